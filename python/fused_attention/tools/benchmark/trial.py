"""One case, ready to be measured: a call for each peer, whether its result is right, its ceiling.

A result is right if it keeps the correctness rule of `tools.testing`: the maximum and the rms of
its error may be twice those of the naive maths, plus four units in the last place. The last queries
of the first batch and key head are compared, since all of a large case would not fit in memory.
Gradients are checked by `verify`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ... import reference
from .. import testing
from ..foreign import NotOffered
from .peers import Peer, whole
from .shapes import Case, Inputs, make_inputs

ERROR_QUERIES = 256
# What float32 may be off with precision "high", which multiplies bfloat16 pairs.
HIGH = {"max": 6e-5, "rms": 2e-6}

Call = Callable[[], object]


@dataclass(frozen=True)
class Judgement:
    """The largest error of a result, how large it may be, and whether the rule is broken."""

    error: float
    allowed: float
    wrong: bool


@dataclass
class Trial:
    """Holds the calls of a case. Peers that cannot run it have a reason in place of a call."""

    dtype: torch.dtype
    flops: float = 0.0  # the operations of the matrix products; 0 if they do not limit the speed
    # Reads or copies the same bytes, or is the cheapest call of its kind: it takes part in the
    # rounds, and is the ceiling in place of the rate of products.
    ceiling: Call | None = None
    calls: dict[str, Call] = field(default_factory=dict)
    judged: dict[str, Judgement] = field(default_factory=dict)  # none for random results
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, peer: str, make: Callable[[], tuple[Call, Judgement | None]]) -> None:
        """Adds the call that `make` returns, or the reason why it cannot run.

        `make` has run the call once, so that it is warm.
        """
        try:
            call, judgement = make()
        except NotOffered as refusal:
            self.reasons[peer] = str(refusal)
        except Exception as exception:  # functions of others may raise anything
            message = (str(exception).strip().splitlines() or [""])[0][:60]
            self.reasons[peer] = f"{type(exception).__name__}: {message}"
        else:
            self.calls[peer] = call
            if judgement is not None:
                self.judged[peer] = judgement


def judge(got: Tensor, want: Tensor, naive: tuple[Tensor, ...], high: bool = False) -> Judgement:
    """Applies the correctness rule to `got`; `want` is exact, in float64."""
    found = list(testing.errors({"out": got}, {"out": want}, tuple({"out": x} for x in naive)))
    largest = max(found, key=lambda e: (e.error == math.inf, e.measure == "max"))
    allowed = {e.measure: max(e.allowed, HIGH.get(e.measure, 0.0) * high) for e in found}
    wrong = any(not e.error <= allowed[e.measure] for e in found)
    return Judgement(largest.error, allowed[largest.measure], wrong)


def _rows(case: Case, inputs: Inputs) -> tuple[testing.Results, Tensor]:
    """Returns the tensors of the compared rows, and which keys they see: [1, 1 or H, rows, Sk]."""
    first, group = max(0, case.Sq - ERROR_QUERIES), case.Hq // case.Hkv
    seen = case.band(first)
    if inputs.mask is not None:
        mask = inputs.mask[:1].cpu()
        seen = seen & (mask if mask.shape[2] == 1 else mask[:, :, first:])
    tensors = {
        "query": inputs.query[:1, :group, first:],
        "key": inputs.key[:1, :1],
        "value": inputs.value[:1, :1],
    }
    if inputs.bias is not None:
        tensors["bias"] = inputs.bias[:, :group, first:]
    return {name: x.detach().cpu() for name, x in tensors.items()}, seen


def exact(case: Case, inputs: Inputs) -> Tensor:
    """Returns the definition in float64 for the rows that are compared."""
    tensors, seen = _rows(case, inputs)
    leaves = {name: x.double() for name, x in tensors.items()}
    query, key, value = (leaves.pop(name) for name in ("query", "key", "value"))
    out = reference.attention_reference(query, key, value, mask=seen, bias=leaves.get("bias"))
    assert isinstance(out, Tensor)
    return out


def naive_rows(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """Returns the naive maths in two orders of summation, for the rows that are compared."""
    tensors, seen = _rows(case, inputs)
    options = {"causal": False, "window_size": (-1, -1), "scale": None, "softcap": 0.0}
    shape = (*tensors["query"].shape[:3], case.Dv)
    gradients = torch.zeros(shape), torch.zeros(shape[:3])
    rows = testing.Inputs(tensors, options | {"dropout_p": 0.0, "mask": seen}, *gradients)
    return tuple(answer["out"] for answer in testing.naive(rows))


def compared_rows(out: Tensor, case: Case) -> Tensor:
    """Returns the rows that are compared of a result, [B, Hq, Sq, Dv] or packed [T, Hq, Dv]."""
    if case.lengths and out.dim() == 3:
        out = out[: case.Sq].transpose(0, 1).unsqueeze(0)
    first, group = max(0, case.Sq - ERROR_QUERIES), case.Hq // case.Hkv
    return out.detach()[:1, :group, first:].cpu()


def error_of(out: Tensor, case: Case, want: Tensor) -> float:
    return (compared_rows(out, case).double() - want).abs().max().item()


def attention_trial(case: Case, peers: dict[str, Peer], device: str = "cpu") -> Trial:
    """Prepares every peer for a case of attention."""
    inputs = make_inputs(case, device=device)
    trial = Trial(case.dtype, 0.0 if case.decodes else float(case.flops()))
    if case.decodes:
        words = torch.randn(case.bytes_of_cache() // 4, device=device)
        trial.ceiling = words.sum
    expected = None
    if not case.dropout_p:
        expected = exact(case, inputs), naive_rows(case, inputs)
    shapes = {(case.B, case.Hq, case.Sq, case.Dv), (sum(case.lengths), case.Hq, case.Dv)}

    def make(peer: Peer) -> tuple[Call, Judgement | None]:
        forward = peer(case, inputs)
        out = forward()
        judgement = None
        if not isinstance(out, Tensor) or tuple(out.shape) not in shapes:
            judgement = Judgement(math.inf, 0.0, True)
        elif expected is not None:
            rows = compared_rows(out, case)
            judgement = judge(rows, *expected, high=case.precision == "high")
        call = whole(forward, case, inputs)
        if case.backward:
            call()
        return call, judgement

    for name, peer in peers.items():
        trial.add(name, lambda peer=peer: make(peer))  # type: ignore[misc]
    return trial
