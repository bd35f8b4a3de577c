// The two products of attention, s = k q^T and o^T = v^T p^T, on vectors. A class of products
// decides how its operands lie in memory and how far it rounds the weights; the algorithm
// (attention_forward.inl) is the same for every class. A class has:
//
//   begin, end             called around a task
//   place, load_queries    take scratch memory, load the queries of one tile
//   scores                 s[key][query] <- k q^T for one tile
//   accumulate             p <- exp(s - m), l <- l + rowsum(p), o^T[d][query] <- o^T + v^T p^T for
//                          one tile; the product may wait until the next flush
//   flush                  called before others read or write o^T
//
// accumulate takes the words `visible` and `keep` of the tile, or null, and overwrites the scores.
#pragma once

#include "masking.inl"
#include "online_softmax.inl"
#include "philox.inl"
#include "sequence.inl"

namespace fused_attention {
namespace {

struct OnVectors {
  static constexpr int kQueryVectors = kMaxVectors;  // per tile
  static void begin() {}
  static void end() {}
  template <int kVectors, typename T>
  void flush(const AttentionParams&, T*) const {}
};

// Products of numbers of type T.
template <typename T_>
struct VectorProducts : OnVectors {
  using T = T_;
  static constexpr bool kRounds = false;
  T *q, *q_t;  // queries [kBlockM][D], transposed [D][kBlockM]
  T *k, *v;    // converted keys and values [kBlockN][D or Dv]

  void place(const AttentionParams& p, Arena& arena) {
    const int64_t width = round_up(p.D, kLanes<T>);
    q_t = arena.take<T>(width * kBlockM<T>);
    q = arena.take<T>(kBlockM<T> * width);
    k = arena.take<T>(kBlockN * p.D);
    v = arena.take<T>(kBlockN * p.Dv);
  }

  template <int kVectors>
  void load_queries(const AttentionParams& p, const Sequence& seq, int64_t h, int64_t m_start,
                    int64_t rows) const {
    constexpr int kRow = kVectors * kLanes<T>;
    const int64_t width = round_up(p.D, kLanes<T>);
    load_tile(q, p.query, p.dtype, seq.b, h, seq.q_start + m_start, rows, p.D, kRow);
    transpose_tile(kRow, width, q, width, q_t, kRow);
  }

  template <int kVectors>
  void scores(const AttentionParams& p, const KeyTile& keys, T* s) const {
    constexpr int kRow = kVectors * kLanes<T>;
    const Scalars<T> rows = key_rows(p, p.key, keys, p.D, nullptr, k);
    multiply<kVectors, false>(keys.columns, p.D, rows, q_t, kRow, s, kRow);
  }

