// Attention forward for few queries against many keys, such as one new token against a cache:
// split-KV decoding. The keys are cut into splits, whose partials are combined in a fixed order
// (Flash-Decoding, Dao et al. 2023). Every key and value is read once, in place, for all queries of
// all heads that share it, so that the time is that of reading them. Time O(Sq Sk D); memory
// O(splits Sq Dv).
//
// A task of the first phase is one split of the keys of one key head, a task of the second is one
// key head. Row r = g * Sq + i is query i of the group's head g. Keys are taken a word (64) at a
// time. The vector lanes run over head_dim in both products, and over keys in between.
#pragma once

#include "masking.inl"
#include "online_softmax.inl"
#include "philox.inl"
#include "scores.inl"
#include "words.inl"

namespace fused_attention {
namespace {

// The most rows of a task: two vectors. With more rows, the ordinary kernel, whose lanes run over
// the queries of one head, is about as fast if query heads share no keys.
constexpr int64_t kMaxDecodeRows = 2 * kLanes<float>;

// A split makes up for storing and combining its partial from about kSplitBytes of keys and values
// on. More than kDecodeTasks tasks serve no machine.
constexpr int64_t kSplitBytes = 1 << 18, kDecodeTasks = 128;

FA_INLINE int64_t decode_rows(const AttentionParams& p) { return p.Hq / p.Hkv * p.Sq; }
FA_INLINE int64_t decode_rows(const AttentionParams& p, const Sequence& seq) {
  return p.Hq / p.Hkv * seq.Sq;
}

FA_INLINE int64_t decode_splits(const AttentionParams& p) {
  const bool window = p.window_left >= 0 && p.window_right >= 0;
  const int64_t keys = window ? min_of(p.Sk, p.window_left + p.Sq + p.window_right) : p.Sk;
  const int64_t bytes = keys * (p.D + p.Dv) * element_size(p.dtype);
  const int64_t wanted = ceil_div(kDecodeTasks, max_of(1, p.B * p.Hkv));
  return max_of(1, min_of(wanted, bytes / kSplitBytes));
}

// The partial of a split: for each row its maximum, its sum and its accumulator.
template <typename T>
struct DecodeResult {
  T *row_max, *row_sum;  // [rows]
  T* acc;                // [rows][width_v]

  size_t place(const AttentionParams& p, void* memory) {
    Arena arena{(char*)memory, 0};
    row_max = arena.take<T>(decode_rows(p));
    row_sum = arena.take<T>(decode_rows(p));
    acc = arena.take<T>(decode_rows(p) * round_up(p.Dv, kLanes<T>));
    return arena.used;
  }
};
template <typename T>
size_t decode_result_bytes(const AttentionParams& p) {
  return DecodeResult<T>().place(p, nullptr);
}

template <typename T>
struct DecodeTile {
  T* q;                       // [rows][width]
  T* s;                       // scores, then weights [rows][kWord]
  T* alpha;                   // [rows]
  T* bias;                    // [kWord]
  T *k, *v;                   // staged keys and values [kWord][width or width_v], or null
  const char **k_at, **v_at;  // the addresses of the rows of this word,
  const char** next_k_at;     // and of the keys of the next word
  int64_t* seen;              // the keys that a head sees
  uint64_t* visible;          // [rows]
  uint64_t* keep;             // [1 + kKeepSlack]
  void* result;               // the partial, if there is only one split

