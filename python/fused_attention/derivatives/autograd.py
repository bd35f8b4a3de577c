"""Gradients: autograd.Functions around the operators, and which of them a call goes through.

`Attention` works everywhere: eager, torch.compile, torch.func (its vmap rule follows from those of
the operators). `AttentionPlain` is for the most frequent call, eager and with nothing optional,
where overhead counts. The backward follows Dao 2023, FlashAttention-2, Alg. 2. It needs the inputs,
out and lse, so O(B·Hq·Sq) are kept beyond inputs and outputs. `tangents` has forward mode and the
gradients of gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import operators as ops
from ..operators import cuda
from ..operators._torch import is_compiling
from ..operators.arguments import DIFFERENTIABLE, NAMES, Arguments, joined, split
from ..operators.handles import names_of
from ..operators.traced import signature_of
from .tangents import attention_gradients, attention_tangents

Gradients = tuple[Tensor | None, ...]


_DEFAULTS = ops.arguments(ops.forward, (), {})
_REST = tuple(_DEFAULTS[name] for name in Arguments._fields)


def _split_inputs(inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Returns the tensors of a call of `Attention`, and its numbers."""
    query, key, value, *given = inputs
    tensors, numbers = split((*given, *_REST[len(given) :]))
    return (query, key, value, *tensors), numbers


