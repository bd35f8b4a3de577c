// Computes logits from q.k: scale, softcap, bias and ALiBi, for one transposed tile s[key][query]
// (kVectors vectors of queries per row).
#pragma once

#include "sequence.inl"

namespace fused_attention {
namespace {

// Loads rows [m_start, m_start + rows) and keys [n_start, n_start + columns) of a bias, or of
// another tensor that broadcasts against the scores: [rows][kBlockN].
template <typename T>
void load_scores(const ScoreView& view, const ScoreTile& tile, T* staged) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t offset = tile.seq.b * view.stride_b + tile.h * view.stride_h +
                           (tile.m_start + i) * view.stride_q + tile.n_start * view.stride_k;
    load_row(staged + i * kBlockN, element(view.data, view.dtype, offset), view.dtype, tile.columns,
             view.stride_k);
  }
}

// s <- f(u), u = scale s, for `count` values of q.k, whole vectors. f(u) = u, or with softcap cap
// tanh(u / cap). With softcap, `cap_slope` gets f'(u), the cap slope, and `bend` gets f''(u),
// unless they are null.
template <typename T>
FA_INLINE void map_scores(const AttentionParams& p, int64_t count, T* s, T* cap_slope, T* bend) {
  constexpr int W = kLanes<T>;
  if (!p.bends_scores()) {
    const Vec<T> scale = broadcast((T)p.scale);
    for (int64_t i = 0; i < count; i += W) store(s + i, mul(load(s + i), scale));
    return;
  }
  const Vec<T> inner = broadcast((T)(p.scale / p.softcap)), outer = broadcast((T)p.softcap);
  const Vec<T> one = broadcast((T)1), curvature = broadcast((T)(-2 / p.softcap));
  for (int64_t i = 0; i < count; i += W) {
    const Vec<T> t = tanh<T>(mul(load(s + i), inner)), derivative = sub(one, mul(t, t));
    store(s + i, mul(t, outer));
    if (cap_slope != nullptr) store(cap_slope + i, derivative);
    if (bend != nullptr) store(bend + i, mul(mul(t, curvature), derivative));
  }
}

// s <- logits if softcap, bias, ALiBi or a scale that is not positive asks for it. Returns the
// factor that still turns s into logits: scale if s is left as q.k, else 1. The factor is positive,
// so that maxima may be taken before it is applied. cap_slope and bend: see map_scores.
template <typename T, int kVectors>
double finish_scores(const AttentionParams& p, const ScoreTile& tile, T* s, T* bias_staged,
                     T* bias_transposed, T* cap_slope, T* bend = nullptr) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  const int64_t columns = tile.columns;
  const bool bias = p.bias.data != nullptr, alibi = p.alibi_slopes != nullptr;
  if (!p.bends_scores() && !bias && !alibi && p.scale > 0) return p.scale;
  map_scores(p, columns * kRow, s, cap_slope, bend);
  if (bias && p.bias.stride_q == 0) {  // one value per key
    ScoreTile one_row = tile;
    one_row.rows = 1;
    load_scores(p.bias, one_row, bias_staged);
    for (int64_t j = 0; j < columns; ++j) {
      const Vec<T> value = broadcast(bias_staged[j]);
      for (int x = 0; x < kVectors; ++x) {
        T* at = s + j * kRow + x * W;
        store(at, add(load(at), value));
      }
    }
  } else if (bias) {
    load_scores(p.bias, tile, bias_staged);
    transpose_tile(tile.rows, columns, bias_staged, kBlockN, bias_transposed, kRow);
    for (int64_t i = 0; i < columns * kRow; i += W) {
      store(s + i, add(load(s + i), load(bias_transposed + i)));
    }
  }
  if (alibi) {  // s <- s - slope * |i + off - j|
    const T steepness = (T)p.alibi_slopes[tile.seq.b * p.alibi_stride_b + tile.h];
    const Vec<T> negative = broadcast(-steepness), lane = iota(T());
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t distance = tile.m_start + tile.seq.diagonal_offset - (tile.n_start + j);
      for (int x = 0; x < kVectors; ++x) {
        T* at = s + j * kRow + x * W;
        const Vec<T> distances = abs(add(lane, broadcast((T)(distance + x * W))));
        store(at, fma(distances, negative, load(at)));
      }
    }
  }
  return 1;
}

}  // namespace
}  // namespace fused_attention
