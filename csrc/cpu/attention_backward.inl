// Attention backward from the saved log-sum-exp (FlashAttention-2, Dao 2023, Algorithm 2). It never
// holds more than kBlockM x kBlockN scores, and no two threads add to one float:
//
//   delta = rowsum(do * o) - dlse          phase 1, a block of queries
//   p  = exp(s * scale - lse)
//   dp = do v^T
//   ds = p * (dp - delta)
//   dv = p^T do,  dk = scale ds^T q
//   dq = scale ds k
//
// The rest is one pass, with five products per tile: a task is the queries of a key head against
// its keys, and sums up dk and dv of the head. With few heads a task is a query split, and a
// further phase combines the query splits, in order. Where these sums would take too much memory
// there are two passes, with seven products per tile: one for dk and dv of a block of keys, against
// the queries that see it; one for dq of a block of queries, against the keys that it sees. The
// shape decides between one pass and two.
//
// Dropout replaces p by z * p in dv and dp by z * dp in ds, where z is the scale of kept weights,
// else 0 (delta is unchanged, since do * o already contains z). dbias = ds, summed where the bias
// is broadcast: by the task that owns the queries, or, if it is broadcast over the queries, by the
// task that owns the keys. An owner takes all heads and batches that share its part of the bias, in
// order. For paged keys, the gradients of each sequence are first computed in one piece; a page
// then gets the sum over the sequences that it serves, in order.
//
// If the weights w = z * p were returned too, their gradient dw adds to do v^T, and rowsum(w * dw)
// to delta (attention_weights.inl).
#pragma once

#include "attention_weights.inl"
#include "masking.inl"
#include "online_softmax.inl"
#include "philox.inl"
#include "scores.inl"
#include "vector_products.inl"
#ifdef FUSED_ATTENTION_AMX_PRODUCTS
#include "amx_products.inl"
#endif

namespace fused_attention {
namespace {

// -- a tile, and the steps that every pass takes -------------------------------------------------

template <typename Products>
struct BackwardTile {
  using T = typename Products::T;
  static constexpr int kBlockM = Products::kQueryVectors * kLanes<T>;
  Products products;         // holds q and do of the queries, k and v of the keys
  T *lse, *delta;            // [kBlockM]
  uint64_t counted;          // a bit for each query that saw something
  T *p, *ds;                 // weights and score gradients [kBlockN][kBlockM]
  T* cap_slope;              // [kBlockN][kBlockM]
  T* unseen;                 // [kBlockN][D or Dv], see add_for_seen_keys
  T *bias, *bias_t;          // bias, then dw [kBlockM][kBlockN], and transposed
  uint64_t *visible, *keep;  // [kBlockN]
  T *dk, *dv;                // [kBlockN][D or Dv]
  T *dq_t, *dq;              // [D][kBlockM] and transposed
  T* dbias;  // of an owner of keys [heads of a group][kBlockN], of queries [kBlockM][Sk]

