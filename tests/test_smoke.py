"""Tests the CPU kernels in half a minute (`make smoke`), and finds most kinds of one-line faults.

Every result is compared with the definition in float64, forward and backward, on the active
instruction set only. The name of a test says where the fault is that it catches. The allowed error
is larger than in the other tests, so that no test fails by chance: the error of a fault in a kernel
is larger still.
"""

import pytest
import torch
import torch.nn.functional as F

import cache_checks
import corner_checks
import decode_checks
import fused_attention as fa
import varlen_checks
import weights_checks
from feature_cases import case_id
from fused_attention.tools import testing
from fused_attention.tools.testing import Case
from softmax_checks import check as softmax_mismatches
from softmax_checks import randn

FACTOR = 4.0  # the allowed error, as a multiple of the naive error
DTYPES = testing.DTYPES


def check(**fields) -> None:
    assert not testing.check(Case(**fields), FACTOR, backend="cpu"), fields


def check_inputs(inputs: testing.Inputs, factor: float = FACTOR) -> None:
    got = testing.run(inputs, backend="cpu")
    assert not testing.mismatches(got, testing.exact(inputs), testing.naive(inputs), factor)


# -- Attention ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", testing.pairs_of_features(), ids=case_id)
def test_pairs_of_features(case):
    """Combines dtypes, masks, biases, ALiBi, softcap, sinks, dropout, GQA, strides, widths."""
    assert not testing.check(case, FACTOR, backend="cpu")


# Lengths near the edges of tiles (12, 24 or 48 queries by 96 keys), vectors and words (64 keys).
QUERIES = (1, 3, 13, 17, 24, 25, 48, 49)
KEYS = (1, 64, 95, 96, 97, 193)
VISIBLE = {
    "all": {},
    "top left": {"causal": "top_left"},
    "bottom right": {"causal": "bottom_right"},
    "diagonal": {"window_size": (0, 0), "causal": "bottom_right"},
    "left": {"window_size": (23, -1)},
    "right": {"window_size": (-1, 24)},
    "both sides": {"window_size": (40, 0), "causal": "bottom_right"},
    "padding": {"key_padding": True},
}


@pytest.mark.parametrize("name", VISIBLE)
def test_edges_of_masks_and_tiles(name):
    for Sq in QUERIES:
        for Sk in KEYS:
            check(Hq=2, Hkv=1, Sq=Sq, Sk=Sk, D=9, Dv=17, B=1, **VISIBLE[name])


