"""`make demo`: the machine, a real model on real sentences, a short benchmark with table and plot.

Writes benchmark.png and benchmark.csv to benchmarks/results/demo. Takes under three minutes.
"""

import argparse
import os
import sys
from pathlib import Path

# The demo fails rather than fall back to the slow reference implementation.
os.environ.setdefault("FUSED_ATTENTION_STRICT", "1")

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fused_attention
import result_tables
from fused_attention.tools.benchmark.harness import Timing, interleave, machine, real_time_priority
from fused_attention.tools.benchmark.peers import PEERS, whole
from fused_attention.tools.benchmark.report import save_plot
from fused_attention.tools.benchmark.shapes import DEMO, Case, make_inputs
from fused_attention.tools.cli import main as command_line
from fused_attention.tools.testing import num_threads
from minilm import SENTENCES, Encoder, fetch, sdpa_calls

RESULTS = Path(__file__).resolve().parent / "results" / "demo"
OURS, PYTORCH = "fused_attention", "PyTorch SDPA"
console = Console(highlight=False)


def show_machine() -> None:
    console.rule("1. This machine")
    sys.stdout.flush()
    command_line(["doctor"])


def show_model() -> dict[str, object]:
    """Runs the model with PyTorch's attention and with ours; {} if there is no model."""
    console.rule("2. A real model: all-MiniLM-L6-v2 with the drop-in under it")
    try:
        with console.status("fetching the model (83.5 MB, once)"):
            directory = fetch()
    except OSError as error:
        console.print(f"The model can't be had here, so this part is left out: {error}")
        return {}
    with console.status("loading the model"):
        encode = Encoder(directory)

    with sdpa_calls() as torch_calls:
        expected = encode(SENTENCES)
    with fused_attention.patch_sdpa(), sdpa_calls() as our_calls:
        embeddings = encode(SENTENCES)

    (query, key, value), options = our_calls[0][0][:3], our_calls[0][1]
    mask = options.get("attn_mask")
    shape = "×".join(str(size) for size in query.shape)
    console.print(
        f"{len(SENTENCES)} sentences: PyTorch's attention was called {len(torch_calls)} times,"
        f" then ours {len(our_calls)} times in its place."
    )
    console.print(f"Query {shape}, boolean mask {tuple(mask.shape) if mask is not None else None}:")
    explanation = fused_attention.explain(query, key, value, mask=mask, scale=options.get("scale"))
    console.print(str(explanation), style="dim")

    difference = (embeddings - expected).abs().max().item()
    cosine = (embeddings * expected).sum(-1).min().item()
    console.print(
        f"Embeddings: largest difference {difference:.1e}, smallest cosine similarity {cosine:.7f}."
    )
    ours_nearest, torch_nearest = nearest(embeddings), nearest(expected)
    same = int((ours_nearest == torch_nearest).sum())
    partner = torch.arange(len(SENTENCES)) ^ 1  # sentences 2i and 2i + 1 are a pair
    found = int((ours_nearest == partner).sum())
    console.print(
        f"Nearest sentence: the same with both for {same} of {len(SENTENCES)};"
        f" it is the paraphrase for {found}. For example:"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("sentence", "nearest with fused_attention"):
        table.add_column(column, overflow="fold")
    table.add_column("cosine", justify="right")
    for index in (0, 2, 8, 14, 22):
        match = int(ours_nearest[index])
        similarity = float(embeddings[index] @ embeddings[match])
        table.add_row(SENTENCES[index], SENTENCES[match], f"{similarity:.2f}")
    console.print(table)
    if difference > 1e-5 or same != len(SENTENCES) or not our_calls:
        sys.exit("The embeddings do not agree: this is a bug, please report it.")
    return {
        "model": "all-MiniLM-L6-v2",
        "sentences": len(SENTENCES),
        "attention_calls": len(our_calls),
        "max_abs_difference": difference,
        "min_cosine": cosine,
        "same_nearest_sentence": same,
        "paraphrase_found": found,
    }


def nearest(embeddings: torch.Tensor) -> torch.Tensor:
    """Returns for each sentence the index of the most similar other one."""
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-1).argmax(-1)


