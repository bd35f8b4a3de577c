"""The overhead of a call, with almost nothing to compute (1×1×1×8): results/overhead.csv.

Every surface is called without a gradient and recording one, beside PyTorch's equivalent if there
is one. All calls are timed in turn, so that a slow moment affects all. `--budget 0.5` is quick.
"""

import argparse
import math
from pathlib import Path

import result_tables
from fused_attention.tools.benchmark.harness import interleave, machine, real_time_priority
from fused_attention.tools.benchmark.workloads import REPEATS, repeated, surfaces
from fused_attention.tools.testing import num_threads

RESULTS = Path(__file__).resolve().parent / "results" / "overhead.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a surface")
    options = parser.parse_args()
    rows = []
    with num_threads(2), real_time_priority() as real_time:
        for grad in (False, True):
            calls = {}
            for name, (ours, theirs) in surfaces(grad).items():
                calls[name, "ours"] = repeated(ours)
                if theirs is not None:
                    calls[name, "PyTorch"] = repeated(theirs)
            timings = interleave(calls, budget=options.budget * len(calls) / 2, max_rounds=4000)
            micros = {call: timing.median * 1e3 / REPEATS for call, timing in timings.items()}
            for name in surfaces(grad):
                ours, theirs = micros[name, "ours"], micros.get((name, "PyTorch"), math.nan)
                row = {"surface": name, "records a gradient": grad, "us": ours}
                rows.append(row | {"PyTorch us": theirs, "difference us": ours - theirs})
                print(f"{name:40} {'gradient' if grad else '':9} {ours:6.2f} us {theirs:6.2f} us")
    result_tables.write(RESULTS, machine() | {"real_time": real_time}, rows)


if __name__ == "__main__":
    main()
