"""Sequences of different lengths, packed or in pages, and the check of operators on them.

Each sequence is a call of its own, whatever lies beside it: the correctness rule is applied to the
sequences one by one, forward and backward.
"""

import dataclasses
import itertools
import math

import torch

from fused_attention.tools import testing
from fused_attention.tools.testing import Case
from operator_calls import arguments

NAN = math.nan
int32 = torch.int32

# (queries, keys): none, one, fewer queries than keys and more, and queries without keys.
LENGTHS = [(5, 7), (0, 3), (33, 20), (1, 34), (18, 0), (0, 0), (2, 50)]

DECODED = [(1, 7), (1, 0), (0, 5), (1, 50), (1, 16), (1, 1)]

SAME = [(19, 0), (19, 1), (19, 29), (19, 33)]

ROOM = 50

SCALE_ONLY = Case(Hq=4, Hkv=2, D=12, Dv=20, B=1)

OPTIONS = {
    "plain": SCALE_ONLY,
    "top left": dataclasses.replace(SCALE_ONLY, causal="top_left", Hq=2),
    "window": dataclasses.replace(SCALE_ONLY, causal="bottom_right", window_size=(14, 0)),
    "all the rest": dataclasses.replace(
        SCALE_ONLY, causal="bottom_right", softcap=3.0, alibi="BH", scale=-0.3, sinks=True, Hq=2
    ),
}


