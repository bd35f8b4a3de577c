"""Attention's backward beside PyTorch's, and forward with backward where PyTorch has no fused
kernel (dropout, a bias with a gradient): results/backward.csv.

With --isa both sides are limited to that instruction set: results/backward_<isa>.csv.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
# The environment variables that limit PyTorch, oneDNN and MKL to an instruction set. Ours is added.
HELD = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "auto": {},
}
# Shapes [B, H, S, D] and options of attention(); whether the forward is timed too.
CASES = {
    "full (8, 12, 512, 64)": ((8, 12, 512, 64), {}, False),
    "full (1, 8, 2048, 64)": ((1, 8, 2048, 64), {}, False),
    "full (1, 2, 2048, 64)": ((1, 2, 2048, 64), {}, False),
    "causal (8, 12, 512, 64)": ((8, 12, 512, 64), {"causal": "top_left"}, False),
    "causal (1, 8, 2048, 64)": ((1, 8, 2048, 64), {"causal": "top_left"}, False),
    "dropout (8, 12, 512, 64)": ((8, 12, 512, 64), {"dropout_p": 0.1}, True),
    "bias (8, 12, 512, 64)": ((8, 12, 512, 64), {"bias": True}, True),
}


def calls_of(shape, options, with_forward, dtype) -> dict[str, Callable[[], object]]:
    import torch
    import torch.nn.functional as F

    from fused_attention import attention

    leaves = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    grad_out = torch.randn(shape).to(dtype)
    ours, theirs = dict(options), {"dropout_p": options.get("dropout_p", 0.0)}
    theirs["is_causal"] = "causal" in options
    if "bias" in options:
        bias = torch.randn(1, shape[1], shape[2], shape[2]).to(dtype).requires_grad_()
        leaves.append(bias)
        ours["bias"] = theirs["attn_mask"] = bias
    forwards = {
        "fused_attention": lambda: attention(*leaves[:3], **ours),
        "PyTorch SDPA": lambda: F.scaled_dot_product_attention(*leaves[:3], **theirs),
    }

    def backward(out):
        return torch.autograd.grad(out, leaves, grad_out, retain_graph=not with_forward)

    calls = {}
    for name, forward in forwards.items():
        if with_forward:
            calls[name] = lambda forward=forward: backward(forward())
        else:
            out = forward()
            calls[name] = lambda out=out: backward(out)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", choices=HELD, default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a case")
    options = parser.parse_args()
    held = HELD[options.isa] | (
        {"FUSED_ATTENTION_CPU_ISA": options.isa} if options.isa != "auto" else {}
    )
    if any(os.environ.get(name) != value for name, value in held.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | held)

    import torch

    import result_tables
    from fused_attention import _native
    from fused_attention.tools.benchmark.harness import interleave, machine, real_time_priority
    from fused_attention.tools.testing import num_threads

    torch.manual_seed(0)
    rows = []
    with num_threads(options.threads), real_time_priority() as real_time:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for name, (shape, extra, with_forward) in CASES.items():
                calls = calls_of(shape, extra, with_forward, dtype)
                timings = interleave(calls, budget=options.budget)
                ratio = timings["PyTorch SDPA"].median / timings["fused_attention"].median
                case = {
                    "case": name,
                    "timed": "forward and backward" if with_forward else "backward",
                    "dtype": str(dtype).removeprefix("torch."),
                }
                rows += result_tables.beside(case, timings, "fused_attention")
                disturbed = any(timing.disturbed for timing in timings.values())
                print(
                    f"{name:26} {case['dtype']:9} {timings['fused_attention'].median:8.1f} ms"
                    f"  PyTorch / ours {ratio:.2f}",
                    "(disturbed)" if disturbed else "",
                    flush=True,
                )
    name = "backward" if options.isa == "auto" else f"backward_{options.isa}"
    path = RESULTS / f"{name}.csv"
    about = machine() | {"isa": _native.active_isa(), "threads": options.threads}
    result_tables.write(path, about | {"real_time": real_time}, rows)
    print("saved", path.name)


if __name__ == "__main__":
    main()
