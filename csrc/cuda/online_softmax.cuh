// Online softmax (Milakov & Gimelshein 2018; FlashAttention-2, Dao 2023, Algorithm 1) on a warp's
// accumulators. row_max is m_i in the papers, row_sum l_i.
#pragma once

#include "masking.cuh"

namespace fused_attention::cuda {

template <int kRowTiles>
struct RowState {
  float max[kRowTiles][2], sum[kRowTiles][2];  // sum: of this lane's columns alone
};
template <int kRowTiles>
FA_DEVICE void start(RowState<kRowTiles>& rows) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    rows.max[i][0] = rows.max[i][1] = -kInf;
    rows.sum[i][0] = rows.sum[i][1] = 0;
  }
}

// Four lanes share a row; these functions combine their values.
FA_DEVICE float row_maximum(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
FA_DEVICE float row_total(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// s <- p = exp(s - max); updates max and sum, and rescales acc. kScaleOnly: s is q.k and max its
// maximum, both still without the scale. Otherwise s are logits, whose difference to max is taken
// before it is multiplied by log2 e: a logit of -FLT_MAX, which hides keys in many models, would
// overflow.
template <bool kScaleOnly, int kRowTiles, int kColumns, int kWidth>
FA_DEVICE void online_softmax_update(float scale_log2, float (&s)[kRowTiles][kColumns / 8][4],
                                     RowState<kRowTiles>& rows,
                                     float (&acc)[kRowTiles][kWidth / 8][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // m <- max(m, rowmax(s))
      const float before = rows.max[i][h];
      float top = before;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        top = fmaxf(top, fmaxf(s[i][n][2 * h], s[i][n][2 * h + 1]));
      }
      top = row_maximum(top);
      rows.max[i][h] = top;
      // -inf - (-inf) is NaN: while a row has seen no key, 0 stands for its max, and all p are 0.
      const float from = top == -kInf ? 0.0f : kScaleOnly ? top * scale_log2 : top;
      // alpha <- exp(m_old - m_new)
      const float alpha =
          exp2_approx(kScaleOnly ? before * scale_log2 - from : (before - from) * kLog2e);
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          // p <- exp(s - m)
          float& x = s[i][n][2 * h + e];
          x = exp2_approx(kScaleOnly ? x * scale_log2 - from : (x - from) * kLog2e);
          sum += x;
        }
      }
      // l <- alpha l + rowsum(p), o <- alpha o
      rows.sum[i][h] = rows.sum[i][h] * alpha + sum;
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        acc[i][n][2 * h] *= alpha;
        acc[i][n][2 * h + 1] *= alpha;
      }
    }
  }
}

// The normalizer of a finished row (`weight`), 0 if the row is fully masked, and its log-sum-exp.
// row_max is a logit; row_sum is 0 only if every logit was hidden or -inf. The sink is one more
// logit without a value: it only joins the denominator.
struct FinishedRow {
  float weight, lse;
};
FA_DEVICE FinishedRow finish(float row_max, float row_sum, const float* sink) {
  float top = row_max, sum = row_sum, shrink = 1;
  if (sink != nullptr) {
    top = fmaxf(row_max, *sink);
    shrink = row_sum == 0 ? 0.0f : exp2_approx((row_max - top) * kLog2e);
    sum = row_sum * shrink + (*sink == top ? 1.0f : exp2_approx((*sink - top) * kLog2e));
  }
  if (sum == 0 || top == -kInf && sum == sum) return {0, -kInf};
  return {row_sum == 0 ? 0.0f : shrink / sum, top + logf(sum)};
}

}  // namespace fused_attention::cuda
