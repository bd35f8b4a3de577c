"""Key/value caches, in which generation keeps the keys and values of earlier tokens.

A cache is dense, [B, Hkv, room, D], or paged (PagedAttention, Kwon et al. 2023, section 4): pages
[pages, page_size, Hkv, D] that a block table [B, max_pages] assigns to sequences.
`kv_cache_append_` writes new tokens into it, in place; `attention(..., seqused_k=, block_table=)`
reads it. Time and traffic O(new tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import operators as ops
from .call.backends import choose_for
from .call.problem import (
    DTYPES,
    check_dtype,
    check_lengths,
    check_same_device,
    check_shape,
    check_tensor,
    shape_of,
)
from .errors import argument_error, is_of_operator, wrong_value
from .operators._torch import is_compiling, looks_at_sizes


def kv_cache_append_(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """Writes new keys and values after those that are in a cache, in place.

    key [B, Hkv, S, D], value [B, Hkv, S, Dv]: S new tokens of each sequence. cache_seqlens: int32
    [B], how many tokens of each sequence are in the cache; new token i of sequence b becomes its
    token cache_seqlens[b] + i. cache_seqlens itself is not changed: pass cache_seqlens + S to
    `attention` as seqused_k afterwards.

    key_cache [B, Hkv, room, D] and value_cache [B, Hkv, room, Dv]; with block_table (int32
    [B, max_pages]) pages [pages, page_size, Hkv, D or Dv] of any page_size: token n of sequence b
    is row n % page_size of page block_table[b, n // page_size]. Any strides; one dtype out of
    float32, bfloat16, float16 and float64; CPU and CUDA. flash_attn_with_kvcache does the same with
    k and v, whose dimensions are the transpose(1, 2) of these. key and value may lie in the caches:
    they are read before anything is written. Autograd notices the change as after any in-place
    operation of PyTorch. Not differentiable.

    Raises ArgumentValueError (ValueError, RuntimeError) and ArgumentTypeError (TypeError,
    RuntimeError) for arguments that do not fit together, caches whose elements share memory, tokens
    that have no room, pages that do not exist, and two new tokens for one row of a page; nothing is
    written then. On a GPU, cache_seqlens and block_table are not checked first, because that would
    wait for the GPU: tokens without room are left out, and of two tokens for one row either stays.
    """
    tensors = (key_cache, value_cache, key, value, cache_seqlens, block_table)
    _check(*tensors)
    if is_compiling():
        return ops.kv_cache_append(*tensors)
    try:
        ops.kv_cache_append(*tensors)
    except RuntimeError as error:
        if is_of_operator(error):
            raise argument_error(error) from None
        raise


@looks_at_sizes
def _check(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
) -> None:
    tensors = {
        "key_cache": key_cache, "value_cache": value_cache, "key": key, "value": value
    }  # fmt: skip
    for name, x in tensors.items():
        check_tensor(name, x)
        if x.dim() != 4:
            pages = block_table is not None and name.endswith("cache")
            layout = "[pages, page_size, Hkv, D]" if pages else "[B, Hkv, S, D]"
            wrong_value(name, f"4 dimensions {layout}", f"{x.dim()}: {shape_of(x)}")
        if key.dtype not in DTYPES:
            wrong_value("key", f"a dtype out of {', '.join(map(str, DTYPES))}", key.dtype)
        check_dtype(name, x, key.dtype, "as key has")
        check_same_device(name, x, key)
        if torch.is_grad_enabled() and x.requires_grad:
            hint = "detach() it, or append under torch.no_grad()"
            wrong_value(name, "no requires_grad", "a tensor that requires it", hint)
    batch, heads, seqlen, head_dim = key.shape
    head_dim_v = value.shape[-1]
    check_shape("value", value, "[B, Hkv, S, Dv]", (batch, heads, seqlen, head_dim_v))
    check_lengths("cache_seqlens", cache_seqlens, key, 1)
    check_shape("cache_seqlens", cache_seqlens, "[B]", (batch,))
    if block_table is None:
        room = key_cache.shape[2]
        meaning, front = "[B, Hkv, room, {}]", (batch, heads, room)
    else:
        check_lengths("block_table", block_table, key, 2)
        max_pages = block_table.shape[1]
        check_shape("block_table", block_table, "[B, max_pages]", (batch, max_pages))
        meaning, front = "[pages, page_size, Hkv, {}]", (*key_cache.shape[:2], heads)
    check_shape("key_cache", key_cache, meaning.format("D"), (*front, head_dim))
    check_shape("value_cache", value_cache, meaning.format("Dv"), (*front, head_dim_v))
    choose_for("kv_cache_append_", key)
