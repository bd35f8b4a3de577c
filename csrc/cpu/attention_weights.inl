// Computes the attention weights themselves from the saved log-sum-exp, for callers who ask for
// them:
//
//   w = dropout(exp(s * scale - lse)), 0 where hidden; for each head, or averaged over the heads
//
// Given lse, a tile needs no other (FlashAttention-2, Dao 2023, Algorithm 2, line 11): the average
// is taken tile by tile, and a task holds its own tiles only. Time O(Hq Sq Sk D) over the tiles
// that some query sees; memory O(tile) per thread. The gradient dw of the weights takes part in
// attention_backward, which runs the second phase here: delta <- delta + rowsum(w * dw). This sum
// is divided by the row's actual total, which the rounding of lse moves away from 1 (as the forward
// divides by row_sum). ds then sums to 0 over a row as exactly as without w.
#pragma once

#include "masking.inl"
#include "online_softmax.inl"
#include "philox.inl"
#include "scores.inl"

namespace fused_attention {
namespace {

constexpr int64_t kWeightTiles = 8;  // tiles of one task, which share the loaded queries of a head

template <typename T>
struct WeightsTile {
  T *q, *q_t;                  // queries [kBlockM][D], transposed [D][kBlockM]
  T* lse;                      // [kBlockM]
  T* s;                        // scores [kBlockN][kBlockM]
  T* sum;                      // weights, summed over the heads [kWeightTiles * kBlockN][kBlockM]
  T *rows, *rows_t;            // weights or dw of one tile [kBlockM][kBlockN], dw transposed
  T *delta, *total;            // [kBlockM]
  T *tile_delta, *tile_total;  // what one tile adds to them
  T* k;                        // converted keys [kBlockN][D]
  T *bias, *bias_t;            // [kBlockM][kBlockN] and transposed
  uint64_t *visible, *keep;    // [kBlockN]

  size_t place(const AttentionParams& p, void* workspace) {
    constexpr int M = kBlockM<T>;
    const int64_t width = round_up(p.D, kLanes<T>);
    Arena arena{(char*)workspace, 0};
    q = arena.take<T>(M * width);
    q_t = arena.take<T>(M * width);
    lse = arena.take<T>(M);
    s = arena.take<T>(kBlockN * M);
    sum = arena.take<T>(kWeightTiles * kBlockN * M);
    rows = arena.take<T>(M * kBlockN);
    rows_t = arena.take<T>(M * kBlockN);
    delta = arena.take<T>(M);
    total = arena.take<T>(M);
    tile_delta = arena.take<T>(M);
    tile_total = arena.take<T>(M);
    k = arena.take<T>(kBlockN * p.D);
    const bool has_bias = p.bias.data != nullptr;
    bias = arena.take<T>(has_bias ? M * kBlockN : 0);
    bias_t = arena.take<T>(has_bias ? M * kBlockN : 0);
    visible = arena.take<uint64_t>(kBlockN);
    keep = arena.take<uint64_t>(kBlockN);
    return arena.used;
  }
};

// Returns the factor of one head's weights in the result: 1 / Hq if it is an average.
template <typename T>
T head_share(const AttentionParams& p) {
  return p.average_weights ? (T)(1.0 / (double)p.Hq) : (T)1;
}

// Loads the queries of one head, transposed, and their lse.
template <typename T, int kVectors>
void load_weights_queries(const AttentionParams& p, int64_t b, int64_t h, int64_t m_start,
                          int64_t rows, const WeightsTile<T>& t) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  const int64_t width = round_up(p.D, W);
  load_tile(t.q, p.query, p.dtype, b, h, m_start, rows, p.D, kRow);
  transpose_tile(kRow, width, t.q, width, t.q_t, kRow);
  for (int64_t i = 0; i < kRow; ++i) {
    const T* lse = (const T*)p.lse + (b * p.Hq + h) * p.Sq + m_start + i;
    // A row that saw nothing has weights exp(s - inf) = 0.
    t.lse[i] = i < rows && *lse != -kInf<T> ? *lse : kInf<T>;
  }
}

// Calls f(i, x, visible, kept, p, log_p) for each vector p of the weights of one tile of one head,
// before dropout; p is vector x of its row and begins at element i of [columns][kRow]. f may write
// to t.s + i. A lane without a bit in `visible` holds anything; `kept` has a bit for each lane that
// is visible and not dropped. Returns whether a weight is visible; without one, f is not called.
template <typename T, int kVectors, typename F>
FA_INLINE bool for_each_weight(const AttentionParams& p, const ScoreTile& tile,
                               const WeightsTile<T>& t, F f) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  const int64_t columns = tile.columns;
  const Visible seen = tile_visibility(p, tile, t.visible);
  if (seen == Visible::kNone) return false;
  // s <- k q^T
  const KeyTile keys = {tile.seq, tile.h / (p.Hq / p.Hkv), tile.n_start, columns};
  const Scalars<T> k = key_rows(p, p.key, keys, p.D, nullptr, t.k);
  multiply<kVectors, false>(columns, p.D, k, t.q_t, kRow, t.s, kRow);
  const double factor = finish_scores<T, kVectors>(p, tile, t.s, t.bias, t.bias_t, nullptr);
  const bool dropout = p.dropout_threshold > 0;
  if (dropout) dropout_keep_bits(p, tile, t.keep);

