"""Attention weights on request, without storing all of them.

    weights_ij = exp(s_ij - lse_i),  0 where key j is hidden

The fused kernel returns the log-denominator of each row, lse, from which any row of the weights can
be computed alone (Dao 2023, FlashAttention-2, Alg. 2). A question about all rows, such as the
entropy of each, is one of `attention_statistics`: memory O(B·Hq·S) beyond inputs and answer, time
O(B·Hq·Sq·Sk·D).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attention import attention
from ..attention_statistics import Call, attention_statistics, blocks, rows_of_weights
from ..attention_weights import no_value, read_call
from ..call.backends import choose
from ..call.problem import Problem, arguments_of
from ..errors import wrong_type, wrong_value
from ..operators.arguments import Arguments, split
from .attend import Attend, Cached, Layout, Packed, Padded

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..call.options import Keywords

DROPOUT = ("dropout_p", "philox_seed")
SEQUENCES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_k")
NOT_OF_MAPS = (*DROPOUT, *SEQUENCES, "block_table", "return_lse")
BLOCK_ELEMENTS = 1 << 20  # weights in a block, unless one row of each head has more


class AttentionMap:
    """The weights of one attention, [B, Hq, Sq, Sk], computed on request.

    query [B, Hq, Sq, D], key [B, Hkv, Sk, D]; the options are those of `attention` with the same
    meaning, except for dropout, packed sequences and pages. Nothing is differentiable. A row that
    sees no key has weights 0; with sinks a row sums to less than 1. Answers are float32 (float64
    for float64).

    Raises as `attention` does, and ArgumentTypeError for an option that maps do not have.
    """

    @torch.no_grad()
    def __init__(self, query: Tensor, key: Tensor, **options: Unpack[Keywords]) -> None:
        said: dict[str, Any] = dict(options)
        for name in NOT_OF_MAPS:
            if name in said:
                wrong_type(name, "nothing: a map is of a dense call without dropout", said[name])
        query, key, given, backend = read_call("AttentionMap", query, key, said)
        value = no_value(key)
        problem = Problem.from_call(query, key, value, given)
        self.row = choose(problem, backend, task="attention_weights")
        self.query, self.key, self.options = query.detach(), key.detach(), options
        self.arguments = Arguments(*arguments_of(query, key, split(problem.numbers)[1], given))
        _, self.lse = attention(self.query, self.key, value, return_lse=True, **options)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hq, Sq, Sk)."""
        B, Hq, Sq, _ = self.query.shape
        return B, Hq, Sq, self.key.shape[2]

    @torch.no_grad()
    def rows(self, rows: Sequence[int] | None = None, heads: Sequence[int] | None = None) -> Tensor:
        """Returns weights [B, len(heads), len(rows), Sk] of these queries and heads (None: all)."""
        B, Hq, Sq, Sk = self.shape
        chosen = []
        for name, numbers, size in (("rows", rows, Sq), ("heads", heads, Hq)):
            numbers = list(range(size) if numbers is None else numbers)
            if not all(0 <= number < size for number in numbers):
                wrong_value(name, f"numbers in [0, {size})", numbers)
            chosen.append(numbers)
        parts = [self._weights(*run, chosen[1]) for run in runs(chosen[0])]
        nothing = self.lse.new_empty(B, len(chosen[1]), 0, Sk)
        return torch.cat([nothing, *parts], 2)

    @torch.no_grad()
    def top_keys(self, n: int) -> tuple[Tensor, Tensor]:
        """Returns the n largest weights of each query, and their keys: two [B, Hq, Sq, n], sorted.

        The largest comes first. Where fewer keys are visible, the rest has weight 0 and any key.
        """
        if not 1 <= n <= self.shape[3]:
            wrong_value("n", f"an int in [1, {self.shape[3]}]", n)
        _, _, weights, keys = self._statistics("top", num_top=n)
        return weights, keys.clamp(min=0)

    def key_sums(self) -> Tensor:
        """Returns the sum of the weights of each key over all queries: [B, Hq, Sk]."""
        return self._statistics("mass")[0]

    def entropy(self) -> Tensor:
        """Returns -Σ_j p_ij log p_ij in nats, [B, Hq, Sq]: log n for n keys of equal weight."""
        return self._statistics("entropy")[1]

    @torch.no_grad()
    def _statistics(self, output: str, **number: int) -> Any:
        return attention_statistics(
            self.query, self.key, outputs=(output,), **number, **self.options
        )

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields all weights, a block of queries at a time: (rows, weights [B, Hq, rows, Sk])."""
        B, Hq, Sq, Sk = self.shape
        for begin, end in blocks(Sq, max(1, BLOCK_ELEMENTS // max(1, B * Hq * Sk))):
            yield slice(begin, end), self._weights(begin, end, range(Hq))

    def _weights(self, begin: int, end: int, heads: Sequence[int]) -> Tensor:
        """Returns the weights of queries [begin, end) and these heads."""
        chosen = torch.tensor(list(heads), dtype=torch.long, device=self.key.device)
        group = self.shape[1] // self.key.shape[1]

        def part(x: Tensor | None) -> Tensor | None:
            """Selects the heads of a mask or bias."""
            return x if x is None or x.shape[1] == 1 else x[:, chosen]

        a = self.arguments
        slopes = a.alibi_slopes
        of_heads = a._replace(
            mask=part(a.mask),
            bias=part(a.bias),
            alibi_slopes=None if slopes is None else slopes[..., chosen].contiguous(),
            sinks=None,  # lse has them
        )
        q, k, lse = self.query[:, chosen], self.key[:, chosen // group], self.lse[:, chosen]
        return rows_of_weights(Call(q, k, of_heads), lse, begin, end, self.row)


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) of each run of consecutive numbers, in their order."""
    begin = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[begin], numbers[i - 1] + 1
            begin = i


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
