"""Forward mode of masked softmax, and the second derivatives that follow from it.

A row with its sink as one more element is P = (p, p_sink) = softmax(S), S = (scale · x + bias,
sink), and dropout gives out = z * p. The Jacobian of softmax is symmetric, so one function serves
both modes: dS = B(P, G) is the gradient for G = (z * dout + dp, dp_sink), and Ṗ = B(P, Ṡ) is the
tangent, where

    B(P, G) = P * (G - ⟨P, G⟩)

The derivatives of B are the tangent Ḃ along (Ṗ, Ġ), and for a gradient H that arrives at B, C in P
and B(P, H) in G:

    Ḃ = Ṗ * (G - ⟨P, G⟩) - P ⟨Ṗ, G⟩ + B(P, Ġ)
    C = H * (G - ⟨P, G⟩) - G ⟨P, H⟩                                     in P

The operators here consist of PyTorch operations in float32 (float64 for float64) on one block of
rows at a time, so they run on any device. Memory beyond the results is O(block), and with dropout
one byte per element for the mask. Gradients and tangents at a weight of exactly 0 are ignored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import operators as ops
from ..operators import handles, vmap
from ..operators._torch import check_transforms, forward_mode_is_on, is_compiling

_BLOCK = 1 << 17  # elements: a few of them fit a second-level cache
Index = tuple[slice, ...]
Three = tuple[Tensor, Tensor, Tensor]


# -- Rows --------------------------------------------------------------------------------


def _part(x: Tensor, index: Index) -> Tensor:
    """Returns the part of `x`, which broadcasts to the rows, that belongs to a block of rows."""
    last = index[len(index) - x.dim() :]
    return x[tuple(slice(None) if n == 1 else i for n, i in zip(x.shape, last, strict=True))]


class _Rows:
    """The weights, block by block. Numbers that belong to rows are vectors [..., 1]."""

    def __init__(
        self, weights: Tensor, sink_weight: Tensor | None, keep: Tensor | None, kept_scale: float
    ) -> None:
        self.weights, self.sink_weight = weights, sink_weight
        self.keep, self.kept_scale = keep, kept_scale
        self.dtype = torch.promote_types(weights.dtype, torch.float32)

    def blocks(self) -> Iterator[Index]:
        """Yields blocks of whole rows: one index in the first dimensions, a range of the next."""
        sizes = self.weights.shape[:-1]
        cut = len(sizes) - 1
        while cut > 0 and math.prod(self.weights.shape[cut:]) <= _BLOCK:
            cut -= 1
        rest = (slice(None),) * (len(sizes) - cut)
        if cut < 0:
            yield rest
            return
        step = max(_BLOCK // max(math.prod(self.weights.shape[cut + 1 :]), 1), 1)
        for first in itertools.product(*map(range, sizes[:cut])):
            for start in range(0, sizes[cut], step):
                outer = tuple(slice(i, i + 1) for i in first)
                yield (*outer, slice(start, start + step), *rest)

    def p(self, index: Index) -> tuple[Tensor, Tensor | float]:
        """(p, p_sink)"""
        sink: Tensor | float = 0.0
        if self.sink_weight is not None:
            sink = self.sink_weight[index[:-1]].unsqueeze(-1)
        return self.weights[index].to(self.dtype), sink

    def dropped(self, x: Tensor, index: Index) -> Tensor:
        """z * x"""
        if self.keep is None:
            return x
        return torch.where(_part(self.keep, index), x * self.kept_scale, 0.0)

    def gradient(
        self, index: Index, out: Tensor | None, weights: Tensor | None, sink: Tensor | None
    ) -> tuple[Tensor, Tensor | float]:
        """G = (z * dout + dp, dp_sink)"""
        seen = self.weights[index] != 0
        total = torch.zeros((), dtype=self.dtype, device=seen.device)
        if out is not None:
            total = total + self.dropped(out[index].to(self.dtype), index)
        if weights is not None:
            total = total + weights[index]
        of_sink = 0.0 if sink is None else sink[index[:-1]].unsqueeze(-1)
        return torch.where(seen, total, 0.0), of_sink

    def direction(
        self,
        index: Index,
        scale: float,
        input: Tensor | None,
        bias: Tensor | None,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor | float]:
        """Ṡ, from the tangents of the inputs"""
        seen = self.weights[index] != 0
        total = torch.zeros((), dtype=self.dtype, device=seen.device)
        if input is not None:
            total = total + scale * input[index].to(self.dtype)
        if bias is not None:
            total = total + _part(bias, index).to(self.dtype)
        of_sink = 0.0 if sinks is None else _part(sinks, index)
        return torch.where(seen, total, 0.0), of_sink


def _inner(a: Any, b: Any) -> Any:
    """Returns ⟨A, B⟩ of each row."""
    return (a[0] * b[0]).sum(-1, keepdim=True) + a[1] * b[1]


class _Sums:
    """Collects dinput, dbias and the dsink of each row by blocks; empty if not asked for."""

    def __init__(self, rows: _Rows, bias: Tensor | None, sinks_grad: bool) -> None:
        weights = rows.weights
        self.dinput = torch.empty_like(weights, memory_format=torch.contiguous_format)
        self.bias, self.dbias = bias, weights.new_empty(0)
        if bias is not None:
            self.dbias = torch.zeros(bias.shape, dtype=rows.dtype, device=bias.device)
        sizes = weights.shape[:-1] if sinks_grad else (0,)
        self.dsink = weights.new_empty(sizes, dtype=rows.dtype)
        self.sinks_grad = sinks_grad

    def add(self, index: Index, ds: Tensor, dsink: Any, scale: float) -> None:
        self.dinput[index] = (scale * ds).to(self.dinput.dtype)
        if self.bias is not None:
            part = _part(self.dbias, index)
            part += ds.sum_to_size(part.shape)
        if self.sinks_grad:
            self.dsink[index[:-1]] = dsink.squeeze(-1)

    def results(self) -> Three:
        dbias = self.dbias if self.bias is None else self.dbias.to(self.bias.dtype)
        return self.dinput, dbias, self.dsink


# -- Operators ---------------------------------------------------------------------------

# keep: the mask of dropout. keep, biases and tangent_sinks [H, 1, 1] broadcast to the rows.
_WEIGHTS = "Tensor weights, Tensor? sink_weight, Tensor? keep, float kept_scale, float scale"
_GRADIENT = "Tensor? grad_out, Tensor? grad_weights, Tensor? grad_sink_weight"
_DIRECTION = "Tensor? tangent_input, Tensor? tangent_bias, Tensor? tangent_sinks"
_RESULTS = "Tensor? bias, bool sinks_grad"


def jvp_kernel(
    weights: Tensor,
    sink_weight: Tensor | None,
    keep: Tensor | None,
    kept_scale: float,
    scale: float,
    *direction: Tensor | None,
) -> Three:
    """Returns B(P, Ṡ): tangents of out, weights and sink_weight, the latter two if saved."""
    rows = _Rows(weights, sink_weight, keep, kept_scale)
    t_out = torch.empty_like(weights, memory_format=torch.contiguous_format)
    t_weights = weights.new_empty(0) if keep is None else torch.empty_like(t_out)
    t_sink = weights.new_empty(0, dtype=rows.dtype)
    if sink_weight is not None:
        t_sink = torch.empty_like(sink_weight)
    for index in rows.blocks():
        p, t_s = rows.p(index), rows.direction(index, scale, *direction)
        t_lse = _inner(p, t_s)
        t_p = p[0] * (t_s[0] - t_lse)
        t_out[index] = rows.dropped(t_p, index).to(weights.dtype)
        if keep is not None:
            t_weights[index] = t_p.to(weights.dtype)
        if sink_weight is not None:
            t_sink[index[:-1]] = (p[1] * (t_s[1] - t_lse)).squeeze(-1)
    return t_out, t_weights, t_sink


def gradients_kernel(
    weights: Tensor,
    sink_weight: Tensor | None,
    keep: Tensor | None,
    kept_scale: float,
    scale: float,
    grad_out: Tensor | None,
    grad_weights: Tensor | None,
    grad_sink_weight: Tensor | None,
    bias: Tensor | None,
    sinks_grad: bool,
) -> Three:
    """Returns B(P, G): gradients of input, bias and sinks, whichever gradients arrive."""
    rows = _Rows(weights, sink_weight, keep, kept_scale)
    sums = _Sums(rows, bias, sinks_grad)
    for index in rows.blocks():
        p, g = rows.p(index), rows.gradient(index, grad_out, grad_weights, grad_sink_weight)
        delta = _inner(p, g)
        sums.add(index, p[0] * (g[0] - delta), p[1] * (g[1] - delta), scale)
    return sums.results()


def weights_grad_kernel(
    weights: Tensor,
    sink_weight: Tensor | None,
    keep: Tensor | None,
    kept_scale: float,
    scale: float,
    *others: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns C: gradients of weights and sink_weight."""
    gradient, direction = others[:3], others[3:]
    rows = _Rows(weights, sink_weight, keep, kept_scale)
    d_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    d_sink = weights.new_empty(0, dtype=rows.dtype)
    if sink_weight is not None:
        d_sink = torch.empty_like(sink_weight)
    for index in rows.blocks():
        p, g = rows.p(index), rows.gradient(index, *gradient)
        h = rows.direction(index, scale, *direction)
        delta, t_lse = _inner(p, g), _inner(p, h)
        d_weights[index] = (h[0] * (g[0] - delta) - g[0] * t_lse).to(weights.dtype)
        if sink_weight is not None:
            d_sink[index[:-1]] = (h[1] * (g[1] - delta) - g[1] * t_lse).squeeze(-1)
    return d_weights, d_sink


