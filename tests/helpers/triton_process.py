"""Triton's compiler, in a process of its own.

When it is imported, Triton decides whether its functions are interpreted or compiled. The tests'
own process interprets them (conftest.py); this one compiles. Both keep what they compiled in
.cache/triton of the repository, by the hash of sources and options, unless TRITON_CACHE_DIR says
otherwise.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from paths import CACHE


def compiling(function: Callable[..., Any], *args: Any) -> Any:
    """Returns function(*args) of the compiling process; RuntimeError says what was raised there."""
    result, error = _process().submit(_call, function, args).result()
    if error:
        raise RuntimeError(error)
    return result


@functools.cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_prepare)


def _prepare() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))
    # This is the default of Triton 3.9; it is set because 3.10 changes the default.
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"


def _call(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, str]:
    # Not every exception of a compiler survives the way between processes.
    try:
        return function(*args), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"[-2000:]
