"""Hopper: mbarriers, bulk and tensor copies (TMA), proxy fences.

PTX ISA 9.x, 9.7.9.27, 9.7.13. A bulk load lands only when all threads are blocked and one of them
waits at its mbarrier; until then, touching its bytes is a finding. It counts as a write by one more
agent, the asynchronous proxy, whose clock the mbarrier hands over. A bulk store takes its bytes
when it is issued; overwriting them before a wait for its group is a finding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .async_copy import ALL, land
from .load_store import CACHING, address, note_global_write, place, read_memory, write_memory
from .machine import BLOCKED, RUNNING, Machine, Program
from .memory import GLOBAL_BASE, POISON, SHARED_BASE, UINT
from .operands import Run, allow, destination, opcode, source, unknown
from .parser import Instruction, Register
from .tensor_map import ELEMENT_BYTES, FIELDS, LAYOUT, SIZE


@dataclass
class PhaseBarrier:
    """An mbarrier object: a phase ends when all arrivals and all expected bytes have come."""

    expected: int
    clock: np.ndarray  # gathered in this phase
    pending: int = 0
    bytes_due: int = 0
    phase: int = 0
    handed_over: np.ndarray | None = None  # clock of the phases that have ended
    waiting: list[tuple[np.ndarray, np.ndarray, Callable[..., None]]] = field(default_factory=list)


@dataclass
class BulkLoad:
    barrier: int  # byte of shared memory, in the batch
    destination: np.ndarray  # byte indices
    data: np.ndarray
    first: int  # first byte of the tile: its bytes are contiguous
    tick: int  # clock of the asynchronous proxy


@dataclass
class BulkStore:
    thread: int
    group: int
    granules: np.ndarray


class Hopper:
    """State of a machine that only sm_90 code needs."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.barriers: dict[int, PhaseBarrier] = {}
        self.loads: list[BulkLoad] = []
        self.stores: list[BulkStore] = []
        self.bulk_group = np.zeros(len(machine.everyone), np.int64)
        self.tick = 0

    def barrier(self, key: int, threads: np.ndarray) -> PhaseBarrier:
        if key not in self.barriers:
            self.machine.find("barrier", "an mbarrier that was not initialised", threads)
            self.barriers[key] = PhaseBarrier(1, np.zeros(self.machine.agents, np.int32), 1)
        return self.barriers[key]

    def check_phase(self, barrier: PhaseBarrier) -> None:
        """Ends the phase if it is complete, and releases the threads that waited for it."""
        if barrier.pending or barrier.bytes_due:
            return
        m = self.machine
        barrier.phase += 1
        barrier.pending = barrier.expected
        done = barrier.clock
        old = barrier.handed_over
        barrier.handed_over = done if old is None else np.maximum(old, done)
        barrier.clock = np.zeros(m.agents, np.int32)
        still = []
        for threads, parity, give in barrier.waiting:
            free = parity != (barrier.phase & 1)
            if free.any():
                m.state[threads[free]] = RUNNING
                m.acquire(np.unique(m.flat_warp[threads[free]]), barrier.handed_over)
                give(threads[free])
            if not free.all():
                still.append((threads[~free], parity[~free], give))
        barrier.waiting = still

    def check_exit(self, threads: np.ndarray) -> None:
        """Reports bulk stores without a wait for them: shared memory ends with the block."""
        for store in self.stores:
            if store.thread in threads:
                what = "exits before its bulk store has read shared memory"
                self.machine.find("missing async wait", what, np.array([store.thread]))

    def land(self) -> bool:
        """Delivers the oldest bulk load at whose mbarrier a thread waits; False without one."""
        m = self.machine
        for load in self.loads:
            barrier = self.barriers.get(load.barrier)
            if barrier and barrier.waiting:
                self.loads.remove(load)
                m.shared.bytes[load.destination] = load.data
                granules = m.shared.granules(np.array([load.first]), len(load.data))
                m.shared.note_write(granules, load.tick << 12 | m.warps << 5, False, False)
                for entry in (m.warps, m.agents - 1):
                    barrier.clock[entry] = max(barrier.clock[entry], load.tick)
                barrier.bytes_due -= len(load.data)
                self.check_phase(barrier)
                return True
        return False


def hopper(m: Machine) -> Hopper:
    if m.hopper is None:
        m.hopper = Hopper(m)
    return m.hopper


# mbarrier


