"""The functions of flash-attn 2.8.3 (Dao 2023, FlashAttention-2), computed by `attention`.

    s_ij = softcap · tanh(softmax_scale · q_i·k_j / softcap) - slope · |i + Sk - Sq - j|
    query i sees key j iff i + Sk - Sq - left <= j <= i + Sk - Sq + right;  causal: right = 0

Signatures, layouts and meaning are the original's: tensors are [B, S, H, D], or [T, H, D] where
sequences are packed, and causal masks, windows and ALiBi are measured from the bottom right. Time
and memory are those of `attention`. `install` lets `import flash_attn` find these functions;
`flash_attn_3` has those of FlashAttention-3.

More is served than by the original: tensors on the CPU, float32 and float64, any head_dim that
`attention` takes, values of another width than keys, empty batches, dropout_p = 1, any page_size,
pages together with cache_batch_idx or cache_leftpad, rotations of any even width with cos and sin
of any floating dtype, and gradients through softmax_lse, which the original drops without a word.

Three things differ. Wrong calls raise ArgumentValueError or ArgumentTypeError, also where the
original ignores an argument: alibi_slopes that require a gradient. The random bits of dropout are
those of `attention`. With causal and alibi_slopes together, softmax_lse is that of the scores
above; the original adds slope · j, not -slope · |i + Sk - Sq - j|, which gives the same output and
another lse.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import operators as ops
from ..attention import attention, dropout_mask
from ..attention_weights import attention_with_weights
from ..cache import kv_cache_append_
from ..call.options import NO_WINDOW, NONE
from ..call.problem import check_lengths, check_number, check_shape, check_tensor, shape_of
from ..errors import ArgumentTypeError, ArgumentValueError, wrong_value
from ..operators._torch import is_compiling
from .handle import Handle
from .stand_in import StandIn

Options = dict[str, Any]  # keywords of `attention`

DENSE = "[B, S, H, D]"
PACKED = "[T, H, D]"
PAGES = "[pages, page_size, H, D]"


# -- Arguments ---------------------------------------------------------------------------


def check_layout(name: str, x: Any, layout: str) -> None:
    rank = layout.count(",") + 1
    if isinstance(x, Tensor) and x.dim() == rank:
        return
    check_tensor(name, x)
    wrong_value(name, f"{rank} dimensions {layout}", f"{x.dim()}: {shape_of(x)}")


def check_inputs(
    q: Any, k: Any, v: Any, layout: str, layout_of_keys: str, suffix: str = ""
) -> None:
    """Checks ranks and numbers of heads; `attention` checks the other sizes.

    suffix: of the names of k and v.
    """
    check_layout("q", q, layout)
    check_layout(f"k{suffix}", k, layout_of_keys)
    check_layout(f"v{suffix}", v, layout_of_keys)
    heads_q, heads_kv = q.shape[-2], k.shape[-2]
    if heads_q != heads_kv and (heads_kv == 0 or heads_q % heads_kv != 0):
        wrong_value(f"k{suffix}", f"a number of heads that divides q's {heads_q}", heads_kv)


def number(x: Any) -> Any:
    """Returns the number in a tensor of one integer, and anything else as it is."""
    return operator.index(x) if isinstance(x, Tensor) else x


def unpacked(name: str, x: Any, layout: str) -> tuple[Tensor, ...]:
    """Returns the tensors that are packed along dimension -3 of x, views of it.

    Their gradients come back in one piece, because unbind's backward stacks them.
    """
    check_layout(name, x, layout)
    count = int(layout.strip("[]").split(", ")[-3])
    if x.shape[-3] != count:
        wrong_value(name, f"shape {layout}", shape_of(x))
    return x.unbind(-3)


def limits(window_size: Any, causal: bool, seqlen_k: int) -> tuple[int, int]:
    """Returns how many keys before and after its own a query sees, -1 for no limit.

    As in flash-attn 2, a limit of seqlen_k or more is none, and a window that limits only the left
    gets seqlen_k on the right. The latter hides keys only where Sq > Sk + 1.
    """
    left, right = window_size
    left, right = int(left), 0 if causal else int(right)
    left = left if 0 <= left < seqlen_k else -1
    right = right if 0 <= right < seqlen_k else -1
    return left, (seqlen_k if left >= 0 > right else right)


def options_of(
    left: int,
    right: int,
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = NONE,
) -> Options:
    """Returns the options under the names of `attention`. left, right: see `limits`."""
    if softcap > 0 and dropout_p > 0:
        hint = "attention(softcap=, dropout_p=) applies both"
        wrong_value("dropout_p", "0.0 together with softcap, as in flash-attn", dropout_p, hint)
    causal = right == 0
    if causal:
        right = -1
    limited = left >= 0 or right >= 0
    # attention() finds the plan of a call sooner if more of its options are the defaults.
    needs_diagonal = not causal and (limited or alibi_slopes is not None)
    return {
        "causal": "bottom_right" if causal else False,
        "diagonal": "bottom_right" if needs_diagonal else None,
        "window_size": (left, right) if limited else NO_WINDOW,
        "scale": softmax_scale,
        "softcap": softcap if softcap > 0 else NONE,
        "alibi_slopes": alibi_slopes,
        "dropout_p": NONE if dropout_p == 0.0 else dropout_p,
    }


# -- Results -----------------------------------------------------------------------------


def attend(q: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """Calls `attention` for q [B, S, H, D] or [T, H, D]; out is contiguous in this layout.

    key and value are as `attention` takes them.
    """
    dense = q.dim() == 4
    results = attention(q.transpose(1, 2) if dense else q, key, value, **options)
    if not options.get("return_lse"):
        return (results.transpose(1, 2) if dense else results).contiguous()
    out, lse = results
    return (out.transpose(1, 2) if dense else out).contiguous(), lse


def flash_lse(lse: Tensor) -> Tensor:
    """Returns lse as flash-attn 2 has it: inf, not -inf, for a row that sees no key."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def _with_probabilities(
    q: Tensor, call: Callable[..., Any], weights: Callable[[], Tensor], dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (out, softmax_lse, S_dmask).

    call: gives (out, lse), for a seed of dropout. weights: gives the weights without dropout.
    """
    s_dmask, philox = q.new_empty(0), None
    if dropout_p:
        check_number("dropout_p", dropout_p)
        if not 0.0 <= dropout_p <= 1.0:
            wrong_value("dropout_p", "a probability in [0, 1]", dropout_p)
        with torch.no_grad():
            p = weights()  # refuses a wrong call before a seed is drawn
            philox = ops.philox_state(q)
            B, H, Sq, Sk = p.shape
            keep = dropout_mask(B, H, Sq, Sk, dropout_p, philox, p.device)
            s_dmask = torch.where(keep, p, -p)
    out, lse = call(philox_seed=philox)
    return out, flash_lse(lse), s_dmask


def _weights(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Returns the attention weights without dropout, [B, Hq, Sq, Sk]."""
    options |= {"dropout_p": 0.0}
    return attention_with_weights(query, key, value, average=False, **options)[1]


