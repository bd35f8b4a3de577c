"""Plans launches from tensors: pure functions, which allocate and start nothing.

A `Launch` is one kernel with its grid, tiles and arguments. Everything that decides about code and
memory (grid, tiles, strides, compiled paths) is computed here from shapes and strides alone, so
that it is tested without a GPU, and so that the compile tests compile exactly what would run.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..operators.arguments import Arguments
from . import attention_backward, attention_decode, attention_weights, masked_softmax
from . import tiles as tables
from .attention_forward import attention_forward_kernel
from .kv_cache import Elements, kv_cache_append_kernel
from .masked_softmax import RowOperand, SoftmaxParams
from .primitives import (
    AttentionParams,
    Dropout,
    Padding,
    Pages,
    RowView,
    ScoreView,
    Slopes,
    SoftmaxState,
    Starts,
    WeightsGradient,
    dropout_keep_mask_kernel,
)
from .tiles import (
    Arch,
    RowTiles,
    Tiles,
    attention_tiles,
    decode_tiles,
    padded_head_dim,
    softmax_tiles,
)

LIMIT = 2**31

# How float32 products are computed for "highest", "high" and "medium". bf16x6 takes each factor as
# a sum of three bfloat16, 24 bits in all, and computes the six products that count; its accuracy is
# float32's, and unlike plain multiply-adds it runs on the matrix units. The interpreter multiplies
# in float32.
INPUT_PRECISION = {
    "sm": ("bf16x6", "tf32x3", "tf32"),
    "gfx": ("bf16x6", "bf16x6", "bf16x3"),
    "interpreter": ("ieee", "ieee", "ieee"),
}


# Triton before 3.9 leaves out fences between what threads write to shared memory and what wgmma
# reads there: tests/ptx detects it, and an H200 sometimes gave wrong results. mma.sync needs no
# fences.
LACKS_FENCES = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


@contextlib.contextmanager
def without_wgmma() -> Iterator[None]:
    """Makes Triton compile without wgmma while the context lasts."""
    before = os.environ.get("DISABLE_MMA_V3")
    os.environ["DISABLE_MMA_V3"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MMA_V3"]
        else:
            os.environ["DISABLE_MMA_V3"] = before


@dataclass(frozen=True)
class Launch:
    """`kernel[grid](*args, **constants, num_warps=..., num_stages=...)`."""

    kernel: Any
    grid: tuple[int]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    # Whether the compiler may fuse multiplications and additions. It must not where a sum of
    # products goes through a warp: each lane would add its neighbour's rounded product to its own
    # exact one, and the hardware would choose which of the lanes' different results is used.
    fusion: bool = True

    @property
    def options(self) -> dict[str, Any]:
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fusion,
        }

    def run(self) -> None:
        if self.grid[0] > 0:
            with without_wgmma() if LACKS_FENCES else contextlib.nullcontext():
                self.kernel[self.grid](*self.args, **self.constants, **self.options)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# -- Operands ------------------------------------------------------------------------------


def row_view(x: Tensor) -> RowView:
    """Returns a view of the rows of x, [B, H, S, D] with a last stride of 1."""
    return RowView(x, 0 if x.shape[0] == 1 else x.stride(0), x.stride(1), x.stride(2))


def descriptor(x: Tensor, block: int, call: AttentionParams, arch: Arch) -> TensorDescriptor | None:
    """Returns the descriptor that copies `block` rows of x, [B, H, S, D], at once, with 0 beyond
    its sizes.

    Returns None if pointers have to read the rows: without TMA; for float32, whose matrix operands
    pass through registers; for calls that mask every tile or whose tiles cross pages; and if an
    address or a stride is no multiple of 16 bytes, or a size is 0.
    """
    *sizes, D = x.shape
    whole_row = ceil_div(D, 8) * 8  # replaces the stride of a size of 1, which may be anything
    strides = [
        stride if size > 1 else whole_row for size, stride in zip(sizes, x.stride(), strict=False)
    ]
    if (
        not arch.has_tma
        or x.element_size() != 2
        or (call.mask is not None or call.key_padding is not None)
        or (call.pages is not None and call.whole_pages is None)
        or min(x.shape) == 0
        or x.data_ptr() % 16 != 0
        or any(stride == 0 or stride % 8 != 0 for stride in strides)
    ):
        return None
    return TensorDescriptor(x, [*sizes, D], [*strides, 1], [1, 1, block, padded_head_dim(D)])


def score_view(x: Tensor | None, data: Tensor | None = None) -> ScoreView | None:
    """Returns a view of a tensor with four dimensions, of which those of size 1 are broadcast to
    the scores. data: its elements, if they are not those of x."""
    if x is None:
        return None
    strides = [0 if x.shape[i] == 1 else x.stride(i) for i in range(4)]
    return ScoreView(x if data is None else data, *strides)


def is_wide(tiles: Tiles, *operands: Any) -> bool:
    """Returns whether the largest offset of an operand inside a tile needs 64 bits."""
    longest = max(tiles.block_m, tiles.block_n)
    last = 0
    for x in operands:
        if isinstance(x, RowView):
            last = max(last, longest * abs(x.stride_s) + 256)
        elif isinstance(x, ScoreView | WeightsGradient):
            last = max(last, tiles.block_m * abs(x.stride_q) + tiles.block_n * abs(x.stride_k))
        elif isinstance(x, Padding):
            last = max(last, tiles.block_n * abs(x.stride_k))
    return last >= LIMIT


def dropout_of(dropout_p: float, philox: Tensor | None) -> Dropout | None:
    if dropout_p == 0.0:
        return None
    threshold = round(dropout_p * 65536)
    kept = 65536 - threshold
    return Dropout(philox, threshold, 65536 / kept if kept else 0.0)


def effective_softcap(softcap: float) -> float | None:
    """Returns the cap, raised to a number by which float32 can divide (describe.cpp). Returns None
    for no cap; 2^96 and more count as none."""
    return max(float(softcap), 2.0**-124) if 0 < softcap < 2.0**96 else None


def describe(query: Tensor, key: Tensor, arguments: Arguments) -> AttentionParams:
    """Returns the params of the kernels from the arguments of an operator.

    query: [B, Hq, Sq, D], packed [1, Hq, Tq, D]; key alike, or pages [pages, Hkv, page size, D].
    """
    a = arguments
    cu_seqlens_q, cu_seqlens_k, seqused_k, block_table = (
        None if x is None else x.contiguous()
        for x in (a.cu_seqlens_q, a.cu_seqlens_k, a.seqused_k, a.block_table)
    )
    B, Hq, Sq, _ = query.shape
    Hkv, Sk = key.shape[1], key.shape[2]
    pages = None
    if cu_seqlens_q is not None:
        B = cu_seqlens_q.shape[0] - 1
    if block_table is not None:
        count, size = key.shape[0], key.shape[2]
        pages = Pages(block_table, block_table.stride(0), size, count)
        Sk = block_table.shape[1] * size if count else 0

    starts = Starts(a.q_start, a.k_start, a.head_start) if any(a.starts()) else None
    longest = Sq + Sk + abs(a.q_start - a.k_start)

    def window(tokens: int) -> int | None:  # a window beyond the sequence hides nothing
        return None if tokens < 0 or tokens > longest else tokens

    padding = slopes = None
    if a.key_padding_mask is not None:
        strides = a.key_padding_mask.stride()
        padding = Padding(a.key_padding_mask.view(torch.uint8), *strides)
    if a.alibi_slopes is not None:
        heads = a.alibi_slopes.shape[-1] if a.alibi_slopes.dim() == 2 else 0
        slopes = Slopes(a.alibi_slopes, heads)
    return AttentionParams(
        B=B,
        Hq=Hq,
        group=Hq // max(Hkv, 1),
        Sq=Sq,
        Sk=Sk,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        pages=pages,
        scale=float(a.scale),
        softcap=effective_softcap(a.softcap),
        offset=None if a.causal in (2, 3) else 0,  # None: bottom right
        left=window(a.window_left),
        right=0 if a.causal in (1, 2) else window(a.window_right),
        mask=score_view(a.mask, None if a.mask is None else a.mask.view(torch.uint8)),
        bias=score_view(a.bias),
        key_padding=padding,
        alibi=slopes,
        sinks=a.sinks,
        dropout=dropout_of(a.dropout_p, a.philox),
        weights=None,
        starts=starts,
        whole_pages=None,
    )


def for_tiles(call: AttentionParams, tiles: Tiles) -> AttentionParams:
    """Returns the params for these tiles of keys, with `whole_pages` set."""
    if call.pages is None:
        return call
    return call._replace(whole_pages=1 if call.pages.size % tiles.block_n == 0 else None)


def query_blocks(call: AttentionParams, block_m: int) -> int:
    """Returns the number of blocks of queries of one head, in the whole batch. Blocks of packed
    queries are those that `primitives.packed_block` numbers."""
    if call.cu_seqlens_q is None:
        return call.B * ceil_div(call.Sq, block_m)
    return call.Sq // block_m + call.B + 1


def key_blocks(call: AttentionParams, block_n: int) -> int:
    """Returns the number of blocks of keys of one key head, in the whole batch or in all pages."""
    if call.pages is not None:
        return call.pages.count * ceil_div(call.pages.size, block_n)
    if call.cu_seqlens_k is None:
        return call.B * ceil_div(call.Sk, block_n)
    return call.Sk // block_n + call.B + 1


# -- Attention -----------------------------------------------------------------------------


def is_per_score(call: AttentionParams) -> bool:
    """Returns whether the call has values for each score: a mask, a bias, dropout, or the gradient
    of returned weights."""
    return any(x is not None for x in (call.mask, call.bias, call.dropout, call.weights))


def _constants(
    call: AttentionParams,
    tiles: Tiles,
    arch: Arch,
    query: Tensor,
    DV: int,
    precision: int,
    wide: bool,
) -> dict[str, Any]:
    D = query.shape[-1]
    products = INPUT_PRECISION[arch.name.rstrip("0123456789_")]
    plain = call.softcap is None and call.bias is None and call.alibi is None and call.scale > 0
    return {
        "D": D,
        "DV": DV,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": padded_head_dim(D),
        "BLOCK_DV": padded_head_dim(DV),
        "SCALE_ONLY": plain,
        "EVEN_N": call.cu_seqlens_k is None
        and call.seqused_k is None
        and call.Sk % tiles.block_n == 0,
        "INDEX": tl.int64 if wide else tl.int32,
        "PRECISION": products[precision] if query.dtype == torch.float32 else "ieee",
    }


def can_specialize(
    call: AttentionParams, arch: Arch, constants: dict[str, Any], copied: bool
) -> bool:
    """Returns whether Triton 3.9 accepts `warp_specialize` for attention_forward: on sm_100, with
    key and value `copied` by descriptors, if the main loop is the only loop."""
    whole = call.left is None and call.right is None and constants["EVEN_N"]
    return arch.name == "sm_100" and copied and whole


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor | None,
    call: AttentionParams,
    precision: int,
    arch: Arch,
    tiles: Tiles | None = None,
) -> Launch:
    """Plans the forward. query, key and value have a last stride of 1. tiles: by default those of
    the table."""
    D, DV = query.shape[-1], value.shape[-1]
    head_dim = max(D, DV)
    tiles = tiles or attention_tiles("forward", arch, query.dtype, head_dim, is_per_score(call))
    q, k, v, o = (row_view(x) for x in (query, key, value, out))
    wide = is_wide(tiles, q, k, v, o, call.mask, call.bias, call.key_padding)
    call = for_tiles(call, tiles)
    descriptors = [descriptor(x, tiles.block_n, call, arch) for x in (key, value)]
    constants = _constants(call, tiles, arch, query, DV, precision, wide)
    taken = can_specialize(call, arch, constants, None not in descriptors)
    return Launch(
        attention_forward_kernel,
        (call.Hq * query_blocks(call, tiles.block_m),),
        (q, k, v, o, lse, call, *descriptors),
        constants | {"SPECIALIZE": tiles.warp_specialize and taken},
        tiles.num_warps,
        tiles.num_stages,
    )


def decode_splits(
    B: int, heads_q: int, heads_kv: int, seqlen_q: int, seqlen_k: int, window: tuple[int, int]
) -> int:
    """Returns the number of splits for attention_decode, or 0 if attention_forward serves the call.

    seqlen_q, seqlen_k: those of the longest sequence, as far as is known; only speed depends on
    them. window: (left, right) in tokens, negative for no limit; causal is a right side of 0.
    """
    if heads_kv == 0 or heads_q // heads_kv * seqlen_q > tables.MAX_DECODE_ROWS:
        return 0
    if min(window) >= 0:
        seqlen_k = min(seqlen_k, window[0] + seqlen_q + window[1])
    wanted = ceil_div(tables.DECODE_PROGRAMS, max(1, B * heads_kv))
    return max(1, min(wanted, seqlen_k // tables.MIN_SPLIT_KEYS))


def splits_of(call: AttentionParams, heads_kv: int, arguments: Arguments) -> int:
    """Returns `decode_splits` for a call."""
    if call.group * call.Sq >= LIMIT:  # the hint may be wrong, and row numbers have 32 bits
        return 0
    left, right = (-1 if tokens is None else tokens for tokens in (call.left, call.right))
    lengths = longest_sequences(call, arguments)
    return decode_splits(call.B, call.Hq, heads_kv, *lengths, (left, right))


def longest_sequences(call: AttentionParams, arguments: Arguments) -> tuple[int, int]:
    """Returns the numbers of queries and keys of the longest sequence, as far as they are known."""

    def longest(hint: int | None, tokens: int) -> int:
        return hint if hint is not None and 0 < hint < tokens else tokens

    if call.cu_seqlens_q is None:
        return call.Sq, call.Sk
    keys = call.Sk if call.pages is not None else longest(arguments.max_seqlen_k, call.Sk)
    return longest(arguments.max_seqlen_q, call.Sq), keys


def decode_launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor | None,
    splits: int,
    partials: SoftmaxState | None,
    longest: int,
    call: AttentionParams,
    precision: int,
    arch: Arch,
    tiles: Tiles | None = None,
) -> list[Launch]:
    """Plans the decode. partials: those of several splits, in float32 (acc [splits, rows, Dv],
    row_max and row_sum [splits, rows], where rows are those of lse), or None for a single split.
    longest: the queries of the longest sequence, as far as is known."""
    D, DV, Hkv = query.shape[-1], value.shape[-1], key.shape[1]
    rows_of_key = call.group * longest
    tiles = tiles or decode_tiles(arch, query.dtype, max(D, DV), rows_of_key, is_per_score(call))
    q, k, v, o = (row_view(x) for x in (query, key, value, out))
    # The queries of a tile may be of several heads; the offset of a head has 64 bits anyway.
    wide = is_wide(tiles, q, k, v, o, call.mask, call.bias, call.key_padding)
    constants = _constants(call, tiles, arch, query, DV, precision, wide)
    number = out.shape[0] * out.shape[1] * out.shape[2]
    sequences = call.B if call.cu_seqlens_q is None else call.B + 1  # see sequence_of
    programs = sequences * Hkv * splits if number else 0
    launches = [
        Launch(
            attention_decode.attention_decode_kernel,
            (programs,),
            (q, k, v, o, lse, partials, for_tiles(call, tiles), Hkv, splits, number),
            constants,
            tiles.num_warps,
            tiles.num_stages,
        )
    ]
    if splits > 1:
        combine = {name: constants[name] for name in ("DV", "BLOCK_M", "BLOCK_DV", "SCALE_ONLY")}
        launches.append(
            Launch(
                attention_decode.attention_combine_kernel,
                (ceil_div(number, tiles.block_m),),
                (partials, o, lse, call, splits, number),
                combine,
                tiles.num_warps,
                1,
            )
        )
    return launches


# A bias gradient that is a long sum is cut into chunks, so that there are about this many programs.
DBIAS_PROGRAMS = 512


@dataclass(frozen=True)
class BiasGradient:
    """How the work on dbias is divided: see attention_dbias_kernel."""

    kept: tuple[int, int, int, int]
    chunks: int

    @staticmethod
    def of(shape: Sequence[int], B: int, Hq: int, m_blocks: int, n_blocks: int) -> BiasGradient:
        full = (B, Hq, m_blocks, n_blocks)
        own = [1 if size == 1 else whole for size, whole in zip(shape, full, strict=True)]
        programs = own[0] * own[1] * own[2] * own[3]
        total = B * Hq * m_blocks * n_blocks // max(programs, 1)
        chunks = max(1, min(total, DBIAS_PROGRAMS // max(programs, 1)))
        return BiasGradient((own[0], own[1], own[2], own[3]), chunks)


def backward_launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dsinks: Tensor | None,
    call: AttentionParams,
    precision: int,
    arch: Arch,
    tiles: Tiles | None = None,
    users: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
) -> list[Launch]:
    """Plans the backward in order: delta, with the part of returned weights; dk and dv; dq; and
    dsinks if asked for.

    users: the users of the pages, as `operators.page_users` returns them.
    """
    B, Hq, Sq, D = query.shape
    Hkv, DV = key.shape[1], value.shape[-1]
    q, k, v, o, do = (row_view(x) for x in (query, key, value, out, grad_out))
    gradients = [row_view(x) for x in (dq, dk, dv)]
    dlse = None if grad_lse is None else score_view(grad_lse.unsqueeze(-1))

    def plan(kernel: str) -> tuple[Tiles, dict[str, Any]]:
        head_dim = max(D, DV)
        own = tiles or attention_tiles(kernel, arch, query.dtype, head_dim, is_per_score(call))
        operands = (q, k, v, o, do, *gradients, dlse, call.mask, call.bias, call.key_padding)
        wide = is_wide(own, *operands, call.weights)
        return own, _constants(call, own, arch, query, DV, precision, wide)

    (keys, key_constants), (queries, query_constants) = plan("dkdv"), plan("dq")
    del key_constants["EVEN_N"]  # its loop is over queries
    key_constants["EVEN_M"] = call.cu_seqlens_q is None and Sq % keys.block_m == 0
    names = ("DV", "BLOCK_M", "BLOCK_DV", "INDEX")
    delta_constants = {name: query_constants[name] for name in names}
    launches = [
        Launch(
            attention_backward.attention_delta_kernel,
            (B * Hq * ceil_div(Sq, queries.block_m),),
            (o, do, delta, dlse, Hq, Sq),
            delta_constants,
            queries.num_warps,
            1,
            fusion=False,
        )
    ]
    if call.weights is not None:
        launches.append(
            Launch(
                attention_weights.attention_weights_delta_kernel,
                (Hq * query_blocks(call, queries.block_m),),
                (q, k, lse, delta, call),
                {name: query_constants[name] for name in WEIGHTS_CONSTANTS},
                queries.num_warps,
                queries.num_stages,
            )
        )
    key_call, query_call = for_tiles(call, keys), for_tiles(call, queries)
    launches += [
        Launch(
            attention_backward.attention_dkdv_kernel,
            (Hkv * key_blocks(call, keys.block_n),),
            (
                *(q, k, v, do, lse, delta, *gradients[1:], key_call, Hkv, *users),
                *(descriptor(x, keys.block_m, key_call, arch) for x in (query, grad_out)),
            ),
            key_constants,
            keys.num_warps,
            keys.num_stages,
        ),
        Launch(
            attention_backward.attention_dq_kernel,
            (Hq * query_blocks(call, queries.block_m),),
            (
                *(q, k, v, do, lse, delta, gradients[0], query_call),
                *(descriptor(x, queries.block_n, query_call, arch) for x in (key, value)),
            ),
            query_constants,
            queries.num_warps,
            queries.num_stages,
        ),
    ]
    if dsinks is not None:
        args = (lse, delta, call.sinks, dsinks, B, Hq, Sq)
        grid = (Hq if B * Sq > 0 else 0,)
        launches.append(
            Launch(attention_backward.attention_dsinks_kernel, grid, args, {"BLOCK": 1024}, 4, 1)
        )
    return launches


def dbias_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dbias: Tensor,
    chunks: int,
    call: AttentionParams,
    precision: int,
    arch: Arch,
    tiles: Tiles | None = None,
) -> Launch:
    """dbias: contiguous, in bias' shape; if chunks > 1, float32 [chunks, *shape], to be summed."""
    B, Hq, Sq, D = query.shape
    Sk, DV = call.Sk, value.shape[-1]
    tiles = tiles or attention_tiles("dq", arch, query.dtype, max(D, DV), is_per_score(call))
    operands = [row_view(x) for x in (query, key, value, grad_out)]
    first = dbias[0] if chunks > 1 else dbias
    target = score_view(first, dbias)
    assert target is not None
    m_blocks, n_blocks = ceil_div(Sq, tiles.block_m), ceil_div(Sk, tiles.block_n)
    work = BiasGradient.of(first.shape, B, Hq, m_blocks, n_blocks)
    wide = is_wide(tiles, *operands, target, call.mask, call.bias, call.key_padding)
    constants = _constants(call, tiles, arch, query, DV, precision, wide)
    del constants["EVEN_N"]  # all tiles are masked
    constants |= {"SUM_M": first.shape[2] == 1, "SUM_N": first.shape[3] == 1}
    programs = work.kept[0] * work.kept[1] * work.kept[2] * work.kept[3]
    empty = B * Hq * Sq * Sk == 0
    return Launch(
        attention_backward.attention_dbias_kernel,
        (0 if empty else programs * chunks,),
        (
            *(*operands, lse, delta, target, for_tiles(call, tiles), B),
            *(work.kept, chunks, first.numel()),
        ),
        constants,
        tiles.num_warps,
        tiles.num_stages,
    )


