// Who sees whom: the tiles that somebody sees, and inside a tile one word per key, bit i set where
// query m_start + i may attend to it.
#pragma once

#include "sequence.inl"

namespace fused_attention {
namespace {

// Half-open range.
struct Range {
  int64_t begin, end;
};
// Empty is {0, 0}: rounded down to a tile's start it stays empty, and nothing past an end is read.
FA_INLINE Range intersect(Range a, Range b) {
  const int64_t begin = max_of(a.begin, b.begin), end = min_of(a.end, b.end);
  return begin < end ? Range{begin, end} : Range{0, 0};
}

// Key j is in the window of query i iff i + off - left <= j <= i + off + right.
// The keys that the queries [m_start, m_end) may see, before masks.
FA_INLINE Range visible_keys(const AttentionParams& p, const Sequence& seq, int64_t m_start,
                             int64_t m_end) {
  const int64_t first = p.window_left < 0 ? 0 : m_start + seq.diagonal_offset - p.window_left;
  const int64_t last = p.window_right < 0 ? seq.Sk : m_end + seq.diagonal_offset + p.window_right;
  return intersect({0, seq.Sk}, {first, last});
}
// The queries that may see one of the keys [n_start, n_end), before masks.
FA_INLINE Range visible_queries(const AttentionParams& p, const Sequence& seq, int64_t n_start,
                                int64_t n_end) {
  const int64_t first = p.window_right < 0 ? 0 : n_start - seq.diagonal_offset - p.window_right;
  const int64_t last = p.window_left < 0 ? seq.Sq : n_end - seq.diagonal_offset + p.window_left;
  return intersect({0, seq.Sq}, {first, last});
}

FA_INLINE uint64_t low_bits(int64_t count) {
  return count <= 0 ? 0 : count >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << count) - 1;
}

enum class Visible { kNone, kSome, kAll };

// -- blocks of a mask -----------------------------------------------------------------------------
// What a mask does to kMaskRows queries and kBlockN keys: found once a call where several heads
// share it, so that tiles that it hides cost nothing, and those that it leaves alone no more than
// without it.

constexpr int64_t kMaskRows = 16;
constexpr uint8_t kShows = 1, kHides = 2;  // some of the block

FA_INLINE int64_t mask_blocks_of_a_head(const AttentionParams& p) {
  return ceil_div(p.Sq, kMaskRows) * ceil_div(p.Sk, kBlockN);
}
FA_INLINE uint8_t* mask_blocks_at(const AttentionParams& p, int64_t b, int64_t h, int64_t row) {
  const int64_t heads = p.mask.stride_h == 0 ? 1 : p.Hq, own_b = p.mask.stride_b == 0 ? 0 : b;
  const int64_t matrix = own_b * heads + (heads == 1 ? 0 : h);
  return p.mask_blocks + matrix * mask_blocks_of_a_head(p) + row * ceil_div(p.Sk, kBlockN);
}

// Task: kMaskRows queries of one matrix of the mask.
struct MaskBlocks {
  // What p.mask_blocks must hold; 0 where every head has a mask of its own, which is looked at but
  // once anyway, where it is the same for all queries, or there are few of them.
  static size_t bytes(const AttentionParams& p) {
    const bool shared = matrices(p) < p.B * p.Hq && p.mask.stride_q != 0 && p.Sq > kMaskRows;
    return p.mask.data != nullptr && shared ? (size_t)(matrices(p) * mask_blocks_of_a_head(p)) : 0;
  }
  static int64_t matrices(const AttentionParams& p) {
    return (p.mask.stride_b == 0 ? 1 : p.B) * (p.mask.stride_h == 0 ? 1 : p.Hq);
  }
  static int64_t num_tasks(const AttentionParams& p) {
    return matrices(p) * ceil_div(p.Sq, kMaskRows);
  }
  static size_t workspace_bytes(const AttentionParams&) { return 0; }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void*) {
    const int64_t groups = ceil_div(p.Sq, kMaskRows), heads = p.mask.stride_h == 0 ? 1 : p.Hq;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task % groups, b = task / groups / heads, h = task / groups % heads;
      const int64_t m_start = row * kMaskRows, rows = min_of(kMaskRows, p.Sq - m_start);
      uint8_t* block = mask_blocks_at(p, b, h, row);
      for (int64_t n = 0; n < p.Sk; n += kBlockN, ++block) {
        const int64_t columns = min_of(kBlockN, p.Sk - n), step = p.mask.stride_k;
        const uint8_t* mask = (const uint8_t*)p.mask.data + b * p.mask.stride_b +
                              h * p.mask.stride_h + m_start * p.mask.stride_q + n * step;
        uint8_t most = 0, least = 255;
        for (int64_t i = 0; i < rows; ++i, mask += p.mask.stride_q) {
          const auto look = [&](uint8_t byte) {
            most = most > byte ? most : byte;
            least = least < byte ? least : byte;
          };
          if (step == 1) {
            for (int64_t j = 0; j < columns; ++j) look(mask[j]);
          } else {
            for (int64_t j = 0; j < columns; ++j) look(mask[j * step]);
          }
        }
        *block = (uint8_t)((most != 0 ? kShows : 0) | (least == 0 ? kHides : 0));
      }
    }
  }
};

