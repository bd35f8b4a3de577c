"""How a call is served: `explain`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from .backends import (
    BACKENDS,
    CPU,
    CUDA,
    REFERENCE,
    TRITON,
    Backend,
    choose,
    first_without_reason,
    requested,
)
from .options import Options
from .problem import Problem, cast_for_autocast


class Details(NamedTuple):
    """What `explain` adds about a backend. Bytes of working memory, beyond inputs and outputs."""

    kernel: str
    extra_bytes: int
    isa: str = ""
    reason: str = ""  # why this kernel among those of the backend
    block_m: int = 0  # queries per tile
    block_n: int = 0  # keys per tile


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


def _triton_details(problem: Problem) -> Details:
    from ..kernels.launch import decode_splits
    from ..kernels.tiles import arch_of, attention_tiles, decode_tiles

    heads, head_dim = problem.heads_q // max(problem.heads_kv, 1), problem.head_dim
    head_dim = max(head_dim, problem.head_dim_v)
    numbers = problem.numbers
    window = (numbers.window_left, 0 if numbers.causal else numbers.window_right)
    splits = decode_splits(
        *(problem.batch, problem.heads_q, problem.heads_kv),
        *(problem.seqlen_q, problem.seqlen_k, window),
    )
    arch = arch_of(problem.device)
    if splits == 0:
        kernel, reason = "attention_forward", ""
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


def _reference_details(problem: Problem) -> Details:
    scores = problem.batch * problem.heads_q * problem.seqlen_q * problem.seqlen_k
    element = 8 if problem.dtype == torch.float64 else 4
    # scores and weights, and where they are visible; backward keeps them and their gradients
    copies = 6 if "gradients" in problem.features else 3
    return Details("attention_reference", copies * scores * element)


_DETAILS: dict[str, Callable[[Problem], Details]] = {
    CUDA.name: _cuda_details,
    TRITON.name: _triton_details,
    CPU.name: _cpu_details,
    REFERENCE.name: _reference_details,
}


def details_of(row: Backend, problem: Problem) -> Details:
    return _DETAILS[row.name](problem)


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
    problem = Problem.from_call(query, key, value, Options(**options))
    if requested(backend) == "auto":
        row, refused = first_without_reason(problem)
    else:
        row = choose(problem, backend)
        before = BACKENDS[: BACKENDS.index(row)]
        refused = {other.name: other.refuses(problem) for other in before}
    return Explanation(
        backend=row.name,
        details=details_of(row, problem),
        threads=torch.get_num_threads(),
        copied=tuple(problem.copied),
        refused=refused,
    )
