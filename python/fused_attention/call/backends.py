"""The capability table, one row per backend, and the choice of the backend that serves a call.

The fastest row comes first, `reference` last. A row is data: devices, head sizes, and for each task
the dtypes and features that it serves. `Backend.refuses` compares a row with a call and returns
every reason against it; `choose` takes the first row without a reason. The tests of features and
the README's table are generated from the rows.

Environment, read once when the package is imported (`read_environment` reads it again):
FUSED_ATTENTION_BACKEND   the backend for calls with backend="auto"; it never falls back
FUSED_ATTENTION_STRICT=1  refuse a call that only the reference serves, with the reasons
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..derivatives import autograd
from ..errors import wrong_value
from ..operators import OPERATORS, cuda
from ..operators._torch import assume_constant_result, exports_onnx, is_compiling
from ..operators.arguments import BOTTOM_RIGHT_ONLY, CAUSAL, Arguments, split
from .observe import announce
from .plan import LEAVE, PLANS, Plan, plan_of_operators
from .problem import DTYPES, FEATURES, Problem

logger = logging.getLogger("fused_attention")

# The tasks of a backend, in the order of the printed table.
TASKS = {
    "attention": "attention",
    "second_derivatives": "second derivatives and forward mode",
    "attention_weights": "returned attention weights",
    "masked_softmax": "masked softmax",
    "dropout_mask": "the mask of dropout",
    "kv_cache_append_": "appending to a key/value cache",
}


class Service(NamedTuple):
    """How far a backend serves one task: for these dtypes, with every feature but `lacks`."""

    dtypes: tuple[torch.dtype, ...]
    lacks: frozenset[str] = frozenset()


class Request(NamedTuple):
    """Device, dtype, sizes and features of a call. A `Problem` has the same attributes."""

    device: torch.device
    dtype: torch.dtype
    head_dims: Mapping[str, int] = {}  # by argument
    features: frozenset[str] = frozenset()


class Asks(Protocol):
    """A `Request` or a `Problem`."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def head_dims(self) -> Mapping[str, int]: ...
    @property
    def features(self) -> frozenset[str]: ...


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    plan: makes the plan for a call of `attention`. missing: returns what this machine lacks, or "".
    prefers: returns why a later row should serve a call if it can, or "".
    """

    name: str
    devices: frozenset[str]
    head_dims: range
    services: Mapping[str, Service]
    plan: Callable[[Problem], Plan]
    missing: Callable[[], str] = str
    prefers: Callable[[Problem], str] = field(default=lambda problem: "")

    def refuses(self, call: Asks, task: str = "attention") -> list[str]:
        """Returns every reason why this backend cannot serve the call; none if it can."""
        missing = self.missing()
        reasons = [missing] if missing else []
        if call.device.type not in self.devices:
            reasons.append(f"device {call.device}: only {', '.join(sorted(self.devices))}")
        service = self.services.get(task)
        if service is None:
            return [*reasons, f"{TASKS[task]}: not built"]
        if call.dtype not in service.dtypes:
            reasons.append(f"dtype {call.dtype}: only {', '.join(map(str, service.dtypes))}")
        for name, size in call.head_dims.items():
            if not self.head_dims.start <= size < self.head_dims.stop:
                sizes = f"{self.head_dims.start} to {self.head_dims.stop - 1}"
                reasons.append(f"{name}'s head_dim {size}: only {sizes}")
        lacks = call.features & service.lacks
        reasons += [f"{name}: not built" for name in FEATURES if name in lacks]
        return reasons


# -- Plans -------------------------------------------------------------------------------


def _plan_cuda(problem: Problem) -> Plan:
    return plan_of_operators(problem, cuda.operators(), autograd.CUDA_FUNCTIONS)


def _plan(problem: Problem) -> Plan:
    return plan_of_operators(problem, OPERATORS, autograd.FUNCTIONS)


@announce
def reference(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, lse: bool = False) -> Any:
    """Calls the reference like an operator; returns out, or (out, lse)."""
    from ..reference import attention_reference

    options = Arguments(*arguments)._asdict()
    number, window = (
        options.pop("causal"),
        (options.pop("window_left"), options.pop("window_right")),
    )
    del options["precision"]
    causal = next((name for name, x in CAUSAL.items() if x == number), False)
    diagonal = "bottom_right" if number == BOTTOM_RIGHT_ONLY else None
    options |= {"causal": causal, "diagonal": diagonal, "window_size": window, "return_lse": lse}
    return attention_reference(query, key, value, **options)


def _plan_reference(problem: Problem) -> Plan:
    operator = functools.partial(reference, lse=problem.return_lse)
    return Plan(operator, split(problem.numbers)[1], may_be_kept=False)


# -- What is missing, and what is preferred ----------------------------------------------


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@assume_constant_result
def _triton_missing() -> str:
    if not _has_triton():
        return "triton not installed"
    return "" if torch.cuda.is_available() else "no CUDA device"


# The features that the fast path of the CUDA kernels serves.
_QUICK_IN_CUDA = {"gradients", "causal", "window_size", "gqa", "value_head_dim", "return_lse"}
_QUICK_IN_CUDA |= {"lse_gradient", "sinks", "sinks_gradient", "varlen", "seqused_k"}
_MANY_SCORES = 1 << 24


def _cuda_prefers(problem: Problem) -> str:
    """Returns why Triton should serve a 16-bit call, or "".

    On an H200 (benchmarks/results/gpu), Triton's kernels took a third to a tenth of the time of the
    CUDA kernels for calls with a mask, a bias or dropout, and three quarters of it for few queries
    and the keys of many sequences. But Triton takes 0.2 ms to launch them, in which the CUDA
    kernels compute some million scores.
    """
    if problem.device.type != "cuda" or problem.dtype.itemsize != 2:
        return ""
    reason = "so many scores, with more than a causal mask: faster in Triton"
    is_quick = problem.features <= _QUICK_IN_CUDA and problem.numbers.scale > 0
    if is_compiling():  # one graph serves every length
        return "" if is_quick else reason
    from ..kernels.tiles import MAX_DECODE_ROWS

    rows = problem.heads_q // max(problem.heads_kv, 1) * problem.seqlen_q
    scores = problem.batch * problem.heads_q * problem.seqlen_q * problem.seqlen_k
    if scores < _MANY_SCORES or (is_quick and rows > MAX_DECODE_ROWS):
        return ""
    return "few queries and many keys: faster in Triton" if is_quick else reason


# -- The table ---------------------------------------------------------------------------

_ON_GPU = Service((torch.float32, torch.bfloat16, torch.float16))
_ANY = Service(DTYPES)
_PACKED = frozenset({"varlen", "seqused_k", "block_table"})

CUDA = Backend(
    "cuda",
    devices=frozenset({"cuda"}),
    head_dims=range(1, 257),
    services={"attention": _ON_GPU, "masked_softmax": _ON_GPU},
    plan=_plan_cuda,
    missing=cuda.missing,
    prefers=_cuda_prefers,
)
TRITON = Backend(
    "triton",
    devices=frozenset({"cuda"}),
    head_dims=range(1, 257),
    services={
        "attention": _ON_GPU,
        "attention_weights": _ON_GPU._replace(lacks=_PACKED),
        "masked_softmax": _ON_GPU,
        "dropout_mask": _ON_GPU,
        "kv_cache_append_": _ANY,
    },
    plan=_plan,
    missing=_triton_missing,
)
CPU = Backend(
    "cpu",
    devices=frozenset({"cpu"}),
    head_dims=range(1, 513),
    services={
        "attention": _ANY,
        "second_derivatives": _ANY._replace(lacks=_PACKED),
        "attention_weights": _ANY._replace(lacks=_PACKED),
        "masked_softmax": _ANY,
        "dropout_mask": _ANY,
        "kv_cache_append_": _ANY,
    },
    plan=_plan,
)
REFERENCE = Backend(
    "reference",
    devices=frozenset({"cpu", "cuda", "meta"}),
    head_dims=range(0, 2**31),
    services={
        "attention": _ANY,
        "second_derivatives": _ANY,
        "attention_weights": _ANY._replace(lacks=_PACKED),
        "masked_softmax": _ANY,
        "dropout_mask": _ANY,
    },
    plan=_plan_reference,
)
BACKENDS = (CUDA, TRITON, CPU, REFERENCE)
NAMES = tuple(row.name for row in BACKENDS)


def feature_table() -> str:
    """Returns the table in Markdown: where backends differ, then what all of them serve."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def head_dims(row: Backend) -> str:
        if row.head_dims.stop == 2**31:
            return "any"
        return f"{row.head_dims.start} to {row.head_dims.stop - 1}"

    def dtypes(service: Service) -> str:
        return ", ".join(str(dtype).removeprefix("torch.") for dtype in service.dtypes)

    def serves(row: Backend, task: str) -> str:
        service = row.services.get(task)
        if service is None:
            return "–"
        return "yes" if service.dtypes == row.services["attention"].dtypes else dtypes(service)

    rows = {
        "device": [", ".join(sorted(row.devices)) for row in BACKENDS],
        "dtype": [dtypes(row.services["attention"]) for row in BACKENDS],
        "head_dim": [head_dims(row) for row in BACKENDS],
    }
    everywhere = []
    for task, title in TASKS.items():
        cells = [serves(row, task) for row in BACKENDS]
        if set(cells) == {"yes"}:
            everywhere.append(title)
        else:
            rows[title] = cells
        for name, meaning in FEATURES.items():
            lacks = [name in row.services[task].lacks for row in BACKENDS if task in row.services]
            if any(lacks):
                rows[f"{title}: {meaning}"] = [
                    "–" if task not in row.services or name in row.services[task].lacks else "yes"
                    for row in BACKENDS
                ]
            elif task == "attention":
                everywhere.append(meaning)
    lines = [line(["", *NAMES]), line(["---"] * (1 + len(BACKENDS)))]
    lines += [line([title, *cells]) for title, cells in rows.items()]
    return "\n".join(
        [*lines, "", *textwrap.wrap(f"All of them serve {'; '.join(everywhere)}.", 100)]
    )


