"""memory_efficient_attention and the masks of xFormers 0.0.33 (xformers.ops.fmha) on `attention`.

    s_ij = scale · q_i·k_j + attn_bias_ij

Signatures, layouts, classes and meaning are the original's: tensors are [B, M, H, K], or
[B, M, G, H, K] where H query heads share each of G key heads, or [B, M, K]. No mask is built: each
class becomes options of `attention`, whose time and memory these are. xFormers is not needed; its
own masks are accepted too, by the names of their classes. The classes are here and, as in the
original, under `attn_bias` and `fmha`, which are both this module.

More is served than by the original: tensors on the CPU, float64, any head_dim that `attention`
takes, gradients for every mask and layout and of every tensor that is a bias, a bias with sizes of
1, keys with fewer heads than queries, a mask on another device (it is copied at each call), and
blocks in which some queries see no key.

Five things differ. Wrong calls raise ArgumentValueError or ArgumentTypeError. The random bits of
dropout are those of `attention`. A query that sees no key gives 0, and lse -inf; the original gives
NaN or +inf. The lse of packed sequences is always packed, [1, H, M]. No kernel can be demanded: an
`op` other than None raises NotImplementedError, and so does a subclass of a mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..call.problem import check_number, check_shape, check_tensor, shape_of
from ..errors import describe_error, wrong_type, wrong_value
from ..merge import merge_attention_states
from ..operators._torch import is_compiling
from .flash_attn import attend
from .handle import Handle
from .stand_in import StandIn

Options = dict[str, Any]  # keywords of `attention`
Device = torch.device | str

LAYOUTS = {3: "[B, M, K]", 4: "[B, M, H, K]", 5: "[B, M, G, H, K]"}

# -- Lengths of sequences ------------------------------------------------------------------


def _lengths(name: str, lengths: Any) -> list[int]:
    """Returns lengths as a list, checked."""
    if isinstance(lengths, Tensor) or not isinstance(lengths, Iterable):
        hint = "use tolist()" if isinstance(lengths, Tensor) else ""
        wrong_type(name, "a list of lengths", type(lengths).__name__, hint)
    lengths = list(lengths)
    if not all(isinstance(x, int) and x >= 0 for x in lengths):
        wrong_value(name, "ints >= 0", lengths)
    return lengths


def _int32(numbers: list[int], device: Device | None) -> Tensor:
    """Returns an int32 tensor; on a GPU without waiting for it. None: a GPU if there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    pinned = torch.device(device).type == "cuda"
    on_cpu = torch.tensor(numbers, dtype=torch.int32, pin_memory=pinned)
    return on_cpu.to(device, non_blocking=True)


def _check_count(name: str, lengths: list[int], batch: int) -> None:
    if len(lengths) != batch:
        wrong_value(name, f"as many numbers as q_seqlen has: {batch}", len(lengths))


