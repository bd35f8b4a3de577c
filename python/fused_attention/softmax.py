"""Masked softmax over the last dimension, and the names that Megatron-LM and apex give it.

    s = scale · input + mask (if floating), -inf where hidden
    p = exp(s) / (exp(sink) + Σ exp(s)), then dropout

Rows that fit into the cache take one pass, longer ones two (online softmax, Milakov & Gimelshein
2018): time O(elements), no memory beyond the result. The backward, dinput = scale · p ·
(dp - Σ p · dp), needs only the result, or with dropout the weights before it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import operators as ops
from .call.backends import REFERENCE, choose_for
from .call.problem import (
    DTYPES,
    as_vector,
    cast_for_autocast,
    causal_number,
    check_number,
    check_philox_seed,
    check_tensor,
    shape_of,
)
from .derivatives.softmax_tangents import softmax_gradients, softmax_tangents
from .errors import wrong_value
from .operators._torch import (
    check_transforms,
    is_any_autocast_enabled,
    is_compiling,
    is_direct,
    is_tracing,
    looks_at_sizes,
    transform_is_active,
)
from .operators.arguments import CAUSAL
from .operators.handles import names_of
from .operators.memory import has_shared_elements, share_memory
from .operators.traced import signature_of

_NAMES = names_of(ops.softmax_forward)

# -- Gradients ---------------------------------------------------------------------------


class MaskedSoftmaxFunction(Function):
    """masked_softmax_forward with gradients: its arguments and results. Callers use only out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return ops.softmax_forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*_saved(inputs, output))
        call = _named(inputs)
        ctx.scale, ctx.causal, ctx.dropout_p = call["scale"], call["causal"], call["dropout_p"]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = _named(ctx.needs_input_grad)
        weights, bias, sink_weight, philox = ctx.saved_tensors
        # Gradients of weights and sink_weight arrive from second derivatives only.
        grad_out, grad_weights, grad_sink_weight = grads
        arrived = (
            grad_out,
            grad_weights if ctx.dropout_p else None,
            None if sink_weight is None else grad_sink_weight,
        )
        if all(x is None for x in arrived):
            return (None,) * len(needed)
        dinput, dbias, dsinks = softmax_gradients(
            *(weights, sink_weight, philox, ctx.dropout_p, ctx.scale, *arrived),
            *(bias if needed["bias"] else None, needed["sinks"], ctx.causal),
        )
        gradients = {"input": dinput, "bias": dbias, "sinks": dsinks}
        return tuple(gradients.get(name) if need else None for name, need in needed.items())


# `Function.apply` without its Python half, which serves torch.func and default arguments.
_apply_directly = super(Function, MaskedSoftmaxFunction).apply


class MaskedSoftmaxForwardMode(MaskedSoftmaxFunction):
    """`MaskedSoftmaxFunction` with forward mode; a separate class because Dynamo refuses a jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        MaskedSoftmaxFunction.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*_saved(inputs, output))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        weights, _, sink_weight, philox = ctx.saved_tensors
        direction = _named(tangents)
        return softmax_tangents(
            *(weights, sink_weight, philox, ctx.dropout_p, ctx.scale),
            *(direction["input"], direction["bias"], direction["sinks"]),
        )


traced_masked_softmax = ops.define_traced(
    "masked_softmax",
    signature_of(ops.softmax_forward),
    ops.softmax_forward,
    MaskedSoftmaxFunction,
    ops.arguments(ops.softmax_forward, (), {}),
)


def _saved(inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Returns weights, bias, sink_weight, philox: both modes save the same, as vmap requires."""
    call = _named(inputs)
    out, weights, sink_weight = output
    return (
        out if call["dropout_p"] == 0 else weights,
        call["bias"],
        None if call["sinks"] is None else sink_weight,
        call["philox"],
    )


