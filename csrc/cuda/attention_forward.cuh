// Attention forward (FlashAttention-2, Dao 2023, Algorithm 1) on the matrix instructions of sm_80.
//
// A thread block computes kBlockM queries of one head, each warp 16 or 32 of them, against tiles of
// kBlockN keys, from the last visible tile to the first. Scores, probabilities and output stay in
// registers:
//
//   s <- q k^T            while the tile of v arrives
//   p <- exp(s - m)       while the next tile of k arrives
//   o <- o + p v
//
// On the fast path only the tiles that the band around the diagonal or the end of the keys cuts are
// masked, in a loop of their own.
#pragma once

#include "copy.cuh"
#include "launch.h"
#include "online_softmax.cuh"
#include "philox.cuh"
#include "products.cuh"
#include "scores.cuh"

namespace fused_attention::cuda {

template <typename T, int kHeadDim, bool kFastPath>
struct ForwardBlock {
  static constexpr ForwardTiles kTiles = forward_tiles(Terms<T>::kCount == 3, kHeadDim, kFastPath);
  static constexpr int kRowTiles = kTiles.row_tiles, kBlockN = kTiles.block_n;
  static constexpr int kBlockM = kTiles.block_m(), kThreads = kTiles.threads();
  static constexpr int kTerms = Terms<T>::kCount, kSteps = kHeadDim / 16;
  static constexpr bool kHoldQuery = kTerms == 1 && kHeadDim <= 64;
  using Element = typename Terms<T>::Element;
  using QueryTile = Tile<kBlockM, kHeadDim, kTerms>;
  using KeyTile = Tile<kBlockN, kHeadDim, kTerms>;

  const KernelParams& p;
  const Sequence seq;
  const int h, m_start;  // m_start: the first query of the block
  const int m_warp;      // the first one of the warp
  const Range keys;
  const RowSource<T> key, value;
  const Dropout dropout;
  const float scale_log2;
  const uint32_t q_tile, k_tile, v_tile;  // addresses in shared memory
  const uint32_t q_read, k_read, v_read;  // where this lane reads operands, see `Tile`
  uint32_t q_held[kHoldQuery ? kRowTiles : 1][kSteps][4];
  float acc[kRowTiles][kHeadDim / 8][4];
  RowState<kRowTiles> rows;

  FA_DEVICE ForwardBlock(const KernelParams& params, const TokenBlock& block, uint32_t shared)
      : p(params),
        seq(sequence_of<kFastPath>(p, block.b)),
        h(block.h),
        m_start(block.start),
        m_warp(m_start + threadIdx.x / 32 * 16 * kRowTiles),
        keys(visible_keys(p, seq, m_start, min(m_start + kBlockM, seq.Sq))),
        key(key_rows<T>(p, p.key, seq, head_kv(), p.D, keys)),
        value(key_rows<T>(p, p.value, seq, head_kv(), p.Dv, keys)),
        dropout(dropout_of(p, block.b, block.h)),
        scale_log2((float)p.scale * kLog2e),
        q_tile(shared),
        k_tile(q_tile + QueryTile::kBytes),
        v_tile(k_tile + KeyTile::kBytes),
        q_read(QueryTile::by_columns(q_tile + (m_warp - m_start) * QueryTile::kRowBytes)),
        k_read(KeyTile::by_rows(k_tile)),
        v_read(KeyTile::by_columns(v_tile)) {}

  FA_DEVICE int head_kv() const { return h / (int)((uint32_t)p.Hq / (uint32_t)p.Hkv); }

  template <bool kWhole>
  FA_DEVICE void load_keys(uint32_t tile, const RowSource<T>& from, int n_start) const {
    load_tile<T, kBlockN, kHeadDim, kThreads, kWhole, kFastPath>(tile, from, n_start);
    copy_commit();
  }

  FA_DEVICE void run() {
    clear(acc);
    start(rows);
    const int first = keys.begin / kBlockN * kBlockN;
    int n = (keys.end - 1) / kBlockN * kBlockN;
    if (keys.end == 0) n = -kBlockN;  // no query sees a key
    const RowSource<T> query = query_rows<T>(p, p.query, seq, h, p.D, {0, seq.Sq});
    load_tile<T, kBlockM, kHeadDim, kThreads, false, kFastPath>(q_tile, query, m_start);
    copy_commit();
    if (n >= first) load_keys<false>(k_tile, key, n);
    if (kHoldQuery) hold_query();
    const Range whole = whole_tiles();
    while (n >= first) {
      for (; n >= first && !(n >= whole.begin && n < whole.end); n -= kBlockN) step<true>(n, first);
      if constexpr (kFastPath) {
        for (; n >= first && n >= whole.begin; n -= kBlockN) step<false>(n, first);
      }
    }
    copy_wait<0>();
    store();
  }

  // Returns the range of starts of the tiles that need no mask and whose left neighbour, which
  // their step loads, lies wholly within the keys.
  FA_DEVICE Range whole_tiles() const {
    if (!kFastPath) return {0, 0};
    const Range all = seen_by_all<false>(p, seq, m_start, min(m_start + kBlockM, seq.Sq));
    return {all.begin == 0 ? 0 : all.begin + kBlockN, all.end - kBlockN + 1};
  }