@dataclass(eq=False)
class _OnDevice:
    """Has tensors, perhaps in other objects of this kind."""

    def to(self, device: Device) -> Any:
        """Returns a copy on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{n: x.to(device) for n, x in values.items() if hasattr(x, "to")})


@dataclass(eq=False)
class _SeqLenInfo(_OnDevice):
    """Sequences one after another: sequence b is tokens seqstart[b] to seqstart[b + 1]."""

    seqstart: Tensor  # int32 [B + 1]
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]  # seqstart, without a transfer from the device

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: Device | None = None) -> _SeqLenInfo:
        lengths = _lengths("seqlens", seqlens)
        starts = [0, *accumulate(lengths)]
        longest, shortest = max(lengths, default=0), min(lengths, default=0)
        return cls(_int32(starts, device), longest, shortest, starts)

    def intervals(self) -> Iterator[tuple[int, int]]:
        """Yields the first token of each sequence, and the one after its last."""
        return zip(self.seqstart_py, self.seqstart_py[1:], strict=False)

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """Returns the sequences of x [1, M, ...] as [n, m, ...], for each n of batch_sizes (default
        1 each) n sequences of one length m."""
        check_tensor("tensor", x)
        starts = self.seqstart_py
        if tuple(x.shape[:2]) != (1, starts[-1]):
            wrong_value("tensor", f"shape [1, {starts[-1]}, ...]", shape_of(x))
        counts = [1] * (len(starts) - 1) if batch_sizes is None else batch_sizes
        ends = [starts[n] for n in accumulate(counts)]
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        parts = zip(x.split(sizes, 1), counts, sizes, strict=True)
        return [part.reshape(n, size // max(n, 1), *x.shape[2:]) for part, n, size in parts]


@dataclass(eq=False)
class _PartlyUsed(_SeqLenInfo):
    """Sequences of which seqlen[b] tokens are used, from seqstart[b] on."""

    seqlen: Tensor  # int32 [B]
    seqlen_py: list[int]

    def intervals(self) -> Iterator[tuple[int, int]]:
        lengths = zip(self.seqstart_py, self.seqlen_py, strict=False)
        return ((start, start + length) for start, length in lengths)


@dataclass(eq=False)
class _PaddedSeqLenInfo(_PartlyUsed):
    """Sequences in rooms of `padding` tokens each, of which the first ones are used."""

    padding: int

    @classmethod
    def from_seqlens_padded(
        cls, seqlens: Sequence[int], padding: int, *, device: Device | None = None
    ) -> _PaddedSeqLenInfo:
        lengths = _lengths("kv_seqlen", seqlens)
        longest = max(lengths, default=0)
        if longest > padding:
            wrong_value("kv_seqlen", f"lengths of at most kv_padding = {padding}", longest)
        starts = [padding * b for b in range(len(lengths) + 1)]
        return cls(
            seqstart=_int32(starts, device),
            max_seqlen=longest,
            min_seqlen=min(lengths, default=0),
            seqstart_py=starts,
            seqlen=_int32(lengths, device),
            seqlen_py=lengths,
            padding=padding,
        )


@dataclass(eq=False)
class _GappySeqInfo(_PartlyUsed):
    """Sequences anywhere. Where keys are paged, tokens are numbered within the pages of each
    sequence, and seqlen[b] is the token after its last."""

    @classmethod
    def from_seqlens_gappy(
        cls,
        seqstarts: Sequence[int],
        seqlens: Sequence[int],
        paged: bool,
        *,
        device: Device | None = None,
    ) -> _GappySeqInfo:
        """seqstarts: [B + 1], the last is the number of all tokens; if paged [B]."""
        starts, lengths = _lengths("kv_seqstarts", seqstarts), _lengths("kv_seqlen", seqlens)
        if len(starts) != len(lengths) + (not paged):
            expected = "one number more than kv_seqlen has" if not paged else "as many as kv_seqlen"
            wrong_value("kv_seqstarts", f"{expected}: {len(lengths)}", len(starts))
        ends = [start + length for start, length in zip(starts, lengths, strict=False)]
        if not paged and max(ends, default=0) > starts[-1]:
            expected = f"sequences that end within the {starts[-1]} tokens of kv_seqstarts[-1]"
            wrong_value("kv_seqlen", expected, f"one that ends at {max(ends)}")
        starts += [-1] * paged
        used = ends if paged else lengths
        return cls(
            seqstart=_int32(starts, device),
            max_seqlen=max(lengths, default=0),
            min_seqlen=min(lengths, default=0),
            seqstart_py=starts,
            seqlen=_int32(used, device),
            seqlen_py=used,
        )


# -- Masks of dense tensors ----------------------------------------------------------------


class AttentionBias:
    """The base of all masks."""

    def materialize(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: Device = "cpu",
    ) -> Tensor:
        """Returns what is added to the scores [..., Mq, Mkv] = shape: 0 where a query sees a key,
        else -inf. For tests: `memory_efficient_attention` never does this."""
        seen = self._visible(*shape[-2:]).to(device)
        shape = (*shape[:-2], *seen.shape)
        return torch.zeros(shape, dtype=dtype, device=device).masked_fill(~seen, -torch.inf)

    def _visible(self, queries: int, keys: int) -> Tensor:
        """Returns bool [queries, keys], True where a query sees a key."""
        return _visible(queries, keys, **_options_of(self))


def _visible(
    queries: int, keys: int, causal: Any = False, diagonal: Any = None, window_size: Any = (-1, -1)
) -> Tensor:
    """Returns which keys the queries see by these options of `attention`, bool [queries, keys]."""
    from ..reference import diagonal_offset, visible

    used = torch.tensor([keys])
    off = diagonal_offset(causal, queries, used, diagonal)
    return visible((1, 1, queries, keys), off, used, causal, window_size)[0, 0]


def _check_window(name: str, x: Any, least: int) -> None:
    if not (isinstance(x, int) and x >= least):
        wrong_value(name, f"an int >= {least}, in tokens", repr(x))


class LowerTriangularMask(AttentionBias):
    """Causal from the top left: query i sees keys j <= i. device: of no use, as in the original."""

    def __init__(self, device: Device | None = None) -> None:
        pass

    def to(self, device: Device) -> LowerTriangularMask:
        return self

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        """Returns this mask together with a bias [B, H, Mq, Mkv]."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Causal from the top left, with a bias [B, H, Mq, Mkv]; differentiable in it."""

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias

    def to(self, device: Device) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(self._bias.to(device))

    def materialize(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: Device = "cpu",
    ) -> Tensor:
        return super().materialize(shape, dtype, device) + self._bias


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Causal from the bottom right: query i sees keys j <= i + Mkv - Mq."""

    def to(self, device: Device) -> LowerTriangularFromBottomRightMask:
        return self

    def make_local_attention(
        self, window_size: int
    ) -> LowerTriangularFromBottomRightLocalAttentionMask:
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """Query i sees the last _window_size keys up to its own, key i + Mkv - Mq."""

    _window_size: int

    def __post_init__(self) -> None:
        _check_window("window_size", self._window_size, 1)


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """Query i sees i - window_left <= j + Mq - Mkv <= i + window_right."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        _check_window("window_left", self.window_left, 0)
        _check_window("window_right", self.window_right, 0)

    def to(self, device: Device) -> LocalAttentionFromBottomRightMask:
        return self


