// Softmax of rows, p_j = e^(s_j) / (e^sink + sum_k e^(s_k)) over the visible columns of
// s = scale * x + bias, and its gradient ds = p * (dp - sum_k p_k dp_k), for rows of any length.
//
// kThreads threads, a warp or a block, share a row; each takes pieces of 8 neighbouring columns,
// for which one Philox counter draws the bits. Up to kSoftmaxPieces pieces a thread stay in
// registers (kHeld), so that memory is read once; longer rows are read twice, the first time with a
// running maximum (online softmax, Milakov & Gimelshein 2018).
#pragma once

#include "philox.cuh"

namespace fused_attention::cuda {

// -- rows -----------------------------------------------------------------------------------------

// The offset of a row in every operand.
struct SoftmaxRow {
  int64_t offset[SoftmaxParams::kOperands];
  FA_DEVICE SoftmaxRow(const SoftmaxKernelParams& p, int64_t row) : offset{} {
    for (int d = p.dims - 1; d >= 0; --d) {
      const int64_t index = row % p.size[d];
      row /= p.size[d];
#pragma unroll
      for (int k = 0; k < SoftmaxParams::kOperands; ++k) offset[k] += index * p.stride[k][d];
    }
  }
  FA_DEVICE int64_t number() const { return offset[SoftmaxParams::kNumber]; }
  FA_DEVICE int query(const SoftmaxKernelParams& p) const { return (int)(number() % p.queries); }
  FA_DEVICE int64_t matrix(const SoftmaxKernelParams& p) const { return number() / p.queries; }
  FA_DEVICE int head(const SoftmaxKernelParams& p) const { return (int)(matrix(p) % p.heads); }
};

FA_DEVICE Dropout dropout_of(const SoftmaxKernelParams& p, const SoftmaxRow& row) {
  if (p.dropout_threshold == 0) return {};
  return {(uint64_t)p.philox[0], (uint32_t)p.philox[1], (uint32_t)row.matrix(p),
          p.dropout_threshold};
}

// Loads columns [8 * piece, 8 * piece + 8) of a row of `columns`, with 0 beyond its end.
template <typename T>
FA_DEVICE void load_eight(const T* row, int64_t piece, int64_t columns, float (&x)[8]) {
  const T* from = row + 8 * piece;
  if ((uint64_t)from % 16 == 0 && 8 * piece + 8 <= columns) {
    T values[8];
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; ++i) ((uint4*)values)[i] = ((const uint4*)from)[i];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = to_float(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = 8 * piece + i < columns ? to_float(from[i]) : 0.0f;
  }
}
template <typename T>
FA_DEVICE void store_eight(T* row, int64_t piece, int64_t columns, const float (&x)[8]) {
  T* to = row + 8 * piece;
  if ((uint64_t)to % 16 == 0 && 8 * piece + 8 <= columns) {
    T values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = from_float<T>(x[i]);
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; ++i) ((uint4*)to)[i] = ((const uint4*)values)[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (8 * piece + i < columns) to[i] = from_float<T>(x[i]);
    }
  }
}

// The threads of a row: a warp, or the block.
template <int kThreads>
struct RowGroup {
  static constexpr int kRows = kSoftmaxBlock / kThreads;
  static FA_DEVICE int thread() { return threadIdx.x % kThreads; }
  static FA_DEVICE int64_t row() { return (int64_t)blockIdx.x * kRows + threadIdx.x / kThreads; }

  // Combines x of all threads of a row in a fixed order; `shared`: 32 floats.
  template <typename Combine>
  static FA_DEVICE float reduce(float x, float* shared, const Combine& combine) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x = combine(x, __shfl_xor_sync(~0u, x, lanes));
    if constexpr (kThreads > 32) {
      __syncthreads();  // no warp reads the previous values any more
      if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
      __syncthreads();
      x = shared[0];
#pragma unroll
      for (int warp = 1; warp < kThreads / 32; ++warp) x = combine(x, shared[warp]);
    }
    return x;
  }
  static FA_DEVICE float maximum(float x, float* shared) {
    return reduce(x, shared, [](float a, float b) { return fmaxf(a, b); });
  }
  static FA_DEVICE float total(float x, float* shared) {
    return reduce(x, shared, [](float a, float b) { return a + b; });
  }
};

// -- forward --------------------------------------------------------------------------------------

// Bit i of the result: whether i < count and column i of a piece is not zero. The columns are
// `stride` apart.
FA_DEVICE uint32_t nonzero_of_eight(const uint8_t* row, int64_t piece, int64_t stride, int count) {
  const uint8_t* from = row + 8 * piece * stride;
  uint32_t nonzero = 0;
  if (stride == 1 && count == 8 && (uint64_t)from % 8 == 0) {
    const uint64_t eight = *(const uint64_t*)from;
#pragma unroll
    for (int i = 0; i < 8; ++i) nonzero |= (uint32_t)((eight >> (8 * i) & 0xff) != 0) << i;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) nonzero |= (uint32_t)(from[i * stride] != 0) << i;
    }
  }
  return nonzero;
}

