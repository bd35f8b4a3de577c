"""Forward mode of attention, and the second derivatives that follow from it.

    forward    (out, lse) = A(x),  x = (q, k, v, bias, sinks)         attention_forward
    backward   g = J(x)ᵀ y,        y = (dout, dlse), J = ∂A/∂x        attention_backward
    tangents   ẏ = J(x) ẋ                                             attention_jvp
    tangents of the backward  ġ = d/dε J(x + ε ẋ)ᵀ (y + ε ẏ)          attention_backward_jvp

Let L(x, y, ẋ) = ⟨y, J(x) ẋ⟩ = ⟨J(x)ᵀ y, ẋ⟩ = d/dε ⟨y, A(x + ε ẋ)⟩. It is linear in y and in ẋ, and
its gradient in x is that of ⟨y, A⟩ differentiated along ẋ: derivatives may be taken in any order.
So with ẋ for the gradient that arrives at the backward (double backward), or y for the one that
arrives at the tangents (reverse over forward), the four operators are closed under one more
derivative of either kind:

    ∂L/∂y = J(x) ẋ: attention_jvp    ∂L/∂ẋ = J(x)ᵀ y: attention_backward
    ∂L/∂x = d/dε J(x + ε ẋ)ᵀ y: attention_backward_jvp with ẏ = 0

`out` and `lse` are arguments below so that nothing is computed twice, but they count as functions
of x: their share of each derivative is in that of x. The formulas of the operators, which go by
tiles, are in csrc/cpu/attention_tangents.inl: memory O(B·Hq·Sq) beyond the results. Third
derivatives, and forward mode over forward mode, raise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .. import operators as ops
from ..call.problem import check_transforms

_BACKWARD_DEFAULTS = [argument.default_value for argument in ops.backward._schema.arguments]

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of query, key, value, bias, sinks


class AttentionGradients(Function):
    """The gradients where they are part of a graph. Inputs: those of attention_backward, all."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Gradients:
        return ops.backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        _save(ctx, inputs[:7], inputs[7:26])
        *ctx.wanted, grad_weights, _ = inputs[26:]
        ctx.of_weights = grad_weights is not None

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        (grad_out, grad_lse, *primals), rest = _check_and_restore(ctx)
        direction = _wanted(ctx, directions)
        results: list[Tensor | None] = [None] * len(needed)
        if all(x is None for x in direction):
            return tuple(results)
        changes = attention_tangents(*primals, *direction, *rest)
        results[:2] = changes
        if any(needed[i] for i in (2, 3, 4, 13, 16)):
            gradients = _gradient_tangents(
                *(grad_out, grad_lse, *primals, None, None),
                *(*direction[:3], *changes, *direction[3:], *rest),
                *(needed[13], needed[16]),
            )
            for i, gradient in zip((2, 3, 4, 13, 16), gradients, strict=True):
                results[i] = gradient
        return tuple(x if need else None for x, need in zip(results, needed, strict=True))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Gradients:
        (grad_out, grad_lse, *primals), rest = _check_and_restore(ctx)
        direction = (*tangents[2:5], tangents[13], tangents[16])
        changes = tangents[5:7]
        if any(x is None for x in changes):
            changes = attention_tangents(*primals, *direction, *rest)
        return _gradient_tangents(
            *(grad_out, grad_lse, *primals, *tangents[:2]),
            *(*direction[:3], *changes, *direction[3:], *rest),
            *ctx.wanted,
        )


class AttentionTangents(Function):
    """(ȯut, l̇se). Inputs: those of attention_jvp, all."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return ops.jvp(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, (*inputs[:10], *output), inputs[10:29])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        tensors, rest = _restore(ctx)
        primals, direction, changes = tensors[:5], tensors[5:10], tensors[10:]
        grad_out, grad_lse = grads
        if grad_out is None:
            grad_out = torch.zeros_like(primals[3])
        results: list[Tensor | None] = [None] * len(needed)
        if any(needed[5:10]):
            results[5:10] = attention_gradients(
                *(grad_out, grad_lse, *primals, *rest, needed[8], needed[9])
            )
        if any(needed[i] for i in (0, 1, 2, 16, 19)):
            gradients = _gradient_tangents(
                *(grad_out, grad_lse, *primals, None, None),
                *(*direction[:3], *changes, *direction[3:], *rest),
                *(needed[16], needed[19]),
            )
            for i, gradient in zip((0, 1, 2, 16, 19), gradients, strict=True):
                results[i] = gradient
        return tuple(x if need else None for x, need in zip(results, needed, strict=True))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "attention: forward mode over forward mode is not built; take forward mode over "
            "reverse (torch.func.hessian, jacfwd of jacrev), or backend='reference'"
        )


class AttentionGradientTangents(Function):
    """The tangents of the gradients, where the graph ends."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Gradients:
        return ops.backward_jvp(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "attention: third derivatives are not built (torch.autograd.functional.hvp takes them; "
            "vhp, and torch.func.jvp of grad, do not); backend='reference' has them"
        )

    jvp = backward


def attention_gradients(*inputs: Any) -> Gradients:
    """attention_backward, part of a graph where somebody may differentiate again: with
    create_graph=True, always under torch.func, and where forward mode is on."""
    check_transforms("attention")
    differentiable = torch.is_grad_enabled() or forward_ad._current_level >= 0
    if differentiable and not torch.compiler.is_compiling():
        return AttentionGradients.apply(*inputs, *_BACKWARD_DEFAULTS[len(inputs) :])
    return ops.backward(*inputs)


def attention_tangents(*inputs: Any) -> tuple[Tensor, Tensor]:
    """attention_jvp, likewise. Everything in this module comes here first."""
    if any(x is not None for x in inputs[-6:]):
        raise NotImplementedError(
            "attention: second derivatives and forward mode of packed sequences (cu_seqlens, "
            "seqused_k, block_table) are not built; backend='reference' has them"
        )
    return AttentionTangents.apply(*inputs)


def _gradient_tangents(*inputs: Any) -> Gradients:
    return AttentionGradientTangents.apply(*inputs)


# -- Contexts ----------------------------------------------------------------------------

# All operators share 19 inputs: scale, causal, window_left, window_right, precision, six tensors
# (mask, bias, key_padding_mask, alibi_slopes, sinks, philox), softcap, dropout_p, and six of packed
# sequences.


def _save(ctx: Any, tensors: tuple[Any, ...], rest: tuple[Any, ...]) -> None:
    saved = (*tensors, *rest[5:11])
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)
    ctx.count, ctx.numbers, ctx.others = len(tensors), rest[:5], rest[11:]
    ctx.set_materialize_grads(False)


def _restore(ctx: Any) -> tuple[list[Any], tuple[Any, ...]]:
    """The tensors that were saved, and the inputs that all operators share."""
    saved = ctx.saved_tensors
    return list(saved[: ctx.count]), (*ctx.numbers, *saved[ctx.count :], *ctx.others)


def _check_and_restore(ctx: Any) -> tuple[list[Any], tuple[Any, ...]]:
    if ctx.of_weights:
        raise NotImplementedError(
            "attention: second derivatives of the attention weights are not built; "
            "backend='reference' has those of the output"
        )
    return _restore(ctx)


def _wanted(ctx: Any, directions: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Without those of gradients of bias and sinks that were not asked for, which are empty."""
    bias_grad, sinks_grad = ctx.wanted
    *three, bias, sinks = directions
    return (*three, bias if bias_grad else None, sinks if sinks_grad else None)