WEIGHTS_CONSTANTS = ("D", "BLOCK_M", "BLOCK_N", "BLOCK_D", "SCALE_ONLY", "INDEX", "PRECISION")


def weights_gradient(grad_weights: Tensor | None, average: bool, Hq: int) -> WeightsGradient | None:
    if grad_weights is None:
        return None
    dw = score_view(grad_weights.unsqueeze(1) if average else grad_weights)
    assert dw is not None
    return WeightsGradient(*dw, 1.0 / max(Hq, 1) if average else 1.0)


def weights_launch(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    weights: Tensor,
    call: AttentionParams,
    precision: int,
    arch: Arch,
    tiles: Tiles | None = None,
) -> Launch:
    """weights: [B, Hq, Sq, Sk], or [B, 1, Sq, Sk] if averaged."""
    D, heads = query.shape[-1], weights.shape[1]
    tiles = tiles or attention_tiles("dq", arch, query.dtype, D)
    q, k, w = row_view(query), row_view(key), score_view(weights)
    wide = is_wide(tiles, q, k, w, call.mask, call.bias, call.key_padding)
    constants = _constants(call, tiles, arch, query, D, precision, wide)
    blocks = ceil_div(call.Sq, tiles.block_m) * ceil_div(call.Sk, tiles.block_n)
    return Launch(
        attention_weights.attention_weights_kernel,
        (call.B * heads * blocks,),
        (q, k, lse, w, call, heads),
        {name: constants[name] for name in WEIGHTS_CONSTANTS},
        tiles.num_warps,
        tiles.num_stages,
    )


