// Attention backward from the saved log-sum-exp (FlashAttention-2, Dao 2023, Algorithm 2), in two
// passes. No two threads add to the same float, so that the result is always the same:
//
//   delta = rowsum(do * o) - dlse
//   p  = exp(s - lse)                      recomputed in each pass
//   dp = do v^T
//   ds = p * (dp - delta)
//   dv = p^T do,  dk = scale ds^T q        a block of keys against the queries that see it
//   dq = scale ds k                        a block of queries against the keys it sees
//
// Both passes are one kernel: the rows that a thread block owns, keys or queries, are the rows of
// the accumulators (s^T = k q^T in the former, s = q k^T in the latter), whose registers are then
// the left operand of the products that compute the gradients. Dropout replaces p by z p in dv and
// dp by z dp in ds, where z is the scale of the kept weights and 0 for the others. dbias = ds
// before the cap slope, summed where the bias is broadcast; a kernel of its own computes it, with
// one thread block for each tile of dbias.
#pragma once

#include "copy.cuh"
#include "philox.cuh"
#include "products.cuh"
#include "scores.cuh"

namespace fused_attention::cuda {

// Computes delta, and row_lse from lse in the form that the other kernels want. Each warp computes
// one row.
template <typename T>
__global__ void __launch_bounds__(32 * kRowsOfDelta)
    attention_delta_kernel(const __grid_constant__ KernelParams p) {
  const int64_t row = (int64_t)blockIdx.x * kRowsOfDelta + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= count_rows(p)) return;
  const int64_t head = row / p.Sq, i = row % p.Sq, b = head / p.Hq, h = head % p.Hq;
  const T* out = head_of<const T>(p.out, (int)b, (int)h) + i * p.out.stride_s;
  const T* grad = head_of<const T>(p.grad_out, (int)b, (int)h) + i * p.grad_out.stride_s;
  float sum = 0;
  for (int d = lane; d < (int)p.Dv; d += 32) {
    // A fully masked row has o = 0 and adds nothing to the gradient of a sink, whatever do holds.
    const float o = to_float(out[d]);
    sum += o == 0 ? 0 : o * to_float(grad[d]);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (lane != 0) return;
  if (p.grad_lse != nullptr) {
    sum -= ((const float*)p.grad_lse)[b * p.grad_lse_stride_b + h * p.grad_lse_stride_h +
                                      i * p.grad_lse_stride_s];
  }
  const float lse = ((const float*)p.lse)[row];
  const bool empty = lse == -kInf;
  ((float*)p.delta)[row] = empty ? 0 : sum;
  p.row_lse[row] = empty ? kInf : p.lse_in_log2 ? lse * kLog2e : lse;
}

template <typename T, int kHeadDim, bool kFastPath, Gradient kGradient>
struct BackwardBlock {
  static constexpr BackwardTiles kTiles =
      backward_tiles(Terms<T>::kCount == 3, kHeadDim, kFastPath);
  // Whether rows are keys.
  static constexpr bool kKeys = kGradient != Gradient::kQuery && kGradient != Gradient::kBias;
  static constexpr bool kFirst = kGradient != Gradient::kValue;  // ds is made, for dk, dq or dbias
  static constexpr bool kSecond = kGradient == Gradient::kValue || kGradient == Gradient::kKeyValue;
  static constexpr int kRowTiles = kTiles.row_tiles, kRows = kTiles.rows();
  static constexpr int kColumns = kTiles.columns, kThreads = kTiles.threads();
  static constexpr int kStages = kTiles.stages, kTerms = Terms<T>::kCount;
  using RowTile = Tile<kRows, kHeadDim, kTerms>;
  using ColumnTile = Tile<kColumns, kHeadDim, kTerms>;
  // A stage holds a tile of columns: q or k, do or v, and lse and delta.
  static constexpr int kStageBytes = 2 * ColumnTile::kBytes + kColumns * 8;
  using Accumulators = float[kRowTiles][kHeadDim / 8][4];
  using Scores = float[kRowTiles][kColumns / 8][4];

