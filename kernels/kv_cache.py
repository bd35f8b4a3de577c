"""Appends tokens to a cache of keys and values, in place (Kwon et al. 2023, "PagedAttention", 4):

    cache token cache_seqlens[b] + i of sequence b  <-  new token i

The cache is dense or paged, with any strides. Time and traffic O(new tokens).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Elements(NamedTuple):
    """[B, H, S, D], or pages [pages, H, page size, D], as integers of the same size."""

    data: Any
    stride_b: Any
    stride_h: Any
    stride_s: Any
    stride_d: Any


@triton.jit
def elements_of(x, b, h, s, d):
    return x.data + b * x.stride_b + h * x.stride_h + s * x.stride_s + d * x.stride_d


@triton.jit
def copy_tokens(cache, new, b, place, h, i, row, rows, D, BLOCK_D: tl.constexpr):
    """cache[place, h, row] <- new[b, h, i], where `rows` is True."""
    for d_start in tl.range(0, D, BLOCK_D):
        d = d_start + tl.arange(0, BLOCK_D)[None, :]
        mask = rows[:, None] & (d < D)
        x = tl.load(elements_of(new, b, h, i[:, None], d.to(tl.int64)), mask=mask)
        at = elements_of(cache, place[:, None], h, row[:, None], d.to(tl.int64))
        tl.store(at, x, mask=mask)


@triton.jit
def kv_cache_append_kernel(
    key_cache, value_cache, key, value, cache_seqlens, pages, H, S, room, D, DV,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_S tokens of one head. room: the capacity of a sequence, in tokens.

    A token without room, or whose page does not exist, is left out.
    """
    blocks = tl.cdiv(S, BLOCK_S)
    start, matrix = tl.program_id(0) % blocks * BLOCK_S, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = matrix // H, matrix % H
    i = start + tl.arange(0, BLOCK_S).to(tl.int64)
    n = tl.load(cache_seqlens + b) + i
    rows = (i < S) & (n >= 0) & (n < room)
    place, row = b + tl.zeros([BLOCK_S], tl.int64), n
    if pages is not None:
        number = pages.table + b * pages.stride_b + n // pages.size
        place = tl.load(number, mask=rows, other=0).to(tl.int64)
        rows, row = rows & (place >= 0) & (place < pages.count), n % pages.size
    copy_tokens(key_cache, key, b, place, h, i, row, rows, D, BLOCK_D)
    copy_tokens(value_cache, value, b, place, h, i, row, rows, DV, BLOCK_D)
