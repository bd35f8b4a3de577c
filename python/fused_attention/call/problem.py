"""The description of a call of attention: all validation, once, and one frozen record.

`Problem.from_call` checks all options of the caller (`Options`) and keeps shapes, dtypes, numbers
and the set of features in use: everything by which a backend accepts or refuses the call, and no
tensor. `arguments_of` brings a call into the form of the operators, without expanding a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import operators as ops
from ..errors import ArgumentDtypeError, describe_error, wrong_type, wrong_value
from ..operators._torch import (
    assume_constant_result,
    float32_matmul_precision,
    is_compiling,
    is_direct,
    looks_at_sizes,
    transform_is_active,
)
from ..operators.arguments import (
    BOTTOM_RIGHT_ONLY,
    CAUSAL,
    NUMBERS,
    PRECISION,
    SEQUENCES,
    TENSORS,
    Arguments,
    joined,
    joined_if_dense,
)
from ..operators.dropout import check_bits
from .options import NO_WINDOW, Options

MAX_INT64 = 2**63 - 1
MAX_FLOAT64 = int(torch.finfo(torch.float64).max)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# All that a call may use beyond softmax(scale * q k^T) v, in the order of the printed table.
FEATURES = {
    "gradients": "gradients of query, key and value",
    "mask": "boolean mask, broadcast without being expanded",
    "bias": "additive bias, broadcast without being expanded",
    "bias_gradient": "gradient of the bias",
    "key_padding_mask": "padded keys, [B, Sk]",
    "causal": "causal, top-left and bottom-right",
    "window_size": "sliding window",
    "softcap": "capped scores",
    "alibi_slopes": "ALiBi",
    "sinks": "attention sinks",
    "sinks_gradient": "gradient of the sinks",
    "dropout": "dropout inside the kernel",
    "gqa": "fewer key/value heads than query heads",
    "value_head_dim": "values wider or narrower than keys",
    "return_lse": "log-sum-exp",
    "lse_gradient": "gradient through the log-sum-exp",
    "varlen": "packed sequences (cu_seqlens)",
    "seqused_k": "used length per sequence",
    "block_table": "paged keys and values",
}


# -- Tensors as the operators take them --------------------------------------------------


@assume_constant_result
def has_autocast(device_type: str) -> bool:
    """torch.amp.is_autocast_available, which the compiler of PyTorch 2.11 cannot trace."""
    return torch.amp.is_autocast_available(device_type)


def cast_for_autocast(query: Any, *others: Any) -> tuple[Any, ...]:
    """Casts as PyTorch does: under autocast, floating tensors except float64 get its dtype."""
    tensors = (query, *others)
    if not isinstance(query, Tensor) or not has_autocast(query.device.type):
        return tensors
    if not torch.is_autocast_enabled(query.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(query.device.type)

    def cast(x: Any) -> Any:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if eligible else x

    return tuple(cast(x) for x in tensors)


def as_4d(x: Tensor | None) -> Tensor | None:
    """Returns a view of a mask or bias with four dimensions, the new ones leading and of size 1."""
    if x is None or x.dim() == 4:
        return x
    return x.view((1,) * (4 - x.dim()) + x.shape)


def as_vector(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns ALiBi slopes or sinks in `dtype`, contiguous."""
    return None if x is None else x.to(dtype).contiguous()


# -- Checks ------------------------------------------------------------------------------

# The options of `attention` that stand for keywords of other libraries.
COUNTERPARTS = {
    "is_causal": 'causal="top_left"',
    "enable_gqa": "no keyword: key and value may have fewer heads as they are",
    "attn_mask": "mask (bool, True = may attend) or bias (floating)",
    "attention_mask": "key_padding_mask=attention_mask == 0",
    "attn_bias": "bias",
    "dropout": "dropout_p",
    "softmax_scale": "scale",
    "scaling": "scale",
    "logits_soft_cap": "softcap",
    "sliding_window": "window_size=(sliding_window - 1, 0)",
    "s_aux": "sinks",
}


def refuse_keyword(name: str, function: str) -> NoReturn:
    """Raises ArgumentTypeError for a keyword that `function` does not have."""
    import difflib

    near = difflib.get_close_matches(name, Options._fields, 1)
    hint = COUNTERPARTS.get(name) or (near[0] if near else "")
    expected = f"a keyword of {function}()"
    wrong_type(name, expected, "one that it does not have", f"use {hint}" if hint else "")


