"""Compares each opcode, in hand-written PTX, with a truth computed another way.

Integers are compared with Python's unbounded ones, bf16 and fp8 with torch, matrix fragments and
layouts element by element with the formulas of the PTX ISA.
"""

import math

import numpy as np
import pytest
import torch

from ptx import PTXError, TensorMap, launch

BITS = {"b8": 8, "b16": 16, "b32": 32, "b64": 64}
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
RNG = np.random.default_rng(0)


def kernel(body, parameters, registers="", target="sm_90a", shared=""):
    """Returns PTX text: `parameters` pointers are %p0, %p1, …; %t is the thread number."""
    declared = ", ".join(f".param .u64 k_{n}" for n in range(parameters))
    loads = "\n".join(f"ld.param.u64 %p{n}, [k_{n}];" for n in range(parameters))
    return f"""
.version 8.7
.target {target}
.address_size 64
.extern .shared .align 1024 .b8 dynamic[];
.visible .entry k({declared})
{{
{shared}
.reg .b64 %p<{parameters}>; .reg .b64 %at; .reg .b64 %wide; .reg .b32 %t; .reg .b32 %lane;
{registers}
{loads}
mov.u32 %t, %tid.x;
mov.u32 %lane, %laneid;
{body}
ret;
}}
"""


def evaluate(instruction, result, *inputs, registers=""):
    """Runs `instruction` (on %d and %a, %b, … or %q for a predicate) for each row of the inputs."""
    rows = len(inputs[0])
    bits = {np.dtype(t).itemsize * 8: f"b{np.dtype(t).itemsize * 8}" for t in UNSIGNED.values()}
    result = np.dtype(result)
    out = np.zeros(rows, UNSIGNED[result.itemsize * 8])
    text, declared = "", f".reg .{bits[out.itemsize * 8]} %d; .reg .pred %q;{registers}"
    arrays = [np.ascontiguousarray(a).view(UNSIGNED[a.itemsize * 8]) for a in inputs]
    for n, array in enumerate(arrays, 1):
        kind, name = bits[array.itemsize * 8], "%" + "abcdef"[n - 1]
        declared += f".reg .{kind} {name};"
        text += f"mad.wide.u32 %at, %t, {array.itemsize}, %p{n}; ld.global.{kind} {name}, [%at];\n"
    text += instruction
    text += f"\nmad.wide.u32 %at, %t, {out.itemsize}, %p0; st.global.b{out.itemsize * 8} [%at], %d;"
    report = launch(kernel(text, 1 + len(arrays), declared), "k", (1,), rows, [out, *arrays])
    assert not report.findings, report.findings
    return out.view(result)


