"""What is raised for a wrong argument. Each is also what PyTorch raises there (RuntimeError).

A call that is right but that the requested backend cannot serve raises NotImplementedError.
"""

from __future__ import annotations

from typing import Any


class ArgumentValueError(ValueError, RuntimeError):
    """An argument has a shape, dtype, device or value that has no meaning here."""


class ArgumentDtypeError(ArgumentValueError, NotImplementedError):
    """A dtype that nothing here computes in: PyTorch answers with either of its bases."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument is not the kind of object that is expected."""


def describe_error(name: str, expected: str, got: Any, hint: str = "") -> str:
    """One sentence: which argument, what was expected, what came, and what to do."""
    message = f"{name}: expected {expected}, got {got}"
    return f"{message}. Hint: {hint}" if hint else message


def is_of_operator(error: RuntimeError) -> bool:
    """Whether an operator of ours refused a call: see `message_of_operator`."""
    return type(error) is RuntimeError and ", csrc/" in str(error)


def message_of_operator(error: RuntimeError) -> str:
    """What an operator found wrong with values, without the place in its source that goes before:
    "function, csrc/ops.cpp:123, message"."""
    return str(error).split("\n")[0].split(", ", 2)[-1]
