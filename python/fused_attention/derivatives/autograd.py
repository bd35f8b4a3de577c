"""Gradients: autograd.Functions around the operators, and which of them a call goes through.

`Attention` works everywhere: eager, torch.compile, torch.func (its vmap rule follows from those of
the operators). `AttentionPlain` is for the most frequent call, eager and with nothing optional,
where overhead counts. The maths of backward: Dao 2023, FlashAttention-2, Alg. 2. Kept for it: the
inputs, out and lse, so O(B·Hq·Sq) beyond inputs and outputs. Forward mode, and the gradients of
gradients, are those of `tangents`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import operators as ops
from ..call.problem import Plan, Problem, check_transforms, is_tracing
from ..operators import cuda
from .tangents import attention_gradients, attention_tangents

_NOT_PACKED = (None,) * 6  # cu_seqlens_q, ... block_table


def _to_save(inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Any, list[Any]]:
    """The tensors of a call of `Attention`, and max_seqlen_q and max_seqlen_k."""
    cu_seqlens_q, cu_seqlens_k, *max_seqlens, seqused_k, block_table = inputs[16:] or _NOT_PACKED
    sequences = (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table)
    return (*inputs[:3], *output, *inputs[8:14], *sequences), max_seqlens


class Attention(Function):
    """(out, lse). Inputs: those of attention_forward; the last six only where one is in use."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return ops.forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        saved, ctx.max_seqlens = _to_save(inputs, output)
        ctx.save_for_backward(*saved)
        ctx.numbers, ctx.softcap_and_dropout = inputs[3:8], inputs[14:16]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(attention_gradients, ctx, *grads)


