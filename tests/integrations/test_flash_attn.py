"""The functions of flash-attn and FlashAttention-3 against their definition in float64, and what
`install` puts in the place of a package."""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch

import flash_attn_reference as definition
from flash_attn_reference import DROPOUT_P, Options, Sequence, drawn_cases
from fused_attention import ArgumentTypeError, ArgumentValueError
from fused_attention.integrations import flash_attn, flash_attn_3
from fused_attention.integrations.flash_attn import (
    apply_rotary_emb,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    index_first_axis,
    install,
    pad_input,
    unpad_input,
)
from fused_attention.tools import testing

int32 = torch.int32


@dataclasses.dataclass(frozen=True)
class Draw:
    """A row of a table, and the seed of its inputs."""

    row: dict[str, Any]
    seed: int = 0


def parameters(axes, is_valid=lambda row: True, is_large=lambda row: False, count=250):
    """Returns rows of `axes` as parameters; those beyond the covering ones are slow."""
    return [
        pytest.param(
            row,
            marks=() if needed and not is_large(row) else pytest.mark.slow,
            id="-".join(str(value).removeprefix("torch.") for value in row.values()),
        )
        for row, needed in drawn_cases(axes, count, is_valid)
    ]


def check(row, answer):
    """Applies the correctness rule to the results (got, exact, naive) that `answer` gives."""
    assert not testing.check_answers(Draw(row), answer)


def window_of(word, Sk):
    return {
        "none": (-1, -1),
        "local": (Sk // 3 + 1, Sk // 5 + 1),
        "left": (Sk // 3 + 1, -1),
        "right": (-1, Sk // 4),
        "wide": (Sk + 3, 2 * Sk),
    }[word]


def draw_tensors(seed, dtype, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def slopes_of(word, B, H):
    """Returns alibi_slopes and, for each sequence, its slopes."""
    if word is None:
        return None, [None] * B
    slopes = torch.linspace(0.01, 0.3, B * H).view(B, H)
    slopes = slopes if word == "BH" else slopes[0]
    return slopes, list(slopes.expand(B, H))


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=int32)


# -- Signatures --------------------------------------------------------------------------

TAIL = "window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
TAIL = f"dropout_p=0.0, softmax_scale=None, causal=False, {TAIL}return_attn_probs=False"
VARLEN = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {TAIL}",
    "flash_attn_qkvpacked_func": f"qkv, {TAIL}",
    "flash_attn_kvpacked_func": f"q, kv, {TAIL}",
    "flash_attn_varlen_func": f"q, k, v, {VARLEN}, {TAIL}, block_table=None",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {TAIL}",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {VARLEN}, {TAIL}",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, "
    "rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, "
    "block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False",
    "apply_rotary_emb": "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, "
    "cu_seqlens=None, max_seqlen=None",
    "unpad_input": "hidden_states, attention_mask, unused_mask=None",
    "pad_input": "hidden_states, indices, batch, seqlen",
}
SCALES = "q_descale=None, k_descale=None, v_descale=None"
TUNING = f"qv=None, {SCALES}, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, "
TUNING += "pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
SIGNATURES_3 = {
    "flash_attn_func": f"q, k, v, softmax_scale=None, causal=False, {TUNING}",
    "flash_attn_qkvpacked_func": f"qkv, softmax_scale=None, causal=False, {SCALES}, "
    "window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, "
    "num_heads_q=None, sm_margin=0, return_attn_probs=False",
    "flash_attn_varlen_func": f"q, k, v, {VARLEN}, seqused_q=None, seqused_k=None, "
    f"softmax_scale=None, causal=False, {TUNING}",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, "
    "rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, "
    "page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, "
    f"rotary_seqlens=None, {SCALES}, softmax_scale=None, causal=False, window_size=(-1, -1), "
    "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, "
    "num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False",
    "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
}


@pytest.mark.parametrize(
    "module, name, expected",
    [(flash_attn, *item) for item in SIGNATURES.items()]
    + [(flash_attn_3, *item) for item in SIGNATURES_3.items()],
    ids=[*SIGNATURES, *(f"{name} of 3" for name in SIGNATURES_3)],
)
def test_signatures_are_the_originals(module, name, expected):
    empty = inspect.Parameter.empty
    parameters = inspect.signature(getattr(module, name)).parameters.values()
    signature = inspect.Signature([x.replace(annotation=empty) for x in parameters])
    assert str(signature) == f"({expected})"


# -- Sequences of one length -------------------------------------------------------------

AXES = {
    "dtype": list(testing.DTYPES),
    "heads": [(4, 4), (6, 2), (3, 1)],
    "D": [8, 20, 33, 64, 72, 128, 256],
    "lengths": [
        (1, 239), (113, 203), (128, 217), (113, 211), (108, 256), (203, 113), (64, 21), (37, 2),
        (5, 0), (256, 512), (511, 512), (512, 256),
    ],
    "causal": [False, True],
    "window": ["none", "local", "left", "right", "wide"],
    "softcap": [0.0, 3.0, -1.0],
    "alibi": [None, "H", "BH"],
    "dropout": [0.0, DROPOUT_P],
    "scale": [None, 0.31],
    "deterministic": [False, True],
    "probs": [False, True],
}  # fmt: skip


def is_valid(row):
    return not (row["dropout"] and (row["softcap"] > 0 or not row["probs"]))


def is_large(row):
    Sq, Sk = row["lengths"]
    return Sq * Sk * row["D"] > 2_500_000


def keywords_of(row, Sk):
    return {
        "dropout_p": row["dropout"],
        "softmax_scale": row["scale"],
        "causal": row["causal"],
        "window_size": window_of(row["window"], Sk),
        "softcap": row["softcap"],
        "deterministic": row["deterministic"],
        "return_attn_probs": row["probs"],
    }


def options_of(row, Sk, **others):
    names = ("causal", "softcap")
    window = window_of(row["window"], Sk)
    return Options(
        **{name: row[name] for name in names},
        window_size=window,
        softmax_scale=row["scale"],
        **{"room": Sk} | others,
    )


def check_probabilities(s_dmask, sequences, o, dtype):
    """Checks the weights before dropout in S_dmask [B, Hq, ...], and how many it drops."""
    eps = torch.finfo(dtype).eps
    for got, x in zip(s_dmask, sequences, strict=True):
        (Sq, _, _), Sk = x.q.shape, x.k.shape[0]
        doubles = x._replace(q=x.q.double(), k=x.k.double(), v=x.v.double())
        p = definition.attend(doubles, o)[2]
        assert not got[:, Sq:].any() and not got[:, :, Sk:].any()
        # A score has an error of some eps times its terms, and its exp the same relative one.
        torch.testing.assert_close(got[:, :Sq, :Sk].abs().double(), p, atol=40 * eps, rtol=40 * eps)


@pytest.mark.parametrize("row", parameters(AXES, is_valid, is_large))
def test_dense(row):
    (Hq, Hkv), (Sq, Sk), D, B = row["heads"], row["lengths"], row["D"], 2
    slopes, each_slopes = slopes_of(row["alibi"], B, Hq)

    def answer(draw):
        shapes = ((B, Sq, Hq, D), (B, Sk, Hkv, D), (B, Sk, Hkv, D), (B, Sq, Hq, D), (B, Hq, Sq))
        *qkv, grad_out, grad_lse = draw_tensors(draw.seed, row["dtype"], *shapes)
        grad_lse = grad_lse.to(torch.promote_types(row["dtype"], torch.float32))
        leaves = [x.requires_grad_() for x in qkv]
        results = flash_attn_func(*leaves, **keywords_of(row, Sk), alibi_slopes=slopes)
        out, lse, s_dmask = results if row["probs"] else (results, None, None)
        assert out.is_contiguous() and out.shape == (B, Sq, Hq, D)
        got = {"out": out}
        if row["probs"]:
            got["lse"] = lse
            grad_lse = grad_lse.masked_fill(lse.isinf(), 0.0)
            assert s_dmask.shape == ((B, Hq, Sq, Sk) if row["dropout"] else (0,))
            assert s_dmask.dtype == row["dtype"] and not s_dmask.requires_grad
        else:
            grad_lse = torch.zeros_like(grad_lse)
        outputs, grads = ((out, lse), (grad_out, grad_lse)) if row["probs"] else (out, grad_out)
        gradients = torch.autograd.grad(outputs, leaves, grads)
        got |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
        keep = s_dmask >= 0 if row["dropout"] else [None] * B
        sequences = [
            Sequence(*x)
            for x in zip(
                *(x.detach() for x in qkv), each_slopes, keep, grad_out, grad_lse, strict=True
            )
        ]
        o = options_of(row, Sk)
        if row["dropout"]:
            check_probabilities(s_dmask, sequences, o, row["dtype"])
        got = {name: x.detach().flatten() for name, x in got.items()}
        exact = definition.exact(sequences, o)
        return got, {name: exact[name] for name in got}, definition.naive(sequences, o)

    check(row, answer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packing", ["qkv", "kv"])
def test_packed_tensors_equal_separate_ones(packing, dtype):
    """Results and gradients have the same bits, and the gradient is one dense tensor."""
    B, S, H, D = 2, 37, 3, 24
    options = {"causal": True, "window_size": (9, -1), "softcap": 2.0, "return_attn_probs": True}
    q, packed, grad = draw_tensors(1, dtype, (B, S, H, D), (B, S, len(packing), H, D), (B, S, H, D))
    packed, q = packed.requires_grad_(), q.requires_grad_()
    if packing == "qkv":
        results = flash_attn_qkvpacked_func(packed, **options)
    else:
        results = flash_attn_kvpacked_func(q, packed, **options)
    separate = [x.clone().detach().requires_grad_() for x in packed.unbind(2)]
    separate = separate if packing == "qkv" else [q, *separate]
    expected = flash_attn_func(*separate, **options)
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got, want)
    (gradient,) = torch.autograd.grad(results[0], packed, grad)
    gradients = torch.autograd.grad(expected[0], separate[-len(packing) :], grad)
    assert torch.equal(gradient, torch.stack(gradients, 2)) and gradient.is_contiguous()


def test_any_strides_without_a_copy():
    """Views of larger tensors, and [B, H, S, D] memory, give the same as contiguous tensors."""
    B, S, H, D = 2, 29, 2, 16
    wide = draw_tensors(2, torch.float32, (B, S, 5 * H, D), (B, H, S, D), (S, B, H, D))
    q, k, v = wide[0][:, :, ::5], wide[1].transpose(1, 2), wide[2].transpose(0, 1)
    out = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(out, flash_attn_func(*(x.contiguous() for x in (q, k, v)), causal=True))
    # Of queries in [B, H, S, D] memory, too, the result is contiguous.
    swapped = flash_attn_func(k, v, q)
    assert swapped.is_contiguous()
    torch.testing.assert_close(swapped, flash_attn_func(k.contiguous(), v, q))


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the operators of a call."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window_size": (7, 0)}])
def test_a_plain_call_only_takes_views(options):
    q, k, v = draw_tensors(3, torch.float32, *[(2, 19, 4, 16)] * 3)
    with Recorder() as recorder:
        flash_attn_func(q, k, v, **options)
    views = ["aten::transpose.int"] * 3
    assert recorder.names[:3] == views and recorder.names[4:] == views[:1]
    assert recorder.names[3] == "fused_attention::attention_forward_plain"


