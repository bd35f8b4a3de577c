"""Matrix instructions of a warp: mma.sync, ldmatrix, stmatrix; and how wgmma reads its operands.

Fragments (PTX ISA 9.x, 9.7.14): in lane l, with g = l // 4 and t = l % 4, and e elements in a
32-bit register,
- A (16 x K), register 2c + r, element i: row g + 8r, column (4c + t)e + i;
- B (K x 8), register c, element i: row (4c + t)e + i, column g;
- C and D (16 x 8) in float32, register 2r + i: row g + 8r, column 2t + i.
Products are exact, sums are made in float64 and cut off to the type of D, as tensor cores do (Fasi
et al. 2021, "Numerical behavior of NVIDIA tensor cores"). These also cut off the terms, in an order
of their own, so this is not bit-exact.
"""

from __future__ import annotations

import numpy as np

from .conversion import E4M3, E5M2, SMALL_FLOATS
from .load_store import address, by_space, place
from .machine import Machine, Program
from .operands import Run, allow, bf16_to_float, opcode, unknown
from .parser import Instruction, Vector

# Type -> elements in 32 bits
PER_WORD = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4, E4M3: 4, E5M2: 4}


def elements(words: np.ndarray, type_: str) -> np.ndarray:
    """Returns the float64 values of uint32 words, along one more axis."""
    words = np.ascontiguousarray(words)[..., None]
    if type_ == "tf32":  # the low 13 bits are ignored
        return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if type_ == "bf16":
        return bf16_to_float(words.view(np.uint16)).astype(np.float64)
    if type_ in SMALL_FLOATS:
        return SMALL_FLOATS[type_][words.view(np.uint8)].astype(np.float64)
    dtype = {"f16": np.float16, "s8": np.int8, "u8": np.uint8}[type_]
    return words.view(dtype).astype(np.float64)


def matrix_a(words: np.ndarray, type_: str) -> np.ndarray:
    """[registers, warps, 32] -> [warps, 16, K]"""
    values = elements(words, type_)
    registers, warps, _, e = values.shape
    c = registers // 2
    split = values.reshape(c, 2, warps, 8, 4, e)  # c, r, warp, g, t, i
    return split.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, c * 4 * e)


def matrix_b(words: np.ndarray, type_: str) -> np.ndarray:
    """[registers, warps, 32] -> [warps, K, 8]"""
    values = elements(words, type_)
    c, warps, _, e = values.shape
    split = values.reshape(c, warps, 8, 4, e)  # c, warp, g, t, i
    return split.transpose(1, 0, 3, 4, 2).reshape(warps, c * 4 * e, 8)


def matrix_c(words: np.ndarray, type_: str) -> np.ndarray:
    """[registers, warps, 32] -> [warps, 16, N]; four (f16: two) registers for 8 columns"""
    if type_ == "f16":
        values = elements(words, "f16")  # register 2n + r, element i
        blocks = len(words) // 2
        split = values.reshape(blocks, 2, -1, 8, 4, 2)  # n, r, warp, g, t, i
        return split.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 8 * blocks)
    values = words.view(np.int32 if type_ == "s32" else np.float32).astype(np.float64)
    blocks = len(words) // 4
    split = values.reshape(blocks, 2, 2, -1, 8, 4)  # n, r, i, warp, g, t
    return split.transpose(3, 1, 4, 0, 5, 2).reshape(-1, 16, 8 * blocks)


def toward_zero(x: np.ndarray) -> np.ndarray:
    """Rounds float64 to float32 toward zero."""
    y = x.astype(np.float32)
    return np.where((np.abs(y) > np.abs(x)) & np.isfinite(y), np.nextafter(y, np.float32(0)), y)


