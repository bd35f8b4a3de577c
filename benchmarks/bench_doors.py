"""Interfaces of other libraries beside PyTorch's own way to the same result: results/doors.csv.

    python benchmarks/bench_doors.py [--seconds 4] [--only TEXT]

16 sequences of 20 to 1000 tokens, 8 heads of 64: PyTorch's varlen_attn, which has no CPU kernel but
ours; nested tensors; and xFormers' BlockDiagonalCausalMask. PyTorch computes them one by one
("each sequence"), on padded rows, and nested tensors without a causal mask. An encoder layer of
width 512 reads them as a nested tensor, ours, and padded, PyTorch's. Megatron's
FusedScaleMaskSoftmax on [4, 16, 512, 512], causal, beside the maths that Megatron runs without its
kernel. attention_statistics for 8 heads, beside the same of a matrix of weights. Each forward,
and forward with backward where there is one; float32 and bfloat16.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

import result_tables
from fused_attention import (
    TransformerEncoderLayer,
    attention_statistics,
    scaled_dot_product_attention,
)
from fused_attention.integrations.megatron import AttnMaskType, FusedScaleMaskSoftmax
from fused_attention.integrations.xformers import BlockDiagonalMask, memory_efficient_attention
from fused_attention.tools.benchmark.harness import interleave, machine, real_time_priority
from fused_attention.tools.benchmark.trial import Call
from fused_attention.tools.testing import num_threads

RESULTS = Path(__file__).resolve().parent / "results" / "doors.csv"
OURS, EACH, PADDED, PYTORCH = "fused_attention", "each sequence", "padded", "PyTorch"
LENGTHS = [20, 35, 50, 71, 97, 128, 165, 208, 256, 311, 373, 442, 518, 601, 800, 1000]
HEADS, SIZE = 8, 64
Functions = dict[str, Callable[..., Tensor]]  # by peer, of the same inputs
Case = tuple[str, Functions, list[Tensor]]


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(-2, -3)


def each_sequence(causal: bool) -> Callable[..., Tensor]:
    """Returns attention of packed tensors [T, H, D], a call for each sequence."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sequences = zip(*(heads_first(x).split(LENGTHS, -2) for x in (q, k, v)), strict=True)
        outs = [
            F.scaled_dot_product_attention(*(x[None] for x in sequence), is_causal=causal)
            for sequence in sequences
        ]
        return heads_first(torch.cat(outs, -2)[0])

    return function


def padded(causal: bool) -> Callable[..., Tensor]:
    """Returns attention of packed tensors [T, H, D] on padded rows, in which padding is hidden."""
    visible = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    mask = visible[:, None, None]
    if causal:
        mask = mask & torch.ones(max(LENGTHS), max(LENGTHS), dtype=torch.bool).tril()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (
            heads_first(nn.utils.rnn.pad_sequence(list(x.split(LENGTHS)), batch_first=True))
            for x in (q, k, v)
        )
        return heads_first(F.scaled_dot_product_attention(*rows, attn_mask=mask))[visible]

    return function


def packed_cases(dtype: torch.dtype) -> Iterator[Case]:
    tensors = [torch.randn(sum(LENGTHS), HEADS, SIZE).to(dtype) for _ in range(3)]
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    starts, longest = offsets.to(torch.int32), max(LENGTHS)

    def varlen(causal: bool) -> Callable[..., Tensor]:
        window = (-1, 0) if causal else (-1, -1)
        places = (starts, starts, longest, longest)
        return lambda q, k, v: varlen_attn(q, k, v, *places, window_size=window)

    def nested(function: Callable[..., Tensor], causal: bool) -> Callable[..., Tensor]:
        bounds = {"min_seqlen": min(LENGTHS), "max_seqlen": longest}

        def call(*tensors: Tensor) -> Tensor:
            rows = (
                torch.nested.nested_tensor_from_jagged(x, offsets, **bounds).transpose(1, 2)
                for x in tensors
            )
            return function(*rows, is_causal=causal).transpose(1, 2).values()

        return call

    mask = BlockDiagonalMask.from_seqlens(LENGTHS, device="cpu").make_causal()

    def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return memory_efficient_attention(q[None], k[None], v[None], mask)[0]

    for causal in (False, True):
        others: Functions = {EACH: each_sequence(causal), PADDED: padded(causal)}
        word = ", causal" * causal
        yield f"varlen_attn{word}", {OURS: varlen(causal)} | others, tensors
        functions = {OURS: nested(scaled_dot_product_attention, causal)} | others
        if not causal:  # else PyTorch has "no viable backend"
            functions[PYTORCH] = nested(F.scaled_dot_product_attention, causal)
        yield f"nested tensors{word}", functions, tensors
    yield "BlockDiagonalCausalMask", {OURS: xformers} | others, tensors


