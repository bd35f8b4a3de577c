"""Compares scaled_dot_product_attention with the MATH kernel of torch's: results and errors."""

import contextlib
import inspect
import itertools
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from fused_attention import attention, dropout_mask, masked_softmax, patch_sdpa
from fused_attention import scaled_dot_product_attention as ours
from fused_attention.call import backends
from fused_attention.errors import ArgumentTypeError, ArgumentValueError


def theirs(*args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def assert_same(query, key, value, attn_mask=None, atol=1e-12, **options):
    """Asserts that output and all gradients are those of torch."""
    tensors = [query, key, value]
    if attn_mask is not None and type(attn_mask) is torch.Tensor and attn_mask.dtype != torch.bool:
        tensors.append(attn_mask)
    results = []
    for function in (ours, theirs):
        leaves = [x.detach().requires_grad_() for x in tensors]
        mask = leaves[3] if len(leaves) == 4 else attn_mask
        out = function(*leaves[:3], mask, **options)
        weights = torch.linspace(-1, 1, max(out.numel(), 1), dtype=torch.float64)[: out.numel()]
        grads = torch.autograd.grad((out.double() * weights.view(out.shape)).sum(), leaves)
        results.append([out.detach(), *grads])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        torch.testing.assert_close(got, expected, atol=atol, rtol=atol)
    with torch.no_grad():  # the operator without a Function, with and without a plan
        for _ in range(2):
            out = ours(query, key, value, attn_mask, **options)
            torch.testing.assert_close(out, results[1][0], atol=atol, rtol=atol)


# -- Signature ---------------------------------------------------------------------------


def test_signature_is_the_documented_one():
    names = "query key value attn_mask dropout_p is_causal scale enable_gqa".split()
    parameters = inspect.signature(ours).parameters
    assert list(parameters) == names
    assert [parameters[n].default for n in names[3:]] == [None, 0.0, False, None, False]
    assert [parameters[n].kind is inspect.Parameter.KEYWORD_ONLY for n in names] == (
        [False] * 6 + [True] * 2
    )


# -- Shapes ------------------------------------------------------------------------------

SHAPES = {
    "4-D": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "value_head_dim": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "3-D": ((3, 5, 8), (3, 7, 8), (3, 7, 8)),
    "2-D": ((5, 8), (7, 8), (7, 4)),
    "5-D": ((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 8)),
    "6-D": ((2, 1, 3, 2, 5, 8), (2, 1, 3, 2, 7, 8), (2, 1, 3, 2, 7, 8)),
    "ranks differ": ((5, 8), (2, 3, 7, 8), (3, 7, 8)),
    "query 4-D, key 3-D": ((2, 3, 5, 8), (3, 7, 8), (3, 7, 8)),
    "batch of key broadcast": ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)),
    "batch of query broadcast": ((1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "batch of value only": ((1, 3, 5, 8), (1, 3, 7, 8), (2, 3, 7, 8)),
    "heads of key and value broadcast": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "heads of key broadcast": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 3, 7, 8)),
    "heads of value broadcast": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 1, 7, 8)),
    "heads of query broadcast": ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "5-D broadcast": ((2, 3, 2, 5, 8), (1, 3, 1, 7, 8), (3, 1, 7, 8)),
}
EMPTY = {
    "no keys": ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8)),
    "no queries": ((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "no batch": ((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 8)),
    "no heads": ((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 8)),
    "no columns": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 0)),
    "no head_dim": ((2, 3, 5, 0), (2, 3, 7, 0), (2, 3, 7, 4)),
    "no batch, 5-D": ((2, 0, 3, 5, 8), (2, 0, 3, 7, 8), (2, 0, 3, 7, 8)),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", SHAPES | EMPTY)
def test_shapes(case, is_causal):
    assert_same(*(randn(*shape) for shape in (SHAPES | EMPTY)[case]), is_causal=is_causal)


@pytest.mark.parametrize(
    "heads", [(8, 2, 2), (8, 8, 8), (6, 1, 1), (8, 2, 4), (8, 4, 2), (8, 1, 8)]
)
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_gqa(heads, leading):
    tensors = [randn(*leading, h, s, 4) for h, s in zip(heads, (5, 6, 6), strict=True)]
    assert_same(*tensors, enable_gqa=True)