# -- Masks of packed sequences -------------------------------------------------------------


@dataclass(eq=False)
class _OfSequences(AttentionBias, _OnDevice):
    """Query and keys are sequences in one [1, M, ...]; a query sees keys of its own sequence."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: Any

    def _key_places(self) -> tuple[int, list[list[int]]]:
        """Returns the number of all keys and, for each sequence, where its keys are."""
        places = [list(range(*interval)) for interval in self.k_seqinfo.intervals()]
        return self.k_seqinfo.seqstart_py[-1], places

    def _visible(self, queries: int, keys: int) -> Tensor:
        expected = (self.q_seqinfo.seqstart_py[-1], self._number_of_keys())
        if (queries, keys) != expected:
            wrong_value("shape", f"(..., Mq, Mkv), which are {expected}", f"{(queries, keys)}")
        count, places = self._key_places()
        options = _options_of(self)
        seen = torch.zeros(queries, count, dtype=torch.bool)
        for (start, end), columns in zip(self.q_seqinfo.intervals(), places, strict=True):
            seen[start:end, columns] = _visible(end - start, len(columns), **options)
        return seen

    def _number_of_keys(self) -> int:
        return self.k_seqinfo.seqstart_py[-1]


@dataclass(eq=False)
class BlockDiagonalMask(_OfSequences):
    """Sequences that lie one after another, queries and keys each.

    _batch_sizes: how many sequences each tensor of `from_tensor_list` had, for `split`.
    """

    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int] | None = None,
        *,
        device: Device | None = None,
    ) -> Any:
        """q_seqlen, kv_seqlen: the lengths, the same if kv_seqlen is None. device: default a GPU if
        there is one, as for all masks."""
        q_seqinfo = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        if kv_seqlen is None:
            return cls(q_seqinfo, q_seqinfo)
        lengths = _lengths("kv_seqlen", kv_seqlen)
        _check_count("kv_seqlen", lengths, len(q_seqinfo.seqstart_py) - 1)
        return cls(q_seqinfo, _SeqLenInfo.from_seqlens(lengths, device=device))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[Any, Tensor]:
        """Packs tensors [B_i, M_i, ...]; returns their mask and one tensor [1, Σ B_i M_i, ...]."""
        mask, packed, _, _ = cls.from_tensor_lists_qkv(tensors, tensors)
        return mask, packed

    @classmethod
    def from_tensor_lists_qkv(
        cls,
        tensors_q: Sequence[Tensor],
        tensors_k: Sequence[Tensor],
        tensors_v: Sequence[Tensor] | None = None,
    ) -> tuple[Any, Tensor, Tensor, Tensor | None]:
        """`from_tensor_list` for queries, keys and values: returns the mask and three tensors."""
        if not tensors_q:
            wrong_value("tensors", "at least one", 0)
        for name, tensors in (("tensors_k", tensors_k), ("tensors_v", tensors_v)):
            sizes = None if tensors is None else [x.shape[0] for x in tensors]
            if sizes not in (None, [x.shape[0] for x in tensors_q]):
                wrong_value(name, "tensors of the batch sizes of tensors_q", sizes)
        same = tensors_q is tensors_k
        q_seqlen, kv_seqlen = (
            [x.shape[1] for x in tensors for _ in range(x.shape[0])]
            for tensors in (tensors_q, tensors_k)
        )
        device = tensors_q[0].device
        mask = cls.from_seqlens(q_seqlen, None if same else kv_seqlen, device=device)
        mask._batch_sizes = [x.shape[0] for x in tensors_q]
        query = _packed(tensors_q)
        key = query if same else _packed(tensors_k)
        return mask, query, key, None if tensors_v is None else _packed(tensors_v)

    def split_queries(self, tensor: Tensor) -> Sequence[Tensor]:
        """Returns the queries of each tensor of `from_tensor_list`, views of tensor [1, M, ...]."""
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor: Tensor) -> Sequence[Tensor]:
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """`split_queries` where queries and keys have the same lengths."""
        if self.q_seqinfo.seqstart_py != self.k_seqinfo.seqstart_py:
            hint = "use split_queries or split_kv"
            wrong_value("tensor", "queries and keys of the same lengths", "others", hint)
        return self.split_queries(tensor)

    def _parts(self) -> tuple[_SeqLenInfo, _SeqLenInfo, Sequence[int] | None]:
        return self.q_seqinfo, self.k_seqinfo, self._batch_sizes

    def make_causal(self) -> BlockDiagonalCausalMask:
        return BlockDiagonalCausalMask(*self._parts())

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        return BlockDiagonalCausalFromBottomRightMask(*self._parts())

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        return BlockDiagonalCausalLocalAttentionMask(*self._parts(), window_size)

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(*self._parts(), window_size)


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten(0, 1) for x in tensors]).unsqueeze(0)


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Each sequence as in `LowerTriangularMask`."""


@dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """Query i of a sequence sees i - _window_size < j <= i."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _check_window("window_size", self._window_size, 1)


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Each sequence as in `LowerTriangularFromBottomRightMask`."""


@dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """Each sequence as in `LowerTriangularFromBottomRightLocalAttentionMask`."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _check_window("window_size", self._window_size, 1)


# -- Masks of padded keys ------------------------------------------------------------------


@dataclass(eq=False)
class BlockDiagonalPaddedKeysMask(_OfSequences):
    """Keys lie in rooms of one size, one for each sequence, of which the first ones are used."""

    k_seqinfo: _PaddedSeqLenInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: Any = None,
        *,
        device: Device | None = None,
    ) -> Any:
        """q_seqlen: the lengths of the queries. kv_padding: the room for the keys of a sequence.
        kv_seqlen: how many of them are used. causal_diagonal: of no use, as in the original."""
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, device))

    def make_paged(
        self,
        block_tables: Tensor,
        page_size: int,
        paged_type: type[PagedBlockDiagonalPaddedKeysMask],
    ) -> PagedBlockDiagonalPaddedKeysMask:
        """Returns this mask for keys in pages: see `PagedBlockDiagonalPaddedKeysMask`."""
        k_seqinfo = replace(self.k_seqinfo, padding=block_tables.shape[1] * page_size)
        return paged_type(self.q_seqinfo, k_seqinfo, block_tables, page_size)

    def make_local_attention(
        self, window_left: int, window_right: int
    ) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        lengths = (self.q_seqinfo, self.k_seqinfo)
        return BlockDiagonalLocalAttentionPaddedKeysMask(*lengths, window_left, window_right)


def _padded(
    q_seqlen: Sequence[int],
    kv_padding: int,
    kv_seqlen: Sequence[int],
    device: Device | None = None,
) -> tuple[_SeqLenInfo, _PaddedSeqLenInfo]:
    q_seqinfo = _SeqLenInfo.from_seqlens(_lengths("q_seqlen", q_seqlen), device=device)
    lengths = _lengths("kv_seqlen", kv_seqlen)
    _check_count("kv_seqlen", lengths, len(q_seqinfo.seqstart_py) - 1)
    return q_seqinfo, _PaddedSeqLenInfo.from_seqlens_padded(lengths, kv_padding, device=device)


@dataclass(eq=False)
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Each sequence as in `LowerTriangularFromBottomRightMask`, measured from its last used key."""

    causal_diagonal: Any = None


@dataclass(eq=False)
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Each sequence as in `LocalAttentionFromBottomRightMask`, measured from its last used key."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        _check_window("window_left", self.window_left, 0)
        _check_window("window_right", self.window_right, 0)

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
    ) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen), window_left, window_right)


@dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Each sequence as in `LowerTriangularFromBottomRightLocalAttentionMask`, measured from its
    last used key."""

    _window_size: int

    def __post_init__(self) -> None:
        _check_window("window_size", self._window_size, 1)

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_size: int,
    ) -> BlockDiagonalCausalLocalAttentionPaddedKeysMask:
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen), window_size)


# -- Masks of gappy keys -------------------------------------------------------------------


@dataclass(eq=False)
class BlockDiagonalGappyKeysMask(_OfSequences):
    """The keys of each sequence lie anywhere among [1, Mkv, ...], in one piece."""

    k_seqinfo: _GappySeqInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        *,
        device: Device | None = None,
    ) -> Any:
        """kv_seqstarts: [B + 1], the first key of each sequence, then Mkv. kv_seqlen: [B]."""
        q_seqinfo = _SeqLenInfo.from_seqlens(_lengths("q_seqlen", q_seqlen), device=device)
        lengths = _lengths("kv_seqlen", kv_seqlen)
        _check_count("kv_seqlen", lengths, len(q_seqinfo.seqstart_py) - 1)
        k_seqinfo = _GappySeqInfo.from_seqlens_gappy(kv_seqstarts, lengths, False, device=device)
        return cls(q_seqinfo, k_seqinfo)

    def make_paged(
        self,
        block_tables: Tensor,
        page_size: int,
        notional_padding: int,
        paged_type: type[PagedBlockDiagonalGappyKeysMask],
    ) -> AttentionBias:
        """Returns this mask for keys in pages, if sequence b is within the notional_padding tokens
        from b · notional_padding on: these are then the pages of row b of block_tables."""
        if notional_padding % page_size != 0:
            expected = f"a multiple of page_size {page_size}"
            wrong_value("notional_padding", expected, notional_padding)
        k, room = self.k_seqinfo, block_tables.shape[1] * page_size
        intervals = [
            (start - b * notional_padding, end - b * notional_padding)
            for b, (start, end) in enumerate(k.intervals())
        ]
        if not all(0 <= start <= end <= room for start, end in intervals):
            wrong_value("block_tables", f"room for these tokens: {intervals}", f"{room} tokens")
        rooms = notional_padding * torch.arange(len(intervals) + 1, device=k.seqstart.device)
        starts = (k.seqstart - rooms).int()
        k_seqinfo = replace(
            k,
            seqstart=starts,
            seqstart_py=[start for start, _ in intervals] + [-1],
            seqlen=k.seqlen + starts[:-1],
            seqlen_py=[end for _, end in intervals],
        )
        return paged_type(self.q_seqinfo, k_seqinfo, block_tables, page_size)


class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    """Each sequence as in `LowerTriangularFromBottomRightMask`."""


# -- Masks of paged keys -------------------------------------------------------------------


@dataclass(eq=False)
class _OfPages(_OfSequences):
    """Keys are [1, pages · page_size, ...]: token n of sequence b is row n % page_size of page
    block_tables[b, n // page_size]. block_tables: int32 [B, max_pages]."""

    block_tables: Tensor
    page_size: int

    def _key_places(self) -> tuple[int, list[list[int]]]:
        tables, size = self.block_tables.tolist(), self.page_size
        places = [
            [table[n // size] * size + n % size for n in range(start, end)]
            for table, (start, end) in zip(tables, self._token_intervals(), strict=True)
        ]
        pages = 1 + max((page for table in tables for page in table), default=-1)
        return pages * size, places

    def _token_intervals(self) -> Iterator[tuple[int, int]]:
        return ((0, length) for length in self.k_seqinfo.seqlen_py)

    def _number_of_keys(self) -> int:
        return self.block_tables.numel() * self.page_size


@dataclass(eq=False)
class PagedBlockDiagonalPaddedKeysMask(_OfPages):
    """Sequence b sees its first kv_seqlen[b] tokens.

    `materialize` takes the shape for max_pages · page_size keys of each sequence, and returns the
    bias for all pages up to the last in use, as the original does.
    """

    k_seqinfo: _PaddedSeqLenInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: Device | None = None,
    ) -> Any:
        lengths = _padded(q_seqlen, block_tables.shape[1] * page_size, kv_seqlen, device)
        return cls(*lengths, block_tables, page_size)


class PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    """`BlockDiagonalCausalWithOffsetPaddedKeysMask` for pages."""


@dataclass(eq=False)
class PagedBlockDiagonalGappyKeysMask(_OfPages):
    """Sequence b sees kv_seqlen[b] of its tokens, from kv_seqstarts[b] on."""

    k_seqinfo: _GappySeqInfo

    def _token_intervals(self) -> Iterator[tuple[int, int]]:
        return zip(self.k_seqinfo.seqstart_py, self.k_seqinfo.seqlen_py, strict=False)

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: Device | None = None,
    ) -> Any:
        """kv_seqstarts, kv_seqlen: [B], within the tokens of each sequence. device: default that of
        block_tables."""
        device = block_tables.device if device is None else device
        q_seqinfo = _SeqLenInfo.from_seqlens(_lengths("q_seqlen", q_seqlen), device=device)
        lengths = _lengths("kv_seqlen", kv_seqlen)
        _check_count("kv_seqlen", lengths, len(q_seqinfo.seqstart_py) - 1)
        k_seqinfo = _GappySeqInfo.from_seqlens_gappy(kv_seqstarts, lengths, True, device=device)
        return cls(q_seqinfo, k_seqinfo, block_tables, page_size)


class PagedBlockDiagonalCausalWithOffsetGappyKeysMask(PagedBlockDiagonalGappyKeysMask):
    """`BlockDiagonalCausalWithOffsetGappyKeysMask` for pages."""


# -- What a mask is to `attention` ---------------------------------------------------------


def _everything(mask: Any) -> Options:
    return {}


def _causal(mask: Any) -> Options:
    return {"causal": "top_left"}


def _local(mask: Any) -> Options:
    return {"causal": "top_left", "window_size": (mask._window_size - 1, -1)}


def _causal_from_end(mask: Any) -> Options:
    return {"causal": "bottom_right"}


def _local_from_end(mask: Any) -> Options:
    return {"causal": "bottom_right", "window_size": (mask._window_size - 1, -1)}


def _window_from_end(mask: Any) -> Options:
    return {"diagonal": "bottom_right", "window_size": (mask.window_left, mask.window_right)}


# Which keys of its own sequence a query sees. The names are those of xFormers' own classes, too.
_OPTIONS: dict[str, Callable[[Any], Options]] = {
    "LowerTriangularMask": _causal,
    "LowerTriangularMaskWithTensorBias": _causal,
    "LowerTriangularFromBottomRightMask": _causal_from_end,
    "LowerTriangularFromBottomRightLocalAttentionMask": _local_from_end,
    "LocalAttentionFromBottomRightMask": _window_from_end,
    "BlockDiagonalMask": _everything,
    "BlockDiagonalCausalMask": _causal,
    "BlockDiagonalCausalLocalAttentionMask": _local,
    "BlockDiagonalCausalFromBottomRightMask": _causal_from_end,
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": _local_from_end,
    "BlockDiagonalPaddedKeysMask": _everything,
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": _causal_from_end,
    "BlockDiagonalLocalAttentionPaddedKeysMask": _window_from_end,
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": _local_from_end,
    "BlockDiagonalGappyKeysMask": _everything,
    "BlockDiagonalCausalWithOffsetGappyKeysMask": _causal_from_end,
    "PagedBlockDiagonalPaddedKeysMask": _everything,
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask": _causal_from_end,
    "PagedBlockDiagonalGappyKeysMask": _everything,
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask": _causal_from_end,
}


def _options_of(mask: Any) -> Options:
    """Returns causal, diagonal and window_size."""
    name = type(mask).__name__
    if name in _OPTIONS:
        return _OPTIONS[name](mask)
    if not hasattr(mask, "materialize"):
        wrong_type("attn_bias", "None, a torch.Tensor or an AttentionBias", name)
    hint = "pass attn_bias.materialize(shape, dtype, device)"
    raise NotImplementedError(describe_error("attn_bias", "a class of xFormers", name, hint))


def _sequences_of(mask: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Options]:
    """Returns key, value [Mkv, Hkv, K] and options as `attention` takes them."""
    q, k = mask.q_seqinfo, mask.k_seqinfo
    options: Options = {"cu_seqlens_q": q.seqstart, "max_seqlen_q": q.max_seqlen}
    paged = hasattr(mask, "block_tables")
    if not hasattr(k, "seqlen"):
        return key, value, options | {"cu_seqlens_k": k.seqstart, "max_seqlen_k": k.max_seqlen}
    if not hasattr(k, "padding"):  # each token is a page
        options |= _table_of_tokens(mask, k)
        return key.unsqueeze(1), value.unsqueeze(1), options
    options["seqused_k"] = k.seqlen
    if not paged:
        return key, value, options | {"cu_seqlens_k": k.seqstart, "max_seqlen_k": k.max_seqlen}
    if key.shape[0] % mask.page_size != 0:
        wrong_value("key", f"pages of {mask.page_size} tokens", f"{key.shape[0]} tokens")
    key, value = (x.unflatten(0, (-1, mask.page_size)) for x in (key, value))
    return key, value, options | {"block_table": mask.block_tables.to(torch.int32)}


def _table_of_tokens(mask: Any, k: Any) -> Options:
    """Returns the block table of a gappy mask for pages of one token, and the lengths."""
    starts = k.seqstart[:-1]
    tokens = starts.unsqueeze(1) + torch.arange(k.max_seqlen, device=starts.device)
    if not hasattr(mask, "block_tables"):
        return {"block_table": tokens.int(), "seqused_k": k.seqlen}
    size = mask.page_size
    pages = (tokens // size).clamp(max=mask.block_tables.shape[1] - 1)
    table = mask.block_tables.gather(1, pages) * size + tokens % size
    return {"block_table": table.int(), "seqused_k": k.seqlen - starts}


# -- Attention -----------------------------------------------------------------------------


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Attention for query [B, Mq, H, K], key [B, Mkv, H, K], value [B, Mkv, H, Kv].

    Or [B, M, G, H, K] each, where key and value are expanded over H (stride 0) or have 1 there:
    query heads g · H to g · H + H - 1 read key head g, without a copy. Keys and values with
    different heads over H, and those [B, M, H, K] with fewer heads than query, are served too. Or
    [B, M, K] each, for H = 1. Any strides. Returns [B, Mq, H, Kv] ([B, Mq, G, H, Kv], [B, Mq, Kv])
    in query's dtype, contiguous.

    attn_bias: floating [B, H, Mq, Mkv] ([B, G, H, Mq, Mkv], [B, Mq, Mkv]), sizes may be 1: added to
        the scores, differentiable. Or one of the masks of this module. Those of sequences take
        B = 1: tokens of query after the last sequence give 0, and such keys are hidden.
    p: probability in [0, 1] of dropping a weight. Random bits follow torch.manual_seed, whether
        gradients are required or not.
    scale: default 1/sqrt(K).
    op: None. Others raise NotImplementedError; `attention(backend=)` chooses a backend.
    output_dtype: the result, rounded to query's dtype, is cast to it.

    A query that sees no key gives 0 and zero gradients. Differentiable as `attention` is;
    deterministic. If key or value are expanded over H, their whole gradient is at h = 0, so that
    what they were expanded from gets the right one.

    Raises ArgumentValueError (ValueError, RuntimeError) and ArgumentTypeError (TypeError,
    RuntimeError) for wrong arguments.
    """
    return _attend(query, key, value, attn_bias, p, scale, op, output_dtype)


def memory_efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`memory_efficient_attention` without gradients."""
    with torch.no_grad():
        return _attend(query, key, value, attn_bias, p, scale, op, output_dtype)


def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) for `memory_efficient_attention_backward`. No gradients of its own.

    lse [B, H, Mq] ([B, G, H, Mq]; [B, 1, Mq] for [B, M, K]), float32 (float64 for float64), is the
    logarithm of the denominator. p must be 0, as in the original.
    """
    _refuse_dropout(p)
    with torch.no_grad():
        return _attend(query, key, value, attn_bias, p, scale, op, output_dtype, return_lse=True)


def memory_efficient_attention_backward(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients (dq, dk, dv) for grad, the gradient of output.

    output, lse: what `memory_efficient_attention_forward_requires_grad` returned, or the results of
    `merge_attentions` over more keys: then dk and dv are those of these keys, and the dq of all
    parts add up. Computes the forward again. p must be 0, as in the original.
    """
    _refuse_dropout(p)
    query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
    with torch.enable_grad():
        results = _attend(query, key, value, attn_bias, p, scale, op, None, return_lse=True)
    out, own_lse = (x.detach() for x in results)
    for name, x, like in (("grad", grad, out), ("output", output, out), ("lse", lse, own_lse)):
        check_tensor(name, x)
        check_shape(name, x, "that of the forward", tuple(like.shape))
    # p = exp(s - lse) = share · softmax(s), and ds = p (dp - rowsum(grad · output)).
    share = torch.where(own_lse == -torch.inf, 0.0, (own_lse - lse).exp())
    rows = grad.to(share.dtype) * (out.to(share.dtype) - output.to(share.dtype))
    if query.dim() == 3:
        rows = rows.unsqueeze(2)
    grad_lse = share * rows.sum(-1).movedim(1, -1)
    shares = share.movedim(-1, 1).reshape(*query.shape[:-1], 1)
    grads = ((grad * shares).to(out.dtype), grad_lse)
    dq, dk, dv = torch.autograd.grad(results, (query, key, value), grads)
    return dq, dk, dv


def memory_efficient_attention_partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) over some of the keys, for `merge_attentions`.

    out has output_dtype, by default float32 (float64 for float64); lse is that of
    `memory_efficient_attention_forward_requires_grad`. Differentiable, unlike the original. p must
    be 0, as in the original.
    """
    _refuse_dropout(p)
    if output_dtype is None and isinstance(query, Tensor):
        output_dtype = torch.promote_types(query.dtype, torch.float32)
    return _attend(query, key, value, attn_bias, p, scale, op, output_dtype, return_lse=True)


def merge_attentions(
    attn_split: Tensor | Sequence[Tensor],
    lse_split: Tensor | Sequence[Tensor],
    write_lse: bool = True,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns (out, lse) over all keys, from (out, lse) over disjoint parts of them.

    attn_split: [B, M, H, K] or [B, M, G, H, K] each, lse_split: [B, H, M] or [B, G, H, M] each; a
    sequence of tensors, or one with the parts along dimension 0. lse is None without write_lse.
    output_dtype: of out, default that of the parts. See `merge_attention_states`; differentiable.
    """
    outs, lses = list(attn_split), list(lse_split)
    for name, tensors, ranks in (("attn_split", outs, (4, 5)), ("lse_split", lses, (3, 4))):
        for x in tensors:
            check_tensor(name, x)
            if x.dim() not in ranks or x.dim() != tensors[0].dim():
                wrong_value(name, f"tensors of {ranks[0]} or {ranks[1]} dimensions", shape_of(x))
    groups = tuple(outs[0].shape[2:4]) if outs and outs[0].dim() == 5 else ()
    dtype = outs[0].dtype if outs else None
    if groups:
        outs, lses = [x.flatten(2, 3) for x in outs], [x.flatten(1, 2) for x in lses]
    if output_dtype is not None:  # a wider one keeps what the sum has beyond the dtype of the parts
        outs = [x.to(torch.promote_types(x.dtype, output_dtype)) for x in outs]
    out, lse = merge_attention_states([x.transpose(1, 2) for x in outs], lses)
    out = out.transpose(1, 2).contiguous().to(output_dtype or dtype)
    if groups:
        out, lse = out.unflatten(2, groups), lse.unflatten(1, groups)
    return out, lse if write_lse else None