  template <int kVectors>
  void accumulate(const AttentionParams& p, const KeyTile& keys, const uint64_t* visible,
                  const uint64_t* keep, Probabilities<T, kVectors> weights, T* s,
                  const RowState<T>& rows, T* acc_t) const {
    weights.replace(keys.columns, s);
    weights.add_sums(rows);
    add_values<kVectors>(p, keys, visible, keep, s, acc_t);
  }
  template <int kVectors>
  void add_values(const AttentionParams& p, const KeyTile& keys, const uint64_t* visible,
                  const uint64_t* keep, T* weights, T* acc_t) const {
    constexpr int kRow = kVectors * kLanes<T>;
    if (keep != nullptr) drop<T, kVectors>(keep, keys.columns, weights);
    const Scalars<T> values = key_rows(p, p.value, keys, p.Dv, visible, v);
    multiply<kVectors, true>(p.Dv, keys.columns, Scalars<T>{values.data, values.column, values.row},
                             weights, kRow, acc_t, kRow);
  }
};

// -- pairs ----------------------------------------------------------------------------------------

#if defined(FUSED_ATTENTION_PAIR_PRODUCTS) || defined(FUSED_ATTENTION_AMX_PRODUCTS)
// The width of a row of D bfloat16 numbers that is paired with its neighbour, in pairs.
FA_INLINE int64_t paired_rows_width(int64_t D) { return round_up(D, 32); }

// dst[j] <- rows 2 j and 2 j + 1 of keys or values, paired:
// [ceil(columns / 2)][paired_rows_width(D)].
// A key that no query sees, or that is past the end, counts as 0, whatever it held.
[[maybe_unused]] void pair_rows_of_keys(const AttentionParams& p, const TensorView& view,
                                        const KeyTile& keys, int64_t D, const uint64_t* visible,
                                        Pair* dst) {
  for (int64_t j = 0; j < keys.columns; j += 2) {
    const bool odd = j + 1 == keys.columns;
    const bool low_used = visible == nullptr || visible[j] != 0;
    const bool high_used = !odd && (visible == nullptr || visible[j + 1] != 0);
    const auto row_at = [&](int64_t at) {
      return (const uint16_t*)key_row(p, view, keys.seq, keys.h, keys.n_start + at);
    };
    const uint16_t *low = row_at(j), *high = row_at(odd ? j : j + 1);
    Pair* row = dst + j / 2 * paired_rows_width(D);
    for (int64_t d = 0; d < D; d += 32) {
      const uint64_t valid = low_bits(D - d);
      pair_rows(low + d, low_used ? valid : 0, high + d, high_used ? valid : 0, row + d);
    }
  }
}

[[maybe_unused]] bool all_finite(const Pair* x, int64_t count) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i top = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    top = _mm512_max_epu16(top, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
  }
  return _mm512_cmpge_epu16_mask(top, _mm512_set1_epi16(0x7f80)) == 0;
}
#endif

#ifdef FUSED_ATTENTION_PAIR_PRODUCTS
// The width of a row of D bfloat16 numbers in pairs, rounded up to whole vectors.
FA_INLINE int64_t pair_width(int64_t D) { return round_up(ceil_div(D, 2), kLanes<float>); }

// dst <- D elements, padded with zeros to whole vectors; only zeros unless `counts`.
FA_INLINE void copy_row_of_pairs(Pair* dst, const void* src, int64_t D, bool counts) {
  copy_words((const uint16_t*)src, counts ? D : 0, 2 * pair_width(D), (uint16_t*)dst);
}

// Whether rows can be read in place as pairs.
FA_INLINE bool rows_in_pairs(const AttentionParams& p, const TensorView& view, int64_t D) {
  return D % 2 == 0 && view.stride_s % 2 == 0 && p.block_table == nullptr;
}

// Returns rows of keys or values as pairs: in place, or copied to scratch [rows][pair_width(D)].
Scalars<Pair> rows_of_pairs(const AttentionParams& p, const TensorView& view, const KeyTile& keys,
                            int64_t D, Pair* scratch) {
  const auto row = [&](int64_t j) { return key_row(p, view, keys.seq, keys.h, keys.n_start + j); };
  if (rows_in_pairs(p, view, D) &&
      keys_in_a_row(p, keys.seq, keys.n_start, keys.columns) >= keys.columns) {
    return {(const Pair*)row(0), view.stride_s / 2, 1};
  }
  for (int64_t j = 0; j < keys.columns; ++j) {
    copy_row_of_pairs(scratch + j * pair_width(D), row(j), D, true);
  }
  return {scratch, pair_width(D), 1};
}

// Products of bfloat16 numbers, two at a time on each float lane: pairs lie along head_dim in the
// first product, along the keys in the second. Keys are read in place if possible, unless a task
// takes a whole key head.
struct PairProducts : OnVectors {
  using T = float;
  static constexpr bool kRounds = true;
  Pair *q, *q_t;        // queries [kBlockM][D / 2], transposed [D / 2][kBlockM]
  Pair* k;              // keys [kBlockN][D / 2], if they are not read in place
  Pair* v;              // values, rows 2 j and 2 j + 1 together: [kBlockN / 2][Dv]
  Pair *own_k, *own_v;  // k and v of a whole head, see load_head
  bool* own_finite;     // whether the values of each of its tiles are finite

