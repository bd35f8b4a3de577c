"""The structs of csrc/attention_params.h and csrc/cuda/launch.h, as ctypes, and their memory.

Kernels take them by value. For the PTX interpreter, each pointer becomes a view of just the
elements that the call may touch, so that everything else is out of bounds.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

I64, F64, U32, U64, PTR = (
    ctypes.c_int64, ctypes.c_double, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p,
)  # fmt: skip
# DType: float32, bfloat16, float16, float64
ITEM_BYTES = (4, 2, 2, 8)


class TensorView(ctypes.Structure):
    _fields_ = [("data", PTR), ("stride_b", I64), ("stride_h", I64), ("stride_s", I64)]


class ScoreView(ctypes.Structure):
    _fields_ = [
        ("data", PTR), ("dtype", ctypes.c_int32),
        ("stride_b", I64), ("stride_h", I64), ("stride_q", I64), ("stride_k", I64),
    ]  # fmt: skip


class Tangents(ctypes.Structure):
    _fields_ = [
        *((name, TensorView) for name in ("query", "key", "value", "grad_out")),
        ("bias", ScoreView), ("sinks", PTR), ("grad_lse", PTR),
        ("out", TensorView), ("lse", PTR), ("delta", PTR),
    ]  # fmt: skip


def view(address: int, shape: list[int], strides: list[int], item: int) -> np.ndarray:
    """Elements of `item` bytes at a host address; strides in elements."""
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else -1
    memory = (ctypes.c_uint8 * ((last + 1) * item)).from_address(address)
    flat = np.frombuffer(memory, dtype=f"V{item}") if last >= 0 else np.zeros(0, f"V{item}")
    if last < 0:
        return flat
    return np.lib.stride_tricks.as_strided(flat, shape, [s * item for s in strides])


def encode(params: Any, memory: Any) -> bytes:
    """The bytes of the kernel's parameter, with the addresses of the interpreter's memory."""
    copy = type(params).from_buffer_copy(params)
    for name, array in params.operands().items():
        address = memory.bind(array) if array.size else 0
        field = getattr(copy, name)
        if isinstance(field, (TensorView, ScoreView)):
            field.data = address
        else:
            setattr(copy, name, address)
    return bytes(copy)


class Call(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32),
        *((name, I64) for name in ("B", "Hq", "Hkv", "Sq", "Sk", "D", "Dv")),
        *((name, TensorView) for name in ("query", "key", "value", "out")),
        ("lse", PTR), ("lse_stride_b", I64), ("lse_stride_h", I64),
        ("cu_seqlens_q", PTR), ("cu_seqlens_k", PTR), ("seqused_k", PTR),
        ("block_table", PTR), ("block_table_stride_b", I64), ("page_size", I64),
        ("shared", PTR), ("threads", I64),
        ("scale", F64), ("softcap", F64), ("precision", I64), ("bottom_right", ctypes.c_bool),
        ("window_left", I64), ("window_right", I64),
        ("mask", ScoreView), ("mask_blocks", PTR), ("bias", ScoreView),
        ("key_padding_mask", PTR), ("key_padding_stride_b", I64), ("key_padding_stride_k", I64),
        ("alibi_slopes", PTR), ("alibi_stride_b", I64), ("sinks", PTR),
        ("dropout_threshold", U32), ("dropout_scale", F64), ("philox_seed", U64),
        ("philox_offset", U32), ("philox_states", PTR), ("sample_heads", I64),
        ("dropout_keep", PTR),
        *((name, TensorView) for name in ("grad_out", "dq", "dk", "dv", "page_dk", "page_dv")),
        ("grad_lse", PTR), ("grad_lse_stride_b", I64), ("grad_lse_stride_h", I64),
        ("grad_lse_stride_s", I64), ("delta", PTR), ("dbias", ScoreView), ("dsinks", PTR),
        ("weights", ScoreView), ("average_weights", ctypes.c_bool), ("tangent", Tangents),
        # Of cuda::Call
        ("philox", PTR), ("row_lse", PTR),
        ("lse_in_log2", ctypes.c_bool), ("aligned", ctypes.c_bool), ("page_count", I64),
        ("splits", I64), ("part_out", PTR), ("part_max", PTR), ("part_sum", PTR),
    ]  # fmt: skip

    def operands(self) -> dict[str, np.ndarray]:
        """What each pointer may be used for, by its field's name."""
        B, Hq, Hkv, Sq, Sk, D, Dv = (
            getattr(self, name) for name in ("B", "Hq", "Hkv", "Sq", "Sk", "D", "Dv")
        )
        item = ITEM_BYTES[self.dtype]
        found: dict[str, np.ndarray] = {}
        # Packed tokens are one batch entry; pages are entries too, each of page_size tokens.
        packed, pages = bool(self.cu_seqlens_q), bool(self.block_table)
        tokens, rows = (1 if packed else B, Sq), 1 if packed else B
        keys = (self.page_count, self.page_size) if pages else (1 if packed else B, Sk)
        for name, H, (entries, S), width in (
            ("query", Hq, tokens, D), ("key", Hkv, keys, D), ("value", Hkv, keys, Dv),
            ("out", Hq, tokens, Dv), ("grad_out", Hq, tokens, Dv), ("dq", Hq, tokens, D),
            ("dk", Hkv, (B, Sk) if pages else keys, D), ("dv", Hkv, (B, Sk) if pages else keys, Dv),
            ("page_dk", Hkv, keys, D), ("page_dv", Hkv, keys, Dv),
        ):  # fmt: skip
            t = getattr(self, name)
            if t.data:
                strides = [t.stride_b, t.stride_h, t.stride_s, 1]
                found[name] = view(t.data, [entries, H, S, width], strides, item)
        for name in ("mask", "bias", "dbias"):
            t = getattr(self, name)
            if t.data:
                strides = [t.stride_b, t.stride_h, t.stride_q, t.stride_k]
                full = (B, Hq, Sq, Sk)
                shape = [1 if s == 0 else n for s, n in zip(strides, full, strict=True)]
                width = 1 if name == "mask" else ITEM_BYTES[t.dtype]
                found[name] = view(t.data, shape, strides, width)
        for name, shape, strides, width in (
            ("lse", [rows, Hq, Sq], [self.lse_stride_b, self.lse_stride_h, 1], 4),
            ("delta", [rows, Hq, Sq], [Hq * Sq, Sq, 1], 4),
            ("row_lse", [rows, Hq, Sq], [Hq * Sq, Sq, 1], 4),
            ("grad_lse", [rows, Hq, Sq],
             [self.grad_lse_stride_b, self.grad_lse_stride_h, self.grad_lse_stride_s], 4),
            ("key_padding_mask", [B, Sk],
             [self.key_padding_stride_b, self.key_padding_stride_k], 1),
            ("alibi_slopes", [B if self.alibi_stride_b else 1, Hq], [self.alibi_stride_b, 1], 4),
            ("sinks", [Hq], [1], 4), ("dsinks", [Hq], [1], 4), ("philox", [2], [1], 8),
            ("cu_seqlens_q", [B + 1], [1], 4), ("cu_seqlens_k", [B + 1], [1], 4),
            ("seqused_k", [B], [1], 4),
            ("block_table", [B, self.block_table_stride_b], [self.block_table_stride_b, 1], 4),
            ("part_out", [self.splits, rows * Hq * Sq, Dv], [rows * Hq * Sq * Dv, Dv, 1], 4),
            ("part_max", [self.splits, rows * Hq * Sq], [rows * Hq * Sq, 1], 4),
            ("part_sum", [self.splits, rows * Hq * Sq], [rows * Hq * Sq, 1], 4),
            ("dropout_keep", [B * Hq * Sq * Sk], [1], 1),
        ):  # fmt: skip
            address = getattr(self, name)
            if address:
                found[name] = view(address, shape, strides, width)
        return found

    encode_for = encode


