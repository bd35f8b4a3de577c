"""masked_softmax against plain PyTorch and against copying the bytes: results/softmax.csv.

About 17 million elements in rows of several lengths, with a boolean mask [B, 1, M, N] that hides a
fifth. The same run measures two ceilings, which move the same bytes: with new memory for the result
(clone; for the backward, which reads two tensors, their sum), and with existing memory (copy_), for
`masked_softmax_`. The output has our time divided by each; below 1 ours is faster.
"""

import argparse
from pathlib import Path

import torch

import result_tables
from fused_attention import _native
from fused_attention.tools.benchmark.harness import interleave, machine, real_time_priority
from fused_attention.tools.benchmark.peers import OURS
from fused_attention.tools.benchmark.workloads import SOFTMAX_SHAPES, softmax_calls
from fused_attention.tools.testing import num_threads

RESULTS = Path(__file__).resolve().parent / "results" / "softmax.csv"
DTYPES = (torch.float32, torch.bfloat16)

# What moves the same bytes, for each call.
CEILINGS = {"forward": "clone", "in place": "copy_", "backward": "sum"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds a case")
    options = parser.parse_args()
    rows = []
    with num_threads(options.threads), real_time_priority() as real_time, torch.no_grad():
        for shape in SOFTMAX_SHAPES:
            for dtype in DTYPES:
                calls = {
                    (what, CEILINGS[what] if peer == "ceiling" else peer): call
                    for what, group in softmax_calls(shape, dtype).items()
                    for peer, call in group.items()
                }
                timings = interleave(calls, budget=options.budget)
                name = str(dtype).removeprefix("torch.")
                case = {"shape": "x".join(map(str, shape)), "dtype": name}
                ratios = []
                for what in CEILINGS:
                    own = {peer: t for (call, peer), t in timings.items() if call == what}
                    rows += result_tables.beside(case | {"call": what}, own, OURS)
                    ratios += [
                        f"{what} / {peer} {own[OURS].median / timing.median:.2f}"
                        for peer, timing in own.items()
                        if peer != OURS
                    ]
                disturbed = any(timing.disturbed for timing in timings.values())
                print(
                    f"rows of {shape[-1]:5} {name:8} "
                    + "  ".join(ratios)
                    + ("  (disturbed)" if disturbed else ""),
                    flush=True,
                )
    about = machine() | {"isa": _native.active_isa(), "threads": options.threads}
    result_tables.write(RESULTS, about | {"real_time": real_time}, rows)
    print("saved", RESULTS.name)


if __name__ == "__main__":
    main()
