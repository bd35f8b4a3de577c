"""Faults planted in the PTX of our kernels are caught: by a finding, or by wrong numbers."""

import functools
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: nothing to plant faults in")

from fused_attention.kernels import operators
from fused_attention.tools import testing
from ptx.device import Execution, PTXDevice, execute_launch
from ptx.kernel_cases import COVERING
from ptx.kernel_faults import FAULTS
from softmax_checks import PHILOX
from triton_calls import run

pytestmark = pytest.mark.timeout(3600)  # a cold cache on a busy machine

# kernel -> the case of COVERING (or "softmax", "keep mask") that starts it
WHERE = {
    **dict.fromkeys(("forward", "delta", "dkdv", "dq"), "causal, gqa"),
    **dict.fromkeys(("dbias", "dsinks"), "everything"),
    **dict.fromkeys(("softmax", "softmax backward", "softmax dbias", "softmax dsinks"), "softmax"),
    "keep mask": "keep mask",
}
NAMES = {
    "softmax": "masked_softmax_kernel",
    "softmax backward": "masked_softmax_backward_kernel",
    "softmax dbias": "masked_softmax_dbias_kernel",
    "softmax dsinks": "masked_softmax_dsinks_kernel",
    "keep mask": "dropout_keep_mask_kernel",
}


def tensors_of(x):
    """Returns the tensors in (nested) arguments, one for each storage."""
    if isinstance(x, torch.Tensor):
        return {x.untyped_storage().data_ptr(): x}
    found = {}
    for part in x if isinstance(x, tuple) else ():
        found |= tensors_of(part)
    return found


def contents(launch):
    return {key: x.untyped_storage().clone() for key, x in tensors_of(launch.args).items()}


@dataclass(frozen=True)
class Recorded:
    """An execution, and the contents of its tensors before and after it."""

    execution: Execution
    before: dict
    after: dict

    def differs(self):
        """Whether the tensors now hold other numbers than after the sound execution."""
        for key, x in tensors_of(self.execution.launch.args).items():
            want = torch.empty(0, dtype=x.dtype).set_(self.after[key])
            got = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
            if not torch.allclose(got.double(), want.double(), 1e-2, 1e-3, equal_nan=True):
                return True
        return False


def work(name):
    if name == "softmax":
        x, mask = torch.randn(2, 3, 5, 70), torch.rand(2, 1, 5, 70) > 0.4
        bias, sinks = torch.randn(3, 1, 70), torch.randn(3)
        options = (0.7, 2, True, mask, bias, sinks, PHILOX, 0.25)
        _, weights, share = operators.masked_softmax_forward(x, *options)
        operators.masked_softmax_backward(
            torch.randn_like(x), weights, 0.7, 2, bias, share, PHILOX, 0.25, True, True
        )
    elif name == "keep mask":
        operators.dropout_keep_mask(PHILOX, 0.3, 2, 3, 17, 133)
    else:
        run(testing.make_inputs(COVERING[name]))


@functools.cache
def recorded(target, name):
    befores = []
    with PTXDevice(target, before=lambda launch: befores.append(contents(launch))) as device:
        work(name)
    assert not device.findings()
    return {
        one.name: Recorded(one, before, contents(one.launch))
        for one, before in zip(device.executions, befores, strict=True)
    }


@functools.cache
def caught(fault):
    """Returns the kinds of findings, with "numbers" if the result differs."""
    name = NAMES.get(fault.kernel, f"attention_{fault.kernel}_kernel")
    sound = recorded(fault.target, WHERE[fault.kernel])[name]
    one = sound.execution
    for key, x in tensors_of(one.launch.args).items():
        x.untyped_storage().copy_(sound.before[key])
    report = execute_launch(one.launch, one.compiled, ptx=fault.edit(one.compiled))
    found = report.kinds() | ({"numbers"} if sound.differs() else set())
    for key, x in tensors_of(one.launch.args).items():
        x.untyped_storage().copy_(sound.after[key])
    return found


KERNELS = sorted({(fault.target, fault.kernel) for fault in FAULTS})
FAST = [("sm_80", "softmax"), ("sm_90", "keep mask")]


@pytest.mark.parametrize(
    "target, kernel",
    [
        pytest.param(*one, id="-".join(one), marks=() if one in FAST else pytest.mark.slow)
        for one in KERNELS
    ],
)
def test_table_of_faults(capsys, target, kernel):
    """Each fault is caught by what should catch it; the test prints what caught each fault."""
    faults = [fault for fault in FAULTS if (fault.target, fault.kernel) == (target, kernel)]
    with capsys.disabled():
        for fault in faults:
            who = ", ".join(sorted(caught(fault))) or "NOBODY"
            print(f"\n{target:7}{kernel:18}{fault.name:36}{who}", end="")
    assert not [fault.name for fault in faults if fault.caught_by not in caught(fault)]
