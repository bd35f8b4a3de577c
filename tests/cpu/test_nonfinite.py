"""Compares NaN and infinity under every mask with the definition, row by row."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fused_attention import _native, attention, reference
from fused_attention.tools import testing

INF, NAN = math.inf, math.nan
SPECIAL = st.sampled_from([NAN, INF, -INF])


@st.composite
def calls(draw):
    """Draws inputs, options and incoming gradient of a call, with special values anywhere."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(testing.DTYPES))
    B, Hkv, group = (draw(st.integers(1, 2)) for _ in range(3))
    Hq = Hkv * group
    Sq = draw(st.sampled_from([1, 2, 5, 33, 70]))
    Sk = draw(st.sampled_from([1, 7, 64, 100, 230]))
    D, Dv = (draw(st.sampled_from([1, 8, 20])) for _ in range(2))
    tensors = {
        "query": torch.randn(B, Hq, Sq, D).to(dtype),
        "key": torch.randn(B, Hkv, Sk, D).to(dtype),
        "value": torch.randn(B, Hkv, Sk, Dv).to(dtype),
    }
    full = (B, Hq, Sq, Sk)
    broadcast = st.tuples(*(st.sampled_from([1, size]) for size in full))
    options = {"causal": draw(st.sampled_from([False, "top_left", "bottom_right"]))}
    options["window_size"] = draw(st.tuples(*(st.sampled_from([-1, -1, 0, 3, 40]),) * 2))
    shown = draw(st.sampled_from([0.05, 0.5, 0.95]))
    if draw(st.booleans()):
        options["mask"] = torch.rand(draw(broadcast)) < shown
    if draw(st.booleans()):
        options["key_padding_mask"] = torch.rand(B, Sk) > shown
    if draw(st.booleans()):
        options["seqused_k"] = torch.randint(0, Sk + 1, (B,), dtype=torch.int32)
    if draw(st.booleans()):
        options["bias"] = torch.randn(draw(broadcast)).to(dtype)
    if draw(st.booleans()):
        options["alibi_slopes"] = torch.rand(Hq)
    if draw(st.booleans()):
        options["sinks"] = torch.randn(Hq, dtype=torch.promote_types(dtype, torch.float32))
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = 5.0
    if draw(st.integers(0, 3)) == 0:
        options["dropout_p"] = 0.3
        options["philox_seed"] = 7
    grad_out = torch.randn(B, Hq, Sq, Dv).to(dtype)
    places = {**tensors, "grad_out": grad_out}
    places |= {name: options[name] for name in ("bias", "alibi_slopes") if name in options}
    for _ in range(draw(st.integers(0, 3))):
        x = places[draw(st.sampled_from(sorted(places)))]
        whole_row = draw(st.booleans())  # which reaches whole tiles
        index = tuple(draw(st.integers(0, size - 1)) for size in x.shape)
        x[index[:-1] if whole_row and x.dim() > 1 else index] = draw(SPECIAL)
    return tensors, options, grad_out


def seen_by(tensors, options):
    """Returns which keys each query sees, [B, Hq, Sq, Sk]."""
    B, Hq, Sq, _ = tensors["query"].shape
    Sk = tensors["key"].shape[2]
    used = options.get("seqused_k", torch.full((B,), Sk))
    return reference.visible(
        (B, Hq, Sq, Sk),
        reference.diagonal_offset(options["causal"], Sq, used),
        used,
        options["causal"],
        options["window_size"],
        options.get("mask"),
        options.get("key_padding_mask"),
    )


def specified_rows(tensors, options, seen):
    """Returns which rows have a specified result: all except those from which a non-finite key or
    value is hidden that another query sees."""
    group = tensors["query"].shape[1] // tensors["key"].shape[1]
    odd = ~(tensors["key"].isfinite().all(-1) & tensors["value"].isfinite().all(-1))
    odd = odd.repeat_interleave(group, dim=1).unsqueeze(2)  # [B, Hq, 1, Sk]
    shown = seen.any(2, keepdim=True)
    return ~(odd & shown & ~seen).any(-1)


def packed(query, key, value, seqused_k=None, **options):
    """Calls attention on the same sequences, packed, and unpacks the results."""
    B, _, Sq, _ = query.shape
    used = [key.shape[2]] * B if seqused_k is None else seqused_k.tolist()
    starts = [torch.tensor([0, *itertools.accumulate(n)]).int() for n in ([Sq] * B, used)]
    options |= {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}
    k, v = (
        torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(used)]) for x in (key, value)
    )
    out, lse = attention(query.transpose(1, 2).flatten(0, 1), k, v, **options, backend="cpu")
    return out.unflatten(0, (B, Sq)).transpose(1, 2), lse.unflatten(1, (B, Sq)).transpose(0, 1)


