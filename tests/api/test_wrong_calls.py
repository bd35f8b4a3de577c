"""Makes wrong calls of everything public: one table of exceptions and of patterns of the messages.

A message names the argument, what it got and what it expected. Where a surface replaces a function
of another library, `original` makes the same call there: that call must fail too, and code that
catches its exception must catch ours. The operators check their arguments themselves; the tests of
each operator cover that.
"""

import functools
import itertools
import math
import re
import sys
import types
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fused_attention as fa
from attention_modules import HEADS, E, L, N, pair, sequence
from fused_attention.tools import cli
from small_calls import PACKED, PAGED, qkv

int32 = torch.int32
VALUE, TYPE = fa.ArgumentValueError, fa.ArgumentTypeError


class Row(NamedTuple):
    surface: str
    call: Callable[[], Any]
    error: type[Exception]
    message: str  # a regular expression
    original: Callable[[], Any] | None = None
    name: str = ""


def randn(*shape, dtype=torch.float32, **options):
    return torch.randn(shape, dtype=dtype, **options)


def on(device, *shape):
    """Returns a fake tensor on a device that this machine need not have."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(shape, device=device)


def self_attention():
    return {name: randn(2, 4, 5, 8) for name in ("query", "key", "value")}


# -- attention and explain ---------------------------------------------------------------

# Each row: arguments that replace those of a valid call, the error, a pattern of its message.
ATTENTION = [
    ({"query": 1}, TYPE, "query: expected a torch.Tensor, got int"),
    ({"key": None}, TYPE, "key: expected a torch.Tensor, got NoneType"),
    ({"value": randn(2, 2, 7, 8).to_sparse()}, VALUE, "value: .*dense.*sparse"),
    ({"query": randn(2, 4, 5, 8).to(torch.float8_e4m3fn)}, VALUE, "query: .*float8_e4m3fn"),
    ({"query": torch.ones(2, 4, 5, 8, dtype=int32)}, VALUE, "query: .*int32.*cast"),
    ({"key": randn(2, 2, 7, 8).half()}, VALUE, "key: .*float32, as query has, got torch.float16"),
    ({"value": randn(2, 2, 7, 8).double()}, VALUE, "value: .*float32.*float64"),
    ({"key": randn(2, 2, 7, 8, device="meta")}, VALUE, "key: .*device cpu.*meta"),
    ({"query": randn(4, 5, 8)}, VALUE, "query: .*4 dimensions.*3: .*cu_seqlens_q"),
    ({"key": randn(2, 7, 8)}, VALUE, "key: .*4 dimensions"),
    ({"key": randn(3, 2, 7, 8)}, VALUE, "key: .*batch size 2"),
    ({"key": randn(2, 2, 7, 9)}, VALUE, "key: .*head_dim 8.*9"),
    ({"value": randn(2, 2, 6, 8)}, VALUE, r"value: .*\(2, 2, 7, 8\).*\(2, 2, 6, 8\)"),
    ({"value": randn(2, 1, 7, 8)}, VALUE, "value: "),
    ({"key": randn(2, 3, 7, 8), "value": randn(2, 3, 7, 8)}, VALUE, "key: .*divides query's 4"),
    ({"key": randn(2, 0, 7, 8), "value": randn(2, 0, 7, 8)}, VALUE, "key: .*divides query's 4"),
    ({"mask": [[True]]}, TYPE, "mask: .*Tensor, got list"),
    ({"mask": randn(5, 7)}, VALUE, "mask: .*torch.bool.*pass additive masks as bias"),
    ({"mask": torch.ones(5, 7, dtype=torch.uint8)}, VALUE, r"mask: .*uint8.*mask.bool\(\)"),
    ({"mask": torch.ones(5, 6, dtype=torch.bool)}, VALUE, r"mask: .*\(2, 4, 5, 7\).*\(5, 6\)"),
    ({"mask": torch.ones(1, 1, 1, 5, 7, dtype=torch.bool)}, VALUE, "mask: .*broadcasts"),
    ({"mask": torch.ones(5, 7, dtype=torch.bool, device="meta")}, VALUE, "mask: .*device cpu"),
    ({"bias": torch.ones(5, 7, dtype=torch.bool)}, VALUE, "bias: .*pass boolean masks as mask"),
    ({"bias": torch.ones(5, 7, dtype=int32)}, VALUE, "bias: .*int32"),
    ({"bias": randn(2, 5, 7)}, VALUE, "bias: .*broadcasts"),
    ({"key_padding_mask": torch.ones(2, 7)}, VALUE, "key_padding_mask: .*bool.*True = padding"),
    (
        {"key_padding_mask": torch.ones(7, dtype=torch.bool)},
        VALUE,
        r"key_padding_mask: .*\[B, Sk\] = \(2, 7\), got \(7,\)",
    ),
    ({"causal": True}, VALUE, 'causal: .*"top_left" or "bottom_right"'),
    ({"causal": "left"}, VALUE, "causal: .*top_left.*bottom_right.*'left'"),
    ({"causal": None}, VALUE, "causal: .*None"),
    ({"diagonal": "right"}, VALUE, 'diagonal: .*"top_left" or "bottom_right", got \'right\''),
    ({"diagonal": True}, VALUE, "diagonal: .*got True"),
    ({"causal": "top_left", "diagonal": "bottom_right"}, VALUE, "diagonal: .*as causal says"),
    ({"window_size": 3}, VALUE, "window_size: .*tokens.*3"),
    ({"window_size": (1, 2, 3)}, VALUE, "window_size: "),
    ({"window_size": (-2, 0)}, VALUE, r"window_size: .*>= -1.*\(-2, 0\)"),
    ({"window_size": (1.5, 0)}, VALUE, "window_size: "),
    ({"window_size": [None, None]}, VALUE, "window_size: "),
    ({"scale": float("nan")}, VALUE, "scale: .*finite.*nan"),
    ({"scale": float("inf")}, VALUE, "scale: .*finite.*inf"),
    ({"scale": "1"}, TYPE, "scale: .*number.*str"),
    ({"scale": torch.tensor(1.0)}, TYPE, "scale: .*multiplied into query"),
    ({"softcap": -1.0}, VALUE, "softcap: .*>= 0.*-1.0"),
    ({"softcap": float("nan")}, VALUE, "softcap: "),
    ({"softcap": None}, TYPE, "softcap: "),
    ({"dropout_p": -0.1}, VALUE, r"dropout_p: .*\[0, 1\].*-0.1"),
    ({"dropout_p": 1.1}, VALUE, "dropout_p: "),
    ({"dropout_p": float("nan")}, VALUE, "dropout_p: "),
    ({"sinks": randn(2)}, VALUE, r"sinks: .*\[Hq\] = \(4,\), got \(2,\)"),
    ({"sinks": torch.ones(4, dtype=int32)}, VALUE, "sinks: .*floating"),
    ({"alibi_slopes": randn(2, 2)}, VALUE, r"alibi_slopes: .*\(4,\) or \(2, 4\), got \(2, 2\)"),
    ({"alibi_slopes": torch.ones(4, dtype=int32)}, VALUE, "alibi_slopes: .*floating"),
    ({"alibi_slopes": randn(4, requires_grad=True)}, VALUE, "alibi_slopes: .*requires_grad.*bias"),
    ({"dropout_p": 0.5, "philox_seed": 2**64}, VALUE, "philox_seed: .*64 bits"),
    ({"dropout_p": 0.5, "philox_seed": "a"}, TYPE, "philox_seed: .*str"),
    ({"dropout_p": 0.5, "philox_seed": torch.tensor([1, 2, 3])}, VALUE, "philox_seed: .*seed, off"),
    ({"dropout_p": 0.5, "philox_seed": torch.tensor([1.0, 2.0])}, VALUE, "philox_seed: .*int64"),
    ({"precision": "low"}, VALUE, "precision: .*highest, high, medium.*'low'"),
    ({"backend": "gpu"}, VALUE, "backend: .*cuda, triton, cpu, reference.*'gpu'"),
    ({"seqused_k": torch.tensor([1, 2])}, VALUE, "seqused_k: .*int32.*int64"),
    ({"seqused_k": torch.tensor([1, 2, 3], dtype=int32)}, VALUE, r"seqused_k: .*\[B\] = \(2,\)"),
    ({"seqused_k": torch.tensor([7, 7], dtype=int32), "causal": True}, VALUE, "causal: "),
    ({"cu_seqlens_k": torch.tensor([0, 7], dtype=int32)}, VALUE, "cu_seqlens_k: .*cu_seqlens_q"),
    ({"query": torch.ones(2, 4, 5, 8, dtype=torch.bool)}, VALUE, "query: .*torch.bool.*cast"),
    ({"query": randn(2, 4, 5, 8).to(torch.float8_e5m2)}, VALUE, "query: .*float8_e5m2"),
    ({"query": randn(2, 4, 5, 8, dtype=torch.complex64)}, VALUE, "query: .*complex64"),
    ({"key": randn(2, 2, 7, 8).to(torch.float8_e4m3fn)}, VALUE, "key: .*float8_e4m3fn"),
    ({"bias": randn(5, 7, dtype=torch.complex64)}, VALUE, "bias: .*complex64"),
    ({"bias": randn(5, 7).to(torch.float8_e5m2)}, VALUE, "bias: .*float8_e5m2"),
    ({"mask": torch.ones(5, 7, dtype=torch.complex64)}, VALUE, "mask: .*complex64"),
    ({"bias": randn(5, 7, device="meta")}, VALUE, "bias: .*device cpu.*meta"),
    ({"sinks": randn(4).to(torch.float8_e4m3fn)}, VALUE, "sinks: .*floating.*float8_e4m3fn"),
    ({"sinks": [0.0] * 4}, TYPE, "sinks: .*Tensor, got list"),
    (
        {"alibi_slopes": randn(4).to(torch.float8_e4m3fn)},
        VALUE,
        "alibi_slopes: .*floating.*float8_e4m3fn",
    ),
    ({"dropout_p": 0.5, "philox_seed": 1.0}, TYPE, "philox_seed: .*int.*float"),
    ({"key_padding_mask": torch.ones(2, 7, dtype=int32)}, VALUE, "key_padding_mask: .*int32"),
    ({"backend": None}, VALUE, "backend: .*None"),
    # Layouts and masks of other libraries
    ({"mask": torch.ones(2, 7, dtype=torch.int64)}, VALUE, "mask: .*key_padding_mask=.* == 0"),
    (
        {"key_padding_mask": torch.ones(2, 7, dtype=torch.int64)},
        VALUE,
        "key_padding_mask: .*True = padding.*attention_mask == 0",
    ),
    (
        {"mask": torch.ones(2, 7, dtype=torch.bool)},
        VALUE,
        r"mask: .*key_padding_mask=~mask.*mask\[:, None, None, :\]",
    ),
    ({"mask": torch.ones(2, 5, 7, dtype=torch.bool)}, VALUE, r"mask: .*pass mask\[:, None\]"),
    ({"bias": randn(2, 5, 7)}, VALUE, r"bias: .*pass bias\[:, None\]"),
    (
        {"query": randn(2, 5, 4, 8), "key": randn(2, 7, 2, 8), "value": randn(2, 7, 2, 8)},
        VALUE,
        r"key: .*\[B, S, H, D\].*transpose\(1, 2\)",
    ),
    (
        {name: x.transpose(1, 2) for name, x in self_attention().items()}
        | {"mask": torch.ones(5, 5, dtype=torch.bool)},
        VALUE,
        r"mask: .*\[B, S, H, D\].*transpose\(1, 2\)",
    ),
    ({"is_causal": True}, TYPE, 'is_causal: .*keyword of .*causal="top_left"'),
    ({"enable_gqa": True}, TYPE, "enable_gqa: .*fewer heads as they are"),
    ({"attn_mask": torch.ones(5, 7, dtype=torch.bool)}, TYPE, "attn_mask: .*mask .*or bias"),
    ({"attention_mask": None}, TYPE, "attention_mask: .*key_padding_mask="),
    ({"softmax_scale": 1.0}, TYPE, "softmax_scale: .*use scale"),
    ({"sinkz": None}, TYPE, "sinkz: .*use sinks"),
    ({"colour": None}, TYPE, "colour: expected a keyword of .*, got one that it does not have$"),
    *(
        (
            {name: on(device, *x.shape) for name, x in qkv().items()},
            NotImplementedError,
            rf"(?s)device {device}(:0)?: only cpu.*reference: device {device}",
        )
        for device in ("mps", "xpu")
    ),
]
ATTENTION_PACKED = [
    ({"cu_seqlens_k": None}, VALUE, "cu_seqlens_k: .*a tensor"),
    ({"cu_seqlens_q": torch.tensor([0, 2, 6])}, VALUE, "cu_seqlens_q: .*int32.*int64"),
    ({"cu_seqlens_q": torch.ones(1, 3, dtype=int32)}, VALUE, "cu_seqlens_q: .*1 dimension,"),
    ({"cu_seqlens_q": torch.ones(0, dtype=int32)}, VALUE, "cu_seqlens_q: .*empty"),
    ({"cu_seqlens_k": torch.tensor([0, 9], dtype=int32)}, VALUE, r"cu_seqlens_k: .*\(3,\).*\(2,\)"),
    ({"query": randn(1, 4, 6, 8)}, VALUE, "query: .*3 dimensions"),
    ({"max_seqlen_q": -1}, VALUE, "max_seqlen_q: .*-1"),
    ({"max_seqlen_k": 2.5}, VALUE, "max_seqlen_k: .*2.5"),
    ({"causal": True}, VALUE, 'causal: .*"top_left"'),
    ({"mask": torch.ones(1, dtype=torch.bool)}, VALUE, "mask: .*None for packed"),
    ({"bias": torch.ones(1)}, VALUE, "bias: .*None for packed"),
    (
        {"key_padding_mask": torch.ones(2, 9, dtype=torch.bool)},
        VALUE,
        "key_padding_mask: .*None for packed",
    ),
]
ATTENTION_PAGED = [
    ({"block_table": torch.tensor([[0, 1], [2, 3]])}, VALUE, "block_table: .*int32"),
    ({"block_table": torch.tensor([0, 1], dtype=int32)}, VALUE, "block_table: .*2 dimensions"),
    ({"block_table": torch.tensor([[0]], dtype=int32)}, VALUE, r"block_table: .*\[B, max_pages\]"),
    ({"key": randn(5, 2, 8)}, VALUE, r"key: .*\[pages, page_size, Hkv, D\]"),
    ({"key": randn(5, 4, 3, 8), "value": randn(5, 4, 3, 8)}, VALUE, "key: .*divides query's 4"),
]


def attention_rows():
    for valid, table in (
        (qkv(), ATTENTION),
        (PACKED, ATTENTION_PACKED),
        (PAGED, ATTENTION_PAGED),
    ):
        for changes, error, message in table:
            for surface in ("attention", "explain"):
                call = functools.partial(getattr(fa, surface), **valid | changes)
                yield Row(surface, call, error, message)


# -- scaled_dot_product_attention --------------------------------------------------------


def torch_sdpa(*args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def double(*shape, dtype=torch.float64):
    return randn(*shape, dtype=dtype)


def sdpa_qkv(*changes):
    tensors = [double(1, 2, 3, 4), double(1, 2, 5, 4), double(1, 2, 5, 4)]
    return [change if change is not None else x for x, change in zip(tensors, changes, strict=True)]


# Values: arguments, keywords, a pattern of the message. PyTorch refuses these calls as well.
SDPA = {
    "mask and is_causal": (
        [*sdpa_qkv(None, None, None), double(3, 5)],
        {"is_causal": True},
        "Explicit attn_mask should not be set when is_causal=True",
    ),
    "CausalBias and is_causal": (
        [*sdpa_qkv(None, None, None), causal_upper_left(3, 5)],
        {"is_causal": True},
        "is_causal",
    ),
    "CausalBias of other lengths": (
        [*sdpa_qkv(None, None, None), causal_lower_right(4, 5)],
        {},
        r"\(3, 5\).*\(4, 5\)",
    ),
    "dtypes differ": (
        sdpa_qkv(None, double(1, 2, 5, 4).float(), None),
        {},
        "key.*float64.*float32",
    ),
    "integers": ([x.int() for x in sdpa_qkv(None, None, None)], {}, "query.*int32"),
    "one dimension": (sdpa_qkv(double(4), None, None), {}, "query.*at least 2 dimensions"),
    "devices differ": (sdpa_qkv(None, double(1, 2, 5, 4).to("meta"), None), {}, "key.*device"),
    "head_dim differs": (sdpa_qkv(None, double(1, 2, 5, 6), None), {}, "key.*head_dim 4"),
    "lengths differ": (sdpa_qkv(None, None, double(1, 2, 6, 4)), {}, "value"),
    "batches do not broadcast": (
        [double(3, 2, 3, 4), double(2, 2, 5, 4), double(2, 2, 5, 4)],
        {},
        "broadcast",
    ),
    "heads without enable_gqa": (sdpa_qkv(double(1, 8, 3, 4), None, None), {}, "enable_gqa=True"),
    "heads do not divide": (
        sdpa_qkv(double(1, 3, 3, 4), None, None),
        {"enable_gqa": True},
        "divides",
    ),
    "heads of value do not divide": (
        sdpa_qkv(double(1, 4, 3, 4), None, double(1, 3, 5, 4)),
        {"enable_gqa": True},
        "value.*divide",
    ),
    "integer mask": (
        [*sdpa_qkv(None, None, None), torch.ones(3, 5).int()],
        {},
        r"attn_mask: .*int32.*attention_mask\.bool\(\)",
    ),
    "mask of a narrower dtype": (
        [*sdpa_qkv(None, None, None), double(3, 5, dtype=torch.bfloat16)],
        {},
        "attn_mask.*bfloat16",
    ),
    "mask does not broadcast": ([*sdpa_qkv(None, None, None), double(3, 4)], {}, r"\(3, 4\)"),
    "mask enlarges": ([*sdpa_qkv(None, None, None), double(3, 2, 3, 5)], {}, r"\(3, 2, 3, 5\)"),
    "mask of too many dimensions": (
        [*sdpa_qkv(None, None, None), double(1, 1, 2, 3, 5)],
        {},
        "at most 4 dimensions",
    ),
    "mask does not broadcast to 5-D": (
        [double(2, 3, 1, 4, 8)] * 3 + [double(3, 3, 1, 4, 4)],
        {},
        "leading dimensions",
    ),
    "dropout above 1": (sdpa_qkv(None, None, None), {"dropout_p": 1.5}, "dropout_p.*1.5"),
    "scale is no number": (sdpa_qkv(None, None, None), {"scale": "a"}, "scale.*str"),
    "is_causal is no bool": (sdpa_qkv(None, None, None), {"is_causal": 1}, "is_causal.*int"),
    "key is no tensor": (sdpa_qkv(None, 3, None), {}, "key.*int"),
    "mask of another device": (
        [*sdpa_qkv(None, None, None), double(3, 5).to("meta")],
        {},
        "mask: .*device cpu.*meta|bias: .*device cpu.*meta",
    ),
    "float8": ([x.to(torch.float8_e5m2) for x in sdpa_qkv(None, None, None)], {}, "query.*e5m2"),
    "booleans": ([x > 0 for x in sdpa_qkv(None, None, None)], {}, "query.*torch.bool"),
}
SDPA_MORE = [
    (sdpa_qkv(None, None, None), {"dropout_p": -0.1}, "dropout_p"),  # torch raises in MATH only
    (sdpa_qkv(None, None, None), {"scale": float("nan")}, "scale"),  # torch gives NaN or 0
    ([double(3, 4), double(5, 4), double(5, 4)], {"enable_gqa": True}, "at least 3 dimensions"),
    ([double(1, 2, 3, 4, dtype=torch.complex64)] * 3, {}, "query.*complex64"),  # torch conjugates
    ([on("xpu", 1, 2, 3, 4)] * 3, {}, "device xpu"),
]


def sdpa_rows():
    ours = fa.scaled_dot_product_attention
    for name, (arguments, options, message) in SDPA.items():
        yield Row(
            "scaled_dot_product_attention",
            functools.partial(ours, *arguments, **options),
            Exception,
            message,
            functools.partial(torch_sdpa, *arguments, **options),
            name,
        )
    for arguments, options, message in SDPA_MORE:
        error = NotImplementedError if "device" in message else VALUE
        call = functools.partial(ours, *arguments, **options)
        yield Row("scaled_dot_product_attention", call, error, message)


# -- masked_softmax and the Megatron names -----------------------------------------------

X = torch.zeros(2, 3, 4, 5)
FLOAT8 = torch.float8_e4m3fn


MASKED_SOFTMAX = {
    "input: expected a torch.Tensor": lambda: fa.masked_softmax([1.0]),
    "input: expected a dtype": lambda: fa.masked_softmax(X.long()),
    "input: expected 1 to 17 dim": lambda: fa.masked_softmax(torch.tensor(1.0)),
    "input: expected a dense": lambda: fa.masked_softmax(torch.zeros(2, 2).to_sparse()),
    "mask: expected a torch.Tensor": lambda: fa.masked_softmax(X, 3),
    "mask: expected bool": lambda: fa.masked_softmax(X, torch.ones(5, dtype=torch.uint8)),
    r"mask: expected a shape .* \(2, 3, 4, 5\), got \(4,\)": lambda: fa.masked_softmax(
        X, torch.ones(4).bool()
    ),
    "mask: expected a shape": lambda: fa.masked_softmax(X, torch.ones(1, 2, 3, 4, 5).bool()),
    "mask: expected device": lambda: fa.masked_softmax(X, torch.empty(5, device="meta")),
    "scale: expected a number, got str": lambda: fa.masked_softmax(X, scale="1"),
    "scale: expected a finite number, got nan": lambda: fa.masked_softmax(X, scale=math.nan),
    "causal: expected .* differ": lambda: fa.masked_softmax(X, causal=True),
    "causal: expected False": lambda: fa.masked_softmax(X, causal="up"),
    "dropout_p: expected a prob": lambda: fa.masked_softmax(X, dropout_p=1.5),
    "dropout_p: expected a number": lambda: fa.masked_softmax(X, dropout_p=None),
    r"sinks: expected shape \[H\] = \(3,\)": lambda: fa.masked_softmax(X, sinks=torch.zeros(4)),
    "sinks: expected a floating": lambda: fa.masked_softmax(X, sinks=torch.zeros(3).long()),
    "input: expected .* with sinks": lambda: fa.masked_softmax(X[0, 0], sinks=torch.zeros(3)),
    "philox_seed: expected 64 bits": lambda: fa.masked_softmax(X, philox_seed=2**64),
    "philox_seed: expected an int": lambda: fa.masked_softmax(X, philox_seed=1.0),
    "input: expected a dtype .*float8_e4m3fn": lambda: fa.masked_softmax(X.to(FLOAT8)),
    "input: expected a dtype .*complex64": lambda: fa.masked_softmax(X.to(torch.complex64)),
    "input: expected a dtype .*bool": lambda: fa.masked_softmax(X > 0),
    "mask: expected bool .*complex64": lambda: fa.masked_softmax(X, X.to(torch.complex64)),
    "mask: expected bool .*float8_e4m3fn": lambda: fa.masked_softmax(X, X.to(FLOAT8)),
    "scale: expected a finite number, got inf": lambda: fa.masked_softmax(X, scale=math.inf),
    "scale: expected a number, got Tensor": lambda: fa.masked_softmax(X, scale=torch.tensor(1.0)),
    "sinks: expected a floating.*float8": lambda: fa.masked_softmax(
        X, sinks=torch.zeros(3).to(FLOAT8)
    ),
    "sinks: expected device": lambda: fa.masked_softmax(X, sinks=torch.empty(3, device="meta")),
    "dropout_p: expected a prob.*nan": lambda: fa.masked_softmax(X, dropout_p=math.nan),
    r"philox_seed: expected shape \[2\]": lambda: fa.masked_softmax(
        X, dropout_p=0.5, philox_seed=torch.zeros(3).long()
    ),
    r"masked_softmax: no backend serves(.|\n)*device xpu": lambda: fa.masked_softmax(
        on("xpu", 2, 3)
    ),
}
OVERLAPPING = "input: expected memory of its own for each element"
MASKED_SOFTMAX_ = {
    "input: expected no requires_grad": lambda: fa.masked_softmax_(X.clone().requires_grad_()),
    "mask: expected no requires_grad": lambda: fa.masked_softmax_(
        X.clone(), torch.zeros(5, requires_grad=True)
    ),
    "input: expected memory": lambda: fa.masked_softmax_(torch.zeros(1, 5).expand(3, 5)),
    "mask: expected memory apart": lambda: [x := X.clone(), fa.masked_softmax_(x, x[0])],
    "sinks: expected no requires_grad": lambda: fa.masked_softmax_(
        X.clone(), sinks=torch.zeros(3, requires_grad=True)
    ),
    f"{OVERLAPPING}, got an expanded": lambda: fa.masked_softmax_(torch.zeros(5, 1).expand(5, 3)),
    f"{OVERLAPPING}, got strides .1, 1.": lambda: fa.masked_softmax_(
        torch.zeros(9).as_strided((3, 4), (1, 1))
    ),
    f"{OVERLAPPING}, got strides .2, 1.": lambda: fa.masked_softmax_(
        torch.zeros(9).unfold(0, 3, 2)
    ),
    "sinks: expected memory apart": lambda: [
        x := X.clone(),
        fa.masked_softmax_(x, sinks=x[0, :, 0, 0]),
    ],
    "input: expected a dtype .*int64": lambda: fa.masked_softmax_(X.long()),
    r"mask: expected a shape .*got \(4,\)": lambda: fa.masked_softmax_(
        X.clone(), torch.ones(4).bool()
    ),
    r"masked_softmax: no backend serves(.|\n)*device mps": lambda: fa.masked_softmax_(
        on("mps", 2, 3)
    ),
}


def messages_and_calls(surface, table):
    """Yields the rows of a table whose keys are the messages."""
    for message, call in table.items():
        error = NotImplementedError if "no backend serves" in message else (VALUE, TYPE)
        yield Row(surface, call, error, message)


# For all three functions, and for the classes that replace the originals' autograd functions.
MEGATRON = {
    "input: expected a dtype .*int64": lambda f: f(X.long()),
    "input: expected a dtype .*float8_e4m3fn": lambda f: f(X.to(FLOAT8)),
    "input: expected a dtype .*complex64": lambda f: f(X.to(torch.complex64)),
    "input: expected a torch.Tensor, got list": lambda f: f([[1.0]]),
    "scale: expected a finite number, got nan": lambda f: f(X, scale=math.nan),
    "scale: expected a number, got str": lambda f: f(X, scale="1"),
    "scale: expected a number, got Tensor": lambda f: f(X, scale=torch.ones(2)),
}
MEGATRON_MASK = {
    "mask: expected bool or uint8.*float32": lambda f: f(X, X, 1.0),
    "mask: expected a torch.Tensor, got list": lambda f: f(X, [[True]], 1.0),
    r"mask: expected a shape .*got \(4,\)": lambda f: f(X, torch.ones(4).bool(), 1.0),
}


def megatron_rows():
    functions = {
        "scaled_softmax": fa.scaled_softmax,
        "scaled_upper_triang_masked_softmax": fa.scaled_upper_triang_masked_softmax,
        "scaled_masked_softmax": fa.scaled_masked_softmax,
        "ScaledSoftmax": fa.ScaledSoftmax.apply,
        "ScaledUpperTriangMaskedSoftmax": fa.ScaledUpperTriangMaskedSoftmax.apply,
        "ScaledMaskedSoftmax": fa.ScaledMaskedSoftmax.apply,
    }
    for name, function in functions.items():
        has_mask = "upper" not in name.lower() and "masked" in name.lower()
        unmasked = functools.partial(function, mask=None) if has_mask else function
        for message, call in MEGATRON.items():
            yield Row(name, functools.partial(call, unmasked), (VALUE, TYPE), message)
        for message, call in MEGATRON_MASK.items() if has_mask else ():
            yield Row(name, functools.partial(call, function), (VALUE, TYPE), message)


# -- MultiheadAttention ------------------------------------------------------------------

CONSTRUCTION = {
    "embed_dim and num_heads must be greater than 0": (0, 1),
    "embed_dim=24 and num_heads=0": (24, 0),
    "num_heads=-1": (24, -1),
    "embed_dim must be divisible by num_heads": (10, 3),
}
# Values: the inputs and keywords of a call that the original refuses too. The first word of a key
# names the argument, directly or by NAMED.
MODULE_CALLS = {
    "query 4-D": (lambda x: (x[None], x, x), {}),
    "key 2-D": (lambda x: (x, x[0], x), {}),
    "embed_dim": (lambda x: (x[..., 1:], x, x), {}),
    "kdim": (lambda x: (x, x[..., 1:], x[..., 1:]), {}),
    "value length": (lambda x: (x, x, x[1:]), {}),
    "batch": (lambda x: (x, x[:, 1:], x[:, 1:]), {}),
    "padding 1-D": (lambda x: (x, x, x), {"key_padding_mask": torch.zeros(L).bool()}),
    "padding shape": (lambda x: (x, x, x), {"key_padding_mask": torch.zeros(N, L + 1).bool()}),
    "padding batch": (lambda x: (x, x, x), {"key_padding_mask": torch.zeros(N + 1, L).bool()}),
    "padding dtype": (lambda x: (x, x, x), {"key_padding_mask": torch.zeros(N, L).int()}),
    "mask shape": (lambda x: (x, x, x), {"attn_mask": torch.zeros(L, L + 1).bool()}),
    "mask 3-D shape": (lambda x: (x, x, x), {"attn_mask": torch.zeros(N, L, L).bool()}),
    "mask 4-D": (lambda x: (x, x, x), {"attn_mask": torch.zeros(N, HEADS, L, L).bool()}),
    "mask dtype": (lambda x: (x, x, x), {"attn_mask": torch.zeros(L, L).int()}),
    "query dtype": (lambda x: (x.float(), x.float(), x.float()), {}),
    "value dtype": (lambda x: (x, x, x.half()), {}),
    "key device": (lambda x: (x, x.to("meta"), x), {}),
    "key_padding_mask complex": (
        lambda x: (x, x, x),
        {"key_padding_mask": torch.zeros(N, L, dtype=torch.complex64)},
    ),
    "attn_mask float8": (lambda x: (x, x, x), {"attn_mask": torch.zeros(L, L).to(FLOAT8)}),
}
NAMED = {"query": "query", "embed_dim": "query", "key": "key", "kdim": "key", "batch": "key"}
NAMED |= {"value": "value", "padding": "key_padding_mask", "mask": "attn_mask"}
LAYERS = {
    "activation should be relu/gelu": {"activation": "tanh"},
    "divisible by num_heads": {"nhead": 5},
    "greater than 0": {"nhead": 0},
}


def module_rows():
    kinds = ("TransformerEncoderLayer", "TransformerDecoderLayer")
    for kind, (message, options) in itertools.product(kinds, LAYERS.items()):
        ours, theirs = (
            functools.partial(getattr(of, kind), E, **{"nhead": HEADS} | options) for of in (fa, nn)
        )
        yield Row(kind, ours, Exception, message, theirs, "construction")
    for message, arguments in CONSTRUCTION.items():
        ours = functools.partial(fa.MultiheadAttention, *arguments)
        theirs = functools.partial(nn.MultiheadAttention, *arguments)
        yield Row("MultiheadAttention", ours, Exception, message, theirs, "construction")
    theirs, ours = pair()
    x = sequence(L)
    for (name, (inputs, options)), need_weights in itertools.product(
        MODULE_CALLS.items(), (False, True)
    ):
        first = name.split()[0]
        options = options | {"need_weights": need_weights}
        yield Row(
            "MultiheadAttention",
            functools.partial(ours, *inputs(x), **options),
            Exception,
            NAMED.get(first, f"{first}: expected"),
            functools.partial(theirs, *inputs(x), **options),
            f"{name}, need_weights={need_weights}",
        )
    for need_weights in (False, True):  # torch.nn accepts it without need_weights
        mask = torch.zeros(L, L, device="meta")
        call = functools.partial(ours, x, x, x, attn_mask=mask, need_weights=need_weights)
        yield Row("MultiheadAttention", call, VALUE, "attn_mask: expected device cpu.*meta")
    for dropout, need_weights in itertools.product((1.5, -0.1, math.nan), (False, True)):
        ours = fa.MultiheadAttention(E, HEADS, dropout=dropout)
        call = functools.partial(ours, *(sequence(L).float(),) * 3, need_weights=need_weights)
        message = rf"dropout: expected a probability in \[0, 1\], got {dropout}"
        yield Row("MultiheadAttention", call, ValueError, message)
    for position, name in enumerate(("query", "key", "value")):
        arguments = [x, x, x]
        arguments[position] = None
        call = functools.partial(pair()[1], *arguments)
        yield Row(
            "MultiheadAttention", call, TYPE, f"{name}: expected a torch.Tensor, got NoneType"
        )
    for module, kind in ((nn.Linear(1, 1), "Linear"), (3, "int"), (ours, "MultiheadAttention")):
        call = functools.partial(fa.MultiheadAttention.from_torch, module)
        yield Row("MultiheadAttention", call, TYPE, f"module: expected a torch.nn.Mult.*{kind}")


# -- replace_multihead_attention, patch_sdpa and record_calls -----------------------------


def patching_rows():
    for model, kind in ((None, "NoneType"), ("bert", "str"), (nn.Linear, "type")):
        call = functools.partial(fa.replace_multihead_attention, model)
        message = f"model: expected a torch.nn.Module, got {kind}"
        yield Row("replace_multihead_attention", call, TYPE, message)
    for modules, error, message in (
        ([sys], VALUE, "modules: expected .*scaled_dot_product_attention, got sys"),
        ([types.ModuleType("empty")], VALUE, "modules: .*got empty"),
        (["torch"], TYPE, "modules: expected modules, got str"),
        (F, TYPE, "modules: expected an iterable of modules, got module"),
        (3, TYPE, "modules: expected an iterable of modules, got int"),
    ):
        yield Row("patch_sdpa", functools.partial(fa.patch_sdpa, modules), error, message)
    for missed, kind in ((None, "NoneType"), ("all", "str"), (1, "int")):
        call = functools.partial(fa.record_calls, missed=missed)
        yield Row("record_calls", call, TYPE, f"missed: expected a bool, got {kind}")


# -- dropout_mask and merge_attention_states ---------------------------------------------

DROPOUT_MASK = [
    ((1, 1, 2, 2, 1.5, 0), VALUE, r"dropout_p: .*\[0, 1\], got 1.5"),
    ((1, 1, 2, 2, math.nan, 0), VALUE, "dropout_p: .*nan"),
    ((1, 1, 2, 2, "half", 0), TYPE, "dropout_p: expected a number, got str"),
    ((1, -1, 2, 2, 0.5, 0), VALUE, "heads: expected a size >= 0, got -1"),
    ((1.5, 1, 2, 2, 0.5, 0), TYPE, "batch: expected an int, got float"),
    ((1, 1, "2", 2, 0.5, 0), TYPE, "seqlen_q: expected an int, got str"),
    ((1, 1, 2, None, 0.5, 0), TYPE, "seqlen_k: expected an int, got NoneType"),
    ((1, 1, 2, 2, 0.5, 2**64), VALUE, "philox_seed: expected 64 bits"),
    (
        (1, 1, 2, 2, 0.5, None),
        TYPE,
        "philox_seed: expected an int or an int64 tensor, got NoneType",
    ),
    ((1, 1, 2, 2, 0.5, 1.0), TYPE, "philox_seed: .*int64 tensor, got float"),
    ((1, 1, 2, 2, 0.5, torch.zeros(2)), VALUE, "philox_seed: expected dtype torch.int64"),
    ((1, 1, 2, 2, 0.5, torch.zeros(3).long()), VALUE, r"philox_seed: expected shape \[2\]"),
    (
        (1, 1, 2, 2, 0.5, torch.zeros(2, device="meta").long()),
        VALUE,
        "philox_seed: expected device cpu, got meta",
    ),
    ((1, 1, 2, 2, 0.5, 0, "abacus"), VALUE, "device: .*abacus"),
]
MERGE = [
    ([], [], None, "lses.*at least one"),
    ([randn(1, 2, 3, 4)], [], None, "lses.*1.*got 0"),
    ([randn(1, 2, 3, 4), randn(1, 2, 4, 4)], [randn(1, 2, 3)] * 2, None, r"outs\[1\]"),
    ([randn(1, 2, 3, 4)], [randn(1, 3, 2)], None, r"lses\[0\].*\(1, 2, 3\)"),
    ([randn(3, 2, 4)], [randn(3, 2)], None, r"lses\[0\].*\(2, 3\)"),
    ([randn(1, 2, 3, 4)], [randn(1, 2, 3)], randn(3), "sinks"),
    ([[1.0]], [randn(1, 2, 3)], None, r"outs\[0\]: expected a torch.Tensor, got list"),
    ([randn(1, 2, 3, 4)], [None], None, r"lses\[0\]: expected a torch.Tensor, got NoneType"),
    ([randn(1, 2, 3, 4)], [randn(1, 2, 3)], [0.0, 0.0], "sinks: expected a torch.Tensor, got list"),
    ([randn(1, 2, 3, 4).long()], [randn(1, 2, 3)], None, r"outs\[0\]: expected a dtype .*int64"),
    ([randn(1, 2, 3, 4)], [randn(1, 2, 3).long()], None, r"lses\[0\]: expected a dtype .*int64"),
]


CACHE = {
    "key_cache": torch.zeros(2, 2, 9, 5),
    "value_cache": torch.zeros(2, 2, 9, 7),
    "key": torch.zeros(2, 2, 4, 5),
    "value": torch.zeros(2, 2, 4, 7),
    "cache_seqlens": torch.zeros(2, dtype=int32),
}
# test_cache.py has more, and checks what is written then.
KV_CACHE_APPEND = [
    ({"cache_seqlens": torch.zeros(2)}, VALUE, "cache_seqlens: .*int32.*float32"),
    ({"cache_seqlens": torch.tensor([0, 6], dtype=int32)}, VALUE, "cache_seqlens: .*got 6"),
    ({"key": torch.zeros(2, 2, 4, 6)}, VALUE, "key"),
    ({"value": 1.0}, TYPE, "value: .*Tensor, got float"),
    ({"key_cache": torch.zeros(2, 2, 9, 5).half()}, VALUE, "key"),
]


def companion_rows():
    for changes, error, message in KV_CACHE_APPEND:
        call = functools.partial(fa.kv_cache_append_, **CACHE | changes)
        yield Row("kv_cache_append_", call, error, message)
    for arguments, error, message in DROPOUT_MASK:
        call = functools.partial(fa.dropout_mask, *arguments)
        yield Row("dropout_mask", call, error, message)
    for outs, lses, sinks, message in MERGE:
        call = functools.partial(fa.merge_attention_states, outs, lses, sinks)
        yield Row("merge_attention_states", call, (VALUE, TYPE), message)
    for changes, error, message in ATTENTION:
        said = {name: x for name, x in (qkv() | changes).items() if name != "value"}
        for function in (fa.attention_statistics, fa.attention_weights):
            if "value" not in changes:
                yield Row(function.__name__, functools.partial(function, **said), error, message)


# -- The table ---------------------------------------------------------------------------

ROWS = [
    *attention_rows(),
    *sdpa_rows(),
    *messages_and_calls("masked_softmax", MASKED_SOFTMAX),
    *messages_and_calls("masked_softmax_", MASKED_SOFTMAX_),
    *megatron_rows(),
    *module_rows(),
    *patching_rows(),
    *companion_rows(),
]


def identity(row):
    return f"{row.surface}: {row.name or row.message}"


@pytest.mark.parametrize("row", ROWS, ids=identity)
def test_a_wrong_call_says_what_is_wrong(row):
    error: Any = row.error
    if row.original is not None:
        with pytest.raises(Exception) as original:
            row.original()
        error = original.type
    with pytest.raises(error, match=row.message):
        row.call()


REMEMBERING = ("attention", "explain", "scaled_dot_product_attention")


@pytest.mark.parametrize("row", [row for row in ROWS if row.surface in REMEMBERING], ids=identity)
def test_also_after_valid_calls_of_the_same_kind(row):
    """Valid calls are remembered and not validated again; wrong ones must still be refused."""
    fa.attention(**qkv())
    fa.attention(**qkv(), dropout_p=0.5, philox_seed=1)
    fa.scaled_dot_product_attention(*sdpa_qkv(None, None, None))
    fa.scaled_dot_product_attention(*sdpa_qkv(None, None, None), is_causal=True)
    test_a_wrong_call_says_what_is_wrong(row)


# Commands, and a pattern of the last line that each prints to stderr.
COMMANDS = [
    ([], "command"),
    (["explain"], "--shape"),
    (["explain", "--shape", "1,8,16"], "expected four sizes B,Hq,Sq,D, got '1,8,16'"),
    (["explain", "--shape", "1,8,x,4"], "expected a size, got 'x'"),
    (["explain", "--shape", "1,8,-1,4"], "expected a size, got '-1'"),
    (["explain", "--shape", "1,8,16,64", "--dtype", "int8"], "invalid choice: 'int8'"),
    (["explain", "--shape", "1,8,16,64", "--device", "abacus"], "abacus"),
    (["explain", "--shape", "1,8,16,64", "--kv-heads", "3"], "divides query's 8, got 3"),
    (["explain", "--shape", "1,8,16,64", "--mask", "4,4"], "mask: expected a shape"),
    (["explain", "--shape", "1,8,16,64", "--backend", "cuda"], "'cuda'.*device cpu: only cuda"),
    (["explain", "--shape", "1,8,16,64", "--backend", "x"], "backend: expected auto or one of"),
    (["verify", "--quick", "--impl", "nothing"], r"expected module:function, got 'nothing'"),
    (["verify", "--quick", "--impl", "no_such_module:f"], r"cannot import 'no_such_module:f'"),
    (["verify", "--quick", "--impl", "math:nothing"], r"cannot import 'math:nothing'"),
    (["verify", "--quick", "--impl", "math:pi"], r"not callable"),
    (
        ["verify", "--quick", "--impl", "torch._C._nn:scaled_dot_product_attention"],
        r"give --signature",
    ),
    (
        ["verify", "--quick", "--impl", "math:exp", "--isa", "baseline"],
        r"without --backend and --isa",
    ),
    (["verify", "--quick", "--backend", "abacus"], r"--backend: expected one of"),
    (["verify", "--quick", "--backend", "triton"], r"cannot run here: "),
    (["verify", "--quick", "--isa", "z80"], r"--isa: expected one of"),
    (
        ["verify", "--quick", "--isa", "baseline", "--backend", "reference"],
        r"only the backend cpu has any",
    ),
    (["bench", "--impl", "nothing"], "expected module:function, got 'nothing'"),
    (["bench", "--impl", "math:pi"], "not callable"),
    (["bench", "--seconds", "soon"], "--seconds: expected a number > 0, got 'soon'"),
    (["bench", "--seconds", "-1"], "--seconds: expected a number > 0, got '-1'"),
    (["bench", "--threads", "0"], "--threads: expected numbers >= 1 such as 2 or 1,2,4, got '0'"),
    (
        ["bench", "--json", "/no/such/folder/x.json"],
        "--json: expected a file in a folder that exists",
    ),
    (
        ["verify", "--json", "/no/such/folder/x.json"],
        "--json: expected a file in a folder that exists",
    ),
    (["explain", "--shape", "1,8,16,64", "--dropout", "1.5"], "dropout_p: .*1.5"),
    (["explain", "--shape", "1,8,16,64", "--window", "-2", "3"], "window_size: .*-2"),
    (["explain", "--shape", "1,8,16,64", "--device", "xpu"], "device xpu"),
    (["nonsense"], "invalid choice: 'nonsense'"),
]


@pytest.mark.parametrize("arguments, message", COMMANDS, ids=lambda x: str(x))
def test_a_wrong_command_is_one_line_and_exit_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    assert re.search(message, captured.err.splitlines()[-1])


def test_the_table_is_long_enough_and_covers_everything_public():
    rows = Counter(row.surface for row in ROWS)
    rows.update(" ".join(arguments[:1]) for arguments, _ in COMMANDS)
    assert rows.total() >= 60
    public = set(fa.__all__) - {"ArgumentTypeError", "ArgumentValueError", "__version__"}
    assert public <= rows.keys(), public - rows.keys()
    assert min(rows[surface] for surface in public) >= 3
    assert rows["verify"] >= 3 and rows["bench"] >= 2


def test_errors_can_be_caught_as_pytorchs():
    for error, builtin in ((VALUE, ValueError), (TYPE, TypeError)):
        assert issubclass(error, builtin) and issubclass(error, RuntimeError)
