// Visibility: which tiles some query sees, and inside a tile one word per key, whose bit i is set
// if query m_start + i may attend to the key.
#pragma once

#include "sequence.inl"

namespace fused_attention {
namespace {

// Half-open range.
struct Range {
  int64_t begin, end;
};
// Returns {0, 0} if the intersection is empty: its begin, rounded down to the start of a tile, is
// then no less than its end, and nothing is read past an end.
FA_INLINE Range intersect(Range a, Range b) {
  const int64_t begin = max_of(a.begin, b.begin), end = min_of(a.end, b.end);
  return begin < end ? Range{begin, end} : Range{0, 0};
}

// Key j is in the window of query i iff i + off - left <= j <= i + off + right. Returns the keys
// that the queries [m_start, m_end) may see, before masks.
FA_INLINE Range visible_keys(const AttentionParams& p, const Sequence& seq, int64_t m_start,
                             int64_t m_end) {
  const int64_t first = p.window_left < 0 ? 0 : m_start + seq.diagonal_offset - p.window_left;
  const int64_t last = p.window_right < 0 ? seq.Sk : m_end + seq.diagonal_offset + p.window_right;
  return intersect({0, seq.Sk}, {first, last});
}
// Returns the queries that may see one of the keys [n_start, n_end), before masks.
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
// Notes for each block of kMaskRows queries and kBlockN keys whether the mask shows or hides some
// of it. If several heads share the mask, notes are taken once per call. Tiles that the mask hides
// then cost nothing, and tiles that it shows cost no more than without a mask.

constexpr int64_t kMaskRows = 16;
constexpr uint8_t kShows = 1, kHides = 2;  // bits: the mask shows (hides) some of the block

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
  // Returns the bytes of p.mask_blocks. There are none if every head has a mask of its own (which
  // is read only once anyway), if the mask is the same for all queries, or if there are few
  // queries.
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

// Returns the notes of all blocks that a tile touches, combined: kShows without a mask, and kShows
// | kHides if no notes were taken.
FA_INLINE uint8_t mask_on_tile(const AttentionParams& p, const ScoreTile& tile) {
  if (p.mask.data == nullptr) return kShows;
  if (p.mask_blocks == nullptr) return kShows | kHides;
  uint8_t found = 0;
  for (int64_t row = tile.m_start / kMaskRows; row * kMaskRows < tile.m_start + tile.rows; ++row) {
    found |= mask_blocks_at(p, tile.seq.b, tile.h, row)[tile.n_start / kBlockN];
  }
  return found;
}

// -- tiles ----------------------------------------------------------------------------------------

// Computes visible[j] for one tile, whose first key is a multiple of kBlockN. `visible` is valid
// only if the result is kSome.
[[maybe_unused]] Visible tile_visibility(const AttentionParams& p, const ScoreTile& tile,
                                         uint64_t* visible) {
  const Sequence& seq = tile.seq;
  const int64_t m_start = tile.m_start, rows = tile.rows;
  const int64_t n_start = tile.n_start, columns = tile.columns;
  const uint64_t everybody = low_bits(rows);
  // The diagonal band cuts the tile unless its first query reaches the last key to the right and
  // its last query the first key to the left.
  const bool cut_right =
      p.window_right >= 0 && n_start + columns - 1 > m_start + seq.diagonal_offset + p.window_right;
  const bool cut_left =
      p.window_left >= 0 && n_start < m_start + rows - 1 + seq.diagonal_offset - p.window_left;
  const uint8_t mask_effect = mask_on_tile(p, tile);
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
                          tile.h * p.mask.stride_h + m_start * p.mask.stride_q +
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