  const Vec<T> scale = broadcast((T)factor), log2e = broadcast(kLog2e<T>);
  const Vec<T> zero = broadcast((T)0);
  for (int64_t j = 0; j < columns; ++j) {
    const uint64_t visible = seen == Visible::kSome ? t.visible[j] : ~(uint64_t)0;
    const uint64_t kept = dropout ? visible & t.keep[j] : visible;
    for (int x = 0; x < kVectors; ++x) {
      // p <- exp(s * scale - lse)
      const int64_t i = j * kRow + x * W;
      const Vec<T> distance = fma_once(load(t.s + i), scale, sub(zero, load(t.lse + x * W)));
      f(i, x, visible >> (x * W), kept >> (x * W), exp2<T>(mul(distance, log2e)), distance);
    }
  }
  return true;
}

// -- the weights. Task: one block of kBlockM queries against kWeightTiles tiles of keys, of one
//    head, or of all heads in order if averaged -------------------------------------------------

// Stores the weights of one block of keys, summed over `heads`, in the place of the first head.
template <typename T, int kVectors>
void attention_weights_block(const AttentionParams& p, int64_t b, Range heads, int64_t m_start,
                             int64_t rows, Range block, const WeightsTile<T>& t) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  const Vec<T> zero = broadcast((T)0);
  const Sequence seq = sequence_of(p, b);
  fill(t.sum, (block.end - block.begin) * kRow, (T)0);
  const Range keys = intersect(visible_keys(p, seq, m_start, m_start + rows), block);
  for (int64_t h = heads.begin; h < heads.end && keys.begin < keys.end; ++h) {
    load_weights_queries<T, kVectors>(p, b, h, m_start, rows, t);
    for (int64_t n = keys.begin / kBlockN * kBlockN; n < keys.end; n += kBlockN) {
      const int64_t columns = min_of(kBlockN, keys.end - n);
      T* sum = t.sum + (n - block.begin) * kRow;
      const auto add_up = [&](int64_t i, int, uint64_t, uint64_t kept, Vec<T> weight, Vec<T>) {
        store(sum + i, add(load(sum + i), select_bits(kept, weight, zero)));
      };
      for_each_weight<T, kVectors>(p, {seq, h, m_start, rows, n, columns}, t, add_up);
    }
  }
  const ScoreView& out = p.weights;
  const T factor = head_share<T>(p) * (T)p.dropout_scale;
  for (int64_t n = block.begin; n < block.end; n += kBlockN) {
    const int64_t columns = min_of(kBlockN, block.end - n);
    transpose_tile(columns, kRow, t.sum + (n - block.begin) * kRow, kRow, t.rows, kBlockN);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t offset =
          b * out.stride_b + heads.begin * out.stride_h + (m_start + i) * out.stride_q + n;
      store_row(element(out.data, out.dtype, offset), out.dtype, t.rows + i * kBlockN, columns,
                factor);
    }
  }
}

