"""Tests corner cases: NaN, infinities, fully masked rows, hidden keys, empty and huge tensors."""

import math

import pytest
import torch

from corner_checks import (
    INF,
    NAN,
    NOT_SEEN,
    check_blind_rows,
    check_unseen_keys,
    gradients,
    make,
)
from fused_attention import attention
from fused_attention.tools import testing
from fused_attention.tools.testing import Case

# -- Hidden keys and fully masked rows ---------------------------------------------------


@pytest.mark.parametrize("how", NOT_SEEN)
@pytest.mark.parametrize("junk", [NAN, INF])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_keys_that_nobody_sees_influence_nothing(isa, how, junk, dtype):
    check_unseen_keys(how, junk, dtype)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(isa, dtype, sinks):
    check_blind_rows(dtype, sinks)


def test_a_fully_padded_sample_is_zero(isa):
    query, key, value = (x.requires_grad_() for x in make())
    padding = torch.tensor([[False], [True]]).expand(2, 107)
    out = attention(query, key, value, key_padding_mask=padding, backend="cpu")
    assert (out[1] == 0).all() and (out[0] != 0).any()
    for gradient in gradients(out, query, key, value):
        assert (gradient[1] == 0).all() and gradient[0].isfinite().all()


# -- Special values that are visible -----------------------------------------------------


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("Sk", [5, 107, 600])
def test_nan_in_a_query_stays(isa, dtype, Sk):
    query, key, value = make(dtype, Sk=Sk)
    query[0, 1, 7, 3] = NAN
    out, lse = attention(query, key, value, return_lse=True, backend="cpu")
    expected = torch.zeros_like(lse, dtype=torch.bool)
    expected[0, 1, 7] = True
    assert torch.equal(lse.isnan(), expected)
    assert torch.equal(out.isnan(), expected.unsqueeze(-1).expand_as(out))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("special", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["query", "key", "value", "bias"])
def test_nan_and_infinity_propagate_as_in_the_definition(isa, dtype, special, where):
    inputs = testing.make_inputs(Case(dtype=dtype, Sq=50, Sk=99, bias="1HQK"))
    position = (0, 1, 11, 2)
    inputs.tensors[where][position] = special
    call = {"bias": inputs.tensors["bias"]}
    tensors = [inputs.tensors[name] for name in ("query", "key", "value")]
    got = attention(*tensors, **call, backend="cpu")
    exact = attention(
        *(x.double() for x in tensors), bias=call["bias"].double(), backend="reference"
    )
    assert torch.equal(got.isnan(), exact.isnan())
    assert torch.equal(got[got.isinf()].double(), exact[exact.isinf()])
    fine = exact.isfinite()
    tolerance = 50 * torch.finfo(dtype).eps
    torch.testing.assert_close(got[fine].double(), exact[fine], atol=tolerance, rtol=tolerance)


def test_large_scores_do_not_overflow(isa):
    query, key, value = make()
    out = attention(query * 1e4, key * 1e4, value, backend="cpu")
    exact = attention(query.double() * 1e4, key.double() * 1e4, value.double(), backend="reference")
    torch.testing.assert_close(out, exact.float(), atol=1e-4, rtol=1e-4)


# By how much a row maximum may grow before the accumulator is rescaled: 2^8 as a logit. There, the
# next number below and the next above, since the comparison must be the same for all accumulators.
RESCALE_THRESHOLD = torch.tensor(8 * math.log(2))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("direction", [-math.inf, 0.0, math.inf])
def test_a_maximum_that_grows_by_the_rescale_threshold(isa, direction, dtype):
    growth = (
        RESCALE_THRESHOLD.nextafter(torch.tensor(direction)) if direction else RESCALE_THRESHOLD
    )
    query, key, value = (
        torch.ones(1, 1, 64, 1),
        torch.zeros(1, 1, 192, 1),
        torch.zeros(1, 1, 192, 1),
    )
    key[..., 96:, :], value[..., :96, :] = 1, 1
    out, lse = attention(
        *(x.to(dtype) for x in (query, key, value)), scale=growth.item(), return_lse=True
    )
    weight = 1 / (1 + growth.double().exp())
    torch.testing.assert_close(out.double(), weight.expand(out.shape), rtol=1e-2, atol=0.0)
    torch.testing.assert_close(
        lse.double(), (96 + 96 * growth.double().exp()).log().expand(lse.shape), rtol=1e-5, atol=0.0
    )


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_the_lowest_number_as_a_bias_is_a_number(isa, dtype):
    """Many models hide keys with it. A row of nothing else averages all values, as in softmax."""
    inputs = testing.make_inputs(Case(dtype=dtype, Sq=50, Sk=99, bias="11QK"))
    bias = inputs.tensors["bias"]
    bias[..., 40:] = torch.finfo(dtype).min
    bias[..., 7, :] = torch.finfo(dtype).min
    got = testing.run(inputs, backend="cpu")
    if dtype != torch.float16:  # beside -65504, its lowest number, scores still count
        average = inputs.tensors["value"].double().mean(2)
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            got["out"][:, :, 7].double(), average, atol=tolerance, rtol=tolerance
        )
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        got["out"].double(), testing.exact(inputs)["out"], atol=tolerance, rtol=tolerance
    )
    assert all(x.isfinite().all() for name, x in got.items() if name != "lse")


# -- Sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        {"B": 0},
        {"Hq": 0, "Hkv": 0},
        {"Sq": 0},
        {"Sk": 0},
        {"Sq": 0, "Sk": 0},
        {"Dv": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [None, "BHQK", "1H1K", "1111"])
