"""Attention backward from the saved log-sum-exp (Dao 2023, FlashAttention-2, Algorithm 2). It never
holds more than BLOCK_M x BLOCK_N scores, and no two programs add to the same float:

    delta = rowsum(do * o) - dlse          attention_delta_kernel, a block of queries
    p  = exp(s - lse)                      recomputed in each of the kernels below
    dp = do vᵀ
    ds = p * (dp - delta)
    dv = pᵀ do,  dk = scale dsᵀ q          attention_dkdv_kernel, a block of keys
    dq = scale ds k                        attention_dq_kernel, a block of queries
    dbias = ds, summed where broadcast     attention_dbias_kernel, a block of the bias
    dsinks = -Σ exp(sink - lse) delta      attention_dsinks_kernel, a head

Dropout replaces p by z * p in dv and dp by z * dp in ds, where z is the scale of the kept weights
and 0 for the others (delta is unchanged, for do * o already holds it). There are seven products a
score, nine with dbias, instead of the five of one kernel with atomics: the price of the same bits
every time. If the weights were returned too, their gradient adds to dp, and attention_weights.py
adds its part to delta.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import (
    LOG2E,
    KernelTraits,
    RowView,
    ScoreTile,
    any_visible,
    batch_of,
    clear_blind_queries,
    clear_unseen_keys,
    dropout_keep_in_call,
    dropout_keep_in_call_at,
    key_block,
    load_lse,
    load_tile,
    place_of_keys,
    probabilities_of,
    query_block,
    row_number,
    score_pointers,
    seeing_blocks,
    seeing_queries,
    seen_blocks,
    seen_keys,
    sequence_of,
    store_tile,
    visible_tile,
    weights_gradient,
)


@triton.jit
def attention_delta_kernel(
    out, grad_out, delta, grad_lse, Hq, Sq,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """delta [B, Hq, Sq]. One program: BLOCK_M queries of one head. grad_lse: ScoreView, 1 key."""
    blocks = tl.cdiv(Sq, BLOCK_M)
    m_start = tl.program_id(0) % blocks * BLOCK_M
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = matrix // Hq, matrix % Hq
    offs_m, offs_dv = tl.arange(0, BLOCK_M).to(INDEX), tl.arange(0, BLOCK_DV)
    rows = m_start + offs_m < Sq
    o = load_tile(out, b, h, m_start, offs_m, offs_dv, rows, DV, BLOCK_DV).to(tl.float32)
    do = load_tile(grad_out, b, h, m_start, offs_m, offs_dv, rows, DV, BLOCK_DV).to(tl.float32)
    # delta <- rowsum(do * o) - dlse
    # A fully masked row has o = 0 and adds nothing to the gradient of a sink, whatever do holds.
    value = tl.sum(tl.where(o == 0, 0.0, o * do), 1)
    if grad_lse is not None:
        pointers = score_pointers(grad_lse, b, h, m_start, 0, offs_m, 0)
        value -= tl.load(pointers, mask=rows, other=0.0)
    tl.store(delta + matrix * Sq + m_start + offs_m, value, mask=rows)


class QueryOperands(NamedTuple):
    """What the backward reads of queries: all of a call, or one block of them in registers."""

    q: Any  # RowView, or [BLOCK_M, BLOCK_D]
    do: Any  # RowView, or [BLOCK_M, BLOCK_DV]
    lse: Any  # pointer, see row_number, or [BLOCK_M, 1] as load_lse returns it
    delta: Any  # pointer, or [BLOCK_M, 1]


class KeyBlock(NamedTuple):
    """The keys of a tile: BLOCK_N keys of a sequence, n_start the first."""

    k: Any  # [BLOCK_N, BLOCK_D]
    v: Any  # [BLOCK_N, BLOCK_DV]
    seq: Any  # Sequence
    n_start: Any


@triton.jit
def score_gradients(s, dp, lse, delta, seen, keep, call, tile, SCALE_ONLY: tl.constexpr):
    """Returns the kept probabilities (for dv), ds and dlogit, from s = q·k and dp = do·v.

    lse and delta have the shape of tile.i; seen and keep may be None. ds is the gradient of
    scale * q·k.
    """
    p, slope = probabilities_of(s, lse, seen, call, tile, SCALE_ONLY)
    dropped, difference = p, dp
    if call.weights is not None:
        difference += weights_gradient(call, tile)
    if keep is not None:
        dropped = tl.where(keep, p, 0.0)
        difference = tl.where(keep, difference * call.dropout.scale, 0.0)
    difference -= delta
    if seen is not None:  # dp and delta may be NaN where hidden
        difference = tl.where(seen, difference, 0.0)
    # ds <- p * (dp - delta)
    dlogit = p * difference
    ds = dlogit * slope
    return dropped, ds, dlogit


# -- dk and dv -----------------------------------------------------------------------------


@triton.jit
def keys_meet_queries(dk, dv, keys, queries, h, call, m_begin, m_end, traits, MASKED: tl.constexpr):
    """Adds to dk and dv of a block of keys what the queries [m_begin, m_end) of head h contribute,
    in transposed tiles."""
    BLOCK_M: tl.constexpr = traits.BLOCK_M
    BLOCK_N: tl.constexpr = traits.BLOCK_N
    PRECISION: tl.constexpr = traits.PRECISION
    seq, n_start, lse, delta = keys.seq, keys.n_start, queries.lse, queries.delta
    offs_m = tl.arange(0, BLOCK_M).to(traits.INDEX)
    offs_n = tl.arange(0, BLOCK_N).to(traits.INDEX)
    offs_d, offs_dv = tl.arange(0, traits.BLOCK_D), tl.arange(0, traits.BLOCK_DV)
    i, j = offs_m[None, :], offs_n[:, None]
    matrix, first = seq.b * call.Hq + h, row_number(call, seq, h)
    b = batch_of(call.cu_seqlens_q, seq)
    for m_start in tl.range(m_begin, m_end, BLOCK_M):
        tile = ScoreTile(seq, h, m_start, n_start, i, j)
        seen, rows = None, None
        if MASKED and (call.mask is not None or call.key_padding is not None):
            seen = visible_tile(call, tile)
        if MASKED:
            rows = seeing_queries(call, seq, seen, m_start, n_start, offs_m, BLOCK_N)
        start = seq.q_start + m_start
        q = load_tile(queries.q, b, h, start, offs_m, offs_d, rows, traits.D, traits.BLOCK_D)
        do = load_tile(queries.do, b, h, start, offs_m, offs_dv, rows, traits.DV, traits.BLOCK_DV)
        at = first + m_start + offs_m
        if MASKED:
            lse_i = load_lse(lse + at, rows)[None, :]
            delta_i = tl.load(delta + at, mask=rows, other=0.0)[None, :]
        else:  # each query sees keys, and is within its sequence
            lse_i, delta_i = tl.load(lse + at)[None, :], tl.load(delta + at)[None, :]
        keep = None
        if call.dropout is not None:
            if call.pages is None:
                row = m_start + tl.arange(0, BLOCK_M)[:, None]
                kept = dropout_keep_in_call(call, matrix, row, n_start, BLOCK_M, BLOCK_N)
                keep = tl.trans(kept)
            else:  # a page may begin anywhere in a group of 8 columns
                keep = dropout_keep_in_call_at(call, matrix, m_start + i, n_start + j)

        # -- s^T <- k q^T, dp^T <- v do^T, ds <- p * (dp - delta) --
        s = tl.dot(keys.k, tl.trans(q), input_precision=PRECISION)
        dp = tl.dot(keys.v, tl.trans(do), input_precision=PRECISION)
        if MASKED and seen is None:
            seen = visible_tile(call, tile)
        p, ds, _ = score_gradients(s, dp, lse_i, delta_i, seen, keep, call, tile, traits.SCALE_ONLY)
        # -- dv <- dv + p^T do, dk <- dk + ds^T q --
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def keys_meet_all_queries(dk, dv, keys, queries, h_kv, call, traits, EVEN_M: tl.constexpr):
    """Adds to dk and dv of a block of keys what all queries of its sequence contribute, head by
    head of the group, in order."""
    seq, n_start = keys.seq, keys.n_start
    begin, full_begin, full_end, end = seeing_blocks(
        call, seq, n_start, traits.BLOCK_M, traits.BLOCK_N
    )
    for in_group in tl.range(0, call.group):
        h = h_kv * call.group + in_group
        if call.mask is not None or call.key_padding is not None:
            dk, dv = keys_meet_queries(dk, dv, keys, queries, h, call, begin, end, traits, True)
        else:
            if call.right is not None:
                dk, dv = keys_meet_queries(
                    dk, dv, keys, queries, h, call, begin, full_begin, traits, True
                )
            dk, dv = keys_meet_queries(
                dk, dv, keys, queries, h, call, full_begin, full_end, traits, False
            )
            if not EVEN_M or call.left is not None:
                dk, dv = keys_meet_queries(
                    dk, dv, keys, queries, h, call, full_end, end, traits, True
                )
    return clear_unseen_keys(dk, dv, call, seq, h_kv, n_start, traits.BLOCK_M, traits.INDEX)


@triton.jit
def attention_dkdv_kernel(
    q, k, v, grad_out, lse, delta, dk, dv, call, Hkv, users, first_user, q_descriptor,
    do_descriptor,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SCALE_ONLY: tl.constexpr, EVEN_M: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one key head, for the query heads that share it, in order.

    With pages: BLOCK_N keys of one page, for the sequences that use it, in order. users: int64, the
    entries b * (pages of a sequence) + n of the table that hold this page are
    users[first_user[page] : first_user[page + 1]].
    """
    traits: tl.constexpr = KernelTraits(
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, SCALE_ONLY, INDEX, PRECISION
    )
    q = RowView(q.data, q.stride_b, q.stride_h, q.stride_s, q_descriptor)
    do = RowView(
        grad_out.data, grad_out.stride_b, grad_out.stride_h, grad_out.stride_s, do_descriptor
    )
    queries = QueryOperands(q, do, lse, delta)
    offs_n, offs_d = tl.arange(0, BLOCK_N).to(INDEX), tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    if call.pages is None:
        seq, h_kv, n_start = key_block(call, Hkv, BLOCK_N)
        b, first = batch_of(call.cu_seqlens_k, seq), seq.k_start + n_start
        in_k, in_room = n_start + offs_n < seq.Sk, n_start + offs_n < seq.room
        k_tile = load_tile(k, b, h_kv, first, offs_n, offs_d, in_k, D, BLOCK_D)
        v_tile = load_tile(v, b, h_kv, first, offs_n, offs_dv, in_k, DV, BLOCK_DV)
        keys = KeyBlock(k_tile, v_tile, seq, n_start)
        dk_tile, dv_tile = keys_meet_all_queries(
            dk_tile, dv_tile, keys, queries, h_kv, call, traits, EVEN_M
        )
    else:
        blocks = tl.cdiv(call.pages.size, BLOCK_N)
        first = tl.program_id(0) % blocks * BLOCK_N
        matrix = (tl.program_id(0) // blocks).to(tl.int64)
        b, h_kv = matrix // Hkv, matrix % Hkv
        in_room = first + offs_n < call.pages.size
        columns = call.Sk // call.pages.size
        for number in tl.range(tl.load(first_user + b), tl.load(first_user + b + 1)):
            user = tl.load(users + number)
            seq = sequence_of(call, user // columns)
            page_start = user % columns * call.pages.size
            n_start = page_start + first
            in_k = in_room & (n_start + offs_n < seq.Sk)
            k_tile = load_tile(k, b, h_kv, first, offs_n, offs_d, in_k, D, BLOCK_D)
            v_tile = load_tile(v, b, h_kv, first, offs_n, offs_dv, in_k, DV, BLOCK_DV)
            own_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            own_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
            keys = KeyBlock(k_tile, v_tile, seq, n_start)
            own_dk, own_dv = keys_meet_all_queries(
                own_dk, own_dv, keys, queries, h_kv, call, traits, EVEN_M
            )
            dk_tile += own_dk
            dv_tile += own_dv

    if call.dropout is not None:
        dv_tile *= call.dropout.scale
    store_tile(dk, b, h_kv, first, offs_n, offs_d, in_room, D, dk_tile * call.scale)
    store_tile(dv, b, h_kv, first, offs_n, offs_dv, in_room, DV, dv_tile)


# -- dq ------------------------------------------------------------------------------------


@triton.jit
def queries_meet_keys(
    dq, queries, k, v, seq, h, m_start, call, n_begin, n_end, traits, MASKED: tl.constexpr
):
    """Adds to dq of a block of queries, from m_start on, what the keys [n_begin, n_end) contribute,
    in blocks."""
    BLOCK_M: tl.constexpr = traits.BLOCK_M
    BLOCK_N: tl.constexpr = traits.BLOCK_N
    PRECISION: tl.constexpr = traits.PRECISION
    offs_m = tl.arange(0, BLOCK_M).to(traits.INDEX)
    offs_n = tl.arange(0, BLOCK_N).to(traits.INDEX)
    offs_d, offs_dv = tl.arange(0, traits.BLOCK_D), tl.arange(0, traits.BLOCK_DV)
    i, j = offs_m[:, None], offs_n[None, :]
    matrix, h_kv = seq.b * call.Hq + h, h // call.group
    m_end = tl.minimum(m_start + BLOCK_M, seq.Sq)
    for n_start in tl.range(n_begin, n_end, BLOCK_N):
        tile = ScoreTile(seq, h, m_start, n_start, i, j)
        seen, rows = None, None
        if MASKED and (call.mask is not None or call.key_padding is not None):
            seen = visible_tile(call, tile)
        if MASKED:
            rows = seen_keys(call, seq, seen, m_start, m_end, n_start, offs_n)
        b, first, offs = place_of_keys(call, seq, n_start, offs_n, rows)
        k_tile = load_tile(k, b, h_kv, first, offs, offs_d, rows, traits.D, traits.BLOCK_D)
        v_tile = load_tile(v, b, h_kv, first, offs, offs_dv, rows, traits.DV, traits.BLOCK_DV)
        keep = None
        if call.dropout is not None:
            row = m_start + tl.arange(0, BLOCK_M)[:, None]
            keep = dropout_keep_in_call(call, matrix, row, n_start, BLOCK_M, BLOCK_N)

        # -- s <- q k^T, dp <- do v^T, ds <- p * (dp - delta) --
        s = tl.dot(queries.q, tl.trans(k_tile), input_precision=PRECISION)
        dp = tl.dot(queries.do, tl.trans(v_tile), input_precision=PRECISION)
        if MASKED and seen is None:
            seen = visible_tile(call, tile)
        _, ds, _ = score_gradients(
            s, dp, queries.lse, queries.delta, seen, keep, call, tile, traits.SCALE_ONLY
        )
        # -- dq <- dq + ds k --
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit
def attention_dq_kernel(
    q, k, v, grad_out, lse, delta, dq, call, k_descriptor, v_descriptor,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SCALE_ONLY: tl.constexpr, EVEN_N: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head."""
    traits: tl.constexpr = KernelTraits(
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, SCALE_ONLY, INDEX, PRECISION
    )
    seq, h, m_start = query_block(call, BLOCK_M)
    offs_m, offs_d = tl.arange(0, BLOCK_M).to(INDEX), tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    in_q = m_start + offs_m < seq.Sq
    k = RowView(k.data, k.stride_b, k.stride_h, k.stride_s, k_descriptor)
    v = RowView(v.data, v.stride_b, v.stride_h, v.stride_s, v_descriptor)
    b, first = batch_of(call.cu_seqlens_q, seq), seq.q_start + m_start
    at = row_number(call, seq, h) + m_start + offs_m
    q_tile = load_tile(q, b, h, first, offs_m, offs_d, in_q, D, BLOCK_D)
    do = load_tile(grad_out, b, h, first, offs_m, offs_dv, in_q, DV, BLOCK_DV)
    lse_i = load_lse(lse + at, in_q)[:, None]
    delta_i = tl.load(delta + at, mask=in_q, other=0.0)[:, None]
    queries = QueryOperands(q_tile, do, lse_i, delta_i)
    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    begin, full_begin, full_end, end = seen_blocks(call, seq, m_start, BLOCK_M, BLOCK_N)
    if call.mask is not None or call.key_padding is not None:
        dq_tile = queries_meet_keys(
            dq_tile, queries, k, v, seq, h, m_start, call, begin, end, traits, True
        )
    else:
        if call.left is not None:
            dq_tile = queries_meet_keys(
                dq_tile, queries, k, v, seq, h, m_start, call, begin, full_begin, traits, True
            )
        dq_tile = queries_meet_keys(
            dq_tile, queries, k, v, seq, h, m_start, call, full_begin, full_end, traits, False
        )
        if not EVEN_N or call.right is not None:
            dq_tile = queries_meet_keys(
                dq_tile, queries, k, v, seq, h, m_start, call, full_end, end, traits, True
            )
    dq_tile = clear_blind_queries(dq_tile, lse_i, call, seq, h, m_start, BLOCK_N, INDEX)
    store_tile(dq, b, h, first, offs_m, offs_d, in_q, D, dq_tile * call.scale)


# -- dbias ---------------------------------------------------------------------------------


@triton.jit
def attention_dbias_kernel(
    q, k, v, grad_out, lse, delta, dbias, call, B, kept, chunks, chunk_stride,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SCALE_ONLY: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr,
    SUM_M: tl.constexpr, SUM_N: tl.constexpr,
):  # fmt: skip
    """One program: a block of dbias, and one of the `chunks` of the tiles of scores that it sums.

    dbias: ScoreView with a stride of 0 where it is broadcast, [chunks, ...] if there are several.
    kept: how many blocks dbias has along (B, Hq, blocks of queries, blocks of keys). SUM_M, SUM_N:
    dbias has one value for all queries, for all keys.
    """
    m_blocks, n_blocks = tl.cdiv(call.Sq, BLOCK_M), tl.cdiv(call.Sk, BLOCK_N)
    # this program's place in dbias
    pid = tl.program_id(0)
    chunk, pid = pid % chunks, pid // chunks
    n_own, pid = pid % kept[3], pid // kept[3]
    m_own, pid = pid % kept[2], pid // kept[2]
    h_own, b_own = pid % kept[1], pid // kept[1]
    # the tiles that this block of dbias sums, in order; this chunk takes [first, last)
    sum_n, sum_m = n_blocks // kept[3], m_blocks // kept[2]
    sum_h, sum_b = call.Hq // kept[1], B // kept[0]
    total = tl.cast(sum_n, tl.int64) * sum_m * sum_h * sum_b
    first, last = total * chunk // chunks, total * (chunk + 1) // chunks

    offs_m, offs_n = tl.arange(0, BLOCK_M).to(INDEX), tl.arange(0, BLOCK_N).to(INDEX)
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    i, j = offs_m[:, None], offs_n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for number in tl.range(first, last):
        t = tl.cast(number, tl.int64)
        n_start = (n_own + t % sum_n) * BLOCK_N
        m_start = (m_own + t // sum_n % sum_m) * BLOCK_M
        h = h_own + t // sum_n // sum_m % sum_h
        seq = sequence_of(call, b_own + t // sum_n // sum_m // sum_h)
        tile = ScoreTile(seq, h, m_start, n_start, i, j)
        seen = visible_tile(call, tile)
        rows, columns = any_visible(seen, 1), any_visible(seen, 0)
        if tl.max(rows.to(tl.int32), 0) != 0:
            q_tile = load_tile(q, seq.b, h, m_start, offs_m, offs_d, rows, D, BLOCK_D)
            do = load_tile(grad_out, seq.b, h, m_start, offs_m, offs_dv, rows, DV, BLOCK_DV)
            h_kv = h // call.group
            b, start, offs = place_of_keys(call, seq, n_start, offs_n, columns)
            k_tile = load_tile(k, b, h_kv, start, offs, offs_d, columns, D, BLOCK_D)
            v_tile = load_tile(v, b, h_kv, start, offs, offs_dv, columns, DV, BLOCK_DV)
            matrix = seq.b * call.Hq + h
            at = row_number(call, seq, h) + m_start + offs_m
            lse_i = load_lse(lse + at, rows)[:, None]
            delta_i = tl.load(delta + at, mask=rows, other=0.0)[:, None]
            keep = None
            if call.dropout is not None:
                row = m_start + tl.arange(0, BLOCK_M)[:, None]
                keep = dropout_keep_in_call(call, matrix, row, n_start, BLOCK_M, BLOCK_N)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            dp = tl.dot(do, tl.trans(v_tile), input_precision=PRECISION)
            _, _, dlogit = score_gradients(
                s, dp, lse_i, delta_i, seen, keep, call, tile, SCALE_ONLY
            )
            acc += dlogit

    m_start, n_start = m_own * BLOCK_M, n_own * BLOCK_N
    if SUM_M:
        acc, i = tl.sum(acc, 0, keep_dims=True), tl.zeros([1, 1], INDEX)
    if SUM_N:
        acc, j = tl.sum(acc, 1, keep_dims=True), tl.zeros([1, 1], INDEX)
    pointers = score_pointers(dbias, b_own, h_own, m_start, n_start, i, j)
    pointers += tl.cast(chunk, tl.int64) * chunk_stride
    inside = (m_start + i < call.Sq) & (n_start + j < call.Sk)
    tl.store(pointers, acc.to(dbias.data.dtype.element_ty), mask=inside)


# -- dsinks --------------------------------------------------------------------------------


@triton.jit
def attention_dsinks_kernel(lse, delta, sinks, dsinks, B, Hq, Sq, BLOCK: tl.constexpr):
    """dsink = Σ p_sink * (0 - delta), p_sink = exp(sink - lse). One program: one head."""
    h = tl.program_id(0)
    sink = tl.load(sinks + h)
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for b in tl.range(0, B):
        first = (tl.cast(b, tl.int64) * Hq + h) * Sq
        for start in tl.range(0, Sq, BLOCK):
            inside = start + offs < Sq
            lse_i = tl.load(lse + first + start + offs, mask=inside, other=float("inf"))
            delta_i = tl.load(delta + first + start + offs, mask=inside, other=0.0)
            # no weight at lse = -inf: the sink is -inf too, or the token belongs to no sequence
            weight = tl.exp2((sink - lse_i) * LOG2E)
            acc -= tl.where(lse_i == float("-inf"), 0.0, weight * delta_i)
    tl.store(dsinks + h, tl.sum(acc, 0))
