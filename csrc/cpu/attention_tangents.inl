// Forward-mode derivatives of attention and of its backward. t_x, the tangent of x, is what x
// changes by when the inputs change by t_q, t_k, t_v, t_bias and t_sink. By the rules of
// differentiation, with the names of attention_backward.inl (u = scale q k^T, f of map_scores in
// scores.inl, z the scale of the weights that dropout keeps, else 0):
//
//   t_u = scale (t_q k^T + q t_k^T),  t_s = f'(u) t_u + t_bias
//   t_lse = rowsum(p * t_s) + p_sink t_sink
//   t_out = (z * p * t_s) v + (z * p) t_v - t_lse * out                       attention_jvp
//
// and for the gradients, with ds = p * (z * dp - delta) and e = f'(u) * ds:
//
//   t_delta = rowsum(t_do * out + do * t_out) - t_dlse,  t_dp = t_do v^T + do t_v^T
//   t_p  = p * (t_s - t_lse)
//   t_ds = t_p * (z * dp - delta) + p * (z * t_dp - t_delta)
//   t_e  = f'(u) * t_ds + f''(u) * t_u * ds
//   t_dv = (z * t_p)^T do + (z * p)^T t_do
//   t_dk = scale (t_e^T q + e^T t_q),  t_dq = scale (t_e k + e t_k)
//   t_dbias = t_ds, summed where the bias is broadcast
//   t_dsink = -sum over rows of p_sink * ((t_sink - t_lse) * delta + t_delta)
//   attention_backward_jvp
//
// As in the backward, everything is recomputed tile by tile from the saved lse (FlashAttention-2,
// Dao 2023, Algorithm 2), so memory beyond the results is O(B Hq Sq). Each result has one owner: no
// two threads add to one float. A tangent that is null is zero, and its products are skipped.
// attention_jvp takes 5 products per tile; attention_backward_jvp without t_do takes 8 for a block
// of keys and 7 for a block of queries. The forward takes 2, the backward in two passes 7.
#pragma once

#include "attention_backward.inl"

namespace fused_attention {
namespace {

template <typename T>
struct TangentTile {
  // Queries: rows [kBlockM][D or Dv], the same transposed, and numbers of a row [kBlockM].
  T *q, *tq, *grad_out, *t_grad_out;
  T *q_t, *tq_t, *grad_out_t, *t_grad_out_t;
  T *lse, *t_lse, *delta, *t_delta;
  uint64_t* counted;  // one word: a bit for each query that saw something
  // Keys and values [kBlockN][D or Dv], if they are converted.
  T *k, *tk, *v, *tv;
  // Scores [kBlockN][kBlockM]: (p, tp) holds (s, t_s) first, (ds, tds) holds (dp, t_dp).
  T *p, *tp, *ds, *tds;
  T *cap_slope, *bend;       // f'(u) and f''(u) * t_u
  T *bias, *bias_t;          // [kBlockM][kBlockN] and transposed
  uint64_t *visible, *keep;  // [kBlockN]
  T *sum_t, *sum, *sum2;     // results: [D or Dv][kBlockM]; [kBlockM or kBlockN][D or Dv]
  T* dbias;                  // [kBlockN][kBlockM]
  T* unseen;                 // [kBlockN][D or Dv], see add_for_seen_keys

