"""The tests of masked_softmax that the kernels of both GPU backends have to pass.

A test module imports them all. It puts the operators of its backend in place of the CPU's, and has
a fixture `blocks`: the ways to divide a row.
"""

import itertools
import math
import random

import pytest
import torch

import fused_attention as fa
from fused_attention import operators as ops
from fused_attention import reference
from fused_attention.kernels import launch
from selection import quick
from softmax_checks import CASES, PHILOX, check, randn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

SHAPE = (2, 2, 3, 20)

BROADCASTS = [
    tuple(size if full else 1 for size, full in zip(SHAPE, bits, strict=True))
    for bits in itertools.product((False, True), repeat=4)
]


SHAPES = [*BROADCASTS, (20,), (3, 1), (2, 3, 20), (1,), ()]


@pytest.mark.parametrize("shape", quick(SHAPES, *BROADCASTS[5::5]), ids=str)
def test_every_broadcast_shape(shape):
    x = randn(*SHAPE, dtype=torch.bfloat16)
    assert not check(x, torch.rand(shape) > 0.4)
    assert not check(x, bias=torch.randn(shape, dtype=torch.float32))


@pytest.mark.parametrize("programs", quick([1, 7, 512], 7))
def test_gradient_of_a_bias_in_any_number_of_parts(monkeypatch, programs):
    monkeypatch.setattr(launch, "DBIAS_PROGRAMS", programs)
    for shape in ((20,), (3, 1), (1, 1), (2, 1, 1), (2, 3, 20)):
        assert not check(randn(*SHAPE), bias=randn(*shape), causal="top_left", scale=0.3)


def fewer(shape):
    return tuple(10 if size == 40 else size for size in shape)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", quick(DTYPES, torch.float32, torch.bfloat16), ids=str)
def test_features_together(blocks, dtype):
    for mask, bias, sinks, causal, dropout_p, scale in random.Random(3).sample(CASES, 5):
        wrong = check(
            randn(2, 3, 10, 50, dtype=dtype),
            None if mask is None else torch.rand(fewer(mask)) > 0.4,
            None if bias is None else randn(*fewer(bias), dtype=dtype),
            randn(3) if sinks else None,
            causal=causal,
            dropout_p=dropout_p,
            scale=scale,
        )
        assert not wrong, (mask, bias, sinks, causal, dropout_p, scale)


@pytest.mark.parametrize("shape", [(7,), (4, 9), (2, 3, 4, 2, 5, 20)], ids=str)
def test_any_rank(shape):
    x = randn(*shape)
    assert not check(x, torch.rand(shape[-2:]) > 0.3, causal="bottom_right", dropout_p=0.2)


def test_dropout_bits_are_those_of_the_cpu(blocks):
    for N in (17, 63, 70):
        out = fa.masked_softmax(torch.zeros(2, 3, 5, N), dropout_p=0.4, philox_seed=PHILOX)
        assert torch.equal(out != 0, ops.dropout_keep_mask(PHILOX, 0.4, 2, 3, 5, N))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_values_influence_nothing(blocks, dtype):
    x, grad, bias = randn(4, 70, dtype=dtype), randn(4, 70, dtype=dtype), randn(70, dtype=dtype)
    mask = torch.rand(4, 70) > 0.4
    mask[2] = False
    results = []
    for a, g in ((x, grad), (x.masked_fill(~mask, math.nan), grad.masked_fill(~mask, math.inf))):
        out, _, _ = ops.softmax_forward(a, 1.0, 0, False, mask, bias)
        results.append((out, *ops.softmax_backward(g, out, 1.0, 0, bias, bias_grad=True)[:2]))
    for clean, other in zip(*results, strict=True):
        assert torch.equal(clean, other)
    assert results[1][0][2].eq(0).all() and results[1][1][2].eq(0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_visible_nan_propagates_in_its_row_only(blocks, bad):
    x = randn(3, 70)
    x[1, 35] = bad
    mask = torch.rand(3, 70) > 0.4
    mask[:, 35] = True
    for sink in (None, randn(1), torch.tensor([-math.inf])):
        out = fa.masked_softmax(x[None], mask, sinks=sink)[0]
        expected = reference.masked_softmax_reference(x[None], mask, sinks=sink)[0]
        torch.testing.assert_close(out, expected, equal_nan=True)
        assert torch.equal(out[1].isnan(), mask[1]) and out[1][~mask[1]].eq(0).all()


def test_large_logits(blocks):
    lowest = torch.finfo(torch.float32).min
    x, bias = randn(3, 60), torch.zeros(3, 60)
    bias[0, :30], bias[1], bias[2] = lowest, lowest, -1e9
    torch.testing.assert_close(
        fa.masked_softmax(x, bias), torch.softmax(x + bias, -1), rtol=1e-5, atol=1e-8
    )
    assert not check(randn(4, 60) * 1e7)


def test_in_place(blocks):
    for x in (randn(2, 3, 4, 40), randn(2, 3, 40, 4).mT, randn(2, 3, 4, 80)[..., ::2]):
        expected = fa.masked_softmax(x, causal="top_left")
        assert fa.masked_softmax_(x, causal="top_left") is x
        assert torch.equal(x, expected)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_empty(shape):
    leaves = [torch.zeros(shape), torch.zeros(shape[-1]), torch.zeros(3)]
    x, bias, sinks = (leaf.requires_grad_() for leaf in leaves)
    out = fa.masked_softmax(x, bias, sinks=sinks)
    assert out.shape == shape
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))
