"""`attention`: exact attention (Vaswani et al. 2017, section 3.2.1), and the mask of its dropout.

It goes by tiles with an online softmax (Dao 2023, FlashAttention-2): time O(B·Hq·Sq·Sk·(D + Dv)),
and on every backend but the reference memory O(B·Hq·Sq) beyond inputs and outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from . import operators as ops
from .call.backends import REFERENCE, choose_for
from .call.options import NO_WINDOW, NONE, Options
from .call.plan import find, kind_of_call, kind_of_option, may_be_refusal
from .call.problem import cast_for_autocast, check_number, check_philox_seed, refuse_keyword
from .call.serve import refused, serve, serve_new
from .errors import wrong_type, wrong_value
from .operators._torch import is_any_autocast_enabled, is_compiling

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalVariant
    from typing_extensions import Unpack

    from .call.options import Keywords


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[Keywords],
) -> Tensor: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[Keywords],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: bool, **options: Unpack[Keywords]
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool | str | CausalVariant = False,
    diagonal: str | None = None,
    window_size: tuple[int, int] = NO_WINDOW,
    scale: float | None = None,
    softcap: float = NONE,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = NONE,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    return_lse: bool = False,
    philox_seed: int | Tensor | None = None,
    precision: str | None = None,
    backend: str = "auto",
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · query keyᵀ + bias, over the visible keys) value, never holding the scores.

    Shapes: query [B, Hq, Sq, D], key [B, Hkv, Sk, D], value [B, Hkv, Sk, Dv], Hq a multiple of Hkv
    (query head h reads key head h // (Hq / Hkv)). One dtype out of float32, bfloat16, float16 and
    float64, one device, any strides (an input whose last stride is not 1 is copied). Returns out
    [B, Hq, Sq, Dv] in query's dtype and memory order (BHSD or BSHD); with return_lse (out, lse).

    mask: bool, broadcasts to [B, Hq, Sq, Sk], never expanded. True = may attend.
    bias: floating, broadcasts likewise, added to the scores; differentiable. Both may be given.
    key_padding_mask: bool [B, Sk]. True = padding, no query attends to it.
    causal: "top_left" (query i sees keys j <= i: scaled_dot_product_attention), "bottom_right"
        (j <= i + Sk - Sq: flash_attn, key/value caches), or True if Sq = Sk, where the two agree.
        The members of torch.nn.attention.bias.CausalVariant are accepted too.
    diagonal: "top_left" (off = 0) or "bottom_right" (off = Sk - Sq): what causal, window_size and
        alibi_slopes are measured from. None is what causal says, and "top_left" without causal.
    window_size: (left, right) in tokens: i + off - left <= j <= i + off + right. -1 = no limit.
    scale: a number, default 1/sqrt(D).
    softcap: in logits, 0 = none: scores become softcap · tanh(scores / softcap), before the bias.
        A softcap of 2^96 or more (float64: 2^992) caps nothing.
    alibi_slopes: [Hq] or [B, Hq]: adds -slope · |i + off - j|. Not differentiable.
    sinks: [Hq] logits that take part in the denominator only; differentiable.
    dropout_p: probability in [0, 1], rounded to 1/65536, applied to the weights. Random bits follow
        torch.manual_seed, or philox_seed (an int, or an int64 tensor (seed, offset)); the same on
        every backend, and not those of torch's own dropout. `dropout_mask` gives the mask.
    cu_seqlens_q, cu_seqlens_k: int32 [B + 1], packed sequences: query [Tq, Hq, D], key
        [Tk, Hkv, D], value [Tk, Hkv, Dv], lse [Hq, Tq]. Sequence b is tokens cu[b] to cu[b + 1];
        tokens after the last sequence give 0 (lse: -inf). max_seqlen_q, max_seqlen_k: hints.
    seqused_k: int32 [B], how many keys of each sequence are used; `off` takes this length for Sk.
    block_table: int32 [B, max_pages]. With it, key and value are pages [pages, page_size, Hkv, D or
        Dv] of any page_size: key n of sequence b is row n % page_size of page block_table[b, n //
        page_size]. Entries after the pages in use may hold anything. See `kv_cache_append_`.
    return_lse: returns (out, lse). lse [B, Hq, Sq], float32 (float64 for float64), is the natural
        logarithm of the denominator, sinks included; differentiable.
    precision: "highest", "high" or "medium", for float32 products; None is
        torch.get_float32_matmul_precision().
    backend: "auto", or the name of a backend, which never falls back. See `explain`.

    A row that sees no key gives 0 (lse: -inf, or its sink) and zero gradients. A key that no query
    of its batch and head sees influences nothing, whatever bits it holds. Under autocast query,
    key, value and bias are cast. Deterministic, for any number of threads. Differentiable twice and
    in forward mode on a CPU, unless sequences are packed.

    Raises ArgumentValueError (ValueError, RuntimeError) and ArgumentTypeError (TypeError,
    RuntimeError) for wrong arguments, NotImplementedError for what the named backend cannot serve.
    """
    if unknown:
        refuse_keyword(next(iter(unknown)), "attention")
    if is_compiling() or is_any_autocast_enabled():
        query, key, value, bias = cast_for_autocast(query, key, value, bias)
    kind = refusal = None
    is_plain = (
        mask is None
        and bias is None
        and diagonal is None
        and key_padding_mask is None
        and alibi_slopes is None
        and sinks is None
        and cu_seqlens_q is None
        and cu_seqlens_k is None
        and max_seqlen_q is None
        and max_seqlen_k is None
        and seqused_k is None
        and block_table is None
        and philox_seed is None
        and not return_lse
        and softcap == 0.0
        and dropout_p == 0.0
        and not is_compiling()
    )
    if is_plain:  # most calls: their plan is found without a record of options
        said: tuple[Any, ...] = (causal, type(causal), scale, type(scale), precision, backend)
        if window_size is not NO_WINDOW:
            said += (kind_of_option(window_size),)
        kind, plan = find(kind_of_call(query, key, value, False, said))
        if plan is not None:
            assert plan.plain is not None
            try:
                return plan.operator(query, key, value, *plan.plain)
            except RuntimeError as error:
                if not may_be_refusal(error):
                    raise
                refusal = error
    options = Options(
        mask,
        bias,
        key_padding_mask,
        causal,
        diagonal,
        window_size,
        scale,
        softcap,
        alibi_slopes,
        sinks,
        dropout_p,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_k,
        block_table,
        return_lse,
        philox_seed,
        precision,
    )
    if refusal is not None:
        raise refused(refusal, query, key, value, options, backend)
    if is_plain:
        return serve_new(kind, query, key, value, options, backend)
    return serve(query, key, value, options, backend)


