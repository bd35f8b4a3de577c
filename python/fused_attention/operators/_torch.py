"""All private names of PyTorch that this package uses, each with a substitute if it is gone.

A substitute is correct and may be slow: a question that cannot be asked gets the answer that leads
to the slower, safe path.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

_C = torch._C


def _private(name: str, instead: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `torch._C.<name>`, bound once: looking it up costs as much as calling it."""
    found: Callable[..., Any] = getattr(_C, name, instead)
    return found


are_transforms_active = _private("_are_functorch_transforms_active", lambda: True)
len_torch_function_stack = _private("_len_torch_function_stack", lambda: 1)
len_torch_dispatch_stack = _private("_len_torch_dispatch_stack", lambda: 1)
is_any_autocast_enabled = _private("_is_any_autocast_enabled", lambda: True)
is_jit_tracing = _private("_is_tracing", torch.jit.is_tracing)
get_float32_matmul_precision = _private(
    "_get_float32_matmul_precision", torch.get_float32_matmul_precision
)
is_compiling = torch.compiler.is_compiling


def forward_mode_is_on() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return getattr(forward_ad, "_current_level", 0) >= 0


_F = TypeVar("_F", bound=Callable[..., Any])


def assume_constant_result(function: _F) -> _F:
    """torch.compiler.assume_constant_result, without the second that it takes to import Dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# -- Transforms, modes and settings ------------------------------------------------------


def transform_is_active() -> bool:
    """Whether torch.func or forward mode is on, where a bare operator would have no derivative."""
    if is_compiling():  # Dynamo may compile this function alone, in a frame of its own
        return _loses_gradients(torch.is_grad_enabled())
    return are_transforms_active() or forward_mode_is_on()


def check_transforms(name: str) -> None:
    """Raises while compiling under a transform or a forward-mode level, where gradients and
    tangents would be lost silently."""
    if is_compiling() and _loses_gradients(torch.is_grad_enabled()):
        raise NotImplementedError(
            f"{name}: gradients of or inside torch.func transforms, and forward mode, inside "
            "torch.compile are not built yet; call the transform outside torch.compile, or "
            "torch.vmap under torch.no_grad(), or use backend='reference' of attention"
        )


@assume_constant_result
def _loses_gradients(grad_enabled: bool) -> bool:
    # Under a transform Dynamo takes no Function, and a bare operator has zeros for its gradients.
    # Under vmap it does not see whether a mapped tensor requires a gradient.
    if forward_mode_is_on():
        return True
    try:
        vmap = _C._functorch.TransformType.Vmap
        levels = _C._functorch.get_interpreter_stack() or ()
    except AttributeError:
        return are_transforms_active()
    return any(grad_enabled or level.key() != vmap for level in levels)


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors is eager and seen by nothing but the dispatcher."""
    return (
        not is_compiling()
        and not transform_is_active()
        and len_torch_function_stack() == 0
        and all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
    )


@assume_constant_result
def float32_matmul_precision() -> str:
    """Returns the process-wide setting, or "highest" if PyTorch refuses to tell it as one word.

    PyTorch refuses after `torch.backends.*.fp32_precision` was set. While compiling, the setting is
    a constant.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"


# -- torch.jit.trace ---------------------------------------------------------------------


def is_tracing() -> bool:
    """Whether torch.jit.trace runs, or the ONNX exporter that is built on it."""
    return not is_compiling() and is_jit_tracing()


def exports_onnx() -> bool:
    """Whether the ONNX exporter built on torch.jit.trace runs. It knows only PyTorch's operators;
    the reference consists of them."""
    return not is_compiling() and torch.onnx.is_in_onnx_export()


def looks_at_sizes(function: _F) -> _F:
    """Decorates functions that decide by sizes and run no operator.

    While torch.jit.trace runs, sizes are tensors. Inside a decorated function they are numbers, and
    its decisions hold for the sizes that were traced.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not is_tracing():
            return function(*args, **kwargs)
        with _tracer_paused():
            return function(*args, **kwargs)

    return cast(_F, call)


@contextlib.contextmanager
def _tracer_paused() -> Iterator[None]:
    if not hasattr(_C, "_set_tracing_state"):
        yield
        return
    state = _C._get_tracing_state()
    _C._set_tracing_state(None)
    try:
        yield
    finally:
        _C._set_tracing_state(state)


@looks_at_sizes
def int_sizes(x: Tensor) -> tuple[int, ...]:
    """Returns x.shape as numbers, also while torch.jit.trace runs."""
    return x.shape


# -- Modes below autograd ----------------------------------------------------------------

try:
    from torch.utils import _python_dispatch as _dispatch

    _Mode: Any = _dispatch.TorchDispatchMode
    _pop_mode, _push_mode = _dispatch._pop_mode, _dispatch._push_mode
    current_modes = _dispatch._get_current_dispatch_mode_stack
