"""The interpreter catches faults that are planted in real kernels."""

import functools

import pytest

pytest.importorskip("triton", reason="triton is not installed: nothing to plant faults in")

from ptx import examples
from ptx.faults import FAULTS
from selection import quick

EXAMPLES = {
    "forward sm_80": lambda: examples.forward(80),
    "backward sm_80": lambda: examples.backward(80),
    "softmax sm_80": lambda: examples.softmax(80, "fp16"),
    "cuda sm_80": lambda: examples.cuda(80),
    "forward sm_90": lambda: examples.forward(90),
    "tma sm_90": lambda: examples.descriptors(90),
    "device tma sm_90": lambda: examples.descriptors(90, host=False),
    "specialised sm_90": lambda: examples.descriptors(90, specialized=True),
}


@functools.cache
def caught(fault):
    """Returns the kinds of findings, with "numbers" if the result is wrong; None without nvcc."""
    example = EXAMPLES[fault.kernel]()
    if example is None:
        return None
    report, error = example.run(fault.edit(example.ptx), "lockstep")
    return report.kinds() | ({"numbers"} if error > 1 else set())


@functools.cache
def without_fault(kernel):
    """Returns the findings without a fault: the specialised kernel has one of its own."""
    example = EXAMPLES[kernel]()
    report, error = example.run(example.ptx, "lockstep")
    assert error < 1
    return report.kinds()


def name_of(fault):
    return f"{fault.kernel}: {fault.name}".replace(" ", "_")


# The first fault of each kind runs each time.
KINDS = {fault.caught_by: fault for fault in reversed(FAULTS)}


@pytest.mark.parametrize("fault", quick(FAULTS, *KINDS.values()), ids=name_of)
def test_fault_is_caught(fault):
    found = caught(fault)
    if found is None:
        pytest.skip("nvcc is not on PATH")
    assert fault.caught_by in found - without_fault(fault.kernel)


@pytest.mark.slow
def test_table_of_faults(capsys):
    """Prints what caught each fault."""
    lines = ["", f"{'kernel':18} {'fault':38} caught by"]
    escaped = []
    for fault in FAULTS:
        found = caught(fault)
        if found is None:
            continue
        found = found - without_fault(fault.kernel)
        lines.append(f"{fault.kernel:18} {fault.name:38} {', '.join(sorted(found)) or 'NOBODY'}")
        escaped += [] if found else [fault]
    with capsys.disabled():
        print("\n".join(lines))
    assert not escaped


def test_numbers_alone_do_not_show_a_missing_barrier():
    """In lockstep the result stays right: only the happens-before check sees these faults."""
    barriers = [f for f in FAULTS if f.caught_by == "shared race" and f.kernel == "forward sm_80"]
    assert barriers and all("numbers" not in caught(fault) for fault in barriers)


def test_a_serial_schedule_turns_a_missing_barrier_into_wrong_numbers():
    example = EXAMPLES["forward sm_80"]()
    fault = next(f for f in FAULTS if f.name == "barrier 0 dropped")
    _, error = example.run(fault.edit(example.ptx), "serial")
    assert error > 1
