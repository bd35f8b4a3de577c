"""Loads another implementation of attention, which `verify` checks and `bench` times beside ours.

It is named `module:function` and has one of two signatures: any subset of the keywords of
`attention()`, or those of PyTorch's `scaled_dot_product_attention`. Calls that need a keyword which
it lacks raise NotOffered.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call.options import DEFAULTS as OPTIONS
from ..errors import ArgumentValueError

SIGNATURES = ("attention", "sdpa")
# The defaults of attention(). An option at its default is not passed.
DEFAULTS = {name: x for name, x in OPTIONS._asdict().items() if x is not None}


class NotOffered(Exception):
    """The implementation does not support a call; the message gives the reason."""


@dataclass(frozen=True)
class Implementation:
    """A function called with the arguments of `attention()`: query, key, value and keywords."""

    name: str
    function: Callable[..., Any]
    signature: str
    keywords: frozenset[str] | None  # None: takes any

    def takes(self, keyword: str) -> bool:
        return self.keywords is None or keyword in self.keywords

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        """Returns out, or (out, lse) with return_lse. Raises NotOffered for an unsupported call."""
        options = {
            name: option
            for name, option in options.items()
            if option is not None and not (name in DEFAULTS and option == DEFAULTS[name])
        }
        if self.signature == "sdpa":
            options = sdpa_options(query, key, **options)
        for name in options:
            if not self.takes(name):
                raise NotOffered(f"no {name}")
        try:
            return self.function(query, key, value, **options)
        except NotImplementedError as error:
            raise NotOffered(str(error).splitlines()[0] if str(error) else "refused") from error


def sdpa_options(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    **others: Any,
) -> dict[str, Any]:
    """Translates keywords of `attention()` into those of scaled_dot_product_attention.

    Raises NotOffered for a call that it does not support.
    """
    for name in others:
        raise NotOffered(f"no {name}")
    if key_padding_mask is not None:
        seen = ~key_padding_mask[:, None, None, :]
        mask = seen if mask is None else mask & seen
    options: dict[str, Any] = {"dropout_p": dropout_p} if dropout_p else {}
    if scale is not None:
        options["scale"] = scale
    if query.shape[1] != key.shape[1]:
        options["enable_gqa"] = True
    if causal:
        if mask is not None or bias is not None:
            raise NotOffered("no mask together with causal")
        if causal == "bottom_right" and query.shape[2] != key.shape[2]:
            raise NotOffered("no causal bottom-right")
        options["is_causal"] = True
    if bias is not None:
        if bias.dtype != query.dtype:
            raise NotOffered("no mask of another dtype")
        options["attn_mask"] = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        options["attn_mask"] = mask
    return options


def load(name: str, signature: str | None = None) -> Implementation:
    """Loads the function `module:function`; modules may also be in the current directory."""
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise ArgumentValueError(f"--impl: expected module:function, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function: Any = importlib.import_module(module_name)
        for attribute in path.split("."):
            function = getattr(function, attribute)
    except Exception as error:  # the module may raise anything
        raise ArgumentValueError(f"--impl: cannot import {name!r}: {error}") from error
    if not callable(function):
        raise ArgumentValueError(f"--impl: {name!r} is not callable")
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        if signature is None:
            raise ArgumentValueError(
                f"--impl: {name!r} has no signature to look at; give --signature"
                f" {' or '.join(SIGNATURES)}"
            ) from None
        return Implementation(name, function, signature, None)
    if signature is None:
        signature = "sdpa" if {"attn_mask", "is_causal"} & set(parameters) else "attention"
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return Implementation(
        name, function, signature, None if takes_any else frozenset(parameters) - {"kwargs"}
    )
