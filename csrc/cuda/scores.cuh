// Computes logits from q.k: scale, softcap, bias and ALiBi.
#pragma once

#include "masking.cuh"

namespace fused_attention::cuda {

// tanh(x). Max error 3 ULP. Below 0.625 the odd polynomial x + x^3 p(x^2) (of csrc/cpu/math.inl),
// beyond it sign(x) (1 - 2 / (e^(2|x|) + 1)), where nothing cancels. NaN for NaN.
FA_DEVICE float tanh_of(float x) {
  const float magnitude = fabsf(x), square = x * x;
  float p = -0.0060967141659081976f;
  p = p * square + 0.020997178999074751f;
  p = p * square - 0.053850909578513581f;
  p = p * square + 0.13332769736976328f;
  p = p * square - 0.33333328944134255f;
  const float small = p * square * x + x;
  const float e = exp2_approx(magnitude * (2 * kLog2e));
  const float large = copysignf(1 - __fdividef(2.0f, e + 1), x);
  if (magnitude < 0.625f) return small;
  return magnitude > 20.0f ? copysignf(1.0f, x) : large;
}

// s <- logits where `visible`, -inf elsewhere, for one row of this lane: a query against keys, or
// (kTransposed) a key against queries. kSlope: slope <- the cap slope, d logit / d (scale q.k).
template <bool kTransposed, int kColumns, bool kSlope>
FA_DEVICE void finish_scores(const KernelParams& p, const Sequence& seq, int h, int row, int half,
                             int column_start, uint32_t visible, float (&s)[kColumns / 8][4],
                             float (*slope)[4]) {
  const float scale = (float)p.scale, cap = (float)p.softcap;
  const float inner = cap > 0 ? (float)(p.scale / p.softcap) : 0.0f;
  float alibi = 0;
  if (p.alibi_slopes != nullptr) alibi = p.alibi_slopes[seq.b * p.alibi_stride_b + h];
  const int64_t bias = seq.b * p.bias.stride_b + h * p.bias.stride_h;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float& x = s[n][2 * half + e];
      if (kSlope) slope[n][2 * half + e] = 1;
      if (!(visible >> (2 * n + e) & 1)) {
        x = -kInf;
        continue;
      }
      if (cap > 0) {
        const float t = tanh_of(x * inner);
        x = cap * t;
        if (kSlope) slope[n][2 * half + e] = 1 - t * t;
      } else {
        x *= scale;
      }
      const int column = column_start + lane_column() + 8 * n + e;
      const int64_t query = kTransposed ? column : row, key = kTransposed ? row : column;
      if (p.bias.data != nullptr) {
        x += load_as_float(p.bias.data, p.bias.dtype,
                           bias + query * p.bias.stride_q + key * p.bias.stride_k);
      }
      if (p.alibi_slopes != nullptr) {
        x -= alibi * fabsf((float)((int)(query - key) + seq.diagonal_offset));
      }
    }
  }
}

}  // namespace fused_attention::cuda
