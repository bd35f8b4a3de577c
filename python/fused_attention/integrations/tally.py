"""Counts the calls that reach a patch, and says why some were left to the original."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch

from ..call.backends import REFERENCE, first_without_reason
from ..call.problem import Problem, cast_for_autocast
from ..operators._torch import is_jit_tracing
from ..sdpa import describe


class Kind(NamedTuple):
    """What calls have in common, without batch sizes and lengths, so that a tally stays small."""

    sizes: tuple[tuple[int, int], ...]  # heads and head_dim of query, key and value
    dtype: torch.dtype
    mask: torch.dtype | None
    drops: bool
    causal: bool

    def cells(self) -> tuple[str, ...]:
        sizes = (f"{heads} x {head_dim}" for heads, head_dim in self.sizes)
        options = ["causal"] if self.causal else []
        if self.mask is not None:
            options.append(f"mask {_name(self.mask)}")
        if self.drops:
            options.append("dropout")
        return (*sizes, _name(self.dtype), ", ".join(options))


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


class Tally:
    """Counts calls of `scaled_dot_product_attention`, and the kinds of those that were left to the
    original; keeps no tensor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._left: dict[Kind | None, tuple[int, str]] = {}
        self.operators = 0  # calls of the native function whose operator was ours

    def clear(self) -> None:
        with self._lock:
            self._calls, self._left, self.operators = 0, {}, 0

    def count(self) -> None:
        with self._lock:
            self._calls += 1

    def leave(self, *inputs: Any, scale: Any = None, enable_gqa: Any = False) -> None:
        """Notes that a call, which was counted, goes to the original. inputs: query, key, value,
        attn_mask, dropout_p, is_causal."""
        kind = _kind(*inputs)
        known = self._left.get(kind)
        reason = _reason(inputs, scale, enable_gqa) if known is None else known[1]
        with self._lock:
            self._left[kind] = self._left.get(kind, (0, ""))[0] + 1, reason

    def report(self) -> str:
        """Returns the counts as text: in its first line all calls, then each kind that was left."""
        from ..tools import console

        with self._lock:
            calls, left, operators = self._calls, dict(self._left), self.operators
        away = sum(number for number, _ in left.values())
        lines = [f"{calls} calls: {calls - away} served here, {away} left to the original"]
        if left:
            header = ("query", "key", "value", "dtype", "options", "left")
            rows = [
                (*(kind.cells() if kind else ("others", *[""] * 4)), str(number))
                for kind, (number, _) in left.items()
            ]
            columns = console.width()
            table = console.fitting_table(header, rows, (0,) * len(header), columns).split("\n")
            lines += table[:2]
            for line, (_, reason) in zip(table[2:], left.values(), strict=True):
                lines += [line, console.paragraph(f"  {reason}", columns)]
        if operators:
            lines.append(f"{operators} calls of the native function ran our operator in its place")
        return "\n".join(lines)


def _kind(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: Any, is_causal: Any
) -> Kind | None:
    """Returns the kind of a call; None for wrong calls, nested tensors, and sizes that are no
    numbers, as in a trace."""
    try:
        if not query.is_nested and not is_jit_tracing():
            sizes = tuple(
                (x.shape[-3] if x.dim() > 2 else 1, x.shape[-1]) for x in (query, key, value)
            )
            mask = None if attn_mask is None else attn_mask.dtype
            kind = Kind(sizes, query.dtype, mask, bool(dropout_p), is_causal is True)
            hash(kind)  # SymInt has none
            return kind
    except (AttributeError, IndexError, RuntimeError, TypeError):
        pass
    return None


def _reason(inputs: tuple[Any, ...], scale: Any, enable_gqa: Any) -> str:
    """Returns why no kernel of ours serves a call."""
    query, key, value, attn_mask, dropout_p, is_causal = inputs
    try:
        q, k, v, mask = cast_for_autocast(query, key, value, attn_mask)
        call = describe(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa)
        row, refused = first_without_reason(Problem.from_call(*call.tensors, call.options))
    except (RuntimeError, TypeError) as error:  # a wrong call, or one that no row serves
        return " ".join(str(error).split())
    if row is REFERENCE:
        return "; ".join(f"not {name}: {'; '.join(reasons)}" for name, reasons in refused.items())
    return "an export, or compiled inside a transform"
