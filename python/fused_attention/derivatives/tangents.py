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
from torch.autograd import Function

from .. import operators as ops
from ..operators._torch import check_transforms, forward_mode_is_on, is_compiling, schema_of
from ..operators.arguments import DIFFERENTIABLE, SEQUENCES
from ..operators.handles import names_of

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of DIFFERENTIABLE
NamedArguments = dict[str, Any]  # the arguments of an operator by name, and others

_DIRECTION = tuple(f"tangent_{name}" for name in DIFFERENTIABLE)


class AttentionGradients(Function):
    """Computes the gradients, as part of a graph. Inputs: all arguments of attention_backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Gradients:
        return ops.backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        _save(ctx, ops.backward, inputs)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        call, needed = _saved(ctx, ops.backward), _needed(ctx, ops.backward)
        # The gradients of bias and sinks that were not asked for are empty.
        wanted = {"bias": call["bias_grad"], "sinks": call["sinks_grad"]}
        for name, tangent in zip(DIFFERENTIABLE, directions, strict=True):
            call[f"tangent_{name}"] = tangent if wanted.get(name, True) else None
        results: NamedArguments = {}
        if any(call[name] is not None for name in _DIRECTION):
            call["tangent_out"], call["tangent_lse"] = attention_tangents(call)
            results |= {"grad_out": call["tangent_out"], "grad_lse": call["tangent_lse"]}
            call |= {"tangent_grad_out": None, "tangent_grad_lse": None}
            results |= _gradient_tangents(call, needed)
        return _in_order(results, needed)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Gradients:
        call = _saved(ctx, ops.backward)
        changes = dict(zip(names_of(ops.backward), tangents, strict=True))
        call |= {f"tangent_{name}": tangent for name, tangent in changes.items()}
        if call["tangent_out"] is None or call["tangent_lse"] is None:
            call["tangent_out"], call["tangent_lse"] = attention_tangents(call)
        return _apply(AttentionGradientTangents, ops.backward_jvp, call)


class AttentionTangents(Function):
    """Computes (ȯut, l̇se). Inputs: all arguments of attention_jvp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return ops.jvp(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, ops.jvp, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, needed = _saved(ctx, ops.jvp), _needed(ctx, ops.jvp)
        call["tangent_out"], call["tangent_lse"] = call.pop("results")
        call["grad_out"], call["grad_lse"] = grads
        if call["grad_out"] is None:
            call["grad_out"] = torch.zeros_like(call["out"])
        results: NamedArguments = {}
        if any(needed[name] for name in _DIRECTION):
            wanted = {f"{name}_grad": needed[f"tangent_{name}"] for name in ("bias", "sinks")}
            gradients = attention_gradients(*_ordered(ops.backward, _defaults() | call | wanted))
            results |= zip(_DIRECTION, gradients, strict=True)
        call |= {"tangent_grad_out": None, "tangent_grad_lse": None}
        return _in_order(results | _gradient_tangents(call, needed), needed)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "attention: forward mode over forward mode is not built; take forward mode over "
            "reverse (torch.func.hessian, jacfwd of jacrev), or backend='reference'"
        )


class AttentionGradientTangents(Function):
    """Computes the tangents of the gradients. The graph ends here."""

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
    """Runs attention_backward, as part of a graph if it may be differentiated: with
    create_graph=True, always under torch.func, and where forward mode is on."""
    check_transforms("attention")
    if (torch.is_grad_enabled() or forward_mode_is_on()) and not is_compiling():
        return _apply(AttentionGradients, ops.backward, ops.arguments(ops.backward, inputs, {}))
    return ops.backward(*inputs)


def attention_tangents(call: NamedArguments) -> tuple[Tensor, Tensor]:
    """Runs attention_jvp, as part of a graph. Every derivative of this module comes here first."""
    if any(call[name] is not None for name in SEQUENCES):
        raise NotImplementedError(
            "attention: second derivatives and forward mode of packed sequences (cu_seqlens, "
            "seqused_k, block_table) are not built; backend='reference' has them"
        )
    return _apply(AttentionTangents, ops.jvp, call)


def _gradient_tangents(call: NamedArguments, needed: dict[str, bool]) -> NamedArguments:
    """Returns ∂L/∂x of the inputs that need it."""
    if not any(needed[name] for name in DIFFERENTIABLE):
        return {}
    wanted = {f"{name}_grad": needed[name] for name in ("bias", "sinks")}
    gradients = _apply(AttentionGradientTangents, ops.backward_jvp, call | wanted)
    return dict(zip(DIFFERENTIABLE, gradients, strict=True))


# -- Arguments by name -------------------------------------------------------------------


def _ordered(op: Any, call: NamedArguments) -> list[Any]:
    return [call[name] for name in names_of(op)]


def _apply(function: Any, op: Any, call: NamedArguments) -> Any:
    """Applies the Function around `op` to all arguments of `op`."""
    return function.apply(*_ordered(op, call))


def _defaults() -> NamedArguments:
    return ops.arguments(ops.backward, (), {})


def _tensors_of(op: Any) -> tuple[str, ...]:
    """Returns the names of the arguments that are tensors, which are saved in this order."""
    return tuple(x.name for x in schema_of(op).arguments if "Tensor" in str(x.type))


def _save(ctx: Any, op: Any, inputs: tuple[Any, ...], results: tuple[Tensor, ...] = ()) -> None:
    call = dict(zip(names_of(op), inputs, strict=True))
    saved = (*(call.pop(name) for name in _tensors_of(op)), *results)
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)
    ctx.numbers = call
    ctx.set_materialize_grads(False)


def _saved(ctx: Any, op: Any) -> NamedArguments:
    """Returns the arguments that `op` had, and `results`."""
    names = _tensors_of(op)
    tensors = ctx.saved_tensors
    call = dict(zip(names, tensors, strict=False)) | ctx.numbers
    if call.get("grad_weights") is not None:
        raise NotImplementedError(
            "attention: second derivatives of the attention weights are not built; "
            "backend='reference' has those of the output"
        )
    return call | {"results": tensors[len(names) :]}


def _needed(ctx: Any, op: Any) -> dict[str, bool]:
    return dict(zip(names_of(op), ctx.needs_input_grad, strict=True))


def _in_order(results: NamedArguments, needed: dict[str, bool]) -> tuple[Tensor | None, ...]:
    return tuple(results.get(name) if need else None for name, need in needed.items())