@opcode("mbarrier")
def mbarrier(program: Program, i: Instruction) -> Run:
    allow(i, "init", "inval", "arrive", "arrive_drop", "expect_tx", "try_wait", "test_wait",
          "parity", "shared", "shared::cta", "shared::cluster", CACHING)  # fmt: skip
    what = i.modifiers[0]
    if what in ("try_wait", "test_wait"):
        return wait_for_phase(program, i)
    result = None
    operands = list(i.operands)
    if what.startswith("arrive") and not hasattr(operands[0], "base"):
        result = operands.pop(0)
    where = address(program, operands[0])
    number = source(program, operands[1], "u32") if len(operands) > 1 else None
    write_state = destination(program, result, "b64") if result is not None else None

    def run(m: Machine) -> None:
        h = hopper(m)
        threads = m.active()
        good, flat = place(
            m, "shared", threads, shared_window(where(m, threads)), 8, what == "init"
        )
        threads = threads[good]
        if what in ("init", "inval"):
            m.shared.write(threads, flat, 8)
        else:
            m.shared.atomic(threads, flat, 8)
        numbers = None
        if number is not None:
            numbers = np.broadcast_to(number(m), m.everyone.shape).astype(np.int64)
        for key in np.unique(flat):
            here = threads[flat == key]
            amounts = np.ones(len(here), np.int64) if numbers is None else numbers[here]
            if what == "init":
                count = int(amounts[0])
                h.barriers[key] = PhaseBarrier(count, np.zeros(m.agents, np.int32), count)
                continue
            barrier = h.barrier(key, here)
            if what == "inval":
                if barrier.waiting:
                    m.find("barrier", "invalidates an mbarrier at which threads wait", here)
                del h.barriers[key]
                continue
            if write_state:
                write_state(m, np.uint64(barrier.phase & 1))
            if "expect_tx" in i.modifiers:
                barrier.bytes_due += int(amounts.sum())
                amounts = np.ones(len(here), np.int64)
            if what.startswith("arrive"):
                arrive(h, barrier, here, int(amounts.sum()))
                if what == "arrive_drop":
                    barrier.expected -= int(amounts.sum())

    return run


def shared_window(where: np.ndarray) -> np.ndarray:
    """Returns offsets in shared memory from addresses that may be generic."""
    return np.where(where >= SHARED_BASE, where - SHARED_BASE, where)


def arrive(h: Hopper, barrier: PhaseBarrier, threads: np.ndarray, count: int) -> None:
    m = h.machine
    warps = np.unique(m.flat_warp[threads])
    barrier.clock = np.maximum(barrier.clock, m.released(threads))
    m.new_epoch(warps)
    if count > barrier.pending:
        m.find("barrier", "more arrivals at an mbarrier than it expects in a phase", threads)
    barrier.pending = max(barrier.pending - count, 0)
    h.check_phase(barrier)


def wait_for_phase(program: Program, i: Instruction) -> Run:
    """try_wait blocks until the phase of that parity has ended; test_wait only looks.

    Without .parity the operand is the state that an arrive gave: here, the parity of its phase.
    """
    blocks = i.modifiers[0] == "try_wait"
    target = i.operands[0]
    if not isinstance(target, Register):
        raise unknown(i)
    where = address(program, i.operands[1])
    kind = "u32" if "parity" in i.modifiers else "u64"
    parity = source(program, i.operands[2], kind)

    def run(m: Machine) -> None:
        h = hopper(m)
        threads = m.active()
        good, flat = place(m, "shared", threads, shared_window(where(m, threads)), 8, False)
        threads = threads[good]
        m.shared.atomic(threads, flat, 8)
        parities = np.broadcast_to(parity(m), m.everyone.shape)[threads].astype(np.int64) & 1
        for key in np.unique(flat):
            here, wanted = threads[flat == key], parities[flat == key]
            barrier = h.barrier(key, here)
            over = wanted != (barrier.phase & 1)
            if over.any():
                m.put(target.index, here[over], np.array(True))
                if barrier.handed_over is not None:
                    m.acquire(np.unique(m.flat_warp[here[over]]), barrier.handed_over)
            late = here[~over]
            if len(late) and blocks:
                m.state[late] = BLOCKED

                def give(freed: np.ndarray) -> None:
                    m.put(target.index, freed, np.array(True))

                barrier.waiting.append((late, wanted[~over], give))
            elif len(late):
                m.put(target.index, late, np.array(False))

    run.leaves = True  # type: ignore[attr-defined]
    return run


def arrive_after_copies(program: Program, i: Instruction) -> Run:
    """cp.async.mbarrier.arrive: each thread's copies land and it arrives, here both at once."""
    where = address(program, i.operands[0])
    counted = "noinc" in i.modifiers

    def run(m: Machine) -> None:
        h = hopper(m)
        threads = m.active()
        land(m, threads, m.copy_group + ALL)
        good, flat = place(m, "shared", threads, shared_window(where(m, threads)), 8, False)
        m.shared.atomic(threads[good], flat, 8)
        for key in np.unique(flat):
            here = threads[good][flat == key]
            barrier = h.barrier(key, here)
            if not counted:
                barrier.pending += len(here)
            arrive(h, barrier, here, len(here))

    return run