class Attention(Function):
    """Computes (out, lse). Inputs: those of attention_forward; trailing defaults may be absent."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return ops.forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        tensors, ctx.numbers = _split_inputs(inputs)
        ctx.save_for_backward(*output, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        return input_gradients(attention_gradients, ctx, ctx.needs_input_grad, grads)


def input_gradients(
    backward: Callable[..., Any],
    ctx: Any,
    needs: Sequence[bool],
    grads: tuple[Tensor | None, ...],
    average: bool = False,
) -> Gradients:
    """Returns the gradients of the inputs of `Attention`, whose forward filled `ctx`.

    grads: those of out, lse and, if given, weights.
    """
    grad_out, grad_lse, grad_weights = (*grads, None)[:3]
    if grad_out is None and grad_lse is None and grad_weights is None:  # as in a double backward
        return (None,) * len(needs)
    out, lse, query, key, value, *tensors = ctx.saved_tensors
    needed = dict(zip(NAMES, needs, strict=False))
    of_weights = () if grad_weights is None else (grad_weights, average)
    gradients = backward(
        *(torch.zeros_like(out) if grad_out is None else grad_out, grad_lse),
        *(query, key, value, out, lse),
        *joined(tensors, ctx.numbers),
        *(needed["bias"], needed["sinks"]),
        *of_weights,
    )
    named = dict(zip(DIFFERENTIABLE, gradients, strict=True))
    return tuple(named.get(name) if need else None for name, need in needed.items())


traced_attention = ops.define_traced(
    "attention", signature_of(ops.forward), ops.forward, Attention, _DEFAULTS
)


class AttentionForwardMode(Attention):
    """`Attention` where forward mode may be on; a separate class because Dynamo refuses a jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        Attention.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*output, *_split_inputs(inputs)[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse, *inputs = ctx.saved_tensors
        query, key, value, *tensors = inputs
        direction = dict(zip(NAMES, tangents, strict=False))
        if direction["alibi_slopes"] is not None:
            raise NotImplementedError("alibi_slopes: not differentiable, in forward mode either")
        call = {"query": query, "key": key, "value": value, "out": out, "lse": lse}
        call |= {f"tangent_{name}": direction[name] for name in DIFFERENTIABLE}
        arguments = Arguments(*joined(tensors, ctx.numbers))
        return attention_tangents(call | arguments._asdict())


class AttentionDirect(Attention):
    """`Attention` for direct calls: the operator without the Python around it."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return ops.OPERATORS.direct_forward(*inputs)


class AttentionWithWeights(Function):
    """Computes (out, lse, weights). Inputs: whether to average them, then those of `Attention`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(average: bool, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return forward_with_weights(average, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.average, *of_attention = inputs
        out, lse, _ = output
        Attention.setup_context(ctx, tuple(of_attention), (out, lse))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        _, *needs = ctx.needs_input_grad  # without `average`
        return None, *input_gradients(attention_gradients, ctx, needs, grads, ctx.average)


_OF_WEIGHTS = names_of(ops.weights)


class AttentionWithWeightsForwardMode(AttentionWithWeights):
    """`AttentionWithWeights` where forward mode may be on, which raises."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("attention: forward mode of the attention weights is not built")


def forward_with_weights(average: bool, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (out, lse, weights), without gradients."""
    out, lse = ops.forward(*inputs)
    query, key, _, *arguments = inputs
    call = {"query": query, "key": key, "lse": lse, "average": average}
    call |= Arguments(*arguments)._asdict()
    return out, lse, ops.weights(*[call[name] for name in _OF_WEIGHTS])


_signature = signature_of(ops.forward).replace("(", "(bool average, ", 1)
traced_attention_with_weights = ops.define_traced(
    "attention_with_weights",
    _signature.replace("-> (Tensor, Tensor)", "-> (Tensor, Tensor, Tensor)"),
    forward_with_weights,
    AttentionWithWeights,
    _DEFAULTS,
)


class AttentionPlain(Function):
    """Computes out from query, key, value and five numbers; keeps lse. For direct calls only."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, numbers: Any) -> Tensor:
        return _keep_plain(ctx, ops.OPERATORS, query, key, value, numbers)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        return _plain_gradients(attention_gradients, ctx, grad_out)


def _keep_plain(ctx: Any, operators: ops.Operators, *inputs: Any) -> Tensor:
    query, key, value, numbers = inputs
    out, lse = operators.direct_forward_plain_lse(query, key, value, *numbers)
    ctx.save_for_backward(query, key, value, out, lse)
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)
    return out


def _plain_gradients(
    backward: Callable[..., Any], ctx: Any, grad_out: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 4
    dq, dk, dv, _, _ = backward(grad_out, None, *ctx.saved_tensors, *ctx.numbers)
    gradients = (dq, dk, dv, None)
    return tuple(
        grad if need else None for grad, need in zip(gradients, ctx.needs_input_grad, strict=True)
    )


# -- The same on the operators of the CUDA library -----------------------------------------


class CudaAttention(Attention):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.fused_attention_cuda.attention_forward.default(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return input_gradients(_cuda_gradients, ctx, ctx.needs_input_grad, grads)


class CudaAttentionForwardMode(CudaAttention):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("attention: forward-mode derivatives are not built" + _ON_CUDA)


class CudaAttentionDirect(CudaAttention):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return cuda.operators().direct_forward(*inputs)


class CudaAttentionPlain(AttentionPlain):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, numbers: Any) -> Tensor:
        return _keep_plain(ctx, cuda.operators(), query, key, value, numbers)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        return _plain_gradients(_cuda_gradients, ctx, grad_out)


class CudaAttentionGradients(Function):
    """Computes the gradients as part of a graph, and raises if they are differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.fused_attention_cuda.attention_backward.default(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("attention: second derivatives are not built" + _ON_CUDA)

    jvp = backward


_ON_CUDA = " on the cuda backend; backend='reference' has them"


def _cuda_gradients(*inputs: Any) -> Any:
    # With create_graph=True, and always under torch.func, the gradients may be differentiated.
    if torch.is_grad_enabled() and not is_compiling():
        return CudaAttentionGradients.apply(*inputs)
    return torch.ops.fused_attention_cuda.attention_backward.default(*inputs)


# -- The Functions of each library ---------------------------------------------------------


class Functions(NamedTuple):
    """The Functions around the operators of one library, for each way to call them."""

    compiling: Callable[..., Any]
    forward_mode: Callable[..., Any]
    # `Function.apply` without its Python half, which serves torch.func and default arguments.
    direct: Callable[..., Any]
    plain: Callable[..., Any]


def _apply_compiling(*inputs: Any) -> Any:
    return Attention.apply(*distinct(inputs))


def _apply_cuda_compiling(*inputs: Any) -> Any:
    return CudaAttention.apply(*distinct(inputs))


FUNCTIONS = Functions(
    _apply_compiling,
    AttentionForwardMode.apply,
    super(Function, AttentionDirect).apply,
    super(Function, AttentionPlain).apply,
)
CUDA_FUNCTIONS = Functions(
    _apply_cuda_compiling,
    CudaAttentionForwardMode.apply,
    super(Function, CudaAttentionDirect).apply,
    super(Function, CudaAttentionPlain).apply,
)


def distinct(inputs: tuple[Any, ...]) -> list[Any]:
    """Returns the inputs, repeated tensors as views: Dynamo refuses the same tensor twice."""
    distinct: list[Any] = []
    for x in inputs:
        seen = isinstance(x, Tensor) and any(x is other for other in distinct)
        distinct.append(x.view_as(x) if seen else x)
    return distinct
