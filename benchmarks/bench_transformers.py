"""Time and memory of models of transformers by their attention: eager, sdpa and fused_attention.

    python benchmarks/bench_transformers.py [--quick] [--seconds 30] [--only TEXT]

The models have the sizes of MiniLM, Whisper base and SmolLM2-135M, and random parameters, which
would not change the work if they were trained. Times are medians of interleaved calls; memory is
the peak of one call beyond the memory before it. "none" is a fourth implementation that returns the
queries: what it takes is the model without attention, so sdpa's time divided by its time is the
limit of what faster attention can gain over sdpa (Amdahl 1967). Writes results/transformers.csv.
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import result_tables
from fused_attention.integrations.transformers import register
from fused_attention.tools import console
from fused_attention.tools.benchmark.harness import (
    extra_memory,
    interleave,
    machine,
    real_time_priority,
)

RESULTS = Path(__file__).resolve().parent / "results" / "transformers.csv"
OURS, LIMIT = "fused_attention", "none"
IMPLEMENTATIONS = (OURS, "sdpa", "eager", LIMIT)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Call = Callable[[], object]


def no_attention(module: nn.Module, query: Tensor, *others: Any, **options: Any) -> Any:
    return query.transpose(1, 2), None


# -- Models ------------------------------------------------------------------------------

MINILM = transformers.BertConfig(
    hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
)
WHISPER = transformers.WhisperConfig(
    d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048,
    decoder_layers=1, decoder_attention_heads=8, decoder_ffn_dim=2048,
)  # fmt: skip
SMOLLM2 = transformers.LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
    tie_word_embeddings=True,
)  # fmt: skip


def tokens(vocab_size: int, *shape: int) -> Tensor:
    return torch.randint(0, vocab_size, shape)


def minilm(mask: Tensor) -> tuple[nn.Module, Call]:
    model = transformers.BertModel(MINILM)
    ids = tokens(MINILM.vocab_size, *mask.shape)
    return model, lambda: model(input_ids=ids, attention_mask=mask).last_hidden_state


def whisper_encoder() -> tuple[nn.Module, Call]:
    model = transformers.WhisperModel(WHISPER).encoder
    spectrum = torch.randn(1, 80, 3000)
    return model, lambda: model(spectrum.to(model.dtype)).last_hidden_state


def smollm2_reads(mask: Tensor) -> tuple[nn.Module, Call]:
    model = transformers.LlamaForCausalLM(SMOLLM2)
    inputs = {"input_ids": tokens(SMOLLM2.vocab_size, *mask.shape), "attention_mask": mask}
    return model, lambda: model(**inputs, use_cache=False, logits_to_keep=1).logits


def smollm2_writes(length: int, count: int) -> tuple[nn.Module, Call]:
    model = transformers.LlamaForCausalLM(SMOLLM2)
    prompt, token = tokens(SMOLLM2.vocab_size, 1, length), tokens(SMOLLM2.vocab_size, 1, 1)
    cache = transformers.DynamicCache(config=SMOLLM2)

    def call() -> object:
        if cache.get_seq_length() == 0:
            model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
        for _ in range(count):
            logits = model(input_ids=token, past_key_values=cache).logits
        cache.crop(-count)
        return logits

    return model, call


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int  # that one call reads or writes; padding does not count
    make: Callable[[], tuple[nn.Module, Call]]


def whole(batch: int, length: int) -> Tensor:
    return torch.ones(batch, length, dtype=torch.long)


def padded(length: int, side: str) -> Tensor:
    """Returns a mask of four rows that hides a quarter of the tokens."""
    lengths = torch.tensor([[length], [length * 3 // 4], [length * 3 // 4], [length // 2]])
    mask = (torch.arange(length) < lengths).long()
    return mask if side == "right" else mask.flip(1)


def case_of(name: str, model: Callable[[Tensor], tuple[nn.Module, Call]], mask: Tensor) -> Case:
    return Case(name, int(mask.sum()), functools.partial(model, mask))


CASES = (
    case_of("MiniLM, 8 x 128", minilm, whole(8, 128)),
    case_of("MiniLM, 2 x 512", minilm, whole(2, 512)),
    case_of("MiniLM, 4 x 512, a quarter is padding", minilm, padded(512, "right")),
    Case("Whisper base, encoder", 1500, whisper_encoder),
    case_of("SmolLM2, reads 2048", smollm2_reads, whole(1, 2048)),
    case_of("SmolLM2, reads 4 x 512, a quarter is padding", smollm2_reads, padded(512, "left")),
    Case("SmolLM2, writes 16 after 2048", 16, functools.partial(smollm2_writes, 2048, 16)),
)
QUICK = (
    case_of("MiniLM, 1 x 32", minilm, whole(1, 32)),
    case_of("SmolLM2, reads 4 x 32, a quarter is padding", smollm2_reads, padded(32, "left")),
    Case("SmolLM2, writes 2 after 16", 2, functools.partial(smollm2_writes, 16, 2)),
)


# -- Measurement -------------------------------------------------------------------------


def calls_of(case: Case, dtype: torch.dtype) -> dict[str, Call]:
    """Returns a call for each implementation; all have the same parameters."""
    torch.manual_seed(0)
    model, call = case.make()
    model.eval().to(dtype)

    def with_attention(implementation: str) -> object:
        model.config._attn_implementation = implementation
        with torch.inference_mode():
            return call()

    return {name: functools.partial(with_attention, name) for name in IMPLEMENTATIONS}


def measure(case: Case, dtype: str, seconds: float) -> list[result_tables.Row]:
    """Returns a row for each implementation."""
    calls = calls_of(case, DTYPES[dtype])
    with real_time_priority() as real_time:
        timings = interleave(calls, budget=seconds, warmup=1)
    limit = timings["sdpa"].median / timings[LIMIT].median
    about = {"case": case.name, "dtype": dtype, "tokens": case.tokens}
    rows = result_tables.beside(about, timings, OURS)
    for row in rows:
        row["tokens/s"] = case.tokens / row["median ms"] * 1e3
        memory = extra_memory(calls[row["peer"]])
        row["peak extra MiB"] = None if memory is None else memory / 2**20
        row["sdpa / ours"] = timings["sdpa"].median / timings[OURS].median
        row["limit of sdpa / ours"] = limit
        row["real_time"] = real_time
    return rows


def describe(rows: list[result_tables.Row]) -> str:
    medians = ", ".join(f"{row['peer']} {row['median ms']:.1f} ms" for row in rows)
    memory = ", ".join(f"{row['peak extra MiB'] or 0:.0f}" for row in rows)
    first = rows[0]
    gain = f"sdpa / ours {first['sdpa / ours']:.2f} of at most {first['limit of sdpa / ours']:.2f}"
    return f"{first['case']}, {first['dtype']}: {medians}; {gain}; MiB: {memory}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small cases, nothing written")
    parser.add_argument("--seconds", type=float, default=30.0, help="per case and dtype")
    parser.add_argument("--only", default="", help="only cases with this text, nothing written")
    options = parser.parse_args()
    transformers.AttentionInterface.register(LIMIT, no_attention)
    transformers.AttentionMaskInterface.register(LIMIT, lambda **arguments: None)
    chosen = [
        (case, dtype)
        for case in (QUICK if options.quick else CASES)
        for dtype in DTYPES
        if options.only in case.name
    ]
    rows: list[result_tables.Row] = []
    with register(), console.progress(len(chosen)) as step:
        for case, dtype in chosen:
            rows += (new := measure(case, dtype, options.seconds))
            step(f"{case.name}, {dtype}")
            print(describe(new))
    if not options.quick and not options.only:
        about = {"threads": torch.get_num_threads(), "transformers": transformers.__version__}
        result_tables.write(RESULTS, machine() | about, rows)


if __name__ == "__main__":
    main()
