"""Tests torch.jit.trace, and the ONNX exporter built on it, with every public function."""

import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attention import (
    MultiheadAttention,
    attention,
    dropout_mask,
    kv_cache_append_,
    masked_softmax,
    masked_softmax_,
    patch_sdpa,
    replace_multihead_attention,
    scaled_dot_product_attention,
    scaled_masked_softmax,
)
from fused_attention.attention_weights import attention_with_weights

MASK, BIAS = torch.arange(7) % 3 != 1, torch.randn(4, 1, 7)
LENGTHS = torch.tensor([5, 7]).int()
STARTS = torch.tensor([0, 3, 7]).int()


def packed(q, k, v):
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    return attention(q, k, v, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS, max_seqlen_q=4)


def appended(q, k, v):
    caches = [torch.zeros(2, 4, 20, 8) for _ in range(2)]
    kv_cache_append_(*caches, k.detach(), v.detach(), LENGTHS)
    return attention(q, *caches, seqused_k=LENGTHS + k.shape[2])


DOORS = {
    "attention": lambda q, k, v: attention(q, k, v),
    "causal": lambda q, k, v: attention(q, k, v, causal=True, window_size=(3, 0), softcap=4.0),
    "lse": lambda q, k, v: attention(q, k, v, return_lse=True)[1],
    "mask": lambda q, k, v: attention(q, k, v, mask=MASK, bias=BIAS),
    "used lengths": lambda q, k, v: attention(q, k, v, seqused_k=LENGTHS, causal="bottom_right"),
    "packed": packed,
    "dropout": lambda q, k, v: attention(q, k, v, dropout_p=0.5, philox_seed=3),
    "cache": appended,
    "weights": lambda q, k, v: attention_with_weights(q, k, v, average=False)[1],
    "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
    "sdpa, 2-D": lambda q, k, v: scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0]),
    "sdpa, 3-D": lambda q, k, v: scaled_dot_product_attention(q[0], k[0], v[0], MASK),
    "sdpa, 5-D": lambda q, k, v: scaled_dot_product_attention(q[None], k[None], v[None]),
    "sdpa, broadcast": lambda q, k, v: scaled_dot_product_attention(q, k[:1], v[:1, :1]),
    "softmax": lambda q, k, v: masked_softmax(q, BIAS[..., :1], causal="top_left"),
    "softmax, dropout": lambda q, k, v: masked_softmax(q, dropout_p=0.5, philox_seed=3),
    "softmax in place": lambda q, k, v: masked_softmax_(q.detach().clone()) * k,
    "Megatron's": lambda q, k, v: scaled_masked_softmax(q, None, 0.5),
}  # fmt: skip
ON_SIZES = {"mask", "packed", "used lengths", "cache", "sdpa, 3-D", "sdpa, 5-D", "sdpa, broadcast"}


def traced(function, *inputs):
    """Traces `function`, saves and loads the trace. A warning that it may not generalize fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", "torch.tensor results are registered as constants")
        trace = torch.jit.trace(function, inputs)
        file = io.BytesIO()
        torch.jit.save(trace, file)
        file.seek(0)
        return torch.jit.load(file)


def qkv(length=7, requires_grad=False):
    return [torch.randn(2, 4, length, 8, requires_grad=requires_grad) for _ in range(3)]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_a_trace_computes_the_same(door, requires_grad):
    function = DOORS[door]
    trace = traced(function, *qkv(requires_grad=requires_grad))
    for length in (7,) if door in ON_SIZES else (7, 12):
        inputs = qkv(length, requires_grad=True)
        out, expected = trace(*inputs), function(*inputs)
        torch.testing.assert_close(out, expected)
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, inputs, grad, allow_unused=True)
        want = torch.autograd.grad(expected, inputs, grad, allow_unused=True)
        torch.testing.assert_close(got, want)


def models():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return {
        "MultiheadAttention": MultiheadAttention(32, 4, batch_first=True),
        "encoder": replace_multihead_attention(
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        ),
    }


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("grad", [False, True])
def test_modules_trace(name, grad):
    model = models()[name].eval()
    inputs = [torch.randn(2, 6, 32)] * (3 if name == "MultiheadAttention" else 1)
    with torch.set_grad_enabled(grad):
        trace = traced(model, *inputs)
        torch.testing.assert_close(trace(*inputs), model(*inputs))


def test_a_patched_model_traces():
    model = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    inputs = qkv(requires_grad=True)
    with patch_sdpa():
        trace = traced(model, *inputs)
    assert "fused_attention::" in str(trace.graph)
    torch.testing.assert_close(trace(*inputs), model(*inputs))


def test_masks_of_dropout_trace():
    trace = traced(lambda x: dropout_mask(2, 4, 7, 8, 0.5, 3) * x, torch.ones(2, 4, 7, 8))
    assert torch.equal(trace(torch.ones(2, 4, 7, 8)).bool(), dropout_mask(2, 4, 7, 8, 0.5, 3))


@pytest.mark.parametrize("door", [*DOORS, *models(), "patched"])
def test_an_export_to_onnx_meets_pytorchs_operators_only(door, monkeypatch):
    if door in ("cache", "packed", "dropout", "softmax, dropout"):
        pytest.skip("no form in ONNX: lengths, random bits and writing to an argument")
    function = DOORS.get(door) or models().get(door)
    inputs = qkv()
    if door == "patched":
        function = lambda q, k, v: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
    elif door not in DOORS:
        inputs = [torch.randn(2, 6, 32)] * (3 if door == "MultiheadAttention" else 1)
        function = function.eval()
    expected = function(*inputs)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with warnings.catch_warnings(), patch_sdpa() if door == "patched" else torch.no_grad():
        warnings.simplefilter("ignore")
        trace = torch.jit.trace(function, tuple(inputs), check_trace=False)
    assert "fused_attention::" not in str(trace.inlined_graph)
    torch.testing.assert_close(trace(*inputs), expected)
