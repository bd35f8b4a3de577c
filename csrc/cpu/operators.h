// Helpers that the CPU operators of attention share.
#pragma once

#include "../attention_operators.h"
#include "run.h"
#include "sequences.h"

namespace fused_attention {

// Memory that the phases of one call share, 64-byte aligned.
struct CallWorkspace {
  explicit CallWorkspace(size_t bytes);
  void* data() const { return (void*)(((uintptr_t)address_of(tensor) + 63) / 64 * 64); }
  Tensor tensor;
};

// Copies the random state of dropout, if there is any, to where kernels read it.
void read_philox(AttentionParams& p, const Held& held);
void read_philox(SoftmaxParams& p, const Held& held);
// Runs describe_sequences, describe_options and read_philox.
void describe_call(AttentionParams& p, const Options& o, const Shape& key, Held& held);

void note_kernel(const char* kernel, const char* reason, TileConfig tiles);

// -- results --------------------------------------------------------------------------------------

constexpr Buffer kDelta = {"delta [B, Hq, Sq] of the backward", "split the batch"};
constexpr Buffer kDbias = {"the gradient of the bias",
                           "a bias of size 1 where it is broadcast has a smaller one than an "
                           "expanded bias; a mask has none",
                           Owner::kResult};
constexpr Buffer kDsinks = {"the gradient of the sinks [Hq]", "", Owner::kResult};

// Returns an uninitialized dense gradient in the memory format of the input.
Tensor empty_gradient(const char* what, const Tensor& tensor, const Input& input, Layout layout);
// Returns an uninitialized gradient like `tensor` if it is wanted, else no_result(dtype).
Tensor gradient_if(bool wanted, Buffer buffer, const OptionalTensor& tensor, ScalarType dtype);
Gradients zeros(Tensor& dq, Tensor& dk, Tensor& dv, Tensor& dbias, Tensor& dsinks);

// -- the operators, beside those of attention_operators.h -----------------------------------------

void attention_weights(StableIValue* values, uint64_t, uint64_t);
void attention_statistics(StableIValue* values, uint64_t, uint64_t);
void attention_jvp(StableIValue* values, uint64_t, uint64_t);
void attention_backward_jvp(StableIValue* values, uint64_t, uint64_t);
// Returns bool [batch, heads, seqlen_q, seqlen_k]: True where dropout keeps the weight.
Tensor dropout_keep_mask(const Tensor& philox, double dropout_p, int64_t batch, int64_t heads,
                         int64_t seqlen_q, int64_t seqlen_k);
// Refuses the lengths and pages that attention_forward would refuse. A call with dropout asks
// first, because a refused call must not draw random numbers.
void check_sequences(StableIValue* values, uint64_t, uint64_t);
// Row cache_seqlens[b] + i of sequence b <- row i of key and value, as they were before the call.
void kv_cache_append_(const Tensor& key_cache, const Tensor& value_cache, const Tensor& key,
                      const Tensor& value, const Tensor& cache_seqlens,
                      const OptionalTensor& block_table);

}  // namespace fused_attention
