"""What each opcode does: arithmetic, conversions, control flow, loads and stores, warp operations.

`decode` turns an instruction into a function that a machine calls. A type decides how the bits of a
register are read: integers and f32, f64, f16 as numpy has them, bf16 as float32, the packed types
as rows of two. Semantics: PTX ISA 9.x, chapter 9. Rounding is to nearest even except where stated;
approximate functions (ex2, lg2, rcp, sin, …) are correctly rounded; .ftz is not modelled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import STORAGE, Machine, Program
from .memory import GLOBAL_BASE, LOCAL_BASE, SHARED_BASE, SHARED_START, UINT, WINDOW
from .parser import (
    TYPE_BITS,
    Address,
    Immediate,
    Instruction,
    Pair,
    PTXError,
    Register,
    Symbol,
    Vector,
)

Run = Callable[[Machine], None]
Builder = Callable[[Program, Instruction], Run]

OPCODES: dict[str, Builder] = {}  # by the first word
CONTROL: dict[str, Builder] = {}  # those after which the scheduler chooses anew


def opcode(*names: str, table: dict[str, Builder] = OPCODES) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        table.update(dict.fromkeys(names, builder))
        return builder

    return register


def decode(program: Program, instruction: Instruction) -> tuple[Run, bool]:
    """The function that executes it, and whether the scheduler chooses anew afterwards."""
    from . import async_copy, matrix, sm90, wgmma  # noqa: F401  they register their opcodes

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
    """Every modifier has to be known: one that is not may change the meaning."""
    known = {m for group in groups for m in ([group] if isinstance(group, str) else group)}
    for modifier in instruction.modifiers:
        if modifier not in known and modifier not in TYPE_BITS:
            raise unknown(instruction)


def register_bits(type_: str) -> int:
    return TYPE_BITS[type_]


# Bits and values


def bf16_to_float(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def float_to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits, rounded to nearest even; NaN becomes 0x7fff."""
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
    halves = np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2)
    return halves.view(np.float16) if type_ == "f16x2" else bf16_to_float(halves)


def to_bits(values: np.ndarray, type_: str) -> np.ndarray:
    if type_ in NUMPY:
        values = np.ascontiguousarray(values, NUMPY[type_])
        return values if type_ == "pred" else values.view(UINT[values.itemsize])
    if type_ == "bf16":
        return float_to_bf16(values)
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
    """The value of an immediate as that type, one element."""
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
    """A function that gives the operand's values, one row a thread, or one for all."""
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
        parts = [
            source(program, item, f"b{bits // len(operand.items)}") for item in operand.items
        ]

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
    """A function that writes values of that type for the active threads."""
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
        return lambda m, values: m.write(index, to_bits(np.asarray(values).astype(wide), f"s{have}"))
    return lambda m, values: m.write(index, to_bits(values, type_))


def elementwise(
    program: Program, instruction: Instruction, function: Callable[..., Any], sources: list[str],
    result: str,
) -> Run:  # fmt: skip
    """d = function(a, b, …), the sources being of those types."""
    write = destination(program, instruction.operands[0], result)
    operands = instruction.operands[1 : 1 + len(sources)]
    if len(operands) < len(sources):
        raise unknown(instruction)
    read = [source(program, o, t) for o, t in zip(operands, sources, strict=True)]
    if len(read) == 1:
        (one,) = read
        return lambda m: write(m, function(one(m)))
    if len(read) == 2:
        a, b = read
        return lambda m: write(m, function(a(m), b(m)))
    return lambda m: write(m, function(*(r(m) for r in read)))


# Arithmetic and logic

ROUNDING = ("rn", "ftz", "approx", "full")


def is_float(type_: str) -> bool:
    return type_ in ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2")


def _min_max(function: Any, keeps_nan: Any) -> Callable[[Instruction], Callable[..., Any]]:
    def choose(instruction: Instruction) -> Callable[..., Any]:
        return keeps_nan if "NaN" in instruction.modifiers else function

    return choose