// s <- s + bias, for at least the visible columns of one piece.
template <typename T>
FA_DEVICE void add_bias(const SoftmaxKernelParams& p, int64_t offset, int64_t piece,
                        uint32_t visible, float (&s)[8]) {
  if (p.bias_stride_k == 1 && p.bias_dtype == dtype_of<T>()) {
    float bias[8];
    load_eight((const T*)p.bias + offset, piece, p.columns, bias);
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i] += bias[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (visible >> i & 1) {
        s[i] += load_as_float(p.bias, p.bias_dtype, offset + (8 * piece + i) * p.bias_stride_k);
      }
    }
  }
}

// s <- scale * x + bias for one piece, -inf where hidden. Bit i of the result: whether column i is
// visible.
template <typename T>
FA_DEVICE uint32_t softmax_logits(const SoftmaxKernelParams& p, const SoftmaxRow& row,
                                  int64_t piece, int64_t visible_columns, float (&s)[8]) {
  const T* input = (const T*)p.input + row.offset[SoftmaxParams::kInput];
  load_eight(input, piece, p.columns, s);
  const int count = (int)max((int64_t)0, min((int64_t)8, visible_columns - 8 * piece));
  uint32_t visible = (1u << count) - 1;
  if (p.mask != nullptr) {
    const uint8_t* mask = p.mask + row.offset[SoftmaxParams::kMask];
    visible = nonzero_of_eight(mask, piece, p.mask_stride_k, count);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) s[i] *= (float)p.scale;
  if (p.bias != nullptr) add_bias<T>(p, row.offset[SoftmaxParams::kBias], piece, visible, s);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (!(visible >> i & 1)) s[i] = -kInf;
  }
  return visible;
}

// Returns e^(s - top). -inf - (-inf) is NaN: if top is -inf, 0 stands for it.
FA_DEVICE float exp_from(float s, float top) {
  return exp2_approx((s - (top == -kInf ? 0.0f : top)) * kLog2e);
}
FA_DEVICE void add_weights(uint32_t visible, float top, const float (&s)[8], float& sum) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (visible >> i & 1) sum += exp_from(s[i], top);
  }
}
// The maximum of s, and the sum of e^(s - max), over some columns.
struct SoftmaxState {
  float max, sum;
};

// Stores the output of one piece, and its weights before dropout if they are kept.
template <typename T>
FA_DEVICE void store_weights(const SoftmaxKernelParams& p, const SoftmaxRow& row,
                             const Dropout& dropout, int64_t piece, uint32_t visible, float top,
                             float factor, float (&s)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) s[i] = visible >> i & 1 ? exp_from(s[i], top) * factor : 0.0f;
  if (p.weights != nullptr) {
    store_eight((T*)p.weights + row.number() * p.columns, piece, p.columns, s);
  }
  if (dropout.threshold > 0) {
    const uint32_t kept = kept_byte(dropout, row.query(p), (int)piece);
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i] = kept >> i & 1 ? s[i] * (float)p.dropout_scale : 0.0f;
  }
  store_eight((T*)p.output + row.offset[SoftmaxParams::kOutput], piece, p.columns, s);
}