  size_t place(const AttentionParams& p_, void* workspace) {
    constexpr int M = kBlockM;
    const int64_t width = round_up(p_.D, kLanes<T>), width_v = round_up(p_.Dv, kLanes<T>);
    Arena arena{(char*)workspace, 0};
    products.place(p_, arena);
    lse = arena.take<T>(M);
    delta = arena.take<T>(M);
    p = arena.take<T>(kBlockN * M);
    ds = arena.take<T>(kBlockN * M);
    visible = arena.take<uint64_t>(kBlockN);
    keep = arena.take<uint64_t>(kBlockN);
    dk = arena.take<T>(kBlockN * width);
    dv = arena.take<T>(kBlockN * width_v);
    dq_t = arena.take<T>(M * width);
    dq = arena.take<T>(M * width);
    cap_slope = arena.take<T>(p_.bends_scores() ? kBlockN * M : 0);
    unseen = arena.take<T>(kBlockN * max_of(width, width_v));
    const bool staged = p_.bias.data != nullptr || p_.weights.data != nullptr;
    bias = arena.take<T>(staged ? M * kBlockN : 0);
    bias_t = arena.take<T>(staged ? M * kBlockN : 0);
    dbias = arena.take<T>(dbias_size(p_));
    return arena.used;
  }
  static int64_t dbias_size(const AttentionParams& p) {
    if (p.dbias.data == nullptr) return 0;
    if (p.dbias.stride_q == 0) return p.Hq / p.Hkv * kBlockN;
    return kBlockM * (p.dbias.stride_k == 0 ? 1 : round_up(p.Sk, kBlockN));
  }
};

// Loads a block of queries with lse and delta. Queries past the end and queries that saw nothing
// (no key, or logits of -inf only) count as 0, whatever they held.
template <int kVectors, typename Products>
void load_queries(const AttentionParams& p, const Sequence& seq, int64_t h, int64_t m_start,
                  int64_t rows, BackwardTile<Products>& t) {
  using T = typename Products::T;
  const int64_t first = row_number(p, seq, h, m_start);
  t.counted = 0;
  for (int64_t i = 0; i < kVectors * kLanes<T>; ++i) {
    const T lse = i < rows ? ((const T*)p.lse)[first + i] : -kInf<T>;
    const bool empty = lse == -kInf<T>;
    t.lse[i] = empty ? kInf<T> : lse;
    t.delta[i] = empty ? (T)0 : ((const T*)p.delta)[first + i];
    t.counted |= (uint64_t)!empty << i;
  }
  t.products.template load_queries<kVectors>(p, seq, h, m_start, rows, t.counted);
}

// t.p <- z * p, t.ds <- the gradient of the logits, both [key][query].
template <int kVectors, typename Products>
void score_gradients(const AttentionParams& p, const ScoreTile& tile, Visible seen,
                     BackwardTile<Products>& t) {
  using T = typename Products::T;
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  const int64_t columns = tile.columns;
  t.products.template scores<kVectors>(p, columns, t.p, t.ds);  // s <- k q^T, dp <- v do^T
  const double factor = finish_scores<T, kVectors>(p, tile, t.p, t.bias, t.bias_t, t.cap_slope);
  if (p.weights.data != nullptr) {  // dp <- dp + dw
    const Vec<T> share = broadcast(head_share<T>(p));
    load_scores(p.weights, tile, t.bias);
    transpose_tile(tile.rows, columns, t.bias, kBlockN, t.bias_t, kRow);
    for (int64_t i = 0; i < columns * kRow; i += W) {
      store(t.ds + i, fma(load(t.bias_t + i), share, load(t.ds + i)));
    }
  }
  const bool dropout = p.dropout_threshold > 0;
  if (dropout) dropout_keep_bits(p, tile, t.keep);

  const Vec<T> scale = broadcast((T)factor), zero = broadcast((T)0);
  const Vec<T> kept_scale = broadcast((T)p.dropout_scale), log2e = broadcast(kLog2e<T>);
  for (int64_t j = 0; j < columns; ++j) {
    // Lanes that do not count become 0, since the sums over queries read them.
    const uint64_t visible = t.counted & (seen == Visible::kSome ? t.visible[j] : ~(uint64_t)0);
    for (int x = 0; x < kVectors; ++x) {
      T *at_p = t.p + j * kRow + x * W, *at_ds = t.ds + j * kRow + x * W;
      const Vec<T> lse = load(t.lse + x * W), delta = load(t.delta + x * W);
      // p <- exp(s * scale - lse)
      const Vec<T> distance = fma_once(load(at_p), scale, sub(zero, lse));
      Vec<T> weight = exp2<T>(mul(distance, log2e));
      weight = select_bits(visible >> (x * W), weight, zero);
      Vec<T> dp = load(at_ds), dropped = weight;
      if (dropout) {
        const uint64_t keep = t.keep[j] >> (x * W);
        dp = select_bits(keep, mul(dp, kept_scale), zero);
        dropped = select_bits(keep, mul(weight, kept_scale), zero);
      }
      // ds <- p * (dp - delta), then 0 again where hidden, since dp may be NaN there
      const Vec<T> ds = mul(weight, sub(dp, delta));
      store(at_ds, select_bits(visible >> (x * W), ds, zero));
      store(at_p, dropped);
      if (p.bends_scores()) {  // the cap slope may be NaN there, too
        T* at = t.cap_slope + j * kRow + x * W;
        store(at, select_bits(visible >> (x * W), load(at), zero));
      }
    }
  }
}

// ds <- ds * d logit / d score, after dbias was summed.
template <int kVectors, typename Products>
void apply_cap_slope(const AttentionParams& p, int64_t columns, const BackwardTile<Products>& t) {
  using T = typename Products::T;
  if (!p.bends_scores()) return;
  for (int64_t i = 0; i < columns * kVectors * kLanes<T>; i += kLanes<T>) {
    store(t.ds + i, mul(load(t.ds + i), load(t.cap_slope + i)));
  }
}

// Returns a bit for each query that sees some key of the tile.
uint64_t seeing_queries(int64_t rows, int64_t columns, Visible seen, const uint64_t* visible) {
  if (seen == Visible::kAll) return low_bits(rows);
  uint64_t seeing = 0;
  for (int64_t j = 0; j < columns; ++j) seeing |= visible[j];
  return seeing & low_bits(rows);
}

// add() adds the products of a tile to `sums`, [columns][width], dk or dv of its keys. A key that
// no query of the block sees keeps its sum as it is: its weights are 0, but 0 times an infinity in
// q or do is NaN. `visible` is null when every key is seen; `unseen` has room for the sums of all.
template <typename T, typename F>
void add_for_seen_keys(const uint64_t* visible, int64_t columns, int64_t width, T* sums, T* unseen,
                       F add) {
  const auto for_each_unseen = [&](auto copy) {
    for (int64_t j = 0; visible != nullptr && j < columns; ++j) {
      if (visible[j] == 0) copy(sums + j * width, unseen + j * width);
    }
  };
  const size_t bytes = (size_t)width * sizeof(T);
  for_each_unseen([&](T* sum, T* kept) { __builtin_memcpy(kept, sum, bytes); });
  add();
  for_each_unseen([&](T* sum, T* kept) { __builtin_memcpy(sum, kept, bytes); });
}

// Stores dk [columns][D] and dv [columns][Dv] of the keys [n_start, n_start + columns) of one key
// head.
template <typename T>
void store_key_gradients(const AttentionParams& p, const Sequence& seq, int64_t h_kv,
                         int64_t n_start, int64_t columns, const T* dk, const T* dv) {
  const int64_t width = round_up(p.D, kLanes<T>), width_v = round_up(p.Dv, kLanes<T>);
  for (int64_t j = 0; j < columns; ++j) {
    const int64_t token = seq.k_start + n_start + j;
    store_row(row_of(p.dk, p.dtype, seq.b, h_kv, token), p.dtype, dk + j * width, p.D, (T)p.scale);
    store_row(row_of(p.dv, p.dtype, seq.b, h_kv, token), p.dtype, dv + j * width_v, p.Dv, (T)1);
  }
}

// -- phase 1: delta, and the gradient of sinks. Task: kBlockM queries of one head; one head ------

// Returns do where o is not 0, else 0. A row that saw nothing has o = 0 and adds nothing to the
// gradient of a sink, whatever do holds. If a row sees something, a NaN in do reaches the gradients
// through dp.
template <typename T>
FA_INLINE Vec<T> where_not_zero(Vec<T> out, Vec<T> grad_out) {
  const Vec<T> zero = broadcast((T)0);
  return select_lt(zero, abs(out), grad_out, zero);
}

template <typename T>
struct AttentionBackwardDelta {
  static int64_t num_tasks(const AttentionParams& p) { return count_query_blocks(p, kBlockM<T>); }
  static size_t workspace_bytes(const AttentionParams& p) {
    return 2 * kBlockM<T> * sizeof(T) * (size_t)round_up(p.Dv, kLanes<T>);
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    constexpr int W = kLanes<T>;
    const int64_t width = round_up(p.Dv, W);
    T *out = (T*)workspace, *grad_out = out + kBlockM<T> * width;
    for (int64_t task = begin; task < end; ++task) {
      const Block block = query_block(p, task, kBlockM<T>);
      const Sequence seq = sequence_of(p, block.b);
      const int64_t rows = min_of(kBlockM<T>, seq.Sq - block.start);
      const int64_t token = seq.q_start + block.start;
      load_tile(out, p.out, p.dtype, block.b, block.h, token, rows, p.Dv, rows);
      load_tile(grad_out, p.grad_out, p.dtype, block.b, block.h, token, rows, p.Dv, rows);
      for (int64_t i = 0; i < rows; ++i) {
        Vec<T> products = broadcast((T)0);
        for (int64_t d = 0; d < width; d += W) {
          const Vec<T> o = load(out + i * width + d), g = load(grad_out + i * width + d);
          products = fma(o, where_not_zero<T>(o, g), products);
        }
        T lanes[W], delta = 0;
        store(lanes, products);
        for (int l = 0; l < W; ++l) delta += lanes[l];
        if (p.grad_lse != nullptr) {
          delta -=
              ((const T*)p.grad_lse)[block.b * p.grad_lse_stride_b + block.h * p.grad_lse_stride_h +
                                     (token + i) * p.grad_lse_stride_s];
        }
        ((T*)p.delta)[row_number(p, seq, block.h, block.start + i)] = delta;
      }
    }
  }
};

// dsink = sum over rows of p_sink * (0 - delta), p_sink = exp(sink - lse). Task: one head of one
// sample.
template <typename T>
struct AttentionBackwardSinks {
  static int64_t num_tasks(const AttentionParams& p) {
    return p.dsinks != nullptr ? samples_of(p) * p.Hq : 0;
  }
  static size_t workspace_bytes(const AttentionParams&) { return 0; }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void*) {
    const int64_t batch = batch_of_a_sample(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t h = task % p.Hq, first = task / p.Hq * batch;
      const double sink = (double)*sink_of<T>(p, first, h);
      double sum = 0;
      for (int64_t b = first; b < first + batch; ++b) {
        const Sequence seq = sequence_of(p, b);
        for (int64_t i = 0; i < seq.Sq; ++i) {
          const int64_t row = row_number(p, seq, h, i);
          const double lse = ((const T*)p.lse)[row];
          if (lse == -__builtin_inf()) continue;  // the sink is -inf, too, and has no weight
          sum -= __builtin_exp(sink - lse) * (double)((const T*)p.delta)[row];
        }
      }
      ((T*)p.dsinks)[task] = (T)sum;
    }
  }
};

// -- dbias: each part of it is summed by the task that owns it -----------------------------------

// dbias is summed over the queries, if the bias is broadcast over them, by the owners of keys. Else
// the owners of queries store it.
FA_INLINE bool has_dbias_of_keys(const AttentionParams& p) {
  return p.dbias.data != nullptr && p.dbias.stride_q == 0;
}
FA_INLINE bool has_dbias_of_queries(const AttentionParams& p) {
  return p.dbias.data != nullptr && p.dbias.stride_q != 0;
}

// sums[key] += ds, summed over the queries: a part of dbias, if the bias is broadcast over the
// queries.
template <typename T, int kVectors>
void add_key_sums(int64_t rows, int64_t columns, const T* ds, T* sums) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  for (int64_t j = 0; j < columns; ++j) {
    Vec<T> sum = broadcast((T)0);
    for (int x = 0; x < kVectors; ++x) {
      const Vec<T> at = load(ds + j * kRow + x * W);
      sum = add(sum, select_bits(low_bits(rows) >> (x * W), at, broadcast((T)0)));
    }
    T lanes[W];
    store(lanes, sum);
    for (int l = 0; l < W; ++l) sums[j] += lanes[l];
  }
}