def test_gqa_with_batch_broadcast():
    assert_same(randn(3, 4, 5, 8), randn(1, 2, 6, 8), randn(3, 2, 6, 8), enable_gqa=True)


def test_memory_order_follows_query():
    q, k, v = (randn(2, s, 3, 8).transpose(1, 2) for s in (5, 7, 7))
    for _ in range(2):
        assert ours(q, k, v).stride() == (5 * 3 * 8, 8, 3 * 8, 1)
    assert ours(q.contiguous(), k, v).is_contiguous()
    assert_same(q, k, v)
    strided = [randn(2, 3, s, 16)[..., ::2] for s in (5, 7, 7)]
    assert_same(*strided)


# -- Masks -------------------------------------------------------------------------------

MASKS_4D = [
    (7,),
    (1,),
    (5, 7),
    (5, 1),
    (1, 7),
    (3, 5, 7),
    (1, 5, 7),
    (3, 1, 1),
    (2, 3, 5, 7),
    (2, 1, 5, 7),
    (1, 3, 5, 7),
    (1, 1, 5, 7),
    (2, 1, 1, 7),
    (2, 3, 5, 1),
]


@pytest.mark.parametrize("kind", ["bool", "bias"])
@pytest.mark.parametrize("shape", MASKS_4D, ids=str)
def test_masks(shape, kind):
    mask = torch.rand(shape) > 0.4 if kind == "bool" else randn(*shape)
    assert_same(randn(2, 3, 5, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 8), mask)


@pytest.mark.parametrize(
    "leading, shape",
    [
        ((), (7,)),
        ((), (5, 7)),
        ((3,), (7,)),
        ((3,), (5, 7)),
        ((3,), (1, 5, 7)),
        ((3,), (3, 5, 7)),
        *(((2, 4, 3), s) for s in [(7,), (5, 7), (3, 5, 7), (1, 1, 5, 7), (4, 1, 5, 7)]),
        *(((2, 4, 3), (a, b, h, 5, 7)) for a, b, h in itertools.product((1, 2), (1, 4), (1, 3))),
        ((2, 2, 2, 2), (2, 1, 2, 2, 5, 7)),
        ((2, 2, 2, 2), (1, 2, 1, 1, 5, 7)),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_masks_of_other_ranks(leading, shape, kind):
    mask = torch.rand(shape) > 0.4 if kind == "bool" else randn(*shape)
    assert_same(randn(*leading, 5, 8), randn(*leading, 7, 8), randn(*leading, 7, 8), mask)


def test_mask_with_empty_batch_of_rank_5():
    mask = torch.ones(2, 1, 1, 5, 7, dtype=torch.bool)
    q, k, v = randn(2, 0, 3, 5, 8), randn(2, 0, 3, 7, 8), randn(2, 0, 3, 7, 8)
    assert ours(q, k, v, mask).shape == theirs(q, k, v, mask).shape


@pytest.mark.parametrize(
    "dtype, bias_dtype",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float32),
    ],
)
def test_bias_dtypes(dtype, bias_dtype):
    tensors = [randn(2, 3, s, 8, dtype=dtype) for s in (5, 7, 7)]
    bias = randn(3, 5, 7, dtype=bias_dtype)
    atol = {torch.bfloat16: 6e-2, torch.float16: 1e-2, torch.float32: 1e-5}.get(dtype, 1e-6)
    assert_same(*tensors, bias, atol=atol)


def test_fully_masked_rows_are_zero():
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    tensors = [randn(1, 2, s, 8) for s in (5, 7, 7)]
    assert_same(*tensors, mask)
    assert not ours(*tensors, mask)[:, :, 2].any()


def test_nan_in_a_query_stays_nan():
    q, k, v = (randn(1, 1, s, 8, dtype=torch.float32) for s in (3, 5, 5))
    q[0, 0, 1] = float("nan")
    assert ours(q, k, v).isnan().all(-1).tolist() == [[[False, True, False]]]


@pytest.mark.parametrize("lengths", [(5, 5), (5, 7), (7, 5)])
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_causal_bias(bias, lengths):
    Sq, Sk = lengths
    tensors = [randn(2, 3, s, 8) for s in (Sq, Sk, Sk)]
    assert_same(*tensors, bias(Sq, Sk))


