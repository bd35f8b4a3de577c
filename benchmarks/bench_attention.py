"""Attention forward by class of shapes, against PyTorch, FlexAttention and, where it is installed,
ONNX Runtime: results/attention.csv, and attention_avx512.csv and attention_avx2.csv.

Every case runs all peers interleaved, on random data. The table shows for each class the geometric
mean of PyTorch's median over ours, beside the ratio that it must reach and the ratio aimed at on a
machine with AMX; the lowest ratios to FlexAttention and ONNX Runtime; our rate and its share of the
ceiling, which is the rate of the same ISA's products on registers, measured in the same run.
Classes that limit both sides to an instruction set run in a process of their own, without ONNX
Runtime, which ignores the limit.
"""

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

import result_tables
from fused_attention import _native
from fused_attention.tools.benchmark.bench import Measurement, Report, bench
from fused_attention.tools.benchmark.onnx_runtime import onnx_runtime
from fused_attention.tools.benchmark.peers import OURS, PEERS, flex
from fused_attention.tools.benchmark.report import as_text
from fused_attention.tools.benchmark.shapes import CLASSES, CaseClass
from fused_attention.tools.console import table, width

RESULTS = Path(__file__).resolve().parent / "results"
PYTORCH, FLEX, ONNX = "PyTorch SDPA", "FlexAttention", "ONNX Runtime"
# The environment variables that limit PyTorch and its libraries to an instruction set.
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


def measure(
    classes: list[CaseClass], seconds: float, threads: int
) -> list[tuple[CaseClass, Report]]:
    """Measures each class."""
    peers = {OURS: PEERS[OURS], PYTORCH: PEERS[PYTORCH], FLEX: flex}
    results = []
    for group in classes:
        if not group.isa:
            peers[ONNX] = onnx_runtime
        report = bench({group.name: [*group.cases]}, peers, seconds=seconds, threads=[threads])
        if report.interrupted:
            sys.exit(130)
        print(as_text(report, width()), file=sys.stderr, flush=True)
        results.append((group, report))
    return results


def stored_row(measured: Measurement) -> result_tables.Row:
    row = {"class": measured.suite, "case": measured.case, "peer": measured.peer}
    if measured.timing is not None:
        row |= result_tables.timed(measured.timing)
        row["median / ours"] = 1.0 if measured.peer == OURS else measured.ratio
        row["GF/s"], row["of ceiling"] = measured.gflops, measured.of_ceiling
        row["extra MiB"] = None if measured.extra_bytes is None else measured.extra_bytes / 2**20
        row["error"] = measured.error
    return row | {"note": measured.reason}


def mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def summary(group: CaseClass, report: Report) -> list[str]:
    of = {
        peer: [m for m in report.measurements if m.peer == peer]
        for peer in (OURS, PYTORCH, FLEX, ONNX)
    }
    ratios = [m.ratio for m in of[PYTORCH] if m.ratio is not None]

    def lowest(peer: str) -> str:
        found = [m.ratio for m in of[peer] if m.ratio is not None]
        return f"{min(found):.2f}x" if found else "-"

    rate, share = (mean([getattr(m, x) for m in of[OURS]]) for x in ("gflops", "of_ceiling"))
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
        f"{100 * share:.0f} %",
        f"{max(m.error for m in of[OURS]):.1e}",
        f"{max(m.error for m in of[PYTORCH]):.1e}",
    ]


def run(chosen: list[CaseClass], isa: str, seconds: float, threads: int) -> None:
    """Measures the classes of one instruction set in this process, prints and stores them."""
    if isa:
        _native.set_isa(isa)
    results = measure([group for group in chosen if group.isa == isa], seconds, threads)
    print(table(HEADER, [summary(*result) for result in results]))
    about = results[0][1].machine | {"isa": _native.active_isa(), "threads": threads}
    about["real_time"] = all(report.real_time for _, report in results)
    rows = [stored_row(measured) for _, report in results for measured in report.measurements]
    path = RESULTS / ("_".join(filter(None, ("attention", isa))) + ".csv")
    result_tables.update(path, about, rows, "class")
    print("saved", path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="per case")
    parser.add_argument("--only", default="", help="classes whose name contains this")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = [group for group in CLASSES if options.only in group.name]
    if options.child is not None:
        run(chosen, options.child, options.seconds, options.threads)
        return
    for isa in LIMITS:
        if isa and isa not in _native.isas() or all(group.isa != isa for group in chosen):
            continue
        subprocess.run(
            [sys.executable, __file__, f"--child={isa}", *sys.argv[1:]],
            env=os.environ | LIMITS[isa],
            check=True,
        )


if __name__ == "__main__":
    main()
