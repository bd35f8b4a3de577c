// Computes statistics of the attention weights from the saved log-sum-exp, without storing them:
//
//   w = dropout(exp(s * scale - lse)), 0 where hidden
//   mass_j = sum_i w_ij    entropy_i = -sum_j w_ij log w_ij    top_i = the largest w_ij of a row
//
// log w is s * scale - lse before dropout, so the entropy needs no logarithm. A tile of weights is
// reduced three ways while it is in the L1 cache. Time O(Hq Sq Sk D) over the tiles that some query
// sees; memory O(tile + num_top) per thread, and O(B Hq Sk) for the sums that tasks hand over.
#pragma once

#include "attention_weights.inl"

namespace fused_attention {
namespace {

template <typename T>
struct StatisticsTile {
  WeightsTile<T> of_weights;
  double *plogp, *total;  // sums of w log w and of w, without the scale of dropout [kBlockM]
  T *lanes, *threshold;   // the num_top-th largest weight [kBlockM]
  T* column;              // sums over the queries of a tile [kBlockN]
  T* top;                 // the largest weights, falling [kBlockM][num_top]
  int64_t* top_keys;

  size_t place(const AttentionParams& p, void* workspace) {
    constexpr int M = kBlockM<T>;
    Arena arena{(char*)workspace, of_weights.place(p, workspace)};
    plogp = arena.take<double>(M);
    total = arena.take<double>(M);
    lanes = arena.take<T>(M);
    threshold = arena.take<T>(M);
    column = arena.take<T>(kBlockN);
    top = arena.take<T>(M * p.num_top);
    top_keys = arena.take<int64_t>(M * p.num_top);
    return arena.used;
  }
};

// How the queries of a head are divided into tasks, each of which sums the mass on its own.
template <typename T>
struct QueryParts {
  explicit QueryParts(const AttentionParams& p) {
    constexpr int64_t kEnoughTasks = 64;
    const int64_t blocks = ceil_div(p.Sq, kBlockM<T>);
    const int64_t wanted = ceil_div(kEnoughTasks, max_of(1, p.B * p.Hq));
    blocks_per_part = ceil_div(blocks, min_of(wanted, max_of(1, blocks)));
    count = blocks > 0 ? ceil_div(blocks, blocks_per_part) : 0;
  }
  int64_t blocks_per_part, count;
};

// Inserts a weight that is larger than the last one of a falling list.
template <typename T>
void insert(T weight, int64_t key, int64_t count, T* top, int64_t* keys) {
  int64_t at = count - 1;
  for (; at > 0 && top[at - 1] < weight; --at) {
    top[at] = top[at - 1];
    keys[at] = keys[at - 1];
  }
  top[at] = weight;
  keys[at] = key;
}

// mass[j] += sum of the weights of key j over the queries of the tile
template <typename T, int kVectors>
void add_columns(int64_t columns, T* weights, T* column, double* mass) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  fill(weights + columns * kRow, (round_up(columns, W) - columns) * kRow, (T)0);
  for (int64_t j = 0; j < columns; j += W) {
    Vec<T> sums[W];
    for (int l = 0; l < W; ++l) {
      const T* row = weights + (j + l) * kRow;
      sums[l] = load(row);
      for (int x = 1; x < kVectors; ++x) sums[l] = add(sums[l], load(row + x * W));
    }
    store(column + j, sum_lanes(sums));
  }
  for (int64_t j = 0; j < columns; ++j) mass[j] += (double)column[j];
}

// Lists the weights of a tile that are larger than the thresholds of their rows. `largest` are the
// maxima of the rows.
template <typename T, int kVectors>
void add_to_top(const AttentionParams& p, const ScoreTile& tile, const Vec<T>* largest,
                const StatisticsTile<T>& t) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  for (int x = 0; x < kVectors; ++x) {
    if (!any_gt(largest[x], load(t.threshold + x * W))) continue;
    store(t.lanes + x * W, largest[x]);
    for (int64_t i = x * W; i < min_of(tile.rows, (x + 1) * W); ++i) {
      if (!(t.lanes[i] > t.threshold[i])) continue;
      T* top = t.top + i * p.num_top;
      for (int64_t j = 0; j < tile.columns; ++j) {
        const T weight = t.of_weights.s[j * kRow + i];
        if (!(weight > t.threshold[i])) continue;
        insert(weight, tile.n_start + j, p.num_top, top, t.top_keys + i * p.num_top);
        t.threshold[i] = top[p.num_top - 1];
      }
    }
  }
}

template <typename T>
void store_statistics(const AttentionParams& p, int64_t first_row, int64_t rows,
                      const StatisticsTile<T>& t) {
  const double scale = p.dropout_scale, log_scale = scale > 0 ? __builtin_log(scale) : 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (p.entropy != nullptr) {
      ((T*)p.entropy)[first_row + i] = (T)(0 - scale * (t.plogp[i] + log_scale * t.total[i]));
    }
    for (int64_t n = 0; n < p.num_top; ++n) {
      const int64_t from = i * p.num_top + n, to = first_row * p.num_top + from;
      // No comparison finds a NaN, which is then all that the row has.
      const bool is_nan = t.total[i] != t.total[i];
      ((T*)p.top_weights)[to] = is_nan ? (T)t.total[i] : t.top[from] * (T)scale;
      p.top_keys[to] = t.top_keys[from];
    }
  }
}