# -- Choice ------------------------------------------------------------------------------


class Environment(NamedTuple):
    backend: str
    strict: bool


_logged: set[tuple[str, str]] = set()
_chosen: dict[tuple[str, str, torch.dtype], Backend] = {}

ENVIRONMENT = Environment("auto", False)


def read_environment() -> None:
    """Reads FUSED_ATTENTION_BACKEND and _STRICT; forgets all plans and choices made before."""
    global ENVIRONMENT
    ENVIRONMENT = Environment(
        backend=os.environ.get("FUSED_ATTENTION_BACKEND") or "auto",
        strict=os.environ.get("FUSED_ATTENTION_STRICT", "") not in ("", "0"),
    )
    PLANS.clear()
    _chosen.clear()
    _logged.clear()


read_environment()


def choose(call: Asks, backend: str = "auto", task: str = "attention") -> Backend:
    """Returns the row that serves `call`.

    For "auto", this is the first row without a reason against it. If there is none, raises
    NotImplementedError with the reasons of all rows. If it is `reference`, logs the reasons, each
    set of them once, or raises NotImplementedError under FUSED_ATTENTION_STRICT. For a name, it is
    that row; raises NotImplementedError if the row refuses. An export to ONNX always gets
    `reference`.
    """
    name = requested(backend)
    if exports_onnx():
        return REFERENCE
    if name != "auto":
        row = row_named(name)
        reasons = row.refuses(call, task)
        if reasons:
            raise NotImplementedError(
                f"backend {name!r} cannot serve this call: {'; '.join(reasons)}"
            )
        return row
    row, refused = first_without_reason(call, task)
    if row is REFERENCE:
        why = _list_reasons(refused)
        if ENVIRONMENT.strict:
            raise NotImplementedError(
                f"FUSED_ATTENTION_STRICT: only the reference serves this:{why}"
            )
        _log_reference(call, task, why)
    return row