// Stores such sums for the keys from first.start on: `count` of them or, if the bias is broadcast
// over the keys too, the total of the `held` sums.
template <typename T>
void store_key_sums(const AttentionParams& p, const Block& first, int64_t count, int64_t held,
                    T* sums) {
  if (p.dbias.stride_k == 0) {
    for (int64_t j = 1; j < held; ++j) sums[0] += sums[j];
    count = 1;
  }
  const int64_t offset =
      first.b * p.dbias.stride_b + first.h * p.dbias.stride_h + first.start * p.dbias.stride_k;
  store_row(element(p.dbias.data, p.dbias.dtype, offset), p.dbias.dtype, sums, count, (T)1);
}

// A block of dbias, of at most `size` queries, which is stored at the first batch and head that
// share it.
template <typename T>
struct QueryBias {
  int64_t rows, row, columns;
  QueryBias(const AttentionParams& p, int64_t m_start, int64_t size)
      : rows(min_of(size, p.Sq - m_start)),
        row(p.dbias.stride_k == 0 ? 1 : round_up(p.Sk, kBlockN)),
        columns(p.dbias.stride_k == 0 ? 1 : p.Sk) {}
  void clear(T* dbias) const { fill(dbias, rows * row, (T)0); }
  void store_block(const AttentionParams& p, const Block& block, const T* dbias) const {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t offset = block.b * p.dbias.stride_b + block.h * p.dbias.stride_h +
                             (block.start + i) * p.dbias.stride_q;
      store_row(element(p.dbias.data, p.dbias.dtype, offset), p.dbias.dtype, dbias + i * row,
                columns, (T)1);
    }
  }
};