@pytest.mark.parametrize("window", [[9, 4], torch.tensor([9, 4]), (torch.tensor(9), 4)], ids=repr)
def test_windows_of_other_kinds(window):
    q, k, v = draw_tensors(4, torch.float64, *[(1, 31, 2, 8)] * 3)
    expected = flash_attn_func(q, k, v, window_size=(9, 4))
    assert torch.equal(flash_attn_func(q, k, v, window_size=window), expected)
    assert not torch.equal(flash_attn_func(q, k, v), expected)


def test_a_row_without_keys():
    """Its out and gradients are 0, and its lse is inf, as in flash-attn; gradients stay finite."""
    q, k, v = draw_tensors(5, torch.float64, (2, 7, 2, 8), (2, 3, 2, 8), (2, 3, 2, 8))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse, s_dmask = flash_attn_func(*leaves, causal=True, return_attn_probs=True)
    assert not out[:, :4].any() and out[:, 4:].all()
    assert (lse[:, :, :4] == torch.inf).all() and lse[:, :, 4:].isfinite().all()
    assert s_dmask.shape == (0,)
    dq, dk, dv = torch.autograd.grad(out.sum() + lse[:, :, 4:].sum(), leaves)
    assert not dq[:, :4].any() and all(x.isfinite().all() for x in (dq, dk, dv))
    nothing = flash_attn_func(q, k[:, :0], v[:, :0], return_attn_probs=True)
    assert not nothing[0].any() and (nothing[1] == torch.inf).all()


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)], ids=str)
def test_empty_tensors(shape):
    q = torch.zeros(shape, requires_grad=True)
    out, lse, _ = flash_attn_func(q, q, q, causal=True, return_attn_probs=True)
    assert out.shape == shape and lse.shape == (shape[0], shape[2], shape[1])
    assert torch.autograd.grad(out.sum(), q)[0].shape == shape


def test_values_of_another_width():
    q, k, v = draw_tensors(6, torch.float64, (2, 9, 4, 24), (2, 13, 2, 24), (2, 13, 2, 40))
    out = flash_attn_func(q, k, v, causal=True)
    parts = [flash_attn_func(q, k, part, causal=True) for part in v.split([24, 16], -1)]
    torch.testing.assert_close(out, torch.cat(parts, -1))


# -- Dropout -----------------------------------------------------------------------------


def test_dropout_follows_the_generator():
    """The same bits come with and without probabilities, and one draw is made for each call."""
    q, k, v = draw_tensors(7, torch.float32, *[(2, 65, 3, 16)] * 3)

    def call(**options):
        torch.manual_seed(11)
        results = flash_attn_func(q, k, v, 0.5, causal=True, **options)
        return results, torch.rand(1)

    alone, after = call()
    (out, _, s_dmask), after_probabilities = call(return_attn_probs=True)
    assert torch.equal(out, alone) and torch.equal(after, after_probabilities)
    again = flash_attn_func(q, k, v, 0.5, causal=True)
    assert not torch.equal(again, alone)
    below = torch.ones(65, 65, dtype=torch.bool).tril()
    dropped = (s_dmask[:, :, below] < 0).double().mean().item()
    assert abs(dropped - 0.5) < 5 * (0.25 / s_dmask[:, :, below].numel()) ** 0.5
    assert not s_dmask[:, :, ~below].any()


