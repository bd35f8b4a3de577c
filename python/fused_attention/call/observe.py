"""How calls are observed while they run: a mode below autograd, and functions that announce
themselves to it, because no operator of ours stands for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ..operators._torch import (
    DispatchMode,
    current_modes,
    is_compiling,
    len_torch_dispatch_stack,
)


class OperatorMode(DispatchMode):
    """A mode that also sees the functions that announce themselves."""

    def announced(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs a function that serves a call."""
        raise NotImplementedError


def active_mode() -> OperatorMode | None:
    """Returns the mode of this thread, or None if there is none."""
    return next((mode for mode in current_modes() if isinstance(mode, OperatorMode)), None)


_F = TypeVar("_F", bound=Callable[..., Any])


def announce(function: _F) -> _F:
    """Decorates a function that serves calls without an operator, so that a mode sees them."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_compiling() or len_torch_dispatch_stack() == 0 or (mode := active_mode()) is None:
            return function(*args, **kwargs)
        return mode.announced(function, args, kwargs)

    return cast(_F, call)