template <typename T>
struct AttentionWeights {
  static constexpr int64_t kKeys = kWeightTiles * kBlockN;
  static int64_t heads(const AttentionParams& p) { return p.average_weights ? 1 : p.Hq; }
  static int64_t num_tasks(const AttentionParams& p) {
    return p.B * heads(p) * ceil_div(p.Sq, kBlockM<T>) * ceil_div(p.Sk, kKeys);
  }
  static size_t workspace_bytes(const AttentionParams& p) {
    WeightsTile<T> tile;
    return tile.place(p, nullptr);
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    WeightsTile<T> tile;
    tile.place(p, workspace);
    const int64_t parts = ceil_div(p.Sk, kKeys), blocks = ceil_div(p.Sq, kBlockM<T>);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n_begin = task % parts * kKeys, m_start = task / parts % blocks * kBlockM<T>;
      const int64_t head = task / parts / blocks % heads(p), b = task / parts / blocks / heads(p);
      const int64_t rows = min_of(kBlockM<T>, p.Sq - m_start);
      const Range block = {n_begin, min_of(n_begin + kKeys, p.Sk)};
      const Range hs = p.average_weights ? Range{0, p.Hq} : Range{head, head + 1};
      with_vectors<T>(rows, [&](auto vectors) {
        attention_weights_block<T, vectors.value>(p, b, hs, m_start, rows, block, tile);
      });
    }
  }
};

// -- delta of the backward. Task: kBlockM queries of one head ------------------------------------

template <typename T, int kVectors>
void attention_weights_delta(const AttentionParams& p, int64_t b, int64_t h, int64_t m_start,
                             int64_t rows, const WeightsTile<T>& t) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  const Vec<T> zero = broadcast((T)0);
  load_weights_queries<T, kVectors>(p, b, h, m_start, rows, t);
  fill(t.delta, kRow, (T)0);
  fill(t.total, kRow, (T)0);
  // delta <- delta + w dw; 0 where hidden, whatever dw is there
  const auto add_up = [&](int64_t i, int x, uint64_t visible, uint64_t kept, Vec<T> weight,
                          Vec<T>) {
    const Vec<T> product = mul(weight, load(t.rows_t + i));
    T *delta = t.tile_delta + x * W, *total = t.tile_total + x * W;
    store(delta, add(load(delta), select_bits(kept, product, zero)));
    store(total, add(load(total), select_bits(visible, weight, zero)));
  };
  const Sequence seq = sequence_of(p, b);
  const Range keys = visible_keys(p, seq, m_start, m_start + rows);
  for (int64_t n = keys.begin / kBlockN * kBlockN; n < keys.end; n += kBlockN) {
    const int64_t columns = min_of(kBlockN, keys.end - n);
    const ScoreTile tile = {seq, h, m_start, rows, n, columns};
    load_scores(p.weights, tile, t.rows);
    transpose_tile(rows, columns, t.rows, kBlockN, t.rows_t, kRow);
    fill(t.tile_delta, kRow, (T)0);
    fill(t.tile_total, kRow, (T)0);
    for_each_weight<T, kVectors>(p, tile, t, add_up);
    for (int64_t i = 0; i < kRow; ++i) {
      t.delta[i] += t.tile_delta[i];
      t.total[i] += t.tile_total[i];
    }
  }
  const T factor = head_share<T>(p) * (T)p.dropout_scale;
  T* delta = (T*)p.delta + (b * p.Hq + h) * p.Sq + m_start;
  for (int64_t i = 0; i < rows; ++i) {
    T total = t.total[i];
    if (p.sinks != nullptr) {
      total += (T)__builtin_exp((double)(*sink_of<T>(p, b, h) - t.lse[i]));
    }
    if (total != 0) delta[i] += t.delta[i] / total * factor;
  }
}

template <typename T>
struct AttentionWeightsDelta {
  static int64_t num_tasks(const AttentionParams& p) {
    return p.weights.data != nullptr ? p.B * p.Hq * ceil_div(p.Sq, kBlockM<T>) : 0;
  }
  static size_t workspace_bytes(const AttentionParams& p) {
    WeightsTile<T> tile;
    return tile.place(p, nullptr);
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    WeightsTile<T> tile;
    tile.place(p, workspace);
    const int64_t blocks = ceil_div(p.Sq, kBlockM<T>);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks / p.Hq, h = task / blocks % p.Hq;
      const int64_t m_start = (blocks - 1 - task % blocks) * kBlockM<T>;
      const int64_t rows = min_of(kBlockM<T>, p.Sq - m_start);
      with_vectors<T>(rows, [&](auto vectors) {
        attention_weights_delta<T, vectors.value>(p, b, h, m_start, rows, tile);
      });
    }
  }
};

}  // namespace
}  // namespace fused_attention