def keep_mask_launch(keep: Tensor, dropout: Dropout | None) -> Launch:
    """keep: bool [B, Hq, Sq, Sk], contiguous."""
    B, Hq, Sq, Sk = keep.shape
    block_m, block_n = 16, 128
    return Launch(
        dropout_keep_mask_kernel,
        (B * Hq * ceil_div(Sq, block_m),),
        (keep.view(torch.uint8), dropout, Sq, Sk),
        {"BLOCK_M": block_m, "BLOCK_N": block_n},
        4,
        1,
    )


def cache_append_launch(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
) -> Launch:
    """Plans the copy of new tokens to a cache, as integers. key, value: [B, Hkv, S, D or Dv];
    caches: [B, Hkv, room, ...], or pages [pages, Hkv, page size, ...]; cache_seqlens and the rows
    of block_table are contiguous."""
    B, H, S, D = key.shape
    count, _, room, _ = key_cache.shape
    pages = None
    if block_table is not None:
        pages = Pages(block_table, block_table.stride(0), room, count)
        room *= block_table.shape[1]
    tensors = (key_cache, value_cache, key, value)
    block_s, block_d = 16, 128
    return Launch(
        kv_cache_append_kernel,
        (B * H * ceil_div(S, block_s) if D + value.shape[-1] else 0,),
        (
            *(Elements(x, *x.stride()) for x in tensors),
            *(cache_seqlens, pages, H, S, room, D, value.shape[-1]),
        ),
        {"BLOCK_S": block_s, "BLOCK_D": block_d},
        4,
        1,
    )


