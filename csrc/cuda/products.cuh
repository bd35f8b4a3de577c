// Matrix products of 16 * kRowTiles rows of a warp, for operands with one or three terms an
// element.
#pragma once

#include "mma.cuh"

namespace fused_attention::cuda {

// Returns the number of products of terms to compute (see `Terms`): 1 for 16-bit elements; for
// float32 6 with precision "highest", 3 with "high", 1 with "medium".
template <typename T>
FA_DEVICE int products_of(const KernelParams& p) {
  return Terms<T>::kCount == 1 || p.precision == 2 ? 1 : p.precision == 1 ? 3 : 6;
}

// Returns a mask for two neighbouring 16-bit elements: bit 0 of `bits` selects the low one, bit 1
// the high one.
FA_DEVICE uint32_t select_halves(uint32_t bits) {
  return (bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u);
}

// c <- a b if `first`, else c + a b, for the columns `half` of the 16 columns of b. Matrix units
// truncate a sum that has too many bits (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor
// cores"). So the products of a float's terms are summed apart, the smallest first, and their sum
// is added to c with rounding to nearest.
template <typename T>
FA_DEVICE void multiply_terms(int products, bool first, float (&c)[4],
                              const uint32_t (&a)[Terms<T>::kCount][4],
                              const uint32_t (&b)[Terms<T>::kCount][4], int half) {
  using Element = typename Terms<T>::Element;
  if constexpr (Terms<T>::kCount == 1) {
    if (first) {
      multiply_add<Element, true>(c, a[0], b[0][2 * half], b[0][2 * half + 1]);
    } else {
      multiply_add<Element>(c, a[0], b[0][2 * half], b[0][2 * half + 1]);
    }
  } else {
    float sum[4] = {};
#pragma unroll
    for (int product = Terms<T>::kProducts - 1; product >= 0; --product) {
      if (product >= products) continue;
      const auto& right = b[kRight[product]];
      multiply_add<Element>(sum, a[kLeft[product]], right[2 * half], right[2 * half + 1]);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) c[k] = first ? sum[k] : c[k] + sum[k];
  }
}

// s <- a b^T, over kWidth columns of both. load_a(i, step, operand) fetches 16 rows and columns of
// a; b_read is the address from which this lane reads kColumns rows of b, `Tile::by_rows`.
template <typename T, typename TileB, int kRowTiles, int kColumns, int kWidth, typename LoadA>
FA_DEVICE void multiply_rows(int products, const LoadA& load_a, uint32_t b_read,
                             float (&s)[kRowTiles][kColumns / 8][4]) {
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
      for (int i = 0; i < kRowTiles; ++i) {
        multiply_terms<T>(products, step == 0, s[i][2 * n], a[i], b, 0);
        multiply_terms<T>(products, step == 0, s[i][2 * n + 1], a[i], b, 1);
      }
    }
  }
}

// acc <- acc + w b, where w are accumulators of kColumns columns and b_read is the address from
// which this lane reads the kColumns rows of b, `Tile::by_columns`. kSelect: rows of b whose bit in
// `seen` (see masking.cuh) is not set are taken as 0, since 0 * NaN is NaN.
template <typename T, typename TileB, bool kSelect, int kRowTiles, int kColumns, int kWidth>
FA_DEVICE void multiply_probabilities(int products, const float (&w)[kRowTiles][kColumns / 8][4],
                                      uint32_t b_read, uint32_t seen,
                                      float (&acc)[kRowTiles][kWidth / 8][4]) {
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
      for (int i = 0; i < kRowTiles; ++i) {
        multiply_terms<T>(products, false, acc[i][2 * step], a[i], b, 0);
        multiply_terms<T>(products, false, acc[i][2 * step + 1], a[i], b, 1);
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
