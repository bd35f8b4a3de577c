"""The attention weights themselves, from the saved log-sum-exp, for callers that ask for them:

    w = dropout(exp(s - lse)), 0 where hidden    attention_weights_kernel, a tile of one head, or of
                                                 all heads in order if they are averaged
    delta <- delta + rowsum(w * dw) / total      attention_weights_delta_kernel, a block of queries

Given lse, tiles do not depend on each other (Dao 2023, FlashAttention-2, Algorithm 2, line 11), so
no memory beside the result is needed. In the ordinary backward the gradient dw of the weights adds
to do vᵀ, and here it adds to delta. total = rowsum(exp(s - lse)) is 1 except for the rounding of
lse: because of the division by total, ds sums to 0 over a row as exactly as without w.
"""

import triton
import triton.language as tl

from .primitives import (
    LOG2E,
    KernelTraits,
    ScoreTile,
    any_visible,
    dropout_keep_in_call,
    load_lse,
    load_tile,
    probabilities_of,
    query_block,
    row_number,
    score_pointers,
    seen_blocks,
    sequence_of,
    visible_tile,
    weights_gradient,
)


@triton.jit
def weights_tile(q_tile, k, lse_i, call, tile, traits):
    """Returns the weights of one head before dropout, 0 where hidden, and which ones are kept."""
    BLOCK_M: tl.constexpr = traits.BLOCK_M
    BLOCK_N: tl.constexpr = traits.BLOCK_N
    D: tl.constexpr = traits.D
    BLOCK_D: tl.constexpr = traits.BLOCK_D
    seq, h, n_start = tile.seq, tile.h, tile.n_start
    offs_n, offs_d = tl.arange(0, BLOCK_N).to(traits.INDEX), tl.arange(0, BLOCK_D)
    seen = visible_tile(call, tile)
    columns = any_visible(seen, 0)
    k_tile = load_tile(k, seq.b, h // call.group, n_start, offs_n, offs_d, columns, D, BLOCK_D)
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision=traits.PRECISION)
    p, _ = probabilities_of(s, lse_i, seen, call, tile, traits.SCALE_ONLY)
    if call.dropout is not None:
        matrix, row = seq.b * call.Hq + h, tile.m_start + tl.arange(0, BLOCK_M)[:, None]
        seen = seen & dropout_keep_in_call(call, matrix, row, n_start, BLOCK_M, BLOCK_N)
    return p, seen


@triton.jit
def attention_weights_kernel(
    q, k, lse, weights, call, heads,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SCALE_ONLY: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weights: ScoreView, with a head stride of 0 if averaged. heads: 1 if averaged, else Hq."""
    traits: tl.constexpr = KernelTraits(
        D, None, BLOCK_M, BLOCK_N, BLOCK_D, None, SCALE_ONLY, INDEX, PRECISION
    )
    m_blocks, n_blocks = tl.cdiv(call.Sq, BLOCK_M), tl.cdiv(call.Sk, BLOCK_N)
    pid = tl.program_id(0)
    n_start, pid = pid % n_blocks * BLOCK_N, pid // n_blocks
    m_start, matrix = pid % m_blocks * BLOCK_M, (pid // m_blocks).to(tl.int64)
    seq, group = sequence_of(call, matrix // heads), call.Hq // heads
    offs_m, offs_n = tl.arange(0, BLOCK_M).to(INDEX), tl.arange(0, BLOCK_N).to(INDEX)
    begin, _, _, end = seen_blocks(call, seq, m_start, BLOCK_M, BLOCK_N)
    first = matrix % heads * group
    last = tl.where((n_start >= begin) & (n_start < end), first + group, first)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for h in tl.range(first, last):
        in_q = m_start + offs_m < seq.Sq
        offs_d = tl.arange(0, BLOCK_D)
        q_tile = load_tile(q, seq.b, h, m_start, offs_m, offs_d, in_q, D, BLOCK_D)
        lse_i = load_lse(lse + row_number(call, seq, h) + m_start + offs_m, in_q)[:, None]
        tile = ScoreTile(seq, h, m_start, n_start, offs_m[:, None], offs_n[None, :])
        p, kept = weights_tile(q_tile, k, lse_i, call, tile, traits)
        acc += tl.where(kept, p, 0.0)
    if call.dropout is not None:
        acc *= call.dropout.scale
    i, j = offs_m[:, None], offs_n[None, :]
    pointers = score_pointers(weights, seq.b, first, m_start, n_start, i, j)
    value = (acc / group).to(weights.data.dtype.element_ty)
    tl.store(pointers, value, mask=(m_start + i < call.Sq) & (n_start + j < call.Sk))


@triton.jit
def attention_weights_delta_kernel(
    q, k, lse, delta, call,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SCALE_ONLY: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head."""
    traits: tl.constexpr = KernelTraits(
        D, None, BLOCK_M, BLOCK_N, BLOCK_D, None, SCALE_ONLY, INDEX, PRECISION
    )
    seq, h, m_start = query_block(call, BLOCK_M)
    offs_m, offs_n = tl.arange(0, BLOCK_M).to(INDEX), tl.arange(0, BLOCK_N).to(INDEX)
    in_q, at = m_start + offs_m < seq.Sq, row_number(call, seq, h) + m_start + offs_m
    q_tile = load_tile(q, seq.b, h, m_start, offs_m, tl.arange(0, BLOCK_D), in_q, D, BLOCK_D)
    lse_i = load_lse(lse + at, in_q)
    i, j = offs_m[:, None], offs_n[None, :]
    total, product = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    begin, _, _, end = seen_blocks(call, seq, m_start, BLOCK_M, BLOCK_N)
    for n_start in tl.range(begin, end, BLOCK_N):
        tile = ScoreTile(seq, h, m_start, n_start, i, j)
        p, kept = weights_tile(q_tile, k, lse_i[:, None], call, tile, traits)
        # dw may be anything where a weight is not kept
        dw = weights_gradient(call, tile)
        product += tl.sum(tl.where(kept, p * dw, 0.0), 1)
        total += tl.sum(p, 1)
    if call.sinks is not None:
        total += tl.exp2((tl.load(call.sinks + h) - lse_i) * LOG2E)
    if call.dropout is not None:
        product *= call.dropout.scale
    value = tl.load(delta + at, mask=in_q, other=0.0)
    tl.store(delta + at, value + tl.where(total == 0.0, 0.0, product / total), mask=in_q)