  size_t place(const AttentionParams& params, void* workspace) {
    constexpr int M = kBlockM<T>;
    const int64_t width = round_up(params.D, kLanes<T>), width_v = round_up(params.Dv, kLanes<T>);
    const int64_t widest = max_of(width, width_v), most = max_of((int64_t)M, (int64_t)kBlockN);
    const bool staged = params.bias.data != nullptr || params.tangent.bias.data != nullptr;
    Arena arena{(char*)workspace, 0};
    const auto take = [&](int64_t count, auto*&... pieces) {
      ((pieces = arena.take<T>(count)), ...);
    };
    take(M * width, q, tq, q_t, tq_t);
    take(M * width_v, grad_out, t_grad_out, grad_out_t, t_grad_out_t);
    take(M, lse, t_lse, delta, t_delta);
    take(kBlockN * params.D, k, tk);
    take(kBlockN * params.Dv, v, tv);
    take(kBlockN * M, p, tp, ds, tds);
    take(params.bends_scores() ? kBlockN * M : 0, cap_slope, bend);
    take(staged ? kBlockN * M : 0, bias, bias_t);
    take(M * widest, sum_t);
    take(most * widest, sum, sum2);
    take(params.dbias.data != nullptr ? kBlockN * M : 0, dbias);
    take(kBlockN * widest, unseen);
    visible = arena.take<uint64_t>(kBlockN);
    counted = arena.take<uint64_t>(1);
    keep = arena.take<uint64_t>(kBlockN);
    return arena.used;
  }
};

FA_INLINE int64_t row_number(const AttentionParams& p, int64_t b, int64_t h, int64_t i) {
  return (b * p.Hq + h) * p.Sq + i;
}

// Loads rows of one head as they are and transposed, if there are any.
template <typename T>
void load_transposed(const AttentionParams& p, const TensorView& view, int64_t b, int64_t h,
                     int64_t m_start, int64_t rows, int64_t columns, int64_t padded, T* tile,
                     T* transposed) {
  if (view.data == nullptr) return;
  const int64_t width = round_up(columns, kLanes<T>);
  load_tile(tile, view, p.dtype, b, h, m_start, rows, columns, padded);
  transpose_tile(padded, width, tile, width, transposed, padded);
}

// Loads a block of queries. Queries past the end and queries that saw nothing do not count.
template <typename T, int kVectors>
void load_tangent_queries(const AttentionParams& p, int64_t b, int64_t h, int64_t m_start,
                          int64_t rows, const TangentTile<T>& t) {
  constexpr int kRow = kVectors * kLanes<T>;
  const Tangents& d = p.tangent;
  load_transposed(p, p.query, b, h, m_start, rows, p.D, kRow, t.q, t.q_t);
  load_transposed(p, d.query, b, h, m_start, rows, p.D, kRow, t.tq, t.tq_t);
  load_transposed(p, p.grad_out, b, h, m_start, rows, p.Dv, kRow, t.grad_out, t.grad_out_t);
  load_transposed(p, d.grad_out, b, h, m_start, rows, p.Dv, kRow, t.t_grad_out, t.t_grad_out_t);
  *t.counted = 0;
  for (int64_t i = 0; i < kRow; ++i) {
    const int64_t row = row_number(p, b, h, m_start + i);
    const T lse = i < rows ? ((const T*)p.lse)[row] : -kInf<T>;
    const bool empty = lse == -kInf<T>;
    *t.counted |= (uint64_t)!empty << i;
    t.lse[i] = empty ? kInf<T> : lse;
    if (p.delta == nullptr) continue;  // attention_jvp
    t.t_lse[i] = empty ? (T)0 : ((const T*)d.lse)[row];
    t.delta[i] = empty ? (T)0 : ((const T*)p.delta)[row];
    t.t_delta[i] = empty ? (T)0 : ((const T*)d.delta)[row];
  }
}

// t.visible <- the words of one tile. Returns whether some query sees a key of it.
template <typename T>
bool tangent_visibility(const AttentionParams& p, const ScoreTile& tile, const TangentTile<T>& t) {
  const Visible seen = tile_visibility(p, tile, t.visible);
  if (seen == Visible::kAll) fill(t.visible, tile.columns, low_bits(tile.rows));
  return seen != Visible::kNone;
}

// The keys and values of one tile, and their tangents. Rows that no query sees are 0, unless
// `visible` is null.
template <typename T>
struct TangentKeys {
  Scalars<T> k, tk, v, tv;
};
template <typename T>
TangentKeys<T> load_tangent_keys(const AttentionParams& p, const KeyTile& keys,
                                 const uint64_t* visible, const TangentTile<T>& t) {
  const auto rows = [&](const TensorView& view, int64_t width, T* scratch) {
    if (view.data == nullptr) return Scalars<T>{nullptr, 0, 0};
    return key_rows(p, view, keys, width, visible, scratch);
  };
  return {rows(p.key, p.D, t.k), rows(p.tangent.key, p.D, t.tk), rows(p.value, p.Dv, t.v),
          rows(p.tangent.value, p.Dv, t.tv)};
}
template <typename T>
Scalars<T> transposed(const Scalars<T>& a) {
  return {a.data, a.column, a.row};
}

// c <- a b^T + a2 b2^T for the scores of one tile, without the terms that are null.
template <typename T, int kVectors>
void multiply_pair(int64_t columns, int64_t depth, Scalars<T> a, const T* b_t, bool has_b,
                   Scalars<T> a2, const T* b2_t, T* c) {
  constexpr int kRow = kVectors * kLanes<T>;
  if (has_b) multiply<kVectors, false>(columns, depth, a, b_t, kRow, c, kRow);
  if (!has_b) fill(c, columns * kRow, (T)0);
  if (a2.data != nullptr) multiply<kVectors, true>(columns, depth, a2, b2_t, kRow, c, kRow);
}

// t.p <- s, t.tp <- t_s; computes t.cap_slope and t.bend. Returns the factor that turns s into
// logits.
template <typename T, int kVectors>
double tangent_scores(const AttentionParams& p, const ScoreTile& tile, const TangentKeys<T>& keys,
                      const TangentTile<T>& t) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  const int64_t columns = tile.columns;
  for (int64_t j = 0; j < columns; ++j) t.visible[j] &= *t.counted;
  // s <- k q^T, t_u <- k t_q^T + t_k q^T
  multiply<kVectors, false>(columns, p.D, keys.k, t.q_t, kRow, t.p, kRow);
  multiply_pair<T, kVectors>(columns, p.D, keys.k, t.tq_t, p.tangent.query.data != nullptr, keys.tk,
                             t.q_t, t.tp);
  const double factor =
      finish_scores<T, kVectors>(p, tile, t.p, t.bias, t.bias_t, t.cap_slope, t.bend);
  const Vec<T> scale = broadcast((T)p.scale);
  for (int64_t i = 0; i < columns * kRow; i += W) {
    Vec<T> ts = mul(load(t.tp + i), scale);
    if (p.bends_scores()) {
      store(t.bend + i, mul(load(t.bend + i), ts));
      ts = mul(ts, load(t.cap_slope + i));
    }
    store(t.tp + i, ts);
  }
  if (p.tangent.bias.data != nullptr) {  // t_s <- t_s + t_bias
    load_scores(p.tangent.bias, tile, t.bias);
    transpose_tile(tile.rows, columns, t.bias, kBlockN, t.bias_t, kRow);
    for (int64_t i = 0; i < columns * kRow; i += W) {
      store(t.tp + i, add(load(t.tp + i), load(t.bias_t + i)));
    }
  }
  return factor;
}

// -- attention_jvp. Task: kBlockM queries of one head --------------------------------------------

template <typename T, int kVectors>
void attention_jvp_block(const AttentionParams& p, int64_t b, int64_t h, int64_t m_start,
                         int64_t rows, const TangentTile<T>& t) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  const int64_t width_v = round_up(p.Dv, W), h_kv = h / (p.Hq / p.Hkv);
  const Sequence seq = sequence_of(p, b);
  const bool dropout = p.dropout_threshold > 0;
  load_tangent_queries<T, kVectors>(p, b, h, m_start, rows, t);
  fill(t.sum_t, width_v * kRow, (T)0);
  fill(t.t_lse, (int64_t)kRow, (T)0);
  uint64_t sighted = 0;  // queries that saw something

