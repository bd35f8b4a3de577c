"""How a call is served: `explain`.

The explanation comes from the code that decides. In a dry run (csrc/notes.h), the operators of the
call note which kernel they choose, its tiles, and each buffer. For Triton, the launches are
prepared but not started.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operators import cuda
from ..operators._torch import without_fake_tensors
from ..operators.arguments import SEQUENCES, Arguments, split
from ..operators.handles import names_of
from ..operators.memory import is_in_memory
from .backends import (
    BACKENDS,
    CUDA,
    REFERENCE,
    TRITON,
    Backend,
    choose,
    first_without_reason,
    requested,
)
from .options import Options
from .problem import Problem, arguments_of, cast_for_autocast, refuse_keyword


class Details(NamedTuple):
    """The kernels that a backend runs, and bytes of working memory beyond inputs and results."""

    kernel: str
    extra_bytes: int
    isa: str = ""
    reason: str = ""  # why this kernel among those of the backend
    block_m: int = 0  # queries per tile
    block_n: int = 0  # keys per tile
    launches: tuple[str, ...] = ()  # on a GPU: the kernels that are launched, in order
    buffers: tuple[tuple[str, int], ...] = ()  # names of the working memory, and bytes


@dataclass(frozen=True)
class Explanation:
    """How a call is served, and every reason why the rows before do not serve it."""

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
    """Returns how `attention` serves a call with these arguments; computes and logs nothing.

    Takes the arguments of `attention`, and raises as it does for wrong ones and for a backend that
    cannot serve the call. FUSED_ATTENTION_STRICT is not applied.
    """
    for name in options.keys() - set(Options._fields):
        refuse_keyword(name, "explain")
    query, key, value, options["bias"] = cast_for_autocast(query, key, value, options.get("bias"))
    given = Options(**options)
    problem = Problem.from_call(query, key, value, given)
    row, refused = _row_and_refusals(problem, backend, "attention")
    details = details_of(row, problem, query, key, value, given)
    return Explanation(row.name, details, torch.get_num_threads(), tuple(problem.copied), refused)


def _row_and_refusals(
    problem: Problem, backend: str, task: str
) -> tuple[Backend, dict[str, list[str]]]:
    """Returns the row of `choose`, and every reason against the rows before it; logs nothing."""
    if requested(backend) == "auto":
        return first_without_reason(problem, task)
    row = choose(problem, backend, task)
    before = BACKENDS[: BACKENDS.index(row)]
    return row, {other.name: other.refuses(problem, task) for other in before}


def explain_with_weights(
    query: Tensor, key: Tensor, value: Tensor, *, average: bool = True, **options: Any
) -> Explanation:
    """Returns how `attention_with_weights` serves a call with these arguments."""
    query, key, value, options["bias"] = cast_for_autocast(query, key, value, options.get("bias"))
    given = Options(**options | {"return_lse": True})
    problem = Problem.from_call(query, key, value, given)
    row, refused = _row_and_refusals(problem, "auto", "attention_weights")
    details = details_of(row, problem, query, key, value, given, weights=True, average=average)
    return Explanation(row.name, details, torch.get_num_threads(), tuple(problem.copied), refused)


def details_of(
    row: Backend,
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    weights: bool = False,
    average: bool = False,
) -> Details:
    """Returns what `row` runs for a valid call. weights: whether the call returns weights too."""
    if row is REFERENCE:
        return _of_reference(problem)
    with without_fake_tensors():
        inputs = tuple(_on_meta(x) for x in (query, key, value))
        call = _named_arguments(problem, inputs, _dry_arguments(problem, options))
        if weights:
            shape = (problem.batch, problem.heads_q, problem.seqlen_q, problem.seqlen_k)
            each = call["query"].new_empty((shape[0], *shape[2:]) if average else shape)
            call |= {"average": average, "average_weights": average, "grad_weights": each}
        if row is TRITON:
            return _of_triton(problem, call, weights)
        if row is CUDA:
            cuda.operators()  # loads them
        namespace = cuda.NAMESPACE if row is CUDA else "fused_attention"
        return _of_library(namespace + "_dry_run", problem, call, weights)


# -- Without memory ----------------------------------------------------------------------


def _on_meta(x: Tensor) -> Tensor:
    """Returns a tensor without memory that has the form of `x`, and its alignment to 64 bytes."""
    first = x.data_ptr() % 64 // x.element_size() if is_in_memory(x) else 0
    storage = torch.empty(0, dtype=x.dtype, device="meta")
    return (
        storage.as_strided(x.shape, x.stride(), first) if x.numel() else storage.new_empty(x.shape)
    )


def _dry_arguments(problem: Problem, options: Options) -> Arguments:
    """Returns the arguments of the operators, with tensors without memory. Lengths and pages keep
    their values, on which the choice of kernels depends; fake ones divide the tokens evenly."""
    tensors: dict[str, Any] = {}
    for name, x in options._asdict().items():
        if isinstance(x, Tensor):
            tensors[name] = _lengths(name, x, problem) if name in SEQUENCES else _on_meta(x)
    if problem.numbers.dropout_p:
        tensors["philox_seed"] = torch.zeros(2, dtype=torch.int64)
    like = torch.empty(0, dtype=problem.dtype, device="meta")
    dry = options._replace(**tensors)
    return Arguments(*arguments_of(like, like, split(problem.numbers)[1], dry, check=False))


def _lengths(name: str, x: Tensor, problem: Problem) -> Tensor:
    if is_in_memory(x):
        return x.cpu()
    longest = problem.seqlen_q if name == "cu_seqlens_q" else problem.seqlen_k
    if name.startswith("cu_seqlens"):
        return torch.linspace(0, longest, x.shape[0]).to(torch.int32)
    return torch.full(x.shape, longest if name == "seqused_k" else 0, dtype=torch.int32)


def _named_arguments(
    problem: Problem, inputs: tuple[Tensor, ...], arguments: Arguments
) -> dict[str, Any]:
    """Returns the arguments of all operators by name."""
    query, _, value = inputs
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    rows = (query.shape[1], query.shape[0]) if query.dim() == 3 else query.shape[:-1]
    lse = query.new_empty(rows, dtype=torch.promote_types(query.dtype, torch.float32))
    return {
        **dict(zip(("query", "key", "value"), inputs, strict=True)),
        **arguments._asdict(),
        "grad_out": out,
        "grad_lse": lse if "lse_gradient" in problem.features else None,
        "out": out,
        "lse": lse,
        "bias_grad": "bias_gradient" in problem.features,
        "sinks_grad": "sinks_gradient" in problem.features,
        "grad_weights": None,
        "average_weights": False,
    }


# -- Backends ----------------------------------------------------------------------------


def notes_of(operators: Any) -> list[dict[str, Any]]:
    """Returns the notes of the last dry run of this thread."""
    text = bytes(operators.notes().tolist()).decode()
    return [json.loads(line) for line in text.splitlines()]


def _of_library(namespace: str, problem: Problem, call: dict[str, Any], weights: bool) -> Details:
    operators = getattr(torch.ops, namespace)

    def run(name: str) -> list[dict[str, Any]]:
        op = getattr(operators, name).default
        op(**{argument: call[argument] for argument in names_of(op)})
        return notes_of(operators)

    plain = problem.is_plain and not problem.differentiable
    passes = [run("attention_forward_plain" if plain else "attention_forward")]
    if weights:
        passes.append(run("attention_weights"))
    if "gradients" in problem.features:
        passes.append(run("attention_backward"))
    return details_of_notes(passes, problem.return_lse and not weights)


def details_of_notes(passes: Sequence[list[dict[str, Any]]], returns_lse: bool) -> Details:
    """Combines the notes of the passes of a call. The extra memory is the largest working memory of
    a pass, plus what is kept from the first pass for the others."""
    kernels = [note for notes in passes for note in notes if "kernel" in note]
    kept = {note["buffer"]: note["bytes"] for note in passes[0] if note.get("owner") == "kept"}
    if returns_lse:
        kept = {}
    first: dict[str, Any] = kernels[0] if kernels else {"kernel": "none, there is nothing to do"}
    names = [note["kernel"].split("_kernel")[0] for note in kernels]
    return _details(
        names or [first["kernel"]],
        kept,
        [_working_memory(notes) for notes in passes],
        isa=first.get("isa", ""),
        reason=first.get("reason", ""),
        block_m=first.get("block_m", 0),
        block_n=first.get("block_n", 0),
        launches=tuple(note["kernel"] for note in kernels if "blocks" in note),
    )


def _details(
    names: list[str], kept: dict[str, int], working: list[dict[str, int]], **others: Any
) -> Details:
    most: dict[str, int] = max(working, key=lambda buffers: sum(buffers.values()))
    buffers = kept | most
    kernel, extra_bytes = " + ".join(dict.fromkeys(names)), sum(buffers.values())
    return Details(kernel, extra_bytes, buffers=tuple(buffers.items()), **others)


def _working_memory(notes: list[dict[str, Any]]) -> dict[str, int]:
    buffers: dict[str, int] = {}
    for note in notes:
        if note.get("owner") == "call":
            buffers[note["buffer"]] = buffers.get(note["buffer"], 0) + note["bytes"]
    workspaces = [note["threads"] * note["workspace"] for note in notes if "workspace" in note]
    if any(workspaces):
        buffers["the threads' workspaces"] = max(workspaces)
    return buffers


def _of_triton(problem: Problem, call: dict[str, Any], weights: bool) -> Details:
    from ..kernels import operators
    from ..kernels.tiles import arch_of

    arguments = Arguments(**{name: call[name] for name in Arguments._fields})
    inputs = (call["query"], call["key"], call["value"])
    arch = arch_of(problem.device)
    plain = problem.is_plain and not problem.differentiable
    forward = operators.schedule_forward(*inputs, arguments, not plain, arch)
    plans = [forward]
    if weights:
        plans.append(operators.schedule_weights(call, arch))
    if "gradients" in problem.features:
        plans.append(operators.schedule_backward(call, arch))
    is_kept = not plain and (weights or not problem.return_lse)
    launches = [launch for plan in plans for launch in plan.launches]
    first = launches[0].constants if launches else {}
    return _details(
        [each.kernel.__name__.removesuffix("_kernel") for each in launches],
        {"the log-sum-exp": _bytes(forward.results[1:])} if is_kept else {},
        [{name: _bytes([x]) for name, x in plan.buffers.items()} for plan in plans],
        isa=arch.name,
        reason=forward.reason,
        block_m=first.get("BLOCK_M", 0),
        block_n=first.get("BLOCK_N", 0),
        launches=tuple(each.kernel.__name__ for each in launches),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _of_reference(problem: Problem) -> Details:
    scores = problem.batch * problem.heads_q * problem.seqlen_q * problem.seqlen_k
    element = 8 if problem.dtype == torch.float64 else 4
    # Scores, weights and visibility; with a backward, as much again for gradients.
    copies = 6 if "gradients" in problem.features else 3
    return Details("attention_reference", copies * scores * element)