  size_t place(const AttentionParams& p, void* workspace) {
    constexpr int W = kLanes<T>;
    Arena arena{(char*)workspace, 0};
    const int64_t rows = decode_rows(p);
    q = arena.take<T>(rows * round_up(p.D, W));
    s = arena.take<T>(rows * kWord);
    alpha = arena.take<T>(rows);
    bias = arena.take<T>(kWord);
    k_at = arena.take<const char*>(kWord);
    v_at = arena.take<const char*>(kWord);
    next_k_at = arena.take<const char*>(kWord);
    seen = arena.take<int64_t>(kWord);
    visible = arena.take<uint64_t>(rows);
    keep = arena.take<uint64_t>(1 + kKeepSlack);
    result = arena.take<char>((int64_t)decode_result_bytes<T>(p));
    // Rows of whole vectors are read in place; other rows are copied and padded with zeros.
    k = p.D % W != 0 ? arena.take<T>(kWord * round_up(p.D, W)) : nullptr;
    v = p.Dv % W != 0 ? arena.take<T>(kWord * round_up(p.Dv, W)) : nullptr;
    return arena.used;
  }
};

// -- products -------------------------------------------------------------------------------------

// The hardware's prefetchers lose track at the end of a row or page. So each product prefetches
// what the other one reads next, at its own position. Data goes into the second-level cache: a word
// of keys and values is too much for the first.
FA_INLINE void fetch_ahead(const char* at) { __builtin_prefetch(at, 0, 2); }

// s[r][j] <- q[r] . k[j] for kRows rows and W / kRows keys, whose scores fill one vector.
template <typename T, typename Stored, int kRows>
FA_INLINE void score_block(Stored storage, int64_t width, const T* q, const char* const* k_at,
                           const char* const* v_at, T* s) {
  constexpr int W = kLanes<T>, kKeys = W / kRows;
  using Element = typename Stored::Element;
  Vec<T> acc[W];
  for (int n = 0; n < W; ++n) acc[n] = broadcast((T)0);
  for (int64_t d = 0; d < width; d += W) {
    Vec<T> queries[kRows];
    for (int r = 0; r < kRows; ++r) queries[r] = load(q + r * width + d);
    for (int j = 0; j < kKeys; ++j) {
      const Vec<T> key = storage.read((const Element*)k_at[j] + d);
      fetch_ahead((const char*)((const Element*)v_at[j] + d));
      for (int r = 0; r < kRows; ++r) {
        acc[r * kKeys + j] = fma(key, queries[r], acc[r * kKeys + j]);
      }
    }
  }
  T sums[W];
  store(sums, sum_lanes(acc));
  for (int r = 0; r < kRows; ++r) {
    __builtin_memcpy(s + r * kWord, sums + r * kKeys, kKeys * sizeof(T));
  }
}
// Computes the scores of rows [row, rows): in blocks of kRows, then of half as many, and so on.
template <typename T, typename Stored, int kRows>
void scores(Stored storage, int64_t row, int64_t rows, int64_t columns, int64_t width,
            const DecodeTile<T>& t) {
  constexpr int kKeys = kLanes<T> / kRows;
  for (; row + kRows <= rows; row += kRows) {
    for (int64_t j = 0; j < columns; j += kKeys) {
      score_block<T, Stored, kRows>(storage, width, t.q + row * width, t.k_at + j, t.v_at + j,
                                    t.s + row * kWord + j);
    }
  }
  if constexpr (kRows > 1) {
    if (row < rows) scores<T, Stored, kRows / 2>(storage, row, rows, columns, width, t);
  }
}

// acc[r] <- alpha[r] acc[r] + sum over the keys in t.seen of p[r][j] v[j], for kRows rows and
// kVectors vectors. The old acc is added last: sums of sums stay accurate over long rows.
template <typename T, typename Stored, int kRows, int kVectors>
FA_INLINE void value_block(Stored storage, int64_t row, int64_t d, int64_t count, int64_t width,
                           const DecodeTile<T>& t, T* acc) {
  constexpr int W = kLanes<T>;
  using Element = typename Stored::Element;
  Vec<T> sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int x = 0; x < kVectors; ++x) sum[r][x] = broadcast((T)0);
  }
  for (int64_t n = 0; n < count; ++n) {
    const int64_t j = t.seen[n];
    const Element* at = (const Element*)t.v_at[j] + d;
    Vec<T> value[kVectors];
    const Element* next = (const Element*)t.next_k_at[j] + d;
    for (int x = 0; x < kVectors; ++x) {
      value[x] = storage.read(at + x * W);
      fetch_ahead((const char*)(next + x * W));
    }
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> weight = broadcast(t.s[(row + r) * kWord + j]);
      for (int x = 0; x < kVectors; ++x) sum[r][x] = fma(weight, value[x], sum[r][x]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const Vec<T> alpha = broadcast(t.alpha[row + r]);
    for (int x = 0; x < kVectors; ++x) {
      T* at = acc + (row + r) * width + d + x * W;
      store(at, fma(load(at), alpha, sum[r][x]));
    }
  }
}
template <typename T, typename Stored, int kRows, int kVectors>
void value_vectors(Stored storage, int64_t row, int64_t d, int64_t count, int64_t width,
                   const DecodeTile<T>& t, T* acc) {
  for (; d + kVectors * kLanes<T> <= width; d += kVectors * kLanes<T>) {
    value_block<T, Stored, kRows, kVectors>(storage, row, d, count, width, t, acc);
  }
  if constexpr (kVectors > 1) {
    if (d < width) {
      value_vectors<T, Stored, kRows, kVectors / 2>(storage, row, d, count, width, t, acc);
    }
  }
}
template <typename T, typename Stored, int kRows>
void values(Stored storage, int64_t row, int64_t rows, int64_t count, int64_t width,
            const DecodeTile<T>& t, T* acc) {
  constexpr int kFit = kVectorRegisters / 2 / kRows, kVectors = kFit < 8 ? kFit : 8;
  for (; row + kRows <= rows; row += kRows) {
    value_vectors<T, Stored, kRows, kVectors>(storage, row, 0, count, width, t, acc);
  }
  if constexpr (kRows > 1) {
    if (row < rows) values<T, Stored, kRows / 2>(storage, row, rows, count, width, t, acc);
  }
}
template <typename T>
constexpr int kDecodeBlockRows = kLanes<T> < 4 ? kLanes<T> : 4;

// -- between the products -------------------------------------------------------------------------

// Sets bit j if query i of head h may attend to key n + j. `unpadded` has the keys that key padding
// leaves.
uint64_t decode_visible(const AttentionParams& p, const Sequence& seq, int64_t h, int64_t i,
                        int64_t n, int64_t columns, uint64_t unpadded) {
  const Range keys = visible_keys(p, seq, i, i + 1);
  uint64_t visible = unpadded & low_bits(keys.end - n) & ~low_bits(keys.begin - n);
  if (p.mask.data != nullptr) {
    const uint8_t* mask = (const uint8_t*)p.mask.data + seq.b * p.mask.stride_b +
                          h * p.mask.stride_h + i * p.mask.stride_q + n * p.mask.stride_k;
    uint64_t bits;
    mask_row_bits(mask, p.mask.stride_k, columns, &bits);
    visible &= bits;
  }
  return visible;
}

// s <- logits of query i of head h for the keys [n, n + columns); -inf where hidden. Returns their
// maximum, which is unspecified if a visible logit is NaN.
template <typename T>
T decode_logits(const AttentionParams& p, const Sequence& seq, int64_t h, int64_t i, int64_t n,
                int64_t columns, uint64_t visible, T* bias, T* s) {
  const bool has_bias = p.bias.data != nullptr, alibi = p.alibi_slopes != nullptr;
  map_scores<T>(p, kWord, s, nullptr, nullptr);
  if (has_bias) {
    const ScoreView& view = p.bias;
    const int64_t offset =
        seq.b * view.stride_b + h * view.stride_h + i * view.stride_q + n * view.stride_k;
    load_row(bias, element(view.data, view.dtype, offset), view.dtype, columns, view.stride_k);
    fill(bias + columns, kWord - columns, (T)0);
    each_vector<T>([&](int j, int) { store(s + j, add(load(s + j), load(bias + j))); });
  }
  if (alibi) {  // s <- s - slope * |i + off - j|
    const Vec<T> negative_slope = broadcast((T)-p.alibi_slopes[seq.b * p.alibi_stride_b + h]);
    const int64_t diagonal = i + seq.diagonal_offset - n;
    each_vector<T>([&](int j, int) {
      const Vec<T> distance = abs(sub(broadcast((T)(diagonal - j)), iota(T())));
      store(s + j, fma(distance, negative_slope, load(s + j)));
    });
  }
  const Vec<T> hidden = broadcast(-kInf<T>);
  Vec<T> top[kChains] = {hidden, hidden, hidden, hidden};
  each_vector<T>([&](int j, int chain) {
    const Vec<T> logit = select_bits(visible >> j, load(s + j), hidden);
    top[chain] = max(top[chain], logit);
    store(s + j, logit);
  });
  return reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
}

// Updates row_max and row_sum; s <- p = exp(s - row_max). Returns alpha, the factor that rescales
// the accumulator.
template <typename T>
T decode_softmax(T block_max, T* s, T* row_max, T* row_sum) {
  const T before = *row_max, after = before < block_max ? block_max : before;
  // A row that saw nothing yet is measured from 0, since -inf - (-inf) is NaN; all p are then 0.
  const Vec<T> top = broadcast(after == -kInf<T> ? (T)0 : after), log2e = broadcast(kLog2e<T>);
  const Vec<T> zero = broadcast((T)0);
  Vec<T> sum[kChains] = {zero, zero, zero, zero};
  each_vector<T>([&](int j, int chain) {
    const Vec<T> weight = exp2<T>(mul(sub(load(s + j), top), log2e));
    sum[chain] = add(sum[chain], weight);
    store(s + j, weight);
  });
  T scratch[kLanes<T>];
  store(scratch, exp2<T>(mul(sub(broadcast(before), top), log2e)));
  const T alpha = scratch[0];
  *row_sum = *row_sum * alpha + reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
  // A visible NaN is in the sum, but the maximum may have missed it, and splits are combined by
  // their maxima.
  *row_max = *row_sum == *row_sum ? after : *row_sum;
  return alpha;
}

// list <- the indices of the bits that are set. Returns how many there are.
FA_INLINE int64_t list_bits(uint64_t set, int64_t* list) {
  int64_t count = 0;
  for (; set != 0; set &= set - 1) list[count++] = __builtin_ctzll(set);
  return count;
}

// -- phases ---------------------------------------------------------------------------------------

// at[j] <- the address of the row of key n + j; past the last key, up to the end of the word, that
// of the last key.
void decode_addresses(const AttentionParams& p, const TensorView& view, const Sequence& seq,
                      int64_t h, int64_t n, int64_t n_end, const char** at) {
  const int64_t columns = min_of(kWord, n_end - n);
  key_addresses(p, view, seq, h, n, columns, at);
  for (int64_t j = columns; j < kWord; ++j) at[j] = at[columns - 1];
}

// Converts rows that are not whole vectors, pads them with zeros, and points at[j] to the copies.
template <typename T>
void decode_stage(DType dtype, int64_t columns, int64_t width, T* staged, const char** at) {
  const int64_t padded = round_up(width, kLanes<T>);
  for (int64_t j = 0; j < kWord; ++j) {
    T* row = staged + min_of(j, columns - 1) * padded;
    if (j < columns) {
      load_row(row, at[j], dtype, width);
      fill(row + width, padded - width, (T)0);
    }
    at[j] = (const char*)row;
  }
}

// Takes one word of keys, from n on, for all rows of the task, whose keys end at n_end.
template <typename T>
void decode_word(const AttentionParams& p, const Sequence& seq, int64_t h_kv, int64_t n,
                 int64_t n_end, const DecodeTile<T>& t, const DecodeResult<T>& result) {
  const int64_t rows = decode_rows(p, seq), group = p.Hq / p.Hkv;
  const int64_t columns = min_of(kWord, n_end - n);
  const int64_t width = round_up(p.D, kLanes<T>), width_v = round_up(p.Dv, kLanes<T>);
  const DType native = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

  uint64_t unpadded = low_bits(columns), anybody = 0;
  if (p.key_padding_mask != nullptr) {
    const uint8_t* padding =
        p.key_padding_mask + seq.b * p.key_padding_stride_b + n * p.key_padding_stride_k;
    uint64_t padded;
    mask_row_bits(padding, p.key_padding_stride_k, columns, &padded);
    unpadded &= ~padded;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t h = h_kv * group + r / seq.Sq;
    t.visible[r] = decode_visible(p, seq, h, r % seq.Sq, n, columns, unpadded);
    anybody |= t.visible[r];
  }
  if (anybody == 0) return;

  decode_addresses(p, p.key, seq, h_kv, n, n_end, t.k_at);
  decode_addresses(p, p.value, seq, h_kv, n, n_end, t.v_at);
  decode_addresses(p, p.key, seq, h_kv, n + kWord < n_end ? n + kWord : n, n_end, t.next_k_at);
  if (t.k != nullptr) decode_stage(p.dtype, columns, p.D, t.k, t.k_at);
  if (t.v != nullptr) decode_stage(p.dtype, columns, p.Dv, t.v, t.v_at);

  // s <- q k^T
  with_storage<T>(t.k != nullptr ? native : p.dtype, [&](auto storage) {
    scores<T, decltype(storage), kDecodeBlockRows<T>>(storage, 0, rows, columns, width, t);
  });

  // p <- exp(s - m), l <- alpha l + rowsum(p)
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t h = h_kv * group + r / seq.Sq, i = r % seq.Sq;
    T* s = t.s + r * kWord;
    const T top = decode_logits(p, seq, h, i, n, columns, t.visible[r], t.bias, s);
    t.alpha[r] = decode_softmax(top, s, result.row_max + r, result.row_sum + r);
    if (p.dropout_threshold > 0) {  // after the sum, since the denominator counts all weights
      dropout_keep_row(attention_stream(p, seq.b, h), p.dropout_threshold,
                       (uint32_t)i + p.dropout_row, n + 8 * (int64_t)p.dropout_group, columns,
                       t.keep);
      const Vec<T> zero = broadcast((T)0);
      each_vector<T>(
          [&](int j, int) { store(s + j, select_bits(*t.keep >> j, load(s + j), zero)); });
    }
  }

