"""The capability table: one row per backend, fastest first, `reference` last.

A row is data: the devices, dtypes, head sizes and features it serves. `supports` compares it with a
`Problem` and answers with every reason against; `choose` takes the first row without one; `explain`
tells how a call would be served and why not faster. The tests of features and the README's table
are generated from the rows.

Environment, read once when the package is imported (`read_environment` reads it again):
FUSED_ATTENTION_BACKEND   the backend that serves backend="auto"; then it never falls back
FUSED_ATTENTION_STRICT=1  refuse a call that only the reference serves, with the reasons
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from ..derivatives import autograd
from ..errors import ArgumentValueError, describe_error
from ..operators import cuda
from .problem import CAUSAL, DTYPES, FEATURES, Plan, Problem, cast_for_autocast, exports_onnx

logger = logging.getLogger("fused_attention")


class Details(NamedTuple):
    """What `explain` adds about a backend. Bytes of working memory, beyond inputs and outputs."""

    kernel: str
    extra_bytes: int
    isa: str = ""
    reason: str = ""  # why this kernel among those of the backend
    block_m: int = 0  # queries per tile
    block_n: int = 0  # keys per tile


@dataclass(frozen=True)
class Backend:
    """One row. `plan` and `details` are None where nothing is built.

    missing: what this machine lacks, or "".
    """

    name: str
    devices: frozenset[str] | None = None  # None: any
    dtypes: tuple[torch.dtype, ...] = ()
    head_dims: range = range(0)
    features: frozenset[str] = frozenset()
    plan: Callable[[Problem], Plan] | None = None
    details: Callable[[Problem], Details] | None = None
    missing: Callable[[], str] = str

    def supports(self, problem: Problem) -> list[str]:
        """Every reason why this backend cannot serve `problem`; empty if it can."""
        if self.plan is None:
            return ["not built yet"]
        reasons = [self.missing()] if self.missing() else []
        if self.devices is not None and problem.device.type not in self.devices:
            reasons.append(f"device {problem.device}: only {', '.join(sorted(self.devices))}")
        if problem.dtype not in self.dtypes:
            reasons.append(f"dtype {problem.dtype}: only {', '.join(map(str, self.dtypes))}")
        for name, size in (("query", problem.head_dim), ("value", problem.head_dim_v)):
            if not self.head_dims.start <= size < self.head_dims.stop:
                sizes = f"{self.head_dims.start} to {self.head_dims.stop - 1}"
                reasons.append(f"{name}'s head_dim {size}: only {sizes}")
        missing = problem.features - self.features
        reasons += [f"{name}: not built yet" for name in FEATURES if name in missing]
        return reasons


# -- CPU ---------------------------------------------------------------------------------


def _cpu_details(problem: Problem) -> Details:
    kernel = _native.attention_kernel(
        str(problem.dtype).removeprefix("torch."),
        (
            problem.batch,
            problem.heads_q,
            problem.heads_kv,
            problem.seqlen_q,
            problem.seqlen_k,
            problem.head_dim,
            problem.head_dim_v,
        ),
        bias="bias" in problem.features,
        softcap="softcap" in problem.features,
    )
    backward = "gradients" in problem.features
    plain = problem.is_plain and not problem.differentiable
    rows = problem.batch * problem.heads_q * problem.seqlen_q
    lse_bytes = rows * (8 if problem.dtype == torch.float64 else 4)
    workspaces = [kernel["forward_workspace_bytes"], kernel["backward_workspace_bytes"] * backward]
    shared = [kernel["shared_bytes"], kernel["backward_shared_bytes"] * backward]
    return Details(
        kernel=kernel["kernel"] + " + attention_backward" * backward,
        reason=kernel["reason"],
        extra_bytes=torch.get_num_threads() * max(workspaces)
        + max(shared)
        + lse_bytes * (not plain)
        + lse_bytes * backward  # delta = rowsum(do * o)
        + problem.copied_bytes,
        isa=kernel["isa"],
        block_m=kernel["block_m"],
        block_n=kernel["block_n"],
    )


# -- CUDA C++ ------------------------------------------------------------------------------


def _cuda_details(problem: Problem) -> Details:
    backward = "gradients" in problem.features
    plain = problem.is_plain and not problem.differentiable
    lse_bytes = 4 * problem.batch * problem.heads_q * problem.seqlen_q
    return Details(
        kernel=f"attention_forward{' + attention_backward' * backward}",
        # lse; backward: delta, and lse as the kernels want it
        extra_bytes=lse_bytes * (not plain) + 2 * lse_bytes * backward + problem.copied_bytes,
    )


# -- Triton ------------------------------------------------------------------------------


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _triton_missing() -> str:
    if not _has_triton():
        return "triton not installed"
    return "" if torch.cuda.is_available() else "no CUDA device"


def _triton_details(problem: Problem) -> Details:
    from ..kernels.launch import decode_splits
    from ..kernels.tiles import arch_of, attention_tiles, decode_tiles

    heads, head_dim = problem.heads_q // max(problem.heads_kv, 1), problem.head_dim
    head_dim = max(head_dim, problem.head_dim_v)
    window = (problem.window_size[0], 0 if problem.causal else problem.window_size[1])
    splits = decode_splits(
        *(problem.batch, problem.heads_q, problem.heads_kv),
        *(problem.seqlen_q, problem.seqlen_k, window),
    )
    arch = arch_of(problem.device)
    if splits == 0:
        kernel, reason = "attention_forward", ""
        if is_faster_in_triton(problem):
            reason = "so many scores, with more than a causal mask: faster than in CUDA"
        tiles = attention_tiles("forward", arch, problem.dtype, head_dim)
    else:
        kernel, rows = "attention_decode", heads * problem.seqlen_q
        reason = f"{rows} rows of a key head; its keys in {splits} splits"
        tiles = decode_tiles(arch, problem.dtype, head_dim, rows)
    backward = "gradients" in problem.features
    plain = problem.is_plain and not problem.differentiable
    lse_bytes = 4 * problem.batch * problem.heads_q * problem.seqlen_q
    parts = splits if splits > 1 else 0
    return Details(
        kernel=f"{kernel}{' + attention_backward' * backward}",
        reason=reason,
        extra_bytes=lse_bytes * (not plain)
        + lse_bytes * backward  # delta = rowsum(do * o)
        + parts * lse_bytes * (2 + problem.head_dim_v)
        + problem.copied_bytes,
        isa=arch.name,
        block_m=tiles.block_m,
        block_n=tiles.block_n,
    )


# -- Reference ---------------------------------------------------------------------------


def _reference_plan(problem: Problem) -> Plan:
    from ..reference import attention_reference

    causal = next(name for name, number in CAUSAL.items() if number == problem.causal)
    names = "mask bias key_padding_mask alibi_slopes sinks philox softcap dropout_p".split()
    names += "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_k block_table".split()

    def operator(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Any:
        return attention_reference(
            query,
            key,
            value,
            causal=causal,
            window_size=problem.window_size,
            scale=problem.scale,
            return_lse=problem.return_lse,
            **dict(zip(names, options, strict=False)),
        )

    return Plan(operator, (), limits=problem.limits, may_be_kept=False)


def _reference_details(problem: Problem) -> Details:
    scores = problem.batch * problem.heads_q * problem.seqlen_q * problem.seqlen_k
    element = 8 if problem.dtype == torch.float64 else 4
    # scores and weights, and where they are visible; backward keeps them and their gradients
    copies = 6 if "gradients" in problem.features else 3
    return Details("attention_reference", copies * scores * element)


# -- The table ---------------------------------------------------------------------------

CUDA = Backend(
    "cuda",
    devices=frozenset({"cuda"}),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    head_dims=range(1, 257),
    features=frozenset(FEATURES),
    plan=autograd.plan_cuda,
    details=_cuda_details,
    missing=cuda.missing,
)
TRITON = Backend(
    "triton",
    devices=frozenset({"cuda"}),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    head_dims=range(1, 257),
    features=frozenset(FEATURES),
    plan=autograd.plan,
    details=_triton_details,
    missing=_triton_missing,
)
CPU = Backend(
    "cpu",
    devices=frozenset({"cpu"}),
    dtypes=DTYPES,
    head_dims=range(1, 513),
    features=frozenset(FEATURES),
    plan=autograd.plan,
    details=_cpu_details,
)
REFERENCE = Backend(
    "reference",
    devices=frozenset({"cpu", "cuda", "meta"}),
    dtypes=DTYPES,
    head_dims=range(0, 2**31),
    features=frozenset(FEATURES),
    plan=_reference_plan,
    details=_reference_details,
)
# In this order. On a GPU see also `is_faster_in_triton`.
BACKENDS = (CUDA, TRITON, CPU, REFERENCE)
NAMES = tuple(row.name for row in BACKENDS)


def feature_table() -> str:
    """The table in Markdown."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def head_dims(row: Backend) -> str:
        if row.head_dims.stop == 2**31:
            return "any"
        return f"{row.head_dims.start} to {row.head_dims.stop - 1}"

    def dtypes(row: Backend) -> str:
        return ", ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes)

    def devices(row: Backend) -> str:
        return "any" if row.devices is None else ", ".join(sorted(row.devices))

    def feature(row: Backend, name: str) -> str:
        return "yes" if name in row.features else "–"

    lines = [line(["", *NAMES]), line(["---"] * (1 + len(BACKENDS)))]
    for title, cell in (("device", devices), ("dtype", dtypes), ("head_dim", head_dims)):
        cells = [cell(row) if row.plan else "not built yet" for row in BACKENDS]
        lines.append(line([title, *cells]))
    for name, meaning in FEATURES.items():
        lines.append(line([meaning, *(feature(row, name) for row in BACKENDS)]))
    return "\n".join(lines)