@pytest.mark.parametrize("p", [-0.1, 1.5, "half"])
def test_a_refused_call_draws_nothing(p):
    q = torch.zeros(1, 3, 2, 8)
    state = torch.get_rng_state()
    with pytest.raises((ArgumentValueError, ArgumentTypeError, TypeError), match="dropout_p|str"):
        flash_attn_func(q, q, q, p, return_attn_probs=True)
    with pytest.raises(ArgumentValueError, match="key: .*head_dim"):
        flash_attn_func(q, q[..., :4], q[..., :4], 0.5, return_attn_probs=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_of_everything():
    q, k, v = draw_tensors(8, torch.float32, *[(1, 9, 2, 8)] * 3)
    out, lse, s_dmask = flash_attn_func(q, k, v, 1.0, return_attn_probs=True)
    assert not out.any() and lse.isfinite().all() and (s_dmask < 0).all()


# -- Packed sequences --------------------------------------------------------------------

VARLEN_AXES = {
    "dtype": list(testing.DTYPES),
    "heads": [(4, 4), (6, 2), (3, 1)],
    "D": [8, 20, 33, 64, 128],
    "lengths": [
        [(5, 7), (0, 3), (113, 203), (1, 64), (17, 0), (40, 31), (0, 0)],
        [(1, 239), (1, 0), (0, 5), (1, 64)],
        [(130, 60), (2, 1), (33, 33)],
    ],
    "causal": [False, True],
    "window": ["none", "local", "left", "right", "wide"],
    "softcap": [0.0, 3.0],
    "alibi": [None, "H", "BH"],
    "dropout": [0.0, DROPOUT_P],
    "scale": [None, 0.31],
    "page_size": [None, 1, 3, 16, 256],
    "deterministic": [False, True],
    "probs": [False, True],
}


def paged(parts, page_size):
    """Copies sequences [S, H, D] to pages in random order, the rest of which is NaN; returns the
    pages and the block table, whose unused entries are no pages."""
    counts = [-(-len(part) // page_size) for part in parts]
    pages = parts[0].new_full((sum(counts) + 1, page_size, *parts[0].shape[1:]), torch.nan)
    table = torch.full((len(parts), max(counts)), -7, dtype=int32)
    numbers = iter(torch.randperm(sum(counts) + 1).tolist())
    for b, part in enumerate(parts):
        for n, chunk in enumerate(part.split(page_size) if len(part) else ()):
            table[b, n] = next(numbers)
            pages[table[b, n], : len(chunk)] = chunk
    return pages, table


@pytest.mark.parametrize("row", parameters(VARLEN_AXES, is_valid))
def test_packed_sequences(row):
    (Hq, Hkv), D, lengths, page_size = row["heads"], row["D"], row["lengths"], row["page_size"]
    B = len(lengths)
    lengths_q, lengths_k = ([n for n in each] for each in zip(*lengths, strict=True))
    longest = max(lengths_k)
    slopes, each_slopes = slopes_of(row["alibi"], B, Hq)

    def answer(draw):
        Tq, Tk = sum(lengths_q), sum(lengths_k)
        shapes = ((Tq, Hq, D), (Tk, Hkv, D), (Tk, Hkv, D), (Tq, Hq, D), (Hq, Tq))
        q, k, v, grad_out, grad_lse = draw_tensors(draw.seed, row["dtype"], *shapes)
        grad_lse = grad_lse.to(torch.promote_types(row["dtype"], torch.float32))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        keys, values, table = k, v, None
        if page_size is not None:
            torch.manual_seed(3)
            keys, table = paged(k.split(lengths_k), page_size)
            torch.manual_seed(3)
            values, _ = paged(v.split(lengths_k), page_size)
        sizes = (offsets(lengths_q), offsets(lengths_k), max(lengths_q), longest)
        options = keywords_of(row, longest) | {"alibi_slopes": slopes, "block_table": table}
        results = flash_attn_varlen_func(q, keys, values, *sizes, **options)
        out, lse, s_dmask = results if row["probs"] else (results, None, None)
        assert out.is_contiguous() and out.shape == (Tq, Hq, D)
        if row["probs"]:
            assert lse.shape == (Hq, Tq)
            grad_lse = grad_lse.masked_fill(lse.isinf(), 0.0)
            expected = (B, Hq, max(lengths_q), longest) if row["dropout"] else (0,)
            assert s_dmask.shape == expected
            outputs, grads = (out, lse), (grad_out, grad_lse)
        else:
            outputs, grads, grad_lse = out, grad_out, torch.zeros_like(grad_lse)
        gradients = torch.autograd.grad(outputs, leaves, grads)
        got = {"out": out} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))
        if row["probs"]:
            got["lse"] = torch.cat([x.flatten() for x in lse.split(lengths_q, 1)])
        keep = [None] * B
        if row["dropout"]:
            keep = [s_dmask[b, :, :Sq, :Sk] >= 0 for b, (Sq, Sk) in enumerate(lengths)]
        sequences = [
            Sequence(*x)
            for x in zip(
                q.detach().split(lengths_q),
                k.detach().split(lengths_k),
                v.detach().split(lengths_k),
                each_slopes,
                keep,
                grad_out.split(lengths_q),
                grad_lse.split(lengths_q, 1),
                strict=True,
            )
        ]
        o = options_of(row, longest)
        if row["dropout"]:
            check_probabilities(s_dmask, sequences, o, row["dtype"])
        got = {name: x.detach().flatten() for name, x in got.items()}
        exact = definition.exact(sequences, o)
        return got, {name: exact[name] for name in got}, definition.naive(sequences, o)

    check(row, answer)


@pytest.mark.parametrize("packing", ["qkv", "kv"])
def test_packed_tensors_of_packed_sequences(packing):
    lengths, H, D = [5, 0, 33, 17], 3, 16
    T, cu = sum(lengths), offsets(lengths)
    options = {"causal": True, "return_attn_probs": True}
    q, packed = draw_tensors(9, torch.float32, (T, H, D), (T, len(packing), H, D))
    packed.requires_grad_()
    if packing == "qkv":
        results = flash_attn_varlen_qkvpacked_func(packed, cu, 33, **options)
    else:
        results = flash_attn_varlen_kvpacked_func(q, packed, cu, cu, 33, 33, **options)
    parts = [x.clone().detach().requires_grad_() for x in packed.unbind(1)]
    parts = parts if packing == "qkv" else [q, *parts]
    expected = flash_attn_varlen_func(*parts, cu, cu, 33, 33, **options)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
    (gradient,) = torch.autograd.grad(results[0].sum(), packed)
    gradients = torch.autograd.grad(expected[0].sum(), parts[-len(packing) :])
    assert torch.equal(gradient, torch.stack(gradients, 1))


def test_longest_length_as_a_tensor():
    q, k, v = draw_tensors(10, torch.float32, *[(9, 2, 8)] * 3)
    cu = offsets([4, 5])
    expected = flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, window_size=(2, 0))
    longest = cu.diff().max()
    out = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, window_size=(2, 0))
    assert torch.equal(out, expected)


