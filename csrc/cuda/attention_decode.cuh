// Split-KV decode, for few queries against many keys: the keys are cut into `splits`, so that there
// are enough thread blocks, and the partials are combined (Flash-Decoding, Dao et al. 2023).
//
// The rows of a tile are the queries of all heads that share a key head: row r is query r / group
// of head h_kv * group + r % group, so that every key is read once. A warp takes 16 keys of each
// tile, with a softmax of its own; warps exchange nothing before the end.
#pragma once

#include "copy.cuh"
#include "online_softmax.cuh"
#include "products.cuh"
#include "scores.cuh"

namespace fused_attention::cuda {

template <typename T, int kHeadDim>
struct DecodeBlock {
  static constexpr DecodeTiles kTiles = decode_tiles(Terms<T>::kCount == 3, kHeadDim);
  static constexpr int kRows = 16, kColumns = 16, kWarps = kTiles.warps;
  static constexpr int kBlockN = kTiles.block_n(), kThreads = kTiles.threads();
  static constexpr int kStages = kTiles.stages, kTerms = Terms<T>::kCount;
  using QueryTile = Tile<kRows, kHeadDim, kTerms>;
  using KeyTile = Tile<kBlockN, kHeadDim, kTerms>;
  static constexpr int kStageBytes = 2 * KeyTile::kBytes;

  const KernelParams& p;
  const Sequence seq;
  const int h_kv, group, split;
  const int warp;
  const uint32_t q_tile, stages;  // addresses in shared memory
  float* const found;             // acc, max and sum of each warp, in the memory of the stages
  RowSource<T> key, value;
  float acc[1][kHeadDim / 8][4];
  RowState<1> rows;

  FA_DEVICE DecodeBlock(const KernelParams& params, int b, int h_kv_, int split_, char* shared)
      : p(params),
        seq(sequence_of(p, b)),
        h_kv(h_kv_),
        group((int)((uint32_t)p.Hq / (uint32_t)p.Hkv)),
        split(split_),
        warp(threadIdx.x / 32),
        q_tile(shared_address(shared)),
        stages(q_tile + QueryTile::kBytes),
        found((float*)(shared + QueryTile::kBytes)) {}

  FA_DEVICE int head(int row) const { return h_kv * group + row % group; }

  FA_DEVICE void run() {
    for (int row = 0; row < seq.Sq * group; row += kRows) {
      __syncthreads();  // no warp reads the memory of the previous rows any more
      load_queries(row);
      attend(row);
      hand_over(row);
    }
  }

  FA_DEVICE void load_queries(int first) const {
    constexpr int kPieces = QueryTile::kPieces;
    for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
      const int row = first + i / kPieces, piece = i % kPieces, query = row / group;
      const int count = query < seq.Sq ? max(0, min(8, (int)p.D - piece * 8)) : 0;
      const T* from = head_of<const T>(p.query, seq.b, head(row), seq.q_start + query) + piece * 8;
      load_piece<T, QueryTile>(q_tile + QueryTile::offset(i / kPieces, piece), from, count,
                               p.aligned);
    }
  }

  FA_DEVICE void load_keys(int n_start, int stage) const {
    const uint32_t to = stages + stage * kStageBytes;
    load_tile<T, kBlockN, kHeadDim, kThreads, false, false>(to, key, n_start);
    load_tile<T, kBlockN, kHeadDim, kThreads, false, false>(to + KeyTile::kBytes, value, n_start);
    copy_commit();
  }

  // Computes the rows from `first` on against the keys of this split.
  FA_DEVICE void attend(int first) {
    const int m_end = min((first + kRows - 1) / group + 1, seq.Sq);
    const Range keys = visible_keys(p, seq, first / group, m_end);
    key = key_rows<T>(p, p.key, seq, h_kv, p.D, keys);
    value = key_rows<T>(p, p.value, seq, h_kv, p.Dv, keys);
    const int tile0 = keys.begin / kBlockN, tiles = ceil_div(keys.end, kBlockN) - tile0;
    const int share = ceil_div(tiles, (int)p.splits);
    const int begin = (tile0 + min(split * share, tiles)) * kBlockN;
    const int end = (tile0 + min((split + 1) * share, tiles)) * kBlockN;
    clear(acc);
    start(rows);
    if (begin < end) load_keys(begin, 0);
    int stage = 0;
    for (int n = begin; n < end; n += kBlockN) {
      copy_wait<0>();
      __syncthreads();  // queries and keys have arrived, and no warp reads the other stage
      const int now = stage;
      if (kStages == 2 && n + kBlockN < end) load_keys(n + kBlockN, stage ^= 1);
      step(first, n + warp * kColumns, stages + now * kStageBytes);
      if (kStages == 1 && n + kBlockN < end) {
        __syncthreads();  // no warp reads the keys any more
        load_keys(n + kBlockN, 0);
      }
    }
  }

