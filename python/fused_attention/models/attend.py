"""One attention, three ways to compute it, for sequences padded, packed or in a cache.

    attend(q, k, v) = softmax(q kᵀ / sqrt(D), over the keys that a query may see) v

(Vaswani et al. 2017, section 3.2.1.) "fused" is this library, "sdpa" PyTorch's own function,
"naive" the formula as it stands. A model gives the same results with each. Only "fused" reads
packed sequences and a cache in place and without a mask; the others get dense tensors and a mask
[B, 1, Sq, Sk].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attention

IMPLEMENTATIONS = ("fused", "sdpa", "naive")


# -- Layouts of a batch -------------------------------------------------------------------


@dataclass(frozen=True)
class Padded:
    """Rows of [B, S, ...]: sequence b is the first lengths[b] tokens of row b (None: all of it).

    lengths: int32 [B], each at least 1. Padding is on the right. The results for it mean
    nothing, and it influences no other result.
    """

    lengths: Tensor | None = None

    def padding(self, seqlen: int) -> Tensor | None:
        """Returns a key_padding_mask: bool [B, seqlen], True = padding; None without lengths."""
        if self.lengths is None:
            return None
        return torch.arange(seqlen, device=self.lengths.device) >= self.lengths[:, None]

    def positions(self, tokens: Tensor) -> Tensor:
        """Returns the position of each token in its sequence: int64 [1, S]."""
        return torch.arange(tokens.shape[1], device=tokens.device)[None]


@dataclass(frozen=True)
class Packed:
    """One after the other in [T, ...]: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1].

    cu_seqlens: int32 [B + 1]. There is no padding, and nothing is computed for it.
    """

    cu_seqlens: Tensor
    max_seqlen: int

    @property
    def lengths(self) -> Tensor:
        return self.cu_seqlens.diff()

    def positions(self, tokens: Tensor) -> Tensor:
        """Returns the position of each token in its sequence: int64 [T]."""
        starts = torch.repeat_interleave(self.cu_seqlens[:-1], self.lengths.long())
        return torch.arange(len(tokens), device=tokens.device) - starts

    def unpack(self, x: Tensor) -> Tensor:
        """Returns [B, max_seqlen, ...] from [T, ...]; padding is 0."""
        present = self._present()
        dense = x.new_zeros(*present.shape, *x.shape[1:])
        return dense.masked_scatter(present.view(*present.shape, *[1] * (x.dim() - 1)), x)

    def pack(self, x: Tensor) -> Tensor:
        """Returns [T, ...] from [B, max_seqlen, ...]."""
        return x[self._present()]

    def _present(self) -> Tensor:
        seqlens = torch.arange(self.max_seqlen, device=self.cu_seqlens.device)
        return seqlens < self.lengths[:, None]


@dataclass(frozen=True)
class Cached:
    """New tokens [B, S, ...] of sequences that have `before` (int32 [B]) tokens each in a cache.

    longest: an upper bound of `before`, known without reading the tensor.
    """

    before: Tensor
    longest: int

    def positions(self, tokens: Tensor) -> Tensor:
        """Returns the position of each new token in its sequence: int64 [B, S]."""
        return self.before[:, None] + torch.arange(tokens.shape[1], device=tokens.device)


Layout = Padded | Packed | Cached


def pad(sequences: Sequence[Sequence[int]], fill: int = 0) -> tuple[Tensor, Padded]:
    """Returns tokens [B, S] from B sequences, padded on the right with `fill`."""
    lengths = [len(sequence) for sequence in sequences]
    tokens = torch.full((len(sequences), max(lengths)), fill)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return tokens, Padded(torch.tensor(lengths, dtype=torch.int32))


def pack(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Packed]:
    """Returns tokens [T] from B sequences, one after the other."""
    lengths = torch.tensor([0, *(len(sequence) for sequence in sequences)], dtype=torch.int32)
    tokens = torch.tensor([token for sequence in sequences for token in sequence])
    return tokens, Packed(lengths.cumsum(0, dtype=torch.int32), int(lengths.max()))


# -- Attention ----------------------------------------------------------------------------


class Attend(nn.Module):
    """The attention between the projections. It is a module so that a forward hook can see it."""

    def __init__(self, implementation: str, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.implementation = implementation
        self.dropout_p = dropout_p

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout, causal: bool
    ) -> Tensor:
        """q and result [B, Hq, Sq, D], k and v [B, Hkv, Sk, D] (packed [Tq, Hq, D], [Tk, Hkv, D]).

        queries, keys: the layouts of the sequences. With `Cached` keys, k and v are the cache, with
        the new tokens in it. causal, for self-attention: token i sees tokens up to i.
        """
        dropout_p = self.dropout_p if self.training else 0.0
        if self.implementation == "fused":
            return _fused(q, k, v, queries, keys, causal, dropout_p)
        compute = {"sdpa": _sdpa, "naive": _naive}[self.implementation]
        if isinstance(queries, Packed) and isinstance(keys, Packed):
            q, k, v = (
                layout.unpack(x).transpose(1, 2)
                for layout, x in ((queries, q), (keys, k), (keys, v))
            )
            mask = _visible(q, k, Padded(queries.lengths), Padded(keys.lengths), causal)
            return queries.pack(compute(q, k, v, mask, dropout_p).transpose(1, 2))
        if isinstance(keys, Cached):
            k, v = (x[:, :, : keys.longest + q.shape[2]] for x in (k, v))
        return compute(q, k, v, _visible(q, k, queries, keys, causal), dropout_p)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout, causal: bool, dropout_p: float
) -> Tensor:
    if isinstance(queries, Packed) and isinstance(keys, Packed):
        return attention(
            q,
            k,
            v,
            cu_seqlens_q=queries.cu_seqlens,
            cu_seqlens_k=keys.cu_seqlens,
            max_seqlen_q=queries.max_seqlen,
            max_seqlen_k=keys.max_seqlen,
            causal="top_left" if causal else False,
            dropout_p=dropout_p,
        )
    if isinstance(keys, Cached):
        used = keys.before + q.shape[2]
        return attention(q, k, v, seqused_k=used, causal="bottom_right", dropout_p=dropout_p)
    assert isinstance(keys, Padded)
    if causal:  # no token sees the padding on its right
        return attention(q, k, v, causal="top_left", dropout_p=dropout_p)
    return attention(q, k, v, key_padding_mask=keys.padding(k.shape[2]), dropout_p=dropout_p)


def _visible(q: Tensor, k: Tensor, queries: Layout, keys: Layout, causal: bool) -> Tensor | None:
    """Returns the mask: bool, broadcasts to [B, 1, Sq, Sk], True = visible; None: all are."""
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    j = torch.arange(seqlen_k, device=k.device)
    if isinstance(keys, Cached):
        i = keys.before.view(-1, 1, 1, 1) + torch.arange(seqlen_q, device=q.device).view(-1, 1)
        return j <= i
    assert isinstance(keys, Padded)
    if causal:
        return (j <= torch.arange(seqlen_q, device=q.device).view(-1, 1)).view(1, 1, seqlen_q, -1)
    padding = keys.padding(seqlen_k)
    return None if padding is None else ~padding[:, None, None, :]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, enable_gqa=grouped)


def _naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    s = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf)
    return F.dropout(s.softmax(-1), dropout_p) @ v
