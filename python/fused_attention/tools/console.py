"""Output of the commands: aligned tables, progress on a terminal (by rich if it is installed), and
files of results."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import ArgumentValueError

Progress = Callable[[str], None]  # called after each step, with the text to show


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligns the columns: the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def text(line: Sequence[str]) -> str:
        first, *rest = zip(line, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "  ".join(cells).rstrip()

    return "\n".join([text(header), "  ".join("-" * width for width in widths), *map(text, rows)])


NARROWEST = 60  # columns that every table fits into


def width() -> int:
    """Returns the columns of the terminal, or COLUMNS of the environment, or else 80."""
    return max(NARROWEST, shutil.get_terminal_size().columns)


def fitting_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], importance: Sequence[int], columns: int
) -> str:
    """Aligns a table within a width: it drops the columns of the least importance first.

    Columns of importance 0 always stay; if they are too wide, long cells are cut in the middle.
    """
    kept = list(range(len(header)))

    def text(shortest: int = 10_000) -> str:
        lines = [[_cut(line[column], shortest) for column in kept] for line in [header, *rows]]
        return table(lines[0], lines[1:])

    def fits(text: str) -> bool:
        return all(len(line) <= columns for line in text.splitlines())

    while not fits(text()) and any(importance[column] for column in kept):
        kept.remove(max(kept, key=lambda column: importance[column]))
    longest = max(len(cell) for line in [header, *rows] for cell in line)
    return next((text(n) for n in range(longest, 4, -1) if fits(text(n))), text(4))


def _cut(cell: str, longest: int) -> str:
    if len(cell) <= longest:
        return cell
    return cell[: longest // 2] + "…" + cell[len(cell) - (longest - 1 - longest // 2) :]


def paragraph(text: str, columns: int) -> str:
    """Breaks a paragraph into lines within a width; further lines are indented."""
    return textwrap.fill(text, columns, subsequent_indent="  ", break_on_hyphens=False)


def marked(text: str, word: str) -> str:
    """Makes the lines with this word red, if stdout is a terminal and NO_COLOR is not set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    lines = text.split("\n")
    return "\n".join(f"\x1b[31m{line}\x1b[0m" if word in line else line for line in lines)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Progress]:
    """Shows a bar on stderr if that is a terminal: rich's if it can be imported, else a plain one.

    The bar is drawn only by its steps, so that no thread disturbs what is timed.
    """
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    try:
        rich: Any = importlib.import_module("rich.progress")
        console: Any = importlib.import_module("rich.console").Console(stderr=True)
    except ImportError:
        with _plain(total) as step:
            yield step
        return
    columns = [rich.TextColumn("{task.description:<48.48}"), rich.BarColumn()]
    columns += [rich.TextColumn("{task.percentage:>3.0f}%"), rich.TimeElapsedColumn()]
    bar = rich.Progress(*columns, console=console, auto_refresh=False, transient=True)
    with bar:
        task = bar.add_task("", total=total)

        def step(text: str) -> None:
            bar.update(task, advance=1, description=text)
            bar.refresh()

        yield step


@contextlib.contextmanager
def _plain(total: int) -> Iterator[Progress]:
    done = 0

    def step(text: str) -> None:
        nonlocal done
        done += 1
        sys.stderr.write(f"\r{done:>5}/{total} {text:<48.48}")
        sys.stderr.flush()

    yield step
    sys.stderr.write("\r" + " " * 60 + "\r")


def write_text(option: str, path: str | None, text: str) -> None:
    """Writes the file that a command-line option names, if the option is given."""
    if path:
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise ArgumentValueError(f"{option}: {error}") from error


def write_json(path: str | None, document: dict[str, Any]) -> None:
    write_text("--json", path, json.dumps(document, indent=1) + "\n")
