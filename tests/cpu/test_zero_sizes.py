"""Tensors without elements: results that have elements are right, and the time depends on the
elements, not on the sizes. Memory that an operator leaves unwritten is NaN here."""

import contextlib
import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_attention import (
    attention,
    dropout_mask,
    kv_cache_append_,
    masked_softmax,
    masked_softmax_,
    reference,
)
from fused_attention import operators as ops
from fused_attention.attention_weights import attention_with_weights
from fused_attention.tools import testing


@contextlib.contextmanager
def unwritten_is_nan():
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled


SIZES = [0, 0, 1, 3]


@st.composite
def calls(draw):
    torch.manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(testing.DTYPES))
    B, Sq, Sk, Hq = (draw(st.sampled_from(SIZES)) for _ in range(4))
    Hkv = draw(st.sampled_from([0, 1, 2] if Hq == 0 else [h for h in (1, 3) if Hq % h == 0]))
    D, Dv = (draw(st.sampled_from([0, 1, 8, 8])) for _ in range(2))
    tensors = {
        "query": torch.randn(B, Hq, Sq, D),
        "key": torch.randn(B, Hkv, Sk, D),
        "value": torch.randn(B, Hkv, Sk, Dv),
    }
    options = {"causal": draw(st.sampled_from([False, "bottom_right"]))}
    if draw(st.booleans()):
        shape = [draw(st.sampled_from([1, size])) for size in (B, Hq, Sq, Sk)]
        tensors["bias"] = torch.randn(shape)
    if draw(st.booleans()):
        tensors["sinks"] = torch.randn(Hq)
    if draw(st.booleans()):
        options["dropout_p"], options["philox_seed"] = 0.5, 3
    if draw(st.integers(0, 3)) == 0:
        options["seqused_k"] = torch.randint(0, Sk + 1, (B,)).int()
    tensors = {name: x if name == "sinks" else x.to(dtype) for name, x in tensors.items()}
    if dtype == torch.float64 and "sinks" in tensors:
        tensors["sinks"] = tensors["sinks"].double()
    return tensors, options


def differentiated(function, tensors, options):
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out, lse = function(**leaves, **options, return_lse=True)
    finite = lse.masked_fill(lse.isinf(), 0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        weights = torch.randn_like(out), torch.randn_like(lse)
    gradients = torch.autograd.grad((out, finite), list(leaves.values()), weights)
    return dict(zip(("out", "lse", *leaves), (out, lse, *gradients), strict=True))


@given(call=calls())
def test_all_results_of_attention(call):
    tensors, options = call
    want = differentiated(reference.attention_reference, tensors, options)
    dtype = tensors["query"].dtype
    tolerance = 64 * torch.finfo(dtype).eps
    with unwritten_is_nan():
        got = differentiated(attention, tensors, options)
        for name, x in got.items():
            torch.testing.assert_close(x, want[name], atol=tolerance, rtol=tolerance, msg=name)
        with torch.no_grad():
            out = attention(**tensors, **options)
            torch.testing.assert_close(out, want["out"], atol=tolerance, rtol=tolerance)
        if "seqused_k" not in options:
            for average in (False, True):
                _, weights = attention_with_weights(**tensors, **options, average=average)
                assert weights.isfinite().all()
                if average and tensors["query"].shape[1] == 0:
                    assert (weights == 0).all()


@given(call=calls(), direction=st.booleans())
def test_derivatives_of_derivatives(call, direction):
    tensors, options = call
    options.pop("seqused_k", None)
    if not 1 <= tensors["query"].shape[-1]:
        return  # only the reference serves head_dim 0
    with unwritten_is_nan():
        if direction:
            names = list(tensors)

            def function(*inputs):
                return attention(**dict(zip(names, inputs, strict=True)), **options)

            inputs = tuple(tensors.values())
            out, tangent = torch.func.jvp(function, inputs, tuple(map(torch.randn_like, inputs)))
            assert out.isfinite().all() and tangent.isfinite().all()
            return
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        out = attention(**leaves, **options)
        first = torch.autograd.grad(out.square().sum(), leaves.values(), create_graph=True)
        total = sum(x.square().sum() for x in first)
        if total.requires_grad:
            second = torch.autograd.grad(total, leaves.values(), allow_unused=True)
            assert all(x is None or x.isfinite().all() for x in second)


@pytest.mark.parametrize("Hkv", [1, 4])
@pytest.mark.parametrize("B", [0, 2])
def test_gradients_of_no_heads_are_zero(isa, B, Hkv):
    query = torch.randn(B, 0, 5, 8, requires_grad=True)
    key, value = (torch.randn(B, Hkv, 7, 8, requires_grad=True) for _ in range(2))
    with unwritten_is_nan():
        out, lse = attention(query, key, value, return_lse=True, backend="cpu")
        gradients = torch.autograd.grad((out.sum() + lse.sum()), (query, key, value))
    assert all((x == 0).all() for x in gradients)


@given(
    sizes=st.tuples(*(st.sampled_from([0, 1, 2, 4]),) * 4),
    lengths=st.lists(st.integers(0, 3), max_size=3),
)
def test_packed_sequences(sizes, lengths):
    rest, Hkv, group, D = sizes
    if D == 0:
        return
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)]).int()
    tokens = sum(lengths) + rest
    query = torch.randn(tokens, Hkv * group, D, requires_grad=True)
    key, value = (torch.randn(tokens, Hkv, D, requires_grad=True) for _ in range(2))
    options = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    with unwritten_is_nan():
        out, lse = attention(query, key, value, **options, return_lse=True, backend="cpu")
        gradients = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(x.isfinite().all() for x in (out, *gradients))
    assert (out[sum(lengths) :] == 0).all() and (lse[:, sum(lengths) :] == -torch.inf).all()