def _refuse_dropout(p: Any) -> None:
    if p != 0.0:
        hint = "memory_efficient_attention applies dropout"
        raise NotImplementedError(describe_error("p", "0.0, as in xFormers", p, hint))


def _attend(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any,
    p: Any,
    scale: Any,
    op: Any,
    output_dtype: torch.dtype | None,
    return_lse: bool = False,
) -> Any:
    """Serves `memory_efficient_attention`; returns out, or (out, lse) if return_lse."""
    if op is not None and op != (None, None):
        hint = "attention(backend=) chooses a backend"
        raise NotImplementedError(describe_error("op", "None", repr(op), hint))
    rank = _rank_of(query, key, value)
    shape = query.shape
    if rank != 4:
        query, key, value = _with_four_dimensions(query, key, value)
    options: Options = {"scale": scale}
    if p != 0.0:
        options["dropout_p"] = _probability(p)
    if return_lse:
        options["return_lse"] = True
    packed = False
    if attn_bias is None:
        pass
    elif isinstance(attn_bias, Tensor):
        options["bias"] = _bias(attn_bias, shape, key)
    else:
        options |= _options_of(attn_bias)
        if hasattr(attn_bias, "_bias"):
            options["bias"] = _bias(attn_bias._bias, shape, key)
        packed = hasattr(attn_bias, "q_seqinfo")
    if packed:
        mask = _on_device(attn_bias, query)
        _check_sequences(mask, query, key, value)
        query = query[0]
        key, value, sequences = _sequences_of(mask, key[0], value[0])
        results = attend(query, key, value, **options, **sequences)
    else:
        results = attend(query, key.transpose(1, 2), value.transpose(1, 2), **options)
    if rank == 4 and not packed and output_dtype is None:
        return results
    out, lse = results if return_lse else (results, None)
    out = out.reshape(*shape[:-1], out.shape[-1])
    out = out if output_dtype is None else out.to(output_dtype)
    if lse is None:
        return out
    return out, lse.reshape(shape[0], *(shape[2:-1] or (1,)), shape[1])