# -- Choice ------------------------------------------------------------------------------

# What CUDA's kernels without options serve.
_QUICK_IN_CUDA = {"gradients", "causal", "window_size", "gqa", "value_head_dim", "return_lse"}
_QUICK_IN_CUDA |= {"lse_gradient", "sinks", "sinks_gradient", "varlen", "seqused_k"}
_MANY_SCORES = 1 << 24


def is_faster_in_triton(problem: Problem) -> bool:
    """Whether TRITON comes before CUDA, in 16 bits.

    On an H200 (benchmarks/results/gpu) its kernels took a third to a tenth of the time of CUDA's
    where a call has a mask, a bias or dropout, and three quarters where few queries meet the keys
    of many sequences; but it takes 0.2 ms to start them, in which CUDA's have computed some million
    scores.
    """
    if problem.device.type != "cuda" or problem.dtype.itemsize != 2:
        return False
    is_quick = problem.features <= _QUICK_IN_CUDA and problem.scale > 0
    if torch.compiler.is_compiling():  # for every length
        return not is_quick
    from ..kernels.tiles import MAX_DECODE_ROWS

    rows = problem.heads_q // max(problem.heads_kv, 1) * problem.seqlen_q
    scores = problem.batch * problem.heads_q * problem.seqlen_q * problem.seqlen_k
    return scores >= _MANY_SCORES and not (is_quick and rows > MAX_DECODE_ROWS)