template <typename T, int kThreads, bool kHeld>
__global__ void __launch_bounds__(kSoftmaxBlock)
    masked_softmax_kernel(const __grid_constant__ SoftmaxKernelParams p) {
  using Group = RowGroup<kThreads>;
  __shared__ float shared[32];
  if (Group::row() >= p.groups * p.group_rows) return;
  const SoftmaxRow row(p, Group::row());
  const Dropout dropout = dropout_of(p, row);
  int64_t seen = p.columns;  // the columns that the diagonal leaves visible
  if (p.causal) seen = max((int64_t)0, min(seen, row.query(p) + p.diagonal_offset + 1));
  const int64_t pieces = (p.columns + 7) / 8, first = Group::thread();

  // m <- max(s), l <- sum(e^(s - m))
  float held[kHeld ? kSoftmaxPieces : 1][8];
  uint32_t visible[kHeld ? kSoftmaxPieces : 1];
  SoftmaxState own = {-kInf, 0};
  if constexpr (kHeld) {
#pragma unroll
    for (int k = 0; k < kSoftmaxPieces; ++k) {
      const int64_t piece = first + k * kThreads;
      visible[k] = 0;
      if (piece >= pieces) continue;
      visible[k] = softmax_logits<T>(p, row, piece, seen, held[k]);
#pragma unroll
      for (int i = 0; i < 8; ++i) own.max = fmaxf(own.max, held[k][i]);
    }
  } else {
    for (int64_t piece = first; piece < pieces; piece += kThreads) {
      visible[0] = softmax_logits<T>(p, row, piece, seen, held[0]);
      float top = own.max;
#pragma unroll
      for (int i = 0; i < 8; ++i) top = fmaxf(top, held[0][i]);
      if (top != -kInf) own.sum *= exp_from(own.max, top);
      own.max = top;
      add_weights(visible[0], top, held[0], own.sum);
    }
  }
  const bool has_sink = p.sinks != nullptr;
  const float sink = has_sink ? ((const float*)p.sinks)[row.head(p)] : -kInf;
  const float most = Group::maximum(own.max, shared), top = fmaxf(most, sink);
  if constexpr (kHeld) {
#pragma unroll
    for (int k = 0; k < kSoftmaxPieces; ++k) {
      add_weights(visible[k], top, held[k], own.sum);
    }
  } else if (top != -kInf) {
    own.sum *= exp_from(own.max, top);
  }
  const float sum = Group::total(own.sum, shared);
  const float of_sink = has_sink && sink != -kInf ? exp_from(sink, top) : 0.0f;
  // A fully masked row is 0; NaN stays NaN.
  const float factor = sum == 0 ? 0.0f : 1 / (sum + of_sink);
  if (p.sink_weight != nullptr && first == 0) {
    const float all = sum + of_sink;
    ((float*)p.sink_weight)[row.number()] = all == 0 ? 0.0f : of_sink / all;
  }
  if constexpr (kHeld) {
#pragma unroll
    for (int k = 0; k < kSoftmaxPieces; ++k) {
      const int64_t piece = first + k * kThreads;
      if (piece < pieces) {
        store_weights<T>(p, row, dropout, piece, visible[k], top, factor, held[k]);
      }
    }
  } else {
    for (int64_t piece = first; piece < pieces; piece += kThreads) {
      visible[0] = softmax_logits<T>(p, row, piece, seen, held[0]);
      store_weights<T>(p, row, dropout, piece, visible[0], top, factor, held[0]);
    }
  }
}

// -- backward -------------------------------------------------------------------------------------

// w <- p, dp <- the gradient of p, for one piece. A weight of 0 has dp = 0, whatever grad_out
// holds.
template <typename T>
FA_DEVICE void load_weights(const SoftmaxKernelParams& p, const SoftmaxRow& row,
                            const Dropout& dropout, int64_t piece, float (&w)[8], float (&dp)[8]) {
  load_eight((const T*)p.input + row.offset[SoftmaxParams::kInput], piece, p.columns, w);
  load_eight((const T*)p.grad_out + row.offset[SoftmaxParams::kGradOut], piece, p.columns, dp);
  uint32_t kept = ~0u;
  if (dropout.threshold > 0) kept = kept_byte(dropout, row.query(p), (int)piece);
  const float scale = dropout.threshold > 0 ? (float)p.dropout_scale : 1.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) dp[i] = w[i] != 0 && (kept >> i & 1) ? dp[i] * scale : 0.0f;
}

template <typename T, int kThreads, bool kHeld>
__global__ void __launch_bounds__(kSoftmaxBlock)
    masked_softmax_backward_kernel(const __grid_constant__ SoftmaxKernelParams p) {
  using Group = RowGroup<kThreads>;
  __shared__ float shared[32];
  if (Group::row() >= p.groups * p.group_rows) return;
  const SoftmaxRow row(p, Group::row());
  const Dropout dropout = dropout_of(p, row);
  const int64_t pieces = (p.columns + 7) / 8, first = Group::thread();
  T* dx = (T*)p.output + row.offset[SoftmaxParams::kOutput];

  // delta <- sum_k p_k dp_k
  float w[kHeld ? kSoftmaxPieces : 1][8], dp[kHeld ? kSoftmaxPieces : 1][8], delta = 0;
  if constexpr (kHeld) {
#pragma unroll
    for (int k = 0; k < kSoftmaxPieces; ++k) {
      const int64_t piece = first + k * kThreads;
      if (piece >= pieces) continue;
      load_weights<T>(p, row, dropout, piece, w[k], dp[k]);
#pragma unroll
      for (int i = 0; i < 8; ++i) delta += w[k][i] * dp[k][i];
    }
  } else {
    for (int64_t piece = first; piece < pieces; piece += kThreads) {
      load_weights<T>(p, row, dropout, piece, w[0], dp[0]);
#pragma unroll
      for (int i = 0; i < 8; ++i) delta += w[0][i] * dp[0][i];
    }
  }
  delta = Group::total(delta, shared);
  if (first == 0) {
    if (p.delta != nullptr) p.delta[row.number()] = delta;
    if (p.sink_terms != nullptr) {
      const float weight = ((const float*)p.sink_weight)[row.number()];
      ((float*)p.sink_terms)[row.number()] = weight == 0 ? 0.0f : -weight * delta;
    }
  }
  // dx <- scale p (dp - delta)
  const auto finish = [&](int64_t piece, float (&weight)[8], float (&gradient)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float ds = weight[i] == 0 ? 0.0f : weight[i] * (gradient[i] - delta);
      gradient[i] = (float)p.scale * ds;
    }
    store_eight(dx, piece, p.columns, gradient);
  };
  if constexpr (kHeld) {
#pragma unroll
    for (int k = 0; k < kSoftmaxPieces; ++k) {
      const int64_t piece = first + k * kThreads;
      if (piece < pieces) finish(piece, w[k], dp[k]);
    }
  } else {
    for (int64_t piece = first; piece < pieces; piece += kThreads) {
      load_weights<T>(p, row, dropout, piece, w[0], dp[0]);
      finish(piece, w[0], dp[0]);
    }
  }
}

