"""Triton 3.9's interpreter, with bfloat16 repaired, and a third faster.

Triton's own keeps bfloat16 as uint16, and multiplies, adds and rounds these as integers (or
truncates). Here a bfloat16 tensor holds float32 numbers that bfloat16 can represent: they are
rounded (to nearest even) when they come from float32, and converted from and to 16 bits when memory
is read or written. `test_triton.py` has a test that fails when Triton needs no repair any more.
"""

import contextlib
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from fused_attention.kernels import launch, tiles

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def round_bits(x):
    """Rounds float32 to the nearest bfloat16, and returns its 16 bits."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FC0), nearest).astype(np.uint16)


def widen(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@contextlib.contextmanager
def repaired_bfloat16():
    np_dtype, fits = interpreter._get_np_dtype, interpreter._validate_np_data_size
    load, store, binary = Builder.create_masked_load, Builder.create_masked_store, Builder.binary_op

    def is_bfloat16(dtype):
        return dtype.scalar == tl.bfloat16

    def masked_load(self, pointers, mask, other, *policy):
        if pointers.get_element_ty() != tl.bfloat16:
            return load(self, pointers, mask, other, *policy)
        zeros = np.zeros(pointers.data.shape, np.uint16)
        filler = zeros if other is None else zeros + round_bits(other.data)
        bits = interpreter._interpreter.load(pointers.data, mask.data, filler, np.dtype(np.uint16))
        return Handle(widen(bits), tl.bfloat16)

    def masked_store(self, pointers, value, mask, *policy):  # policy: what this Triton passes
        if is_bfloat16(value.dtype):
            value = Handle(round_bits(value.data), tl.uint16)
        return store(self, pointers, value, mask, *policy)

    def cast(self, source, target, *rounding):
        data = source.data.astype(np_dtype_of(target))
        if is_bfloat16(target):
            data = widen(round_bits(data))
        return Handle(data, target.scalar)

    def binary_op(self, left, right, op):
        result = binary(self, left, right, op)
        if is_bfloat16(result.dtype) and result.data.dtype == np.float32:
            result.data = widen(round_bits(result.data))
        return result

    def np_dtype_of(dtype):
        is_pointer = isinstance(dtype.scalar, tl.pointer_type)
        wide = not is_pointer and is_bfloat16(dtype)
        return np.dtype(np.float32) if wide else np_dtype(dtype)

    def data_fits(data, dtype):
        is_pointer = isinstance(dtype, tl.pointer_type)
        return (not is_pointer and is_bfloat16(dtype)) or fits(data, dtype)

    casts = ["cast_impl", "create_fp_to_fp"]
    with contextlib.ExitStack() as stack:
        for name in casts:
            stack.enter_context(mock.patch.object(Builder, name, cast))
        for name, new in (
            ("create_masked_load", masked_load),
            ("create_masked_store", masked_store),
            ("binary_op", binary_op),
        ):
            stack.enter_context(mock.patch.object(Builder, name, new))
        stack.enter_context(mock.patch.object(interpreter, "_get_np_dtype", np_dtype_of))
        stack.enter_context(mock.patch.object(interpreter, "_validate_np_data_size", data_fits))
        yield


@contextlib.contextmanager
def quick_calls():
    """Patches the language once per launch instead of at every call of a device function."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()

    def patch_once(function):
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch(function)

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    with (
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.object(interpreter.GridExecutor, "__call__", launch_afresh),
    ):
        yield


def use_tiles(monkeypatch, own):
    """Uses these tiles for every launch: with small tiles, small problems have several blocks in
    each direction. None stands for the tiles of the tables."""
    for name in ("attention_tiles", "decode_tiles"):
        found = getattr(tiles, name) if own is None else lambda *args, **kwargs: own
        monkeypatch.setattr(launch, name, found)
