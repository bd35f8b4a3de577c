// Plans the launches of a call: pure functions of shapes, strides and options, tested without a
// GPU.
#pragma once

#include <stdio.h>

#include "../attention_params.h"

namespace fused_attention::cuda {

// The params of a CUDA kernel, passed by value: those of the CPU kernels, and the fields below.
struct KernelParams : AttentionParams {
  const int64_t* philox = nullptr;  // seed and offset of dropout, in device memory
  // Backward: the lse of each row [B, Hq, Sq], contiguous, +inf for a fully masked row. If
  // lse_in_log2, as the fast path wants it, lse is multiplied by log2 e.
  float* row_lse = nullptr;
  bool lse_in_log2 = false;
  bool aligned = false;    // every row that tiles read starts at a multiple of 16 bytes
  int64_t page_count = 0;  // all pages, of all sequences
  // Split-KV decode: the number of splits, and each split's partial (out, max and sum), float
  // [splits, rows, Dv], [splits, rows] and [splits, rows], where rows are those of lse.
  int64_t splits = 0;
  float *partial_out = nullptr, *partial_max = nullptr, *partial_sum = nullptr;
};

// Head sizes that kernels are compiled for; others are padded with zeros in shared memory.
constexpr int kHeadDims[] = {32, 64, 96, 128, 256};
constexpr int kMaxHeadDim = 256;
// Returns the smallest of kHeadDims that is at least D and Dv, or 0 if there is none.
constexpr int padded_head_dim(int64_t D, int64_t Dv) {
  for (int head_dim : kHeadDims) {
    if (D <= head_dim && Dv <= head_dim) return head_dim;
  }
  return 0;
}

// The tiles of attention_forward_kernel: 16 * row_tiles queries a warp, and block_n keys. terms:
// 16-bit elements that stand for one element (types.cuh). fast_path: a 16-bit call without options
// but causal, window, lse and sinks, on rows of whole 16-byte pieces.
struct ForwardTiles {
  int row_tiles, warps, block_n, terms, head_dim;
  constexpr int block_m() const { return 16 * row_tiles * warps; }
  constexpr int threads() const { return 32 * warps; }
  // q, k and v
  constexpr int shared_bytes() const { return (block_m() + 2 * block_n) * head_dim * 2 * terms; }
};
constexpr ForwardTiles forward_tiles(bool is_float, int head_dim, bool fast_path) {
  if (!is_float) return {fast_path && head_dim <= 128 ? 2 : 1, 4, 64, 1, head_dim};
  return {1, head_dim <= 128 ? 4 : 2, head_dim <= 64 ? 64 : head_dim <= 128 ? 32 : 16, 3, head_dim};
}

// The tiles of the forward on sm_90: `groups` warpgroups of 64 queries each, and one that copies.
struct HopperTiles {
  int groups, block_n, stages, head_dim;
  constexpr int block_m() const { return 64 * groups; }
  constexpr int threads() const { return 128 * (groups + 1); }
  // q, stages of k and v, barriers, and room to start at a multiple of 1024
  constexpr int shared_bytes() const {
    return (block_m() + 2 * stages * block_n) * head_dim * 2 + 32 * stages + 8 + 1024;
  }
};
constexpr HopperTiles hopper_tiles(int head_dim) { return {2, 128, 2, head_dim}; }
// The tiles of the backward on sm_90: a thread block owns rows, keys or queries, and meets the
// other of the two in tiles of `columns`.
struct HopperBackwardTiles {
  int groups, columns, stages, head_dim;
  constexpr int rows() const { return 64 * groups; }
  constexpr int threads() const { return 128 * (groups + 1); }
  // Two operands, and two floats a column, rounded up to a multiple of 1024
  constexpr int stage_bytes() const {
    return (2 * columns * head_dim * 2 + columns * 8 + 1023) / 1024 * 1024;
  }
  constexpr int shared_bytes() const {
    return 2 * rows() * head_dim * 2 + stages * (stage_bytes() + 16) + 8 + 1024;
  }
};
constexpr HopperBackwardTiles hopper_backward_tiles(int head_dim) { return {2, 64, 2, head_dim}; }
// CUDA's CUtensorMap, which describes a tensor to the copy engine.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// The tiles of attention_decode_kernel: 16 rows, and 16 keys a warp.
struct DecodeTiles {
  int warps, stages, terms, head_dim;
  constexpr int block_n() const { return 16 * warps; }
  constexpr int threads() const { return 32 * warps; }
  constexpr int shared_bytes() const {
    return (16 + 2 * stages * block_n()) * head_dim * 2 * terms;
  }
};
constexpr DecodeTiles decode_tiles(bool is_float, int head_dim) {
  if (!is_float) return {head_dim <= 128 ? 4 : 2, 2, 1, head_dim};
  return {head_dim <= 64 ? 4 : head_dim <= 128 ? 2 : 1, 1, 3, head_dim};
}

// The gradients that one launch of the backward computes. kKeyValue: dk and dv of a block of keys.
// With a head size of 256 each of the two fills the registers, so each has a pass of its own.
enum class Gradient { kQuery, kKey, kValue, kKeyValue, kBias };

// The tiles of the backward: a thread block holds `rows` queries (of q and do) or keys (of k and
// v), 16 * row_tiles a warp, and `stages` tiles of `columns` of the other of the two.
struct BackwardTiles {
  int row_tiles, warps, columns, stages, terms, head_dim;
  constexpr int rows() const { return 16 * row_tiles * warps; }
  constexpr int threads() const { return 32 * warps; }
  // Each tile has two operands, and each column two floats, its lse and delta.
  constexpr int shared_bytes() const {
    return 2 * (rows() + stages * columns) * head_dim * 2 * terms + stages * columns * 8;
  }
};
constexpr BackwardTiles backward_tiles(bool is_float, int head_dim, bool fast_path) {
  if (is_float) {
    return {1,       head_dim <= 64 ? 4 : head_dim <= 128 ? 2 : 1, head_dim <= 128 ? 32 : 16, 1, 3,
            head_dim};
  }
  return {fast_path && head_dim <= 64 ? 2 : 1, 4, head_dim <= 128 ? 32 : 16, 2, 1, head_dim};
}

// One kernel with its grid and shared memory: all that it is started with, except its params.
struct Launch {
  char kernel[80] = {};  // its template-id
  int64_t blocks = 0;
  int threads = 0, shared_bytes = 0;
};

constexpr int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Return the number of blocks of `size` queries or keys, as sequence.cuh numbers them.
inline int64_t query_blocks(const KernelParams& p, int64_t size) {
  if (p.cu_seqlens_q != nullptr) return p.Hq * (p.Sq / size + p.B + 1);
  return p.B * p.Hq * blocks_of(p.Sq, size);
}
inline int64_t key_blocks(const KernelParams& p, int64_t size) {
  if (p.cu_seqlens_k != nullptr && p.block_table == nullptr) {
    return p.Hkv * (p.Sk / size + p.B + 1);
  }
  return p.B * p.Hkv * blocks_of(p.Sk, size);
}
// Returns the number of rows of lse, delta and row_lse: [B, Hq, Sq], packed [Hq, Tq].
inline int64_t rows_of(const KernelParams& p) {
  return (p.cu_seqlens_q != nullptr ? 1 : p.B) * p.Hq * p.Sq;
}

inline bool is_float(const KernelParams& p) { return p.dtype == DType::kFloat32; }

// Returns whether the fast path serves the call; its rows are whole 16-byte pieces.
inline bool takes_fast_path(const KernelParams& p) {
  return !is_float(p) && p.aligned && p.D % 8 == 0 && p.Dv % 8 == 0 && p.scale > 0 &&
         !p.bends_scores() && p.mask.data == nullptr && p.bias.data == nullptr &&
         p.key_padding_mask == nullptr && p.alibi_slopes == nullptr && p.dropout_threshold == 0 &&
         p.diagonal_start == 0 && p.block_table == nullptr;
}

inline const char* type_name(DType dtype) {
  return dtype == DType::kFloat32 ? "float" : dtype == DType::kFloat16 ? "Half" : "BFloat16";
}

// Split-KV decode serves calls of at most kMaxDecodeRows rows (the queries of all heads that share
// a key head). Rows that need more than one tile use it only if there are several splits. The keys
// are split until there are about kDecodeBlocks thread blocks, but a split has at least
// kMinSplitKeys keys.
constexpr int64_t kMaxDecodeRows = 64, kDecodeTileRows = 16;
constexpr int64_t kDecodeBlocks = 256, kMinSplitKeys = 256;

// Returns the number of splits for attention_decode_kernel, or 0 if a kernel of the forward serves
// the call. seqlen_q, seqlen_k: those of the longest sequence, as far as is known; only speed
// depends on them.
inline int64_t decode_splits(const KernelParams& p, int64_t seqlen_q, int64_t seqlen_k) {
  // Hints out of range are ignored.
  if (seqlen_q <= 0 || seqlen_q > p.Sq) seqlen_q = p.Sq;
  if (seqlen_k <= 0 || seqlen_k > p.Sk) seqlen_k = p.Sk;
  const int64_t group = p.Hkv > 0 ? p.Hq / p.Hkv : 0, rows = group * seqlen_q;
  if (rows == 0 || rows > kMaxDecodeRows || p.dropout_threshold > 0) return 0;
  // The hint may be too small: row numbers of a longer sequence must fit into 32 bits, too.
  if (group * p.Sq >= (int64_t)1 << 31) return 0;
  if (p.window_left >= 0 && p.window_right >= 0) {
    const int64_t seen = p.window_left + seqlen_q + p.window_right;
    seqlen_k = seen < seqlen_k ? seen : seqlen_k;
  }
  const int64_t heads = p.B > 0 ? p.B * p.Hkv : 1;
  const int64_t wanted = blocks_of(kDecodeBlocks, heads), most = seqlen_k / kMinSplitKeys;
  const int64_t splits = wanted < most ? wanted : most;
  return splits > 1 ? splits : rows <= kDecodeTileRows ? 1 : 0;
}

constexpr int kRowsOfCombine = 4;  // rows of a thread block, one a warp

// The kernel of the splits, and the kernel that combines their partials.
struct DecodeLaunches {
  Launch splits, combine;
};
inline DecodeLaunches decode_launches(const KernelParams& p) {
  const int head_dim = padded_head_dim(p.D, p.Dv);
  const DecodeTiles tiles = decode_tiles(is_float(p), head_dim);
  DecodeLaunches launches;
  snprintf(launches.splits.kernel, sizeof launches.splits.kernel, "attention_decode_kernel<%s, %d>",
           type_name(p.dtype), head_dim);
  const int64_t rest = p.cu_seqlens_q != nullptr ? 1 : 0;  // for tokens of no sequence
  launches.splits.blocks = (p.B + rest) * p.Hkv * p.splits;
  launches.splits.threads = tiles.threads();
  launches.splits.shared_bytes = tiles.shared_bytes();
  snprintf(launches.combine.kernel, sizeof launches.combine.kernel, "attention_combine_kernel<%s>",
           type_name(p.dtype));
  launches.combine.blocks = blocks_of(rows_of(p), kRowsOfCombine);
  launches.combine.threads = 32 * kRowsOfCombine;
  return launches;
}

// Returns whether the kernels of sm_90 serve the call: one on the fast path, with head sizes up to
// 128. The copy engine takes no size and no stride of 0.
inline bool serves_hopper(const KernelParams& p, int compute_capability) {
  const auto fits = [&](const TensorView& x, int64_t B, int64_t H, int64_t S) {
    return (B <= 1 || x.stride_b > 0) && (H <= 1 || x.stride_h > 0) && (S <= 1 || x.stride_s > 0);
  };
  const int64_t B = p.cu_seqlens_q != nullptr ? 1 : p.B;
  const bool empty = B == 0 || p.Hq == 0 || p.Sq == 0 || p.Sk == 0 || p.D == 0 || p.Dv == 0;
  return compute_capability / 10 == 9 && takes_fast_path(p) && !empty && p.D <= 128 &&
         p.Dv <= 128 && fits(p.query, B, p.Hq, p.Sq) && fits(p.key, B, p.Hkv, p.Sk) &&
         fits(p.value, B, p.Hkv, p.Sk) &&
         (p.grad_out.data == nullptr || fits(p.grad_out, B, p.Hq, p.Sq));
}
constexpr int hopper_head_dim(int64_t D, int64_t Dv) { return D <= 64 && Dv <= 64 ? 64 : 128; }
inline Launch forward_hopper_launch(const KernelParams& p) {
  const int head_dim = hopper_head_dim(p.D, p.Dv);
  const HopperTiles tiles = hopper_tiles(head_dim);
  Launch launch;
  snprintf(launch.kernel, sizeof launch.kernel, "attention_forward_hopper_kernel<%s, %d>",
           type_name(p.dtype), head_dim);
  launch.blocks = query_blocks(p, tiles.block_m());
  launch.threads = tiles.threads();
  launch.shared_bytes = tiles.shared_bytes();
  return launch;
}

inline Launch forward_launch(const KernelParams& p) {
  const int head_dim = padded_head_dim(p.D, p.Dv);
  const ForwardTiles tiles = forward_tiles(is_float(p), head_dim, takes_fast_path(p));
  Launch launch;
  snprintf(launch.kernel, sizeof launch.kernel, "attention_forward_kernel<%s, %d, %s>",
           type_name(p.dtype), head_dim, takes_fast_path(p) ? "true" : "false");
  launch.blocks = query_blocks(p, tiles.block_m());
  launch.threads = tiles.threads();
  launch.shared_bytes = tiles.shared_bytes();
  return launch;
}

// The kernels of a backward, in order.
struct BackwardLaunches {
  static constexpr int kMax = 7;
  Launch items[kMax];
  int count = 0;
};

constexpr int kRowsOfDelta = 4;  // rows of a thread block, one a warp
constexpr int kThreadsOfPages = 256;

inline BackwardLaunches backward_launches(const KernelParams& p, int compute_capability) {
  const int head_dim = padded_head_dim(p.D, p.Dv);
  const bool fast_path = takes_fast_path(p);
  const BackwardTiles tiles = backward_tiles(is_float(p), head_dim, fast_path);
  BackwardLaunches launches;
  Launch& delta = launches.items[launches.count++];
  snprintf(delta.kernel, sizeof delta.kernel, "attention_delta_kernel<%s>", type_name(p.dtype));
  delta.blocks = blocks_of(rows_of(p), kRowsOfDelta);
  delta.threads = 32 * kRowsOfDelta;
  const auto add = [&](const char* gradient, int64_t blocks) {
    Launch& launch = launches.items[launches.count++];
    snprintf(launch.kernel, sizeof launch.kernel,
             "attention_backward_kernel<%s, %d, %s, Gradient::%s>", type_name(p.dtype), head_dim,
             fast_path ? "true" : "false", gradient);
    launch.blocks = blocks;
    launch.threads = tiles.threads();
    launch.shared_bytes = tiles.shared_bytes();
  };
  const bool hopper = serves_hopper(p, compute_capability);
  const auto add_hopper = [&](bool keys) {
    const HopperBackwardTiles own = hopper_backward_tiles(hopper_head_dim(p.D, p.Dv));
    Launch& launch = launches.items[launches.count++];
    snprintf(launch.kernel, sizeof launch.kernel, "attention_backward_hopper_kernel<%s, %d, %s>",
             type_name(p.dtype), own.head_dim, keys ? "true" : "false");
    launch.blocks = keys ? key_blocks(p, own.rows()) : query_blocks(p, own.rows());
    launch.threads = own.threads();
    launch.shared_bytes = own.shared_bytes();
  };
  const int64_t of_keys = key_blocks(p, tiles.rows());
  if (hopper) {
    add_hopper(true);
  } else if (head_dim <= 128) {
    add("kKeyValue", of_keys);
  } else {
    add("kKey", of_keys);
    add("kValue", of_keys);
  }
  if (p.block_table != nullptr) {
    Launch& pages = launches.items[launches.count++];
    snprintf(pages.kernel, sizeof pages.kernel, "attention_page_gradients_kernel<%s>",
             type_name(p.dtype));
    pages.blocks = p.page_count * p.Hkv;
    pages.threads = kThreadsOfPages;
  }
  if (hopper) {
    add_hopper(false);
  } else {
    add("kQuery", query_blocks(p, tiles.rows()));
  }
  if (p.dbias.data != nullptr) {
    const BackwardTiles of_bias = backward_tiles(is_float(p), head_dim, false);
    Launch& bias = launches.items[launches.count++];
    snprintf(bias.kernel, sizeof bias.kernel, "attention_dbias_kernel<%s, %d>", type_name(p.dtype),
             head_dim);
    bias.blocks = (p.dbias.stride_b != 0 ? p.B : 1) * (p.dbias.stride_h != 0 ? p.Hq : 1) *
                  (p.dbias.stride_q != 0 ? blocks_of(p.Sq, of_bias.rows()) : 1) *
                  (p.dbias.stride_k != 0 ? blocks_of(p.Sk, of_bias.columns) : 1);
    bias.threads = of_bias.threads();
    bias.shared_bytes = of_bias.shared_bytes();
  }
  if (p.dsinks != nullptr) {
    Launch& sinks = launches.items[launches.count++];
    snprintf(sinks.kernel, sizeof sinks.kernel, "attention_dsinks_kernel<256>");
    sinks.blocks = p.Hq;
    sinks.threads = 256;
  }
  return launches;
}

// -- masked softmax -------------------------------------------------------------------------------

struct SoftmaxKernelParams : SoftmaxParams {
  const int64_t* philox = nullptr;  // as in KernelParams
  float* delta = nullptr;           // backward with a bias gradient: [rows], sum_k p_k dp_k
};

// A row is computed by `threads` threads, in pieces of 8 neighbouring columns a thread. kHeld: each
// thread holds its pieces, up to kSoftmaxPieces, in registers; the logits of a longer row are
// computed twice.
constexpr int kSoftmaxPieces = 4, kSoftmaxBlock = 256, kBiasColumns = 128, kSinkThreads = 256;
// A bias gradient that is a long sum is cut into chunks, so that there are about kBiasTasks tasks.
constexpr int64_t kBiasTasks = 512;

struct SoftmaxBackwardLaunches {
  static constexpr int kMax = 4;
  Launch items[kMax];
  int count = 0;
};

inline int64_t softmax_rows(const SoftmaxKernelParams& p) { return p.groups * p.group_rows; }

inline Launch softmax_rows_launch(const SoftmaxKernelParams& p, const char* kernel) {
  const int64_t pieces = blocks_of(p.columns, 8);
  const int threads = pieces <= 32 * kSoftmaxPieces ? 32 : kSoftmaxBlock;
  const bool held = pieces <= threads * kSoftmaxPieces;
  Launch launch;
  snprintf(launch.kernel, sizeof launch.kernel, "%s<%s, %d, %s>", kernel, type_name(p.dtype),
           threads, held ? "true" : "false");
  launch.blocks = p.columns == 0 ? 0 : blocks_of(softmax_rows(p), kSoftmaxBlock / threads);
  launch.threads = kSoftmaxBlock;
  return launch;
}
inline Launch softmax_launch(const SoftmaxKernelParams& p) {
  return softmax_rows_launch(p, "masked_softmax_kernel");
}

// The kernels of a backward, in order.
inline SoftmaxBackwardLaunches softmax_backward_launches(const SoftmaxKernelParams& p) {
  SoftmaxBackwardLaunches launches;
  launches.items[launches.count++] = softmax_rows_launch(p, "masked_softmax_backward_kernel");
  if (p.dbias != nullptr) {
    Launch& bias = launches.items[launches.count++];
    snprintf(bias.kernel, sizeof bias.kernel, "masked_softmax_dbias_kernel<%s>",
             type_name(p.dtype));
    bias.blocks = p.groups * p.chunks * blocks_of(p.bias_width, kBiasColumns);
    bias.threads = kBiasColumns;
    if (p.chunks > 1) {
      Launch& sum = launches.items[launches.count++];
      snprintf(sum.kernel, sizeof sum.kernel, "masked_softmax_dbias_sum_kernel<%d>", kBiasColumns);
      sum.blocks = blocks_of(p.groups * p.bias_width, kBiasColumns);
      sum.threads = kBiasColumns;
    }
  }
  if (p.dsinks != nullptr) {
    Launch& sinks = launches.items[launches.count++];
    snprintf(sinks.kernel, sizeof sinks.kernel, "masked_softmax_dsinks_kernel<%d>", kSinkThreads);
    sinks.blocks = p.heads;
    sinks.threads = kSinkThreads;
  }
  return launches;
}

}  // namespace fused_attention::cuda
