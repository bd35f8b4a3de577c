#include "operators.h"

#include "../softmax_operators.h"

namespace fused_attention {

CallWorkspace::CallWorkspace(size_t bytes)
    : tensor(empty({"the workspace that the phases of a kernel share", "split the batch"},
                   {(int64_t)bytes + 63}, ScalarType::Byte)) {}

namespace {
template <typename Params>
void read_philox_of(Params& p, const Held& held) {
  const int64_t* state = (const int64_t*)held.philox.get();
  if (state == nullptr) return;
  p.philox_seed = (uint64_t)state[0];
  p.philox_offset = (uint32_t)state[1];
  if (p.sample_heads > 0) p.philox_states = state;
}
}  // namespace

void read_philox(AttentionParams& p, const Held& held) { read_philox_of(p, held); }
void read_philox(SoftmaxParams& p, const Held& held) { read_philox_of(p, held); }

void describe_call(AttentionParams& p, const Options& o, const Shape& key, Held& held) {
  describe_sequences(p, o, key, held);
  describe_options(p, o, held);
  read_philox(p, held);
}

void note_kernel(const char* kernel, const char* reason, TileConfig tiles) {
  note(
      "{\"isa\": \"%s\", \"kernel\": \"%s\", \"reason\": \"%s\", \"block_m\": %lld, \"block_n\": "
      "%lld}",
      kernel_table().isa, kernel, reason, (long long)tiles.block_m, (long long)tiles.block_n);
}

Tensor empty_gradient(const char* what, const Tensor& tensor, const Input& input, Layout layout) {
  const Shape& shape = input.given;
  const Buffer buffer = {what, "split the batch; an expanded input has a gradient of full size",
                         Owner::kResult};
  if (layout != Layout::kDense) return empty(buffer, tensor.sizes(), tensor.scalar_type());
  return empty_like_format(buffer, shape, shape.size[2], shape.size[3], tensor.scalar_type());
}

Tensor gradient_if(bool wanted, Buffer buffer, const OptionalTensor& tensor, ScalarType dtype) {
  return wanted ? empty(buffer, tensor->sizes(), tensor->scalar_type()) : no_result(dtype);
}
Gradients zeros(Tensor& dq, Tensor& dk, Tensor& dv, Tensor& dbias, Tensor& dsinks) {
  for (Tensor* gradient : {&dq, &dk, &dv, &dbias, &dsinks}) torch::stable::zero_(*gradient);
  return {dq, dk, dv, dbias, dsinks};
}

// -- registration ---------------------------------------------------------------------------------

namespace {

constexpr Operator kOperators[] = {
    {"attention_forward_plain", kAttentionForwardPlain, attention_forward_plain},
    {"attention_forward_plain_lse", kAttentionForwardPlainLse, attention_forward_plain_lse},
    {"attention_forward", kAttentionForward, attention_forward},
    {"attention_backward", kAttentionBackward, attention_backward},
    {"attention_jvp", kAttentionJvp, attention_jvp},
    {"attention_backward_jvp", kAttentionBackwardJvp, attention_backward_jvp},
    {"attention_weights", kAttentionWeights, attention_weights},
    {"attention_statistics", kAttentionStatistics, attention_statistics},
    {"dropout_keep_mask", kDropoutKeepMask, TORCH_BOX(&dropout_keep_mask)},
    {"check_sequences", kCheckSequences, check_sequences},
    {"kv_cache_append_", kKvCacheAppend, TORCH_BOX(&kv_cache_append_)},
    {"masked_softmax_forward", kMaskedSoftmaxForward, TORCH_BOX(&masked_softmax_forward)},
    {"masked_softmax_", kMaskedSoftmax, TORCH_BOX(&masked_softmax_)},
    {"masked_softmax_backward", kMaskedSoftmaxBackward, TORCH_BOX(&masked_softmax_backward)},
};

constexpr Operator kDryOperators[] = {
    {"attention_forward_plain", kAttentionForwardPlain, run_dry<attention_forward_plain>},
    {"attention_forward", kAttentionForward, run_dry<attention_forward>},
    {"attention_backward", kAttentionBackward, run_dry<attention_backward>},
    {"attention_weights", kAttentionWeights, run_dry<attention_weights>},
};

}  // namespace
}  // namespace fused_attention

STABLE_TORCH_LIBRARY(fused_attention, m) {
  fused_attention::define(m, fused_attention::kOperators);
}
STABLE_TORCH_LIBRARY_IMPL(fused_attention, CPU, m) {
  fused_attention::implement(m, fused_attention::kOperators);
}
STABLE_TORCH_LIBRARY(fused_attention_dry_run, m) {
  fused_attention::define(m, fused_attention::kDryOperators);
  m.def(fused_attention::kNotes);
}
STABLE_TORCH_LIBRARY_IMPL(fused_attention_dry_run, CompositeExplicitAutograd, m) {
  fused_attention::implement(m, fused_attention::kDryOperators);
  m.impl("notes", fused_attention::take_notes);
}
