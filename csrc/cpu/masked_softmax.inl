// Softmax of rows, p_j = e^(s_j) / (e^sink + sum_k e^(s_k)) over the visible columns of
//  = scale * x + bias, and its gradient ds = p * (dp - sum_k p_k dp_k). The vector lanes run along
// he row, 64 columns (one word of visibility bits) at a time. A row is taken in blocks, each
// easured from its own maximum; the final factor of each block makes up for that (online softmax,
// ilakov & Gimelshein 2018). A row of up to kSoftmaxRow columns is read once; the weights of a
// onger one are computed twice. Time O(rows * columns), memory O(kSoftmaxRow) per thread, plus two
// its per column.
//
// Task: some rows, as many as make a task worth while (softmax_operators.cpp). For the gradient of
// a broadcast bias: whole groups of rows that share one row of that gradient, or a chunk of a
// group.
#pragma once

#include "philox.inl"
#include "words.inl"

namespace fused_attention {
namespace {

// A block of floats fills a third of a first-level cache, a row half of a small second-level one.
constexpr int64_t kSoftmaxBlock = 4096, kSoftmaxRow = 8 * kSoftmaxBlock;

// -- rows -----------------------------------------------------------------------------------------

// Walks over rows, keeping their offsets in every operand.
struct SoftmaxRows {
  const SoftmaxParams& p;
  int64_t index[SoftmaxParams::kMaxDims], offset[SoftmaxParams::kOperands];

