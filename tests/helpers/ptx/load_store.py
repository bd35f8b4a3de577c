"""Loads, stores and atomics, with a check of every address (PTX ISA 9.x, 9.7.9, 9.7.13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import Machine, Program
from .memory import GLOBAL_BASE, LOCAL_BASE, SHARED_BASE, SHARED_START, UINT, WINDOW
from .operands import (
    NUMPY,
    Run,
    allow,
    destination,
    opcode,
    source,
    to_bits,
    to_values,
)
from .parser import (
    TYPE_BITS,
    Address,
    Immediate,
    Instruction,
    Register,
    Symbol,
    Vector,
)

SPACES = ("global", "shared", "shared::cta", "local", "param", "const")
CACHING = (
    "weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys", "cluster",
    "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::evict_normal", "L1::evict_unchanged",
    "L1::evict_first", "L1::evict_last", "L1::no_allocate", "L2::cache_hint", "L2::64B",
    "L2::128B", "L2::256B", "L2::evict_last", "L2::evict_normal", "L2::evict_first", "noftz",
)  # fmt: skip


def access_bytes(i: Instruction) -> int:
    return TYPE_BITS[i.types[-1]] // 8


def vector_length(i: Instruction) -> int:
    return next((int(m[1:]) for m in i.modifiers if m in ("v2", "v4", "v8")), 1)


def space_of(i: Instruction) -> str:
    space = next((m for m in i.modifiers if m in SPACES), "generic")
    return {"shared::cta": "shared", "const": "global"}.get(space, space)


def address(program: Program, operand: Address) -> Callable[[Machine, np.ndarray], np.ndarray]:
    """Returns a function that gives the int64 addresses of some threads."""
    base, offset = operand.base, operand.offset
    if isinstance(base, Register):
        index = base.index
        return lambda m, threads: m.registers[index][threads].astype(np.int64) + offset
    if isinstance(base, Immediate):
        fixed = int(base.value) + offset
    else:
        fixed = program.address_of(base) + offset
    return lambda m, threads: np.full(len(threads), fixed, np.int64)


def by_space(
    m: Machine, space: str, threads: np.ndarray, where: np.ndarray
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Resolves generic addresses to (space, indices of threads, addresses within the window)."""
    if space != "generic":
        return [(space, np.arange(len(threads)), where)]
    parts = []
    left = np.ones(len(threads), bool)
    for name, base in (("shared", SHARED_BASE), ("local", LOCAL_BASE)):
        here = (where >= base) & (where < base + WINDOW)
        left &= ~here
        if here.any():
            parts.append((name, np.flatnonzero(here), where[here] - base))
    if left.any():
        parts.append(("global", np.flatnonzero(left), where[left]))
    return parts


