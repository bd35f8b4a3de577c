"""Compares masked_softmax of any backend with its definition: inputs, cases, the comparison."""

import itertools
import math
import random

import torch

import fused_attention as fa
from fused_attention import reference
from fused_attention.softmax import MaskedSoftmaxFunction
from fused_attention.tools import testing

PHILOX = torch.tensor([0x123456789ABCDEF, 5])


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def results(function, input, bias, sinks, grad):
    """Returns out and the gradients of sum(out * grad), by name."""
    leaves = {"input": input, "bias": bias, "sinks": sinks}
    leaves = {k: x.detach().requires_grad_() for k, x in leaves.items() if x is not None}
    out = function(leaves["input"], leaves.get("bias"), leaves.get("sinks"))
    gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return {"out": out.detach()} | {f"d{k}": x for k, x in zip(leaves, gradients, strict=True)}


def naive(input, mask, bias, sinks, grad, options):
    """Computes whole tensors, with the softmax of 16-bit inputs in float32 and the weights rounded
    once."""
    dtype, wide = input.dtype, torch.promote_types(input.dtype, torch.float32)
    seen = torch.ones(input.shape, dtype=torch.bool) if mask is None else mask.expand(input.shape)
    if options.get("causal"):
        M, N = ((1,) + tuple(input.shape))[-2:]
        off = N - M if options["causal"] == "bottom_right" else 0
        triangle = torch.ones(M, N, dtype=torch.bool).tril(off)
        seen = seen & (triangle if input.dim() > 1 else triangle[0])
    s = input.to(wide) * options.get("scale", 1.0)
    s = s if bias is None else s + bias.to(wide)
    columns = [torch.where(seen, s, -math.inf)]
    if sinks is not None:
        columns.append(sinks.to(wide).view(-1, 1, 1).expand(*s.shape[:-1], 1))
    p = torch.softmax(torch.cat(columns, -1), -1).nan_to_num(0.0)
    sink_weight, p = p[..., -1:], p[..., : s.shape[-1]].to(dtype).to(wide)
    keep = torch.ones_like(p)
    if options.get("dropout_p"):
        shape = (1,) * (3 - p.dim()) + tuple(p.shape)
        shape = (math.prod(shape[:-3]), *shape[-3:])
        keep = reference.dropout(keep.view(shape), options["dropout_p"], PHILOX).view(p.shape)
    dp = grad.to(wide) * keep
    delta = (p * dp).sum(-1, keepdim=True)
    ds = p * (dp - delta)
    got = {"out": (p * keep).to(dtype), "dinput": (ds * options.get("scale", 1.0)).to(dtype)}
    if bias is not None:
        got["dbias"] = ds.sum_to_size(bias.shape).to(bias.dtype)
        got["magnitude of dbias"] = ds.abs().sum_to_size(bias.shape)
    if sinks is not None:

        def per_sink(terms):  # [..., H, M, 1]
            return terms.sum(-1).sum(-1).reshape(-1, sinks.numel()).sum(0)

        got["dsinks"] = per_sink(-sink_weight * delta).to(sinks.dtype)
        # These sums are float32 at least, whatever the dtype of the input.
        unit = torch.finfo(wide).eps / torch.finfo(dtype).eps
        magnitudes = sink_weight * (p * dp).abs().sum(-1, keepdim=True)
        got["magnitude of dsinks"] = unit * per_sink(magnitudes)
    return got


def check(input, mask=None, bias=None, sinks=None, grad=None, **options):
    """Compares ours with the definition, and lists what breaks the correctness rule."""
    grad = torch.randn_like(input) if grad is None else grad
    seed = {"philox_seed": PHILOX} if options.get("dropout_p") else {}
    exact_options = options | ({"philox": PHILOX} if seed else {})

    def ours(x, b, s):
        # only the operators take both a boolean mask and a bias
        if mask is not None and b is not None:
            call = {"scale": options.get("scale", 1.0), "causal": options.get("causal", False)}
            causal = {False: 0, "top_left": 1, "bottom_right": 2}[call["causal"]]
            philox = PHILOX if seed else None
            rest = (mask, b, s, philox, options.get("dropout_p", 0.0))
            return MaskedSoftmaxFunction.apply(x, call["scale"], causal, True, *rest)[0]
        return fa.masked_softmax(x, mask if b is None else b, sinks=s, **options, **seed)

    def definition(x, b, s):
        return reference.masked_softmax_reference(x, mask, b, sinks=s, **exact_options)

    def wide(x):
        return None if x is None else x.double()

    got = results(ours, input, bias, sinks, grad)
    exact = results(definition, wide(input), wide(bias), wide(sinks), grad)
    plain = naive(input, mask, bias, sinks, grad, options)
    return testing.mismatches(got, exact, (plain,))


OPTIONS = {
    "mask": [None, (2, 1, 40, 50), (40, 1)],
    "bias": [None, (3, 1, 50), (2, 3, 40, 50)],
    "sinks": [False, True],
    "causal": [False, "top_left", "bottom_right"],
    "dropout_p": [0.0, 0.3, 1.0],
    "scale": [1.0, -0.4],
}

CASES = list(itertools.product(*OPTIONS.values()))

random.Random(0).shuffle(CASES)
