// What the two products of attention, s = k q^T and o^T = v^T p^T, are computed in: how the
// operands are laid out, and how far the weights are rounded. The algorithm (attention_forward.inl)
// is the same for each:
//
//   begin, end             around a task
//   place, load_queries    scratch memory, and the queries of one tile
//   scores                 s[key][query] <- k q^T for one tile
//   accumulate             o^T[d][query] <- o^T + v^T p^T for one tile, now or by the next flush
//   flush                  before o^T is read or written by others
//
// accumulate gets the words of the tile, visible and keep, or null, and overwrites the weights.

struct OnVectors {
  static constexpr int kQueryVectors = kMaxVectors;  // of a tile
  static void begin() {}
  static void end() {}
  template <int kVectors, typename T>
  void flush(const AttentionParams&, T*) const {}
};

// Numbers of type T on the vector lanes.
template <typename T_>
struct Direct : OnVectors {
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

  template <int kVectors>
  void accumulate(const AttentionParams& p, const Sequence& seq, int64_t h_kv, int64_t n_start,
                  int64_t columns, const uint64_t* visible, const uint64_t* keep, T* weights,
                  const RowState<T>&, T* acc_t) const {
    constexpr int kRow = kVectors * kLanes<T>;
    if (keep != nullptr) drop<T, kVectors>(keep, columns, weights);
    const Scalars<T> values = key_rows(p, p.value, seq, h_kv, n_start, columns, p.Dv, visible, v);
    multiply<kVectors, true>(p.Dv, columns, Scalars<T>{values.data, values.column, values.row},
                             weights, kRow, acc_t, kRow);
  }
};

#ifdef FUSED_ATTENTION_PAIRS
// bfloat16 numbers, two at a time on each float lane: pairs along head_dim in the first product,
// along the keys in the second. Keys are read as they lie in memory.
struct Pairs : OnVectors {
  using T = float;
  static constexpr bool kRounds = true;
  Pair *q, *q_t;  // queries [kBlockM][D / 2], transposed [D / 2][kBlockM]
  Pair* k;        // keys [kBlockN][D / 2], where they do not lie in pairs, or in one page
  Pair* v;        // values, rows 2 j and 2 j + 1 together: [kBlockN / 2][Dv]

  static int64_t width(const AttentionParams& p) {
    return round_up(ceil_div(p.D, 2), kLanes<float>);
  }
  static int64_t width_v(const AttentionParams& p) { return round_up(p.Dv, 32); }

  void place(const AttentionParams& p, Arena& arena) {
    q_t = arena.take<Pair>(width(p) * kBlockM<float>);
    q = arena.take<Pair>(kBlockM<float> * width(p));
    v = arena.take<Pair>(kBlockN / 2 * width_v(p));
    k = arena.take<Pair>(in_pairs(p) && p.block_table == nullptr ? 0 : kBlockN * width(p));
  }

  static bool in_pairs(const AttentionParams& p) { return p.D % 2 == 0 && p.key.stride_s % 2 == 0; }

  // Row `r` of dst <- D elements, zero to whole vectors; with none of them, all zero.
  static void copy_row(const AttentionParams& p, Pair* dst, int64_t r, const void* src, int64_t D) {
    uint16_t* row = (uint16_t*)(dst + r * width(p));
    __builtin_memcpy(row, src, (size_t)D * sizeof *row);
    fill(row + D, 2 * width(p) - D, (uint16_t)0);
  }

  template <int kVectors>
  void load_queries(const AttentionParams& p, const Sequence& seq, int64_t h, int64_t m_start,
                    int64_t rows) const {
    constexpr int kRow = kVectors * kLanes<float>;
    for (int64_t r = 0; r < kRow; ++r) {
      const int64_t i = seq.q_start + m_start + (r < rows ? r : 0);
      copy_row(p, q, r, row_of(p.query, p.dtype, seq.b, h, i), r < rows ? p.D : 0);
    }
    transpose_tile(kRow, width(p), (const float*)q, width(p), (float*)q_t, kRow);
  }

  template <int kVectors>
  void scores(const AttentionParams& p, const Sequence& seq, int64_t h_kv, int64_t n_start,
              int64_t columns, float* s) const {
    constexpr int kRow = kVectors * kLanes<float>;
    Scalars<Pair> keys{(const Pair*)key_row(p, p.key, seq, h_kv, n_start), p.key.stride_s / 2, 1};
    if (!in_pairs(p) || keys_in_a_row(p, seq, n_start, columns) < columns) {
      for (int64_t j = 0; j < columns; ++j) {
        copy_row(p, k, j, key_row(p, p.key, seq, h_kv, n_start + j), p.D);
      }
      keys = {k, width(p), 1};
    }
    multiply<kVectors, false>(columns, ceil_div(p.D, 2), keys, q_t, kRow, s, kRow);
  }

  // A key that nobody sees, or that is past the end, has a value of 0, whatever it held.
  template <int kVectors>
  void accumulate(const AttentionParams& p, const Sequence& seq, int64_t h_kv, int64_t n_start,
                  int64_t columns, const uint64_t* visible, const uint64_t* keep, float* weights,
                  const RowState<float>& rows, float* acc_t) const {
    constexpr int W = kLanes<float>, kRow = kVectors * W;
    const int64_t pairs = ceil_div(columns, 2);
    Pair* paired = (Pair*)weights;  // row j takes the place of rows 2 j and 2 j + 1
    const Vec<float> zero = broadcast(0.0f);
    Vec<float> sum[kVectors];
    for (int x = 0; x < kVectors; ++x) sum[x] = load(rows.rounded_sum + x * W);
    for (int64_t j = 0; j < pairs; ++j) {
      const bool odd = 2 * j + 1 == columns;
      const bool low_used = visible == nullptr || visible[2 * j] != 0;
      const bool high_used = !odd && (visible == nullptr || visible[2 * j + 1] != 0);
      const int64_t n = n_start + 2 * j;
      const auto* low_value = (const uint16_t*)key_row(p, p.value, seq, h_kv, n);
      const auto* high_value = (const uint16_t*)key_row(p, p.value, seq, h_kv, odd ? n : n + 1);
      for (int64_t d = 0; d < p.Dv; d += 32) {
        const uint64_t valid = low_bits(p.Dv - d);
        pair_rows(low_value + d, low_used ? valid : 0, high_value + d, high_used ? valid : 0,
                  v + j * width_v(p) + d);
      }
      for (int x = 0; x < kVectors; ++x) {
        const float* at = weights + 2 * j * kRow + x * W;
        Vec<float> low = load(at), high = odd ? zero : load(at + kRow);
        // before dropout: the denominator is that of all weights
        sum[x] = fma(round_to_pair(low, high), broadcast(kOnes), sum[x]);
        if (keep != nullptr) {
          low = select_bits(keep[2 * j] >> (x * W), low, zero);
          high = odd ? zero : select_bits(keep[2 * j + 1] >> (x * W), high, zero);
        }
        store(paired + j * kRow + x * W, round_to_pair(low, high));
      }
    }
    for (int x = 0; x < kVectors; ++x) store(rows.rounded_sum + x * W, sum[x]);
    multiply<kVectors, true>(p.Dv, pairs, Scalars<Pair>{v, 1, width_v(p)}, paired, kRow, acc_t,
                             kRow);
  }
};
#endif
