"""wgmma: asynchronous matrix products of a warpgroup, with operands in shared memory.

PTX ISA 9.x, 9.7.15. Each of the four warps computes 16 of the 64 rows. The product is computed when
it is issued. Touching its accumulators, or overwriting its operands in registers or shared memory,
before `wgmma.wait_group` is a finding, and so are registers changed without `wgmma.fence`.

An operand in shared memory is described by 64 bits: start address (bits 0-13), leading (16-29) and
stride (32-45) byte offset, all in units of 16 bytes, and the swizzle (62-63: none, 128, 64, 32).
Where x counts rows of A or columns of B, and k the depth, an element of e bytes lies at
- K-major, swizzled over S bytes: (x // 8) stride + (x % 8) S + k e;
- K-major, not swizzled: (x // 8) stride + (k e // 16) leading + (x % 8) 16 + k e % 16;
- MN-major, swizzled: (x // c) leading + (x % c) e + (k // 8) stride + (k % 8) S, c = S / e;
- MN-major, not swizzled: (x // 8) stride + (x % 8) e + (k // 8) leading + (k % 8) 16;
then the 16-byte chunks are exchanged as in a tensor copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .machine import Machine, Program
from .matrix import PER_WORD, elements, matrix_a, matrix_c, register_indices, words_of_d
from .operands import Run, allow, opcode, source, unknown
from .parser import Address, Instruction, Pair, Register, Vector
from .sm90 import hopper, require_fence, swizzle


@dataclass
class Product:
    """A wgmma that has not been waited for, of one or more warps."""

    warps: np.ndarray
    group: np.ndarray  # of each warp
    registers: list[int]
    granules: list[tuple[np.ndarray, np.ndarray]]  # (warps, granules [warps, n]) that it reads


class Tracker:
    """Tracks the registers of each warp that a product uses, or that changed since a fence."""

    def __init__(self, m: Machine):
        warps = len(m.everyone) // 32
        registers = len(m.registers)
        self.products: list[Product] = []
        self.group = np.zeros(warps, np.int64)
        self.accumulating = np.zeros((registers, warps), np.int16)
        self.reading = np.zeros((registers, warps), np.int16)
        self.unfenced = np.ones((registers, warps), bool)  # the first product needs a fence


def tracker(m: Machine) -> Tracker:
    h = hopper(m)
    if not hasattr(h, "tracker"):
        h.tracker = Tracker(m)
    return h.tracker


def active_warps(m: Machine) -> np.ndarray:
    return np.flatnonzero(m.mask.reshape(-1, 32).any(1))


def matrix_addresses(descriptor: int, rows: int, depth: int, itemsize: int, k_major: bool) -> Any:
    """Returns the shared addresses [rows, depth] of the elements of an operand."""
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    span = (0, 128, 64, 32)[descriptor >> 62]
    x, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if k_major and span:
        offset = x // 8 * stride + x % 8 * span + k * itemsize
    elif k_major:
        at = k * itemsize
        offset = x // 8 * stride + at // 16 * leading + x % 8 * 16 + at % 16
    elif span:
        chunk = span // itemsize
        offset = x // chunk * leading + x % chunk * itemsize + k // 8 * stride + k % 8 * span
    else:
        offset = x // 8 * stride + x % 8 * itemsize + k // 8 * leading + k % 8 * 16
    return swizzle(start + offset, span)


def read_operand(
    m: Machine, descriptors: np.ndarray, warps: np.ndarray, rows: int, depth: int, type_: str,
    k_major: bool, mine: bool,
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:  # fmt: skip
    """Returns float64 [warps, rows, depth] (mine: a warp's own 16 rows), and granules read."""
    itemsize = 4 // PER_WORD[type_]
    shared = m.shared
    values = np.zeros((len(warps), 16 if mine else rows, depth))
    used = []
    # Warps with the same descriptor, and the same rows of it, read the same addresses.
    keys = np.stack([descriptors.view(np.int64), warps % 4 if mine else np.zeros_like(warps)], 1)
    for descriptor, part in np.unique(keys, axis=0):
        chosen = np.flatnonzero((keys == (descriptor, part)).all(1))
        where = matrix_addresses(int(descriptor) % 2**64, rows, depth, itemsize, k_major)
        if mine:
            where = where[16 * int(part) : 16 * int(part) + 16]
        threads = warps[chosen] * 32
        if where.min() < 1024 or where.max() + itemsize > shared.high:
            m.find("out of bounds", "a matrix descriptor beyond shared memory", threads)
            continue
        start = m.block_of[threads] * shared.stride
        granules = np.unique(where // shared.granule) + (start // shared.granule)[:, None]
        shared.read(threads, start + where.min(), 0, granules)
        require_fence(m, threads, granules)
        np.add.at(shared.read_later, granules, 1)
        used.append((warps[chosen], granules))
        index = (start[:, None, None] + where) // itemsize
        raw = shared.views[itemsize][index]
        if itemsize == 4:
            values[chosen] = elements(raw, type_)[..., 0]
        else:
            values[chosen] = elements(raw.view(np.uint32), type_).reshape(values[chosen].shape)
    return values, used


@opcode("wgmma")
def wgmma(program: Program, i: Instruction) -> Run:
    what = i.modifiers[0]
    if what == "fence":
        return fence_registers
    if what == "commit_group":
        return commit
    if what == "wait_group":
        keep = int(i.operands[0].value)
        return lambda m: wait(m, keep)
    if what == "mma_async":
        return multiply(program, i)
    raise unknown(i)


def fence_registers(m: Machine) -> None:
    m.require_whole_warps()
    tracker(m).unfenced[:, active_warps(m)] = False


def commit(m: Machine) -> None:
    m.require_whole_warps()
    tracker(m).group[active_warps(m)] += 1


def wait(m: Machine, keep: int) -> None:
    m.require_whole_warps()
    t, here = tracker(m), active_warps(m)
    left = []
    for p in t.products:
        done = np.isin(p.warps, here) & (p.group < t.group[p.warps] - keep)
        if not done.any():
            left.append(p)
            continue
        finished = p.warps[done]
        for registers, table in zip(p.registers, (t.accumulating, t.reading), strict=True):
            table[np.ix_(registers, finished)] -= 1
        reads = []
        for warps, granules in p.granules:
            mine = np.isin(warps, finished)
            np.subtract.at(m.shared.read_later, granules[mine], 1)
            # The reads end now: threads that overwrite these bytes have to come after this point.
            m.shared.readers[granules[mine], (warps[mine] % m.warps)[:, None]] = (
                m.own_clock[warps[mine]] << 5
            )[:, None]
            reads.append((warps[~mine], granules[~mine]))
        if not done.all():
            left.append(Product(p.warps[~done], p.group[~done], p.registers, reads))
    t.products = left


def multiply(program: Program, i: Instruction) -> Run:
    """wgmma.mma_async.sync.aligned.m64nNkK.dtype.atype.btype"""
    allow(i, "mma_async", "sync", "aligned", i.modifiers[3], PER_WORD)
    type_d, type_a, type_b = i.modifiers[4:7]
    columns, depth = (int(n) for n in i.modifiers[3][4:].split("k"))
    d = register_indices(i, i.operands[0])
    in_registers = isinstance(i.operands[1], Vector)
    a = register_indices(i, i.operands[1]) if in_registers else []
    descriptor_a = None if in_registers else source(program, i.operands[1], "u64")
    descriptor_b = source(program, i.operands[2], "u64")
    accumulates = source(program, i.operands[3], "pred")
    signs = [int(operand.value) for operand in i.operands[4:6]]
    transposed = [int(operand.value) for operand in i.operands[6:]]
    k_major_b = not (transposed and transposed[-1])
    k_major_a = not (len(transposed) == 2 and transposed[0])
    bytes_of_k = depth * 4 // PER_WORD[type_a]
    words = columns // 2 if type_d == "f32" else columns // 4
    if bytes_of_k != 32 or len(d) != words or type_d not in ("f32", "f16"):
        raise unknown(i)

    def run(m: Machine) -> None:
        m.require_whole_warps()
        t, warps = tracker(m), active_warps(m)
        check_registers(m, t, d, a, warps)

        def of_warps(values: Any) -> np.ndarray:
            return np.broadcast_to(values, m.everyone.shape)[warps * 32]

        used = []
        if descriptor_a:
            left, reads = read_operand(
                m, of_warps(descriptor_a(m)), warps, 64, depth, type_a, k_major_a, True
            )
            used += reads
        else:
            raw = np.stack([m.registers[n].reshape(-1, 32)[warps] for n in a])
            left = matrix_a(raw, type_a)
        right, reads = read_operand(
            m, of_warps(descriptor_b(m)), warps, columns, depth, type_b, k_major_b, False
        )
        used += reads
        product = np.matmul(left, right.swapaxes(1, 2)) * (signs[0] * signs[1])
        before = np.stack([m.registers[n].reshape(-1, 32)[warps] for n in d])
        add = of_warps(accumulates(m))[:, None, None]
        result = words_of_d(np.where(add, matrix_c(before, type_d), 0.0) + product, type_d)
        for n, row in zip(d, result, strict=True):
            new = m.registers[n].reshape(-1, 32).copy()
            new[warps] = row
            m.registers[n] = new.reshape(-1)
        t.products.append(Product(warps, t.group[warps].copy(), [d, a], used))
        t.accumulating[np.ix_(d, warps)] += 1
        t.reading[np.ix_(a, warps)] += 1

    return run


def check_registers(m: Machine, t: Tracker, d: list[int], a: list[int], warps: np.ndarray) -> None:
    if t.unfenced[np.ix_(d + a, warps)].any():
        what = "registers of the product were changed after the last wgmma.fence"
        m.find("missing wgmma fence", what, warps * 32)
    if t.accumulating[np.ix_(a, warps)].any():
        m.find("missing async wait", "A is the result of a product not waited for", warps * 32)


def registers_in(operand: Any) -> list[int]:
    if isinstance(operand, Register):
        return [operand.index]
    parts = {
        Vector: lambda o: o.items,
        Address: lambda o: (o.base, *o.coordinates),
        Pair: lambda o: (o.first, o.second),
    }.get(type(operand), lambda o: ())(operand)
    return [r for part in parts for r in registers_in(part)]


def watch(program: Program) -> None:
    """Makes every other instruction check the registers that products use."""
    code = program.kernel.code
    products = [i for i in code if i.base == "wgmma" and i.modifiers[0] == "mma_async"]
    watched = {r for i in products for operand in i.operands[:2] for r in registers_in(operand)}
    watched = {r for r in watched if program.register_bits[r] == 32}
    if not products:
        return
    for n, i in enumerate(code):
        if i.base == "wgmma":
            continue
        writes = [] if i.base in ("st", "red", "stmatrix") or not i.operands else i.operands[:1]
        written = sorted({r for o in writes for r in registers_in(o)} & watched)
        touched = sorted({r for o in i.operands for r in registers_in(o)} & watched)
        if touched:
            program.runs[n] = _watched(program.runs[n], written, touched)


def _watched(run: Run, written: list[int], touched: list[int]) -> Run:
    def checked(m: Machine) -> None:
        t, warps = tracker(m), active_warps(m)
        if t.products:
            busy = t.accumulating[np.ix_(touched, warps)].any()
            if busy or t.reading[np.ix_(written, warps)].any():
                what = "touches registers of a wgmma with no wgmma.wait_group before"
                m.find("missing async wait", what, m.active())
        if written:
            t.unfenced[np.ix_(written, warps)] = True
        run(m)

    return checked