  // Computes the rows against this warp's keys of a tile.
  FA_DEVICE void step(int first, int n_start, uint32_t tile) {
    float s[1][kColumns / 8][4];
    const uint32_t own = tile + warp * kColumns * KeyTile::kRowBytes;
    const auto load_query = [&](int, int k, uint32_t (&q)[kTerms][4]) {
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        load_matrices(q[term], QueryTile::move(QueryTile::by_columns(q_tile), 0, k, term));
      }
    };
    const int products = products_of<T>(p);
    multiply_rows<T, KeyTile, 1, kColumns, kHeadDim>(products, load_query, KeyTile::by_rows(own),
                                                     s);
    uint32_t seen = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 8 * half + lane_row(), query = row / group, h = head(row);
      const uint32_t visible = visible_columns<false, kColumns>(p, seq, h, query, n_start);
      finish_scores<false, kColumns, false>(p, seq, h, query, half, n_start, visible, s[0],
                                            nullptr);
      seen |= visible;
    }
    seen = any_row(seen);
    online_softmax_update<false, 1, kColumns, kHeadDim>(0, s, rows, acc);
    multiply_probabilities<T, KeyTile, true, 1, kColumns, kHeadDim>(
        products, s, KeyTile::by_columns(own + KeyTile::kBytes), seen, acc);
  }

  // Combines the results of the warps and stores them as the partial of this split, for
  // attention_combine_kernel.
  FA_DEVICE void hand_over(int first) {
    constexpr int kWidth = kHeadDim + 2;
    __syncthreads();  // no warp reads keys any more
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* own = found + (warp * kRows + 8 * half + lane_row()) * kWidth;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        own[8 * n + lane_column()] = acc[0][n][2 * half];
        own[8 * n + lane_column() + 1] = acc[0][n][2 * half + 1];
      }
      const float sum = row_total(rows.sum[0][half]);
      if (threadIdx.x % 4 == 0) {
        own[kHeadDim] = rows.max[0][half];
        own[kHeadDim + 1] = sum;
      }
    }
    __syncthreads();
    const int64_t total = count_rows(p);  // rows of the call
    for (int i = threadIdx.x; i < kRows * kWidth; i += kThreads) {
      const int at = i / kWidth, d = i % kWidth, row = first + at, query = row / group;
      if (query >= seq.Sq) break;
      float top = -kInf;
      for (int w = 0; w < kWarps; ++w)
        top = fmaxf(top, found[(w * kRows + at) * kWidth + kHeadDim]);
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) {
        const float* theirs = found + (w * kRows + at) * kWidth;
        // -inf - (-inf) is NaN: if no warp saw a key, all sums are 0 and alpha is taken as 1.
        const float alpha = top == -kInf ? 1.0f : exp2_approx((theirs[kHeadDim] - top) * kLog2e);
        sum += theirs[d] * alpha;
      }
      const int64_t number = split * total + row_number(p, seq, head(row)) + query;
      if (d < (int)p.Dv) p.partial_out[number * p.Dv + d] = sum;
      if (d == kHeadDim) p.partial_max[number] = top;
      if (d == kHeadDim + 1) p.partial_sum[number] = sum;
    }
  }
};

// Each thread block takes one split of the keys of one key head, for all its queries.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(DecodeBlock<T, kHeadDim>::kThreads)
    attention_decode_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(128) char shared[];
  const uint32_t splits = (uint32_t)p.splits, Hkv = (uint32_t)p.Hkv;
  const uint32_t split = blockIdx.x % splits, head = blockIdx.x / splits;
  DecodeBlock<T, kHeadDim> work(p, (int)(head / Hkv), (int)(head % Hkv), (int)split, shared);
  work.run();
}

// out <- sum of alpha acc / sum of alpha l over the splits, alpha = exp(m_split - m). Each warp
// combines one row.
template <typename T>
__global__ void __launch_bounds__(32 * kRowsOfCombine)
    attention_combine_kernel(const __grid_constant__ KernelParams p) {
  const int64_t total = count_rows(p);
  const int64_t row = (int64_t)blockIdx.x * kRowsOfCombine + threadIdx.x / 32;
  if (row >= total) return;
  const int64_t i = row % p.Sq, b = row / p.Sq / p.Hq, h = row / p.Sq % p.Hq;
  float top = -kInf;
  for (int64_t s = 0; s < p.splits; ++s) top = fmaxf(top, p.partial_max[s * total + row]);
  const auto alpha = [&](int64_t s) {
    return top == -kInf ? 1.0f : exp2_approx((p.partial_max[s * total + row] - top) * kLog2e);
  };
  float sum = 0;
  for (int64_t s = 0; s < p.splits; ++s) sum += p.partial_sum[s * total + row] * alpha(s);
  const bool rest = is_packed(p) && i >= between(p.cu_seqlens_q[p.B], 0, (int)p.Sq);
  const float* sink = p.sinks == nullptr || rest ? nullptr : (const float*)p.sinks + h;
  const FinishedRow finished = finish(top, sum, sink);
  if (p.lse != nullptr && threadIdx.x % 32 == 0) ((float*)p.lse)[row] = finished.lse;
  T* out = head_of<T>(p.out, (int)b, (int)h, (int)i);
  for (int64_t d = threadIdx.x % 32; d < p.Dv; d += 32) {
    float x = 0;
    for (int64_t s = 0; s < p.splits; ++s)
      x += p.partial_out[(s * total + row) * p.Dv + d] * alpha(s);
    out[d] = from_float<T>(sum == 0 ? 0.0f : x * finished.weight);
  }
}

}  // namespace fused_attention::cuda
