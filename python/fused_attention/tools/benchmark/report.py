"""What `bench` has measured, as text for a terminal, Markdown, JSON, a page and a picture."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import ArgumentValueError
from .. import console
from . import harness
from .bench import Measurement, Report, compare
from .harness import Timing
from .peers import OURS

Cells = Callable[[Measurement], str]
FORMAT = 2  # of the JSON document


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def between(interval: harness.Interval | None) -> str:
    return "-" if interval is None else f"{interval[0]:.2f}-{interval[1]:.2f}"


def around(timing: Timing) -> harness.Interval:
    """Returns the 95 % interval of the median; of a single pass, the median twice."""
    return harness.interval(timing.logarithms) or (timing.median, timing.median)


def _timing(cell: Callable[[Timing], str]) -> Cells:
    return lambda m: "-" if m.timing is None else cell(m.timing)


def _mebibytes(m: Measurement) -> str:
    return "?" if m.extra_bytes is None else f"{m.extra_bytes / 2**20:.1f}"


def _error(m: Measurement) -> str:
    return "-" if m.error is None else f"{m.error:.1e}"


# (title, importance: 0 always stays, the largest goes first, cell)
COLUMNS: list[tuple[str, int, Cells]] = [
    ("case", 0, lambda m: m.case),
    ("threads", 0, lambda m: str(m.threads)),
    ("peer", 0, lambda m: m.peer),
    ("median ms", 0, _timing(lambda t: f"{t.median:.3f}")),
    ("min", 6, _timing(lambda t: f"{t.minimum:.3f}")),
    ("spread", 7, _timing(lambda t: percent(t.spread))),
    ("GF/s", 4, lambda m: "-" if m.gflops is None else f"{m.gflops:.0f}"),
    ("ceiling", 2, lambda m: percent(m.of_ceiling)),
    ("extra MiB", 5, _mebibytes),
    ("error", 3, _error),
    ("ratio", 0, lambda m: m.verdict),
    ("95 %", 1, lambda m: between(m.interval)),
]


def columns_of(report: Report) -> list[tuple[str, int, Cells]]:
    """Returns the columns; the number of threads is one only if there are several."""
    return [column for column in COLUMNS if column[0] != "threads" or len(report.threads) > 1]


def measured(report: Report) -> list[Measurement]:
    return [m for m in report.measurements if m.timing is not None]


def by_case(measurements: Iterable[Measurement]) -> dict[tuple[str, str, int], list[Measurement]]:
    groups: dict[tuple[str, str, int], list[Measurement]] = {}
    for m in measurements:
        groups.setdefault((m.suite, m.case, m.threads), []).append(m)
    return groups


def notes(report: Report) -> Iterator[str]:
    """Yields the sentences below a table."""
    about, count = report.machine, ", ".join(map(str, report.threads))
    priority = "real-time" if report.real_time else "normal"
    libraries = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    if report.interrupted:
        yield (
            "INTERRUPTED: the table has only the cases that were finished, and there is no interval"
            " for those that were measured once."
        )
    yield (
        f"{about['cpu']} (family {about['cpu_family']}, model {about['cpu_model']}), {report.isa};"
        f" threads: {count}; {priority} priority; {libraries}."
    )
    yield (
        "ratio: a peer's median over ours, above 1 ours is faster; level: the 95 % interval of the"
        " ratio contains 1."
    )
    tops = ", ".join(f"{kind}: {top:.0f} GF/s" for kind, top in report.ceilings.items())
    yield (
        "ceiling: the share of the rate of products in registers"
        + (f" ({tops})" if tops else "")
        + ", or of a read or copy of the same bytes where memory is the limit."
    )
    for m in report.wrong:
        yield (
            f"WRONG: {m.peer}, {m.case}: error {m.error:.1e}, allowed {m.allowed:.1e}."
            if m.error is not None and math.isfinite(m.error)
            else f"WRONG: {m.peer}, {m.case}: NaN, infinity, or another shape or dtype."
        )
    busy = sum(m.reason.startswith("busy") for m in report.measurements)
    if busy:
        yield (
            f"busy ({busy}): no ratio, since something else kept the machine busy: the minimum is"
            " below 0.7 of the median."
        )
    reasons: dict[tuple[str, str], list[str]] = {}
    for m in report.measurements:
        if m.timing is None and m.case not in reasons.setdefault((m.peer, m.reason), []):
            reasons[m.peer, m.reason].append(m.case)
    for (peer, reason), cases in reasons.items():
        yield f"Not measured: {peer}: {reason} ({'; '.join(cases)})."


def scaling(report: Report) -> list[list[str]]:
    """Returns the rows of the scaling table: milliseconds by threads, and the speed-up."""
    medians: dict[tuple[str, str], dict[int, Timing]] = {}
    for m in report.measurements:
        if m.timing is not None:
            medians.setdefault((m.case, m.peer), {})[m.threads] = m.timing
    first, last = report.threads[0], report.threads[-1]
    rows = []
    for (case, peer), timings in medians.items():
        times = [f"{timings[n].median:.3f}" if n in timings else "-" for n in report.threads]
        speedup, interval = "-", None
        if first in timings and last in timings:
            a, b = timings[first], timings[last]
            interval = harness.ratio_interval(a, b)
            speedup = f"{a.median / b.median:.2f}x"
        rows.append([case, peer, *times, speedup, between(interval)])
    return rows


def without_repeats(rows: list[list[str]]) -> list[list[str]]:
    """Leaves out the first cell of a row where it is that of the row above."""
    above = ["", *(row[0] for row in rows[:-1])]
    pairs = zip(above, rows, strict=True)
    return [["" if row[0] == last else row[0], *row[1:]] for last, row in pairs]


def as_text(report: Report, width: int) -> str:
    """Returns what a terminal shows: no line is wider than `width`."""
    columns = columns_of(report)
    rows = [[cell(m) for _, _, cell in columns] for m in measured(report)]
    parts = []
    if rows:
        header, importance = [c[0] for c in columns], [c[1] for c in columns]
        parts.append(console.fitting_table(header, without_repeats(rows), importance, width))
    if len(report.threads) > 1 and rows:
        header = ["case", "peer", *(f"{n}: ms" for n in report.threads), "speed-up", "95 %"]
        importance = [0, 0, *(0 for _ in report.threads), 0, 1]
        lines = without_repeats(scaling(report))
        parts += ["", console.fitting_table(header, lines, importance, width)]
    return "\n".join([*parts, "", *(console.paragraph(note, width) for note in notes(report))])


# -- Markdown and JSON ---------------------------------------------------------------------


def as_markdown(report: Report) -> str:
    """Returns a table for a pull request, with the notes as a list."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    def bold(cell: str) -> str:
        return f"**{cell}**" if cell == "WRONG" else cell

    columns = columns_of(report)
    rows = [line(bold(cell(m)) for _, _, cell in columns) for m in measured(report)]
    rules = line("---" if title in ("case", "peer") else "---:" for title, _, _ in columns)
    lines = [line(title for title, _, _ in columns), rules, *rows, ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(report))]) + "\n"