  const KernelParams& p;
  const Sequence seq;
  const int head;  // that of the owned rows
  const int row_start, row_end, row_warp;
  const float scale_log2;
  const uint32_t x_tile, y_tile, stages;  // rows of q or k, rows of do or v
  const uint32_t x_read, y_read;          // addresses from which this lane reads, see `Tile`
  Accumulators dx, dy;                    // dk or dq; dv
  // The query head and the columns that are being computed.
  int h;
  Range columns;
  RowSource<T> x_columns, y_columns;
  Dropout dropout;
  float row_lse[kRowTiles][2], row_delta[kRowTiles][2];  // if rows are queries
  // Bit `half`: whether this lane's row has met a column that it sees, or that sees it. Unused if
  // kFastPath, where `takes_part` tells.
  uint32_t seen_rows = 0;

  FA_DEVICE BackwardBlock(const KernelParams& params, const TokenBlock& block, uint32_t shared)
      : p(params),
        seq(sequence_of<kFastPath>(p, block.b)),
        head(block.h),
        row_start(block.start),
        row_end(min(row_start + kRows, kKeys ? seq.Sk : seq.Sq)),
        row_warp(row_start + threadIdx.x / 32 * 16 * kRowTiles),
        scale_log2((float)p.scale * kLog2e),
        x_tile(shared),
        y_tile(x_tile + RowTile::kBytes),
        stages(y_tile + RowTile::kBytes),
        x_read(RowTile::by_columns(x_tile + (row_warp - row_start) * RowTile::kRowBytes)),
        y_read(x_read + RowTile::kBytes) {}

  // Returns the rows of q or do, or (kOfKeys) of k or v.
  template <bool kOfKeys>
  FA_DEVICE RowSource<T> source(const TensorView& view, int head_, int64_t width,
                                Range rows) const {
    return kOfKeys ? key_rows<T>(p, view, seq, head_, width, rows)
                   : query_rows<T>(p, view, seq, head_, width, rows);
  }

  FA_DEVICE void load_rows() const {
    const Range rows = {row_start, row_end};
    const RowSource<T> x = source<kKeys>(kKeys ? p.key : p.query, head, p.D, rows);
    const RowSource<T> y = source<kKeys>(kKeys ? p.value : p.grad_out, head, p.Dv, rows);
    load_tile<T, kRows, kHeadDim, kThreads, false, kFastPath>(x_tile, x, row_start);
    load_tile<T, kRows, kHeadDim, kThreads, false, kFastPath>(y_tile, y, row_start);
    copy_commit();
  }

  FA_DEVICE void run() {
    clear(dx);
    clear(dy);
    load_rows();
    const int group = (int)((uint32_t)p.Hq / (uint32_t)p.Hkv);
    if constexpr (kKeys) {
      columns = visible_queries(p, seq, row_start, row_end);
      for (int i = 0; i < group; ++i) against_columns(head * group + i, head * group + i);
    } else {
      columns = visible_keys(p, seq, row_start, row_end);
      against_columns(head, head / group);
    }
    copy_wait<0>();
    store();
  }

  FA_DEVICE void select_head(int h_query, int h_columns) {
    h = h_query;
    x_columns = source<!kKeys>(kKeys ? p.query : p.key, h_columns, p.D, columns);
    y_columns = source<!kKeys>(kKeys ? p.grad_out : p.value, h_columns, p.Dv, columns);
    dropout = dropout_of(p, seq.b, h);
    if constexpr (!kKeys) load_row_statistics();
  }

  // Computes the rows against all columns of head h_columns, for the query head h_query.
  FA_DEVICE void against_columns(int h_query, int h_columns) {
    select_head(h_query, h_columns);
    const int begin = columns.begin / kColumns * kColumns;
    // The range of starts of the tiles that need no mask and whose right neighbour, which their
    // step loads, lies wholly within the columns.
    Range whole = {0, 0};
    if (kFastPath) whole = seen_by_all<kKeys>(p, seq, row_start, row_end);
    whole.end -= 2 * kColumns - 1;
    __syncthreads();  // no warp reads the previous head's columns any more
    if (columns.begin < columns.end) load_columns<false>(begin, stages);
    int c = begin, stage = 0;
    while (c < columns.end) {
      for (; c < columns.end && !(c >= whole.begin && c < whole.end); c += kColumns) {
        step<true>(c, stage);
      }
      if constexpr (kFastPath) {
        for (; c < columns.end && c < whole.end; c += kColumns) step<false>(c, stage);
      }
    }
  }

