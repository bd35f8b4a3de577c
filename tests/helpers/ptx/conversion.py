"""cvt: between integers, floats, packed halves and 8-bit floats (PTX ISA 9.x, 9.7.9.21)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .machine import Program
from .operands import (
    NUMPY,
    Run,
    allow,
    bf16_to_float,
    elementwise,
    float_to_bf16,
    is_float,
    opcode,
)
from .parser import (
    TYPE_BITS,
    Instruction,
)

E4M3, E5M2 = "e4m3", "e5m2"


def small_float_table(exponent_bits: int) -> np.ndarray:
    """Returns the values of the 256 codes of e4m3 (no infinity) or e5m2."""
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
    """Returns the nearest code, ties to even, saturating at the largest finite number."""
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
    """Rounds and saturates; NaN gives 0."""
    limits = np.iinfo(NUMPY[type_])
    rounded = INTEGER_ROUNDING[mode](np.asarray(values, np.float64))
    above, below = rounded >= float(limits.max), rounded <= float(limits.min)
    inside = np.where(above | below | np.isnan(rounded), 0, rounded).astype(NUMPY[type_])
    return np.where(above, limits.max, np.where(below, limits.min, inside)).astype(NUMPY[type_])


def narrow(values: Any, type_: str, mode: str) -> Any:
    """Rounds a float to `type_`: to nearest even, or .rz towards zero, .rm down, .rp up."""
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
