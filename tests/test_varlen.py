"""Packed sequences, used lengths and pages: each sequence is a call of its own, whatever lies
beside it. The correctness rule is applied to the sequences one by one."""

import dataclasses
import itertools

import pytest
import torch
from torch.library import opcheck

from fused_attention import ArgumentValueError, attention, explain, testing
from fused_attention.testing import Case

int32 = torch.int32
# Queries and keys of the sequences: none, one, fewer queries than keys and more, none seen.
LENGTHS = [(5, 7), (0, 3), (130, 200), (1, 64), (48, 0), (49, 100), (96, 31), (0, 0), (2, 500)]
DECODED = [(1, 7), (1, 0), (0, 5), (1, 200), (1, 2100), (1, 64), (1, 1)]
PLAIN = Case(Hq=4, Hkv=2, D=24, Dv=40)
OPTIONS = {
    "plain": PLAIN,
    "top left": dataclasses.replace(PLAIN, causal="top_left"),
    "bottom right": dataclasses.replace(PLAIN, causal="bottom_right"),
    "window": dataclasses.replace(PLAIN, causal="bottom_right", window_size=(40, 0)),
    "window of both sides": dataclasses.replace(PLAIN, window_size=(9, 70)),
    "all the rest": dataclasses.replace(
        PLAIN, causal="bottom_right", softcap=3.0, alibi="BH", sinks=True, scale=-0.3, layout="BSHD"
    ),
}
SCORES = {
    "mask and padding": dataclasses.replace(PLAIN, mask="BHQK", key_padding=True),
    "bias": dataclasses.replace(PLAIN, bias="1HQK", causal="bottom_right"),
    "biases and masks of keys": dataclasses.replace(PLAIN, mask="B11K", bias="BH1K"),
}
NAN = float("nan")


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=int32)


def check_sequence(inputs, out, lse):
    """`inputs`: the dense call of one sequence, [1, H, S, D]."""
    got = {"out": out, "lse": lse}
    if inputs.tensors["query"].shape[2] == 0:
        assert out.numel() == lse.numel() == 0
        return
    wrong = testing.errors(got, testing.exact(inputs), testing.naive(inputs))
    assert not [e.message for e in wrong if e.is_wrong]