  SoftmaxRows(const SoftmaxParams& params, int64_t row) : p(params) {
    fill(offset, (int64_t)SoftmaxParams::kOperands, (int64_t)0);
    for (int d = p.dims - 1; d >= 0; --d) {
      index[d] = row % p.size[d];
      row /= p.size[d];
      for (int k = 0; k < SoftmaxParams::kOperands; ++k) offset[k] += index[d] * p.stride[k][d];
    }
  }
  void next() {
    for (int d = p.dims - 1; d >= 0; --d) {
      for (int k = 0; k < SoftmaxParams::kOperands; ++k) offset[k] += p.stride[k][d];
      if (++index[d] < p.size[d]) return;
      for (int k = 0; k < SoftmaxParams::kOperands; ++k) offset[k] -= index[d] * p.stride[k][d];
      index[d] = 0;
    }
  }
  int64_t number() const { return offset[SoftmaxParams::kNumber]; }
  int64_t matrix() const { return number() / p.queries; }
  int64_t sink() const {
    const int64_t sample = p.sample_heads == 0 ? 0 : matrix() / p.sample_heads;
    return sample * p.heads + matrix() % p.heads;
  }
  // Returns the number of columns that the diagonal leaves.
  int64_t visible_columns() const {
    if (!p.causal) return p.columns;
    return max_of(0, min_of(p.columns, number() % p.queries + p.diagonal_offset + 1));
  }
};

// Returns the rows of a task.
FA_INLINE Range softmax_task(const SoftmaxParams& p, int64_t task) {
  if (p.chunks == 1) {
    const int64_t group = task * p.groups_per_task;
    return {group * p.group_rows, min_of(p.groups, group + p.groups_per_task) * p.group_rows};
  }
  const int64_t first = task / p.chunks * p.group_rows, chunk = task % p.chunks;
  return {first + p.group_rows * chunk / p.chunks, first + p.group_rows * (chunk + 1) / p.chunks};
}
FA_INLINE int64_t softmax_tasks(const SoftmaxParams& p) {
  return p.chunks == 1 ? ceil_div(p.groups, p.groups_per_task) : p.groups * p.chunks;
}

FA_INLINE void map_output(const SoftmaxParams& p, Range rows) {
  if (p.map_pages == nullptr) return;
  const int64_t row_bytes = p.columns * element_size(p.dtype);
  p.map_pages((char*)p.output + rows.begin * row_bytes, (rows.end - rows.begin) * row_bytes);
}

// -- forward --------------------------------------------------------------------------------------

// s <- scale * x + bias, -inf where hidden and from `count` to the end of the word. Returns max(s),
// which is unspecified if a visible s is NaN.
template <typename T, typename Stored, bool kBias>
T softmax_logits(Stored storage, const typename Stored::Element* x, const T* bias,
                 const uint64_t* visible, int64_t count, T scale, T* s) {
  const Vec<T> factor = broadcast(scale), hidden = broadcast(-kInf<T>);
  typename Stored::Element staged[kWord];
  Vec<T> top[kChains] = {hidden, hidden, hidden, hidden};
  for (int64_t j = 0; j < count; j += kWord) {
    const uint64_t seen = word_bits(visible, j, count);
    T* to = s + j;
    if (seen == 0) {
      fill(to, kWord, -kInf<T>);
      continue;
    }
    const auto* from = whole_word(x, j, count, staged);
    const auto logits = [&](int i) {
      const Vec<T> value = storage.read(from + i);
      return kBias ? fma(value, factor, load(bias + j + i)) : mul(value, factor);
    };
    if (seen == ~(uint64_t)0) {
      each_vector<T>([&](int i, int chain) {
        const Vec<T> value = logits(i);
        top[chain] = max(top[chain], value);
        store(to + i, value);
      });
    } else {
      each_vector<T>([&](int i, int chain) {
        const Vec<T> value = select_bits(seen >> i, logits(i), hidden);
        top[chain] = max(top[chain], value);
        store(to + i, value);
      });
    }
  }
  return reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
}

// The reference and the sum of the weights of a block. Weights are 2^(s * log2 e - reference), with
// log2 e as T holds it. The reference is -inf if the block sees nothing.
struct SoftmaxBlock {
  double reference, sum;
};
// Returns 2^(x - top), also where both are infinite.
FA_INLINE double power_from(double top, double x) {
  return x == top ? 1.0 : __builtin_exp2(x - top);
}

// s <- p. Returns the sum of p. Meanwhile the lines at `next`, `next_bytes` per word, are
// prefetched (addresses need not be valid). kFused saves an operation: top is already in units of
// log2 e.
template <typename T, bool kFused>
T softmax_weights(const uint64_t* visible, int64_t count, T top, T* s, const char* next,
                  int64_t next_bytes) {
  const Vec<T> log2e = broadcast(kLog2e<T>), zero = broadcast((T)0);
  const Vec<T> tops = broadcast(kFused ? -top : top);
  Vec<T> sum[kChains] = {zero, zero, zero, zero};
  for (int64_t j = 0; j < count; j += kWord) {
    for (int64_t line = 0; line < next_bytes; line += 64) __builtin_prefetch(next + line, 0, 2);
    next += next_bytes;
    T* at = s + j;
    if (word_bits(visible, j, count) == 0) {
      fill(at, kWord, (T)0);
      continue;
    }
    each_vector<T>([&](int i, int chain) {
      const Vec<T> x = load(at + i);
      const Vec<T> weight = exp2<T>(kFused ? fma(x, log2e, tops) : mul(sub(x, tops), log2e));
      sum[chain] = add(sum[chain], weight);
      store(at + i, weight);
    });
  }
  return reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}
template <typename T>
SoftmaxBlock softmax_block(const uint64_t* visible, int64_t count, T block_max, T* s,
                           const char* next, int64_t next_bytes) {
  // The fused form rounds s * log2 e - top once, after the subtraction. But top is a rounded
  // product: if the logits are so large (the most negative number as a mask, say) that top is far
  // off or overflows, the maximum is subtracted from s itself.
  constexpr T kFusedMax = 1 << 20;
  if (kFusedMultiplyAdd && block_max > -kFusedMax && block_max < kFusedMax) {
    const T top = block_max * kLog2e<T>;
    return {(double)top,
            (double)softmax_weights<T, true>(visible, count, top, s, next, next_bytes)};
  }
  // A block that saw nothing is measured from 0, since -inf - (-inf) is NaN; all p are then 0.
  const T top = block_max == -kInf<T> ? (T)0 : block_max;
  const T sum = softmax_weights<T, false>(visible, count, top, s, next, next_bytes);
  return {(double)block_max * (double)kLog2e<T>, (double)sum};
}

// dst <- factor * s, 0 where `keep` has no bit.
template <typename T, typename Stored>
void softmax_store(Stored storage, typename Stored::Element* dst, const T* s, const uint64_t* keep,
                   int64_t count, T factor) {
  const Vec<T> scale = broadcast(factor), zero = broadcast((T)0);
  typename Stored::Element staged[kWord];
  for (int64_t j = 0; j < count; j += kWord) {
    auto* to = begin_word(dst, j, count, staged);
    if (keep == nullptr) {
      each_vector<T>([&](int i, int) { storage.write(to + i, mul(scale, load(s + j + i))); });
    } else {
      const uint64_t kept = keep[j / kWord];
      each_vector<T>([&](int i, int) {
        storage.write(to + i, select_bits(kept >> i, mul(scale, load(s + j + i)), zero));
      });
    }
    end_word(dst, j, count, staged);
  }
}

template <typename T>
struct MaskedSoftmax {
  struct Scratch {
    T* s;                      // [kSoftmaxRow]
    T* bias;                   // [kSoftmaxBlock]
    SoftmaxBlock* blocks;      // the blocks of the row
    uint64_t *visible, *keep;  // a bit per column