  static int64_t tiles_of_a_head(const AttentionParams& p) { return ceil_div(p.Sk, kBlockN); }
  // Whether a task is all queries of one key head. That would not pay for one block of queries.
  static bool by_heads(const AttentionParams& p) {
    const int64_t pairs = pair_width(p.D) + paired_rows_width(p.Dv) / 2;
    return p.Sq * (p.Hq / p.Hkv) > kBlockM<float> &&
           many_heads(p, tiles_of_a_head(p) * kBlockN * pairs * (int64_t)sizeof(Pair));
  }
  void place(const AttentionParams& p, Arena& arena) {
    q_t = arena.take<Pair>(pair_width(p.D) * kBlockM<float>);
    q = arena.take<Pair>(kBlockM<float> * pair_width(p.D));
    v = arena.take<Pair>(kBlockN / 2 * paired_rows_width(p.Dv));
    k = arena.take<Pair>(rows_in_pairs(p, p.key, p.D) ? 0 : kBlockN * pair_width(p.D));
    const int64_t tiles = by_heads(p) ? tiles_of_a_head(p) : 0;
    own_k = arena.take<Pair>(tiles * kBlockN * pair_width(p.D));
    own_v = arena.take<Pair>(tiles * kBlockN / 2 * paired_rows_width(p.Dv));
    own_finite = arena.take<bool>(tiles);
  }

  void load_head(const AttentionParams& p, const Sequence& seq, int64_t h_kv) const {
    const Range keys = visible_keys(p, seq, 0, seq.Sq);
    const int64_t first = keys.begin / kBlockN * kBlockN;
    for (int64_t j = first; j < keys.end; ++j) {
      copy_row_of_pairs(own_k + j * pair_width(p.D), key_row(p, p.key, seq, h_kv, j), p.D, true);
    }
    const int64_t width = paired_rows_width(p.Dv);
    for (int64_t n = first; n < keys.end; n += kBlockN) {
      const int64_t columns = min_of(kBlockN, seq.Sk - n);
      Pair* values = own_v + n / 2 * width;
      pair_rows_of_keys(p, p.value, {seq, h_kv, n, columns}, p.Dv, nullptr, values);
      own_finite[n / kBlockN] = all_finite(values, ceil_div(columns, 2) * width);
    }
  }
  // Returns the values of a tile. Hidden values may stay if they were loaded with the head and all
  // are finite, since 0 times a finite value is 0. Otherwise they count as 0.
  const Pair* values_of_tile(const AttentionParams& p, const KeyTile& keys,
                             const uint64_t* visible) const {
    if (by_heads(p) && own_finite[keys.n_start / kBlockN]) {
      return own_v + keys.n_start / 2 * paired_rows_width(p.Dv);
    }
    pair_rows_of_keys(p, p.value, keys, p.Dv, visible, v);
    return v;
  }

  template <int kVectors>
  void load_queries(const AttentionParams& p, const Sequence& seq, int64_t h, int64_t m_start,
                    int64_t rows) const {
    constexpr int kRow = kVectors * kLanes<float>;
    const int64_t width = pair_width(p.D);
    for (int64_t r = 0; r < kRow; ++r) {
      const int64_t i = seq.q_start + m_start + (r < rows ? r : 0);
      copy_row_of_pairs(q + r * width, row_of(p.query, p.dtype, seq.b, h, i), p.D, r < rows);
    }
    transpose_tile(kRow, width, (const float*)q, width, (float*)q_t, kRow);
  }

  template <int kVectors>
  void scores(const AttentionParams& p, const KeyTile& keys, float* s) const {
    constexpr int kRow = kVectors * kLanes<float>;
    const int64_t width = pair_width(p.D);
    const Scalars<Pair> rows = by_heads(p) ? Scalars<Pair>{own_k + keys.n_start * width, width, 1}
                                           : rows_of_pairs(p, p.key, keys, p.D, k);
    multiply<kVectors, false>(keys.columns, ceil_div(p.D, 2), rows, q_t, kRow, s, kRow);
  }