# -- Sequences of one length -------------------------------------------------------------


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention for q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, D] with any strides.

    Hq is a multiple of Hkv: query head h reads key head h // (Hq / Hkv). Returns out [B, Sq, Hq, D]
    in q's dtype, contiguous; with return_attn_probs (out, softmax_lse, S_dmask).

    dropout_p: probability in [0, 1] of dropping a weight. Random bits follow torch.manual_seed.
    softmax_scale: default 1/sqrt(D).
    causal: query i sees keys j <= i + Sk - Sq.
    window_size: (left, right) in tokens, -1 = no limit; see the module for the formula.
    softcap: in logits: scores become softcap · tanh(scores / softcap). 0 or less = none. Refused
        together with dropout_p, as in the original.
    alibi_slopes: [Hq] or [B, Hq]: adds -slope · |i + Sk - Sq - j|.
    deterministic: always is.
    softmax_lse: [B, Hq, Sq], float32 (float64 for float64), the logarithm of the denominator.
        Differentiable.
    S_dmask: with dropout_p > 0 the attention weights [B, Hq, Sq, Sk] before dropout, in q's dtype;
        their sign is negative where dropout drops them. They are normalized and not scaled by
        1 / (1 - dropout_p); the original pads both lengths to multiples of 128. Without dropout an
        empty tensor, as in the original. Not differentiable; meant for tests.

    A row that sees no key gives 0, with softmax_lse inf and zero gradients. Differentiable in q, k,
    v as `attention` is; deterministic.

    Raises ArgumentValueError (ValueError, RuntimeError) and ArgumentTypeError (TypeError,
    RuntimeError) for wrong arguments.
    """
    check_inputs(q, k, v, DENSE, DENSE)
    left, right = limits(window_size, causal, k.shape[1])
    options = options_of(left, right, softmax_scale, softcap, alibi_slopes, dropout_p)
    key, value = k.transpose(1, 2), v.transpose(1, 2)
    if not return_attn_probs:
        return attend(q, key, value, **options)
    call = partial(attend, q, key, value, return_lse=True, **options)
    weights = partial(_weights, q.transpose(1, 2), key, value, **options)
    return _with_probabilities(q, call, weights, dropout_p)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` for q, k and v in one qkv [B, S, 3, H, D]; so is their gradient."""
    q, k, v = unpacked("qkv", qkv, "[B, S, 3, H, D]")
    options: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    options += (deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, *options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` for k and v in one kv [B, Sk, 2, Hkv, D]; so is their gradient."""
    k, v = unpacked("kv", kv, "[B, S, 2, H, D]")
    options: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    options += (deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, *options)


# -- Packed sequences --------------------------------------------------------------------


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention within each of B sequences that lie one after another.

    q [Tq, Hq, D], k and v [Tk, Hkv, D]. cu_seqlens_q, cu_seqlens_k: int32 [B + 1]: sequence b is
    tokens cu[b] to cu[b + 1] and may be empty; tokens after the last sequence give 0. max_seqlen_q,
    max_seqlen_k: the longest lengths. Returns out [Tq, Hq, D]; with return_attn_probs
    (out, softmax_lse [Hq, Tq], S_dmask [B, Hq, max_seqlen_q, max_seqlen_k]).

    block_table: int32 [B, max_pages]. With it, k and v are pages [pages, page_size, Hkv, D]: key n
        of sequence b is row n % page_size of page block_table[b, n // page_size], and cu_seqlens_k
        only gives the lengths.

    All else is as in `flash_attn_func`, with the lengths of each sequence for Sq and Sk.
    """
    check_inputs(q, k, v, PACKED, PACKED if block_table is None else PAGES)
    max_seqlen_q, max_seqlen_k = number(max_seqlen_q), number(max_seqlen_k)
    left, right = limits(window_size, causal, max_seqlen_k)
    options = options_of(left, right, softmax_scale, softcap, alibi_slopes, dropout_p)
    sequences: Options = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    sequences |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    call = partial(attend, q, k, v, block_table=block_table, **sequences, **options)
    if not return_attn_probs:
        return call()
    weights = partial(_weights_of_sequences, q, k, v, block_table, **sequences, **options)
    return _with_probabilities(q, partial(call, return_lse=True), weights, dropout_p)


def _weights_of_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    alibi_slopes: Tensor | None,
    **options: Any,
) -> Tensor:
    """Returns the weights of each sequence without dropout, [B, Hq, max_seqlen_q, max_seqlen_k]."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    batch, heads = len(starts_q) - 1, q.shape[1]
    weights = q.new_zeros(batch, heads, max_seqlen_q, max_seqlen_k)
    for b in range(batch):
        rows = slice(starts_q[b], starts_q[b + 1])
        columns = slice(starts_k[b], starts_k[b + 1])
        keys, values = (
            x[columns] if block_table is None else _from_pages(x, block_table[b], columns)
            for x in (k, v)
        )
        slopes = None if alibi_slopes is None else alibi_slopes.expand(batch, heads)[b]
        sequence = (x.transpose(0, 1).unsqueeze(0) for x in (q[rows], keys, values))
        own = _weights(*sequence, alibi_slopes=slopes, **options)[0]
        weights[b, :, : own.shape[1], : own.shape[2]] = own
    return weights


def _from_pages(pages: Tensor, table: Tensor, columns: slice) -> Tensor:
    """Copies as many tokens as `columns` has from the first pages of a row of a block table."""
    length, page_size = columns.stop - columns.start, pages.shape[1]
    return pages[table[: -(-length // page_size)].long()].flatten(0, 1)[:length]


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` for q, k and v in one qkv [T, 3, H, D]; so is their gradient."""
    q, k, v = unpacked("qkv", qkv, "[T, 3, H, D]")
    sequences = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    options += (deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, *sequences, *options)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` for k and v in one kv [Tk, 2, Hkv, D]; so is their gradient."""
    k, v = unpacked("kv", kv, "[T, 2, H, D]")
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options: Any = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    options += (deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, *sequences, *options)


# -- Key/value caches --------------------------------------------------------------------


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Appends new keys and values to a cache, in place, and attends to all that it then holds.

    q [B, Sq, Hq, D]. k_cache, v_cache: [B_cache, room, Hkv, D], of which rows 0 to B - 1 are used,
    or with block_table (int32 [B, max_pages]) pages [pages, page_size, Hkv, D], as in
    `flash_attn_varlen_func`. Returns out [B, Sq, Hq, D], contiguous; with return_softmax_lse
    (out, softmax_lse [B, Hq, Sq]).

    k, v: [B, S_new, Hkv, D]: token i of sequence b becomes token cache_seqlens[b] + i of its cache.
    cache_seqlens: int, or int32 [B]: how many tokens of each cache are in use before the call; not
        changed. Sk is cache_seqlens + S_new. None, if there is no k, stands for the whole cache.
    cache_batch_idx: int32 [B]: sequence b uses row cache_batch_idx[b] of the caches (or of
        block_table), without a copy. The rows must differ if k is given.
    cache_leftpad: int32 [B]: the tokens of a cache before this one are hidden.
    rotary_cos, rotary_sin: [positions, rotary_dim / 2], rotary_dim <= D: see `apply_rotary_emb`.
        Token i of the new k is rotated by row cache_seqlens[b] + i, and so is token i of q if there
        is a causal mask or a window; else all of q is rotated by row cache_seqlens[b].
    num_splits: any number. The splits are chosen here, by shapes alone.

    All else is as in `flash_attn_func`. The results require no gradient, as in the original.
    Raises as `kv_cache_append_` and `attention` do.
    """
    check_layout("k_cache", k_cache, DENSE if block_table is None else PAGES)
    left, right = limits(window_size, causal, room_of(k_cache, block_table))
    results = attend_to_cache(
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
        block_table=block_table,
        options=options_of(left, right, softmax_scale, softcap, alibi_slopes),
        return_lse=return_softmax_lse,
    )
    if not return_softmax_lse:
        return results
    out, lse = results
    return out, flash_lse(lse)


def room_of(k_cache: Tensor, block_table: Tensor | None) -> int:
    """Returns how many tokens the cache of one sequence holds at most."""
    return k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])


def attend_to_cache(
    *,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Any,
    v: Any,
    rotary_cos: Any,
    rotary_sin: Any,
    rotary_interleaved: bool,
    cache_seqlens: Any,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    options: Options,
    return_lse: bool,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
) -> Any:
    """Serves `flash_attn_with_kvcache`, whose arguments these are; lse is that of `attention`.

    options: those of `attention`. cu_seqlens_q, cu_seqlens_k_new: q, or k and v, are packed.
    rotary_seqlens: takes the place of cache_seqlens in the rotation.
    """
    grows = not (k is None and v is None and rotary_cos is None and rotary_sin is None)
    if grows:
        given = {"k": k, "v": v, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
        _check_needed(given | {"cache_seqlens": cache_seqlens})
    _check_cache(q, k_cache, v_cache, cu_seqlens_q, block_table)
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    lengths = cache_seqlens
    if grows or not isinstance(lengths, Tensor):  # `attention` checks a tensor
        lengths = _per_sequence("cache_seqlens", lengths, batch, q)
    packed = cu_seqlens_q is not None or cu_seqlens_k_new is not None
    table = _table(block_table, cache_batch_idx, k_cache, batch, packed)
    key, value = k_cache, v_cache
    if table is None:
        if key.shape[0] != batch:
            key, value = key[:batch], value[:batch]
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    if q.requires_grad or k_cache.requires_grad or v_cache.requires_grad:
        q, key, value = q.detach(), key.detach(), value.detach()
    if k is not None:
        for name, x in (("k", k), ("v", v)):
            check_layout(name, x, DENSE if cu_seqlens_k_new is None else PACKED)
        k, v = k.detach(), v.detach()
        if rotary_cos is not None:
            starts = _per_sequence("rotary_seqlens", rotary_seqlens, batch, q)
            starts = lengths if starts is None else starts
            step = 1 if options["causal"] or options["window_size"] != NO_WINDOW else 0
            rotary = (rotary_cos, rotary_sin, rotary_interleaved)
            with torch.no_grad():  # the tables may require a gradient
                q = _rotated(q, *rotary, _positions(q, starts, cu_seqlens_q, step), "rotary_")
                k = _rotated(k, *rotary, _positions(k, starts, cu_seqlens_k_new), "rotary_")
        lengths = _append(key, value, k, v, lengths, table, cu_seqlens_k_new)
    options |= {"seqused_k": lengths, "block_table": table, "return_lse": return_lse}
    if cache_leftpad is not None:
        leftpad = _per_sequence("cache_leftpad", cache_leftpad, batch, q)
        tokens = torch.arange(room_of(k_cache, table), device=q.device)
        options["key_padding_mask"] = tokens < leftpad.unsqueeze(1)
    if cu_seqlens_q is not None:
        options |= {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q}
    try:
        return attend(q, key, value, **options)
    except (ArgumentValueError, ArgumentTypeError):
        if lengths is not None:  # `attention` calls them seqused_k
            _per_sequence("cache_seqlens", lengths, batch, q)
            _check_numbers("cache_seqlens", lengths, room_of(k_cache, table) + 1)
        raise


# The second argument of each pair means nothing without the first.
_NEEDED = (
    ("v", "k"),
    ("k", "v"),
    ("cache_seqlens", "k"),
    ("rotary_sin", "rotary_cos"),
    ("rotary_cos", "rotary_sin"),
    ("k", "rotary_cos"),
)


def _check_needed(arguments: dict[str, Any]) -> None:
    for needed, name in _NEEDED:
        if arguments[needed] is None and arguments[name] is not None:
            wrong_value(needed, f"not None, since {name} is given", None)


def _check_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cu_seqlens_q: Any, block_table: Any
) -> None:
    layout = DENSE if cu_seqlens_q is None else PACKED
    layout_of_keys = DENSE if block_table is None else PAGES
    check_inputs(q, k_cache, v_cache, layout, layout_of_keys, "_cache")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(-1) != 1:
            wrong_value(name, "a last dimension of stride 1", f"stride {cache.stride(-1)}")


def _per_sequence(name: str, x: Any, batch: int, q: Tensor) -> Any:
    """Returns x as int32 [B], or None if it is None."""
    if x is None:
        return None
    if isinstance(x, int):
        return torch.full((batch,), x, dtype=torch.int32, device=q.device)
    check_lengths(name, x, q, 1)
    check_shape(name, x, "[B]", (batch,))
    return x


def _table(
    block_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    k_cache: Tensor,
    batch: int,
    packed: bool,
) -> Any:
    """Returns the block table of a call, or None if sequence b simply uses row b of the caches.

    A dense cache [B_cache, room, H, D] is one of pages, whose page_size is its room.
    """
    if cache_batch_idx is None and (block_table is not None or not packed):
        return block_table
    count = k_cache.shape[0] if block_table is None else block_table.shape[0]
    if cache_batch_idx is None:
        rows = torch.arange(batch, dtype=torch.int32, device=k_cache.device)
    else:
        rows = _per_sequence("cache_batch_idx", cache_batch_idx, batch, k_cache)
        _check_numbers("cache_batch_idx", rows, count)
    return rows.unsqueeze(1) if block_table is None else block_table[rows]


def _append(
    key: Tensor,
    value: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    table: Any,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Appends k and v in place to the caches `key` and `value`; returns the new lengths, int32 [B].

    cu_seqlens: k and v are packed. Each token is then appended as a sequence of its own.
    """
    if cu_seqlens is None:
        kv_cache_append_(key, value, k.transpose(1, 2), v.transpose(1, 2), lengths, table)
        return lengths + k.shape[1]
    places = _positions(k, lengths, cu_seqlens).int()
    rows = table[_sequences(k, cu_seqlens)]
    kv_cache_append_(key, value, k.unsqueeze(2), v.unsqueeze(2), places, rows)
    return lengths + cu_seqlens.diff()


def _check_numbers(name: str, numbers: Tensor, count: int) -> None:
    """Checks integers for 0 to count - 1 on a CPU. On a GPU that would wait for it; there PyTorch's
    indexing, or the operator that reads them, checks them."""
    if numbers.device.type != "cpu" or is_compiling() or numbers.numel() == 0:
        return
    low, high = (int(x) for x in numbers.aminmax())
    if low < 0 or high >= count:
        wrong_value(name, f"numbers from 0 to {count - 1}", f"{low} to {high}")


# -- Rotary positions --------------------------------------------------------------------


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotary position embedding (Su et al. 2021, RoFormer) of x [B, S, H, D].

        (a, b) -> (a cos - b sin, a sin + b cos)

    for each pair of the first rotary_dim elements; the others stay as they are.

    cos, sin: [positions, rotary_dim / 2], rotary_dim <= D. Token i of sequence b is rotated by row
        seqlen_offsets[b] + i.
    interleaved: a pair is elements 2i and 2i + 1 (GPT-J), else i and i + rotary_dim / 2 (GPT-NeoX).
    inplace: writes the result to x and returns x.
    seqlen_offsets: an int, or integers [B].
    cu_seqlens: int32 [B + 1]: x is packed, [T, H, D]. max_seqlen is not needed.

    Computed in float32 (float64 for float64) and rounded to x's dtype once. Differentiable.
    Raises ArgumentValueError for shapes that do not fit together and, on a CPU, for a position
    without a row.
    """
    check_layout("x", x, DENSE if cu_seqlens is None else PACKED)
    before = x.clone() if inplace else x  # autograd keeps the values before the rotation
    rotated = _rotated(before, cos, sin, interleaved, _positions(x, seqlen_offsets, cu_seqlens))
    return x.copy_(rotated) if inplace else rotated


def _sequences(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Returns the number of the sequence of each token of x [T, H, D]."""
    tokens = torch.arange(x.shape[0], dtype=cu_seqlens.dtype, device=x.device)
    return torch.searchsorted(cu_seqlens, tokens, right=True) - 1


def _positions(x: Tensor, starts: Any, cu_seqlens: Tensor | None, step: int = 1) -> Tensor:
    """Returns starts + step · i for token i of each sequence, [S], [B, S] or, if packed, [T]."""
    tokens = torch.arange(x.shape[-3], device=x.device)
    if cu_seqlens is None:
        starts = starts.unsqueeze(1) if isinstance(starts, Tensor) else starts
        return starts + step * tokens
    sequences = _sequences(x, cu_seqlens)
    starts = starts[sequences] if isinstance(starts, Tensor) else starts
    return starts + step * (tokens - cu_seqlens[sequences])


def _rotated(
    x: Tensor, cos: Any, sin: Any, interleaved: bool, positions: Tensor, prefix: str = ""
) -> Tensor:
    """Returns x [..., S, H, D], rotated by rows `positions` [..., S] of cos and sin."""
    for name, table in (("cos", cos), ("sin", sin)):
        check_layout(prefix + name, table, "[positions, rotary_dim / 2]")
    check_shape(f"{prefix}sin", sin, "that of cos", tuple(cos.shape))
    count, half = cos.shape
    if 2 * half > x.shape[-1]:
        wrong_value(f"{prefix}cos", f"at most D / 2 = {x.shape[-1] / 2} columns", half)
    _check_numbers(f"positions in {prefix}cos", positions, count)
    dtype = torch.promote_types(x.dtype, torch.float32)
    c, s = (table[positions].to(dtype).unsqueeze(-2) for table in (cos, sin))
    turning, rest = x.split([2 * half, x.shape[-1] - 2 * half], -1)
    sizes, pair = ((half, 2), -1) if interleaved else ((2, half), -2)
    a, b = turning.to(dtype).unflatten(-1, sizes).unbind(pair)
    turned = torch.stack((a * c - b * s, a * s + b * c), pair).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), -1)


