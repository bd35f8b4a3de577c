"""The attention weights, for callers who ask for them: computed tile by tile from the lse.

    weights_ij = dropout(exp(s_ij - lse_i)),  0 where key j is hidden;  s and lse as in `attention`

Given the lse of the fused forward, each tile of weights can be computed on its own (Dao 2023,
FlashAttention-2, Alg. 2). So the average over heads is taken tile by tile, and the gradient of the
weights is one more input of attention's backward. Memory beyond the results is O(tile) per thread,
forward and backward, dropout included; time is O(B·Hq·Sq·Sk·D), half of it for causal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .call.backends import REFERENCE, choose, reference
from .call.options import Options
from .call.problem import Problem, arguments_of, cast_for_autocast
from .derivatives import autograd
from .operators._torch import check_transforms, is_compiling, is_tracing
from .operators.arguments import Arguments, split


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
    row = choose(problem, task="attention_weights")
    arguments = arguments_of(query, key, split(problem.numbers)[1], given)
    if row is REFERENCE:
        return _reference(query, key, value, average, Arguments(*arguments))
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


def _reference(
    query: Tensor, key: Tensor, value: Tensor, average: bool, arguments: Arguments
) -> tuple[Tensor, Tensor]:
    """Returns (out, weights). The weights are the output for identity matrices as values."""
    B, Hkv, Sk, _ = key.shape
    identity = torch.eye(Sk, dtype=value.dtype, device=value.device).expand(B, Hkv, Sk, Sk)
    out, weights = (reference(query, key, v, *arguments) for v in (value, identity))
    # The average over no heads is 0, as in the kernels.
    return out, weights.sum(1) / max(weights.shape[1], 1) if average else weights
