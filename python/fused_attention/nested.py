"""Nested tensors as packed sequences of `attention`, and back.

The buffer of a jagged tensor [B, j, ...] is [T, ...], and its offsets are cu_seqlens, so attention
needs neither padding nor copies: time O(sum of Sq·Sk) instead of O(B·max Sq·max Sk). Strided
nested tensors have a buffer for each component, which are concatenated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .errors import wrong_value
from .operators._torch import is_compiling, ragged_dim, seqlen_bounds


class Packed(NamedTuple):
    """The sequences of a nested tensor: sequence b is rows offsets[b] to offsets[b + 1], or, if
    there are lengths, rows offsets[b] to offsets[b] + lengths[b]."""

    rows: Tensor  # [T, ...]
    offsets: Tensor  # int64 [B + 1]
    lengths: Tensor | None
    dim: int  # the ragged dimension of the nested tensor
    shortest: int | None  # as far as the tensor knows
    longest: int | None
    sizes: list[int] | None  # the lengths of a strided nested tensor


def any_nested(*tensors: Any) -> bool:
    return any(isinstance(x, Tensor) and x.is_nested for x in tensors)


def not_served(what: str) -> NoReturn:
    raise NotImplementedError(
        f"{what}: not supported for nested tensors. Hint: to_padded_tensor() makes a dense one"
    )


def check_nested(tensors: Mapping[str, Any]) -> None:
    """Raises unless all tensors are nested, with one layout, rank and batch size."""
    first = next(x for x in tensors.values() if any_nested(x))
    alike = f"of layout {first.layout} and {first.dim()} dimensions"
    kind = f"query, key and value to be nested tensors {alike}"
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.is_nested:
            wrong_value(name, kind, "a dense one" if isinstance(x, Tensor) else type(x).__name__)
        if x.layout != first.layout or x.dim() != first.dim():
            wrong_value(name, kind, f"one of layout {x.layout} and {x.dim()} dimensions")
        if x.size(0) != first.size(0):
            wrong_value(name, f"batch size {first.size(0)}, as the others", x.size(0))


def pack(name: str, x: Tensor, dim: int) -> Packed:
    """Returns the sequences of x, whose dimension `dim` they lie along."""
    if x.layout == torch.jagged:
        if ragged_dim(x) != dim:
            not_served(f"{name} whose ragged dimension is {ragged_dim(x)} of {x.dim()}")
        rows = x.values().movedim(dim - 1, 0)
        shortest, longest = seqlen_bounds(x)
        offsets, lengths = x.offsets(), x.lengths()  # type: ignore[attr-defined]
        return Packed(rows, offsets, lengths, dim, shortest, longest, None)
    parts = [part.movedim(dim - 1, 0) for part in x.unbind()]
    if len({part.shape[1:] for part in parts}) > 1:
        not_served(f"{name} that is ragged in another dimension than {dim}")
    sizes = [part.shape[0] for part in parts]
    offsets = torch.tensor([0, *sizes], device=x.device).cumsum(0)
    return Packed(torch.cat(parts), offsets, None, dim, min(sizes), max(sizes), sizes)


def nest(rows: Tensor, like: Packed) -> Tensor:
    """Returns rows [T, ...] as a nested tensor whose ragged size is that of `like`."""
    if like.sizes is not None:
        parts = [part.movedim(0, like.dim - 1) for part in rows.split(like.sizes)]
        return torch.nested.as_nested_tensor(parts, layout=torch.strided)
    return torch.nested.nested_tensor_from_jagged(
        rows.movedim(0, like.dim - 1),
        like.offsets,
        like.lengths,
        jagged_dim=like.dim,
        min_seqlen=like.shortest,
        max_seqlen=like.longest,
    )


def check_same_sequences(name: str, x: Packed, other: str, like: Packed) -> None:
    """Raises unless the sequences of x lie where those of `like` do."""
    if x.offsets is like.offsets and x.lengths is like.lengths:
        return
    if is_compiling():
        wrong_value(name, f"the offsets and lengths of {other}", "other tensors")
    for a, b in ((x.offsets, like.offsets), (lengths_of(x), lengths_of(like))):
        if not torch.equal(a, b):
            wrong_value(name, f"the offsets and lengths of {other}, {b.tolist()}", a.tolist())


def options_of(query: Packed, key: Packed) -> dict[str, Any]:
    """Returns the options of `attention` that say where the sequences lie.

    With lengths, the rows between the sequences are sequences too, of which no key is used: their
    outputs and gradients are 0, and nothing in them is read.
    """
    if query.lengths is None and key.lengths is None:
        starts = query.offsets.to(torch.int32)
        same = key.offsets is query.offsets
        return {
            "cu_seqlens_q": starts,
            "cu_seqlens_k": starts if same else key.offsets.to(torch.int32),
            "max_seqlen_q": query.longest,
            "max_seqlen_k": key.longest,
        }
    used = lengths_of(key)
    return {
        "cu_seqlens_q": _starts_and_ends(query),
        "cu_seqlens_k": _starts_and_ends(key),
        "seqused_k": torch.stack([torch.zeros_like(used), used], 1).flatten().to(torch.int32),
    }


def _starts_and_ends(x: Packed) -> Tensor:
    """Returns 0, and the start and end of each sequence: int32 [2 B + 1]."""
    starts = x.offsets[:-1]
    ends = torch.stack([starts, starts + lengths_of(x)], 1).flatten()
    return torch.cat([ends.new_zeros(1), ends]).to(torch.int32)


def lengths_of(x: Packed) -> Tensor:
    """Returns the lengths of the sequences, int64 [B]."""
    return x.offsets.diff() if x.lengths is None else x.lengths


def pad(x: Packed) -> tuple[Tensor, Tensor]:
    """Returns the rows [B, longest, ...], with zeros after each sequence, and their numbers
    [B, longest], which are -1 there."""
    lengths = lengths_of(x)
    numbers = torch.arange(int(lengths.max()), device=lengths.device)
    rows = (x.offsets[:-1, None] + numbers).masked_fill(numbers >= lengths[:, None], -1)
    dense = x.rows.new_zeros(*rows.shape, *x.rows.shape[1:])
    return dense.index_put((rows >= 0,), x.rows[rows[rows >= 0]]), rows


def unpad(dense: Tensor, rows: Tensor, count: int) -> Tensor:
    """Returns [count, ...]: the rows of `dense` in the places that `pad` took them from, else 0."""
    inside = rows >= 0
    return dense.new_zeros(count, *dense.shape[2:]).index_put((rows[inside],), dense[inside])