def _named(inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Returns `inputs`, one for each argument of `MaskedSoftmaxFunction`, by name."""
    return dict(zip(_NAMES, inputs, strict=True))


# -- Describing a call -------------------------------------------------------------------


@looks_at_sizes
def _check(
    input: Any, mask: Any, scale: Any, causal: Any, dropout_p: Any, sinks: Any, philox_seed: Any
) -> int:
    """Checks the arguments of `masked_softmax`; an error names the argument. Returns the number
    that stands for `causal`."""
    check_tensor("input", input)
    if input.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        wrong_value("input", f"a dtype out of {allowed}", input.dtype, "cast it first")
    if not 1 <= input.dim() <= 17:
        wrong_value("input", "1 to 17 dimensions", f"{input.dim()}: {shape_of(input)}")
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool and mask.dtype not in DTYPES:
            wrong_value("mask", "bool (True = may attend) or a floating dtype", mask.dtype)
        _check_device("mask", mask, input)
        fits = mask.dim() <= input.dim() and all(
            size == 1 or size == full
            for size, full in zip(reversed(mask.shape), reversed(input.shape), strict=False)
        )
        if not fits:
            wrong_value("mask", f"a shape that broadcasts to {shape_of(input)}", shape_of(mask))
    check_number("scale", scale)
    if not -math.inf < scale < math.inf:
        wrong_value("scale", "a finite number", scale)
    if sinks is not None:
        check_tensor("sinks", sinks)
        if input.dim() < 3:
            wrong_value("input", "[..., H, M, N] with sinks", shape_of(input))
        if sinks.dtype not in DTYPES:
            wrong_value("sinks", "a floating dtype", sinks.dtype)
        if sinks.shape != input.shape[-3:-2]:
            wrong_value("sinks", f"shape [H] = ({input.shape[-3]},)", shape_of(sinks))
        _check_device("sinks", sinks, input)
    check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        wrong_value("dropout_p", "a probability in [0, 1]", dropout_p)
    check_philox_seed(philox_seed, input.device)
    rows = input.shape[-2] if input.dim() > 1 else 1
    return causal_number(causal, rows == input.shape[-1])


def _check_device(name: str, x: Tensor, input: Tensor) -> None:
    if x.device != input.device:
        wrong_value(name, f"device {input.device}, as input has", x.device)


def _options(
    input: Tensor, mask: Tensor | None, dropout_p: float, sinks: Any, philox_seed: Any
) -> tuple[Any, ...]:
    """Returns mask, bias, sinks, philox and dropout_p as the operators take them."""
    is_bias = mask is not None and mask.dtype != torch.bool
    return (
        None if is_bias else mask,
        mask if is_bias else None,
        as_vector(sinks, torch.promote_types(input.dtype, torch.float32)),
        ops.philox_state(input, philox_seed) if dropout_p else None,
        float(dropout_p),
    )


def _reference(input: Tensor, scale: float, causal: int, options: tuple[Any, ...]) -> Tensor:
    from .reference import masked_softmax_reference

    mask, bias, sinks, philox, dropout_p = options
    return masked_softmax_reference(
        input,
        mask,
        bias,
        scale=scale,
        causal=next(name for name, number in CAUSAL.items() if number == causal),
        dropout_p=dropout_p,
        sinks=sinks,
        philox=philox,
    )


# -- masked_softmax ----------------------------------------------------------------------


def masked_softmax(
    input: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    causal: bool | str = False,
    dropout_p: float = 0.0,
    sinks: Tensor | None = None,
    philox_seed: int | Tensor | None = None,
) -> Tensor:
    """softmax(scale · input + mask) over the last dimension; hidden elements are exactly 0.

    input: [..., H, M, N], from one dimension up; float32, bfloat16, float16 or float64, any strides
        (copied first if the last one is not 1); any N. Computed in float32 (float64 for float64),
        returned in input's dtype, contiguous.
    mask: broadcasts to input's shape, never expanded. bool: True = may attend. Floating (any of the
        dtypes): added to scale · input; differentiable, the gradient has the mask's own shape.
    scale: multiplies input first; any finite number.
    causal: over the last two dimensions. "top_left": row i sees columns j <= i; "bottom_right":
        j <= i + N - M; True if M = N, where the two agree. With a mask, both apply.
    dropout_p: probability in [0, 1], rounded to 1/65536, kept weights are scaled by 1 / (1 - p).
        Random bits are those of `attention` for [B, H, M, N], see `dropout_mask`; B is the product
        of all dimensions before H. philox_seed: an int, or an int64 tensor (seed, offset).
    sinks: [H] logits that take part in the denominator only, unscaled; differentiable.

    A row that sees nothing gives 0 and zero gradients. Hidden elements influence nothing, whatever
    bits they hold; a visible NaN or +inf makes every visible element of its row NaN. A NaN or
    infinity in the gradient that arrives for a weight of exactly 0 is ignored. Under autocast input
    and mask are cast first; computation is in float32. Deterministic, for any number of threads. On
    a GPU, the CUDA or Triton kernels serve the call, and for float64 the reference. Second
    derivatives and forward mode: see `softmax_tangents`; third derivatives raise.

    Raises ArgumentValueError (ValueError, RuntimeError) and ArgumentTypeError (TypeError,
    RuntimeError) for wrong arguments, NotImplementedError on other devices.
    """
    if is_compiling() or is_any_autocast_enabled():
        input, mask = cast_for_autocast(input, mask)
    diagonal = _check(input, mask, scale, causal, dropout_p, sinks, philox_seed)
    row = choose_for("masked_softmax", input)
    if row is not REFERENCE:
        check_transforms("masked_softmax")
    options = _options(input, mask, dropout_p, sinks, philox_seed)
    if row is REFERENCE:
        return _reference(input, scale, diagonal, options)
    if is_tracing():
        return traced_masked_softmax(input, scale, diagonal, True, *options)[0]
    gradients = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (input, mask, sinks)
    )
    if not gradients and not transform_is_active():
        return ops.softmax_forward(input, scale, diagonal, False, *options)[0]
    if is_compiling():
        if mask is input:  # Dynamo refuses the same tensor twice
            input = input.view_as(input)
        return MaskedSoftmaxFunction.apply(input, scale, diagonal, True, *options)[0]
    if is_direct(input, mask, sinks):
        return _apply_directly(input, scale, diagonal, True, *options)[0]
    return MaskedSoftmaxForwardMode.apply(input, scale, diagonal, True, *options)[0]


def masked_softmax_(
    input: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    causal: bool | str = False,
    dropout_p: float = 0.0,
    sinks: Tensor | None = None,
    philox_seed: int | Tensor | None = None,
) -> Tensor:
    """`masked_softmax` that overwrites `input`, and returns it. Without gradients.

    Autocast does not apply: the result has input's dtype. Raises ArgumentValueError if input, mask
    or sinks require a gradient (and grad mode is on), if elements of input share memory (it is
    expanded, or its strides overlap), and if mask or sinks lie in input's memory.
    """
    diagonal = _check(input, mask, scale, causal, dropout_p, sinks, philox_seed)
    for name, x in (("input", input), ("mask", mask), ("sinks", sinks)):
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            hint = "use masked_softmax, or torch.no_grad()"
            wrong_value(name, "no requires_grad, for an in-place operation", True, hint)
    _check_memory(input, mask, sinks, philox_seed)
    if transform_is_active() or choose_for("masked_softmax", input) is REFERENCE:
        with torch.autocast(input.device.type, enabled=False):
            out = masked_softmax(
                input,
                mask,
                scale=scale,
                causal=causal,
                dropout_p=dropout_p,
                sinks=sinks,
                philox_seed=philox_seed,
            )
        return input.copy_(out)
    options = _options(input, mask, dropout_p, sinks, philox_seed)
    ops.softmax_in_place(input, scale, diagonal, *options)
    return input


@looks_at_sizes
def _check_memory(input: Tensor, mask: Any, sinks: Any, philox_seed: Any) -> None:
    """Raises if elements of input, which is overwritten, share memory, or share it with others."""
    if any(input.shape[i] > 1 and input.stride(i) == 0 for i in range(input.dim())):
        wrong_value("input", "memory of its own for each element", "an expanded tensor", "clone it")
    # This comes before random numbers are drawn; in compiled calls the operator checks.
    if not is_compiling() and not transform_is_active():
        if has_shared_elements(input):
            got = f"strides {tuple(input.stride())} for sizes {shape_of(input)}"
            wrong_value("input", "memory of its own for each element", got, "clone it")
        for name, other in (("mask", mask), ("sinks", sinks), ("philox_seed", philox_seed)):
            if isinstance(other, Tensor) and share_memory(input, other):
                wrong_value(name, "memory apart from input's", "a view of the same", "clone it")


# -- Megatron-LM and apex ----------------------------------------------------------------


def visible_of(mask: Any) -> Any:
    """Inverts a mask of Megatron-LM or apex, which is True (or 1) where masked out."""
    if mask is None:
        return None
    check_tensor("mask", mask)
    if mask.dtype not in (torch.bool, torch.uint8):
        wrong_value("mask", "bool or uint8, True = masked out", mask.dtype)
    # Broadcast dimensions get size 1: an expanded mask must not become a full one.
    return mask[tuple(slice(1 if stride == 0 else None) for stride in mask.stride())] == 0


def _check_scale(scale: Any) -> float:
    """Returns the scale as a number: the originals take None for 1, and their kernels a tensor."""
    if isinstance(scale, Tensor) and scale.numel() == 1:
        return float(scale)
    return 1.0 if scale is None else scale


def scaled_masked_softmax(input: Tensor, mask: Tensor | None, scale: float | None = 1.0) -> Tensor:
    """Megatron-LM's and apex's: softmax(scale · input) over [b, np, sq, sk].

    mask: bool or uint8, True = masked out, broadcasts to input's shape ([b or 1, 1, sq, sk] in the
    originals), or None. A row that is masked out everywhere gives 0. Any sizes and dtypes.
    """
    return masked_softmax(input, visible_of(mask), scale=_check_scale(scale))


def scaled_upper_triang_masked_softmax(input: Tensor, scale: float | None = 1.0) -> Tensor:
    """Megatron-LM's and apex's: softmax(scale · input) over [b · np, sq, sk], causal.

    Row i sees columns j <= i. The originals require sq = sk.
    """
    return masked_softmax(input, scale=_check_scale(scale), causal="top_left")


def scaled_softmax(input: Tensor, scale: float | None = 1.0) -> Tensor:
    """Megatron-LM's and apex's: softmax(scale · input) over [b, np, sq, sk]."""
    return masked_softmax(input, scale=_check_scale(scale))


class ScaledMaskedSoftmax:
    """For code that calls the original's autograd.Function: `ScaledMaskedSoftmax.apply(...)`."""

    apply = staticmethod(scaled_masked_softmax)


class ScaledUpperTriangMaskedSoftmax:
    """`ScaledUpperTriangMaskedSoftmax.apply(input, scale)`."""

    apply = staticmethod(scaled_upper_triang_masked_softmax)


class ScaledSoftmax:
    """`ScaledSoftmax.apply(input, scale)`."""

    apply = staticmethod(scaled_softmax)
