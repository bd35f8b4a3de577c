"""Calls that say where their queries, keys and heads begin compute a part of a whole call: in every
backend, for causal, windows, ALiBi and the bits of dropout."""

import itertools

import numpy as np
import pytest
import torch
from packaging.version import Version

from fused_attention import _native, attention, merge_attention_states
from fused_attention.call.options import Options
from fused_attention.call.serve import serve
from fused_attention.operators.arguments import Arguments
from fused_attention.reference import attention_reference
from fused_attention.tools.testing import cpu_isa

DROPOUT = {"dropout_p": 0.3, "philox_seed": 11}
OPTIONS = {
    "causal": {"causal": "top_left"},
    "window": {"window_size": (9, 4)},
    "causal window": {"causal": "top_left", "window_size": (20, -1)},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.02, 0.3, 0.004])},
    "dropout": DROPOUT,
    "everything": {
        **{"causal": "top_left", "window_size": (21, -1), "softcap": 3.0, "sinks": torch.ones(4)},
        **{"alibi_slopes": torch.tensor([0.1, 0.02, 0.3, 0.004]), **DROPOUT},
    },
}
B, HQ, HKV, SQ, SK, D = 2, 4, 2, 71, 83, 24


def qkv(dtype=torch.float32):
    draw = torch.Generator().manual_seed(4)
    shapes = ((B, HQ, SQ, D), (B, HKV, SK, D), (B, HKV, SK, D))
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def close(got, want, dtype):
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-13}.get(dtype, 2e-2)
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_some_queries(options, dtype, isa):
    """Compares forward and gradients; the part with one query runs the decode kernel."""
    q, k, v = (x.requires_grad_() for x in qkv(dtype))
    grad = torch.randn(B, HQ, SQ, D).to(dtype)
    with cpu_isa(isa):
        whole = attention(q, k, v, **OPTIONS[options])
        dq, dk, dv = torch.autograd.grad(whole, (q, k, v), grad)
        sums = [torch.zeros_like(k), torch.zeros_like(v)]
        for first, last in ((0, 1), (1, 32), (32, SQ)):
            part = Options(**OPTIONS[options], q_start=first)
            queries = slice(first, last)
            out = serve(q[:, :, queries], k, v, part, "cpu")
            close(out, whole[:, :, queries], dtype)
            own_dq, *own = torch.autograd.grad(out, (q, k, v), grad[:, :, queries])
            close(own_dq[:, :, queries], dq[:, :, queries], dtype)
            sums = [total + x for total, x in zip(sums, own, strict=True)]
        if dtype != torch.bfloat16:  # bfloat16 sums of parts are rounded more often
            for got, want in zip(sums, (dk, dv), strict=True):
                torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "everything"])
def test_some_keys(options):
    """Merges parts of the keys; with dropout they must begin at multiples of 8."""
    q, k, v = qkv()
    whole, lse = attention(q, k, v, **OPTIONS[options], return_lse=True)
    parts = []
    for first, last in ((0, 16), (16, 40), (40, SK)):
        keys = slice(first, last)
        part = Options(**OPTIONS[options], return_lse=True, k_start=first)
        parts.append(serve(q, k[:, :, keys], v[:, :, keys], part))
    out, merged = merge_attention_states(*zip(*parts, strict=True))
    close(out, whole, torch.float32)
    close(merged, lse, torch.float32)


def test_some_heads_and_some_of_the_batch():
    q, k, v = qkv()
    whole = attention(q, k, v, **DROPOUT)
    for b, heads in itertools.product(range(B), (slice(0, 2), slice(2, 4))):
        keys = slice(heads.start // 2, heads.stop // 2)
        part = Options(**DROPOUT, head_start=b * HQ + heads.start)
        out = serve(q[b : b + 1, heads], k[b : b + 1, keys], v[b : b + 1, keys], part)
        assert torch.equal(out, whole[b : b + 1, heads])


CASES = [
    {"causal": "bottom_right"},
    {"window_size": (3, 60)},
    OPTIONS["alibi"] | {"causal": "top_left"},
    OPTIONS["dropout"],
]
STARTS = [(0, 40, 0), (300, 0, 1), (5, 8, 2**20), (2**29, 2**29 + 8, 3)]


def exact(options, starts):
    names = ("q_start", "k_start", "head_start")
    wide = {name: x.double() for name, x in zip(("query", "key", "value"), qkv(), strict=True)}
    return attention_reference(**wide, **options, **dict(zip(names, starts, strict=True)))


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("starts", STARTS, ids=str)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_kernels_mean_what_the_reference_means(number, starts, isa):
    """The queries may also lie far beyond their keys, or before them."""
    with cpu_isa(isa):
        out = serve(*qkv(), Options(**CASES[number])._replace(
            q_start=starts[0], k_start=starts[1], head_start=starts[2]
        ))  # fmt: skip
    close(out, exact(CASES[number], starts).float(), torch.float32)


@pytest.mark.parametrize("starts", [(-1, 0, 0), (0, 2**30, 0), (0, 4, 0)], ids=str)
def test_starts_without_a_meaning_are_refused(starts):
    with pytest.raises(RuntimeError, match="start: expected"):
        serve(*qkv(), Options(**DROPOUT)._replace(
            q_start=starts[0], k_start=starts[1], head_start=starts[2]
        ))  # fmt: skip


def test_a_part_is_no_other_part():
    """A plan that is remembered for one start does not serve another."""
    q, k, v = qkv()
    results = [serve(q, k, v, Options(causal="top_left", q_start=n)) for n in (0, 7, 0, 7)]
    assert results[0].equal(results[2]) and results[1].equal(results[3])
    assert not results[0].equal(results[1])


def gpu_arguments(options, starts):
    given = dict(options)
    seed = given.pop("philox_seed", None)
    causal = {False: 0, "top_left": 1, "bottom_right": 2}[given.pop("causal", False)]
    left, right = given.pop("window_size", (-1, -1))
    philox = None if seed is None else torch.tensor([seed, 0])
    numbers = Arguments(D**-0.5, causal, left, right, 0)
    return numbers._replace(
        philox=philox, q_start=starts[0], k_start=starts[1], head_start=starts[2], **given
    )


@pytest.mark.covering(1)
@pytest.mark.parametrize("starts", STARTS, ids=str)
@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_triton(number, starts):
    triton = pytest.importorskip("triton")
    if Version(triton.__version__) < Version("3.9") and Version(np.__version__) >= Version("2.4"):
        pytest.skip("the interpreter of Triton 3.6 cannot count its loops with NumPy 2.4")
    from fused_attention.kernels import operators
    from triton_interpreter import quick_calls, repaired_bfloat16

    with repaired_bfloat16(), quick_calls():
        out, _ = operators.attention_forward(*qkv(), *gpu_arguments(CASES[number], starts))
    close(out, exact(CASES[number], starts).float(), torch.float32)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_cuda(number):
    import cuda_interpreter

    if cuda_interpreter.NVCC is None:
        pytest.skip("no nvcc")
    cuda_interpreter.library()
    starts = STARTS[number]
    q, k, v = (x.half() for x in qkv())
    with cuda_interpreter.interpreted() as runs:
        out, _ = torch.ops.fused_attention_cuda.attention_forward(
            q, k, v, *gpu_arguments(CASES[number], starts)
        )
    assert not [finding for run in runs for finding in run.report.findings]
    close(out.float(), exact(CASES[number], starts).float(), torch.float16)
