"""Tests of the CUDA kernels of masked softmax: the public functions launch them, and the PTX
interpreter runs what nvcc compiles for sm_80. The checks are those of softmax_checks.py and
softmax_suite.py.
"""

import pytest
import torch

pytest.importorskip("triton", reason="softmax_suite.py imports the Triton kernels")

import cuda_interpreter
import fused_attention as fa
from cuda_interpreter import interpreted
from fused_attention import operators as ops
from fused_attention.operators import cuda, gpu
from ptx import SCHEDULES, faults
from selection import quick
from softmax_checks import PHILOX, check, randn
from softmax_suite import (  # noqa: F401
    test_a_visible_nan_propagates_in_its_row_only,
    test_any_rank,
    test_dropout_bits_are_those_of_the_cpu,
    test_empty,
    test_every_broadcast_shape,
    test_features_together,
    test_gradient_of_a_bias_in_any_number_of_parts,
    test_hidden_values_influence_nothing,
    test_in_place,
    test_large_logits,
)

pytestmark = pytest.mark.skipif(cuda_interpreter.NVCC is None, reason="nvcc not found")
OPS = torch.ops.fused_attention_cuda


@pytest.fixture(autouse=True)
def runs(monkeypatch):
    """Yields the launches of a test, and fails the test if one of them has a finding."""
    cuda_interpreter.library()
    monkeypatch.setattr(ops, "softmax_forward", OPS.masked_softmax_forward)
    monkeypatch.setattr(ops, "softmax_backward", OPS.masked_softmax_backward)
    monkeypatch.setattr(ops, "softmax_in_place", OPS.masked_softmax_)
    with interpreted() as launches:
        yield launches
    found = [f"{run.kernel}: {finding}" for run in launches for finding in run.report.findings]
    assert not found, "\n".join(found)


@pytest.fixture(params=["one block"])
def blocks(request):
    """The fixture that softmax_suite.py needs. It has one value: these kernels divide a row by its
    length alone."""


# Number of columns: the variant of the kernel that serves it.
LENGTHS = {
    1: "32, true", 17: "32, true", 1024: "32, true", 1025: "256, true", 8192: "256, true",
    8200: "256, false", 20001: "256, false",
}  # fmt: skip


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", quick(LENGTHS, 17, 1025, 8200))
def test_row_lengths(runs, N, dtype):
    x = randn(3, N, dtype=dtype)
    x[0, N // 2 :] += 5  # the maximum grows on the way
    mask = torch.rand(3, N) > 0.3
    assert not check(x, mask, scale=0.7)
    assert not check(x, bias=randn(N), dropout_p=0.3)
    names = {run.kernel for run in runs}
    type_ = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}[dtype]
    for kernel in ("masked_softmax_kernel", "masked_softmax_backward_kernel"):
        assert f"{kernel}<{type_}, {LENGTHS[N]}>" in names


@pytest.mark.parametrize("N", quick([40, 2000, 9000], 9000))
def test_rows_at_any_address(N):
    """Covers rows that do not start at a multiple of 16 bytes, and strided rows."""
    whole = randn(4, N + 3, dtype=torch.float16)
    for x in (whole[:, 3:], whole[:, 1 : N - 5], whole[::2, :N]):
        assert not check(x, torch.rand(x.shape[-1]) > 0.3)


def test_what_serves_a_gpu(monkeypatch):
    """The CUDA library serves its operators if it is installed; Triton serves all others."""
    from fused_attention.kernels import operators

    gpu.gpu_kernel.cache_clear()
    monkeypatch.setattr(cuda, "missing", lambda: "")
    assert gpu.gpu_kernel("masked_softmax_forward") is OPS.masked_softmax_forward
    assert gpu.gpu_kernel("attention_weights") is operators.attention_weights
    gpu.gpu_kernel.cache_clear()
    monkeypatch.setattr(cuda, "missing", lambda: "not built")
    assert gpu.gpu_kernel("masked_softmax_forward") is operators.masked_softmax_forward
    gpu.gpu_kernel.cache_clear()


def test_the_schemas_are_those_of_the_cpu():
    for name in gpu.IN_CUDA_LIBRARY:
        ours = getattr(OPS, name).default._schema
        theirs = getattr(torch.ops.fused_attention, name).default._schema
        assert str(ours).split("(", 1)[1] == str(theirs).split("(", 1)[1]


@pytest.mark.parametrize("schedule", quick(SCHEDULES, "random"))
def test_every_order_of_the_warps(monkeypatch, schedule):
    with interpreted(schedule) as launches:
        x, sinks = randn(1, 2, 2, 1500), randn(2)
        assert not check(x, bias=randn(2, 1, 1), sinks=sinks, causal="bottom_right")
    assert launches and not [f for run in launches for f in run.report.findings]


def test_the_bits_are_the_same_each_time():
    x = randn(5, 3000)
    first, again = (fa.masked_softmax(x, dropout_p=0.1, philox_seed=PHILOX) for _ in range(2))
    assert torch.equal(first, again)


FAULTS = {
    "no barrier before the warps' results are read": (faults.drop(faults.BAR, 1), "finding"),
    "columns beyond the last one": (
        faults.everywhere(r"min\.s64(\s+%rd\d+), %rd\d+, 8;", r"mov.b64\1, 8;"), "numbers"
    ),
    "a sum of other lanes": (
        faults.replace(r"(shfl\.sync\.bfly\.b32\s+%r\d+\|%p\d+, %r\d+, )%r\d+", r"\g<1>4", -1),
        "numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name):
    edit, caught_by = FAULTS[name]
    x = randn(2, 1500)
    with interpreted(edit=edit) as launches:
        out, _, _ = ops.softmax_forward(x, 1.0, 0, False)
    found = [f for run in launches for f in run.report.findings]
    wrong = not torch.allclose(out, x.softmax(-1), atol=1e-5)
    assert {"finding": found, "numbers": wrong, "any": found or wrong}[caught_by]