    size_t place(const SoftmaxParams& p, void* workspace) {
      Arena arena{(char*)workspace, 0};
      const int64_t row = round_up(min_of(p.columns, kSoftmaxRow), kWord);
      const int64_t words = ceil_div(p.columns, kWord) + kKeepSlack;
      s = arena.take<T>(row);
      blocks = arena.take<SoftmaxBlock>(ceil_div(p.columns, kSoftmaxBlock));
      bias = arena.take<T>(p.bias != nullptr ? min_of(row, kSoftmaxBlock) : 0);
      visible = arena.take<uint64_t>(p.mask != nullptr ? words : 0);
      keep = arena.take<uint64_t>(p.dropout_threshold > 0 ? words : 0);
      return arena.used;
    }
  };

  static int64_t num_tasks(const SoftmaxParams& p) { return softmax_tasks(p); }
  static size_t workspace_bytes(const SoftmaxParams& p) { return Scratch().place(p, nullptr); }
  static void run(const SoftmaxParams& p, int64_t begin, int64_t end, void* workspace) {
    Scratch scratch;
    scratch.place(p, workspace);
    for (int64_t task = begin; task < end; ++task) {
      const Range range = softmax_task(p, task);
      map_output(p, range);
      SoftmaxRows row(p, range.begin);
      for (int64_t i = range.begin; i < range.end; ++i, row.next()) {
        forward(p, row, scratch);
      }
    }
  }

  // s <- weights of the `count` columns from j on. `ahead`: bytes from there to what is read next;
  // 0 prefetches nothing.
  static SoftmaxBlock weights(const SoftmaxParams& p, const SoftmaxRows& row, const Scratch& t,
                              const uint64_t* visible, int64_t j, int64_t count, int64_t ahead,
                              T* s) {
    if (p.bias != nullptr) {
      const int64_t offset = row.offset[SoftmaxParams::kBias] + j * p.bias_stride_k;
      load_row(t.bias, element(p.bias, p.bias_dtype, offset), p.bias_dtype, count, p.bias_stride_k);
      fill(t.bias + count, round_up(count, kWord) - count, (T)0);
    }
    SoftmaxBlock block = {};
    with_storage<T>(p.dtype, [&](auto storage) {
      using Stored = decltype(storage);
      const auto* x =
          (const typename Stored::Element*)p.input + row.offset[SoftmaxParams::kInput] + j;
      const auto logits =
          p.bias != nullptr ? softmax_logits<T, Stored, true> : softmax_logits<T, Stored, false>;
      const T top = logits(storage, x, t.bias, visible, count, (T)p.scale, s);
      block = softmax_block(visible, count, top, s, (const char*)x + ahead,
                            ahead != 0 ? kWord * element_size(p.dtype) : 0);
    });
    return block;
  }