def words_of_d(matrix: np.ndarray, type_: str) -> np.ndarray:
    """The inverse of `matrix_c`."""
    warps, _, columns = matrix.shape
    split = matrix.reshape(warps, 2, 8, columns // 8, 4, 2)  # warp, r, g, n, t, i
    if type_ == "f16":
        halves = np.ascontiguousarray(split.transpose(3, 1, 0, 2, 4, 5), np.float16)
        return halves.view(np.uint32).reshape(-1, warps, 32)
    values = split.transpose(3, 1, 5, 0, 2, 4)
    values = values.astype(np.int32) if type_ == "s32" else toward_zero(values)
    words = np.ascontiguousarray(values).view(np.uint32)
    return words.reshape(-1, warps, 32)


def register_indices(i: Instruction, operand: object) -> list[int]:
    if not isinstance(operand, Vector):
        raise unknown(i)
    return [item.index for item in operand.items]


@opcode("mma")
def multiply_accumulate(program: Program, i: Instruction) -> Run:
    """mma.sync.aligned.m16n8kK.row.col.dtype.atype.btype.ctype"""
    allow(i, "sync", "aligned", "row", "col", PER_WORD, i.modifiers[2], "satfinite")
    shape, (type_d, type_a, type_b, type_c) = i.modifiers[2], i.modifiers[-4:]
    depth = int(shape.split("k")[1])
    d, a, b, c = (register_indices(i, operand) for operand in i.operands[:4])
    e = PER_WORD[type_a]
    fits = (
        shape.startswith("m16n8k")
        and (i.modifiers[3:5] == ("row", "col"))
        and len(a) * 2 * e == depth
        and len(b) * 4 * e == depth
        and (len(c), type_c) == (len(d), type_d)
        and type_d in ("f32", "f16", "s32")
    )
    if not fits:
        raise unknown(i)

    def run(m: Machine) -> None:
        m.require_whole_warps()
        warps = np.flatnonzero(m.mask.reshape(-1, 32).any(1))
        x, y, z = (
            np.stack([m.registers[n] for n in ns]).reshape(len(ns), -1, 32)[:, warps]
            for ns in (a, b, c)
        )
        product = np.matmul(matrix_a(x, type_a), matrix_b(y, type_b)) + matrix_c(z, type_c)
        result = words_of_d(product, type_d)
        everyone = len(warps) * 32 == len(m.everyone)
        for n, words in zip(d, result, strict=True):
            if everyone:
                m.write(n, words.reshape(-1))
            else:
                new = np.zeros((len(m.everyone) // 32, 32), np.uint32)
                new[warps] = words
                m.write(n, new.reshape(-1))

    return run


@opcode("ldmatrix", "stmatrix")
def move_matrices(program: Program, i: Instruction) -> Run:
    """Lane 8j + r gives the address of row r of matrix j (8 x 8 elements of 16 bits).

    Register j of lane l holds row l // 4, columns 2(l % 4) and the next; with .trans the transpose.
    """
    allow(i, "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta")
    loads, transposed = i.base == "ldmatrix", "trans" in i.modifiers
    count = next(int(m[1]) for m in i.modifiers if m in ("x1", "x2", "x4"))
    vector, where = i.operands if loads else reversed(i.operands)
    registers = register_indices(i, vector)
    if len(registers) != count or "b16" not in i.modifiers:
        raise unknown(i)
    at = address(program, where)
    generic = "generic" if not {"shared", "shared::cta"} & set(i.modifiers) else "shared"

    def run(m: Machine) -> None:
        m.require_whole_warps()
        warps = np.flatnonzero(m.mask.reshape(-1, 32).any(1))
        threads = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
        _, chosen, offset = by_space(m, generic, threads, at(m, threads))[0]
        good, flat = place(m, "shared", threads[chosen], offset, 16, not loads)
        if loads:
            m.shared.read(threads[good], flat, 16)
            rows = np.zeros((len(threads), 8), np.uint16)
            rows[good] = m.shared.views[2][flat[:, None] // 2 + np.arange(8)]
            tiles = rows.reshape(len(warps), count, 8, 8)
            tiles = tiles.swapaxes(2, 3) if transposed else tiles
            words = np.ascontiguousarray(tiles).view(np.uint32).reshape(len(warps), count, 32)
            for j, n in enumerate(registers):
                new = np.zeros((len(m.everyone) // 32, 32), np.uint32)
                new[warps] = words[:, j]
                m.write(n, new.reshape(-1))
        else:
            words = np.stack([m.registers[n].reshape(-1, 32)[warps] for n in registers], 1)
            tiles = np.ascontiguousarray(words).view(np.uint16).reshape(len(warps), count, 8, 8)
            tiles = tiles.swapaxes(2, 3) if transposed else tiles
            m.shared.write(threads[good], flat, 16)
            m.shared.views[2][flat[:, None] // 2 + np.arange(8)] = tiles.reshape(-1, 8)[good]

    return run
