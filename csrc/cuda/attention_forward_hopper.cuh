// Attention forward (FlashAttention-2, Dao 2023, Algorithm 1) for sm_90, with the additions of
// FlashAttention-3 (Shah et al. 2024): a warp that only copies, by TMA, and two warpgroups that
// compute 64 queries each, by wgmma. While one of them is in its softmax, the other one's products
// run.
//
//   copier                  for each tile of keys: wait until its place is empty, copy k and v
//   s <- q k^T              both operands in shared memory
//   p <- exp(s - m)
//   o <- o + p v            p from registers
//
// The loops go from the last visible tile to the first. Tiles that the band around the diagonal or
// the end of the keys cuts are masked, in a loop of their own.
#pragma once

#include "hopper.cuh"
#include "online_softmax.cuh"

namespace fused_attention::cuda {

template <typename T, int kHeadDim>
struct HopperBlock {
  static constexpr HopperTiles kTiles = hopper_tiles(kHeadDim);
  static constexpr int kBlockM = kTiles.block_m(), kBlockN = kTiles.block_n;
  static constexpr int kStages = kTiles.stages, kGroups = kTiles.groups;
  static constexpr int kParts = kHeadDim / 64;  // parts of a row, 128 bytes each
  static constexpr int kQueryPart = kBlockM * 128, kKeyPart = kBlockN * 128;
  static constexpr int kQueryBytes = kParts * kQueryPart, kKeyBytes = kParts * kKeyPart;
  static constexpr int kComputing = 128 * kGroups;  // threads that compute
  using Scores = float[1][kBlockN / 8][4];

  const KernelParams& p;
  const Sequence seq;
  const int h, m_start;
  const Range keys;
  const int first, count;  // the start of the first tile of keys; the number of tiles
  const uint32_t q_tile, k_tiles, v_tiles, barriers;

  FA_DEVICE HopperBlock(const KernelParams& params, const TokenBlock& block, uint32_t shared)
      : p(params),
        seq(sequence_of<true>(p, block.b)),
        h(block.h),
        m_start(block.start),
        keys(visible_keys(p, seq, m_start, min(m_start + kBlockM, seq.Sq))),
        first(keys.begin / kBlockN * kBlockN),
        count(keys.begin < keys.end ? ceil_div(keys.end - first, kBlockN) : 0),
        q_tile(shared),
        k_tiles(q_tile + kQueryBytes),
        v_tiles(k_tiles + kStages * kKeyBytes),
        barriers(v_tiles + kStages * kKeyBytes) {}

  // The barriers of each stage: k has arrived, v has arrived, k has been read, v has been read. The
  // barrier behind them: q has arrived.
  FA_DEVICE uint32_t k_full(int stage) const { return barriers + stage * 32; }
  FA_DEVICE uint32_t v_full(int stage) const { return barriers + stage * 32 + 8; }
  FA_DEVICE uint32_t k_empty(int stage) const { return barriers + stage * 32 + 16; }
  FA_DEVICE uint32_t v_empty(int stage) const { return barriers + stage * 32 + 24; }
  FA_DEVICE uint32_t q_full() const { return barriers + kStages * 32; }
  // Returns the first key of tile i of the loop, which begins with the last tile.
  FA_DEVICE int start_of(int i) const { return first + (count - 1 - i) * kBlockN; }

