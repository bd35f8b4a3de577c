"""Attention forward: out = softmax(scale q kᵀ + bias, masked) v and its log-sum-exp, never holding
more than BLOCK_M x BLOCK_N scores (Dao 2023, FlashAttention-2, Algorithm 1).

Time O(Sq Sk (D + Dv)) over the blocks that somebody sees; memory O(Sq) beyond the inputs and out.
Blocks that every query of the tile sees whole are computed without any mask.
"""

import triton
import triton.language as tl

from .primitives import (
    LN2,
    LOG2E,
    dropout_keep,
    load_tile,
    logits,
    online_softmax_update,
    somebody,
    store_tile,
    visible_block_range,
    visible_tile,
)


@triton.jit
def attend(
    acc, row_max, row_sum, q_tile, k, v, call, b, h, m_start, n_begin, n_end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PLAIN: tl.constexpr, INDEX: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The queries of a tile against the keys [n_begin, n_end), in blocks."""
    offs_m, offs_n = tl.arange(0, BLOCK_M).to(INDEX), tl.arange(0, BLOCK_N).to(INDEX)
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    i, j = offs_m[:, None], offs_n[None, :]
    h_kv = h // call.group
    for n_start in tl.range(n_begin, n_end, BLOCK_N):
        if MASKED:
            seen = visible_tile(call, b, h, m_start, n_start, i, j)
            in_k, in_v = n_start + offs_n < call.Sk, somebody(seen, 0)
        else:
            in_k, in_v = None, None

        # -- s <- q k^T --
        k_tile = load_tile(k, b, h_kv, n_start, offs_n, offs_d, in_k, D, BLOCK_D)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if not PLAIN:
            s, _ = logits(s, call, b, h, m_start, n_start, i, j)
        if MASKED:
            s = tl.where(seen, s, float("-inf"))

        # -- p <- exp(s - m), l <- alpha l + rowsum(p), acc <- alpha acc --
        acc, row_max, row_sum, p = online_softmax_update(
            acc, row_max, row_sum, s, call.scale, PLAIN
        )
        if call.dropout is not None:  # after the sum: the denominator is that of all weights
            matrix = b * call.Hq + h
            row = m_start + tl.arange(0, BLOCK_M)[:, None]
            keep = dropout_keep(call.dropout, matrix, row, n_start, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p, 0.0)

        # -- acc <- acc + p v --
        v_tile = load_tile(v, b, h_kv, n_start, offs_n, offs_dv, in_v, DV, BLOCK_DV)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit
def attention_forward_kernel(
    q, k, v, out, lse, call,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PLAIN: tl.constexpr, EVEN_N: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. q, k, v, out: Rows; lse: [B, Hq, Sq] or None.

    PLAIN: logits are just scale * q·k, with scale > 0. EVEN_N: BLOCK_N divides Sk. INDEX: the type
    of offsets inside a tile.
    """
    blocks = tl.cdiv(call.Sq, BLOCK_M)
    # The last queries first: under a causal mask they have the most keys.
    m_start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = matrix // call.Hq, matrix % call.Hq
    offs_m, offs_d, offs_dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    in_q = m_start + offs_m < call.Sq

    q_tile = load_tile(q, b, h, m_start, offs_m.to(INDEX), offs_d, in_q, D, BLOCK_D)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    m_end = tl.minimum(m_start + BLOCK_M, call.Sq)
    begin, full_begin, full_end, end = visible_block_range(
        m_start, m_end, call.offset, call.left, call.right, call.Sk, BLOCK_N
    )
    if call.mask is not None or call.key_padding is not None:
        full_begin, full_end = begin, begin
    else:
        if call.left is not None:
            acc, row_max, row_sum = attend(
                acc, row_max, row_sum, q_tile, k, v, call, b, h, m_start, begin, full_begin,
                D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PLAIN, INDEX, PRECISION, True,
            )  # fmt: skip
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, q_tile, k, v, call, b, h, m_start, full_begin, full_end,
            D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PLAIN, INDEX, PRECISION, False,
        )  # fmt: skip
    if (
        not EVEN_N
        or call.right is not None
        or call.mask is not None
        or call.key_padding is not None
    ):
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, q_tile, k, v, call, b, h, m_start, full_end, end,
            D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PLAIN, INDEX, PRECISION, True,
        )  # fmt: skip

    # -- out <- acc / l, lse <- m + log(l) --
    blind = row_sum == 0.0  # and so is acc, unless it met a NaN that others see
    if PLAIN:
        row_max = row_max * LN2
    factor = 1.0
    if call.sinks is not None:
        # One more logit, without a value: it only joins the denominator.
        sink = tl.load(call.sinks + h)
        top = tl.maximum(row_max, sink)
        origin = tl.where(top == float("-inf"), 0.0, top)
        factor = tl.exp2((row_max - origin) * LOG2E)
        row_sum = row_sum * factor + tl.exp2((sink - origin) * LOG2E)
        row_max = top
    if call.dropout is not None:
        factor = factor * call.dropout.scale
    factor = tl.where(blind, 0.0, factor / row_sum)
    acc = tl.where(blind[:, None], 0.0, acc * factor[:, None])
    store_tile(out, b, h, m_start, offs_m.to(INDEX), offs_dv, in_q, DV, acc)
    if lse is not None:
        value = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log(row_sum))
        tl.store(lse + matrix * call.Sq + m_start + offs_m, value, mask=in_q)
