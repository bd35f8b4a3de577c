"""Global and shared memory, with the records that judge each access.

Global memory is one array of bytes with a map of which bytes an argument owns: everything between
the arguments, and between the rows of a strided one, is out of bounds. It remembers which warp
wrote each byte.

Shared memory has a shadow per granule (the smallest width with which the kernel accesses shared
memory, so no two accesses share a granule by accident): who wrote it last and when, when each warp
read it last, and whether an asynchronous copy is about to write it or still reads it. An access is
a race if the vector clock of the accessing warp does not cover an earlier conflicting one
(Flanagan and Freund 2009, "FastTrack", without the compression of read clocks).
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

GLOBAL_BASE = 0x7000_0000_0000  # beyond 32 bits: a truncated address is out of bounds
SHARED_BASE = 0x6000_0000_0000  # of the window in the generic address space
LOCAL_BASE = 0x5000_0000_0000
WINDOW = 1 << 40
SHARED_START = 1024  # the system keeps the first KiB, and so shared address 0 is out of bounds
GUARD = 4096  # bytes between allocations
UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
POISON = 0xFF  # bytes of a copy that has not landed: NaN in every floating-point type

READ_WRITE, READ_ONLY = 1, 2


class GlobalMemory:
    def __init__(self) -> None:
        self.size = GUARD
        self.pieces: list[tuple[int, np.ndarray, np.ndarray, bool]] = []
        self.placed: dict[int, int] = {}  # start of the host storage -> device address

    def reserve(self, data: np.ndarray, valid: np.ndarray, writes_back: bool) -> int:
        """Returns the device address of a copy of `data`; valid: the allowed use of each byte."""
        start = self.size
        self.pieces.append((start, data, valid, writes_back))
        self.size += -(-(len(data) + GUARD) // 256) * 256  # cudaMalloc aligns to 256
        return GLOBAL_BASE + start

    def constant(self, data: bytes) -> int:
        array = np.frombuffer(data, np.uint8)
        return self.reserve(array, np.full(len(array), READ_ONLY, np.uint8), False)

    def bind(self, tensor: Any) -> int:
        """Returns the device address of an array or tensor; tensors of one storage share memory."""
        pointer, storage, storage_bytes, shape, strides, itemsize = describe(tensor)
        if storage not in self.placed:
            host = np.frombuffer((ctypes.c_uint8 * storage_bytes).from_address(storage), np.uint8)
            self.placed[storage] = self.reserve(host, np.zeros(storage_bytes, np.uint8), True)
        base = self.placed[storage]
        valid = next(v for start, _, v, _ in self.pieces if GLOBAL_BASE + start == base)
        if 0 not in shape:
            elements = np.lib.stride_tricks.as_strided(
                valid[pointer - storage :], (*shape, itemsize), (*strides, 1)
            )
            elements[...] = READ_WRITE
        return base + pointer - storage

    def freeze(self) -> None:
        """Lays the bytes out, after the last `bind`."""
        padded = -(-self.size // 64) * 64
        self.bytes = np.full(padded, POISON, np.uint8)
        self.valid = np.zeros(padded, np.uint8)
        for start, data, valid, _ in self.pieces:
            self.bytes[start : start + len(data)] = data
            self.valid[start : start + len(data)] = valid
        self.views = {size: self.bytes.view(kind) for size, kind in UINT.items()}
        self.writer = np.zeros(padded, np.int32)  # 0: nobody, else warp of the grid + 1
        self.clock = np.zeros(padded, np.int32)

    def write_back(self) -> None:
        for start, data, valid, writes_back in self.pieces:
            if writes_back:
                changed = valid == READ_WRITE
                data[changed] = self.bytes[start : start + len(data)][changed]

    def inside(self, index: np.ndarray, size: int, writing: bool) -> np.ndarray:
        """Returns which accesses to bytes index … index + size are within bytes of arguments."""
        inside = (index >= 0) & (index <= len(self.bytes) - size)
        first = np.where(inside, index, 0)
        wanted = (READ_WRITE, READ_WRITE) if writing else (READ_WRITE, READ_ONLY)
        for offset in {*range(0, size, 2), size - 1}:
            here = self.valid[first + offset]
            inside &= (here == wanted[0]) | (here == wanted[1])
        return inside


def describe(tensor: Any) -> tuple[int, int, int, tuple[int, ...], tuple[int, ...], int]:
    """Returns pointer, start and bytes of storage, shape, strides and element size in bytes."""
    if isinstance(tensor, np.ndarray):
        base = tensor
        while isinstance(base.base, np.ndarray):
            base = base.base
        low, high = np.lib.array_utils.byte_bounds(base)
        return (tensor.ctypes.data, low, high - low, tensor.shape, tensor.strides, tensor.itemsize)
    storage = tensor.untyped_storage()
    itemsize = tensor.element_size()
    strides = tuple(stride * itemsize for stride in tensor.stride())
    return (
        tensor.data_ptr(), storage.data_ptr(), storage.nbytes(), tuple(tensor.shape), strides,
        itemsize,
    )  # fmt: skip


class SharedMemory:
    """Shared memory of a batch of blocks: byte `address` of block n is at n * stride + address."""

    def __init__(self, machine: Any, size: int, granule: int):
        self.machine, self.granule = machine, granule
        self.high = SHARED_START + size
        self.stride = -(-self.high // 1024) * 1024
        total = machine.blocks * self.stride
        self.bytes = np.full(total, POISON, np.uint8)
        self.views = {width: self.bytes.view(kind) for width, kind in UINT.items()}
        granules = total // granule
        # The last writer: clock << 12 | agent << 5 | lane; 0 = never written.
        self.writer = np.zeros(granules, np.int32)
        # The last read of each warp: clock << 5 | lane.
        self.readers = np.zeros((granules, machine.warps), np.int32)
        self.in_flight = np.zeros(granules, bool)  # an asynchronous copy will write it
        self.read_later = np.zeros(granules, np.int16)  # asynchronous operations that still read it
        self.unfenced = np.zeros(granules, bool)  # written by the generic proxy, no proxy fence yet

    def granules(self, flat: np.ndarray, size: int) -> np.ndarray:
        return flat[:, None] // self.granule + np.arange(-(-size // self.granule))

    def later_than_known(
        self, threads: np.ndarray, stamps: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns which stamped accesses ([threads, n]) are not ordered before the current access
        of each thread: those of another warp, and those of another lane of its own warp."""
        m = self.machine
        row = (m.flat_warp[threads] * m.agents + m.lanes)[:, None]
        late = (stamps >> 12) > m.clocks_flat[row + (stamps & 4095)]
        mine = ((stamps >> 5) & 127) == m.warp_of[threads][:, None]
        others = (stamps & 31) != m.lane_of[threads][:, None]
        return late & ~mine, late & mine & others

    def read(
        self, threads: np.ndarray, flat: np.ndarray, size: int, granules: np.ndarray | None = None
    ) -> None:
        """Judges and notes each thread's read of `size` bytes at `flat`, or of granules."""
        m, g = self.machine, self.granules(flat, size) if granules is None else granules
        warp, lane = m.warp_of[threads], m.lane_of[threads]
        now = m.own_clock[m.flat_warp[threads]]
        writer = self.writer[g]
        race, race_of_lanes = self.later_than_known(threads, writer)
        bad = (writer == 0) | race | race_of_lanes | self.in_flight[g]
        if bad.any():
            for kind, what, where in (
                ("missing async wait", "reads shared bytes that an asynchronous copy has yet to "
                 "write: no wait by this thread", self.in_flight[g]),
                ("uninitialised shared memory", "reads bytes that nobody wrote", writer == 0),
                ("shared race", "reads what another warp wrote, with no barrier between", race),
                ("lane race", "reads what another lane wrote, with no barrier of the warp between",
                 race_of_lanes),
            ):  # fmt: skip
                self._report(kind, what, threads, flat, where)
                if where.any() and kind == "missing async wait":
                    break  # the rest follows from it
        self.readers[g, warp[:, None]] = (now << 5 | lane)[:, None]

    def write(
        self, threads: np.ndarray, flat: np.ndarray, size: int, asynchronous: bool = False,
        same: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Judges and notes a write.

        asynchronous: the write is issued now and lands later. same: which threads write the value
        that is there already; two warps that write the same value are no race.
        """
        m, g = self.machine, self.granules(flat, size)
        warp, lane = m.warp_of[threads], m.lane_of[threads]
        now = m.own_clock[m.flat_warp[threads]]
        race, other_lane = self.later_than_known(threads, self.writer[g])
        if same is not None:
            race &= ~same[:, None]
            other_lane &= ~same[:, None]
        readers, every = self.readers[g], np.arange(m.warps)
        stamps = (readers >> 5) << 12 | every << 5 | (readers & 31)
        late, late_lane = self.later_than_known(
            threads, stamps.reshape(len(stamps), g.shape[1] * m.warps)
        )
        overwrites = late.reshape(readers.shape).any(2)
        race_of_lanes = late_lane.reshape(readers.shape).any(2)
        bad = (
            race
            | overwrites
            | race_of_lanes
            | other_lane
            | self.in_flight[g]
            | (self.read_later[g] > 0)
        )
        if bad.any():
            for kind, what, where in (
                ("missing async wait", "writes where an asynchronous copy is about to write",
                 self.in_flight[g]),
                ("missing async wait", "overwrites what an asynchronous operation still reads",
                 self.read_later[g] > 0),
                ("shared race", "overwrites what another warp wrote, with no barrier between",
                 race),
                ("shared race", "overwrites what another warp read, with no barrier between",
                 overwrites),
                ("lane race", "overwrites what another lane wrote, with no barrier of the warp "
                 "between", other_lane),
                ("lane race", "overwrites what another lane read, with no barrier of the warp "
                 "between", race_of_lanes),
            ):  # fmt: skip
                self._report(kind, what, threads, flat, where)
        self.note_write(g, (now << 12 | warp << 5 | lane)[:, None], asynchronous)

    def atomic(self, threads: np.ndarray, flat: np.ndarray, size: int) -> None:
        """Judges an atomic like a read: atomics do not race, and later writes must follow."""
        self.read(threads, flat, size)

    def note_write(
        self, granules: np.ndarray, stamp: Any, in_flight: bool, generic: bool = True
    ) -> None:
        """Notes a write; after one of the generic proxy, the asynchronous one needs a fence."""
        self.writer[granules] = stamp
        self.in_flight[granules] = in_flight
        self.unfenced[granules] = generic

    def _report(
        self, kind: str, what: str, threads: np.ndarray, flat: np.ndarray, where: np.ndarray
    ) -> None:
        rows = np.flatnonzero(where.reshape(len(threads), -1).any(1))
        if len(rows):
            address = int(flat[rows[0]]) % self.stride
            self.machine.find(kind, f"{what} (shared address {address})", threads[rows])
