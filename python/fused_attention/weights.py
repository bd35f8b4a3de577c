"""The attention weights themselves, for those who ask to see them: block by block, from the lse.

    weights_ij = dropout(exp(scale · q_i·k_j + bias_ij - lse_i)),  0 where key j is hidden

Given the log-denominators that the fused kernel left behind, each block of weights stands alone, so
that the average over heads is taken on the fly: memory beyond the result O(BLOCK), forward and
backward. (Dropout needs its whole mask, a byte per weight and head.) The derivative takes lse for
an input of its own; what reaches it goes on through the kernel's differentiable lse, and both
together are the derivative of softmax. Time O(B·Hq·Sq·Sk·D), half of it for causal.

Two operators written in Python: opaque to torch.compile, whose graph would otherwise hold every
block, and differentiated by the Function below, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .attention import dropout_mask
from .problem import transform_is_active

BLOCK = 2**20  # weights that are held at a time, over all heads (at least one row's)


class _Call(NamedTuple):
    """The arguments of the operators after the tensors that are always there."""

    mask: Tensor | None
    bias: Tensor | None
    key_padding_mask: Tensor | None
    philox: Tensor | None
    scale: float
    causal: bool
    dropout_p: float
    average: bool


class _Block(NamedTuple):
    """A part of the weights: all heads of some samples and rows, up to the last visible column."""

    samples: slice
    rows: slice
    columns: slice

    def of(self, x: Tensor) -> Tensor:
        """The part of x [N or 1, H or 1, L or 1, S or 1]: a view."""
        sizes = zip((self.samples, slice(None), self.rows, self.columns), x.shape, strict=True)
        return x[tuple(part if size != 1 else slice(None) for part, size in sizes)]


def _blocks(query: Tensor, key: Tensor, causal: bool) -> Iterator[_Block]:
    N, H, L, _ = query.shape
    S = key.shape[2]
    if N * H * L * S == 0:
        return
    samples = max(1, BLOCK // (H * L * S))
    rows = L if samples > 1 else min(L, max(1, BLOCK // (H * S)))
    for n in range(0, N, samples):
        for i in range(0, L, rows):
            end = min(i + rows, L)
            yield _Block(
                slice(n, min(n + samples, N)), slice(i, end), slice(min(end, S) if causal else S)
            )


def _probabilities(
    query: Tensor, key: Tensor, lse: Tensor, call: _Call, block: _Block, space: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(scale · q kᵀ + bias - lse) [n, H, l, s], and scale · q and k of the block, in float32.

    The former lies in `space`, of which every block makes use anew: fresh pages cost more than exp.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query[block.samples, :, block.rows].to(dtype) * call.scale
    k = key[block.samples, :, block.columns].to(dtype)
    padding = call.key_padding_mask
    if padding is not None:  # may hold any bits, and 0 · NaN is NaN
        padding = padding[block.samples, None, None, block.columns]
        k = k.masked_fill(padding.mT, 0.0)
    lse = lse[block.samples, :, block.rows]
    lse = lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)  # -inf - -inf would be NaN
    s = space[: q.shape[:3].numel() * k.shape[2]].view(*q.shape[:3], k.shape[2])
    products = (x.flatten(0, 1) for x in (-lse, q, k.mT))
    torch.baddbmm(*products, out=s.flatten(0, 1))
    if call.bias is not None:
        s += block.of(call.bias)
    if call.mask is not None:
        s.masked_fill_(~block.of(call.mask), float("-inf"))
    if padding is not None:
        s.masked_fill_(padding, float("-inf"))
    p = s.exp_()
    if call.causal:
        p[..., block.rows.start :].tril_()
    return p, q, k


def _space(query: Tensor, key: Tensor) -> Tensor:
    """For the largest block."""
    block = next(_blocks(query, key, causal=False), None)
    samples, rows = (part.stop for part in block[:2]) if block else (0, 0)
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(samples * query.shape[1] * rows * key.shape[2], dtype=dtype)


def _kept(query: Tensor, key: Tensor, call: _Call) -> tuple[Tensor | None, float]:
    """The mask of dropout [N, H, L, S], and the factor of what it keeps."""
    if call.philox is None:
        return None, 1.0
    dropped = round(65536 * call.dropout_p)
    N, H, L, _ = query.shape
    kept = dropout_mask(N, H, L, key.shape[2], call.dropout_p, call.philox, query.device)
    return kept, 65536 / (65536 - dropped) if dropped < 65536 else 0.0


def _weights(query: Tensor, key: Tensor, lse: Tensor, *options: Any) -> Tensor:
    call, dtype = _Call(*options[:-1]), options[-1]
    N, H, L, _ = query.shape
    shape = (N, L, key.shape[2]) if call.average else (N, H, L, key.shape[2])
    weights = query.new_zeros(shape, dtype=dtype)
    kept, factor = _kept(query, key, call)
    space = _space(query, key)
    with torch.autocast(query.device.type, enabled=False):
        for block in _blocks(query, key, call.causal):
            p, _, _ = _probabilities(query, key, lse, call, block, space)
            if kept is not None:
                p = p.mul_(block.of(kept)).mul_(factor)
            if call.average:
                weights[block] = p.mean(1)
            else:
                block.of(weights).copy_(p)
    return weights


def _weights_backward(
    grad: Tensor, query: Tensor, key: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call, bias_grad = _Call(*options[:-1]), options[-1]
    heads = query.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    dq, dk = torch.zeros_like(query, dtype=dtype), torch.zeros_like(key, dtype=dtype)
    dlse = torch.zeros_like(lse)
    dbias = query.new_zeros(0)
    if bias_grad and call.bias is not None:
        dbias = torch.zeros_like(call.bias, dtype=dtype)
    kept, factor = _kept(query, key, call)
    factor = factor / heads if call.average else factor
    space = _space(query, key)
    with torch.autocast(query.device.type, enabled=False):
        for block in _blocks(query, key, call.causal):
            p, q, k = _probabilities(query, key, lse, call, block, space)
            dp = grad[block].unsqueeze(1) if call.average else block.of(grad)
            ds = p.mul_(dp).mul_(factor)  # p <- p · dp
            if kept is not None:
                ds.mul_(block.of(kept))
            dlse[block.samples, :, block.rows] = -ds.sum(-1)
            dq[block.samples, :, block.rows] = call.scale * (ds @ k)
            dk[block.samples, :, block.columns] += ds.mT @ q
            if dbias.numel():
                part = block.of(dbias)
                part += ds.sum_to_size(part.shape)
    return dq.to(query.dtype), dk.to(key.dtype), dlse, dbias.to(_bias_dtype(call))


def _bias_dtype(call: _Call) -> torch.dtype:
    return torch.float32 if call.bias is None else call.bias.dtype


# -- Operators ---------------------------------------------------------------------------

_OPTIONS = (
    "Tensor? mask, Tensor? bias, Tensor? key_padding_mask, Tensor? philox, float scale, "
    "bool causal, float dropout_p, bool average"
)
_library = torch.library.Library("fused_attention", "FRAGMENT")
_library.define(
    f"attention_weights(Tensor query, Tensor key, Tensor lse, {_OPTIONS}, ScalarType dtype)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attention_weights_backward(Tensor grad, Tensor query, Tensor key, Tensor lse, "
    f"{_OPTIONS}, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("attention_weights", _weights, "CompositeExplicitAutograd")
_library.impl("attention_weights_backward", _weights_backward, "CompositeExplicitAutograd")
weights_op = torch.ops.fused_attention.attention_weights.default
weights_backward_op = torch.ops.fused_attention.attention_weights_backward.default


@torch.library.register_fake("fused_attention::attention_weights")
def _fake_weights(query: Tensor, key: Tensor, lse: Tensor, *options: Any) -> Tensor:
    N, H, L, _ = query.shape
    shape = (N, L, key.shape[2]) if options[-2] else (N, H, L, key.shape[2])
    return query.new_empty(shape, dtype=options[-1])


@torch.library.register_fake("fused_attention::attention_weights_backward")
def _fake_weights_backward(
    grad: Tensor, query: Tensor, key: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call, bias_grad = _Call(*options[:-1]), options[-1]
    dbias = query.new_empty(0, dtype=_bias_dtype(call))
    if bias_grad and call.bias is not None:
        dbias = torch.empty_like(call.bias)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(lse), dbias


# -- Gradient ----------------------------------------------------------------------------


class AttentionWeights(Function):
    """weights, from the arguments of the operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return weights_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.numbers = inputs[7:11]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bias_grad = ctx.needs_input_grad[4]
        dq, dk, dlse, dbias = weights_backward_op(grad, *ctx.saved_tensors, *ctx.numbers, bias_grad)
        return dq, dk, dlse, None, dbias if bias_grad else None, *(None,) * 7


