"""The picture of a benchmark: one group of bars per case, milliseconds on a logarithmic axis."""

from pathlib import Path

import matplotlib

from fused_attention.tools.benchmark.harness import Timing, machine
from fused_attention.tools.benchmark.shapes import Case

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402

COLOURS = {"naive maths": "#b8bcc4", "PyTorch SDPA": "#e08e45", "fused_attention": "#2f6fb0"}
HEIGHT = 0.26


def save_plot(
    measured: list[tuple[Case, dict[str, Timing]]], thread_count: int, path: Path
) -> None:
    """Bars are medians; the thin line in each starts at the minimum."""
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.95 * len(measured)), layout="constrained")
    names = list(measured[0][1])
    for row, (_, timings) in enumerate(measured):
        baseline = timings["PyTorch SDPA"].median
        for offset, name in enumerate(names):
            timing = timings[name]
            y = row + (offset - (len(names) - 1) / 2) * (HEIGHT + 0.02)
            axes.barh(
                y, timing.median, HEIGHT, color=COLOURS[name], label=name if not row else None
            )
            axes.plot([timing.minimum, timing.median], [y, y], color="black", lw=0.8, alpha=0.5)
            text = f" {timing.median:.3g} ms"
            if name == "fused_attention":
                text += f"  ({baseline / timing.median:.2f}x as fast as PyTorch)"
            axes.text(timing.median, y, text, va="center", fontsize=9)
    axes.set_yticks(
        range(len(measured)),
        [f"{case.name}\n{case.B}×{case.Hq}×{case.Sq}×{case.D}" for case, _ in measured],
    )
    axes.set_xscale("log")
    slowest = max(timing.median for _, timings in measured for timing in timings.values())
    fastest = min(timing.minimum for _, timings in measured for timing in timings.values())
    axes.set_xlim(fastest / 2, slowest * 3)
    axes.set_ylim(len(measured) - 0.45, -0.55)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("milliseconds per call, median (shorter is better; logarithmic)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    about = machine()
    axes.set_title(
        f"Attention on {about['cpu']}, {thread_count} threads, torch {about['torch']}\n"
        "batch × heads × sequence × head size",
        fontsize=11,
        loc="left",
    )
    figure.legend(loc="outside upper right", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
