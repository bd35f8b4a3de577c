"""Runs kernels of two compilers under every schedule: results as in float64, and no finding."""

import itertools

import pytest

from ptx import SCHEDULES

pytest.importorskip("triton", reason="triton is not installed: nothing to compile the kernels with")

from ptx import examples


def check(example, schedule):
    if example is None:
        pytest.skip("nvcc is not on PATH")
    report, error = example.run(example.ptx, schedule)
    assert not report.findings, "\n".join(map(str, report.findings))
    assert error < 1
    return report


TARGETS = pytest.mark.parametrize("target", [80, 90])
DTYPES = pytest.mark.parametrize("dtype", examples.TYPES)
# Schedules matter to the synchronisation, which is the same for each type.
FAST = [("bf16", "lockstep"), ("fp32", "random"), ("fp16", "serial"), ("fp16", "reverse")]
DTYPES_AND_SCHEDULES = pytest.mark.parametrize(
    "dtype, schedule",
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
        for case in itertools.product(examples.TYPES, SCHEDULES)
    ],
)


@DTYPES_AND_SCHEDULES
@TARGETS
def test_forward(target, dtype, schedule):
    report = check(examples.forward(target, dtype), schedule)
    used = {opcode.split(".")[0] for opcode in report.opcodes}
    assert {"wgmma" if target == 90 else "mma", "cp"} <= used


@DTYPES
@TARGETS
def test_causal_forward(target, dtype):
    check(examples.forward(target, dtype, causal=True), "lockstep")


@TARGETS
def test_dropout_equals_an_independent_philox(target):
    check(examples.forward(target, dropout=True, heads=1, seqlen_q=40, seqlen_k=50), "lockstep")


@DTYPES_AND_SCHEDULES
@TARGETS
def test_backward(target, dtype, schedule):
    check(examples.backward(target, dtype), schedule)


@DTYPES
@TARGETS
def test_softmax_of_strided_rows(target, dtype):
    check(examples.softmax(target, dtype), "random")


@pytest.mark.parametrize("schedule", SCHEDULES)
@TARGETS
def test_many_operations(target, schedule):
    check(examples.many_operations(target), schedule)


@pytest.mark.covering
@pytest.mark.parametrize("host", [True, False], ids=["host", "device"])
@pytest.mark.parametrize(
    "dtype, dim",
    [("fp16", 64), ("bf16", 128), ("fp32", 64), pytest.param("fp32", 128, marks=pytest.mark.slow)],
)
@TARGETS
def test_descriptors(target, dtype, dim, host):
    report = check(examples.descriptors(target, dtype, dim, host), "lockstep")
    assert (target == 90) == any("bulk.tensor" in opcode for opcode in report.opcodes)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tensor_copies_under_every_schedule(schedule):
    check(examples.descriptors(90), schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "host",
    [pytest.param(True, id="host"), pytest.param(False, id="device", marks=pytest.mark.slow)],
)
def test_warp_specialisation(host, schedule):
    """Triton 3.9 lets both consumer warpgroups compute and store the same tile: one finding."""
    example = examples.descriptors(90, host=host, specialized=True)
    report, error = example.run(example.ptx, schedule)
    assert error < 1
    assert report.kinds() == {"global race"}
    assert all("cp.async.bulk.tensor" in finding.where for finding in report.findings)
    assert any(opcode.startswith("setmaxnreg") for opcode in report.opcodes)


@pytest.mark.covering
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@TARGETS
def test_cuda(target, causal, schedule):
    check(examples.cuda(target, causal), schedule)


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(lambda: examples.forward(120), id="forward-120"),
        pytest.param(lambda: examples.descriptors(120), id="descriptors-120"),
        pytest.param(lambda: examples.softmax(100, "bf16"), id="softmax-100"),
    ],
)
def test_newer_targets(example):
    """sm_120 has mma.sync and TMA; on sm_100 only kernels without tcgen05 run."""
    report = check(example(), "lockstep")
    assert any("f32x2" in opcode for opcode in report.opcodes)