def place(
    m: Machine, space: str, threads: np.ndarray, where: np.ndarray, size: int, writing: bool,
    align: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Returns which threads may go on, and the index of their bytes in the memory of the space."""
    if space == "global":
        index = where - GLOBAL_BASE
        inside = m.memory.inside(index, size, writing)
    elif space == "shared":
        index = m.block_of[threads] * m.shared.stride + where
        inside = (where >= SHARED_START) & (where + size <= m.shared.high)
    else:
        index = where
        inside = (where >= 0) & (where + size <= m.program.local_size)
    if not inside.all():
        bad = threads[~inside]
        first = int(where[~inside][0])
        shown = f"{space} address {first - GLOBAL_BASE if space == 'global' else first:#x}"
        what = f"{'write' if writing else 'read'} of {size} bytes"
        m.find("out of bounds", f"{what} at {shown}, which no argument or variable owns", bad)
    aligned = where % (align or size) == 0
    if not aligned.all():
        what = f"an access to {align or size} bytes at an address that is no multiple of that"
        m.find("misaligned", what, threads[~aligned])
    good = np.flatnonzero(inside & aligned)
    return good, index[good]


def read_memory(
    m: Machine, space: str, threads: np.ndarray, where: np.ndarray, size: int, count: int
) -> np.ndarray:
    """Returns [count, threads] unsigned integers of `size` bytes; 0 where the access is wrong."""
    result = np.zeros((count, len(threads)), UINT[size])
    for part, chosen, offset in by_space(m, space, threads, where):
        good, index = place(m, part, threads[chosen], offset, size * count, False)
        rows = chosen[good]
        if part == "global":
            check_global_read(m, threads[rows], index)
            memory = m.memory.views[size]
        elif part == "shared":
            m.shared.read(threads[rows], index, size * count)
            memory = m.shared.views[size]
        else:
            memory = m.local.reshape(-1).view(UINT[size])
            index = index + threads[rows] * m.program.local_size
        for k in range(count):
            result[k, rows] = memory[index // size + k]
    return result


def write_memory(
    m: Machine, space: str, threads: np.ndarray, where: np.ndarray, size: int, values: np.ndarray
) -> None:
    """Writes values, [count, threads] unsigned integers, except where the access is wrong."""
    count = len(values)
    for part, chosen, offset in by_space(m, space, threads, where):
        good, index = place(m, part, threads[chosen], offset, size * count, True)
        rows = chosen[good]
        if part == "global":
            note_global_write(m, threads[rows], index, size * count)
            memory = m.memory.views[size]
        elif part == "shared":
            memory = m.shared.views[size]
            same = np.ones(len(rows), bool)
            for k in range(count):
                same &= memory[index // size + k] == values[k][rows]
            m.shared.write(threads[rows], index, size * count, same=same)
        else:
            memory = m.local.reshape(-1).view(UINT[size])
            index = index + threads[rows] * m.program.local_size
        for k in range(count):
            memory[index // size + k] = values[k][rows]
        lost = np.zeros(len(rows), bool)
        for k in range(count):
            lost |= memory[index // size + k] != values[k][rows]
        if lost.any():
            kind = "shared race" if part == "shared" else "global race"
            what = "two threads write different values to one address in one instruction"
            m.find(kind, what, threads[rows[lost]])


def unordered(m: Machine, threads: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which global bytes (index: [threads, n]) another block wrote, and which another warp
    wrote with no barrier between."""
    writer = m.memory.writer[index]
    rank = m.block_rank[m.block_of[threads]][:, None]
    others = (writer > 0) & ((writer - 1) // m.warps != rank)
    known = np.take_along_axis(
        m.clocks[m.flat_warp[threads]], np.maximum(writer - 1, 0) % m.warps, axis=1
    )
    late = (writer > 0) & ~others & (m.memory.clock[index] > known)
    return others, late


def check_global_read(m: Machine, threads: np.ndarray, index: np.ndarray) -> None:
    if not m.memory.writer[index].any():
        return
    others, late = unordered(m, threads, index[:, None])
    for where, what in (
        (others, "reads what another block wrote in the same launch"),
        (late, "reads what another warp wrote, with no barrier between"),
    ):
        if where.any():
            m.find("global race", what, threads[where.any(1)])


def note_global_write(m: Machine, threads: np.ndarray, index: np.ndarray, size: int) -> None:
    each = index[:, None] + np.arange(size)
    if m.memory.writer[each].any():
        others, late = unordered(m, threads, each)
        for where, kind, what in (
            (others, "overlapping global writes", "another block wrote these bytes too"),
            (late, "global race", "another warp wrote these bytes too, with no barrier between"),
        ):
            if where.any():
                m.find(kind, what, threads[where.any(1)])
    rank = m.block_rank[m.block_of[threads]]
    writer = (rank * m.warps + m.warp_of[threads] + 1)[:, None]
    m.memory.writer[each] = writer
    m.memory.clock[each] = m.own_clock[m.flat_warp[threads]][:, None]
    # Blocks that run side by side may write in the same instruction: only the last one is noted.
    others = (m.memory.writer[each] - 1) // m.warps != rank[:, None]
    if others.any():
        what = "another block wrote these bytes too"
        m.find("overlapping global writes", what, threads[others.any(1)])


@opcode("ld", "ldu")
def load(program: Program, i: Instruction) -> Run:
    allow(i, SPACES, CACHING, ("v2", "v4", "v8"))
    size, count, space, type_ = access_bytes(i), vector_length(i), space_of(i), i.types[-1]
    target = i.operands[0]
    targets = target.items if isinstance(target, Vector) else (target,)
    if space == "param" and isinstance(i.operands[1].base, Symbol):
        return load_parameter(program, i, targets, type_)
    where = address(program, i.operands[1])
    if space == "param":  # a register holds the address of a struct's field
        within, space = where, "global"

        def where(m: Machine, threads: np.ndarray) -> np.ndarray:
            return within(m, threads) + program.parameter_base

    indices = [t.index if isinstance(t, Register) else None for t in targets]
    kinds = [
        np.dtype(f"{'i' if type_[0] == 's' else 'u'}{program.register_bits[n] // 8}")
        for n in indices
        if n is not None
    ]

    def run(m: Machine) -> None:
        threads = m.active()
        values = read_memory(m, space, threads, where(m, threads), size, count)
        if type_[0] == "s":
            values = values.view(NUMPY[type_])
        for n, value, kind in zip(indices, values, kinds, strict=False):
            if n is not None:
                m.put(n, threads, value.astype(kind))

    return run


def load_parameter(program: Program, i: Instruction, targets: tuple[Any, ...], type_: str) -> Run:
    where, size = i.operands[1], access_bytes(i)
    start = program.address_of(where.base) + where.offset
    data = np.frombuffer(program.parameter_bytes[start : start + size * len(targets)], UINT[size])
    writers = [destination(program, target, type_) for target in targets]

    def run(m: Machine) -> None:
        for write, bits in zip(writers, data, strict=True):
            write(m, to_values(np.array([bits]), type_)[0])

    return run


@opcode("st")
def store(program: Program, i: Instruction) -> Run:
    allow(i, SPACES, CACHING, ("v2", "v4", "v8"))
    size, space = access_bytes(i), space_of(i)
    where = address(program, i.operands[0])
    items = i.operands[1].items if isinstance(i.operands[1], Vector) else (i.operands[1],)
    read = [source(program, item, f"u{8 * size}") for item in items]

    def run(m: Machine) -> None:
        threads = m.active()
        values = np.stack([np.broadcast_to(r(m), m.everyone.shape)[threads] for r in read])
        write_memory(m, space, threads, where(m, threads), size, values)

    return run


ATOMIC: dict[str, Callable[..., Any]] = {
    "add": lambda old, b: old + b,
    "min": lambda old, b: min(old, b),
    "max": lambda old, b: max(old, b),
    "and": lambda old, b: old & b,
    "or": lambda old, b: old | b,
    "xor": lambda old, b: old ^ b,
    "exch": lambda old, b: b,
    "inc": lambda old, b: old.dtype.type(0) if old >= b else old + old.dtype.type(1),
    "dec": lambda old, b: b if old == 0 or old > b else old - old.dtype.type(1),
    "cas": lambda old, b, c: c if old == b else old,
}


@opcode("atom", "red")
def atomic(program: Program, i: Instruction) -> Run:
    """Lets one thread act after the other, in the order of their numbers."""
    allow(i, SPACES, CACHING, ATOMIC, ("v2", "v4", "v8"))
    operation = next(m for m in i.modifiers if m in ATOMIC)
    function = ATOMIC[operation]
    type_, space, size = i.types[-1], space_of(i), access_bytes(i)
    gives = i.base == "atom"
    where = address(program, i.operands[gives])
    groups = [
        operand.items if isinstance(operand, Vector) else (operand,)
        for operand in i.operands[gives + 1 :][: 2 if operation == "cas" else 1]
    ]
    read = [[source(program, item, type_) for item in items] for items in groups]
    target = i.operands[0]
    targets = (target.items if isinstance(target, Vector) else (target,)) if gives else ()
    indices = [t.index for t in targets if isinstance(t, Register)]
    count = len(groups[0])

    def run(m: Machine) -> None:
        threads = m.active()
        old = np.zeros((count, len(threads)), UINT[size])
        shape = m.everyone.shape
        values = [[np.resize(r(m), (shape[0], *np.shape(r(m))[1:])) for r in rs] for rs in read]
        for part, chosen, offset in by_space(m, space, threads, where(m, threads)):
            good, index = place(m, part, threads[chosen], offset, size * count, True)
            rows = chosen[good]
            if part == "global":
                memory = m.memory.views[size]
                check_global_read(m, threads[rows], index)
            else:
                memory = m.shared.views[size]
                m.shared.atomic(threads[rows], index, size * count)
            for row, at in zip(rows, index // size, strict=True):
                for k in range(count):
                    before = to_values(memory[at + k : at + k + 1], type_)
                    old[k, row] = memory[at + k]
                    after = function(before[0:1][0], *(v[k][threads[row]] for v in values))
                    memory[at + k] = to_bits(np.asarray(after)[None], type_)[0]
        for k, n in enumerate(indices):
            m.put(n, threads, old[k])

    return run