def shape_of(x: Tensor) -> str:
    return str(tuple(x.shape))


def check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        wrong_type(name, "a torch.Tensor", type(x).__name__)
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor" if x.is_nested else str(x.layout)
        wrong_value(name, "a dense strided tensor", kind, "pad it, or convert it with to_dense()")


def check_same_device(name: str, x: Tensor, query: Tensor) -> None:
    if x.device != query.device:
        wrong_value(name, f"device {query.device}, as query has", x.device)


def check_dtype(name: str, x: Tensor, dtype: torch.dtype, hint: str = "") -> None:
    if x.dtype != dtype:
        wrong_value(name, f"dtype {dtype}", x.dtype, hint)


def check_shape(name: str, x: Tensor, meaning: str, *shapes: tuple[int, ...]) -> None:
    """Raises unless x has one of `shapes`, which `meaning` gives in letters."""
    if not any(x.dim() == len(shape) and tuple(x.shape) == shape for shape in shapes):
        numbers = " or ".join(str(shape) for shape in shapes)
        wrong_value(name, f"shape {meaning} = {numbers}", shape_of(x))


def check_broadcastable(
    name: str, x: Tensor, target: tuple[int, int, int, int], heads_kv: int
) -> None:
    fits = x.dim() <= 4
    for size, full in zip(reversed(x.shape), reversed(target), strict=False):
        fits = fits and (size == 1 or size == full)
    if not fits:
        expected = f"a shape that broadcasts to [B, Hq, Sq, Sk] = {target}"
        wrong_value(name, expected, shape_of(x), mask_shape_hint(name, x, target, heads_kv))


BSHD_HINT = "if query, key and value are [B, S, H, D], pass their transpose(1, 2)"


def mask_dtype_hint(mask: Tensor) -> str:
    """Says how a mask of another dtype than bool can be passed."""
    if mask.is_floating_point():
        return "pass additive masks as bias"
    if mask.dim() == 2:
        return (
            "use mask.bool(); but Hugging Face's attention_mask [B, Sk], 1 for a token, becomes"
            " key_padding_mask=attention_mask == 0"
        )
    return "use mask.bool()"


def mask_shape_hint(name: str, x: Tensor, scores: tuple[int, ...], heads_kv: int) -> str:
    """Guesses from the shape of a mask or bias which dimension is missing or out of place."""
    B, Hq, Sq, Sk = scores
    shape = tuple(x.shape)
    if name == "mask" and shape == (B, Sk):
        return "pass key_padding_mask=~mask, where True = padding, or mask[:, None, None, :]"
    if shape == (B, Sq, Sk):
        return f"pass {name}[:, None], with a dimension for the heads"
    return BSHD_HINT if shape[-2:] == (Hq, heads_kv) else ""


def check_number(name: str, x: Any, hint: str = "") -> None:
    if isinstance(x, Tensor) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        wrong_type(name, "a number", type(x).__name__, hint)
    if isinstance(x, int) and not -MAX_FLOAT64 <= x <= MAX_FLOAT64:
        wrong_value(name, "a number that a float64 can hold", f"an int of {x.bit_length()} bits")


def check_query_key_value(query: Any, key: Any, value: Any) -> None:
    """Checks kind, dtype and device; the shapes differ between dense, packed and paged calls."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
        if x.dtype not in DTYPES:
            allowed = ", ".join(str(dtype) for dtype in DTYPES)
            expected = f"a dtype out of {allowed}"
            raise ArgumentDtypeError(describe_error(name, expected, x.dtype, "cast it first"))
        if x.dtype != query.dtype:
            wrong_value(name, f"dtype {query.dtype}, as query has", x.dtype, "cast to one dtype")
        check_same_device(name, x, query)


def check_dense_shapes(query: Tensor, key: Tensor, value: Tensor, paged: bool) -> None:
    """Checks for [B, H, S, D], and paged keys and values for [pages, page_size, Hkv, D or Dv]."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            layout = "[pages, page_size, Hkv, D]" if paged and name != "query" else "[B, H, S, D]"
            hint = "packed sequences [T, H, D] need cu_seqlens_q" if x.dim() == 3 else ""
            wrong_value(name, f"4 dimensions {layout}", f"{x.dim()}: {shape_of(x)}", hint)
    if paged:
        return
    if key.shape[0] != query.shape[0]:
        wrong_value(
            "key", f"batch size {query.shape[0]}, as query has", key.shape[0], "expand() is free"
        )


