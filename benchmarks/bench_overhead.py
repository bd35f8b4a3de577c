"""What a call costs where there is nothing to compute (1×1×1×8): results/overhead.json.

PyTorch's SDPA, our drop-in for it and `attention()`, without gradient and recording one,
interleaved.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from fused_attention import attention, scaled_dot_product_attention
from fused_attention.tools.benchmark.harness import as_json, interleave, machine, real_time_priority
from fused_attention.tools.testing import num_threads

RESULTS = Path(__file__).resolve().parent / "results" / "overhead.json"
CALLS = {
    "PyTorch SDPA": F.scaled_dot_product_attention,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "attention": attention,
}
REPEATS = 200  # calls a timing, so that the clock does not count


def repeated(call, inputs):
    def run() -> None:
        for _ in range(REPEATS):
            call(*inputs)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a mode")
    options = parser.parse_args()
    results: dict[str, object] = {"machine": machine()}
    with num_threads(2), real_time_priority() as real_time:
        for mode, wanted in (("no gradient", False), ("recording a gradient", True)):
            inputs = [torch.randn(1, 1, 1, 8).requires_grad_(wanted) for _ in range(3)]
            calls = {name: repeated(call, inputs) for name, call in CALLS.items()}
            timings = interleave(calls, budget=options.budget, max_rounds=2000)
            micros = {name: timing.median * 1e3 / REPEATS for name, timing in timings.items()}
            results[mode] = {"microseconds": micros, "timings_ms_of_200": as_json(timings)}
            for name, cost in micros.items():
                print(f"{mode:22} {name:30} {cost:6.2f} us  {cost - micros['PyTorch SDPA']:+.2f}")
    results["real_time"] = real_time
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
