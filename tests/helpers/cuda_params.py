"""The structs of csrc/attention_params.h and csrc/cuda/launch.h, as ctypes, and their memory.

Kernels take them by value. For the PTX interpreter, each pointer becomes a view of just the
elements that the call may touch, so that everything else is out of bounds.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from paths import CACHE, ROOT

PTR = ctypes.c_void_p
# DType: float32, bfloat16, float16, float64
ITEM_BYTES = (4, 2, 2, 8)


# The layouts come from the headers: a program that includes them prints where each field lies, what
# type it has and how big it is. The fields are named here, because C++ cannot list them; together
# with the gaps of alignment they must fill the struct.
STRUCTS = {
    "TensorView": "data stride_b stride_h stride_s",
    "ScoreView": "data dtype stride_b stride_h stride_q stride_k",
    "Tangents": "query key value grad_out bias sinks grad_lse out lse delta",
    "KernelParams": """dtype B Hq Hkv Sq Sk D Dv query key value out lse lse_stride_b
        lse_stride_h cu_seqlens_q cu_seqlens_k seqused_k block_table block_table_stride_b
        page_size least_queries most_queries call_workspace threads scale softcap precision
        bottom_right diagonal_start window_left window_right mask mask_blocks bias
        key_padding_mask key_padding_stride_b key_padding_stride_k alibi_slopes alibi_stride_b
        sinks dropout_threshold dropout_scale philox_seed philox_offset dropout_row dropout_group
        dropout_head philox_states sample_heads dropout_keep grad_out dq dk dv page_dk page_dv
        grad_lse grad_lse_stride_b grad_lse_stride_h grad_lse_stride_s delta dbias dsinks weights
        average_weights mass entropy top_weights top_keys num_top tangent philox row_lse
        lse_in_log2 aligned page_count splits partial_out partial_max partial_sum""",
    "SoftmaxKernelParams": """dtype columns queries heads dims size stride input output mask bias
        map_pages mask_stride_k bias_stride_k bias_dtype sinks scale causal diagonal_offset
        dropout_threshold
        dropout_scale philox_seed philox_offset philox_states sample_heads weights sink_weight
        grad_out dsinks sink_terms dbias partial bias_width groups group_rows groups_per_task chunks
        philox delta""",
}
PROGRAM = """#include "cuda/launch.h"
#include <stddef.h>
#include <string>
#include <type_traits>
using namespace fused_attention;
using namespace fused_attention::cuda;
template <typename T> std::string type() {
  if constexpr (std::is_array_v<T>) {
    return type<std::remove_extent_t<T>>() + "*" + std::to_string(std::extent_v<T>);
  } else if constexpr (std::is_same_v<T, TensorView>) { return "TensorView";
  } else if constexpr (std::is_same_v<T, ScoreView>) { return "ScoreView";
  } else if constexpr (std::is_same_v<T, Tangents>) { return "Tangents";
  } else if constexpr (std::is_pointer_v<T>) { return "pointer";
  } else if constexpr (std::is_same_v<T, bool>) { return "bool";
  } else if constexpr (std::is_same_v<T, double>) { return "float64";
  } else if constexpr (std::is_same_v<T, float>) { return "float32";
  } else if constexpr (std::is_enum_v<T>) { return type<std::underlying_type_t<T>>();
  } else { return (std::is_signed_v<T> ? "int" : "uint") + std::to_string(8 * sizeof(T)); }
}
#define FIELD(s, f) printf("%s %s %zu %s\\n", #s, #f, offsetof(s, f), \\
                           type<decltype(s::f)>().c_str());
