// Attention backward (FlashAttention-2, Dao 2023, Algorithm 2) for sm_90, in the two passes of
// attention_backward.cuh: blocks of keys compute dk and dv, blocks of queries compute dq, and no
// thread block adds to the result of another. Here a warp copies, by TMA, and two warpgroups
// compute, by wgmma. A thread block owns 128 rows, either keys or queries; its columns are the
// other of the two, in tiles of 64:
//
//   s <- x x'^T, dp <- y y'^T        rows against columns: x, x' are q and k, y, y' do and v
//   p <- exp(s - lse), ds <- p * (dp - delta)
//   dy <- dy + p y'                  dv, only if rows are keys
//   dx <- dx + ds x'                 dk or dq, without the scale
//
// The first products read both operands from shared memory, the others p and ds from registers.
#pragma once

#include "hopper.cuh"
#include "masking.cuh"

namespace fused_attention::cuda {

template <typename T, int kHeadDim, bool kKeys>
struct HopperBackward {
  static constexpr HopperBackwardTiles kTiles = hopper_backward_tiles(kHeadDim);
  static constexpr int kRows = kTiles.rows(), kColumns = kTiles.columns, kStages = kTiles.stages;
  static constexpr int kParts = kHeadDim / 64;  // parts of a row, 128 bytes each
  static constexpr int kRowPart = kRows * 128, kColumnPart = kColumns * 128;
  static constexpr int kRowBytes = kParts * kRowPart, kColumnBytes = kParts * kColumnPart;
  static constexpr int kStageBytes = kTiles.stage_bytes();  // x', y', lse and delta
  static constexpr int kComputing = 128 * kTiles.groups;    // threads that compute
  using Scores = float[kColumns / 8][4];
  using Accumulators = float[kHeadDim / 8][4];

  const KernelParams& p;
  const Sequence seq;
  const int head, group;  // head: that of the rows; group: query heads of a key head
  const int row_start, row_end;
  const Range columns;
  const int first, count;  // the first start, and the number, of the tiles of columns of a head
  const int heads;         // the number of heads whose columns the rows meet
  const uint32_t x_tile, y_tile, stages, barriers;

  FA_DEVICE HopperBackward(const KernelParams& params, const TokenBlock& block, uint32_t shared)
      : p(params),
        seq(sequence_of<true>(p, block.b)),
        head(block.h),
        group((int)((uint32_t)p.Hq / (uint32_t)p.Hkv)),
        row_start(block.start),
        row_end(min(row_start + kRows, kKeys ? seq.Sk : seq.Sq)),
        columns(kKeys ? visible_queries(p, seq, row_start, row_end)
                      : visible_keys(p, seq, row_start, row_end)),
        first(columns.begin / kColumns * kColumns),
        count(columns.begin < columns.end ? ceil_div(columns.end - first, kColumns) : 0),
        heads(kKeys ? group : 1),
        x_tile(shared),
        y_tile(x_tile + kRowBytes),
        stages(y_tile + kRowBytes),
        barriers(stages + kStages * kStageBytes) {}

  FA_DEVICE uint32_t full(int stage) const { return barriers + stage * 16; }
  FA_DEVICE uint32_t empty(int stage) const { return barriers + stage * 16 + 8; }
  FA_DEVICE uint32_t rows_full() const { return barriers + kStages * 16; }
  FA_DEVICE int tiles() const { return heads * count; }
  FA_DEVICE int start_of(int i) const { return first + i % count * kColumns; }
  FA_DEVICE int query_head(int i) const { return kKeys ? head * group + i / count : head; }