def gradients_jvp_kernel(
    weights: Tensor,
    sink_weight: Tensor | None,
    keep: Tensor | None,
    kept_scale: float,
    scale: float,
    *others: Any,
) -> Three:
    """Returns Ḃ: tangents of the gradients of input, bias and sinks."""
    gradient, changes = others[:3], others[3:6]
    t_weights, t_sink, bias, sinks_grad = others[6:]
    rows = _Rows(weights, sink_weight, keep, kept_scale)
    sums = _Sums(rows, bias, sinks_grad)
    for index in rows.blocks():
        p, g = rows.p(index), rows.gradient(index, *gradient)
        t_g = rows.gradient(index, *changes)
        t_p = (
            torch.zeros_like(p[0]) if t_weights is None else t_weights[index].to(rows.dtype),
            0.0 if t_sink is None else t_sink[index[:-1]].unsqueeze(-1),
        )
        delta, t_delta = _inner(p, g), _inner(t_p, g) + _inner(p, t_g)
        ds, dsink = (
            a * (b - delta) + c * (d - t_delta) for a, b, c, d in zip(t_p, g, p, t_g, strict=True)
        )
        sums.add(index, ds, dsink, scale)
    return sums.results()


# The arguments that have the shape of the rows, and those that have it without the last dimension.
# The others broadcast to the rows.
_FULL = (
    *("weights", "grad_out", "grad_weights", "tangent_input", "tangent_weights"),
    *("tangent_grad_out", "tangent_grad_weights"),
)
_OF_ROWS = ("sink_weight", "grad_sink_weight", "tangent_sink_weight", "tangent_grad_sink_weight")


