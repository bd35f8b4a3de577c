"""Operators that write to an argument: autograd notices."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import increment_version

from ._torch import after_writing
from .handles import arguments, library_of

WRITES = {"kv_cache_append_": ("key_cache", "value_cache"), "masked_softmax_": ("input",)}


def count_versions(namespace: str, name: str) -> None:
    """Autograd then notices if a tensor that it kept was written to, as after PyTorch's own
    in-place operators, whose kernels for this dispatch key do the same."""
    op = getattr(getattr(torch.ops, namespace), name).default

    def count(*args: Any, **kwargs: Any) -> None:
        call = arguments(op, args, kwargs)
        increment_version([call[written] for written in WRITES[name]])

    write = after_writing(op, count)
    if write is not None:
        library_of(namespace).impl(name, write, "ADInplaceOrView", with_keyset=True)


for _name in WRITES:
    count_versions("fused_attention", _name)
