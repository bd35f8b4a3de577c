"""Whole models, the same weights with fused, PyTorch's and naive attention: time and memory.

    python benchmarks/bench_models.py [--quick] [--seconds 20]

Whisper base's encoder (1500 positions), SmolLM2-135M reading 2048 tokens and writing 16 more, and
training steps of an encoder-decoder at growing lengths. Random weights: they do not change what is
computed. Interleaved, medians; peak memory beyond what is there before, of one call. Writes
results/models.json and results/models.png.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fused_attention.models.attend import IMPLEMENTATIONS, Padded
from fused_attention.models.pretrained import SoundFront
from fused_attention.models.training import token_loss
from fused_attention.models.transformer import Config, Transformer
from fused_attention.tools import console
from fused_attention.tools.benchmark.harness import (
    as_json,
    extra_memory,
    interleave,
    machine,
    real_time_priority,
)

RESULTS = Path(__file__).resolve().parent / "results"
WHISPER = Config(
    51865,
    encoder_layers=6,
    decoder_layers=1,
    dim=512,
    heads=8,
    hidden=2048,
    activation="gelu",
    positions="learned",
    max_positions=448,
    max_source_positions=1500,
)
SMOLLM2 = Config(
    49152,
    encoder_layers=0,
    decoder_layers=30,
    dim=576,
    heads=9,
    kv_heads=3,
    hidden=1536,
    activation="swiglu",
    norm="rms",
    positions="rotary",
    max_positions=8192,
    bias=False,
    scale_embedding=False,
)


@dataclass(frozen=True)
class Case:
    """One thing to measure: `make` gives a call for a way to compute attention."""

    name: str
    tokens: int  # that one call reads or writes
    make: Callable[[], tuple[Transformer, Callable[[], object]]]


def whisper_encoder() -> tuple[Transformer, Callable[[], object]]:
    model = Transformer(WHISPER, front=SoundFront(80, 512)).eval()
    spectrum = torch.randn(1, 80, 3000)
    return model, torch.inference_mode()(lambda: model.encode(spectrum).hidden)


def prefill(length: int) -> tuple[Transformer, Callable[[], object]]:
    model = Transformer(SMOLLM2).eval()
    tokens = torch.randint(0, SMOLLM2.vocab_size, (1, length))

    def call() -> object:
        return model.step(tokens, model.start(None, 1, length))

    return model, call


def decode(length: int, count: int) -> tuple[Transformer, Callable[[], object]]:
    model = Transformer(SMOLLM2).eval()
    cache = model.start(None, 1, length + count)
    model.step(torch.randint(0, SMOLLM2.vocab_size, (1, length)), cache)
    lengths, longest = cache.lengths, cache.longest

    def call() -> object:
        cache.lengths, cache.longest = lengths, longest
        for _ in range(count):
            logits = model.step(torch.zeros(1, 1, dtype=torch.long), cache)
        return logits

    return model, call


def training_step(batch: int, seqlen: int, target: int) -> tuple[Transformer, Callable[[], object]]:
    model = Transformer(Config(8000)).train()
    source = torch.randint(4, 8000, (batch, seqlen))
    tokens = torch.randint(4, 8000, (batch, target + 1))

    def call() -> object:
        model.zero_grad()
        loss = token_loss(model(tokens[:, :-1], None, source), tokens[:, 1:], Padded())
        loss.backward()
        return loss

    return model, call


def cases(quick: bool) -> list[Case]:
    if quick:
        return [
            Case("training, 8 × 40", 8 * 80, lambda: training_step(8, 40, 40)),
            Case("training, 1 × 512", 640, lambda: training_step(1, 512, 128)),
        ]
    sizes = ((64, 40, 40), (8, 512, 128), (4, 1024, 128), (2, 2048, 128))
    return [
        Case("Whisper base, encoder", 1500, whisper_encoder),
        Case("SmolLM2, reads 2048", 2048, lambda: prefill(2048)),
        Case("SmolLM2, writes 16 after 2048", 16, lambda: decode(2048, 16)),
        *(
            Case(f"training, {b} × {s}", b * (s + t), lambda b=b, s=s, t=t: training_step(b, s, t))
            for b, s, t in sizes
        ),
    ]


def measure(case: Case, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    model, call = case.make()

    def with_attention(attention: str) -> Callable[[], object]:
        def run() -> object:
            model.use_attention(attention)
            return call()

        return run

    calls = {name: with_attention(name) for name in IMPLEMENTATIONS}
    with real_time_priority() as real_time:
        timings = interleave(calls, budget=seconds, warmup=1)
    memory = {name: extra_memory(run) for name, run in calls.items()}
    per_second = {name: case.tokens / t.median * 1e3 for name, t in timings.items()}
    return {
        "name": case.name,
        "tokens": case.tokens,
        "real_time_priority": real_time,
        "milliseconds": as_json(timings),
        "tokens_per_second": per_second,
        "peak_extra_bytes": memory,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 1 + 0.9 * len(rows)), layout="constrained")
    colours = dict(zip(IMPLEMENTATIONS, ("#2f6fb0", "#e08e45", "#b8bcc4"), strict=True))
    quantities = (
        ("tokens_per_second", "tokens per second; bars: fused = 1 (longer is faster)", 1.0),
        ("peak_extra_bytes", "peak memory of a call, MiB (shorter is better)", 2**-20),
    )
    for side, (key, label, unit) in zip(axes, quantities, strict=True):
        for number, row in enumerate(rows):
            for place, name in enumerate(IMPLEMENTATIONS):
                value = row[key][name] * unit
                length = value / row[key]["fused"] if key == "tokens_per_second" else value
                y = number + (place - 1) * 0.27
                side.barh(y, length, 0.25, color=colours[name], label=None if number else name)
                text = f" {value:,.0f}" if value >= 100 else f" {value:.3g}"
                side.text(length, y, text, va="center", fontsize=8)
        side.set_yticks(range(len(rows)), [row["name"] for row in rows])
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
    parser.add_argument("--seconds", type=float, default=30.0, help="per case")
    options = parser.parse_args()
    rows = []
    chosen = cases(options.quick)
    with console.progress(len(chosen)) as step:
        for case in chosen:
            rows.append(measure(case, options.seconds))
            step(case.name)
    for row in rows:
        medians = ", ".join(
            f"{name} {row['milliseconds'][name]['median']:.0f} ms" for name in IMPLEMENTATIONS
        )
        memory = ", ".join(f"{(x or 0) / 2**20:.0f}" for x in row["peak_extra_bytes"].values())
        print(f"{row['name']}: {medians}; MiB: {memory}")
    if not options.quick:
        configs = {"whisper": asdict(WHISPER), "smollm2": asdict(SMOLLM2)}
        about = machine() | {"threads": torch.get_num_threads()}
        document = {"machine": about, "configs": configs, "cases": rows}
        (RESULTS / "models.json").write_text(json.dumps(document, indent=1) + "\n")
        plot(rows, RESULTS / "models.png")


if __name__ == "__main__":
    main()
