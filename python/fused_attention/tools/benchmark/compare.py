"""Compares two reports of `bench --json`, case by case and peer by peer.

The clock of a machine and its memory differ by a few percent from one run to the next, and that
changes the times of all peers of a case alike. So a peer's change is divided by that of the other
libraries of its case (the geometric mean), pass by pass. That needs the same machine and the same
versions in both reports.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from ...errors import ArgumentValueError
from .. import console
from . import harness
from .peers import OURS
from .report import FORMAT, between, without_repeats

Key = tuple[str, str, str, int]  # suite, case, peer, threads
MACHINE = ("cpu", "cpu_family", "cpu_model", "isa", "logical_cpus")


@dataclass(frozen=True)
class Change:
    """How one peer's time on one case changed: the ratio of the medians with its 95 % interval."""

    key: Key
    before: float  # milliseconds
    after: float
    ratio: float  # after / before, over that of the other libraries of the case
    interval: harness.Interval | None  # None: one of the runs had a single pass

    @property
    def verdict(self) -> str:
        if self.interval is None:
            return "-"
        if harness.level(self.interval):
            return "no difference"
        return "slower" if self.ratio > 1 else "faster"

    def slower_by(self, threshold: float) -> bool:
        """Says whether the whole interval lies beyond the threshold, in percent."""
        return self.interval is not None and self.interval[0] > 1 + threshold / 100


@dataclass(frozen=True)
class Run:
    """One report: the logarithms of the medians of each pass, and what they depend on."""

    passes: dict[Key, list[float]]
    machine: tuple[object, ...]
    versions: dict[str, str]


def read(path: str) -> Run:
    """Reads a report. Raises ArgumentValueError for any other file."""
    try:
        with open(path, encoding="utf-8") as file:
            document: dict[str, Any] = json.load(file)
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']}")
        passes = {
            (row["suite"], row["case"], row["peer"], row["threads"]): [
                math.log(median(rounds)) for rounds in row["timing"]["passes"]
            ]
            for row in document["measurements"]
            if row["timing"] is not None
        }
        machine = tuple(document["machine"][name] for name in MACHINE)
        return Run(passes, machine, document["versions"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{type(error).__name__}: {error}"
        raise ArgumentValueError(
            f"{path}: expected a file written by bench --json ({message})"
        ) from error


def differences(before: Run, after: Run) -> list[str]:
    """Returns sentences on what else than the code differs between the reports."""
    lines = []
    if before.machine != after.machine:
        lines.append(f"The machines differ: {before.machine} and {after.machine}.")
    changed = [
        f"{name} {before.versions.get(name, '-')} and {after.versions.get(name, '-')}"
        for name in before.versions | after.versions
        if before.versions.get(name) != after.versions.get(name)
    ]
    if changed:
        lines.append(f"Versions differ: {', '.join(changed)}.")
    return lines


def _is_library(peer: str) -> bool:
    """Says whether a peer is the same code in both runs: not ours, and none of --impl."""
    return peer != OURS and ":" not in peer


def changes(before: Run, after: Run) -> list[Change]:
    """Returns a row for each case and peer that both reports have.

    Raises ArgumentValueError if the reports have no row in common.
    """
    common = [key for key in before.passes if key in after.passes]
    if not common:
        raise ArgumentValueError("compare: the reports have no case and peer in common")
    comparable = not differences(before, after)

    def relative(run: Run, key: Key) -> list[float]:
        """Returns the logarithms of a peer over those of the other libraries of its case."""
        suite, case, peer, threads = key
        others = [
            run.passes[other]
            for other in common
            if other != key and _is_library(other[2])
            if (other[0], other[1], other[3]) == (suite, case, threads)
        ]
        if not comparable or not others:
            return run.passes[key]
        machine = [fmean(values) for values in zip(*others, strict=True)]
        return [x - y for x, y in zip(run.passes[key], machine, strict=True)]

    rows = []
    for key in common:
        old, new = relative(before, key), relative(after, key)
        rows.append(
            Change(
                key,
                before=math.exp(fmean(before.passes[key])),
                after=math.exp(fmean(after.passes[key])),
                ratio=math.exp(fmean(new) - fmean(old)),
                interval=harness.change_interval(new, old),
            )
        )
    return rows


def as_text(rows: list[Change], before: Run, after: Run, threshold: float, width: int) -> str:
    """Returns the table for a terminal, no line of which is wider than `width`.

    rows: the `changes` from before to after. threshold: in percent.
    """
    several = len({change.key[3] for change in rows}) > 1
    cells = [
        [
            change.key[1] + (f", {change.key[3]} threads" if several else ""),
            change.key[2],
            f"{change.before:.3f}",
            f"{change.after:.3f}",
            f"{change.ratio:.2f}",
            between(change.interval),
            change.verdict,
        ]
        for change in rows
    ]
    header = ["case", "peer", "A ms", "B ms", "B / A", "95 %", "B is"]
    importance = [0, 0, 2, 3, 0, 1, 0]
    lines = [console.fitting_table(header, without_repeats(cells), importance, width), ""]
    slower = sum(change.slower_by(threshold) for change in rows)
    notes = [
        f"{len(rows)} rows compared; {slower} slower by more than {threshold:g} % (the whole"
        " interval). no difference: the 95 % interval of the ratio contains 1."
    ]
    different = differences(before, after)
    if different:
        notes += [*different, "So B / A is that of the times alone."]
    else:
        notes.append(
            "B / A: the change of the time over that of the other libraries of the case, which is"
            " the machine's."
        )
    only = len(before.passes.keys() ^ after.passes.keys())
    if only:
        notes.append(f"{only} rows are in one of the reports only.")
    return "\n".join([*lines, *(console.paragraph(note, width) for note in notes)])
