"""Calls of the CUDA library's operators with `testing.Inputs`, without a GPU.

The PTX interpreter runs the launches, or they are only recorded.
"""

import contextlib
import dataclasses

import torch

import cuda_interpreter
from cuda_interpreter import interpreted
from operator_calls import arguments

OPS = torch.ops.fused_attention_cuda

PLAIN_NUMBERS = (0.125, 0, -1, -1, 0)


def run(inputs, precision=0, gradients=True, schedule="lockstep", edit=None, capability=80):
    """Returns results by name, as `testing.run` does, and the launches."""
    cuda_interpreter.library()
    q, k, v = (inputs.tensors[name] for name in ("query", "key", "value"))
    call = arguments(inputs, precision)
    with interpreted(schedule, edit, capability) as runs:
        out, lse = OPS.attention_forward(q, k, v, *call)
        results = {"out": out, "lse": lse}
        if gradients:
            grad_lse = inputs.grad_lse.masked_fill(lse.isinf(), 0.0)
            wanted = ["bias" in inputs.tensors, "sinks" in inputs.tensors]
            grads = OPS.attention_backward(
                inputs.grad_out, grad_lse, q, k, v, out, lse, *call, *(None,) * 6, 0, 0, 0, *wanted
            )
            named = dict(zip(("query", "key", "value", "bias", "sinks"), grads, strict=True))
            results |= {f"d{name}": named[name] for name in inputs.tensors}
    return results, runs


def start(inputs):
    """Calls the operators that `run` calls, under the substitute of the caller."""
    q, k, v = (inputs.tensors[name] for name in ("query", "key", "value"))
    call = (*arguments(inputs), *(None,) * 6, 0, 0, 0)
    out, lse = OPS.attention_forward(q, k, v, *call)
    wanted = ["bias" in inputs.tensors, "sinks" in inputs.tensors]
    OPS.attention_backward(inputs.grad_out, inputs.grad_lse, q, k, v, out, lse, *call, *wanted)


def findings(runs):
    return [f"{run.kernel}: {finding}" for run in runs for finding in run.report.findings]


def small(case):
    """Returns the case with at most two blocks of queries and of keys: the interpreter takes at
    least 0.1 s per block."""
    Hkv, group = min(case.Hkv, 2), min(case.Hq // case.Hkv, 2)
    return dataclasses.replace(
        case, B=1, Hq=Hkv * group, Hkv=Hkv, Sq=min(case.Sq, 70), Sk=min(case.Sk, 140)
    )


@contextlib.contextmanager
def recording(compute_capability):
    """Records launches as (kernel, blocks, threads, bytes of shared memory), and runs none."""
    launches = []

    @cuda_interpreter.SUBSTITUTE
    def record(kernel, blocks, threads, shared_bytes, params):
        launches.append((kernel.decode(), blocks, threads, shared_bytes))

    set_substitute = cuda_interpreter.library().fused_attention_cuda_substitute
    set_substitute(record, compute_capability)
    try:
        yield launches
    finally:
        set_substitute(None, 0)
