// What the two products of attention, s = k q^T and o^T = v^T p^T, are computed in: how the
// operands are laid out, and how far the weights are rounded. The algorithm (attention_forward.inl)
// is the same for each:
//
//   place, load_queries    scratch memory, and the queries of one tile
//   scores                 s[key][query] <- k q^T for one tile
//   round                  a weight as the second product meets it
//   accumulate             o^T[d][query] <- o^T + v^T p^T for one tile

// Numbers of type T on the vector lanes.
template <typename T_>
struct Direct {
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
  void scores(const AttentionParams& p, const Sequence& seq, int64_t h_kv, int64_t n_start,
              int64_t columns, T* s) const {
    constexpr int kRow = kVectors * kLanes<T>;
    const Scalars<T> keys = key_rows(p, p.key, seq, h_kv, n_start, columns, p.D, nullptr, k);
    multiply<kVectors, false>(columns, p.D, keys, q_t, kRow, s, kRow);
  }

  static FA_INLINE Vec<T> round(Vec<T> weight) { return weight; }

  // visible: null, or the words of the tile.
  template <int kVectors>
  void accumulate(const AttentionParams& p, const Sequence& seq, int64_t h_kv, int64_t n_start,
                  int64_t columns, const uint64_t* visible, const T* weights, T* acc_t) const {
    constexpr int kRow = kVectors * kLanes<T>;
    const Scalars<T> values = key_rows(p, p.value, seq, h_kv, n_start, columns, p.Dv, visible, v);
    multiply<kVectors, true>(p.Dv, columns, Scalars<T>{values.data, values.column, values.row},
                             weights, kRow, acc_t, kRow);
  }
};
