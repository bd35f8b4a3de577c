"""The machine: threads, scheduling, barriers, clocks, findings.

Registers are numpy rows with one value a thread, over all threads of a batch of blocks. The threads
at the lowest program counter run together, so diverged threads meet again at the next label. A
thread blocks at a barrier or an mbarrier. When no thread can run, an asynchronous copy lands for
which a thread waits; if there is none, the threads are deadlocked.

Happens-before: each warp has a vector clock over the warps of its block (and one more agent, the
asynchronous proxy), and over their lanes. A release (barrier, mbarrier arrive) hands this clock to
the warps that acquire it, and starts a new epoch of the warp. A release by some lanes of a warp
covers what the other lanes did only up to the last barrier at which they all met.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import SHARED_START, GlobalMemory, SharedMemory
from .parser import Kernel, PTXError, Symbol, Variable, parse

RUNNING, BLOCKED, EXITED = 0, 1, 2
STORAGE = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SCHEDULES = ("lockstep", "serial", "reverse", "random")
BATCH_THREADS = 2048  # blocks run side by side up to this many threads
MAX_STEPS = 5_000_000


@dataclass
class Finding:
    kind: str
    message: str
    where: str  # source file:line, PTX line, opcode
    count: int = 1  # threads, summed over the launch

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}; {self.where} ({self.count} x)"


@dataclass
class Report:
    """The result of a launch. `findings` is empty if nothing was wrong on the path that ran."""

    findings: list[Finding] = field(default_factory=list)
    steps: int = 0  # instructions, each for all threads that ran it together
    opcodes: Counter[str] = field(default_factory=Counter)  # fully qualified -> steps

    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.findings}


class Deadlock(Exception):
    pass


@dataclass
class Barrier:
    """One of the 16 named barriers of a block, while it gathers threads."""

    expected: int | None  # None: all threads that have not exited
    arrived: int = 0
    clock: np.ndarray | None = None
    warps: set[int] = field(default_factory=set)  # waiting warps, numbered over the batch
    waiting: list[np.ndarray] = field(default_factory=list)
    reductions: list[Callable[[list[np.ndarray]], None]] = field(default_factory=list)
    predicates: list[np.ndarray] = field(default_factory=list)


class Machine:
    """A batch of blocks of one launch."""

    def __init__(
        self,
        program: Program,
        block_ids: Sequence[tuple[int, int, int]],
        schedule: str,
        rng: np.random.Generator,
    ):
        self.program, self.kernel, self.memory = program, program.kernel, program.memory
        self.schedule, self.rng = schedule, rng
        x, y, z = program.block
        threads = x * y * z
        self.blocks, self.warps = len(block_ids), -(-threads // 32)
        self.block_threads = self.warps * 32
        total = self.blocks * self.block_threads
        everyone = np.arange(total)
        self.everyone = everyone
        self.block_of = everyone // self.block_threads
        self.thread_of = everyone % self.block_threads
        self.lane_of = (everyone % 32).astype(np.int32)
        self.warp_of = (self.thread_of // 32).astype(np.int32)
        self.flat_warp = everyone // 32
        self.block_ids = np.array(block_ids)
        gx, gy, _ = program.grid
        self.block_rank = self.block_ids @ [1, gx, gx * gy]  # in the grid
        self.pc = np.zeros(total, np.int64)
        self.state = np.where(self.thread_of < threads, RUNNING, EXITED).astype(np.int8)
        self.registers = [
            np.full(total, False if bits == 1 else np.iinfo(STORAGE[bits]).max, STORAGE[bits])
            for bits in program.register_bits
        ]
        self.carry = np.zeros(total, bool)
        # A clock has an entry for each warp and for the asynchronous proxy; from `lanes` on, one
        # for each lane of each warp, and again for the proxy, in the order of the stamps of
        # SharedMemory.
        self.lanes = self.warps + 1
        self.agents = self.lanes + self.warps * 32 + 1
        self.clocks = np.zeros((self.blocks * self.warps, self.agents), np.int32)
        self.clocks_flat = self.clocks.reshape(-1)  # a view
        self.own_clock = np.zeros(self.blocks * self.warps, np.int32)  # the diagonal
        self.new_epoch(np.arange(self.blocks * self.warps))
        self.shared = SharedMemory(self, program.shared_size, program.granule)
        self.local = np.full((total, program.local_size), 0xFF, np.uint8)
        self.barriers: dict[tuple[int, int], Barrier] = {}
        self.copies: list[Any] = []  # cp.async that have not landed
        self.copy_group = np.zeros(total, np.int64)
        self.hopper: Any = None  # state of sm90.py, made at the first use
        self.mask, self.full = self.state == RUNNING, True
        self.position = 0

    # Clocks

    def new_epoch(self, flat_warps: np.ndarray) -> None:
        self.clocks[flat_warps, flat_warps % self.warps] += 1
        self.own_clock[flat_warps] = self.clocks[flat_warps, flat_warps % self.warps]

    def released(self, threads: np.ndarray) -> np.ndarray:
        """Returns the clock that these threads of one block release together."""
        warps = self.flat_warp[threads]
        clock = self.clocks[np.unique(warps)].max(0)
        entries = self.lanes + self.warp_of[threads] * 32 + self.lane_of[threads]
        clock[entries] = self.own_clock[warps]
        return clock

    def acquire(self, flat_warps: np.ndarray, clock: np.ndarray) -> None:
        self.clocks[flat_warps] = np.maximum(self.clocks[flat_warps], clock)

    # Running

    def active(self) -> np.ndarray:
        """Returns the indices of the threads that execute the current instruction."""
        return np.flatnonzero(self.mask)

    def put(self, register: int, threads: np.ndarray, values: np.ndarray) -> None:
        """Gives these threads new values."""
        new = self.registers[register].copy()
        new[threads] = values
        self.registers[register] = new

    def write(self, register: int, value: np.ndarray) -> None:
        """Gives the active threads a new value: never in place, since moves share arrays."""
        old = self.registers[register]
        if np.shape(value) != old.shape:
            value = np.full(old.shape, value, old.dtype)
        self.registers[register] = value if self.full else np.where(self.mask, value, old)

    def run(self) -> None:
        program, counts = self.program, self.program.counts
        runs, guards, stops, leaves = program.runs, program.guards, program.stops, program.leaves
        state, pc = self.state, self.pc
        steps = 0
        while True:
            chosen = self.choose()
            if chosen is None:
                break
            base, p = chosen
            base_full = bool((base | (state == EXITED)).all())
            quantum = int(self.rng.integers(1, 64)) if self.schedule == "random" else 1 << 60
            while True:
                guard = guards[p]
                if guard is None:
                    self.mask, self.full = base, base_full
                else:
                    value = self.registers[guard.index]
                    self.mask = base & (~value if guard.negated else value)
                    self.full = False
                self.position = p
                steps += 1
                if leaves[p]:
                    pc[base] = p + 1
                    if guard is None or self.mask.any():
                        counts[p] += 1
                        runs[p](self)
                    break
                if guard is None or self.mask.any():
                    counts[p] += 1
                    runs[p](self)
                p += 1
                quantum -= 1
                if stops[p] or quantum <= 0:
                    pc[base] = p
                    break
            if steps > MAX_STEPS:
                self.find("deadlock", f"no end after {MAX_STEPS} steps", self.active())
                break
        program.steps += steps

    def choose(self) -> tuple[np.ndarray, int] | None:
        """Returns the threads that run next, and their common program counter; None at the end."""
        while True:
            running = self.state == RUNNING
            if running.any():
                break
            if (self.state == EXITED).all():
                return None
            if not (self.hopper and self.hopper.land()):
                self.report_deadlock()
                return None
        if self.schedule != "lockstep":
            warps = np.flatnonzero(np.bincount(self.warp_of[running], minlength=self.warps))
            pick = {"serial": 0, "reverse": -1}.get(self.schedule)
            warp = warps[pick] if pick is not None else self.rng.choice(warps)
            running &= self.warp_of == warp
        p = int(self.pc[running].min())
        return running & (self.pc == p), p

    def report_deadlock(self) -> None:
        blocked = np.flatnonzero(self.state == BLOCKED)
        for p in np.unique(self.pc[blocked]):
            self.position = int(p) - 1
            here = blocked[self.pc[blocked] == p]
            self.find("deadlock", "threads wait for ever", here)

    def find(self, kind: str, message: str, threads: np.ndarray) -> None:
        """Reports a finding at the current instruction; the first message of a kind stays."""
        findings = self.program.findings
        key = (kind, self.position)
        if key in findings:
            findings[key].count += len(threads)
            return
        where = self.kernel.where(self.kernel.code[self.position])
        t = int(threads[0]) if len(threads) else 0
        block = tuple(int(i) for i in self.block_ids[self.block_of[t]])
        who = f" [thread {self.thread_of[t]} of block {block}]"
        findings[key] = Finding(kind, message + who, where, len(threads))

    def require_whole_warps(self, members: np.ndarray | None = None) -> None:
        """Reports divergence unless all lanes (or `members`) of the active warps are active."""
        lanes = self.mask.reshape(-1, 32)
        here = lanes.any(1)
        wanted = self.state.reshape(-1, 32) != EXITED
        if members is not None:
            wanted = wanted & members
        missing = (wanted & ~lanes)[here].any()
        if missing:
            self.find("divergence", "some lanes of the warp do not execute it", self.active())

    # Barriers of a block

    def barrier(
        self, number: np.ndarray, expected: np.ndarray | None, aligned: bool, waits: bool,
        predicate: np.ndarray | None = None, reduce: Callable[..., None] | None = None,
    ) -> None:  # fmt: skip
        if aligned:
            self.require_whole_warps()
        active = self.active()
        gone = (self.state == EXITED).reshape(-1, 32).sum(1)
        for block in np.unique(self.block_of[active]):
            in_block = active[self.block_of[active] == block]
            for n in np.unique(number[in_block]):
                threads = in_block[number[in_block] == n]
                count = None if expected is None else int(expected[threads[0]])
                barrier = self.barriers.setdefault((int(block), int(n)), Barrier(count))
                if barrier.expected != count:
                    self.find("barrier", "threads expect different numbers of threads", threads)
                warps = np.unique(self.flat_warp[threads])
                barrier.arrived += len(threads) + int(gone[warps].sum())
                clock = self.released(threads)
                barrier.clock = clock if barrier.clock is None else np.maximum(barrier.clock, clock)
                if waits:
                    self.state[threads] = BLOCKED
                    barrier.warps.update(int(w) for w in warps)
                    barrier.waiting.append(threads)
                    if predicate is not None:
                        barrier.predicates.append(predicate[threads])
                        assert reduce is not None
                        barrier.reductions.append(reduce)
                else:
                    self.new_epoch(warps)
                self.complete(int(block), int(n))

    def complete(self, block: int, number: int) -> None:
        """Releases the threads that wait at a barrier, if all have arrived."""
        barrier = self.barriers[block, number]
        expected = barrier.expected
        arrived = barrier.arrived
        if expected is None:
            mine = slice(block * self.block_threads, (block + 1) * self.block_threads)
            expected = int((self.state[mine] != EXITED).sum())
            arrived = sum(len(threads) for threads in barrier.waiting)
        if arrived < expected or not arrived:
            return
        if barrier.expected is not None and arrived > expected:
            self.find("barrier", f"{arrived} threads came, {expected} expected", self.active())
        del self.barriers[block, number]
        for threads in barrier.waiting:
            self.state[threads] = RUNNING
        if barrier.predicates:
            values = np.concatenate(barrier.predicates)
            for threads, reduce in zip(barrier.waiting, barrier.reductions, strict=True):
                reduce(threads, values)
        warps = np.array(sorted(barrier.warps), np.int64)
        self.acquire(warps, barrier.clock)
        self.new_epoch(warps)

    def exit(self, threads: np.ndarray) -> None:
        self.state[threads] = EXITED
        if self.hopper:
            self.hopper.check_exit(threads)
        for block, number in list(self.barriers):
            if self.barriers[block, number].expected is None:
                self.complete(block, number)


class Program:
    """A kernel decoded for one launch: a function per instruction, and what all batches share."""

    def __init__(
        self, kernel: Kernel, grid: tuple[int, int, int], block: tuple[int, int, int],
        arguments: Sequence[Any], dynamic_shared: int,
    ):  # fmt: skip
        # Imported here, because these modules import this one; the import registers their opcodes.
        from . import (  # noqa: F401
            arithmetic,
            async_copy,
            control,
            conversion,
            load_store,
            matrix,
            operands,
            sm90,
            wgmma,
        )

        self.kernel, self.grid, self.block = kernel, grid, block
        self.memory = GlobalMemory()
        self.findings: dict[tuple[str, int], Finding] = {}
        self.steps = 0
        self.counts = [0] * len(kernel.code)
        self.register_bits = [operands.register_bits(t) for t in kernel.register_types]
        self._lay_out_variables(dynamic_shared)
        self._lay_out_parameters(arguments)
        self.memory.freeze()
        self.granule = min(
            [4]
            + [
                load_store.access_bytes(i)
                for i in kernel.code
                if i.base in ("ld", "st", "atom", "red") and "global" not in i.modifiers
            ]
        )
        decoded = [operands.decode(self, instruction) for instruction in kernel.code]
        self.runs = [d[0] for d in decoded]
        self.leaves = [d[1] for d in decoded]
        wgmma.watch(self)
        self.guards = [instruction.guard for instruction in kernel.code]
        self.stops = [False] * (len(kernel.code) + 1)
        for index in kernel.labels:
            self.stops[index] = True
        if not kernel.code or not self.leaves[-1]:
            raise PTXError("the kernel does not end with ret, exit, trap or bra")

    def _lay_out_variables(self, dynamic_shared: int) -> None:
        """Gives each variable an address in its space."""
        self.addresses: dict[str, int] = {}
        shared, local = SHARED_START, 0
        dynamic = [v for v in self.kernel.variables.values() if v.space == "shared" and not v.size]
        for v in self.kernel.variables.values():
            if v.space == "shared" and v.size:
                shared = -(-shared // v.align) * v.align
                self.addresses[v.name] = shared
                shared += v.size
            elif v.space == "local":
                local = -(-local // v.align) * v.align
                self.addresses[v.name] = local
                local += v.size
            elif v.space in ("global", "const"):
                data = (v.data or b"").ljust(v.size, b"\0")
                if v.space == "const" or v.data:
                    self.addresses[v.name] = self.memory.constant(data)
                else:
                    bytes_ = np.frombuffer(bytearray(data), np.uint8)
                    valid = np.ones(v.size, np.uint8)
                    self.addresses[v.name] = self.memory.reserve(bytes_, valid, False)
        for v in dynamic:
            start = -(-shared // max(v.align, 16)) * max(v.align, 16)
            self.addresses[v.name] = start
        if dynamic:
            shared = max(self.addresses[v.name] for v in dynamic) + dynamic_shared
        self.shared_size, self.local_size = shared - SHARED_START, local

    def _lay_out_parameters(self, arguments: Sequence[Any]) -> None:
        parameters = self.kernel.parameters
        if len(arguments) != len(parameters):
            raise ValueError(
                f"{self.kernel.name}: expected {len(parameters)} arguments, got {len(arguments)}"
            )
        block = b""
        offsets = []
        for variable, argument in zip(parameters, arguments, strict=True):
            align = max(variable.align, 1)
            block = block.ljust(-(-len(block) // align) * align, b"\0")
            offsets.append(len(block))
            block += self._encode(variable, argument)
        self.parameter_bytes = block
        self.parameter_base = self.memory.constant(block.ljust(16, b"\0"))
        self.parameter_offsets = dict(zip((v.name for v in parameters), offsets, strict=True))

    def _encode(self, variable: Variable, argument: Any) -> bytes:
        if hasattr(argument, "encode_for"):  # a TensorMap, or a struct of cuda_params.py
            data = argument.encode_for(self.memory)
        elif argument is None:
            data = bytes(8)
        elif isinstance(argument, (bool, int, np.integer)) and not variable.type.startswith("f"):
            data = (int(argument) % (1 << (8 * variable.size))).to_bytes(variable.size, "little")
        elif isinstance(argument, (int, float, np.number)):
            data = np.array(argument, {2: "f2", 4: "f4", 8: "f8"}[variable.size]).tobytes()
        else:
            data = self.memory.bind(argument).to_bytes(8, "little")
        if len(data) != variable.size:
            raise ValueError(
                f"parameter {variable.name}: expected {variable.size} bytes, got {len(data)} "
                f"from {type(argument).__name__}"
            )
        return data

    def address_of(self, symbol: Symbol) -> int:
        """Returns the address of a variable or parameter: within its window, unless global."""
        if symbol.name in self.parameter_offsets:
            return self.parameter_offsets[symbol.name] + symbol.offset
        if symbol.name not in self.addresses:
            raise PTXError(f"unknown name {symbol.name}")
        return self.addresses[symbol.name] + symbol.offset


def launch(
    ptx_text: str, kernel_name: str | None, grid: Sequence[int], block: int | Sequence[int],
    arguments: Sequence[Any], dynamic_shared: int = 0, schedule: str = "lockstep", seed: int = 0,
) -> Report:  # fmt: skip
    """Runs a kernel of `ptx_text` on numpy arrays and torch CPU tensors, in place.

    kernel_name: may be None if the text has one kernel. grid, block: up to three numbers.
    arguments: one for each parameter, in order: an array or tensor (its address is passed; it may
    be a strided view, then only its elements may be touched), a number, None (null pointer), or a
    `TensorMap`. dynamic_shared: bytes. schedule: "lockstep" (all warps together), "serial" or
    "reverse" (the lowest or highest warp that can run, until it blocks), or "random" (any warp for
    a few instructions; from `seed`). Outputs are written into the arguments also when there are
    findings.

    Raises PTXError for unknown text or opcodes, ValueError for arguments that do not fit.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {SCHEDULES}, got {schedule!r}")
    kernel = parse(ptx_text, kernel_name)
    sizes = (block,) if isinstance(block, int) else tuple(block)
    block3 = (*sizes, 1, 1)[:3]
    grid3 = (*grid, 1, 1)[:3]
    threads = int(np.prod(block3))
    if kernel.required_threads not in (None, threads):
        raise ValueError(f"block: .reqntid is {kernel.required_threads}, got {threads}")
    program = Program(kernel, grid3, block3, arguments, dynamic_shared)
    ids = [(x, y, z) for z in range(grid3[2]) for y in range(grid3[1]) for x in range(grid3[0])]
    side_by_side = max(1, BATCH_THREADS // threads)
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        for start in range(0, len(ids), side_by_side):
            Machine(program, ids[start : start + side_by_side], schedule, rng).run()
    program.memory.write_back()
    opcodes: Counter[str] = Counter()
    for instruction, count in zip(kernel.code, program.counts, strict=True):
        if count:
            opcodes[instruction.opcode] += count
    return Report(list(program.findings.values()), program.steps, opcodes)
