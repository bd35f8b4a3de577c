"""Interleaved measurement: all calls run in turn, so that a slow moment affects each of them.

Results are medians over the rounds. The rounds themselves are kept: `ratio_interval` resamples them
(the bootstrap; Efron 1979) to say how far a ratio of two medians can be trusted. Where a median is
far above its minimum, something else kept the machine busy, and the result says so.
"""

from __future__ import annotations

import contextlib
import ctypes
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
from torch import Tensor

from ... import __version__, _native

Interval = tuple[float, float]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over the rounds; spread = (third - first quartile) / median."""

    median: float
    minimum: float
    spread: float
    rounds: int
    values: tuple[float, ...] = ()  # milliseconds of each round, in order

    @property
    def disturbed(self) -> bool:
        """Says whether something else kept the machine busy during many of the rounds: then the
        median measures that, and a ratio of two medians is chance."""
        return self.minimum < 0.7 * self.median


def summarise(seconds: Sequence[float]) -> Timing:
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    values = tuple(value * 1e3 for value in seconds)
    return Timing(median * 1e3, min(values), (third - first) / median, len(values), values)


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
    """Times every call once a round, in an order that rotates, for about `budget` seconds.

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
    return {name: summarise(values) for name, values in seconds.items()}


# -- Intervals ---------------------------------------------------------------------------

RESAMPLES = 2000
CONFIDENCE = 0.95


def _medians(values: Sequence[float], rounds: Tensor) -> Tensor:
    """Returns the median of each row of resampled rounds: float64 [RESAMPLES]."""
    drawn = torch.tensor(values, dtype=torch.float64)[rounds].sort(-1).values
    middle = drawn.shape[-1] // 2
    return (drawn[:, middle] + drawn[:, -middle - 1]) / 2


def _rounds(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (RESAMPLES, count), generator=generator)


def _interval(medians: Tensor) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    low, high = medians.quantile(torch.tensor([tail, 1 - tail], dtype=medians.dtype)).tolist()
    return low, high


def median_interval(values: Sequence[float]) -> Interval:
    """Returns the 95 % bootstrap interval of the median."""
    generator = torch.Generator().manual_seed(0)
    return _interval(_medians(values, _rounds(len(values), generator)))


def ratio_interval(above: Sequence[float], below: Sequence[float], *, paired: bool) -> Interval:
    """Returns the 95 % bootstrap interval of median(above) / median(below).

    paired: both were measured in the same rounds, and the same rounds are drawn of both, so that
    what slowed both of them in a round cancels. Rounds of two runs are drawn independently.
    """
    generator = torch.Generator().manual_seed(0)
    rounds = _rounds(len(below), generator)
    others = rounds if paired else _rounds(len(above), generator)
    return _interval(_medians(above, others) / _medians(below, rounds))


def level(interval: Interval) -> bool:
    """Says whether the interval contains 1: then neither side of the ratio is faster."""
    return interval[0] <= 1.0 <= interval[1]


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
