"""Calls of the Triton kernels' operators with `testing.Inputs`: attention, weights, caches."""

import dataclasses

import torch

from fused_attention import kv_cache_append_
from fused_attention.kernels import operators, tiles
from fused_attention.tools import testing
from fused_attention.tools.testing import Case
from operator_calls import arguments
from weights_checks import as_weights, weights_inputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

SMALL = tiles.Tiles(block_m=16, block_n=16, num_warps=4, num_stages=1)

# Sizes in place of the CPU's: with 16 x 16 tiles, fewer queries and keys make several blocks.
SIZES = {
    "tiny": (1, 1, 1, 1, 1, 1, 1),
    "decode": (2, 2, 1, 1, 45, 32, 32),
    "one key": (1, 2, 1, 19, 1, 8, 8),
    "ragged": (2, 2, 2, 21, 37, 33, 33),
    "long query": (1, 2, 2, 41, 19, 16, 16),
    "gqa": (1, 4, 2, 20, 34, 64, 64),
    "mqa narrow value": (1, 3, 1, 18, 50, 80, 17),
    "wide value": (1, 2, 2, 20, 33, 3, 70),
}


def smaller(case: Case) -> Case:
    fields = ("B", "Hq", "Hkv", "Sq", "Sk", "D", "Dv")
    sizes = tuple(getattr(case, name) for name in fields)
    name = next(name for name, shape in testing.SHAPES.items() if shape == sizes)
    dtype = torch.float32 if case.dtype == torch.float64 else case.dtype
    return dataclasses.replace(case, dtype=dtype, **dict(zip(fields, SIZES[name], strict=True)))


PAIRS = [smaller(case) for case in testing.pairs_of_features()]


def run(inputs: testing.Inputs) -> testing.Results:
    """Runs forward and backward, and returns results by name as `testing.run` does."""
    call = arguments(inputs)
    query, key, value = (inputs.tensors[name] for name in ("query", "key", "value"))
    out, lse = operators.attention_forward(query, key, value, *call)
    grad_lse = inputs.grad_lse.to(lse.dtype).masked_fill(lse.isinf(), 0.0)
    wanted = ("bias" in inputs.tensors, "sinks" in inputs.tensors)
    dq, dk, dv, dbias, dsinks = operators.attention_backward(
        inputs.grad_out,
        grad_lse,
        query,
        key,
        value,
        out,
        lse,
        *call,
        *(None,) * 6,
        0,
        0,
        0,
        *wanted,
    )
    results = {"out": out, "lse": lse, "dquery": dq, "dkey": dk, "dvalue": dv}
    if wanted[0]:
        results["dbias"] = dbias
    if wanted[1]:
        results["dsinks"] = dsinks
    return results


def run_weights(inputs, average):
    """Runs the weights forward and backward; the gradient of the output is 0."""
    tensors, call = inputs.tensors, arguments(inputs)
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    out, lse = operators.attention_forward(query, key, value, *call)
    weights = operators.attention_weights(query, key, lse, average, *call)
    grad = inputs.grad_out
    grad = grad[:, 0] * grad.shape[1] if average else grad.mT.contiguous().mT  # not dense
    wanted = ("bias" in tensors, "sinks" in tensors)
    dq, dk, _, dbias, dsinks = operators.attention_backward(
        *(torch.zeros_like(out), None, query, key, value, out, lse, *call, *(None,) * 6, 0, 0, 0),
        *(*wanted, grad, average),
    )
    results = {"out": weights, "dquery": dq, "dkey": dk, "dbias": dbias, "dsinks": dsinks}
    return {
        name: x
        for name, x in results.items()
        if name not in ("dbias", "dsinks") or name[1:] in tensors
    }


def weights_mismatches(case, average):
    def answer(case):
        inputs = weights_inputs(case, average)
        exact = as_weights(testing.exact(inputs), average)
        naive = tuple(as_weights(x, average) for x in testing.naive(inputs))
        return run_weights(inputs, average), exact, naive

    return testing.check_answers(case, answer)


def check_append(caches, *rest):
    """Compares the operator with that of the CPU."""
    want = [x.clone() for x in caches]
    kv_cache_append_(*want, *rest)
    operators.kv_cache_append_(*caches, *rest)
    assert all(torch.equal(x, y) for x, y in zip(caches, want, strict=True))