def dropout_mask(
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dropout_p: float,
    philox_seed: int | Tensor,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The mask that `attention(dropout_p=, philox_seed=)` applies: bool, True = kept.

    [batch, heads, seqlen_q, seqlen_k], with `heads` query heads. Kept weights are scaled by
    65536 / (65536 - round(65536 · dropout_p)). Philox4x32-10, see `attention`.

    Raises ArgumentValueError and ArgumentTypeError, as `attention` does.
    """
    sizes = (batch, heads, seqlen_q, seqlen_k)
    for name, size in zip(("batch", "heads", "seqlen_q", "seqlen_k"), sizes, strict=True):
        if not isinstance(size, (int, torch.SymInt)):
            wrong_type(name, "an int", type(size).__name__)
        if size < 0:
            wrong_value(name, "a size >= 0", size)
        if size >= 2**63:
            wrong_value(name, "a size below 2^63", size)
    check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        wrong_value("dropout_p", "a probability in [0, 1]", dropout_p)
    try:
        like = torch.empty(0, device=device, dtype=torch.float32)
    except (RuntimeError, AssertionError, TypeError) as error:  # unknown, or not in this build
        wrong_value("device", "a device of this PyTorch", f"{device!r} ({error})")
    if philox_seed is None:
        wrong_type("philox_seed", "an int or an int64 tensor", "NoneType")
    check_philox_seed(philox_seed, like.device)
    philox = ops.philox_state(like, philox_seed)
    if choose_for("dropout_mask", like) is not REFERENCE:
        return ops.dropout_keep_mask(philox, dropout_p, *sizes)
    from .reference import dropout_keep_mask

    return dropout_keep_mask(philox, dropout_p, *sizes)