def paged(query, key, value, seqused_k=None, **options):
    """Calls attention with the same keys and values in pages of 16 tokens, in random order."""
    B, _, Sk, _ = key.shape
    used = torch.full((B,), Sk).int() if seqused_k is None else seqused_k
    table = torch.randperm(B * -(-Sk // 16)).view(B, -1)
    k, v = (
        F.pad(x, (0, 0, 0, -Sk % 16)).transpose(1, 2).unflatten(1, (-1, 16)).flatten(0, 1)
        for x in (key, value)
    )
    k, v = (x[table.flatten().argsort()] for x in (k, v))
    options |= {"block_table": table.int(), "seqused_k": used}
    return attention(query, k, v, **options, backend="cpu")


def dense(*inputs, **options):
    return attention(*inputs, **options, backend="cpu")


def run(function, tensors, options, grad_out, dtype=None):
    leaves = [x.to(dtype or x.dtype).requires_grad_() for x in tensors.values()]
    out, lse = function(*leaves, **options, return_lse=True)
    gradients = torch.autograd.grad(out, leaves, grad_out.to(out.dtype))
    return out.detach(), lse.detach(), *gradients


def dense_lse(tensors, options):
    inputs = [x.double() for x in tensors.values()]
    return reference.attention_reference(*inputs, **options, return_lse=True)[1]


def assert_same(name, got, want, where, tolerance):
    got, want = got.double()[where], want.double()[where]
    assert torch.equal(got.isnan(), want.isnan()), f"{name}: NaN in other places"
    assert torch.equal(got[got.isinf()], want[want.isinf()]), f"{name}: other infinities"
    fine = want.isfinite()
    torch.testing.assert_close(got[fine], want[fine], atol=tolerance, rtol=tolerance, msg=name)


@given(
    call=calls(), isa=st.sampled_from(_native.isas()), form=st.sampled_from([dense, packed, paged])
)
def test_special_values_against_the_definition(call, isa, form):
    tensors, options, grad_out = call
    if form is not dense:  # packed and paged calls take no masks of this shape
        options = {
            name: x
            for name, x in options.items()
            if name not in ("mask", "bias", "key_padding_mask")
        }
    dtype = tensors["query"].dtype
    seen = seen_by(tensors, options)
    specified = specified_rows(tensors, options, seen)
    with testing.cpu_isa(isa):
        out, lse, dq, dk, dv = run(form, tensors, options, grad_out)
    exact_out, exact_lse, *exact = run(
        reference.attention_reference, tensors, options, grad_out, torch.float64
    )
    tolerance = 64 * torch.finfo(dtype).eps
    assert_same("lse", lse, exact_lse, specified, tolerance)
    if "dropout_p" in options:  # a NaN weight may be dropped, and its row be 0 or NaN
        odd = exact_lse.isnan()
        assert (out.isnan() | (exact_out == out))[odd & specified].all()
        specified &= ~odd
    # Rows whose visible logits are all -inf are 0, even beside a value v for which 0 * v is NaN.
    without_sinks = {name: x for name, x in options.items() if name != "sinks"}
    blind = dense_lse(tensors, without_sinks) == -INF
    assert (out == 0)[blind].all()
    specified &= ~blind
    assert_same("out", out, exact_out, specified, tolerance)

    sees = seen.any(-1)
    assert (out[~sees] == 0).all() and (dq[~sees] == 0).all()
    B, Hkv, Sk, _ = tensors["key"].shape
    key_is_seen = seen.any(2).view(B, Hkv, -1, Sk).any(2)
    assert (dk[~key_is_seen] == 0).all() and (dv[~key_is_seen] == 0).all()
    # delta = rowsum(do * o) is NaN where o is, even if dropout dropped the weight that made it NaN.
    is_plain = "dropout_p" not in options or bool(exact_out.isfinite().all())
    if specified.all() and is_plain:
        for name, got, want in zip(("dq", "dk", "dv"), (dq, dk, dv), exact, strict=True):
            fine = want.isfinite()
            scale = max(float(want[fine].abs().max()) if fine.any() else 0.0, 1.0)
            assert_same(name, got, want, fine, 8 * tolerance * scale)


# -- Faults that were found --------------------------------------------------------------

HIDING = {
    "causal": lambda Sk: {"causal": "top_left"},
    "window": lambda Sk: {"window_size": (3, 0)},
    "padding": lambda Sk: {"key_padding_mask": (torch.arange(Sk) >= 7).view(1, Sk)},
    "mask": lambda Sk: {"mask": torch.arange(Sk) < 7},
    "used length": lambda Sk: {"seqused_k": torch.tensor([7], dtype=torch.int32)},
}


@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("Sq", [1, 200])
def test_nan_queries_stay_nan_beside_hidden_keys(isa, hiding, Sq):
    for dtype in testing.DTYPES:
        query = torch.full((1, 2, Sq, 24), NAN, dtype=dtype, requires_grad=True)
        key = torch.randn(1, 2, 200, 24).to(dtype).requires_grad_()
        out, lse = attention(query, key, key, **HIDING[hiding](200), return_lse=True, backend="cpu")
        assert out.isnan().all() and lse.isnan().all()
        (dq,) = torch.autograd.grad(out, query, torch.ones_like(out))
        assert dq.isnan().all()


@pytest.mark.parametrize("where", ["bias", "alibi_slopes", "key"])
@pytest.mark.parametrize("sinks", [False, True])
def test_nan_logits_stay_nan_beside_hidden_keys(isa, where, sinks):
    query, key, value = (torch.randn(1, 1, 200, 8) for _ in range(3))
    options = {"sinks": torch.randn(1)} if sinks else {}
    if where == "key":
        key[0, 0, 0] = NAN
    elif where == "bias":
        options["bias"] = torch.full((1, 1, 200, 1), NAN)
    else:
        options["alibi_slopes"] = torch.full((1,), NAN)
    out, lse = attention(
        query, key, value, causal="top_left", **options, return_lse=True, backend="cpu"
    )
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("where", ["query", "grad_out"])
@pytest.mark.parametrize("bias", [None, "per key", "per query"])
@pytest.mark.parametrize("heads", [1, 9])  # backward in two passes, or in one by heads
def test_padded_keys_have_no_gradient(isa, where, bias, heads):
    for dtype, special in itertools.product(testing.DTYPES, (NAN, INF, -INF)):
        query, key, value, grad_out = (torch.randn(1, heads, 120, 24).to(dtype) for _ in range(4))
        {"query": query, "grad_out": grad_out}[where][0, :, 3, 2] = special
        options = {"key_padding_mask": (torch.arange(120) % 7 == 5).view(1, 120)}
        leaves = [x.requires_grad_() for x in (query, key, value)]
        if bias is not None:
            shape = (1, heads, 1 if bias == "per key" else 120, 120)
            options["bias"] = torch.randn(shape, dtype=dtype, requires_grad=True)
            leaves.append(options["bias"])
        out = attention(query, key, value, **options, backend="cpu")
        _, dk, dv, *dbias = torch.autograd.grad(out, leaves, grad_out)
        padded = options["key_padding_mask"][0]
        assert (dk[:, :, padded] == 0).all() and (dv[:, :, padded] == 0).all()
        assert all((x[..., padded] == 0).all() for x in dbias)
        assert not dk[:, :, ~padded].isfinite().all()


@pytest.mark.parametrize("special", [NAN, INF])
def test_rows_that_see_nothing_have_no_part_in_the_gradient_of_sinks(isa, special):
    for dtype, Sq in itertools.product(testing.DTYPES, (2, 50)):
        query, key, value, grad_out = (torch.randn(2, 2, Sq, 8).to(dtype) for _ in range(4))
        mask = torch.ones(Sq, Sq, dtype=torch.bool)
        mask[1] = False
        grad_out[:, :, 1] = special
        sinks = torch.randn(2, dtype=torch.promote_types(dtype, torch.float32))
        leaves = [x.requires_grad_() for x in (query, key, value, sinks)]
        out = attention(*leaves[:3], mask=mask, sinks=sinks, backend="cpu")
        gradients = torch.autograd.grad(out, leaves, grad_out)
        assert all(x.isfinite().all() for x in gradients)


def test_padded_keys_have_no_tangent_of_their_gradient(isa):
    query, key, value, grad_out = (torch.randn(1, 2, 60, 8, dtype=torch.float64) for _ in range(4))
    query[0, 0, 3, 2] = INF
    padding = (torch.arange(60) % 7 == 5).view(1, 60)

    def gradients(k, v):
        out = attention(query, k, v, key_padding_mask=padding, backend="cpu")
        return torch.autograd.grad(out, (k, v), grad_out, create_graph=True)

    leaves = (key.requires_grad_(), value.requires_grad_())
    dk, dv = gradients(*leaves)
    second = torch.autograd.grad((dk, dv), leaves, (torch.randn_like(dk), torch.randn_like(dv)))
    for x in (dk, dv, *second):
        assert (x[:, :, padding[0]] == 0).all()


@pytest.mark.parametrize("softcap", [1e300, 3e38, 1e38, 1e-300, 1e-45, 5e-324])
@pytest.mark.parametrize("Sq", [2, 40])
def test_a_cap_that_the_dtype_cannot_hold(isa, softcap, Sq):
    for dtype, backend in itertools.product(testing.DTYPES, ("cpu", "reference")):
        leaves = [torch.randn(1, 2, s, 8).to(dtype).requires_grad_() for s in (Sq, 70, 70)]
        leaves[0].data[0, 0, 0] = 0  # 0 * inf
        expected = {"softcap": 0.0} if softcap > 1 else {"scale": 0.0}
        out = attention(*leaves, softcap=softcap, backend=backend)
        same = attention(*leaves, **expected, backend=backend)
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(out, same, atol=tolerance, rtol=tolerance)
        grad_out = torch.randn_like(out)
        gradients = torch.autograd.grad(out, leaves, grad_out)
        if softcap > 1:
            same = torch.autograd.grad(same, leaves, grad_out)
            torch.testing.assert_close(gradients, same, atol=16 * tolerance, rtol=16 * tolerance)
        assert all(x.isfinite().all() for x in gradients)