  FA_DEVICE void hold_query() {
    copy_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < (kHoldQuery ? kRowTiles : 0); ++i) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        load_matrices(q_held[i][step], QueryTile::move(q_read, i * 16, step));
      }
    }
  }

  template <bool kMasked>
  FA_DEVICE void step(int n_start, int first) {
    copy_wait<0>();
    __syncthreads();  // k has arrived, and no warp reads the previous v any more
    load_keys<!kMasked>(v_tile, value, n_start);
    float s[kRowTiles][kBlockN / 8][4];
    const auto load_query = [&](int i, int k, uint32_t (&q)[kTerms][4]) {
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        if constexpr (kHoldQuery) {
#pragma unroll
          for (int r = 0; r < 4; ++r) q[term][r] = q_held[i][k][r];
        } else {
          load_matrices(q[term], QueryTile::move(q_read, i * 16, k, term));
        }
      }
    };
    const int products = products_of<T>(p);
    multiply_rows<T, KeyTile, kRowTiles, kBlockN, kHeadDim>(products, load_query, k_read, s);
    copy_wait<0>();
    __syncthreads();  // v has arrived, and no warp reads k any more
    if (n_start > first) load_keys<!kMasked>(k_tile, key, n_start - kBlockN);

    uint32_t seen = ~0u;
    if constexpr (kFastPath) {
      if (kMasked) hide_outside_band<false, kRowTiles, kBlockN>(p, seq, m_warp, n_start, s);
      online_softmax_update<true, kRowTiles, kBlockN, kHeadDim>(scale_log2, s, rows, acc);
    } else {
      seen = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = m_warp + 8 * half + lane_row();
        const uint32_t visible = visible_columns<false, kBlockN>(p, seq, h, query, n_start);
        finish_scores<false, kBlockN, false>(p, seq, h, query, half, n_start, visible, s[0],
                                             nullptr);
        seen |= visible;
      }
      seen = any_row(seen);
      online_softmax_update<false, kRowTiles, kBlockN, kHeadDim>(0, s, rows, acc);
      if (dropout.threshold > 0) drop(n_start, s[0]);
    }
    multiply_probabilities<T, KeyTile, !kFastPath, kRowTiles, kBlockN, kHeadDim>(products, s,
                                                                                 v_read, seen, acc);
  }

  // p <- p where kept, 0 elsewhere
  FA_DEVICE void drop(int n_start, float (&weights)[kBlockN / 8][4]) const {
    uint32_t keep[2];
    dropout_keep_bits<kBlockN, false>(dropout, m_warp, n_start, keep);
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (!(keep[c / 2] >> (2 * n + c % 2) & 1)) weights[n][c] = 0;
      }
    }
  }

  FA_DEVICE void store() {
    const bool has_sink = p.sinks != nullptr && !is_rest(p, seq.b);
    const float* sink = has_sink ? (const float*)p.sinks + h : nullptr;
    T* out = head_of<T>(p.out, seq.b, h, seq.q_start);
    float* lse = p.lse == nullptr ? nullptr : (float*)p.lse + row_number(p, seq, h);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = m_warp + 16 * i + 8 * half + lane_row();
        const float sum = row_total(rows.sum[i][half]);
        const float max = kFastPath ? rows.max[i][half] * (float)p.scale : rows.max[i][half];
        FinishedRow row = finish(max, sum, sink);
        if (lse != nullptr && threadIdx.x % 4 == 0 && query < seq.Sq) lse[query] = row.lse;
        if (!kFastPath && dropout.threshold > 0) row.weight *= (float)p.dropout_scale;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            // A fully masked row is zero even if it met a NaN that other rows see: 0 * NaN is NaN.
            float& x = acc[i][n][2 * half + e];
            x = sum == 0 ? 0.0f : x * row.weight;
          }
        }
        if constexpr (!kFastPath) {
#pragma unroll
          for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int d = 8 * n + lane_column() + e;
              if (query < seq.Sq && d < (int)p.Dv) {
                out[query * p.out.stride_s + d] = from_float<T>(acc[0][n][2 * half + e]);
              }
            }
          }
        }
      }
    }
    if constexpr (kFastPath) store_pieces(out);
  }

  // Stores the output through the warp's own rows of q in shared memory, so that each lane writes
  // 16 bytes at a time.
  FA_DEVICE void store_pieces(T* out) const {
    constexpr int kPieces = QueryTile::kPieces, kRows = 16 * kRowTiles;
    const int lane = threadIdx.x % 32;
    const uint32_t mine = q_tile + (m_warp - m_start) * QueryTile::kRowBytes;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * i + 8 * half + lane_row();
#pragma unroll
        for (int n = 0; n < kPieces; ++n) {
          store_shared(mine + QueryTile::offset(row, n) + lane_column() * 2,
                       pack<T>(acc[i][n][2 * half], acc[i][n][2 * half + 1]));
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int at = lane; at < kRows * kPieces; at += 32) {
      const int row = at / kPieces, piece = at % kPieces, query = m_warp + row;
      const uint4 x = load_shared(mine + QueryTile::offset(row, piece));
      if (query < seq.Sq && piece * 8 < (int)p.Dv) {
        store_global(out + query * p.out.stride_s + piece * 8, x);
      }
    }
  }
};

template <typename T, int kHeadDim, bool kFastPath>
__global__ void __launch_bounds__(ForwardBlock<T, kHeadDim, kFastPath>::kThreads,
                                  kHeadDim <= 128 ? 2 : 1)
    attention_forward_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(128) char shared[];
  const TokenBlock block = query_block(p, ForwardBlock<T, kHeadDim, kFastPath>::kBlockM);
  ForwardBlock<T, kHeadDim, kFastPath> work(p, block, shared_address(shared));
  if (work.m_start < work.seq.Sq) work.run();
}

}  // namespace fused_attention::cuda