def to_pages(x, page_size, numbers):
    """x [B, H, S, D] in the pages of table `numbers` [B, max_pages], NaN everywhere else."""
    B, H, S, D = x.shape
    pages = torch.full((int(numbers.max()) + 2, page_size, H, D), NAN, dtype=x.dtype)
    for b in range(B):
        for n in range(S):
            pages[numbers[b, n // page_size], n % page_size] = x[b, :, n]
    return pages


def table(B, page_size, room):
    max_pages = -(-room // page_size)
    return torch.randperm(B * max_pages).view(B, max_pages).to(int32)


# -- Packed ------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [None, 7, 64])
@pytest.mark.parametrize("lengths", [LENGTHS, DECODED], ids=["prompts", "decode"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_packed(isa, name, dtype, lengths, page_size):
    each = [
        testing.make_inputs(
            dataclasses.replace(OPTIONS[name], B=1, Sq=Sq, Sk=Sk, dtype=dtype, seed=seed)
        )
        for seed, (Sq, Sk) in enumerate(lengths)
    ]
    sinks = {"sinks": each[0].tensors["sinks"]} if OPTIONS[name].sinks else {}
    each = [dataclasses.replace(x, tensors=x.tensors | sinks) for x in each]

    def packed(tensor, dirt):  # with tokens behind the last sequence, of none
        parts = [x.tensors[tensor][0].transpose(0, 1) for x in each]
        return torch.cat([*parts, torch.full_like(parts[2][:3], dirt)])

    query = packed("query", NAN)
    cu_q, cu_k = (offsets(x) for x in zip(*lengths, strict=True))
    places = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    if page_size is None:
        key, value = packed("key", NAN), packed("value", NAN)
    else:
        longest = max(Sk for _, Sk in lengths)
        numbers = table(len(lengths), page_size, longest)
        key, value = (
            to_pages(torch.cat([pad(x.tensors[tensor], longest) for x in each]), page_size, numbers)
            for tensor in ("key", "value")
        )
        places["block_table"] = numbers
    options = {k: v for k, v in each[0].keywords.items() if k != "alibi_slopes"} | sinks
    if OPTIONS[name].alibi:
        options["alibi_slopes"] = torch.cat([x.options["alibi_slopes"] for x in each])
    kernel = explain(query, key, value, **places, **options, max_seqlen_q=max(lengths)[0]).details
    assert kernel.kernel.startswith(
        "attention_decode" if lengths is DECODED else "attention_forward"
    )
    out, lse = attention(query, key, value, **places, **options, return_lse=True, backend="cpu")
    assert out.shape == (query.shape[0], 4, 40) and lse.shape == (4, query.shape[0])
    for inputs, begin, end in zip(each, cu_q[:-1], cu_q[1:], strict=True):
        check_sequence(inputs, out[begin:end].transpose(0, 1)[None], lse[None, :, begin:end])
    assert (out[cu_q[-1] :] == 0).all() and (lse[:, cu_q[-1] :] == -float("inf")).all()


def pad(x, length):
    """x [1, H, S, D] with NaN up to `length` tokens."""
    rest = torch.full((1, x.shape[1], length - x.shape[2], x.shape[3]), NAN, dtype=x.dtype)
    return torch.cat([x, rest], 2)


def test_packed_is_dense_where_all_lengths_are_equal(isa):
    """Bit for bit, so dropout counts sequences as it does the batch."""
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


@pytest.mark.parametrize("page_size", [None, 1, 5, 16, 64, 256])
@pytest.mark.parametrize("Sq", [1, 3, 60])
@pytest.mark.parametrize("name", OPTIONS | SCORES)
def test_used_lengths_and_pages(isa, name, Sq, page_size):
    used = [0, 1, 290, 333]
    room = 333 if page_size is None else -(-333 // page_size) * page_size
    dtype = testing.DTYPES[(len(name) + Sq + (page_size or 0)) % 4]  # every one of them somewhere
    case = dataclasses.replace((OPTIONS | SCORES)[name], B=4, Sq=Sq, Sk=room, dtype=dtype)
    inputs = testing.make_inputs(case)
    tensors = inputs.tensors
    places = {"seqused_k": torch.tensor(used, dtype=int32)}
    key, value = tensors["key"].clone(), tensors["value"].clone()
    for b, n in enumerate(used):
        key[b, :, n:] = value[b, :, n:] = NAN
    if page_size is not None:
        numbers = table(4, page_size, room)
        key, value = (to_pages(x, page_size, numbers) for x in (key, value))
        for b, n in enumerate(used):
            numbers[b, -(-n // page_size) :] = 2**31 - 1  # not in use: anything
        places["block_table"] = numbers
    given = tensors | {"key": key, "value": value}
    out, lse = attention(**given, **inputs.keywords, **places, return_lse=True, backend="cpu")
    for b, n in enumerate(used):
        # The same call with this sequence alone
        own = {
            name: (x if name == "sinks" or x.shape[0] == 1 else x[b : b + 1])
            for name, x in tensors.items()
        }
        options = {
            name: (x[b : b + 1] if isinstance(x, torch.Tensor) and x.shape[0] == 4 else x)
            for name, x in inputs.options.items()
        }
        for part in ("key", "value"):
            own[part] = own[part][:, :, :n]
        for where, part in ((own, "bias"), (options, "mask"), (options, "key_padding_mask")):
            if part in where and where[part].shape[-1] == room:
                where[part] = where[part][..., :n]
        one = dataclasses.replace(
            inputs,
            tensors=own,
            options=options,
            grad_out=inputs.grad_out[b : b + 1],
            grad_lse=inputs.grad_lse[b : b + 1],
        )
        check_sequence(one, out[b : b + 1], lse[b : b + 1])


# -- Whatever the lengths hold -----------------------------------------------------------

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
    results = []
    for threads in (1, 2, 3):
        with testing.num_threads(threads):
            results.append(attention(query, key, key, **cu, causal="bottom_right"))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("call", [PACKED, PAGED], ids=["packed", "paged"])
def test_operator(call):
    arguments = dict(call) | {"scale": 0.3, "causal": 2, "window_left": -1, "window_right": -1}
    opcheck(torch.ops.fused_attention.attention_forward.default, (), arguments | {"precision": 0})


@pytest.mark.parametrize("call", [PACKED, PAGED], ids=["packed", "paged"])
def test_compiles(call):
    def function(**call):
        return attention(**call, causal="bottom_right", return_lse=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(**call), function(**call), strict=True):
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
