"""Tile sizes and launch options, and nothing else: by kernel, architecture, dtype and head size.

The table follows from what compiles without spills and fits the shared memory of a block
(tests/triton/test_triton_compile.py checks both), and for Hopper from an H200 (`tune`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """A tile of block_m queries and block_n keys, computed by num_warps warps.

    warp_specialize: by more warps, each of which only copies, multiplies or does the rest, where
    `launch.can_specialize`. No entry says so: what Triton 3.9 makes of it for sm_100 has run
    nowhere yet, and for sm_90 it makes nothing of it (test_triton_compile.py). `tune` tries it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    warp_specialize: bool = False


class Arch(NamedTuple):
    """What a table entry is chosen by.

    shared_bytes: the most that one block may use. has_tma: a unit of its own copies tiles, as a
    descriptor tells it (NVIDIA's Tensor Memory Accelerator).
    """

    name: str
    shared_bytes: int
    has_tma: bool = False


# NVIDIA by compute capability, AMD by name. KiB from the vendors' documents.
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
# Of a GPU that is not listed: what every one of them can run.
SMALLEST = Arch("sm_86", 64 * 1024)


@functools.cache
def arch_of(device: torch.device) -> Arch:
    """The architecture of a CUDA or HIP device; a CPU is Triton's interpreter."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return ARCHS.get(properties.gcnArchName.split(":")[0], SMALLEST)
    return ARCHS.get(f"sm_{properties.major}{properties.minor}", SMALLEST)


def padded_head_dim(head_dim: int) -> int:
    """A power of two, of at least 16: the smallest depth of a matrix instruction."""
    return max(16, 1 << (head_dim - 1).bit_length())


# kernel, architecture or "any", bits of the dtype: {padded head size, 64 also for less: tiles}.
# What an architecture says goes before what "any" says.
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
    # 64 and 128: the fastest of some on an H200.
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


# In place of them where a call has something of its own for each score, a mask, a bias or dropout,
# whose registers would otherwise spill.
_PER_SCORE: dict[tuple[str, str, int], dict[int, Tiles]] = {
    # Also because Triton 3.6 computes wrong sums over 16 scores of a mask with dropout.
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
    """kernel: "forward", "decode", "dkdv", "dq"; head_dim: the larger of query's and value's;
    per_score: whether the call has a mask, a bias or dropout."""
    bits = 8 * dtype.itemsize
    rows = _TABLE[kernel, "any", bits] | _TABLE.get((kernel, arch.name, bits), {})
    if per_score:
        rows = rows | _PER_SCORE.get((kernel, "any", bits), {})
        rows = rows | _PER_SCORE.get((kernel, arch.name, bits), {})
    return rows[max(64, padded_head_dim(head_dim))]


# Few queries against many keys: so many rows at most (queries of heads that share their keys) go to
# attention_decode, which cuts the keys until there are about so many programs, but no finer.
MAX_DECODE_ROWS = 64
DECODE_PROGRAMS = 256
MIN_SPLIT_KEYS = 256


def decode_tiles(
    arch: Arch, dtype: torch.dtype, head_dim: int, rows: int, per_score: bool = False
) -> Tiles:
    """Tiles of `attention_decode`, of one block of rows if that is possible."""
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
    """About 4096 elements a program, or one row; one warp for each 512 of them."""
    block = min(max_block, max(16, 1 << (columns - 1).bit_length()))
    rows = max(1, min(16, 1024 // block))
    return RowTiles(rows, block, min(16, max(1, rows * block // 512)))
