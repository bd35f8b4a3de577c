"""Integer and floating-point arithmetic, logic, comparison, selection, moves.

PTX ISA 9.x, 9.7.1 to 9.7.8. Rounding is to nearest even; approximate functions (ex2, lg2, rcp, sin,
…) are correctly rounded; .ftz is not modelled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import Machine, Program
from .memory import GLOBAL_BASE, LOCAL_BASE, SHARED_BASE, UINT, WINDOW
from .operands import (
    NUMPY,
    Run,
    allow,
    destination,
    elementwise,
    is_float,
    opcode,
    source,
    unknown,
)
from .parser import (
    TYPE_BITS,
    Instruction,
    Pair,
    Symbol,
)

ROUNDING = ("rn", "ftz", "approx", "full")


def divide_integers(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divides towards zero; a division by zero gives all ones."""
    quotient = np.where(b == 0, np.array(-1).astype(a.dtype), a // np.where(b == 0, 1, b))
    exact = quotient * b == a
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & ~exact & (b != 0)).astype(a.dtype)
    return quotient


def remainder_integers(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, a, a - divide_integers(a, b) * b)


def multiply_high(a: Any, b: Any) -> np.ndarray:
    """Returns the upper half of the product."""
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
    if len(i.types) > 1:  # mixed precision
        raise unknown(i)
    if i.base == "mul" and not is_float(type_):
        return multiply(program, i)
    if i.base in ("add", "sub") and "cc" in i.modifiers:
        return add_with_carry(program, i)
    allow(i, ROUNDING, "NaN", "sat", "uni", ["relu"] if i.base in ("min", "max") else [])
    function = (FLOAT if is_float(type_) else INTEGER)[i.base]
    if "NaN" in i.modifiers:
        function = NAN_KEEPING[i.base]
    if "sat" in i.modifiers:
        function = saturated(function, type_)
    count = ARITY.get(i.base, 1)
    if i.base in ("min", "max") and len(i.operands) == 4:  # three operands, on sm_100 and later
        of_two, count = function, 3
        function = lambda a, b, c: of_two(of_two(a, b), c)  # noqa: E731
    if "relu" in i.modifiers:
        limited = function
        function = lambda *v: np.maximum(limited(*v), 0)  # noqa: E731
    return elementwise(program, i, function, [type_] * count, type_)


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
    """Returns a * b + c with one rounding (the product of floats is exact in float64)."""
    if a.dtype == np.float64:
        return a * b + c
    wide = np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)
    return wide.astype(a.dtype)


@opcode("fma", "mad")
def multiply_add(program: Program, i: Instruction) -> Run:
    type_ = i.types[-1]
    if len(i.types) > 1:
        raise unknown(i)
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
    """add.cc, addc, sub.cc, subc, mad.cc, madc: each thread has one carry (or borrow)."""
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
    """Shifts the 64 bits b:a; .l gives the upper word, .r the lower."""
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
    *three, table_operand = i.operands
    table = int(table_operand.value)

    def function(a: Any, b: Any, c: Any) -> Any:
        result = np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                result = result | (
                    (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
                )
        return result

    without_table = dataclasses.replace(i, operands=three)
    return elementwise(program, without_table, function, ["b32"] * 3, "b32")


@opcode("prmt")
def permute_bytes(program: Program, i: Instruction) -> Run:
    """Each nibble of c picks a byte of b:a; its top bit replicates that byte's sign."""
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
    "ne": lambda a, b: (a < b) | (a > b),  # ordered, if floats
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
    if len(i.operands) != (4 if combine else 3):
        raise unknown(i)
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
    """Gives all ones (or 1.0 for a floating result) where the comparison holds, else 0."""
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
    """Converts between generic addresses and addresses within the window of one space."""
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
