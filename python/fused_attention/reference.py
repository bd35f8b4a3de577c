"""The definition of attention in this package: every other backend is compared with this file.

    s = softcap(scale · q kᵀ) + bias + alibi, -inf where a key is not visible
    p = exp(s - lse),  lse = log(exp(sink) + Σ_j exp(s_ij))
    out = dropout(p) v

Scaled dot-product attention as in Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1,
with ALiBi (Press et al. 2022, section 3), sinks in the denominator (Xiao et al. 2024, section 3)
and dropout bits from Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as
1, 2, 3", section 3.3). Naive on purpose: it holds the whole score matrix, so memory is
O(B·Hq·Sq·Sk) and time O(B·Hq·Sq·Sk·(D + Dv)). It consists of PyTorch operations in float32
(float64 for float64), so ordinary autograd differentiates it, twice and in forward mode too.
`Problem` validates calls; this file only checks what would otherwise give a wrong answer and no
error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

INF = float("inf")

# -- Visibility --------------------------------------------------------------------------


def diagonal_offset(
    causal: bool | str | None, seqlen_q: int, used: Tensor, diagonal: str | None = None
) -> Tensor:
    """Returns `off`, int64 [B, 1, 1, 1]: query i is aligned with key i + off."""
    from_the_end = (used.to(torch.int64) - seqlen_q).view(-1, 1, 1, 1)
    if diagonal is not None:
        is_known = diagonal in ("top_left", "bottom_right")
        if not is_known or causal not in (None, False, True, diagonal):
            raise ValueError(f"diagonal: got {diagonal!r} with causal {causal!r}")
        causal = diagonal
    if causal == "bottom_right":
        return from_the_end
    if causal not in (None, False, True, "top_left"):
        raise ValueError(f'causal: expected False, "top_left" or "bottom_right", got {causal!r}')
    if causal in (True,) and bool(from_the_end.any()):
        raise ValueError(
            f"causal: True is ambiguous for {seqlen_q} queries and {used.tolist()} keys; "
            'say "top_left" (as PyTorch) or "bottom_right" (as flash-attn)'
        )
    return torch.zeros_like(from_the_end)


def visible(
    shape: tuple[int, int, int, int],
    off: Tensor,
    used: Tensor,
    causal: bool | str | None = False,
    window_size: tuple[int, int] = (-1, -1),
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Returns which keys each query may attend to: bool, `shape` = (B, Hq, Sq, Sk)."""
    B, _, Sq, Sk = shape
    left, right = window_size
    if min(left, right) < -1:
        raise ValueError(f"window_size: expected tokens, or -1 for no limit, got {window_size}")
    for name, x in (("mask", mask), ("key_padding_mask", key_padding_mask)):
        if x is not None and x.dtype != torch.bool:
            raise TypeError(f"{name}: expected torch.bool, got {x.dtype}; floating goes to bias")
    i = torch.arange(Sq, device=off.device).view(Sq, 1)
    j = torch.arange(Sk, device=off.device)
    ahead = j - (i + off)  # how far key j lies past the diagonal of query i, [B, 1, Sq, Sk]
    seen = j < used.view(B, 1, 1, 1)
    if causal:
        seen = seen & (ahead <= 0)
    if left >= 0:
        seen = seen & (ahead >= -left)
    if right >= 0:
        seen = seen & (ahead <= right)
    if key_padding_mask is not None:
        seen = seen & ~key_padding_mask.expand(B, Sk).view(B, 1, 1, Sk)
    if mask is not None:
        seen = seen & mask.expand(shape)
    return seen.expand(shape)


# -- Scores and softmax ------------------------------------------------------------------


