"""A training step of an encoder-decoder transformer with PyTorch's attention and with ours:
results/training_step.csv. `training_steps` describes the model and the settings.
"""

import argparse
from pathlib import Path

import result_tables
from fused_attention import _native
from fused_attention.tools.benchmark.harness import interleave, machine, real_time_priority
from fused_attention.tools.benchmark.peers import OURS
from fused_attention.tools.benchmark.workloads import (
    PYTORCH_MODULES,
    TRAINING_LENGTHS,
    TRAINING_SETTINGS,
    training_steps,
)
from fused_attention.tools.testing import num_threads

RESULTS = Path(__file__).resolve().parent / "results" / "training_step.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds a case")
    parser.add_argument("--lengths", type=int, nargs="+", default=TRAINING_LENGTHS)
    options = parser.parse_args()
    rows = []
    with num_threads(options.threads), real_time_priority() as real_time:
        for setting, (regular, autocast) in TRAINING_SETTINGS.items():
            for length in options.lengths:
                calls = training_steps(length, regular, autocast)
                timings = interleave(calls, budget=options.budget, warmup=1)
                ratio = timings[PYTORCH_MODULES].median / timings[OURS].median
                rows += result_tables.beside({"setting": setting, "length": length}, timings, OURS)
                disturbed = any(timing.disturbed for timing in timings.values())
                print(
                    f"{setting:40} S {length:5} {timings[OURS].median:8.1f} ms"
                    f"  torch.nn / ours {ratio:.2f}",
                    "(disturbed)" if disturbed else "",
                    flush=True,
                )
    about = machine() | {"isa": _native.active_isa(), "threads": options.threads}
    result_tables.write(RESULTS, about | {"real_time": real_time}, rows)
    print("saved", RESULTS.name)


if __name__ == "__main__":
    main()
