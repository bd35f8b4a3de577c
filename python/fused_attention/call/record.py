"""What served the calls of a program: `record_calls`.

A mode below autograd sees each operator that the thread runs: ours, PyTorch's attention, and the
products and the softmax of attention that is written out. The first call of each kind is described
by the notes that the operator itself takes (csrc/notes.h), and by the reasons of the capability
table, as in `explain`. A record holds numbers and strings, never a tensor.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._version import __version__
from ..errors import wrong_type
from ..operators import cuda
from ..operators._torch import is_compiling, leave_mode, schema_of
from ..operators.arguments import BOTTOM_RIGHT_ONLY, CAUSAL, PRECISION, Arguments
from ..operators.handles import arguments
from .backends import (
    BACKENDS,
    CPU,
    CUDA,
    REFERENCE,
    TRITON,
    Backend,
    Request,
    first_without_reason,
)
from .explain import Details, details_of, details_of_notes, notes_of
from .observe import OperatorMode, active_mode
from .options import Options
from .problem import Problem

PYTORCH = "pytorch"  # stands for a backend where PyTorch serves a call


# -- Call sites --------------------------------------------------------------------------


class Site(NamedTuple):
    """Who called: the innermost line outside of torch and this package, and the module."""

    file: str
    line: int
    module: str  # its path in the outermost module, layers as "*"; "" outside of modules

    def __str__(self) -> str:
        return f"{'/'.join(Path(self.file).parts[-2:])}:{self.line}"


# Inductor writes the code of compiled graphs to files; "<frozen" and "<eval_with_key>" are Python's
# importer and the code of torch.fx.
_INSIDE = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[1]}/", "<frozen", "<eval_")
_CALLS_MODULE: CodeType = nn.Module._call_impl.__code__


class _Callers:
    """Finds call sites, and knows the paths of the modules that it has met."""

    def __init__(self) -> None:
        self._inside: dict[str, bool] = {}
        self._paths: dict[int, tuple[weakref.ref[nn.Module], str]] = {}

    def site(self, frame: FrameType | None) -> Site:
        place, path = None, ""
        while frame is not None:
            code = frame.f_code
            if code is _CALLS_MODULE:
                path = path or self._path_of(frame)
                if place is not None:
                    break
            elif place is None and not self._is_inside(code.co_filename):
                place = code.co_filename, frame.f_lineno
                if path:
                    break
            frame = frame.f_back
        return Site(*(place or ("unknown", 0)), path)

    def _is_inside(self, file: str) -> bool:
        inside = self._inside.get(file)
        if inside is None:
            inside = file.startswith(_INSIDE) or "torchinductor_" in file
            self._inside[file] = inside
        return inside

    def _path_of(self, frame: FrameType) -> str:
        module = frame.f_locals["self"]
        known = self._paths.get(id(module))
        if known is None or known[0]() is not module:
            self._name_modules(frame)
            known = self._paths.get(id(module))
        return type(module).__name__ if known is None else known[1]

    def _name_modules(self, frame: FrameType) -> None:
        outermost, outer = frame, frame.f_back
        while outer is not None:
            if outer.f_code is _CALLS_MODULE:
                outermost = outer
            outer = outer.f_back
        root = outermost.f_locals["self"]
        for name, module in root.named_modules():
            path = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", f".{name}" if name else "")
            self._paths[id(module)] = weakref.ref(module), type(root).__name__ + path


# -- Rows --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Served:
    """What all calls of one kind from one place have in common."""

    site: Site
    operator: str
    tensors: dict[str, tuple[tuple[int, ...], str]]  # shape and dtype of each argument
    options: dict[str, Any]
    device: str
    backend: str  # a row of the capability table, or "pytorch"
    details: Details
    why: tuple[str, ...]  # why no faster row, or nothing of ours, served the calls
    is_timed: bool


@dataclass
class Row:
    """Calls of one kind from one place, and how long they took."""

    served: Served
    calls: int = 0
    nanoseconds: int = 0

    def as_json(self) -> dict[str, Any]:
        served, details = self.served, self.served.details
        total = self.nanoseconds / 1e6 if served.is_timed else None
        return {
            "file": served.site.file,
            "line": served.site.line,
            "module": served.site.module,
            "operator": served.operator,
            "shapes": {name: list(shape) for name, (shape, _) in served.tensors.items()},
            "dtypes": {name: dtype for name, (_, dtype) in served.tensors.items()},
            "options": served.options,
            "device": served.device,
            "backend": served.backend,
            "kernel": details.kernel,
            "isa": details.isa,
            "tiles": [details.block_m, details.block_n] if details.block_m else None,
            "chosen": details.reason,
            "extra_bytes": details.extra_bytes,
            "why": list(served.why),
            "calls": self.calls,
            "total_ms": total,
            "mean_us": None if total is None else total * 1e3 / self.calls,
        }


class Calls:
    """The calls that a `record_calls` block has seen; it may be read inside the block too."""

    def __init__(self, missed: bool) -> None:
        self.missed = missed
        self._rows: dict[Served, Row] = {}
        self._lock = threading.Lock()
        self._mode: _Recorder | None = None

    def __enter__(self) -> Calls:
        if self._mode is not None:
            raise RuntimeError("record_calls: this record is being taken already")
        mode = active_mode()
        if not isinstance(mode, _Recorder):
            mode = _Recorder()
            mode.__enter__()
        mode.begin(self)
        self._mode = mode
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        mode, self._mode = self._mode, None
        assert mode is not None
        mode.end(self)

    def add(self, served: Served, nanoseconds: int) -> None:
        with self._lock:
            row = self._rows.get(served)
            if row is None:
                row = self._rows[served] = Row(served)
            row.calls += 1
            row.nanoseconds += nanoseconds

    @property
    def rows(self) -> list[Row]:
        """A row for each kind of call and call site, in the order of their first calls."""
        with self._lock:
            return list(self._rows.values())

    def to_json(self) -> str:
        rows = [row.as_json() for row in self.rows]
        document = {"fused_attention": __version__, "torch": torch.__version__, "rows": rows}
        return json.dumps(document, indent=1)

    def table(self, columns: int | None = None) -> str:
        """Returns the calls as text within `columns`, by default those of the terminal: the slowest
        first, calls that differ only in their sizes together."""
        from ..tools import console

        columns = columns or console.width()
        groups = sorted(_grouped(self.rows), key=lambda group: -group.nanoseconds)
        if not groups:
            return "No attention was called."
        header = ("call site", "calls", "total ms", "mean us", "backend")
        cells = [group.cells() for group in groups]
        lines = console.fitting_table(header, cells, [0] * len(header), columns).split("\n")
        text = lines[:2]
        for line, group in zip(lines[2:], groups, strict=True):
            details = (console.paragraph(f"  {part}", columns) for part in group.details())
            text += [line, *details]
        others = sum(x.calls for x in groups if x.served.backend in (PYTORCH, REFERENCE.name))
        total = sum(group.calls for group in groups)
        return "\n".join([*text, f"{total} calls, {others} of them by no kernel of this package"])

    __str__ = table


def record_calls(*, missed: bool = True) -> Calls:
    """Records the attention that this thread runs in a `with` block, and what served it.

        with record_calls() as calls:
            model(x)
        print(calls.table())

    calls.table() lists for each call site the shapes, dtypes, options, backend, kernel, the number
    of calls and their time, and why a call was not served by a faster backend, or not here.
    calls.to_json() has the same as JSON, calls.rows as data.

    missed: also what is not served here: PyTorch's own attention, and softmax(q kᵀ) v written out
        with batched products (`torch.bmm`, `@`, einsum).

    Backward passes that run in the block are recorded too, for the line that started them (on a
    GPU, PyTorch starts them in a thread of its own, and the line is unknown), but not the backward
    of attention that is written out or that the reference serves. Times are those of the operators
    on a CPU; there are none for a GPU, where kernels run after the call. Compiled code stays
    compiled, and its calls of our operators are recorded; what the compiler fuses is not seen.
    Calls of other threads are not recorded, nor those with tensor subclasses or fake tensors.
    Blocks nest, and each records. A record keeps no tensor alive.

    Raises ArgumentTypeError if missed is not a bool.
    """
    if not isinstance(missed, bool):
        wrong_type("missed", "a bool", type(missed).__name__)
    return Calls(missed)


# -- The table ---------------------------------------------------------------------------


@dataclass
class _Group:
    """Rows that differ only in sizes."""

    served: Served
    sizes: dict[str, list[tuple[int, ...]]]
    calls: int = 0
    nanoseconds: int = 0
    extra_bytes: int = 0  # the most

    def cells(self) -> tuple[str, ...]:
        served, ms = self.served, self.nanoseconds / 1e6
        total, mean = f"{ms:.2f}", f"{ms * 1e3 / self.calls:.0f}"
        if not served.is_timed:
            total = mean = "–"
        return str(served.site), str(self.calls), total, mean, served.backend

    def details(self) -> Iterator[str]:
        served = self.served
        if served.site.module:
            yield f"in {served.site.module}"
        first = next(iter(served.tensors.values()), ((), ""))[1]
        parts = [served.operator]
        for name, shapes in self.sizes.items():
            dtype = served.tensors[name][1]
            parts.append(f"{name} {_sizes(shapes)}" + (f" {dtype}" if dtype != first else ""))
        parts += [first] + [f"{name}={x}" for name, x in served.options.items()]
        yield ", ".join(parts)
        details = served.details
        parts = [f"kernel {details.kernel}"]
        if details.isa:
            parts.append(details.isa)
        if details.block_m:
            parts.append(f"tiles of {details.block_m} queries x {details.block_n} keys")
        if self.extra_bytes >= 2**16:
            parts.append(f"extra memory {self.extra_bytes / 2**20:.1f} MiB")
        yield ", ".join(parts)
        yield from served.why


def _sizes(shapes: Sequence[tuple[int, ...]]) -> str:
    """Returns shapes of one rank as one: 1x9x(8-71)x64."""

    def size(least: int, most: int) -> str:
        return str(least) if least == most else f"({least}-{most})"

    return "x".join(size(min(sizes), max(sizes)) for sizes in zip(*shapes, strict=True))


def _grouped(rows: Sequence[Row]) -> list[_Group]:
    groups: dict[Any, _Group] = {}
    for row in rows:
        served = row.served
        kinds = tuple((name, len(x[0]), x[1]) for name, x in served.tensors.items())
        details, options = served.details, json.dumps(served.options)
        key = (
            *(served.site, served.operator, kinds, options, served.device, served.backend),
            *(details.kernel, details.isa, details.block_m, details.block_n, served.why),
        )
        group = groups.setdefault(key, _Group(served, {name: [] for name in served.tensors}))
        group.calls += row.calls
        group.nanoseconds += row.nanoseconds
        group.extra_bytes = max(group.extra_bytes, details.extra_bytes)
        for name, (shape, _) in served.tensors.items():
            group.sizes[name].append(shape)
    return list(groups.values())


# -- The mode ----------------------------------------------------------------------------

_Role = Callable[["_Recorder", Any, tuple[Any, ...], dict[str, Any]], Any]
_Notes = list[dict[str, Any]]


class _Recorder(OperatorMode):
    """Records the operators of one thread for every record that is being taken in it."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[Calls] = []
        self._missed = False  # whether a record wants what is not served here
        self.scores = _Tracked()
        self._callers = _Callers()
        self._known: dict[Any, Served | None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_compiling() or types:  # traced by Dynamo, or a tensor subclass that dispatches itself
            return func(*args, **kwargs)
        role = _ROLES.get(func, _to_find)
        if role is _to_find:
            role = _ROLES[func] = _role_of(func)
        if role is None or (role in _OF_WRITTEN_OUT and not self._missed):
            return func(*args, **kwargs)
        return role(self, func, args, kwargs)

    def begin(self, record: Calls) -> None:
        self._records.append(record)
        self._missed = self._missed or record.missed

    def end(self, record: Calls) -> None:
        self._records.remove(record)
        self._missed = any(other.missed for other in self._records)
        if not self._records and active_mode() is self:  # another thread may end a generator
            leave_mode(self)

    def announced(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return self.run(function, args, kwargs, _served_by_reference)

    def site(self) -> Site:
        return self._callers.site(sys._getframe(1))

    def run(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        describe: Callable[..., Served | None],
    ) -> Any:
        """Runs a call and records it; the first call of a kind takes notes, and is described."""
        site, forms = self.site(), [_form(x) for x in args]
        if kwargs:
            forms += [(name, _form(x)) for name, x in kwargs.items()]
        key = (function, site, args[0].device, *forms)
        if key in self._known:
            served = self._known[key]
            start = time.perf_counter_ns()
            out = function(*args, **kwargs)
            nanoseconds = time.perf_counter_ns() - start
        else:
            with _Listening(function) as listening:
                start = time.perf_counter_ns()
                out = function(*args, **kwargs)
                nanoseconds = time.perf_counter_ns() - start
            served = describe(site, function, args, kwargs, listening.notes)
            self._known[key] = served
        if served is not None:
            self.add(served, nanoseconds)
        return out

    def add(self, served: Served, nanoseconds: int) -> None:
        for record in self._records:
            if record.missed or served.backend != PYTORCH:
                record.add(served, nanoseconds)


def _form(x: Any) -> Any:
    """Returns what tells an argument's kind: numbers only, no tensor."""
    if not isinstance(x, Tensor):
        return x
    try:
        return x.shape, x.dtype, x.stride()[-1:]
    except RuntimeError:  # nested tensors have no shape
        return "nested"


class _Listening:
    """Takes the notes of an operator of ours that runs in the block."""

    def __init__(self, function: Any) -> None:
        namespace = getattr(function, "namespace", "")
        name = cuda.NAMESPACE if namespace == cuda.NAMESPACE else "fused_attention"
        self._operators = getattr(torch.ops, name + "_dry_run") if namespace else None
        self.notes: _Notes = []

    def __enter__(self) -> _Listening:
        if self._operators is not None:
            self._operators.notes(True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._operators is not None:
            self.notes = notes_of(self._operators)


# -- Softmax written out -----------------------------------------------------------------


@dataclass
class _Scores:
    """q kᵀ, and then the weights, of attention that is written out."""

    head_dim: int
    nanoseconds: int  # of all operators on the way
    softmax: str = ""
    shape: tuple[int, ...] = ()  # of the weights
    site: Site | None = None
    is_done: bool = False  # the backward uses the weights again


class _Tracked:
    """The tensors that are scores or weights, as long as they live."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[weakref.ref[Tensor], _Scores]] = {}

    def __bool__(self) -> bool:
        return bool(self._of)

    def get(self, x: Any) -> _Scores | None:
        found = self._of.get(id(x))
        return found[1] if found is not None and found[0]() is x else None

    def put(self, x: Tensor, scores: _Scores) -> None:
        number = id(x)
        self._of[number] = weakref.ref(x, lambda _: self._of.pop(number, None)), scores


def _timed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
    start = time.perf_counter_ns()
    out = func(*args, **kwargs)
    return out, time.perf_counter_ns() - start


def _product(mode: _Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    left, right = args[-2:]
    out, nanoseconds = _timed(func, args, kwargs)
    scores = mode.scores.get(left)
    if scores is not None and scores.site is not None:
        if not scores.is_done:
            scores.is_done = True
            scores.nanoseconds += nanoseconds
            mode.add(_written_out(scores, right), scores.nanoseconds)
    elif left.device.type != "meta" and not (_is_parameter(left) or _is_parameter(right)):
        mode.scores.put(out, _Scores(left.shape[-1], nanoseconds))
    return out


def _is_parameter(x: Tensor) -> bool:
    return isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter)


def _softmax(mode: _Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, dim = args[:2]
    scores = mode.scores.get(x)
    if scores is None or scores.site is not None or dim not in (-1, x.dim() - 1):
        return func(*args, **kwargs)
    out, nanoseconds = _timed(func, args, kwargs)
    scores.nanoseconds += nanoseconds
    scores.softmax, scores.shape, scores.site = _name(func), tuple(x.shape), mode.site()
    mode.scores.put(out, scores)
    return out


def _follow(mode: _Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator that may stand between the products and the softmax."""
    scores = next(filter(None, map(mode.scores.get, args)), None) if mode.scores else None
    if scores is None:
        return func(*args, **kwargs)
    out, nanoseconds = _timed(func, args, kwargs)
    scores.nanoseconds += nanoseconds
    mode.scores.put(out[0] if isinstance(out, tuple) else out, scores)
    return out


def _written_out(scores: _Scores, value: Tensor) -> Served:
    *batch, seqlen_q, seqlen_k = scores.shape
    dtype, head_dim_v = _dtype_name(value), value.shape[-1]
    sizes = {
        "query": (*batch, seqlen_q, scores.head_dim),
        "key": (*batch, seqlen_k, scores.head_dim),
        "value": (*batch, seqlen_k, head_dim_v),
    }
    in_sdpa = scores.softmax == "_safe_softmax"  # which only scaled_dot_product_attention calls
    head_dims = {"query": scores.head_dim, "value": head_dim_v}
    remedy = _SDPA if in_sdpa else _WRITTEN_OUT
    extra_bytes = torch.Size(scores.shape).numel() * value.element_size()
    assert scores.site is not None
    return Served(
        scores.site,
        "scaled_dot_product_attention, unfused" if in_sdpa else "written out",
        {name: (shape, dtype) for name, shape in sizes.items()},
        {},
        str(value.device),
        PYTORCH,
        Details(f"bmm + {scores.softmax} + bmm", extra_bytes),
        _why_not_here(value, head_dims, remedy),
        value.device.type == "cpu",
    )


# -- What served a call ------------------------------------------------------------------

# The tasks of operators other than those of attention.
_TASK_OF = {
    "attention_weights": "attention_weights",
    "attention_jvp": "second_derivatives",
    "attention_backward_jvp": "second_derivatives",
    "dropout_keep_mask": "dropout_mask",
    "kv_cache_append_": "kv_cache_append_",
}


def _dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _served_here(
    site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], notes: _Notes
) -> Served | None:
    name, named, first = _name(func), arguments(func, args, kwargs), args[0]
    if first.device.type == "meta":
        return None
    task = "masked_softmax" if name.startswith("masked_softmax") else _TASK_OF.get(name)
    details = Details(name, 0)
    if task is not None:
        row, refused = first_without_reason(Request(first.device, first.dtype), task)
    else:
        row = CUDA if func.namespace == cuda.NAMESPACE else CPU if first.is_cpu else TRITON
        refused = _refused_before(row, named)
        if row is TRITON and name.startswith("attention_forward"):
            details = details_of(row, *_problem_of(named))
    if any("operator" in note for note in notes):
        details = details_of_notes([notes], returns_lse=False)
    return _served(site, name, named, row.name, details, _reasons(refused) + _copies(details))


def _served_by_reference(
    site: Site,
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    notes: _Notes,
) -> Served | None:
    query, key, value, *others = args
    if type(query) not in (Tensor, nn.Parameter) or query.device.type == "meta":
        return None
    named = {"query": query, "key": key, "value": value, **Arguments(*others)._asdict()}
    problem, *_ = _problem_of(named)
    row, refused = first_without_reason(problem)
    why = _reasons(refused)
    if row is not REFERENCE:
        why = (f"the reference was asked for by name: the backend {row.name} would serve it",)
    details = details_of(REFERENCE, *_problem_of(named))
    return _served(site, "attention_reference", named, REFERENCE.name, details, why)


def _served_by_pytorch(
    site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], notes: _Notes
) -> Served | None:
    name, named, query = _name(func), arguments(func, args, kwargs), args[0]
    if query.is_nested or query.device.type == "meta":
        return None
    if notes:  # patch_sdpa replaced the operator
        details = details_of_notes([notes], returns_lse=False)
        return _served(site, name, named, CPU.name, details, _copies(details))
    head_dims, remedy = {"query": query.shape[-1]}, _SDPA
    if "num_heads" in named or "num_head" in named:
        heads = named.get("num_heads") or named["num_head"]
        head_dims, remedy = {"query": query.shape[-1] // heads}, _NATIVE_PATH
    elif isinstance(value := named.get("value"), Tensor):
        head_dims["value"] = value.shape[-1]
    why = _why_not_here(query, head_dims, remedy)
    kernel = name.removeprefix("_scaled_dot_product_")
    return _served(site, name, named, PYTORCH, Details(kernel, 0), why)


_SDPA = "PyTorch's scaled_dot_product_attention: patch_sdpa() would send it to the backend"
_NATIVE_PATH = "the native path of torch.nn: patch_sdpa() would send it to the backend"
_WRITTEN_OUT = "softmax(q kᵀ) v is written out: attention() would run it on the backend"


def _why_not_here(x: Tensor, head_dims: dict[str, int], remedy: str) -> tuple[str, ...]:
    """Returns why a call was PyTorch's: no kernel here serves it, or nothing sent it here."""
    try:
        row, refused = first_without_reason(Request(x.device, x.dtype, head_dims))
    except NotImplementedError as error:
        return (" ".join(str(error).split()),)
    if row is REFERENCE:
        return _reasons(refused)
    if remedy is not _SDPA or not _is_patched():
        return (f"{remedy} {row.name}",)
    return ("patch_sdpa() left it to PyTorch: report() of its handle says why",)


def _is_patched() -> bool:
    return F.scaled_dot_product_attention.__module__.startswith("fused_attention.")


def _served(
    site: Site,
    operator: str,
    named: Mapping[str, Any],
    backend: str,
    details: Details,
    why: tuple[str, ...],
) -> Served:
    tensors = {
        name: (tuple(x.shape), _dtype_name(x))
        for name, x in named.items()
        if isinstance(x, Tensor) and not name.startswith(_UNNAMED)
    }
    device = next(x.device for x in named.values() if isinstance(x, Tensor))
    options, is_timed = _options_in(named), device.type == "cpu"
    return Served(site, operator, tensors, options, str(device), backend, details, why, is_timed)


# Tensors that are not what a caller passed, and the parameters of torch.nn's native path.
_UNNAMED = (
    *("grad", "out", "lse", "logsumexp", "philox", "cum_seq"),
    *("qkv_", "proj_", "norm_", "ffn_"),
)


def _options_in(named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the numbers of a call that say more than the default."""
    options = {}
    for name, x in named.items():
        if x is None or isinstance(x, Tensor) or name.startswith("window_"):
            continue
        if name == "causal":
            x = next((word for word, number in CAUSAL.items() if number == x), "")
        elif name == "precision":
            x = next(word for word, number in PRECISION.items() if number == x)
            x = "" if x == "highest" or named["query"].dtype != torch.float32 else x
        elif name == "scale" and "query" in named:
            x = 0 if x == named["query"].shape[-1] ** -0.5 else x
        if x:
            options[name] = x
    window = named.get("window_left", -1), named.get("window_right", -1)
    return options if window == (-1, -1) else options | {"window_size": list(window)}


def _name(func: Any) -> str:
    name: str = schema_of(func).name
    return name.split("::")[1]


def _reasons(refused: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    return tuple(f"not {name}: {'; '.join(reasons)}" for name, reasons in refused.items())


def _copies(details: Details) -> tuple[str, ...]:
    copied = [name for name, _ in details.buffers if name.startswith("a copy of ")]
    return (f"makes {', '.join(copied)} first",) if copied else ()


def _refused_before(row: Backend, named: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the reasons against the rows before this one that serve its device."""
    device = named["query"].device.type
    before = [other for other in BACKENDS[: BACKENDS.index(row)] if device in other.devices]
    if not before:
        return {}
    problem, *_ = _problem_of(named)
    return {other.name: other.refuses(problem) or [other.prefers(problem)] for other in before}


def _problem_of(named: Mapping[str, Any]) -> tuple[Problem, Tensor, Tensor, Tensor, Options]:
    """Returns the problem that the arguments of an operator came from, without gradients, and its
    query, key, value and options."""
    number = named["causal"]
    options = Options(
        **{name: named[name] for name in Options._fields if name in named}
        | {
            "causal": next((word for word, x in CAUSAL.items() if x == number), False),
            "diagonal": "bottom_right" if number == BOTTOM_RIGHT_ONLY else None,
            "window_size": (named["window_left"], named["window_right"]),
            "precision": next(word for word, x in PRECISION.items() if x == named["precision"]),
        }
    )
    inputs = named["query"], named["key"], named["value"]
    with torch.no_grad():
        return Problem.from_call(*inputs, options), *inputs, options


# -- Roles -------------------------------------------------------------------------------

_FOLLOW = {"view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "transpose", "permute"}
_FOLLOW |= {"alias", "clone", "detach", "slice", "_to_copy", "mul", "mul_", "div", "div_", "tanh"}
_FOLLOW |= {"add", "add_", "sub", "sub_", "masked_fill", "masked_fill_", "where", "native_dropout"}
_FOLLOW |= {"reshape", "contiguous", "to", "dropout"}
_COMPOSITE = {"scaled_dot_product_attention", "_scaled_dot_product_attention_math"}
_COMPOSITE |= {"matmul", "einsum", "softmax"}
_NATIVE = {"_native_multi_head_attention", "_transformer_encoder_layer_fwd"}
_NATIVE |= {"_flash_attention_forward", "_efficient_attention_forward"}


def _ours(mode: _Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return mode.run(func, args, kwargs, _served_here)


def _pytorchs(mode: _Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return mode.run(func, args, kwargs, _served_by_pytorch)


def _composite(mode: _Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operator that consists of others, which the mode sees too. In inference mode PyTorch
    decomposes them below the mode."""
    if any(isinstance(x, Tensor) and x.is_nested for x in args):
        return func(*args, **kwargs)
    with mode:
        return func.decompose(*args, **kwargs)


_OF_WRITTEN_OUT = (_product, _softmax, _follow)


def _to_find(mode: _Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Stands for a role that is not known yet."""


_ROLES: dict[Any, _Role | None] = {}


def _role_of(func: Any) -> _Role | None:
    if not isinstance(func, torch._ops.OpOverload):
        return None
    name = _name(func)
    if func.namespace in ("fused_attention", cuda.NAMESPACE):
        is_call = name.startswith(("attention_", "masked_softmax", "dropout_", "kv_cache_"))
        return _ours if is_call else None
    if func.namespace != "aten":
        return None
    if name in _COMPOSITE:
        return _composite
    if name.startswith("_scaled_dot_product_") or name in _NATIVE:
        return _pytorchs
    if name in ("bmm", "baddbmm"):
        return _product
    if name in ("_softmax", "_safe_softmax"):
        return _softmax
    return _follow if name in _FOLLOW else None
