"""Softmax of rows, p = e^s / (e^sink + Σ e^s) over the visible columns of s = scale · x + bias, and
its gradient ds = p · (dp - Σ p · dp).

A row that fits into one block is read once and stays in registers; a longer one is taken in blocks
with an online softmax (Milakov & Gimelshein 2018) and read twice. Time O(rows · columns), no memory
beyond the results. An operand has a stride for each dimension of the rows, 0 where it is broadcast,
so rows may lie anywhere.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import LOG2E, dropout_keep


class RowOperand(NamedTuple):
    """An operand that has a place for each row. strides are those of the rows' dimensions, stride_k
    is that along a row, in elements."""

    data: Any
    strides: Any
    stride_k: Any


class SoftmaxParams(NamedTuple):
    """Everything about a call beyond the tensors that have rows."""

    sizes: Any  # sizes of the rows' dimensions, the last one fastest
    rows: Any
    columns: Any
    queries: Any  # rows are numbered [..., heads, queries]
    heads: Any
    scale: Any
    offset: Any  # row i sees columns j <= i + offset; None = all
    sinks: Any  # float32 [heads], or None
    dropout: Any


class RowTile(NamedTuple):
    """A tile of scores and weights: columns n_start + offs_n of some rows."""

    row: Any  # the numbers of the rows, int64 [ROWS]
    valid: Any  # whether there is such a row, [ROWS]
    n_start: Any
    offs_n: Any  # 0, 1, 2, ... [BLOCK]


@triton.jit
def row_offsets(row, sizes, strides):
    """Returns the offsets of the rows: Σ index_d · stride_d."""
    offset = row * 0
    for d in tl.static_range(len(sizes) - 1, -1, -1):
        offset += row % sizes[d] * strides[d]
        row = row // sizes[d]
    return offset


@triton.jit
def row_pointers(x, offsets, tile):
    start = tl.cast(tile.n_start, tl.int64) * x.stride_k
    return x.data + (offsets[:, None] + start) + tile.offs_n[None, :].to(tl.int64) * x.stride_k


@triton.jit
def inside_rows(call, tile):
    """Returns which elements of a tile exist."""
    return tile.valid[:, None] & (tile.n_start + tile.offs_n < call.columns)[None, :]


@triton.jit
def visible_columns(call, tile):
    seen = inside_rows(call, tile)
    if call.offset is not None:
        last = tile.row % call.queries + call.offset
        seen = seen & (tile.n_start + tile.offs_n[None, :] <= last[:, None])
    return seen


@triton.jit
def row_logits(x, mask, bias, offsets, call, tile):
    """Returns s = scale * x + bias, -inf where hidden, and what is visible. offsets: x, mask,
    bias."""
    seen = visible_columns(call, tile)
    if mask is not None:
        seen = seen & (tl.load(row_pointers(mask, offsets[1], tile), mask=seen, other=0) != 0)
    s = tl.load(row_pointers(x, offsets[0], tile), mask=seen, other=0.0)
    s = s.to(tl.float32) * call.scale
    if bias is not None:
        value = tl.load(row_pointers(bias, offsets[2], tile), mask=seen, other=0.0)
        s += value.to(tl.float32)
    return tl.where(seen, s, float("-inf")), seen


@triton.jit
def row_keep(call, tile):
    row, n_start = tile.row, tile.n_start
    matrix, i = (row // call.queries)[:, None], (row % call.queries)[:, None]
    return dropout_keep(call.dropout, matrix, i, n_start, row.shape[0], tile.offs_n.shape[0])


@triton.jit
def store_weights(p, seen, out, weights, offsets, call, tile):
    """Stores out = dropout(p), and p in weights if it is kept for the backward; hidden columns are
    exactly 0. offsets: out."""
    inside = inside_rows(call, tile)
    p = tl.where(seen, p, 0.0)
    if weights is not None:
        at = tile.row[:, None] * call.columns + tile.n_start + tile.offs_n[None, :]
        tl.store(weights + at, p.to(weights.dtype.element_ty), mask=inside)
    if call.dropout is not None:
        p = tl.where(row_keep(call, tile), p * call.dropout.scale, 0.0)
    pointers = row_pointers(out, offsets, tile)
    tl.store(pointers, p.to(out.data.dtype.element_ty), mask=inside)


@triton.jit
def masked_softmax_kernel(
    x, out, weights, mask, bias, sink_weight, call,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows. x, out, mask (bytes), bias: RowOperand; weights [rows, columns] and
    sink_weight [rows] are kept for the backward, or None. ONE_BLOCK: columns <= BLOCK."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < call.rows
    offs_n = tl.arange(0, BLOCK)
    x_at, out_at = (
        row_offsets(row, call.sizes, x.strides),
        row_offsets(row, call.sizes, out.strides),
    )
    mask_at, bias_at = x_at, x_at
    if mask is not None:
        mask_at = row_offsets(row, call.sizes, mask.strides)
    if bias is not None:
        bias_at = row_offsets(row, call.sizes, bias.strides)
    offsets = (x_at, mask_at, bias_at)

    # -- m <- rowmax(s), l <- rowsum(exp(s - m)) --
    if ONE_BLOCK:
        tile = RowTile(row, valid, 0, offs_n)
        s, seen = row_logits(x, mask, bias, offsets, call, tile)
        row_max = tl.max(s, 1)
        # -inf - (-inf) is NaN: for a fully masked row 0 replaces the maximum, and all p are 0
        origin = tl.where(row_max == float("-inf"), 0.0, row_max)
        p = tl.exp2((s - origin[:, None]) * LOG2E)
        row_sum = tl.sum(p, 1)
    else:
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
        for n_start in tl.range(0, call.columns, BLOCK):
            tile = RowTile(row, valid, n_start, offs_n)
            s, _ = row_logits(x, mask, bias, offsets, call, tile)
            new_max = tl.maximum(row_max, tl.max(s, 1))
            origin = tl.where(new_max == float("-inf"), 0.0, new_max)
            alpha = tl.exp2((row_max - origin) * LOG2E)
            row_sum = row_sum * alpha + tl.sum(tl.exp2((s - origin[:, None]) * LOG2E), 1)
            row_max = new_max
        origin = tl.where(row_max == float("-inf"), 0.0, row_max)

    # -- the sink joins the denominator --
    factor = 1.0
    if call.sinks is not None:
        sink = tl.load(call.sinks + row // call.queries % call.heads, mask=valid, other=0.0)
        top = tl.maximum(row_max, sink)
        top = tl.where(top == float("-inf"), 0.0, top)
        factor = tl.exp2((row_max - top) * LOG2E)
        weight = tl.exp2((sink - top) * LOG2E)
        row_sum = row_sum * factor + weight
        if sink_weight is not None:
            tl.store(sink_weight + row, tl.where(row_sum == 0.0, 0.0, weight / row_sum), mask=valid)
    factor = tl.where(row_sum == 0.0, 0.0, factor / row_sum)

    # -- p <- exp(s - m) / l --
    if ONE_BLOCK:
        p = p * factor[:, None]
        store_weights(p, seen, out, weights, out_at, call, tile)
    else:
        for n_start in tl.range(0, call.columns, BLOCK):
            tile = RowTile(row, valid, n_start, offs_n)
            s, seen = row_logits(x, mask, bias, offsets, call, tile)
            p = tl.exp2((s - origin[:, None]) * LOG2E) * factor[:, None]
            store_weights(p, seen, out, weights, out_at, call, tile)


# -- backward ------------------------------------------------------------------------------


@triton.jit
def weights_and_gradients(weights, grad_out, offsets, call, tile):
    """Returns p and dp. dp is 0 where p is (as in hidden columns), even if grad_out is NaN there.
    offsets: weights, grad_out."""
    inside = inside_rows(call, tile)
    p = tl.load(row_pointers(weights, offsets[0], tile), mask=inside, other=0.0)
    p = p.to(tl.float32)
    dp = tl.load(row_pointers(grad_out, offsets[1], tile), mask=inside, other=0.0)
    dp = tl.where(p != 0.0, dp.to(tl.float32), 0.0)
    if call.dropout is not None:
        dp = tl.where(row_keep(call, tile), dp * call.dropout.scale, 0.0)
    return p, dp


@triton.jit
def masked_softmax_backward_kernel(
    weights, grad_out, dx, delta, sink_weight, sink_terms, call,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = scale ds. One program: ROWS rows. delta: [rows], or None. sink_terms: [rows], each row's
    term of dsinks, or None."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < call.rows
    offs_n = tl.arange(0, BLOCK)
    offsets = (
        row_offsets(row, call.sizes, weights.strides),
        row_offsets(row, call.sizes, grad_out.strides),
    )
    dx_at = row_offsets(row, call.sizes, dx.strides)
    # -- delta <- rowsum(p * dp) --
    if ONE_BLOCK:
        tile = RowTile(row, valid, 0, offs_n)
        p, dp = weights_and_gradients(weights, grad_out, offsets, call, tile)
        total = tl.sum(p * dp, 1)
    else:
        total = tl.zeros([ROWS], tl.float32)
        for n_start in tl.range(0, call.columns, BLOCK):
            tile = RowTile(row, valid, n_start, offs_n)
            p, dp = weights_and_gradients(weights, grad_out, offsets, call, tile)
            total += tl.sum(p * dp, 1)
    if delta is not None:
        tl.store(delta + row, total, mask=valid)
    if sink_terms is not None:
        # dsink <- p_sink * (0 - delta)
        share = tl.load(sink_weight + row, mask=valid, other=0.0)
        tl.store(sink_terms + row, tl.where(share == 0.0, 0.0, -share * total), mask=valid)
    # -- dx <- scale * p * (dp - delta) --
    if ONE_BLOCK:
        ds = tl.where(p != 0.0, p * (dp - total[:, None]), 0.0) * call.scale
        pointers = row_pointers(dx, dx_at, tile)
        tl.store(pointers, ds.to(dx.data.dtype.element_ty), mask=inside_rows(call, tile))
    else:
        for n_start in tl.range(0, call.columns, BLOCK):
            tile = RowTile(row, valid, n_start, offs_n)
            p, dp = weights_and_gradients(weights, grad_out, offsets, call, tile)
            ds = tl.where(p != 0.0, p * (dp - total[:, None]), 0.0) * call.scale
            pointers = row_pointers(dx, dx_at, tile)
            tl.store(pointers, ds.to(dx.data.dtype.element_ty), mask=inside_rows(call, tile))


@triton.jit
def masked_softmax_dbias_kernel(
    weights, grad_out, number, delta, dbias, call, group_rows, chunks, width, chunk_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """dbias = Σ ds over the rows of a group, which are neighbours in the order of call.sizes.

    One program: BLOCK columns of one group (all columns if SUM_COLUMNS), and one of the `chunks` of
    its rows. number: a RowOperand without data, whose offset of a row is the row's number in the
    order of the input.
    """
    blocks = tl.cdiv(width, BLOCK)
    pid = tl.program_id(0)
    chunk, n_first = pid % chunks, pid // chunks % blocks * BLOCK
    group = tl.cast(pid // chunks // blocks, tl.int64)
    first = group_rows * chunk // chunks
    last = group_rows * (chunk + 1) // chunks
    offs_n = tl.arange(0, BLOCK)
    n_last = n_first + BLOCK
    if SUM_COLUMNS:
        n_last = call.columns
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(first, last, ROWS):
        in_group = start + tl.arange(0, ROWS)
        valid = in_group < last
        row = group * group_rows + in_group
        offsets = (
            row_offsets(row, call.sizes, weights.strides),
            row_offsets(row, call.sizes, grad_out.strides),
        )
        numbers = row_offsets(row, call.sizes, number.strides)
        total = tl.load(delta + numbers, mask=valid, other=0.0)
        for n_start in tl.range(n_first, n_last, BLOCK):
            tile = RowTile(numbers, valid, n_start, offs_n)
            p, dp = weights_and_gradients(weights, grad_out, offsets, call, tile)
            acc += tl.where(p != 0.0, p * (dp - total[:, None]), 0.0)
    at = dbias + tl.cast(chunk, tl.int64) * chunk_stride + group * width
    if SUM_COLUMNS:
        tl.store(at, tl.sum(tl.sum(acc, 0), 0).to(dbias.dtype.element_ty))
    else:
        inside = n_first + offs_n < width
        tl.store(at + n_first + offs_n, tl.sum(acc, 0).to(dbias.dtype.element_ty), mask=inside)


@triton.jit
def masked_softmax_dsinks_kernel(sink_terms, dsinks, call, BLOCK: tl.constexpr):
    """dsinks[h] = the sum of the sink terms of the rows of head h. One program: one head."""
    h = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    of_head = call.rows // call.heads
    for start in tl.range(0, of_head, BLOCK):
        n = (start + offs).to(tl.int64)
        row = (n // call.queries * call.heads + h) * call.queries + n % call.queries
        acc += tl.load(sink_terms + row, mask=n < of_head, other=0.0)
    tl.store(dsinks + h, tl.sum(acc, 0))
