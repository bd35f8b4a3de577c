"""Interleaved measurement: what is compared runs in turn, so that a slow moment hits everyone.

Results are medians over the rounds. The minimum and the spread are kept beside them: where the
median is far above the minimum, something else was running, and the result says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from ... import __version__


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over the rounds; spread = (third - first quartile) / median."""

    median: float
    minimum: float
    spread: float
    rounds: int

    @property
    def disturbed(self) -> bool:
        """Whether the machine was busy with something else for a good part of the rounds: then
        the median is no measure, and a ratio of two would be one of luck."""
        return self.minimum < 0.7 * self.median


def summarise(seconds: list[float]) -> Timing:
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median * 1e3, min(seconds) * 1e3, (third - first) / median, len(seconds))


def interleave(
    calls: dict[str, Callable[[], object]],
    *,
    budget: float = 3.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    warmup: int = 2,
    after_round: Callable[[float], None] = lambda fraction: None,
) -> dict[str, Timing]:
    """Times every call once a round, in an order that rotates, for about `budget` seconds.

    `after_round` is told the fraction that is done, outside what is timed.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(max_rounds):
        shift = done % len(names)
        for name in names[shift:] + names[:shift]:
            begin = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - begin)
        elapsed = time.perf_counter() - start
        after_round(min(1.0, max(elapsed / budget, (done + 1) / max_rounds)))
        if elapsed >= budget and done + 1 >= min_rounds:
            break
    return {name: summarise(values) for name, values in seconds.items()}


@contextlib.contextmanager
def real_time_priority(priority: int = 10) -> Iterator[bool]:
    """Inside, other processes do not interrupt ours; yields whether the system allowed that.

    It usually needs root. Without it, medians and interleaving have to do.
    """

    def schedule(policy: int, value: int) -> None:
        for thread in os.listdir("/proc/self/task"):  # the pool of PyTorch too
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
    """Bytes that a call needs beyond what is there before it and the tensors that it returns: the
    peak of the process's resident memory, which Linux forgets on request. None elsewhere."""

    def resident(field: str) -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024

    try:
        ctypes.CDLL(None).malloc_trim(0)  # or what earlier calls left would be used again
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
    """What a result depends on, as far as it can be known."""
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