  const Range range = visible_keys(p, seq, m_start, m_start + rows);
  for (int64_t n = range.begin / kBlockN * kBlockN; n < range.end; n += kBlockN) {
    const int64_t columns = min_of(kBlockN, range.end - n);
    const ScoreTile tile = {seq, h, m_start, rows, n, columns};
    if (!tangent_visibility(p, tile, t)) continue;
    sighted |= seeing_queries(rows, columns, Visible::kSome, t.visible) & *t.counted;
    const TangentKeys<T> keys = load_tangent_keys(p, {seq, h_kv, n, columns}, t.visible, t);
    const double factor = tangent_scores<T, kVectors>(p, tile, keys, t);
    if (dropout) dropout_keep_bits(p, tile, t.keep);

    const Vec<T> scale = broadcast((T)factor), log2e = broadcast(kLog2e<T>);
    const Vec<T> kept_scale = broadcast((T)p.dropout_scale), zero = broadcast((T)0);
    Vec<T> t_lse[kVectors];
    for (int x = 0; x < kVectors; ++x) t_lse[x] = zero;
    for (int64_t j = 0; j < columns; ++j) {
      for (int x = 0; x < kVectors; ++x) {
        const uint64_t seen = t.visible[j] >> (x * W);
        T *at_p = t.p + j * kRow + x * W, *at_tp = t.tp + j * kRow + x * W;
        // p <- exp(s * scale - lse)
        const Vec<T> distance = fma_once(load(at_p), scale, sub(zero, load(t.lse + x * W)));
        Vec<T> weight = exp2<T>(mul(distance, log2e));
        weight = select_bits(seen, weight, zero);
        // p * t_s, then 0 again where hidden, since t_s may be NaN there
        Vec<T> changed = select_bits(seen, mul(weight, load(at_tp)), zero);
        t_lse[x] = add(t_lse[x], changed);
        if (dropout) {
          const uint64_t keep = t.keep[j] >> (x * W);
          weight = select_bits(keep, mul(weight, kept_scale), zero);
          changed = select_bits(keep, mul(changed, kept_scale), zero);
        }
        store(at_p, weight);
        store(at_tp, changed);
      }
    }
    for (int x = 0; x < kVectors; ++x) {
      store(t.t_lse + x * W, add(load(t.t_lse + x * W), t_lse[x]));
    }
    // t_out^T <- t_out^T + v^T (z p t_s)^T + t_v^T (z p)^T
    multiply<kVectors, true>(p.Dv, columns, transposed(keys.v), t.tp, kRow, t.sum_t, kRow);
    if (keys.tv.data != nullptr) {
      multiply<kVectors, true>(p.Dv, columns, transposed(keys.tv), t.p, kRow, t.sum_t, kRow);
    }
  }
  transpose_tile(width_v, kRow, t.sum_t, kRow, t.sum, width_v);
  load_tile(t.sum2, p.out, p.dtype, b, h, m_start, rows, p.Dv, rows);
  for (int64_t i = 0; i < rows; ++i) {
    T t_lse = t.t_lse[i];
    if (p.tangent.sinks != nullptr) {  // + p_sink t_sink
      const T* sink = sink_of<T>(p, b, h);
      const T t_sink = ((const T*)p.tangent.sinks)[sink - (const T*)p.sinks];
      t_lse += (T)__builtin_exp((double)*sink - (double)t.lse[i]) * t_sink;
    }
    ((T*)p.tangent.lse)[row_number(p, b, h, m_start + i)] = t_lse;
    T *t_out = t.sum + i * width_v, *out = t.sum2 + i * width_v;
    if (!(sighted >> i & 1)) fill(t_out, width_v, (T)0);
    for (int64_t d = 0; d < width_v; d += W) {
      store(t_out + d, fma(broadcast(-t_lse), load(out + d), load(t_out + d)));
    }
    store_row(row_of(p.tangent.out, p.dtype, b, h, m_start + i), p.dtype, t_out, p.Dv, (T)1);
  }
}