def as_json(report: Report) -> dict[str, Any]:
    """Returns the document of --json, with the milliseconds of every round."""

    def finite(x: Any) -> Any:
        return None if isinstance(x, float) and not math.isfinite(x) else x

    rows = [
        {name: finite(x) for name, x in asdict(m).items()} | {"verdict": m.verdict}
        for m in report.measurements
    ]
    return {
        "format": FORMAT,
        "interrupted": report.interrupted,
        "right": not report.wrong,
        "threads": report.threads,
        "device": report.device,
        "real_time_priority": report.real_time,
        "machine": report.machine | {"isa": report.isa},
        "versions": report.versions,
        "ceilings": report.ceilings,
        "measurements": rows,
    }


# -- A page --------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2430; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
th, td { padding: .15rem .5rem; text-align: right; border-bottom: 1px solid #d8dde4; }
th:first-child, td:first-child { text-align: left; }
.wrong { color: #b00020; font-weight: 600; } svg { display: block; max-width: 100%; }
ul { font-size: .85rem; color: #4a5566; }
@media print { body { margin: 0; max-width: none; } section { break-inside: avoid; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; } }
"""


def bars(group: list[Measurement]) -> str:
    """Returns an SVG of one case: a bar for each median, and a line for its 95 % interval."""
    label, scale, height = 170, 430.0, 22
    known = [(m, m.timing, around(m.timing)) for m in group if m.timing]
    longest = max(max(timing.median, interval[1]) for _, timing, interval in known)
    parts = []
    for number, (m, timing, (low, high)) in enumerate(known):
        y = number * height
        colour = "#b00020" if m.wrong else "#2f6fb0" if m.peer == OURS else "#aab4c0"
        left, right = (label + x / longest * scale for x in (low, high))
        length, middle = timing.median / longest * scale, y + 10
        text = f"{timing.median:.3g} ms" + ("" if m.verdict == "-" else f", {m.verdict}")
        parts += [
            f'<text x="{label - 6}" y="{y + 14}" text-anchor="end">{html.escape(m.peer)}</text>',
            f'<rect x="{label}" y="{y + 3}" width="{length:.1f}" height="14" fill="{colour}"/>',
            f'<path d="M{left:.1f} {middle}H{right:.1f}M{left:.1f} {y + 6}v8M{right:.1f} {y + 6}v8"'
            ' stroke="#1c2430" fill="none"/>',
            f'<text x="{max(label + length, right) + 6:.1f}" y="{y + 14}">{text}</text>',
        ]
    size = f'width="760" height="{len(known) * height}" viewBox="0 0 760 {len(known) * height}"'
    return f'<svg {size} role="img" font-size="12" fill="#1c2430">{"".join(parts)}</svg>'


def as_html(report: Report) -> str:
    """Returns one page without external resources: a section with bars and a table per case."""
    columns = [column for column in columns_of(report) if column[0] not in ("case", "threads")]
    sections = []
    for (suite, case, threads), group in by_case(measured(report)).items():
        head = "".join(f"<th>{html.escape(title)}</th>" for title, _, _ in columns)
        body = "".join(
            ('<tr class="wrong">' if m.wrong else "<tr>")
            + "".join(f"<td>{html.escape(cell(m))}</td>" for _, _, cell in columns)
            + "</tr>"
            for m in group
        )
        title = html.escape(f"{suite}: {case}, {threads} threads")
        rows = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        sections.append(f"<section><h2>{title}</h2>{bars(group)}{rows}</section>")
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes(report))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>fused_attention bench</title><style>{STYLE}</style></head><body>"
        f"<h1>fused_attention bench, {html.escape(str(report.machine['date']))}</h1>"
        "<p>Bars are medians in milliseconds, shorter is better; the line on each is the 95 %"
        f" interval of the median.</p><ul>{items}</ul>{''.join(sections)}</body></html>\n"
    )


# -- A picture -----------------------------------------------------------------------------


def require_matplotlib() -> Any:
    """Returns matplotlib's pyplot. Raises ArgumentValueError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ArgumentValueError("--png: matplotlib is not installed") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


COLOURS = ("#e08e45", "#4f8f4f", "#8f6fb0", "#b8bcc4", "#c0504d", "#5fb0b0", "#8a6d3b", "#d07fb0")
HEIGHT = 0.8  # of the bars of a case together


def save_plot(groups: dict[str, dict[str, Timing]], title: str, path: Path | str) -> None:
    """Draws the medians of each case's peers on a logarithmic axis, with their 95 % intervals."""
    plt = require_matplotlib()
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    names = list(dict.fromkeys(name for timings in groups.values() for name in timings))
    others = [name for name in names if name != OURS]
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(others)}
    colours[OURS] = "#2f6fb0"
    rows = sum(map(len, groups.values()))
    figure, axes = plt.subplots(figsize=(10, 1.8 + 0.3 * rows), layout="constrained")
    for row, timings in enumerate(groups.values()):
        height = HEIGHT / len(timings)
        for place, (name, timing) in enumerate(timings.items()):
            y = row + (place - (len(timings) - 1) / 2) * height
            low, high = around(timing)
            axes.barh(y, timing.median, 0.9 * height, color=colours[name])
            axes.plot([low, high], [y, y], color="black", lw=1)
            ratio, interval, _ = compare(timings.get(OURS), timing)
            text = f"  {timing.median:.3g} ms"
            if ratio is not None:
                same = interval is not None and harness.level(interval)
                text += " (level)" if same else f" ({ratio:.2f})"
            axes.text(max(timing.median, high), y, text, va="center", fontsize=8)
    for name in names:
        axes.barh(0, 0, color=colours[name], label=name)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_xscale("log")
    known = [timing for timings in groups.values() for timing in timings.values()]
    axes.set_xlim(min(t.minimum for t in known) / 2, max(t.median for t in known) * 4)
    axes.set_ylim(len(groups) - 0.45, -0.55)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("milliseconds per call, median (over ours); shorter is better; logarithmic")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=11, loc="left")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save_png(report: Report, path: str) -> None:
    """Draws the report. A report without measurements gives no picture."""
    several = len(report.threads) > 1
    groups = {
        case + (f"\n{threads} threads" if several else ""): {
            m.peer + (" (WRONG)" if m.wrong else ""): m.timing for m in group if m.timing
        }
        for (_, case, threads), group in by_case(measured(report)).items()
    }
    if groups:
        threads = ", ".join(map(str, report.threads))
        title = f"{report.machine['cpu']}, {report.isa}, {threads} threads"
        save_plot(groups, title, path)
