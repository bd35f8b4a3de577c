"""Is time linear in the visible tiles? S from 128 to 16384, full, causal and windowed.

    python benchmarks/bench_scaling.py [--quick | --plot]

Batch 1, 8 heads of 64, on one thread and on two. PyTorch's scaled_dot_product_attention runs beside
ours; it gets a window as a mask, up to S 4096. Medians of interleaved calls go to
results/scaling.csv and scaling.png.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import result_tables
from fused_attention import attention, explain
from fused_attention.tools import console
from fused_attention.tools.benchmark.harness import interleave, machine, real_time_priority
from fused_attention.tools.testing import num_threads

RESULTS = Path(__file__).resolve().parent / "results"
HEADS, HEAD_DIM, WINDOW, LONGEST_MASK = 8, 64, 256, 4096
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": "top_left"},
    f"window {WINDOW}": {"window_size": (WINDOW, WINDOW)},
}
OURS, PYTORCH = "fused_attention", "PyTorch SDPA"


def visible_tiles(length: int, options: dict[str, Any], block_m: int, block_n: int) -> int:
    """Returns the number of tiles of all heads that some query sees."""
    count = 0
    left, right = options.get("window_size", (length, length))
    right = 0 if "causal" in options else right
    for m in range(0, length, block_m):
        first, last = max(m - left, 0), min(min(m + block_m, length) - 1 + right, length - 1)
        count += last // block_n - first // block_n + 1
    return HEADS * count


def calls_of(length: int, options: dict[str, Any], dtype: torch.dtype) -> dict[str, Callable]:
    query, key, value = (torch.randn(1, HEADS, length, HEAD_DIM).to(dtype) for _ in range(3))
    calls: dict[str, Callable] = {OURS: lambda: attention(query, key, value, **options)}
    theirs: dict[str, Any] = {"is_causal": "causal" in options}
    if "window_size" in options:
        if length > LONGEST_MASK:
            return calls
        distance = torch.arange(length)[:, None] - torch.arange(length)
        theirs["attn_mask"] = distance.abs() <= WINDOW
    calls[PYTORCH] = lambda: F.scaled_dot_product_attention(query, key, value, **theirs)
    return calls


def measure(quick: bool) -> list[result_tables.Row]:
    lengths = [128 << n for n in range(3 if quick else 8)]
    settings = [
        (threads, dtype, kind, length)
        for threads in (1, 2)
        for dtype in (torch.float32, torch.bfloat16)
        for kind in KINDS
        for length in lengths
    ]
    rows = []
    with console.progress(len(settings)) as step:
        for threads, dtype, kind, length in settings:
            options = KINDS[kind]
            calls = calls_of(length, options, dtype)
            query = torch.empty(1, HEADS, length, HEAD_DIM, dtype=dtype)
            details = explain(query, query, query, **options).details
            with num_threads(threads), real_time_priority():
                timings = interleave(calls, budget=1.5, min_rounds=3, warmup=1)
            case = {
                "threads": threads,
                "dtype": str(dtype).removeprefix("torch."),
                "kind": kind,
                "length": length,
                "tiles": visible_tiles(length, options, details.block_m, details.block_n),
            }
            rows += result_tables.beside(case, timings, OURS)
            step(f"{kind}, {length}")
    return rows


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Draws a table that was read from its file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    colours = dict(zip(KINDS, ("#2f6fb0", "#c0504d", "#4f8f4f"), strict=True))
    for side, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        for kind, colour in colours.items():
            chosen = [
                r for r in rows if (r["kind"], r["dtype"], r["threads"]) == (kind, dtype, "2")
            ]
            peers = result_tables.by("peer", chosen)
            for name, style in ((OURS, "o-"), (PYTORCH, "x:")):
                points = [(int(r["length"]), float(r["median ms"])) for r in peers[name]]
                side.plot(*zip(*points, strict=True), style, color=colour, label=f"{kind}, {name}")
            longest = peers[OURS][-1]
            rate = float(longest["median ms"]) / int(longest["tiles"])
            side.plot(
                [int(r["length"]) for r in peers[OURS]],
                [rate * int(r["tiles"]) for r in peers[OURS]],
                color=colour,
                lw=6,
                alpha=0.2,
                label=f"{kind}: visible tiles, at the rate of the longest",
            )
        side.set(xscale="log", yscale="log", xlabel="tokens", title=dtype)
        lengths = sorted({int(r["length"]) for r in rows})
        side.set_xticks(lengths, lengths, minor=False)
        side.grid(alpha=0.3)
        side.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("milliseconds, median (8 heads of 64, 2 threads)")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to S 512, nothing written")
    parser.add_argument("--plot", action="store_true", help="only draw the stored table")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = [] if options.plot else measure(options.quick)
    for row in rows:
        print(
            f"{row['threads']} thread(s) {row['dtype']:9} {row['kind']:10} {row['length']:6} "
            f"{row['peer']:15} {row['median ms']:9.3f} ms, {row['median / ours']:.2f} times ours, "
            f"{1e3 * row['median ms'] / row['tiles']:6.2f} us for each of our tiles"
        )
    path = RESULTS / "scaling.csv"
    if rows and not options.quick:
        result_tables.write(path, machine(), rows)
    if not options.quick:
        plot(result_tables.read(path)[1], RESULTS / "scaling.png")


if __name__ == "__main__":
    main()
