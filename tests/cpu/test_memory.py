"""The working memory of a training step never holds a score matrix, whatever is asked.

A child process measures the peak resident size above the inputs, less everything returned (out, dq,
dk, dv, dbias), forward and backward at B1 H8 S3072 D64 float32. PyTorch on the same scale: 44 MiB
plain, 1192 with dropout, 616 with a (1, 8, S, S) bias gradient, 903 for Dv != D, 923 for a 3-D
mask, 80 for a bool mask.
"""

import json
import subprocess
import sys

import pytest

from paths import ROOT
from selection import quick

LIMIT_MIB = 36

CHILD = """
import json, sys
import torch
from fused_attention import attention, scaled_dot_product_attention

case = sys.argv[1]
torch.set_num_threads(2)
S, D = 3072, 64


def make(S):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, S, D).requires_grad_() for _ in range(3))
    options = {"backend": sys.argv[2]}
    call = attention
    if case == "causal":
        options["causal"] = True
    elif case == "dropout":
        options["dropout_p"] = 0.1
    elif case == "bias 1HQK":
        options["bias"] = torch.randn(1, 8, S, S).requires_grad_()
    elif case == "bias 11QK":
        options["bias"] = torch.randn(1, 1, S, S).requires_grad_()
    elif case == "value head_dim":
        v = torch.randn(1, 8, S, 96).requires_grad_()
    elif case == "bool mask":
        options["mask"] = torch.rand(1, 1, S, S) > 0.2
    elif case == "3-D mask":
        call, options = scaled_dot_product_attention, {"attn_mask": torch.rand(8, S, S) > 0.2}
    else:
        assert case == "plain", case
    leaves = [q, k, v] + ([options["bias"]] if "bias" in options else [])
    return call, leaves, options, torch.randn(1, 8, S, v.shape[-1])


def step(call, leaves, options, grad_out):
    out = call(*leaves[:3], **options)
    return (out, *torch.autograd.grad(out, leaves, grad_out))


def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


step(*make(128))  # code, thread pools
inputs = make(S)
with open("/proc/self/clear_refs", "w") as clear_refs:
    clear_refs.write("5")  # the peak starts again
before = resident("VmRSS")
returned = step(*inputs)
peak = resident("VmHWM")
nbytes = sum(x.numel() * x.element_size() for x in returned)
print(json.dumps((peak - before - nbytes) / 2**20))
"""

CASES = [
    "plain",
    "causal",
    "dropout",
    "bias 1HQK",
    "bias 11QK",
    "value head_dim",
    "3-D mask",
    "bool mask",
]


pytestmark = [
    pytest.mark.serial,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]


def extra_mib(case: str, backend: str) -> float:
    run = subprocess.run(
        [sys.executable, "-c", CHILD, case, backend], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    print(f"{case}, {backend}: {run.stdout.strip()} MiB")
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", quick(CASES, "dropout", "bias 11QK", "bool mask"))
def test_a_training_step_holds_no_scores(case):
    assert extra_mib(case, "cpu") <= LIMIT_MIB


def test_the_measurement_sees_scores():
    assert extra_mib("plain", "reference") >= 8 * 3072 * 3072 * 4 / 2**20


@pytest.mark.covering(1)
@pytest.mark.parametrize("row", ["double backward, all", "jvp, with forward", "jvp of grad"])
@pytest.mark.parametrize("case", ["float32", "float32 dropout 0.1"])
def test_second_derivatives_hold_no_scores(case, row):
    """Limits the peak above inputs and results; a score matrix is 288 MiB."""
    script = ROOT / "benchmarks" / "bench_tangents.py"
    command = [sys.executable, str(script), "--memory-of", case, row]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(child.stdout) <= 80