# -- Key/value caches --------------------------------------------------------------------

B, ROOM = 3, 80
CACHE_AXES = {
    "dtype": list(testing.DTYPES),
    "heads": [(4, 4), (6, 2), (3, 1)],
    "D": [8, 20, 64, 128],
    "Sq": [1, 5, 37],
    "new": [None, 0, 1, 4, 37],
    "cache": ["dense", "more rows", "batch_idx", "pages of 1", "pages of 16", "pages, batch_idx"],
    "leftpad": [False, True],
    "seqlens": ["int", "tensor", None],
    "rotary_dim": [0, 4, 8],
    "interleaved": [False, True],
    "causal": [False, True],
    "window": ["none", "local", "left", "right", "wide"],
    "softcap": [0.0, 3.0],
    "alibi": [None, "H", "BH"],
    "scale": [None, 0.31],
    "num_splits": [0, 1, 5],
    "lse": [False, True],
}


def is_valid_cache(row):
    return not (row["rotary_dim"] and row["new"] is None) and not (
        row["seqlens"] is None and row["new"] is not None
    )


class Caches:
    """Caches of B sequences that hold NaN but for tokens `begin` to `end` of each sequence."""

    def __init__(self, kind, seed, dtype, Hkv, D, begin, end):
        self.arguments: dict[str, Any] = {}
        rows, page_size = range(B), ROOM
        if kind.endswith("batch_idx"):
            rows = (3, 0, 2)
            self.arguments["cache_batch_idx"] = torch.tensor(rows, dtype=int32)
        if kind.startswith("pages"):
            page_size = 1 if kind == "pages of 1" else 16
            max_pages = -(-ROOM // page_size)
            numbers = torch.randperm(5 * max_pages, generator=torch.Generator().manual_seed(seed))
            table = numbers.view(5, max_pages)
            used = table if kind.endswith("batch_idx") else table[:B]
            self.arguments["block_table"] = used.to(int32)
        else:
            table = torch.arange(B if kind == "dense" else 5).view(-1, 1)
        tokens = torch.arange(ROOM)
        # Where the tokens of each sequence are: (row or page, row of a page)
        self.places = [(table[row][tokens // page_size], tokens % page_size) for row in rows]
        shape = (table.numel(), page_size, Hkv, D)
        self.k, self.v = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
        given = draw_tensors(seed, dtype, *[(B, ROOM, Hkv, D)] * 2)
        for b in range(B):
            for cache, x in zip((self.k, self.v), given, strict=True):
                self.write(cache, b, slice(begin[b], end[b]), x[b, begin[b] : end[b]])

    def write(self, cache, b, tokens, x):
        page, row = self.places[b]
        cache[page[tokens], row[tokens]] = x

    def read(self, cache, b, tokens):
        page, row = self.places[b]
        return cache[page[tokens], row[tokens]]


@pytest.mark.parametrize("row", parameters(CACHE_AXES, is_valid_cache, count=400))
def test_with_kvcache(row):
    (Hq, Hkv), D, Sq, new, dtype = row["heads"], row["D"], row["Sq"], row["new"], row["dtype"]
    slopes, each_slopes = slopes_of(row["alibi"], B, Hq)
    lengths = {"int": [20] * B, "tensor": [0, 13, 33], None: [ROOM] * B}[row["seqlens"]]
    leftpad = [0, min(5, lengths[1]), min(21, lengths[2])] if row["leftpad"] else [0] * B
    grown = [length + (new or 0) for length in lengths]

    def answer(draw):
        caches = Caches(row["cache"], draw.seed, dtype, Hkv, D, leftpad, lengths)
        room = caches.k.shape[1] * (
            caches.arguments["block_table"].shape[1] if "block_table" in caches.arguments else 1
        )
        q, angles = draw_tensors(
            draw.seed + 1, dtype, (B, Sq, Hq, D), (120, row["rotary_dim"] // 2)
        )
        arguments = caches.arguments | {"causal": row["causal"], "softcap": row["softcap"]}
        arguments |= {"softmax_scale": row["scale"], "window_size": window_of(row["window"], room)}
        arguments |= {"alibi_slopes": slopes, "num_splits": row["num_splits"]}
        if row["leftpad"]:
            arguments["cache_leftpad"] = torch.tensor(leftpad, dtype=int32)
        if row["seqlens"] is not None:
            tensor = torch.tensor(lengths, dtype=int32)
            arguments["cache_seqlens"] = tensor if row["seqlens"] == "tensor" else lengths[0]
        wide_q, expected_k, expected_v = list(q.double()), caches.k.clone(), caches.v.clone()
        if new is not None:
            k, v = draw_tensors(draw.seed + 2, dtype, *[(B, new, Hkv, D)] * 2)
            arguments |= {"k": k, "v": v}
        o = options_of(row, room)
        if row["rotary_dim"]:
            cos, sin = angles.double().cos().to(dtype), angles.double().sin().to(dtype)
            rotary = {
                "rotary_cos": cos,
                "rotary_sin": sin,
                "rotary_interleaved": row["interleaved"],
            }
            arguments |= rotary
        wide_k = []
        for b in range(B if new is not None else 0):
            tokens = slice(lengths[b], grown[b])
            wide_k.append(k[b].double())
            if row["rotary_dim"]:
                places = torch.arange(lengths[b], grown[b])
                wide_k[b] = definition.rotated(k[b], cos, sin, places, row["interleaved"])
                places = lengths[b] + torch.arange(Sq)
                if not row["causal"] and row["window"] in ("none", "wide"):
                    places = torch.full((Sq,), lengths[b])
                wide_q[b] = definition.rotated(q[b], cos, sin, places, row["interleaved"])
            caches.write(expected_k, b, tokens, wide_k[b].to(dtype))
            caches.write(expected_v, b, tokens, v[b])

        results = flash_attn_with_kvcache(
            q, caches.k, caches.v, return_softmax_lse=row["lse"], **arguments
        )
        out, lse = results if row["lse"] else (results, None)
        assert out.is_contiguous() and out.shape == q.shape
        close = torch.testing.assert_close if row["rotary_dim"] else same_bits
        close(caches.k, expected_k, equal_nan=True)
        same_bits(caches.v, expected_v, equal_nan=True)
        got = {"out": out.flatten()}
        if row["lse"]:
            assert lse.shape == (B, Hq, Sq)
            got["lse"] = lse.flatten()
        sequences = []
        for b in range(B):
            tokens = slice(leftpad[b], grown[b])
            keys, values = (caches.read(x, b, tokens) for x in (caches.k, caches.v))
            sequences.append(Sequence(wide_q[b].to(dtype), keys, values, each_slopes[b]))
        unrounded = [x._replace(q=q) for x, q in zip(sequences, wide_q, strict=True)]
        exact = definition.exact(unrounded, o)
        return got, {name: exact[name] for name in got}, definition.naive(sequences, o)

    check(row, answer)


def same_bits(x, y, equal_nan):
    assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) and torch.equal(x.isnan(), y.isnan())


def test_generation_token_by_token():
    """A prompt and then single tokens through a cache equal one call over all tokens."""
    S, Hq, Hkv, D = 23, 6, 2, 16
    q, k, v = draw_tensors(1, torch.float64, (2, S, Hq, D), (2, S, Hkv, D), (2, S, Hkv, D))
    caches = [torch.full((2, S, Hkv, D), torch.nan, dtype=torch.float64) for _ in range(2)]
    steps = [slice(0, 11), *(slice(n, n + 1) for n in range(11, S))]
    outs = [
        flash_attn_with_kvcache(
            *(q[:, t], *caches, k[:, t], v[:, t]), cache_seqlens=t.start, causal=True
        )
        for t in steps
    ]
    torch.testing.assert_close(torch.cat(outs, 1), flash_attn_func(q, k, v, causal=True))
    assert torch.equal(caches[0], k) and torch.equal(caches[1], v)


def test_results_require_no_gradient():
    q, cache = torch.zeros(1, 1, 2, 8, requires_grad=True), torch.zeros(1, 4, 2, 8)
    out = flash_attn_with_kvcache(q, cache, cache.clone(), q, q, cache_seqlens=2)
    assert not out.requires_grad and not cache.requires_grad
    angles = torch.zeros(4, 2, requires_grad=True)
    rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    out = flash_attn_with_kvcache(q, cache, cache.clone(), q, q, **rotary, cache_seqlens=2)
    assert not out.requires_grad and not cache.requires_grad
    wanted = cache.clone().requires_grad_()
    assert not flash_attn_with_kvcache(q.detach(), wanted, cache, cache_seqlens=2).requires_grad


# -- Rotary positions --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("starts", [0, 5, torch.tensor([3, 0, 7])], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_rotation(dtype, interleaved, starts, inplace):
    x, angles = draw_tensors(1, dtype, (3, 9, 2, 20), (16, 6))
    cos, sin = angles.double().cos().to(dtype), angles.double().sin().to(dtype)
    before = x.clone()
    out = apply_rotary_emb(x, cos, sin, interleaved, inplace, starts)
    for b in range(3):
        places = torch.arange(9) + (starts if isinstance(starts, int) else starts[b])
        want = definition.rotated(before[b], cos, sin, places, interleaved)
        torch.testing.assert_close(out[b], want.to(dtype))
    assert (out is x) == inplace
    assert torch.equal(out[..., 12:], before[..., 12:])


@pytest.mark.parametrize("starts", [4, torch.tensor([3, 0, 7, 1])], ids=str)
def test_rotation_of_packed_sequences(starts):
    lengths = [4, 0, 7, 2]
    x, angles = draw_tensors(2, torch.float64, (sum(lengths), 2, 12), (16, 6))
    out = apply_rotary_emb(
        x, angles.cos(), angles.sin(), seqlen_offsets=starts, cu_seqlens=offsets(lengths)
    )
    each = [starts] * 4 if isinstance(starts, int) else starts.tolist()
    places = torch.cat([start + torch.arange(n) for start, n in zip(each, lengths, strict=True)])
    want = definition.rotated(x, angles.cos(), angles.sin(), places, False)
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_rotation_is_differentiable(interleaved, inplace):
    x, angles = draw_tensors(3, torch.float64, (1, 3, 2, 6), (5, 2))
    inputs = [t.requires_grad_() for t in (x, angles.cos(), angles.sin())]

    def rotate(x, cos, sin):
        return apply_rotary_emb(x.clone(), cos, sin, interleaved, inplace, 1)

    assert torch.autograd.gradcheck(rotate, inputs)


# -- Padding -----------------------------------------------------------------------------


def test_unpad_and_pad():
    x = torch.randn(3, 7, 2, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1], [0] * 7])
    tokens, indices, cu_seqlens, longest, used = unpad_input(x, mask)
    assert torch.equal(tokens, x[mask.bool()])
    assert cu_seqlens.dtype == used.dtype == int32
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 3, 8, 8], 5, [3, 5, 0])
    assert type(longest) is int
    assert torch.equal(index_first_axis(x.flatten(0, 1), indices), tokens)
    padded = pad_input(tokens, indices, 3, 7)
    assert torch.equal(padded, x * mask[..., None, None])
    (gradient,) = torch.autograd.grad(padded.sum(), x)
    assert torch.equal(gradient, mask[..., None, None].expand_as(x).double())


