"""torch.ops.fused_attention.* for CUDA and HIP tensors: allocation, then the launches in order.

The same arguments, results and memory layouts as the operators of the CPU (csrc/ops.cpp) and their
fake kernels (ops.py). With TRITON_INTERPRET=1 these functions also take CPU tensors, which is how
the tests run them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentValueError, describe_error
from ..operators.memory import has_shared_elements, share_memory
from . import launch
from .tiles import MAX_SOFTMAX_BLOCK, Tiles, arch_of, attention_tiles, softmax_tiles

# Tests set these: with small tiles, small problems have several blocks in each direction.
OVERRIDE: Tiles | None = None
MAX_BLOCK = MAX_SOFTMAX_BLOCK

HIGHEST = 0  # of the precisions of float32 products


def empty_like_layout(like: Tensor, last: int) -> Tensor:
    """[B, H, S, last]: dense BSHD memory if that is how `like` lies, else BHSD."""
    batch, heads, seqlen, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty((batch, seqlen, heads, last)).transpose(1, 2)
    return like.new_empty((batch, heads, seqlen, last))


def dense(x: Tensor) -> Tensor:
    """In place if its last stride is 1, else copied."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# -- Attention -----------------------------------------------------------------------------


class Layout(NamedTuple):
    """How tokens lie: packed sequences are [T, H, D], pages [pages, page size, Hkv, D]."""

    packed: bool = False
    paged: bool = False

    def queries(self, x: Tensor) -> Tensor:
        """A view [B, H, S, D], packed [1, H, T, D]."""
        return x.transpose(0, 1).unsqueeze(0) if self.packed else x

    def keys(self, x: Tensor) -> Tensor:
        """A view [B, H, S, D], packed [1, H, T, D], paged [pages, Hkv, page size, D]."""
        return x.transpose(1, 2) if self.paged else self.queries(x)

    def new(self, like: Tensor, last: int) -> Tensor:
        """As the tensor `like`, but for its last size."""
        if self.packed:
            return like.new_empty((*like.shape[:-1], last))
        return empty_like_layout(like, last)

    def new_keys(self, like: Tensor) -> Tensor:
        return like.new_empty(like.shape) if self.paged else self.new(like, like.shape[-1])


NOT_PACKED = (None,) * 6


def _forward(
    *inputs: Any,
    with_lse: bool,
    options: tuple[Any, ...] = launch.NO_OPTIONS,
    places: tuple[Any, ...] = NOT_PACKED,
) -> tuple[Tensor, Tensor | None]:
    """inputs, options (from mask to dropout_p) and places (from cu_seqlens_q on): the arguments of
    attention_forward, in order."""
    query, key, value, scale, causal, window_left, window_right, precision = inputs
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, block_table = places
    layout = Layout(cu_seqlens_q is not None, block_table is not None)
    result = layout.new(query, value.shape[-1])
    query, out = layout.queries(dense(query)), layout.queries(result)
    key, value = layout.keys(dense(key)), layout.keys(dense(value))
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32) if with_lse else None
    numbers = (scale, causal, window_left, window_right)
    lengths = map(contiguous, (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table))
    call = launch.describe(query, key, *numbers, *options, *lengths)
    arch = arch_of(query.device)

    longest_q, longest_k = call.Sq, call.Sk
    if layout.packed:
        longest_q = launch.longest(max_seqlen_q, call.Sq)
        longest_k = call.Sk if layout.paged else launch.longest(max_seqlen_k, call.Sk)
    window = (window_left, 0 if causal else window_right)
    heads = (call.Hq, key.shape[1])
    splits = launch.decode_splits(call.B, *heads, longest_q, longest_k, window)
    if call.group * call.Sq >= launch.LIMIT:  # the hint may be wrong, and 32 bits count the rows
        splits = 0
    operands = (query, key, value, out, lse)
    if splits == 0:
        launches = [launch.forward_launch(*operands, call, precision, arch, OVERRIDE)]
    else:
        parts: Any = (None, None, None)
        if splits > 1:
            sizes = (splits, out.shape[:-1].numel())
            acc = out.new_empty((*sizes, out.shape[-1]), dtype=torch.float32)
            parts = (acc, *out.new_empty((2, *sizes), dtype=torch.float32))
        launches = launch.decode_launches(
            *operands, splits, parts, longest_q, call, precision, arch, OVERRIDE
        )
    for each in launches:
        each.run()
    return result, lse.squeeze(0) if lse is not None and layout.packed else lse


def attention_forward_plain(query: Tensor, key: Tensor, value: Tensor, *numbers: Any) -> Tensor:
    return _forward(query, key, value, *numbers, with_lse=False)[0]