// Of the blocks that a tile touches together; kShows | kHides where nothing was noted.
FA_INLINE uint8_t mask_on_tile(const AttentionParams& p, int64_t b, int64_t h, int64_t m_start,
                               int64_t rows, int64_t n_start) {
  if (p.mask.data == nullptr) return kShows;
  if (p.mask_blocks == nullptr) return kShows | kHides;
  uint8_t found = 0;
  for (int64_t row = m_start / kMaskRows; row * kMaskRows < m_start + rows; ++row) {
    found |= mask_blocks_at(p, b, h, row)[n_start / kBlockN];
  }
  return found;
}

// -- tiles ----------------------------------------------------------------------------------------

// visible[j] for one tile, whose first key is a multiple of kBlockN; left unwritten unless the
// answer is kSome.
[[maybe_unused]] Visible tile_visibility(const AttentionParams& p, const Sequence& seq, int64_t h,
                                         int64_t m_start, int64_t rows, int64_t n_start,
                                         int64_t columns, uint64_t* visible) {
  const uint64_t everybody = low_bits(rows);
  // The diagonal band cuts the tile unless its first query reaches the last key to the right and
  // its last query the first key to the left.
  const bool cut_right =
      p.window_right >= 0 && n_start + columns - 1 > m_start + seq.diagonal_offset + p.window_right;
  const bool cut_left =
      p.window_left >= 0 && n_start < m_start + rows - 1 + seq.diagonal_offset - p.window_left;
  const uint8_t mask_effect = mask_on_tile(p, seq.b, h, m_start, rows, n_start);
  if ((mask_effect & kShows) == 0) return Visible::kNone;
  const bool masked = (mask_effect & kHides) != 0;
  if (!cut_right && !cut_left && p.key_padding_mask == nullptr && !masked) return Visible::kAll;
  fill(visible, columns, everybody);
  for (int64_t j = 0; cut_right && j < columns; ++j) {
    visible[j] &= ~low_bits(n_start + j - seq.diagonal_offset - p.window_right - m_start);
  }
  for (int64_t j = 0; cut_left && j < columns; ++j) {
    visible[j] &= low_bits(n_start + j - seq.diagonal_offset + p.window_left - m_start + 1);
  }
  if (p.key_padding_mask != nullptr) {
    const uint8_t* padding =
        p.key_padding_mask + seq.b * p.key_padding_stride_b + n_start * p.key_padding_stride_k;
    for (int64_t j = 0; j < columns; ++j) {
      if (padding[j * p.key_padding_stride_k] != 0) visible[j] = 0;
    }
  }
  if (masked) {
    const uint8_t* mask = (const uint8_t*)p.mask.data + seq.b * p.mask.stride_b +
                          h * p.mask.stride_h + m_start * p.mask.stride_q +
                          n_start * p.mask.stride_k;
    const int64_t step = p.mask.stride_k;
    if (p.mask.stride_q == 0) {
      for (int64_t j = 0; j < columns; ++j) visible[j] = mask[j * step] ? visible[j] : 0;
    } else {
      for (int64_t i = 0; i < rows; ++i, mask += p.mask.stride_q) {
        if (step == 1) {
          for (int64_t j = 0; j < columns; ++j) visible[j] &= ~((uint64_t)(mask[j] == 0) << i);
        } else {
          for (int64_t j = 0; j < columns; ++j) {
            visible[j] &= ~((uint64_t)(mask[j * step] == 0) << i);
          }
        }
      }
    }
  }
  uint64_t seen_by_all = everybody, seen_by_any = 0;
  for (int64_t j = 0; j < columns; ++j) {
    seen_by_all &= visible[j];
    seen_by_any |= visible[j];
  }
  if (seen_by_any == 0) return Visible::kNone;
  return seen_by_all == everybody ? Visible::kAll : Visible::kSome;
}

}  // namespace
}  // namespace fused_attention