def choose_for(task: str, x: Tensor) -> Backend:
    """Returns the row for a task that depends on the device and dtype of a tensor only, and not on
    FUSED_ATTENTION_BACKEND; remembers it. On "meta" it is CPU: any operator gives the shapes."""
    if is_compiling() or exports_onnx():
        return REFERENCE if exports_onnx() else _choose_for(task, x)
    key = (task, x.device.type, x.dtype)
    row = _chosen.get(key)
    if row is None:
        row = _chosen[key] = _choose_for(task, x)
    return row


def _choose_for(task: str, x: Tensor) -> Backend:
    if x.device.type == "meta":
        return CPU
    request = Request(x.device, x.dtype)
    row, refused = first_without_reason(request, task)
    if row is REFERENCE:
        _log_reference(request, task, _list_reasons(refused))
    return row


def plan_of_kernel(problem: Problem) -> Plan:
    """Returns the plan of a row that has kernels; LEAVE if only the reference or no row serves it.

    The reference serves if FUSED_ATTENTION_BACKEND asks for it.
    """
    if exports_onnx():
        return LEAVE
    asked = requested("auto")
    for name in in_order(problem) if asked == "auto" else (asked,):
        row = row_named(name)
        if row.refuses(problem) or (row is REFERENCE and asked == "auto"):
            continue
        try:
            return row.plan(problem)
        except NotImplementedError:  # compiled inside a transform
            return LEAVE
    return LEAVE


