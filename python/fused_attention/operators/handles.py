"""Handles of the operators, and their arguments by name.

Importing `fused_attention._native` defines torch.ops.fused_attention.* and registers the kernels of
the CPU. `arguments.py` has the arguments that every operator of attention takes after its tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native as _native  # defines the operators
from ..errors import ArgumentValueError
from ._torch import direct, schema_of

forward_plain = torch.ops.fused_attention.attention_forward_plain.default
forward_plain_lse = torch.ops.fused_attention.attention_forward_plain_lse.default
forward = torch.ops.fused_attention.attention_forward.default
backward = torch.ops.fused_attention.attention_backward.default
weights = torch.ops.fused_attention.attention_weights.default
statistics = torch.ops.fused_attention.attention_statistics.default
jvp = torch.ops.fused_attention.attention_jvp.default
backward_jvp = torch.ops.fused_attention.attention_backward_jvp.default
dropout_keep_mask = torch.ops.fused_attention.dropout_keep_mask.default
check_sequences = torch.ops.fused_attention.check_sequences.default
kv_cache_append = torch.ops.fused_attention.kv_cache_append_.default
softmax_forward = torch.ops.fused_attention.masked_softmax_forward.default
softmax_in_place = torch.ops.fused_attention.masked_softmax_.default
softmax_backward = torch.ops.fused_attention.masked_softmax_backward.default

# For registrations in Python; `library_of` returns that of any namespace.
library = torch.library.Library("fused_attention", "FRAGMENT")


@functools.cache
def library_of(namespace: str) -> torch.library.Library:
    return library if namespace == library.ns else torch.library.Library(namespace, "IMPL")


class Operators(NamedTuple):
    """The operators of attention in one library. For `direct_*` see `_torch.direct`."""

    forward_plain: Callable[..., Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    direct_forward_plain: Callable[..., Any]
    direct_forward_plain_lse: Callable[..., Any]
    direct_forward: Callable[..., Any]

    @staticmethod
    def of(namespace: str) -> Operators:
        library = getattr(torch.ops, namespace)
        plain, full = library.attention_forward_plain.default, library.attention_forward.default
        return Operators(
            plain,
            full,
            library.attention_backward.default,
            direct(plain),
            direct(library.attention_forward_plain_lse.default),
            direct(full),
        )


OPERATORS = Operators.of("fused_attention")


@functools.cache
def names_of(op: Any) -> tuple[str, ...]:
    """Returns the names of an operator's arguments, in order."""
    return tuple(argument.name for argument in schema_of(op).arguments)


@functools.cache
def _defaults_of(op: Any) -> dict[str, Any]:
    return {argument.name: argument.default_value for argument in schema_of(op).arguments}


def arguments(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call of `op` by name, defaults included."""
    named = dict(_defaults_of(op))
    named.update(zip(named, args, strict=False))
    named.update(kwargs)
    return named


def check_devices(*inputs: Any) -> None:
    """Raises unless all tensors are on one device. The dispatcher does not check: it calls kernels
    with a mask on "meta" and a query on a CPU."""
    devices = {str(x.device) for x in inputs if isinstance(x, Tensor)}
    if len(devices) > 1:
        raise ArgumentValueError(
            f"attention: expected one device, got {', '.join(sorted(devices))}"
        )
