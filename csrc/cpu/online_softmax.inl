// Online softmax (Milakov & Gimelshein 2018; FlashAttention-2, Dao 2023, Algorithm 1) on a
// transposed tile s[key][query]: every quantity has one vector lane per query, so nothing is
// reduced across lanes. row_max is m_i in the papers, row_sum l_i. Logits are subtracted before the
// difference is multiplied by log2 e: a logit of -FLT_MAX, which hides keys in many models, would
// overflow.
#pragma once

#include "tiles.inl"

namespace fused_attention {
namespace {

// Sets hidden scores to -inf.
template <typename T, int kVectors>
void hide(const uint64_t* visible, int64_t columns, T* s) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  for (int64_t j = 0; j < columns; ++j) {
    for (int x = 0; x < kVectors; ++x) {
      T* at = s + j * kRow + x * W;
      store(at, select_bits(visible[j] >> (x * W), load(at), broadcast(-kInf<T>)));
    }
  }
}

// The online softmax state of each query.
template <typename T>
struct RowState {
  T *max, *sum;
  T* rounded_sum;  // the sum of the rounded weights, if the products round them for p v
  T* alpha;        // rescales the accumulator for the last tile
};
// Whether a finished row saw nothing: no visible key, or logits of -inf only. Its weights add up to
// exactly 0. Any other row has a weight of about 1 at its maximum, or a sum that is NaN. The
// maximum itself cannot tell: it loses a NaN that hidden keys follow.
template <typename T>
FA_INLINE bool saw_nothing(T row_sum) {
  return row_sum == 0;
}
// Returns the maximum from which a row is measured. For a row that saw nothing yet it is 0, since
// -inf - (-inf) is NaN; all p are then 0.
template <typename T>
FA_INLINE Vec<T> finite_max(Vec<T> max) {
  return select_lt(max, broadcast(kLowest<T>), broadcast((T)0), max);
}
template <typename T>
void start(const RowState<T>& rows, int64_t count) {
  fill(rows.max, count, -kInf<T>);
  fill(rows.sum, count, (T)0);
  fill(rows.rounded_sum, count, (T)0);
}

// Raises row_max for one more tile of scores s * factor, and rescales row_sum, which does not
// include the tile's weights yet. Returns whether a maximum grew: the accumulator and rounded_sum
// must then be rescaled by alpha. A maximum may lag behind by at most `rescale_threshold`.
template <typename T, int kVectors>
bool raise_max(int64_t columns, double factor, T rescale_threshold, const T* s,
               const RowState<T>& rows) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  Vec<T> top[kVectors];
  for (int x = 0; x < kVectors; ++x) top[x] = broadcast(-kInf<T>);
  for (int64_t j = 0; j < columns; ++j) {
    for (int x = 0; x < kVectors; ++x) top[x] = max(top[x], load(s + j * kRow + x * W));
  }
  bool grew = false;
  for (int x = 0; x < kVectors; ++x) {
    const Vec<T> before = load(rows.max + x * W), scaled = mul(top[x], broadcast((T)factor));
    const Vec<T> limit = add(before, broadcast(rescale_threshold));
    grew |= any_gt(scaled, limit);
    // m <- max(m, rowmax(s)) where a maximum grew, and nowhere else: alpha is 1 for the other rows.
    // A NaN of the tile does not raise the maximum, but row_sum gets it.
    const Vec<T> after = select_lt(limit, scaled, scaled, before);
    store(rows.max + x * W, after);
    // alpha <- exp(m_old - m_new), l <- alpha l
    const Vec<T> alpha = exp2<T>(mul(sub(before, finite_max<T>(after)), broadcast(kLog2e<T>)));
    store(rows.alpha + x * W, alpha);
    store(rows.sum + x * W, mul(load(rows.sum + x * W), alpha));
  }
  return grew;
}

// Computes the weights p = exp(s * factor - row_max) of a tile, one vector at a time. They are
// added up on their own before their sum goes to row_sum: added one by one to the sum of a long
// row, they would lose their last bits.
template <typename T, int kVectors>
class Probabilities {
 public:
  Probabilities(double factor, const RowState<T>& rows) : factor_(broadcast((T)factor)) {
    for (int x = 0; x < kVectors; ++x) {
      max_[x] = finite_max<T>(load(rows.max + x * kLanes<T>));
      sum_[x] = broadcast((T)0);
    }
  }
  // Returns the weights of the scores at s, which belong to vector x of queries.
  FA_INLINE Vec<T> operator()(const T* s, int x) {
    const Vec<T> distance = fma_once(load(s), factor_, sub(broadcast((T)0), max_[x]));
    const Vec<T> weight = exp2<T>(mul(distance, broadcast(kLog2e<T>)));
    sum_[x] = add(sum_[x], weight);
    return weight;
  }
  // Overwrites the scores of the tile by their weights.
  void replace(int64_t columns, T* s) {
    for (int64_t j = 0; j < columns; ++j) {
      for (int x = 0; x < kVectors; ++x) {
        T* at = s + (j * kVectors + x) * kLanes<T>;
        store(at, (*this)(at, x));
      }
    }
  }
  void add_sums(const RowState<T>& rows) const {
    for (int x = 0; x < kVectors; ++x) {
      T* sum = rows.sum + x * kLanes<T>;
      store(sum, add(load(sum), sum_[x]));
    }
  }

 private:
  Vec<T> factor_, max_[kVectors], sum_[kVectors];
};

// Returns the sink of one head, or null.
template <typename T>
FA_INLINE const T* sink_of(const AttentionParams& p, int64_t b, int64_t h) {
  if (p.sinks == nullptr) return nullptr;
  const int64_t sample = p.sample_heads == 0 ? 0 : b * p.Hq / p.sample_heads;
  return (const T*)p.sinks + sample * p.Hq + h;
}
FA_INLINE int64_t samples_of(const AttentionParams& p) {
  return p.sample_heads == 0 ? 1 : p.B * p.Hq / p.sample_heads;
}
FA_INLINE int64_t batch_of_a_sample(const AttentionParams& p) {
  return p.sample_heads == 0 ? p.B : p.sample_heads / p.Hq;
}

// The sink is one more logit, without a value: it only joins the denominator.
struct Denominator {
  double top, sum;  // the denominator is sum * exp(top)
};
template <typename T>
Denominator denominator(T row_max, T row_sum, const T* sink) {
  const double m = (double)row_max, sum = (double)row_sum;
  if (sink == nullptr) return {m, sum};
  const double logit = (double)*sink, top = logit > m ? logit : m;
  return {top, sum * (m == top ? 1 : __builtin_exp(m - top)) +
                   (logit == top ? 1 : __builtin_exp(logit - top))};
}

// Returns the lse of a row, -inf if there is neither a visible key nor a sink.
template <typename T>
T log_sum_exp(T row_max, T row_sum, const T* sink) {
  const Denominator all = denominator(row_max, row_sum, sink);
  if (saw_nothing(row_sum) && all.top == -__builtin_inf()) return -kInf<T>;
  return (T)(all.top + __builtin_log(all.sum));
}

// Returns the normalizer of a finished row, 0 if the row saw nothing.
template <typename T>
T row_normalizer(T row_max, T row_sum, const T* sink) {
  if (saw_nothing(row_sum)) return 0;
  const Denominator all = denominator(row_max, row_sum, sink);
  return (T)((row_max == (T)all.top ? 1 : __builtin_exp((double)row_max - all.top)) / all.sum);
}

}  // namespace
}  // namespace fused_attention
