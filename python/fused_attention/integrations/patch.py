"""patch_sdpa: runs existing models on fused attention, without a change to their code.

PyTorch's attention is reached in three ways, and a patch covers each. Calls of
`torch.nn.functional.scaled_dot_product_attention` (nn.MultiheadAttention, transformers, and
torch.compile, which guards on the attribute) reach ours, because the attribute is replaced. Names
that were bound by `from torch.nn.functional import ...` before still lead to the native function;
the fused CPU operator that it calls is replaced through PyTorch's registry of flash attention
implementations. The native path of nn.TransformerEncoderLayer in evaluation, which calls neither,
is switched off.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import operators as ops
from ..call.backends import BACKENDS, CPU, REFERENCE, Request
from ..call.problem import as_4d, precision_number
from ..errors import wrong_type, wrong_value
from ..operators._torch import cpu_keys, is_compiling, native_sdpa
from ..operators.arguments import CAUSAL, Arguments, joined_if_dense, split
from ..sdpa import sdpa
from .handle import Handle
from .tally import Tally

NAME = "fused_attention"  # in PyTorch's registry of flash attention implementations


# -- Instead of the function -------------------------------------------------------------


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Calls our attention if a kernel of ours serves the call, else the original function."""
    inputs = (query, key, value, attn_mask, dropout_p, is_causal)
    ours = isinstance(query, Tensor) and query.device.type in _state.devices
    if _state.on and not is_compiling():
        _state.tally.count()
    if _state.on and ours and not (query.is_nested and query.layout == torch.strided):
        return sdpa(*inputs, scale, enable_gqa, _leave)
    return _leave(*inputs, scale=scale, enable_gqa=enable_gqa)


def _leave(*inputs: Any, scale: float | None, enable_gqa: bool) -> Tensor:
    """Calls the original function, and notes why."""
    if _state.on and not is_compiling():
        _state.tally.leave(*inputs, scale=scale, enable_gqa=enable_gqa)
    return _state.original(*inputs, scale=scale, enable_gqa=enable_gqa)


# -- Instead of the operator -------------------------------------------------------------


