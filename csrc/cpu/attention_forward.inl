// Attention forward: o = softmax(scale q k^T + bias, masked) v and its log-sum-exp, tile by tile,
// never holding more than kBlockM x kBlockN scores (FlashAttention-2, Dao 2023, Algorithm 1).
// Time O(Sq Sk D) over the tiles that somebody sees; memory O(tile) a thread.
//
// Task: one block of kBlockM queries of one head, against its keys kBlockN at a time.

template <typename Arithmetic>
struct ForwardTile {
  using T = typename Arithmetic::T;
  Arithmetic products;       // with the queries, keys and values as it wants them
  T* acc_t;                  // unnormalised output, transposed [Dv][kBlockM]
  T* out;                    // its transpose [kBlockM][Dv]
  T* s;                      // scores, then weights [kBlockN][kBlockM]
  T *bias, *bias_t;          // [kBlockM][kBlockN] and transposed
  RowState<T> softmax;       // [kBlockM]
  uint64_t *visible, *keep;  // [kBlockN]

  size_t place(const AttentionParams& p, void* workspace) {
    const int64_t width_v = round_up(p.Dv, kLanes<T>);
    Arena arena{(char*)workspace, 0};
    s = arena.take<T>(kBlockN * kBlockM<T>);
    acc_t = arena.take<T>(width_v * kBlockM<T>);
    softmax.max = arena.take<T>(kBlockM<T>);
    softmax.sum = arena.take<T>(kBlockM<T>);
    softmax.rounded_sum = arena.take<T>(kBlockM<T>);
    softmax.alpha = arena.take<T>(kBlockM<T>);
    visible = arena.take<uint64_t>(kBlockN);
    keep = arena.take<uint64_t>(kBlockN);
    out = arena.take<T>(kBlockM<T> * width_v);
    products.place(p, arena);
    const bool has_bias = p.bias.data != nullptr;
    bias = arena.take<T>(has_bias ? kBlockM<T> * kBlockN : 0);
    bias_t = arena.take<T>(has_bias ? kBlockM<T> * kBlockN : 0);
    return arena.used;
  }
};

template <int kVectors, typename Arithmetic>
void attention_forward_block(const AttentionParams& p, const Sequence& seq, int64_t h,
                             int64_t m_start, int64_t rows, const ForwardTile<Arithmetic>& t) {
  using T = typename Arithmetic::T;
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  const int64_t width_v = round_up(p.Dv, W);
  const int64_t h_kv = h / (p.Hq / p.Hkv);

  t.products.template load_queries<kVectors>(p, seq, h, m_start, rows);
  fill(t.acc_t, width_v * kRow, (T)0);
  start(t.softmax, kRow);

  const Range keys = visible_keys(p, seq, m_start, m_start + rows);
  for (int64_t n = keys.begin / kBlockN * kBlockN; n < keys.end; n += kBlockN) {
    const int64_t columns = min_of(kBlockN, keys.end - n);
    const Visible seen = tile_visibility(p, seq, h, m_start, rows, n, columns, t.visible);
    if (seen == Visible::kNone) continue;

    // s <- k q^T
    t.products.template scores<kVectors>(p, seq, h_kv, n, columns, t.s);
    const double factor = finish_scores<T, kVectors>(p, seq, h, m_start, rows, n, columns, t.s,
                                                     t.bias, t.bias_t, nullptr);
    if (seen == Visible::kSome) hide<T, kVectors>(t.visible, columns, t.s);

    // p <- exp2(s - m), l <- alpha l + rowsum(p), o <- alpha o
    if (online_softmax_update<Arithmetic, kVectors>(columns, factor, t.s, t.softmax)) {
      for (int64_t d = 0; d < p.Dv; ++d) {
        for (int x = 0; x < kVectors; ++x) {
          T* at = t.acc_t + d * kRow + x * W;
          store(at, mul(load(at), load(t.softmax.alpha + x * W)));
        }
      }
    }
    if (p.dropout_threshold > 0) {  // after the sum: the denominator is that of all weights
      dropout_keep_bits(p, seq.b, h, m_start, rows, n, columns, t.keep);
      drop<T, kVectors>(t.keep, columns, t.s);
    }
    // o^T <- o^T + v^T p^T
    t.products.template accumulate<kVectors>(
        p, seq, h_kv, n, columns, seen == Visible::kSome ? t.visible : nullptr, t.s, t.acc_t);
  }

  transpose_tile(width_v, kRow, t.acc_t, kRow, t.out, width_v);
  for (int64_t i = 0; i < rows; ++i) {
    const T* sink = p.sinks ? (const T*)p.sinks + h : nullptr;
    const T max = t.softmax.max[i];
    if (p.lse != nullptr) {
      *lse_of<T>(p, seq, h, m_start + i) = log_sum_exp(max, t.softmax.sum[i], sink);
    }
    T weight =
        row_weight(max, (Arithmetic::kRounds ? t.softmax.rounded_sum : t.softmax.sum)[i], sink);
    if (p.dropout_threshold > 0) weight *= (T)p.dropout_scale;
    // A row that saw nothing is zero even beside a visible NaN, which 0 * NaN would not be.
    if (max == -kInf<T>) fill(t.out + i * width_v, p.Dv, (T)0);
    store_row(row_of(p.out, p.dtype, seq.b, h, seq.q_start + m_start + i), p.dtype,
              t.out + i * width_v, p.Dv, weight);
  }
}

template <typename Arithmetic>
void attention_forward_tasks(const AttentionParams& p, int64_t begin, int64_t end, void* memory) {
  using T = typename Arithmetic::T;
  ForwardTile<Arithmetic> tile;
  tile.place(p, memory);
  for (int64_t task = begin; task < end; ++task) {
    const QueryBlock block = query_block(p, task, kBlockM<T>);
    const Sequence seq = sequence_of(p, block.b);
    const int64_t rows = min_of(kBlockM<T>, seq.Sq - block.m_start);
    if (rows <= 0) continue;
    with_vectors<T>(rows, [&](auto vectors) {
      attention_forward_block<vectors.value>(p, seq, block.h, block.m_start, rows, tile);
    });
  }
}

template <typename Arithmetic>
struct AttentionForward {
  using T = typename Arithmetic::T;
  static int64_t num_tasks(const AttentionParams& p) { return count_query_blocks(p, kBlockM<T>); }
  static size_t workspace_bytes(const AttentionParams& p) {
    ForwardTile<Arithmetic> tile;
    return tile.place(p, nullptr);
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    attention_forward_tasks<Arithmetic>(p, begin, end, workspace);
  }
};

template <typename T>
using DirectForward = AttentionForward<Direct<T>>;

TileConfig forward_tiles(const AttentionParams& p) {
  return {p.dtype == DType::kFloat64 ? kBlockM<double> : kBlockM<float>, kBlockN};
}
