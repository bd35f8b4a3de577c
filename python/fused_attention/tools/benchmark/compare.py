"""Compares two reports of `bench --json`, case by case and peer by peer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import median
from typing import Any

from ...errors import ArgumentValueError
from .. import console
from . import harness
from .report import FORMAT, between, without_repeats

Key = tuple[str, str, str, int]  # suite, case, peer, threads


@dataclass(frozen=True)
class Change:
    """How one peer's time on one case changed: the medians' ratio with its 95 % interval."""

    key: Key
    before: float  # milliseconds
    after: float
    interval: harness.Interval

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def verdict(self) -> str:
        if harness.level(self.interval):
            return "no difference"
        return "slower" if self.ratio > 1 else "faster"

    def slower_by(self, threshold: float) -> bool:
        """Says whether the whole interval lies beyond the threshold, in percent."""
        return self.interval[0] > 1 + threshold / 100


def rounds_of(path: str) -> dict[Key, list[float]]:
    """Reads the milliseconds of each round. Raises ArgumentValueError for any other file."""
    try:
        with open(path, encoding="utf-8") as file:
            document: dict[str, Any] = json.load(file)
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']}")
        return {
            (row["suite"], row["case"], row["peer"], row["threads"]): row["timing"]["values"]
            for row in document["measurements"]
            if row["timing"] is not None
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{type(error).__name__}: {error}"
        raise ArgumentValueError(
            f"{path}: expected a file written by bench --json ({message})"
        ) from error


def changes(before: dict[Key, list[float]], after: dict[Key, list[float]]) -> list[Change]:
    """Returns a row for each case and peer that both reports have.

    The rounds of two runs are not paired, so those of each run are drawn independently. Raises
    ArgumentValueError if the reports have no row in common.
    """
    rows = []
    for key, old in before.items():
        if key in after:
            interval = harness.ratio_interval(after[key], old, paired=False)
            rows.append(Change(key, median(old), median(after[key]), interval))
    if not rows:
        raise ArgumentValueError("compare: the reports have no case and peer in common")
    return rows


def as_text(rows: list[Change], only: int, threshold: float, width: int) -> str:
    """Returns the table for a terminal, no line of which is wider than `width`.

    only: how many rows one of the reports has alone. threshold: in percent.
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
    lines.append(
        console.paragraph(
            f"{len(rows)} rows compared; {slower} slower by more than {threshold:g} % (the whole"
            " interval). no difference: the 95 % interval of the ratio contains 1.",
            width,
        )
    )
    if only:
        lines.append(f"{only} rows are in one of the reports only.")
    return "\n".join(lines)
