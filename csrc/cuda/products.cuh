// Matrix products of a warp's 16 * kRowTiles rows, for operands of one or of three terms an
// element.
#pragma once

#include "mma.cuh"

namespace fused_attention::cuda {

// Of float32 those that its precision asks for, see `Terms`: "highest" 6, "high" 3, "medium" 1.
template <typename T>
FA_DEVICE int products_of(const Call& p) {
  return Terms<T>::kCount == 1 || p.precision == 2 ? 1 : p.precision == 1 ? 3 : 6;
}

// Of two neighbouring 16-bit elements those whose bit, 0 and 1, is set.
FA_DEVICE uint32_t select_halves(uint32_t bits) {
  return (bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u);
}

// s <- a b^T, over kWidth columns of either. load_a(i, step, operand) fetches 16 rows and columns
// of a; b_read is where this lane reads kColumns rows of b, `Tile::by_rows`.
template <typename T, typename TileB, int kRowTiles, int kColumns, int kWidth, typename LoadA>
FA_DEVICE void multiply_rows(int products, const LoadA& load_a, uint32_t b_read,
                             float (&s)[kRowTiles][kColumns / 8][4]) {
  using Element = typename Terms<T>::Element;
  constexpr int kTerms = Terms<T>::kCount;
#pragma unroll
  for (int step = 0; step < kWidth / 16; ++step) {
    uint32_t a[kRowTiles][kTerms][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) load_a(i, step, a[i]);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t b[kTerms][4];
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        load_matrices(b[term], TileB::move(b_read, n * 16, step, term));
      }
#pragma unroll
      for (int product = 0; product < Terms<T>::kProducts; ++product) {
        if (product >= products) break;
        const auto& right = b[kRight[product]];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          const auto& left = a[i][kLeft[product]];
          if (step == 0 && product == 0) {
            multiply_add<Element, true>(s[i][2 * n], left, right[0], right[1]);
            multiply_add<Element, true>(s[i][2 * n + 1], left, right[2], right[3]);
          } else {
            multiply_add<Element>(s[i][2 * n], left, right[0], right[1]);
            multiply_add<Element>(s[i][2 * n + 1], left, right[2], right[3]);
          }
        }
      }
    }
  }
}

// acc <- acc + w b, w accumulators of kColumns columns; b_read is where this lane reads b's
// kColumns rows, `Tile::by_columns`. kSelect: rows of b whose bit in `seen` (see masking.cuh) is
// not set are taken as 0, since 0 * NaN would not be.
template <typename T, typename TileB, bool kSelect, int kRowTiles, int kColumns, int kWidth>
FA_DEVICE void multiply_weights(int products, const float (&w)[kRowTiles][kColumns / 8][4],
                                uint32_t b_read, uint32_t seen,
                                float (&acc)[kRowTiles][kWidth / 8][4]) {
  using Element = typename Terms<T>::Element;
  constexpr int kTerms = Terms<T>::kCount;
#pragma unroll
  for (int n = 0; n < kColumns / 16; ++n) {
    uint32_t a[kRowTiles][kTerms][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float* pair = &w[i][2 * n + r / 2][r % 2 * 2];
        uint32_t packed[kTerms];
        pack_terms<T>(pair[0], pair[1], packed);
#pragma unroll
        for (int term = 0; term < kTerms; ++term) a[i][term][r] = packed[term];
      }
    }
    const uint32_t low = select_halves(seen >> (4 * n)), high = select_halves(seen >> (4 * n + 2));
#pragma unroll
    for (int step = 0; step < kWidth / 16; ++step) {
      uint32_t b[kTerms][4];
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        load_matrices_transposed(b[term], TileB::move(b_read, n * 16, step, term));
        if (kSelect) {
          b[term][0] &= low, b[term][2] &= low;
          b[term][1] &= high, b[term][3] &= high;
        }
      }
#pragma unroll
      for (int product = 0; product < Terms<T>::kProducts; ++product) {
        if (product >= products) break;
        const auto& right = b[kRight[product]];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          const auto& left = a[i][kLeft[product]];
          multiply_add<Element>(acc[i][2 * step], left, right[0], right[1]);
          multiply_add<Element>(acc[i][2 * step + 1], left, right[2], right[3]);
        }
      }
    }
  }
}

template <int kRowTiles, int kTiles>
FA_DEVICE void clear(float (&acc)[kRowTiles][kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[i][n][c] = 0;
    }
  }
}

}  // namespace fused_attention::cuda