# Proxies


@opcode("fence")
def fence(program: Program, i: Instruction) -> Run:
    """fence.proxy.async: the asynchronous proxy may read what this warp knows to be written.

    The other fences order nothing that is modelled here.
    """
    allow(i, CACHING, "sc", "proxy", "async", "alias", "async.shared::cta", "shared::cta", "global",
          "shared::cluster", "mbarrier_init", "tensormap::generic", "async::generic")  # fmt: skip
    if i.modifiers[:2] != ("proxy", "async") or "global" in i.modifiers:
        return lambda m: None

    def run(m: Machine) -> None:
        shared = m.shared
        unfenced = np.flatnonzero(shared.unfenced)
        if not len(unfenced):
            return
        writer = shared.writer[unfenced]
        block = unfenced // (shared.stride // shared.granule)
        for warp in np.flatnonzero(m.mask.reshape(-1, 32).any(1)):
            known = m.clocks[warp][(writer >> 5) & 127] >= (writer >> 12)
            shared.unfenced[unfenced[known & (block == warp // m.warps)]] = False

    return run


# Bulk copies


def swizzle(offset: np.ndarray, span: int) -> np.ndarray:
    """Exchanges the 16-byte chunks within `span` bytes by the number of the 128-byte row."""
    if not span:
        return offset
    return offset ^ (((offset >> 7) & (span // 16 - 1)) << 4)


@dataclass
class Tile:
    """A tile of a tensor in global memory, element by element, innermost dimension first."""

    inside: np.ndarray  # which elements the tensor has
    index: np.ndarray  # of the elements' first bytes in global memory
    itemsize: int
    swizzle: int
    nan_fill: bool


def tile_of(m: Machine, thread: int, map_address: int, coordinates: list[int]) -> Tile | None:
    who = np.array([thread])
    index = np.array([map_address - GLOBAL_BASE])
    if not m.memory.inside(index, SIZE, False)[0]:
        m.find("out of bounds", f"no tensor map at address {map_address:#x}", who)
        return None
    raw = m.memory.bytes[index[0] : index[0] + LAYOUT.size].tobytes()
    fields = LAYOUT.unpack(raw)
    rank = fields[20] + 1
    strides = (0, *fields[1:5])
    itemsize = ELEMENT_BYTES[fields[21]]
    if rank != len(coordinates):
        m.find("out of bounds", f"{len(coordinates)} coordinates for {rank} dimensions", who)
        return None
    inside, offset = np.array(True), np.array(0, np.int64)
    for d in range(rank):
        position = coordinates[d] + np.arange(fields[10 + d], dtype=np.int64)
        shape = [1] * rank
        shape[rank - 1 - d] = -1
        step = strides[d] if d else itemsize
        inside = inside & ((position >= 0) & (position < fields[5 + d])).reshape(shape)
        offset = offset + (position * step).reshape(shape)
    return Tile(
        inside.reshape(-1), (offset + fields[0] - GLOBAL_BASE).reshape(-1), itemsize,
        (0, 32, 64, 128)[fields[22]], bool(fields[24]),
    )  # fmt: skip


def bulk_copy(program: Program, i: Instruction) -> Run:
    allow(i, "async", "bulk", "tensor", "tile", "1d", "2d", "3d", "4d", "5d", "global", "shared",
          "shared::cta", "shared::cluster", "mbarrier::complete_tx::bytes", "bulk_group",
          "commit_group", "wait_group", "read", "prefetch", CACHING)  # fmt: skip
    if "commit_group" in i.modifiers:
        return commit_bulk_group
    if "wait_group" in i.modifiers:
        keep = int(i.operands[0].value)
        return lambda m: wait_bulk_group(m, keep)
    if "prefetch" in i.modifiers:
        return lambda m: None
    loads = "mbarrier::complete_tx::bytes" in i.modifiers
    tensor = "tensor" in i.modifiers
    to, from_ = i.operands[:2]
    ours, theirs = (to, from_) if loads else (from_, to)
    shared_at, global_at = address(program, ours), address(program, theirs)
    axes = [source(program, c, "s32") for c in theirs.coordinates]
    size = None if tensor else source(program, i.operands[2], "u32")
    barrier_at = address(program, i.operands[2 if tensor else 3]) if loads else None

    def run(m: Machine) -> None:
        threads = m.active()
        place_in_shared = shared_window(shared_at(m, threads))
        place_in_global = global_at(m, threads)
        barriers = shared_window(barrier_at(m, threads)) if barrier_at else None
        for n, thread in enumerate(threads):
            if tensor:
                coordinates = [
                    int(np.broadcast_to(axis(m), m.everyone.shape)[thread]) for axis in axes
                ]
                tile = tile_of(m, thread, int(place_in_global[n]), coordinates)
            else:
                length = int(np.broadcast_to(size(m), m.everyone.shape)[thread])
                first = int(place_in_global[n]) - GLOBAL_BASE
                tile = Tile(np.ones(length, bool), first + np.arange(length), 1, 0, False)
            if tile is None:
                continue
            alignment = 128 if tensor else 16
            where = int(place_in_shared[n])
            if where % alignment:
                m.find("misaligned", f"a bulk copy needs {alignment} bytes", threads[n : n + 1])
                continue
            key = int(barriers[n]) if barriers is not None else None
            transfer(m, int(thread), tile, where, key)

    return run


def transfer(m: Machine, thread: int, tile: Tile, where: int, barrier: int | None) -> None:
    """Issues one bulk load (with an mbarrier) or store."""
    h, who = hopper(m), np.array([thread])
    total = len(tile.inside) * tile.itemsize
    if not 1024 <= where <= m.shared.high - total:
        m.find("out of bounds", f"bulk copy of {total} bytes at shared address {where:#x}", who)
        return
    start = int(m.block_of[thread]) * m.shared.stride
    order = start + swizzle(where + np.arange(total), tile.swizzle)
    legal = m.memory.inside(tile.index, tile.itemsize, barrier is None)
    if (tile.inside & ~legal).any():
        m.find("out of bounds", "the tensor map reaches beyond its tensor", who)
    chosen = np.flatnonzero(tile.inside & legal)
    bytes_of = tile.index[chosen, None] + np.arange(tile.itemsize)
    flat = np.array([start + where])
    if barrier is not None:
        data = np.full((len(tile.inside), tile.itemsize), 0xFF if tile.nan_fill else 0, np.uint8)
        data[chosen] = m.memory.bytes[bytes_of]
        m.shared.write(who, flat, total, asynchronous=True)
        m.shared.bytes[order] = POISON
        h.tick += 1
        h.loads.append(BulkLoad(start + barrier, order, data.reshape(-1), start + where, h.tick))
        return
    m.shared.read(who, flat, total)
    granules = m.shared.granules(flat, total)[0]
    require_fence(m, who, granules)
    m.shared.read_later[granules] += 1
    h.stores.append(BulkStore(thread, int(h.bulk_group[thread]), granules))
    note_global_write(m, np.full(len(chosen), thread), bytes_of[:, 0], tile.itemsize)
    values = m.shared.bytes[order].reshape(-1, tile.itemsize)
    m.memory.bytes[bytes_of] = values[chosen]


def require_fence(m: Machine, threads: np.ndarray, granules: np.ndarray) -> None:
    if m.shared.unfenced[granules].any():
        what = "the asynchronous proxy reads what a thread wrote, with no fence.proxy.async between"
        m.find("missing proxy fence", what, threads)


def commit_bulk_group(m: Machine) -> None:
    hopper(m).bulk_group[m.active()] += 1


def wait_bulk_group(m: Machine, keep: int) -> None:
    h = hopper(m)
    left = []
    for store in h.stores:
        if m.mask[store.thread] and store.group < h.bulk_group[store.thread] - keep:
            m.shared.read_later[store.granules] -= 1
            stamp = m.own_clock[m.flat_warp[store.thread]] << 5 | m.lane_of[store.thread]
            m.shared.readers[store.granules, m.warp_of[store.thread]] = stamp
        else:
            left.append(store)
    h.stores = left


@opcode("tensormap")
def tensor_map(program: Program, i: Instruction) -> Run:
    """tensormap.replace sets a field of a map, tensormap.cp_fenceproxy copies a map to global."""
    if i.modifiers[0] == "cp_fenceproxy":
        to, from_ = (address(program, operand) for operand in i.operands[:2])

        def copy(m: Machine) -> None:
            m.require_whole_warps()
            threads = m.active()  # the last lane acts for its warp
            threads = threads[np.r_[m.flat_warp[threads][1:] != m.flat_warp[threads][:-1], True]]
            words = read_memory(m, "shared", threads, shared_window(from_(m, threads)), 8, 16)
            write_memory(m, "global", threads, to(m, threads), 8, words)

        return copy
    name = i.modifiers[2]
    if i.modifiers[:2] != ("replace", "tile") or name not in FIELDS:
        raise unknown(i)
    offset, size = FIELDS[name]
    where = address(program, i.operands[0])
    ordinal = int(i.operands[1].value) if len(i.operands) > 2 else 0
    value = source(program, i.operands[-1], i.types[-1])
    space = "global" if "global" in i.modifiers else "shared"

    def run(m: Machine) -> None:
        threads = m.active()
        values = np.broadcast_to(value(m), m.everyone.shape)[threads].astype(UINT[size])[None]
        at = where(m, threads)
        at = shared_window(at) if space == "shared" else at
        write_memory(m, space, threads, at + offset + ordinal * size, size, values)

    return run