# -- Masked softmax ------------------------------------------------------------------------


def row_operand(x: Tensor, shape: Sequence[int]) -> RowOperand:
    """Returns x as a RowOperand. It broadcasts to `shape`, which has at least two dimensions, the
    last of which are the columns."""
    missing = len(shape) - x.dim()
    strides = [0] * missing + [
        0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)
    ]
    return RowOperand(x, tuple(strides[:-1]), strides[-1])


def softmax_params(
    shape: Sequence[int],
    scale: float,
    causal: int,
    sinks: Tensor | None = None,
    philox: Tensor | None = None,
    dropout_p: float = 0.0,
) -> SoftmaxParams:
    """shape: that of the rows and columns, with at least two dimensions."""
    columns, queries = shape[-1], shape[-2]
    return SoftmaxParams(
        sizes=tuple(shape[:-1]),
        rows=math.prod(shape[:-1]),
        columns=columns,
        queries=queries,
        heads=shape[-3] if len(shape) > 2 else 1,
        scale=float(scale),
        offset=None if causal == 0 else columns - queries if causal == 2 else 0,
        sinks=sinks,
        dropout=dropout_of(dropout_p, philox),
    )


def _row_launch(
    kernel: Any, call: SoftmaxParams, args: tuple[Any, ...], fusion: bool = True
) -> Launch:
    tiles = softmax_tiles(call.columns)
    constants = {
        "ROWS": tiles.rows,
        "BLOCK": tiles.block,
        "ONE_BLOCK": call.columns <= tiles.block,
    }
    grid = (ceil_div(call.rows, tiles.rows) if call.columns else 0,)
    return Launch(kernel, grid, args, constants, tiles.num_warps, 1, fusion)


