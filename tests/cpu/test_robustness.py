"""All shapes, strides, devices and modes give the right answer or a clear refusal."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fused_attention import _native, attention
from fused_attention.tools import testing

sizes = st.integers(1, 40)
# The step between the elements of a dimension in memory; 0 repeats one element for all.
spacing = st.sampled_from([1, 1, 1, 2, 3, 0])


@st.composite
def tensors(draw, shape, dtype, order=(0, 1, 2, 3)):
    """Draws a view of random strides: permuted, sliced with steps, expanded, at an odd offset."""
    steps = [draw(spacing) for _ in shape]
    order = draw(st.permutations(range(len(shape))))
    stored = [1 if step == 0 else size * step for size, step in zip(shape, steps, strict=True)]
    offset = draw(st.integers(0, 3))
    flat = torch.randn(int(torch.tensor(stored).prod()) + offset).to(dtype)[offset:]
    view = flat.view([stored[dim] for dim in order])
    view = view.permute(torch.tensor(order).argsort().tolist())
    return view[tuple(slice(None, None, step or None) for step in steps)].expand(shape)


@st.composite
def calls(draw):
    dtype = draw(st.sampled_from(testing.DTYPES))
    batch, heads_kv, group = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
    )
    seqlen_q, seqlen_k, head_dim, head_dim_v = (draw(sizes) for _ in range(4))
    seqlen_k *= draw(st.sampled_from([1, 1, 3]))
    full = (batch, heads_kv * group, seqlen_q, seqlen_k)
    broadcast = st.tuples(*(st.sampled_from([1, size]) for size in full))
    options = {}
    if draw(st.booleans()):
        options["mask"] = draw(tensors(draw(broadcast), torch.float32)) > -0.5
    if draw(st.booleans()):
        bias_dtype = draw(st.sampled_from(testing.DTYPES))
        options["bias"] = draw(tensors(draw(broadcast), bias_dtype))
    if draw(st.booleans()):
        options["key_padding_mask"] = draw(tensors((batch, seqlen_k), torch.float32)) > 0.8
    options["causal"] = draw(st.sampled_from([False, "top_left", "bottom_right"]))
    options["window_size"] = draw(
        st.tuples(*(st.sampled_from([-1, 0, 3, 17, 2**62]) for _ in range(2)))
    )
    qkv = (
        draw(tensors((*full[:3], head_dim), dtype)),
        draw(tensors((batch, heads_kv, seqlen_k, head_dim), dtype)),
        draw(tensors((batch, heads_kv, seqlen_k, head_dim_v), dtype)),
    )
    return qkv, options


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(calls(), st.sampled_from(_native.isas()))
def test_any_shapes_and_strides(call, isa):
    qkv, options = call
    with testing.cpu_isa(isa):
        out, lse = attention(*qkv, **options, return_lse=True, backend="cpu")
    bias = options.pop("bias", None)
    exact, exact_lse = attention(
        *(x.double() for x in qkv),
        **options,
        bias=None if bias is None else bias.double(),
        return_lse=True,
        backend="reference",
    )
    tolerance = 16 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)
    tolerance = 64 * torch.finfo(lse.dtype).eps
    torch.testing.assert_close(lse.double(), exact_lse, atol=tolerance, rtol=tolerance)


def test_meta_tensors_give_shapes():
    query = torch.empty(2, 4, 5, 8, device="meta", dtype=torch.bfloat16)
    key, value = (
        torch.empty(2, 2, 7, 8, device="meta").bfloat16(),
        torch.empty(2, 2, 7, 6, device="meta").bfloat16(),
    )
    out, lse = attention(query, key, value, return_lse=True)
    assert out.shape == (2, 4, 5, 6) and out.dtype == torch.bfloat16 and out.is_meta
    assert lse.shape == (2, 4, 5) and lse.dtype == torch.float32


def test_deterministic_algorithms_are_no_obstacle():
    query, key, value = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    torch.use_deterministic_algorithms(True)
    try:
        out = attention(query, key, value, dropout_p=0.1, backend="cpu")
        out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert query.grad is not None and query.grad.isfinite().all()


def test_flushing_denormals_changes_nothing_that_matters():
    query, key, value = (torch.randn(1, 2, 60, 8) for _ in range(3))
    plain = attention(query, key, value, causal=True, backend="cpu")
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    try:
        flushed = attention(query, key, value, causal=True, backend="cpu")
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(plain, flushed, atol=1e-6, rtol=1e-6)