def divide_integers(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero; anything by zero gives all ones."""
    quotient = np.where(b == 0, np.array(-1).astype(a.dtype), a // np.where(b == 0, 1, b))
    exact = quotient * b == a
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & ~exact & (b != 0)).astype(a.dtype)
    return quotient


def remainder_integers(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, a, a - divide_integers(a, b) * b)


def multiply_high(a: Any, b: Any) -> np.ndarray:
    """The upper half of the product."""
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.itemsize < 8:
        bits = 8 * a.dtype.itemsize
        wide = np.dtype(f"{a.dtype.kind}8")
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(a.dtype)
    x, y, low, half = a.view(np.uint64), b.view(np.uint64), np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + ((x0 * y0) >> half)
    high = x1 * y1 + (middle >> half) + ((x0 * y1 + (middle & low)) >> half)
    if a.dtype.kind == "i":
        zero = np.uint64(0)
        high = high - np.where(a < 0, y, zero) - np.where(b < 0, x, zero)
    return high.view(a.dtype)


def shift_left(a: Any, b: Any) -> np.ndarray:
    bits = 8 * np.asarray(a).dtype.itemsize
    return np.where(b >= bits, 0, a << np.minimum(b, bits - 1).astype(a.dtype)).astype(a.dtype)


def shift_right(a: Any, b: Any) -> np.ndarray:
    bits = 8 * np.asarray(a).dtype.itemsize
    shifted = a >> np.minimum(b, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(b >= bits, 0, shifted).astype(a.dtype)


INTEGER: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "div": divide_integers,
    "rem": remainder_integers,
    "min": np.minimum,
    "max": np.maximum,
    "neg": lambda a: np.asarray(0, a.dtype) - a,
    "abs": np.abs,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "cnot": lambda a: (a == 0).astype(a.dtype),
}
FLOAT: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "min": np.fmin,
    "max": np.fmax,
    "neg": lambda a: -a,
    "abs": np.abs,
    "rcp": lambda a: (1.0 / np.asarray(a, np.float64)).astype(a.dtype),
    "sqrt": np.sqrt,
    "rsqrt": lambda a: (1.0 / np.sqrt(np.asarray(a, np.float64))).astype(a.dtype),
    "ex2": lambda a: np.exp2(np.asarray(a, np.float64)).astype(a.dtype),
    "lg2": lambda a: np.log2(np.asarray(a, np.float64)).astype(a.dtype),
    "sin": lambda a: np.sin(np.asarray(a, np.float64)).astype(a.dtype),
    "cos": lambda a: np.cos(np.asarray(a, np.float64)).astype(a.dtype),
    "tanh": lambda a: np.tanh(np.asarray(a, np.float64)).astype(a.dtype),
    "copysign": lambda a, b: np.copysign(b, a),
}
NAN_KEEPING = {"min": np.minimum, "max": np.maximum}
ARITY = {"add": 2, "sub": 2, "mul": 2, "div": 2, "rem": 2, "min": 2, "max": 2, "and": 2, "or": 2}
ARITY |= {"xor": 2, "copysign": 2}


@opcode(*INTEGER, *FLOAT)
def arithmetic(program: Program, i: Instruction) -> Run:
    type_ = i.types[-1]
    if i.base in ("sub", "add") and len(i.types) > 1:
        raise unknown(i)  # mixed precision
    if i.base == "mul" and not is_float(type_):
        return multiply(program, i)
    if i.base in ("add", "sub") and "cc" in i.modifiers:
        return add_with_carry(program, i)
    allow(i, ROUNDING, "NaN", "sat", "uni")
    function = (FLOAT if is_float(type_) else INTEGER)[i.base]
    if "NaN" in i.modifiers:
        function = NAN_KEEPING[i.base]
    if "sat" in i.modifiers:
        function = saturated(function, type_)
    return elementwise(program, i, function, [type_] * ARITY.get(i.base, 1), type_)


def saturated(function: Callable[..., Any], type_: str) -> Callable[..., Any]:
    if is_float(type_):  # to [0, 1], NaN to 0
        return lambda *v: np.nan_to_num(np.clip(function(*v), 0.0, 1.0), nan=0.0)
    limits = np.iinfo(NUMPY[type_])
    return lambda *v: np.clip(
        function(*(np.asarray(x).astype(np.int64) for x in v)), limits.min, limits.max
    ).astype(NUMPY[type_])


def multiply(program: Program, i: Instruction) -> Run:
    allow(i, "lo", "hi", "wide")
    type_ = i.types[-1]
    if "wide" in i.modifiers:
        wide = f"{type_[0]}{2 * TYPE_BITS[type_]}"
        return elementwise(program, i, _widen(wide, lambda a, b: a * b), [type_, type_], wide)
    function = multiply_high if "hi" in i.modifiers else lambda a, b: a * b
    return elementwise(program, i, function, [type_, type_], type_)


def _widen(wide: str, function: Callable[..., Any]) -> Callable[..., Any]:
    dtype = NUMPY[wide]
    return lambda a, b, *c: function(np.asarray(a).astype(dtype), np.asarray(b).astype(dtype), *c)


def fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding (in float64 the product of floats is exact)."""
    if a.dtype == np.float64:
        return a * b + c
    wide = np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)
    return wide.astype(a.dtype)