FA_DEVICE void store_bias_gradient(const SoftmaxKernelParams& p, int64_t at, float x) {
  if (p.bias_dtype == DType::kFloat32) ((float*)p.dbias)[at] = x;
  if (p.bias_dtype == DType::kBFloat16) ((BFloat16*)p.dbias)[at] = from_float<BFloat16>(x);
  if (p.bias_dtype == DType::kFloat16) ((Half*)p.dbias)[at] = from_float<Half>(x);
  if (p.bias_dtype == DType::kFloat64) ((double*)p.dbias)[at] = x;
}

// Sums ds over a chunk of the rows of a group. Each thread sums one column; if the bias has one
// value for all columns, all threads sum that value together.
template <typename T>
__global__ void __launch_bounds__(kBiasColumns)
    masked_softmax_dbias_kernel(const __grid_constant__ SoftmaxKernelParams p) {
  const int64_t width = p.bias_width, parts = (width + kBiasColumns - 1) / kBiasColumns;
  const int64_t task = blockIdx.x / parts, group = task / p.chunks, chunk = task % p.chunks;
  const bool narrow = width == 1 && p.columns > 1;
  const int64_t own = blockIdx.x % parts * kBiasColumns + threadIdx.x;
  const int64_t begin = group * p.group_rows + p.group_rows * chunk / p.chunks;
  const int64_t end = group * p.group_rows + p.group_rows * (chunk + 1) / p.chunks;
  float sum = 0;
  for (int64_t number = begin; number < end; ++number) {
    const SoftmaxRow row(p, number);
    const Dropout dropout = dropout_of(p, row);
    const float delta = p.delta[row.number()];
    const int64_t last = narrow ? p.columns : min(own + 1, p.columns);
    for (int64_t column = narrow ? (int64_t)threadIdx.x : own; column < last;
         column += kBiasColumns) {
      const float w = to_float(((const T*)p.input)[row.offset[SoftmaxParams::kInput] + column]);
      if (w == 0) continue;
      float dp = to_float(((const T*)p.grad_out)[row.offset[SoftmaxParams::kGradOut] + column]);
      if (dropout.threshold > 0) {
        const uint32_t kept = kept_byte(dropout, row.query(p), (int)(column / 8));
        dp = kept >> column % 8 & 1 ? dp * (float)p.dropout_scale : 0.0f;
      }
      sum += w * (dp - delta);
    }
  }
  if (narrow) sum = block_total<kBiasColumns>(sum);
  if (own >= width) return;
  if (p.chunks > 1) {
    ((float*)p.partial)[task * width + own] = sum;
  } else {
    store_bias_gradient(p, group * width + own, sum);
  }
}

// Sums the chunks of each group in order; each thread sums one element of dbias.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    masked_softmax_dbias_sum_kernel(const __grid_constant__ SoftmaxKernelParams p) {
  const int64_t at = (int64_t)blockIdx.x * kThreads + threadIdx.x, width = p.bias_width;
  if (at >= p.groups * width) return;
  const float* parts = (const float*)p.partial + at / width * p.chunks * width + at % width;
  float sum = 0;
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk) sum += parts[chunk * width];
  store_bias_gradient(p, at, sum);
}

// dsinks[h] <- the sum of the sink terms of the rows of head h. Each thread block sums one head.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    masked_softmax_dsinks_kernel(const __grid_constant__ SoftmaxKernelParams p) {
  const int64_t h = blockIdx.x, rows = p.groups * p.group_rows / p.heads;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    const int64_t number = (i / p.queries * p.heads + h) * p.queries + i % p.queries;
    sum += ((const float*)p.sink_terms)[number];
  }
  sum = block_total<kThreads>(sum);
  if (threadIdx.x == 0) ((float*)p.dsinks)[h] = sum;
}

}  // namespace fused_attention::cuda
