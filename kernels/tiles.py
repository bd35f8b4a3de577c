"""Tile sizes and launch options by kernel, architecture, dtype and head size, and nothing else.

The tiles compile without spills and fit the shared memory of a block
(tests/triton/test_triton_compile.py checks both); those for Hopper were chosen on an H200 (`tune`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """A tile of block_m queries and block_n keys, computed by num_warps warps.

    warp_specialize: more warps compute, each of which only copies, multiplies or does the rest, if
    `launch.can_specialize` allows it. No entry sets it: what Triton 3.9 compiles for sm_100 has not
    been run yet, and for sm_90 it specializes nothing (test_triton_compile.py). `tune` tries it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    warp_specialize: bool = False


class Arch(NamedTuple):
    """The properties of a GPU by which tiles are chosen.

    shared_bytes: the most shared memory that one block may use. has_tma: whether a unit of its own
    copies tiles by descriptors (NVIDIA's Tensor Memory Accelerator).
    """

    name: str
    shared_bytes: int
    has_tma: bool = False


# NVIDIA by compute capability, AMD by name. The sizes in KiB are from the vendors' documents.
ARCHS = {
    "sm_80": Arch("sm_80", 163 * 1024),
    "sm_86": Arch("sm_86", 99 * 1024),
    "sm_89": Arch("sm_86", 99 * 1024),
    "sm_90": Arch("sm_90", 227 * 1024, True),
    "sm_100": Arch("sm_100", 227 * 1024, True),
    "sm_103": Arch("sm_100", 227 * 1024, True),
    "sm_120": Arch("sm_120", 99 * 1024, True),
    "sm_121": Arch("sm_120", 99 * 1024, True),
    "gfx942": Arch("gfx942", 64 * 1024),
    "gfx950": Arch("gfx950", 160 * 1024),
}
# TRITON_INTERPRET=1, on CPU tensors.
INTERPRETER = Arch("interpreter", 2**31)
# For a GPU that is not listed: what every GPU can run.
SMALLEST = Arch("sm_86", 64 * 1024)


