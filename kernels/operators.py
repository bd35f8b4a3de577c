"""torch.ops.fused_attention.* for CUDA and HIP tensors: allocation, then the launches in order.

The same arguments, results and memory layouts as the operators of the CPU (csrc/ops.cpp) and their
fake kernels (ops.py). With TRITON_INTERPRET=1 these functions also take CPU tensors, which is how
the tests run them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import launch
from .tiles import MAX_SOFTMAX_BLOCK, Tiles, arch_of, attention_tiles, softmax_tiles

# Tests set these: with small tiles, small problems have several blocks in each direction.
OVERRIDE: Tiles | None = None
MAX_BLOCK = MAX_SOFTMAX_BLOCK


def empty_like_layout(like: Tensor, last: int) -> Tensor:
    """[B, H, S, last]: dense BSHD memory if that is how `like` lies, else BHSD."""
    batch, heads, seqlen, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty((batch, seqlen, heads, last)).transpose(1, 2)
    return like.new_empty((batch, heads, seqlen, last))


def dense(x: Tensor) -> Tensor:
    """In place if its last stride is 1, else copied."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def refuse_packed(*tensors: Tensor | None) -> None:
    if any(x is not None for x in tensors):
        raise NotImplementedError(
            "cu_seqlens, seqused_k and block_table: not built yet for the Triton kernels"
        )


# -- Attention -----------------------------------------------------------------------------


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: int,
    window_left: int,
    window_right: int,
    precision: int,
    with_lse: bool,
    *options: Any,
) -> tuple[Tensor, Tensor | None]:
    out = empty_like_layout(query, value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32) if with_lse else None
    query, key, value = dense(query), dense(key), dense(value)
    call = launch.describe(query, key, scale, causal, window_left, window_right, *options)
    arch = arch_of(query.device)
    launch.forward_launch(query, key, value, out, lse, call, precision, arch, OVERRIDE).run()
    return out, lse


def attention_forward_plain(query: Tensor, key: Tensor, value: Tensor, *numbers: Any) -> Tensor:
    return _forward(query, key, value, *numbers, False)[0]


def attention_forward_plain_lse(
    query: Tensor, key: Tensor, value: Tensor, *numbers: Any
) -> tuple[Tensor, Tensor | None]:
    return _forward(query, key, value, *numbers, True)


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
    refuse_packed(cu_seqlens_q, cu_seqlens_k, seqused_k, block_table)
    numbers = (scale, causal, window_left, window_right, precision)
    options = (mask, bias, key_padding_mask, alibi_slopes, sinks, philox, softcap, dropout_p)
    return _forward(query, key, value, *numbers, True, *options)


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
    refuse_packed(cu_seqlens_q, cu_seqlens_k, seqused_k, block_table)
    if grad_weights is not None:
        raise NotImplementedError("grad_weights: only the CPU kernels return attention weights")
    dq, dk, dv = (empty_like_layout(x, x.shape[-1]) for x in (query, key, value))
    query, key, value, out, grad_out = map(dense, (query, key, value, out, grad_out))
    options = (mask, bias, key_padding_mask, alibi_slopes, sinks, philox, softcap, dropout_p)
    call = launch.describe(query, key, scale, causal, window_left, window_right, *options)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    dsinks = lse.new_empty(0)
    if sinks_grad:
        assert sinks is not None
        dsinks = lse.new_zeros(sinks.shape)
    arch = arch_of(query.device)
    for each in launch.backward_launches(
        query, key, value, out, grad_out, grad_lse, lse, delta, dq, dk, dv,
        dsinks if sinks_grad else None, call, precision, arch, OVERRIDE,
    ):  # fmt: skip
        each.run()
    dbias = query.new_empty(0)
    if bias_grad:
        assert bias is not None
        dbias = _bias_gradient(bias, query, key, value, grad_out, lse, delta, call, precision)
    return dq, dk, dv, dbias, dsinks


def _bias_gradient(
    bias: Tensor, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, lse: Tensor,
    delta: Tensor, call: launch.Call, precision: int,
) -> Tensor:  # fmt: skip
    B, Hq, Sq, D = query.shape
    Sk = key.shape[2]
    if B * Hq * Sq * Sk == 0:
        return bias.new_zeros(bias.shape)
    arch = arch_of(query.device)
    tiles = OVERRIDE or attention_tiles("dq", arch, query.dtype, max(D, value.shape[-1]))
    blocks = (launch.ceil_div(Sq, tiles.block_m), launch.ceil_div(Sk, tiles.block_n))
    chunks = launch.BiasGradient.of(bias.shape, B, Hq, *blocks).chunks
    dbias = bias.new_empty(bias.shape)
    parts = bias.new_empty((chunks, *bias.shape), dtype=torch.float32) if chunks > 1 else dbias
    operands = (query, key, value, grad_out, lse, delta, parts, chunks, call, precision, arch)
    launch.dbias_launch(*operands, tiles).run()
    return parts.sum(0).to(bias.dtype) if chunks > 1 else dbias


def dropout_keep_mask(
    philox: Tensor, dropout_p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int
) -> Tensor:
    keep = torch.ones((batch, heads, seqlen_q, seqlen_k), dtype=torch.bool, device=philox.device)
    if dropout_p > 0.0 and keep.numel():
        launch.keep_mask_launch(keep, launch.dropout_of(dropout_p, philox)).run()
    return keep


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
    delta = dx.new_empty(call.rows, dtype=torch.float32) if bias_grad else None
    terms = dx.new_empty(call.rows, dtype=torch.float32) if sinks_grad else None
    launch.softmax_backward_launch(
        rows, grads, _two_dimensional(dx), delta, sink_weight, terms, call, MAX_BLOCK
    ).run()
    dbias, dsinks = dx.new_empty(0), dx.new_empty(0, dtype=torch.float32)
    if terms is not None:
        dsinks = dx.new_empty(call.heads, dtype=torch.float32)
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