  FA_DEVICE const float* statistics(const void* of) const {
    return (const float*)of + row_number(p, seq, h);
  }

  FA_DEVICE void load_row_statistics() {
    const float *lse = statistics(p.row_lse), *delta = statistics(p.delta);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = row_warp + 16 * i + 8 * half + lane_row();
        row_lse[i][half] = query < seq.Sq ? lse[query] : kInf;
        row_delta[i][half] = query < seq.Sq ? delta[query] : 0;
      }
    }
  }

  template <bool kWhole>
  FA_DEVICE void load_columns(int column_start, uint32_t to) const {
    load_tile<T, kColumns, kHeadDim, kThreads, kWhole, kFastPath>(to, x_columns, column_start);
    to += ColumnTile::kBytes;
    load_tile<T, kColumns, kHeadDim, kThreads, kWhole, kFastPath>(to, y_columns, column_start);
    if constexpr (kKeys) {
      to += ColumnTile::kBytes;
      static_assert(2 * kColumns <= kThreads);
      const int i = threadIdx.x, query = column_start + i / 2;
      if (i < 2 * kColumns) {
        const bool inside = kWhole || query < columns.end;
        const float* from = statistics(i % 2 == 0 ? p.row_lse : p.delta) + (inside ? query : 0);
        copy_word_async(to + i * 4, from, inside ? 4 : 0);
      }
    }
    copy_commit();
  }

  template <bool kMasked>
  FA_DEVICE void step(int column_start, int& stage) {
    const uint32_t x_now = stages + stage * kStageBytes, y_now = x_now + ColumnTile::kBytes;
    const int next = column_start + kColumns;
    copy_wait<0>();
    __syncthreads();  // the columns have arrived, and no warp reads those of the other stage
    if (kStages == 2) {
      stage ^= 1;
      if (!kMasked || next < columns.end) {
        load_columns<!kMasked>(next, stages + stage * kStageBytes);
      }
    }
    Scores s, dp;
    multiply(x_now, y_now, s, dp);
    const uint32_t seen = differentiate<kMasked>(column_start, y_now + ColumnTile::kBytes, s, dp);

    // dv <- dv + p^T do; dk <- dk + ds^T q or dq <- dq + ds k
    const int products = products_of<T>(p);
    if constexpr (kSecond) {
      multiply_probabilities<T, ColumnTile, !kFastPath, kRowTiles, kColumns, kHeadDim>(
          products, s, ColumnTile::by_columns(y_now), seen, dy);
    }
    if constexpr (kFirst) {
      multiply_probabilities<T, ColumnTile, !kFastPath, kRowTiles, kColumns, kHeadDim>(
          products, dp, ColumnTile::by_columns(x_now), seen, dx);
    }
    if (kStages == 1 && next < columns.end) {
      __syncthreads();  // no warp reads the columns any more
      load_columns<!kMasked>(next, stages);
    }
  }

  // s <- x x'^T, dp <- y y'^T
  FA_DEVICE void multiply(uint32_t x_now, uint32_t y_now, Scores& s, Scores& dp) const {
    const int products = products_of<T>(p);
    const auto load_from = [](uint32_t read) {
      return [=](int i, int k, uint32_t (&a)[kTerms][4]) {
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
          load_matrices(a[term], RowTile::move(read, i * 16, k, term));
        }
      };
    };
    multiply_rows<T, ColumnTile, kRowTiles, kColumns, kHeadDim>(products, load_from(x_read),
                                                                ColumnTile::by_rows(x_now), s);
    if constexpr (kFirst) {
      multiply_rows<T, ColumnTile, kRowTiles, kColumns, kHeadDim>(products, load_from(y_read),
                                                                  ColumnTile::by_rows(y_now), dp);
    }
  }

  // s <- z p, dp <- ds. Returns which columns some row of the warp sees.
  template <bool kMasked>
  FA_DEVICE uint32_t differentiate(int column_start, uint32_t statistics_at, Scores& s,
                                   Scores& dp) {
    uint32_t seen = ~0u, visible[2] = {~0u, ~0u}, keep[2] = {~0u, ~0u};
    float slope[kFastPath ? 1 : kColumns / 8][4];
    if constexpr (kFastPath) {
      if (kMasked) {
        hide_outside_band<kKeys, kRowTiles, kColumns>(p, seq, row_warp, column_start, s);
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_warp + 8 * half + lane_row();
        visible[half] = visible_columns<kKeys, kColumns>(p, seq, h, row, column_start);
        finish_scores<kKeys, kColumns, true>(p, seq, h, row, half, column_start, visible[half],
                                             s[0], slope);
      }
      seen_rows |= (uint32_t)(visible[0] != 0) | (uint32_t)(visible[1] != 0) << 1;
      seen = any_row(visible[0] | visible[1]);
      if (dropout.threshold > 0) {
        dropout_keep_bits<kColumns, kKeys>(dropout, row_warp, column_start, keep);
      }
    }
    const float kept = dropout.threshold > 0 ? (float)p.dropout_scale : 1.0f;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      float column_lse[2], column_delta[2];
      if constexpr (kKeys) {
        const float4 both = load_shared_floats(statistics_at + (8 * n + lane_column()) * 8);
        column_lse[0] = both.x, column_delta[0] = both.y;
        column_lse[1] = both.z, column_delta[1] = both.w;
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float lse = kKeys ? column_lse[c % 2] : row_lse[i][c / 2];
          const float delta = kKeys ? column_delta[c % 2] : row_delta[i][c / 2];
          float &w = s[i][n][c], &d = dp[i][n][c];
          // p <- exp(s - lse), ds <- p * (dp - delta); both are 0 where hidden, whatever v holds
          if constexpr (kFastPath) {
            const bool hidden = kMasked && w == -kInf;
            w = exp2_approx(w * scale_log2 - lse);
            if (kFirst) d = hidden ? 0.0f : w * (d - delta);
          } else {
            const bool keeps = keep[c / 2] >> (2 * n + c % 2) & 1;
            const bool sees = visible[c / 2] >> (2 * n + c % 2) & 1;
            w = sees ? exp2_approx((w - lse) * kLog2e) : 0.0f;
            if (kFirst) {
              d = sees ? w * ((keeps ? d * kept : 0.0f) - delta) : 0.0f;
              if (kGradient != Gradient::kBias) d *= slope[n][c];
            }
            w = keeps ? w * kept : 0.0f;
          }
        }
      }
    }
    return seen;
  }

  // sum <- sum + ds of one tile of columns, for the gradient of the bias.
  FA_DEVICE void add_to_bias(int column_start, float (&sum)[kColumns / 8][4]) {
    const int group = (int)((uint32_t)p.Hq / (uint32_t)p.Hkv);
    columns = visible_keys(p, seq, row_start, row_end);
    if (column_start >= columns.end || column_start + kColumns <= columns.begin) return;
    __syncthreads();  // no warp reads the previous tiles any more
    load_rows();
    select_head(head, head / group);
    load_columns<false>(column_start, stages);
    copy_wait<0>();
    __syncthreads();
    Scores s, dp;
    multiply(stages, stages + ColumnTile::kBytes, s, dp);
    differentiate<true>(column_start, 0, s, dp);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[n][c] += dp[0][n][c];
    }
  }

  FA_DEVICE void store() {
    const float scale = (float)p.scale;
    for (int lanes = 1; lanes < 4; lanes *= 2) {  // four lanes share a row
      if (!kFastPath) seen_rows |= __shfl_xor_sync(~0u, seen_rows, lanes);
    }
    if (kFirst) store_rows(kKeys ? p.dk : p.dq, (int)p.D, scale, dx);
    if (kSecond) store_rows(p.dv, (int)p.Dv, 1, dy);
  }

  FA_DEVICE void store_rows(const TensorView& to, int width, float factor,
                            const Accumulators& acc) const {
    T* rows = head_of<T>(to, seq.b, head, kKeys ? seq.k_start : seq.q_start);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_warp + 16 * i + 8 * half + lane_row();
        // A row that takes no part has a gradient of 0, even if 0 * NaN was added to it.
        const bool seen = kFastPath ? takes_part<kKeys>(p, seq, row) : seen_rows >> half & 1;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          const int d = 8 * n + lane_column();
          const float low = seen ? acc[i][n][2 * half] * factor : 0.0f;
          const float high = seen ? acc[i][n][2 * half + 1] * factor : 0.0f;
          T* at = rows + row * to.stride_s + d;
          if constexpr (kFastPath) {
            if (row < row_end && d < width) *(uint32_t*)at = pack<T>(low, high);
          } else {
            if (row < row_end && d < width) at[0] = from_float<T>(low);
            if (row < row_end && d + 1 < width) at[1] = from_float<T>(high);
          }
        }
      }
    }
  }
};