@functools.cache
def arch_of(device: torch.device) -> Arch:
    """Returns the architecture of a CUDA or HIP device; a CPU is Triton's interpreter."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return ARCHS.get(properties.gcnArchName.split(":")[0], SMALLEST)
    return ARCHS.get(f"sm_{properties.major}{properties.minor}", SMALLEST)


def padded_head_dim(head_dim: int) -> int:
    """Returns a power of two of at least 16, the smallest depth of a matrix instruction."""
    return max(16, 1 << (head_dim - 1).bit_length())


# (kernel, architecture or "any", bits of the dtype): {padded head size: tiles}. The entry for 64
# also serves smaller head sizes. The entries of an architecture replace those of "any".
_TABLE: dict[tuple[str, str, int], dict[int, Tiles]] = {
    ("forward", "any", 16): {
        64: Tiles(128, 64, 4, 3),
        128: Tiles(128, 64, 8, 2),
        256: Tiles(64, 32, 8, 2),
    },
    ("dkdv", "any", 16): {
        64: Tiles(32, 64, 4, 2),
        128: Tiles(64, 64, 8, 1),
        256: Tiles(32, 32, 8, 1),
    },
    ("dq", "any", 16): {
        64: Tiles(64, 64, 4, 2),
        128: Tiles(64, 64, 8, 1),
        256: Tiles(32, 32, 8, 1),
    },
    ("forward", "sm_80", 16): {64: Tiles(128, 64, 4, 2), 256: Tiles(64, 64, 8, 2)},
    ("dkdv", "sm_80", 16): {64: Tiles(32, 128, 4, 2), 128: Tiles(64, 64, 4, 2)},
    ("dq", "sm_80", 16): {64: Tiles(128, 32, 4, 2), 128: Tiles(64, 64, 4, 2)},
    # 64 and 128: the fastest of those measured on an H200.
    ("forward", "sm_90", 16): {
        64: Tiles(64, 64, 4, 3),
        128: Tiles(64, 64, 4, 3),
        256: Tiles(128, 64, 8, 2),
    },
    ("dkdv", "sm_90", 16): {
        64: Tiles(64, 64, 4, 2),
        128: Tiles(32, 64, 4, 2),
        256: Tiles(64, 32, 8, 1),
    },
    ("dq", "sm_90", 16): {
        64: Tiles(64, 64, 4, 3),
        128: Tiles(64, 64, 4, 2),
        256: Tiles(128, 32, 8, 1),
    },
    ("forward", "sm_100", 16): {
        64: Tiles(128, 128, 8, 3),
        128: Tiles(128, 128, 8, 2),
        256: Tiles(128, 64, 8, 2),
    },
    ("dkdv", "sm_100", 16): {
        64: Tiles(64, 128, 8, 2),
        128: Tiles(64, 128, 8, 1),
        256: Tiles(64, 64, 8, 1),
    },
    ("dq", "sm_100", 16): {
        64: Tiles(128, 64, 4, 2),
        128: Tiles(128, 128, 8, 1),
        256: Tiles(128, 32, 8, 1),
    },
    ("forward", "sm_120", 16): {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 32, 8, 2)},
    ("forward", "gfx942", 16): {128: Tiles(128, 64, 4, 1)},
    ("dkdv", "gfx942", 16): {
        64: Tiles(32, 128, 4, 2),
        128: Tiles(32, 128, 4, 1),
        256: Tiles(16, 64, 4, 1),
    },
    ("dq", "gfx942", 16): {
        64: Tiles(128, 64, 4, 2),
        128: Tiles(128, 32, 4, 1),
        256: Tiles(64, 16, 4, 1),
    },
    ("forward", "gfx950", 16): {128: Tiles(128, 64, 8, 1)},
    ("decode", "any", 16): {
        64: Tiles(16, 64, 4, 3),
        128: Tiles(16, 32, 4, 3),
        256: Tiles(16, 32, 4, 2),
    },
    ("decode", "any", 32): {
        64: Tiles(16, 32, 4, 2),
        128: Tiles(16, 32, 4, 2),
        256: Tiles(16, 16, 4, 2),
    },
    ("forward", "any", 32): {
        64: Tiles(32, 32, 4, 1),
        128: Tiles(32, 32, 8, 1),
        256: Tiles(32, 16, 8, 1),
    },
    ("dkdv", "any", 32): {
        64: Tiles(32, 32, 8, 1),
        128: Tiles(16, 32, 8, 1),
        256: Tiles(16, 16, 8, 1),
    },
    ("dq", "any", 32): {
        64: Tiles(32, 32, 8, 1),
        128: Tiles(32, 16, 8, 1),
        256: Tiles(16, 16, 8, 1),
    },
}


# Entries that replace those above for calls with values for each score (a mask, a bias or dropout),
# whose registers would otherwise spill.
_PER_SCORE: dict[tuple[str, str, int], dict[int, Tiles]] = {
    # Another reason: Triton 3.6 computes wrong sums over 16 scores of a mask with dropout.
    ("forward", "any", 32): {256: Tiles(16, 32, 8, 1)},
    ("decode", "any", 32): {256: Tiles(16, 32, 4, 1)},
    ("dkdv", "any", 32): {128: Tiles(32, 16, 8, 1), 256: Tiles(32, 16, 8, 1)},
    ("dq", "any", 32): {128: Tiles(16, 32, 8, 1), 256: Tiles(16, 32, 8, 1)},
    ("dkdv", "sm_80", 16): {64: Tiles(32, 64, 8, 2), 128: Tiles(64, 64, 8, 2)},
    ("forward", "sm_90", 16): {64: Tiles(128, 128, 8, 3), 128: Tiles(128, 128, 8, 2)},
    ("dkdv", "sm_90", 16): {64: Tiles(64, 128, 8, 2), 128: Tiles(32, 128, 8, 1)},
    ("dq", "sm_90", 16): {64: Tiles(128, 64, 4, 2), 128: Tiles(128, 128, 8, 1)},
}


def attention_tiles(
    kernel: str, arch: Arch, dtype: torch.dtype, head_dim: int, per_score: bool = False
) -> Tiles:
    """Returns the tiles of a kernel: "forward", "decode", "dkdv" or "dq". head_dim: the larger of
    query's and value's; per_score: whether the call has a mask, a bias or dropout."""
    bits = 8 * dtype.itemsize
    rows = _TABLE[kernel, "any", bits] | _TABLE.get((kernel, arch.name, bits), {})
    if per_score:
        rows = rows | _PER_SCORE.get((kernel, "any", bits), {})
        rows = rows | _PER_SCORE.get((kernel, arch.name, bits), {})
    return rows[max(64, padded_head_dim(head_dim))]


# Split-KV decode: calls of at most MAX_DECODE_ROWS rows (the queries of all heads that share a key
# head) go to attention_decode. It splits the keys until there are about DECODE_PROGRAMS programs,
# but a split has at least MIN_SPLIT_KEYS keys.
MAX_DECODE_ROWS = 64
DECODE_PROGRAMS = 256
MIN_SPLIT_KEYS = 256


def decode_tiles(
    arch: Arch, dtype: torch.dtype, head_dim: int, rows: int, per_score: bool = False
) -> Tiles:
    """Returns the tiles of `attention_decode`, with all rows in one block if possible."""
    tiles = attention_tiles("decode", arch, dtype, head_dim, per_score)
    block_m = max(tiles.block_m, 1 << (min(rows, MAX_DECODE_ROWS) - 1).bit_length())
    return tiles._replace(block_m=block_m)


class RowTiles(NamedTuple):
    """Tiles of masked softmax: `rows` rows of up to `block` columns at a time."""

    rows: int
    block: int
    num_warps: int


# A longer row is taken in blocks of this size.
MAX_SOFTMAX_BLOCK = 8192


def softmax_tiles(columns: int, max_block: int = MAX_SOFTMAX_BLOCK) -> RowTiles:
    """Returns tiles of up to 1024 elements, or of one row, with one warp for each 512 elements."""
    block = min(max_block, max(16, 1 << (columns - 1).bit_length()))
    rows = max(1, min(16, 1024 // block))
    return RowTiles(rows, block, min(16, max(1, rows * block // 512)))
