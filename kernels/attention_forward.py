"""Attention forward: out = softmax(scale q kᵀ + bias, masked) v and its log-sum-exp, never holding
more than BLOCK_M x BLOCK_N scores (Dao 2023, FlashAttention-2, Algorithm 1).

Time O(Sq Sk (D + Dv)) over the blocks that some query sees; memory O(Sq) beyond the inputs and out.
Blocks that every query of the tile sees whole are computed without any mask.
"""

import triton
import triton.language as tl

from .primitives import (
    LOWEST,
    Rows,
    batch_of,
    dropout_keep_in_call,
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


@triton.jit
def attend(
    acc, row_max, row_sum, q_tile, k, v, call, seq, h, h_kv, m_start, m_end, i, n_begin, n_end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SCALE_ONLY: tl.constexpr, INDEX: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
    SPECIALIZE: tl.constexpr = False,
):  # fmt: skip
    """Adds the keys [n_begin, n_end) of h_kv, in blocks, to the softmax of the queries m_start + i,
    [M, 1].

    The queries are among [m_start, m_end). h: their head, or one for each query, [M, 1]. STAGES:
    the stages of the pipeline, None for those of the launch. SPECIALIZE: whether warps are
    specialized, see `tiles.Tiles`.
    """
    BLOCK_M: tl.constexpr = q_tile.shape[0]
    offs_n = tl.arange(0, BLOCK_N).to(INDEX)
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    j = offs_n[None, :]
    for n_start in tl.range(n_begin, n_end, BLOCK_N, num_stages=STAGES, warp_specialize=SPECIALIZE):
        seen, in_k, in_v = None, None, None
        if MASKED and (call.mask is not None or call.key_padding is not None):
            seen = visible_tile(call, seq, h, m_start, n_start, i, j)
        if MASKED:
            in_k = n_start + offs_n < seq.Sk
            in_v = seen_keys(call, seq, seen, m_start, m_end, n_start, offs_n)
        b, first, offs = place_of_keys(call, seq, n_start, offs_n, in_k)

        # -- s <- q k^T --
        k_tile = load_tile(k, b, h_kv, first, offs, offs_d, in_k, D, BLOCK_D)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if not SCALE_ONLY:
            s, _ = logits(s, call, seq, h, m_start, n_start, i, j)
        if MASKED:
            if seen is None:
                seen = visible_tile(call, seq, h, m_start, n_start, i, j)
            s = tl.where(seen, s, float("-inf"))

        # -- p <- exp(s - m), l <- alpha l + rowsum(p), acc <- alpha acc --
        acc, row_max, row_sum, p = online_softmax_update(
            acc, row_max, row_sum, s, call.scale, SCALE_ONLY
        )
        if call.dropout is not None:  # after the row sum: dropped weights count in it, too
            matrix = seq.b * call.Hq + h
            keep = dropout_keep_in_call(call, matrix, m_start + i, n_start, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p, 0.0)

        # -- acc <- acc + p v --
        v_tile = load_tile(v, b, h_kv, first, offs, offs_dv, in_v, DV, BLOCK_DV)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit
def attention_forward_kernel(
    q, k, v, out, lse, call, k_descriptor, v_descriptor,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SCALE_ONLY: tl.constexpr, EVEN_N: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. q, k, v, out: Rows; lse: [B, Hq, Sq] or None.

    SCALE_ONLY: logits are just scale * q·k, with scale > 0. EVEN_N: BLOCK_N divides the number of
    keys. INDEX: the type of offsets inside a tile.
    """
    seq, h, m_start = query_block(call, BLOCK_M)
    h_kv = h // call.group
    k = Rows(k.data, k.stride_b, k.stride_h, k.stride_s, k_descriptor)
    v = Rows(v.data, v.stride_b, v.stride_h, v.stride_s, v_descriptor)
    offs_m, offs_d = tl.arange(0, BLOCK_M).to(INDEX), tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    i, in_q = offs_m[:, None], m_start + offs_m < seq.Sq

    b, first = batch_of(call.cu_seqlens_q, seq), seq.q_start + m_start
    q_tile = load_tile(q, b, h, first, offs_m, offs_d, in_q, D, BLOCK_D)
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    m_end = tl.minimum(m_start + BLOCK_M, seq.Sq)
    begin, full_begin, full_end, end = seen_blocks(call, seq, m_start, BLOCK_M, BLOCK_N)
    # The few blocks at the edge of the visible keys are not worth a pipeline, nor its registers.
    RIM_STAGES: tl.constexpr = None if call.mask is not None or call.key_padding is not None else 1
    if call.mask is not None or call.key_padding is not None:
        full_begin, full_end = begin, begin
    else:
        if call.left is not None:
            acc, row_max, row_sum = attend(
                acc, row_max, row_sum, q_tile, k, v, call, seq, h, h_kv, m_start, m_end, i,
                begin, full_begin, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, SCALE_ONLY, INDEX, PRECISION,
                True, 1,
            )  # fmt: skip
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, q_tile, k, v, call, seq, h, h_kv, m_start, m_end, i,
            full_begin, full_end, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, SCALE_ONLY, INDEX, PRECISION,
            False, None, SPECIALIZE,
        )  # fmt: skip
    if (
        not EVEN_N
        or call.right is not None
        or call.mask is not None
        or call.key_padding is not None
    ):
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, q_tile, k, v, call, seq, h, h_kv, m_start, m_end, i,
            full_end, end, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, SCALE_ONLY, INDEX, PRECISION, True,
            RIM_STAGES,
        )  # fmt: skip

    sink = None
    if call.sinks is not None:
        sink = sinks_of(call, h, seq.q_start + m_start + offs_m)
    o, value = finish_softmax(acc, row_max, row_sum, call, sink, SCALE_ONLY)
    store_tile(out, b, h, first, offs_m, offs_dv, in_q, DV, o)
    if lse is not None:
        tl.store(lse + row_number(call, seq, h) + m_start + offs_m, value, mask=in_q)
