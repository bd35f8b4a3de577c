"""Device code that the attention kernels share: operands, sequences, block ranges, masking, logits,
softmax and dropout.

Indices: `m_start` and `n_start` are the first query and key of a tile, `i` and `j` index tensors
inside it, shaped so that they broadcast to the tile: [M, 1] and [1, N], or [1, M] and [N, 1] in a
transposed tile. A scalar part of an offset is 64 bits wide; the part inside a tile has the width of
`i` and `j`, which the launcher chooses (`launch.is_wide`).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The initial maximum of a row: the lowest finite number, so that a logit of -inf, hidden or not,
# has probability exp(-inf - maximum) = 0 and never exp(-inf + inf) = NaN. A fully masked row is
# known by its sum, which is 0, never by its maximum.
LOWEST = tl.constexpr(-3.4028234663852886e38)

# -- Operands: strides in elements; None where a call has no such operand ------------------


class RowView(NamedTuple):
    """[B, H, S, D], last stride 1. Packed sequences: [1, H, T, D]; pages: [pages, H, page size, D].

    stride_b is 0 where the first size is 1.
    """

    data: Any
    stride_b: Any
    stride_h: Any
    stride_s: Any
    descriptor: Any = None  # reads whole tiles, see `launch.descriptor`


class ScoreView(NamedTuple):
    """Broadcast against the scores [B, Hq, Sq, Sk]: a stride is 0 where it is broadcast."""

    data: Any
    stride_b: Any
    stride_h: Any
    stride_q: Any
    stride_k: Any


class Padding(NamedTuple):
    """[B, Sk], nonzero = hidden."""

    data: Any
    stride_b: Any
    stride_k: Any


class Slopes(NamedTuple):
    """float32 [Hq], or [B, Hq]; stride_b is 0 for the former."""

    data: Any
    stride_b: Any


class Dropout(NamedTuple):
    """Keep iff the 16-bit value >= threshold; scale is 65536 / (65536 - threshold), or 0."""

    philox: Any  # int64 [2]: seed, offset
    threshold: Any
    scale: Any


class Starts(NamedTuple):
    """The first query, key and head of a part of a larger call."""

    query: Any
    key: Any  # with dropout a multiple of 8
    head: Any


class WeightsGradient(NamedTuple):
    """The gradient of the returned weights: a ScoreView, of which each head takes `share`."""

    data: Any
    stride_b: Any
    stride_h: Any
    stride_q: Any
    stride_k: Any
    share: Any  # 1 / Hq if they were averaged


class Pages(NamedTuple):
    """Key n of sequence b is row n % size of page table[b, n // size]."""

    table: Any  # int32 [B, pages of a sequence], last stride 1
    stride_b: Any
    size: Any
    count: Any  # the number of all pages


class AttentionParams(NamedTuple):
    """Everything about a call beyond query, key and value."""

    B: Any  # sequences
    Hq: Any
    group: Any  # query heads per key head
    Sq: Any  # packed: all tokens
    Sk: Any  # packed: all tokens; pages: the capacity of a sequence
    cu_seqlens_q: Any  # int32 [B + 1], or None: each sequence has Sq queries
    cu_seqlens_k: Any
    seqused_k: Any  # int32 [B]
    pages: Any
    scale: Any
    softcap: Any
    offset: Any  # query i is aligned with key i + offset; None: Sk - Sq of each sequence
    left: Any  # left side of the window, in tokens; None = unlimited
    right: Any  # right side; 0 if causal
    mask: Any  # ScoreView of bytes, nonzero = may attend
    bias: Any  # ScoreView
    key_padding: Any
    alibi: Any
    sinks: Any  # float32 [Hq]
    dropout: Any
    weights: Any  # WeightsGradient, in a backward
    starts: Any  # Starts, or None for a whole call
    # 1 if no tile of keys crosses from one page to the next, else None. Both values are compiled
    # in, as the last field must be: Triton 3.6 forgets the constants inside a field that no
    # constant follows.
    whole_pages: Any


# -- Tiles of scores -----------------------------------------------------------------------


class KernelTraits(NamedTuple):
    """What is compiled into a kernel: the sizes of its tiles, and how scores are computed.

    A kernel builds its traits once, from its constants, and declares them as tl.constexpr: an
    assignment without that declaration would turn the numbers into values at run time.
    """

    D: Any  # head sizes of query and key, and of value
    DV: Any
    BLOCK_M: Any
    BLOCK_N: Any
    BLOCK_D: Any  # D and DV, padded to what a tile can have
    BLOCK_DV: Any
    SCALE_ONLY: Any  # logits are scale * q·k, with scale > 0
    INDEX: Any  # the type of offsets inside a tile
    PRECISION: Any  # of the products


class ScoreTile(NamedTuple):
    """Where a tile of scores lies. Its queries are m_start + i, its keys n_start + j."""

    seq: Any  # Sequence
    h: Any  # the query head: a number, or one for each query, in the shape of i
    m_start: Any
    n_start: Any
    i: Any
    j: Any


# -- Sequences -----------------------------------------------------------------------------


class Sequence(NamedTuple):
    """One sequence of a call: its length, and the place of its tokens."""

    b: Any  # its index along a batch dimension
    Sq: Any
    Sk: Any  # its keys in use
    room: Any  # capacity for its keys, in use or not
    q_start: Any  # its first token among all tokens, 0 unless they are packed
    k_start: Any
    offset: Any  # query i is aligned with key i + offset


@triton.jit
def between(x, low, high):
    """Returns x clamped to [low, high], so that invalid lengths and places never lead out of the
    tensors."""
    return tl.maximum(tl.minimum(x, high), low)


@triton.jit
def sequence_of(call, b):
    """Returns sequence b. Packed calls have one sequence more, of the tokens that belong to none:
    it sees no key."""
    Sq, Sk, room, q_start, k_start = call.Sq, call.Sk, call.Sk, 0, 0
    if call.cu_seqlens_q is not None:
        q_start = between(tl.load(call.cu_seqlens_q + b), 0, call.Sq)
        q_end = tl.load(call.cu_seqlens_q + b + 1, mask=b < call.B, other=call.Sq)
        Sq = between(q_end, q_start, call.Sq) - q_start
    if call.cu_seqlens_k is not None:
        first = tl.load(call.cu_seqlens_k + b)
        last = tl.load(call.cu_seqlens_k + b + 1, mask=b < call.B, other=call.Sk)
        if call.pages is None:
            k_start = between(first, 0, call.Sk)
            Sk = between(last, k_start, call.Sk) - k_start
            room = Sk
        else:  # cu_seqlens_k tells only the lengths
            Sk = between(last - first, 0, call.Sk)
    if call.seqused_k is not None:
        Sk = between(tl.load(call.seqused_k + b, mask=b < call.B, other=0), 0, room)
    if call.cu_seqlens_q is not None:
        Sk = tl.where(b < call.B, Sk, 0)
    offset = call.offset
    if offset is None:
        offset = Sk - Sq
    if call.starts is not None:
        offset += call.starts.query - call.starts.key
    return Sequence(b=b, Sq=Sq, Sk=Sk, room=room, q_start=q_start, k_start=k_start, offset=offset)


@triton.jit
def packed_block(cu_seqlens, B, total, block, BLOCK: tl.constexpr):
    """Returns which sequence a block of the `total` packed tokens belongs to, and the block's first
    token in it, which is beyond the last one if the block is empty. Whatever cu_seqlens holds, the
    first token is 0 or more and does not overflow.

    The blocks of sequence b, which starts at token t, begin at number t // BLOCK + b. That leaves
    room for all, since ceil(n / BLOCK) <= (t + n) // BLOCK - t // BLOCK + 1.
    """
    b = -1
    for first in tl.range(0, B + 1, 128):
        number = first + tl.arange(0, 128)
        start = between(tl.load(cu_seqlens + number, mask=number <= B, other=0), 0, total)
        begins = (number <= B) & (start // BLOCK + number <= block)
        b += tl.sum(begins.to(tl.int32), 0)
    b = tl.maximum(b, 0)
    first = between(tl.load(cu_seqlens + b), 0, total) // BLOCK + b
    return b.to(tl.int64), between(block - first, 0, total // BLOCK + 1) * BLOCK


@triton.jit
def query_block(call, BLOCK_M: tl.constexpr):
    """Returns this program's sequence, head and first query.

    The last queries come first: under a causal mask they have the most keys.
    """
    if call.cu_seqlens_q is None:
        blocks = tl.cdiv(call.Sq, BLOCK_M)
        m_start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
        matrix = (tl.program_id(0) // blocks).to(tl.int64)
        b, h = matrix // call.Hq, matrix % call.Hq
    else:
        blocks = call.Sq // BLOCK_M + call.B + 1
        block = blocks - 1 - tl.program_id(0) % blocks
        h = (tl.program_id(0) // blocks).to(tl.int64)
        b, m_start = packed_block(call.cu_seqlens_q, call.B, call.Sq, block, BLOCK_M)
    return sequence_of(call, b), h, m_start


@triton.jit
def key_block(call, Hkv, BLOCK_N: tl.constexpr):
    """Returns this program's sequence, key head and first key, for keys that are not paged."""
    if call.cu_seqlens_k is None:
        blocks = tl.cdiv(call.Sk, BLOCK_N)
        n_start = tl.program_id(0) % blocks * BLOCK_N
        matrix = (tl.program_id(0) // blocks).to(tl.int64)
        b, h_kv = matrix // Hkv, matrix % Hkv
    else:
        blocks = call.Sk // BLOCK_N + call.B + 1
        h_kv = (tl.program_id(0) // blocks).to(tl.int64)
        block = tl.program_id(0) % blocks
        b, n_start = packed_block(call.cu_seqlens_k, call.B, call.Sk, block, BLOCK_N)
    return sequence_of(call, b), h_kv, n_start


@triton.jit
def row_number(call, seq, h):
    """Returns the index of the first query of head h in lse and delta ([B, Hq, Sq], packed [Hq,
    Tq])."""
    if call.cu_seqlens_q is None:
        number = (seq.b * call.Hq + h) * call.Sq
    else:
        number = h * call.Sq + seq.q_start
    return number


@triton.jit
def batch_of(cu_seqlens, seq):
    """Returns the batch index of a sequence in memory: 0 for packed sequences."""
    if cu_seqlens is None:
        b = seq.b
    else:
        b = tl.cast(0, tl.int64)
    return b


@triton.jit
def place_of_keys(call, seq, n_start, offs_n, rows):
    """Returns b, start and offs_s, by which load_tile reads the keys n_start + offs_n."""
    pages = call.pages
    if pages is None:
        b, start, offs = batch_of(call.cu_seqlens_k, seq), seq.k_start + n_start, offs_n
    else:
        numbers = pages.table + seq.b * pages.stride_b
        if call.whole_pages is not None:
            page = tl.load(numbers + n_start // pages.size)
            b = between(page, 0, pages.count - 1).to(tl.int64)
            start, offs = n_start % pages.size, offs_n
        else:
            n = n_start + offs_n
            page = tl.load(numbers + n // pages.size, mask=rows)
            b = between(page, 0, pages.count - 1).to(tl.int64)[:, None]
            start, offs = 0, n % pages.size
    return b, start, offs


# -- Tiles ---------------------------------------------------------------------------------


@triton.jit
def load_tile(x, b, h, start, offs_s, offs_d, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads rows start + offs_s of x: [len(offs_s), BLOCK_D], 0 where `rows` (None = all) is False.

    b and h are numbers, or one for each row, [len(offs_s), 1]. Tiles of all rows are read by x's
    descriptor if there is one; then offs_s are 0, 1, 2, ..., and b and h are numbers.
    """
    base = x.data + b * x.stride_b + h * x.stride_h + tl.cast(start, tl.int64) * x.stride_s
    pointers = base + (offs_s[:, None] * x.stride_s + offs_d[None, :])
    if rows is None:
        if x.descriptor is not None:
            place = [tl.cast(b, tl.int32), tl.cast(h, tl.int32), tl.cast(start, tl.int32), 0]
            tile = tl.reshape(x.descriptor.load(place), (offs_s.shape[0], BLOCK_D))
        elif D == BLOCK_D:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(offs_d < D)[None, :], other=0.0)
    else:
        if D == BLOCK_D:
            tile = tl.load(pointers, mask=rows[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=rows[:, None] & (offs_d < D)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(x, b, h, start, offs_s, offs_d, rows, D: tl.constexpr, tile):
    base = x.data + b * x.stride_b + h * x.stride_h + tl.cast(start, tl.int64) * x.stride_s
    pointers = base + (offs_s[:, None] * x.stride_s + offs_d[None, :])
    value = tile.to(x.data.dtype.element_ty)
    tl.store(pointers, value, mask=rows[:, None] & (offs_d < D)[None, :])


@triton.jit
def score_pointers(x, b, h, m_start, n_start, i, j):
    base = x.data + b * x.stride_b + h * x.stride_h
    base += tl.cast(m_start, tl.int64) * x.stride_q + tl.cast(n_start, tl.int64) * x.stride_k
    return base + (i * x.stride_q + j * x.stride_k)


@triton.jit
def load_scores(x, tile):
    """Loads the elements of a ScoreView that belong to a tile, 0 outside of the sequence."""
    seq, m_start, n_start, i, j = tile.seq, tile.m_start, tile.n_start, tile.i, tile.j
    inside = (m_start + i < seq.Sq) & (n_start + j < seq.Sk)
    pointers = score_pointers(x, seq.b, tile.h, m_start, n_start, i, j)
    return tl.load(pointers, mask=inside, other=0)


# -- Visibility ----------------------------------------------------------------------------


@triton.jit
def visible_block_range(start, end, offset, left, right, length, BLOCK: tl.constexpr):
    """Returns which keys the queries [start, end) may see: (begin, full_begin, full_end, stop).

    Query i sees key j iff i + offset - left <= j <= i + offset + right. Every query sees all of the
    keys [full_begin, full_end), which are whole blocks; in [begin, full_begin) and [full_end, stop)
    some query may see some key. With left and right exchanged and -offset, this gives the queries
    that see the keys [start, end).
    """
    begin, full_begin = 0, 0
    stop, full_end = length, length
    if left is not None:
        begin = tl.maximum(start + offset - left, 0)
        full_begin = tl.maximum(end - 1 + offset - left, 0)
    if right is not None:
        stop = tl.maximum(tl.minimum(end + offset + right, length), 0)
        full_end = tl.maximum(tl.minimum(start + offset + right + 1, length), 0)
    begin = begin // BLOCK * BLOCK
    full_begin = tl.minimum((full_begin + BLOCK - 1) // BLOCK * BLOCK, tl.maximum(stop, begin))
    full_end = tl.maximum(full_end // BLOCK * BLOCK, full_begin)
    return begin, full_begin, full_end, stop


@triton.jit
def seen_blocks(call, seq, m_start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the visible_block_range of BLOCK_M queries."""
    Sk = seq.Sk
    if call.cu_seqlens_q is not None:  # the block may have no queries
        Sk = tl.where(m_start < seq.Sq, Sk, 0)
    m_end = tl.minimum(m_start + BLOCK_M, seq.Sq)
    return visible_block_range(m_start, m_end, seq.offset, call.left, call.right, Sk, BLOCK_N)


@triton.jit
def seeing_blocks(call, seq, n_start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the visible_block_range of BLOCK_N keys: the queries that see them."""
    Sq = seq.Sq
    if call.cu_seqlens_k is not None or call.seqused_k is not None:  # possibly no key is in use
        Sq = tl.where(n_start < seq.Sk, Sq, 0)
    n_end = tl.minimum(n_start + BLOCK_N, seq.Sk)
    return visible_block_range(n_start, n_end, -seq.offset, call.right, call.left, Sq, BLOCK_M)


@triton.jit
def visible_tile(call, tile):
    """Returns which queries of a tile see which of its keys."""
    seq, n_start, j = tile.seq, tile.n_start, tile.j
    query = tile.m_start + tile.i
    # the last key of the tile that each query sees, from n_start on; -1 for queries past the end
    last = seq.Sk - 1
    if call.right is not None:
        last = tl.minimum(last, query + (seq.offset + call.right))
    last = tl.where(query < seq.Sq, last - n_start, -1)
    seen = j <= last
    if call.left is not None:
        seen = seen & (j >= query + (seq.offset - call.left) - n_start)
    if call.key_padding is not None:
        padding = call.key_padding
        base = padding.data + seq.b * padding.stride_b
        base += tl.cast(n_start, tl.int64) * padding.stride_k
        inside = n_start + j < seq.Sk
        seen = seen & (tl.load(base + j * padding.stride_k, mask=inside, other=1) == 0)
    if call.mask is not None:
        # the mask is read where scores are hidden, too: the lanes of a vector must not differ
        seen = seen & (load_scores(call.mask, tile) != 0)
    return seen


@triton.jit
def any_visible(seen, axis: tl.constexpr):
    """Returns whether anything is visible along `axis`. Rows without a visible score are read as 0,
    since 0 * NaN is NaN."""
    return tl.max(seen.to(tl.int32), axis) != 0


@triton.jit
def seen_keys(call, seq, seen, m_start, m_end, n_start, offs_n):
    """Returns which keys some query of [m_start, m_end) sees, [BLOCK_N]. seen: the visible tile,
    [BLOCK_M, BLOCK_N], or None without mask and key padding.

    Without these, neighbouring queries see ranges of keys that overlap: together, they see all keys
    from the first key of the first query to the last key of the last query.
    """
    if seen is not None:
        keys = any_visible(seen, 0)
    else:
        key = n_start + offs_n
        keys = key < seq.Sk
        if call.right is not None:
            keys = keys & (key <= m_end - 1 + seq.offset + call.right)
        if call.left is not None:
            keys = keys & (key >= m_start + seq.offset - call.left)
    return keys


@triton.jit
def seeing_queries(call, seq, seen, m_start, n_start, offs_m, BLOCK_N: tl.constexpr):
    """Returns which queries see a key of a tile, [BLOCK_M]. seen: [BLOCK_N, BLOCK_M], or None."""
    if seen is not None:
        queries = any_visible(seen, 0)
    else:
        query, last_key = m_start + offs_m, tl.minimum(n_start + BLOCK_N, seq.Sk) - 1
        queries = query < seq.Sq
        if call.right is not None:
            queries = queries & (query >= n_start - seq.offset - call.right)
        if call.left is not None:
            queries = queries & (query <= last_key - seq.offset + call.left)
    return queries


# A key that no query sees, and a query that sees no key, has a gradient of 0, even if 0 * NaN was
# added to it. Bounds and key padding identify such keys and queries at no cost. A mask has to be
# read once more, which is done only if there is a NaN to remove.


@triton.jit
def has_nan(x):
    return tl.max(tl.max((x != x).to(tl.int32), 1), 0) != 0


@triton.jit
def clear_unseen_keys(dk, dv, call, seq, h_kv, n_start, BLOCK_M: tl.constexpr, INDEX: tl.constexpr):
    """Returns dk and dv of a tile, with 0 for the keys that no query of the group's heads sees."""
    BLOCK_N: tl.constexpr = dk.shape[0]
    offs_n = tl.arange(0, BLOCK_N).to(INDEX)
    if call.mask is None:
        key = n_start + offs_n
        # the first and the last query that see each key, apart from key padding
        first, last = key * 0, key * 0 + seq.Sq - 1
        if call.right is not None:
            first = tl.maximum(first, key - (seq.offset + call.right))
        if call.left is not None:
            last = tl.minimum(last, key - (seq.offset - call.left))
        seen = (key < seq.Sk) & (first <= last)
        if call.key_padding is not None:
            padding = call.key_padding
            base = padding.data + seq.b * padding.stride_b
            base += tl.cast(n_start, tl.int64) * padding.stride_k
            seen = seen & (tl.load(base + offs_n * padding.stride_k, mask=seen, other=1) == 0)
        dk, dv = tl.where(seen[:, None], dk, 0.0), tl.where(seen[:, None], dv, 0.0)
    elif has_nan(dk) | has_nan(dv):
        i, j = tl.arange(0, BLOCK_M).to(INDEX)[None, :], offs_n[:, None]
        count = tl.zeros([BLOCK_N], tl.int32)
        for in_group in tl.range(0, call.group):
            h = h_kv * call.group + in_group
            # All queries are visited: bounds kept until here would take registers in the main loop.
            for m_start in tl.range(0, seq.Sq, BLOCK_M, num_stages=1):
                seen = visible_tile(call, ScoreTile(seq, h, m_start, n_start, i, j))
                count = tl.maximum(count, tl.max(seen.to(tl.int32), 1))
        dk, dv = tl.where(count[:, None] != 0, dk, 0.0), tl.where(count[:, None] != 0, dv, 0.0)
    return dk, dv


@triton.jit
def clear_blind_queries(dq, lse, call, seq, h, m_start, BLOCK_N: tl.constexpr, INDEX: tl.constexpr):
    """Returns dq of a tile, with 0 for fully masked rows. lse: as load_lse returns it, [BLOCK_M,
    1]; with a sink it does not tell that the sum over the keys was 0."""
    BLOCK_M: tl.constexpr = dq.shape[0]
    offs_m = tl.arange(0, BLOCK_M).to(INDEX)
    if call.mask is None and call.key_padding is None:
        query = m_start + offs_m
        first, last = query * 0, query * 0 + seq.Sk - 1
        if call.left is not None:
            first = tl.maximum(first, query + (seq.offset - call.left))
        if call.right is not None:
            last = tl.minimum(last, query + (seq.offset + call.right))
        dq = tl.where((first <= last)[:, None], dq, 0.0)
    elif call.sinks is None:
        dq = tl.where(lse == float("inf"), 0.0, dq)
    elif has_nan(dq):
        i, j = offs_m[:, None], tl.arange(0, BLOCK_N).to(INDEX)[None, :]
        count = tl.zeros([BLOCK_M], tl.int32)
        for n_start in tl.range(0, seq.Sk, BLOCK_N, num_stages=1):
            seen = visible_tile(call, ScoreTile(seq, h, m_start, n_start, i, j))
            count = tl.maximum(count, tl.max(seen.to(tl.int32), 1))
        dq = tl.where(count[:, None] != 0, dq, 0.0)
    return dq


# -- Logits --------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """Max error 2 ULP. Odd polynomial below 0.625, beyond it 1 - 2 / (e^2|x| + 1)."""
    square, magnitude = x * x, tl.abs(x)
    # (tanh(x) / x - 1) / x^2 in x^2 on [0, 0.625^2]: a Chebyshev fit, relative error 1.7e-8
    poly = 0.020997178999074751 - 0.0060967141659081976 * square
    poly = -0.053850909578513581 + poly * square
    poly = 0.13332769736976328 + poly * square
    poly = -0.33333328944134255 + poly * square
    small = x + x * (square * poly)
    large = 1.0 - 2.0 / (tl.exp2(magnitude * (2.0 * LOG2E)) + 1.0)
    large = tl.where(x < 0.0, -large, large)
    return tl.where(magnitude < 0.625, small, large)


@triton.jit
def logits(s, call, tile):
    """Returns the logits of a tile, before masking, from s = q·k, and the cap slope d logit / d
    (scale q·k)."""
    s = s * call.scale
    slope = 1.0
    if call.softcap is not None:
        # s <- cap * tanh(s / cap)
        t = tanh(s / call.softcap)
        s = t * call.softcap
        slope = 1.0 - t * t
    if call.bias is not None:
        s += load_scores(call.bias, tile).to(tl.float32)
    if call.alibi is not None:
        # s <- s - slope * |i + offset - j|
        seq, alibi = tile.seq, call.alibi
        distance = tl.abs(tile.m_start + tile.i + seq.offset - (tile.n_start + tile.j))
        distance = distance.to(tl.float32)
        s -= tl.load(alibi.data + seq.b * alibi.stride_b + tile.h) * distance
    return s, slope


# -- Probabilities, from the log-sum-exp ---------------------------------------------------


@triton.jit
def load_lse(pointer, rows):
    """Loads lse, as +inf for fully masked rows and rows past the end: p = exp(s - inf) = 0."""
    lse = tl.load(pointer, mask=rows, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def probabilities_of(s, lse, seen, call, tile, SCALE_ONLY: tl.constexpr):
    """Returns the probabilities before dropout, from s = q·k, and the cap slope d logit / d (scale
    q·k).

    lse: as load_lse returns it, in the shape of tile.i. seen: None if all is visible.
    """
    slope = 1.0
    # p <- exp(s - lse)
    if SCALE_ONLY:
        exponent = s * (call.scale * LOG2E) - lse * LOG2E
    else:
        s, slope = logits(s, call, tile)
        exponent = (s - lse) * LOG2E
    if seen is not None:
        # The exponent is hidden and not p: with p the compiler would hide the halves of words,
        # after p is rounded.
        exponent = tl.where(seen, exponent, float("-inf"))
        if call.softcap is not None:  # the slope may be NaN where hidden
            slope = tl.where(seen, slope, 0.0)
    return tl.exp2(exponent), slope


@triton.jit
def weights_gradient(call, tile):
    """Loads the gradient that each weight of a tile receives as a returned weight."""
    return load_scores(call.weights, tile).to(tl.float32) * call.weights.share


# -- Softmax -------------------------------------------------------------------------------


class SoftmaxState(NamedTuple):
    """The state of the online softmax of BLOCK_M rows. An operand of this type has pointers to the
    states of several splits, their partials."""

    acc: Any  # [BLOCK_M, BLOCK_DV]
    row_max: Any  # [BLOCK_M], in powers of two if SCALE_ONLY
    row_sum: Any  # [BLOCK_M]


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Returns the state of rows that have met no key."""
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    return SoftmaxState(tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), row_max, row_sum)


@triton.jit
def online_softmax_update(state, s, scale, SCALE_ONLY: tl.constexpr):
    """Adds one block of scores to the online softmax (Milakov & Gimelshein 2018, Algorithm 3), but
    not yet p v to its accumulator. Hidden scores are -inf.

    SCALE_ONLY: logits are scale * s, and row_max is in powers of two, so that a probability costs
    one fused multiply-add. Otherwise s are logits, whose difference is taken before it is
    multiplied by log2 e: a logit of -FLT_MAX, which hides keys in many models, would overflow.
    Returns the new state and p.
    """
    row_max = state.row_max
    if SCALE_ONLY:
        # m <- max(m, rowmax(s))
        new_max = tl.maximum(row_max, tl.max(s, 1) * (scale * LOG2E))
        # p <- exp(s - m), alpha <- exp(m_old - m)
        p = tl.exp2(s * (scale * LOG2E) - new_max[:, None])
        alpha = tl.exp2(row_max - new_max)
    else:
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp2((s - new_max[:, None]) * LOG2E)
        alpha = tl.exp2((row_max - new_max) * LOG2E)
    # l <- alpha l + rowsum(p), acc <- alpha acc
    row_sum = state.row_sum * alpha + tl.sum(p, 1)
    return SoftmaxState(state.acc * alpha[:, None], new_max, row_sum), p


@triton.jit
def sinks_of(call, h, token):
    """Returns the sink of head h for the rows `token`, which count all tokens; a token of no
    sequence has none, -inf."""
    sink = tl.load(call.sinks + h)
    if call.cu_seqlens_q is not None:
        sink = tl.where(token < tl.load(call.cu_seqlens_q + call.B), sink, float("-inf"))
    return sink


@triton.jit
def finish_softmax(state, call, sink, SCALE_ONLY: tl.constexpr):
    """Returns out and lse of rows that have met all their keys. sink: that of each row, or None."""
    acc, row_max, row_sum = state.acc, state.row_max, state.row_sum
    fully_masked = row_sum == 0.0  # then acc is 0 too, unless it met a NaN that other rows see
    if SCALE_ONLY:
        row_max = row_max * LN2
    row_max = tl.where(fully_masked, float("-inf"), row_max)
    factor = 1.0
    if sink is not None:
        # The sink is one more logit, without a value: it only joins the denominator.
        top = tl.maximum(row_max, sink)
        origin = tl.where(top == float("-inf"), 0.0, top)
        factor = tl.exp2((row_max - origin) * LOG2E)
        row_sum = row_sum * factor + tl.exp2((sink - origin) * LOG2E)
        row_max = top
    if call.dropout is not None:
        factor = factor * call.dropout.scale
    # out <- acc / l, lse <- m + log(l)
    factor = tl.where(fully_masked, 0.0, factor / row_sum)
    out = tl.where(fully_masked[:, None], 0.0, acc * factor[:, None])
    return out, tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log(row_sum))


# -- Dropout -------------------------------------------------------------------------------


@triton.jit
def philox4x32(c0, c1, c2, c3, seed):
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0 = tl.full((), 0x9E3779B9, tl.uint32)
    w1 = tl.full((), 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        # both halves of a product by one instruction
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        high0, high1 = (product0 >> 32).to(tl.uint32), (product1 >> 32).to(tl.uint32)
        c0, c2 = high1 ^ c1 ^ k0, high0 ^ c3 ^ k1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        k0 = tl.add(k0, w0, sanitize_overflow=False)
        k1 = tl.add(k1, w1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def philox_words(dropout, matrix, row, group):
    """Returns the 128 bits of a group of 8 columns, as four words of the shape of group and row.

    counter = (column // 8, row, batch * Hq + head, offset), key = seed.
    """
    seed = tl.load(dropout.philox)
    offset = (tl.load(dropout.philox + 1) & 0xFFFFFFFF).to(tl.uint32)
    group, row = tl.broadcast(group.to(tl.uint32), row.to(tl.uint32))
    zero = group ^ group
    return philox4x32(group, row, zero + matrix.to(tl.uint32), zero + offset, seed)


@triton.jit
def halves_kept(word, threshold):
    """Returns which of a word's two 16-bit values are kept, the low one first: [..., 2]."""
    low, high = (word & 0xFFFF).to(tl.int32), (word >> 16).to(tl.int32)
    return tl.join((low >= threshold).to(tl.int8), (high >= threshold).to(tl.int8))


@triton.jit
def dropout_keep(dropout, matrix, row, n_start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns which weights of the rows [ROWS, 1], columns n_start + [0, COLUMNS), are kept: bool.

    n_start is a multiple of 8; matrix is a number, or one for each row, [ROWS, 1].
    """
    group = n_start // 8 + tl.arange(0, COLUMNS // 8)[None, :]
    c0, c1, c2, c3 = philox_words(dropout, matrix, row, group)
    # [rows, columns / 8, 2, 2, 2]: word / 2, word % 2, half; in memory order these are 8 columns
    even = tl.join(halves_kept(c0, dropout.threshold), halves_kept(c2, dropout.threshold))
    odd = tl.join(halves_kept(c1, dropout.threshold), halves_kept(c3, dropout.threshold))
    words = tl.permute(tl.join(even, odd), (0, 1, 3, 4, 2))
    return tl.reshape(words, (ROWS, COLUMNS)) != 0


@triton.jit
def dropout_keep_in_call(call, matrix, row, n_start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns `dropout_keep` for a call that counts heads, rows and columns from its starts."""
    if call.starts is not None:
        matrix = matrix + call.starts.head
        row = row + call.starts.query
        n_start = n_start + call.starts.key
    return dropout_keep(call.dropout, matrix, row, n_start, ROWS, COLUMNS)


@triton.jit
def dropout_keep_in_call_at(call, matrix, row, column):
    """Returns `dropout_keep_at` for a call."""
    if call.starts is not None:
        matrix = matrix + call.starts.head
        row = row + call.starts.query
        column = column + call.starts.key
    return dropout_keep_at(call.dropout, matrix, row, column)


@triton.jit
def dropout_keep_at(dropout, matrix, row, column):
    """Returns what dropout_keep does, for any columns; each draws the bits of its whole group of
    8."""
    c0, c1, c2, c3 = philox_words(dropout, matrix, row, column // 8)
    place = column % 8
    word = tl.where(place < 4, tl.where(place < 2, c0, c1), tl.where(place < 6, c2, c3))
    half = tl.where(place % 2 == 0, word & 0xFFFF, word >> 16)
    return half.to(tl.int32) >= dropout.threshold


@triton.jit
def dropout_keep_mask_kernel(keep, dropout, Sq, Sk, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Stores the dropout mask, bytes [B, Hq, Sq, Sk]. One program: BLOCK_M rows of one head."""
    blocks = tl.cdiv(Sq, BLOCK_M)
    matrix, m_start = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_M
    i, j = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    base = keep + tl.cast(matrix, tl.int64) * Sq * Sk + tl.cast(m_start, tl.int64) * Sk
    for n_start in tl.range(0, Sk, BLOCK_N):
        kept = dropout_keep(dropout, matrix, m_start + i, n_start, BLOCK_M, BLOCK_N)
        inside = (m_start + i < Sq) & (n_start + j < Sk)
        pointers = base + i.to(tl.int64) * Sk + n_start + j
        tl.store(pointers, kept.to(tl.int8), mask=inside)