// Calls f(b, h, m_start, rows) for each task of [begin, end): the blocks of queries, the last block
// of each head first.
template <typename T, typename F>
void for_each_query_block(const AttentionParams& p, int64_t begin, int64_t end, F f) {
  const int64_t blocks = ceil_div(p.Sq, kBlockM<T>);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t m_start = (blocks - 1 - task % blocks) * kBlockM<T>, head = task / blocks;
    f(head / p.Hq, head % p.Hq, m_start, min_of(kBlockM<T>, p.Sq - m_start));
  }
}

template <typename T>
struct TangentPhase {
  static size_t workspace_bytes(const AttentionParams& p) {
    TangentTile<T> tile;
    return tile.place(p, nullptr);
  }
};
template <typename T>
struct TangentQueriesPhase : TangentPhase<T> {
  static int64_t num_tasks(const AttentionParams& p) {
    return p.B * p.Hq * ceil_div(p.Sq, kBlockM<T>);
  }
};

template <typename T>
struct AttentionJvp : TangentQueriesPhase<T> {
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    TangentTile<T> tile;
    tile.place(p, workspace);
    for_each_query_block<T>(p, begin, end, [&](int64_t b, int64_t h, int64_t m, int64_t rows) {
      with_vectors<T>(rows, [&](auto vectors) {
        attention_jvp_block<T, vectors.value>(p, b, h, m, rows, tile);
      });
    });
  }
};

// -- attention_backward_jvp, phase 1: delta and t_delta. Task: kBlockM queries of one head -------

