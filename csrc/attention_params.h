// The params of a kernel, for one call: pointers, shapes, strides (in elements) and options. They
// are plain structs without a torch header, so that kernels compile in a fraction of a second and
// run in a torch-free test driver.
//
// Shapes: query [B, Hq, Sq, D], key [B, Hkv, Sk, D], value [B, Hkv, Sk, Dv], Hq a multiple of Hkv.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fused_attention {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

// The diagonal that `causal`, `window` and ALiBi are measured from: key j meets query i at
//  = i + offset. The offset is 0 for top-left and Sk - Sq of each sequence for bottom-right
// lignment.
// kBottomRightOnly: nothing is causal, but window and ALiBi are measured from the bottom right.
enum class Causal : int32_t { kNone = 0, kTopLeft = 1, kBottomRight = 2, kBottomRightOnly = 3 };

// A [B, H, S, D] tensor whose last stride is 1.
struct TensorView {
  void* data = nullptr;
  int64_t stride_b = 0, stride_h = 0, stride_s = 0;
};

// A tensor broadcast against the scores [B, Hq, Sq, Sk]: a stride is 0 where it is broadcast.
struct ScoreView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;  // the dtype of a bias; a mask has one byte per element
  int64_t stride_b = 0, stride_h = 0, stride_q = 0, stride_k = 0;
};

// Tangents (attention_tangents.inl). Each view is like that of the tensor of the same name, and
// null if the tangent is zero.
struct Tangents {
  TensorView query, key, value, grad_out;
  ScoreView bias;
  const void* sinks = nullptr;     // [Hq] contiguous
  const void* grad_lse = nullptr;  // [B, Hq, Sq] contiguous, like lse and delta
  TensorView out;                  // out and lse are results of attention_jvp,
  void* lse = nullptr;             // which attention_backward_jvp reads
  void* delta = nullptr;           // of attention_backward_jvp, between its phases
};

struct AttentionParams {
  DType dtype = DType::kFloat32;
  int64_t B = 0, Hq = 0, Hkv = 0, Sq = 0, Sk = 0, D = 0, Dv = 0;
  TensorView query, key, value, out;
  void* lse = nullptr;  // [B, Hq, Sq] (packed: [Hq, Tq]) contiguous, float (double for float64)
  int64_t lse_stride_b = 0, lse_stride_h = 0;

  // Sequences whose lengths or places differ; null where unused. Sq and Sk bound the lengths.
  const int32_t* cu_seqlens_q = nullptr;  // [B + 1]: sequence b is tokens [cu[b], cu[b + 1]) of a
  const int32_t* cu_seqlens_k = nullptr;  // view [1, H, T, D], whose stride_b is 0
  const int32_t* seqused_k = nullptr;     // [B], keys of each sequence that are in use
  const int32_t* block_table = nullptr;   // [B, pages]: key n of sequence b is row n % page_size of
  int64_t block_table_stride_b = 0;       // page [b, n / page_size]; key and value are views
  int64_t page_size = 0;                  // [all pages, Hkv, page_size, D or Dv]
  // The numbers of queries of the packed sequences that are served; kernels see no query of others.
  int64_t least_queries = 0, most_queries = INT64_MAX;

  // The call workspace, in which phases hand results on to one another, 64-byte aligned.
  void* call_workspace = nullptr;
  int64_t threads = 1;  // may decide how tasks are cut, not what they compute

  double scale = 1.0;
  double softcap = 0.0;        // 0 = none
  int64_t precision = 0;       // of float32 products: 0 "highest", 1 "high", 2 "medium"
  bool bottom_right = false;   // how the diagonal is aligned, see Causal
  int64_t diagonal_start = 0;  // the position of the first query less that of the first key
  int64_t window_left = -1;    // tokens; -1 = unlimited
  int64_t window_right = -1;   // causal is window_right = 0

  ScoreView mask;  // bool, nonzero = may attend
  // Notes for each block whether the mask shows or hides some of it, see masking.inl; null if
  // kernels look at the mask tile by tile.
  uint8_t* mask_blocks = nullptr;
  ScoreView bias;
  const uint8_t* key_padding_mask = nullptr;  // [B, Sk], nonzero = hidden
  int64_t key_padding_stride_b = 0, key_padding_stride_k = 0;
  const float* alibi_slopes = nullptr;  // [B or 1, Hq], contiguous over heads
  int64_t alibi_stride_b = 0;
  const void* sinks = nullptr;  // [Hq] contiguous, float (double for float64); see sample_heads

  // Dropout: keep iff the 16-bit Philox value >= dropout_threshold = round(p * 65536).
  uint32_t dropout_threshold = 0;  // 0 = none
  double dropout_scale = 1.0;      // 65536 / (65536 - threshold), 0 when everything is dropped
  uint64_t philox_seed = 0;
  uint32_t philox_offset = 0;
  // The numbers of the first query, of the first eight keys and of the first head.
  uint32_t dropout_row = 0, dropout_group = 0, dropout_head = 0;
  // Several samples in one call: Philox states (seed, offset) [n, 2] and sinks [n, Hq] have one row
  // per sample. A sample is `sample_heads` heads of the batch, whose numbers begin anew. 0: one
  // sample.
  const int64_t* philox_states = nullptr;
  int64_t sample_heads = 0;
  uint8_t* dropout_keep = nullptr;  // [B, Hq, Sq, Sk], output of dropout_keep_mask

