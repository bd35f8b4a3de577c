"""The tables that `bench` measures, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from ...errors import ArgumentValueError
from . import shapes, workloads
from .shapes import Case
from .trial import Trial


@dataclass(frozen=True)
class Workload:
    """A case that is no call of attention: it has its own peers."""

    name: str
    make: Callable[[], Trial]


Item = Case | Workload
SDPA = "scaled_dot_product_attention"


def _softmax() -> list[Item]:
    return [
        Workload(
            f"{what}, rows of {shape[-1]}, {name}",
            partial(workloads.softmax_trial, shape, dtype, what),
        )
        for shape in workloads.SOFTMAX_SHAPES
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        for what in ("forward", "in place", "backward")
    ]


def _training() -> list[Item]:
    return [
        Workload(f"{setting}, {length}", partial(workloads.training_trial, length, *options))
        for length in workloads.TRAINING_LENGTHS
        for setting, options in workloads.TRAINING_SETTINGS.items()
    ]


def _models() -> list[Item]:
    return [Workload(m.name, partial(workloads.model_trial, m)) for m in workloads.MODELS]


def _frontend() -> list[Item]:
    return [
        Workload(
            f"100 x {name.replace(SDPA, 'sdpa')}" + (", gradient" if grad else ""),
            partial(workloads.surface_trial, name, grad),
        )
        for grad in (False, True)
        for name in workloads.surfaces(grad)
    ]


SUITES: dict[str, Callable[[], list[Item]]] = {
    "forward": lambda: [*shapes.FORWARD],
    "backward": lambda: [*shapes.BACKWARD],
    "decode": lambda: [*shapes.DECODE],
    "varlen": lambda: [*shapes.VARLEN],
    "masks": lambda: [*shapes.MASKS],
    "softmax": _softmax,
    "training": _training,
    "models": _models,
    "frontend": _frontend,
}


def chosen(names: Iterable[str], quick: bool) -> dict[str, list[Item]]:
    """Returns the tables to measure by suite; without a name, a table of each kind of call.

    Raises ArgumentValueError for an unknown name.
    """
    for name in names:
        if name not in SUITES:
            raise ArgumentValueError(f"--suite: expected one of {', '.join(SUITES)}, got {name!r}")
    tables = {name: SUITES[name]() for name in names}
    if quick:
        tables = {name: table[: shapes.QUICK_CASES] for name, table in tables.items()}
    return tables or {"overview": [*(shapes.QUICK if quick else shapes.FULL)]}


def require_attention(tables: dict[str, list[Item]]) -> None:
    """Raises ArgumentValueError if a table has a case that runs on the CPU only."""
    for name, table in tables.items():
        if any(isinstance(item, Workload) for item in table):
            raise ArgumentValueError(f"--device: expected cpu with --suite {name}")
