// PyTorch's stable interface, and the schemas of the operators: those of the CPU in
// torch.ops.fused_attention, those of CUDA, with the same arguments, in fused_attention_cuda.
#pragma once

#include <stdio.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "arguments.h"
#include "attention_params.h"
#include "footprint.h"
#include "notes.h"

namespace fused_attention {

using torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

#define FA_SOFTMAX_OPTIONS                                                          \
  "Tensor? mask=None, Tensor? bias=None, Tensor? sinks=None, Tensor? philox=None, " \
  "float dropout_p=0.0"

constexpr const char* kAttentionForwardPlain =
    "attention_forward_plain(Tensor query, Tensor key, Tensor value" FA_NUMBERS_SCHEMA
    ") -> Tensor";
constexpr const char* kAttentionForwardPlainLse =
    "attention_forward_plain_lse(Tensor query, Tensor key, Tensor value" FA_NUMBERS_SCHEMA
    ") -> (Tensor, Tensor)";
constexpr const char* kAttentionForward =
    "attention_forward(Tensor query, Tensor key, Tensor value" FA_OPTIONS_SCHEMA
    ") -> (Tensor, Tensor)";
constexpr const char* kAttentionBackward =
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
    "Tensor value, Tensor out, Tensor lse" FA_OPTIONS_SCHEMA
    ", bool bias_grad=False, bool sinks_grad=False, Tensor? grad_weights=None, "
    "bool average_weights=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kAttentionJvp =
    "attention_jvp(Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "Tensor? tangent_query, Tensor? tangent_key, Tensor? tangent_value, Tensor? tangent_bias, "
    "Tensor? tangent_sinks" FA_OPTIONS_SCHEMA ") -> (Tensor, Tensor)";
constexpr const char* kAttentionBackwardJvp =
    "attention_backward_jvp(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
    "Tensor value, Tensor out, Tensor lse, Tensor? tangent_grad_out, Tensor? tangent_grad_lse, "
    "Tensor? tangent_query, Tensor? tangent_key, Tensor? tangent_value, Tensor tangent_out, "
    "Tensor tangent_lse, Tensor? tangent_bias, Tensor? tangent_sinks" FA_OPTIONS_SCHEMA
    ", bool bias_grad=False, bool sinks_grad=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kAttentionWeights =
    "attention_weights(Tensor query, Tensor key, Tensor lse, bool average" FA_OPTIONS_SCHEMA
    ") -> Tensor";
constexpr const char* kAttentionStatistics =
    "attention_statistics(Tensor query, Tensor key, Tensor lse, bool mass, bool entropy, "
    "int num_top" FA_OPTIONS_SCHEMA ") -> (Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kDropoutKeepMask =
    "dropout_keep_mask(Tensor philox, float dropout_p, SymInt batch, SymInt heads, "
    "SymInt seqlen_q, SymInt seqlen_k) -> Tensor";
constexpr const char* kCheckSequences =
    "check_sequences(Tensor query, Tensor key" FA_OPTIONS_SCHEMA ") -> ()";
constexpr const char* kKvCacheAppend =
    "kv_cache_append_(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key, Tensor value, "
    "Tensor cache_seqlens, Tensor? block_table=None) -> ()";
constexpr const char* kMaskedSoftmaxForward =
    "masked_softmax_forward(Tensor input, float scale, int causal, bool save, " FA_SOFTMAX_OPTIONS
    ") -> (Tensor, Tensor, Tensor)";
constexpr const char* kMaskedSoftmax =
    "masked_softmax_(Tensor(a!) input, float scale, int causal, " FA_SOFTMAX_OPTIONS ") -> ()";
constexpr const char* kMaskedSoftmaxBackward =
    "masked_softmax_backward(Tensor grad_out, Tensor weights, float scale, int causal, "
    "Tensor? bias=None, Tensor? sink_weight=None, Tensor? philox=None, float dropout_p=0.0, "
    "bool bias_grad=False, bool sinks_grad=False) -> (Tensor, Tensor, Tensor)";

// An operator: its name, its schema, and its kernel, which takes the arguments off a stack and puts
// the results there.
using BoxedKernel = void (*)(StableIValue*, uint64_t, uint64_t);
struct Operator {
  const char *name, *schema;
  BoxedKernel kernel;
};
template <size_t kCount>
void define(torch::stable::detail::StableLibrary& library, const Operator (&operators)[kCount]) {
  for (const Operator& op : operators) library.def(op.schema);
}
template <size_t kCount>
void implement(torch::stable::detail::StableLibrary& library, const Operator (&operators)[kCount]) {
  for (const Operator& op : operators) library.impl(op.name, op.kernel);
}

}  // namespace fused_attention