@pytest.mark.parametrize("Sq", [2, 70], ids=["decode", "tiles"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rising", [True, False])
def test_rescaling_when_the_maximum_grows(rising, dtype, Sq):
    """The row maximum grows between tiles and between splits by more than the rescale threshold: a
    missing factor alpha makes an error as large as the result."""
    inputs = testing.make_inputs(Case(dtype=dtype, B=1, Hq=2, Hkv=2, Sq=Sq, Sk=2100, D=64, Dv=64))
    growth = torch.linspace(0.1, 6, 2100).view(-1, 1).to(dtype)
    inputs.tensors["key"] *= growth if rising else growth.flip(0)
    check_inputs(inputs, 32.0)


@pytest.mark.parametrize("bias", [None, "BHQK", "11QK", "1H1K", "B1Q1"])
@pytest.mark.parametrize("heads", [2, 8])
def test_both_ways_of_the_backward(heads, bias):
    """Runs the backward in one pass and in two; few key heads are cut into query splits."""
    for Sq, dtype in ((40, torch.float32), (420, torch.bfloat16)):
        check(
            B=1, Hq=2 * heads, Hkv=heads, Sq=Sq, Sk=230, bias=bias, dtype=dtype, causal="top_left"
        )


@pytest.mark.parametrize("head_dim", [1, 7, 8, 15, 31, 64, 65, 129, 256, 511])
def test_head_dims(head_dim):
    for Sq, dtype in ((3, torch.float32), (30, torch.float32), (30, torch.bfloat16)):
        check(B=1, Sq=Sq, Sk=99, D=head_dim, Dv=head_dim, dtype=dtype, seed=1)


@pytest.mark.parametrize("shape", ["11QK", "B1QK", "BHQK"])
def test_tiles_that_a_mask_hides_or_shows_whole(shape):
    inputs = testing.make_inputs(Case(mask=shape, Sq=150, Sk=450, Hq=4, causal="bottom_right"))
    mask = inputs.options["mask"]
    mask[..., 100:300], mask[..., 40:60, :] = False, False
    mask[..., 64:, 300:] = True
    check_inputs(inputs)


@pytest.mark.parametrize("how", corner_checks.NOT_SEEN)
def test_nan_in_keys_that_nobody_sees(how):
    for dtype in DTYPES:
        corner_checks.check_unseen_keys(how, float("nan"), dtype)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(sinks):
    for dtype in DTYPES:
        corner_checks.check_blind_rows(dtype, sinks)


def test_the_bits_do_not_depend_on_threads():
    inputs = testing.make_inputs(Case(Sq=200, Sk=300, bias="1H1K", sinks=True, dropout_p=0.2))
    results = []
    for threads in (1, 2, 3):
        with testing.num_threads(threads):
            results.append(testing.run(inputs, backend="cpu"))
    for other in results[1:]:
        assert all(torch.equal(x, other[name]) for name, x in results[0].items())


def test_dropout_keeps_what_its_mask_says():
    query, key = torch.randn(2, 3, 50, 8), torch.randn(2, 3, 130, 8)
    value = torch.eye(130).expand(2, 3, -1, -1)  # the output is the weights
    for rows in (50, 2):
        out = fa.attention(query[:, :, :rows], key, value, dropout_p=0.3, philox_seed=7)
        assert torch.equal(out != 0, fa.dropout_mask(2, 3, rows, 130, 0.3, 7))


# -- Few queries, sequences, pages, caches -----------------------------------------------


@pytest.mark.parametrize("name", decode_checks.CASES)
def test_few_queries_and_split_keys(name):
    for dtype in (torch.float32, torch.bfloat16):
        decode_checks.check_case(name, dtype)


@pytest.mark.parametrize("seqlen_k", [1, 7, 8, 63, 64, 65, 129])
def test_few_queries_and_the_last_keys(seqlen_k):
    for heads in (1, 2, 3, 5, decode_checks.rows_served()):
        case = Case(B=1, Hq=heads, Hkv=1, Sq=1, Sk=seqlen_k, D=24, Dv=40)
        decode_checks.check_forward(case)


@pytest.mark.parametrize("name", varlen_checks.OPTIONS)
def test_packed_sequences(name):
    for page_size, dtype in ((None, torch.float32), (7, torch.float16)):
        varlen_checks.check_packed(name, dtype, varlen_checks.LENGTHS, page_size)
        varlen_checks.check_gradients_of_packed(name, page_size)
    varlen_checks.check_packed(name, torch.float32, varlen_checks.DECODED, None)


@pytest.mark.parametrize("name", varlen_checks.OPTIONS | varlen_checks.SCORES)
def test_used_lengths_and_pages(name):
    for Sq, page_size in ((1, None), (3, 16), (60, 5)):
        varlen_checks.check_used_lengths_and_pages(name, Sq, page_size)
    varlen_checks.check_gradients_of_used_lengths_and_pages(name, 16)


def test_caches():
    for dtype in DTYPES:
        cache_checks.check_dense(dtype, 4)
    for page_size in (1, 3, 16):
        cache_checks.check_paged(page_size, 40)
    for paged in (False, True):
        cache_checks.check_generation(paged)


# -- Weights, softmax, second derivatives ------------------------------------------------


@pytest.mark.parametrize("number", range(0, len(weights_checks.COVERING), 5))
def test_weights_that_are_returned(number):
    assert not weights_checks.mismatches(weights_checks.COVERING[number], number % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_softmax(dtype):
    for columns in (1, 7, 16, 63, 64, 65, 500, 4097, 33000):
        x = randn(1, 2, 3, columns, dtype=dtype)
        x[..., columns // 2 :] += 5  # the maximum grows along the row
        mask = torch.rand(1, 1, 3, columns) > 0.3
        assert not softmax_mismatches(x, mask, scale=0.7), columns
        bias, sinks = randn(2, 1, columns, dtype=dtype), randn(2, dtype=torch.float64)
        sinks = sinks.to(torch.promote_types(dtype, torch.float32))
        options = {"causal": "bottom_right", "dropout_p": 0.3}
        assert not softmax_mismatches(x, None, bias, sinks, **options), columns


def test_second_derivatives():
    def call(*tensors):
        query, key, value, bias = tensors
        options = {"causal": "bottom_right", "softcap": 2.0, "dropout_p": 0.2, "philox_seed": 3}
        return fa.attention(query, key, value, bias=bias, **options, return_lse=True)

    shapes = ((1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 3), (1, 2, 1, 5))
    tensors = [torch.randn(x, dtype=torch.float64, requires_grad=True) for x in shapes]
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True, check_fwd_over_rev=True)


# -- From the public functions to the kernels --------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"attn_mask": torch.rand(5, 7) > 0.3, "scale": 0.3},
        {"attn_mask": torch.randn(2, 1, 5, 7, dtype=torch.float64)},
        {"enable_gqa": True},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_scaled_dot_product_attention(options):
    heads = 2 if "enable_gqa" in options else 4
    shapes = ((2, 4, 5, 8), (2, heads, 7, 8), (2, heads, 7, 6))
    leaves = [torch.randn(x, dtype=torch.float64, requires_grad=True) for x in shapes]
    results = []
    for function in (fa.scaled_dot_product_attention, F.scaled_dot_product_attention):
        out = function(*leaves, **options)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights):
    theirs = torch.nn.MultiheadAttention(24, 4, batch_first=True, dtype=torch.float64)
    ours = fa.MultiheadAttention.from_torch(theirs)
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    options = {"key_padding_mask": torch.arange(7).expand(3, 7) > 4, "need_weights": need_weights}
    for got, want in zip(ours(x, x, x, **options), theirs(x, x, x, **options), strict=True):
        assert (got is None) == (want is None)
        torch.testing.assert_close(got, want)


def test_a_patched_call_and_a_compiled_one():
    query, key, value = (torch.randn(1, 2, 9, 8) for _ in range(3))
    want = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    with fa.patch_sdpa() as patch:
        assert patch.active
        got = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(got, want)
    compiled = torch.compile(fa.attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, value, causal=True), want)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"key": torch.zeros(1, 2, 5, 9)}, "key: .*head_dim 8"),
        ({"mask": torch.zeros(3, 4)}, "mask: .*bool"),
        ({"causal": True}, "causal: .*top_left.*bottom_right"),
        ({"window_size": (-2, 0)}, "window_size: "),
        ({"dropout_p": 1.5}, "dropout_p: "),
        ({"seqused_k": torch.tensor([6], dtype=torch.int32)}, "seqused_k: .*got 6"),
    ],
)
def test_wrong_calls_are_refused(changes, message):
    valid = {name: torch.zeros(1, 2, size, 8) for name, size in (("query", 3), ("key", 5))}
    valid["value"] = valid["key"]
    fa.attention(**valid)
    with pytest.raises(fa.ArgumentValueError, match=message):
        fa.attention(**valid | changes)


def test_explain_names_the_kernel_that_runs():
    query, key = torch.zeros(1, 2, 50, 8), torch.zeros(1, 2, 50, 8)
    assert fa.explain(query, key, key).details.kernel == "attention_forward"
    assert fa.explain(query[:, :, :1], key, key).details.kernel == "attention_decode"
