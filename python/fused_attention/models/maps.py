"""Attention weights on request, without storing all of them.

    weights_ij = exp(s_ij - lse_i),  0 where key j is hidden

The fused kernel returns the log-denominator of each row, lse, from which any row of the weights can
be computed alone (Dao 2023, FlashAttention-2, Alg. 2). A question about all rows, such as the
entropy of each, is answered a block of rows at a time: memory O(B·Hq·S) beyond inputs and answer,
time O(B·Hq·Sq·Sk·D). Scores and visibility are those of the definition, `reference.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attention import attention
from ..errors import wrong_type, wrong_value
from ..reference import diagonal_offset, scores, visible
from .attend import Attend, Cached, Layout, Packed, Padded

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..call.options import Keywords

DROPOUT = ("dropout_p", "philox_seed")
SEQUENCES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_k")
NOT_OF_MAPS = (*DROPOUT, *SEQUENCES, "block_table", "return_lse")
ONLY_OF_LSE = ("sinks", "precision", "backend")
BLOCK_ELEMENTS = 1 << 20  # weights in a block, unless one row of each head has more


class AttentionMap:
    """The weights of one attention, [B, Hq, Sq, Sk], computed on request.

    query [B, Hq, Sq, D], key [B, Hkv, Sk, D]; the options are those of `attention` with the same
    meaning, except for dropout, packed sequences and pages. Nothing is differentiable. A row that
    sees no key has weights 0; with sinks a row sums to less than 1. Answers are float32 (float64
    for float64).

    Raises as `attention` does, and ArgumentTypeError for an option that maps do not have.
    """

    def __init__(self, query: Tensor, key: Tensor, **options: Unpack[Keywords]) -> None:
        said: dict[str, Any] = dict(options)
        for name in NOT_OF_MAPS:
            if name in said:
                wrong_type(name, "nothing: a map is of a dense call without dropout", said[name])
        self.query, self.key = query.detach(), key.detach()
        no_value = self.key[..., :1]
        with torch.no_grad():
            _, self.lse = attention(self.query, self.key, no_value, return_lse=True, **said)
        for name in ONLY_OF_LSE:
            said.pop(name, None)
        self.causal, self.diagonal = said.pop("causal", False), said.pop("diagonal", None)
        self.window_size = said.pop("window_size", (-1, -1))
        self.mask, self.padding = said.pop("mask", None), said.pop("key_padding_mask", None)
        self.of_scores = said
        self.dtype = torch.promote_types(query.dtype, torch.float32)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hq, Sq, Sk)."""
        B, Hq, Sq, _ = self.query.shape
        return B, Hq, Sq, self.key.shape[2]

    @torch.no_grad()
    def rows(self, rows: Sequence[int] | None = None, heads: Sequence[int] | None = None) -> Tensor:
        """Returns weights [B, len(heads), len(rows), Sk] of these queries and heads (None: all)."""
        _, Hq, Sq, _ = self.shape
        chosen = []
        for name, numbers, size in (("rows", rows, Sq), ("heads", heads, Hq)):
            numbers = range(size) if numbers is None else numbers
            if not all(0 <= number < size for number in numbers):
                wrong_value(name, f"numbers in [0, {size})", list(numbers))
            chosen.append(torch.tensor(list(numbers), dtype=torch.long, device=self.key.device))
        return self._weights(*chosen)

    @torch.no_grad()
    def top_keys(self, n: int) -> tuple[Tensor, Tensor]:
        """Returns the n largest weights of each query, and their keys: two [B, Hq, Sq, n], sorted.

        The largest comes first. Where fewer keys are visible, the rest has weight 0 and any key.
        """
        if not 1 <= n <= self.shape[3]:
            wrong_value("n", f"an int in [1, {self.shape[3]}]", n)
        weights = torch.empty(*self.shape[:3], n, dtype=self.dtype, device=self.key.device)
        keys = torch.empty_like(weights, dtype=torch.long)
        for rows, p in self.blocks():
            weights[:, :, rows], keys[:, :, rows] = p.topk(n)
        return weights, keys

    @torch.no_grad()
    def key_sums(self) -> Tensor:
        """Returns the sum of the weights of each key over all queries: [B, Hq, Sk]."""
        B, Hq, _, Sk = self.shape
        sums = torch.zeros(B, Hq, Sk, dtype=torch.float64, device=self.key.device)
        for _, p in self.blocks():
            sums += p.sum(2, dtype=torch.float64)
        return sums.to(self.dtype)

    @torch.no_grad()
    def entropy(self) -> Tensor:
        """Returns -Σ_j p_ij log p_ij in nats, [B, Hq, Sq]: log n for n keys of equal weight."""
        # Allocated first: small results between large temporaries would fragment the heap.
        entropy = torch.empty(*self.shape[:3], dtype=self.dtype, device=self.key.device)
        for rows, p in self.blocks():
            entropy[:, :, rows] = torch.special.entr(p).sum(-1)
        return entropy

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields all weights, a block of queries at a time: (rows, weights [B, Hq, rows, Sk])."""
        B, Hq, Sq, Sk = self.shape
        heads = torch.arange(Hq, device=self.key.device)
        size = max(1, BLOCK_ELEMENTS // max(1, B * Hq * Sk))
        for begin in range(0, Sq, size):
            rows = slice(begin, min(begin + size, Sq))
            numbers = torch.arange(rows.start, rows.stop, device=self.key.device)
            yield rows, self._weights(numbers, heads)

    def _weights(self, rows: Tensor, heads: Tensor) -> Tensor:
        B, Hq, Sq, Sk = self.shape
        group = Hq // self.key.shape[1]
        used = torch.full((B,), Sk, device=self.key.device)
        # Query rows[n] is row n of the block, so its offset grows by rows[n] - n.
        moved = (rows - torch.arange(len(rows), device=rows.device)).view(1, 1, -1, 1)
        off = diagonal_offset(self.causal, Sq, used, self.diagonal) + moved

        def part(x: Tensor | None) -> Tensor | None:
            """Selects these heads and rows of a mask or bias that broadcasts to [B, Hq, Sq, Sk]."""
            if x is None:
                return None
            x = x.detach()[(None,) * (4 - x.dim())]
            x = x if x.shape[1] == 1 else x[:, heads]
            return x if x.shape[2] == 1 else x[:, :, rows]

        shape = (B, len(heads), len(rows), Sk)
        mask = part(self.mask)
        seen = visible(shape, off, used, self.causal, self.window_size, mask, self.padding)
        of_scores = {**self.of_scores, "bias": part(self.of_scores.get("bias"))}
        if (slopes := of_scores.get("alibi_slopes")) is not None:
            of_scores["alibi_slopes"] = slopes[..., heads]
        q, k = self.query[:, heads][:, :, rows], self.key[:, heads // group]
        s = scores(q.to(self.dtype), k.to(self.dtype), off, **of_scores)
        lse = self.lse[:, heads][:, :, rows, None].to(self.dtype)
        return torch.where(seen, torch.exp(s - lse), 0.0)


# -- Maps of a model ---------------------------------------------------------------------------


@torch.no_grad()
def attention_maps(model: nn.Module, *inputs: Any, **options: Any) -> dict[str, AttentionMap]:
    """Returns the map of every attention that model(*inputs, **options) computes, by module name.

    In models of this package a name is "decoder.blocks.0.cross_attention", for example. Packed
    sequences become rows of a padded batch. The maps keep the queries and keys of each layer,
    O(layers · B·S·dim).

    Raises ArgumentValueError for a model without such modules.
    """
    with record_maps(model) as maps:
        model(*inputs, **options)
    return maps


@contextlib.contextmanager
def record_maps(model: nn.Module) -> Iterator[dict[str, AttentionMap]]:
    """Yields a dict that is filled inside with the map of each module's last call."""
    maps: dict[str, AttentionMap] = {}
    modules = {
        name.removesuffix(".attend"): module
        for name, module in model.named_modules()
        if isinstance(module, Attend)
    }
    if not modules:
        wrong_value("model", "one of fused_attention.models", type(model).__name__)

    def recorder(name: str) -> Callable[..., None]:
        def record(
            module: nn.Module,
            arguments: tuple[Tensor, Tensor, Tensor, Layout, Layout, bool],
            out: Tensor,
        ) -> None:
            q, k, _, queries, keys, causal = arguments
            if isinstance(queries, Packed) and isinstance(keys, Packed):
                q, k = queries.unpack(q).transpose(1, 2), keys.unpack(k).transpose(1, 2)
                keys = Padded(keys.lengths)
            if isinstance(keys, Cached):
                wrong_value("model", "whole sequences, not steps with a cache", "a cache")
            assert isinstance(keys, Padded)
            padding = keys.padding(k.shape[2])
            maps[name] = AttentionMap(
                q, k, key_padding_mask=padding, causal="top_left" if causal else False
            )

        return record

    hooks = [module.register_forward_hook(recorder(name)) for name, module in modules.items()]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def align(weights: Tensor) -> list[tuple[int, int]]:
    """Returns the monotonic path of weights [T, S] with the largest sum, from first to last cell.

    Dynamic time warping (Sakoe & Chiba 1978): each step moves on by a row, a column or both.
    """
    T, S = weights.shape
    gain = weights.tolist()
    total = [[-math.inf] * (S + 1) for _ in range(T + 1)]  # the largest sum of a path to each cell
    total[0][0] = 0.0
    moves = ((1, 1), (1, 0), (0, 1))
    came = [[moves[0]] * (S + 1) for _ in range(T + 1)]
    for i in range(1, T + 1):
        for j in range(1, S + 1):
            came[i][j] = max(moves, key=lambda move: total[i - move[0]][j - move[1]])
            total[i][j] = total[i - came[i][j][0]][j - came[i][j][1]] + gain[i - 1][j - 1]
    path = [(T, S)]
    while path[-1] != (1, 1):
        (i, j), (di, dj) = path[-1], came[path[-1][0]][path[-1][1]]
        path.append((i - di, j - dj))
    return [(i - 1, j - 1) for i, j in reversed(path)]
