"""Checks of packed sequences, used lengths and pages: the correctness rule is applied to each
sequence as a call of its own, whatever lies beside it.

test_gpu.py puts a function that computes on a GPU in place of `attention`.
"""

import dataclasses
import itertools

import torch

from fused_attention import attention, explain
from fused_attention.tools import testing
from fused_attention.tools.testing import Case

int32 = torch.int32

# (queries, keys): none, one, fewer queries than keys and more, and queries without keys.
LENGTHS = [(5, 7), (0, 3), (130, 200), (1, 64), (48, 0), (49, 100), (96, 31), (0, 0), (2, 500)]

DECODED = [(1, 7), (1, 0), (0, 5), (1, 200), (1, 2100), (1, 64), (1, 1)]

SCALE_ONLY = Case(Hq=4, Hkv=2, D=24, Dv=40)

OPTIONS = {
    "plain": SCALE_ONLY,
    "top left": dataclasses.replace(SCALE_ONLY, causal="top_left"),
    "bottom right": dataclasses.replace(SCALE_ONLY, causal="bottom_right"),
    "window": dataclasses.replace(SCALE_ONLY, causal="bottom_right", window_size=(40, 0)),
    "window of both sides": dataclasses.replace(SCALE_ONLY, window_size=(9, 70)),
    "window at the bottom right": dataclasses.replace(
        SCALE_ONLY, window_size=(9, 30), diagonal="bottom_right"
    ),
    "all the rest": dataclasses.replace(
        SCALE_ONLY,
        causal="bottom_right",
        softcap=3.0,
        alibi="BH",
        sinks=True,
        scale=-0.3,
        memory_format="BSHD",
    ),
}

SCORES = {
    "mask and padding": dataclasses.replace(SCALE_ONLY, mask="BHQK", key_padding=True),
    "bias": dataclasses.replace(SCALE_ONLY, bias="1HQK", causal="bottom_right"),
    "biases and masks of keys": dataclasses.replace(SCALE_ONLY, mask="B11K", bias="BH1K"),
}

NAN = float("nan")


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=int32)


def check_sequence(inputs, out, lse):
    """Checks one sequence. inputs: its dense call, [1, H, S, D]."""
    got = {"out": out, "lse": lse}
    if inputs.tensors["query"].shape[2] == 0:
        assert out.numel() == lse.numel() == 0
        return
    wrong = testing.errors(got, testing.exact(inputs), testing.naive(inputs))
    assert not [e.message for e in wrong if e.is_wrong]