  template <int kVectors>
  void accumulate(const AttentionParams& p, const KeyTile& keys, const uint64_t* visible,
                  const uint64_t* keep, Probabilities<float, kVectors> weights, float* s,
                  const RowState<float>& rows, float* acc_t) const {
    constexpr int W = kLanes<float>, kRow = kVectors * W;
    const int64_t columns = keys.columns, pairs = ceil_div(columns, 2);
    const Pair* values = values_of_tile(p, keys, visible);
    Pair* paired = (Pair*)s;  // row j takes the place of rows 2 j and 2 j + 1
    const Vec<float> zero = broadcast(0.0f);
    Vec<float> sum[kVectors];
    for (int x = 0; x < kVectors; ++x) sum[x] = zero;
    // Rounds the weights of `count` keys, from j on.
    const auto round_rows = [&](int64_t j, auto count, auto drops) {
      constexpr bool kOdd = count.value == 1;
      for (int x = 0; x < kVectors; ++x) {
        const float* at = s + j * kRow + x * W;
        Vec<float> low = weights(at, x), high = kOdd ? zero : weights(at + kRow, x);
        // before dropout, since the denominator counts all weights
        sum[x] = fma(round_to_pair(low, high), broadcast(kOnes), sum[x]);
        if constexpr (drops.value) {
          low = select_bits(keep[j] >> (x * W), low, zero);
          high = kOdd ? zero : select_bits(keep[j + 1] >> (x * W), high, zero);
        }
        store(paired + j / 2 * kRow + x * W, round_to_pair(low, high));
      }
    };
    with_flag(keep != nullptr, [&](auto drops) {
      for (int64_t j = 0; j + 2 <= columns; j += 2) round_rows(j, Constant<2>(), drops);
      if (columns % 2 == 1) round_rows(columns - 1, Constant<1>(), drops);
    });
    weights.add_sums(rows);
    for (int x = 0; x < kVectors; ++x) {
      float* total = rows.rounded_sum + x * W;
      store(total, add(load(total), sum[x]));
    }
    multiply<kVectors, true>(p.Dv, pairs, Scalars<Pair>{values, 1, paired_rows_width(p.Dv)}, paired,
                             kRow, acc_t, kRow);
  }
};
#endif

// -- backward -------------------------------------------------------------------------------------

// The five products of the backward, for one tile. The algorithm (attention_backward.inl) is the
// same for every class of products:
//
//   begin, end             called around a task
//   place, load_queries    take scratch memory; load q and do of a block, 0 without a bit in
//                          `counted`
//   load_keys              loads k and v of a tile
//   scores                 s[key][query] <- k q^T, dp[key][query] <- v do^T
//   select_queries         called before the next two with the queries that see a key of the tile
//   add_to_dv, add_to_dk   dv <- dv + p^T do, dk <- dk + ds^T q
//   add_to_dq              dq^T[d][query] <- dq^T + k^T ds^T
//
// Queries that are not selected, and keys without a bit in `visible`, count as 0 in sums over them,
// since 0 * NaN would not be 0.

template <typename T_, int kVectorsOfQueries = kMaxVectors>
struct VectorProductsBackward : OnVectors {
  using T = T_;
  T *q, *q_t, *grad_out, *grad_out_t;   // [kBlockM][D or Dv], and transposed
  T *selected_q, *selected_grad_out;    // 0 in queries that are not selected
  T *k_tile, *v_tile;                   // converted [kBlockN][D or Dv]
  const T *q_to_add, *grad_out_to_add;  // with or without selection
  Scalars<T> k, v;

  static int64_t width(int64_t D) { return round_up(D, kLanes<T>); }