def test_unpad_with_unused_tokens():
    x = torch.randn(2, 4, 3)
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    unused = torch.tensor([[False, False, True, False], [False, False, False, True]])
    tokens, indices, cu_seqlens, longest, used = unpad_input(x, mask, unused)
    assert indices.tolist() == [0, 1, 2, 4, 7] and torch.equal(tokens, x.flatten(0, 1)[indices])
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 3, 5], 3, [2, 1])


def test_padded_attention_by_packing():
    """The use that the functions are for: unpad, attend to packed sequences, pad."""
    S, lengths = 9, [4, 9, 1]
    q, k, v = draw_tensors(4, torch.float64, *[(3, S, 2, 8)] * 3)
    mask = torch.arange(S) < torch.tensor(lengths)[:, None]
    (tokens, indices, cu, longest, _), *others = (unpad_input(x, mask) for x in (q, k, v))
    packed = (tokens, *(other[0] for other in others))
    out = flash_attn_varlen_func(*packed, cu, cu, longest, longest, causal=True)
    padded = pad_input(out, indices, 3, S)
    expected = flash_attn_func(q, k, v, causal=True) * mask[..., None, None]
    torch.testing.assert_close(padded, expected)


# -- FlashAttention-3 --------------------------------------------------------------------

AXES_3 = {
    "dtype": [torch.float32, torch.bfloat16],
    "heads": [(4, 4), (6, 2), (3, 1)],
    "D": [20, 64],
    "lengths": [(1, 239), (113, 203), (37, 11)],
    "causal": [False, True],
    "window": ["none", "local", "left", "right", "wide"],
    "softcap": [0.0, 3.0],
    "scale": [None, 0.31],
    "packed": [False, True],
    "probs": [False, True],
}