def row_named(name: str) -> Backend:
    return BACKENDS[NAMES.index(name)]


def in_order(call: Asks) -> tuple[str, ...]:
    """Returns the names of the rows in the order in which they are tried: rows that prefer another
    one (`prefers`) come after all others except the reference."""
    if not isinstance(call, Problem):
        return NAMES
    unwilling = tuple(row.name for row in BACKENDS if row.prefers(call))
    others = tuple(name for name in NAMES if name not in unwilling)
    return (*others[:-1], *unwilling, others[-1])


def first_without_reason(
    call: Asks, task: str = "attention"
) -> tuple[Backend, dict[str, list[str]]]:
    """Returns the row that serves the call, and the reasons against the rows before it, except
    rows for other devices."""
    refused: dict[str, list[str]] = {}
    names = in_order(call)
    fitting = [name for name in names if call.device.type in row_named(name).devices]
    for name in fitting or names:
        row = row_named(name)
        reasons = row.refuses(call, task)
        if not reasons:
            if isinstance(call, Problem):
                for other in BACKENDS[: NAMES.index(name)]:
                    if other.name in fitting and other.name not in refused:
                        refused[other.name] = [other.prefers(call)]
            return row, refused
        refused[name] = reasons
    raise NotImplementedError(f"{task}: no backend serves this call:{_list_reasons(refused)}")


def _list_reasons(refused: dict[str, list[str]]) -> str:
    return "".join(f"\n  {name}: {'; '.join(reasons)}" for name, reasons in refused.items())


def requested(backend: str) -> str:
    """Returns the backend that the call asks for, else that of the environment, else "auto"."""
    sources = {"backend": backend, "FUSED_ATTENTION_BACKEND": ENVIRONMENT.backend}
    for source, name in sources.items():
        if name not in ("auto", *NAMES):
            wrong_value(source, f"auto or one of {', '.join(NAMES)}", repr(name))
    return backend if backend != "auto" else ENVIRONMENT.backend


def _log_reference(call: Asks, task: str, why: str) -> None:
    if is_compiling() or call.device.type not in ("cpu", "cuda"):
        return
    if (task, why) not in _logged:
        _logged.add((task, why))
        logger.warning(
            "%s: the slow reference serves a call, with all scores in memory:%s", task, why
        )