  void place(const AttentionParams& p, Arena& arena) {
    constexpr int M = kVectorsOfQueries * kLanes<T>;
    q = arena.take<T>(M * width(p.D));
    q_t = arena.take<T>(M * width(p.D));
    grad_out = arena.take<T>(M * width(p.Dv));
    grad_out_t = arena.take<T>(M * width(p.Dv));
    selected_q = arena.take<T>(M * width(p.D));
    selected_grad_out = arena.take<T>(M * width(p.Dv));
    k_tile = arena.take<T>(kBlockN * p.D);
    v_tile = arena.take<T>(kBlockN * p.Dv);
  }

  template <int kVectors>
  void load_queries(const AttentionParams& p, const Sequence& seq, int64_t h, int64_t m_start,
                    int64_t rows, uint64_t counted) {
    constexpr int kRow = kVectors * kLanes<T>;
    const int64_t token = seq.q_start + m_start;
    load_tile(q, p.query, p.dtype, seq.b, h, token, rows, p.D, kRow);
    load_tile(grad_out, p.grad_out, p.dtype, seq.b, h, token, rows, p.Dv, kRow);
    for (int64_t i = 0; i < kRow; ++i) {
      if (counted >> i & 1) continue;
      fill(q + i * width(p.D), width(p.D), (T)0);
      fill(grad_out + i * width(p.Dv), width(p.Dv), (T)0);
    }
    transpose_tile(kRow, width(p.D), q, width(p.D), q_t, kRow);
    transpose_tile(kRow, width(p.Dv), grad_out, width(p.Dv), grad_out_t, kRow);
  }
  void load_keys(const AttentionParams& p, const KeyTile& keys, const uint64_t* visible) {
    k = key_rows(p, p.key, keys, p.D, visible, k_tile);
    v = key_rows(p, p.value, keys, p.Dv, nullptr, v_tile);
  }
  template <int kVectors>
  void scores(const AttentionParams& p, int64_t columns, T* s, T* dp) const {
    constexpr int kRow = kVectors * kLanes<T>;
    query_scores<kVectors>(p, columns, s);
    multiply<kVectors, false>(columns, p.Dv, v, grad_out_t, kRow, dp, kRow);
  }
  template <int kVectors>
  void query_scores(const AttentionParams& p, int64_t columns, T* s) const {
    constexpr int kRow = kVectors * kLanes<T>;
    multiply<kVectors, false>(columns, p.D, k, q_t, kRow, s, kRow);
  }
  void select_queries(const AttentionParams& p, int64_t rows, uint64_t selected) {
    const bool all = selected == low_bits(rows);
    q_to_add = all ? q : selected_q;
    grad_out_to_add = all ? grad_out : selected_grad_out;
    if (all) return;
    for (int64_t i = 0; i < rows; ++i) {
      const bool counts = selected >> i & 1;
      copy_or_clear(selected_q, q, i, width(p.D), counts);
      copy_or_clear(selected_grad_out, grad_out, i, width(p.Dv), counts);
    }
  }
  static void copy_or_clear(T* dst, const T* src, int64_t row, int64_t width, bool copies) {
    for (int64_t i = row * width; i < (row + 1) * width; i += kLanes<T>) {
      store(dst + i, copies ? load(src + i) : broadcast((T)0));
    }
  }
  template <int kVectors>
  void add_to_dv(const AttentionParams& p, int64_t rows, int64_t columns, const T* weights,
                 T* dv) const {
    multiply_wide(columns, rows, width(p.Dv), Scalars<T>{weights, kVectors * kLanes<T>, 1},
                  grad_out_to_add, width(p.Dv), dv, width(p.Dv));
  }
  template <int kVectors>
  void add_to_dk(const AttentionParams& p, int64_t rows, int64_t columns, const T* ds,
                 T* dk) const {
    multiply_wide(columns, rows, width(p.D), Scalars<T>{ds, kVectors * kLanes<T>, 1}, q_to_add,
                  width(p.D), dk, width(p.D));
  }
  template <int kVectors>
  void add_to_dq(const AttentionParams& p, const KeyTile& keys, const uint64_t*, const T* ds,
                 T* dq_t) const {
    constexpr int kRow = kVectors * kLanes<T>;
    multiply<kVectors, true>(p.D, keys.columns, Scalars<T>{k.data, k.column, k.row}, ds, kRow, dq_t,
                             kRow);
  }
};

#ifdef FUSED_ATTENTION_PAIR_PRODUCTS
// Products of pairs, which lie along head_dim (scores), the queries (dv, dk) or the keys (dq). p
// and ds are rounded to bfloat16.
struct PairProductsBackward : OnVectors {
  using T = float;
  Pair *q, *q_t, *grad_out, *grad_out_t;  // [kBlockM][D / 2 or Dv / 2], and transposed
  Pair *q_rows, *grad_out_rows;           // rows 2 i and 2 i + 1 together: [kBlockM / 2][D or Dv]
  Pair *k_tile, *v_tile;  // [kBlockN][D / 2 or Dv / 2], if they are not read in place
  Pair* k_rows;           // [kBlockN / 2][D]
  uint16_t* rounded;      // p or ds [kBlockN][kBlockM]
  Pair* ds_rows;          // [kBlockN / 2][kBlockM]
  Scalars<Pair> k, v;