// Task: some blocks of queries of one head against all keys.
template <typename T, int kVectors>
void attention_statistics_block(const AttentionParams& p, int64_t b, int64_t h, int64_t m_start,
                                int64_t rows, double* mass, const StatisticsTile<T>& t) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  const Vec<T> zero = broadcast((T)0), lowest = broadcast(kLowest<T>);
  load_weights_queries<T, kVectors>(p, b, h, m_start, rows, t.of_weights);
  fill(t.plogp, kRow, 0.0);
  fill(t.total, kRow, 0.0);
  fill(t.threshold, kRow, (T)0);
  fill(t.top, kRow * p.num_top, (T)0);
  fill(t.top_keys, kRow * p.num_top, (int64_t)-1);
  const uint64_t in_block = ~(uint64_t)0 >> (64 - rows);
  const Sequence seq = sequence_of(p, b);
  const Range keys = visible_keys(p, seq, m_start, m_start + rows);
  for (int64_t n = keys.begin / kBlockN * kBlockN; n < keys.end; n += kBlockN) {
    const int64_t columns = min_of(kBlockN, keys.end - n);
    const ScoreTile tile = {seq, h, m_start, rows, n, columns};
    Vec<T> plogp[kVectors], total[kVectors], largest[kVectors];
    for (int x = 0; x < kVectors; ++x) plogp[x] = total[x] = largest[x] = zero;
    const auto reduce = [&](int64_t i, int x, uint64_t, uint64_t kept, Vec<T> value, Vec<T> log) {
      kept &= in_block >> (x * W);
      const Vec<T> weight = select_bits(kept, value, zero);
      store(t.of_weights.s + i, weight);  // in place of its score
      total[x] = add(total[x], weight);
      largest[x] = max(weight, largest[x]);
      // 0 log 0 is 0: 0 times an infinity would be NaN
      plogp[x] = add(plogp[x], select_bits(kept, mul(value, max(log, lowest)), zero));
    };
    if (!for_each_weight<T, kVectors>(p, tile, t.of_weights, reduce)) continue;
    for (int x = 0; x < kVectors; ++x) store(t.lanes + x * W, total[x]);
    for (int64_t i = 0; i < kRow; ++i) t.total[i] += (double)t.lanes[i];
    for (int x = 0; x < kVectors; ++x) store(t.lanes + x * W, plogp[x]);
    for (int64_t i = 0; i < kRow; ++i) t.plogp[i] += (double)t.lanes[i];
    if (p.num_top > 0) add_to_top<T, kVectors>(p, tile, largest, t);
    if (mass != nullptr) add_columns<T, kVectors>(columns, t.of_weights.s, t.column, mass + n);
  }
  store_statistics(p, (b * p.Hq + h) * p.Sq + m_start, rows, t);
}

template <typename T>
struct AttentionStatistics {
  static int64_t num_tasks(const AttentionParams& p) { return p.B * p.Hq * QueryParts<T>(p).count; }
  static size_t workspace_bytes(const AttentionParams& p) {
    StatisticsTile<T> tile;
    return tile.place(p, nullptr);
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    StatisticsTile<T> tile;
    tile.place(p, workspace);
    const QueryParts<T> parts(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts.count, matrix = task / parts.count;
      double* mass = p.mass != nullptr ? (double*)p.call_workspace + task * p.Sk : nullptr;
      if (mass != nullptr) fill(mass, p.Sk, 0.0);
      const int64_t first = part * parts.blocks_per_part * kBlockM<T>;
      const int64_t last = min_of(p.Sq, first + parts.blocks_per_part * kBlockM<T>);
      for (int64_t m_start = first; m_start < last; m_start += kBlockM<T>) {
        const int64_t rows = min_of(kBlockM<T>, p.Sq - m_start);
        with_vectors<T>(rows, [&](auto vectors) {
          attention_statistics_block<T, vectors.value>(p, matrix / p.Hq, matrix % p.Hq, m_start,
                                                       rows, mass, tile);
        });
      }
    }
  }
};

// -- mass. Task: one head, whose parts are added in order ----------------------------------------

template <typename T>
struct AttentionMass {
  static int64_t num_tasks(const AttentionParams& p) { return p.mass != nullptr ? p.B * p.Hq : 0; }
  static size_t workspace_bytes(const AttentionParams&) { return 0; }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void*) {
    const int64_t parts = QueryParts<T>(p).count;
    for (int64_t head = begin; head < end; ++head) {
      const double* sums = (const double*)p.call_workspace + head * parts * p.Sk;
      for (int64_t j = 0; j < p.Sk; ++j) {
        double sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += sums[part * p.Sk + j];
        ((T*)p.mass)[head * p.Sk + j] = (T)(sum * p.dropout_scale);
      }
    }
  }
};

size_t mass_call_workspace_bytes(const AttentionParams& p) {
  if (p.mass == nullptr) return 0;
  const int64_t parts =
      p.dtype == DType::kFloat64 ? QueryParts<double>(p).count : QueryParts<float>(p).count;
  return (size_t)(p.B * p.Hq * parts * p.Sk) * sizeof(double);
}

}  // namespace
}  // namespace fused_attention