  FA_DEVICE void init_barriers() const {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(k_full(stage), 1);
        barrier_init(v_full(stage), 1);
        barrier_init(k_empty(stage), 4 * kGroups);  // one lane of each warp arrives
        barrier_init(v_empty(stage), 4 * kGroups);
      }
      barrier_init(q_full(), 1);
      barrier_fence();
    }
    __syncthreads();
  }

  // -- the copier ---------------------------------------------------------------------------------

  FA_DEVICE void copy(const TensorMap* query, const TensorMap* key, const TensorMap* value) const {
    const int h_kv = h / (int)((uint32_t)p.Hq / (uint32_t)p.Hkv), b = is_packed(p) ? 0 : seq.b;
    if (count > 0) {
      barrier_expect(q_full(), kQueryBytes);
      copy_rows<kParts>(q_tile, kQueryPart, query, seq.q_start + m_start, h, b, q_full());
    }
    for (int i = 0; i < count; ++i) {
      const int stage = i % kStages, parity = i / kStages % 2 ^ 1, row = seq.k_start + start_of(i);
      if (i >= kStages) barrier_wait(k_empty(stage), parity);
      barrier_expect(k_full(stage), kKeyBytes);
      copy_rows<kParts>(k_tiles + stage * kKeyBytes, kKeyPart, key, row, h_kv, b, k_full(stage));
      if (i >= kStages) barrier_wait(v_empty(stage), parity);
      barrier_expect(v_full(stage), kKeyBytes);
      copy_rows<kParts>(v_tiles + stage * kKeyBytes, kKeyPart, value, row, h_kv, b, v_full(stage));
    }
  }

  // -- a computing warpgroup ----------------------------------------------------------------------

  FA_DEVICE void compute(int group) {
    const int m_warp = m_start + 64 * group + threadIdx.x % 128 / 32 * 16;
    float acc[1][kHeadDim / 8][4];
    RowState<1> rows;
    start(rows);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[0][n][c] = 0;
    }
    // Tiles that lie within `all` need no mask.
    const int m_end = min(m_start + kBlockM, seq.Sq);
    const Range all = seen_by_all<false>(p, seq, m_start, m_end);
    if (count > 0) barrier_wait(q_full(), 0);
    int i = 0;
    while (i < count) {
      for (; i < count && !(start_of(i) >= all.begin && start_of(i) + kBlockN <= all.end); ++i) {
        step<true>(group, m_warp, i, rows, acc);
      }
      for (; i < count && start_of(i) >= all.begin; ++i) step<false>(group, m_warp, i, rows, acc);
    }
    store(group, m_warp, rows, acc[0]);
  }

  template <bool kMasked>
  FA_DEVICE void step(int group, int m_warp, int i, RowState<1>& rows,
                      float (&acc)[1][kHeadDim / 8][4]) const {
    const int stage = i % kStages, parity = i / kStages % 2, n_start = start_of(i);
    const uint32_t k_tile = k_tiles + stage * kKeyBytes, v_tile = v_tiles + stage * kKeyBytes;
    // s <- q k^T
    Scores s;
    barrier_wait(k_full(stage), parity);
    product_fence();
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      WarpgroupProduct<T, kBlockN>::of_columns(
          s[0], by_columns_of(q_tile + group * 64 * 128, k / 4 * kQueryPart + k % 4 * 32),
          by_columns_of(k_tile, k / 4 * kKeyPart + k % 4 * 32), k > 0);
    }
    product_commit();
    product_wait<0>();
    if (threadIdx.x % 32 == 0) barrier_arrive(k_empty(stage));

    // p <- exp(s - m)
    if (kMasked) hide_outside_band<false, 1, kBlockN>(p, seq, m_warp, n_start, s);
    online_softmax_update<true, 1, kBlockN, kHeadDim>((float)p.scale * kLog2e, s, rows, acc);
    uint32_t weights[kBlockN / 16][4];
#pragma unroll
    for (int k = 0; k < kBlockN / 16; ++k) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float* pair = &s[0][2 * k + r / 2][r % 2 * 2];
        weights[k][r] = pack<T>(pair[0], pair[1]);
      }
    }

    // o <- o + p v
    barrier_wait(v_full(stage), parity);
    if (kMasked) clear_unseen(v_tile, n_start);
    settle(weights);
    settle(acc[0]);
    product_fence();
