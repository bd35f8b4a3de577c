// Attention forward: o = softmax(scale q k^T + bias, masked) v and its log-sum-exp, tile by tile,
// never holding more than kBlockM x kBlockN scores (FlashAttention-2, Dao 2023, Algorithm 1). Time
// O(Sq Sk D) over the tiles that some query sees; memory O(tile) per thread.
//
// Task: one block of kBlockM queries of one head, against its keys kBlockN at a time.
#pragma once

#include "masking.inl"
#include "online_softmax.inl"
#include "philox.inl"
#include "scores.inl"
#include "vector_products.inl"
#ifdef FUSED_ATTENTION_AMX_PRODUCTS
#include "amx_products.inl"
#endif

namespace fused_attention {
namespace {

template <typename Products>
struct ForwardTile {
  using T = typename Products::T;
  static constexpr int kBlockM = Products::kQueryVectors * kLanes<T>;
  Products products;         // holds queries, keys and values in its own form
  T* acc_t;                  // accumulator, transposed [Dv][kBlockM]
  T* out;                    // its transpose [kBlockM][Dv]
  T* s;                      // scores, then weights [kBlockN][kBlockM]
  T *bias, *bias_t;          // [kBlockM][kBlockN] and transposed
  RowState<T> rows;          // [kBlockM]
  uint64_t *visible, *keep;  // [kBlockN]

