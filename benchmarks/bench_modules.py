"""MultiheadAttention against torch.nn's, same arguments on both sides: results/modules.csv.

Evaluation: the time of a call, B1 L1024, 8 heads of 64, bfloat16, causal; and the time of the two
linear layers alone, which is the same in both modules, so the rest is attention. Training: the time
and the peak extra memory of a step, B8 L1024, 8 heads of 16, float32, causal with padding. Memory
is measured in a process of its own.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import result_tables
from fused_attention import MultiheadAttention
from fused_attention.tools.benchmark.harness import interleave, machine, real_time_priority
from fused_attention.tools.testing import num_threads

RESULTS = Path(__file__).resolve().parent / "results" / "modules.csv"
OURS, PYTORCH, LINEAR = "fused_attention", "torch.nn", "linear layers"
HEADS = 8


def evaluation_calls(mask_dtype: torch.dtype, need_weights: bool) -> dict[str, Callable]:
    """A boolean mask lets torch.nn take its native fast path, a floating one does not."""
    theirs = nn.MultiheadAttention(512, HEADS, batch_first=True, dtype=torch.bfloat16).eval()
    x = torch.randn(1, 1024, 512, dtype=torch.bfloat16)
    mask = torch.ones(1024, 1024, dtype=torch.bool).triu(1)
    if mask_dtype != torch.bool:
        mask = torch.zeros(1024, 1024, dtype=mask_dtype).masked_fill(mask, float("-inf"))

    def call(module: nn.Module) -> Callable:
        return lambda: module(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)

    def linear() -> None:
        F.linear(x, theirs.in_proj_weight, theirs.in_proj_bias)
        F.linear(x, theirs.out_proj.weight, theirs.out_proj.bias)

    ours = MultiheadAttention.from_torch(theirs)
    return {PYTORCH: call(theirs), OURS: call(ours), LINEAR: linear}


def training_step(name: str, need_weights: bool, length: int = 1024) -> Callable:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(128, HEADS, batch_first=True)
    if name == OURS:
        module = MultiheadAttention.from_torch(module)
    x = torch.randn(8, length, 128, requires_grad=True)
    mask = nn.Transformer.generate_square_subsequent_mask(length)
    padding = torch.arange(length) >= torch.tensor([[length], [length * 3 // 4]] * 4)
    padding = torch.zeros(padding.shape).masked_fill(padding, float("-inf"))
    masks = {"attn_mask": mask, "key_padding_mask": padding, "is_causal": True}

    def step() -> None:
        out, weights = module(x, x, x, need_weights=need_weights, **masks)
        loss = out.sum() if weights is None else out.sum() + weights.square().sum()
        loss.backward()

    return step


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**10


def peak_extra_mib(name: str, need_weights: bool) -> float:
    """Returns the peak extra memory of one step, measured in this process."""
    training_step(name, need_weights, 64)()  # loads code, starts thread pools
    step = training_step(name, need_weights)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds a case")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.memory_of:
        name, need_weights = options.memory_of
        with num_threads(options.threads):
            print(peak_extra_mib(name, need_weights == "True"))
        return
    rows = []
    with num_threads(options.threads), real_time_priority() as real_time:
        for need_weights in (True, False):
            for mask_dtype in (torch.bool, torch.bfloat16):
                with torch.no_grad():
                    calls = evaluation_calls(mask_dtype, need_weights)
                    timings = interleave(calls, budget=options.budget)
                theirs, ours, linear = (timings[name].median for name in (PYTORCH, OURS, LINEAR))
                case = {"call": "evaluation", "need_weights": need_weights}
                case["mask"] = str(mask_dtype).removeprefix("torch.")
                for row in result_tables.beside(case, timings, OURS):
                    if row["peer"] == PYTORCH:
                        row["without linear layers"] = (theirs - linear) / (ours - linear)
                    rows.append(row)
                print(
                    f"evaluation, need_weights={need_weights}, {mask_dtype} mask:"
                    f" torch.nn {theirs:.1f} ms, ours {ours:.1f} ms, {theirs / ours:.2f}x;"
                    f" of both {linear:.1f} ms are linear layers, without them"
                    f" {(theirs - linear) / (ours - linear):.1f}x"
                )
        training = {}
        for need_weights in (True, False):
            steps = {name: training_step(name, need_weights) for name in (PYTORCH, OURS)}
            training[need_weights] = interleave(steps, budget=options.budget)
    for need_weights, timings in training.items():
        memory = {}
        for row in result_tables.beside(
            {"call": "training step", "need_weights": need_weights}, timings, OURS
        ):
            command = [sys.executable, __file__, "--threads", str(options.threads)]
            command += ["--memory-of", row["peer"], str(need_weights)]
            child = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            memory[row["peer"]] = row["peak extra MiB"] = float(child.stdout)
            rows.append(row)
        theirs, ours = (timings[name].median for name in (PYTORCH, OURS))
        print(
            f"training, need_weights={need_weights}, padding and causal:"
            f" torch.nn {theirs:.0f} ms, ours {ours:.0f} ms,"
            f" {theirs / ours:.2f}x; extra memory {memory[PYTORCH]:.0f} MiB,"
            f" ours {memory[OURS]:.0f} MiB, {memory[PYTORCH] / memory[OURS]:.1f} times less"
        )
    about = machine() | {"threads": options.threads, "real_time": real_time}
    result_tables.write(RESULTS, about, rows)
    print("saved", RESULTS.name)


if __name__ == "__main__":
    main()
