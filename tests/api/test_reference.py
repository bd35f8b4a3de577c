"""Compares the reference with results that do not come from it.

They come from PyTorch's maths SDPA where the two overlap, small cases worked out by hand,
brute-force loops that spell out every rule for one query and one key, an independent Philox, and
finite differences.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import philox_numpy
from fused_attention import reference
from fused_attention.reference import attention_reference as attention

INF = float("inf")
NAN = float("nan")
LN2, LN3, LN5 = math.log(2.0), math.log(3.0), math.log(5.0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20240607)


def make(*shape, dtype=torch.float64, grad=False):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def qkv(B=2, Hq=4, Hkv=2, Sq=5, Sk=7, D=3, Dv=6, **kwargs):
    return (
        make(B, Hq, Sq, D, **kwargs),
        make(B, Hkv, Sk, D, **kwargs),
        make(B, Hkv, Sk, Dv, **kwargs),
    )


def column(*numbers, grad=False):
    """[1, 1, S, 1]: one number per token."""
    return torch.tensor(numbers, dtype=torch.float64).view(1, 1, -1, 1).requires_grad_(grad)


def near(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=atol)


def brute_force(q, k, v, sees, score, sinks=None):
    """(out, lse) by a loop over batch, head, query; `sees` and `score` judge one (b, h, i, j)."""
    B, Hq, Sq, _ = q.shape
    Sk, Dv = v.shape[2:]
    out, lse = q.new_zeros(B, Hq, Sq, Dv), q.new_full((B, Hq, Sq), -INF)
    for b in range(B):
        for h in range(Hq):
            for i in range(Sq):
                kv_head = h // (Hq // k.shape[1])
                keys = [j for j in range(Sk) if sees(b, h, i, j)]
                denominator = 0.0 if sinks is None else math.exp(sinks[h])
                for j in keys:
                    dot = float(sum(q[b, h, i] * k[b, kv_head, j])) / math.sqrt(q.shape[3])
                    weight = math.exp(score(dot, b, h, i, j))
                    denominator += weight
                    out[b, h, i] += weight * v[b, kv_head, j]
                if denominator:
                    out[b, h, i] /= denominator
                    lse[b, h, i] = math.log(denominator)
    return out, lse


def everything(b, h, i, j):
    return True


def plain(dot, b, h, i, j):
    return dot


# -- By hand -----------------------------------------------------------------------------


def test_three_keys_by_hand():
    # logits 0, ln 2, ln 5: weights 1/8, 2/8, 5/8. out = 8/8 + 2·4/8 + 5·16/8 = 12, lse = ln 8.
    q, k, v = column(1, grad=True), column(0, LN2, LN5, grad=True), column(8, 4, 16, grad=True)
    out, lse = attention(q, k, v, scale=1.0, return_lse=True)
    near(out, column(12))
    near(lse, torch.tensor([[[math.log(8)]]], dtype=torch.float64))
    # ds_j = p_j (v_j - out) = -4/8, -8·2/8, 4·5/8; dk = ds · q; dq = Σ ds_j k_j; dv = p.
    out.backward(torch.ones_like(out))
    near(q.grad, column(-2 * LN2 + 2.5 * LN5))
    near(k.grad, column(-0.5, -2, 2.5))
    near(v.grad, column(1 / 8, 2 / 8, 5 / 8))


def test_lse_gradient_by_hand():
    # d lse / d s_j = p_j = 1/8, 2/8, 5/8. A sink of ln 8 halves them, and its own share is 8/16.
    q, k, v = column(1, grad=True), column(0, LN2, LN5, grad=True), column(8, 4, 16)
    attention(q, k, v, scale=1.0, return_lse=True)[1].sum().backward()
    near(k.grad, column(1 / 8, 2 / 8, 5 / 8))
    near(q.grad, column(2 / 8 * LN2 + 5 / 8 * LN5))
    sinks = torch.tensor([math.log(8)], dtype=torch.float64, requires_grad=True)
    k.grad = None
    attention(q, k, v, scale=1.0, sinks=sinks, return_lse=True)[1].sum().backward()
    near(sinks.grad, torch.tensor([0.5], dtype=torch.float64))
    near(k.grad, column(1 / 16, 2 / 16, 5 / 16))


def test_sink_by_hand():
    # A sink of ln 8 doubles the denominator 8: out 12/2, lse = ln 16. The scale does not touch it.
    sinks = torch.tensor([math.log(8)], dtype=torch.float64)
    q, k = column(1), column(0, 2 * LN2, 2 * LN5)
    out, lse = attention(q, k, column(8, 4, 16), scale=0.5, sinks=sinks, return_lse=True)
    near(out, column(6))
    near(lse, torch.tensor([[[math.log(16)]]], dtype=torch.float64))


def test_softcap_by_hand():
    # tanh(ln 2) = (4 - 1) / (4 + 1) = 3/5. Cap 5/3 · ln 3 and score cap · ln 2 make the logit ln 3.
    cap = 5 / 3 * LN3
    # A bias comes after the cap: ln 2 more makes the weights 6 and 1 of 7 instead of 3 and 1 of 4.
    bias = torch.tensor([[[[LN2, 0.0]]]], dtype=torch.float64)
    q, k, v = column(1), column(cap * LN2, 0), column(28, 0)
    near(attention(q, k, v, scale=1.0, softcap=cap), column(21))
    near(attention(q, k, v, scale=1.0, softcap=cap, bias=bias), column(24))


def test_alibi_by_hand():
    # Slope ln 2 halves a weight per token of distance. Three equal scores seen from the last key:
    # 1/4, 1/2, 1 of 7/4, so (7 + 2·14 + 4·21) / 7 = 17; from the first: (4·7 + 2·14 + 21) / 7 = 11.
    slopes = torch.tensor([LN2])
    k, v = column(0, 0, 0), column(7, 14, 21)
    tolerance = 1e-6  # slopes are float32
    one = attention(column(5), k, v, alibi_slopes=slopes, causal="bottom_right")
    near(one, column(17), tolerance)
    near(attention(column(5), k, v, alibi_slopes=slopes), column(11), tolerance)
    # Three queries: the middle one sees 1/2, 1, 1/2 of 2: (7 + 28 + 21) / 4 = 14.
    three = attention(column(5, 5, 5), k, v, alibi_slopes=slopes)
    near(three, column(11, 14, 17), tolerance)


def test_causal_by_hand():
    # Equal scores give the average of the visible ones among 1, 2, 4.
    k, v = column(0, 0, 0), column(1, 2, 4)
    near(attention(column(1, 1), k, v, causal="top_left"), column(1, 1.5))
    near(attention(column(1, 1), k, v, causal="bottom_right"), column(1.5, 7 / 3))
    # Five queries, three keys: the first two see nothing from the bottom right.
    five = column(1, 1, 1, 1, 1)
    near(attention(five, k, v, causal="top_left"), column(1, 1.5, 7 / 3, 7 / 3, 7 / 3))
    out, lse = attention(five, k, v, causal="bottom_right", return_lse=True)
    near(out, column(0, 0, 1, 1.5, 7 / 3))
    near(lse, torch.tensor([[[-INF, -INF, 0, LN2, LN3]]], dtype=torch.float64))


# -- PyTorch's maths SDPA ----------------------------------------------------------------


def sdpa(*args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def same_gradients(actual, expected, inputs):
    """Asserts that both results have the same gradients for a random incoming gradient."""
    grad = torch.randn_like(expected)
    ours = torch.autograd.grad(actual, inputs, grad, retain_graph=True)
    theirs = torch.autograd.grad(expected, inputs, grad, retain_graph=True)
    for a, b in zip(ours, theirs, strict=True):
        near(a, b)


MASK_SHAPES = [(2, 4, 5, 7), (2, 1, 5, 7), (1, 4, 1, 7), (5, 7), (1, 1, 5, 1), (7,)]


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks_agree_with_sdpa(kind, shape):
    q, k, v = qkv(grad=True)
    if kind == "bool":
        mask = torch.rand(shape) < 0.6
        if mask.shape[-1] == 1:
            mask[...] = True
        mask[..., 0] = True  # no fully masked rows: another test has those
        inputs, ours, theirs = (q, k, v), {"mask": mask}, {"attn_mask": mask}
    else:
        bias = make(*shape, grad=True)
        inputs, ours, theirs = (q, k, v, bias), {"bias": bias}, {"attn_mask": bias}
    out = attention(q, k, v, **ours)
    expected = sdpa(q, k, v, **theirs, enable_gqa=True)
    near(out, expected)
    same_gradients(out, expected, inputs)


@pytest.mark.parametrize("scale", [None, 0.37, 0.0, -1.5])
@pytest.mark.parametrize("causal", [False, "top_left"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("lengths", [(5, 7), (7, 5), (1, 9)], ids=str)
def test_plain_calls_agree_with_sdpa(scale, causal, heads, lengths):
    q, k, v = qkv(2, *heads, *lengths, grad=True)
    out = attention(q, k, v, causal=causal, scale=scale)
    expected = sdpa(q, k, v, is_causal=bool(causal), scale=scale, enable_gqa=True)
    near(out, expected)
    same_gradients(out, expected, (q, k, v))


def test_infinite_bias_agrees_with_sdpa():
    q, k, v = qkv(grad=True)
    bias = make(2, 4, 5, 7).masked_fill_(torch.rand(2, 4, 5, 7) < 0.5, -INF)
    bias[1, 2, 3] = -INF  # a row of nothing but -inf
    out, lse = attention(q, k, v, bias=bias, return_lse=True)
    near(out, sdpa(q, k, v, attn_mask=bias, enable_gqa=True))
    assert (out[1, 2, 3] == 0).all() and lse[1, 2, 3] == -INF
    for gradient in torch.autograd.grad(out.sum() + lse[lse > -INF].sum(), (q, k, v)):
        assert gradient.isfinite().all()


def test_true_is_causal_where_the_alignments_agree():
    q, k, v = qkv(Sq=6, Sk=6)
    expected = sdpa(q, k, v, is_causal=True, enable_gqa=True)
    for causal in (True, "top_left", "bottom_right"):
        near(attention(q, k, v, causal=causal), expected)


# -- Scores, lse, sinks ------------------------------------------------------------------


def test_lse_is_logsumexp():
    q, k, v = qkv(grad=True)
    bias, sinks = make(4, 1, 7, grad=True), make(4, grad=True)
    mask = torch.rand(2, 1, 5, 7) < 0.6
    mask[..., 0] = True
    inputs = (q, k, bias)
    s = q @ k.repeat_interleave(2, 1).mT / math.sqrt(3) + bias
    s = s.masked_fill(~mask, -INF)

    lse = attention(q, k, v, bias=bias, mask=mask, return_lse=True)[1]
    expected = torch.logsumexp(s, -1)
    near(lse, expected)
    same_gradients(lse, expected, inputs)

    lse = attention(q, k, v, bias=bias, mask=mask, sinks=sinks, return_lse=True)[1]
    expected = torch.logaddexp(torch.logsumexp(s, -1), sinks.view(4, 1))
    near(lse, expected)
    same_gradients(lse, expected, (*inputs, sinks))


def test_softcap_bias_alibi_and_sinks_in_order():
    q, k, v = qkv()
    bias, sinks, slopes = make(2, 1, 5, 7), make(4), torch.rand(2, 4)
    cap, off = 0.7, 2

    def score(dot, b, h, i, j):
        capped = cap * math.tanh(dot / cap)
        return capped + float(bias[b, 0, i, j]) - float(slopes[b, h]) * abs(i + off - j)

    out, lse = attention(
        q,
        k,
        v,
        bias=bias,
        sinks=sinks,
        alibi_slopes=slopes,
        softcap=cap,
        causal="bottom_right",
        return_lse=True,
    )
    expected = brute_force(q, k, v, lambda b, h, i, j: j <= i + off, score, sinks.tolist())
    near(out, expected[0])
    near(lse, expected[1])


def test_slopes_per_head_equal_slopes_repeated_per_batch():
    q, k, v = qkv()
    slopes = torch.rand(4)
    expected = brute_force(
        q, k, v, everything, lambda dot, b, h, i, j: dot - float(slopes[h]) * abs(i - j)
    )
    near(attention(q, k, v, alibi_slopes=slopes), expected[0])
    near(attention(q, k, v, alibi_slopes=slopes.expand(2, 4)), expected[0])


def test_large_scores_do_not_overflow():
    # 1000 and 999 apart from the rest: weights e/(1+e) and 1/(1+e), lse = 1000 + ln(1 + 1/e).
    for sign, floor in ((1, -1000), (-1, -3000)):
        k = column(sign * 1000, sign * 1000 - 1, floor)
        out, lse = attention(column(1), k, column(1, 0, 5), scale=1.0, return_lse=True)
        near(out, column(math.e / (1 + math.e)))
        assert float(lse) == pytest.approx(sign * 1000 + math.log1p(1 / math.e), rel=1e-14)


# -- Visibility --------------------------------------------------------------------------


@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (2, 1), (-1, 2), (3, -1), (0, 4)], ids=str)
@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize("lengths", [(4, 4), (3, 6), (6, 3), (1, 5)], ids=str)
def test_windows_and_causal_against_loops(window, causal, lengths):
    Sq, Sk = lengths
    left, right = window
    off = Sk - Sq if causal == "bottom_right" else 0

    def sees(b, h, i, j):
        return (
            (not causal or j <= i + off)
            and (left == -1 or i + off - left <= j)
            and (right == -1 or j <= i + off + right)
        )

    q, k, v = qkv(1, 2, 1, Sq, Sk, 2, 3)
    out, lse = attention(q, k, v, causal=causal, window_size=window, return_lse=True)
    expected = brute_force(q, k, v, sees, plain)
    near(out, expected[0])
    near(lse, expected[1])


def test_a_window_as_large_as_an_integer_is_no_limit():
    q, k, v = qkv()
    huge = 2**63 - 1
    near(attention(q, k, v, window_size=(huge, huge)), attention(q, k, v))


def test_everything_that_hides_keys_at_once():
    q, k, v = qkv(Sq=4, Sk=6)
    mask, padding = torch.rand(2, 4, 4, 6) < 0.7, torch.rand(2, 6) < 0.3
    used = torch.tensor([5, 3])

    def sees(b, h, i, j):
        off = int(used[b]) - 4
        return (
            bool(mask[b, h, i, j])
            and not padding[b, j]
            and j < used[b]
            and i + off - 3 <= j <= i + off
        )

    out, lse = attention(
        q,
        k,
        v,
        mask=mask,
        key_padding_mask=padding,
        seqused_k=used,
        causal="bottom_right",
        window_size=(3, 2),
        return_lse=True,
    )
    expected = brute_force(q, k, v, sees, plain)
    near(out, expected[0])
    near(lse, expected[1])


@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
def test_seqused_equals_shorter_keys(causal):
    q, k, v = qkv(B=3, Sq=4, Sk=6)
    slopes = torch.rand(3, 4)
    used = torch.tensor([6, 0, 3], dtype=torch.int32)
    options = {"causal": causal, "window_size": (2, -1)}
    out, lse = attention(q, k, v, seqused_k=used, alibi_slopes=slopes, return_lse=True, **options)
    for b, n in enumerate(used.tolist()):
        one = (q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        expected = attention(*one, alibi_slopes=slopes[b], return_lse=True, **options)
        near(out[b : b + 1], expected[0])
        near(lse[b : b + 1], expected[1])
    assert (out[1] == 0).all() and (lse[1] == -INF).all()


# -- Fully masked rows and hidden keys ---------------------------------------------------


def test_rows_that_see_nothing():
    q, k, v = qkv(grad=True)
    bias = make(2, 4, 5, 7, grad=True)
    mask = torch.ones(2, 4, 5, 7, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 3] = False
    seen = mask.any(-1)
    out, lse = attention(q, k, v, mask=mask, bias=bias, return_lse=True)
    assert (out[~seen] == 0).all() and (lse[~seen] == -INF).all()
    assert (out[seen] != 0).all() and lse[seen].isfinite().all()
    # The incoming gradients of these rows have no effect, even NaN.
    grad_out, grad_lse = make(2, 4, 5, 6), make(2, 4, 5)
    clean = torch.autograd.grad(
        (out, lse), (q, k, v, bias), (grad_out, grad_lse), retain_graph=True
    )
    grad_out[~seen], grad_lse[~seen] = NAN, INF
    dirty = torch.autograd.grad((out, lse), (q, k, v, bias), (grad_out, grad_lse))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    assert (clean[0][~seen] == 0).all() and (clean[3][~seen] == 0).all()
    assert (clean[0][seen] != 0).all()


def test_rows_that_see_only_a_sink():
    q, k, v = qkv(grad=True)
    sinks = make(4, grad=True)
    mask = torch.rand(2, 4, 5, 7) < 0.6
    mask[0, 1, 2] = False
    out, lse = attention(q, k, v, mask=mask, sinks=sinks, return_lse=True)
    assert (out[0, 1, 2] == 0).all()
    near(lse[0, 1, 2], sinks[1])
    dq, dk, dsinks = torch.autograd.grad(lse[0, 1, 2] + 3 * out[0, 1, 2].sum(), (q, k, sinks))
    assert (dq == 0).all() and (dk == 0).all()
    near(dsinks, torch.tensor([0, 1, 0, 0], dtype=torch.float64))


def poisoned(x, where, bits):
    """Returns x with `bits` where `where` is True, as a leaf of the graph."""
    return torch.where(where, bits, x.detach()).requires_grad_()


@pytest.mark.parametrize("bits", [NAN, INF, -INF])
@pytest.mark.parametrize("hide", ["key_padding_mask", "seqused_k", "mask", "window"])
def test_hidden_keys_and_queries_influence_nothing(hide, bits):
    B, Hq, Hkv, Sq, Sk = 2, 4, 2, 5, 7
    q, k, v = qkv(B, Hq, Hkv, Sq, Sk)
    hidden = torch.zeros(B, Sk, dtype=torch.bool)
    if hide == "key_padding_mask":
        hidden[0, 2:4] = hidden[1, :] = True
        options = {"key_padding_mask": hidden}
    elif hide == "seqused_k":
        hidden[0, 6:] = hidden[1, 3:] = True
        options = {"seqused_k": torch.tensor([6, 3])}
    elif hide == "mask":
        hidden[0, 0] = hidden[1, 5] = True
        mask = torch.rand(B, Hq, Sq, Sk) < 0.7
        mask[0, 1, 3] = False
        options = {"mask": mask & ~hidden.view(B, 1, 1, Sk)}
    else:
        hidden[:, 5:] = True  # top-left causal: five queries never reach the last two keys
        options = {"causal": "top_left"}
    hidden_pairs = hidden.view(B, 1, 1, Sk).expand(B, Hq, Sq, Sk)
    row_sees = (
        options["mask"].any(-1)
        if hide == "mask"
        else ~hidden.all(-1).view(B, 1, 1).expand(B, Hq, Sq)
    )
    bias, sinks = make(B, Hq, Sq, Sk), make(Hq)
    grads = (make(B, Hq, Sq, 6), make(B, Hq, Sq))
    dropout = {"dropout_p": 0.2, "philox_seed": 3}

    def run(dirty):
        hidden_keys = hidden.view(B, 1, Sk, 1) & dirty
        inputs = (
            poisoned(q, ~row_sees.unsqueeze(-1) & dirty, bits),
            poisoned(k, hidden_keys, bits),
            poisoned(v, hidden_keys, bits),
            poisoned(bias, hidden_pairs & dirty, bits),
            poisoned(sinks, torch.tensor(False), bits),
        )
        out, lse = attention(
            *inputs[:3],
            bias=inputs[3],
            sinks=inputs[4],
            softcap=5.0,
            return_lse=True,
            **dropout,
            **options,
        )
        return out, lse, *torch.autograd.grad((out, lse), inputs, grads)

    clean, dirty = run(torch.tensor(False)), run(torch.tensor(True))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    dq, dk, dv, dbias = dirty[2:6]
    assert (dk.mT[hidden.view(B, 1, 1, Sk).expand_as(dk.mT)] == 0).all()
    assert (dv.mT[hidden.view(B, 1, 1, Sk).expand_as(dv.mT)] == 0).all()
    assert (dbias[hidden_pairs] == 0).all() and (dq[~row_sees] == 0).all()


def test_a_key_hidden_from_one_head_of_its_group_only():
    # Two query heads share the key head; NaN in key 3 may reach the second one only.
    q, k, v = qkv(1, 2, 1, 3, 4)
    k[0, 0, 3] = v[0, 0, 3] = NAN
    mask = torch.ones(1, 2, 1, 4, dtype=torch.bool)
    mask[0, 0, 0, 3] = False
    out = attention(q, k, v, mask=mask)
    near(out[:, :1], attention(q[:, :1], k[:, :, :3], v[:, :, :3]))
    assert out[:, 1].isnan().all()


def test_what_is_visible_propagates():
    q, k, v = qkv()
    q[0, 0, 1, 0] = v[1, 0, 2, 3] = NAN
    expected = torch.zeros(2, 4, 5, 6, dtype=torch.bool)
    expected[0, 0, 1] = expected[1, :2, :, 3] = True
    out, lse = attention(q, k, v, return_lse=True)
    assert torch.equal(out.isnan(), expected)
    assert torch.equal(lse.isnan(), expected[..., 0] & (torch.arange(2).view(2, 1, 1) == 0))


# -- Dropout -----------------------------------------------------------------------------


@pytest.mark.parametrize("counter, key, words", philox_numpy.KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    assert philox_numpy.philox4x32(counter, key) == words
    counter, key = ([torch.tensor(word) for word in words] for words in (counter, key))
    assert tuple(int(word) for word in reference.philox4x32(counter, key)) == words


def test_first_dropout_bits_by_hand():
    # All-zero counter and key give 6627e8d5 e169c58d bc57ac4c 9b00dbd8 (first known answer). Low
    # bits first: e8d5 6627 c58d e169 ac4c bc57 dbd8 9b00. p = 0.7: round(0.7 · 65536) = b333.
    keep = reference.dropout_keep_mask(torch.tensor([0, 0]), 0.7, 1, 1, 1, 8)
    assert keep.flatten().tolist() == [True, False, True, True, False, True, True, False]
    # keep iff value >= threshold: 6627 (hex) is kept by itself and dropped by the next probability.
    for threshold, kept in ((0x6627, True), (0x6628, False)):
        keep = reference.dropout_keep_mask(torch.tensor([0, 0]), threshold / 65536, 1, 1, 1, 2)
        assert bool(keep[0, 0, 0, 1]) is kept


# Seed 0x0123456789abcdef, offset 7, p = 0.3, [2, 2, 2, 12]; 1 = kept. The same on every backend.
KEEP_VECTORS = [
    "011001110100",
    "110001111110",
    "110111111011",
    "111001010010",
    "011101010110",
    "110010111011",
    "101011111101",
    "110110111111",
]


def test_committed_dropout_vectors():
    seed, offset, p, shape = 0x0123456789ABCDEF, 7, 0.3, (2, 2, 2, 12)
    keep = reference.dropout_keep_mask(torch.tensor([seed, offset]), p, *shape)
    assert keep.dtype == torch.bool
    rows = ["".join("01"[bit] for bit in row) for row in keep.view(8, 12).int().tolist()]
    assert rows == KEEP_VECTORS
    assert torch.equal(keep, torch.from_numpy(philox_numpy.keep_mask(seed, offset, p, *shape)))


@pytest.mark.parametrize(
    "seed, offset",
    [(0, 0), (1, 2**32 - 1), (2**63 - 1, 2**32 + 5), (-1, -1), (-(2**63), 2**40 + 1)],
)
@pytest.mark.parametrize("shape", [(2, 3, 4, 17), (1, 1, 9, 8), (3, 1, 1, 1)], ids=str)
def test_dropout_mask_equals_the_independent_philox(seed, offset, shape):
    for p in (0.1, 0.5, 0.97):
        keep = reference.dropout_keep_mask(torch.tensor([seed, offset]), p, *shape)
        assert torch.equal(keep, torch.from_numpy(philox_numpy.keep_mask(seed, offset, p, *shape)))


def test_dropout_mask_extremes():
    philox = torch.tensor([5, 0])
    assert reference.dropout_keep_mask(philox, 0.0, 1, 2, 30, 30).all()
    assert not reference.dropout_keep_mask(philox, 1.0, 1, 2, 30, 30).any()
    for shape in [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)]:
        assert reference.dropout_keep_mask(philox, 0.5, *shape).shape == shape
    # Mean of 2·300·300 independent bits: within six standard deviations of 0.9.
    kept = reference.dropout_keep_mask(philox, 0.1, 1, 2, 300, 300).double().mean()
    assert abs(float(kept) - 0.9) < 6 * math.sqrt(0.09 / 180000)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_in_attention(p):
    q, k, v = qkv(grad=True)
    keep = torch.from_numpy(philox_numpy.keep_mask(11, 0, p, 2, 4, 5, 7))
    scale = 65536 / (65536 - round(p * 65536))
    weights = torch.softmax(q @ k.repeat_interleave(2, 1).mT / math.sqrt(3), -1)
    expected = (weights * keep * scale) @ v.repeat_interleave(2, 1)
    out, lse = attention(q, k, v, dropout_p=p, philox_seed=11, return_lse=True)
    near(out, expected)
    near(lse, attention(q, k, v, return_lse=True)[1])
    same_gradients(out, expected, (q, k, v))


def test_dropout_probability_one_and_seeds():
    q, k, v = qkv(grad=True)
    out = attention(q, k, v, dropout_p=1.0, philox_seed=1)
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))

    def run(**philox):
        return attention(q, k, v, dropout_p=0.5, **philox)

    assert torch.equal(run(philox_seed=9), run(philox=torch.tensor([9, 0])))
    assert torch.equal(run(philox_seed=2**64 - 1), run(philox=torch.tensor([-1, 0])))
    assert not torch.equal(run(philox_seed=9), run(philox_seed=9 + 2**32))
    assert not torch.equal(run(philox_seed=9), run(philox=torch.tensor([9, 1])))


# -- Packed sequences and pages ----------------------------------------------------------


def by_sequence(q, k, v, starts_q, starts_k, options, slopes=None, keep=None, sinks=None):
    """Computes packed attention in plain PyTorch: one masked softmax per sequence."""
    outs, lses = [], []
    group = q.shape[1] // k.shape[1]
    for b in range(len(starts_q) - 1):
        qb = q[starts_q[b] : starts_q[b + 1]].transpose(0, 1)
        kb, vb = (
            x[starts_k[b] : starts_k[b + 1]].transpose(0, 1).repeat_interleave(group, 0)
            for x in (k, v)
        )
        Sq, Sk = qb.shape[1], kb.shape[1]
        off = Sk - Sq if options.get("causal") == "bottom_right" else 0
        distance = torch.arange(Sk) - torch.arange(Sq).view(Sq, 1) - off
        s = qb @ kb.mT / math.sqrt(q.shape[2])
        if slopes is not None:
            s = s - slopes[b].double().view(-1, 1, 1) * distance.abs()
        seen = torch.ones(Sq, Sk, dtype=torch.bool)
        if options.get("causal"):
            seen &= distance <= 0
        if "window_size" in options:
            seen &= distance >= -options["window_size"][0]
        empty = ~seen.any(-1, keepdim=True)
        s = torch.where(seen | empty, s, -INF)  # logsumexp of -inf only has a NaN gradient
        lse = torch.where(empty.squeeze(-1), -INF, torch.logsumexp(s, -1))
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.view(-1, 1))
        p = seen * torch.exp(s - torch.where(lse == -INF, 0, lse).unsqueeze(-1))
        if keep is not None:
            p = p * keep[b, :, :Sq, :Sk] * 2  # dropout_p = 1/2
        outs.append((p @ vb).transpose(0, 1))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize("feature", ["plain", "window", "alibi", "sinks", "dropout"])
def test_packed_sequences_equal_a_loop(causal, feature):
    # Lengths 3/4, 0/2, 5/3 and 2/0, then two tokens of q and one of k that belong to no sequence.
    starts_q, starts_k = [0, 3, 3, 8, 10], [0, 4, 6, 9, 9]
    cu_q = torch.tensor(starts_q, dtype=torch.int32)
    cu_k = torch.tensor(starts_k, dtype=torch.int32)
    q, k, v = make(12, 4, 3, grad=True), make(10, 2, 3, grad=True), make(10, 2, 6, grad=True)
    options, facts = {"causal": causal}, {}
    if feature == "window":
        options["window_size"] = (1, -1)
    elif feature == "alibi":
        options["alibi_slopes"] = facts["slopes"] = torch.rand(4, 4)
    elif feature == "sinks":
        options["sinks"] = facts["sinks"] = make(4)
    elif feature == "dropout":
        options |= {"dropout_p": 0.5, "philox_seed": 77}
        facts["keep"] = torch.from_numpy(philox_numpy.keep_mask(77, 0, 0.5, 4, 4, 5, 4))
    out, lse = attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, **options)
    expected = by_sequence(q, k, v, starts_q, starts_k, options, **facts)
    assert out.shape == (12, 4, 6) and lse.shape == (4, 12)
    near(out[:10], expected[0])
    near(lse[:, :10], expected[1])
    assert (out[10:] == 0).all() and (lse[:, 10:] == -INF).all()

    seen = expected[1] > -INF
    assert seen.any() and not seen.all() or feature == "sinks"
    losses = [
        (x[:10] * torch.arange(6)).square().sum() + y[:, :10][seen].square().sum()
        for x, y in ((out, lse), expected)
    ]
    for a, b in zip(*(torch.autograd.grad(loss, (q, k, v)) for loss in losses), strict=True):
        near(a, b)


def test_packed_tokens_of_no_sequence_influence_nothing():
    cu_q, cu_k = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 6])
    used = torch.tensor([2, 3])
    q, k, v = make(7, 2, 3), make(8, 1, 3), make(8, 1, 3)
    dirty_q, dirty_k, dirty_v = q.clone(), k.clone(), v.clone()
    dirty_q[5:] = NAN
    dirty_k[2] = dirty_v[2] = dirty_k[6:] = dirty_v[6:] = NAN  # row 2: past the used length
    results = []
    for inputs in ((q, k, v), (dirty_q, dirty_k, dirty_v)):
        for x in inputs:
            x.requires_grad_()
        out, lse = attention(
            *inputs, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqused_k=used, return_lse=True
        )
        grads = torch.autograd.grad(out.sum() + lse[:, :5].sum(), inputs)
        results.append((out, lse, *grads))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    dk = results[1][3]
    assert (dk[2] == 0).all() and (dk[6:] == 0).all() and (dk[3:6] != 0).all()
    # The used length replaces the key length.
    shorter = torch.tensor([0, 2, 5])
    kept = torch.tensor([0, 1, 3, 4, 5])
    near(
        results[0][0],
        attention(q, k[kept], v[kept], cu_seqlens_q=cu_q, cu_seqlens_k=shorter),
    )


@pytest.mark.parametrize("page_size", [1, 3, 4])
@pytest.mark.parametrize("causal", [False, "bottom_right"])
def test_pages_equal_gathered_keys(page_size, causal):
    B, Hkv, Sq, lengths = 3, 2, 4, [7, 0, 5]
    rows = -(-8 // page_size)
    total = B * rows + 2
    pages_k, pages_v = make(total, page_size, Hkv, 3), make(total, page_size, Hkv, 6)
    table = torch.randperm(total)[: B * rows].view(B, rows).int()
    q = make(B, 4, Sq, 3)
    k, v = torch.zeros(B, Hkv, 8, 3).double(), torch.zeros(B, Hkv, 8, 6).double()
    used_pages = set()
    for b, n in enumerate(lengths):
        for j in range(n):
            page, slot = int(table[b, j // page_size]), j % page_size
            used_pages.add(page)
            k[b, :, j], v[b, :, j] = pages_k[page, slot], pages_v[page, slot]
        table[b, -(-n // page_size) :] = -7  # past the used length: any number
    for page in set(range(total)) - used_pages:
        pages_k[page] = pages_v[page] = NAN
    used = torch.tensor(lengths)
    options = {"causal": causal, "return_lse": True, "dropout_p": 0.3, "philox_seed": 5}
    expected = attention(q, k, v, seqused_k=used, **options)

    out, lse = attention(q, pages_k, pages_v, block_table=table, seqused_k=used, **options)
    near(out, expected[0])
    near(lse, expected[1])

    # The same with packed queries, for both ways to give the lengths.
    cu_q = torch.arange(0, 13, 4)
    packed = q.transpose(1, 2).flatten(0, 1)
    for given in ({"seqused_k": used}, {"cu_seqlens_k": torch.tensor([0, 7, 7, 12])}):
        out, lse = attention(
            packed, pages_k, pages_v, block_table=table, cu_seqlens_q=cu_q, **given, **options
        )
        near(out, expected[0].transpose(1, 2).flatten(0, 1))
        near(lse, expected[1].transpose(0, 1).flatten(1))


def test_pages_are_differentiable_and_full_without_lengths():
    pages_k, pages_v = make(4, 2, 1, 3, grad=True), make(4, 2, 1, 3, grad=True)
    table = torch.tensor([[2, 0], [2, 3]])  # page 2 is shared, page 1 unused
    q = make(2, 2, 3, 3)
    out = attention(q, pages_k, pages_v, block_table=table)
    k, v = (x[table].flatten(1, 2).transpose(1, 2) for x in (pages_k, pages_v))
    expected = sdpa(q, k, v, enable_gqa=True)
    near(out, expected)
    ours = torch.autograd.grad(out.square().sum(), (pages_k, pages_v))
    theirs = torch.autograd.grad(expected.square().sum(), (pages_k, pages_v))
    for a, b in zip(ours, theirs, strict=True):
        near(a, b)
        assert (a[1] == 0).all()


# -- Gradients by finite differences -----------------------------------------------------


def half_mask():
    mask = torch.rand(1, 2, 3, 4) < 0.6
    mask[0, 0, 1] = False
    return mask


FEATURES = {
    "plain": dict,
    "causal_window": lambda: {"causal": "bottom_right", "window_size": (1, -1)},
    "top_left": lambda: {"causal": "top_left"},
    "softcap": lambda: {"softcap": 0.8},
    "mask": lambda: {"mask": half_mask()},
    "padding": lambda: {"key_padding_mask": torch.tensor([[False, True, False, False]])},
    "alibi": lambda: {"alibi_slopes": torch.rand(2)},
    "dropout": lambda: {"dropout_p": 0.3, "philox_seed": 4},
    "used": lambda: {"seqused_k": torch.tensor([3])},
    "all": lambda: {
        "softcap": 0.8,
        "mask": half_mask(),
        "alibi_slopes": torch.rand(2),
        "dropout_p": 0.3,
        "philox_seed": 4,
        "causal": "bottom_right",
    },
}


@pytest.mark.parametrize("feature", FEATURES)
def test_gradcheck(feature):
    options = FEATURES[feature]()
    q, k, v = qkv(1, 2, 1, 3, 4, 2, 2, grad=True)
    bias, sinks = make(1, 2, 1, 4, grad=True), make(2, grad=True)

    def with_lse(q, k, v, bias):
        out, lse = attention(q, k, v, bias=bias, return_lse=True, **options)
        return out, torch.where(lse == -INF, 0.0, lse)

    def with_sinks(q, k, v, sinks):
        return attention(q, k, v, sinks=sinks, return_lse=True, **options)

    assert torch.autograd.gradcheck(with_lse, (q, k, v, bias), check_forward_ad=True)
    assert torch.autograd.gradcheck(with_sinks, (q, k, v, sinks), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(with_lse, (q, k, v, bias))
    assert torch.autograd.gradgradcheck(with_sinks, (q, k, v, sinks))


def test_gradcheck_packed():
    q, k, v = make(5, 2, 2, grad=True), make(6, 1, 2, grad=True), make(6, 1, 2, grad=True)
    cu_q, cu_k = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 6])

    def packed(q, k, v):
        return attention(
            q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal="top_left", return_lse=True
        )

    assert torch.autograd.gradcheck(packed, (q, k, v))
    assert torch.autograd.gradgradcheck(packed, (q, k, v))


def test_slopes_get_no_gradient():
    q, k, v = qkv(grad=True)
    slopes = torch.rand(4, requires_grad=True)
    out = attention(q, k, v, alibi_slopes=slopes)
    assert torch.autograd.grad(out.sum(), slopes, allow_unused=True) == (None,)


# -- Shapes, dtypes, memory --------------------------------------------------------------


@pytest.mark.parametrize(
    "empty", ["B", "heads", "Sq", "Sk", "D", "Dv", "Sq and Sk", "query heads"], ids=str
)
def test_empty_shapes(empty):
    sizes = {
        "B": {"B": 0},
        "heads": {"Hq": 0, "Hkv": 0},
        "query heads": {"Hq": 0},
        "Sq and Sk": {"Sq": 0, "Sk": 0},
    }.get(empty, {empty: 0})
    q, k, v = qkv(**sizes, grad=True)
    shape = (q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    sinks, bias = make(q.shape[1]), make(*q.shape[:3], k.shape[2])
    for options in ({}, {"sinks": sinks}, {"bias": bias, "causal": "bottom_right"}):
        philox = {"dropout_p": 0.5, "philox_seed": 0} if empty != "D" else {}
        out, lse = attention(q, k, v, return_lse=True, **options, **philox)
        assert out.shape == shape and lse.shape == shape[:3]
        for x, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
            assert gradient.shape == x.shape and gradient.isfinite().all()
    if empty == "Sk":
        assert (attention(q, k, v) == 0).all()
        assert (attention(q, k, v, return_lse=True)[1] == -INF).all()
        near(
            attention(q, k, v, sinks=sinks, return_lse=True)[1], sinks.view(1, 4, 1).expand(2, 4, 5)
        )
    if empty == "D":  # without features every score is 0: an average
        near(attention(q, k, v), v.mean(2, keepdim=True).repeat_interleave(2, 1).expand(shape))


def test_empty_packed():
    cu = torch.tensor([0])
    q, k, v = make(0, 2, 3, grad=True), make(0, 1, 3), make(0, 1, 4)
    out, lse = attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True)
    assert out.shape == (0, 2, 4) and lse.shape == (2, 0)
    out.sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    q, k, v = (x.to(dtype) for x in qkv())
    bias = make(4, 5, 7)
    out, lse = attention(q, k, v, bias=bias, return_lse=True)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == dtype and lse.dtype == lse_dtype
    # Rounded once: as good as the float64 result in this dtype.
    exact, exact_lse = attention(q.double(), k.double(), v.double(), bias=bias, return_lse=True)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=eps, atol=1e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
    near(attention(q, k, v, bias=bias, compute_dtype=torch.float64), exact.to(dtype), atol=0)


def test_autocast_changes_nothing():
    q, k, v = (x.float() for x in qkv())
    expected = attention(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(q, k, v), expected)


def test_output_memory_follows_the_query():
    q, k, v = qkv()
    assert attention(q, k, v).stride() == (4 * 5 * 6, 5 * 6, 6, 1)
    bshd = q.transpose(1, 2).contiguous().transpose(1, 2)
    out = attention(bshd, k, v)
    assert out.stride() == (5 * 4 * 6, 6, 4 * 6, 1)
    assert torch.equal(out, attention(q, k, v))


# -- Merging -----------------------------------------------------------------------------


def test_merging_parts_equals_the_whole():
    q, k, v = qkv(Sk=9, grad=True)
    sinks = make(4, grad=True)
    mask = torch.rand(2, 4, 5, 9) < 0.6
    mask[..., 0] = True
    mask[0, 0, 0, :4] = False  # nothing in the first part
    mask[1, 1, 1] = False  # nothing at all
    cuts = [(0, 4), (4, 5), (5, 5), (5, 9)]
    parts = [
        attention(q, k[:, :, a:b], v[:, :, a:b], mask=mask[..., a:b], return_lse=True)
        for a, b in cuts
    ]
    outs, lses = zip(*parts, strict=True)
    for given in (None, sinks):
        whole = attention(q, k, v, mask=mask, sinks=given, return_lse=True)
        merged = reference.merge_attention_states(outs, lses, given)
        near(merged[0], whole[0])
        near(merged[1], whole[1])
        inputs = (q, k, v) if given is None else (q, k, v, sinks)
        weight = make(*whole[0].shape)
        loss = [
            (out * weight).sum() + lse[lse > -INF].square().sum() for out, lse in (merged, whole)
        ]
        for a, b in zip(
            *(torch.autograd.grad(x, inputs, retain_graph=True) for x in loss), strict=True
        ):
            near(a, b)


def test_merging_by_hand():
    # Denominators 1 and 3 (lse 0 and ln 3): a quarter of 8 and three quarters of 4 are 5, lse ln 4.
    outs = [torch.full((1, 1, 1, 1), value) for value in (8.0, 4.0, NAN)]
    lses = [torch.full((1, 1, 1), value) for value in (0.0, LN3, -INF)]
    out, lse = reference.merge_attention_states(outs, lses)
    assert float(out) == pytest.approx(5) and float(lse) == pytest.approx(math.log(4))
    # A sink of ln 4, counted once, halves the result: lse is ln 8.
    out, lse = reference.merge_attention_states(outs, lses, torch.tensor([math.log(4)]))
    assert float(out) == pytest.approx(2.5) and float(lse) == pytest.approx(math.log(8))
    out, lse = reference.merge_attention_states(outs[2:], lses[2:])
    assert float(out) == 0 and float(lse) == -INF


def test_merging_packed():
    cu_q = torch.tensor([0, 2, 5])
    q, k, v = make(5, 2, 3), make(6, 2, 3), make(6, 2, 4)

    def run(keys, *starts):
        cu_k = torch.tensor(starts)
        return attention(q, k[keys], v[keys], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True)

    first, second = run([0, 3, 4], 0, 1, 3), run([1, 2, 5], 0, 2, 3)
    out, lse = reference.merge_attention_states((first[0], second[0]), (first[1], second[1]))
    whole = run([0, 1, 2, 3, 4, 5], 0, 3, 6)
    near(out, whole[0])
    near(lse, whole[1])


# -- Calls without meaning ---------------------------------------------------------------


def bad_calls():
    used, table = torch.tensor([7, 8]), torch.tensor([[0, 1], [1, 4]])
    cu_q, cu_k = torch.tensor([0, 2, 4]), torch.tensor([0, 3])
    return {
        "ambiguous causal": ({"causal": True}, "top_left.*bottom_right"),
        "unknown causal": ({"causal": "diagonal"}, "causal"),
        "negative window": ({"window_size": (-2, 0)}, "window_size"),
        "integer mask": ({"mask": torch.ones(5, 7, dtype=torch.uint8)}, "mask"),
        "integer padding": ({"key_padding_mask": torch.ones(2, 7).long()}, "key_padding_mask"),
        "bool bias": ({"bias": torch.ones(5, 7, dtype=torch.bool)}, "bias"),
        "no seed": ({"dropout_p": 0.5}, "philox_seed"),
        "probability": ({"dropout_p": 1.5, "philox_seed": 0}, "dropout_p"),
        "used too long": ({"seqused_k": used}, "seqused_k"),
        "keys without queries": ({"cu_seqlens_k": cu_k}, "cu_seqlens_q"),
        "packed mask": (
            {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_q, "mask": torch.ones(1).bool()},
            "mask",
        ),
        "mask of another batch": ({"mask": torch.ones(3, 1, 5, 7).bool()}, "expand"),
        "page out of range": ({"block_table": table}, "block_table"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_calls_without_meaning_raise(name):
    options, message = bad_calls()[name]
    q, k, v = qkv()
    if name == "page out of range":
        k, v = make(4, 2, 2, 3), make(4, 2, 2, 6)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        attention(q, k, v, **options)


@pytest.mark.parametrize(
    "starts_q, starts_k, total, name",
    [
        ([0, 3, 2], [0, 2, 4], 4, "cu_seqlens_q"),
        ([1, 2, 4], [0, 2, 4], 4, "cu_seqlens_q"),
        ([0, 2, 5], [0, 2, 4], 4, "cu_seqlens_q"),
        ([0, 2, 4], [0, 2, 5], 4, "cu_seqlens_k"),
        ([0, 2, 4], [0, 4], 4, "cu_seqlens_k"),
        ([0, 2, 4], None, 4, "cu_seqlens_k"),
    ],
)
def test_packed_calls_without_meaning_raise(starts_q, starts_k, total, name):
    x = make(total, 1, 2)
    cu_k = None if starts_k is None else torch.tensor(starts_k)
    with pytest.raises(ValueError, match=name):
        attention(x, x, x, cu_seqlens_q=torch.tensor(starts_q), cu_seqlens_k=cu_k)


@pytest.mark.parametrize(
    "q, k, v",
    [
        ((2, 3, 5, 4), (2, 2, 7, 4), (2, 2, 7, 4)),  # 3 heads over 2
        ((2, 1, 5, 4), (2, 2, 7, 4), (2, 2, 7, 4)),  # fewer heads than keys
        ((2, 2, 5, 4), (1, 2, 7, 4), (2, 2, 7, 4)),
        ((2, 2, 5, 4), (2, 2, 7, 4), (1, 2, 7, 4)),
        ((2, 2, 5, 4), (2, 2, 7, 3), (2, 2, 7, 4)),
        ((2, 2, 5, 4), (2, 2, 1, 4), (2, 2, 7, 4)),
    ],
)
def test_shapes_that_do_not_fit_raise(q, k, v):
    with pytest.raises(ValueError, match="fit"):
        attention(make(*q), make(*k), make(*v))


def test_max_seqlens_are_hints():
    x, cu = make(6, 2, 3), torch.tensor([0, 2, 6])
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    near(attention(x, x, x, max_seqlen_q=4, max_seqlen_k=4, **packed), attention(x, x, x, **packed))
