"""Forward speed per instruction set, with PyTorch held to the same one: results/isa.json.

Each instruction set is measured in a process of its own, because PyTorch, MKL and oneDNN choose
theirs when they start.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from fused_attention import _native
from fused_attention.benchmark.harness import as_json, interleave, machine, real_time_priority
from fused_attention.benchmark.peers import PEERS, bind
from fused_attention.benchmark.shapes import FORWARD_FLOAT32, make_inputs
from fused_attention.testing import num_threads

RESULTS = Path(__file__).resolve().parent / "results" / "isa.json"
OURS, PYTORCH = "fused_attention", "PyTorch SDPA"
# What holds PyTorch and the libraries below it to an instruction set
LIMITS = {
    "avx512": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}


def measure(thread_count: int, budget: float) -> dict[str, object]:
    cases = []
    with num_threads(thread_count), real_time_priority() as real_time:
        for case in FORWARD_FLOAT32:
            inputs = make_inputs(case)
            calls = {name: bind(PEERS[name], case, inputs) for name in (PYTORCH, OURS)}
            timings = interleave(calls, budget=budget)
            ours = timings[OURS].median
            cases.append(
                {
                    "case": case.name,
                    "timings_ms": as_json(timings),
                    "ratio": timings[PYTORCH].median / ours,
                    "gflops": case.flops() / ours / 1e6,
                }
            )
    return {"real_time": real_time, "threads": thread_count, "machine": machine(), "cases": cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a case")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.threads, options.budget)))
        return
    results = {}
    for isa in (isa for isa in LIMITS if isa in _native.isas()):
        child = subprocess.run(
            [sys.executable, __file__, "--child", *sys.argv[1:]],
            env=os.environ | LIMITS[isa] | {"FUSED_ATTENTION_CPU_ISA": isa},
            stdout=subprocess.PIPE,
            check=True,
        )
        results[isa] = json.loads(child.stdout)
        for case in results[isa]["cases"]:
            times = {name: timing["median"] for name, timing in case["timings_ms"].items()}
            disturbed = any(timing["disturbed"] for timing in case["timings_ms"].values())
            print(
                f"{isa:8} {case['case']:28} PyTorch {times[PYTORCH]:8.2f} ms  ours"
                f" {times[OURS]:8.2f} ms  {case['ratio']:.2f}x  {case['gflops']:.0f} GF/s"
                + ("  (disturbed)" if disturbed else "")
            )
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print("saved", RESULTS.name)


if __name__ == "__main__":
    main()