def to_pages(x, page_size, numbers):
    """Copies x [B, H, S, D] to the pages of table `numbers` [B, max_pages], NaN elsewhere."""
    B, H, S, D = x.shape
    pages = torch.full((int(numbers.max()) + 2, page_size, H, D), NAN, dtype=x.dtype)
    for b in range(B):
        for n in range(S):
            pages[numbers[b, n // page_size], n % page_size] = x[b, :, n]
    return pages


def table(B, page_size, room):
    max_pages = -(-room // page_size)
    return torch.randperm(B * max_pages).view(B, max_pages).to(int32)


def packed_call(case, lengths, page_size):
    """Returns the dense call of each sequence, and the packed call of all, with NaN wherever no
    sequence reads."""
    each = [
        testing.make_inputs(dataclasses.replace(case, B=1, Sq=Sq, Sk=Sk, seed=seed))
        for seed, (Sq, Sk) in enumerate(lengths)
    ]
    sinks = {"sinks": each[0].tensors["sinks"]} if case.sinks else {}
    each = [dataclasses.replace(x, tensors=x.tensors | sinks) for x in each]

    def packed(tensor):
        return with_dirt([x.tensors[tensor][0].transpose(0, 1) for x in each])

    call = {"query": packed("query"), **sinks}
    call |= {
        "cu_seqlens_q": offsets(lengths_q(lengths)),
        "cu_seqlens_k": offsets(lengths_k(lengths)),
    }
    if page_size is None:
        call |= {name: packed(name) for name in ("key", "value")}
    else:
        longest = max(lengths_k(lengths))
        numbers = table(len(lengths), page_size, longest)
        for name in ("key", "value"):
            rows = torch.cat([pad(x.tensors[name], longest) for x in each])
            call[name] = to_pages(rows, page_size, numbers)
        call["block_table"] = numbers
    call |= {k: v for k, v in each[0].keywords.items() if k != "alibi_slopes"}
    if case.alibi:
        call["alibi_slopes"] = torch.cat([x.options["alibi_slopes"] for x in each])
    return each, call


def lengths_q(lengths):
    return [Sq for Sq, _ in lengths]


def lengths_k(lengths):
    return [Sk for _, Sk in lengths]


def with_dirt(parts, dim=0):
    """Concatenates along `dim`, with three tokens of NaN at the end that belong to no sequence."""
    shape = [3 if i == dim else size for i, size in enumerate(parts[0].shape)]
    return torch.cat([*parts, parts[0].new_full(shape, NAN)], dim)


def from_pages(pages, numbers, room):
    """Returns what `to_pages` took, [B, H, room, D]."""
    return pages[numbers].flatten(1, 2)[:, :room].transpose(1, 2)


def differentiate(call, grad_out, grad_lse):
    """Returns gradients by name. grad_out and grad_lse may be NaN where no sequence lies."""
    names = ("query", "key", "value", "bias", "sinks")
    leaves = {x: call[x].detach().requires_grad_() for x in names if x in call}
    results = attention(**call | leaves, return_lse=True, backend="cpu")
    gradients = torch.autograd.grad(results, list(leaves.values()), (grad_out, grad_lse))
    return {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def check_gradients(each):
    """Checks sequences together: [(the dense call of one, its gradients by name), ...]."""

    def together(results):
        names = set.intersection(*map(set, results))
        return {name: torch.cat([x[name].flatten() for x in results]) for name in sorted(names)}

    want = [testing.exact(inputs) for inputs, _ in each]
    naive = [testing.naive(inputs) for inputs, _ in each]
    dtype = each[0][0].grad_out.dtype  # the dtype of out sets the floor of the rule
    got = together(
        [own | {"out": x["out"].to(dtype)} for (_, own), x in zip(each, want, strict=True)]
    )
    naive = tuple(map(together, zip(*naive, strict=True)))
    wrong = testing.errors(got, together(want), naive)
    assert not [e.message for e in wrong if e.is_wrong]


def pad(x, length):
    """Pads x [1, H, S, D] with NaN to `length` tokens."""
    rest = torch.full((1, x.shape[1], length - x.shape[2], x.shape[3]), NAN, dtype=x.dtype)
    return torch.cat([x, rest], 2)


def alone(inputs, b, used):
    """Returns the call of sequence b alone, of a batch of 4, with only the keys that it uses."""
    room = inputs.tensors["key"].shape[2]

    def own(name, x):
        if not isinstance(x, torch.Tensor) or name == "sinks":
            return x
        if x.shape[0] == 4:
            x = x[b : b + 1]
        if name in ("key", "value"):
            return x[:, :, :used]
        return x[..., :used] if x.shape[-1] == room else x

    return dataclasses.replace(
        inputs,
        tensors={name: own(name, x) for name, x in inputs.tensors.items()},
        options={name: own(name, x) for name, x in inputs.options.items()},
        grad_out=inputs.grad_out[b : b + 1],
        grad_lse=inputs.grad_lse[b : b + 1],
    )


def check_packed(name, dtype, lengths, page_size):
    each, call = packed_call(dataclasses.replace(OPTIONS[name], dtype=dtype), lengths, page_size)
    kernel = explain(**call, max_seqlen_q=max(lengths)[0]).details.kernel
    first = "attention_decode" if lengths is DECODED else "attention_decode + attention_forward"
    assert kernel.startswith(first)
    out, lse = attention(**call, return_lse=True, backend="cpu")
    tokens, cu_q = call["query"].shape[0], call["cu_seqlens_q"]
    assert out.shape == (tokens, 4, call["value"].shape[-1]) and lse.shape == (4, tokens)
    for inputs, begin, end in zip(each, cu_q[:-1], cu_q[1:], strict=True):
        check_sequence(inputs, out[begin:end].transpose(0, 1)[None], lse[None, :, begin:end])
    assert (out[cu_q[-1] :] == 0).all() and (lse[:, cu_q[-1] :] == -float("inf")).all()


def check_gradients_of_packed(name, page_size):
    dtype = testing.DTYPES[(len(name) + (page_size or 0)) % 4]
    case = dataclasses.replace(OPTIONS[name], dtype=dtype)
    each, call = packed_call(case, LENGTHS, page_size)
    seen = [
        testing.exact(x)["lse"].isfinite() if Sq else None
        for x, (Sq, _) in zip(each, LENGTHS, strict=True)
    ]
    each = [
        x if finite is None else dataclasses.replace(x, grad_lse=x.grad_lse.where(finite, 0.0))
        for x, finite in zip(each, seen, strict=True)
    ]
    grad_out = with_dirt([x.grad_out[0].transpose(0, 1) for x in each])
    grad_lse = with_dirt([x.grad_lse[0] for x in each], dim=1)
    got = differentiate(call, grad_out, grad_lse)
    cu_q, cu_k = call["cu_seqlens_q"], call["cu_seqlens_k"]
    assert (got["dquery"][cu_q[-1] :] == 0).all()
    gradients = []
    for b, (inputs, (Sq, Sk)) in enumerate(zip(each, LENGTHS, strict=True)):
        if Sq == 0 or Sk == 0:
            continue
        own = {"dquery": got["dquery"][cu_q[b] : cu_q[b + 1]].transpose(0, 1)[None]}
        for part in ("dkey", "dvalue"):
            if page_size is None:
                own[part] = got[part][cu_k[b] : cu_k[b + 1]].transpose(0, 1)[None]
            else:
                own[part] = from_pages(got[part], call["block_table"][b : b + 1], Sk)
        gradients.append((inputs, own))
    check_gradients(gradients)
    used = sum(got[part].abs().sum((-1, -2)).count_nonzero() for part in ("dkey", "dvalue"))
    assert used <= 2 * cu_k[-1]  # the gradients are 0 everywhere else


def check_used_lengths_and_pages(name, Sq, page_size):
    used = [0, 1, 290, 333]
    room = 333 if page_size is None else -(-333 // page_size) * page_size
    dtype = testing.DTYPES[(len(name) + Sq + (page_size or 0)) % 4]  # every dtype occurs
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
            numbers[b, -(-n // page_size) :] = 2**31 - 1  # unused entries may be anything
        places["block_table"] = numbers
    given = tensors | {"key": key, "value": value}
    out, lse = attention(**given, **inputs.keywords, **places, return_lse=True, backend="cpu")
    for b, n in enumerate(used):
        check_sequence(alone(inputs, b, n), out[b : b + 1], lse[b : b + 1])


def check_gradients_of_used_lengths_and_pages(name, page_size):
    used, room = [160, 0, 290, 333], 336
    dtype = testing.DTYPES[(len(name) + (page_size or 0)) % 4]
    case = dataclasses.replace((OPTIONS | SCORES)[name], B=4, Sq=60, Sk=room, dtype=dtype)
    inputs = testing.make_inputs(case)
    call = inputs.tensors | inputs.keywords | {"seqused_k": torch.tensor(used, dtype=int32)}
    if page_size is not None:
        numbers = table(4, page_size, room)
        call |= {x: to_pages(inputs.tensors[x], page_size, numbers) for x in ("key", "value")}
        call["block_table"] = numbers
    each = [alone(inputs, b, n) for b, n in enumerate(used)]
    lse = torch.cat([testing.exact(x)["lse"] for x in each])
    grad_lse = inputs.grad_lse.masked_fill(lse.isinf(), 0.0)
    each = [dataclasses.replace(x, grad_lse=grad_lse[b : b + 1]) for b, x in enumerate(each)]
    got = differentiate(call, inputs.grad_out, grad_lse)
    gradients = []
    for b, n in enumerate(used):
        own = {"dquery": got["dquery"][b : b + 1]}
        if case.bias and case.bias[0] == "B":
            own["dbias"] = got["dbias"][b : b + 1, ..., :n]
            assert (got["dbias"][b, ..., n:] == 0).all()
        for part in ("dkey", "dvalue"):
            if page_size is None:
                own[part] = got[part][b : b + 1, :, :n]
                assert (got[part][b, :, n:] == 0).all()
            else:
                own[part] = from_pages(got[part], numbers[b : b + 1], n)
        gradients.append((each[b], own))
    check_gradients(gradients)
