"""Output of the commands: aligned tables, progress on a terminal (by rich if it is installed), and
files of results."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
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


def write_json(path: str | None, document: dict[str, Any]) -> None:
    if path:
        try:
            with open(path, "w") as file:
                file.write(json.dumps(document, indent=1) + "\n")
        except OSError as error:
            raise ArgumentValueError(f"--json: {error}") from error