int main() {
@FIELDS@
  return 0;
}
"""


def program() -> str:
    lines = []
    for struct, fields in STRUCTS.items():
        lines += [f"  FIELD({struct}, {name})" for name in fields.split()]
        lines.append(f'  printf("{struct} sizeof %zu bytes\\n", sizeof({struct}));')
    return PROGRAM.replace("@FIELDS@", "\n".join(lines))


def printed() -> list[list[str]]:
    """Returns the words of each line that the program prints. The output is kept in .cache by the
    hash of the program and the headers."""
    text = program()
    headers = b"".join((ROOT / "csrc" / name).read_bytes() for name in HEADERS)
    digest = hashlib.sha256(text.encode() + headers).hexdigest()[:16]
    path = CACHE / "cuda" / f"layout-{digest}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            source, built = Path(folder) / "layout.cpp", Path(folder) / "layout"
            source.write_text(text)
            flags = ["-std=c++20", "-Wno-invalid-offsetof", f"-I{ROOT / 'csrc'}"]
            subprocess.run([*COMPILER, *flags, source, "-o", built], check=True)
            output = subprocess.run([built], capture_output=True, check=True).stdout
            (Path(folder) / "printed").write_bytes(output)
            (Path(folder) / "printed").rename(path)
    return [line.split() for line in path.read_text().splitlines()]


HEADERS = ("attention_params.h", "cuda/launch.h")
COMPILER = os.environ.get("CXX", "g++").split()
_SCALARS = {
    "pointer": PTR,
    "bool": ctypes.c_bool,
    **{f"int{n}": getattr(ctypes, f"c_int{n}") for n in (8, 16, 32, 64)},
    **{f"uint{n}": getattr(ctypes, f"c_uint{n}") for n in (8, 16, 32, 64)},
    "float32": ctypes.c_float,
    "float64": ctypes.c_double,
}
TYPES: dict[str, Any] = dict(_SCALARS)


def _type(name: str) -> Any:
    element, *extents = name.split("*")
    found = TYPES[element]
    for extent in extents:  # the innermost one first, as C++ nests arrays
        found = found * int(extent)
    return found


def _layouts() -> dict[str, list[tuple[str, Any]]]:
    layouts: dict[str, list[tuple[str, Any]]] = {}
    ends: dict[str, int] = {}
    for struct, name, number, kind in printed():
        fields, at = layouts.setdefault(struct, []), int(number)
        gap = at - ends.setdefault(struct, 0)
        assert 0 <= gap < 8, f"{struct}: {gap} bytes before {name} are not mirrored"
        if gap:
            fields.append((f"gap_{at}", ctypes.c_uint8 * gap))
        if name == "sizeof":
            TYPES[struct] = type(struct, (ctypes.Structure,), {"_pack_": 1, "_fields_": fields})
            assert ctypes.sizeof(TYPES[struct]) == at, struct
        else:
            fields.append((name, _type(kind)))
            ends[struct] = at + ctypes.sizeof(_type(kind))
    return layouts


LAYOUTS = _layouts()
TensorView, ScoreView = TYPES["TensorView"], TYPES["ScoreView"]


def view(address: int, shape: list[int], strides: list[int], item: int) -> np.ndarray:
    """Returns the elements of `item` bytes at a host address; strides are in elements."""
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else -1
    memory = (ctypes.c_uint8 * ((last + 1) * item)).from_address(address)
    flat = np.frombuffer(memory, dtype=f"V{item}") if last >= 0 else np.zeros(0, f"V{item}")
    if last < 0:
        return flat
    return np.lib.stride_tricks.as_strided(flat, shape, [s * item for s in strides])


def encode(params: Any, memory: Any) -> bytes:
    """Returns the bytes of the kernel's parameter, with addresses in the interpreter's memory."""
    copy = type(params).from_buffer_copy(params)
    for name, array in params.operands().items():
        address = memory.bind(array) if array.size else 0
        field = getattr(copy, name)
        if isinstance(field, (TensorView, ScoreView)):
            field.data = address
        else:
            setattr(copy, name, address)
    return bytes(copy)


class KernelParams(ctypes.Structure):
    _pack_ = 1
    _fields_ = LAYOUTS["KernelParams"]

    def operands(self) -> dict[str, np.ndarray]:
        """Returns the elements that each pointer may touch, by the name of its field."""
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
            ("partial_out", [self.splits, rows * Hq * Sq, Dv], [rows * Hq * Sq * Dv, Dv, 1], 4),
            ("partial_max", [self.splits, rows * Hq * Sq], [rows * Hq * Sq, 1], 4),
            ("partial_sum", [self.splits, rows * Hq * Sq], [rows * Hq * Sq, 1], 4),
            ("dropout_keep", [B * Hq * Sq * Sk], [1], 1),
        ):  # fmt: skip
            address = getattr(self, name)
            if address:
                found[name] = view(address, shape, strides, width)
        return found

    encode_for = encode


KINDS = ("input", "grad_out", "output", "mask", "bias", "number")  # SoftmaxParams::Operand


class SoftmaxKernelParams(ctypes.Structure):
    _pack_ = 1
    _fields_ = LAYOUTS["SoftmaxKernelParams"]

    def operands(self) -> dict[str, np.ndarray]:
        """Returns the elements that each pointer may touch, by the name of its field."""
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