@pytest.mark.parametrize("row", parameters(AXES_3, count=150))
def test_functions_of_3(row):
    (Hq, Hkv), (Sq, Sk), D, n = row["heads"], row["lengths"], row["D"], 2

    def answer(draw):
        shapes = ((n, Sq, Hq, D), (n, Sk, Hkv, D), (n, Sk, Hkv, D), (n, Sq, Hq, D), (n, Hq, Sq))
        *qkv, grad_out, grad_lse = draw_tensors(draw.seed, row["dtype"], *shapes)
        grad_lse = grad_lse.float()
        leaves = [x.requires_grad_() for x in qkv]
        options = {"causal": row["causal"], "window_size": window_of(row["window"], Sk)}
        options |= {"softcap": row["softcap"], "return_attn_probs": row["probs"]}
        options |= {
            "softmax_scale": row["scale"],
            "num_splits": 3,
            "pack_gqa": True,
            "sm_margin": 2,
        }
        if row["packed"]:
            sizes = (offsets([Sq] * n), offsets([Sk] * n), Sq, Sk)
            flat = [x.flatten(0, 1) for x in leaves]
            results = flash_attn_3.flash_attn_varlen_func(*flat, *sizes, **options)
        else:
            results = flash_attn_3.flash_attn_func(*leaves, **options)
        out, lse = results if row["probs"] else (results, None)
        out = out.view(n, Sq, Hq, D)
        got = {"out": out}
        if row["probs"]:
            lse = torch.stack(lse.split(Sq, 1)) if row["packed"] else lse
            got["lse"] = lse
            grad_lse = grad_lse.masked_fill(lse.isinf(), 0.0)
            gradients = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
        else:
            grad_lse = torch.zeros_like(grad_lse)
            gradients = torch.autograd.grad(out, leaves, grad_out)
        got |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
        rows = zip(*(x.detach() for x in qkv), grad_out, grad_lse, strict=True)
        sequences = [Sequence(q, k, v, None, None, *grads) for q, k, v, *grads in rows]
        o = options_of(row, Sk, version=3)
        got = {name: x.detach().flatten() for name, x in got.items()}
        exact = definition.exact(sequences, o)
        return got, {name: exact[name] for name in got}, definition.naive(sequences, o)

    check(row, answer)


@pytest.mark.parametrize("layout", ["3", "Hq + 2 Hkv"])
def test_packed_tensor_of_3(layout):
    if layout == "3":
        qkv = torch.randn(2, 9, 3, 4, 8, dtype=torch.float64)
        parts, heads = qkv.unbind(2), None
    else:
        qkv = torch.randn(2, 9, 8, 8, dtype=torch.float64)
        parts, heads = qkv.split([4, 2, 2], 2), 4
    out = flash_attn_3.flash_attn_qkvpacked_func(qkv, None, True, num_heads_q=heads)
    assert torch.equal(out, flash_attn_func(*parts, causal=True))


@pytest.mark.parametrize("seqused", [[3, 0], [7, 5]])
def test_used_keys_of_3(seqused):
    q, k, v = draw_tensors(1, torch.float64, (9, 2, 8), (12, 2, 8), (12, 2, 8))
    used = torch.tensor(seqused, dtype=int32)
    sizes = (offsets([4, 5]), offsets([7, 5]), 5, 7)
    out = flash_attn_3.flash_attn_varlen_func(q, k, v, *sizes, seqused_k=used, causal=True)
    for b, (rows, first) in enumerate((([0, 4], 0), ([4, 9], 7))):
        columns = slice(first, first + seqused[b])
        own = (q[slice(*rows)], k[columns], v[columns])
        want = flash_attn_func(*(x.unsqueeze(0) for x in own), causal=True)[0]
        torch.testing.assert_close(out[slice(*rows)], want)


