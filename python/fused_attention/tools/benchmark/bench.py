"""Measures the cases of a table: time, extra memory and error of each peer, and our ratio to it.

The whole table is measured in several passes, one after the other. See `harness` for the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ... import _native
from ..console import Progress
from ..testing import num_threads
from . import harness
from .harness import Interval, Timing, extra_memory, interleave, real_time_priority, timing_of
from .peers import OURS, Peer, versions
from .suites import Item, Workload
from .trial import Call, Judgement, Trial, attention_trial

PASSES = 5
MIN_ROUNDS = 1  # of a pass: `prepare` has run each call once
CEILING = "ceiling"  # the name of the ceiling's call among the calls of the peers


@dataclass(frozen=True)
class Measurement:
    """One peer on one case, or the reason why it was not measured."""

    suite: str
    case: str
    peer: str
    threads: int
    timing: Timing | None = None
    gflops: float | None = None  # None where products do not limit the speed
    of_ceiling: float | None = None  # the share of what this machine can reach
    extra_bytes: int | None = None
    error: float | None = None  # None: random (dropout), or not compared
    allowed: float | None = None  # by the correctness rule
    wrong: bool = False  # the error breaks the correctness rule
    ratio: float | None = None  # its median over ours
    interval: Interval | None = None  # of the ratio, 95 %
    reason: str = ""  # why there is no time, or no ratio

    @property
    def verdict(self) -> str:
        """Returns what the column "ratio" says: above 1 ours is faster."""
        if self.wrong:
            return "WRONG"
        if self.ratio is None or self.interval is None:
            return "busy" if self.reason.startswith("busy") else "-"
        return "level" if harness.level(self.interval) else f"{self.ratio:.2f}x"


@dataclass
class Report:
    """What one run has measured, on which machine."""

    measurements: list[Measurement] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    device: str = "cpu"
    real_time: bool = True
    interrupted: bool = False
    ceilings: dict[str, float] = field(default_factory=dict)  # GF/s by dtype and threads
    machine: dict[str, object] = field(default_factory=harness.machine)
    isa: str = field(default_factory=_native.active_isa)
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def wrong(self) -> list[Measurement]:
        return [m for m in self.measurements if m.wrong]


def prepare(item: Item, peers: dict[str, Peer], device: str) -> Trial:
    return item.make() if isinstance(item, Workload) else attention_trial(item, peers, device)


def synchronized(call: Call, device: str) -> Call:
    """Returns a call that waits until the device has finished."""
    if device == "cpu":
        return call
    module = torch.get_device_module(device)

    def run() -> object:
        result = call()
        module.synchronize()
        return result

    return run


def products(dtype: torch.dtype, device: str, threads: int) -> float:
    """Returns the GF/s of products: on registers of the CPU, or of a large matmul of a device."""
    if device == "cpu":
        with real_time_priority():
            return harness.ceiling(str(dtype).removeprefix("torch."), threads)
    x = torch.randn(8192, 8192, device=device).to(dtype)
    call = synchronized(lambda: x @ x, device)
    return 2 * 8192**3 / interleave({"matmul": call}, budget=1.0)["matmul"].minimum / 1e6


def ceiling_name(dtype: torch.dtype, threads: int) -> str:
    return f"{str(dtype).removeprefix('torch.')}, {threads} threads"


Place = tuple[str, str, int]  # suite, case, threads


@dataclass
class Record:
    """What the passes have measured of one case, by peer."""

    dtype: torch.dtype
    flops: float
    memory: dict[str, int | None]
    judged: dict[str, Judgement] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # of peers that failed in any pass
    passes: list[dict[str, Timing]] = field(default_factory=list)

    def timings(self) -> dict[str, Timing]:
        """Returns the passes of each peer that ran in all of them."""
        return {
            name: timing_of([rounds for one in self.passes for rounds in one[name].passes])
            for name in self.passes[0]
            if name not in self.reasons
        }


def run_pass(trial: Trial, record: Record | None, seconds: float, report: Report) -> Record:
    """Measures every peer on one case, interleaved, and returns the record with this pass."""
    on_cpu = report.device == "cpu"
    calls = {name: synchronized(call, report.device) for name, call in trial.calls.items()}
    if record is None:
        memory = {name: extra_memory(call) if on_cpu else None for name, call in calls.items()}
        record = Record(trial.dtype, trial.flops, memory)
    if trial.ceiling is not None:
        calls[CEILING] = synchronized(trial.ceiling, report.device)
        calls[CEILING]()
    with real_time_priority() as granted:
        timings = {}
        if trial.calls:
            timings = interleave(calls, budget=seconds, min_rounds=MIN_ROUNDS, warmup=0)
    report.real_time &= granted
    record.passes.append(timings)
    record.reasons |= trial.reasons
    record.judged = trial.judged | {name: j for name, j in record.judged.items() if j.wrong}
    return record


def measurements(place: Place, record: Record, top: float | None) -> Iterator[Measurement]:
    """Yields a row for each peer. top: the ceiling in GF/s, where products limit the speed."""
    suite, case, threads = place
    timings = record.timings()
    ceiling = timings.pop(CEILING, None)
    ours = timings.get(OURS)
    if OURS in record.judged and record.judged[OURS].wrong:
        ours = None  # the time of a wrong result is no measure for others
    for name, timing in timings.items():
        judged = record.judged.get(name)
        wrong = judged is not None and judged.wrong
        ratio, interval, reason = compare(None if wrong else ours, timing)
        gflops = record.flops / timing.median / 1e6 if record.flops else None
        of_ceiling = gflops / top if gflops and top else None
        if ceiling is not None:
            of_ceiling = ceiling.median / timing.median
        yield Measurement(
            suite,
            case,
            name,
            threads,
            timing=timing,
            gflops=gflops,
            of_ceiling=of_ceiling,
            extra_bytes=record.memory.get(name),
            error=judged.error if judged else None,
            allowed=judged.allowed if judged else None,
            wrong=wrong,
            ratio=ratio,
            interval=interval,
            reason=reason,
        )
    for name, reason in record.reasons.items():
        yield Measurement(suite, case, name, threads, reason=reason)


def compare(ours: Timing | None, theirs: Timing) -> tuple[float | None, Interval | None, str]:
    """Returns their median over ours with its interval, or why that would mean nothing."""
    if ours is None or ours is theirs:
        return None, None, ""
    if ours.disturbed or theirs.disturbed:
        share = min(t.minimum / t.median for t in (ours, theirs))
        return None, None, f"busy: min is {share:.2f} of median"
    return theirs.median / ours.median, harness.ratio_interval(theirs, ours), ""


def bench(
    tables: dict[str, list[Item]],
    peers: dict[str, Peer],
    *,
    seconds: float,
    threads: Sequence[int],
    device: str = "cpu",
    step: Progress = lambda text: None,
) -> Report:
    """Measures every case of every table with each number of threads; `seconds` is for one case.

    Calls `step` after each case of each of the PASSES passes. An interrupt (Ctrl-C) ends it: the
    report then has the passes that were finished.
    """
    report = Report(threads=list(threads), device=device)
    records: dict[Place, Record] = {}

    def run(suite: str, item: Item, count: int) -> None:
        place = suite, item.name, count
        with num_threads(count):
            trial = prepare(item, peers, device)
            kind = ceiling_name(trial.dtype, count)
            if trial.flops and kind not in report.ceilings:
                report.ceilings[kind] = products(trial.dtype, device, count)
            records[place] = run_pass(trial, records.get(place), seconds / PASSES, report)
        step(item.name)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns about kernels that it cannot use
            for _ in range(PASSES):
                for count in threads:
                    for suite, table in tables.items():
                        for item in table:
                            run(suite, item, count)
    except KeyboardInterrupt:
        report.interrupted = True
    for place, record in records.items():
        top = report.ceilings.get(ceiling_name(record.dtype, place[2]))
        report.measurements += measurements(place, record, top)
    return report