  // Backward.
  TensorView grad_out, dq, dk, dv;  // with pages, dk and dv are [B, Hkv, Sk, D or Dv],
  TensorView page_dk, page_dv;      // and are then added to these pages of zeros
  const void* grad_lse = nullptr;   // [B, Hq, Sq] (packed: [Hq, Tq]) with strides, or null
  int64_t grad_lse_stride_b = 0, grad_lse_stride_h = 0, grad_lse_stride_s = 0;
  void* delta = nullptr;   // like lse: rowsum(do * o) - dlse
  ScoreView dbias;         // strides of a contiguous tensor, 0 where it is summed
  void* dsinks = nullptr;  // [Hq] contiguous

  // The weights [B, Hq, Sq, Sk] that attention_weights writes, with last stride 1; in the backward
  // their gradient, with any strides. If they are averaged over the heads, stride_h is 0.
  ScoreView weights;
  bool average_weights = false;

  // What attention_statistics writes; null is what is not asked for. Contiguous; float, double for
  // float64.
  void* mass = nullptr;         // [B, Hq, Sk], the sums of the weights over the queries
  void* entropy = nullptr;      // [B, Hq, Sq]
  void* top_weights = nullptr;  // [B, Hq, Sq, num_top], the largest weights, falling,
  int64_t* top_keys = nullptr;  // and their keys; 0 and -1 where there is no other above 0
  int64_t num_top = 0;

  // For attention_jvp and attention_backward_jvp. The latter writes its results to dq, dk, dv,
  // dbias and dsinks.
  Tangents tangent;

  bool serves_queries(int64_t count) const {
    return least_queries <= count && count <= most_queries;
  }
  // Whether softcap bends the scores: their cap slope is then not 1.
  bool bends_scores() const { return softcap > 0; }
};

// The params of masked softmax: rows of `columns` neighbouring elements, at any strides. `size` are
// the dimensions before the last one, without those of size 1, in the order in which rows are
// visited, the last one fastest.
struct SoftmaxParams {
  static constexpr int kMaxDims = 16;
  // The operands that have an offset of their own for each row. kNumber: the row's number in the
  // order of the input.
  enum Operand { kInput, kGradOut, kOutput, kMask, kBias, kNumber, kOperands };

  DType dtype = DType::kFloat32;
  int64_t columns = 0;
  int64_t queries = 1, heads = 1;  // the last dimensions before the columns: [..., heads, queries]
  int dims = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kOperands][kMaxDims] = {};  // in elements

  const void* input = nullptr;  // backward: the weights, before dropout
  void* output = nullptr;       // backward: the gradient of the input
  const uint8_t* mask = nullptr;
  const void* bias = nullptr;
  // Null, or called with the part of a contiguous output that a task is about to write.
  void (*map_pages)(void* memory, int64_t bytes) = nullptr;
  int64_t mask_stride_k = 0, bias_stride_k = 0;
  DType bias_dtype = DType::kFloat32;
  const void* sinks = nullptr;  // [heads] contiguous, float (double for float64)

  double scale = 1.0;
  bool causal = false;
  int64_t diagonal_offset = 0;

  uint32_t dropout_threshold = 0;  // as in AttentionParams
  double dropout_scale = 1.0;
  uint64_t philox_seed = 0;
  uint32_t philox_offset = 0;
  const int64_t* philox_states = nullptr;
  int64_t sample_heads = 0;

  // Kept for the backward, or null, in the order of the rows' numbers:
  void* weights = nullptr;      // before dropout, [rows, columns] in dtype
  void* sink_weight = nullptr;  // [rows], float (double for float64)

  // Backward.
  const void* grad_out = nullptr;
  void* dsinks = nullptr;      // [heads]
  void* sink_terms = nullptr;  // [rows], the terms of dsinks
  void* dbias = nullptr;       // [groups, bias_width] contiguous, in bias_dtype
  void* partial = nullptr;     // [tasks, bias_width] float (double for float64), if chunks > 1
  int64_t bias_width = 0;      // columns, or 1 where the bias is broadcast along them

  // Rows of one group are visited one after another and share a row of dbias. A task is
  // `groups_per_task` whole groups, or one of the `chunks` chunks of a group.
  int64_t groups = 0, group_rows = 1, groups_per_task = 1, chunks = 1;
};

// One parallel step of a kernel. Tasks are independent of one another; what they compute depends on
// the problem and the ISA only, bit for bit, never on the number of threads.
template <typename Params>
struct PhaseOf {
  int64_t (*num_tasks)(const Params&);
  size_t (*workspace_bytes)(const Params&);  // per thread, 64-byte aligned
  void (*run)(const Params&, int64_t task_begin, int64_t task_end, void* workspace);
};
using Phase = PhaseOf<AttentionParams>;
using SoftmaxPhase = PhaseOf<SoftmaxParams>;

}  // namespace fused_attention