template <typename T>
struct TangentDelta : TangentQueriesPhase<T> {
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    TangentTile<T> t;
    t.place(p, workspace);
    const Tangents& d = p.tangent;
    const int64_t width = round_up(p.Dv, kLanes<T>);
    for_each_query_block<T>(p, begin, end, [&](int64_t b, int64_t h, int64_t m, int64_t rows) {
      T *out = t.sum, *t_out = t.sum2;
      load_tile(out, p.out, p.dtype, b, h, m, rows, p.Dv, rows);
      load_tile(t_out, d.out, p.dtype, b, h, m, rows, p.Dv, rows);
      load_tile(t.grad_out, p.grad_out, p.dtype, b, h, m, rows, p.Dv, rows);
      if (d.grad_out.data != nullptr) {
        load_tile(t.t_grad_out, d.grad_out, p.dtype, b, h, m, rows, p.Dv, rows);
      }
      const auto dot = [&](const T* gradient, const T* output) {
        Vec<T> products = broadcast((T)0);
        for (int64_t i = 0; i < width; i += kLanes<T>) {
          const Vec<T> o = load(output + i);
          products = fma(o, where_not_zero<T>(o, load(gradient + i)), products);
        }
        return reduce_add(products);
      };
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = row_number(p, b, h, m + i), at = i * width;
        T delta = dot(t.grad_out + at, out + at), t_delta = dot(t.grad_out + at, t_out + at);
        if (d.grad_out.data != nullptr) t_delta += dot(t.t_grad_out + at, out + at);
        if (p.grad_lse != nullptr) delta -= ((const T*)p.grad_lse)[row];
        if (d.grad_lse != nullptr) t_delta -= ((const T*)d.grad_lse)[row];
        ((T*)p.delta)[row] = delta;
        ((T*)d.delta)[row] = t_delta;
      }
    });
  }
};

// Task: one head of one sample.
template <typename T>
struct TangentSinks {
  static int64_t num_tasks(const AttentionParams& p) {
    return p.dsinks != nullptr ? samples_of(p) * p.Hq : 0;
  }
  static size_t workspace_bytes(const AttentionParams&) { return 0; }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void*) {
    const Tangents& d = p.tangent;
    const int64_t batch = batch_of_a_sample(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t h = task % p.Hq, first = task / p.Hq * batch;
      const double sink = (double)((const T*)p.sinks)[task];
      const double t_sink = d.sinks != nullptr ? (double)((const T*)d.sinks)[task] : 0.0;
      double sum = 0;
      for (int64_t b = first; b < first + batch; ++b) {
        for (int64_t i = 0; i < p.Sq; ++i) {
          const int64_t row = row_number(p, b, h, i);
          const double lse = ((const T*)p.lse)[row];
          if (lse == -__builtin_inf()) continue;  // the sink is -inf, too, and has no weight
          const double delta = ((const T*)p.delta)[row], t_delta = ((const T*)d.delta)[row];
          const double change = t_sink - (double)((const T*)d.lse)[row];
          sum -= __builtin_exp(sink - lse) * (change * delta + t_delta);
        }
      }
      ((T*)p.dsinks)[task] = (T)sum;
    }
  }
};

// -- the tile that phases 2 to 4 share -----------------------------------------------------------

// t.p <- z * p, t.tp <- z * t_p, t.ds <- ds, t.tds <- t_ds, all [key][query], 0 where hidden and
// past the last query.
template <typename T, int kVectors>
void tangent_gradients(const AttentionParams& p, const ScoreTile& tile, const TangentKeys<T>& keys,
                       const TangentTile<T>& t) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  const int64_t columns = tile.columns;
  const double factor = tangent_scores<T, kVectors>(p, tile, keys, t);
  // dp <- v do^T, t_dp <- v t_do^T + t_v do^T
  multiply<kVectors, false>(columns, p.Dv, keys.v, t.grad_out_t, kRow, t.ds, kRow);
  multiply_pair<T, kVectors>(columns, p.Dv, keys.v, t.t_grad_out_t,
                             p.tangent.grad_out.data != nullptr, keys.tv, t.grad_out_t, t.tds);
  const bool dropout = p.dropout_threshold > 0;
  if (dropout) dropout_keep_bits(p, tile, t.keep);

  const Vec<T> scale = broadcast((T)factor), zero = broadcast((T)0);
  const Vec<T> kept_scale = broadcast((T)p.dropout_scale), log2e = broadcast(kLog2e<T>);
  for (int64_t j = 0; j < columns; ++j) {
    for (int x = 0; x < kVectors; ++x) {
      const int64_t i = j * kRow + x * W;
      const uint64_t seen = t.visible[j] >> (x * W);
      // p <- exp(s * scale - lse)
      const Vec<T> distance = fma_once(load(t.p + i), scale, sub(zero, load(t.lse + x * W)));
      Vec<T> weight = select_bits(seen, exp2<T>(mul(distance, log2e)), zero);
      Vec<T> dp = load(t.ds + i), t_dp = load(t.tds + i), kept = weight;
      if (dropout) {
        const uint64_t keep = t.keep[j] >> (x * W);
        dp = select_bits(keep, mul(dp, kept_scale), zero);
        t_dp = select_bits(keep, mul(t_dp, kept_scale), zero);
        kept = select_bits(keep, mul(weight, kept_scale), zero);
      }
      const Vec<T> change = sub(load(t.tp + i), load(t.t_lse + x * W));  // t_p / p
      const Vec<T> above = sub(dp, load(t.delta + x * W));               // ds / p
      // t_ds <- p * ((t_s - t_lse) * (dp - delta) + t_dp - t_delta), then 0 again where hidden,
      // since the factors of p may be NaN there
      const Vec<T> tds = mul(weight, fma(change, above, sub(t_dp, load(t.t_delta + x * W))));
      store(t.p + i, kept);
      store(t.tp + i, select_bits(seen, mul(kept, change), zero));
      store(t.ds + i, select_bits(seen, mul(weight, above), zero));
      store(t.tds + i, select_bits(seen, tds, zero));
    }
  }
}