  static void forward(const SoftmaxParams& p, const SoftmaxRows& row, const Scratch& t) {
    int64_t columns = row.visible_columns();
    const uint64_t *visible = nullptr, *keep = nullptr;
    if (p.mask != nullptr && columns > 0) {
      const uint8_t* mask = p.mask + row.offset[SoftmaxParams::kMask];
      if (p.mask_stride_k == 0) {
        columns = *mask != 0 ? columns : 0;
      } else {
        mask_row_bits(mask, p.mask_stride_k, columns, t.visible);
        visible = t.visible;
      }
    }
    if (p.dropout_threshold > 0) {
      dropout_keep_row(philox_stream(p, row.matrix()), p.dropout_threshold,
                       (uint32_t)(row.number() % p.queries), 0, columns, t.keep);
      keep = t.keep;
    }

    const bool in_cache = columns <= kSoftmaxRow;
    const int64_t next_row = p.dims > 0 ? p.stride[SoftmaxParams::kInput][p.dims - 1] : 0;
    double top = -__builtin_inf();
    for (int64_t j = 0, b = 0; j < columns; j += kSoftmaxBlock, ++b) {
      const int64_t count = min_of(columns - j, kSoftmaxBlock);
      const int64_t ahead = j + count < columns ? count : next_row - j;
      t.blocks[b] = weights(p, row, t, visible != nullptr ? visible + j / kWord : nullptr, j, count,
                            ahead * element_size(p.dtype), in_cache ? t.s + j : t.s);
      top = t.blocks[b].reference > top ? t.blocks[b].reference : top;
    }
    const double factor = normalise(p, row, t.blocks, ceil_div(columns, kSoftmaxBlock), &top);
    for (int64_t j = 0, b = 0; j < columns; j += kSoftmaxBlock, ++b) {
      const int64_t count = min_of(columns - j, kSoftmaxBlock);
      const uint64_t* seen = visible != nullptr ? visible + j / kWord : nullptr;
      T* s = in_cache ? t.s + j : t.s;
      if (!in_cache) weights(p, row, t, seen, j, count, 0, s);
      T block_factor = (T)(factor * power_from(top, t.blocks[b].reference));
      if (!(factor == factor)) {  // a visible NaN or +inf makes all visible weights NaN
        for (int64_t i = 0; i < count; ++i) {
          s[i] = word_bits(seen, i / kWord * kWord, count) >> (i % kWord) & 1 ? (T)factor : (T)0;
        }
        block_factor = 1;
      }
      emit(p, row, s, keep != nullptr ? keep + j / kWord : nullptr, j, count, block_factor);
    }
    clear(p, p.output, row.offset[SoftmaxParams::kOutput], columns);
    clear(p, p.weights, row.number() * p.columns, columns);
  }

  // Returns the normalizer of weights relative to `top`, which a sink may raise: 1 over the sum of
  // the weights and the sink's weight; 0 for a row that saw nothing.
  static double normalise(const SoftmaxParams& p, const SoftmaxRows& row,
                          const SoftmaxBlock* blocks, int64_t count, double* top) {
    const bool has_sink = p.sinks != nullptr;
    double sink = 0, sum = 0;
    if (has_sink) {
      sink = (double)((const T*)p.sinks)[row.sink()] * (double)kLog2e<T>;
      if (!(sink <= *top)) *top = sink;
    }
    for (int64_t b = 0; b < count; ++b) {
      if (blocks[b].sum != 0) sum += blocks[b].sum * power_from(*top, blocks[b].reference);
    }
    if (has_sink && *top > -__builtin_inf()) sum += power_from(*top, sink);
    if (has_sink && p.sink_weight != nullptr) {
      ((T*)p.sink_weight)[row.number()] = sum == 0 ? (T)0 : (T)(power_from(*top, sink) / sum);
    }
    return sum == 0 ? 0 : 1 / sum;
  }

