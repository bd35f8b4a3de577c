"""`make record`: this processor's row of results/processors.csv.

A row has the processor, its instruction sets, the number of threads, and for each class of
attention forward the geometric mean of PyTorch's median over ours and our share of the ceiling: the
rate of products on registers, measured in the same run. A class has no ratio if the machine was too
busy to give all of them, or if a result of ours is wrong; the column "wrong" names the latter. The
classes that are limited to an instruction set are left out.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

import result_tables
from fused_attention import _native
from fused_attention.tools import console
from fused_attention.tools.benchmark.bench import PASSES, Report, bench
from fused_attention.tools.benchmark.peers import OURS, PEERS
from fused_attention.tools.benchmark.report import as_text
from fused_attention.tools.benchmark.shapes import CLASSES

RESULTS = Path(__file__).resolve().parent / "results" / "processors.csv"
PYTORCH = "PyTorch SDPA"


def mean(values: list[float | None]) -> float | None:
    """Returns the geometric mean, or None if there is a None among the values."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return math.exp(sum(map(math.log, known)) / len(known))


def row_of(report: Report, threads: int) -> result_tables.Row:
    """Returns the row of the processor that the report was measured on."""
    about = report.machine
    names = [str(about[name]) for name in ("cpu", "cpu_family", "cpu_model")]
    row: result_tables.Row = {
        "processor": f"{names[0]}, family {names[1]}, model {names[2]}, {threads} threads",
        "isa": report.isa,
        "isas": " ".join(_native.isas()),
        "torch": about["torch"],
        "fused_attention": about["fused_attention"],
        "real_time": report.real_time,
        "wrong": "; ".join(dict.fromkeys(m.suite for m in report.wrong)),
    }
    for name in dict.fromkeys(m.suite for m in report.measurements):
        group = [m for m in report.measurements if m.suite == name]
        row[f"{name}: vs PyTorch"] = mean([m.ratio for m in group if m.peer == PYTORCH])
        row[f"{name}: of ceiling"] = mean([m.of_ceiling for m in group if m.peer == OURS])
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="per case")
    options = parser.parse_args()
    tables = {group.name: [*group.cases] for group in CLASSES if not group.isa}
    peers = {name: PEERS[name] for name in (OURS, PYTORCH)}
    with console.progress(PASSES * sum(map(len, tables.values()))) as step:
        report = bench(tables, peers, seconds=options.seconds, threads=[options.threads], step=step)
    print(console.marked(as_text(report, console.width()), "WRONG"))
    if report.interrupted:
        return 130
    row = row_of(report, options.threads)
    result_tables.update(RESULTS, report.machine, [row], "processor")
    print(f"wrote the row of {row['processor']} to {RESULTS.name}")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