@given(
    shape=st.lists(st.sampled_from([0, 1, 3]), min_size=1, max_size=4),
    sinks=st.booleans(),
    masked=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.5]),
)
def test_masked_softmax(shape, sinks, masked, dropout_p):
    options = {"dropout_p": dropout_p, "philox_seed": 1}
    x = torch.randn(shape, requires_grad=True)
    leaves = [x]
    if sinks and len(shape) >= 3:
        leaves.append(torch.randn(shape[-3], requires_grad=True))
        options["sinks"] = leaves[-1]
    if masked:
        leaves.append(torch.randn([1] + shape[1:], requires_grad=True))
        options["mask"] = leaves[-1]
    with unwritten_is_nan():
        out = masked_softmax(x, **options)
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        assert all(y.isfinite().all() for y in (out, *gradients))
        with torch.no_grad():
            assert torch.equal(masked_softmax_(x.detach().clone(), **options), out)


# -- Huge sizes, but no elements -------------------------------------------------------------

HUGE = 2**50


def empty(*shape):
    """Returns a tensor of any size in the memory of few elements."""
    return torch.empty([1 if size == HUGE else size for size in shape]).expand(shape)


NOTHING = {
    "a dropout mask": lambda: dropout_mask(1, HUGE, 1, 0, 0.5, 1),
    "a batch without queries": lambda: attention(
        empty(HUGE, 1, 0, 8), empty(HUGE, 1, 4, 8), empty(HUGE, 1, 4, 8), backend="cpu"
    ),
    "heads without queries": lambda: attention(
        empty(1, HUGE, 0, 8), empty(1, HUGE, 4, 8), empty(1, HUGE, 4, 8), return_lse=True
    ),
    "values without columns": lambda: ops.forward_plain(
        empty(HUGE, 1, 3, 8), empty(HUGE, 1, 4, 8), empty(HUGE, 1, 4, 0), 1.0, 0, -1, -1, 0
    ),
    "weights of no keys": lambda: ops.weights(
        empty(HUGE, 1, 0, 8), empty(HUGE, 1, 0, 8), empty(HUGE, 1, 0), False, 1.0, 0, -1, -1, 0
    ),
    "rows without columns": lambda: masked_softmax(empty(HUGE, 0)),
    "rows without columns in place": lambda: masked_softmax_(torch.empty(HUGE, 0)),
    "rows without columns in many dimensions": lambda: masked_softmax(empty(4, HUGE, 1024, 0)),
    "new tokens without columns": lambda: kv_cache_append_(
        *(torch.empty(1, HUGE, 9, 0),) * 2, *(torch.empty(1, HUGE, 1, 0),) * 2, torch.zeros(1).int()
    ),
}


