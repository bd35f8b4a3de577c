"""Measures the cases of a table: time, extra memory and error of each peer, and our ratio to it.

Error: the largest of `out` against the definition in float64, over the last queries of the first
batch and key head (all of a large case would not fit); gradients are what `verify` is for.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ... import reference
from ..console import Progress, table
from ..foreign import NotOffered
from ..testing import num_threads
from .harness import Timing, extra_memory, interleave, machine, real_time_priority
from .peers import OURS, Peer, bind
from .shapes import Case, Inputs, make_inputs

ERROR_QUERIES = 256


@dataclass(frozen=True)
class Measurement:
    """Of one peer on one case; `reason` says why it has none."""

    case: str
    peer: str
    timing: Timing | None = None
    gflops: float = 0.0
    extra_bytes: int | None = None
    error: float | None = None  # None: random (dropout)
    ratio: float | None = None  # its median over ours
    reason: str = ""

    def row(self) -> list[str]:
        if self.timing is None:
            return [self.case, self.peer, "-", "-", "-", "-", "-", "-", self.reason]
        memory = "?" if self.extra_bytes is None else f"{self.extra_bytes / 2**20:.1f}"
        ratio = self.reason if self.ratio is None else f"{self.ratio:.2f}x"
        return [
            self.case,
            self.peer,
            f"{self.timing.median:.3f}",
            f"{self.timing.minimum:.3f}",
            f"{100 * self.timing.spread:.0f} %",
            f"{self.gflops:.0f}",
            memory,
            "-" if self.error is None else f"{self.error:.1e}",
            ratio,
        ]


HEADER = ["case", "peer", "median ms", "min", "spread", "GF/s", "extra MiB", "error", "ours faster"]


def exact(case: Case, inputs: Inputs) -> torch.Tensor:
    """The definition in float64, for the rows that `error_of` looks at."""
    first, group = max(0, case.Sq - ERROR_QUERIES), case.Hq // case.Hkv
    seen = case.band(first)
    if inputs.mask is not None:
        seen = seen & inputs.mask[:1]
    bias = None if inputs.bias is None else inputs.bias[:, :group, first:].detach().double()
    query = inputs.query[:1, :group, first:].detach().double()
    key, value = (x[:1, :1].detach().double() for x in (inputs.key, inputs.value))
    out = reference.attention_reference(query, key, value, mask=seen, bias=bias)
    assert isinstance(out, torch.Tensor)
    return out


def error_of(out: torch.Tensor, case: Case, want: torch.Tensor) -> float:
    first, group = max(0, case.Sq - ERROR_QUERIES), case.Hq // case.Hkv
    return (out.detach()[:1, :group, first:].double() - want).abs().max().item()


def measure(
    case: Case, peers: dict[str, Peer], seconds: float, real_time: list[bool]
) -> list[Measurement]:
    """Every peer that can do the case, interleaved."""
    inputs = make_inputs(case)
    want = None if case.dropout_p else exact(case, inputs)
    calls, errors, memory, reasons = {}, {}, {}, {}
    for name, peer in peers.items():
        try:
            out = peer(case, inputs)()
            calls[name] = bind(peer, case, inputs)
            calls[name]()
        except NotOffered as refusal:
            reasons[name] = str(refusal)
            calls.pop(name, None)
            continue
        except Exception as exception:  # of somebody else's function: anything
            calls.pop(name, None)
            message = (str(exception).strip().splitlines() or [""])[0][:60]
            reasons[name] = f"{type(exception).__name__}: {message}"
            continue
        errors[name] = None if want is None else error_of(out, case, want)
        del out
        memory[name] = extra_memory(calls[name])
    with real_time_priority() as granted:
        timings = interleave(calls, budget=seconds, min_rounds=7) if calls else {}
    real_time.append(granted)
    measured = []
    for name in peers:
        timing = timings.get(name)
        if timing is None:
            measured.append(Measurement(case.name, name, reason=reasons[name]))
            continue
        ratio, reason = compare(timings.get(OURS), timing)
        measured.append(
            Measurement(
                case.name,
                name,
                timing,
                gflops=case.flops() / timing.median / 1e6,
                extra_bytes=memory[name],
                error=errors[name],
                ratio=ratio,
                reason=reason,
            )
        )
    return measured


def compare(ours: Timing | None, theirs: Timing) -> tuple[float | None, str]:
    """Their median over ours, or why that would mean nothing."""
    if ours is None or ours is theirs:
        return None, ""
    if ours.disturbed or theirs.disturbed:
        share = min(t.minimum / t.median for t in (ours, theirs))
        return None, f"refused: min is {share:.2f} of median"
    return theirs.median / ours.median, ""


@dataclass(frozen=True)
class Report:
    threads: int
    real_time: bool
    measurements: list[Measurement]

    def as_json(self) -> dict[str, Any]:
        def finite(x: Any) -> Any:
            return None if isinstance(x, float) and not math.isfinite(x) else x

        rows = [
            {name: finite(x) for name, x in asdict(measurement).items()}
            for measurement in self.measurements
        ]
        return {
            "threads": self.threads,
            "real_time_priority": self.real_time,
            "machine": machine(),
            "measurements": rows,
        }

    def __str__(self) -> str:
        rows, last = [], ""
        for measurement in self.measurements:
            row = measurement.row()
            rows.append([row[0] if row[0] != last else "", *row[1:]])
            last = row[0]
        priority = (
            "at real-time priority"
            if self.real_time
            else "at normal priority: real time needs root"
        )
        refused = sum(m.reason.startswith("refused") for m in self.measurements)
        lines = [table(HEADER, rows), f"{self.threads} threads, interleaved, {priority}."]
        if refused:
            lines.append(
                f"{refused} ratios refused: something else kept the machine busy, and the minimum"
                " is below 0.7 of the median."
            )
        return "\n".join(lines)


def bench(
    cases: Iterable[Case],
    peers: dict[str, Peer],
    *,
    seconds: float,
    threads: int,
    step: Progress = lambda text: None,
) -> Report:
    """Measures every case with every peer; `step` is called after each case."""
    measurements: list[Measurement] = []
    real_time: list[bool] = []
    with num_threads(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of the kernels that it cannot take
        for case in cases:
            measurements += measure(case, peers, seconds, real_time)
            step(case.name)
    return Report(threads, all(real_time), measurements)