@opcode("fma", "mad")
def multiply_add(program: Program, i: Instruction) -> Run:
    type_ = i.types[-1]
    if is_float(type_):
        allow(i, ROUNDING, "relu", "sat")
        function = fused
        if "relu" in i.modifiers:
            function = lambda a, b, c: np.fmax(fused(a, b, c), 0)  # noqa: E731
        if "sat" in i.modifiers:
            function = saturated(function, type_)
        return elementwise(program, i, function, [type_] * 3, type_)
    if "cc" in i.modifiers:
        return add_with_carry(program, i)
    allow(i, "lo", "hi", "wide")
    if "wide" in i.modifiers:
        wide = f"{type_[0]}{2 * TYPE_BITS[type_]}"
        function = _widen(wide, lambda a, b, c: a * b + c)
        return elementwise(program, i, function, [type_, type_, wide], wide)
    if "hi" in i.modifiers:
        return elementwise(program, i, lambda a, b, c: multiply_high(a, b) + c, [type_] * 3, type_)
    return elementwise(program, i, lambda a, b, c: a * b + c, [type_] * 3, type_)


@opcode("addc", "subc", "madc")
def add_with_carry(program: Program, i: Instruction) -> Run:
    """add.cc, addc, sub.cc, subc, mad.cc, madc: through the carry (or borrow) of each thread."""
    allow(i, "cc", "lo", "hi")
    kind = f"u{TYPE_BITS[i.types[-1]]}"
    signed = i.types[-1] if i.base.startswith("mad") else kind
    write = destination(program, i.operands[0], kind)
    read = [source(program, operand, kind) for operand in i.operands[1:]]
    takes, gives = i.base.endswith("c"), "cc" in i.modifiers

    def run(m: Machine) -> None:
        values = [np.broadcast_to(r(m), m.everyone.shape) for r in read]
        if len(values) == 3:
            a, b = (v.view(NUMPY[signed]) for v in values[:2])
            product = multiply_high(a, b) if "hi" in i.modifiers else a * b
            values = [product.view(NUMPY[kind]), values[2]]
        a, b = values
        carry = m.carry.astype(a.dtype) if takes else a.dtype.type(0)
        if i.base.startswith("sub"):
            result = a - b - carry
            out = (a < b) | ((a == b) & (carry > 0))
        else:
            result = a + b + carry
            out = (result < a) | ((result == a) & (carry > 0) & (b > 0))
        write(m, result)
        if gives:
            m.carry = np.where(m.mask, out, m.carry)

    return run


@opcode("shl", "shr")
def shift(program: Program, i: Instruction) -> Run:
    function = shift_left if i.base == "shl" else shift_right
    return elementwise(program, i, function, [i.types[-1], "u32"], i.types[-1])


@opcode("shf")
def funnel_shift(program: Program, i: Instruction) -> Run:
    """Shift the 64 bits b:a; .l gives the upper word, .r the lower."""
    allow(i, "l", "r", "wrap", "clamp")
    left, wrap = "l" in i.modifiers, "wrap" in i.modifiers

    def function(a: Any, b: Any, c: Any) -> np.ndarray:
        n = (c & np.uint32(31) if wrap else np.minimum(c, np.uint32(32))).astype(np.uint64)
        both = (np.asarray(b).astype(np.uint64) << np.uint64(32)) | np.asarray(a).astype(np.uint64)
        if left:
            return ((both << n) >> np.uint64(32)).astype(np.uint32)
        return (both >> n).astype(np.uint32)

    return elementwise(program, i, function, ["b32"] * 3, "b32")


