// Online softmax (Milakov & Gimelshein 2018; FlashAttention-2, Dao 2023, Algorithm 1) on a
// transposed tile s[key][query]: every quantity is one vector lane per query, so nothing is reduced
// across lanes. row_max is m_i in the papers, row_sum l_i. Differences of logits are taken before
// they are multiplied by log2 e: a logit of -FLT_MAX, which hides keys in many models, would
// overflow.

// Hidden scores become -inf.
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

// s[j] <- p[j] = exp(s[j] * factor - row_max), with row_max and row_sum brought up to date. Returns
// whether a maximum grew: then what was accumulated before must be multiplied by alpha.
template <typename T, int kVectors>
bool online_softmax_update(int64_t columns, double factor, T* s, T* row_max, T* row_sum, T* alpha) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  const Vec<T> scale = broadcast((T)factor), log2e = broadcast(kLog2e<T>);
  Vec<T> top[kVectors], sum[kVectors];
  for (int x = 0; x < kVectors; ++x) top[x] = broadcast(-kInf<T>);
  for (int64_t j = 0; j < columns; ++j) {
    for (int x = 0; x < kVectors; ++x) top[x] = max(top[x], load(s + j * kRow + x * W));
  }
  bool grew = false;
  for (int x = 0; x < kVectors; ++x) {
    const Vec<T> before = load(row_max + x * W), scaled = mul(top[x], scale);
    grew |= any_gt(scaled, before);
    // m <- max(m, rowmax(s)); the operands' order keeps a NaN of the tile
    const Vec<T> after = max(before, scaled);
    store(row_max + x * W, after);
    // -inf - (-inf) is NaN: a row that saw nothing yet is measured from 0, where all p are 0.
    top[x] = select_lt(after, broadcast(kLowest<T>), broadcast((T)0), after);
    // alpha <- exp(m_old - m_new)
    const Vec<T> rescale = exp2<T>(mul(sub(before, top[x]), log2e));
    store(alpha + x * W, rescale);
    sum[x] = mul(load(row_sum + x * W), rescale);
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int x = 0; x < kVectors; ++x) {
      T* at = s + j * kRow + x * W;
      // p <- exp(s * scale - row_max)
      const Vec<T> distance = fma(load(at), scale, sub(broadcast((T)0), top[x]));
      const Vec<T> weight = exp2<T>(mul(distance, log2e));
      sum[x] = add(sum[x], weight);
      store(at, weight);
    }
  }
  for (int x = 0; x < kVectors; ++x) store(row_sum + x * W, sum[x]);
  return grew;
}

// What a finished row is multiplied by, and its log-sum-exp. The sink is one more logit, without a
// value: it only joins the denominator. A row that saw nothing (row_max = -inf) has weight 0.
template <typename T>
T finish_row(T row_max, T row_sum, const T* sink, T* lse) {
  const double m = (double)row_max;
  double top = m, weight = 1, sum = (double)row_sum;
  if (sink != nullptr) {
    const double logit = (double)*sink;
    top = logit > m ? logit : m;
    weight = m == top ? 1 : __builtin_exp(m - top);
    sum = sum * weight + (logit == top ? 1 : __builtin_exp(logit - top));
  }
  if (top == -__builtin_inf()) {
    *lse = -kInf<T>;
    return 0;
  }
  *lse = (T)(top + __builtin_log(sum));
  return row_max == -kInf<T> ? (T)0 : (T)(weight / sum);
}