def layer_cases(dtype: torch.dtype) -> Iterator[Case]:
    width = HEADS * SIZE
    theirs = nn.TransformerEncoderLayer(width, HEADS, batch_first=True, dropout=0.0, dtype=dtype)
    ours = TransformerEncoderLayer(width, HEADS, batch_first=True, dropout=0.0, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    parts = [torch.randn(n, width).to(dtype) for n in LENGTHS]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    rows = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    padding = torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]
    functions: Functions = {
        OURS: lambda: ours.eval()(nested).values(),
        f"{OURS}, {PADDED}": lambda: ours.eval()(rows, src_key_padding_mask=padding)[~padding],
        PADDED: lambda: theirs.eval()(rows, src_key_padding_mask=padding)[~padding],
    }
    yield "TransformerEncoderLayer", functions, []


def softmax_cases(dtype: torch.dtype) -> Iterator[Case]:
    kind = {torch.float32: (False, False), torch.bfloat16: (False, True)}[dtype]
    softmax = FusedScaleMaskSoftmax(*kind, AttnMaskType.causal, True, None, True, None)
    hidden = torch.ones(512, 512, dtype=torch.bool).triu(1)

    def unfused(scores: Tensor) -> Tensor:
        return scores.float().masked_fill(hidden, -10000.0).softmax(-1).to(dtype)

    scores = torch.randn(4, 16, 512, 512).to(dtype)
    functions: Functions = {OURS: lambda x: softmax(x, None), PYTORCH: unfused}
    yield "FusedScaleMaskSoftmax, causal", functions, [scores]


def statistics_cases(dtype: torch.dtype) -> Iterator[Case]:
    for length in (512, 2048):
        q, k = (torch.randn(1, HEADS, length, SIZE).to(dtype) for _ in range(2))

        def whole(q: Tensor = q, k: Tensor = k) -> Tensor:
            weights = (q @ k.mT / math.sqrt(SIZE)).float().softmax(-1)
            torch.special.entr(weights).sum(-1), weights.topk(8)
            return weights.sum(2)

        def ours(q: Tensor = q, k: Tensor = k) -> Tensor:
            mass = attention_statistics(q, k).mass
            assert mass is not None
            return mass

        yield f"attention_statistics, {length} tokens", {OURS: ours, PYTORCH: whole}, []


def calls_of(functions: Functions, tensors: list[Tensor], backward: bool) -> dict[str, Call]:
    leaves = [x.detach().clone().requires_grad_(backward) for x in tensors]

    def call(function: Callable[..., Tensor]) -> Call:
        def forward() -> Any:
            with torch.set_grad_enabled(backward):
                out = function(*leaves)
            return torch.autograd.grad(out.sum(), leaves) if backward else out

        return forward

    return {name: call(function) for name, function in functions.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="per case")
    parser.add_argument("--only", default="", help="only cases with this text, nothing written")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    makers = (packed_cases, layer_cases, softmax_cases, statistics_cases)
    with num_threads(options.threads), real_time_priority() as real_time:
        for dtype in (torch.float32, torch.bfloat16):
            for name, functions, tensors in (x for maker in makers for x in maker(dtype)):
                if options.only not in name:
                    continue
                for backward in (False, True) if tensors else (False,):
                    calls = calls_of(functions, tensors, backward)
                    results = [call() for call in calls.values()]
                    if not backward:
                        for other in results[1:]:
                            torch.testing.assert_close(other, results[0], atol=0.03, rtol=0.03)
                    timings = interleave(calls, budget=options.seconds)
                    case = {"case": name, "dtype": str(dtype).removeprefix("torch.")}
                    case["what"] = "forward and backward" if backward else "forward"
                    rows += (new := result_tables.beside(case, timings, OURS))
                    ratios = (f"{row['peer']} {row['median / ours']:.2f}" for row in new[1:])
                    times = f"{timings[OURS].median:8.2f} ms"
                    print(f"{', '.join(case.values()):60} {times}  {'  '.join(ratios)}", flush=True)
    if not options.only:
        about = machine() | {"threads": options.threads, "real_time": real_time}
        result_tables.write(RESULTS, about, rows)


if __name__ == "__main__":
    main()
