"""Plans: the operator for all calls of one kind, remembered by what such calls have in common.

A call whose kind (shapes, dtypes, options, gradient mode) was seen before skips validation and
choice. A kind holds numbers and types, never a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..derivatives import autograd
from ..errors import ArgumentValueError, argument_error, is_of_operator
from ..operators import Operators
from ..operators._torch import (
    are_transforms_active,
    check_transforms,
    forward_mode_is_on,
    get_float32_matmul_precision,
    is_compiling,
    is_jit_tracing,
    is_tracing,
    len_torch_function_stack,
)
from ..operators.arguments import split
from .options import Options
from .problem import Problem, arguments_of


class Plan(NamedTuple):
    """`operator(query, key, value, *arguments)` gives out or (out, lse)."""

    operator: Callable[..., Any]
    numbers: tuple[Any, ...] = ()  # among the arguments, as `split` returns them
    # For plain calls: all arguments after query, key and value, so that options are not read.
    plain: tuple[Any, ...] | None = None
    leaves_call: bool = False  # to the function that a patch replaced
    may_be_kept: bool = True  # the operator refuses arguments that do not fit together


LEAVE = Plan(lambda *inputs: None, leaves_call=True)
PLANS: dict[tuple[Any, ...] | None, Plan] = {}
MAX_PLANS = 4096


def plan_of_operators(
    problem: Problem, operators: Operators, functions: autograd.Functions
) -> Plan:
    """Returns the plan on a backend with these operators and the Functions around them."""
    check_transforms("attention")
    numbers, plain = split(problem.numbers)[1], problem.numbers.plain()
    function: Callable[..., Any]
    if is_tracing():
        function = autograd.traced_attention
    elif not problem.differentiable:
        if problem.is_plain:
            direct = operators.direct_forward_plain
            function = direct if problem.is_direct else operators.forward_plain
            return Plan(function, numbers, plain)
        function = operators.direct_forward if problem.is_direct else operators.forward
    elif is_compiling():
        function = functions.compiling
    elif not problem.is_direct:
        function = functions.forward_mode
    elif problem.is_plain:
        return Plan(functions.plain, numbers, (plain,))
    else:
        function = functions.direct
    return Plan(function if problem.return_lse else _first(function), numbers)


def _first(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def out(*inputs: Any) -> Tensor:
        return function(*inputs)[0]

    return out


def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Any:
    if plan.plain is not None:
        return plan.operator(query, key, value, *plan.plain)
    return plan.operator(query, key, value, *arguments_of(query, key, plan.numbers, options))


# -- Kinds -------------------------------------------------------------------------------

_ORDINARY = frozenset({Tensor, torch.nn.Parameter})
_is_grad_enabled = torch.is_grad_enabled


def kind_of_call(
    query: Tensor, key: Tensor, value: Tensor, draws: bool, options: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Returns what all calls that one plan serves have in common: numbers and types only.

    Returns None if a tuple cannot identify the call: for nested tensors, for tensor subclasses,
    torch.func transforms, forward mode and active modes (the conditions of `is_direct`), and while
    torch.jit.trace runs, where sizes are tensors. The tuple leaves out strides, which the operators
    look at and no backend refuses. It also leaves out dtype, device and layout of key and value,
    which the operators compare with query's, unless the call `draws` random numbers before its
    operator could refuse it.
    """
    if (
        type(query) not in _ORDINARY
        or type(key) not in _ORDINARY
        or type(value) not in _ORDINARY
        or are_transforms_active()
        or forward_mode_is_on()
        or len_torch_function_stack() != 0
        or is_jit_tracing()
    ):
        return None
    try:
        shapes = query.shape, key.shape, value.shape
    except RuntimeError:  # nested tensors have none
        return None
    try:
        precision = get_float32_matmul_precision()
    except RuntimeError:  # see float32_matmul_precision
        precision = "highest"
    if draws:
        options += (key.dtype, key.device, key.layout, value.dtype, value.device, value.layout)
        options += (query.layout,)
    return (
        shapes,
        query.dtype,
        query.device,
        _is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
        precision,
        options,
    )


_NUMBERS = frozenset({int, float, bool, str, type(None)})


def kind_of_option(x: Any) -> Any:
    """Returns the type and form of a tensor, or any other option with its type: 2 == 2.0 == True,
    but not all of them are valid."""
    own = x.__class__
    if own in _NUMBERS:  # a quicker test than the one for tensors
        return x, own
    if own is tuple:
        return x, tuple(map(type, x))
    if own in _ORDINARY or isinstance(x, Tensor):
        if x.is_nested:
            return own
        return own, x.shape, x.dtype, x.device, x.layout, _is_grad_enabled() and x.requires_grad
    return x, own


def remember(kind: tuple[Any, ...] | None, plan: Plan) -> None:
    if kind is None or not plan.may_be_kept:
        return
    if len(PLANS) >= MAX_PLANS:
        PLANS.clear()
    PLANS[kind] = plan


def find(kind: tuple[Any, ...] | None) -> tuple[tuple[Any, ...] | None, Plan | None]:
    """Returns the kind and its plan, if there is one; (None, None) if the kind has no hash."""
    try:
        return kind, PLANS.get(kind)
    except TypeError:  # an unhashable option, say window_size=[1, 1]
        return None, None


# -- Refusals ----------------------------------------------------------------------------


def may_be_refusal(error: RuntimeError) -> bool:
    """Whether an operator may have refused a call that skipped validation, as its kind was known.

    Validation then gives a better message. Any other error is the caller's own (hooks, modes,
    memory) and passes through unchanged. Nothing is run again.
    """
    return is_of_operator(error) or isinstance(error, (ArgumentValueError, NotImplementedError))


def run_new(plan: Plan, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Any:
    """Runs a call that was validated except for the values of its lengths and pages, which only the
    operator reads."""
    try:
        return run(plan, query, key, value, options)
    except RuntimeError as error:
        if is_of_operator(error):
            raise argument_error(error) from None
        raise