@pytest.mark.parametrize("what", NOTHING)
def test_nothing_takes_no_time(what):
    NOTHING[what]()


def test_the_backward_of_no_queries_takes_no_time():
    for shape in ((HUGE, 1, 0, 8), (1, HUGE, 0, 8)):
        inputs = [empty(*shape).requires_grad_() for _ in range(3)]
        out, lse = attention(*inputs, return_lse=True, backend="cpu")
        gradients = torch.autograd.grad((out, lse), inputs, (out, lse))
        assert all(x.shape == shape for x in gradients)
        out, tangent = torch.func.jvp(
            lambda *x: attention(*x, backend="cpu"),
            tuple(inputs),
            tuple(map(torch.zeros_like, inputs)),
        )
        assert tangent.shape == shape


TOO_MUCH = {
    "the output": lambda: attention(
        empty(HUGE, 1, 1, 8), empty(HUGE, 1, 4, 8), empty(HUGE, 1, 4, 8), backend="cpu"
    ),
    "a dropout mask": lambda: dropout_mask(HUGE, 1, 1, 1, 0.5, 1),
    "the attention weights": lambda: ops.weights(
        empty(HUGE, 1, 1, 8), empty(HUGE, 1, 1, 8), empty(HUGE, 1, 1), False, 1.0, 0, -1, -1, 0
    ),
    "the softmax": lambda: masked_softmax(empty(HUGE, 1)),
    "the gradient of key": lambda: ops.backward(
        empty(HUGE, 1, 0, 1), None, empty(HUGE, 1, 0, 1), empty(HUGE, 1, 1, 1),
        empty(HUGE, 1, 1, 1), empty(HUGE, 1, 0, 1), empty(HUGE, 1, 0), 1.0, 0, -1, -1, 0,
    ),
    "a copy of lengths": lambda: attention(
        empty(HUGE, 1, 0, 8), empty(HUGE, 1, 4, 8), empty(HUGE, 1, 4, 8), backend="cpu",
        seqused_k=torch.zeros(1).int().expand(HUGE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TOO_MUCH)
def test_what_memory_lacks_is_named(what):
    with pytest.raises(RuntimeError) as caught:
        TOO_MUCH[what]()
    text = str(caught.value)
    assert text.startswith(f"not enough memory for {what}") and "MiB" in text
    assert "aoti" not in text and "csrc" not in text
    assert not isinstance(caught.value, ValueError)  # no argument is wrong


WORKSPACE = """
import resource, torch
from fused_attention import attention
torch.set_num_threads(1)
q = torch.randn(1, 1, 2, 1, requires_grad=True)
k = torch.randn(1, 1, 1 << 21, 1)
bias = torch.zeros(1, 1, 2, 1 << 21, requires_grad=True)
few = attention(q, k[:, :, :9], k[:, :, :9], bias=bias[..., :9])
torch.autograd.grad(few.sum(), bias)  # everything is loaded
out = attention(q, k, k, bias=bias)
with open("/proc/self/status") as status:
    size = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size + (100 << 20), -1))
try:
    torch.autograd.grad(out.sum(), bias)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_workspace_that_finds_no_memory_is_named():
    done = subprocess.run([sys.executable, "-c", WORKSPACE], capture_output=True, text=True)
    assert done.stdout.startswith("not enough memory for the workspace of a thread: "), done.stderr
    assert "MiB. Hint: " in done.stdout