def random_integers(dtype, rows=64):
    info = np.iinfo(dtype)
    edges = [0, 1, info.max, info.min, info.max - 1, info.max // 2, 2, 3]
    values = [int.from_bytes(RNG.bytes(info.bits // 8), "little", signed=info.min < 0)
              for _ in range(rows - len(edges))]  # fmt: skip
    return RNG.permutation(np.array(edges + values, dtype))


def random_floats(dtype, rows=64, scale=4.0):
    return (RNG.standard_normal(rows) * scale).astype(dtype)


def wrap(value, dtype):
    bits = np.dtype(dtype).itemsize * 8
    value %= 1 << bits
    return value - (1 << bits) if np.dtype(dtype).kind == "i" and value >> (bits - 1) else value


def trunc_div(a, b):
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def field(a, position, length, bits, signed):
    position, length = position & 255, length & 255
    kept = (a % (1 << bits)) >> position if position < bits else 0
    kept &= (1 << min(length, bits)) - 1
    sign_bit = min(position + length - 1, bits - 1)
    if signed and length and (a % (1 << bits)) >> sign_bit & 1:
        kept |= ~((1 << min(length, bits)) - 1)
    return kept


def insert(a, b, position, length, bits):
    position, length = position & 255, length & 255
    mask = ((1 << min(length, bits)) - 1) << position
    return (((a << position) & mask) | (b & ~mask)) % (1 << bits)


def prmt(a, b, c):
    data = [(a >> 8 * n) & 255 for n in range(4)] + [(b >> 8 * n) & 255 for n in range(4)]
    chosen = [(c >> 4 * n) & 15 for n in range(4)]
    out = [(255 if data[s & 7] & 128 else 0) if s & 8 else data[s & 7] for s in chosen]
    return sum(byte << 8 * n for n, byte in enumerate(out))


I16, I32, I64, U16, U32, U64 = np.int16, np.int32, np.int64, np.uint16, np.uint32, np.uint64
INTEGER_TYPES = {"s16": I16, "u16": U16, "s32": I32, "u32": U32, "s64": I64, "u64": U64}
# instruction, type of the result, types of the inputs, truth on Python integers
INTEGER_CASES = [
    *[
        (f"{op}.{kind} %d, %a, %b;", t, (t, t), f)
        for kind, t in INTEGER_TYPES.items()
        for op, f in {
            "add": lambda a, b: a + b,
            "sub": lambda a, b: a - b,
            "mul.lo": lambda a, b: a * b,
            "min": min,
            "max": max,
        }.items()
    ],
    *[
        (f"mul.hi.{kind} %d, %a, %b;", t, (t, t), lambda a, b, n=bits: (a * b) >> n)
        for kind, t in INTEGER_TYPES.items()
        for bits in (8 * np.dtype(t).itemsize,)
    ],
    *[
        (f"{op}.{kind} %d, %a, %b;", t, (t, t), f)
        for kind, t in INTEGER_TYPES.items()
        for op, f in {
            "div": lambda a, b: trunc_div(a, b) if b else -1,
            "rem": lambda a, b: a - trunc_div(a, b) * b if b else a,
        }.items()
    ],
    ("mul.wide.s32 %d, %a, %b;", I64, (I32, I32), lambda a, b: a * b),
    ("mul.wide.u32 %d, %a, %b;", U64, (U32, U32), lambda a, b: a * b),
    ("mul.wide.u16 %d, %a, %b;", U32, (U16, U16), lambda a, b: a * b),
    ("mad.lo.s32 %d, %a, %b, %c;", I32, (I32, I32, I32), lambda a, b, c: a * b + c),
    ("mad.lo.s64 %d, %a, %b, %c;", I64, (I64, I64, I64), lambda a, b, c: a * b + c),
    ("mad.wide.s32 %d, %a, %b, %c;", I64, (I32, I32, I64), lambda a, b, c: a * b + c),
    ("mad.wide.u32 %d, %a, %b, %c;", U64, (U32, U32, U64), lambda a, b, c: a * b + c),
    ("mad.hi.u32 %d, %a, %b, %c;", U32, (U32, U32, U32), lambda a, b, c: ((a * b) >> 32) + c),
    ("neg.s32 %d, %a;", I32, (I32,), lambda a: -a),
    ("abs.s32 %d, %a;", I32, (I32,), abs),
    ("not.b32 %d, %a;", U32, (U32,), lambda a: ~a),
    ("cnot.b32 %d, %a;", U32, (U32,), lambda a: int(a == 0)),
    ("and.b32 %d, %a, %b;", U32, (U32, U32), lambda a, b: a & b),
    ("or.b64 %d, %a, %b;", U64, (U64, U64), lambda a, b: a | b),
    ("xor.b16 %d, %a, %b;", U16, (U16, U16), lambda a, b: a ^ b),
    ("lop3.b32 %d, %a, %b, %c, 0x96;", U32, (U32, U32, U32), lambda a, b, c: a ^ b ^ c),
    ("lop3.b32 %d, %a, %b, %c, 0xE8;", U32, (U32,) * 3, lambda a, b, c: a & b | a & c | b & c),
    ("and.b32 %b, %b, 63; shl.b32 %d, %a, %b;", U32, (U32, U32), lambda a, b: a << (b & 63)),
    ("and.b32 %b, %b, 63; shr.u32 %d, %a, %b;", U32, (U32, U32), lambda a, b: a >> (b & 63)),
    ("and.b32 %b, %b, 63; shr.s32 %d, %a, %b;", I32, (I32, U32), lambda a, b: a >> (b & 63)),
    ("and.b32 %b, %b, 127; shl.b64 %d, %a, %b;", U64, (U64, U32), lambda a, b: a << (b & 127)),
    ("and.b32 %b, %b, 127; shr.s64 %d, %a, %b;", I64, (I64, U32), lambda a, b: a >> (b & 127)),
    ("shr.u16 %d, %a, 3;", U16, (U16,), lambda a: a >> 3),
    ("shf.l.wrap.b32 %d, %a, %b, %c;", U32, (U32,) * 3,
     lambda a, b, c: (((b << 32 | a) << (c & 31)) >> 32)),
    ("shf.r.wrap.b32 %d, %a, %b, %c;", U32, (U32,) * 3, lambda a, b, c: (b << 32 | a) >> (c & 31)),
    ("shf.r.clamp.b32 %d, %a, %b, %c;", U32, (U32,) * 3,
     lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    ("bfe.u32 %d, %a, %b, %c;", U32, (U32,) * 3, lambda a, b, c: field(a, b, c, 32, False)),
    ("bfe.s32 %d, %a, %b, %c;", I32, (I32, U32, U32), lambda a, b, c: field(a, b, c, 32, True)),
    ("bfe.u32 %d, %a, 3, 4;", U32, (U32,), lambda a: (a >> 3) & 15),
    ("bfe.s32 %d, %a, 30, 2;", I32, (I32,), lambda a: a >> 30),
    ("bfe.u64 %d, %a, %b, %c;", U64, (U64, U32, U32), lambda a, b, c: field(a, b, c, 64, False)),
    ("and.b32 %c, %c, 31; bfi.b32 %d, %a, %b, %c, 5;", U32, (U32,) * 3,
     lambda a, b, c: insert(a, b, c & 31, 5, 32)),
    ("popc.b32 %d, %a;", U32, (U32,), lambda a: a.bit_count()),
    ("popc.b64 %d, %a;", U32, (U64,), lambda a: a.bit_count()),
    ("clz.b32 %d, %a;", U32, (U32,), lambda a: 32 - a.bit_length()),
    ("clz.b64 %d, %a;", U32, (U64,), lambda a: 64 - a.bit_length()),
    ("bfind.u32 %d, %a;", U32, (U32,), lambda a: a.bit_length() - 1),
    ("brev.b32 %d, %a;", U32, (U32,), lambda a: int(f"{a:032b}"[::-1], 2)),
    ("prmt.b32 %d, %a, %b, %c;", U32, (U32,) * 3, prmt),
    ("prmt.b32 %d, %a, %b, 0x5410;", U32, (U32, U32),
     lambda a, b: (a & 0xFFFF) | (b & 0xFFFF) << 16),
    ("dp4a.s32.s32 %d, %a, %b, %c;", I32, (U32, U32, I32),
     lambda a, b, c: c + sum(
         wrap(a >> 8 * n, np.int8) * wrap(b >> 8 * n, np.int8) for n in range(4))),
    ("cvt.s64.s32 %d, %a;", I64, (I32,), lambda a: a),
    ("cvt.u64.u32 %d, %a;", U64, (U32,), lambda a: a),
    ("cvt.u32.u64 %d, %a;", U32, (U64,), lambda a: a),
    ("cvt.s32.s16 %d, %a;", I32, (I16,), lambda a: a),
    ("cvt.u32.u16 %d, %a;", U32, (U16,), lambda a: a),
    ("cvt.s32.s8 %d, %a;", I32, (I32,), lambda a: wrap(a, np.int8)),
    ("cvt.sat.s16.s32 %d, %a;", I16, (I32,), lambda a: max(-32768, min(32767, a))),
    ("add.sat.s32 %d, %a, %b;", I32, (I32, I32), lambda a, b: max(-(2**31), min(2**31 - 1, a + b))),
    ("min.relu.s32 %d, %a, %b;", I32, (I32, I32), lambda a, b: max(0, min(a, b))),
    ("setp.lt.s32 %q, %a, %b; selp.b32 %d, %a, %b, %q;", I32, (I32, I32), min),
    ("setp.ge.u64 %q, %a, %b; selp.b64 %d, %a, %b, %q;", U64, (U64, U64), max),
    ("setp.hi.u32 %q, %a, %b; @%q mov.b32 %d, 7; @!%q mov.b32 %d, 9;", U32, (U32, U32),
     lambda a, b: 7 if a > b else 9),
    ("setp.eq.s32 %q, %a, 1; setp.gt.and.s32 %q|%r, %b, 0, %q; selp.b32 %d, 1, 0, %r;", U32,
     (I32, I32), lambda a, b: int(not b > 0 and a == 1)),
    ("slct.b32.s32 %d, %a, %b, %c;", U32, (U32, U32, I32), lambda a, b, c: a if c >= 0 else b),
    ("set.lt.u32.s32 %d, %a, %b;", U32, (I32, I32), lambda a, b: 0xFFFFFFFF if a < b else 0),
    ("mov.b64 %d, {%a, %b};", U64, (U32, U32), lambda a, b: a | b << 32),
    ("mov.b32 %d, {%a, %b};", U32, (U16, U16), lambda a, b: a | b << 16),
    ("mov.b64 {%x, %d}, %a;", U32, (U64,), lambda a: a >> 32),
    ("add.cc.u32 %x, %a, %c; addc.u32 %d, %b, %e;", U32, (U32,) * 5,
     lambda a, b, c, d, e: b + e + ((a + c) >> 32)),
    ("sub.cc.u32 %x, %a, %c; subc.u32 %d, %b, %e;", U32, (U32,) * 5,
     lambda a, b, c, d, e: b - e - (a < c)),
    ("mad.lo.cc.u32 %x, %a, %b, %c; madc.hi.u32 %d, %a, %b, %e;", U32, (U32,) * 5,
     lambda a, b, c, d, e: ((a * b + c + (e << 32)) >> 32)),
]  # fmt: skip


@pytest.mark.parametrize("case", INTEGER_CASES, ids=lambda c: c[0].replace(" ", "_"))
def test_integer(case):
    instruction, result, types, truth = case
    inputs = [random_integers(t) for t in types]
    if "shf.r.clamp" in instruction or "bfe" in instruction:
        inputs[1:] = [RNG.integers(0, 64, 64).astype(t) for t in types[1:]]
        if "shf" in instruction:
            inputs[1] = random_integers(U32)
    got = evaluate(instruction, result, *inputs, registers=".reg .b32 %x; .reg .pred %r;")
    expected = [
        wrap(int(truth(*row)), result) for row in zip(*(a.tolist() for a in inputs), strict=True)
    ]
    assert got.tolist() == expected


def float32(f):
    return lambda *v: np.array([np.float32(f(*map(float, row))) for row in zip(*v, strict=True)])


F16, F32, F64 = np.float16, np.float32, np.float64
# instruction, result, inputs, truth on numpy rows, largest error in units of the last place
FLOAT_CASES = [
    ("add.f32 %d, %a, %b;", F32, (F32, F32), lambda a, b: a + b, 0),
    ("sub.rn.ftz.f32 %d, %a, %b;", F32, (F32, F32), lambda a, b: a - b, 0),
    ("mul.f32 %d, %a, %b;", F32, (F32, F32), lambda a, b: a * b, 0),
    ("mul.f64 %d, %a, %b;", F64, (F64, F64), lambda a, b: a * b, 0),
    ("fma.rn.f32 %d, %a, %b, %c;", F32, (F32,) * 3, float32(lambda a, b, c: a * b + c), 0),
    ("fma.rn.f64 %d, %a, %b, %c;", F64, (F64,) * 3, lambda a, b, c: a * b + c, 1),
    ("mul.f16 %d, %a, %b;", F16, (F16, F16), lambda a, b: a * b, 0),
    ("div.full.f32 %d, %a, %b;", F32, (F32, F32), lambda a, b: a / b, 0),
    ("div.rn.f32 %d, %a, %b;", F32, (F32, F32), lambda a, b: a / b, 0),
    ("rcp.approx.ftz.f32 %d, %a;", F32, (F32,), float32(lambda a: 1 / a), 1),
    ("abs.f32 %d, %a; sqrt.approx.ftz.f32 %d, %d;", F32, (F32,), lambda a: np.sqrt(np.abs(a)), 1),
    ("abs.f32 %d, %a; rsqrt.approx.f32 %d, %d;", F32, (F32,), float32(lambda a: abs(a) ** -0.5), 1),
    ("ex2.approx.ftz.f32 %d, %a;", F32, (F32,), float32(lambda a: 2.0**a), 1),
    ("abs.f32 %d, %a; lg2.approx.f32 %d, %d;", F32, (F32,),
     float32(lambda a: math.log2(abs(a))), 1),
    ("sin.approx.f32 %d, %a;", F32, (F32,), float32(math.sin), 1),
    ("cos.approx.f32 %d, %a;", F32, (F32,), float32(math.cos), 1),
    ("tanh.approx.f32 %d, %a;", F32, (F32,), float32(math.tanh), 1),
    ("neg.f32 %d, %a;", F32, (F32,), lambda a: -a, 0),
    ("abs.f64 %d, %a;", F64, (F64,), np.abs, 0),
    ("max.f32 %d, %a, %b;", F32, (F32, F32), np.maximum, 0),
    ("max.f32 %d, %a, %b, %c;", F32, (F32,) * 3, lambda *v: np.max(v, 0), 0),
    ("min.f32 %d, %a, %b;", F32, (F32, F32), np.minimum, 0),
    ("copysign.f32 %d, %a, %b;", F32, (F32, F32), lambda a, b: np.copysign(b, a), 0),
    ("add.sat.f32 %d, %a, %b;", F32, (F32, F32), lambda a, b: np.clip(a + b, 0, 1), 0),
    ("cvt.f32.f16 %d, %a;", F32, (F16,), lambda a: a.astype(F32), 0),
    ("cvt.rn.f16.f32 %d, %a;", F16, (F32,), lambda a: a.astype(F16), 0),
    ("cvt.f64.f32 %d, %a;", F64, (F32,), lambda a: a.astype(F64), 0),
    ("cvt.rn.f32.f64 %d, %a;", F32, (F64,), lambda a: a.astype(F32), 0),
    ("cvt.rn.f32.s32 %d, %a;", F32, (I32,), lambda a: a.astype(F32), 0),
    ("cvt.rn.f32.u64 %d, %a;", F32, (U64,), lambda a: a.astype(F32), 0),
    ("cvt.rn.f64.s64 %d, %a;", F64, (I64,), lambda a: a.astype(F64), 0),
    ("cvt.rzi.s32.f32 %d, %a;", I32, (F32,), lambda a: np.trunc(a).astype(I32), 0),
    ("cvt.rni.s32.f32 %d, %a;", I32, (F32,), lambda a: np.rint(a).astype(I32), 0),
    ("cvt.rmi.f32.f32 %d, %a;", F32, (F32,), np.floor, 0),
    ("cvt.rpi.ftz.f32.f32 %d, %a;", F32, (F32,), np.ceil, 0),
    ("setp.ltu.f32 %q, %a, %b; selp.f32 %d, %a, %b, %q;", F32, (F32, F32), np.minimum, 0),
]  # fmt: skip


@pytest.mark.parametrize("case", FLOAT_CASES, ids=lambda c: c[0].replace(" ", "_"))
def test_float(case):
    instruction, result, types, truth, ulp = case
    inputs = [random_floats(t) if np.dtype(t).kind == "f" else random_integers(t) for t in types]
    got = evaluate(instruction, result, *inputs)
    expected = truth(*inputs)
    if ulp:
        np.testing.assert_array_max_ulp(got, expected.astype(result), ulp)
    else:
        np.testing.assert_array_equal(got, expected)


SPECIALS = np.array([0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, np.nan, 3e38], F32)
COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b and a == a and b == b,
    "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: a == b or a != a or b != b,
    "neu": lambda a, b: a != b,
    "leu": lambda a, b: a <= b or a != a or b != b,
    "gtu": lambda a, b: a > b or a != a or b != b,
    "num": lambda a, b: a == a and b == b,
    "nan": lambda a, b: a != a or b != b,
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparison_with_nan_and_infinity(name):
    a, b = (x.reshape(-1) for x in np.meshgrid(SPECIALS, SPECIALS))
    got = evaluate(f"setp.{name}.f32 %q, %a, %b; selp.b32 %d, 1, 0, %q;", U32, a, b)
    expected = [int(COMPARISONS[name](*row)) for row in zip(a.tolist(), b.tolist(), strict=True)]
    assert got.tolist() == expected


def test_max_drops_nan_unless_told_otherwise():
    a, b = (x.reshape(-1) for x in np.meshgrid(SPECIALS, SPECIALS))
    dropped = evaluate("max.f32 %d, %a, %b;", F32, a, b)
    kept = evaluate("max.NaN.f32 %d, %a, %b;", F32, a, b)
    one_nan = np.isnan(a) ^ np.isnan(b)
    assert not np.isnan(dropped[one_nan]).any() and np.isnan(kept[one_nan]).all()


def test_float_to_integer_saturates():
    values = np.array([1e20, -1e20, np.nan, np.inf, -np.inf, 2.5, -2.5, 3.5], F32)
    big, small = 2**31 - 1, -(2**31)
    assert evaluate("cvt.rni.s32.f32 %d, %a;", I32, values).tolist() == [
        big, small, 0, big, small, 2, -2, 4
    ]  # fmt: skip
    assert evaluate("cvt.rzi.u32.f32 %d, %a;", U32, values).tolist() == [
        2**32 - 1, 0, 0, 2**32 - 1, 0, 2, 0, 3
    ]  # fmt: skip


def bf16_bits(values):
    return (
        torch.from_numpy(np.ascontiguousarray(values))
        .bfloat16()
        .view(torch.int16)
        .numpy()
        .view(U16)
    )


def from_bf16(bits):
    return torch.from_numpy(bits.view(I16).copy()).view(torch.bfloat16)


def test_bf16():
    x, y, z = (random_floats(F32) for _ in range(3))
    x[:4] = [1.00390625, 1.01171875, 3.3e38, -1e-40]  # ties to even, nearly infinite, subnormal
    assert evaluate("cvt.rn.bf16.f32 %d, %a;", U16, x).tolist() == bf16_bits(x).tolist()
    a, b, c = (bf16_bits(v) for v in (x[4:], y[4:], z[4:]))
    wide = evaluate("cvt.f32.bf16 %d, %a;", F32, a)
    np.testing.assert_array_equal(wide, from_bf16(a).float().numpy())
    got = evaluate("add.rn.bf16 %d, %a, %b;", U16, a, b)
    assert from_bf16(got).equal(from_bf16(a) + from_bf16(b))
    got = evaluate("fma.rn.bf16 %d, %a, %b, %c;", U16, a, b, c)
    exact = from_bf16(a).double() * from_bf16(b).double() + from_bf16(c).double()
    assert from_bf16(got).equal(exact.bfloat16())


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_packed_halves(kind):
    dtype = torch.float16 if kind == "f16x2" else torch.bfloat16
    low, high = torch.randn(64), torch.randn(64)
    got = evaluate(f"cvt.rn.{kind}.f32 %d, %a, %b;", U32, high.numpy(), low.numpy())
    halves = torch.from_numpy(got.view(I16).copy()).view(dtype).view(-1, 2)
    assert halves.equal(torch.stack([low, high], 1).to(dtype))
    a, b, c = (torch.randn(64, 2).to(dtype) for _ in range(3))
    words = [t.view(torch.int32)[:, 0].numpy() for t in (a, b, c)]
    cases = {
        f"mul.rn.{kind} %d, %a, %b;": a * b,
        f"fma.rn.{kind} %d, %a, %b, %c;": (a.double() * b.double() + c.double()).to(dtype),
        f"max.{kind} %d, %a, %b;": torch.maximum(a, b),
        f"neg.{kind} %d, %a;": -a,
    }
    for instruction, expected in cases.items():
        got = evaluate(instruction, U32, *words)
        assert torch.from_numpy(got.view(I16).copy()).view(dtype).view(-1, 2).equal(expected), (
            instruction
        )


def test_packed_floats():
    """sm_100 and later pack two float32 in 64 bits."""
    a, b, c = (random_floats(F32, 128) for _ in range(3))
    words = [x.view(U64) for x in (a, b, c)]
    cases = {
        "add.rn.f32x2 %d, %a, %b;": a + b,
        "sub.f32x2 %d, %a, %b;": a - b,
        "mul.f32x2 %d, %a, %b;": a * b,
        "fma.rn.f32x2 %d, %a, %b, %c;": float32(lambda a, b, c: a * b + c)(a, b, c),
    }
    for instruction, expected in cases.items():
        np.testing.assert_array_equal(evaluate(instruction, U64, *words).view(F32), expected)


def test_fp8():
    values = np.clip(random_floats(F32, scale=60), -400, 400)
    low, high = values, values[::-1].copy()
    for name, dtype in (("e4m3x2", torch.float8_e4m3fn), ("e5m2x2", torch.float8_e5m2)):
        got = evaluate(f"cvt.rn.satfinite.{name}.f32 %d, %a, %b;", U16, high, low)
        expected = torch.from_numpy(np.stack([low, high], 1)).to(dtype).view(torch.uint8).numpy()
        assert got.view(np.uint8).reshape(-1, 2).tolist() == expected.tolist()
        back = evaluate(f"cvt.rn.f16x2.{name} %d, %a;", U32, got).view(F16).reshape(-1, 2)
        again = torch.from_numpy(expected.copy()).view(dtype).half().numpy()
        np.testing.assert_array_equal(back, again)


def test_tf32_rounds_to_ten_bits():
    values = random_floats(F32)
    got = evaluate("cvt.rna.tf32.f32 %d, %a;", F32, values)
    mantissa, exponent = np.frexp(values.astype(F64))
    scaled = mantissa * 2**11
    away = np.trunc(np.abs(scaled) + 0.5) * np.sign(scaled)
    np.testing.assert_array_equal(got, np.ldexp(away, exponent - 11))


# Warps


def run_warps(body, outputs, inputs=(), threads=64, registers="", shared_bytes=0, shared=""):
    text = kernel(body, len(outputs) + len(inputs), registers, shared=shared)
    report = launch(text, "k", (1,), threads, [*outputs, *inputs], shared_bytes)
    assert not report.findings, "\n".join(map(str, report.findings))
    return report


SHUFFLES = {
    "up, 3, 0": lambda lane: lane - 3 if lane >= 3 else lane,
    "down, 5, 31": lambda lane: lane + 5 if lane + 5 <= 31 else lane,
    "bfly, 6, 31": lambda lane: lane ^ 6,
    "idx, 9, 31": lambda lane: 9,
    # Segments of 8 lanes: the mask 0x18 stands in bits 8 to 12.
    "idx, 2, 6175": lambda lane: (lane & 24) | 2,
    "down, 3, 6175": lambda lane: lane + 3 if (lane & 7) + 3 <= 7 else lane,
}


@pytest.mark.parametrize("case", SHUFFLES)
def test_shuffle(case):
    mode, operands = case.split(", ", 1)
    values = random_integers(U32)
    got = evaluate(f"shfl.sync.{mode}.b32 %d|%q, %a, {operands}, -1;", U32, values)
    source = [32 * (t // 32) + SHUFFLES[case](t % 32) for t in range(64)]
    assert got.tolist() == values[source].tolist()


def test_votes_and_reductions():
    values = random_integers(U32)
    warps = values.reshape(2, 32).tolist()

    def each(f):
        return [f(w) for w in warps for _ in range(32)]

    odd = "and.b32 %a, %a, 1; setp.ne.u32 %q, %a, 0;"
    ballot = each(lambda w: sum((v & 1) << n for n, v in enumerate(w)))
    assert evaluate(f"{odd} vote.sync.ballot.b32 %d, %q, -1;", U32, values).tolist() == ballot
    for name, f in (("any", any), ("all", all)):
        text = f"{odd} vote.sync.{name}.pred %q, %q, -1; selp.b32 %d, 1, 0, %q;"
        assert evaluate(text, U32, values).tolist() == each(lambda w, f=f: int(f(v & 1 for v in w)))
    assert evaluate("redux.sync.add.u32 %d, %a, -1;", U32, values).tolist() == each(
        lambda w: sum(w) % 2**32
    )
    assert evaluate("redux.sync.max.u32 %d, %a, -1;", U32, values).tolist() == each(max)
    small = values & U32(3)
    matches = evaluate("match.any.sync.b32 %d, %a, -1;", U32, small).tolist()
    rows = small.reshape(2, 32).tolist()
    assert matches == [
        sum(1 << n for n, other in enumerate(w) if other == v) for w in rows for v in w
    ]
    led = "elect.sync %d|%q, -1; selp.b32 %d, 100, %d, %q;"
    assert evaluate(led, U32, values).tolist() == ([100] + [0] * 31) * 2
    assert evaluate("activemask.b32 %d;", U32, values).tolist() == [2**32 - 1] * 64


def test_special_registers():
    out = np.zeros((4, 3, 32, 4), U32)
    text = kernel(
        """mov.u32 %r0, %ctaid.y; mov.u32 %r1, %nctaid.x; mov.u32 %r2, %ctaid.x;
        mad.lo.u32 %r3, %r0, %r1, %r2; mad.lo.u32 %r3, %r3, 32, %t; mad.wide.u32 %at, %r3, 16, %p0;
        mov.u32 %r3, %ntid.x; st.global.v4.u32 [%at], {%lane, %r2, %r0, %r3};""",
        1, ".reg .b32 %r<4>;",
    )  # fmt: skip
    assert not launch(text, "k", (3, 4), 32, [out]).findings
    y, x, t = np.meshgrid(range(4), range(3), range(32), indexing="ij")
    np.testing.assert_array_equal(out, np.stack([t, x, y, np.full_like(x, 32)], -1))


def test_loop_with_a_different_count_in_each_thread():
    counts = np.arange(64, dtype=U32) % 7
    body = (
        "mov.b32 %d, 0; L: add.u32 %d, %d, %a; sub.u32 %a, %a, 1; setp.ne.u32 %q, %a, 0; @%q bra L;"
    )
    got = evaluate("add.u32 %a, %a, 1;" + body, U32, counts)
    assert got.tolist() == [sum(range(1, n + 2)) for n in counts.tolist()]


def test_atomics_return_the_old_value():
    total, old = np.zeros(3, U32), np.zeros(64, U32)
    run_warps(
        """atom.global.add.u32 %r0, [%p0], 2; atom.global.gpu.acq_rel.max.u32 %r1, [%p0+4], %t;
        atom.global.cas.b32 %r1, [%p0+8], 0, 77;
        mad.wide.u32 %at, %t, 4, %p1; st.global.u32 [%at], %r0;""",
        [total, old], registers=".reg .b32 %r<2>;",
    )  # fmt: skip
    assert total.tolist() == [128, 63, 77] and old.tolist() == list(range(0, 128, 2))
    sums = np.zeros(2, F32)
    run_warps("red.global.add.f32 [%p0], 0f3F000000;", [sums])
    assert sums.tolist() == [32.0, 0.0]


def test_fields_of_a_parameter_by_its_address():
    """This is how nvcc reads a struct that a kernel takes by value."""
    text = kernel(
        "mov.b64 %at, k_1; ld.param.u32 %t, [%at+4]; st.global.u32 [%p0], %t;"
        "ld.param.u64 %wide, [%at+0]; st.global.u64 [%p0+8], %wide;",
        2,
    )
    out, beyond = np.zeros(4, np.uint32), np.zeros(1, np.uint32)
    report = launch(text, "k", (1,), 1, [out, 0x1122334455667788])
    assert not report.findings
    assert list(out) == [0x11223344, 0, 0x55667788, 0x11223344]
    far = text.replace("[%at+4]", "[%at+4096]")
    assert launch(far, "k", (1,), 1, [beyond, 0]).kinds() == {"out of bounds"}


def test_local_memory_and_generic_addresses():
    out = np.zeros(64, U32)
    run_warps(
        """mov.u64 %l, depot; cvta.local.u64 %g, %l; st.u32 [%g+4], %t; ld.local.u32 %r, [%l+4];
        cvta.to.global.u64 %g, %p0; mad.wide.u32 %at, %t, 4, %g; st.u32 [%at], %r;""",
        [out], registers=".reg .b64 %l, %g; .reg .b32 %r;", shared=".local .align 8 .b8 depot[16];",
    )  # fmt: skip
    assert out.tolist() == list(range(64))


def test_barrier_reduction_and_named_barriers():
    out = np.zeros(64, U32)
    run_warps(
        """setp.lt.u32 %q, %t, 10; bar.red.popc.u32 %r, 0, %q; mad.wide.u32 %at, %t, 4, %p0;
        setp.lt.u32 %q, %t, 32; @%q bra A; bar.sync 1, 64; bra B; A: bar.arrive 1, 64;
        B: st.global.u32 [%at], %r;""",
        [out], registers=".reg .b32 %r; .reg .pred %q;",
    )  # fmt: skip
    assert out.tolist() == [10] * 64


# Matrices: `fragment(lane, i)` gives (row, column) of element i of a lane, from the PTX ISA.


def a_16bit(lane, i):  # m16n8k16, and k8 without the upper half
    row = lane // 4 + (8 if i % 4 in (2, 3) else 0)
    return row, lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_16bit(lane, i):
    return lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane // 4


def a_tf32(lane, i):
    return lane // 4 + (8 if i in (1, 3) else 0), lane % 4 + (4 if i >= 2 else 0)


def b_tf32(lane, i):
    return lane % 4 + (4 if i == 1 else 0), lane // 4


def a_8bit(lane, i):
    row = lane // 4 + (8 if 4 <= i < 8 or i >= 12 else 0)
    return row, lane % 4 * 4 + (i & 3) + (16 if i >= 8 else 0)


def b_8bit(lane, i):
    return lane % 4 * 4 + (i & 3) + (16 if i >= 4 else 0), lane // 4


def c_32bit(lane, i):
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


def gather(matrix, fragment, count):
    """Returns the registers [32, words] of a matrix."""
    rows = [[matrix[fragment(lane, i)] for i in range(count)] for lane in range(32)]
    return torch.stack([torch.stack(row) for row in rows]).contiguous().view(torch.int32).numpy()


MMA = {
    "m16n8k16.row.col.f32.f16.f16.f32": (torch.float16, 16, a_16bit, 8, b_16bit, 4),
    "m16n8k16.row.col.f32.bf16.bf16.f32": (torch.bfloat16, 16, a_16bit, 8, b_16bit, 4),
    "m16n8k8.row.col.f32.f16.f16.f32": (torch.float16, 8, a_16bit, 4, b_16bit, 2),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (torch.float32, 8, a_tf32, 4, b_tf32, 2),
    "m16n8k32.row.col.s32.s8.s8.s32": (torch.int8, 32, a_8bit, 16, b_8bit, 8),
    "m16n8k32.row.col.f32.e4m3.e4m3.f32": (torch.float8_e4m3fn, 32, a_8bit, 16, b_8bit, 8),
}


@pytest.mark.parametrize("shape", MMA)
def test_mma(shape):
    dtype, depth, a_of, a_count, b_of, b_count = MMA[shape]
    integers = dtype is torch.int8
    a, b = (torch.randint(-9, 9, s).to(dtype) for s in ((16, depth), (depth, 8)))
    c = torch.randint(-99, 99, (16, 8)).to(torch.int32 if integers else torch.float32)
    a_words, b_words = gather(a, a_of, a_count), gather(b, b_of, b_count)
    c_words, d_words = gather(c, c_32bit, 4), np.zeros((32, 4), I32)

    def loads(name, words, pointer):
        return f"mad.wide.u32 %at, %t, {4 * words}, %p{pointer};" + "".join(
            f"ld.global.b32 %{name}{n}, [%at+{4 * n}];" for n in range(words)
        )

    def vector(name, words):
        return "{" + ", ".join(f"%{name}{n}" for n in range(words)) + "}"

    na, nb = a_words.shape[1], b_words.shape[1]
    run_warps(
        loads("a", na, 1) + loads("b", nb, 2) + loads("c", 4, 3)
        + f"mma.sync.aligned.{shape} {vector('d', 4)}, {vector('a', na)}, {vector('b', nb)}, "
        + f"{vector('c', 4)}; mad.wide.u32 %at, %t, 16, %p0; "
        + f"st.global.v4.b32 [%at], {vector('d', 4)};",
        [d_words], [a_words, b_words, c_words], 32,
        ".reg .b32 %a<4>, %b<4>, %c<4>, %d<4>;",
    )  # fmt: skip
    expected = a.double() @ b.double() + c.double()  # small integers: exact in every type
    got = d_words if integers else d_words.view(F32)
    for lane in range(32):
        for i in range(4):
            assert got[lane, i] == expected[c_32bit(lane, i)]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(count, trans):
    tiles = RNG.integers(0, 2**16, (count, 8, 8)).astype(U16)
    out, copied = np.zeros((32, count), U32), np.zeros_like(tiles)
    registers = "{" + ", ".join(f"%r{n}" for n in range(count)) + "}"
    run_warps(
        f"""mov.u32 %base, dynamic; and.b32 %row, %t, {8 * count - 1};
        setp.lt.u32 %q, %t, {8 * count}; mad.lo.u32 %s, %row, 16, %base;
        mad.wide.u32 %at, %row, 16, %p2;
        @%q ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%at];
        @%q st.shared.v4.b32 [%s], {{%r0, %r1, %r2, %r3}}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers}, [%s];
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%s+{128 * count}], {registers};
        bar.warp.sync -1; mad.wide.u32 %at, %t, {4 * count}, %p0;
        """
        + "".join(f"st.global.b32 [%at+{4 * n}], %r{n};" for n in range(count))
        + f"""mad.wide.u32 %at, %row, 16, %p1;
        @%q ld.shared.v4.b32 {{%r0, %r1, %r2, %r3}}, [%s+{128 * count}];
        @%q st.global.v4.b32 [%at], {{%r0, %r1, %r2, %r3}};""",
        [out, copied], [tiles], 32,
        ".reg .b32 %r<4>, %base, %row, %s; .reg .pred %q;", 256 * count,
    )  # fmt: skip
    halves = out.view(U16).reshape(32, count, 2)
    for lane in range(32):
        for n in range(count):
            for i in range(2):
                row, column = lane // 4, lane % 4 * 2 + i
                where = (column, row) if trans else (row, column)
                assert halves[lane, n, i] == tiles[(n, *where)]
    np.testing.assert_array_equal(copied, tiles)


def test_cp_async_fills_up_with_zeros():
    data, out = np.arange(64, dtype=U32), np.zeros(64, U32)
    run_warps(
        """mov.u32 %s, dynamic; mad.lo.u32 %s, %t, 16, %s; mad.wide.u32 %at, %t, 16, %p1;
        mul.lo.u32 %n, %t, 4; min.u32 %n, %n, 16;
        cp.async.cg.shared.global [%s], [%at], 16, %n; cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.v4.b32 {%r0, %r1, %r2, %r3}, [%s]; mad.wide.u32 %at, %t, 16, %p0;
        st.global.v4.b32 [%at], {%r0, %r1, %r2, %r3};""",
        [out], [data], 16, ".reg .b32 %s, %n, %r<4>;", 256,
    )  # fmt: skip
    kept = np.minimum(np.arange(16), 4)
    expected = np.where(np.arange(4) < kept[:, None], data.reshape(16, 4), 0)
    np.testing.assert_array_equal(out.reshape(16, 4), expected)


# Hopper

COPY_IN = """mov.u32 %s, dynamic; mov.u32 %n, %t;
IN: mad.wide.u32 %at, %n, 4, %p1; ld.global.b32 %x, [%at]; mad.lo.u32 %y, %n, 4, %s;
st.shared.b32 [%y], %x; add.u32 %n, %n, 128; setp.lt.u32 %q, %n, WORDS; @%q bra IN;
fence.proxy.async.shared::cta; bar.sync 0;"""


def swizzled(x, k, span, rows_of):
    """Returns the byte of 16-bit element (x, k); k runs along rows of `span` bytes, 8 per atom.

    The 16-byte chunk c of row r is stored at chunk c ^ (r mod 8) for 128 bytes, c ^ (r / 2 mod 4)
    for 64, c ^ (r / 4 mod 2) for 32: tables of the PTX ISA, "Swizzling modes".
    """
    row, chunk, rest = x, k * 2 // 16, k * 2 % 16
    mixed = {128: row % 8, 64: row // 2 % 4, 32: row // 4 % 2}[span]
    return rows_of(row) + (chunk ^ mixed) * 16 + rest


def image(matrix, where, size):
    """Returns a piece of shared memory that holds matrix[x, k] at byte where(x, k)."""
    halves = np.zeros(size // 2, U16)
    bits = matrix.view(torch.int16).numpy().view(U16)
    for x, k in np.ndindex(bits.shape):
        halves[where(x, k) // 2] = bits[x, k]
    return halves


@pytest.mark.parametrize("layout", ["k128", "k64", "k32", "k0", "mn128", "mn64", "mn0"])
def test_wgmma_layouts(layout):
    """Multiplies A in registers by B (16 x 64) in shared memory, in each canonical layout."""
    span = int("".join(c for c in layout if c.isdigit()))
    columns, mn_major = 64, layout.startswith("mn")
    a, b = torch.randint(-9, 9, (64, 16)).half(), torch.randint(-9, 9, (columns, 16)).half()
    if mn_major:  # a row for each k, along which x runs; swizzled, 16 rows are two atoms
        leading, stride = (16 * span, 8 * span) if span else (128, 256)
    else:  # not swizzled: 8 rows of 16 bytes a core matrix, at 128 along k, 256 along x
        leading, stride = (0, 8 * span) if span else (128, 256)

    def where(x, k):
        if not span:
            row, column = (k, x) if mn_major else (x, k)
            return x // 8 * 256 + k // 8 * 128 + row % 8 * 16 + column % 8 * 2
        if not mn_major:
            return swizzled(x, k, span, lambda r: r * span)
        chunk = span // 2
        return x // chunk * 16 * span + swizzled(k, x % chunk, span, lambda r: r * span)

    words = 4096
    memory = image(b, where, 4 * words)
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[span]
    descriptor = (leading >> 4) << 16 | (stride >> 4) << 32 | mode << 62
    a_words = np.stack(
        [gather(a[16 * w : 16 * w + 16], a_16bit, 8) for w in range(4)]
    ).reshape(128, 4)  # fmt: skip
    out = np.zeros((128, columns // 2), F32)
    accumulators = "{" + ", ".join(f"%d{n}" for n in range(columns // 2)) + "}"
    run_warps(
        COPY_IN.replace("WORDS", str(words))
        + """cvt.u64.u32 %desc, %s; shr.u64 %desc, %desc, 4;"""
        + f"""or.b64 %desc, %desc, {descriptor};
        mad.wide.u32 %at, %t, 16, %p2; ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%at];
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {accumulators},
            {{%a0, %a1, %a2, %a3}}, %desc, 0, 1, 1, {int(mn_major)};
        wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {accumulators},
            {{%a0, %a1, %a2, %a3}}, %desc, 1, 1, 1, {int(mn_major)};
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        mad.wide.u32 %at, %t, {2 * columns}, %p0;"""
        + "".join(f"st.global.b32 [%at+{4 * n}], %d{n};" for n in range(columns // 2)),
        [out], [memory.view(U32), a_words], 128,
        f".reg .b32 %s, %n, %x, %y, %a<4>, %d<{columns // 2}>; .reg .b64 %desc; .reg .pred %q;",
        4 * words,
    )  # fmt: skip
    expected = 2 * (a.double() @ b.double().T)
    for thread in range(128):
        for i in range(columns // 2):
            row, column = c_32bit(thread % 32, i % 4)
            assert out[thread, i] == expected[thread // 32 * 16 + row, i // 4 * 8 + column]


@pytest.mark.parametrize("span", [0, 32, 64, 128])
def test_tensor_copy_swizzles_and_clips(span):
    """Loads a tile that hangs over two edges, looks at its bytes, and stores it elsewhere."""
    columns = (span or 128) // 2
    tensor = torch.randint(1, 1000, (21, columns + 8)).to(torch.int16)
    target = torch.zeros_like(tensor)
    box = [16, columns]
    raw = np.zeros((16, columns), np.int16)
    maps = [TensorMap(t, box, swizzle=span) for t in (tensor, target)]
    text = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 dynamic[];
.visible .entry k(.param .align 64 .b8 k_in[128], .param .align 64 .b8 k_out[128],
    .param .u64 k_raw)
{
.reg .b64 %in, %out, %raw, %at; .reg .b32 %t, %s, %b, %n, %x, %y; .reg .pred %q, %done;
mov.b64 %in, k_in; cvta.param.u64 %in, %in; mov.b64 %out, k_out; cvta.param.u64 %out, %out;
ld.param.u64 %raw, [k_raw]; mov.u32 %t, %tid.x; mov.u32 %s, dynamic; add.u32 %b, %s, 4096;
setp.eq.u32 %q, %t, 0;
@%q mbarrier.init.shared::cta.b64 [%b], 1;
bar.sync 0;
@%q mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], TOTAL;
@%q cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
    [%s], [%in, {16, 10}], [%b];
WAIT: mbarrier.try_wait.parity.shared::cta.b64 %done, [%b], 0;
@!%done bra WAIT;
mov.u32 %n, %t;
OUT: mad.lo.u32 %y, %n, 4, %s; ld.shared.b32 %x, [%y]; mul.wide.u32 %at, %n, 4;
add.u64 %at, %at, %raw; st.global.b32 [%at], %x; add.u32 %n, %n, 32; setp.lt.u32 %done, %n, WORDS;
@%done bra OUT;
@%q cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%out, {16, 10}], [%s];
@%q cp.async.bulk.commit_group;
@%q cp.async.bulk.wait_group.read 0;
ret;
}""".replace("TOTAL", str(32 * columns)).replace("WORDS", str(8 * columns))
    report = launch(text, "k", (1,), 32, [*maps, raw], 4104)
    assert not report.findings, "\n".join(map(str, report.findings))
    expected = torch.zeros(16, columns, dtype=torch.int16)
    inside = tensor[10:, 16:][:16, :columns]
    expected[: inside.shape[0], : inside.shape[1]] = inside
    if span:
        size = 32 * columns
        laid_out = image(expected, lambda x, k: swizzled(x, k, span, lambda r: r * span), size)
    else:
        laid_out = expected.numpy().reshape(-1).view(U16)
    np.testing.assert_array_equal(raw.reshape(-1).view(U16), laid_out)
    stored = torch.zeros_like(target)
    stored[10:, 16:][:16, :columns] = inside
    assert target.equal(stored)


# Unknown opcodes and names raise an error that names them, and are never skipped


@pytest.mark.parametrize(
    "line, name",
    [
        ("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r}, [%r];", "tcgen05.ld"),
        ("ld.global.L3::hint.b32 %r, [%p0];", "L3::hint"),
        ("call.uni foo, (%r);", "call.uni"),
        ("add.rn.strange.f32 %r, %r, %r;", "strange"),
        ("add.f32 %r, %r, %r, %r;", "add.f32"),
        ("fma.rn.f32.f16 %r, %r, %r, %r;", "fma.rn.f32.f16"),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%p0}, {%p0}, {%p0}, {%p0};", "m8n8k4"),
        ("mov.u32 %r, %unheard_of;", "%unheard_of"),
    ],
)
def test_unknown_is_an_error_even_if_it_never_runs(line, name):
    text = kernel(f"bra OVER; {line} OVER:", 1, ".reg .b32 %r;")
    with pytest.raises(PTXError, match=name.replace(".", r"\.")):
        launch(text, "k", (1,), 32, [np.zeros(4)])