class Environment(NamedTuple):
    backend: str
    strict: bool


# Of calls that validated before, by what they have in common: see `attention.py`.
PLANS: dict[tuple[Any, ...] | None, Plan] = {}
MAX_PLANS = 4096
LEFT = Plan(lambda *inputs: None, (), is_left=True)

_logged: set[str] = set()


ENVIRONMENT = Environment("auto", False)


def read_environment() -> None:
    """Reads FUSED_ATTENTION_BACKEND and _STRICT, and forgets all that followed from them."""
    global ENVIRONMENT
    ENVIRONMENT = Environment(
        backend=os.environ.get("FUSED_ATTENTION_BACKEND") or "auto",
        strict=os.environ.get("FUSED_ATTENTION_STRICT", "") not in ("", "0"),
    )
    PLANS.clear()
    _logged.clear()


read_environment()


def choose(problem: Problem, backend: str = "auto") -> Backend:
    """The row that serves `problem`.

    "auto": the first without a reason against, or NotImplementedError with those of all. If that is
    `reference`: logged once per set of reasons, NotImplementedError if FUSED_ATTENTION_STRICT. A
    name: that row, or NotImplementedError with its reasons. An export to ONNX always gets
    `reference`.
    """
    name = requested(backend)
    if exports_onnx():
        return REFERENCE
    if name != "auto":
        row = BACKENDS[NAMES.index(name)]
        reasons = row.supports(problem)
        if reasons:
            raise NotImplementedError(
                f"backend {name!r} cannot serve this call: {'; '.join(reasons)}"
            )
        return row
    row, refused = _first_without_reason(problem)
    if row is REFERENCE:
        why = _list_reasons(refused)
        if ENVIRONMENT.strict:
            raise NotImplementedError(
                f"FUSED_ATTENTION_STRICT: only the reference serves this:{why}"
            )
        _log_reference(problem, why)
    return row


