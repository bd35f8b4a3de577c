"""Tests for shared memory, for operators that write to an argument (csrc/footprint.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native


def is_in_memory(x: Tensor) -> bool:
    """Whether a tensor has memory: it is not fake, and not on "meta"."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta"


def place(x: Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """Returns where the elements of a tensor lie, as `_native` takes it."""
    return x.data_ptr(), x.element_size(), tuple(x.shape), tuple(x.stride())


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether an element of one shares a byte with one of the other."""
    if not (is_in_memory(a) and is_in_memory(b)) or a.device != b.device:
        return False
    return _native.overlap(place(a), place(b))


def has_shared_elements(x: Tensor) -> bool:
    """Whether two elements of a tensor lie in one place."""
    return is_in_memory(x) and _native.overlaps_itself(place(x))
