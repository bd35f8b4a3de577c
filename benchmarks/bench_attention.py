"""Attention forward by class of shapes, against PyTorch, FlexAttention and, where it is installed,
ONNX Runtime: results/attention.json.

Every case runs all peers interleaved, on random data. A class has the geometric mean of PyTorch's
median over ours, beside what it must reach and what is aimed at on a machine with AMX; the lowest
ratios to the other two; our rate and its share of the machine's ceiling, which is that of the same
ISA's products on registers, measured in the same run. Classes that hold both sides to an
instruction set run in a process of their own, without ONNX Runtime, which takes no notice.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from fused_attention import _native
from fused_attention.models import files
from fused_attention.tools.benchmark.bench import bench
from fused_attention.tools.benchmark.harness import real_time_priority
from fused_attention.tools.benchmark.onnx_runtime import onnx_runtime
from fused_attention.tools.benchmark.peers import OURS, PEERS, flex
from fused_attention.tools.benchmark.shapes import CLASSES, CaseClass
from fused_attention.tools.console import table

RESULTS = Path(__file__).resolve().parent / "results" / "attention.json"
PYTORCH, FLEX, ONNX = "PyTorch SDPA", "FlexAttention", "ONNX Runtime"
# What holds PyTorch and the libraries below it to an instruction set
LIMITS = {
    "": {},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}
HEADER = [
    "class",
    "vs PyTorch",
    "must",
    "aim",
    "vs Flex",
    "vs ONNX",
    "GF/s",
    "of ceiling",
    "error ours",
    "theirs",
]


def ceiling(dtype: str, threads: int, seconds: float = 0.05) -> float:
    """GF/s of products on registers, all threads at once, the best of five tries."""

    def work(rounds: int) -> float:
        done = [0.0] * threads

        def run(i: int) -> None:
            done[i] = _native.multiply_registers(dtype, rounds)

        workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
        begin = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(done) / (time.perf_counter() - begin) / 1e9

    rounds = 1000
    while True:
        begin = time.perf_counter()
        work(rounds)
        if time.perf_counter() - begin > seconds:
            return max(work(rounds) for _ in range(5))
        rounds *= 2


def measure(classes: list[CaseClass], seconds: float, threads: int) -> list[dict]:
    peers = {OURS: PEERS[OURS], PYTORCH: PEERS[PYTORCH], FLEX: flex}
    results = []
    for group in classes:
        if not group.isa:
            peers[ONNX] = onnx_runtime
        dtype = str(group.cases[0].dtype).removeprefix("torch.")
        with real_time_priority():
            top = ceiling(dtype, threads)
        report = bench(group.cases, peers, seconds=seconds, threads=threads)
        print(report, file=sys.stderr, flush=True)
        results.append({"class": group.name, "ceiling_gflops": top, **report.as_json()})
    return results


def mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def row(result: dict, group: CaseClass) -> list[str]:
    of = {
        peer: [m for m in result["measurements"] if m["peer"] == peer]
        for peer in (OURS, PYTORCH, FLEX, ONNX)
    }
    ratios = [m["ratio"] for m in of[PYTORCH] if m["ratio"] is not None]

    def lowest(peer: str) -> str:
        found = [m["ratio"] for m in of[peer] if m["ratio"] is not None]
        return f"{min(found):.2f}x" if found else "-"

    rate = mean([m["gflops"] for m in of[OURS]])
    missing = len(group.cases) - len(ratios)
    return [
        group.name,
        (f"{mean(ratios):.2f}x" if ratios else "-")
        + (f" ({missing} disturbed)" if missing else ""),
        f"{group.must:g}x",
        f"{group.aim:g}x",
        lowest(FLEX),
        lowest(ONNX),
        f"{rate:.0f}",
        f"{100 * rate / result['ceiling_gflops']:.0f} %",
        f"{max(m['error'] for m in of[OURS]):.1e}",
        f"{max(m['error'] for m in of[PYTORCH]):.1e}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="a case")
    parser.add_argument("--only", default="", help="classes whose name contains this; others stay")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = [group for group in CLASSES if options.only in group.name]
    if options.child is not None:
        if options.child:
            _native.set_isa(options.child)
        chosen = [group for group in chosen if group.isa == options.child]
        print(json.dumps(measure(chosen, options.seconds, options.threads)))
        return
    results: dict[str, dict] = {}
    for isa in LIMITS:
        if isa and isa not in _native.isas() or all(group.isa != isa for group in chosen):
            continue
        child = subprocess.run(
            [sys.executable, __file__, f"--child={isa}", *sys.argv[1:]],
            env=os.environ | LIMITS[isa],
            stdout=subprocess.PIPE,
            check=True,
        )
        results |= {result["class"]: result for result in json.loads(child.stdout)}
    rows = [row(results[group.name], group) for group in chosen if group.name in results]
    print(table(HEADER, rows))
    with files.locked(RESULTS):
        if options.only and RESULTS.exists():  # the others stay as they are
            stored = json.loads(RESULTS.read_text())["classes"]
            results = {result["class"]: result for result in stored} | results
        classes = [results[group.name] for group in CLASSES if group.name in results]
        files.write_json(RESULTS, {"isa": _native.active_isa(), "classes": classes})
    print("saved", RESULTS.name)


if __name__ == "__main__":
    main()