def plan_of_kernel(problem: Problem) -> Plan:
    """The plan of a row that has kernels; LEFT if only the reference, or nothing, serves this.

    The reference serves if FUSED_ATTENTION_BACKEND asks for it.
    """
    if exports_onnx():
        return LEFT
    name = requested("auto")
    rows = _in_order(problem) if name == "auto" else (BACKENDS[NAMES.index(name)],)
    for row in rows:
        if row.supports(problem) or (row is REFERENCE and name == "auto"):
            continue
        assert row.plan is not None
        try:
            return row.plan(problem)
        except NotImplementedError:  # compiled inside a transform
            return LEFT
    return LEFT


def _in_order(problem: Problem) -> tuple[Backend, ...]:
    """The rows, the preferred one first."""
    return ((TRITON,) if is_faster_in_triton(problem) else ()) + BACKENDS


def _first_without_reason(problem: Problem) -> tuple[Backend, dict[str, list[str]]]:
    """And the reasons against those before it."""
    refused: dict[str, list[str]] = {}
    for row in _in_order(problem):
        reasons = row.supports(problem)
        if not reasons:
            return row, refused
        refused[row.name] = reasons
    raise NotImplementedError(f"attention: no backend serves this call:{_list_reasons(refused)}")


def _list_reasons(refused: dict[str, list[str]]) -> str:
    return "".join(f"\n  {name}: {'; '.join(reasons)}" for name, reasons in refused.items())


def requested(backend: str) -> str:
    """The backend asked for by the call, else by the environment, else "auto"."""
    sources = {"backend": backend, "FUSED_ATTENTION_BACKEND": ENVIRONMENT.backend}
    for source, name in sources.items():
        if name not in ("auto", *NAMES):
            expected = f"auto or one of {', '.join(NAMES)}"
            raise ArgumentValueError(describe_error(source, expected, repr(name)))
    return backend if backend != "auto" else ENVIRONMENT.backend


def _log_reference(problem: Problem, why: str) -> None:
    if torch.compiler.is_compiling() or problem.device.type not in ("cpu", "cuda"):
        return
    if why not in _logged:
        _logged.add(why)
        logger.warning(
            "attention: the slow reference serves a call, with all scores in memory:%s", why
        )


# -- Explanation -------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """How a call is served, and every reason why no row before that serves it."""

    backend: str
    details: Details
    threads: int
    copied: tuple[str, ...]  # inputs that are copied first: their last stride is not 1
    refused: dict[str, list[str]]

    def __str__(self) -> str:
        lines = {"backend": self.backend, "kernel": self.details.kernel}
        if self.details.reason:
            lines["chosen"] = self.details.reason
        if self.details.isa:
            lines["ISA"] = self.details.isa
        if self.details.block_m:
            lines["tiles"] = f"{self.details.block_m} queries x {self.details.block_n} keys"
        lines["threads"] = str(self.threads)
        lines["extra memory"] = f"{self.details.extra_bytes / 2**20:.2f} MiB"
        if self.copied:
            lines["copied first"] = f"{', '.join(self.copied)}: last stride is not 1"
        for name, reasons in self.refused.items():
            lines[f"not {name}"] = "; ".join(reasons)
        return "\n".join(f"{title:<14}{text}" for title, text in lines.items())


def explain(
    query: Tensor, key: Tensor, value: Tensor, *, backend: str = "auto", **options: Any
) -> Explanation:
    """How `attention` serves a call with these arguments; computes and logs nothing.

    Takes the arguments of `attention`, raises as it does for wrong ones and for a backend that
    cannot serve the call. FUSED_ATTENTION_STRICT is not applied.
    """
    query, key, value, options["bias"] = cast_for_autocast(query, key, value, options.get("bias"))
    problem = Problem.from_call(query, key, value, **options)
    if requested(backend) == "auto":
        row, refused = _first_without_reason(problem)
    else:
        row = choose(problem, backend)
        before = BACKENDS[: NAMES.index(row.name)]
        refused = {other.name: other.supports(problem) for other in before}
    assert row.details is not None
    return Explanation(
        backend=row.name,
        details=row.details(problem),
        threads=torch.get_num_threads(),
        copied=tuple(problem.copied),
        refused=refused,
    )