@opcode("bfe")
def bit_field_extract(program: Program, i: Instruction) -> Run:
    type_ = i.types[-1]
    bits = TYPE_BITS[type_]

    def function(a: Any, position: Any, length: Any) -> np.ndarray:
        position, length = position & np.uint32(255), length & np.uint32(255)
        a, position, length = np.broadcast_arrays(a, position, length)
        sign_at = np.minimum(position + length - np.uint32(1), np.uint32(bits - 1))
        field = shift_right(a.view(UINT[bits // 8]), position)
        kept = np.minimum(length, np.uint32(bits))
        mask = shift_left(np.ones_like(field), kept) - UINT[bits // 8](1)
        field = field & mask
        if type_[0] == "s":
            negative = (shift_right(a.view(UINT[bits // 8]), sign_at) & UINT[bits // 8](1)) > 0
            field = np.where(negative & (length > 0), field | ~mask, field)
        return field.view(NUMPY[type_])

    return elementwise(program, i, function, [type_, "u32", "u32"], type_)


@opcode("bfi")
def bit_field_insert(program: Program, i: Instruction) -> Run:
    type_ = i.types[-1]
    kind = UINT[TYPE_BITS[type_] // 8]

    def function(a: Any, b: Any, position: Any, length: Any) -> np.ndarray:
        position, length = position & np.uint32(255), length & np.uint32(255)
        a, b, position, length = np.broadcast_arrays(a, b, position, length)
        mask = shift_left(shift_left(np.ones_like(a), length) - kind(1), position)
        return (shift_left(a, position) & mask) | (b & ~mask)

    return elementwise(program, i, function, [type_, type_, "u32", "u32"], type_)


@opcode("bfind", "clz", "popc", "brev", "ffs")
def bit_count(program: Program, i: Instruction) -> Run:
    bits = TYPE_BITS[i.types[-1]]
    unsigned = f"u{bits}"

    def bits_of(a: Any) -> np.ndarray:
        shifts = np.arange(bits, dtype=UINT[bits // 8])
        return ((np.asarray(a)[..., None] >> shifts) & UINT[bits // 8](1)).astype(bool)

    def highest(a: Any) -> np.ndarray:
        found = bits_of(a)
        return np.where(found.any(-1), bits - 1 - found[..., ::-1].argmax(-1), -1)

    if i.base == "brev":
        weights = UINT[bits // 8](1) << np.arange(bits, dtype=UINT[bits // 8])[::-1]
        function = lambda a: (bits_of(a) * weights).sum(-1, dtype=UINT[bits // 8])  # noqa: E731
        return elementwise(program, i, function, [unsigned], unsigned)
    allow(i)
    function = {
        "popc": lambda a: bits_of(a).sum(-1).astype(np.uint32),
        "clz": lambda a: (bits - 1 - highest(a)).astype(np.uint32),
        "bfind": lambda a: highest(a).astype(np.int64).astype(np.uint32),
    }[i.base]
    if i.base == "bfind" and i.types[-1][0] == "s":
        raise unknown(i)
    return elementwise(program, i, function, [unsigned], "u32")


@opcode("lop3")
def three_input_logic(program: Program, i: Instruction) -> Run:
    table = int(i.operands[4].value)

    def function(a: Any, b: Any, c: Any) -> Any:
        result = np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                result = result | (
                    (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
                )
        return result

    return elementwise(program, i, function, ["b32"] * 3, "b32")


@opcode("prmt")
def permute_bytes(program: Program, i: Instruction) -> Run:
    """Each nibble of c picks one of the eight bytes b:a; its top bit replicates that byte's sign."""
    allow(i)

    def function(a: Any, b: Any, c: Any) -> np.ndarray:
        both = (np.asarray(b).astype(np.uint64) << np.uint64(32)) | np.asarray(a).astype(np.uint64)
        result = np.uint32(0)
        for n in range(4):
            selector = (np.asarray(c).astype(np.uint64) >> np.uint64(4 * n)) & np.uint64(15)
            byte = (both >> ((selector & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(selector & np.uint64(8), sign, byte).astype(np.uint32)
            result = result | (byte << np.uint32(8 * n))
        return result

    return elementwise(program, i, function, ["b32"] * 3, "b32")


@opcode("dp4a")
def dot_of_bytes(program: Program, i: Instruction) -> Run:
    kinds = [NUMPY[f"{t[0]}8"] for t in i.types[:2]]
    result = "s32" if "s32" in i.types[:2] else "u32"

    def function(a: Any, b: Any, c: Any) -> np.ndarray:
        x, y = (
            np.ascontiguousarray(v).view(k).reshape(-1, 4).astype(np.int64)
            for v, k in zip((a, b), kinds, strict=True)
        )
        return ((x * y).sum(1) + np.asarray(c).astype(np.int64)).astype(NUMPY[result])

    return elementwise(program, i, function, ["b32", "b32", result], result)


# Comparison and selection

COMPARE: dict[str, Callable[..., Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b),  # of floats: ordered
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "lo": lambda a, b: a < b,
    "ls": lambda a, b: a <= b,
    "hi": lambda a, b: a > b,
    "hs": lambda a, b: a >= b,
}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@opcode("setp")
def set_predicate(program: Program, i: Instruction) -> Run:
    allow(i, COMPARE, COMBINE, "ftz")
    type_ = i.types[-1]
    compare = COMPARE[i.modifiers[0]]
    combine = next((COMBINE[m] for m in i.modifiers[1:] if m in COMBINE), None)
    target = i.operands[0]
    pair = target if isinstance(target, Pair) else Pair(target, Symbol("_"))
    write, write_second = (destination(program, o, "pred") for o in (pair.first, pair.second))
    packed = type_.endswith("x2")
    a, b = (source(program, operand, type_) for operand in i.operands[1:3])
    c = source(program, i.operands[3], "pred") if combine else None

    def run(m: Machine) -> None:
        result = compare(a(m), b(m))
        if packed:
            write(m, result[:, 0])
            write_second(m, result[:, 1])
            return
        other = ~result
        if combine and c:
            result, other = combine(result, c(m)), combine(other, c(m))
        write(m, result)
        write_second(m, other)

    return run


@opcode("set")
def set_value(program: Program, i: Instruction) -> Run:
    """All ones (or 1.0 for a floating result) where the comparison holds."""
    allow(i, COMPARE, "ftz")
    result, type_ = i.types
    compare = COMPARE[i.modifiers[0]]
    true = 1.0 if is_float(result) else -1
    dtype = NUMPY.get(result, np.dtype("f4"))

    def function(a: Any, b: Any) -> np.ndarray:
        return np.where(compare(a, b), np.array(true).astype(dtype), dtype.type(0))

    return elementwise(program, i, function, [type_, type_], result)


@opcode("selp")
def select(program: Program, i: Instruction) -> Run:
    bits = f"b{TYPE_BITS[i.types[-1]]}"
    return elementwise(program, i, lambda a, b, p: np.where(p, a, b), [bits, bits, "pred"], bits)


@opcode("slct")
def select_by_sign(program: Program, i: Instruction) -> Run:
    bits = f"b{TYPE_BITS[i.types[0]]}"
    types = [bits, bits, i.types[-1]]
    return elementwise(program, i, lambda a, b, c: np.where(c >= 0, a, b), types, bits)


@opcode("mov")
def move(program: Program, i: Instruction) -> Run:
    type_ = i.types[-1]
    kind = type_ if type_ == "pred" else f"b{TYPE_BITS[type_]}"
    return elementwise(program, i, lambda a: a, [kind], kind)


@opcode("cvta")
def convert_address(program: Program, i: Instruction) -> Run:
    """Between the generic address space and a window of it."""
    allow(i, "to", "global", "shared", "local", "const", "param", "shared::cta")
    space = next(m for m in i.modifiers if m not in ("to", "u64", "u32"))
    bases = {"shared": SHARED_BASE, "shared::cta": SHARED_BASE, "local": LOCAL_BASE}
    base = bases.get(space, program.parameter_base if space == "param" else 0)
    offset = NUMPY[i.types[-1]].type(base)
    function = (lambda a: a - offset) if "to" in i.modifiers else (lambda a: a + offset)
    return elementwise(program, i, function, [i.types[-1]] * 1, i.types[-1])


@opcode("isspacep")
def is_in_space(program: Program, i: Instruction) -> Run:
    low = {"global": GLOBAL_BASE, "shared": SHARED_BASE, "local": LOCAL_BASE}[i.modifiers[0]]
    function = lambda a: (a >= np.uint64(low)) & (a < np.uint64(low + WINDOW))  # noqa: E731
    return elementwise(program, i, function, ["u64"], "pred")


# Conversion

E4M3, E5M2 = "e4m3", "e5m2"


def small_float_table(exponent_bits: int) -> np.ndarray:
    """Value of each of the 256 codes of e4m3 (no infinity) or e5m2."""
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    codes = np.arange(256)
    sign = np.where(codes >> 7, -1.0, 1.0)
    exponent, mantissa = (codes & 127) >> mantissa_bits, codes & (2**mantissa_bits - 1)
    normal = 2.0 ** (exponent - bias) * (1 + mantissa / 2**mantissa_bits)
    value = np.where(exponent > 0, normal, 2.0 ** (1 - bias) * mantissa / 2**mantissa_bits)
    if exponent_bits == 4:
        value = np.where((codes & 127) == 127, np.nan, value)
    else:
        value = np.where(exponent == 31, np.where(mantissa, np.nan, np.inf), value)
    return (sign * value).astype(np.float32)


SMALL_FLOATS = {E4M3: small_float_table(4), E5M2: small_float_table(5)}


def to_small_float(values: np.ndarray, name: str) -> np.ndarray:
    """The nearest code, ties to even, saturating at the largest finite."""
    table = SMALL_FLOATS[name]
    finite = np.flatnonzero(np.isfinite(table[:128]))
    magnitudes = table[finite].astype(np.float64)
    size = np.minimum(np.abs(np.asarray(values, np.float64)), magnitudes[-1])
    above = np.searchsorted(magnitudes, size).clip(1, len(magnitudes) - 1)
    below = above - 1
    to_below = size - magnitudes[below]
    to_above = magnitudes[above] - size
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    code = np.where(up, above, below) | (np.signbit(values).astype(np.int64) << 7)
    return np.where(np.isnan(values), 0x7F, code).astype(np.uint8)


INTEGER_ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def float_to_integer(values: Any, mode: str, type_: str) -> np.ndarray:
    """Saturating; NaN gives 0."""
    limits = np.iinfo(NUMPY[type_])
    rounded = INTEGER_ROUNDING[mode](np.asarray(values, np.float64))
    above, below = rounded >= float(limits.max), rounded <= float(limits.min)
    inside = np.where(above | below | np.isnan(rounded), 0, rounded).astype(NUMPY[type_])
    return np.where(above, limits.max, np.where(below, limits.min, inside)).astype(NUMPY[type_])


def narrow(values: Any, type_: str, mode: str) -> Any:
    """A float as `type_`, rounded to nearest even, or .rz towards zero, .rm down, .rp up."""
    wide = np.asarray(values)
    if type_ == "tf32":  # 10 bits of mantissa; .rna: ties away from zero
        bits = np.ascontiguousarray(wide, np.float32).view(np.uint32)
        half = {"rna": 0x1000, "rz": 0}.get(mode)
        more = np.uint32(half) if half is not None else np.uint32(0xFFF) + ((bits >> 13) & 1)
        return ((bits + more) & np.uint32(0xFFFFE000)).view(np.float32)
    rounded = bf16_to_float(float_to_bf16(wide)) if type_ == "bf16" else wide.astype(NUMPY[type_])
    if mode == "rn":
        return rounded
    exact, got = wide.astype(np.float64), rounded.astype(np.float64)
    too_far = {"rz": np.abs(got) > np.abs(exact), "rm": got > exact, "rp": got < exact}[mode]
    towards = {"rz": 0.0, "rm": -np.inf, "rp": np.inf}[mode]
    if type_ == "bf16":
        code = float_to_bf16(rounded)
        step = np.where((rounded > 0) == (towards <= 0), -1, 1) if towards else -1
        return bf16_to_float((code + np.where(too_far, step, 0)).astype(np.uint16))
    return np.where(too_far, np.nextafter(rounded, NUMPY[type_].type(towards)), rounded)


@opcode("cvt")
def convert(program: Program, i: Instruction) -> Run:
    small = {"e4m3x2": E4M3, "e5m2x2": E5M2}
    allow(i, INTEGER_ROUNDING, "rn", "rz", "rm", "rp", "rna", "ftz", "sat", "satfinite", "relu",
          small)  # fmt: skip
    kinds = [m for m in i.modifiers if m in TYPE_BITS or m in small]
    result, type_ = kinds
    mode = next((m for m in i.modifiers if m in ("rn", "rz", "rm", "rp", "rna")), "rn")
    relu = "relu" in i.modifiers
    if type_ in small:  # e4m3x2 -> f16x2

        def widen(a: Any) -> np.ndarray:
            codes = np.ascontiguousarray(np.broadcast_to(a, np.shape(a) or (1,))).view(np.uint8)
            return SMALL_FLOATS[small[type_]][codes.reshape(-1, 2)]

        return elementwise(program, i, widen, ["b16"], result)
    if result in small or result.endswith("x2"):
        packed = [type_] if type_.endswith("x2") else [type_, type_]

        def pack(high: Any, low: Any = None) -> np.ndarray:
            pair = high if low is None else np.stack(np.broadcast_arrays(low, high), -1)
            pair = np.fmax(pair, 0) if relu else pair
            if result in small:
                return to_small_float(pair, small[result]).view(np.uint16)[..., 0]
            return narrow(pair, result[:-2], mode)

        return elementwise(program, i, pack, packed, "b16" if result in small else result)
    to_integer = next((m for m in i.modifiers if m in INTEGER_ROUNDING), None)
    if is_float(type_) and not (is_float(result) or result == "tf32"):
        assert to_integer
        function = lambda a: float_to_integer(a, to_integer, result)  # noqa: E731
    elif is_float(type_) and to_integer:
        rounding = INTEGER_ROUNDING[to_integer]
        function = lambda a: rounding(a).astype(NUMPY[result])  # noqa: E731
    elif is_float(type_):

        def function(a: Any) -> Any:
            value = narrow(a, result, mode)
            value = np.fmax(value, 0) if relu else value
            return np.nan_to_num(np.clip(value, 0, 1), nan=0.0) if "sat" in i.modifiers else value

    elif is_float(result):
        if mode != "rn":
            function = lambda a: narrow(np.asarray(a, np.float64), result, mode)  # noqa: E731
        else:
            dtype = NUMPY.get(result, np.dtype("f4"))
            function = lambda a: np.asarray(a).astype(dtype)  # noqa: E731
    elif "sat" in i.modifiers:
        limits = np.iinfo(NUMPY[result])
        function = lambda a: np.clip(a, limits.min, limits.max).astype(NUMPY[result])  # noqa: E731
    else:
        function = lambda a: np.asarray(a).astype(NUMPY[result])  # noqa: E731
    return elementwise(program, i, function, [type_], result)


# Control flow


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


@opcode("nanosleep", "membar", "prefetch", "prefetchu", "griddepcontrol", "applypriority", "discard")
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
    """[warps, 32] bool from the member masks of the active threads (that of the lowest lane)."""
    masks = np.broadcast_to(masks, m.everyone.shape).reshape(-1, 32)
    lowest = m.mask.reshape(-1, 32).argmax(1)
    mask = masks[np.arange(len(masks)), lowest]
    return ((mask[:, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)).astype(bool)


def warp_barrier(program: Program, i: Instruction) -> Run:
    masks = source(program, i.operands[0], "u32")

    def run(m: Machine) -> None:
        m.require_whole_warps(member_lanes(m, masks(m)))
        m.new_epoch(np.flatnonzero(m.mask.reshape(-1, 32).any(1)))

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
    """The lowest of the lanes named leads; its number, and a predicate that is true for it."""
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
    """match.any.sync: which lanes hold the same value."""
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


# Loads and stores

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
    """A function that gives int64 addresses for some threads."""
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
    """(space, which threads, addresses within the window): resolves generic addresses."""
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
    """Which of the threads may go on, and the index of their bytes in the memory of that space."""
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
    """[count, threads] unsigned integers of `size` bytes; 0 where the access is wrong."""
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
    """`values`: [count, threads] unsigned integers."""
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
    """Which global bytes (index: [threads, n]) another block wrote, and which another warp wrote
    with no barrier between."""
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
    if space == "param":
        return load_parameter(program, i, targets, type_)
    where = address(program, i.operands[1])
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


def load_parameter(
    program: Program, i: Instruction, targets: tuple[Any, ...], type_: str
) -> Run:
    where, size = i.operands[1], access_bytes(i)
    if not isinstance(where.base, Symbol):
        raise unknown(i)
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
    """One thread after the other, in the order of their numbers."""
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