// t.tds <- t_e, t.ds <- e
template <typename T, int kVectors>
void apply_tangent_cap_slope(const AttentionParams& p, int64_t columns, const TangentTile<T>& t) {
  constexpr int W = kLanes<T>;
  if (!p.bends_scores()) return;
  const Vec<T> zero = broadcast((T)0);
  for (int64_t j = 0; j < columns; ++j) {
    for (int x = 0; x < kVectors; ++x) {
      const int64_t i = (j * kVectors + x) * W;
      const uint64_t seen = t.visible[j] >> (x * W);  // where hidden the cap slope may be NaN
      const Vec<T> ds = load(t.ds + i), cap_slope = select_bits(seen, load(t.cap_slope + i), zero);
      const Vec<T> bend = select_bits(seen, load(t.bend + i), zero);
      store(t.tds + i, fma(cap_slope, load(t.tds + i), mul(bend, ds)));
      store(t.ds + i, mul(cap_slope, ds));
    }
  }
}

// -- phase 2: t_dk, t_dv. Task: kBlockN keys of one key head -------------------------------------

// Sets queries that see no key of the tile to 0, since 0 * NaN is not 0.
template <typename T>
void clear_blind_tangents(int64_t rows, int64_t columns, int64_t width, int64_t width_v,
                          const TangentTile<T>& t) {
  uint64_t seeing = 0;
  for (int64_t j = 0; j < columns; ++j) seeing |= t.visible[j];
  for (int64_t i = 0; i < rows; ++i) {
    if (seeing >> i & 1) continue;
    fill(t.q + i * width, width, (T)0);
    fill(t.tq + i * width, width, (T)0);
    fill(t.grad_out + i * width_v, width_v, (T)0);
    fill(t.t_grad_out + i * width_v, width_v, (T)0);
  }
}