def check_key_value_shapes(query: Tensor, key: Tensor, value: Tensor, heads_dim: int) -> None:
    if key.shape[-1] != query.shape[-1]:
        expected = f"head_dim {query.shape[-1]}, as query {shape_of(query)} has"
        wrong_value("key", expected, f"{key.shape[-1]}: {shape_of(key)}")
    if value.shape[:-1] != key.shape[:-1]:
        expected = f"all but the last size as in key {shape_of(key)}"
        wrong_value("value", expected, shape_of(value))
    heads_q, heads_kv = query.shape[1], key.shape[heads_dim]
    if heads_q != heads_kv and (heads_kv == 0 or heads_q % heads_kv != 0):
        fits = query.dim() == 4 and query.shape[2] % max(key.shape[3 - heads_dim], 1) == 0
        hint = BSHD_HINT if fits else ""
        wrong_value("key", f"a number of heads that divides query's {heads_q}", heads_kv, hint)


# The members of torch.nn.attention.bias.CausalVariant, a module that takes a second to import.
_VARIANTS = {"UPPER_LEFT": "top_left", "LOWER_RIGHT": "bottom_right"}


def causal_number(causal: Any, same_lengths: bool, diagonal: Any = None) -> int:
    """Returns the number that stands for `causal` and `diagonal` together."""
    if type(causal).__name__ == "CausalVariant":
        causal = _VARIANTS[causal.name]
    if diagonal is not None:
        if diagonal not in _VARIANTS.values():
            wrong_value("diagonal", 'None, "top_left" or "bottom_right"', repr(diagonal))
        if causal in _VARIANTS.values() and causal != diagonal:
            wrong_value("diagonal", f"None or {causal!r}, as causal says", repr(diagonal))
        if causal is False:
            return CAUSAL[False] if diagonal == "top_left" else BOTTOM_RIGHT_ONLY
        if causal is True:
            causal = diagonal
    if isinstance(causal, (bool, int, str)) and causal in CAUSAL:
        return CAUSAL[causal]
    if isinstance(causal, int) and causal == 1:
        if same_lengths:
            return CAUSAL["top_left"]
        wrong_value(
            "causal",
            '"top_left" or "bottom_right" where query and key lengths differ or may differ',
            True,
            '"top_left" is what scaled_dot_product_attention does, '
            '"bottom_right" what flash_attn does and what a key/value cache needs',
        )
    wrong_value("causal", 'False, True, "top_left" or "bottom_right"', repr(causal))


def as_float(x: Any) -> Any:
    return float(x) if isinstance(x, int) else x


def as_int64(x: Any) -> Any:
    """Clamps a number of tokens to the 64 bits that the operators take."""
    return min(x, MAX_INT64) if isinstance(x, int) else x


def window_numbers(window_size: Any) -> tuple[int, int]:
    """Returns (left, right), clamped: a window wider than any sequence hides nothing."""
    if isinstance(window_size, Sequence) and len(window_size) == 2:
        left, right = window_size
        if all(isinstance(x, (int, torch.SymInt)) and x >= -1 for x in (left, right)):
            return as_int64(left), as_int64(right)
    wrong_value("window_size", "(left, right) in tokens, each an int >= -1", repr(window_size))


def precision_number(precision: Any, dtype: torch.dtype) -> int:
    if precision is not None and precision not in PRECISION:
        wrong_value("precision", f"None or one of {', '.join(PRECISION)}", repr(precision))
    if dtype != torch.float32:
        return PRECISION["highest"]
    return PRECISION[precision or float32_matmul_precision()]


def check_lengths(name: str, x: Any, query: Tensor, dim: int) -> None:
    """Checks an int32 tensor of sequence lengths, offsets or page numbers."""
    check_tensor(name, x)
    check_dtype(name, x, torch.int32, "to(torch.int32)")
    check_same_device(name, x, query)
    if x.dim() != dim:
        wrong_value(name, f"{dim} dimension{'s' * (dim > 1)}", f"{x.dim()}: {shape_of(x)}")