  // o <- alpha o + p v, without the keys that no query of a head sees: 0 * NaN is not 0.
  const auto head_sees = [&](int64_t r) {
    uint64_t seen = 0;
    for (int64_t i = 0; i < seq.Sq; ++i) seen |= t.visible[r + i];
    return seen;
  };
  for (int64_t r = 0, end; r < rows; r = end) {
    const uint64_t seen = head_sees(r);
    for (end = r + seq.Sq; end < rows && head_sees(end) == seen;) end += seq.Sq;
    const int64_t count = list_bits(seen, t.seen);
    with_storage<T>(t.v != nullptr ? native : p.dtype, [&](auto storage) {
      values<T, decltype(storage), kDecodeBlockRows<T>>(storage, r, end, count, width_v, t,
                                                        result.acc);
    });
  }
}

// Stores the output and lse of one row, from its maximum, sum and accumulator.
template <typename T>
void decode_finish(const AttentionParams& p, const Sequence& seq, int64_t h, int64_t i, T row_max,
                   T row_sum, T* acc) {
  const T* sink = sink_of<T>(p, seq.b, h);
  if (p.lse != nullptr) {
    *lse_of<T>(p, seq, h, i) = log_sum_exp(row_max, row_sum, sink);
  }
  T weight = row_normalizer(row_max, row_sum, sink);
  if (p.dropout_threshold > 0) weight *= (T)p.dropout_scale;
  // A row that saw nothing is 0, even beside a NaN that another query sees: 0 * NaN is not 0.
  if (saw_nothing(row_sum)) fill(acc, p.Dv, (T)0);
  store_row(row_of(p.out, p.dtype, seq.b, h, seq.q_start + i), p.dtype, acc, p.Dv, weight);
}

