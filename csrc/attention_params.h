// What a kernel is told about one call: pointers, shapes, strides (in elements) and options. Plain
// structs without a torch header, so that kernels compile in a fraction of a second and run in a
// torch-free test driver.
//
// Shapes: query [B, Hq, Sq, D], key [B, Hkv, Sk, D], value [B, Hkv, Sk, Dv], Hq a multiple of Hkv.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fused_attention {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Which diagonal `causal`, `window` and ALiBi are measured from: key j meets query i at
// j = i + diagonal_offset, 0 for top-left, Sk - Sq for bottom-right alignment.
enum class Causal : int32_t { kNone = 0, kTopLeft = 1, kBottomRight = 2 };

// A [B, H, S, D] tensor whose last stride is 1.
struct TensorView {
  void* data = nullptr;
  int64_t stride_b = 0, stride_h = 0, stride_s = 0;
};

// A tensor broadcast against the scores [B, Hq, Sq, Sk]: a stride is 0 where it is broadcast.
struct ScoreView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;  // of a bias; a mask holds one byte per element
  int64_t stride_b = 0, stride_h = 0, stride_q = 0, stride_k = 0;
};

struct AttentionParams {
  DType dtype = DType::kFloat32;
  int64_t B = 0, Hq = 0, Hkv = 0, Sq = 0, Sk = 0, D = 0, Dv = 0;
  TensorView query, key, value, out;
  void* lse = nullptr;  // [B, Hq, Sq] contiguous, float (double for float64)

  double scale = 1.0;
  double softcap = 0.0;  // 0 = none
  int64_t diagonal_offset = 0;
  int64_t window_left = -1;   // tokens; -1 = unlimited
  int64_t window_right = -1;  // causal is window_right = 0

  ScoreView mask;  // bool, nonzero = may attend
  ScoreView bias;
  const uint8_t* key_padding_mask = nullptr;  // [B, Sk], nonzero = hidden
  int64_t key_padding_stride_b = 0, key_padding_stride_k = 0;
  const float* alibi_slopes = nullptr;  // [B or 1, Hq], contiguous over heads
  int64_t alibi_stride_b = 0;
  const void* sinks = nullptr;  // [Hq] contiguous, float (double for float64)

  // Dropout: keep iff the 16-bit Philox value >= dropout_threshold = round(p * 65536).
  uint32_t dropout_threshold = 0;  // 0 = none
  double dropout_scale = 1.0;      // 65536 / (65536 - threshold), 0 when everything is dropped
  uint64_t philox_seed = 0;
  uint32_t philox_offset = 0;
  uint8_t* dropout_keep = nullptr;  // [B, Hq, Sq, Sk], output of dropout_keep_mask

  // Backward.
  TensorView grad_out, dq, dk, dv;
  const void* grad_lse = nullptr;  // [B, Hq, Sq] with strides, or null
  int64_t grad_lse_stride_b = 0, grad_lse_stride_h = 0, grad_lse_stride_s = 0;
  void* delta = nullptr;   // [B, Hq, Sq] contiguous: rowsum(do * o) - dlse
  ScoreView dbias;         // strides as of a contiguous tensor, 0 where reduced
  void* dsinks = nullptr;  // [Hq] contiguous
};

// One parallel step of a kernel. Tasks are independent of one another, their number and what each
// computes depend on the problem and the ISA only, never on the number of threads.
struct Phase {
  int64_t (*num_tasks)(const AttentionParams&);
  size_t (*workspace_bytes)(const AttentionParams&);  // per thread, 64-byte aligned
  void (*run)(const AttentionParams&, int64_t task_begin, int64_t task_end, void* workspace);
};

}  // namespace fused_attention
