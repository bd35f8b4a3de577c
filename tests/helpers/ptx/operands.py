"""How an instruction reads its operands and writes its result, and the table of opcodes.

`decode` turns an instruction into a function that a machine calls. A type decides how the bits of a
register are read: integers and f32, f64, f16 as numpy has them, bf16 as float32, the packed types
as rows of two. The files that define opcodes register a builder for each first word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import STORAGE, Machine, Program
from .memory import UINT
from .parser import (
    TYPE_BITS,
    Immediate,
    Instruction,
    PTXError,
    Register,
    Symbol,
    Vector,
)

Run = Callable[[Machine], None]
Builder = Callable[[Program, Instruction], Run]

OPCODES: dict[str, Builder] = {}  # by the first word
CONTROL: dict[str, Builder] = {}  # opcodes after which the scheduler chooses again


def opcode(*names: str, table: dict[str, Builder] = OPCODES) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        table.update(dict.fromkeys(names, builder))
        return builder

    return register


def decode(program: Program, instruction: Instruction) -> tuple[Run, bool]:
    """Returns the function that executes it, and whether the scheduler chooses again after it."""
    base = instruction.base
    try:
        if base in CONTROL:
            return CONTROL[base](program, instruction), True
        if base in OPCODES:
            run = OPCODES[base](program, instruction)
            return run, getattr(run, "leaves", False)
    except (KeyError, IndexError, StopIteration) as error:
        raise unknown(instruction) from error
    raise unknown(instruction)


def unknown(instruction: Instruction) -> PTXError:
    return PTXError(f"line {instruction.line}: opcode {instruction.opcode} is not known")


def allow(instruction: Instruction, *groups: Any) -> None:
    """Raises PTXError for an unknown modifier, which may change the meaning."""
    known = {m for group in groups for m in ([group] if isinstance(group, str) else group)}
    for modifier in instruction.modifiers:
        if modifier not in known and modifier not in TYPE_BITS:
            raise unknown(instruction)


def register_bits(type_: str) -> int:
    return TYPE_BITS[type_]


def bf16_to_float(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def float_to_bf16(values: np.ndarray) -> np.ndarray:
    """Returns the bits, rounded to nearest even; NaN becomes 0x7fff."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


NUMPY = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "tf32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "pred": np.dtype(bool),
}


def to_values(bits: np.ndarray, type_: str) -> np.ndarray:
    if type_ in NUMPY:
        return bits.view(NUMPY[type_])
    if type_ == "bf16":
        return bf16_to_float(bits)
    if type_ == "f32x2":
        return np.ascontiguousarray(bits).view(np.float32).reshape(-1, 2)
    halves = np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2)
    return halves.view(np.float16) if type_ == "f16x2" else bf16_to_float(halves)


def to_bits(values: np.ndarray, type_: str) -> np.ndarray:
    if type_ in NUMPY:
        values = np.ascontiguousarray(values, NUMPY[type_])
        return values if type_ == "pred" else values.view(UINT[values.itemsize])
    if type_ == "bf16":
        return float_to_bf16(values)
    if type_ == "f32x2":
        return np.ascontiguousarray(values, np.float32).view(np.uint64)[..., 0]
    halves = (
        np.ascontiguousarray(values, np.float16).view(np.uint16)
        if type_ == "f16x2"
        else float_to_bf16(values)
    )
    return halves.view(np.uint32)[..., 0]


SPECIAL: dict[str, Callable[[Machine], Any]] = {
    "%laneid": lambda m: m.lane_of,
    "%warpid": lambda m: m.warp_of,
    "%smid": lambda m: m.block_of,
    "%nwarpid": lambda m: m.warps,
    "%lanemask_eq": lambda m: 1 << m.lane_of.astype(np.int64),
    "%lanemask_lt": lambda m: (1 << m.lane_of.astype(np.int64)) - 1,
    "%lanemask_le": lambda m: (2 << m.lane_of.astype(np.int64)) - 1,
    "%lanemask_gt": lambda m: (1 << 32) - (2 << m.lane_of.astype(np.int64)),
    "%lanemask_ge": lambda m: (1 << 32) - (1 << m.lane_of.astype(np.int64)),
    "%clock": lambda m: m.program.steps,
    "%clock64": lambda m: m.program.steps,
    "%globaltimer": lambda m: m.program.steps,
    "%dynamic_smem_size": lambda m: m.program.shared_size,
    "%cluster_ctarank": lambda m: 0,
    "%cluster_nctarank": lambda m: 1,
    "%is_explicit_cluster": lambda m: 0,
}
for _axis, _letter in enumerate("xyz"):

    def _tid(m: Machine, axis: int = _axis) -> Any:
        x, y, z = m.program.block
        return m.thread_of // (1, x, x * y)[axis] % (x, y, z)[axis]

    SPECIAL[f"%tid.{_letter}"] = _tid
    SPECIAL[f"%ntid.{_letter}"] = lambda m, axis=_axis: m.program.block[axis]
    SPECIAL[f"%ctaid.{_letter}"] = lambda m, axis=_axis: m.block_ids[m.block_of, axis]
    SPECIAL[f"%nctaid.{_letter}"] = lambda m, axis=_axis: m.program.grid[axis]
    # A cluster is one block here.
    SPECIAL[f"%clusterid.{_letter}"] = SPECIAL[f"%ctaid.{_letter}"]
    SPECIAL[f"%nclusterid.{_letter}"] = SPECIAL[f"%nctaid.{_letter}"]
    SPECIAL[f"%cluster_ctaid.{_letter}"] = lambda m: 0
    SPECIAL[f"%cluster_nctaid.{_letter}"] = lambda m: 1