#pragma unroll
    for (int k = 0; k < kBlockN / 16; ++k) {
      WarpgroupProduct<T, kHeadDim>::of_rows(acc[0], weights[k],
                                             by_rows_of(v_tile, k * 16 * 128, kKeyPart));
    }
    product_commit();
    product_wait<0>();
    if (threadIdx.x % 32 == 0) barrier_arrive(v_empty(stage));
  }

  // Clears the rows of v that no query of the block sees: they may hold a NaN, and 0 * NaN is NaN.
  FA_DEVICE void clear_unseen(uint32_t v_tile, int n_start) const {
    if (n_start >= keys.begin && n_start + kBlockN <= keys.end) return;
    for (int at = threadIdx.x - 128; at < kParts * kBlockN * 8; at += kComputing) {
      const int key = n_start + at / 8 % kBlockN;
      if (key < keys.begin || key >= keys.end) {
        store_shared(v_tile + at * 16, make_uint4(0, 0, 0, 0));
      }
    }
    proxy_fence();
    named_barrier(1, kComputing);
  }

  FA_DEVICE void store(int group, int m_warp, const RowState<1>& rows,
                       float (&acc)[kHeadDim / 8][4]) const {
    const bool has_sink = p.sinks != nullptr && !is_rest(p, seq.b);
    const float* sink = has_sink ? (const float*)p.sinks + h : nullptr;
    T* out = head_of<T>(p.out, seq.b, h, seq.q_start);
    float* lse = p.lse == nullptr ? nullptr : (float*)p.lse + row_number(p, seq, h);
    // The output goes through this warp's rows of q, so that each lane writes 16 bytes at a time.
    named_barrier(2 + group, 128);  // no warp of the warpgroup reads them any more
    const int row0 = m_warp - m_start, lane = threadIdx.x % 32;
    const auto at = [&](int row, int piece) {
      return q_tile + piece / 8 * kQueryPart + row * 128 + ((piece ^ row) % 8) * 16;
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 8 * half + lane_row(), query = m_start + row;
      const float sum = row_total(rows.sum[0][half]);
      const FinishedRow done = finish(rows.max[0][half] * (float)p.scale, sum, sink);
      if (lse != nullptr && threadIdx.x % 4 == 0 && query < seq.Sq) lse[query] = done.lse;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) x[e] = sum == 0 ? 0.0f : acc[n][2 * half + e] * done.weight;
        store_shared(at(row, n) + lane_column() * 2, pack<T>(x[0], x[1]));
      }
    }
    __syncwarp();
    constexpr int kPieces = kHeadDim / 8;
#pragma unroll
    for (int i = lane; i < 16 * kPieces; i += 32) {
      const int row = row0 + i / kPieces, piece = i % kPieces, query = m_start + row;
      const uint4 x = load_shared(at(row, piece));
      if (query < seq.Sq && piece * 8 < (int)p.Dv) {
        store_global(out + query * p.out.stride_s + piece * 8, x);
      }
    }
  }
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(hopper_tiles(kHeadDim).threads(), 1)
    attention_forward_hopper_kernel(const __grid_constant__ KernelParams p,
                                    const __grid_constant__ TensorMap query,
                                    const __grid_constant__ TensorMap key,
                                    const __grid_constant__ TensorMap value) {
  extern __shared__ __align__(1024) char shared[];
  using Block = HopperBlock<T, kHeadDim>;
  // Swizzled parts start at multiples of 1024 bytes.
  Block work(p, query_block(p, Block::kBlockM), (shared_address(shared) + 1023) & ~1023u);
  if (work.m_start >= work.seq.Sq) return;
  work.init_barriers();
  if (threadIdx.x < 128) {
    give_registers<24>();
    if (threadIdx.x == 0) work.copy(&query, &key, &value);
  } else {
    take_registers<240>();
    // The warpgroup's number comes from one lane, so that the compiler knows that all lanes agree.
    work.compute(__shfl_sync(~0u, (int)threadIdx.x / 128 - 1, 0));
  }
}

}  // namespace fused_attention::cuda
