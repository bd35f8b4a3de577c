"""Attention forward: out = softmax(scale q kᵀ + bias, masked) v and its log-sum-exp, never holding
more than BLOCK_M x BLOCK_N scores (Dao 2023, FlashAttention-2, Algorithm 1).

Time O(Sq Sk (D + Dv)) over the blocks that some query sees; memory O(Sq) beyond the inputs and out.
Blocks that every query of the tile sees whole are computed without any mask.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import (
    KernelTraits,
    RowView,
    ScoreTile,
    SoftmaxState,
    batch_of,
    dropout_keep_in_call,
    empty_state,
    finish_softmax,
    load_tile,
    logits,
    online_softmax_update,
    place_of_keys,
    query_block,
    row_number,
    seen_blocks,
    seen_keys,
    sinks_of,
    store_tile,
    visible_tile,
)


class QueryBlock(NamedTuple):
    """The queries of a tile: m_start + i of a sequence, which are among [m_start, m_end)."""

    q: Any  # [BLOCK_M, BLOCK_D]
    seq: Any  # Sequence
    h: Any  # the query head: a number, or one for each query, [BLOCK_M, 1]
    m_start: Any
    m_end: Any
    i: Any  # [BLOCK_M, 1]


@triton.jit
def attend(
    state, queries, k, v, h_kv, call, n_begin, n_end, traits,
    MASKED: tl.constexpr, STAGES: tl.constexpr, SPECIALIZE: tl.constexpr = False,
):  # fmt: skip
    """Adds the keys [n_begin, n_end) of h_kv, in blocks, to the softmax of a block of queries.

    STAGES: the stages of the pipeline, None for those of the launch. SPECIALIZE: whether warps are
    specialized, see `tiles.Tiles`.
    """
    BLOCK_M: tl.constexpr = traits.BLOCK_M
    BLOCK_N: tl.constexpr = traits.BLOCK_N
    seq, h, m_start, i = queries.seq, queries.h, queries.m_start, queries.i
    offs_n = tl.arange(0, BLOCK_N).to(traits.INDEX)
    offs_d, offs_dv = tl.arange(0, traits.BLOCK_D), tl.arange(0, traits.BLOCK_DV)
    j = offs_n[None, :]
    for n_start in tl.range(n_begin, n_end, BLOCK_N, num_stages=STAGES, warp_specialize=SPECIALIZE):
        tile = ScoreTile(seq, h, m_start, n_start, i, j)
        seen, in_k, in_v = None, None, None
        if MASKED and (call.mask is not None or call.key_padding is not None):
            seen = visible_tile(call, tile)
        if MASKED:
            in_k = n_start + offs_n < seq.Sk
            in_v = seen_keys(call, seq, seen, m_start, queries.m_end, n_start, offs_n)
        b, first, offs = place_of_keys(call, seq, n_start, offs_n, in_k)

        # -- s <- q k^T --
        k_tile = load_tile(k, b, h_kv, first, offs, offs_d, in_k, traits.D, traits.BLOCK_D)
        s = tl.dot(queries.q, tl.trans(k_tile), input_precision=traits.PRECISION)
        if not traits.SCALE_ONLY:
            s, _ = logits(s, call, tile)
        if MASKED:
            if seen is None:
                seen = visible_tile(call, tile)
            s = tl.where(seen, s, float("-inf"))

        # -- p <- exp(s - m), l <- alpha l + rowsum(p), acc <- alpha acc --
        state, p = online_softmax_update(state, s, call.scale, traits.SCALE_ONLY)
        if call.dropout is not None:  # after the row sum: dropped weights count in it, too
            matrix = seq.b * call.Hq + h
            keep = dropout_keep_in_call(call, matrix, m_start + i, n_start, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p, 0.0)

        # -- acc <- acc + p v --
        v_tile = load_tile(v, b, h_kv, first, offs, offs_dv, in_v, traits.DV, traits.BLOCK_DV)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, state.acc, input_precision=traits.PRECISION)
        state = SoftmaxState(acc, state.row_max, state.row_sum)
    return state


@triton.jit
def attention_forward_kernel(
    q, k, v, out, lse, call, k_descriptor, v_descriptor,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SCALE_ONLY: tl.constexpr, EVEN_N: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. q, k, v, out: RowView; lse: [B, Hq, Sq] or None.

    EVEN_N: BLOCK_N divides the number of keys. The constants of KernelTraits are described there.
    """
    traits: tl.constexpr = KernelTraits(
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, SCALE_ONLY, INDEX, PRECISION
    )
    seq, h, m_start = query_block(call, BLOCK_M)
    h_kv = h // call.group
    k = RowView(k.data, k.stride_b, k.stride_h, k.stride_s, k_descriptor)
    v = RowView(v.data, v.stride_b, v.stride_h, v.stride_s, v_descriptor)
    offs_m, offs_d = tl.arange(0, BLOCK_M).to(INDEX), tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    i, in_q = offs_m[:, None], m_start + offs_m < seq.Sq

    b, first = batch_of(call.cu_seqlens_q, seq), seq.q_start + m_start
    q_tile = load_tile(q, b, h, first, offs_m, offs_d, in_q, D, BLOCK_D)
    state = empty_state(BLOCK_M, BLOCK_DV)

    queries = QueryBlock(q_tile, seq, h, m_start, tl.minimum(m_start + BLOCK_M, seq.Sq), i)
    begin, full_begin, full_end, end = seen_blocks(call, seq, m_start, BLOCK_M, BLOCK_N)
    # The few blocks at the edge of the visible keys are not worth a pipeline, nor its registers.
    RIM_STAGES: tl.constexpr = None if call.mask is not None or call.key_padding is not None else 1
    if call.mask is not None or call.key_padding is not None:
        full_begin, full_end = begin, begin
    else:
        if call.left is not None:
            state = attend(state, queries, k, v, h_kv, call, begin, full_begin, traits, True, 1)
        state = attend(
            state, queries, k, v, h_kv, call, full_begin, full_end, traits, False, None, SPECIALIZE
        )
    if (
        not EVEN_N
        or call.right is not None
        or call.mask is not None
        or call.key_padding is not None
    ):
        state = attend(state, queries, k, v, h_kv, call, full_end, end, traits, True, RIM_STAGES)

    sink = None
    if call.sinks is not None:
        sink = sinks_of(call, h, seq.q_start + m_start + offs_m)
    o, value = finish_softmax(state, call, sink, SCALE_ONLY)
    store_tile(out, b, h, first, offs_m, offs_dv, in_q, DV, o)
    if lse is not None:
        tl.store(lse + row_number(call, seq, h) + m_start + offs_m, value, mask=in_q)