def show_benchmark(budget: float, thread_count: int, model: dict[str, object]) -> None:
    """Measures every case with every peer; prints the table, saves it and the plot.

    model: the results of `show_model`, which go into the first line of the saved table.
    """
    console.rule(f"3. Benchmark: {thread_count} threads, interleaved, medians")
    measured: list[tuple[Case, dict[str, Timing], float | None]] = []
    progress = Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,  # no refreshing thread while something is timed
        transient=True,
    )
    with num_threads(thread_count), real_time_priority() as real_time, progress:
        task = progress.add_task("", total=len(DEMO))
        for number, case in enumerate(DEMO):

            def show(fraction: float, number: int = number, case: Case = case) -> None:
                progress.update(task, completed=number + fraction, description=case.name)
                progress.refresh()

            show(0.0)
            inputs = make_inputs(case)
            calls = {name: whole(peer(case, inputs), case, inputs) for name, peer in PEERS.items()}
            timings = interleave(calls, budget=budget, after_round=show)
            measured.append((case, timings, largest_difference(calls, case)))

    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="milliseconds per call")
    table.add_column("case")
    table.add_column("B×H×S×D")
    for column in ("naive", "PyTorch", "ours", "speed-up", "diff."):
        table.add_column(column, justify="right")
    for case, timings, difference in measured:
        ratio = timings[PYTORCH].median / timings[OURS].median
        table.add_row(
            case.name,
            f"{case.B}×{case.Hq}×{case.Sq}×{case.D}",
            *(f"{timings[name].median:.2f}" for name in PEERS),
            f"{ratio:.2f}x",
            "-" if difference is None else f"{difference:.0e}",
        )
    console.print(table)
    console.print(
        "Speed-up: of ours over PyTorch's SDPA. diff.: the largest difference of the two results,"
        " gradients included (none for dropout, where each draws its own random bits)."
    )
    priority = "real-time priority" if real_time else "normal priority (real-time needs root)"
    console.print(f"Measured at {priority}.")
    disturbed = [
        f"{case.name} ({name})"
        for case, timings, _ in measured
        for name, timing in timings.items()
        if timing.disturbed
    ]
    if disturbed:
        console.print(
            "Something else kept the machine busy; the minimum is below 0.7 of the median"
            f" for: {', '.join(disturbed)}.",
            style="yellow",
        )
    plot = RESULTS / "benchmark.png"
    groups = {
        f"{case.name}\n{case.B}×{case.Hq}×{case.Sq}×{case.D}": timings
        for case, timings, _ in measured
    }
    cpu, version = machine()["cpu"], torch.__version__
    save_plot(groups, f"Attention on {cpu}, {thread_count} threads, torch {version}", plot)
    console.print(f"Plot: {os.path.relpath(plot)}")
    rows = []
    for case, timings, difference in measured:
        sizes = {name: getattr(case, name) for name in "B Hq Hkv Sq Sk D Dv".split()}
        columns = {"case": case.name, **sizes, "dtype": str(case.dtype).removeprefix("torch.")}
        for row in result_tables.beside(columns, timings, OURS):
            rows.append(row | {"GF/s": case.flops() / row["median ms"] / 1e6})
            rows[-1]["difference from PyTorch"] = difference if row["peer"] == OURS else None
    results = RESULTS / "benchmark.csv"
    about = machine() | {"threads": thread_count, "real_time": real_time} | model
    result_tables.write(results, about, rows)
    console.print(f"Table: {os.path.relpath(results)}")


def largest_difference(calls: dict, case: Case) -> float | None:
    """Compares our results with PyTorch's, gradients too if there is a backward pass."""
    if case.dropout_p > 0:
        return None
    ours, theirs = calls[OURS](), calls[PYTORCH]()
    pairs = zip(ours, theirs, strict=True) if case.backward else [(ours, theirs)]
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="per case (default: 5)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    show_machine()
    show_benchmark(options.seconds, options.threads, show_model())


if __name__ == "__main__":
    main()
