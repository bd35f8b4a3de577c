"""Serves calls: finds the plan of a call, or makes one, and runs it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import argument_error
from ..operators._torch import is_compiling
from .backends import choose
from .options import DEFAULTS, Options
from .plan import (
    find,
    kind_of_call,
    kind_of_option,
    may_be_refusal,
    remember,
    run,
    run_new,
)
from .problem import Problem

_COUNT = range(len(DEFAULTS))


def said_by(options: Options, backend: str) -> tuple[Any, ...]:
    """Returns what the options of a call add to its kind."""
    kinds = [
        (i, kind_of_option(x))
        for i, x, default in zip(_COUNT, options, DEFAULTS, strict=True)
        if x is not default
    ]
    return (*kinds, options.cu_seqlens_q is options.cu_seqlens_k, backend)


def serve(
    query: Tensor, key: Tensor, value: Tensor, options: Options, backend: str = "auto"
) -> Any:
    """Serves a call of `attention`, or a part of a larger one if `options` has its starts."""
    kind = plan = None
    compiling = is_compiling()
    if not compiling:
        said = said_by(options, backend)
        kind, plan = find(kind_of_call(query, key, value, options.dropout_p != 0.0, said))
    if plan is None:
        return serve_new(kind, query, key, value, options, backend)
    try:
        return run(plan, query, key, value, options)
    except RuntimeError as error:
        if not may_be_refusal(error):
            raise
        refusal = error
    raise refused(refusal, query, key, value, options, backend)


def serve_new(
    kind: tuple[Any, ...] | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    backend: str,
) -> Any:
    """Serves a call of a kind that was not seen before: validates, chooses, remembers, runs."""
    problem = Problem.from_call(query, key, value, options)
    plan = choose(problem, backend).plan(problem)
    remember(kind, plan)
    if is_compiling():
        return run(plan, query, key, value, options)
    return run_new(plan, query, key, value, options)


def refused(
    refusal: RuntimeError,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    backend: str,
) -> Exception:
    """Returns the error of an operator that refused a call of a known kind; validation raises a
    better one if it can. Nothing is run again."""
    choose(Problem.from_call(query, key, value, options), backend)
    return argument_error(refusal)