// -- a block of queries against all keys that it sees --------------------------------------------

// The sums of a whole key head that a task of one pass has beside dq; null in two passes.
template <typename T>
struct HeadGradients {
  T *dk = nullptr, *dv = nullptr;  // [Sk][D or Dv]
  T* key_sums = nullptr;           // dbias, if the bias is broadcast over the queries, [Sk]
};

template <int kVectors, typename Products>
void attention_backward_queries(const AttentionParams& p, const Sequence& seq, int64_t h,
                                int64_t m_start, int64_t rows, BackwardTile<Products>& t,
                                const HeadGradients<typename Products::T>& head) {
  using T = typename Products::T;
  constexpr int kRow = kVectors * kLanes<T>;
  const int64_t width = round_up(p.D, kLanes<T>), width_v = round_up(p.Dv, kLanes<T>);
  const int64_t h_kv = h / (p.Hq / p.Hkv);
  load_queries<kVectors>(p, seq, h, m_start, rows, t);
  fill(t.dq_t, width * kRow, (T)0);
  uint64_t sighted = 0;  // queries that saw something

  const Range keys = visible_keys(p, seq, m_start, m_start + rows);
  for (int64_t n = keys.begin / kBlockN * kBlockN; n < keys.end; n += kBlockN) {
    const int64_t columns = min_of(kBlockN, keys.end - n);
    const ScoreTile tile = {seq, h, m_start, rows, n, columns};
    const KeyTile tile_keys = {seq, h_kv, n, columns};
    const Visible seen = tile_visibility(p, tile, t.visible);
    if (seen == Visible::kNone) continue;
    const uint64_t* visible = seen == Visible::kSome ? t.visible : nullptr;
    t.products.load_keys(p, tile_keys, visible);
    score_gradients<kVectors>(p, tile, seen, t);
    const uint64_t seeing = seeing_queries(rows, columns, seen, t.visible);
    sighted |= seeing & t.counted;

    if (head.dv != nullptr) {  // dv <- dv + p^T do
      t.products.select_queries(p, rows, seeing);
      T* dv = head.dv + n * width_v;
      add_for_seen_keys(visible, columns, width_v, dv, t.unseen, [&] {
        t.products.template add_to_dv<kVectors>(p, rows, columns, t.p, dv);
      });
    }
    if (head.key_sums != nullptr) {
      add_key_sums<T, kVectors>(rows, columns, t.ds, head.key_sums + n);
    }
    if (has_dbias_of_queries(p)) {  // dbias <- dbias + ds
      transpose_tile(columns, kRow, t.ds, kRow, t.bias, kBlockN);
      const bool one_a_row = p.dbias.stride_k == 0;
      const int64_t dbias_row = one_a_row ? 1 : round_up(p.Sk, kBlockN);
      for (int64_t i = 0; i < rows; ++i) {
        T* row = t.dbias + i * dbias_row + (one_a_row ? 0 : n);
        for (int64_t j = 0; j < columns; ++j) row[one_a_row ? 0 : j] += t.bias[i * kBlockN + j];
      }
    }
    apply_cap_slope<kVectors>(p, columns, t);
    if (head.dk != nullptr) {  // dk <- dk + ds^T q
      T* dk = head.dk + n * width;
      add_for_seen_keys(visible, columns, width, dk, t.unseen, [&] {
        t.products.template add_to_dk<kVectors>(p, rows, columns, t.ds, dk);
      });
    }
    // dq^T <- dq^T + k^T ds^T
    t.products.template add_to_dq<kVectors>(p, tile_keys, visible, t.ds, t.dq_t);
  }
  transpose_tile(width, kRow, t.dq_t, kRow, t.dq, width);
  for (int64_t i = 0; i < rows; ++i) {
    // A query that saw nothing has gradient 0, even beside a NaN in a key that others see.
    T* dq = t.dq + i * width;
    if (!(sighted >> i & 1)) fill(dq, p.D, (T)0);
    store_row(row_of(p.dq, p.dtype, seq.b, h, seq.q_start + m_start + i), p.dtype, dq, p.D,
              (T)p.scale);
  }
}

