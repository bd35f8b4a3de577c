"""TMA descriptors (CUtensorMap) as arguments of a launch.

The 128 bytes are opaque on a GPU, so they have a layout of our own here, which `tensormap.replace`
and the tensor copies of sm90.py use.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from .memory import GlobalMemory, describe

# address, strides of dimensions 1…4 in bytes, sizes, box sizes, element strides, then one byte
# each: rank, element type, swizzle, interleave, fill. Dimension 0 is the innermost.
LAYOUT = struct.Struct("<Q4Q5I5I5B5B")
SIZE = 128
FIELDS = {  # name in tensormap.replace -> (offset, bytes of an element)
    "global_address": (0, 8),
    "global_stride": (8, 8),
    "global_dim": (40, 4),
    "box_dim": (60, 4),
    "element_stride": (80, 1),
    "rank": (85, 1),
    "elemtype": (86, 1),
    "swizzle_mode": (87, 1),
    "interleave_layout": (88, 1),
    "fill_mode": (89, 1),
}
# Codes of .elemtype: u8 u16 u32 s32 u64 s64 f16 f32 f32.ftz f64 bf16 tf32 tf32.ftz
ELEMENT_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4)
TYPE_CODE = {1: 0, 2: 1, 4: 2, 8: 4}  # any type of that many bytes: copies do not compute
SWIZZLES = (0, 32, 64, 128)


@dataclass
class TensorMap:
    """Argument for a `CUtensorMap` parameter.

    tensor: array or tensor whose last stride is 1. box: elements of a tile, outermost dimension
    first, as are shape and strides (in elements; default: the tensor's). swizzle: bytes, one of 0,
    32, 64, 128. nan_fill: elements outside of the tensor read as NaN instead of 0.
    """

    tensor: Any
    box: Any
    shape: Any = None
    strides: Any = None
    swizzle: int = 0
    nan_fill: bool = False

    def encode_for(self, memory: GlobalMemory) -> bytes:
        """Binds the tensor, and returns the bytes of the parameter."""
        address = memory.bind(self.tensor)
        _, _, _, shape, strides, itemsize = describe(self.tensor)
        sizes = list(self.shape if self.shape is not None else shape)[::-1]
        steps = [s // itemsize for s in strides] if self.strides is None else list(self.strides)
        steps = steps[::-1]
        box = list(self.box)[::-1]
        rank = len(sizes)
        if not 1 <= rank <= 5 or len(box) != rank or len(steps) != rank:
            raise ValueError(f"TensorMap: shape {sizes}, strides {steps}, box {box}")
        if steps[0] != 1 or any(s * itemsize % 16 for s in steps[1:]) or address % 16:
            raise ValueError("TensorMap: needs last stride 1, address and strides multiples of 16")
        if max(box) > 256 or (self.swizzle and box[0] * itemsize > self.swizzle):
            raise ValueError(f"TensorMap: box {box} with swizzle {self.swizzle}")
        return LAYOUT.pack(
            address,
            *_pad([s * itemsize for s in steps[1:]], 4),
            *_pad(sizes, 5),
            *_pad(box, 5),
            *[1] * 5,
            rank - 1,
            TYPE_CODE[itemsize],
            SWIZZLES.index(self.swizzle),
            0,
            int(self.nan_fill),
        ).ljust(SIZE, b"\0")


def _pad(values: list[int], length: int) -> list[int]:
    return [int(v) for v in values] + [0] * (length - len(values))