  size_t place(const AttentionParams& p, void* workspace) {
    const int64_t width_v = round_up(p.Dv, kLanes<T>);
    Arena arena{(char*)workspace, 0};
    s = arena.take<T>(kBlockN * kBlockM);
    acc_t = arena.take<T>(width_v * kBlockM);
    rows.max = arena.take<T>(kBlockM);
    rows.sum = arena.take<T>(kBlockM);
    rows.rounded_sum = arena.take<T>(kBlockM);
    rows.alpha = arena.take<T>(kBlockM);
    visible = arena.take<uint64_t>(kBlockN);
    keep = arena.take<uint64_t>(kBlockN);
    out = arena.take<T>(kBlockM * width_v);
    products.place(p, arena);
    const bool has_bias = p.bias.data != nullptr;
    bias = arena.take<T>(has_bias ? kBlockM * kBlockN : 0);
    bias_t = arena.take<T>(has_bias ? kBlockM * kBlockN : 0);
    return arena.used;
  }
};

// x[r] <- x[r] * alpha for `count` rows of queries.
template <typename T, int kVectors>
void rescale(int64_t count, const T* alpha, T* values) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  for (int64_t r = 0; r < count; ++r) {
    for (int x = 0; x < kVectors; ++x) {
      T* at = values + r * kRow + x * W;
      store(at, mul(load(at), load(alpha + x * W)));
    }
  }
}

template <int kVectors, typename Products>
void attention_forward_block(const AttentionParams& p, const Sequence& seq, int64_t h,
                             int64_t m_start, int64_t rows, ForwardTile<Products>& t) {
  using T = typename Products::T;
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  const int64_t width_v = round_up(p.Dv, W);
  const int64_t h_kv = h / (p.Hq / p.Hkv);

  t.products.template load_queries<kVectors>(p, seq, h, m_start, rows);
  fill(t.acc_t, width_v * kRow, (T)0);
  start(t.rows, kRow);
  // Lazy rescaling, if weights are rounded: the accumulator is left alone while the row maximum has
  // grown by less than 8 in log2. Weights then reach at most 2^8.
  const T rescale_threshold = Products::kRounds ? (T)(8 / kLog2e<T>) : (T)0;

  const Range keys = visible_keys(p, seq, m_start, m_start + rows);
  for (int64_t n = keys.begin / kBlockN * kBlockN; n < keys.end; n += kBlockN) {
    const int64_t columns = min_of(kBlockN, keys.end - n);
    const ScoreTile tile = {seq, h, m_start, rows, n, columns};
    const KeyTile tile_keys = {seq, h_kv, n, columns};
    const Visible seen = tile_visibility(p, tile, t.visible);
    if (seen == Visible::kNone) continue;

    // s <- k q^T
    t.products.template scores<kVectors>(p, tile_keys, t.s);
    const double factor = finish_scores<T, kVectors>(p, tile, t.s, t.bias, t.bias_t, nullptr);
    if (seen == Visible::kSome) hide<T, kVectors>(t.visible, columns, t.s);

    // m <- max(m, rowmax(s)), l <- alpha l, o <- alpha o
    if (raise_max<T, kVectors>(columns, factor, rescale_threshold, t.s, t.rows)) {
      t.products.template flush<kVectors>(p, t.acc_t);
      rescale<T, kVectors>(1, t.rows.alpha, t.rows.rounded_sum);
      rescale<T, kVectors>(p.Dv, t.rows.alpha, t.acc_t);
    }
    const bool dropout = p.dropout_threshold > 0;
    if (dropout) dropout_keep_bits(p, tile, t.keep);
    // p <- exp(s - m), l <- l + rowsum(p), o^T <- o^T + v^T p^T
    t.products.accumulate(p, tile_keys, seen == Visible::kSome ? t.visible : nullptr,
                          dropout ? t.keep : nullptr, Probabilities<T, kVectors>(factor, t.rows),
                          t.s, t.rows, t.acc_t);
  }

  t.products.template flush<kVectors>(p, t.acc_t);
  transpose_tile(width_v, kRow, t.acc_t, kRow, t.out, width_v);
  for (int64_t i = 0; i < rows; ++i) {
    const T* sink = sink_of<T>(p, seq.b, h);
    const T max = t.rows.max[i], sum = t.rows.sum[i];
    if (p.lse != nullptr) {
      *lse_of<T>(p, seq, h, m_start + i) = log_sum_exp(max, sum, sink);
    }
    // Rounded weights went into o, so it is divided by their sum. Rounding loses a NaN, hence a sum
    // that is NaN is used itself.
    const bool rounded = Products::kRounds && sum == sum;
    T weight = row_normalizer(max, rounded ? t.rows.rounded_sum[i] : sum, sink);
    if (p.dropout_threshold > 0) weight *= (T)p.dropout_scale;
    // A row that saw nothing is 0, even if its tile has a NaN that another query sees: 0 * NaN is
    // not 0.
    if (saw_nothing(sum)) fill(t.out + i * width_v, p.Dv, (T)0);
    store_row(row_of(p.out, p.dtype, seq.b, h, seq.q_start + m_start + i), p.dtype,
              t.out + i * width_v, p.Dv, weight);
  }
}

// Computes the block that starts at query m_start, if there is one.
template <typename Products>
FA_INLINE void attention_forward_rows(const AttentionParams& p, const Sequence& seq, int64_t h,
                                      int64_t m_start, ForwardTile<Products>& tile) {
  const int64_t rows = min_of(ForwardTile<Products>::kBlockM, seq.Sq - m_start);
  if (rows <= 0) return;
  with_vectors<typename Products::T, Products::kQueryVectors>(rows, [&](auto vectors) {
    attention_forward_block<vectors.value>(p, seq, h, m_start, rows, tile);
  });
}

template <typename Products>
void attention_forward_tasks(const AttentionParams& p, int64_t begin, int64_t end, void* memory) {
  ForwardTile<Products> tile;
  tile.place(p, memory);
  constexpr int64_t kBlockM = ForwardTile<Products>::kBlockM;
  for (int64_t task = begin; task < end; ++task) {
    const Block block = query_block(p, task, kBlockM);
    attention_forward_rows(p, sequence_of(p, block.b), block.h, block.start, tile);
  }
}

template <typename Products>
struct AttentionForward {
  using T = typename Products::T;
  static constexpr int64_t kBlockM = ForwardTile<Products>::kBlockM;
  static int64_t num_tasks(const AttentionParams& p) { return count_query_blocks(p, kBlockM); }
  static TileConfig tiles(const AttentionParams&) { return {kBlockM, kBlockN}; }
  static size_t workspace_bytes(const AttentionParams& p) {
    ForwardTile<Products> tile;
    return tile.place(p, nullptr);
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    Products::begin();
    attention_forward_tasks<Products>(p, begin, end, workspace);
    Products::end();
  }
};

template <typename T>
using VectorForward = AttentionForward<VectorProducts<T>>;

// With many heads a task is all queries of one key head. The products load its keys and values
// once, into the workspace.
template <typename Products>
struct ForwardByHeads : AttentionForward<Products> {
  using ByBlocks = AttentionForward<Products>;
  static int64_t num_tasks(const AttentionParams& p) {
    return Products::by_heads(p) ? p.B * p.Hkv : ByBlocks::num_tasks(p);
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    if (!Products::by_heads(p)) return ByBlocks::run(p, begin, end, workspace);
    Products::begin();
    ForwardTile<Products> tile;
    tile.place(p, workspace);
    const int64_t group = p.Hq / p.Hkv;
    for (int64_t task = begin; task < end; ++task) {
      const Sequence seq = sequence_of(p, task / p.Hkv);
      const int64_t h_kv = task % p.Hkv;
      if (seq.Sq > 0) tile.products.load_head(p, seq, h_kv);
      for (int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
        for (int64_t m = 0; m < seq.Sq; m += ByBlocks::kBlockM) {
          attention_forward_rows(p, seq, h, m, tile);
        }
      }
    }
    Products::end();
  }
};

#ifdef FUSED_ATTENTION_AMX_PRODUCTS
// Decomposes keys and values into planes, in the phase before the products; unless their tasks are
// key heads. Task: kBlockN keys of one key head.
template <int kPlanes>
struct DecomposeKeysAndValues {
  using Split = DecomposedBlock<kPlanes>;
  static int64_t num_tasks(const AttentionParams& p) {
    return AmxProducts<kPlanes>::by_heads(p) ? 0 : count_key_blocks(p, kBlockN);
  }
  static size_t workspace_bytes(const AttentionParams& p) {
    return (size_t)(2 * Split::tile_size(p)) * sizeof(float);
  }
  static size_t call_workspace_bytes(const AttentionParams& p) {
    return (size_t)(num_tasks(p) * Split::bytes(p));
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    float *tile = (float*)workspace, *tile_t = tile + Split::tile_size(p);
    for (int64_t task = begin; task < end; ++task) {
      const Block block = key_block(p, task, kBlockN);
      const Sequence seq = sequence_of(p, block.b);
      if (block.start >= seq.Sk) continue;
      const int64_t number = key_block_number(p, block.b, block.h, block.start, kBlockN);
      Split(p, (char*)p.call_workspace, number).fill(p, seq, block.h, block.start, tile, tile_t);
    }
  }
};
#endif

}  // namespace
}  // namespace fused_attention
