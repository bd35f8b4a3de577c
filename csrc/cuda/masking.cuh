// Masking of the score accumulators of a warp. In lane 4 g + t of a warp, s[i][n][2 h + e] is row
// 16 i + 8 h + g and column 8 n + 2 t + e of the warp's part of the tile. Bit 2 n + e of a row's
// bits is that column.
#pragma once

#include "mma.cuh"
#include "sequence.cuh"

namespace fused_attention::cuda {

FA_DEVICE int lane_row() { return threadIdx.x % 32 / 4; }
FA_DEVICE int lane_column() { return threadIdx.x % 4 * 2; }

// Returns what one row sees, before masks: the keys of a query, or (kTransposed) the queries of a
// key.
template <bool kTransposed>
FA_DEVICE Range seen_by(const KernelParams& p, const Sequence& seq, int row) {
  return kTransposed ? visible_queries(p, seq, row, row + 1) : visible_keys(p, seq, row, row + 1);
}
// Returns whether a row takes part at all, in a call without masks: a query that sees some key, or
// a key that some query sees. Any other row has a gradient of 0, even if 0 * NaN was added to it.
template <bool kTransposed>
FA_DEVICE bool takes_part(const KernelParams& p, const Sequence& seq, int row) {
  const Range seen = seen_by<kTransposed>(p, seq, row);
  return seen.begin < seen.end;
}
// Returns the columns that every row of [row_start, row_end) sees.
template <bool kTransposed>
FA_DEVICE Range seen_by_all(const KernelParams& p, const Sequence& seq, int row_start,
                            int row_end) {
  const Range first = seen_by<kTransposed>(p, seq, row_start);
  const Range last = seen_by<kTransposed>(p, seq, row_end - 1);
  return intersect(first, last);
}

// Sets scores outside the band around the diagonal, and beyond the last key, to -inf.
template <bool kTransposed, int kRowTiles, int kColumns>
FA_DEVICE void hide_outside_band(const KernelParams& p, const Sequence& seq, int row_start,
                                 int column_start, float (&s)[kRowTiles][kColumns / 8][4]) {
  const int column = column_start + lane_column();
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Range seen = seen_by<kTransposed>(p, seq, row_start + 16 * i + 8 * half + lane_row());
      const int begin = seen.begin - column, end = seen.end - column;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * n + e < begin || 8 * n + e >= end) s[i][n][2 * half + e] = -kInf;
        }
      }
    }
  }
}

// Returns which of the columns of a tile that this lane holds are visible to one row.
template <bool kTransposed, int kColumns>
FA_DEVICE uint32_t visible_columns(const KernelParams& p, const Sequence& seq, int h, int row,
                                   int column_start) {
  if (row >= (kTransposed ? seq.Sk : seq.Sq)) return 0;
  const Range seen = seen_by<kTransposed>(p, seq, row);
  const uint8_t* mask = (const uint8_t*)p.mask.data;
  if (mask != nullptr) mask += seq.b * p.mask.stride_b + h * p.mask.stride_h;
  uint32_t visible = 0;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = column_start + lane_column() + 8 * n + e;
      const int64_t query = kTransposed ? column : row, key = kTransposed ? row : column;
      bool sees = column >= seen.begin && column < seen.end;
      if (sees && mask != nullptr) {
        sees = mask[query * p.mask.stride_q + key * p.mask.stride_k] != 0;
      }
      if (sees && p.key_padding_mask != nullptr) {
        sees =
            p.key_padding_mask[seq.b * p.key_padding_stride_b + key * p.key_padding_stride_k] == 0;
      }
      visible |= (uint32_t)sees << (2 * n + e);
    }
  }
  return visible;
}

// Returns the columns that some row of the warp sees.
FA_DEVICE uint32_t any_row(uint32_t visible) {
  for (int lanes = 4; lanes < 32; lanes *= 2) visible |= __shfl_xor_sync(~0u, visible, lanes);
  return visible;
}

}  // namespace fused_attention::cuda