def attention_forward_plain_lse(
    query: Tensor, key: Tensor, value: Tensor, *numbers: Any
) -> tuple[Tensor, Tensor | None]:
    return _forward(query, key, value, *numbers, with_lse=True)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: int,
    window_left: int,
    window_right: int,
    precision: int,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    philox: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    numbers = (scale, causal, window_left, window_right, precision)
    options = (mask, bias, key_padding_mask, alibi_slopes, sinks, philox, softcap, dropout_p)
    places = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, block_table)
    inputs = (query, key, value, *numbers)
    return _forward(*inputs, with_lse=True, options=options, places=places)


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: int,
    window_left: int,
    window_right: int,
    precision: int,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    philox: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    bias_grad: bool = False,
    sinks_grad: bool = False,
    grad_weights: Tensor | None = None,
    average_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = Layout(cu_seqlens_q is not None, block_table is not None)
    grad_query = layout.new(query, query.shape[-1])
    grad_key, grad_value = layout.new_keys(key), layout.new_keys(value)
    dq, dk, dv = layout.queries(grad_query), layout.keys(grad_key), layout.keys(grad_value)
    query, out, grad_out = (layout.queries(dense(x)) for x in (query, out, grad_out))
    key, value = layout.keys(dense(key)), layout.keys(dense(value))
    if layout.packed:
        lse = lse.unsqueeze(0)
        grad_lse = None if grad_lse is None else grad_lse.unsqueeze(0)
    options: tuple[Any, ...] = (
        mask,
        bias,
        key_padding_mask,
        alibi_slopes,
        sinks,
        philox,
        softcap,
        dropout_p,
    )
    lengths = map(contiguous, (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table))
    numbers = (scale, causal, window_left, window_right)
    call = launch.describe(query, key, *numbers, *options, *lengths)
    weights = launch.weights_gradient(grad_weights, average_weights, call.Hq)
    call = call._replace(weights=weights)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    dsinks = lse.new_empty(0)
    if sinks_grad:
        assert sinks is not None
        dsinks = lse.new_zeros(sinks.shape)
    arch = arch_of(query.device)
    for each in launch.backward_launches(
        query, key, value, out, grad_out, grad_lse, lse, delta, dq, dk, dv,
        dsinks if sinks_grad else None, call, precision, arch, OVERRIDE, page_users(call),
    ):  # fmt: skip
        each.run()
    dbias = query.new_empty(0)
    if bias_grad:
        assert bias is not None
        dbias = _bias_gradient(bias, query, key, value, grad_out, lse, delta, call, precision)
    return grad_query, grad_key, grad_value, dbias, dsinks


