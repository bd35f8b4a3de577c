"""Operators that write to an argument, in a way that autograd notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import increment_version

from . import handles
from ._torch import after_writing
from .handles import arguments, library_of

WRITES = {"kv_cache_append_": ("key_cache", "value_cache"), "masked_softmax_": ("input",)}


def _counter(op: Any, name: str) -> Callable[..., None]:
    def count(*args: Any, **kwargs: Any) -> None:
        call = arguments(op, args, kwargs)
        increment_version([call[written] for written in WRITES[name]])

    return count


def count_versions(namespace: str, name: str) -> None:
    """Makes an operator increment the versions of the tensors that it writes to, so autograd
    notices if it had saved one of them. PyTorch's own in-place operators have kernels for this
    dispatch key that do the same."""
    op = getattr(getattr(torch.ops, namespace), name).default
    write = after_writing(op, _counter(op, name))
    if write is not None:
        library_of(namespace).impl(name, write, "ADInplaceOrView", with_keyset=True)


def noticed(op: Any, name: str) -> Callable[..., None]:
    """Returns `op`, or, where PyTorch does not let Python reach autograd's key, `op` followed by
    an increment of the versions."""
    count = _counter(op, name)
    if after_writing(op, count) is not None:
        return op

    def call(*args: Any, **kwargs: Any) -> None:
        op(*args, **kwargs)
        count(*args, **kwargs)

    return call


for _name in WRITES:
    count_versions("fused_attention", _name)
kv_cache_append = noticed(handles.kv_cache_append, "kv_cache_append_")
softmax_in_place = noticed(handles.softmax_in_place, "masked_softmax_")
