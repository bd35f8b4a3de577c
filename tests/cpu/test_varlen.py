"""Packed sequences, used lengths and pages: each sequence gives what a call of its own gives,
whatever lies beside it. The correctness rule is applied to the sequences one by one."""

import pytest
import torch
from torch.library import opcheck

from fused_attention import ArgumentValueError, attention
from fused_attention.tools import testing
from varlen_checks import (
    DECODED,
    LENGTHS,
    OPTIONS,
    SCORES,
    check_gradients_of_packed,
    check_gradients_of_used_lengths_and_pages,
    check_packed,
    check_used_lengths_and_pages,
    offsets,
)

int32 = torch.int32

# -- Packed ------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("page_size", [None, 7, 64])
@pytest.mark.parametrize("lengths", [LENGTHS, DECODED], ids=["prompts", "decode"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_packed(isa, name, dtype, lengths, page_size):
    check_packed(name, dtype, lengths, page_size)


@pytest.mark.covering
@pytest.mark.parametrize("page_size", [None, 7])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_packed(isa, name, page_size):
    check_gradients_of_packed(name, page_size)


def test_packed_is_dense_where_all_lengths_are_equal(isa):
    """They agree bit for bit, so dropout counts sequences as it counts the batch."""
    for Sq in (1, 60):
        query, key, value = (
            torch.randn(3, heads, S, 16) for heads, S in ((4, Sq), (2, 150), (2, 150))
        )
        options = {"dropout_p": 0.3, "philox_seed": 7, "causal": "bottom_right"}
        want, want_lse = attention(query, key, value, **options, return_lse=True)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        cu = {"cu_seqlens_q": offsets([Sq] * 3), "cu_seqlens_k": offsets([150] * 3)}
        out, lse = attention(q, k, v, **cu, **options, return_lse=True, backend="cpu")
        assert torch.equal(out.unflatten(0, (3, Sq)).transpose(1, 2), want)
        assert torch.equal(lse.unflatten(1, (3, Sq)).transpose(0, 1), want_lse)


def test_used_lengths_of_packed_keys(isa):
    query, key = torch.randn(7, 2, 8), torch.randn(30, 2, 8)
    cu_q, cu_k = offsets([3, 4]), offsets([10, 20])
    used = torch.tensor([4, 20], dtype=int32)
    out = attention(query, key, key, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqused_k=used)
    only = torch.cat([key[:4], key[10:]])
    want = attention(query, only, only, cu_seqlens_q=cu_q, cu_seqlens_k=offsets([4, 20]))
    assert torch.equal(out, want)


# -- Batches of different lengths --------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("page_size", [None, 1, 5, 16, 64, 256])
@pytest.mark.parametrize("Sq", [1, 3, 60])
@pytest.mark.parametrize("name", OPTIONS | SCORES)
def test_used_lengths_and_pages(isa, name, Sq, page_size):
    check_used_lengths_and_pages(name, Sq, page_size)


@pytest.mark.covering
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("name", OPTIONS | SCORES)
def test_gradients_of_used_lengths_and_pages(isa, name, page_size):
    check_gradients_of_used_lengths_and_pages(name, page_size)


# -- Values and strides of the lengths ---------------------------------------------------

QUERY, KEY, PAGES = torch.randn(10, 2, 8), torch.randn(12, 2, 8), torch.randn(6, 4, 2, 8)
PACKED = {"query": QUERY, "key": KEY, "value": KEY}
PACKED |= {"cu_seqlens_q": offsets([4, 6]), "cu_seqlens_k": offsets([5, 7])}
PAGED = {"query": torch.randn(2, 2, 3, 8), "key": PAGES, "value": PAGES}
PAGED |= {"block_table": torch.tensor([[0, 1], [2, 5]], dtype=int32)}


def int_tensor(*values):
    return torch.tensor(values, dtype=int32)


WRONG = {
    "falling": (PACKED, {"cu_seqlens_q": int_tensor(0, 6, 4)}, "cu_seqlens_q: .*got 6 before 4"),
    "negative": (PACKED, {"cu_seqlens_q": int_tensor(0, -5, 4)}, "cu_seqlens_q: .*before -5"),
    "not 0 first": (PACKED, {"cu_seqlens_k": int_tensor(1, 4, 6)}, "cu_seqlens_k: .*0 first"),
    "past the end": (PACKED, {"cu_seqlens_k": int_tensor(0, 4, 13)}, "cu_seqlens_k: .*12.*got 13"),
    "used": (PACKED, {"seqused_k": int_tensor(5, 8)}, r"seqused_k: .*\[0, 7\], got 8"),
    "negative used": (PACKED, {"seqused_k": int_tensor(-1, 5)}, "seqused_k: .*got -1"),
    "page": (PAGED, {"block_table": int_tensor([0, 1], [2, 6])}, r"block_table: .*\[0, 6\), got 6"),
    "negative page": (PAGED, {"block_table": int_tensor([0, -1], [2, 3])}, "block_table: .*-1"),
    "pages hold less": (PAGED, {"seqused_k": int_tensor(8, 9)}, r"seqused_k: .*\[0, 8\], got 9"),
    "offsets of pages": (
        PAGED | {"query": QUERY},
        {"cu_seqlens_q": offsets([4, 6]), "cu_seqlens_k": offsets([8, 9])},
        "cu_seqlens_k: .*8.*got 9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_refused(name):
    valid, changes, message = WRONG[name]
    for _ in range(2):  # also when the plan is known
        with pytest.raises(ArgumentValueError, match="^" + message):
            attention(**valid | changes, backend="cpu")


def test_lengths_need_not_be_contiguous():
    spread = {
        name: PACKED[name].repeat_interleave(2)[::2] for name in ("cu_seqlens_q", "cu_seqlens_k")
    }
    assert torch.equal(attention(**PACKED | spread), attention(**PACKED))
    turned = PAGED["block_table"].T.contiguous().T
    assert torch.equal(attention(**PAGED | {"block_table": turned}), attention(**PAGED))


def test_no_sequences_and_no_tokens():
    empty = PACKED | {"cu_seqlens_q": offsets([]), "cu_seqlens_k": offsets([])}
    out, lse = attention(**empty, return_lse=True, backend="cpu")
    assert (out == 0).all() and (lse == -float("inf")).all() and out.shape == (10, 2, 8)
    none = {name: x[:0] for name, x in PACKED.items() if x.is_floating_point()}
    out = attention(**none, cu_seqlens_q=offsets([0]), cu_seqlens_k=offsets([0]), backend="cpu")
    assert out.shape == (0, 2, 8)


# -- Everything else ---------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [LENGTHS, DECODED], ids=["prompts", "decode"])
def test_bits_do_not_depend_on_threads(isa, lengths):
    Sq, Sk = zip(*lengths, strict=True)
    query, key = torch.randn(sum(Sq), 4, 64), torch.randn(sum(Sk), 2, 64)
    cu = {"cu_seqlens_q": offsets(Sq), "cu_seqlens_k": offsets(Sk)}
    leaves = [x.requires_grad_() for x in (query, key)]
    results = []
    for threads in (1, 2, 3):
        with testing.num_threads(threads):
            out = attention(query, key, key, **cu, causal="bottom_right")
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("call", [PACKED, PAGED], ids=["packed", "paged"])
def test_operators(call):
    arguments = dict(call) | {"scale": 0.3, "causal": 2, "window_left": -1, "window_right": -1}
    arguments["precision"] = 0
    forward = torch.ops.fused_attention.attention_forward.default
    opcheck(forward, (), arguments)
    out, lse = forward(**arguments)
    arguments |= {"grad_out": torch.randn_like(out), "out": out, "lse": lse}
    backward = torch.ops.fused_attention.attention_backward.default
    for grad_lse in (None, torch.randn_like(lse.T).T):
        opcheck(backward, (), arguments | {"grad_lse": grad_lse})
    for name in ("grad_out", "out", "lse"):
        with pytest.raises(RuntimeError, match=name):
            backward(**arguments | {name: arguments[name][..., :-1], "grad_lse": None})


def test_no_gradients_through_returned_weights_of_packed_sequences():
    call = PACKED | {"scale": 0.3, "causal": 0, "window_left": -1, "window_right": -1}
    call["precision"] = 0
    out, lse = torch.ops.fused_attention.attention_forward.default(**call)
    call |= {"grad_out": out, "grad_lse": None, "out": out, "lse": lse}
    with pytest.raises(RuntimeError, match="grad_weights: expected none beside cu_seqlens_q"):
        torch.ops.fused_attention.attention_backward.default(**call, grad_weights=out)


@pytest.mark.parametrize("call", [PACKED, PAGED], ids=["packed", "paged"])
def test_compiles(call):
    def function(**call):
        return attention(**call, causal="bottom_right", return_lse=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        leaves = {x: call[x].detach().requires_grad_() for x in ("query", "key", "value")}
        out, lse = run(**call | leaves)
        loss = out.square().sum() + lse[lse.isfinite()].sum()
        results.append((out, lse, *torch.autograd.grad(loss, list(leaves.values()))))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("call", [PACKED, PAGED], ids=["packed", "paged"])
def test_vmap_is_one_call_per_sample(call):
    queries = torch.randn(3, *call["query"].shape)
    rest = {name: x for name, x in call.items() if name != "query"}
    op = torch.ops.fused_attention.attention_forward.default

    def function(query):
        return op(query, rest["key"], rest["value"], 0.3, 0, -1, -1, 0, **{
            name: x for name, x in rest.items() if name not in ("key", "value")
        })  # fmt: skip

    for i, (out, lse) in enumerate(zip(*torch.vmap(function)(queries), strict=True)):
        want, want_lse = function(queries[i])
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
