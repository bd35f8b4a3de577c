"""Attention forward for few queries against many keys, such as one new token against a cache. The
keys are cut into splits, whose results are combined in a fixed order (Flash-Decoding, Dao et al.
2023):

    acc_s, m_s, l_s = the online softmax over split s          attention_decode_kernel
    out = Σ exp(m_s - m) acc_s / Σ exp(m_s - m) l_s            attention_combine_kernel

Every key and value is read once for all queries of all heads that share it: row r = g Sq + i of a
tile is query i of the group's head g. Time O(Sq Sk D) in parallel over the splits; memory
O(splits Sq Dv).
"""

import triton
import triton.language as tl

from .attention_forward import QueryBlock, attend
from .primitives import (
    LOG2E,
    LOWEST,
    KernelTraits,
    SoftmaxState,
    batch_of,
    empty_state,
    finish_softmax,
    load_tile,
    row_number,
    sequence_of,
    sinks_of,
    store_tile,
    visible_block_range,
)


@triton.jit
def attention_decode_kernel(
    q, k, v, out, lse, partials, call, Hkv, splits, rows,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SCALE_ONLY: tl.constexpr, EVEN_N: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one of the `splits` of the keys of one key head.

    With several splits, each stores its partial in a SoftmaxState of float32: acc [splits, rows,
    Dv], row_max and row_sum [splits, rows]. A single split stores out and lse, and partials is
    None. rows: B Hq Sq, packed Hq Tq.
    """
    traits: tl.constexpr = KernelTraits(
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, SCALE_ONLY, INDEX, PRECISION
    )
    split, pid = tl.program_id(0) % splits, tl.program_id(0) // splits
    b, h_kv = (pid // Hkv).to(tl.int64), (pid % Hkv).to(tl.int64)
    seq = sequence_of(call, b)
    q_b = batch_of(call.cu_seqlens_q, seq)
    begin, _, _, end = visible_block_range(
        0, seq.Sq, seq.offset, call.left, call.right, seq.Sk, BLOCK_N
    )
    part = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), splits) * BLOCK_N
    begin += split * part
    end = tl.minimum(begin + part, end)

    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    # One block of rows, unless a sequence is longer than the caller said.
    for r_start in tl.range(0, call.group * seq.Sq, BLOCK_M):
        r = r_start + tl.arange(0, BLOCK_M)
        in_q = r < call.group * seq.Sq
        r = tl.where(in_q, r, 0)
        h, i = h_kv * call.group + r // seq.Sq, (r % seq.Sq).to(INDEX)
        q_tile = load_tile(q, q_b, h[:, None], seq.q_start, i, offs_d, in_q, D, BLOCK_D)
        queries = QueryBlock(q_tile, seq, h[:, None], 0, seq.Sq, i[:, None])
        state = empty_state(BLOCK_M, BLOCK_DV)
        state = attend(state, queries, k, v, h_kv, call, begin, end, traits, True, None)
        row = row_number(call, seq, h) + i
        if partials is None:
            sink = None
            if call.sinks is not None:
                sink = sinks_of(call, h, seq.q_start + i)
            o, value = finish_softmax(state, call, sink, SCALE_ONLY)
            store_tile(out, q_b, h[:, None], seq.q_start, i, offs_dv, in_q, DV, o)
            if lse is not None:
                tl.store(lse + row, value, mask=in_q)
        else:
            at = split.to(tl.int64) * rows + row
            tl.store(partials.row_max + at, state.row_max, mask=in_q)
            tl.store(partials.row_sum + at, state.row_sum, mask=in_q)
            pointers = partials.acc + at[:, None] * DV + offs_dv[None, :]
            tl.store(pointers, state.acc, mask=in_q[:, None] & (offs_dv < DV)[None, :])


@triton.jit
def attention_combine_kernel(
    partials, out, lse, call, splits, rows,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, SCALE_ONLY: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of out; the rows are [B, Hq, Sq], packed [Hq, Tq]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, offs_dv = row < rows, tl.arange(0, BLOCK_DV)
    # m <- max over the splits
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    for split in tl.range(0, splits):
        at = tl.cast(split, tl.int64) * rows + row
        m = tl.load(partials.row_max + at, mask=inside, other=float("-inf"))
        row_max = tl.maximum(row_max, m)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for split in tl.range(0, splits):
        at = tl.cast(split, tl.int64) * rows + row
        m = tl.load(partials.row_max + at, mask=inside, other=float("-inf"))
        # alpha <- exp(m_s - m); l_s and acc_s are 0 if a split saw no key
        if SCALE_ONLY:
            alpha = tl.exp2(m - row_max)
        else:
            alpha = tl.exp2((m - row_max) * LOG2E)
        # l <- l + alpha l_s, acc <- acc + alpha acc_s
        row_sum += alpha * tl.load(partials.row_sum + at, mask=inside, other=0.0)
        pointers = partials.acc + at[:, None] * DV + offs_dv[None, :]
        mask = inside[:, None] & (offs_dv < DV)[None, :]
        acc += alpha[:, None] * tl.load(pointers, mask=mask, other=0.0)

    i, matrix = row % call.Sq, row // call.Sq
    b, h = matrix // call.Hq, matrix % call.Hq
    sink = None
    if call.sinks is not None:
        sink = sinks_of(call, h, i)
    o, value = finish_softmax(SoftmaxState(acc, row_max, row_sum), call, sink, SCALE_ONLY)
    store_tile(out, b[:, None], h[:, None], 0, i, offs_dv, inside, DV, o)
    if lse is not None:
        tl.store(lse + row, value, mask=inside)
