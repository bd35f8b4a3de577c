"""The functions of FlashAttention-3 (Shah et al. 2024; module flash_attn_interface) on `attention`.

Signatures and meaning are those of hopper/flash_attn_interface.py in August 2026. They are those of
`flash_attn` but for four things. The arguments have another order: softmax_scale follows v. There
is no dropout and no ALiBi. return_attn_probs adds softmax_lse only, and this is -inf for a row that
sees no key, so that `flash_attn_combine` can merge it. -1 in a window never hides a key.

num_splits, pack_gqa, sm_margin and deterministic tune the original's kernels; here they change
nothing, and results are always deterministic. qv, the descale factors of float8, attention_chunk,
seqused_q, scheduler_metadata, and cache_leftpad together with packed queries are not served: they
raise NotImplementedError.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call.problem import check_dtype, check_shape
from ..errors import describe_error, wrong_value
from ..merge import merge_attention_states
from .flash_attn import (
    DENSE,
    PACKED,
    PAGES,
    attend,
    attend_to_cache,
    check_inputs,
    check_layout,
    number,
    options_of,
    room_of,
    unpacked,
)


def _refuse(**arguments: Any) -> None:
    """Raises NotImplementedError if one of the arguments is given."""
    for name, x in arguments.items():
        if x is not None:
            got = "a tensor" if isinstance(x, Tensor) else repr(x)
            raise NotImplementedError(describe_error(name, "None (others are not built)", got))


def _limits(window_size: Any, causal: bool, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """Returns how many keys before and after its own a query sees; -1 if no key is hidden."""
    left, right = (int(x) for x in window_size)
    left = left if 0 <= left < seqlen_k - 1 else -1
    right = right if 0 <= right < seqlen_q - 1 else -1
    return left, (0 if causal else right)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Attention for q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv]: see
    `flash_attn.flash_attn_func`.

    Returns out [B, Sq, Hq, Dv], contiguous; with return_attn_probs (out, softmax_lse [B, Hq, Sq]).
    Differentiable in q, k and v, and through softmax_lse.
    """
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    _refuse(attention_chunk=attention_chunk or None)
    check_inputs(q, k, v, DENSE, DENSE)
    left, right = _limits(window_size, causal, q.shape[1], k.shape[1])
    options = options_of(left, right, softmax_scale, softcap)
    key, value = k.transpose(1, 2), v.transpose(1, 2)
    return attend(q, key, value, return_lse=return_attn_probs, **options)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` for qkv [B, S, 3, H, D]; so is the gradient.

    num_heads_q: then qkv is [B, S, num_heads_q + 2 Hkv, D].
    """
    if num_heads_q is None:
        q, k, v = unpacked("qkv", qkv, "[B, S, 3, H, D]")
    else:
        check_layout("qkv", qkv, "[B, S, Hq + 2 Hkv, D]")
        rest = qkv.shape[2] - num_heads_q
        if num_heads_q < 0 or rest < 0 or rest % 2 != 0:
            expected = f"a number of heads that leaves twice Hkv of qkv's {qkv.shape[2]}"
            wrong_value("num_heads_q", expected, num_heads_q)
        q, k, v = qkv.split([num_heads_q, rest // 2, rest // 2], 2)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Attention within each of B packed sequences: see `flash_attn.flash_attn_varlen_func`.

    q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv]; cu_seqlens_q, cu_seqlens_k: int32 [B + 1].
    seqused_k: int32 [B], how many keys of each sequence are used. Returns out [Tq, Hq, Dv]; with
    return_attn_probs (out, softmax_lse [Hq, Tq]).
    """
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    _refuse(attention_chunk=attention_chunk or None, seqused_q=seqused_q)
    check_inputs(q, k, v, PACKED, PACKED)
    max_seqlen_q, max_seqlen_k = number(max_seqlen_q), number(max_seqlen_k)
    left, right = _limits(window_size, causal, max_seqlen_q, max_seqlen_k)
    return attend(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_k=seqused_k,
        return_lse=return_attn_probs,
        **options_of(left, right, softmax_scale, softcap),
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Appends to a cache and attends to it: see `flash_attn.flash_attn_with_kvcache`.

    page_table is its block_table. cu_seqlens_q: int32 [B + 1]: q is packed, [Tq, Hq, D], and so are
    out and softmax_lse [Hq, Tq]; max_seqlen_q is the longest length. cu_seqlens_k_new: int32
    [B + 1]: k and v are packed, [cu_seqlens_k_new[B], Hkv, D], so that sequences may grow by
    different numbers of tokens. rotary_seqlens: int32 [B], the position of the first new token in
    the rotation; default cache_seqlens.
    """
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    _refuse(attention_chunk=attention_chunk or None, scheduler_metadata=scheduler_metadata)
    if cu_seqlens_q is not None:
        _refuse(cache_leftpad=cache_leftpad)
    check_layout("q", q, DENSE if cu_seqlens_q is None else PACKED)
    check_layout("k_cache", k_cache, DENSE if page_table is None else PAGES)
    max_seqlen_q = number(max_seqlen_q)
    seqlen_q = q.shape[-3] if cu_seqlens_q is None or max_seqlen_q is None else max_seqlen_q
    left, right = _limits(window_size, causal, seqlen_q, room_of(k_cache, page_table))
    return attend_to_cache(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        k=k,
        v=v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=page_table,
        options=options_of(left, right, softmax_scale, softcap),
        return_lse=return_softmax_lse,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        max_seqlen_q=max_seqlen_q,
        rotary_seqlens=rotary_seqlens,
    )


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Merges attention over N disjoint parts of the keys: see `merge_attention_states`.

    out_partial [N, B, S, H, D] and lse_partial [N, B, S, H], whose value -inf or inf marks a row
    that sees no key of that part. Returns out [B, S, H, D] in out_dtype (default that of
    out_partial) and lse [B, S, H], float32. out: a tensor to which the result is written.
    """
    check_layout("out_partial", out_partial, "[N, B, S, H, D]")
    check_layout("lse_partial", lse_partial, "[N, B, S, H]")
    check_shape("lse_partial", lse_partial, "[N, B, S, H]", tuple(out_partial.shape[:-1]))
    lse_partial = lse_partial.masked_fill(lse_partial == torch.inf, -torch.inf)
    outs, lses = (x.transpose(2, 3).unbind(0) for x in (out_partial, lse_partial))
    merged, lse = (x.transpose(1, 2) for x in merge_attention_states(outs, lses))
    merged = merged.to(out_dtype or out_partial.dtype).contiguous()
    if out is None:
        return merged, lse
    check_shape("out", out, "[B, S, H, D]", tuple(merged.shape))
    check_dtype("out", out, merged.dtype, "pass it as out_dtype too")
    return out.copy_(merged), lse