except (ImportError, AttributeError):

    class _Mode:  # type: ignore[no-redef]
        def __init__(self) -> None:
            raise NotImplementedError("record_calls: this PyTorch has no modes of dispatch")

    def current_modes() -> list[Any]:
        return []


class DispatchMode(_Mode):
    """A mode whose `__torch_dispatch__` gets each operator that this thread runs, the backward's
    too. Compiled code stays compiled under it, and only the operators that it calls are seen."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operator imports Dynamo, which takes a second

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


def leave_mode(mode: DispatchMode) -> None:
    """Ends a mode of this thread, even if others were entered since."""
    above = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    _push_mode(mode)
    mode.__exit__(None, None, None)
    for other in reversed(above):
        _push_mode(other)


# -- Operators ---------------------------------------------------------------------------


def schema_of(op: Any) -> Any:
    """Returns an operator's schema: `arguments` (with `name`, `default_value`) and `returns`."""
    return op._schema


def direct(op: Any) -> Callable[..., Any]:
    """Returns `op` as a direct call of the dispatcher: saves 1 us, skips __torch_function__."""
    try:
        schema = schema_of(op)
        handle = _C._dispatch_find_schema_or_throw(schema.name, schema.overload_name)
        return functools.partial(_C._dispatch_call_boxed, handle)
    except AttributeError:
        return cast(Callable[..., Any], op)


def after_writing(op: Any, then: Callable[..., None]) -> Callable[..., None] | None:
    """Returns a kernel for the key ADInplaceOrView: calls `op` below the key, then `then(*args)`.

    Returns None if PyTorch does not let Python go below the key.
    """
    if not hasattr(_C, "_AutoDispatchBelowADInplaceOrView"):
        return None

    def write(keys: Any, *args: Any, **kwargs: Any) -> None:
        with _C._AutoDispatchBelowADInplaceOrView():
            op.redispatch(keys & _C._after_ADInplaceOrView_keyset, *args, **kwargs)
        then(*args, **kwargs)

    return write


def cpu_keys() -> Any:
    """Returns the dispatch keys with which a CPU kernel of PyTorch is called."""
    return _C.DispatchKeySet(_C.DispatchKey.CPU)


def native_sdpa() -> Any:
    """Returns PyTorch's own torch.nn.functional.scaled_dot_product_attention, or None."""
    return getattr(_C._nn, "scaled_dot_product_attention", None)


# -- Nested tensors ----------------------------------------------------------------------


def ragged_dim(x: Tensor) -> int:
    """Returns the ragged dimension of a jagged tensor."""
    return int(x._ragged_idx)  # type: ignore[attr-defined]


def seqlen_bounds(x: Tensor) -> tuple[int | None, int | None]:
    """Returns the shortest and longest length of a jagged tensor, as far as it knows them."""
    return getattr(x, "_maybe_min_seqlen", None), getattr(x, "_maybe_max_seqlen", None)


# -- vmap and fake tensors ---------------------------------------------------------------


def mapped_by_every_vmap(device: torch.device) -> Tensor | None:
    """Returns a tensor that every active vmap maps, or None if it cannot be made. PyTorch calls the
    vmap rule of an operator only if one of its arguments is mapped."""
    try:
        from torch._functorch.pyfunctorch import (
            VmapInterpreter,
            retrieve_all_functorch_interpreters,
            temporarily_clear_interpreter_stack,
        )
    except ImportError:
        return None
    levels = [x for x in retrieve_all_functorch_interpreters() if isinstance(x, VmapInterpreter)]
    with temporarily_clear_interpreter_stack():
        like = torch.empty([x.batch_size() for x in levels], device=device)
        for x in levels:
            like = _C._functorch._add_batch_dim(like, 0, x.level())
    return like


def guard_or_false(condition: Any) -> bool:
    """Returns a condition on sizes, or False if it depends on sizes known only at run time."""
    try:
        from torch.fx.experimental.symbolic_shapes import guard_or_false as guard
    except ImportError:
        return bool(condition)
    return guard(condition)


def fake_tensors() -> Any:
    """Returns a mode in which tensors have shapes and no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


@contextlib.contextmanager
def without_fake_tensors() -> Iterator[None]:
    """A context in which tensors are real even if `fake_tensors` is on outside."""
    try:
        from torch.fx.experimental.proxy_tensor import unset_fake_temporarily
    except ImportError:
        yield
        return
    with unset_fake_temporarily():
        yield


# The `__torch_function__` of a subclass of Tensor whose calls go straight to __torch_dispatch__.
without_torch_function: Any = torch._C._disabled_torch_function_impl