template <typename Products>
void run_query_block(const AttentionParams& p, const Block& block, BackwardTile<Products>& tile,
                     const HeadGradients<typename Products::T>& head) {
  using T = typename Products::T;
  const Sequence seq = sequence_of(p, block.b);
  const int64_t rows = min_of(BackwardTile<Products>::kBlockM, seq.Sq - block.start);
  if (rows <= 0) return;
  with_vectors<T, Products::kQueryVectors>(rows, [&](auto vectors) {
    attention_backward_queries<vectors.value>(p, seq, block.h, block.start, rows, tile, head);
  });
}

// -- one pass: dq, dk, dv. Task: a key head, see HeadTasks ---------------------------------------

// Divides the one-pass backward into tasks. A task owns a key head, or all key heads that share a
// part of dbias. If there are few of these, each is divided into query splits: split s has the
// blocks of queries m with m % query_splits == s.
struct HeadTasks {
  // The most bytes of dk and dv of one task; the fewest tasks that keep the threads busy; and the
  // most bytes of dk and dv of all query splits together.
  static constexpr int64_t kMostBytes = 8 << 20, kFewest = 8, kMostSharedBytes = 16 << 20;
  int64_t batches, heads, query_splits = 1;  // the number of tasks along each
  explicit HeadTasks(const AttentionParams& p)
      : batches(p.dbias.data != nullptr && p.dbias.stride_b == 0 ? 1 : p.B),
        heads(p.dbias.data != nullptr && p.dbias.stride_h == 0 ? 1 : p.Hkv) {
    const bool owns_heads = batches == p.B && heads == p.Hkv;
    const int64_t owners = batches * heads;
    if (owners > 0 && owners < kFewest && owns_heads && !has_dbias_of_keys(p)) {
      query_splits = ceil_div(kFewest, owners);
    }
  }
  int64_t count() const { return batches * heads * query_splits; }
  // Returns the number of key heads of one task; 0 for an empty batch, which has no task.
  int64_t heads_of_each(const AttentionParams& p) const {
    return p.B * p.Hkv / max_of(batches * heads, 1);
  }
};
// Returns the number of elements of dk and dv of one key head, padded as in the sums.
template <typename T>
int64_t head_gradients_size(const AttentionParams& p) {
  const int64_t W = kLanes<T>;
  return round_up(p.Sk, kBlockN) * (round_up(p.D, W) + round_up(p.Dv, W));
}
template <typename T>
bool in_one_pass(const AttentionParams& p) {
  const HeadTasks tasks(p);
  if (tasks.count() < HeadTasks::kFewest) return false;
  const int64_t bytes = head_gradients_size<T>(p) * (int64_t)sizeof(T);
  if (tasks.query_splits > 1) {
    return p.Sq >= 2 * tasks.query_splits * kBlockM<T> &&
           tasks.count() * bytes <= HeadTasks::kMostSharedBytes;
  }
  return tasks.heads_of_each(p) * bytes <= HeadTasks::kMostBytes;
}