def _rank_of(query: Any, key: Any, value: Any) -> int:
    check_tensor("query", query)
    rank = query.dim()
    if rank not in LAYOUTS:
        layouts = ", ".join(LAYOUTS.values())
        wrong_value("query", f"dimensions {layouts}", f"{rank}: {shape_of(query)}")
    for name, x in (("key", key), ("value", value)):
        check_tensor(name, x)
        if x.dim() != rank:
            expected = f"{rank} dimensions {LAYOUTS[rank]}, as query has"
            wrong_value(name, expected, f"{x.dim()}: {shape_of(x)}")
    return rank


def _with_four_dimensions(
    query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tensors [B, M, K] or [B, M, G, H, K] as [B, M, H, K]; key and value with as few heads
    as they have different ones."""
    if query.dim() == 3:
        return query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2)
    groups, heads = query.shape[2:4]
    for name, x in (("key", key), ("value", value)):
        if x.shape[2] != groups or x.shape[3] not in (1, heads):
            expected = f"[B, M, {groups}, {heads}, K] or [B, M, {groups}, 1, K]"
            wrong_value(name, expected, shape_of(x))
    if all(x.shape[3] == 1 or x.stride(3) == 0 for x in (key, value)):
        return query.flatten(2, 3), key[:, :, :, 0], value[:, :, :, 0]
    key, value = (x.expand(-1, -1, -1, heads, -1).flatten(2, 3) for x in (key, value))
    return query.flatten(2, 3), key, value


def _probability(p: Any) -> float:
    check_number("p", p)
    if not 0.0 <= p <= 1.0:
        wrong_value("p", "a probability in [0, 1]", p)
    return p


def _bias(bias: Tensor, shape: torch.Size, key: Tensor) -> Tensor:
    """Returns a bias as [B, H, Mq, Mkv], or with sizes of 1. shape: that of query."""
    heads = tuple(shape[2:-1])
    full = (shape[0], *heads, shape[1], key.shape[1])
    fits = bias.dim() == len(full) and all(
        size in (1, n) for size, n in zip(bias.shape, full, strict=True)
    )
    if not fits:
        wrong_value("attn_bias", f"shape {full}, or 1 in some places", shape_of(bias))
    if not bias.is_floating_point():
        hint = "attention(mask=) takes a bool mask, True = may attend"
        wrong_value("attn_bias", "a floating dtype", bias.dtype, hint)
    if len(heads) == 0:
        return bias.unsqueeze(1)
    return bias if len(heads) == 1 else bias.expand(-1, *heads, -1, -1).flatten(1, 2)


def _on_device(mask: Any, query: Tensor) -> Any:
    """Returns the mask on query's device."""
    return mask if mask.q_seqinfo.seqstart.device == query.device else mask.to(query.device)


def _check_sequences(mask: Any, query: Tensor, key: Tensor, value: Tensor) -> None:
    name = type(mask).__name__
    for argument, x in (("query", query), ("key", key), ("value", value)):
        if x.shape[0] != 1:
            wrong_value(argument, f"batch size 1 with {name}", x.shape[0])
    if is_compiling():  # each list of lengths would be compiled for; the operator checks them
        return
    paged = hasattr(mask, "block_tables")
    counts = [("queries", mask.q_seqinfo, query)] + [("keys", mask.k_seqinfo, key)] * (not paged)
    for kind, lengths, x in counts:
        if lengths.seqstart_py[-1] > x.shape[1]:
            got = f"{name} for {lengths.seqstart_py[-1]}"
            wrong_value("attn_bias", f"a mask for at most {x.shape[1]} {kind}", got)


attn_bias = fmha = sys.modules[__name__]  # xFormers has the masks in fmha.attn_bias

# -- import xformers -----------------------------------------------------------------------

VERSION = "0.0.33"

_OPS = (
    AttentionBias,
    LowerTriangularMask,
    memory_efficient_attention,
    memory_efficient_attention_backward,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
)
_FMHA = (*_OPS, BlockDiagonalMask, memory_efficient_attention_partial, merge_attentions)
_STAND_IN = StandIn(
    "xformers",
    VERSION,
    {
        "xformers": (),
        "xformers.ops": (*_OPS, torch.unbind),
        "xformers.ops.fmha": _FMHA,
        "xformers.ops.fmha.attn_bias": (AttentionBias, *map(globals().get, _OPTIONS)),
    },
)


def install() -> Handle:
    """Lets `import xformers` find the functions and masks of this module, until the handle is
    undone.

        with install():
            from xformers.ops import LowerTriangularMask, fmha, memory_efficient_attention

    It offers the modules xformers.ops (attention, AttentionBias, LowerTriangularMask and unbind),
    xformers.ops.fmha and xformers.ops.fmha.attn_bias, and the metadata of a package xformers
    0.0.33. All else is as in `flash_attn.install`.

    Raises RuntimeError if an xformers is importable or imported already.
    """
    return _STAND_IN.handle()