def weights_extra_bytes(query: Tensor, key: Tensor, dropout_p: float) -> int:
    """Working memory of `attention_weights`, about: for `explain`."""
    space = _space(query.to("meta"), key.to("meta"))
    kept = query.shape[:3].numel() * key.shape[2] if dropout_p else 0
    return space.numel() * space.element_size() + kept


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    dropout_p: float = 0.0,
    philox: Tensor | None = None,
    average: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weights of `attention(query, key, ..., return_lse=True)`, which gave `lse` [N, H, L].

    query [N, H, L, D], key [N, H, S, D]; mask (True = may attend) and bias [N or 1, H or 1, L or 1,
    S or 1], key_padding_mask [N, S] (True = padding), causal False or
    "top_left", dropout_p with the `philox`
    state int64 [2] of the call. Returns [N, L, S], averaged over the heads, or else [N, H, L, S],
    in `dtype` (default: query's). A row that sees no key: 0. Differentiable once in query, key,
    lse and bias; deterministic.
    """
    scale = query.shape[-1] ** -0.5
    philox = philox if dropout_p else None
    options = (mask, bias, key_padding_mask, philox, scale, bool(causal), dropout_p, average)
    inputs = (query, key, lse, *options, dtype or query.dtype)
    grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, lse, bias)
    )
    return AttentionWeights.apply(*inputs) if grad or transform_is_active() else weights_op(*inputs)