def page_users(call: launch.Call) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Which entries b * (pages of a sequence) + n of the table are in use, sorted by page, and
    where those of each page begin: int64 [entries], [pages + 1]."""
    if call.pages is None:
        return None, None
    table, size, count = call.pages.table, call.pages.size, call.pages.count
    first_key = torch.arange(table.shape[1], device=table.device) * size
    used = first_key.new_full((call.B,), call.Sk)
    if call.seqused_k is not None:
        used = call.seqused_k
    elif call.cu_seqlens_k is not None:
        used = call.cu_seqlens_k.diff()
    in_use = first_key < used.unsqueeze(1)
    pages = torch.where(in_use, table.clamp(0, count - 1), count).flatten()
    pages, users = pages.sort(stable=True)
    every = torch.arange(count + 1, device=table.device, dtype=pages.dtype)
    return users, torch.searchsorted(pages, every)


def _bias_gradient(
    bias: Tensor, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, lse: Tensor,
    delta: Tensor, call: launch.Call, precision: int,
) -> Tensor:  # fmt: skip
    B, Hq, Sq, D = query.shape
    Sk = call.Sk
    if B * Hq * Sq * Sk == 0:
        return bias.new_zeros(bias.shape)
    arch = arch_of(query.device)
    head_dim = max(D, value.shape[-1])
    tiles = OVERRIDE or attention_tiles("dq", arch, query.dtype, head_dim, per_score=True)
    blocks = (launch.ceil_div(Sq, tiles.block_m), launch.ceil_div(Sk, tiles.block_n))
    chunks = launch.BiasGradient.of(bias.shape, B, Hq, *blocks).chunks
    dbias = bias.new_empty(bias.shape)
    parts = bias.new_empty((chunks, *bias.shape), dtype=torch.float32) if chunks > 1 else dbias
    operands = (query, key, value, grad_out, lse, delta, parts, chunks, call, precision, arch)
    launch.dbias_launch(*operands, tiles).run()
    return parts.sum(0).to(bias.dtype) if chunks > 1 else dbias


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    causal: int,
    window_left: int,
    window_right: int,
    average: bool,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    philox: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
) -> Tensor:
    query, key = dense(query), dense(key)
    masks = (mask, bias, key_padding_mask, alibi_slopes)
    options: tuple[Any, ...] = (*masks, None, philox, softcap, dropout_p)
    call = launch.describe(query, key, scale, causal, window_left, window_right, *options)
    weights = query.new_empty((call.B, 1 if average else call.Hq, call.Sq, call.Sk))
    if call.Hq == 0:
        weights.zero_()
    else:
        arch = arch_of(query.device)
        operands = (query, key, lse.contiguous(), weights, call)
        launch.weights_launch(*operands, HIGHEST, arch, OVERRIDE).run()
    return weights.squeeze(1) if average else weights


def dropout_keep_mask(
    philox: Tensor, dropout_p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int
) -> Tensor:
    keep = torch.ones((batch, heads, seqlen_q, seqlen_k), dtype=torch.bool, device=philox.device)
    if dropout_p > 0.0 and keep.numel():
        launch.keep_mask_launch(keep, launch.dropout_of(dropout_p, philox)).run()
    return keep


def kv_cache_append_(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
) -> None:
    for name, x in (("key_cache", key_cache), ("value_cache", value_cache)):
        if has_shared_elements(x):
            expected, got = "memory of its own for each element", "overlapping strides"
            raise ArgumentValueError(describe_error(name, expected, got))
    if share_memory(key_cache, value_cache):
        expected = "memory apart from key_cache's"
        raise ArgumentValueError(describe_error("value_cache", expected, "a view of the same"))

    def apart(x: Any) -> Any:
        """What lies in a cache is read before it is written to."""
        shared = x is not None and (share_memory(x, key_cache) or share_memory(x, value_cache))
        return x.clone() if shared else x

    key, value, cache_seqlens, block_table = map(apart, (key, value, cache_seqlens, block_table))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[key.dtype.itemsize]
    caches = [Layout(paged=block_table is not None).keys(x) for x in (key_cache, value_cache)]
    tensors = (x.view(bits) for x in (*caches, key, value))
    launch.cache_append_launch(*tensors, *map(contiguous, (cache_seqlens, block_table))).run()


# -- Masked softmax ------------------------------------------------------------------------


def _two_dimensional(x: Tensor) -> Tensor:
    return x if x.dim() > 1 else x.unsqueeze(0)


def masked_softmax_forward(
    input: Tensor,
    scale: float,
    causal: int,
    save: bool,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    philox: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(input, memory_format=torch.contiguous_format)
    save_weights, save_sinks = save and dropout_p > 0.0, save and sinks is not None
    weights = torch.empty_like(out) if save_weights else out.new_empty(0)
    sink_weight = out.new_empty(out.shape[:-1] if save_sinks else 0, dtype=torch.float32)
    rows = _two_dimensional(input)
    call = launch.row_call(rows.shape, scale, causal, sinks, philox, dropout_p)
    launch.softmax_launch(
        rows,
        _two_dimensional(out),
        weights if save_weights else None,
        mask,
        bias,
        sink_weight if save_sinks else None,
        call,
        MAX_BLOCK,
    ).run()
    return out, weights, sink_weight


def masked_softmax_(
    input: Tensor,
    scale: float,
    causal: int,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    philox: Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    if has_shared_elements(input):
        expected = "memory of its own for each element"
        raise ArgumentValueError(describe_error("input", expected, "overlapping strides"))
    for name, x in (("mask", mask), ("bias", bias), ("sinks", sinks), ("philox", philox)):
        if x is not None and share_memory(input, x):
            expected = "memory apart from input's, which is overwritten"
            raise ArgumentValueError(describe_error(name, expected, "a view of the same"))
    rows = _two_dimensional(input)
    call = launch.row_call(rows.shape, scale, causal, sinks, philox, dropout_p)
    launch.softmax_launch(rows, rows, None, mask, bias, None, call, MAX_BLOCK).run()


def masked_softmax_backward(
    grad_out: Tensor,
    weights: Tensor,
    scale: float,
    causal: int,
    bias: Tensor | None = None,
    sink_weight: Tensor | None = None,
    philox: Tensor | None = None,
    dropout_p: float = 0.0,
    bias_grad: bool = False,
    sinks_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(weights, memory_format=torch.contiguous_format)
    rows, grads = _two_dimensional(weights), _two_dimensional(grad_out)
    call = launch.row_call(rows.shape, scale, causal, None, philox, dropout_p)
    count = call.rows if rows.numel() else 0
    delta = dx.new_empty(count, dtype=torch.float32) if bias_grad else None
    terms = dx.new_empty(count, dtype=torch.float32) if sinks_grad else None
    launch.softmax_backward_launch(
        rows, grads, _two_dimensional(dx), delta, sink_weight, terms, call, MAX_BLOCK
    ).run()
    dbias, dsinks = dx.new_empty(0), dx.new_empty(0, dtype=torch.float32)
    if terms is not None:
        dsinks = dx.new_zeros(call.heads, dtype=torch.float32)
        if rows.numel():
            launch.softmax_dsinks_launch(terms, dsinks, call).run()
    if delta is not None:
        assert bias is not None
        dbias = bias.new_zeros(bias.shape)
        if rows.numel():
            sizes = softmax_tiles(call.columns, MAX_BLOCK)
            work = launch.RowGroups.of(bias, rows.shape, sizes.block)
            several = work.chunks > 1
            parts = dbias
            if several:
                parts = dx.new_empty((work.chunks, *bias.shape), dtype=torch.float32)
            launch.softmax_dbias_launch(rows, grads, delta, parts, work, call, sizes).run()
            dbias = parts.sum(0).to(bias.dtype) if several else dbias
    return dx, dbias, dsinks
