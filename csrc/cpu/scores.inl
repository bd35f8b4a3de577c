// From q.k to the logits the softmax sees: softcap, bias and ALiBi, for one transposed tile
// s[key][query] (kVectors vectors of queries a row).

// Rows [m_start, m_start + rows), keys [n_start, n_start + columns): [rows][kBlockN].
template <typename T>
void load_scores(const ScoreView& view, int64_t b, int64_t h, int64_t m_start, int64_t rows,
                 int64_t n_start, int64_t columns, T* staged) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t offset = b * view.stride_b + h * view.stride_h + (m_start + i) * view.stride_q +
                           n_start * view.stride_k;
    load_row(staged + i * kBlockN, element(view.data, view.dtype, offset), view.dtype, columns,
             view.stride_k);
  }
}

// s <- logits where a feature asks for it. Returns the factor that still turns s into logits: scale
// for plain scores, else 1. It is positive, so that maxima may be taken before it is applied.
// softcap_slope, if given, gets d logit / d (scale q.k).
template <typename T, int kVectors>
double finish_scores(const AttentionParams& p, const Sequence& seq, int64_t h, int64_t m_start,
                     int64_t rows, int64_t n_start, int64_t columns, T* s, T* bias_staged,
                     T* bias_transposed, T* softcap_slope) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  const bool softcap = p.softcap > 0, bias = p.bias.data != nullptr;
  const bool alibi = p.alibi_slopes != nullptr;
  if (!softcap && !bias && !alibi && p.scale > 0) return p.scale;

  if (softcap) {  // s <- cap * tanh(s * scale / cap)
    const Vec<T> inner = broadcast((T)(p.scale / p.softcap)), one = broadcast((T)1);
    const Vec<T> outer = broadcast((T)p.softcap);
    for (int64_t i = 0; i < columns * kRow; i += W) {
      const Vec<T> t = tanh<T>(mul(load(s + i), inner));
      store(s + i, mul(t, outer));
      if (softcap_slope) store(softcap_slope + i, sub(one, mul(t, t)));
    }
  } else {
    const Vec<T> factor = broadcast((T)p.scale);
    for (int64_t i = 0; i < columns * kRow; i += W) store(s + i, mul(load(s + i), factor));
  }
  if (bias && p.bias.stride_q == 0) {  // one value a key
    load_scores(p.bias, seq.b, h, m_start, 1, n_start, columns, bias_staged);
    for (int64_t j = 0; j < columns; ++j) {
      const Vec<T> value = broadcast(bias_staged[j]);
      for (int x = 0; x < kVectors; ++x) {
        T* at = s + j * kRow + x * W;
        store(at, add(load(at), value));
      }
    }
  } else if (bias) {
    load_scores(p.bias, seq.b, h, m_start, rows, n_start, columns, bias_staged);
    transpose_tile(rows, columns, bias_staged, kBlockN, bias_transposed, kRow);
    for (int64_t i = 0; i < columns * kRow; i += W) {
      store(s + i, add(load(s + i), load(bias_transposed + i)));
    }
  }
  if (alibi) {  // s <- s - slope * |i + off - j|
    const T slope = (T)p.alibi_slopes[seq.b * p.alibi_stride_b + h];
    const Vec<T> negative_slope = broadcast(-slope), lane = iota(T());
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t distance = m_start + seq.diagonal_offset - (n_start + j);
      for (int x = 0; x < kVectors; ++x) {
        T* at = s + j * kRow + x * W;
        const Vec<T> distances = abs(add(lane, broadcast((T)(distance + x * W))));
        store(at, fma(distances, negative_slope, load(at)));
      }
    }
  }
  return 1;
}