def check_philox_seed(philox_seed: Any, device: torch.device) -> Any:
    """Checks for None, 64 bits as an int, or (seed, offset) as an int64 tensor; returns it."""
    if isinstance(philox_seed, Tensor):
        check_dtype("philox_seed", philox_seed, torch.int64)
        check_shape("philox_seed", philox_seed, "[2] (seed, offset)", (2,))
        if philox_seed.device != device:
            wrong_value("philox_seed", f"device {device}", philox_seed.device)
    elif philox_seed is not None:
        if not isinstance(philox_seed, (int, torch.SymInt)):
            wrong_type("philox_seed", "an int or an int64 tensor", type(philox_seed).__name__)
        check_bits(philox_seed)
    return philox_seed


# -- The record --------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A valid call. If packed, seqlen_* are max_seqlen_*, or the tokens of all sequences."""

    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: torch.device
    numbers: Arguments  # the tensors among them are None
    return_lse: bool
    features: frozenset[str]
    differentiable: bool  # goes through the autograd.Function: gradients or a transform are on
    is_direct: bool  # see `is_direct`
    copied: dict[str, int]  # inputs whose last stride is not 1, and their bytes

    @property
    def head_dims(self) -> dict[str, int]:
        return {"query": self.head_dim, "value": self.head_dim_v}

    @property
    def is_plain(self) -> bool:
        """Whether attention_forward_plain serves it: no optional tensor, softcap, dropout or lse,
        and not a part of a larger call."""
        small = {"gradients", "causal", "window_size", "gqa", "value_head_dim"}
        return self.features <= small and not any(self.numbers.starts())

    @staticmethod
    @looks_at_sizes
    def from_call(query: Tensor, key: Tensor, value: Tensor, o: Options) -> Problem:
        """Checks the arguments of `attention()`, which says what they mean.

        Raises ArgumentTypeError for an argument of the wrong kind and ArgumentValueError for a
        shape, dtype, device or value; the message names the argument.
        """
        check_query_key_value(query, key, value)
        packed, paged = o.cu_seqlens_q is not None, o.block_table is not None
        heads_dim = 2 if paged else 1

        # Sizes
        if packed:
            for name, x in (("query", query), ("key", key), ("value", value)):
                rank = 4 if paged and name != "query" else 3
                if x.dim() != rank:
                    got = f"{x.dim()}: {shape_of(x)}"
                    wrong_value(name, f"{rank} dimensions where cu_seqlens_q is given", got)
            check_lengths("cu_seqlens_q", o.cu_seqlens_q, query, 1)
            batch = o.cu_seqlens_q.shape[0] - 1  # type: ignore[union-attr]
            if batch < 0:
                wrong_value("cu_seqlens_q", "[B + 1] offsets, the first is 0", "an empty tensor")
        else:
            check_dense_shapes(query, key, value, paged)
            batch = query.shape[0]
        check_key_value_shapes(query, key, value, heads_dim)
        if o.cu_seqlens_k is not None:
            check_lengths("cu_seqlens_k", o.cu_seqlens_k, query, 1)
            if not packed:
                wrong_value("cu_seqlens_k", "None without cu_seqlens_q", "a tensor")
            check_shape("cu_seqlens_k", o.cu_seqlens_k, "[B + 1], as cu_seqlens_q", (batch + 1,))
        elif packed and not paged:
            wrong_value("cu_seqlens_k", "a tensor, since cu_seqlens_q is one", None)
        for name, length in (("max_seqlen_q", o.max_seqlen_q), ("max_seqlen_k", o.max_seqlen_k)):
            if length is not None and not (isinstance(length, (int, torch.SymInt)) and length >= 0):
                wrong_value(name, "None or an int >= 0", repr(length))
        if o.seqused_k is not None:
            check_lengths("seqused_k", o.seqused_k, query, 1)
            check_shape("seqused_k", o.seqused_k, "[B]", (batch,))
        if o.block_table is not None:
            check_lengths("block_table", o.block_table, query, 2)
            check_shape(
                "block_table", o.block_table, "[B, max_pages]", (batch, o.block_table.shape[1])
            )
        heads_q, head_dim = query.shape[1], query.shape[-1]
        heads_kv, head_dim_v = key.shape[heads_dim], value.shape[-1]
        seqlen_q = query.shape[2] if not packed else o.max_seqlen_q or query.shape[0]
        if o.block_table is not None:
            seqlen_k = o.block_table.shape[1] * key.shape[1]
        else:
            seqlen_k = key.shape[2] if not packed else o.max_seqlen_k or key.shape[0]

        # Options that are tensors
        scores = (batch, heads_q, seqlen_q, seqlen_k)
        for name, option in (
            ("mask", o.mask),
            ("bias", o.bias),
            ("key_padding_mask", o.key_padding_mask),
            ("alibi_slopes", o.alibi_slopes),
            ("sinks", o.sinks),
        ):
            if option is not None:
                check_tensor(name, option)
                check_same_device(name, option, query)
                if packed and name in ("mask", "bias", "key_padding_mask"):
                    wrong_value(name, "None for packed sequences (cu_seqlens_q)", "a tensor")
        if o.mask is not None:
            hint = f"True = may attend; {mask_dtype_hint(o.mask)}"
            check_dtype("mask", o.mask, torch.bool, hint)
            check_broadcastable("mask", o.mask, scores, heads_kv)
        if o.bias is not None:
            if o.bias.dtype not in DTYPES:
                hint = "pass boolean masks as mask" if o.bias.dtype == torch.bool else "cast it"
                wrong_value("bias", "a floating dtype", o.bias.dtype, hint)
            check_broadcastable("bias", o.bias, scores, heads_kv)
        if o.key_padding_mask is not None:
            hint = "True = padding"
            if not o.key_padding_mask.is_floating_point():
                hint += "; Hugging Face's attention_mask, 1 for a token, is attention_mask == 0"
            check_dtype("key_padding_mask", o.key_padding_mask, torch.bool, hint)
            check_shape("key_padding_mask", o.key_padding_mask, "[B, Sk]", (batch, seqlen_k))
        if o.alibi_slopes is not None:
            if o.alibi_slopes.dtype not in DTYPES:
                wrong_value("alibi_slopes", "a floating dtype", o.alibi_slopes.dtype)
            check_shape(
                "alibi_slopes", o.alibi_slopes, "[Hq] or [B, Hq]", (heads_q,), (batch, heads_q)
            )
            if torch.is_grad_enabled() and o.alibi_slopes.requires_grad:
                hint = "detach() it, or pass the biases of learned slopes as bias"
                wrong_value("alibi_slopes", "no requires_grad", "a tensor that requires it", hint)
        if o.sinks is not None:
            if o.sinks.dtype not in DTYPES:
                wrong_value("sinks", "a floating dtype", o.sinks.dtype)
            check_shape("sinks", o.sinks, "[Hq]", (heads_q,))

        # Options that are numbers
        same_lengths = (
            not paged
            and o.seqused_k is None
            and (o.cu_seqlens_q is o.cu_seqlens_k if packed else seqlen_q == seqlen_k)
        )
        causal = causal_number(o.causal, same_lengths, o.diagonal)
        window_left, window_right = window_numbers(o.window_size)
        scale = o.scale
        if scale is None:
            scale = head_dim**-0.5 if head_dim else 1.0
        check_number("scale", scale, "a learned scale can be multiplied into query")
        if not float("-inf") < scale < float("inf"):
            wrong_value("scale", "a finite number", scale)
        check_number("softcap", o.softcap)
        if not 0.0 <= o.softcap < float("inf"):
            wrong_value("softcap", "a number of logits >= 0, 0 for none", o.softcap)
        check_number("dropout_p", o.dropout_p)
        if not 0.0 <= o.dropout_p <= 1.0:
            wrong_value("dropout_p", "a probability in [0, 1]", o.dropout_p)
        check_philox_seed(o.philox_seed, query.device)
        for name in ("q_start", "k_start", "head_start"):
            if not 0 <= getattr(o, name) < 2**30:
                wrong_value(name, "0 to 2^30", getattr(o, name))
        if o.dropout_p and o.k_start % 8 != 0:  # random bits are drawn for eight keys at once
            wrong_value("k_start", "a multiple of 8 with dropout", o.k_start)

        # Features in use
        grad = torch.is_grad_enabled()
        bias_gradient = grad and o.bias is not None and o.bias.requires_grad
        sinks_gradient = grad and o.sinks is not None and o.sinks.requires_grad
        qkv_gradient = grad and (query.requires_grad or key.requires_grad or value.requires_grad)
        gradients = qkv_gradient or bias_gradient or sinks_gradient
        used = {
            "gradients": gradients,
            "mask": o.mask is not None,
            "bias": o.bias is not None,
            "bias_gradient": bias_gradient,
            "key_padding_mask": o.key_padding_mask is not None,
            "causal": causal in (CAUSAL["top_left"], CAUSAL["bottom_right"]),
            "window_size": (window_left, window_right) != NO_WINDOW,
            "softcap": o.softcap != 0.0,
            "alibi_slopes": o.alibi_slopes is not None,
            "sinks": o.sinks is not None,
            "sinks_gradient": sinks_gradient,
            "dropout": o.dropout_p != 0.0,
            "gqa": heads_q != heads_kv,
            "value_head_dim": head_dim_v != head_dim,
            "return_lse": bool(o.return_lse),
            "lse_gradient": gradients and bool(o.return_lse),
            "varlen": packed,
            "seqused_k": o.seqused_k is not None,
            "block_table": paged,
        }
        return Problem(
            batch=batch,
            heads_q=heads_q,
            heads_kv=heads_kv,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            dtype=query.dtype,
            device=query.device,
            numbers=Arguments(
                scale=as_float(scale),
                causal=causal,
                window_left=window_left,
                window_right=window_right,
                precision=precision_number(o.precision, query.dtype),
                softcap=as_float(o.softcap),
                dropout_p=as_float(o.dropout_p),
                max_seqlen_q=as_int64(o.max_seqlen_q),
                max_seqlen_k=as_int64(o.max_seqlen_k),
                q_start=o.q_start,
                k_start=o.k_start,
                head_start=o.head_start,
            ),
            return_lse=bool(o.return_lse),
            features=frozenset(name for name in FEATURES if used[name]),
            differentiable=gradients or transform_is_active(),
            is_direct=is_direct(
                query, key, value, o.mask, o.bias, o.key_padding_mask, o.alibi_slopes, o.sinks
            ),
            copied={
                name: x.numel() * x.element_size()
                for name, x in (("query", query), ("key", key), ("value", value))
                if x.stride(-1) != 1 and x.shape[-1] > 1
            },
        )