template <typename T, int kHeadDim, bool kFastPath, Gradient kGradient>
__global__ void __launch_bounds__(
    backward_tiles(Terms<T>::kCount == 3, kHeadDim, kFastPath).threads(), kHeadDim <= 128 ? 2 : 1)
    attention_backward_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(128) char shared[];
  using Block = BackwardBlock<T, kHeadDim, kFastPath, kGradient>;
  const TokenBlock block = Block::kKeys ? key_block(p, Block::kRows) : query_block(p, Block::kRows);
  Block work(p, block, shared_address(shared));
  if (work.row_start < work.row_end) work.run();
}

// The gradients of a page are the sums of those of its users, the entries of the table that hold
// its number, in order. Each thread block sums one page and head. If the table has more than
// kThreadsOfPages entries, the sum is rounded to T after every kThreadsOfPages of them.
template <typename T>
__global__ void __launch_bounds__(kThreadsOfPages)
    attention_page_gradients_kernel(const __grid_constant__ KernelParams p) {
  __shared__ int users[kThreadsOfPages];
  __shared__ uint32_t found[kThreadsOfPages / 32];
  const int page = (int)(blockIdx.x / (uint32_t)p.Hkv), h = (int)(blockIdx.x % (uint32_t)p.Hkv);
  const int columns = (int)p.block_table_stride_b, size = (int)p.page_size;
  const int entries = (int)p.B * columns, thread = threadIdx.x;
  for (int first = 0; first == 0 || first < entries; first += kThreadsOfPages) {
    const int entry = first + thread, b = entry < entries ? entry / columns : 0;
    bool uses = entry < entries;
    if (uses) {
      uses = between(p.block_table[entry], 0, (int)p.page_count - 1) == page &&
             entry % columns * size < sequence_of(p, b).Sk;
    }
    const uint32_t mine = __ballot_sync(~0u, uses);
    __syncthreads();  // no thread reads the previous users any more
    if (thread % 32 == 0) found[thread / 32] = mine;
    __syncthreads();
    int count = 0, before = 0;
    for (int warp = 0; warp < kThreadsOfPages / 32; ++warp) {
      if (warp < thread / 32) before += __popc(found[warp]);
      count += __popc(found[warp]);
    }
    if (uses) users[before + __popc(mine & ((1u << thread % 32) - 1))] = entry;
    __syncthreads();
    const int width = (int)(p.D + p.Dv);
    for (int i = thread; i < size * width; i += kThreadsOfPages) {
      const int row = i / width, column = i % width, is_dv = column >= (int)p.D;
      const int d = is_dv ? column - (int)p.D : column;
      T* to = head_of<T>(is_dv ? p.page_dv : p.page_dk, page, h, row) + d;
      float sum = first == 0 ? 0.0f : to_float(*to);
      for (int user = 0; user < count; ++user) {
        const int of = users[user] / columns, key = users[user] % columns * size + row;
        if (key >= sequence_of(p, of).Sk) continue;
        sum += to_float(head_of<const T>(is_dv ? p.dv : p.dk, of, h, key)[d]);
      }
      *to = from_float<T>(sum);
    }
  }
}