@pytest.mark.parametrize("lengths", [(5, 5), (5, 7), (7, 5)])
def test_is_causal_is_top_left(lengths):
    Sq, Sk = lengths
    assert_same(*(randn(2, 3, s, 8) for s in (Sq, Sk, Sk)), is_causal=True)


# -- Numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.0, -0.5, 2, torch.tensor(0.3)], ids=str)
def test_scale(scale):
    assert_same(*(randn(2, 3, s, 8) for s in (5, 7, 7)), scale=scale)


def test_dropout():
    q, k, v = randn(2, 3, 64, 8), randn(2, 3, 65, 8), randn(2, 3, 65, 65)
    v[:] = torch.eye(65)  # out is the weights
    torch.manual_seed(3)
    first, second = ours(q, k, v, None, 0.25), ours(q, k, v, None, 0.25)
    torch.manual_seed(3)
    torch.testing.assert_close(ours(q, k, v, None, 0.25), first, atol=0, rtol=0)
    assert not torch.equal(first, second)
    weights = theirs(q, k, v)
    kept = first != 0
    assert abs(kept.double().mean() - 0.75) < 0.02
    torch.testing.assert_close(first[kept], weights[kept] / 0.75)
    assert not ours(q, k, v, None, 1.0).any()
    mask = torch.rand(64, 65) > 0.5
    masked = ours(q, k, v, mask, 0.25)
    assert not masked[..., ~mask].any() and masked.any()


def test_autocast():
    q, k, v = (randn(2, 3, s, 8, dtype=torch.float32) for s in (5, 7, 7))
    with torch.autocast("cpu", torch.bfloat16):
        for mask in (None, torch.rand(5, 7) > 0.3, randn(5, 7, dtype=torch.float32)):
            for _ in range(2):
                out = ours(q, k.bfloat16(), v, mask)
                assert out.dtype == torch.bfloat16
                torch.testing.assert_close(out, theirs(q, k, v, mask), atol=3e-2, rtol=3e-2)
        assert ours(q.double(), k.double(), v.double()).dtype == torch.float64
    assert ours(q, k, v).dtype == torch.float32


# -- Errors ------------------------------------------------------------------------------


def test_sparse_tensors_are_refused_by_name():
    dense = randn(2, 3, 4, 8)
    ours(dense, dense, dense)
    sparse = dense.to_sparse()
    with pytest.raises(RuntimeError, match="query.*dense"):
        ours(sparse, sparse, sparse)


def test_nested_tensors_after_dense_ones():
    """A plan of dense calls does not serve nested tensors of the same sizes; test_nested.py has the
    rest."""
    dense = randn(2, 3, 4, 8)
    expected = ours(dense, dense, dense)
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor(list(dense), layout=layout)
        for got, want in zip(ours(nested, nested, nested).unbind(), expected, strict=True):
            torch.testing.assert_close(got, want)


# -- A scale that is a tensor ------------------------------------------------------------

PATCHED = pytest.mark.parametrize("patched", [False, True])


def called(patched, *args, **kwargs):
    with patch_sdpa() if patched else contextlib.nullcontext():
        return (F.scaled_dot_product_attention if patched else ours)(*args, **kwargs)


@PATCHED
@pytest.mark.parametrize("kind", [torch.tensor, nn.Parameter], ids=["tensor", "parameter"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.zeros(5, 5)}])
def test_a_scale_stands_for_its_present_value(patched, kind, options):
    query = randn(1, 2, 5, 8, dtype=torch.float32)
    scale = torch.tensor(0.1)
    if kind is nn.Parameter:
        scale = nn.Parameter(scale, requires_grad=False)
    plans = len(backends.PLANS)
    for value in (0.1, 3.0, -1.0, 0.1):
        scale.data.fill_(value)
        out = called(patched, query, query, query, scale=scale, **options)
        expected = theirs(query, query, query, scale=value, **options)
        torch.testing.assert_close(out, expected)
    assert len(backends.PLANS) <= plans + 3  # one for each value
    for value in (torch.tensor(2), torch.tensor(True), torch.tensor(0.1, dtype=torch.float16)):
        out = called(patched, query, query, query, scale=value)
        torch.testing.assert_close(out, theirs(query, query, query, scale=value))