template <typename T>
struct DecodeSplit {
  static int64_t num_tasks(const AttentionParams& p) { return p.B * p.Hkv * decode_splits(p); }
  static size_t workspace_bytes(const AttentionParams& p) {
    return DecodeTile<T>().place(p, nullptr);
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    DecodeTile<T> tile;
    tile.place(p, workspace);
    const int64_t splits = decode_splits(p);
    for (int64_t task = begin; task < end; ++task) {
      const Sequence seq = sequence_of(p, task / splits / p.Hkv);
      if (seq.Sq > 0) split(p, seq, task / splits % p.Hkv, task % splits, splits, tile);
    }
  }

  static void split(const AttentionParams& p, const Sequence& seq, int64_t h_kv, int64_t split,
                    int64_t splits, const DecodeTile<T>& t) {
    const int64_t rows = decode_rows(p, seq), group = p.Hq / p.Hkv;
    const int64_t width = round_up(p.D, kLanes<T>), width_v = round_up(p.Dv, kLanes<T>);
    const int64_t number = (seq.b * p.Hkv + h_kv) * splits + split;
    DecodeResult<T> result;
    result.place(p, splits == 1
                        ? t.result
                        : (char*)p.call_workspace + number * (int64_t)decode_result_bytes<T>(p));
    fill(result.row_max, rows, -kInf<T>);
    fill(result.row_sum, rows, (T)0);
    fill(result.acc, rows * width_v, (T)0);
    for (int64_t g = 0; g < group; ++g) {
      load_tile(t.q + g * seq.Sq * width, p.query, p.dtype, seq.b, h_kv * group + g, seq.q_start,
                seq.Sq, p.D, seq.Sq);
    }

    const Range keys = visible_keys(p, seq, 0, seq.Sq);
    const int64_t first = keys.begin / kWord, words = ceil_div(keys.end, kWord) - first;
    const int64_t n_end = min_of(keys.end, (first + words * (split + 1) / splits) * kWord);
    for (int64_t n = (first + words * split / splits) * kWord; n < n_end; n += kWord) {
      decode_word(p, seq, h_kv, n, n_end, t, result);
    }
    for (int64_t r = 0; splits == 1 && r < rows; ++r) {
      decode_finish(p, seq, h_kv * group + r / seq.Sq, r % seq.Sq, result.row_max[r],
                    result.row_sum[r], result.acc + r * width_v);
    }
  }
};

