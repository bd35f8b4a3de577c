// One sequence of a call: its lengths, and where its tokens lie. Everything that may differ between
// the entries of a batch (packed sequences, used lengths, pages) is decided here, once per task.
#pragma once

#include "tiles.inl"

namespace fused_attention {
namespace {

struct Sequence {
  int64_t b;                 // its index along a batch dimension
  int64_t Sq, Sk;            // the number of its queries, and of its keys in use
  int64_t q_start, k_start;  // its first token among all tokens, 0 unless they are packed
  int64_t diagonal_offset;   // key j meets query i at j = i + diagonal_offset
  const int32_t* pages;      // the numbers of the pages its keys lie in, or null
};

FA_INLINE Sequence sequence_of(const AttentionParams& p, int64_t b) {
  Sequence seq = {b, p.Sq, p.Sk, 0, 0, p.diagonal_start, nullptr};
  if (p.cu_seqlens_q != nullptr) {
    seq.q_start = p.cu_seqlens_q[b];
    seq.Sq = p.cu_seqlens_q[b + 1] - seq.q_start;
    if (!p.serves_queries(seq.Sq)) seq.Sq = 0;
  }
  if (p.cu_seqlens_k != nullptr) {
    seq.k_start = p.cu_seqlens_k[b];
    seq.Sk = p.cu_seqlens_k[b + 1] - seq.k_start;
  }
  if (p.seqused_k != nullptr) seq.Sk = p.seqused_k[b];
  if (p.block_table != nullptr) {
    seq.pages = p.block_table + b * p.block_table_stride_b;
    seq.k_start = 0;
  }
  if (p.bottom_right) seq.diagonal_offset += seq.Sk - seq.Sq;
  return seq;
}

// The keys [n_start, n_start + columns) of key head h of one sequence.
struct KeyTile {
  const Sequence& seq;
  int64_t h, n_start, columns;
};
// Their scores with the queries [m_start, m_start + rows) of query head h.
struct ScoreTile {
  const Sequence& seq;
  int64_t h, m_start, rows, n_start, columns;
};

// A block of at most `size` tokens of one head of one sequence. A block of a packed sequence may be
// empty: its `start` is then beyond the last token.
struct Block {
  int64_t b, h, start;
};
// Returns the number of blocks of one head, over all sequences. If sequences are packed, the blocks
// of sequence b, which starts at token t, are numbered from t / size + b on. These numbers suffice,
// since ceil(n / size) <= (t + n) / size - t / size + 1.
FA_INLINE int64_t blocks_of_a_head(const AttentionParams& p, const int32_t* cu_seqlens,
                                   int64_t length, int64_t size) {
  if (cu_seqlens == nullptr) return p.B * ceil_div(length, size);
  return cu_seqlens[p.B] / size + p.B;
}
FA_INLINE Block block_of(const AttentionParams& p, const int32_t* cu_seqlens, int64_t heads,
                         int64_t length, int64_t number, int64_t size) {
  if (cu_seqlens == nullptr) {
    const int64_t blocks = ceil_div(length, size), head = number / blocks;
    return {head / heads, head % heads, number % blocks * size};
  }
  const int64_t blocks = blocks_of_a_head(p, cu_seqlens, length, size), block = number % blocks;
  int64_t low = 0, high = p.B;  // the last sequence whose first block is not beyond this one
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (cu_seqlens[middle] / size + middle <= block ? low : high) = middle;
  }
  return {low, number / blocks, (block - cu_seqlens[low] / size - low) * size};
}
FA_INLINE int64_t count_query_blocks(const AttentionParams& p, int64_t size) {
  return p.Hq * blocks_of_a_head(p, p.cu_seqlens_q, p.Sq, size);
}
// The last queries come first: under a causal mask they see the most keys.
FA_INLINE Block query_block(const AttentionParams& p, int64_t number, int64_t size) {
  number = count_query_blocks(p, size) - 1 - number;
  return block_of(p, p.cu_seqlens_q, p.Hq, p.Sq, number, size);
}
// Whether there are enough key heads to keep every thread busy, and each fits in a cache. A task
// may then be all queries of one key head. Packed sequences need more heads, because their lengths
// differ.
FA_INLINE bool many_heads(const AttentionParams& p, int64_t bytes_of_a_head) {
  const int64_t heads_a_thread = p.cu_seqlens_q == nullptr ? 4 : 32;
  return p.B * p.Hkv >= heads_a_thread * p.threads && bytes_of_a_head <= 2 << 20;
}
// Returns the offsets of packed keys, or null. Paged keys have none: every sequence has the same
// capacity of keys, which are divided into blocks as in a dense batch.
FA_INLINE const int32_t* key_offsets(const AttentionParams& p) {
  return p.block_table == nullptr ? p.cu_seqlens_k : nullptr;
}
FA_INLINE int64_t count_key_blocks(const AttentionParams& p, int64_t size) {
  return p.Hkv * blocks_of_a_head(p, key_offsets(p), p.Sk, size);
}
FA_INLINE Block key_block(const AttentionParams& p, int64_t number, int64_t size) {
  return block_of(p, key_offsets(p), p.Hkv, p.Sk, number, size);
}

// Returns the number of the block in which key n of head h lies.
FA_INLINE int64_t key_block_number(const AttentionParams& p, int64_t b, int64_t h, int64_t n,
                                   int64_t size) {
  const int32_t* offsets = key_offsets(p);
  if (offsets == nullptr) return (b * p.Hkv + h) * ceil_div(p.Sk, size) + n / size;
  return h * blocks_of_a_head(p, offsets, p.Sk, size) + offsets[b] / size + b + n / size;
}

// Returns the index of query i of head h in lse and delta.
FA_INLINE int64_t row_number(const AttentionParams& p, const Sequence& seq, int64_t h, int64_t i) {
  return seq.b * p.lse_stride_b + h * p.lse_stride_h + seq.q_start + i;
}
template <typename T>
FA_INLINE T* lse_of(const AttentionParams& p, const Sequence& seq, int64_t h, int64_t i) {
  return (T*)p.lse + row_number(p, seq, h, i);
}
// Returns the address of the row of key n of head h.
FA_INLINE const char* key_row(const AttentionParams& p, const TensorView& view, const Sequence& seq,
                              int64_t h, int64_t n) {
  if (seq.pages == nullptr) return (char*)row_of(view, p.dtype, seq.b, h, seq.k_start + n);
  return (char*)row_of(view, p.dtype, seq.pages[n / p.page_size], h, n % p.page_size);
}
// Returns how many keys from n on, at most `columns`, lie at a constant stride.
FA_INLINE int64_t keys_in_a_row(const AttentionParams& p, const Sequence& seq, int64_t n,
                                int64_t columns) {
  return seq.pages == nullptr ? columns : min_of(columns, p.page_size - n % p.page_size);
}
// at[j] <- the address of the row of key n + j, for j < columns.
[[maybe_unused]] void key_addresses(const AttentionParams& p, const TensorView& view,
                                    const Sequence& seq, int64_t h, int64_t n, int64_t columns,
                                    const char** at) {
  const int64_t step = view.stride_s * element_size(p.dtype);
  for (int64_t j = 0; j < columns;) {
    const char* row = key_row(p, view, seq, h, n + j);
    const int64_t end = j + keys_in_a_row(p, seq, n + j, columns - j);
    for (; j < end; ++j, row += step) at[j] = row;
  }
}

// Returns the rows of K or V of one head, for reading scalars: in place if they are of type T, none
// is hidden and they lie at a constant stride, else converted in `scratch`. Rows whose visibility
// word is 0 (no query sees them) become 0, whatever they held, since 0 * NaN is not 0. `visible` is
// null if every row is seen.
template <typename T>
Scalars<T> key_rows(const AttentionParams& p, const TensorView& view, const KeyTile& keys,
                    int64_t D, const uint64_t* visible, T* scratch) {
  bool hidden = false;
  for (int64_t j = 0; visible != nullptr && j < keys.columns; ++j) hidden |= visible[j] == 0;
  const bool same_type = p.dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32);
  const bool in_a_row = keys_in_a_row(p, keys.seq, keys.n_start, keys.columns) == keys.columns;
  if (same_type && !hidden && in_a_row) {
    return {(const T*)key_row(p, view, keys.seq, keys.h, keys.n_start), view.stride_s, 1};
  }
  for (int64_t j = 0; j < keys.columns; ++j) {
    T* row = scratch + j * D;
    if (hidden && visible[j] == 0) {
      fill(row, D, (T)0);
    } else {
      load_row(row, key_row(p, view, keys.seq, keys.h, keys.n_start + j), p.dtype, D);
    }
  }
  return {scratch, D, 1};
}

// Loads the same rows as a tile [padded_rows][round_up(D)], padded with zeros.
template <typename T>
void load_key_tile(T* dst, const AttentionParams& p, const TensorView& view, const KeyTile& keys,
                   int64_t D, const uint64_t* visible, int64_t padded_rows) {
  const int64_t width = round_up(D, kLanes<T>);
  for (int64_t j = 0; j < padded_rows; ++j) {
    T* row = dst + j * width;
    const bool counts = j < keys.columns && (visible == nullptr || visible[j] != 0);
    if (counts) load_row(row, key_row(p, view, keys.seq, keys.h, keys.n_start + j), p.dtype, D);
    const int64_t valid = counts ? D : 0;
    fill(row + valid, width - valid, (T)0);
  }
}

}  // namespace
}  // namespace fused_attention