FA_DEVICE void store_from_float(void* data, DType dtype, int64_t index, float x) {
  if (dtype == DType::kFloat32) ((float*)data)[index] = x;
  if (dtype == DType::kBFloat16) ((BFloat16*)data)[index] = from_float<BFloat16>(x);
  if (dtype == DType::kFloat16) ((Half*)data)[index] = from_float<Half>(x);
  if (dtype == DType::kFloat64) ((double*)data)[index] = x;
}

// Stores the tile of dbias at block (b, h, m, n) = at, summed over rows and columns where dbias is
// broadcast along them.
template <int kColumns, int kRows>
FA_DEVICE void store_bias(const KernelParams& p, const int (&at)[4], float (&sum)[kColumns / 8][4],
                          char* shared) {
  const bool one_row = p.dbias.stride_q == 0, one_column = p.dbias.stride_k == 0;
  float* rows = (float*)shared;  // [kRows][kColumns]
  __syncthreads();               // no warp reads tiles any more
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int row = (int)threadIdx.x / 32 * 16 + c / 2 * 8 + lane_row();
      rows[row * kColumns + 8 * n + lane_column() + c % 2] = sum[n][c];
    }
  }
  __syncthreads();
  const int m_start = at[2] * kRows, n_start = at[3] * kColumns;
  const int height = one_row ? 1 : min(kRows, (int)p.Sq - m_start);
  const int width = one_column ? 1 : min(kColumns, (int)p.Sk - n_start);
  const int64_t tile = at[0] * p.dbias.stride_b + at[1] * p.dbias.stride_h +
                       m_start * p.dbias.stride_q + n_start * p.dbias.stride_k;
  for (int i = threadIdx.x; i < height * width; i += blockDim.x) {
    const int row = i / width, column = i % width;
    float total = 0;
    for (int r = one_row ? 0 : row; r < (one_row ? kRows : row + 1); ++r) {
      for (int c = one_column ? 0 : column; c < (one_column ? kColumns : column + 1); ++c) {
        total += rows[r * kColumns + c];
      }
    }
    store_from_float(p.dbias.data, p.dbias.dtype,
                     tile + row * p.dbias.stride_q + column * p.dbias.stride_k, total);
  }
}

