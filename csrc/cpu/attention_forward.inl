// Attention forward: o = softmax(scale q k^T + bias, masked) v and its log-sum-exp, tile by tile,
// never holding more than kBlockM x kBlockN scores (FlashAttention-2, Dao 2023, Algorithm 1).
// Time O(Sq Sk D) over the tiles that somebody sees; memory O(tile) a thread.
//
// Task: one block of kBlockM queries of one head, against its keys kBlockN at a time.

template <typename T>
struct ForwardTile {
  T *q, *q_t;                    // queries [kBlockM][D], transposed [D][kBlockM]
  T* acc_t;                      // unnormalised output, transposed [Dv][kBlockM]
  T* out;                        // its transpose [kBlockM][Dv]
  T* s;                          // scores, then weights [kBlockN][kBlockM]
  T *k, *v;                      // converted keys and values [kBlockN][D or Dv]
  T *bias, *bias_t;              // [kBlockM][kBlockN] and transposed
  T *row_max, *row_sum, *alpha;  // [kBlockM]
  uint64_t *visible, *keep;      // [kBlockN]

  size_t place(const AttentionParams& p, void* workspace) {
    const int64_t width = round_up(p.D, kLanes<T>), width_v = round_up(p.Dv, kLanes<T>);
    Arena arena{(char*)workspace, 0};
    q_t = arena.take<T>(width * kBlockM<T>);
    s = arena.take<T>(kBlockN * kBlockM<T>);
    acc_t = arena.take<T>(width_v * kBlockM<T>);
    row_max = arena.take<T>(kBlockM<T>);
    row_sum = arena.take<T>(kBlockM<T>);
    alpha = arena.take<T>(kBlockM<T>);
    visible = arena.take<uint64_t>(kBlockN);
    keep = arena.take<uint64_t>(kBlockN);
    q = arena.take<T>(kBlockM<T> * width);
    out = arena.take<T>(kBlockM<T> * width_v);
    k = arena.take<T>(kBlockN * p.D);
    v = arena.take<T>(kBlockN * p.Dv);
    const bool has_bias = p.bias.data != nullptr;
    bias = arena.take<T>(has_bias ? kBlockM<T> * kBlockN : 0);
    bias_t = arena.take<T>(has_bias ? kBlockM<T> * kBlockN : 0);
    return arena.used;
  }
};

template <typename T, int kVectors>
void attention_forward_block(const AttentionParams& p, int64_t b, int64_t h, int64_t m_start,
                             int64_t rows, const ForwardTile<T>& t) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  const int64_t width = round_up(p.D, W), width_v = round_up(p.Dv, W);
  const int64_t h_kv = h / (p.Hq / p.Hkv);

  load_tile(t.q, p.query, p.dtype, b, h, m_start, rows, p.D, kRow);
  transpose_tile(kRow, width, t.q, width, t.q_t, kRow);
  fill(t.acc_t, width_v * kRow, (T)0);
  fill(t.row_max, kRow, -kInf<T>);
  fill(t.row_sum, kRow, (T)0);

  const Range keys = visible_keys(p, m_start, m_start + rows);
  for (int64_t n = keys.begin / kBlockN * kBlockN; n < keys.end; n += kBlockN) {
    const int64_t columns = min_of(kBlockN, keys.end - n);
    const Visible seen = tile_visibility(p, b, h, m_start, rows, n, columns, t.visible);
    if (seen == Visible::kNone) continue;

    // s <- k q^T
    const Scalars<T> k = key_rows(p.key, p.dtype, b, h_kv, n, columns, p.D, nullptr, t.k);
    multiply<T, kVectors, false>(columns, p.D, k, t.q_t, kRow, t.s, kRow);
    const double factor = finish_scores<T, kVectors>(p, b, h, m_start, rows, n, columns, t.s,
                                                     t.bias, t.bias_t, nullptr);
    if (seen == Visible::kSome) hide<T, kVectors>(t.visible, columns, t.s);

    // p <- exp2(s - m), l <- alpha l + rowsum(p), o <- alpha o
    if (online_softmax_update<T, kVectors>(columns, factor, t.s, t.row_max, t.row_sum, t.alpha)) {
      for (int64_t d = 0; d < p.Dv; ++d) {
        for (int x = 0; x < kVectors; ++x) {
          T* at = t.acc_t + d * kRow + x * W;
          store(at, mul(load(at), load(t.alpha + x * W)));
        }
      }
    }
    if (p.dropout_threshold > 0) {  // after the sum: the denominator is that of all weights
      dropout_keep_bits(p, b, h, m_start, rows, n, columns, t.keep);
      drop<T, kVectors>(p, t.keep, columns, t.s);
    }
    // o^T <- o^T + v^T p^T
    const Scalars<T> v = key_rows(p.value, p.dtype, b, h_kv, n, columns, p.Dv,
                                  seen == Visible::kSome ? t.visible : nullptr, t.v);
    multiply<T, kVectors, true>(p.Dv, columns, {v.data, v.column, v.row}, t.s, kRow, t.acc_t, kRow);
  }

  transpose_tile(width_v, kRow, t.acc_t, kRow, t.out, width_v);
  for (int64_t i = 0; i < rows; ++i) {
    T* lse = (T*)p.lse;
    T unused, *row_lse = lse ? lse + (b * p.Hq + h) * p.Sq + m_start + i : &unused;
    const T* sink = p.sinks ? (const T*)p.sinks + h : nullptr;
    const T weight = finish_row(t.row_max[i], t.row_sum[i], sink, row_lse);
    // A row that saw nothing is zero even beside a visible NaN, which 0 * NaN would not be.
    if (t.row_max[i] == -kInf<T>) fill(t.out + i * width_v, p.Dv, (T)0);
    store_row(row_of(p.out, p.dtype, b, h, m_start + i), p.dtype, t.out + i * width_v, p.Dv,
              weight);
  }
}

template <typename T>
void attention_forward_tasks(const AttentionParams& p, int64_t begin, int64_t end, void* memory) {
  ForwardTile<T> tile;
  tile.place(p, memory);
  const int64_t blocks = ceil_div(p.Sq, kBlockM<T>);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / blocks / p.Hq, h = task / blocks % p.Hq;
    // The last queries first: under a causal mask they have the most keys.
    const int64_t m_start = (blocks - 1 - task % blocks) * kBlockM<T>;
    const int64_t rows = min_of(kBlockM<T>, p.Sq - m_start);
    with_vectors<T>(rows, [&](auto vectors) {
      attention_forward_block<T, vectors.value>(p, b, h, m_start, rows, tile);
    });
  }
}

template <typename T>
struct AttentionForward {
  static int64_t num_tasks(const AttentionParams& p) {
    return p.B * p.Hq * ceil_div(p.Sq, kBlockM<T>);
  }
  static size_t workspace_bytes(const AttentionParams& p) {
    ForwardTile<T> tile;
    return tile.place(p, nullptr);
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    attention_forward_tasks<T>(p, begin, end, workspace);
  }
};

TileConfig forward_tiles(const AttentionParams& p) {
  return {p.dtype == DType::kFloat64 ? kBlockM<double> : kBlockM<float>, kBlockN};
}