@pytest.mark.parametrize("sinks", [False, True])
def test_empty(isa, shape, bias, sinks):
    sizes = {"B": 2, "Hq": 3, "Hkv": 3, "Sq": 5, "Sk": 7, "D": 8, "Dv": 8} | shape
    inputs = testing.make_inputs(Case(**sizes, bias=bias, sinks=sinks))
    got = testing.run(inputs)
    exact = testing.exact(inputs)
    for name, want in exact.items():
        torch.testing.assert_close(got[name], want.to(got[name].dtype), msg=name)


def test_more_than_2_to_the_31_elements():
    """64-bit offsets: the last head of an expanded tensor lies past 2^31 elements of its view."""
    storage = torch.randn(64, 64)
    huge = storage.as_strided((1, 1, 2**26, 64), (0, 0, 0, 1))  # 2^32 elements, one row
    query = torch.randn(1, 1, 3, 64)
    out = attention(query, huge[:, :, -5:], huge[:, :, -5:], backend="cpu")
    torch.testing.assert_close(out, storage[:1].expand(1, 1, 3, 64))
    stride = 2**31 // 4
    pool = torch.empty(5 * stride + 8, dtype=torch.uint8)  # untouched pages cost nothing
    value = pool.view(torch.uint8)[: 5 * stride].view(torch.float32)
    rows = value.as_strided((1, 1, 3, 4), (0, 0, stride // 2, 1))
    rows.copy_(torch.randn(1, 1, 3, 4))
    query = torch.randn(1, 1, 2, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, rows.contiguous(), rows.contiguous()
    )
    torch.testing.assert_close(attention(query, rows, rows, backend="cpu"), expected)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (3, 2, 1, 0)])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_memory_orders(isa, order, dtype):
    """Any strides are read in place or copied; outputs are dense, BSHD where the input is."""

    def laid_out(x):
        inverse = torch.tensor(order).argsort().tolist()
        return x.permute(order).contiguous().permute(inverse)

    plain = make(dtype)
    query, key, value = (laid_out(x).requires_grad_() for x in plain)
    out = attention(query, key, value, backend="cpu")
    expected = attention(*plain, backend="cpu")
    assert torch.equal(out, expected)
    results = (out, *gradients(out, query, key, value))
    for x, like in zip(results, (query, query, key, value), strict=True):
        bshd = like.stride(1) < like.stride(2)
        assert (x.transpose(1, 2) if bshd else x).is_contiguous()


def test_expanded_inputs_are_not_copied(isa):
    query, key, value = make()
    wide_key, wide_value = (x[:1, :1].expand(2, 2, -1, -1) for x in (key, value))
    out = attention(query, wide_key, wide_value, backend="cpu")
    assert torch.equal(
        out, attention(query, wide_key.contiguous(), wide_value.contiguous(), backend="cpu")
    )


@pytest.mark.parametrize("layout", [(1, 0), (0, 1), (0, 0)])
def test_masks_and_biases_of_any_stride(isa, layout):
    """A mask, bias or padding whose last stride is 0 or other than 1 is read in place."""
    query, key, value = make()
    transposed, expanded = layout
    mask = torch.rand(2, 1, 107, 53) > 0.3 if transposed else torch.rand(2, 1, 53, 214) > 0.3
    mask = mask.mT if transposed else mask[..., ::2]
    bias = torch.randn(1, 2, 107, 53).mT if transposed else torch.randn(1, 2, 53, 214)[..., 1::2]
    if expanded:
        mask, bias = mask[..., :1].expand(2, 1, 53, 107), bias[..., :1, :].expand(1, 2, 53, 107)
    padding = (torch.rand(107, 2) > 0.5).T
    out = attention(
        query, key, value, mask=mask, bias=bias, key_padding_mask=padding, backend="cpu"
    )
    dense = attention(
        query,
        key,
        value,
        mask=mask.contiguous(),
        bias=bias.contiguous(),
        key_padding_mask=padding.contiguous(),
        backend="cpu",
    )
    assert torch.equal(out, dense)


@pytest.mark.parametrize("shape", ["11QK", "B1QK", "1HQK", "BHQK", "B11K"])
@pytest.mark.parametrize("options", [{}, {"Hq": 4, "causal": "bottom_right"}], ids=["", "causal"])
def test_masks_in_blocks(isa, shape, options):
    """A mask hides whole tiles, shows whole tiles and cuts others; hidden keys hold NaN."""
    case = testing.Case(mask=shape, B=2, Sq=150, Sk=450, **options)
    inputs = testing.make_inputs(case)
    mask = torch.ones(case.broadcast_shape(shape), dtype=torch.bool)
    mask[..., 100:300] = False
    if shape != "B11K":
        mask[..., 40:60, :] = False
        mask[..., 64:, 290:300] = True
        mask[..., 5, 2] = False
    inputs.options["mask"] = mask
    wrong = testing.mismatches(testing.run(inputs), testing.exact(inputs), testing.naive(inputs))
    assert not wrong
    hidden = ~mask.expand(2, inputs.tensors["query"].shape[1], 150, 450).any(2).any(1)
    expected = testing.run(inputs)["out"]
    for name in ("key", "value"):
        inputs.tensors[name].masked_fill_(hidden[:, None, :, None], torch.nan)
    assert torch.equal(testing.run(inputs)["out"], expected)