# -- Padding (flash_attn.bert_padding) ---------------------------------------------------


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Returns rows `indices` [N] of input [M, ...]. Differentiable."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Returns [first_axis_dim, ...] with values [N, ...] at rows `indices`, 0 elsewhere.
    Differentiable."""
    zeros = values.new_zeros(first_axis_dim, *values.shape[1:])
    return zeros.index_copy(0, indices.long(), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the tokens of hidden_states [B, S, ...] that attention_mask [B, S] marks (not 0).

    unused_mask: [B, S], marks tokens that are packed too, but not counted as used. Returns the
    tokens [T, ...], differentiable; their indices in the flattened [B · S], int64 [T]; cu_seqlens,
    int32 [B + 1]; the longest length; and the number of used tokens, int32 [B].
    """
    packed = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths, used = (mask.sum(-1, dtype=torch.int32) for mask in (packed, attention_mask))
    indices = packed.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, cu_seqlens, int(lengths.max()), used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undoes `unpad_input`: tokens [T, ...] become [batch, seqlen, ...], 0 at padding.
    Differentiable."""
    tokens = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return tokens.unflatten(0, (batch, seqlen))


# -- import flash_attn -------------------------------------------------------------------

VERSION = "2.8.3"

_FUNCTIONS = (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
_STAND_IN = StandIn(
    "flash-attn",
    VERSION,
    {
        "flash_attn": _FUNCTIONS,
        "flash_attn.flash_attn_interface": _FUNCTIONS,
        "flash_attn.bert_padding": (index_first_axis, index_put_first_axis, pad_input, unpad_input),
        "flash_attn.layers": (),
        "flash_attn.layers.rotary": (apply_rotary_emb,),
    },
)


def install() -> Handle:
    """Lets `import flash_attn` find the functions of this module, until the handle is undone.

        with install():
            from flash_attn import flash_attn_func

    It offers the modules flash_attn, flash_attn.flash_attn_interface, flash_attn.bert_padding
    (index_first_axis, index_put_first_axis, pad_input, unpad_input) and flash_attn.layers.rotary
    (apply_rotary_emb), and the metadata of a package flash-attn 2.8.3. Names that were imported
    from them stay valid after undo(). Handles nest: the modules go when the last is undone.

    transformers believes in flash-attn only if torch.cuda.is_available() holds as well, and keeps
    its first answer: with a GPU, call install() before transformers is imported. On a machine
    without one, attn_implementation="flash_attention_2" is refused by transformers itself
    ("FlashAttention2 is not available on CPU"), whatever is installed; there
    `fused_attention.integrations.transformers.register()` brings attention to its models.

    Raises RuntimeError if a flash_attn is importable or imported already.
    """
    return _STAND_IN.handle()
