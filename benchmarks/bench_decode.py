"""Generation and packed sequences beside PyTorch: results/decode.csv and mixed_batch.csv.

Decoding has one sequence and one or four queries, 32 heads on 8 key heads, D 128, with a dense
cache and with pages in random order. Its ceiling is reading the keys and values once: in each round
torch.sum over as many bytes of float32 measures the bandwidth of the memory at that moment.
Variable length has 32 sequences of 16 to 2048 tokens, packed, against the same tokens padded and
masked, and against the rate of a dense call of 1024 tokens. A mixed batch, as a server has it, is
one call for 4 prompts of 512 tokens and 28 sequences that decode one token after 100 to 8000, in
pages of 16; beside it the prompts and the others as calls of their own, and vLLM if installed.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import result_tables
from fused_attention import _native, attention
from fused_attention.tools.benchmark.harness import interleave, machine, real_time_priority
from fused_attention.tools.benchmark.peers import flex, in_pages
from fused_attention.tools.benchmark.shapes import Case, Inputs
from fused_attention.tools.benchmark.vllm_cpu import packed_forward
from fused_attention.tools.testing import num_threads

RESULTS = Path(__file__).resolve().parent / "results" / "decode.csv"
MIXED = RESULTS.with_name("mixed_batch.csv")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OURS, PYTORCH, READ = "fused_attention", "PyTorch SDPA", "reading once"
PARTS = "fused_attention, two calls"
Calls = dict[str, Callable[[], object]]


def decode_calls(Sq: int, Sk: int, dtype: torch.dtype, with_flex: bool) -> tuple[Calls, int]:
    """Returns the calls to time, and the bytes of keys and values."""
    query = torch.randn(1, 32, Sq, 128).to(dtype)
    key, value = (torch.randn(1, 8, Sk, 128).to(dtype) for _ in range(2))
    size = 2 * key.numel() * key.element_size()
    words = torch.randn(size // 4)
    calls: Calls = {
        OURS: lambda: attention(query, key, value),
        PYTORCH: lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True),
        READ: lambda: words.sum(),
    }
    for page_size in (16, 256):
        if page_size > Sk:
            continue
        order = torch.randperm(Sk // page_size)
        table = order.to(torch.int32).unsqueeze(0)
        pages = [in_pages(x, page_size, order) for x in (key, value)]

        def paged(pages=pages, table=table) -> object:
            return attention(query, *pages, block_table=table)

        calls[f"{OURS}, pages of {page_size}"] = paged
    if with_flex:
        case = Case("decode", 1, 32, 8, Sq, Sk, 128, 128, dtype=dtype)
        calls["FlexAttention"] = flex(case, Inputs(query, key, value, None, None, None, ()))
    return calls, size


def varlen_calls(lengths: list[int], dtype: torch.dtype) -> Calls:
    """Returns the calls to time: 8 heads, D 64; `dense` has one sequence of 1024 tokens."""
    heads, head_dim, dense_length = 8, 64, 1024
    query, key, value = (torch.randn(sum(lengths), heads, head_dim).to(dtype) for _ in range(3))
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    places = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    dense = [torch.randn(1, heads, dense_length, head_dim).to(dtype) for _ in range(3)]

    def padded(x: torch.Tensor) -> torch.Tensor:
        parts = torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True)
        return parts.transpose(1, 2).contiguous()

    wide = [padded(x) for x in (query, key, value)]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1))[:, None, None]
    return {
        OURS: lambda: attention(query, key, value, **places),
        "dense": lambda: attention(*dense),
        f"{PYTORCH}, padded": lambda: F.scaled_dot_product_attention(*wide, attn_mask=mask),
    }


def mixed_calls(dtype: torch.dtype) -> Calls:
    """Returns the calls to time: 32 heads on 8 key heads, D 128, causal."""
    lengths = torch.linspace(100, 8000, 28).long()[torch.randperm(28)]
    lengths = torch.cat([torch.full((4,), 512), lengths])
    queries = torch.tensor([512] * 4 + [1] * 28)
    query = torch.randn(int(queries.sum()), 32, 128).to(dtype)
    key, value = (torch.randn(int(lengths.sum()), 8, 128).to(dtype) for _ in range(2))
    counts = (lengths + 15) // 16
    order = torch.randperm(int(counts.sum()))
    pages = []
    for x in (key, value):
        padded = [
            F.pad(part, (0, 0, 0, 0, 0, -len(part) % 16)) for part in x.split(lengths.tolist())
        ]
        pages.append(in_pages(torch.cat(padded).transpose(0, 1).unsqueeze(0), 16, order))
    table = torch.nn.utils.rnn.pad_sequence(
        list(order.to(torch.int32).split(counts.tolist())), batch_first=True
    )

    def part(begin: int, end: int) -> Callable[[], torch.Tensor]:
        starts = F.pad(queries.cumsum(0), (1, 0)).to(torch.int32)
        rows = query[starts[begin] : starts[end]]
        options = {
            "cu_seqlens_q": starts[begin : end + 1] - starts[begin],
            "seqused_k": lengths[begin:end].to(torch.int32),
            "block_table": table[begin:end].contiguous(),
            "max_seqlen_q": int(queries[begin:end].max()),
            "causal": "bottom_right",
        }
        return lambda: attention(rows, *pages, **options)

    prompts, others = part(0, 4), part(4, 32)
    calls: Calls = {OURS: part(0, 32), PARTS: lambda: (prompts(), others())}
    if importlib.util.find_spec("vllm"):
        forward = packed_forward(query, key, value, queries, lengths, True)
        torch.testing.assert_close(forward(), calls[OURS](), atol=2e-2, rtol=2e-2)
        calls["vLLM"] = forward
    return calls


def report(title: str, timings: dict, ratios: dict[str, float]) -> None:
    disturbed = any(timing.disturbed for timing in timings.values())
    times = f"{timings[OURS].median:8.3f} ms"
    text = "  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    print(title, times, text, "(disturbed)" if disturbed else "", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a case")
    parser.add_argument("--flex", action="store_true", help="also FlexAttention: compiles slowly")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows, mixed = [], []
    lengths = torch.logspace(4, 11, 32, base=2).round().int().tolist()
    with num_threads(options.threads), real_time_priority() as real_time, torch.no_grad():
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            for Sq, Sk in ((1, 64), (1, 512), (1, 4096), (1, 16384), (4, 4096)):
                calls, size = decode_calls(Sq, Sk, dtype, options.flex)
                timings = interleave(calls, budget=options.budget)
                ours = timings[OURS].median
                ratios = {
                    f"{peer} / ours": timing.median / ours
                    for peer, timing in timings.items()
                    if peer not in (OURS, READ)
                }
                ratios["share of the bandwidth"] = timings[READ].median / ours
                case = {"what": "decode", "dtype": name, "Sq": Sq, "Sk": Sk, "bytes": size}
                for row in result_tables.beside(case, timings, OURS):
                    rows.append(row | {"GB/s": size / row["median ms"] / 1e6})
                report(f"decode {name:8} Sq {Sq} Sk {Sk:5}", timings, ratios)
            timings = interleave(varlen_calls(lengths, dtype), budget=options.budget)
            work = sum(n * n for n in lengths) / 1024**2
            rate = "ours / work at the dense rate"
            ratios = {
                "padded / ours": timings[f"{PYTORCH}, padded"].median / timings[OURS].median,
                rate: timings[OURS].median / (work * timings["dense"].median),
            }
            own, *others = result_tables.beside(
                {"what": "32 sequences", "dtype": name}, timings, OURS
            )
            rows += [own | {rate: ratios[rate]}, *others]
            report(f"32 sequences {name:8}", timings, ratios)
            timings = interleave(mixed_calls(dtype), budget=options.budget)
            mixed += result_tables.beside({"dtype": name}, timings, OURS)
            ratios = {
                f"{peer} / ours": timing.median / timings[OURS].median
                for peer, timing in timings.items()
                if peer != OURS
            }
            report(f"mixed batch {name:8}", timings, ratios)
    about = machine() | {"isa": _native.active_isa(), "threads": options.threads}
    about |= {"real_time": real_time}
    result_tables.write(MIXED, about, mixed)
    about |= {"sequences": " ".join(map(str, lengths))}
    result_tables.write(RESULTS, about, rows)
    print("saved", RESULTS.name, "and", MIXED.name)


if __name__ == "__main__":
    main()