def constant(operand: Immediate, type_: str) -> Any:
    """Returns the value of an immediate in that type, one element."""
    bits = TYPE_BITS[type_]
    if type_ == "pred":
        return np.bool_(operand.value)
    if operand.bits is not None:  # 0f… and 0d… give the bits of a float
        if type_ in ("f32", "f64") and operand.bits != bits:
            wide = np.array(operand.value, UINT[operand.bits // 8]).view(f"f{operand.bits // 8}")
            return wide.astype(NUMPY[type_])[()]
        pattern = np.array([operand.value], np.uint64).astype(UINT[bits // 8])
    elif type_ in ("f16", "f32", "f64") and isinstance(operand.value, float):
        return NUMPY[type_].type(operand.value)
    else:
        pattern = np.array([int(operand.value) % (1 << bits)], UINT[bits // 8])
    value = to_values(pattern, type_)
    return value[0]


def source(program: Program, operand: Any, type_: str) -> Callable[[Machine], Any]:
    """Returns a function that gives the operand's values: one per thread, or one for all."""
    bits = TYPE_BITS[type_]
    if isinstance(operand, Immediate):
        fixed = constant(operand, type_)
        return lambda m: fixed
    if isinstance(operand, Symbol):
        if operand.name in SPECIAL:
            read, kind = SPECIAL[operand.name], STORAGE[bits]
            return lambda m: np.asarray(read(m)).astype(kind).view(NUMPY[type_])
        if operand.name.startswith("%"):
            raise PTXError(f"special register {operand.name} is not known")
        fixed = np.array(program.address_of(operand) % (1 << bits), UINT[bits // 8])
        fixed = fixed.view(NUMPY[type_])
        return lambda m: fixed
    if isinstance(operand, Vector):  # pack: the first element lies lowest
        parts = [source(program, item, f"b{bits // len(operand.items)}") for item in operand.items]

        def pack(m: Machine) -> np.ndarray:
            columns = np.broadcast_arrays(*(part(m) for part in parts), m.everyone)[:-1]
            return to_values(np.stack(columns, 1).view(UINT[bits // 8])[:, 0], type_)

        return pack
    index, have = operand.index, program.register_bits[operand.index]
    if type_ == "pred":
        if operand.negated:
            return lambda m: ~m.registers[index]
        return lambda m: m.registers[index]
    if have > bits > 1:  # the low bits
        narrow = UINT[bits // 8]
        return lambda m: to_values(m.registers[index].astype(narrow), type_)
    if have < bits:
        raise PTXError(f"a register of {have} bits as .{type_}")
    if type_ in NUMPY:
        dtype = NUMPY[type_]
        return lambda m: m.registers[index].view(dtype)
    return lambda m: to_values(m.registers[index], type_)


def destination(program: Program, operand: Any, type_: str) -> Callable[[Machine, Any], None]:
    """Returns a function that writes values of that type for the active threads."""
    if isinstance(operand, Symbol) and operand.name == "_":
        return lambda m, values: None
    if isinstance(operand, Vector):  # unpack
        bits = TYPE_BITS[type_] // len(operand.items)
        parts = [destination(program, item, f"b{bits}") for item in operand.items]

        def unpack(m: Machine, values: Any) -> None:
            row = np.broadcast_to(to_bits(values, type_), m.everyone.shape)
            columns = np.ascontiguousarray(row).view(UINT[bits // 8]).reshape(-1, len(parts))
            for n, part in enumerate(parts):
                part(m, columns[:, n])

        return unpack
    if not isinstance(operand, Register):
        raise PTXError(f"{operand} cannot be written")
    index, have = operand.index, program.register_bits[operand.index]
    if have < TYPE_BITS[type_]:
        raise PTXError(f"a .{type_} does not fit into a register of {have} bits")
    if have > TYPE_BITS[type_] > 1:  # extend by the sign of a signed type, else by zeros
        wide = np.dtype(f"{'i' if type_[0] == 's' else 'u'}{have // 8}")
        if type_[0] != "s":
            return lambda m, values: m.write(index, to_bits(values, type_).astype(wide))
        return lambda m, values: m.write(
            index, to_bits(np.asarray(values).astype(wide), f"s{have}")
        )
    return lambda m, values: m.write(index, to_bits(values, type_))


def elementwise(
    program: Program, instruction: Instruction, function: Callable[..., Any], sources: list[str],
    result: str,
) -> Run:  # fmt: skip
    """Builds d = function(a, b, …); sources: the types of a, b, …"""
    write = destination(program, instruction.operands[0], result)
    operands = instruction.operands[1:]
    if len(operands) != len(sources):
        raise unknown(instruction)
    read = [source(program, o, t) for o, t in zip(operands, sources, strict=True)]
    if len(read) == 1:
        (one,) = read
        return lambda m: write(m, function(one(m)))
    if len(read) == 2:
        a, b = read
        return lambda m: write(m, function(a(m), b(m)))
    return lambda m: write(m, function(*(r(m) for r in read)))


def is_float(type_: str) -> bool:
    return type_ in ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2")