def _gradients(
    backward: Callable[..., Any], ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, *options = ctx.saved_tensors
    *options, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table = options
    needed = ctx.needs_input_grad
    if grad_out is None and grad_lse is None:  # as in a double backward, see `tangents`
        return (None,) * len(needed)
    bias_grad, sinks_grad = needed[9], needed[12]
    dq, dk, dv, dbias, dsinks = backward(
        *(torch.zeros_like(out) if grad_out is None else grad_out, grad_lse),
        *(query, key, value, out, lse),
        *ctx.numbers,
        *options,
        *ctx.softcap_and_dropout,
        *(cu_seqlens_q, cu_seqlens_k, *ctx.max_seqlens, seqused_k, block_table),
        *(bias_grad, sinks_grad),
    )
    gradients = {0: dq, 1: dk, 2: dv, 9: dbias, 12: dsinks}
    return tuple(gradients.get(i) if need else None for i, need in enumerate(needed))


traced_attention = ops.define_traced(
    "attention", ops.schema_of(ops.forward), ops.forward, Attention
)


class AttentionForwardMode(Attention):
    """`Attention` where forward mode may be on. Apart, because Dynamo refuses a jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        Attention.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*_to_save(inputs, output)[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        query, key, value, out, lse, *options = ctx.saved_tensors
        *options, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table = options
        if tangents[11] is not None:
            raise NotImplementedError("alibi_slopes: not differentiable, in forward mode either")
        return attention_tangents(
            *(query, key, value, out, lse, *tangents[:3], tangents[9], tangents[12]),
            *(*ctx.numbers, *options, *ctx.softcap_and_dropout),
            *(cu_seqlens_q, cu_seqlens_k, *ctx.max_seqlens, seqused_k, block_table),
        )


class AttentionWithWeights(Function):
    """(out, lse, weights). Inputs: whether the weights are averaged, then those of `Attention`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(average: bool, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return forward_with_weights(average, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.average, *inputs = inputs  # type: ignore[assignment]
        ctx.save_for_backward(*inputs[:3], *output[:2], *inputs[8:14])
        ctx.numbers, ctx.softcap_and_dropout = inputs[3:8], inputs[14:16]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *options = ctx.saved_tensors
        grad_out, grad_lse, grad_weights = grads
        if all(x is None for x in grads):
            return (None,) * len(ctx.needs_input_grad)
        needed = ctx.needs_input_grad[1:]
        dq, dk, dv, dbias, dsinks = attention_gradients(
            *(torch.zeros_like(out) if grad_out is None else grad_out, grad_lse),
            *(query, key, value, out, lse),
            *ctx.numbers,
            *options,
            *ctx.softcap_and_dropout,
            *_NOT_PACKED,
            *(needed[9], needed[12], grad_weights, ctx.average),
        )
        gradients = {0: dq, 1: dk, 2: dv, 9: dbias, 12: dsinks}
        return None, *(gradients.get(i) if need else None for i, need in enumerate(needed))


class AttentionWithWeightsForwardMode(AttentionWithWeights):
    """`AttentionWithWeights` where forward mode may be on: it ends here."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("attention: forward mode of the attention weights is not built")


def forward_with_weights(average: bool, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, weights), without gradients."""
    out, lse = ops.forward(*inputs)
    query, key, _, *numbers, _ = inputs[:8]
    mask, bias, key_padding_mask, alibi_slopes, _, philox, *softcap_and_dropout = inputs[8:16]
    masks = (mask, bias, key_padding_mask, alibi_slopes)
    weights = ops.weights(query, key, lse, *numbers, average, *masks, philox, *softcap_and_dropout)
    return out, lse, weights


_schema = ops.schema_of(ops.forward).replace("(", "(bool average, ", 1)
traced_attention_with_weights = ops.define_traced(
    "attention_with_weights",
    _schema.replace("-> (Tensor, Tensor)", "-> (Tensor, Tensor, Tensor)"),
    forward_with_weights,
    AttentionWithWeights,
)


class AttentionPlain(Function):
    """out, from query, key, value and the five numbers; lse stays inside. Direct calls only."""

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
        return _gradients(_cuda_gradients, ctx, *grads)


class CudaAttentionForwardMode(CudaAttention):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("attention: forward-mode derivatives are not built" + _ON_CUDA)


class CudaAttentionPlain(AttentionPlain):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, numbers: Any) -> Tensor:
        return _keep_plain(ctx, cuda.operators(), query, key, value, numbers)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        return _plain_gradients(_cuda_gradients, ctx, grad_out)


class CudaAttentionGradients(Function):
    """The gradients where they are part of a graph themselves: tells that it ends there."""

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
    # With create_graph=True, and always under torch.func, somebody may differentiate again.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return CudaAttentionGradients.apply(*inputs)
    return torch.ops.fused_attention_cuda.attention_backward.default(*inputs)


# -- Which way a call goes ---------------------------------------------------------------


class Functions(NamedTuple):
    """The ways of one library. Compiled calls give each tensor once: Dynamo refuses it twice."""

    compiling: Callable[..., Any]
    forward_mode: Callable[..., Any]
    # `Function.apply` without its Python half, which serves torch.func and default arguments.
    direct: Callable[..., Any]
    plain: Callable[..., Any]


def _apply_compiling(*inputs: Any) -> Any:
    return Attention.apply(*_distinct(inputs))


def _apply_cuda_compiling(*inputs: Any) -> Any:
    return CudaAttention.apply(*_distinct(inputs))


FUNCTIONS = Functions(
    _apply_compiling,
    AttentionForwardMode.apply,
    super(Function, Attention).apply,
    super(Function, AttentionPlain).apply,
)
CUDA_FUNCTIONS = Functions(
    _apply_cuda_compiling,
    CudaAttentionForwardMode.apply,
    super(Function, CudaAttention).apply,
    super(Function, CudaAttentionPlain).apply,
)


def plan(problem: Problem) -> Plan:
    """What serves `problem` on a backend whose operators are those of `ops`."""
    return _plan(problem, ops.OPERATORS, FUNCTIONS)


def plan_cuda(problem: Problem) -> Plan:
    """What serves `problem` through the CUDA library."""
    return _plan(problem, cuda.operators(), CUDA_FUNCTIONS)


def _plan(problem: Problem, operators: ops.Operators, functions: Functions) -> Plan:
    check_transforms("attention")
    function: Callable[..., Any]
    if is_tracing():
        function = traced_attention
    elif not problem.differentiable:
        if problem.is_plain:
            direct = operators.direct_forward_plain
            function = direct if problem.is_direct else operators.forward_plain
            return Plan(function, problem.numbers, is_plain=True)
        function = operators.direct_forward if problem.is_direct else operators.forward
    elif torch.compiler.is_compiling():
        function = functions.compiling
    elif not problem.is_direct:
        function = functions.forward_mode
    elif problem.is_plain:
        return Plan(functions.plain, (problem.numbers,), is_plain=True)
    else:
        function = functions.direct
    function = function if problem.return_lse else _first(function)
    return Plan(function, problem.numbers, limits=problem.limits)


def plan_with_weights(problem: Problem) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """What gives (out, lse, weights), from the inputs of `AttentionWithWeights`."""
    check_transforms("attention")
    if is_tracing():
        return traced_attention_with_weights
    if not problem.differentiable:
        return forward_with_weights
    if torch.compiler.is_compiling():
        return lambda *inputs: AttentionWithWeights.apply(*_distinct(inputs))
    return AttentionWithWeightsForwardMode.apply


def _first(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def out(*inputs: Any) -> Tensor:
        return function(*inputs)[0]

    return out


def _distinct(inputs: tuple[Any, ...]) -> list[Any]:
    """Dynamo refuses the same tensor twice."""
    distinct: list[Any] = []
    for x in inputs:
        seen = isinstance(x, Tensor) and any(x is other for other in distinct)
        distinct.append(x.view_as(x) if seen else x)
    return distinct