def scores(
    q: Tensor,
    k: Tensor,
    off: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """The logits before masking, [B, Hq, Sq, Sk], from q [B, Hq, Sq, D] and k [B, Hq, Sk, D]."""
    B, Hq, Sq, D = q.shape
    scale = 1.0 / math.sqrt(max(D, 1)) if scale is None else scale
    s = scale * (q @ k.transpose(-2, -1))
    if 0 < softcap < 2.0 ** (992 if s.dtype == torch.float64 else 96):  # larger ones cap nothing
        softcap = max(softcap, 4 * torch.finfo(s.dtype).tiny)
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(f"bias: expected a floating dtype, got {bias.dtype}; bool goes to mask")
        s = s + bias.to(s.dtype).expand(s.shape)
    if alibi_slopes is not None:
        i = torch.arange(Sq, device=q.device).view(Sq, 1)
        distance = (i + off - torch.arange(k.shape[-2], device=q.device)).abs()
        slopes = alibi_slopes.detach().to(s.dtype).expand(B, Hq).view(B, Hq, 1, 1)
        s = s - slopes * distance.to(s.dtype)
    return s


def softmax(s: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis of s [..., Hq, Sq, N], and lse [..., Hq, Sq], its log-denominator.

    A sink (a logit per head, [Hq]) is one more key, without a value. A row of -inf has weights 0.
    """
    sink = s.new_full((), -INF) if sinks is None else sinks.to(s.dtype).view(-1, 1, 1)
    s = torch.cat([s, sink.expand(*s.shape[:-1], 1)], dim=-1)
    row_max = s.amax(dim=-1, keepdim=True).detach()  # the result does not depend on it: no gradient
    row_max = torch.where(row_max == -INF, 0.0, row_max)  # -inf - -inf would be NaN
    p = torch.exp(s - row_max)
    row_sum = p.sum(dim=-1, keepdim=True)
    empty = row_sum == 0
    row_sum = torch.where(empty, 1.0, row_sum)
    lse = torch.where(empty, -INF, row_max + torch.log(row_sum))
    return (p / row_sum)[..., :-1], lse.squeeze(-1)


# -- Dropout -----------------------------------------------------------------------------

WORD = 0xFFFFFFFF


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: maps four 32-bit counter words and two key words to four random words.

    Words are int64 tensors in [0, 2³²) that broadcast. Products wrap modulo 2⁶⁴ in int64, so both
    halves of a product are right even if its sign is not.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = (product1 >> 32 & WORD) ^ c1 ^ k0, (product0 >> 32 & WORD) ^ c3 ^ k1
        c1, c3 = product1 & WORD, product0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def dropout_threshold(dropout_p: float) -> int:
    """Returns the nearest integer to p · 65536, ties to even; 16-bit values below are dropped."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {dropout_p}")
    return round(dropout_p * 65536)


def dropout_keep_mask(
    philox: Tensor,
    dropout_p: float,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    *,
    q_start: int = 0,
    k_start: int = 0,
    head_start: int = 0,
) -> Tensor:
    """The elements that dropout keeps: bool [batch, heads, seqlen_q, seqlen_k], on philox's device.

    `philox` is int64 [2] = (seed, offset); the mask depends on nothing but the arguments.
    counter = (column // 8, row, b · heads + head, offset mod 2³²), key = (low word, high word) of
    the seed; the 128 bits are eight 16-bit values, low bits first, for columns 8 · (column // 8) +
    0 ... 7. Keep iff value >= `dropout_threshold(dropout_p)`. Rows, columns and heads are numbered
    from q_start, k_start and head_start; k_start must be a multiple of 8.
    """
    threshold = dropout_threshold(dropout_p)
    seed, offset = philox.to(torch.int64).unbind()

    def count(n: int, start: int = 0) -> Tensor:
        return torch.arange(start, start + n, device=philox.device) & WORD

    random = philox4x32(
        (
            count(-(-seqlen_k // 8), k_start // 8),
            count(seqlen_q, q_start).view(seqlen_q, 1),
            count(batch * heads, head_start).view(batch, heads, 1, 1),
            offset & WORD,
        ),
        (seed & WORD, seed >> 32 & WORD),
    )
    words = torch.stack(torch.broadcast_tensors(*random), dim=-1)
    values = torch.stack([words & 0xFFFF, words >> 16], dim=-1)  # [..., Sk/8, 4 words, 2 halves]
    return values.flatten(-3)[..., :seqlen_k] >= threshold


def philox_state(philox: Tensor | None, philox_seed: int | None, device: torch.device) -> Tensor:
    """Returns (seed, offset), int64 [2]: philox, or philox_seed modulo 2⁶⁴ and offset 0."""
    if (philox is None) == (philox_seed is None):
        raise ValueError("dropout_p > 0: expected exactly one of philox and philox_seed")
    if philox is not None:
        return philox.to(device)
    seed = int(philox_seed or 0) & (2**64 - 1)
    seed = seed - 2**64 if seed >= 2**63 else seed
    return torch.tensor([seed, 0], dtype=torch.int64, device=device)


def dropout(p: Tensor, dropout_p: float, philox: Tensor, **starts: int) -> Tensor:
    """Sets dropped weights to 0 and scales the kept ones by 65536 / (65536 - threshold)."""
    B, H, Sq, Sk = p.shape
    keep = dropout_keep_mask(philox, dropout_p, B, H, Sq, Sk, **starts)
    kept = 65536 - dropout_threshold(dropout_p)
    return torch.where(keep, p * (65536 / max(kept, 1)), 0.0)  # dropout_p = 1 keeps none


# -- Masked softmax ----------------------------------------------------------------------


def masked_softmax_reference(
    input: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    causal: bool | str = False,
    dropout_p: float = 0.0,
    sinks: Tensor | None = None,
    philox_seed: int | None = None,
    philox: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """softmax(scale · input + bias) over the visible elements of the last dimension, 0 elsewhere.

    input [..., H, M, N], from one dimension up; mask (bool, True = may attend) and bias broadcast
    to it; the other arguments as in `attention_reference`. Returns input's dtype. For dropout all
    dimensions before H count as batch.
    """
    dtype = compute_dtype or torch.promote_types(input.dtype, torch.float32)
    shape = (1,) * (3 - input.dim()) + tuple(input.shape)
    H, M, N = shape[-3:]
    B = math.prod(shape[:-3])
    philox = philox_state(philox, philox_seed, input.device) if dropout_p else None
    with torch.autocast(input.device.type, enabled=False):
        used = torch.full((1,), N, device=input.device)
        off = diagonal_offset(causal, M, used)
        seen = visible((1, 1, M, N), off, used, causal).view(shape[-2:][-input.dim() :])
        seen = seen.expand(input.shape)
        if mask is not None:
            seen = seen & mask
        s = scale * input.to(dtype)
        if bias is not None:
            s = s + bias.to(dtype)
        p, _ = softmax(torch.where(seen, s, -INF).view(shape), sinks)
        p = torch.where(seen.view(shape), p, 0.0)  # 0 beside a visible NaN, too
        if philox is not None:
            p = dropout(p.reshape(B, H, M, N), dropout_p, philox).view(shape)
        return p.view(input.shape).to(input.dtype)


# -- Attention ---------------------------------------------------------------------------


def gather_pages(pages: Tensor, block_table: Tensor, used: Tensor | None) -> Tensor:
    """Gathers [B, Hkv, max_pages · page_size, D] from pages [pages, page_size, Hkv, D].

    Entries of block_table [B, max_pages] past the used length may be anything: they give zeros.
    """
    num_pages, page_size = pages.shape[:2]
    first_key = torch.arange(block_table.shape[1], device=pages.device) * page_size
    in_use = torch.ones_like(block_table, dtype=torch.bool)
    if used is not None:
        in_use = first_key < used.view(-1, 1)
    if bool((in_use & ((block_table < 0) | (block_table >= num_pages))).any()):
        raise ValueError(
            f"block_table: expected pages in [0, {num_pages}), got {block_table.tolist()}"
        )
    pages = torch.cat([pages, pages.new_zeros(1, *pages.shape[1:])])
    return pages[torch.where(in_use, block_table, num_pages)].flatten(1, 2).transpose(1, 2)


def sequence_starts(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    """Returns cu_seqlens as integers; raises unless they start at 0, never fall and fit `total`."""
    starts = [int(start) for start in cu_seqlens.tolist()]
    if not starts or starts[0] != 0 or starts != sorted(starts) or starts[-1] > total:
        raise ValueError(f"{name}: expected 0, ... rising to at most {total}, got {starts}")
    return starts


def attention_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    head_start: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Returns (out [Tq, Hq, Dv], lse [Hq, Tq]) from one dense call per sequence.

    Rows that belong to no sequence are 0 and -inf.
    """
    Tq, Hq, _ = query.shape
    starts_q = sequence_starts("cu_seqlens_q", cu_seqlens_q, Tq)
    batch = len(starts_q) - 1
    if block_table is None:
        if cu_seqlens_k is None or cu_seqlens_k.shape != cu_seqlens_q.shape:
            raise ValueError("cu_seqlens_k: expected as many entries as in cu_seqlens_q")
        starts_k = sequence_starts("cu_seqlens_k", cu_seqlens_k, key.shape[0])
    elif seqused_k is None and cu_seqlens_k is not None:
        seqused_k = cu_seqlens_k.diff()
    for name, x in (("seqused_k", seqused_k), ("block_table", block_table)):
        if x is not None and x.shape[0] != batch:
            raise ValueError(f"{name}: expected one row for each of {batch} sequences")
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.expand(batch, Hq)

    def dense(x: Tensor, begin: int, end: int) -> Tensor:
        return x[begin:end].transpose(0, 1).unsqueeze(0)

    def of(b: int, x: Tensor | None) -> Tensor | None:
        return None if x is None else x[b : b + 1]

    results: list[Any] = []
    for b in range(batch):
        q, k, v = dense(query, starts_q[b], starts_q[b + 1]), key, value
        if block_table is None:
            k, v = (dense(x, starts_k[b], starts_k[b + 1]) for x in (key, value))
        options |= {"seqused_k": of(b, seqused_k), "block_table": of(b, block_table)}
        options |= {"alibi_slopes": of(b, alibi_slopes), "head_start": head_start + b * Hq}
        results.append(attention_reference(q, k, v, return_lse=True, **options))
    rest = dense(query, starts_q[-1], Tq)
    no_keys = [dense(x.flatten(0, -3), 0, 0) for x in (key, value)]
    results.append(attention_reference(rest, *no_keys, return_lse=True))
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, dim=2)[0].transpose(0, 1).contiguous(), torch.cat(lses, dim=2)[0]


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool | str | None = False,
    diagonal: str | None = None,
    window_size: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    return_lse: bool = False,
    philox_seed: int | None = None,
    philox: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    q_start: int = 0,
    k_start: int = 0,
    head_start: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by its definition: out, or (out, lse) if return_lse. Any device, any strides.

    query [B, Hq, Sq, D], key [B, Hkv, Sk, D], value [B, Hkv, Sk, Dv], Hq a multiple of Hkv: query
    head h reads key head h // (Hq / Hkv). With cu_seqlens_q (and cu_seqlens_k; int [B + 1]) the
    sequences are packed: [Tq, Hq, D], [Tk, Hkv, D], [Tk, Hkv, Dv]. With block_table (int [B, pages
    of a row]) key and value are [pages, page_size, Hkv, D or Dv], and Sk is what a row can hold.
    out has query's shape with Dv for D, and query's dtype; lse is [B, Hq, Sq] or [Hq, Tq], float32
    (float64 for float64), the natural logarithm of the denominator, sinks included.

    scale: of q·k; None is 1/sqrt(D). softcap: in logits, 0 is none.
    bias: floating, added to the scores; differentiable. mask: bool, True = may attend.
        Both broadcast to [B, Hq, Sq, Sk]. key_padding_mask: bool [B, Sk], True = hidden.
    causal: query i sees keys j <= i + off. "top_left": off = 0; "bottom_right": off = Sk - Sq;
        True: if both agree. window_size (left, right): i + off - left <= j <= i + off + right in
        tokens, -1 = no limit. diagonal: the same words, for a window or ALiBi without causal; None
        is off = 0 then.
    alibi_slopes: [Hq] or [B, Hq], adds -slope · |i + off - j|; not differentiable.
    sinks: [Hq] logits that only enter the denominator; differentiable.
    dropout_p: probability, in steps of 1/65536. Bits come from philox (int64 [2]: seed, offset) or
        from philox_seed (with offset 0), see `dropout_keep_mask`; lse is that of the undropped row.
    seqused_k: int [B], keys from this position on are hidden; `off` takes this length for Sk.
    max_seqlen_q, max_seqlen_k: hints for kernels, without meaning here.
    compute_dtype: None is float32, or float64 for float64 inputs.
    q_start, k_start: positions of the first query and key, if these are a part of longer
        sequences. They are added to i and j in all of the above, and to rows and columns of
        dropout. head_start: number of the first head in dropout (b · Hq + h of a larger call).

    A row that sees no key: out 0, lse -inf (or the sink), gradients 0. A key that no query of its
    (batch, head) sees influences nothing, whatever bits it holds. Deterministic.
    Raises ValueError or TypeError for arguments that have no meaning.
    """
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    dtype = compute_dtype or lse_dtype
    philox = philox_state(philox, philox_seed, query.device) if dropout_p else None
    if cu_seqlens_q is not None:
        if mask is not None or bias is not None or key_padding_mask is not None:
            raise ValueError("mask, bias, key_padding_mask: expected None for packed sequences")
        packed = (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, alibi_slopes)
        out, lse = attention_packed(
            query,
            key,
            value,
            *packed,
            causal=causal,
            diagonal=diagonal,
            window_size=window_size,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            dropout_p=dropout_p,
            philox=philox,
            compute_dtype=compute_dtype,
            q_start=q_start,
            k_start=k_start,
            head_start=head_start,
        )
        return (out, lse) if return_lse else out
    if cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_q: expected a tensor beside cu_seqlens_k, got None")
    if block_table is not None:
        key, value = (gather_pages(pages, block_table, seqused_k) for pages in (key, value))
    B, Hq, Sq, D = query.shape
    _, Hkv, Sk, _ = value.shape
    group = Hq // Hkv if Hkv else 0
    if key.shape != (B, Hkv, Sk, D) or value.shape[0] != B or Hq != Hkv * group:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key, value: shapes {shapes} do not fit together")
    used = torch.full((B,), Sk, device=query.device) if seqused_k is None else seqused_k
    if seqused_k is not None and bool(((used < 0) | (used > Sk)).any()):
        raise ValueError(f"seqused_k: expected lengths in [0, {Sk}], got {used.tolist()}")

    # A device without autocast, such as meta, has none to disable: naming the CPU does no harm.
    available = torch.amp.is_autocast_available(query.device.type)
    with torch.autocast(query.device.type if available else "cpu", enabled=False):
        off = diagonal_offset(causal, Sq, used, diagonal) + (q_start - k_start)
        seen = visible((B, Hq, Sq, Sk), off, used, causal, window_size, mask, key_padding_mask)
        query_sees = seen.any(dim=-1).unsqueeze(-1)  # [B, Hq, Sq, 1]
        key_is_seen = seen.any(dim=-2).unsqueeze(-1)  # [B, Hq, Sk, 1]

        # Rows that take no part become 0: a NaN there would reach results and gradients as 0 · NaN.
        q = torch.where(query_sees, query.to(dtype), 0.0)
        k = torch.where(key_is_seen, key.to(dtype).repeat_interleave(group, dim=1), 0.0)
        v = torch.where(key_is_seen, value.to(dtype).repeat_interleave(group, dim=1), 0.0)

        logits: dict[str, Any] = {"scale": scale, "softcap": softcap}
        s = scores(q, k, off, **logits, bias=bias, alibi_slopes=alibi_slopes)
        p, lse = softmax(torch.where(seen, s, -INF), sinks)
        if philox is not None:
            starts = {"q_start": q_start, "k_start": k_start, "head_start": head_start}
            p = dropout(p, dropout_p, philox, **starts)
        out = torch.where(query_sees, p @ v, 0.0)

    out = out.to(query.dtype).contiguous()
    if query.stride(1) < query.stride(2):  # BSHD in memory, as query is
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return (out, lse.to(lse_dtype)) if return_lse else out


def merge_attention_states(
    outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) over all keys from (out, lse) over disjoint parts of them.

    outs: [B, Hq, Sq, Dv] each, lses: [B, Hq, Sq] each (packed: [Tq, Hq, Dv] and [Hq, Tq]), all
    computed without sinks; sinks [Hq] enter here, once. out = Σ_n exp(lse_n - lse) · out_n, which
    is attention over the parts, with score lse_n and value out_n. A part with lse = -inf
    contributes nothing, whatever its out; all -inf: out 0, lse -inf (or the sink). Differentiable.
    """
    packed = outs[0].dim() == 3
    lse_dtype = torch.promote_types(outs[0].dtype, torch.float32)
    with torch.autocast(outs[0].device.type, enabled=False):
        s = torch.stack([lse.to(lse_dtype) for lse in lses], dim=-1)  # [B, Hq, Sq, parts]
        o = torch.stack([out.transpose(0, 1) if packed else out for out in outs], dim=-2)
        p, lse = softmax(s, sinks)
        o = torch.where((s == -INF).unsqueeze(-1), 0.0, o.to(lse_dtype))
        out = (p.unsqueeze(-1) * o).sum(dim=-2).to(outs[0].dtype)
    return (out.transpose(0, 1) if packed else out), lse
