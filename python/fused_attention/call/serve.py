"""From what a caller says to a result: finds the plan of the call, or makes it, and runs it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import argument_error
from ..operators._torch import is_compiling
from .backends import choose
from .options import Options
from .plan import find, kind_of_call, kind_of_option, may_be_refusal, remember, run, run_new
from .problem import Problem


def said_by(options: Options, backend: str) -> tuple[Any, ...]:
    """What the options of a call add to its kind."""
    same_lengths = options.cu_seqlens_q is options.cu_seqlens_k
    return (*map(kind_of_option, options), same_lengths, backend)


def serve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    backend: str = "auto",
    said: tuple[Any, ...] | None = None,
) -> Any:
    """`attention`, and with the starts of `options` a part of it.

    said: what `said_by` gives, or anything that tells these options from all others.
    """
    kind = plan = refusal = None
    if not is_compiling():
        said = said or said_by(options, backend)
        kind, plan = find(kind_of_call(query, key, value, options.dropout_p != 0.0, said))
    if plan is not None:
        try:
            return run(plan, query, key, value, options)
        except RuntimeError as error:
            if not may_be_refusal(error):
                raise
            refusal = error
    problem = Problem.from_call(query, key, value, options)
    plan = choose(problem, backend).plan(problem)
    if refusal is not None:
        raise argument_error(refusal)
    remember(kind, plan)
    if is_compiling():
        return run(plan, query, key, value, options)
    return run_new(plan, query, key, value, options)
