"""Tests attention_decode, the kernel for few queries and many keys, which splits the keys."""

import math

import pytest
import torch

from decode_checks import CASES, check_case, check_forward, rows_served
from fused_attention import attention, explain
from fused_attention.tools import testing
from fused_attention.tools.testing import Case


@pytest.mark.covering
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results(isa, name, dtype):
    check_case(name, dtype)


@pytest.mark.covering
@pytest.mark.parametrize("seqlen_k", [1, 7, 8, 63, 64, 65, 127, 128, 129, 191, 800])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_every_tail_of_keys(isa, dtype, seqlen_k):
    for heads in range(1, rows_served() + 1):
        check_forward(Case(dtype=dtype, B=1, Hq=heads, Hkv=1, Sq=1, Sk=seqlen_k, D=24, Dv=40))


def test_the_ordinary_kernel_serves_more_rows(isa):
    rows = rows_served()
    assert rows >= 8
    for case in (Case(Hq=rows + 1, Hkv=1, Sq=1), Case(Hq=4, Hkv=2, Sq=rows // 2 + 1)):
        inputs = testing.make_inputs(case)
        assert explain(**inputs.tensors).details.kernel == "attention_forward"


@pytest.mark.parametrize("name", ["seven splits", "window", "everything"])
def test_bits_do_not_depend_on_threads(isa, name):
    inputs = testing.make_inputs(CASES[name])
    results = []
    for threads in (1, 2, 3, 1):
        with testing.num_threads(threads):
            results.append(
                attention(**inputs.tensors, **inputs.keywords, return_lse=True, backend="cpu")
            )
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_heads_of_a_group_see_their_own_keys_only(isa, junk):
    """Key 700 holds junk. It is hidden from head 0 of the group, and visible to head 1."""
    query, key, value = (torch.randn(1, heads, 1100, 64) for heads in (4, 2, 2))
    query = query[:, :, :1]
    mask = torch.ones(1, 4, 1, 1100, dtype=torch.bool)
    mask[0, 0, 0, 700] = False
    want, want_lse = attention(query, key, value, mask=mask, return_lse=True)
    key[0, 0, 700] = junk
    value[0, 0, 700] = junk
    out, lse = attention(query, key, value, mask=mask, return_lse=True)
    for head in (0, 2, 3):
        assert torch.equal(out[0, head], want[0, head])
        assert torch.equal(lse[0, head], want_lse[0, head])
    assert out[0, 1].isnan().all() and not lse[0, 1].isfinite().all()


@pytest.mark.parametrize("where", [0, 500, 1099])
def test_visible_nan_and_infinity_reach_the_result(isa, where):
    for junk in (math.nan, math.inf):
        query, key, value = (torch.randn(1, heads, 1100, 64) for heads in (4, 2, 2))
        query = query[:, :, :1].abs()
        key[0, 0, where, 0] = junk
        out, lse = attention(query, key, value, return_lse=True)
        assert out[0, :2].isnan().all() and lse[0, :2].isnan().all()
        assert out[0, 2:].isfinite().all() and lse[0, 2:].isfinite().all()
        value[0, 1, where, 5] = junk
        key[0, 0, where, 0] = 0.0
        out = attention(query, key, value)
        wrong = ~out.isfinite()
        assert wrong[0, 2:, 0, 5].all() and wrong.sum() == 2


def test_nan_alone_in_a_split_of_hidden_keys(isa):
    """If the only visible key of a split is NaN, the split has the maximum of no key."""
    query, key, value = (torch.randn(1, 1, 3000, 64) for _ in range(3))
    mask = torch.zeros(3000, dtype=torch.bool)
    mask[2000] = True
    key[0, 0, 2000] = math.nan
    out, lse = attention(query[:, :, :1], key, value, mask=mask, return_lse=True)
    assert out.isnan().all() and lse.isnan().all()


def test_rows_that_see_nothing(isa):
    query, key, value = (torch.randn(1, heads, 1500, 64) for heads in (4, 2, 2))
    query, value[0, 0] = query[:, :, :2], math.nan
    mask = torch.ones(1, 4, 2, 1500, dtype=torch.bool)
    mask[0, 0, 1] = mask[0, 2] = False
    sinks = torch.tensor([1.0, 2.0, 3.0, 4.0])
    out, lse = attention(query, key, value, mask=mask, return_lse=True)
    assert (out[0, 0, 1] == 0).all() and (out[0, 2] == 0).all() and out[0, 0, 0].isnan().all()
    assert lse[0, 0, 1] == -math.inf and (lse[0, 2] == -math.inf).all()
    out, lse = attention(query, key, value, mask=mask, sinks=sinks, return_lse=True)
    assert (out[0, 2] == 0).all() and (lse[0, 2] == 3.0).all() and lse[0, 0, 1] == 1.0