  FA_DEVICE void init_barriers() const {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        // arrivals: one for the copies, and one for each lane that copies lse and delta
        barrier_init(full(stage), kKeys ? 1 + 32 : 1);
        barrier_init(empty(stage), kComputing / 32);
      }
      barrier_init(rows_full(), 1);
      barrier_fence();
    }
    __syncthreads();
  }

  // -- copying ------------------------------------------------------------------------------------

  // x, y: the tensors of the rows; x_, y_: those of the columns.
  FA_DEVICE void copy(const TensorMap* x, const TensorMap* y, const TensorMap* x_,
                      const TensorMap* y_) const {
    const int b = is_packed(p) ? 0 : seq.b;
    const int row = (kKeys ? seq.k_start : seq.q_start) + row_start;
    if (tiles() > 0) {
      barrier_expect(rows_full(), 2 * kRowBytes);
      copy_rows<kParts>(x_tile, kRowPart, x, row, head, b, rows_full());
      copy_rows<kParts>(y_tile, kRowPart, y, row, head, b, rows_full());
    }
    for (int i = 0; i < tiles(); ++i) {
      const int stage = i % kStages, h = kKeys ? query_head(i) : head / group;
      const int column = (kKeys ? seq.q_start : seq.k_start) + start_of(i);
      const uint32_t to = stages + stage * kStageBytes;
      if (i >= kStages) barrier_wait(empty(stage), i / kStages % 2 ^ 1);
      barrier_expect(full(stage), 2 * kColumnBytes);
      copy_rows<kParts>(to, kColumnPart, x_, column, h, b, full(stage));
      copy_rows<kParts>(to + kColumnBytes, kColumnPart, y_, column, h, b, full(stage));
    }
  }

  // Copies lse and delta of the columns, if these are queries. One warp does this.
  FA_DEVICE void copy_statistics() const {
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < tiles(); ++i) {
      const int stage = i % kStages;
      const uint32_t to = stages + stage * kStageBytes + 2 * kColumnBytes;
      if (i >= kStages) barrier_wait(empty(stage), i / kStages % 2 ^ 1);
      const int64_t row = row_number(p, seq, query_head(i)) + start_of(i);
      for (int j = lane; j < kColumns; j += 32) {
        const bool inside = start_of(i) + j < columns.end;
        store_shared(to + j * 8, __float_as_uint(inside ? p.row_lse[row + j] : 0.0f));
        store_shared(to + j * 8 + 4,
                     __float_as_uint(inside ? ((const float*)p.delta)[row + j] : 0.0f));
      }
      barrier_arrive(full(stage));
    }
  }

  // -- computing ----------------------------------------------------------------------------------

  FA_DEVICE void compute(int warpgroup) {
    const int row_warp = row_start + 64 * warpgroup + threadIdx.x % 128 / 32 * 16;
    Accumulators dx, dy;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) dx[n][c] = dy[n][c] = 0;
    }
    float lse[2] = {}, delta[2] = {};  // of this lane's rows, if these are queries
    if constexpr (!kKeys) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = row_warp + 8 * half + lane_row();
        const int64_t row = row_number(p, seq, head) + query;
        lse[half] = query < seq.Sq ? p.row_lse[row] : kInf;
        delta[half] = query < seq.Sq ? ((const float*)p.delta)[row] : 0.0f;
      }
    }
    const Range all = seen_by_all<kKeys>(p, seq, row_start, row_end);
    if (tiles() > 0) barrier_wait(rows_full(), 0);
    for (int i = 0; i < tiles();) {
      const int end = first + count * kColumns;
      int c = first;  // where a tile of columns starts
      const auto is_whole = [&] { return c >= all.begin && c + kColumns <= all.end; };
      while (c < end) {
        for (; c < end && !is_whole(); c += kColumns, ++i) {
          step<true>(warpgroup, row_warp, i, c, lse, delta, dx, dy);
        }
        for (; c < end && is_whole(); c += kColumns, ++i) {
          step<false>(warpgroup, row_warp, i, c, lse, delta, dx, dy);
        }
      }
    }
    store_rows(kKeys ? p.dk : p.dq, (int)p.D, (float)p.scale, row_warp, dx);
    if (kKeys) store_rows(p.dv, (int)p.Dv, 1, row_warp, dy);
  }

  template <bool kMasked>
  FA_DEVICE void step(int warpgroup, int row_warp, int i, int column_start, const float (&lse)[2],
                      const float (&delta)[2], Accumulators& dx, Accumulators& dy) const {
    const int stage = i % kStages;
    const uint32_t x_ = stages + stage * kStageBytes, y_ = x_ + kColumnBytes;
    Scores s[1], dp;
    barrier_wait(full(stage), i / kStages % 2);
    if (kMasked) clear_unseen(x_, column_start);
    product_fence();
    multiply(s[0], x_tile + warpgroup * 64 * 128, x_);
    multiply(dp, y_tile + warpgroup * 64 * 128, y_);
    product_commit();
    product_wait<0>();

    if (kMasked) hide_outside_band<kKeys, 1, kColumns>(p, seq, row_warp, column_start, s);
    const float scale_log2 = (float)p.scale * kLog2e;
    uint32_t weights[kColumns / 16][4], gradients[kColumns / 16][4];
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      float column_lse[2], column_delta[2];
      if constexpr (kKeys) {
        const float4 both = load_shared_floats(y_ + kColumnBytes + (8 * n + lane_column()) * 8);
        column_lse[0] = both.x, column_delta[0] = both.y;
        column_lse[1] = both.z, column_delta[1] = both.w;
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float &w = s[0][n][c], &d = dp[n][c];
        // p <- exp(s - lse), ds <- p * (dp - delta); both are 0 where hidden, whatever v holds
        const bool hidden = kMasked && w == -kInf;
        w = exp2_approx(w * scale_log2 - (kKeys ? column_lse[c % 2] : lse[c / 2]));
        d = hidden ? 0.0f : w * (d - (kKeys ? column_delta[c % 2] : delta[c / 2]));
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = n / 2, r = n % 2 * 2 + half;
        weights[k][r] = pack<T>(s[0][n][2 * half], s[0][n][2 * half + 1]);
        gradients[k][r] = pack<T>(dp[n][2 * half], dp[n][2 * half + 1]);
      }
    }

    if (kKeys) settle(weights), settle(dy);
    settle(gradients);
    settle(dx);
    product_fence();
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      if constexpr (kKeys) {
        WarpgroupProduct<T, kHeadDim>::of_rows(dy, weights[k],
                                               by_rows_of(y_, k * 16 * 128, kColumnPart));
      }
      WarpgroupProduct<T, kHeadDim>::of_rows(dx, gradients[k],
                                             by_rows_of(x_, k * 16 * 128, kColumnPart));
    }
    product_commit();
    product_wait<0>();
    // Lane 0 arrives for the warp, after all lanes have read lse and delta.
    if (kKeys) __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(empty(stage));
  }

  // s <- a b^T, for this warpgroup's 64 rows of a
  FA_DEVICE static void multiply(Scores& s, uint32_t a, uint32_t b) {
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      WarpgroupProduct<T, kColumns>::of_columns(s, by_columns_of(a, k / 4 * kRowPart + k % 4 * 32),
                                                by_columns_of(b, k / 4 * kColumnPart + k % 4 * 32),
                                                k > 0);
    }
  }

  // Clears the columns of x' that no row sees: they may hold a NaN, and 0 * NaN is NaN. y' is
  // cleared only if rows are keys, where p is multiplied by it.
  FA_DEVICE void clear_unseen(uint32_t x_, int column_start) const {
    if (column_start >= columns.begin && column_start + kColumns <= columns.end) return;
    constexpr int kPieces = (kKeys ? 2 : 1) * kParts * kColumns * 8;
    for (int at = threadIdx.x - 128; at < kPieces; at += kComputing) {
      const int column = column_start + at / 8 % kColumns;
      if (column < columns.begin || column >= columns.end) {
        store_shared(x_ + at * 16, make_uint4(0, 0, 0, 0));
      }
    }
    proxy_fence();
    named_barrier(1, kComputing);
  }

  FA_DEVICE void store_rows(const TensorView& to, int width, float factor, int row_warp,
                            const Accumulators& acc) const {
    T* rows = head_of<T>(to, seq.b, head, kKeys ? seq.k_start : seq.q_start);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_warp + 8 * half + lane_row();
      const bool seen = takes_part<kKeys>(p, seq, row);
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        const int d = 8 * n + lane_column();
        if (row < row_end && d < width) {
          const float low = acc[n][2 * half] * factor, high = acc[n][2 * half + 1] * factor;
          *(uint32_t*)(rows + row * to.stride_s + d) = seen ? pack<T>(low, high) : 0;
        }
      }
    }
  }
};

