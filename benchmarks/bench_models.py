"""Time and memory of whole models with fused, PyTorch's and naive attention.

    python benchmarks/bench_models.py [--quick | --plot] [--seconds 20]

The models are Whisper base's encoder (1500 positions), SmolLM2-135M reading 2048 tokens and writing
16 more, and training steps of an encoder-decoder at growing lengths. Each has the same random
parameters with every attention; pre-trained ones would not change the work. Times are medians of
interleaved calls; memory is the peak of one call beyond the memory before it. Writes
results/models.csv and results/models.png.
"""

import argparse
from pathlib import Path

import torch

import result_tables
from fused_attention.models.attend import IMPLEMENTATIONS
from fused_attention.tools import console
from fused_attention.tools.benchmark.harness import (
    extra_memory,
    interleave,
    machine,
    real_time_priority,
)
from fused_attention.tools.benchmark.workloads import MODELS, Model, model_calls

RESULTS = Path(__file__).resolve().parent / "results"


def measure(case: Model, seconds: float) -> list[result_tables.Row]:
    """Returns a row for each way to compute attention."""
    calls = model_calls(case)
    with real_time_priority() as real_time:
        timings = interleave(calls, budget=seconds, warmup=1)
    rows = result_tables.beside({"case": case.name, "tokens": case.tokens}, timings, "fused")
    for row in rows:
        row["tokens/s"] = case.tokens / row["median ms"] * 1e3
        memory = extra_memory(calls[row["peer"]])
        row["peak extra MiB"] = None if memory is None else memory / 2**20
        row["real_time"] = real_time
    return rows


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Draws a table that was read from its file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = result_tables.by("case", rows)
    figure, axes = plt.subplots(1, 2, figsize=(12, 1 + 0.9 * len(groups)), layout="constrained")
    colours = dict(zip(IMPLEMENTATIONS, ("#2f6fb0", "#e08e45", "#b8bcc4"), strict=True))
    quantities = (
        ("tokens/s", "tokens per second; bars: fused = 1 (longer is faster)"),
        ("peak extra MiB", "peak memory of a call, MiB (shorter is better)"),
    )
    for side, (key, label) in zip(axes, quantities, strict=True):
        for number, group in enumerate(groups.values()):
            values = {row["peer"]: float(row[key]) for row in group}
            for place, name in enumerate(IMPLEMENTATIONS):
                value = values[name]
                length = value / values["fused"] if key == "tokens/s" else value
                y = number + (place - 1) * 0.27
                side.barh(y, length, 0.25, color=colours[name], label=None if number else name)
                text = f" {value:,.0f}" if value >= 100 else f" {value:.3g}"
                side.text(length, y, text, va="center", fontsize=8)
        side.set_yticks(range(len(groups)), list(groups))
        side.invert_yaxis()
        side.set_xlabel(label)
        side.margins(x=0.15)
        side.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small cases, nothing written")
    parser.add_argument("--plot", action="store_true", help="only draw the stored table")
    parser.add_argument("--seconds", type=float, default=30.0, help="per case")
    options = parser.parse_args()
    chosen = [] if options.plot else MODELS[:2] if options.quick else MODELS[2:]
    rows = []
    with console.progress(len(chosen)) as step:
        for case in chosen:
            rows += measure(case, options.seconds)
            step(case.name)
    for name, group in result_tables.by("case", rows).items():
        medians = ", ".join(f"{row['peer']} {row['median ms']:.0f} ms" for row in group)
        memory = ", ".join(f"{row['peak extra MiB'] or 0:.0f}" for row in group)
        print(f"{name}: {medians}; MiB: {memory}")
    path = RESULTS / "models.csv"
    if rows and not options.quick:
        result_tables.write(path, machine() | {"threads": torch.get_num_threads()}, rows)
    if not options.quick:
        plot(result_tables.read(path)[1], RESULTS / "models.png")


if __name__ == "__main__":
    main()
