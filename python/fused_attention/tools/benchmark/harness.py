"""Interleaved measurement: all calls run in turn, so that a slow moment affects each of them.

The rounds of one pass run one after another, and its result is their median. Several passes,
minutes apart and each with new tensors, see what the rounds of one pass share: the clock of that
minute, and where the memory lies. Intervals are therefore taken over passes (Student's t on the
logarithms of their medians), not over rounds. Where a median is far above its minimum, something
else kept the machine busy, and the result says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from ... import __version__, _native

Interval = tuple[float, float]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over the rounds of one or more passes."""

    median: float  # of the rounds of a pass; the geometric mean over the passes
    minimum: float
    spread: float  # (third - first quartile) / median of all rounds
    rounds: int  # of all passes
    passes: tuple[tuple[float, ...], ...] = ()  # milliseconds of each round, in order

    @property
    def disturbed(self) -> bool:
        """Says whether something else kept the machine busy during many of the rounds: then the
        median measures that, and a ratio of two medians is chance."""
        return self.minimum < 0.7 * self.median

    @property
    def logarithms(self) -> list[float]:
        """Returns the logarithm of each pass's median."""
        return [math.log(statistics.median(values)) for values in self.passes]


def timing_of(passes: Sequence[Sequence[float]]) -> Timing:
    """Summarises the milliseconds of the rounds of one or more passes."""
    values = [value for rounds in passes for value in rounds]
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if values[1:] else 3 * values
    first, middle, third = quartiles
    median = statistics.geometric_mean(map(statistics.median, passes))
    kept = tuple(tuple(rounds) for rounds in passes)
    return Timing(median, min(values), (third - first) / middle, len(values), kept)


def interleave(
    calls: dict[str, Callable[[], object]],
    *,
    budget: float = 3.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    warmup: int = 2,
    after_round: Callable[[float], None] = lambda fraction: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times every call once a round, in an order that rotates: one pass of about `budget` seconds.

    `after_round` is called with the fraction of the budget that is used, outside what is timed.
    `clock` returns seconds.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start = clock()
    for done in range(max_rounds):
        shift = done % len(names)
        for name in names[shift:] + names[:shift]:
            begin = clock()
            calls[name]()
            seconds[name].append(clock() - begin)
        elapsed = clock() - start
        after_round(min(1.0, max(elapsed / budget, (done + 1) / max_rounds)))
        if elapsed >= budget and done + 1 >= min_rounds:
            break
    return {name: timing_of([[1e3 * x for x in of]]) for name, of in seconds.items()}


# -- Intervals ---------------------------------------------------------------------------

# The 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom; the last serves all beyond.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _around(middle: float, error: float, freedom: float) -> Interval:
    """Returns exp(middle +- t * error), the 95 % interval of a ratio from its logarithm."""
    margin = QUANTILES[min(int(freedom), len(QUANTILES)) - 1] * error
    return math.exp(middle - margin), math.exp(middle + margin)


def interval(logarithms: Sequence[float]) -> Interval | None:
    """Returns the 95 % interval of exp(mean), or None for a single pass."""
    count = len(logarithms)
    if count < 2:
        return None
    error = statistics.stdev(logarithms) / math.sqrt(count)
    return _around(statistics.fmean(logarithms), error, count - 1)


def ratio_interval(above: Timing, below: Timing) -> Interval | None:
    """Returns the 95 % interval of above / below, which were measured in the same passes.

    The ratio is taken in each pass, so that what slowed both of them in a pass cancels.
    """
    pairs = zip(above.logarithms, below.logarithms, strict=True)
    return interval([a - b for a, b in pairs])


def change_interval(after: Sequence[float], before: Sequence[float]) -> Interval | None:
    """Returns the 95 % interval of exp(mean(after) - mean(before)) of two runs (Welch's t test),
    from the logarithms of their passes, or None if one of the runs had a single pass."""
    if min(len(after), len(before)) < 2:
        return None
    squares = [statistics.variance(x) / len(x) for x in (after, before)]
    total = sum(squares)
    weights = sum(s**2 / (len(x) - 1) for s, x in zip(squares, (after, before), strict=True))
    freedom = total**2 / weights if weights else 1.0
    middle = statistics.fmean(after) - statistics.fmean(before)
    return _around(middle, math.sqrt(total), freedom)


def level(between: Interval) -> bool:
    """Says whether the interval contains 1: then neither side of the ratio is faster."""
    return between[0] <= 1.0 <= between[1]


# -- The machine -------------------------------------------------------------------------


def ceiling(dtype: str, threads: int, seconds: float = 0.05) -> float:
    """Returns the GF/s of products on registers, all threads at once, the best of five tries.

    The products are those of `dtype` on the instruction set in force.
    """

    def work(rounds: int) -> float:
        done = [0.0] * threads

        def run(i: int) -> None:
            done[i] = _native.multiply_registers(dtype, rounds)

        workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
        begin = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(done) / (time.perf_counter() - begin) / 1e9

    rounds = 1000
    while True:
        begin = time.perf_counter()
        work(rounds)
        if time.perf_counter() - begin > seconds:
            return max(work(rounds) for _ in range(5))
        rounds *= 2


@contextlib.contextmanager
def real_time_priority(priority: int = 10) -> Iterator[bool]:
    """Inside, other processes do not interrupt this one; yields whether the system allowed that.

    It usually needs root.
    """

    def schedule(policy: int, value: int) -> None:
        for thread in os.listdir("/proc/self/task"):  # PyTorch's pool has threads of its own
            with contextlib.suppress(ProcessLookupError):
                os.sched_setscheduler(int(thread), policy, os.sched_param(value))

    try:
        schedule(os.SCHED_FIFO, priority)
        granted = True
    except (OSError, AttributeError):
        granted = False
    try:
        yield granted
    finally:
        if granted:
            schedule(os.SCHED_OTHER, 0)


def extra_memory(call: Callable[[], object]) -> int | None:
    """Returns the bytes that a call needs beyond its inputs and results, or None if unknown.

    This is the peak of the process's resident memory, which Linux resets on request.
    """

    def resident(field: str) -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024

    try:
        ctypes.CDLL(None).malloc_trim(0)  # else the call reuses what earlier calls have freed
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        returned = call()
        peak = resident("VmHWM")
    except (OSError, AttributeError, StopIteration):
        return None
    tensors = returned if isinstance(returned, tuple) else (returned,)
    kept = sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))
    return max(0, peak - before - kept)


def machine() -> dict[str, object]:
    """Returns what a result depends on, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    first = {name.strip(): of for name, _, of in (line.partition(": ") for line in lines[::-1])}
    return {
        "cpu": first.get("model name") or platform.processor() or platform.machine(),
        "cpu_family": first.get("cpu family"),  # the name may not tell: AMD 26 is Zen 5
        "cpu_model": first.get("model"),
        "logical_cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fused_attention": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