def softmax_launch(
    input: Tensor,
    out: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    sink_weight: Tensor | None,
    call: SoftmaxParams,
) -> Launch:
    """input and out: [..., columns] of the same shape, at least two dimensions."""
    shape = input.shape
    operands = (
        row_operand(input, shape),
        row_operand(out, shape),
        weights,
        None if mask is None else row_operand(mask.view(torch.uint8), shape),
        None if bias is None else row_operand(bias, shape),
        sink_weight,
    )
    return _row_launch(masked_softmax.masked_softmax_kernel, call, (*operands, call))


def softmax_backward_launch(
    weights: Tensor,
    grad_out: Tensor,
    dx: Tensor,
    delta: Tensor | None,
    sink_weight: Tensor | None,
    sink_terms: Tensor | None,
    call: SoftmaxParams,
) -> Launch:
    operands = [row_operand(x, weights.shape) for x in (weights, grad_out, dx)]
    args = (*operands, delta, sink_weight, sink_terms, call)
    kernel = masked_softmax.masked_softmax_backward_kernel
    return _row_launch(kernel, call, args, fusion=False)


@dataclass(frozen=True)
class RowGroups:
    """The rows in another order, in which those that share a row of dbias are neighbours."""

    order: tuple[int, ...]  # the order of the dimensions
    groups: int
    group_rows: int
    width: int  # columns of dbias: all, or 1
    chunks: int  # pieces of a group, so that there are about DBIAS_PROGRAMS programs

    @staticmethod
    def of(bias: Tensor, shape: Sequence[int], block: int) -> RowGroups:
        own = (1,) * (len(shape) - bias.dim()) + tuple(bias.shape)
        dims = range(len(shape) - 1)
        kept = [d for d in dims if own[d] == shape[d]]
        summed = [d for d in dims if own[d] != shape[d]]
        groups = math.prod(shape[d] for d in kept)
        group_rows = math.prod(shape[d] for d in summed)
        programs = max(1, groups * ceil_div(own[-1], block))
        chunks = max(1, min(group_rows, DBIAS_PROGRAMS // programs))
        return RowGroups((*kept, *summed), groups, group_rows, own[-1], chunks)


def softmax_dbias_launch(
    weights: Tensor,
    grad_out: Tensor,
    delta: Tensor,
    dbias: Tensor,
    work: RowGroups,
    call: SoftmaxParams,
    tiles: RowTiles,
) -> Launch:
    """dbias: [groups, width], or [chunks, groups, width] in float32, to be summed."""
    shape = weights.shape
    numbers = torch.empty(shape[:-1], device="meta").stride()

    def ordered(strides: Sequence[int]) -> tuple[int, ...]:
        return tuple(strides[d] for d in work.order)

    def operand(x: Tensor) -> RowOperand:
        own = row_operand(x, shape)
        return RowOperand(x, ordered(own.strides), own.stride_k)

    args = (
        *(operand(weights), operand(grad_out)),
        *(RowOperand(None, ordered(numbers), None), delta, dbias),
        *(call._replace(sizes=ordered(call.sizes)), work.group_rows, work.chunks, work.width),
        work.groups * work.width,
    )
    narrow = work.width == 1 and call.columns > 1
    constants = {"ROWS": tiles.rows, "BLOCK": tiles.block, "SUM_COLUMNS": narrow}
    grid = (work.groups * work.chunks * ceil_div(work.width, tiles.block),)
    return Launch(
        masked_softmax.masked_softmax_dbias_kernel, grid, args, constants, tiles.num_warps, 1
    )


def softmax_dsinks_launch(sink_terms: Tensor, dsinks: Tensor, call: SoftmaxParams) -> Launch:
    kernel = masked_softmax.masked_softmax_dsinks_kernel
    return Launch(kernel, (call.heads,), (sink_terms, dsinks, call), {"BLOCK": 1024}, 4, 1)
