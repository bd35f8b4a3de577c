"""`attention_weights`: the weights, for callers who ask for them, tile by tile from the lse.

    weights_ij = dropout(exp(s_ij - lse_i)),  0 where key j is hidden;  s and lse as in `attention`

Given the lse of the fused forward, each tile of weights can be computed on its own (Dao 2023,
FlashAttention-2, Alg. 2). So the average over heads is taken tile by tile, and the gradient of the
weights is one more input of attention's backward. Memory beyond the results is O(tile) per thread,
forward and backward, dropout included; time is O(B·Hq·Sq·Sk·D), half of it for causal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .call.backends import REFERENCE, choose, reference
from .call.options import Keywords, Options
from .call.problem import (
    Problem,
    arguments_of,
    cast_for_autocast,
    check_tensor,
    refuse_keyword,
)
from .derivatives import autograd
from .errors import wrong_value
from .operators._torch import check_transforms, is_compiling, is_tracing
from .operators.arguments import SEQUENCES, Arguments, split

if TYPE_CHECKING:
    from typing_extensions import Unpack

_KEYWORDS = frozenset(Keywords.__annotations__)


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    reduce: Literal["mean"] | None = None,
    **options: Unpack[Keywords],
) -> Tensor:
    """Returns softmax(scale · query keyᵀ + bias), the factors of the values in `attention`.

    query [B, Hq, Sq, D], key [B, Hkv, Sk, D] and the options as in `attention`, dropout included.
    Returns [B, Hq, Sq, Sk] in query's dtype, or with reduce="mean" [B, Sq, Sk], averaged over the
    heads (summed in float32, float64 for float64, and rounded once). Memory beyond the result is
    O(B·Hq·Sq): the average holds no matrix of a head.

    A row that sees no key is 0. With sinks, a row sums to less than 1. Differentiable once;
    deterministic, for any number of threads. The reference serves the calls that the kernels do not
    serve. `attention_statistics` answers questions about all weights in linear memory.

    Raises as `attention` does, and NotImplementedError for packed sequences and pages
    (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table).
    """
    if reduce not in (None, "mean"):
        wrong_value("reduce", 'None or "mean"', repr(reduce))
    query, key, given, backend = read_call("attention_weights", query, key, options)
    value = no_value(key)
    problem = Problem.from_call(query, key, value, given)
    for name in SEQUENCES:
        if getattr(given, name) is not None:
            raise NotImplementedError(
                f"attention_weights: {name}: not built; attention_statistics serves it"
            )
    return _with_weights(problem, query, key, value, reduce == "mean", given, backend)[1]


def read_call(
    function: str, query: Any, key: Any, keywords: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Options, str]:
    """Returns query, key, options and backend of a call that has no value."""
    said = dict(keywords)
    for name in said:
        if name not in _KEYWORDS:
            refuse_keyword(name, function)
    backend = said.pop("backend", "auto")
    query, key, bias = cast_for_autocast(query, key, said.get("bias"))
    check_tensor("key", key)
    return query, key, Options(**said | {"bias": bias, "return_lse": True}), backend


def no_value(key: Tensor) -> Tensor:
    """Returns values of size 1 for these keys: zeros, one number in memory."""
    return key.detach().new_zeros(()).expand(*key.shape[:-1], 1)


def attention_with_weights(
    query: Tensor, key: Tensor, value: Tensor, *, average: bool = True, **options: Any
) -> tuple[Tensor, Tensor]:
    """Returns (out, weights). The other arguments, and out, are those of `attention`.

    weights: the factors of the values, after dropout, in query's dtype. If `average`, [B, Sq, Sk],
    averaged over the heads (summed in float32, float64 for float64, and rounded once); else
    [B, Hq, Sq, Sk]. A row that sees no key is 0. With sinks, a row does not sum to 1.
    Differentiable once; deterministic, for any number of threads. The reference serves the calls
    that the kernels do not serve. Raises as `attention` does.
    """
    query, key, value, bias = cast_for_autocast(query, key, value, options.get("bias"))
    given = Options(**options | {"bias": bias, "return_lse": True})
    problem = Problem.from_call(query, key, value, given)
    return _with_weights(problem, query, key, value, average, given)


def _with_weights(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    average: bool,
    given: Options,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    row = choose(problem, backend, task="attention_weights")
    arguments = arguments_of(query, key, split(problem.numbers)[1], given)
    if row is REFERENCE:
        return weights_by_reference(query, key, value, average, Arguments(*arguments))
    out, _, weights = _function(problem)(average, query, key, value, *arguments)
    return out, weights


def _function(problem: Problem) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Chooses the function that maps the inputs of `AttentionWithWeights` to its results."""
    check_transforms("attention")
    if is_tracing():
        return autograd.traced_attention_with_weights
    if not problem.differentiable:
        return autograd.forward_with_weights
    if is_compiling():
        return lambda *inputs: autograd.AttentionWithWeights.apply(*autograd.distinct(inputs))
    return autograd.AttentionWithWeightsForwardMode.apply


def weights_by_reference(
    query: Tensor, key: Tensor, value: Tensor, average: bool, arguments: Arguments
) -> tuple[Tensor, Tensor]:
    """Returns (out, weights). The weights are the output for identity matrices as values."""
    B, Hkv, Sk, _ = key.shape
    identity = torch.eye(Sk, dtype=value.dtype, device=value.device).expand(B, Hkv, Sk, Sk)
    out, weights = (reference(query, key, v, *arguments) for v in (value, identity))
    # The average over no heads is 0, as in the kernels.
    return out, weights.sum(1) / max(weights.shape[1], 1) if average else weights
