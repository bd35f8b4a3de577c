"""The tables in results/: CSV below one comment line with the machine, the date and the settings.

A row is a dictionary without the columns that are empty. Numbers keep six significant digits.
"""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fused_attention.models import files
from fused_attention.tools.benchmark.harness import Timing

Row = dict[str, Any]


def text_of(value: object) -> str:
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1e6 else f"{value:.6g}"
    return str(value)


def timed(timing: Timing) -> Row:
    return {
        "median ms": timing.median,
        "minimum ms": timing.minimum,
        "spread": timing.spread,
        "rounds": timing.rounds,
        "disturbed": timing.disturbed,
    }


def beside(case: Row, timings: dict[str, Timing], ours: str) -> list[Row]:
    """Returns one row for each peer of a case, with the ratio of its median to ours."""
    median = timings[ours].median
    return [
        {**case, "peer": peer, **timed(timing), "median / ours": timing.median / median}
        for peer, timing in timings.items()
    ]


def write(path: Path, about: Row, rows: list[Row]) -> None:
    """Writes a table. `about` goes into the comment line; notes and dates are the last columns."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = sorted(names, key=lambda name: {"note": 1, "date": 2}.get(name, 0))
    table = io.StringIO()
    known = {name: text_of(value).replace(",", ";") for name, value in about.items()}
    table.write("# " + ", ".join(f"{name}: {text}" for name, text in known.items() if text) + "\n")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([text_of(row.get(name)) for name in columns] for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, table.getvalue())


def read(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Returns the comment line and the rows as texts; missing values are empty."""
    with path.open(newline="", encoding="utf-8") as file:
        comment = file.readline().removeprefix("# ").rstrip("\n")
        about = dict(item.split(": ", 1) for item in comment.split(", "))
        return about, list(csv.DictReader(file))


def update(path: Path, about: Row, rows: list[Row], key: str) -> None:
    """Replaces the rows whose `key` occurs in `rows`; the other rows stay where they are.

    The comment line describes the last run, and each row has the date of its own run.
    """
    with files.locked(path):
        stored = read(path)[1] if path.exists() else []
        kept = by(key, stored)
        new = by(key, (row | {"date": about["date"]} for row in rows))
        write(path, about, [row for group in (kept | new).values() for row in group])


def by(key: str, rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups
