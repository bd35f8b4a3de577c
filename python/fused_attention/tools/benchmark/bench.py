"""Measures the cases of a table: time, extra memory and error of each peer, and our ratio to it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ... import _native
from ..console import Progress
from ..testing import num_threads
from . import harness
from .harness import Interval, Timing, extra_memory, interleave, real_time_priority
from .peers import OURS, Peer, versions
from .suites import Item, Workload
from .trial import Call, Trial, attention_trial

MIN_ROUNDS = 9
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


def measure(
    suite: str, item: Item, peers: dict[str, Peer], seconds: float, threads: int, report: Report
) -> None:
    """Adds the measurements of every peer on one case, interleaved, to the report."""
    trial = prepare(item, peers, report.device)
    calls = {name: synchronized(call, report.device) for name, call in trial.calls.items()}
    memory = {
        name: extra_memory(call) if report.device == "cpu" else None for name, call in calls.items()
    }
    top = None
    if trial.flops:
        kind = f"{str(trial.dtype).removeprefix('torch.')}, {threads} threads"
        if kind not in report.ceilings:
            report.ceilings[kind] = products(trial.dtype, report.device, threads)
        top = report.ceilings[kind]
    rounds = dict(calls)
    if trial.ceiling is not None:
        rounds[CEILING] = synchronized(trial.ceiling, report.device)
    with real_time_priority() as granted:
        timings = interleave(rounds, budget=seconds, min_rounds=MIN_ROUNDS) if calls else {}
    report.real_time &= granted
    ours = timings.get(OURS)
    if OURS in trial.judged and trial.judged[OURS].wrong:
        ours = None  # the time of a wrong result is no measure for others
    rows = []
    for name in [*calls, *trial.reasons]:
        place = suite, item.name, name, threads
        timing = timings.get(name)
        if timing is None:
            rows.append(Measurement(*place, reason=trial.reasons[name]))
            continue
        judged = trial.judged.get(name)
        wrong = judged is not None and judged.wrong
        ratio, interval, reason = compare(None if wrong else ours, timing)
        gflops = trial.flops / timing.median / 1e6 if trial.flops else None
        of_ceiling = gflops / top if gflops and top else None
        if trial.ceiling is not None:
            of_ceiling = timings[CEILING].median / timing.median
        rows.append(
            Measurement(
                *place,
                timing=timing,
                gflops=gflops,
                of_ceiling=of_ceiling,
                extra_bytes=memory[name],
                error=judged.error if judged else None,
                allowed=judged.allowed if judged else None,
                wrong=wrong,
                ratio=ratio,
                interval=interval,
                reason=reason,
            )
        )
    report.measurements += rows  # at once, so that an interrupt leaves no part of a case


def compare(ours: Timing | None, theirs: Timing) -> tuple[float | None, Interval | None, str]:
    """Returns their median over ours with its interval, or why that would mean nothing."""
    if ours is None or ours is theirs:
        return None, None, ""
    if ours.disturbed or theirs.disturbed:
        share = min(t.minimum / t.median for t in (ours, theirs))
        return None, None, f"busy: min is {share:.2f} of median"
    interval = harness.ratio_interval(theirs.values, ours.values, paired=True)
    return theirs.median / ours.median, interval, ""


def bench(
    tables: dict[str, list[Item]],
    peers: dict[str, Peer],
    *,
    seconds: float,
    threads: Sequence[int],
    device: str = "cpu",
    step: Progress = lambda text: None,
) -> Report:
    """Measures every case of every table with each number of threads; calls `step` after a case.

    An interrupt (Ctrl-C) ends it: the report then has the cases that were finished.
    """
    report = Report(threads=list(threads), device=device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns about kernels that it cannot use
            for count in threads:
                with num_threads(count):
                    for suite, table in tables.items():
                        for item in table:
                            measure(suite, item, peers, seconds, count, report)
                            step(item.name)
    except KeyboardInterrupt:
        report.interrupted = True
    return report
