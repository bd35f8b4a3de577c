"""Fake kernels for tracing: shapes, dtypes and strides of the operators' results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._torch import guard_or_false
from .handles import (
    arguments,
    backward,
    backward_jvp,
    check_devices,
    jvp,
    library,
    softmax_backward,
    softmax_forward,
    statistics,
    weights,
)


def empty_like_format(like: Tensor, last: Any) -> Tensor:
    """Returns an empty [B, H, S, last] in like's dtype: in BSHD memory if `like` is, else BHSD."""
    batch, heads, seqlen, _ = like.shape
    if guard_or_false(like.stride(1) < like.stride(2)):
        return like.new_empty((batch, seqlen, heads, last)).transpose(1, 2)
    return like.new_empty((batch, heads, seqlen, last))


def fake_forward_plain(query: Tensor, key: Tensor, value: Tensor, *numbers: Any) -> Tensor:
    check_devices(query, key, value)
    return empty_like_format(query, value.shape[-1])


def fake_forward(
    query: Tensor, key: Tensor, value: Tensor, *options: Any, **named_options: Any
) -> tuple[Tensor, Tensor]:
    check_devices(query, key, value, *options, *named_options.values())
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    if query.dim() == 3:  # packed sequences, [Tq, Hq, D]
        tokens, heads, _ = query.shape
        return (
            query.new_empty((tokens, heads, value.shape[-1])),
            query.new_empty((heads, tokens), dtype=lse_dtype),
        )
    return empty_like_format(query, value.shape[-1]), query.new_empty(
        query.shape[:-1], dtype=lse_dtype
    )


def _fake_gradients(call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_devices(*call.values())
    query, bias, sinks = call["query"], call["bias"], call["sinks"]

    def like(x: Tensor) -> Tensor:
        in_pages = x is not query and call["block_table"] is not None
        return (
            x.new_empty(x.shape) if x.dim() == 3 or in_pages else empty_like_format(x, x.shape[-1])
        )

    dq, dk, dv = (like(x) for x in (query, call["key"], call["value"]))
    dbias = bias.new_empty(bias.shape) if call["bias_grad"] else query.new_empty(0)
    dsinks = call["lse"].new_empty(sinks.shape if call["sinks_grad"] else 0)
    return dq, dk, dv, dbias, dsinks


def fake_backward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(arguments(backward, args, kwargs))


@torch.library.register_fake("fused_attention::attention_backward_jvp")
def _fake_backward_jvp(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(arguments(backward_jvp, args, kwargs))


@torch.library.register_fake("fused_attention::attention_jvp")
def _fake_jvp(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    check_devices(*args, *kwargs.values())
    call = arguments(jvp, args, kwargs)
    return (
        empty_like_format(call["query"], call["value"].shape[-1]),
        call["lse"].new_empty(call["lse"].shape),
    )


@torch.library.register_fake("fused_attention::attention_weights")
def _fake_weights(*args: Any, **kwargs: Any) -> Tensor:
    check_devices(*args, *kwargs.values())
    call = arguments(weights, args, kwargs)
    B, Hq, Sq, _ = call["query"].shape
    heads = () if call["average"] else (Hq,)
    return call["query"].new_empty((B, *heads, Sq, call["key"].shape[2]))


@torch.library.register_fake("fused_attention::attention_statistics")
def _fake_statistics(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_devices(*args, *kwargs.values())
    call = arguments(statistics, args, kwargs)
    B, Hq, Sq, _ = call["query"].shape
    top = call["lse"].new_empty((B, Hq, Sq, call["num_top"]))
    return (
        top.new_empty((B, Hq, call["key"].shape[2]) if call["mass"] else (B, 0)),
        top.new_empty((B, Hq, Sq) if call["entropy"] else (B, 0)),
        top,
        top.new_empty(top.shape, dtype=torch.int64),
    )


@torch.library.register_fake("fused_attention::dropout_keep_mask")
def _fake_dropout_keep_mask(philox: Tensor, dropout_p: float, *sizes: Any) -> Tensor:
    return philox.new_empty(sizes, dtype=torch.bool)


def _check_nothing(*args: Any) -> None:
    """Checks nothing: fake lengths have no values, and reading a GPU's would wait for it."""


torch.library.register_fake("fused_attention::check_sequences", _check_nothing)
library.impl("check_sequences", _check_nothing, "CUDA")


@torch.library.register_fake("fused_attention::kv_cache_append_")
def _fake_kv_cache_append(*args: Any, **kwargs: Any) -> None:
    check_devices(*args, *kwargs.values())


# -- Masked softmax ----------------------------------------------------------------------


@torch.library.register_fake("fused_attention::masked_softmax_forward")
def _fake_softmax_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_devices(*args, *kwargs.values())
    call = arguments(softmax_forward, args, kwargs)
    x, save = call["input"], call["save"]
    weights = x.new_empty(x.shape if save and call["dropout_p"] > 0 else 0)
    sink_weight = x.new_empty(
        x.shape[:-1] if save and call["sinks"] is not None else 0,
        dtype=torch.promote_types(x.dtype, torch.float32),
    )
    return x.new_empty(x.shape), weights, sink_weight


@torch.library.register_fake("fused_attention::masked_softmax_")
def _fake_softmax_in_place(*args: Any, **kwargs: Any) -> None:
    check_devices(*args, *kwargs.values())


@torch.library.register_fake("fused_attention::masked_softmax_backward")
def _fake_softmax_backward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_devices(*args, *kwargs.values())
    call = arguments(softmax_backward, args, kwargs)
    weights, bias = call["weights"], call["bias"]
    dbias = bias.new_empty(bias.shape) if call["bias_grad"] else weights.new_empty(0)
    dsinks = weights.new_empty(
        weights.shape[-3] if call["sinks_grad"] else 0,
        dtype=torch.promote_types(weights.dtype, torch.float32),
    )
    return weights.new_empty(weights.shape), dbias, dsinks
