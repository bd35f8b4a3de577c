"""Operators with gradients that a trace of torch.jit.trace can hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from ._torch import schema_of
from .handles import library, names_of


def signature_of(op: Any) -> str:
    """Returns the arguments and results of an operator, without its name."""
    return "(" + str(schema_of(op)).split("(", 1)[1]


def define_traced(
    name: str, schema: str, forward: Callable[..., Any], function: Any, defaults: dict[str, Any]
) -> Callable[..., Any]:
    """Defines the operator `traced_<name>`: `forward` with the gradients of a Function.

    torch.jit.trace must record an operator, because a Function cannot be saved. It must be the same
    operator with and without gradients, because the tracer traces twice and compares. PyTorch's
    registration of gradients costs 34 us a call, so only traces use it. The registration leaves out
    arguments that have their defaults, so the operator has no defaults: they are filled in here.
    """
    schema = re.sub(r"=[^,)]*", "", schema)
    library.define(f"traced_{name}{schema}", tags=torch.Tag.pt2_compliant_tag)
    library.impl(f"traced_{name}", forward, "CompositeExplicitAutograd")
    torch.library.register_autograd(
        f"fused_attention::traced_{name}", function.backward, setup_context=function.setup_context
    )
    op = getattr(torch.ops.fused_attention, f"traced_{name}").default
    names = names_of(op)

    def call(*inputs: Any) -> Any:
        return op(*inputs, *(defaults[name] for name in names[len(inputs) :]))

    return call