template <typename Products>
struct AttentionBackwardHeads {
  using T = typename Products::T;
  static constexpr int64_t kBlockM = BackwardTile<Products>::kBlockM;
  static int64_t num_tasks(const AttentionParams& p) {
    return in_one_pass<T>(p) ? HeadTasks(p).count() : 0;
  }
  // The tile; behind it dk and dv of the task's heads, unless they are those of a query split, in
  // p.call_workspace; and the key sums of each dbias that the task owns.
  struct Memory {
    BackwardTile<Products> tile;
    T *dk, *dv, *key_sums;
    size_t place(const AttentionParams& p, void* workspace) {
      const HeadTasks tasks(p);
      const int64_t heads = tasks.query_splits > 1 ? 0 : tasks.heads_of_each(p);
      const int64_t keys = heads * round_up(p.Sk, kBlockN);
      Arena arena{(char*)workspace, tile.place(p, workspace)};
      dk = arena.take<T>(keys * round_up(p.D, kLanes<T>));
      dv = arena.take<T>(keys * round_up(p.Dv, kLanes<T>));
      const int64_t sum_rows = p.Hq / p.Hkv * round_up(p.Sk, kBlockN);
      key_sums = has_dbias_of_keys(p) ? arena.take<T>(sum_rows) : nullptr;
      return arena.used;
    }
  };
  static size_t workspace_bytes(const AttentionParams& p) {
    Memory memory;
    return memory.place(p, nullptr);
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    Memory memory;
    memory.place(p, workspace);
    const HeadTasks tasks(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t owner = task / tasks.query_splits, split = task % tasks.query_splits;
      const int64_t b = owner / tasks.heads, h = owner % tasks.heads;
      if (tasks.query_splits > 1) {
        memory.dk = (T*)p.call_workspace + task * head_gradients_size<T>(p);
        memory.dv = memory.dk + round_up(p.Sk, kBlockN) * round_up(p.D, kLanes<T>);
      }
      run_heads(p, tasks.batches == 1 ? Range{0, p.B} : Range{b, b + 1},
                tasks.heads == 1 ? Range{0, p.Hkv} : Range{h, h + 1}, split, tasks.query_splits,
                memory);
    }
  }
  static void run_heads(const AttentionParams& p, Range bs, Range hs, int64_t split, int64_t splits,
                        Memory& memory) {
    BackwardTile<Products>& tile = memory.tile;
    const int64_t width = round_up(p.D, kLanes<T>), width_v = round_up(p.Dv, kLanes<T>);
    const int64_t keys = round_up(p.Sk, kBlockN), group = p.Hq / p.Hkv;
    const int64_t heads = hs.end - hs.begin, all_keys = (bs.end - bs.begin) * heads * keys;
    const bool shared = p.dbias.data != nullptr && p.dbias.stride_h == 0;
    // The query heads are `groups` ranges [first, first + count). The heads of a range share one
    // dbias.
    const int64_t groups = shared ? 1 : heads * group, count = shared ? heads * group : 1;
    fill(memory.dk, all_keys * width, (T)0);
    fill(memory.dv, all_keys * width_v, (T)0);
    if (memory.key_sums != nullptr) fill(memory.key_sums, groups * keys, (T)0);
    for (int64_t m = split * kBlockM; m < p.Sq; m += splits * kBlockM) {
      const QueryBias<T> dbias(p, m, kBlockM);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = hs.begin * group + g * count;
        if (has_dbias_of_queries(p)) dbias.clear(tile.dbias);
        for (int64_t b = bs.begin; b < bs.end; ++b) {
          for (int64_t h = first; h < first + count; ++h) {
            const int64_t at = ((b - bs.begin) * heads + h / group - hs.begin) * keys;
            run_query_block(p, {b, h, m}, tile,
                            {memory.dk + at * width, memory.dv + at * width_v,
                             memory.key_sums == nullptr ? nullptr : memory.key_sums + g * keys});
          }
        }
        if (has_dbias_of_queries(p)) dbias.store_block(p, {bs.begin, first, m}, tile.dbias);
      }
    }
    for (int64_t g = 0; memory.key_sums != nullptr && g < groups; ++g) {
      store_key_sums(p, {bs.begin, hs.begin * group + g * count, 0}, p.Sk, p.Sk,
                     memory.key_sums + g * keys);
    }
    for (int64_t b = bs.begin; splits == 1 && b < bs.end; ++b) {
      const Sequence seq = sequence_of(p, b);
      for (int64_t h = hs.begin; h < hs.end; ++h) {
        const int64_t at = ((b - bs.begin) * heads + h - hs.begin) * keys;
        store_key_gradients(p, seq, h, 0, seq.Sk, memory.dk + at * width, memory.dv + at * width_v);
      }
    }
  }
};

// dk, dv <- the sums of the query splits, in order. Task: kBlockN keys of one key head.
template <typename T>
struct AttentionBackwardCombine {
  static size_t call_workspace_bytes(const AttentionParams& p) {
    const HeadTasks tasks(p);
    const bool is_split = tasks.query_splits > 1 && in_one_pass<T>(p);
    return is_split ? (size_t)(tasks.count() * head_gradients_size<T>(p)) * sizeof(T) : 0;
  }
  static int64_t num_tasks(const AttentionParams& p) {
    return call_workspace_bytes(p) > 0 ? p.B * p.Hkv * ceil_div(p.Sk, kBlockN) : 0;
  }
  static size_t workspace_bytes(const AttentionParams&) { return 0; }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void*) {
    const int64_t blocks = ceil_div(p.Sk, kBlockN), splits = HeadTasks(p).query_splits;
    const int64_t width = round_up(p.D, kLanes<T>), width_v = round_up(p.Dv, kLanes<T>);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t owner = task / blocks, n_start = task % blocks * kBlockN;
      const Sequence seq = sequence_of(p, owner / p.Hkv);
      const int64_t columns = min_of(kBlockN, seq.Sk - n_start);
      if (columns <= 0) continue;
      const int64_t size = head_gradients_size<T>(p);
      T* first = (T*)p.call_workspace + owner * splits * size;
      T *dk = first + n_start * width, *dv = first + blocks * kBlockN * width + n_start * width_v;
      for (int64_t split = 1; split < splits; ++split) {
        add_to(dk, dk + split * size, columns * width);
        add_to(dv, dv + split * size, columns * width_v);
      }
      store_key_gradients(p, seq, owner % p.Hkv, n_start, columns, dk, dv);
    }
  }
  static void add_to(T* sums, const T* terms, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      store(sums + i, add(load(sums + i), load(terms + i)));
    }
  }
};

// -- two passes: dk, dv. Task: kBlockN keys of one key head --------------------------------------