@pytest.mark.parametrize("cache", ["dense", "batch_idx", "pages of 16", "pages, batch_idx"])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("packed_keys", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_queries_and_keys_with_a_cache(cache, rotary, packed_keys, causal):
    """Sequences that ask and grow by different numbers of tokens equal calls one by one."""
    Hq, Hkv, D, dtype = 6, 2, 16, torch.float64
    lengths, asked = [0, 13, 33], [4, 0, 7]
    grow = [3, 5, 0] if packed_keys else [2] * B
    caches = Caches(cache, 1, dtype, Hkv, D, [0] * B, lengths)
    alone = Caches(cache, 1, dtype, Hkv, D, [0] * B, lengths)
    shapes = ((sum(asked), Hq, D), (sum(grow), Hkv, D), (sum(grow), Hkv, D), (60, 5))
    q, k, v, angles = draw_tensors(2, dtype, *shapes)
    options: dict[str, Any] = {"causal": causal, "softcap": 3.0, "return_softmax_lse": True}
    starts = [0, 0, 0]
    if rotary:
        options |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
        starts = [2, 13, 9]
        options["rotary_seqlens"] = torch.tensor(starts, dtype=int32)
    arguments = dict(caches.arguments)
    if "block_table" in arguments:
        arguments["page_table"] = arguments.pop("block_table")
    packing = {"cu_seqlens_q": offsets(asked), "max_seqlen_q": max(asked)}
    new = (k.view(B, 2, Hkv, D), v.view(B, 2, Hkv, D)) if not packed_keys else (k, v)
    if packed_keys:
        packing["cu_seqlens_k_new"] = offsets(grow)
    seqlens = torch.tensor(lengths, dtype=int32)
    out, lse = flash_attn_3.flash_attn_with_kvcache(
        q, caches.k, caches.v, *new, cache_seqlens=seqlens, **arguments, **packing, **options
    )
    assert out.shape == q.shape and lse.shape == (Hq, sum(asked))
    rows = zip(q.split(asked), k.split(grow), v.split(grow), strict=True)
    for b, (own_q, own_k, own_v) in enumerate(rows):
        if rotary:
            turns = (angles.cos(), angles.sin())
            places = starts[b] + torch.arange(len(own_k))
            own_k = definition.rotated(own_k, *turns, places, True)
            places = starts[b] + (torch.arange(len(own_q)) if causal else torch.zeros(len(own_q)))
            own_q = definition.rotated(own_q, *turns, places.long(), True)
        tokens = slice(lengths[b], lengths[b] + grow[b])
        alone.write(alone.k, b, tokens, own_k)
        alone.write(alone.v, b, tokens, own_v)
        own = slice(0, lengths[b] + grow[b])
        keys, values = alone.read(alone.k, b, own), alone.read(alone.v, b, own)
        o = Options(causal=causal, softcap=3.0, version=3)
        want, want_lse, _ = definition.attend(Sequence(own_q, keys, values), o)
        torch.testing.assert_close(out.split(asked)[b], want)
        torch.testing.assert_close(lse.split(asked, 1)[b], want_lse)
    torch.testing.assert_close(caches.k, alone.k, equal_nan=True)
    torch.testing.assert_close(caches.v, alone.v, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_combine(dtype, given):
    """Attention over parts of the keys, one of which is hidden from some rows, merges to the
    whole; so does a part whose lse is inf, as flash-attn 2 has it."""
    q, k, v = draw_tensors(1, torch.float32, (2, 9, 4, 8), (2, 21, 2, 8), (2, 21, 2, 8))
    options = {"causal": True, "return_attn_probs": True}
    whole, whole_lse, _ = flash_attn_func(q, k, v, **options)
    # The diagonal of the whole call, in each part: the last part ends where the whole does.
    first = flash_attn_func(q[:, :, :], k[:, :12], v[:, :12], return_attn_probs=True)
    last = flash_attn_func(q, k[:, 12:], v[:, 12:], **options)
    hidden = [torch.full_like(first[0], torch.nan), torch.full_like(first[1], torch.inf)]
    parts = [first, last, hidden]
    partial_out = torch.stack([part[0] for part in parts])
    partial_lse = torch.stack([part[1].transpose(1, 2) for part in parts])
    out = torch.empty(2, 9, 4, 8, dtype=dtype) if given else None
    merged, lse = flash_attn_3.flash_attn_combine(partial_out, partial_lse, out, dtype)
    assert merged.dtype == dtype and merged.is_contiguous() and (not given or merged is out)
    assert lse.shape == (2, 9, 4)
    torch.testing.assert_close(merged, whole.to(dtype))
    torch.testing.assert_close(lse, whole_lse.transpose(1, 2))


# -- Refusals ----------------------------------------------------------------------------

X = torch.zeros(2, 5, 4, 8)
CU = offsets([5, 5])
LENGTHS = torch.tensor([1, 2], dtype=int32)
TURNS = torch.zeros(16, 4)


def cached(*args, **kwargs):
    return flash_attn_with_kvcache(X[:, :1], X.clone(), X.clone(), *args, **kwargs)


def cached_3(*args, **kwargs):
    return flash_attn_3.flash_attn_with_kvcache(X[:, :1], X.clone(), X.clone(), *args, **kwargs)


REFUSED = {
    "a list": (lambda: flash_attn_func([1], X, X), "q: expected a torch.Tensor, got list"),
    "rank of q": (lambda: flash_attn_func(X[0], X, X), r"q: expected 4 dim.*\[B, S, H, D\].*3"),
    "rank of v": (lambda: flash_attn_func(X, X, X[0]), r"v: expected 4 dimensions \[B, S, H, D\]"),
    "heads": (lambda: flash_attn_func(X, X[:, :, :3], X[:, :, :3]), "k: .*divides q's 4, got 3"),
    "no heads": (lambda: flash_attn_func(X, X[:, :, :0], X[:, :, :0]), "k: .*divides q's 4, got 0"),
    "dtype": (lambda: flash_attn_func(X, X.half(), X), "key: expected dtype torch.float32"),
    "integers": (lambda: flash_attn_func(*[X.int()] * 3), "query: expected a dtype out of"),
    "dropout and softcap": (
        lambda: flash_attn_func(X, X, X, 0.1, softcap=2.0),
        "dropout_p: expected 0.0 together with softcap, .*attention",
    ),
    "learned slopes": (
        lambda: flash_attn_func(X, X, X, alibi_slopes=torch.zeros(4, requires_grad=True)),
        "alibi_slopes: expected no requires_grad",
    ),
    "qkv": (
        lambda: flash_attn_qkvpacked_func(X[:, None]),
        r"qkv: expected shape \[B, S, 3, H, D\]",
    ),
    "rank of qkv": (
        lambda: flash_attn_qkvpacked_func(X),
        r"qkv: expected 5 dim.*\[B, S, 3, H, D\]",
    ),
    "kv": (lambda: flash_attn_kvpacked_func(X, X[:, None]), r"kv: .*\[B, S, 2, H, D\], got \(2, 1"),
    "packed rank": (
        lambda: flash_attn_varlen_func(X, X, X, CU, CU, 5, 5),
        r"q: expected 3 dimensions \[T, H, D\], got 4",
    ),
    "pages": (
        lambda: flash_attn_varlen_func(*[X.flatten(0, 1)] * 3, CU, CU, 5, 5, block_table=CU[None]),
        r"k: expected 4 dimensions \[pages, page_size, H, D\]",
    ),
    "int64 offsets": (
        lambda: flash_attn_varlen_func(*[X.flatten(0, 1)] * 3, CU.long(), CU.long(), 5, 5),
        "cu_seqlens_q: expected dtype torch.int32",
    ),
    "v without k": (lambda: cached(v=X), "k: expected not None, since v is given"),
    "k without v": (lambda: cached(X, cache_seqlens=1), "v: expected not None, since k is given"),
    "k without seqlens": (lambda: cached(X, X), "cache_seqlens: .*since k is given"),
    "cos without sin": (
        lambda: cached(X, X, TURNS, cache_seqlens=1),
        "rotary_sin: expected not None, since rotary_cos is given",
    ),
    "sin without cos": (
        lambda: cached(X, X, None, TURNS, cache_seqlens=1),
        "rotary_cos: expected not None, since rotary_sin is given",
    ),
    "rotary without k": (
        lambda: cached(None, None, TURNS, TURNS),
        "k: .*since rotary_cos is given",
    ),
    "too wide": (
        lambda: cached(X[:, :1], X[:, :1], torch.zeros(16, 5), torch.zeros(16, 5), 1),
        "rotary_cos: expected at most D / 2 = 4.0 columns, got 5",
    ),
    "sin's shape": (
        lambda: cached(X[:, :1], X[:, :1], TURNS, TURNS[:9], 1),
        r"rotary_sin: expected shape that of cos = \(16, 4\), got \(9, 4\)",
    ),
    "too few positions": (
        lambda: cached(X[:, :1], X[:, :1], TURNS[:2], TURNS[:2], LENGTHS),
        "positions in rotary_cos: expected numbers from 0 to 1, got 1 to 2",
    ),
    "int64 seqlens": (
        lambda: cached(cache_seqlens=LENGTHS.long()),
        "cache_seqlens: expected dtype torch.int32",
    ),
    "seqlens of 3": (
        lambda: cached(cache_seqlens=torch.zeros(3, dtype=int32)),
        r"cache_seqlens: expected shape \[B\] = \(2,\), got \(3,\)",
    ),
    "words": (lambda: cached(cache_seqlens="2"), "cache_seqlens: expected a torch.Tensor, got str"),
    "too many": (
        lambda: cached(cache_seqlens=torch.tensor([0, 6], dtype=int32)),
        "cache_seqlens: expected numbers from 0 to 5, got 0 to 6",
    ),
    "no room": (lambda: cached(X, X, cache_seqlens=1), "cache_seqlens: .*got 1"),
    "batch_idx": (
        lambda: cached(cache_batch_idx=LENGTHS),
        "cache_batch_idx: expected numbers from 0 to 1, got 1 to 2",
    ),
    "leftpad": (lambda: cached(cache_leftpad=CU), r"cache_leftpad: expected shape \[B\] = \(2,\)"),
    "strided cache": (
        lambda: flash_attn_with_kvcache(X, X.mT.contiguous().mT, X),
        "k_cache: expected a last dimension of stride 1, got stride 4",
    ),
    "heads of the cache": (
        lambda: flash_attn_with_kvcache(X, X[:, :, :3], X[:, :, :3]),
        "k_cache: expected a number of heads that divides q's 4, got 3",
    ),
    "cos's rank": (
        lambda: apply_rotary_emb(X, TURNS[0], TURNS[0]),
        r"cos: expected 2 dimensions \[positions, rotary_dim / 2\]",
    ),
    "positions": (
        lambda: apply_rotary_emb(X, TURNS, TURNS, seqlen_offsets=12),
        "positions in cos: expected numbers from 0 to 15, got 12 to 16",
    ),
    "num_heads_q": (
        lambda: flash_attn_3.flash_attn_qkvpacked_func(X, num_heads_q=1),
        "num_heads_q: expected a number of heads that leaves twice Hkv of qkv's 4, got 1",
    ),
    "shape of lse_partial": (
        lambda: flash_attn_3.flash_attn_combine(X[None], X[None, ..., 0][:, :1]),
        r"lse_partial: expected shape \[N, B, S, H\] = \(1, 2, 5, 4\)",
    ),
    "shape of out": (
        lambda: flash_attn_3.flash_attn_combine(X[None], X[None, ..., 0], X[:1]),
        r"out: expected shape \[B, S, H, D\] = \(2, 5, 4, 8\)",
    ),
    "dtype of out": (
        lambda: flash_attn_3.flash_attn_combine(X[None], X[None, ..., 0], X.half()),
        "out: expected dtype torch.float32, got torch.float16. Hint: pass it as out_dtype too",
    ),
}
NOT_BUILT = {
    "qv": (lambda: flash_attn_3.flash_attn_func(X, X, X, qv=X), "qv: .*a tensor"),
    "q_descale": (lambda: flash_attn_3.flash_attn_func(X, X, X, q_descale=X), "q_descale"),
    "k_descale": (
        lambda: flash_attn_3.flash_attn_qkvpacked_func(X, k_descale=X, num_heads_q=2),
        "k_descale",
    ),
    "v_descale": (lambda: cached_3(v_descale=X), "v_descale"),
    "attention_chunk": (
        lambda: flash_attn_3.flash_attn_func(X, X, X, attention_chunk=4),
        r"attention_chunk: expected None \(others are not built\), got 4",
    ),
    "seqused_q": (
        lambda: flash_attn_3.flash_attn_varlen_func(X, X, X, CU, CU, 5, 5, seqused_q=LENGTHS),
        "seqused_q",
    ),
    "scheduler_metadata": (lambda: cached_3(scheduler_metadata=X), "scheduler_metadata"),
    "leftpad of packed queries": (
        lambda: cached_3(cu_seqlens_q=CU, cache_leftpad=LENGTHS),
        "cache_leftpad",
    ),
}


@pytest.mark.parametrize(
    "call, error, message",
    [(call, (ArgumentValueError, ArgumentTypeError), text) for call, text in REFUSED.values()]
    + [(call, NotImplementedError, text) for call, text in NOT_BUILT.values()],
    ids=[*REFUSED, *NOT_BUILT],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


# -- import flash_attn -------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_stays_installed():
    before = list(sys.meta_path)
    yield
    assert sys.meta_path == before
    assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]


def foreign_code(x):
    """Code that was written for flash-attn."""
    import flash_attn
    from flash_attn import flash_attn_func
    from flash_attn.bert_padding import pad_input, unpad_input
    from flash_attn.flash_attn_interface import flash_attn_varlen_func
    from flash_attn.layers.rotary import apply_rotary_emb

    assert tuple(map(int, flash_attn.__version__.split("."))) >= (2, 8, 3)
    x = apply_rotary_emb(x, torch.ones(x.shape[1], 4), torch.zeros(x.shape[1], 4))
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    tokens, indices, cu, longest, _ = unpad_input(x, mask)
    out = flash_attn_varlen_func(tokens, tokens, tokens, cu, cu, longest, longest, causal=True)
    out = pad_input(out, indices, *x.shape[:2])
    torch.testing.assert_close(out, flash_attn_func(x, x, x, causal=True))
    return out


def test_code_for_flash_attn_runs():
    x = torch.randn(2, 7, 2, 8)
    with pytest.raises(ImportError):
        foreign_code(x)
    with install():
        out = foreign_code(x)
    torch.testing.assert_close(out, flash_attn_func(x, x, x, causal=True))
    with pytest.raises(ImportError):
        foreign_code(x)


def test_what_is_installed():
    handle = install()
    package = importlib.import_module("flash_attn")
    assert package.flash_attn_interface.flash_attn_func is package.flash_attn_func
    for name in SIGNATURES:
        if name.startswith("flash_attn"):
            assert getattr(package, name) is getattr(flash_attn, name)
    spec = importlib.util.find_spec("flash_attn")
    assert spec is package.__spec__ and spec.name == "flash_attn"
    assert importlib.util.find_spec("flash_attn.layers.rotary").parent == "flash_attn.layers"
    for name in ("flash-attn", "flash_attn", "Flash_Attn"):
        assert importlib.metadata.version(name) == package.__version__ == "2.8.3"
    assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
    with pytest.raises(ModuleNotFoundError, match="flash_attn.ops"):
        importlib.import_module("flash_attn.ops")
    assert importlib.metadata.version("torch")  # other packages are found as before
    handle.undo()
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")
    assert "flash_attn" not in importlib.metadata.packages_distributions()
    assert importlib.util.find_spec("flash_attn") is None


def test_handles_nest():
    first, second = install(), install()
    module = importlib.import_module("flash_attn")
    first.undo()
    first.undo()
    assert second.active and importlib.import_module("flash_attn") is module
    with install():
        second.undo()
        assert importlib.import_module("flash_attn") is module
    assert importlib.util.find_spec("flash_attn") is None


@pytest.mark.parametrize("imported", [False, True])
def test_a_real_package_is_not_replaced(imported, tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("__version__ = 'real'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    if imported:
        importlib.import_module("flash_attn")
        monkeypatch.undo()  # not importable any more, but there
    try:
        with pytest.raises(RuntimeError, match="^install: flash_attn is installed or imported"):
            install()
        assert imported == ("flash_attn" in sys.modules)
    finally:
        sys.modules.pop("flash_attn", None)


def test_a_package_that_came_later_stays(monkeypatch):
    """undo() removes no module that other code has put in the place of ours."""
    handle = install()
    importlib.import_module("flash_attn")
    other = type(sys)("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", other)
    handle.undo()
    assert sys.modules.pop("flash_attn") is other
    monkeypatch.undo()
    sys.modules.pop("flash_attn", None)


TRANSFORMERS = """
from fused_attention.integrations.flash_attn import install
install()
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import is_flash_attn_2_available
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=9)
config = LlamaConfig(**sizes, num_attention_heads=2, attn_implementation="flash_attention_2")
print(is_flash_attn_2_available())
try:
    AutoModelForCausalLM.from_config(config, attn_implementation="flash_attention_2")
except ImportError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="no transformers")
@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers refuses without a GPU only")
def test_transformers_refuses_flash_attention_2_on_a_cpu():
    """This is what the docstring of `install` says."""
    command = [sys.executable, "-c", TRANSFORMERS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "False" in done.stdout and "FlashAttention2 is not available on CPU" in done.stdout


# -- Compilation -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("probs", [False, True])
def test_compiled(probs):
    q, k, v = draw_tensors(1, torch.float32, (2, 9, 4, 16), (2, 13, 2, 16), (2, 13, 2, 16))

    def call(q, k, v):
        return flash_attn_func(q, k, v, causal=True, window_size=(4, 0), return_attn_probs=probs)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v))


@pytest.mark.slow
def test_compiled_cache():
    q, k, v = draw_tensors(1, torch.float32, (2, 1, 4, 16), (2, 1, 2, 16), (2, 1, 2, 16))
    turns = torch.randn(13, 4)
    lengths = torch.tensor([3, 7], dtype=int32)

    def call(k_cache, v_cache):
        new = (k, v, turns.cos(), turns.sin(), lengths)
        return flash_attn_with_kvcache(q, k_cache, v_cache, *new, causal=True)

    caches = [torch.randn(2, 13, 2, 16) for _ in range(4)]
    caches[2:] = [x.clone() for x in caches[:2]]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*caches[:2]), call(*caches[2:]))
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])