def _define(name: str, arguments: str, results: int, kernel: Any) -> tuple[Any, Any]:
    """Defines an operator; returns it and its vmap rule."""
    returns = ", ".join(["Tensor"] * results)
    handles.library.define(f"{name}({arguments}) -> ({returns})")
    handles.library.impl(name, kernel, "CompositeExplicitAutograd")
    op = getattr(torch.ops.fused_attention, name).default
    torch.library.register_fake(f"fused_attention::{name}")(kernel)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Adds the samples as a new first dimension of the rows."""
        call = ops.arguments(op, args, {})
        dims = dict(zip(call, in_dims, strict=False))
        rank = call["weights"].dim() - (dims["weights"] is not None)
        bias = call.get("bias")

        def fold(name: str, x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            dim = dims.get(name)
            each = name in _FULL or name in _OF_ROWS or name == "bias"  # one for each sample
            if dim is None and not each:
                return x
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            if name in _FULL or name in _OF_ROWS:
                return x
            return x.reshape(info.batch_size, *(1,) * (rank + 1 - x.dim()), *x.shape[1:])

        folded = [fold(name, x) for name, x in call.items()]
        values = list(op(*folded))
        if bias is not None:
            shape = bias.shape if dims["bias"] is None else bias.movedim(dims["bias"], 0).shape[1:]
            values[1] = values[1].view(info.batch_size, *shape)
        # Results that were not asked for are empty.
        return tuple(values), tuple(0 if x.dim() > 1 else None for x in values)

    torch.library.register_vmap(f"fused_attention::{name}", rule)
    return op, rule


jvp, _ = _define("masked_softmax_jvp", f"{_WEIGHTS}, {_DIRECTION}", 3, jvp_kernel)
gradients, _gradients_rule = _define(
    "masked_softmax_gradients", f"{_WEIGHTS}, {_GRADIENT}, {_RESULTS}", 3, gradients_kernel
)
weights_grad, _ = _define(
    "masked_softmax_weights_grad", f"{_WEIGHTS}, {_GRADIENT}, {_DIRECTION}", 2, weights_grad_kernel
)
gradients_jvp, _ = _define(
    "masked_softmax_gradients_jvp",
    f"{_WEIGHTS}, {_GRADIENT}, Tensor? tangent_grad_out, Tensor? tangent_grad_weights, "
    "Tensor? tangent_grad_sink_weight, Tensor? tangent_weights, Tensor? tangent_sink_weight, "
    + _RESULTS,
    3,
    gradients_jvp_kernel,
)


# -- Functions ---------------------------------------------------------------------------

# A call is a dictionary of arguments by name. Tangents and gradients exist for out, for weights (if
# there is dropout) and for sink_weight (if there are sinks).
NamedArguments = dict[str, Any]
_FIRST = ("weights", "sink_weight", "philox", "dropout_p", "scale")
_OF_OUTPUTS = ("out", "weights", "sink_weight")
_GRADS = tuple(f"grad_{name}" for name in _OF_OUTPUTS)
_CHANGES = ("tangent_input", "tangent_bias", "tangent_sinks")

_GRADIENTS_INPUTS = (*_FIRST, *_GRADS, "bias", "sinks_grad", "causal")
_TANGENTS_INPUTS = (*_FIRST, *_CHANGES)
_WEIGHTS_GRADIENT_INPUTS = (*_FIRST, *_GRADS, *_CHANGES)
_GRADIENTS_TANGENTS_INPUTS = (
    *(*_FIRST, *_GRADS, *(f"tangent_{name}" for name in _GRADS)),
    *("tangent_weights", "tangent_sink_weight", "bias", "sinks_grad"),
)
_NUMBERS = ("dropout_p", "scale", "sinks_grad", "causal")


def _named(names: tuple[str, ...], values: Any) -> NamedArguments:
    return dict(zip(names, values, strict=True))


def _some(call: NamedArguments, names: tuple[str, ...]) -> list[Any]:
    return [call[name] for name in names]


def _operands(call: NamedArguments) -> tuple[Any, ...]:
    """Returns the first arguments of the operators."""
    weights, dropout_p = call["weights"], call["dropout_p"]
    keep = None
    if dropout_p:
        sizes = _sizes(weights.shape)
        keep = ops.dropout_keep_mask(call["philox"], dropout_p, *sizes).view(weights.shape)
    return weights, call["sink_weight"], keep, _kept_scale(dropout_p), call["scale"]


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the sizes of a dropout mask: batch, heads, queries, keys."""
    shape = (1,) * (3 - len(shape)) + tuple(shape)
    return math.prod(shape[:-3]), *shape[-3:]