template <typename Products>
void attention_backward_keys(const AttentionParams& p, int64_t b, int64_t h_kv, int64_t n_start,
                             BackwardTile<Products>& t) {
  using T = typename Products::T;
  const int64_t width = round_up(p.D, kLanes<T>), width_v = round_up(p.Dv, kLanes<T>);
  const int64_t group = p.Hq / p.Hkv;
  const Sequence seq = sequence_of(p, b);
  const int64_t columns = min_of(kBlockN, seq.Sk - n_start);
  if (columns <= 0) return;
  t.products.load_keys(p, {seq, h_kv, n_start, columns}, nullptr);
  fill(t.dk, columns * width, (T)0);
  fill(t.dv, columns * width_v, (T)0);

  constexpr int kBlockM = BackwardTile<Products>::kBlockM;
  const Range queries = visible_queries(p, seq, n_start, n_start + columns);
  for (int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
    T* key_sums = t.dbias + (p.dbias.stride_h == 0 ? 0 : h % group) * kBlockN;
    for (int64_t m = queries.begin / kBlockM * kBlockM; m < queries.end; m += kBlockM) {
      const int64_t rows = min_of(kBlockM, queries.end - m);
      const ScoreTile tile = {seq, h, m, rows, n_start, columns};
      const Visible seen = tile_visibility(p, tile, t.visible);
      if (seen == Visible::kNone) continue;
      with_vectors<T, Products::kQueryVectors>(rows, [&](auto vectors) {
        constexpr int kVectors = vectors.value;
        load_queries<kVectors>(p, seq, h, m, rows, t);
        score_gradients<kVectors>(p, tile, seen, t);
        t.products.select_queries(p, rows, seeing_queries(rows, columns, seen, t.visible));
        const uint64_t* visible = seen == Visible::kSome ? t.visible : nullptr;
        // dv <- dv + p^T do
        add_for_seen_keys(visible, columns, width_v, t.dv, t.unseen, [&] {
          t.products.template add_to_dv<kVectors>(p, rows, columns, t.p, t.dv);
        });
        if (has_dbias_of_keys(p)) {
          add_key_sums<T, kVectors>(rows, columns, t.ds, key_sums);
        }
        apply_cap_slope<kVectors>(p, columns, t);
        // dk <- dk + ds^T q
        add_for_seen_keys(visible, columns, width, t.dk, t.unseen, [&] {
          t.products.template add_to_dk<kVectors>(p, rows, columns, t.ds, t.dk);
        });
      });
    }
  }
  store_key_gradients(p, seq, h_kv, n_start, columns, t.dk, t.dv);
}

template <typename Products>
struct AttentionBackwardKeys {
  using T = typename Products::T;
  // The dimensions along which the work is divided into tasks: all, except those along which tasks
  // would share a part of dbias.
  struct Split {
    bool by_batch, by_head, by_block;
    bool is_full() const { return by_batch && by_head && by_block; }
  };
  static Split split(const AttentionParams& p) {
    if (!has_dbias_of_keys(p)) return {true, true, true};
    return {p.dbias.stride_b != 0, p.dbias.stride_h != 0, p.dbias.stride_k != 0};
  }
  static int64_t num_tasks(const AttentionParams& p) {
    if (in_one_pass<T>(p)) return 0;
    const Split s = split(p);
    if (s.is_full()) return count_key_blocks(p, kBlockN);
    return (s.by_batch ? p.B : 1) * (s.by_head ? p.Hkv : 1) *
           (s.by_block ? ceil_div(p.Sk, kBlockN) : 1);
  }
  static size_t workspace_bytes(const AttentionParams& p) {
    BackwardTile<Products> tile;
    return tile.place(p, nullptr);
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    BackwardTile<Products> tile;
    tile.place(p, workspace);
    const Split s = split(p);
    const int64_t blocks = s.by_block ? ceil_div(p.Sk, kBlockN) : 1;
    const int64_t heads = s.by_head ? p.Hkv : 1, group = p.Hq / p.Hkv;
    const bool owns_dbias = has_dbias_of_keys(p);
    const int64_t owned_heads = p.dbias.stride_h == 0 ? 1 : group;
    for (int64_t task = begin; task < end; ++task) {
      const Block block = s.is_full() ? key_block(p, task, kBlockN)
                                      : Block{task / blocks / heads, task / blocks % heads,
                                              task % blocks * kBlockN};
      const Range ns =
          s.by_block ? Range{block.start, min_of(block.start + kBlockN, p.Sk)} : Range{0, p.Sk};
      const Range hs = s.by_head ? Range{block.h, block.h + 1} : Range{0, p.Hkv};
      const Range bs = s.by_batch ? Range{block.b, block.b + 1} : Range{0, p.B};
      if (owns_dbias) fill(tile.dbias, owned_heads * kBlockN, (T)0);
      for (int64_t n = ns.begin; n < ns.end; n += kBlockN) {
        for (int64_t b = bs.begin; b < bs.end; ++b) {
          for (int64_t h = hs.begin; h < hs.end; ++h) attention_backward_keys(p, b, h, n, tile);
        }
      }
      for (int64_t g = 0; owns_dbias && g < owned_heads; ++g) {
        store_key_sums(p, {bs.begin, hs.begin * group + g, ns.begin}, ns.end - ns.begin, kBlockN,
                       tile.dbias + g * kBlockN);
      }
    }
  }
};

// -- two passes: dq. Task: kBlockM queries of one head -------------------------------------------