template <typename T>
void tangent_keys(const AttentionParams& p, int64_t b, int64_t h_kv, int64_t n_start,
                  const TangentTile<T>& t) {
  constexpr int W = kLanes<T>;
  const int64_t width = round_up(p.D, W), width_v = round_up(p.Dv, W), group = p.Hq / p.Hkv;
  const int64_t columns = min_of(kBlockN, p.Sk - n_start);
  const Sequence seq = sequence_of(p, b);
  const TangentKeys<T> keys = load_tangent_keys(p, {seq, h_kv, n_start, columns}, nullptr, t);
  T *tdk = t.sum, *tdv = t.sum2;
  fill(tdk, columns * width, (T)0);
  fill(tdv, columns * width_v, (T)0);

  const Range queries = visible_queries(p, seq, n_start, n_start + columns);
  for (int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
    for (int64_t m = queries.begin / kBlockM<T> * kBlockM<T>; m < queries.end; m += kBlockM<T>) {
      const int64_t rows = min_of(kBlockM<T>, queries.end - m);
      const ScoreTile tile = {seq, h, m, rows, n_start, columns};
      if (!tangent_visibility(p, tile, t)) continue;
      with_vectors<T>(rows, [&](auto vectors) {
        constexpr int kVectors = vectors.value, kRow = kVectors * W;
        load_tangent_queries<T, kVectors>(p, b, h, m, rows, t);
        tangent_gradients<T, kVectors>(p, tile, keys, t);
        clear_blind_tangents(rows, columns, width, width_v, t);
        // t_dv <- t_dv + (z t_p)^T do + (z p)^T t_do
        add_for_seen_keys(t.visible, columns, width_v, tdv, t.unseen, [&] {
          multiply_wide(columns, rows, width_v, Scalars<T>{t.tp, kRow, 1}, t.grad_out, width_v, tdv,
                        width_v);
          if (p.tangent.grad_out.data == nullptr) return;
          multiply_wide(columns, rows, width_v, Scalars<T>{t.p, kRow, 1}, t.t_grad_out, width_v,
                        tdv, width_v);
        });
        apply_tangent_cap_slope<T, kVectors>(p, columns, t);
        // t_dk <- t_dk + t_e^T q + e^T t_q
        add_for_seen_keys(t.visible, columns, width, tdk, t.unseen, [&] {
          multiply_wide(columns, rows, width, Scalars<T>{t.tds, kRow, 1}, t.q, width, tdk, width);
          if (p.tangent.query.data == nullptr) return;
          multiply_wide(columns, rows, width, Scalars<T>{t.ds, kRow, 1}, t.tq, width, tdk, width);
        });
      });
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    store_row(row_of(p.dk, p.dtype, b, h_kv, n_start + j), p.dtype, tdk + j * width, p.D,
              (T)p.scale);
    store_row(row_of(p.dv, p.dtype, b, h_kv, n_start + j), p.dtype, tdv + j * width_v, p.Dv, (T)1);
  }
}

template <typename T>
struct AttentionTangentKeys : TangentPhase<T> {
  static int64_t num_tasks(const AttentionParams& p) {
    return p.B * p.Hkv * ceil_div(p.Sk, kBlockN);
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    TangentTile<T> tile;
    tile.place(p, workspace);
    const int64_t blocks = ceil_div(p.Sk, kBlockN);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / blocks;
      tangent_keys(p, head / p.Hkv, head % p.Hkv, task % blocks * kBlockN, tile);
    }
  }
};

// -- phase 3: t_dq. Task: kBlockM queries of one head --------------------------------------------

template <typename T, int kVectors>
void tangent_queries(const AttentionParams& p, int64_t b, int64_t h, int64_t m_start, int64_t rows,
                     const TangentTile<T>& t) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  const int64_t width = round_up(p.D, W), h_kv = h / (p.Hq / p.Hkv);
  const Sequence seq = sequence_of(p, b);
  load_tangent_queries<T, kVectors>(p, b, h, m_start, rows, t);
  fill(t.sum_t, width * kRow, (T)0);
  uint64_t sighted = 0;  // queries that saw something

  const Range range = visible_keys(p, seq, m_start, m_start + rows);
  for (int64_t n = range.begin / kBlockN * kBlockN; n < range.end; n += kBlockN) {
    const int64_t columns = min_of(kBlockN, range.end - n);
    const ScoreTile tile = {seq, h, m_start, rows, n, columns};
    if (!tangent_visibility(p, tile, t)) continue;
    sighted |= seeing_queries(rows, columns, Visible::kSome, t.visible) & *t.counted;
    const TangentKeys<T> keys = load_tangent_keys(p, {seq, h_kv, n, columns}, t.visible, t);
    tangent_gradients<T, kVectors>(p, tile, keys, t);
    apply_tangent_cap_slope<T, kVectors>(p, columns, t);
    // t_dq^T <- t_dq^T + k^T t_e^T + t_k^T e^T
    multiply<kVectors, true>(p.D, columns, transposed(keys.k), t.tds, kRow, t.sum_t, kRow);
    if (keys.tk.data != nullptr) {
      multiply<kVectors, true>(p.D, columns, transposed(keys.tk), t.ds, kRow, t.sum_t, kRow);
    }
  }
  transpose_tile(width, kRow, t.sum_t, kRow, t.sum, width);
  for (int64_t i = 0; i < rows; ++i) {
    if (!(sighted >> i & 1)) fill(t.sum + i * width, p.D, (T)0);
    store_row(row_of(p.dq, p.dtype, b, h, m_start + i), p.dtype, t.sum + i * width, p.D,
              (T)p.scale);
  }
}

template <typename T>
struct AttentionTangentQueries : TangentQueriesPhase<T> {
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    TangentTile<T> tile;
    tile.place(p, workspace);
    for_each_query_block<T>(p, begin, end, [&](int64_t b, int64_t h, int64_t m, int64_t rows) {
      with_vectors<T>(
          rows, [&](auto vectors) { tangent_queries<T, vectors.value>(p, b, h, m, rows, tile); });
    });
  }
};

