"""The attention weights themselves, for those who ask to see them: tile by tile, from the lse.

    weights_ij = dropout(exp(s_ij - lse_i)),  0 where key j is hidden;  s and lse as in `attention`

Given the log-denominators that the fused kernel left behind, each tile of weights stands alone
(Dao 2023, FlashAttention-2, Alg. 2), so that the average over heads is taken on the fly, and their
gradient takes part in the one backward of attention. Memory beyond the results O(tile) a thread,
forward and backward, dropout included; time O(B·Hq·Sq·Sk·D), half of it for causal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native
from . import operators as ops
from .call.backends import CPU, CUDA, TRITON, choose
from .call.problem import CAUSAL, Problem, as_4d, as_vector, cast_for_autocast
from .derivatives import autograd


def weights_extra_bytes(query: Tensor, bias: Tensor | None) -> int:
    """Working memory of the weights: for `explain`. On a GPU there is none."""
    if query.device.type != "cpu":
        return 0
    dtype = str(query.dtype).removeprefix("torch.")
    workspace = _native.weights_workspace_bytes(dtype, query.shape[-1], bias is not None)
    return torch.get_num_threads() * workspace


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    average: bool = True,
    bias: Tensor | None = None,
    philox_seed: int | Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(out, weights) of `attention`, which says what the arguments mean, those in `options` too.

    weights: those that met the values, after dropout, in query's dtype: [B, Sq, Sk], averaged over
    the heads (summed up in float32, float64 for float64, and rounded once), or else [B, Hq, Sq,
    Sk]. A row that sees no key: 0. With sinks a row does not sum to 1. Differentiable once;
    deterministic, for any number of threads. What the kernels do not serve, the reference does.
    Raises as `attention` does.
    """
    query, key, value, bias = cast_for_autocast(query, key, value, bias)
    problem = Problem.from_call(
        query, key, value, bias=bias, philox_seed=philox_seed, return_lse=True, **options
    )
    row = choose(problem)
    if row is CUDA and not TRITON.supports(problem):  # the CUDA library has no weights to return
        row = TRITON
    philox = None
    if problem.dropout_p:  # not before: a refused call draws nothing
        philox = ops.philox_state(query, key, value, philox_seed)
    if row not in (CPU, TRITON):
        return _reference(query, key, value, problem, average, bias=bias, philox=philox, **options)
    out, _, weights = autograd.plan_with_weights(problem)(
        *(average, query, key, value, *problem.numbers),
        *(as_4d(options.get("mask")), as_4d(bias), options.get("key_padding_mask")),
        as_vector(options.get("alibi_slopes"), torch.float32),
        as_vector(options.get("sinks"), torch.promote_types(query.dtype, torch.float32)),
        *(philox, problem.softcap, problem.dropout_p),
    )
    return out, weights


def _reference(
    query: Tensor, key: Tensor, value: Tensor, problem: Problem, average: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """The weights are what attention gives for values that are the identity."""
    from .reference import attention_reference

    options["causal"] = next(name for name, x in CAUSAL.items() if x == problem.causal)
    B, Hkv, Sk, _ = key.shape
    identity = torch.eye(Sk, dtype=value.dtype, device=value.device).expand(B, Hkv, Sk, Sk)
    out, weights = (attention_reference(query, key, v, **options) for v in (value, identity))
    assert isinstance(out, Tensor) and isinstance(weights, Tensor)
    # The average over no heads is 0, as the kernels have it.
    return out, weights.sum(1) / max(weights.shape[1], 1) if average else weights