KINDS = ("input", "grad_out", "output", "mask", "bias", "number")  # SoftmaxParams::Operand


class SoftmaxCall(ctypes.Structure):
    MAX_DIMS = 16
    _fields_ = [
        ("dtype", ctypes.c_int32), ("columns", I64), ("queries", I64), ("heads", I64),
        ("dims", ctypes.c_int), ("size", I64 * MAX_DIMS), ("stride", I64 * MAX_DIMS * len(KINDS)),
        ("input", PTR), ("output", PTR), ("mask", PTR), ("bias", PTR), ("map_pages", PTR),
        ("mask_stride_k", I64), ("bias_stride_k", I64), ("bias_dtype", ctypes.c_int32),
        ("sinks", PTR), ("scale", F64), ("causal", ctypes.c_bool), ("diagonal_offset", I64),
        ("dropout_threshold", U32), ("dropout_scale", F64), ("philox_seed", U64),
        ("philox_offset", U32), ("philox_states", PTR), ("sample_heads", I64),
        ("weights", PTR), ("sink_weight", PTR), ("grad_out", PTR), ("dsinks", PTR),
        ("sink_terms", PTR), ("dbias", PTR), ("partial", PTR), ("bias_width", I64),
        ("groups", I64), ("group_rows", I64), ("groups_per_task", I64), ("chunks", I64),
        # Of cuda::SoftmaxCall
        ("philox", PTR), ("delta", PTR),
    ]  # fmt: skip

    def operands(self) -> dict[str, np.ndarray]:
        """What each pointer may be used for, by its field's name."""
        item, bias_item = ITEM_BYTES[self.dtype], ITEM_BYTES[self.bias_dtype]
        rows, sizes = self.groups * self.group_rows, self.size[: self.dims]
        found: dict[str, np.ndarray] = {}
        for kind, last, width in (
            ("input", 1, item), ("grad_out", 1, item), ("output", 1, item),
            ("mask", self.mask_stride_k, 1), ("bias", self.bias_stride_k, bias_item),
        ):  # fmt: skip
            if address := getattr(self, kind):
                strides = [*self.stride[KINDS.index(kind)][: self.dims], last]
                shape = [
                    1 if s == 0 else n for n, s in zip([*sizes, self.columns], strides, strict=True)
                ]
                found[kind] = view(address, shape, strides, width)
        for name, count, width in (
            ("weights", rows * self.columns, item), ("sinks", self.heads, 4), ("philox", 2, 8),
            ("sink_weight", rows, 4), ("sink_terms", rows, 4), ("dsinks", self.heads, 4),
            ("delta", rows, 4), ("dbias", self.groups * self.bias_width, bias_item),
            ("partial", self.groups * self.chunks * self.bias_width, 4),
        ):  # fmt: skip
            if address := getattr(self, name):
                found[name] = view(address, [count], [1], width)
        return found

    encode_for = encode
