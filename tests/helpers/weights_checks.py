"""Compares attention weights with the reference's: its output if value is the identity.

test_gpu.py puts a function that computes on a GPU in place of `attention_with_weights`.
"""

import dataclasses

import torch

from fused_attention.attention_weights import attention_with_weights
from fused_attention.tools import testing


def weights_inputs(case, average):
    """Returns inputs whose value is the identity, so that the output is the weights.

    The weights and grad_out, their gradient, are [B, Hq, Sq, Sk]. average: the weights are averaged
    over the heads, so that each head gets 1 / Hq of one gradient.
    """
    inputs = testing.make_inputs(dataclasses.replace(case, Dv=case.Sk))
    identity = torch.eye(case.Sk, dtype=case.dtype).expand(case.B, case.Hkv, case.Sk, case.Sk)
    grad = inputs.grad_out
    if average:
        grad = (grad[:, :1] / case.Hq).expand_as(grad)
    return dataclasses.replace(
        inputs,
        tensors=inputs.tensors | {"value": identity},
        grad_out=grad.contiguous(),
        grad_lse=torch.zeros_like(inputs.grad_lse),
    )


def as_weights(results, average):
    """Returns the results of attention to these inputs that weights have too, averaged if asked."""
    results = {name: x for name, x in results.items() if name not in ("lse", "dvalue")}
    if average:
        accumulated = torch.promote_types(results["out"].dtype, torch.float32)
        results["out"] = results["out"].to(accumulated).mean(1).to(results["out"].dtype)
    return results


def run(inputs, average):
    """Runs the weights forward and backward; the output gets no gradient."""
    leaves = inputs.differentiable()
    given = leaves | {"value": leaves.pop("value").detach()}
    _, weights = attention_with_weights(**given, average=average, **inputs.keywords)
    grad = inputs.grad_out
    grad = grad[:, 0] * grad.shape[1] if average else grad.mT.contiguous().mT  # not dense
    gradients = torch.autograd.grad(weights, list(leaves.values()), grad)
    named = {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {"out": weights.detach(), **named}


def mismatches(case, average):
    def answer(case):
        inputs = weights_inputs(case, average)
        exact = as_weights(testing.exact(inputs), average)
        naive = tuple(as_weights(x, average) for x in testing.naive(inputs))
        return run(inputs, average), exact, naive

    return testing.check_answers(case, answer)


COVERING = [case for case in testing.pairs_of_features() if case.Hq > 0]