  // Stores the weights of a block, before dropout if the backward needs them and after it.
  static void emit(const SoftmaxParams& p, const SoftmaxRows& row, const T* s, const uint64_t* keep,
                   int64_t j, int64_t count, T factor) {
    with_storage<T>(p.dtype, [&](auto storage) {
      using Element = typename decltype(storage)::Element;
      if (p.weights != nullptr) {
        softmax_store<T>(storage, (Element*)p.weights + row.number() * p.columns + j, s, nullptr,
                         count, factor);
      }
      softmax_store<T>(storage, (Element*)p.output + row.offset[SoftmaxParams::kOutput] + j, s,
                       keep, count, keep != nullptr ? factor * (T)p.dropout_scale : factor);
    });
  }

  // Sets a row to 0 from column `first` on.
  static void clear(const SoftmaxParams& p, void* data, int64_t offset, int64_t first) {
    if (data == nullptr || first == p.columns) return;
    __builtin_memset(element(data, p.dtype, offset + first), 0,
                     (size_t)((p.columns - first) * element_size(p.dtype)));
  }
};

// -- backward -------------------------------------------------------------------------------------

// Returns dp, the gradient of the weights: grad_out, scaled where kept and 0 where dropped.
template <typename T, typename Stored>
FA_INLINE Vec<T> weight_gradient(Stored storage, const typename Stored::Element* grad,
                                 const uint64_t* keep, int64_t j, int i, Vec<T> dropout_scale) {
  const Vec<T> dp = storage.read(grad + i);
  if (keep == nullptr) return dp;
  return select_bits(keep[j / kWord] >> i, mul(dp, dropout_scale), broadcast((T)0));
}

// delta = sum p * dp
template <typename T, typename Stored>
T softmax_delta(Stored storage, const typename Stored::Element* weights,
                const typename Stored::Element* grad, const uint64_t* keep, int64_t count,
                T dropout_scale) {
  using Element = typename Stored::Element;
  const Vec<T> zero = broadcast((T)0), scale = broadcast(dropout_scale);
  Vec<T> sum[kChains] = {zero, zero, zero, zero};
  Element staged_weights[kWord], staged_grad[kWord];
  for (int64_t j = 0; j < count; j += kWord) {
    const Element* p = whole_word(weights, j, count, staged_weights);
    const Element* dp = whole_word(grad, j, count, staged_grad);
    each_vector<T>([&](int i, int chain) {
      sum[chain] =
          fma(storage.read(p + i), weight_gradient<T>(storage, dp, keep, j, i, scale), sum[chain]);
    });
  }
  return reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

// ds = p * (dp - delta); dx <- scale * ds; the row of dbias <- or += ds.
enum class DBias { kNone, kSet, kAdd };
template <typename T, typename Stored, DBias kDBias>
void softmax_gradient(Stored storage, const typename Stored::Element* weights,
                      const typename Stored::Element* grad, const uint64_t* keep, int64_t count,
                      T dropout_scale, T delta, T scale, typename Stored::Element* dx, T* dbias) {
  using Element = typename Stored::Element;
  const Vec<T> deltas = broadcast(delta), factor = broadcast(scale);
  const Vec<T> kept_scale = broadcast(dropout_scale);
  Element staged_weights[kWord], staged_grad[kWord], staged_dx[kWord];
  for (int64_t j = 0; j < count; j += kWord) {
    const Element* p = whole_word(weights, j, count, staged_weights);
    const Element* dp = whole_word(grad, j, count, staged_grad);
    Element* to = begin_word(dx, j, count, staged_dx);
    each_vector<T>([&](int i, int) {
      const Vec<T> incoming = weight_gradient<T>(storage, dp, keep, j, i, kept_scale);
      const Vec<T> ds = mul(storage.read(p + i), sub(incoming, deltas));
      storage.write(to + i, mul(ds, factor));
      if (kDBias == DBias::kSet) store(dbias + j + i, ds);
      if (kDBias == DBias::kAdd) store(dbias + j + i, add(load(dbias + j + i), ds));
    });
    end_word(dx, j, count, staged_dx);
  }
}

template <typename T>
struct MaskedSoftmaxBackward {
  struct Scratch {
    uint64_t* keep;  // a bit per column
    T* dbias;        // a row of dbias, in whole words

    size_t place(const SoftmaxParams& p, void* workspace) {
      Arena arena{(char*)workspace, 0};
      const int64_t words = ceil_div(p.columns, kWord);
      keep = arena.take<uint64_t>(p.dropout_threshold > 0 ? words + kKeepSlack : 0);
      dbias = arena.take<T>(p.dbias != nullptr ? words * kWord : 0);
      return arena.used;
    }
  };

  static int64_t num_tasks(const SoftmaxParams& p) { return softmax_tasks(p); }
  static size_t workspace_bytes(const SoftmaxParams& p) { return Scratch().place(p, nullptr); }
  static void run(const SoftmaxParams& p, int64_t begin, int64_t end, void* workspace) {
    Scratch scratch;
    scratch.place(p, workspace);
    for (int64_t task = begin; task < end; ++task) {
      const Range range = softmax_task(p, task);
      map_output(p, range);
      SoftmaxRows row(p, range.begin);
      double total = 0;  // of ds, if the bias is broadcast along the columns
      for (int64_t i = range.begin; i < range.end; ++i, row.next()) {
        const bool first = i == range.begin || i % p.group_rows == 0;
        const bool last = i + 1 == range.end || (i + 1) % p.group_rows == 0;
        const bool narrow = p.bias_width == 1 && p.columns > 1;
        backward(p, row, scratch, first || narrow);
        if (p.dbias == nullptr) continue;
        if (narrow) {
          if (first) total = 0;
          for (int64_t j = 0; j < p.columns; ++j) total += (double)scratch.dbias[j];
          scratch.dbias[0] = (T)total;
        }
        if (last && p.chunks == 1) {
          store_row(element(p.dbias, p.bias_dtype, i / p.group_rows * p.bias_width), p.bias_dtype,
                    scratch.dbias, p.bias_width, (T)1);
        } else if (last) {
          __builtin_memcpy((T*)p.partial + task * p.bias_width, scratch.dbias,
                           (size_t)p.bias_width * sizeof(T));
        }
      }
    }
  }

  static void backward(const SoftmaxParams& p, const SoftmaxRows& row, const Scratch& t,
                       bool first) {
    const int64_t columns = row.visible_columns();
    const T dropout_scale = (T)p.dropout_scale, scale = (T)p.scale;
    const uint64_t* keep = nullptr;
    if (p.dropout_threshold > 0) {
      dropout_keep_row(philox_stream(p, row.matrix()), p.dropout_threshold,
                       (uint32_t)(row.number() % p.queries), 0, columns, t.keep);
      keep = t.keep;
    }
    const int64_t input = row.offset[SoftmaxParams::kInput];
    const int64_t grad = row.offset[SoftmaxParams::kGradOut];
    const int64_t output = row.offset[SoftmaxParams::kOutput];
    T delta = 0;
    with_storage<T>(p.dtype, [&](auto storage) {
      using Stored = decltype(storage);
      using Element = typename Stored::Element;
      const Element *weights = (const Element*)p.input + input,
                    *grad_out = (const Element*)p.grad_out + grad;
      Element* dx = (Element*)p.output + output;
      delta = softmax_delta<T>(storage, weights, grad_out, keep, columns, dropout_scale);
      if (!(delta - delta == 0)) {
        delta = careful(p, weights, grad_out, keep, columns, dx, first, t.dbias);
        return;
      }
      const auto compute = p.dbias == nullptr ? softmax_gradient<T, Stored, DBias::kNone>
                           : first            ? softmax_gradient<T, Stored, DBias::kSet>
                                              : softmax_gradient<T, Stored, DBias::kAdd>;
      compute(storage, weights, grad_out, keep, columns, dropout_scale, delta, scale, dx, t.dbias);
    });
    if (columns < p.columns) {
      __builtin_memset(element(p.output, p.dtype, output + columns), 0,
                       (size_t)((p.columns - columns) * element_size(p.dtype)));
      const int64_t padded = round_up(columns, kWord), end = round_up(p.columns, kWord);
      if (p.dbias != nullptr && first && padded < end) fill(t.dbias + padded, end - padded, (T)0);
    }
    if (p.sink_terms != nullptr) {
      // dsink = p_sink * (0 - delta); 0 if the sink has no weight, whatever delta is
      const T share = ((const T*)p.sink_weight)[row.number()];
      ((T*)p.sink_terms)[row.number()] = share == 0 ? (T)0 : -share * delta;
    }
  }

  // Does the same, element by element, for a row with a NaN or infinity: grad_out does not count
  // where the weight is 0, as it is wherever the mask hides. Returns delta.
  template <typename Element>
  static T careful(const SoftmaxParams& p, const Element* weights, const Element* grad,
                   const uint64_t* keep, int64_t columns, Element* dx, bool first, T* dbias) {
    const auto incoming = [&](int64_t j) {
      const T dp = load_element<T>(grad + j, p.dtype);
      if (keep == nullptr) return dp;
      return keep[j / kWord] >> (j % kWord) & 1 ? dp * (T)p.dropout_scale : (T)0;
    };
    T delta = 0;
    for (int64_t j = 0; j < columns; ++j) {
      const T weight = load_element<T>(weights + j, p.dtype);
      if (weight != 0) delta += weight * incoming(j);
    }
    for (int64_t j = 0; j < columns; ++j) {
      const T weight = load_element<T>(weights + j, p.dtype);
      const T ds = weight != 0 ? weight * (incoming(j) - delta) : (T)0;
      store_element<T>(dx + j, p.dtype, ds * (T)p.scale);
      if (p.dbias != nullptr) dbias[j] = first ? ds : dbias[j] + ds;
    }
    if (p.dbias != nullptr && first) {
      fill(dbias + columns, round_up(columns, kWord) - columns, (T)0);
    }
    return delta;
  }
};

// dbias <- the sums of the chunks of each group. Task: kSoftmaxBlock columns of one group.
template <typename T>
struct MaskedSoftmaxBackwardBias {
  static int64_t blocks(const SoftmaxParams& p) { return ceil_div(p.bias_width, kSoftmaxBlock); }
  static int64_t num_tasks(const SoftmaxParams& p) { return p.groups * blocks(p); }
  static size_t workspace_bytes(const SoftmaxParams& p) {
    return (size_t)min_of(p.bias_width, kSoftmaxBlock) * sizeof(T);
  }
  static void run(const SoftmaxParams& p, int64_t begin, int64_t end, void* workspace) {
    T* sum = (T*)workspace;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / blocks(p), first = task % blocks(p) * kSoftmaxBlock;
      const int64_t count = min_of(p.bias_width - first, kSoftmaxBlock);
      fill(sum, count, (T)0);
      for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
        const T* part = (const T*)p.partial + (group * p.chunks + chunk) * p.bias_width + first;
        for (int64_t j = 0; j < count; ++j) sum[j] += part[j];
      }
      store_row(element(p.dbias, p.bias_dtype, group * p.bias_width + first), p.bias_dtype, sum,
                count, (T)1);
    }
  }
};

// dsinks[h] <- the sum of the terms of head h's rows. Task: one head.
template <typename T>
struct MaskedSoftmaxBackwardSinks {
  static int64_t num_tasks(const SoftmaxParams& p) { return p.heads; }
  static size_t workspace_bytes(const SoftmaxParams&) { return 0; }
  static void run(const SoftmaxParams& p, int64_t begin, int64_t end, void*) {
    const int64_t rows = p.groups * p.group_rows, stride = p.heads * p.queries;
    for (int64_t head = begin; head < end; ++head) {
      double sum = 0;
      for (int64_t first = head * p.queries; first < rows; first += stride) {
        const T* terms = (const T*)p.sink_terms + first;
        for (int64_t i = 0; i < p.queries; ++i) sum += (double)terms[i];
      }
      ((T*)p.dsinks)[head] = (T)sum;
    }
  }
};

}  // namespace
}  // namespace fused_attention