// Each thread block computes a tile of dbias: the sum of ds, in order, over the dimensions along
// which the bias is broadcast.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(backward_tiles(Terms<T>::kCount == 3, kHeadDim, false).threads())
    attention_dbias_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(128) char shared[];
  using Block = BackwardBlock<T, kHeadDim, false, Gradient::kBias>;
  constexpr int kRows = Block::kRows, kColumns = Block::kColumns;
  const int sizes[4] = {(int)p.B, (int)p.Hq, ceil_div((int)p.Sq, kRows),
                        ceil_div((int)p.Sk, kColumns)};
  const int64_t strides[4] = {p.dbias.stride_b, p.dbias.stride_h, p.dbias.stride_q,
                              p.dbias.stride_k};
  int begin[4], end[4];
  uint32_t rest = blockIdx.x;
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    const bool kept = strides[i] != 0;
    begin[i] = kept ? (int)(rest % (uint32_t)sizes[i]) : 0;
    end[i] = kept ? begin[i] + 1 : sizes[i];
    if (kept) rest /= (uint32_t)sizes[i];
  }
  float sum[kColumns / 8][4] = {};
  for (int b = begin[0]; b < end[0]; ++b) {
    for (int h = begin[1]; h < end[1]; ++h) {
      for (int m = begin[2]; m < end[2]; ++m) {
        for (int n = begin[3]; n < end[3]; ++n) {
          Block work(p, {b, h, m * kRows}, shared_address(shared));
          work.add_to_bias(n * kColumns, sum);
        }
      }
    }
  }
  store_bias<kColumns, kRows>(p, begin, sum, shared);
}

// dsinks = -sum(exp(sink - lse) * delta), over the queries of a head in all sequences. Each thread
// block sums one head.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    attention_dsinks_kernel(const __grid_constant__ KernelParams p) {
  // Tokens of no sequence have no sink: their lse is -inf.
  const int64_t h = blockIdx.x, rows = (is_packed(p) ? 1 : p.B) * p.Sq;
  const float sink = ((const float*)p.sinks)[h];
  float sum = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    const int64_t at = (i / p.Sq * p.Hq + h) * p.Sq + i % p.Sq;
    const float lse = ((const float*)p.lse)[at];
    if (lse != -kInf) sum -= exp2_approx((sink - lse) * kLog2e) * ((const float*)p.delta)[at];
  }
  sum = block_total<kThreads>(sum);
  if (threadIdx.x == 0) ((float*)p.dsinks)[h] = sum;
}

}  // namespace fused_attention::cuda
