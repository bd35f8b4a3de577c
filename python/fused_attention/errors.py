"""The errors for wrong arguments. Each is also a RuntimeError, which PyTorch raises for them.

A valid call that the requested backend cannot serve raises NotImplementedError.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn


class ArgumentValueError(ValueError, RuntimeError):
    """An argument has a shape, dtype, device or value that has no meaning here."""


class ArgumentDtypeError(ArgumentValueError, NotImplementedError):
    """No backend computes in this dtype. PyTorch raises one or the other base class then."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument is not the kind of object that is expected."""


def describe_error(name: str, expected: str, got: Any, hint: str = "") -> str:
    """Returns one sentence: the argument, what was expected, what came, and what to do."""
    message = f"{name}: expected {expected}, got {got}"
    return f"{message}. Hint: {hint}" if hint else message


def wrong_value(name: str, expected: str, got: Any, hint: str = "") -> NoReturn:
    raise ArgumentValueError(describe_error(name, expected, got, hint))


def wrong_type(name: str, expected: str, got: Any, hint: str = "") -> NoReturn:
    raise ArgumentTypeError(describe_error(name, expected, got, hint))


# "function, csrc/describe.cpp:123, message"
_REFUSAL = re.compile(r"\S+, csrc/\S+:\d+, (.*)")


def is_of_operator(error: RuntimeError) -> bool:
    """Whether `error` says that an operator of ours refused a call because of its arguments."""
    return type(error) is RuntimeError and _REFUSAL.match(str(error)) is not None


def argument_error(error: RuntimeError) -> RuntimeError:
    """Turns the refusal of an operator into an ArgumentValueError, without its place in the source;
    returns any other error unchanged."""
    refusal = _REFUSAL.match(str(error))
    if type(error) is not RuntimeError or refusal is None:
        return error
    return ArgumentValueError(refusal.group(1))