  void place(const AttentionParams& p, Arena& arena) {
    constexpr int M = kBlockM<float>;
    q = arena.take<Pair>(M * pair_width(p.D));
    q_t = arena.take<Pair>(M * pair_width(p.D));
    grad_out = arena.take<Pair>(M * pair_width(p.Dv));
    grad_out_t = arena.take<Pair>(M * pair_width(p.Dv));
    q_rows = arena.take<Pair>(M / 2 * paired_rows_width(p.D));
    grad_out_rows = arena.take<Pair>(M / 2 * paired_rows_width(p.Dv));
    k_tile = arena.take<Pair>(rows_in_pairs(p, p.key, p.D) ? 0 : kBlockN * pair_width(p.D));
    v_tile = arena.take<Pair>(rows_in_pairs(p, p.value, p.Dv) ? 0 : kBlockN * pair_width(p.Dv));
    k_rows = arena.take<Pair>(kBlockN / 2 * paired_rows_width(p.D));
    rounded = arena.take<uint16_t>(kBlockN * M);
    ds_rows = arena.take<Pair>(kBlockN / 2 * paired_rows_width(M));
  }

  template <int kVectors>
  void load_queries(const AttentionParams& p, const Sequence& seq, int64_t h, int64_t m_start,
                    int64_t rows, uint64_t counted) {
    constexpr int kRow = kVectors * kLanes<float>;
    const int64_t width = pair_width(p.D), width_v = pair_width(p.Dv);
    for (int64_t r = 0; r < kRow; ++r) {
      const int64_t i = seq.q_start + m_start + (r < rows ? r : 0);
      const bool counts = counted >> r & 1;
      copy_row_of_pairs(q + r * width, row_of(p.query, p.dtype, seq.b, h, i), p.D, counts);
      copy_row_of_pairs(grad_out + r * width_v, row_of(p.grad_out, p.dtype, seq.b, h, i), p.Dv,
                        counts);
    }
    transpose_tile(kRow, width, (const float*)q, width, (float*)q_t, kRow);
    transpose_tile(kRow, width_v, (const float*)grad_out, width_v, (float*)grad_out_t, kRow);
    selected_ = kNone;
  }
  void load_keys(const AttentionParams& p, const KeyTile& keys, const uint64_t*) {
    k = rows_of_pairs(p, p.key, keys, p.D, k_tile);
    v = rows_of_pairs(p, p.value, keys, p.Dv, v_tile);
  }
  template <int kVectors>
  void scores(const AttentionParams& p, int64_t columns, float* s, float* dp) const {
    constexpr int kRow = kVectors * kLanes<float>;
    multiply<kVectors, false>(columns, ceil_div(p.D, 2), k, q_t, kRow, s, kRow);
    multiply<kVectors, false>(columns, ceil_div(p.Dv, 2), v, grad_out_t, kRow, dp, kRow);
  }
  void select_queries(const AttentionParams& p, int64_t rows, uint64_t selected) {
    if (selected == selected_) return;  // the pairs of the tile before serve
    selected_ = selected;
    pair_selected(q, p.D, rows, q_rows);
    pair_selected(grad_out, p.Dv, rows, grad_out_rows);
  }
  void pair_selected(const Pair* src, int64_t D, int64_t rows, Pair* dst) const {
    const int64_t width = pair_width(D);
    for (int64_t r = 0; r < rows; r += 2) {
      const auto *low = (const uint16_t*)(src + r * width), *high = low + 2 * width;
      const uint64_t low_used = 0 - (selected_ >> r & 1), high_used = 0 - (selected_ >> r >> 1 & 1);
      Pair* row = dst + r / 2 * paired_rows_width(D);
      for (int64_t d = 0; d < D; d += 32)
        pair_rows(low + d, low_used, high + d, high_used, row + d);
    }
  }
  template <int kVectors>
  void round(int64_t columns, const float* src) const {
    for (int64_t i = 0; i < columns * kVectors * kLanes<float>; i += kLanes<float>) {
      store_rounded(rounded + i, load(src + i));
    }
  }
  // sums [key][d] += rounded [key][query] factor [query][d]
  template <int kVectors>
  void add_to_keys(int64_t rows, int64_t columns, int64_t D, const Pair* factor,
                   float* sums) const {
    constexpr int kPairs = kVectors * kLanes<float> / 2;
    multiply_wide(columns, ceil_div(rows, 2), round_up(D, kLanes<float>),
                  Scalars<Pair>{(const Pair*)rounded, kPairs, 1}, factor, paired_rows_width(D),
                  sums, round_up(D, kLanes<float>));
  }
  template <int kVectors>
  void add_to_dv(const AttentionParams& p, int64_t rows, int64_t columns, const float* weights,
                 float* dv) const {
    round<kVectors>(columns, weights);
    add_to_keys<kVectors>(rows, columns, p.Dv, grad_out_rows, dv);
  }
  template <int kVectors>
  void add_to_dk(const AttentionParams& p, int64_t rows, int64_t columns, const float* ds,
                 float* dk) const {
    round<kVectors>(columns, ds);
    add_to_keys<kVectors>(rows, columns, p.D, q_rows, dk);
  }
  template <int kVectors>
  void add_to_dq(const AttentionParams& p, const KeyTile& keys, const uint64_t* visible,
                 const float* ds, float* dq_t) const {
    constexpr int kRow = kVectors * kLanes<float>, kWidth = (kRow + 31) / 32 * 32;
    const int64_t columns = keys.columns;
    round<kVectors>(columns, ds);
    for (int64_t j = 0; j < columns; j += 2) {
      const uint16_t* low = rounded + j * kRow;
      const bool odd = j + 1 == columns;
      for (int x = 0; x < kRow; x += 32) {
        const uint64_t valid = low_bits(kRow - x);
        pair_rows(low + x, valid, odd ? low : low + kRow + x, odd ? 0 : valid,
                  ds_rows + j / 2 * kWidth + x);
      }
    }
    pair_rows_of_keys(p, p.key, keys, p.D, visible, k_rows);
    multiply<kVectors, true>(p.D, ceil_div(columns, 2),
                             Scalars<Pair>{k_rows, 1, paired_rows_width(p.D)}, ds_rows, kWidth,
                             dq_t, kRow);
  }

 private:
  static constexpr uint64_t kNone = ~(uint64_t)0;  // no tile has 64 queries
  uint64_t selected_ = kNone;                      // the queries whose rows are paired
};
#endif

}  // namespace
}  // namespace fused_attention
