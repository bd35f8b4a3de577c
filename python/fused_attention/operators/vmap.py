"""Rules of torch.vmap: the mapped dimension is folded into the batch.

Packed sequences take one call per sample, and so do, on a GPU, dropout and mapped sinks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import DIFFERENTIABLE, SEQUENCES
from .fake import fake_backward, fake_forward, fake_forward_plain
from .handles import (
    arguments,
    backward_jvp,
    dropout_keep_mask,
    jvp,
    softmax_forward,
    statistics,
    weights,
)

# They get a row for each sample if samples differ in one, or if each numbers its heads anew.
ROWS = ("philox", "sinks", "tangent_sinks")
_BIAS, _SINKS = map(DIFFERENTIABLE.index, ("bias", "sinks"))


def _fold_batch(
    name: str, x: Any, dim: int | None, samples: int, batch: int, own: frozenset[str]
) -> Any:
    """Returns argument `x`, mapped along `dim`, for a call whose batch is samples * batch.

    own: the arguments of which each sample gets a copy even if all samples share one.
    """
    if not isinstance(x, Tensor):
        return x
    if name in ROWS:
        if name not in own:
            return x
        x = x.expand(samples, *x.shape) if dim is None else x.movedim(dim, 0)
        x = x if x.dim() == 3 else x.unsqueeze(1)  # [samples, samples of an inner vmap, ...]
        return x.flatten(0, 1).contiguous()
    if name in ("mask", "bias", "tangent_bias") and dim is None and x.shape[0] == 1:
        if name not in own:
            return x  # stays broadcast
    if name == "alibi_slopes":  # [Hq] or [B, Hq] of each sample, or [B, Hq] of all
        if dim is None and x.dim() == 1:
            return x
        slopes = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
        slopes = slopes.unsqueeze(1) if slopes.dim() == 2 else slopes
        return slopes.expand(samples, batch, -1).flatten(0, 1).contiguous()
    x = x.expand(samples, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(samples, batch, *x.shape[2:]).flatten(0, 1)


def _vmap_rule(op: Any, batched_outputs: int) -> Callable[..., Any]:
    """Returns the rule of an attention operator; its first outputs begin with the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
        call = arguments(op, args, kwargs)
        dims = dict(zip(call, in_dims, strict=False))
        samples = info.batch_size
        query, query_dim = call["query"], dims["query"]
        batch = query.shape[0] if query_dim is None else query.movedim(query_dim, 0).shape[1]
        bias_grad, sinks_grad = call.get("bias_grad"), call.get("sinks_grad")
        own: set[str] = {"bias"} if bias_grad else set()
        sinks_are_mapped = any(dims.get(name) is not None for name in ROWS)
        if call.get("philox") is not None or sinks_are_mapped or sinks_grad:
            own |= set(ROWS)
        packed = any(call.get(name) is not None for name in SEQUENCES)
        on_gpu = query.device.type == "cuda" or op.namespace != "fused_attention"
        if packed or samples == 0 or ("philox" in own and on_gpu):
            results = [op(**_sample(call, dims, i)) for i in range(max(samples, 1))]
            if isinstance(results[0], Tensor):
                return torch.stack(results)[:samples], 0
            stacked = tuple(torch.stack(x)[:samples] for x in zip(*results, strict=True))
            return stacked, (0,) * len(stacked)
        result = op(
            **{
                name: _fold_batch(name, x, dims.get(name), samples, batch, frozenset(own))
                for name, x in call.items()
            }
        )
        if isinstance(result, Tensor):
            return result.unflatten(0, (samples, batch)), 0
        outputs = [
            x.unflatten(0, (samples, batch)) if i < batched_outputs else x
            for i, x in enumerate(result)
        ]
        mapped: list[int | None] = [0] * batched_outputs + [None] * (len(outputs) - batched_outputs)
        if bias_grad:  # summed over the batch of a sample if the batch shares one bias
            dbias = outputs[_BIAS].unflatten(0, (samples, batch))
            bias, dim = call["bias"], dims["bias"]
            shared = (bias if dim is None else bias.movedim(dim, 0)[0]).shape[0] == 1
            outputs[_BIAS], mapped[_BIAS] = dbias.sum(1, keepdim=True) if shared else dbias, 0
        if sinks_grad:
            sinks, dim = call["sinks"], dims["sinks"]
            shape = (sinks if dim is None else sinks.movedim(dim, 0)[0]).shape
            outputs[_SINKS], mapped[_SINKS] = outputs[_SINKS].view(samples, *shape), 0
        return tuple(outputs), tuple(mapped)

    return rule


def _sample(call: dict[str, Any], dims: dict[str, Any], i: int) -> dict[str, Any]:
    """Returns the arguments of sample i, or zeros of the same shapes if there are no samples."""

    def select(x: Tensor, dim: int) -> Tensor:
        return x.select(dim, i) if x.shape[dim] else x.sum(dim, dtype=x.dtype)

    sample = {
        name: x if dims.get(name) is None else select(x, dims[name]) for name, x in call.items()
    }
    for name in ("alibi_slopes", "sinks", "tangent_sinks", "philox"):
        if isinstance(sample.get(name), Tensor):
            sample[name] = sample[name].contiguous()
    return sample