def _kept_scale(dropout_p: float) -> float:
    kept = 65536 - round(dropout_p * 65536)
    return 65536 / kept if kept else 0.0


class SoftmaxGradients(Function):
    """Computes B(P, G): gradients of input, bias (if given) and sinks, from _GRADIENTS_INPUTS."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Three:
        return _gradients(_named(_GRADIENTS_INPUTS, inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
        _save(ctx, _named(_GRADIENTS_INPUTS, inputs))

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        call, needed = _restore(ctx), _named(_GRADIENTS_INPUTS, ctx.needs_input_grad)
        input, bias, sinks = directions
        call["tangent_input"] = input
        call["tangent_bias"] = None if call["bias"] is None else bias
        call["tangent_sinks"] = sinks if call["sinks_grad"] else None
        results: NamedArguments = {}
        if any(x is not None for x in _some(call, _CHANGES)):
            if any(_some(needed, _GRADS)):
                changes = SoftmaxTangents.apply(*_some(call, _TANGENTS_INPUTS))
                results |= _named(_GRADS, changes)
            results |= _weights_gradient(call, needed)
        return tuple(results.get(name) if need else None for name, need in needed.items())

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Three:
        call = _restore(ctx)
        changes = _named(_GRADIENTS_INPUTS, tangents)
        call |= {f"tangent_{name}": tangent for name, tangent in changes.items()}
        return SoftmaxGradientsTangents.apply(*_some(call, _GRADIENTS_TANGENTS_INPUTS))


class SoftmaxTangents(Function):
    """Computes B(P, Ṡ): tangents of out, weights and sink_weight, from _TANGENTS_INPUTS."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Three:
        call = _named(_TANGENTS_INPUTS, inputs)
        return jvp(*_operands(call), *_changes(call))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
        _save(ctx, _named(_TANGENTS_INPUTS, inputs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, needed = _restore(ctx), _named(_TANGENTS_INPUTS, ctx.needs_input_grad)
        # Gradients of outputs that are empty do not count.
        call |= _named(_GRADS, grads)
        if not call["dropout_p"]:
            call["grad_weights"] = None
        if call["sink_weight"] is None:
            call["grad_sink_weight"] = None
        results: NamedArguments = {}
        if any(_some(needed, _CHANGES)):
            bias = call["tangent_bias"] if needed["tangent_bias"] else None
            call |= {"bias": bias, "sinks_grad": needed["tangent_sinks"], "causal": 0}
            gradients = softmax_gradients(*_some(call, _GRADIENTS_INPUTS))
            results |= _named(_CHANGES, gradients)
        results |= _weights_gradient(call, needed)
        return tuple(results.get(name) if need else None for name, need in needed.items())

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "masked_softmax: forward mode over forward mode is not built; take forward mode over "
            "reverse (torch.func.hessian, jacfwd of jacrev)"
        )


class _Last(Function):
    """A Function where the graph ends: its derivatives raise."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "masked_softmax: third derivatives are not built (torch.autograd.functional.hvp takes "
            "them; vhp, and torch.func.jvp of grad, do not)"
        )

    jvp = backward


class SoftmaxWeightsGradient(_Last):
    """Computes C: gradients of weights and sink_weight, from _WEIGHTS_GRADIENT_INPUTS."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        call = _named(_WEIGHTS_GRADIENT_INPUTS, inputs)
        return weights_grad(*_operands(call), *_some(call, _GRADS), *_changes(call))


class SoftmaxGradientsTangents(_Last):
    """Computes Ḃ for input, bias and sinks, from _GRADIENTS_TANGENTS_INPUTS."""

    @staticmethod
    def forward(*inputs: Any) -> Three:
        call = _named(_GRADIENTS_TANGENTS_INPUTS, inputs)
        others = _some(call, _GRADIENTS_TANGENTS_INPUTS[len(_FIRST) :])
        return _with_sums(gradients_jvp(*_operands(call), *others), call["sinks_grad"])


def _weights_gradient(call: NamedArguments, needed: dict[str, bool]) -> NamedArguments:
    names = ("weights", "sink_weight")
    if not any(_some(needed, names)):
        return {}
    results = SoftmaxWeightsGradient.apply(*_some(call, _WEIGHTS_GRADIENT_INPUTS))
    return _named(names, results)


def _save(ctx: Any, call: NamedArguments) -> None:
    tensors = {name: x for name, x in call.items() if name not in _NUMBERS}
    ctx.save_for_backward(*tensors.values())
    ctx.save_for_forward(*tensors.values())
    ctx.names = tuple(tensors)
    ctx.numbers = {name: x for name, x in call.items() if name in _NUMBERS}
    ctx.set_materialize_grads(False)


def _restore(ctx: Any) -> NamedArguments:
    return _named(ctx.names, ctx.saved_tensors) | ctx.numbers


def _changes(call: NamedArguments) -> tuple[Tensor | None, ...]:
    """Returns the tangents of the inputs; those of sinks broadcast to the rows of their heads."""
    sinks = call["tangent_sinks"]
    column = None if sinks is None else sinks.view(-1, 1, 1)
    return call["tangent_input"], call["tangent_bias"], column


def _with_sums(results: Three, sinks_grad: bool) -> Three:
    """Sums the dsink of the rows, [..., H, M], to dsinks [H]."""
    dinput, dbias, dsink = results
    if sinks_grad:
        dsink = dsink.sum([d for d in range(dsink.dim()) if d != dsink.dim() - 2])
    return dinput, dbias, dsink


def _gradients(call: NamedArguments) -> Three:
    """Runs the fused kernel if only dout has arrived, as in every first derivative."""
    only_out = call["grad_weights"] is None and call["grad_sink_weight"] is None
    if call["grad_out"] is None or not only_out:
        others = _some(call, (*_GRADS, "bias", "sinks_grad"))
        return _with_sums(gradients(*_operands(call), *others), call["sinks_grad"])
    names = ("grad_out", "weights", "scale", "causal", "bias", "sink_weight", "philox", "dropout_p")
    return ops.softmax_backward(*_some(call, names), call["bias"] is not None, call["sinks_grad"])


def _gradients_of_samples(
    info: Any, call: dict[str, Any], dims: dict[str, int | None]
) -> tuple[Three, tuple[int | None, ...]]:
    """The vmap rule of masked_softmax_backward with sinks_grad: sums dsinks for each sample."""
    weights, dropout_p, dim = call["weights"], call["dropout_p"], dims["weights"]
    shape = tuple(weights.shape if dim is None else weights.movedim(dim, 0).shape[1:])
    keep = None
    if dropout_p:
        sizes = _sizes(shape)
        keep, _ = vmap.dropout_keep_masks(
            info, (dims["philox"],), call["philox"], dropout_p, *sizes
        )
        keep = keep.view(info.batch_size, *shape)
    kept_scale = _kept_scale(dropout_p)
    bias, bias_dim = (call["bias"], dims["bias"]) if call["bias_grad"] else (None, None)
    results, _ = _gradients_rule(
        info,
        (dim, dims["sink_weight"], 0, None, None, dims["grad_out"], None, None, bias_dim, None),
        *(weights, call["sink_weight"], keep, kept_scale, call["scale"]),
        *(call["grad_out"], None, None, bias, True),
    )
    dinput, dbias, dsink = results
    dsinks = dsink.sum([d for d in range(1, dsink.dim()) if d != dsink.dim() - 2])
    return (dinput, dbias, dsinks), (0, 0 if call["bias_grad"] else None, 0)


_rule_without_sinks = vmap.softmax_vmap_rule(
    ops.softmax_backward, "weights", lambda call: (True, bool(call["bias_grad"]), False)
)


@torch.library.register_vmap("fused_attention::masked_softmax_backward")
def _backward_rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
    call = ops.arguments(ops.softmax_backward, args, kwargs)
    if call["sinks_grad"]:
        return _gradients_of_samples(info, call, dict(zip(call, in_dims, strict=False)))
    return _rule_without_sinks(info, in_dims, *args, **kwargs)


def softmax_gradients(*inputs: Any) -> Three:
    """Returns the gradients of input, bias and sinks, from _GRADIENTS_INPUTS. They are part of a
    graph if they may be differentiated: with create_graph=True, always under torch.func, and where
    forward mode is on.
    """
    check_transforms("masked_softmax")
    if (torch.is_grad_enabled() or forward_mode_is_on()) and not is_compiling():
        return SoftmaxGradients.apply(*inputs)
    return _gradients(_named(_GRADIENTS_INPUTS, inputs))


def softmax_tangents(*inputs: Any) -> Three:
    """Returns the tangents that `SoftmaxTangents` computes, as part of a graph."""
    return SoftmaxTangents.apply(*inputs)