// -- phase 4: t_dbias. Task: one tile of t_dbias, from all tiles that are summed into it ---------

template <typename T>
struct AttentionTangentBias : TangentPhase<T> {
  // The number of tasks along each dimension: one where the bias is broadcast.
  struct Parts {
    int64_t b, h, m, n;
  };
  static Parts parts(const AttentionParams& p) {
    const ScoreView& dbias = p.dbias;
    return {dbias.stride_b == 0 ? 1 : p.B, dbias.stride_h == 0 ? 1 : p.Hq,
            dbias.stride_q == 0 ? 1 : ceil_div(p.Sq, kBlockM<T>),
            dbias.stride_k == 0 ? 1 : ceil_div(p.Sk, kBlockN)};
  }
  static int64_t num_tasks(const AttentionParams& p) {
    if (p.dbias.data == nullptr) return 0;
    const Parts n = parts(p);
    return n.b * n.h * n.m * n.n;
  }

  // t.dbias[key][query] += t_ds of one tile
  static void add_tile(const AttentionParams& p, int64_t b, int64_t h, int64_t m, int64_t n,
                       const TangentTile<T>& t) {
    const int64_t rows = min_of(kBlockM<T>, p.Sq - m), columns = min_of(kBlockN, p.Sk - n);
    const Sequence seq = sequence_of(p, b);
    const ScoreTile tile = {seq, h, m, rows, n, columns};
    if (!tangent_visibility(p, tile, t)) return;
    with_vectors<T>(rows, [&](auto vectors) {
      constexpr int kVectors = vectors.value, kRow = kVectors * kLanes<T>;
      const TangentKeys<T> keys =
          load_tangent_keys(p, {seq, h / (p.Hq / p.Hkv), n, columns}, nullptr, t);
      load_tangent_queries<T, kVectors>(p, b, h, m, rows, t);
      tangent_gradients<T, kVectors>(p, tile, keys, t);
      for (int64_t j = 0; j < columns; ++j) {
        for (int64_t i = 0; i < kRow; i += kLanes<T>) {
          T* sum = t.dbias + j * kBlockM<T> + i;
          store(sum, add(load(sum), load(t.tds + j * kRow + i)));
        }
      }
    });
  }

  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    constexpr int64_t M = kBlockM<T>;
    TangentTile<T> t;
    t.place(p, workspace);
    const Parts n = parts(p);
    const auto range = [](int64_t parts, int64_t part, int64_t size, int64_t step) {
      return parts == 1 ? Range{0, size} : Range{part * step, min_of((part + 1) * step, size)};
    };
    for (int64_t task = begin; task < end; ++task) {
      const Range ns = range(n.n, task % n.n, p.Sk, kBlockN);
      const Range ms = range(n.m, task / n.n % n.m, p.Sq, M);
      const Range hs = range(n.h, task / n.n / n.m % n.h, p.Hq, 1);
      const Range bs = range(n.b, task / n.n / n.m / n.h, p.B, 1);
      fill(t.dbias, kBlockN * M, (T)0);
      for (int64_t b = bs.begin; b < bs.end; ++b) {
        for (int64_t h = hs.begin; h < hs.end; ++h) {
          for (int64_t j = ns.begin; j < ns.end; j += kBlockN) {
            for (int64_t i = ms.begin; i < ms.end; i += M) add_tile(p, b, h, i, j, t);
          }
        }
      }
      const ScoreView& out = p.dbias;
      const int64_t rows = out.stride_q == 0 ? 1 : ms.end - ms.begin;
      const int64_t columns = out.stride_k == 0 ? 1 : ns.end - ns.begin;
      if (out.stride_k == 0) {
        for (int64_t j = 1; j < kBlockN; ++j) {
          for (int64_t i = 0; i < M; ++i) t.dbias[i] += t.dbias[j * M + i];
        }
      }
      for (int64_t j = 0; j < columns; ++j) {
        T* sums = t.dbias + j * M;
        for (int64_t i = 1; out.stride_q == 0 && i < M; ++i) sums[0] += sums[i];
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t offset = bs.begin * out.stride_b + hs.begin * out.stride_h +
                                 (ms.begin + i) * out.stride_q + (ns.begin + j) * out.stride_k;
          store_element<T>(element(out.data, out.dtype, offset), out.dtype, sums[i]);
        }
      }
    }
  }
};

}  // namespace
}  // namespace fused_attention
