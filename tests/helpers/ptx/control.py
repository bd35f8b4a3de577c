"""Control flow, barriers, and operations of whole warps.

PTX ISA 9.x, 9.7.12 and 9.7.13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import Machine, Program
from .operands import (
    CONTROL,
    Run,
    allow,
    destination,
    opcode,
    source,
)
from .parser import (
    Instruction,
    Pair,
    Register,
    Symbol,
)


@opcode("bra", table=CONTROL)
def branch(program: Program, i: Instruction) -> Run:
    target = i.target

    def run(m: Machine) -> None:
        m.pc[m.mask] = target

    return run


@opcode("ret", "exit", table=CONTROL)
def leave(program: Program, i: Instruction) -> Run:
    return lambda m: m.exit(m.active())


@opcode("trap", "brkpt", table=CONTROL)
def trap(program: Program, i: Instruction) -> Run:
    def run(m: Machine) -> None:
        m.find("trap", "the kernel gave up", m.active())
        m.exit(np.flatnonzero(m.state != 2))

    return run


@opcode(
    "nanosleep", "membar", "prefetch", "prefetchu", "griddepcontrol", "applypriority", "discard"
)
def nothing(program: Program, i: Instruction) -> Run:
    """Time, caches and other grids are not modelled."""
    return lambda m: None


@opcode("setmaxnreg")
def set_register_count(program: Program, i: Instruction) -> Run:
    allow(i, "inc", "dec", "sync", "aligned")
    return lambda m: m.require_whole_warps()


@opcode("createpolicy")
def cache_policy(program: Program, i: Instruction) -> Run:
    write = destination(program, i.operands[0], "b64")
    return lambda m: write(m, np.uint64(0))


@opcode("bar", "barrier", table=CONTROL)
def barrier(program: Program, i: Instruction) -> Run:
    allow(i, "cta", "sync", "arrive", "red", "aligned", "warp", "popc", "and", "or")
    if "warp" in i.modifiers:
        return warp_barrier(program, i)
    aligned = i.base == "bar" or "aligned" in i.modifiers
    operands = list(i.operands)
    result = operands.pop(0) if "red" in i.modifiers else None
    value = source(program, operands.pop(), "pred") if result is not None else None
    number = source(program, operands[0], "u32")
    expected = source(program, operands[1], "u32") if len(operands) > 1 else None
    reductions = {"popc": np.sum, "and": np.all, "or": np.any}
    how = next((reductions[m] for m in i.modifiers if m in reductions), None)

    def reduce(m: Machine) -> Callable[..., None]:
        def give(threads: np.ndarray, values: np.ndarray) -> None:
            assert how and isinstance(result, Register)
            m.put(result.index, threads, how(values))

        return give

    def run(m: Machine) -> None:
        shape = m.everyone.shape
        m.barrier(
            np.broadcast_to(number(m), shape),
            None if expected is None else np.broadcast_to(expected(m), shape),
            aligned,
            "arrive" not in i.modifiers,
            None if value is None else np.broadcast_to(value(m), shape),
            reduce(m),
        )

    return run


def member_lanes(m: Machine, masks: Any) -> np.ndarray:
    """Returns bool [warps, 32] from the member mask of the lowest active lane of each warp."""
    masks = np.broadcast_to(masks, m.everyone.shape).reshape(-1, 32)
    lowest = m.mask.reshape(-1, 32).argmax(1)
    mask = masks[np.arange(len(masks)), lowest]
    return ((mask[:, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)).astype(bool)


def warp_barrier(program: Program, i: Instruction) -> Run:
    masks = source(program, i.operands[0], "u32")

    def run(m: Machine) -> None:
        m.require_whole_warps(member_lanes(m, masks(m)))
        threads = m.active()
        warps = m.flat_warp[threads]
        for warp in np.unique(warps):
            m.acquire(np.array([warp]), m.released(threads[warps == warp]))
        m.new_epoch(np.unique(warps))

    return run


# Warp operations


@opcode("shfl")
def shuffle(program: Program, i: Instruction) -> Run:
    allow(i, "sync", "up", "down", "bfly", "idx")
    mode = i.modifiers[1]
    target = i.operands[0]
    pair = target if isinstance(target, Pair) else Pair(target, Symbol("_"))
    write = destination(program, pair.first, "b32")
    write_inside = destination(program, pair.second, "pred")
    value, distance, limits, masks = (source(program, o, "u32") for o in i.operands[1:5])

    def run(m: Machine) -> None:
        m.require_whole_warps(member_lanes(m, masks(m)))
        lane = m.lane_of
        b = (distance(m) & np.uint32(31)).astype(np.int32)
        c = limits(m)
        clamp = (c & np.uint32(31)).astype(np.int32)
        segment = ((c >> np.uint32(8)) & np.uint32(31)).astype(np.int32)
        low = lane & segment
        high = low | (clamp & ~segment)
        other = {
            "up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~segment)
        }[mode]  # fmt: skip
        inside = other >= high if mode == "up" else other <= high
        from_ = np.where(inside, m.everyone - lane + other, m.everyone)
        write(m, np.broadcast_to(value(m), lane.shape)[from_])
        write_inside(m, inside)

    return run


@opcode("vote")
def vote(program: Program, i: Instruction) -> Run:
    allow(i, "sync", "all", "any", "uni", "ballot")
    mode = i.modifiers[1]
    write = destination(program, i.operands[0], i.types[-1])
    value = source(program, i.operands[1], "pred")
    masks = source(program, i.operands[2], "u32")

    def run(m: Machine) -> None:
        members = member_lanes(m, masks(m))
        m.require_whole_warps(members)
        here = members & m.mask.reshape(-1, 32)
        yes = np.broadcast_to(value(m), m.everyone.shape).reshape(-1, 32)
        if mode == "ballot":
            weights = np.uint64(1) << np.arange(32, dtype=np.uint64)
            result = ((yes & here) * weights).sum(1).astype(np.uint32)
        else:
            everyone, someone = (yes | ~here).all(1), (yes & here).any(1)
            result = {"all": everyone, "any": someone, "uni": everyone | ~someone}[mode]
        write(m, np.repeat(result, 32))

    return run


@opcode("activemask")
def active_mask(program: Program, i: Instruction) -> Run:
    write = destination(program, i.operands[0], "u32")

    def run(m: Machine) -> None:
        weights = np.uint64(1) << np.arange(32, dtype=np.uint64)
        bits = (m.mask.reshape(-1, 32) * weights).sum(1).astype(np.uint32)
        write(m, np.repeat(bits, 32))

    return run


@opcode("elect")
def elect(program: Program, i: Instruction) -> Run:
    """Gives the number of the lowest member lane, and a predicate that is true in this lane."""
    allow(i, "sync")
    write = destination(program, i.operands[0].first, "u32")
    write_leads = destination(program, i.operands[0].second, "pred")
    masks = source(program, i.operands[1], "u32")

    def run(m: Machine) -> None:
        members = member_lanes(m, masks(m))
        m.require_whole_warps(members)
        leader = np.repeat((members & m.mask.reshape(-1, 32)).argmax(1), 32)
        write(m, leader.astype(np.uint32))
        write_leads(m, m.lane_of == leader)

    return run


@opcode("redux")
def reduce_warp(program: Program, i: Instruction) -> Run:
    allow(i, "sync", "add", "min", "max", "and", "or", "xor")
    functions = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
        "or": np.bitwise_or, "xor": np.bitwise_xor,
    }  # fmt: skip
    function, type_ = functions[i.modifiers[1]], i.types[-1]
    write = destination(program, i.operands[0], type_)
    value = source(program, i.operands[1], type_)
    masks = source(program, i.operands[2], "u32")

    def run(m: Machine) -> None:
        members = member_lanes(m, masks(m))
        m.require_whole_warps(members)
        rows = np.broadcast_to(value(m), m.everyone.shape).reshape(-1, 32)
        here = members & m.mask.reshape(-1, 32)
        result = np.zeros(len(rows), rows.dtype)
        for w in np.flatnonzero(here.any(1)):
            result[w] = function.reduce(rows[w][here[w]], dtype=rows.dtype)
        write(m, np.repeat(result, 32))

    return run


@opcode("match")
def match(program: Program, i: Instruction) -> Run:
    """match.any.sync: gives the mask of the lanes that hold the same value."""
    allow(i, "any", "sync")
    write = destination(program, i.operands[0], "u32")
    value = source(program, i.operands[1], i.types[-1])
    masks = source(program, i.operands[2], "u32")

    def run(m: Machine) -> None:
        members = member_lanes(m, masks(m))
        m.require_whole_warps(members)
        rows = np.broadcast_to(value(m), m.everyone.shape).reshape(-1, 32)
        same = (rows[:, :, None] == rows[:, None, :]) & members[:, None, :]
        weights = np.uint64(1) << np.arange(32, dtype=np.uint64)
        write(m, (same * weights).sum(2).astype(np.uint32).reshape(-1))

    return run