// o <- sum_s exp(m_s - m) o_s / sum_s exp(m_s - m) l_s, m the largest of the splits' maxima m_s.
template <typename T>
struct DecodeCombine {
  static int64_t num_tasks(const AttentionParams& p) {
    return decode_splits(p) > 1 ? p.B * p.Hkv : 0;
  }
  static size_t workspace_bytes(const AttentionParams& p) {
    return (size_t)round_up(p.Dv, kLanes<T>) * sizeof(T);
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    T* acc = (T*)workspace;
    for (int64_t task = begin; task < end; ++task) {
      const Sequence seq = sequence_of(p, task / p.Hkv);
      for (int64_t r = 0; r < decode_rows(p, seq); ++r) {
        combine(p, seq, task, r, acc);
      }
    }
  }

  static void combine(const AttentionParams& p, const Sequence& seq, int64_t task, int64_t r,
                      T* acc) {
    const int64_t splits = decode_splits(p), width_v = round_up(p.Dv, kLanes<T>);
    const int64_t bytes = (int64_t)decode_result_bytes<T>(p);
    const auto result = [&](int64_t split) {
      DecodeResult<T> of_split;
      of_split.place(p, (char*)p.call_workspace + (task * splits + split) * bytes);
      return of_split;
    };
    T row_max = -kInf<T>;
    double row_sum = 0;
    for (int64_t split = 0; split < splits; ++split) {
      const T m = result(split).row_max[r];
      row_max = row_max != row_max || m <= row_max ? row_max : m;  // a NaN stays
    }
    fill(acc, width_v, (T)0);
    for (int64_t split = 0; split < splits; ++split) {
      const DecodeResult<T> part = result(split);
      if (saw_nothing(part.row_sum[r])) continue;
      const double weight = __builtin_exp((double)part.row_max[r] - (double)row_max);
      row_sum += weight * (double)part.row_sum[r];
      const Vec<T> factor = broadcast((T)weight);
      for (int64_t d = 0; d < width_v; d += kLanes<T>) {
        store(acc + d, fma(factor, load(part.acc + r * width_v + d), load(acc + d)));
      }
    }
    const int64_t h = task % p.Hkv * (p.Hq / p.Hkv) + r / seq.Sq;
    decode_finish(p, seq, h, r % seq.Sq, row_max, (T)row_sum, acc);
  }
};

// -- the kernel's entry in the table --------------------------------------------------------------

bool decode_serves(const AttentionParams& p) {
  if (p.Hkv == 0 || p.Sq == 0) return false;
  int64_t most = kMaxDecodeRows;
#if defined(FUSED_ATTENTION_PAIR_PRODUCTS) || defined(FUSED_ATTENTION_AMX_PRODUCTS)
  // The ordinary kernel multiplies bfloat16 faster than float; this one does not.
  if (p.dtype == DType::kBFloat16 && p.Hq == p.Hkv) most = p.Sk <= 64 ? 12 : 28;
#endif
  return decode_rows(p) <= most;
}
TileConfig decode_tiles(const AttentionParams& p) { return {decode_rows(p), kWord}; }
size_t decode_call_workspace_bytes(const AttentionParams& p) {
  const int64_t splits = decode_splits(p);
  const size_t bytes =
      p.dtype == DType::kFloat64 ? decode_result_bytes<double>(p) : decode_result_bytes<float>(p);
  return splits > 1 ? (size_t)(p.B * p.Hkv * splits) * bytes : 0;
}

}  // namespace
}  // namespace fused_attention