@PATCHED
@pytest.mark.parametrize(
    "scale",
    [
        torch.tensor([0.1]),
        torch.tensor([0.1, 0.2]),
        torch.tensor(0.1, requires_grad=True),
        nn.Parameter(torch.tensor(0.1)),
        "0.1",
        torch.tensor(1j),
    ],
    ids=str,
)
def test_a_scale_that_pytorch_refuses_is_refused(patched, scale):
    query = randn(1, 2, 5, 8)
    for _ in range(2):
        with pytest.raises((TypeError, RuntimeError), match="scale|converted"):
            theirs(query, query, query, scale=scale)
        error = TypeError if not patched or not isinstance(scale, torch.Tensor) else Exception
        with pytest.raises(error, match="scale|converted"):
            called(patched, query, query, query, scale=scale)


def test_a_scale_of_numpy():
    query = randn(1, 2, 5, 8)
    for scale in (np.float32(0.25), np.float64(0.25)):
        out = ours(query, query, query, scale=scale)
        assert torch.equal(out, ours(query, query, query, scale=0.25))


# -- Keys by which plans are remembered --------------------------------------------------

EQUAL = {
    "window_size": [((2, 1), (2.0, 1.0)), ((2, 1), (2, 1.0)), ((2, 1), (Fraction(2), 1))],
    "causal": [(True, 1.0), (False, 0.0), (True, Fraction(1))],
    "scale": [(0.5, np.float32(0.5)), (0.5, Fraction(1, 2)), (0.5, Decimal("0.5"))],
    "softcap": [(2.0, np.float32(2)), (2, Decimal(2))],
    "dropout_p": [(0.5, np.float32(0.5)), (0.5, Decimal("0.5"))],
}


@pytest.mark.parametrize("name", EQUAL)
def test_what_compares_equal_is_not_taken_for_the_same(name):
    query = randn(1, 2, 5, 8)
    for valid, wrong in EQUAL[name]:
        assert valid == wrong
        for call in (attention, lambda *x, **o: attention(*x, **o, return_lse=True)):
            call(query, query, query, **{name: valid})
            with pytest.raises((ArgumentTypeError, ArgumentValueError), match=name):
                call(query, query, query, **{name: wrong})


def test_lengths_that_compare_equal():
    query, lengths = randn(5, 2, 8), torch.tensor([0, 2, 5]).int()
    options = {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths}
    attention(query, query, query, **options, max_seqlen_q=5)
    with pytest.raises(ArgumentValueError, match="max_seqlen_q"):
        attention(query, query, query, **options, max_seqlen_q=5.0)


def test_a_plan_holds_no_tensor():
    query = randn(1, 2, 5, 8)
    options = {"bias": randn(5, 5), "scale": 0.5, "alibi_slopes": randn(2), "return_lse": True}
    attention(query, query, query, **options)
    ours(query, query, query, randn(5, 5), scale=torch.tensor(0.3))

    def tensors(x):
        if isinstance(x, tuple):
            return [y for part in x for y in tensors(part)]
        return [x] if isinstance(x, torch.Tensor) else []

    assert backends.PLANS
    for kind, plan in backends.PLANS.items():
        assert not tensors(kind) and not tensors(plan.numbers) and not tensors(plan.plain)


@pytest.mark.parametrize("window", [(2**64, 2**70), (2**63, 0), (0, 2**63)])
def test_windows_without_end(window):
    query = randn(1, 2, 5, 8)
    same = tuple(-1 if x > 5 else x for x in window)
    for _ in range(2):
        out = attention(query, query, query, window_size=window)
        assert torch.equal(out, attention(query, query, query, window_size=same))


def test_numbers_of_too_many_bits():
    query, lengths = randn(5, 2, 8), torch.tensor([0, 2, 5]).int()
    options = {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths}
    for _ in range(2):
        out = attention(query, query, query, **options, max_seqlen_q=2**64, max_seqlen_k=2**65)
        assert torch.equal(out, attention(query, query, query, **options))
        for name in ("scale", "softcap", "dropout_p"):
            with pytest.raises(ArgumentValueError, match=f"{name}: expected"):
                attention(query, query, query, **options, **{name: 2**2000})
        with pytest.raises(ArgumentValueError, match="scale"):
            ours(query, query, query, scale=2**2000)
        with pytest.raises(ArgumentValueError, match="scale"):
            masked_softmax(query, scale=2**2000)
        with pytest.raises(ArgumentValueError, match="heads: expected a size below"):
            dropout_mask(1, 2**64, 1, 1, 0.5, 1)