class _FlashHandle:
    """Replaces PyTorch's fused operators for the CPU by ours until `remove()`.

    PyTorch makes and removes it: `torch.nn.attention.activate_flash_attention_impl`, and
    `restore_flash_attention_impl`.
    """

    def __init__(self) -> None:
        forward = "aten::_scaled_dot_product_flash_attention_for_cpu"
        backward = forward + "_backward"
        native = torch.library.get_kernel(forward, "CPU")
        native_backward = torch.library.get_kernel(backward, "CPU")
        cpu = cpu_keys()

        def flash(query: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not _is_served(query):
                return native.call_boxed(cpu, query, *args, **kwargs)
            _state.tally.operators += 1
            return _flash(query, *args, **kwargs)

        def flash_backward(grad_out: Tensor, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not _is_served(query):
                return native_backward.call_boxed(cpu, grad_out, query, *args, **kwargs)
            return _flash_backward(grad_out, query, *args, **kwargs)

        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():  # "Overriding a previously registered kernel"
            warnings.simplefilter("ignore", UserWarning)
            self._library.impl(forward, flash, "CPU")
            self._library.impl(backward, flash_backward, "CPU")

    def remove(self) -> None:
        self._library._destroy()


def _is_served(query: Tensor) -> bool:
    """Whether our CPU kernels serve the call. PyTorch only calls its operator with values that are
    as wide as the keys."""
    return not CPU.refuses(Request(query.device, query.dtype, {"query": query.shape[-1]}))


def _arguments(query: Tensor, is_causal: bool, scale: float | None, mask: Any) -> Any:
    arguments = Arguments(
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        causal=CAUSAL["top_left" if is_causal else False],
        window_left=-1,
        window_right=-1,
        precision=precision_number(None, query.dtype),
        bias=as_4d(mask),
    )
    return joined_if_dense(*split(arguments))


def _sequence_first(x: Tensor) -> Tensor:
    """Returns x, [B, H, S, ...], in BSH... memory, as PyTorch's fake kernels promise it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    # PyTorch calls this operator only without dropout.
    arguments = _arguments(query, is_causal, scale, attn_mask)
    out, lse = ops.forward(query, key, value, *arguments)
    # PyTorch's lse of a fully masked row is 0, and its own backward may follow after an undo.
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    return out, _sequence_first(lse)


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = _arguments(query, is_causal, scale, attn_mask)
    tensors = (grad_out, None, query, key, value, out, lse.contiguous())
    dq, dk, dv, _, _ = ops.backward(*tensors, *arguments)
    return _sequence_first(dq), _sequence_first(dk), _sequence_first(dv)


# Importing this module offers the implementation by its name, and activates nothing. PyTorch 2.10
# has a registry that cannot restore the original.
_HAS_REGISTRY = hasattr(torch.nn.attention, "restore_flash_attention_impl")
if _HAS_REGISTRY:
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=_FlashHandle)


# -- Patches -----------------------------------------------------------------------------


@dataclass
class _Replaced:
    """An attribute of a module that patches replaced by ours."""

    module: ModuleType
    name: str
    original: Any
    patches: int = 1  # how many patches replaced it


class _State:
    """The state of this process that all patches share."""

    def __init__(self) -> None:
        fast = [row for row in BACKENDS if not row.missing() and row is not REFERENCE]
        self.devices = {device for row in fast for device in row.devices}
        self.on = False  # apart from `patches`, because compiled code guards on it
        self.patches = 0
        self.original: Any = F.scaled_dot_product_attention
        self.tally = Tally()  # since the first of the patches that are active
        self.replaced: dict[tuple[int, str], _Replaced] = {}
        self.fast_path = True
        self.flash = False  # whether the implementation in the registry was activated here

    def apply(self, places: list[tuple[ModuleType, str]]) -> None:
        if not self.on:
            self.on = True
            self.tally.clear()
            self.original = F.scaled_dot_product_attention
            self.fast_path = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            if _HAS_REGISTRY and torch.nn.attention.current_flash_attention_impl() is None:
                torch.nn.attention.activate_flash_attention_impl(NAME)
                self.flash = True
        self.patches += 1
        for module, name in places:
            key = (id(module), name)
            if key in self.replaced:
                self.replaced[key].patches += 1
            else:
                self.replaced[key] = _Replaced(module, name, getattr(module, name))
                setattr(module, name, _sdpa)

    def undo(self, places: list[tuple[ModuleType, str]]) -> None:
        own = [self.replaced[id(module), name] for module, name in places]
        for place in own:
            present = getattr(place.module, place.name)
            if place.patches == 1 and present is not _sdpa:
                raise RuntimeError(
                    f"patch_sdpa: cannot undo, {place.module.__name__}.{place.name} was replaced "
                    f"by {present!r} since. Hint: undo that first"
                )
        for place in own:
            place.patches -= 1
            if place.patches == 0:
                setattr(place.module, place.name, place.original)
                del self.replaced[id(place.module), place.name]
        self.patches -= 1
        if self.patches == 0:
            self.on = False
            torch.backends.mha.set_fastpath_enabled(self.fast_path)
            if self.flash and torch.nn.attention.current_flash_attention_impl() == NAME:
                torch.nn.attention.restore_flash_attention_impl()
            self.flash = False


_state = _State()


def patch_sdpa(modules: Iterable[ModuleType] = ()) -> Handle:
    """Replaces PyTorch's scaled_dot_product_attention by fused attention, at once.

        with patch_sdpa():
            model(x)

        patch = patch_sdpa()
        model(x)
        patch.undo()

    modules: other modules that hold the function after `from torch.nn.functional import
        scaled_dot_product_attention`, under any name; their attribute is replaced as well.

    A patch reaches everything that calls `torch.nn.functional.scaled_dot_product_attention`: models
    of transformers with attn_implementation="sdpa", nn.MultiheadAttention with need_weights=False
    (`replace_multihead_attention` serves the rest, with less memory), and compiled code, which is
    compiled again when it meets the other function. It reaches nn.TransformerEncoderLayer in
    evaluation, by switching off the fast path of `torch.backends.mha`. All other calls
    (from-imports, exported programs) end in PyTorch's fused CPU operator. A patch replaces that
    operator from PyTorch 2.11 on, whose registry of flash attention implementations can restore the
    original, if no other implementation is active there. PyTorch does not use the operator for
    dropout, a mask with a gradient, Ev != E, or tensors that are not 4-D; for such calls name the
    module in `modules`.

    Jagged tensors are packed sequences, causal ones too. Strided nested tensors, and calls that no
    kernel here serves (a head_dim above 512, other dtypes or devices), go where they went before.
    So do wrong calls, which get PyTorch's errors.

    `report()` of the handle says how many calls ours served since the first active patch, which
    went to the original, and why. Calls of compiled code are not counted.

    Patches nest, and may be undone in any order: the original comes back when the last is undone.
    The function is an attribute of a module, so a patch holds for every thread of the process:
    apply and undo it where no other thread is in the middle of a model. Applying and undoing
    themselves are thread-safe.

    Raises ArgumentValueError for a module without the function, ArgumentTypeError for anything that
    is not a module.
    """
    places: list[tuple[ModuleType, str]] = [(F, "scaled_dot_product_attention")]
    targets = (F.scaled_dot_product_attention, native_sdpa(), _sdpa)
    if not isinstance(modules, Iterable):
        wrong_type("modules", "an iterable of modules", type(modules).__name__)
    for module in modules:
        if not isinstance(module, ModuleType):
            wrong_type("modules", "modules", type(module).__name__)
        names = [name for name, x in vars(module).items() if any(x is y for y in targets)]
        if not names:
            wrong_value(
                "modules",
                "modules with an attribute that is scaled_dot_product_attention",
                getattr(module, "__name__", repr(module)),
            )
        places += [(module, name) for name in names if (module, name) not in places]
    return Handle(
        lambda: _state.apply(places),
        lambda: _state.undo(places),
        "patch_sdpa",
        lambda: _state.tally.report(),
    )