template <typename Products>
struct AttentionBackwardQueries {
  using T = typename Products::T;
  static constexpr int64_t kBlockM = BackwardTile<Products>::kBlockM;
  static int64_t batches(const AttentionParams& p) { return p.dbias.stride_b == 0 ? 1 : p.B; }
  static int64_t heads(const AttentionParams& p) { return p.dbias.stride_h == 0 ? 1 : p.Hq; }
  static int64_t num_tasks(const AttentionParams& p) {
    if (in_one_pass<T>(p)) return 0;
    if (!has_dbias_of_queries(p)) return count_query_blocks(p, kBlockM);
    return batches(p) * heads(p) * ceil_div(p.Sq, kBlockM);
  }
  static size_t workspace_bytes(const AttentionParams& p) {
    BackwardTile<Products> tile;
    return tile.place(p, nullptr);
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    BackwardTile<Products> tile;
    tile.place(p, workspace);
    const int64_t blocks = ceil_div(p.Sq, kBlockM);
    for (int64_t task = begin; task < end; ++task) {
      if (!has_dbias_of_queries(p)) {
        run_query_block(p, query_block(p, task, kBlockM), tile, {});
        continue;
      }
      const int64_t m_start = (blocks - 1 - task % blocks) * kBlockM;
      const int64_t h_task = task / blocks % heads(p), b_task = task / blocks / heads(p);
      const Range hs = heads(p) == p.Hq ? Range{h_task, h_task + 1} : Range{0, p.Hq};
      const Range bs = batches(p) == p.B ? Range{b_task, b_task + 1} : Range{0, p.B};
      const QueryBias<T> dbias(p, m_start, kBlockM);
      dbias.clear(tile.dbias);
      for (int64_t b = bs.begin; b < bs.end; ++b) {
        for (int64_t h = hs.begin; h < hs.end; ++h) run_query_block(p, {b, h, m_start}, tile, {});
      }
      dbias.store_block(p, {bs.begin, hs.begin, m_start}, tile.dbias);
    }
  }
};

// -- after either way: gradients of pages. Task: one key head ------------------------------------

// Adds the gradients of each sequence to the pages that hold its keys, in order. Task: one key
// head.
template <typename T>
struct AttentionBackwardPages {
  static int64_t num_tasks(const AttentionParams& p) {
    return p.block_table != nullptr ? p.Hkv : 0;
  }
  static size_t workspace_bytes(const AttentionParams& p) {
    return 2 * sizeof(T) * (size_t)max_of(p.D, p.Dv);
  }
  static void add(const AttentionParams& p, const TensorView& pages, const TensorView& gradients,
                  const Sequence& seq, int64_t h, int64_t width, T* sum, T* term) {
    for (int64_t n = 0; n < seq.Sk; ++n) {
      void* to = (void*)key_row(p, pages, seq, h, n);
      load_row(sum, to, p.dtype, width);
      load_row(term, row_of(gradients, p.dtype, seq.b, h, n), p.dtype, width);
      for (int64_t d = 0; d < width; ++d) sum[d] += term[d];
      store_row(to, p.dtype, sum, width, (T)1);
    }
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    T *sum = (T*)workspace, *term = sum + max_of(p.D, p.Dv);
    for (int64_t h = begin; h < end; ++h) {
      for (int64_t b = 0; b < p.B; ++b) {
        const Sequence seq = sequence_of(p, b);
        add(p, p.page_dk, p.dk, seq, h, p.D, sum, term);
        add(p, p.page_dv, p.dv, seq, h, p.Dv, sum, term);
      }
    }
  }
};

// -- which products ------------------------------------------------------------------------------

template <typename Products_>
struct ProductsAre {
  using Products = Products_;
};

template <template <typename> class Kernel>
struct WithProducts {
  template <typename F>
  static auto with(const AttentionParams& p, F f) {
    if (p.dtype == DType::kFloat64) return f(ProductsAre<VectorProductsBackward<double>>());
#ifdef FUSED_ATTENTION_AMX_PRODUCTS
    if (p.dtype == DType::kBFloat16) return f(ProductsAre<AmxProductsBackward<1, 1>>());
    if (p.dtype == DType::kFloat16) return f(ProductsAre<AmxProductsBackward<2, 3>>());
    // On AMX tiles, if there are enough queries to make up for decomposing the keys. Exact products
    // of floats are as fast on vectors, since each takes six products of planes, and the
    // decomposition.
    if (p.Sq >= 64 && p.Sk >= 64) {
      if (p.precision == 2) return f(ProductsAre<AmxProductsBackward<1, 0>>());
      if (p.precision == 1) return f(ProductsAre<AmxProductsBackward<2, 0>>());
    }
#endif
#ifdef FUSED_ATTENTION_PAIR_PRODUCTS
    if (p.dtype == DType::kBFloat16) return f(ProductsAre<PairProductsBackward>());
#endif
    return f(ProductsAre<VectorProductsBackward<float>>());
  }
  static int64_t num_tasks(const AttentionParams& p) {
    return with(p, [&](auto is) { return Kernel<typename decltype(is)::Products>::num_tasks(p); });
  }
  static size_t workspace_bytes(const AttentionParams& p) {
    return with(
        p, [&](auto is) { return Kernel<typename decltype(is)::Products>::workspace_bytes(p); });
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    with(p, [&](auto is) {
      using Products = typename decltype(is)::Products;
      Products::begin();
      Kernel<Products>::run(p, begin, end, workspace);
      Products::end();
    });
  }
};

}  // namespace
}  // namespace fused_attention