@dataclasses.dataclass
class Packing:
    """How the tokens of sequences lie together, and where to find them again."""

    lengths: list[tuple[int, int]]
    packed: bool = True
    page_size: int | None = None
    used: bool = False  # whether there are more keys than are used
    rest: int = 3  # tokens behind the last sequence, which belong to none

    def __post_init__(self):
        Sq, self.Sk = zip(*self.lengths, strict=True)
        self.q_starts = [0, *itertools.accumulate(Sq)]
        self.rooms = [n + 4 * self.used for n in self.Sk]
        self.k_starts = [0, *itertools.accumulate(self.rooms)]
        if self.page_size:
            B, width = len(self.lengths), -(-ROOM // self.page_size)
            self.table = torch.randperm(B * width + 1)[: B * width].view(B, width).to(int32)
            for b, n in enumerate(self.Sk):
                self.table[b, -(-n // self.page_size) :] = 2**31 - 1  # unused: may be anything

    @property
    def arguments(self):
        """Returns the operators' arguments from cu_seqlens_q to block_table."""
        cu_q = torch.tensor(self.q_starts, dtype=int32) if self.packed else None
        cu_k = torch.tensor(self.k_starts, dtype=int32) if self.packed else None
        used = self.used or (self.page_size and not self.packed) or not self.packed
        seqused = torch.tensor(self.Sk, dtype=int32) if used else None
        longest = [max(n) for n in zip(*self.lengths, strict=True)] if self.packed else [None] * 2
        return cu_q, cu_k, *longest, seqused, self.table if self.page_size else None

    def queries(self, each):
        """Lays out [1, H, S, D] of each sequence as the operator takes query, NaN elsewhere."""
        if not self.packed:
            return torch.cat(each)
        tokens = [x[0].transpose(0, 1) for x in each]
        return torch.cat([*tokens, tokens[0].new_full((self.rest, *tokens[0].shape[1:]), NAN)])

    def keys(self, each):
        H, D, dtype = each[0].shape[1], each[0].shape[3], each[0].dtype
        B = len(each)
        if self.page_size:
            pages = B * (-(-ROOM // self.page_size)) + 1
            result = torch.full((pages, self.page_size, H, D), NAN, dtype=dtype)
        elif self.packed:
            result = torch.full((self.k_starts[-1] + self.rest, H, D), NAN, dtype=dtype)
        else:
            result = torch.full((B, H, ROOM, D), NAN, dtype=dtype)
        for b, x in enumerate(each):
            self.of_keys(result, b)[...] = x if not self.page_size else 0
            if self.page_size:
                for n in range(self.Sk[b]):
                    page = self.table[b, n // self.page_size]
                    result[page, n % self.page_size] = x[0, :, n]
        return result

    def of_queries(self, x, b):
        """Returns the part of sequence b, [1, H, S, D], of a tensor laid out like query."""
        if not self.packed:
            return x[b : b + 1]
        return x[self.q_starts[b] : self.q_starts[b + 1]].transpose(0, 1)[None]

    def of_keys(self, x, b):
        n = self.Sk[b]
        if self.page_size:
            rows = [
                x[self.table[b, j // self.page_size], j % self.page_size] for j in range(n)
            ] or [x[0, :0].sum(0)]
            return torch.stack(rows, 1)[None][:, :, :n]
        if self.packed:
            return x[self.k_starts[b] : self.k_starts[b] + n].transpose(0, 1)[None]
        return x[b : b + 1, :, :n]

    def of_rows(self, x, b):
        """Returns the part of sequence b, [1, H, S], of a tensor laid out like lse."""
        if not self.packed:
            return x[b : b + 1]
        return x[None, :, self.q_starts[b] : self.q_starts[b + 1]]


def options_together(each):
    """Returns the operators' numbers and options, in order, for all sequences at once."""
    call = list(arguments(each[0]))
    if call[8] is not None:  # alibi_slopes
        call[8] = torch.cat([x.options["alibi_slopes"] for x in each])
    return call


def check(operators, case: Case, packing: Packing) -> None:
    """Checks forward and backward by the operators of a backend."""
    each = [
        testing.make_inputs(dataclasses.replace(case, Sq=Sq, Sk=Sk, seed=seed))
        for seed, (Sq, Sk) in enumerate(packing.lengths)
    ]
    if case.sinks:
        each = [
            dataclasses.replace(x, tensors=x.tensors | {"sinks": each[0].tensors["sinks"]})
            for x in each
        ]
    query = packing.queries([x.tensors["query"] for x in each])
    key, value = (packing.keys([x.tensors[name] for x in each]) for name in ("key", "value"))
    call, places = options_together(each), packing.arguments
    out, lse = operators.attention_forward(query, key, value, *call, *places)
    grad_out = packing.queries([x.grad_out for x in each])
    grad_lse = torch.zeros_like(lse)
    for b, x in enumerate(each):
        own = packing.of_rows(grad_lse, b)
        own[...] = x.grad_lse.to(lse.dtype).masked_fill(packing.of_rows(lse, b).isinf(), 0.0)
    wanted = (False, case.sinks)
    dq, dk, dv, _, dsinks = operators.attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, *call, *places, 0, 0, 0, *wanted
    )
    assert dk.shape == key.shape and dv.shape == value.shape and dq.shape == query.shape
    exact_dsinks = 0.0
    for b, inputs in enumerate(each):
        exact = testing.exact(inputs)
        exact_dsinks = exact_dsinks + exact.pop("dsinks", 0.0)
        got = {
            "out": packing.of_queries(out, b),
            "lse": packing.of_rows(lse, b),
            "dquery": packing.of_queries(dq, b),
            "dkey": packing.of_keys(dk, b),
            "dvalue": packing.of_keys(dv, b),
        }
        if out.numel() and min(packing.lengths[b]) > 0:
            assert not testing.mismatches(got, exact, testing.naive(inputs)), (b, inputs)
        else:  # no queries or no keys
            assert all((x == 0).all() for name, x in got.items() if name != "lse")
            want = exact["lse"].to(lse.dtype).expand_as(got["lse"])
            torch.testing.assert_close(got["lse"], want)
    if case.sinks:
        torch.testing.assert_close(dsinks.double(), exact_dsinks, atol=1e-2, rtol=1e-2)
    # Tokens that belong to no sequence, or are not in use
    if packing.packed:
        end = packing.q_starts[-1]
        assert (out[end:] == 0).all() and (dq[end:] == 0).all()
        assert (lse[:, end:] == -math.inf).all()
    total = [sum(packing.of_keys(x, b).ne(0).sum() for b in range(len(each))) for x in (dk, dv)]
    assert total == [x.ne(0).sum() for x in (dk, dv)]