_DROPOUT = NUMBERS.index("dropout_p")
_NOTHING = (None,) * (len(TENSORS) - len(SEQUENCES))


def arguments_of(
    query: Tensor, key: Tensor, numbers: tuple[Any, ...], options: Options, check: bool = True
) -> tuple[Any, ...]:
    """Returns the arguments of a valid call after query, key and value, as the operators take them;
    trailing ones that have their defaults may be left out.

    numbers: those of its `Problem`, as `split` returns them. Draws the random state of dropout; if
    `check`, checks lengths and pages before.
    """
    o = options
    sequences = (o.cu_seqlens_q, o.cu_seqlens_k, o.seqused_k, o.block_table)
    packed = not (
        o.cu_seqlens_q is None
        and o.cu_seqlens_k is None
        and o.seqused_k is None
        and o.block_table is None
    )
    mask, bias, philox = o.mask, o.bias, None
    if numbers[_DROPOUT]:
        if packed and check and not is_compiling():  # a call that is refused draws nothing
            ops.check_sequences(query, key, *joined((*_NOTHING, *sequences), numbers))
        philox = ops.philox_state(query, o.philox_seed)
    slopes, sinks = o.alibi_slopes, o.sinks
    if sinks is not None:
        sinks = as_vector(sinks, torch.promote_types(query.dtype, torch.float32))
    tensors = (
        mask if mask is None or mask.dim() == 4 else as_4d(mask),
        bias if bias is None or bias.dim() == 4 else as_4d(bias),
        o.key_padding_mask,
        None if slopes is None else as_vector(slopes, torch.float32),
        sinks,
        philox,
        *sequences,
    )
    if packed or o.q_start or o.k_start or o.head_start:
        return joined(tensors, numbers)
    return joined_if_dense(tensors, numbers)