// If kKeys, x and y are key and value, and x_ and y_ are query and grad_out; otherwise the reverse.
template <typename T, int kHeadDim, bool kKeys>
__global__ void __launch_bounds__(hopper_backward_tiles(kHeadDim).threads(), 1)
    attention_backward_hopper_kernel(const __grid_constant__ KernelParams p,
                                     const __grid_constant__ TensorMap x,
                                     const __grid_constant__ TensorMap y,
                                     const __grid_constant__ TensorMap x_,
                                     const __grid_constant__ TensorMap y_) {
  extern __shared__ __align__(1024) char shared[];
  using Block = HopperBackward<T, kHeadDim, kKeys>;
  const TokenBlock block = kKeys ? key_block(p, Block::kRows) : query_block(p, Block::kRows);
  // Swizzled parts start at multiples of 1024 bytes.
  Block work(p, block, (shared_address(shared) + 1023) & ~1023u);
  if (work.row_start >= work.row_end) return;
  work.init_barriers();
  if (threadIdx.x < 128) {
    give_registers<24>();
    if (threadIdx.x == 0) work.copy(&x, &y, &x_, &y_);
    if (kKeys && threadIdx.x / 32 == 1) work.copy_statistics();
  } else {
    take_registers<240>();
    // The warpgroup's number comes from one lane, so that the compiler knows that all lanes agree.
    work.compute(__shfl_sync(~0u, (int)threadIdx.x / 128 - 1, 0));
  }
}

}  // namespace fused_attention::cuda