@functools.cache
def register_tracing(namespace: str) -> None:
    """Registers fake kernels and vmap rules for the attention operators of a library, once."""
    library = getattr(torch.ops, namespace)
    for name, fake, outputs in (
        ("attention_forward_plain", fake_forward_plain, 1),
        ("attention_forward_plain_lse", fake_forward, 2),
        ("attention_forward", fake_forward, 2),
        ("attention_backward", fake_backward, 3),
    ):
        op = getattr(library, name).default
        torch.library.register_fake(f"{namespace}::{name}", fake)
        torch.library.register_vmap(f"{namespace}::{name}", _vmap_rule(op, batched_outputs=outputs))


register_tracing("fused_attention")
torch.library.register_vmap("fused_attention::attention_jvp", _vmap_rule(jvp, batched_outputs=2))
torch.library.register_vmap(
    "fused_attention::attention_backward_jvp", _vmap_rule(backward_jvp, batched_outputs=3)
)
torch.library.register_vmap(
    "fused_attention::attention_weights", _vmap_rule(weights, batched_outputs=1)
)
torch.library.register_vmap(
    "fused_attention::attention_statistics", _vmap_rule(statistics, batched_outputs=4)
)


def dropout_keep_masks(
    info: Any, in_dims: tuple[Any, ...], philox: Tensor, dropout_p: float, batch: int, *sizes: int
) -> tuple[Tensor, int]:
    """The vmap rule: returns a mask for each sample, even if all have the same seed."""
    samples = info.batch_size
    if samples == 0 or philox.device.type == "cuda":
        call, dims = {"philox": philox}, {"philox": in_dims[0]}
        masks = [
            dropout_keep_mask(_sample(call, dims, i)["philox"], dropout_p, batch, *sizes)
            for i in range(max(samples, 1))
        ]
        return torch.stack(masks)[:samples], 0
    states = _fold_batch("philox", philox, in_dims[0], samples, batch, frozenset(ROWS))
    keep = dropout_keep_mask(states, dropout_p, samples * batch, *sizes)
    return keep.unflatten(0, (samples, batch)), 0


torch.library.register_vmap("fused_attention::dropout_keep_mask", dropout_keep_masks)


# -- Masked softmax ----------------------------------------------------------------------


def softmax_vmap_rule(
    op: Any, main: str, mapped: Callable[[dict[str, Any]], tuple[bool, bool, bool]]
) -> Callable[..., Any]:
    """Returns the rule of an operator on rows: the samples become a new first dimension.

    main: the argument that has the shape of the rows. mapped: returns which results exist for each
    sample; the others are empty.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
        call = arguments(op, args, kwargs)
        dims = dict(zip(call, in_dims, strict=False))
        samples, own_grad = info.batch_size, bool(call.get("bias_grad"))
        own_rows = call.get("philox") is not None or dims.get("sinks") is not None
        if samples == 0 or (own_rows and call[main].device.type == "cuda"):
            each = [op(**_sample(call, dims, i)) for i in range(max(samples, 1))]
            stacked = tuple(torch.stack(x)[:samples] for x in zip(*each, strict=True))
            return stacked, (0, 0, 0)
        x, dim = call[main], dims[main]
        shape = x.shape if dim is None else x.movedim(dim, 0).shape[1:]
        # If heads are numbered, rows have at least the dimensions of heads, queries and keys.
        padding = (1,) * (3 - len(shape)) if own_rows else ()
        rank = len(padding) + len(shape)

        def fold(name: str, x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            dim = dims.get(name)
            if name in ("philox", "sinks"):
                return _fold_batch(name, x, dim, samples, 1, frozenset(ROWS if own_rows else ()))
            broadcasts = name in ("mask", "bias")
            if dim is None and broadcasts and not (name == "bias" and own_grad):
                return x
            x = x.expand(samples, *x.shape) if dim is None else x.movedim(dim, 0)
            ones = (1,) * (rank + 1 - x.dim()) if broadcasts else padding
            return x.reshape(samples, *ones, *x.shape[1:])

        results = list(op(**{name: fold(name, x) for name, x in call.items()}))
        if padding:
            results[0] = results[0].view(samples, *shape)
            if main == "input" and results[1].dim() > 1:
                results[1] = results[1].view(samples, *shape)
        if own_grad:
            bias, dim = call["bias"], dims["bias"]
            bias_shape = bias.shape if dim is None else bias.movedim(dim, 0).shape[1:]
            results[1] = results[1].view(samples, *bias_shape)
        return tuple(results), tuple(0 if of_sample else None for of_sample in mapped(call))

    return rule


torch.library.register_vmap(
    "fused_attention::masked_softmax_forward",
    softmax_vmap_rule(
        softmax_forward,
        "input",
        lambda call: (
            True,
            call["save"] and call["dropout_p"] > 0,
            call["save"] and call["sinks"] is not None,
        ),
    ),
)
