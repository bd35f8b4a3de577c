// The kernels of masked softmax (see phases.inl).
#include "masked_softmax.inl"
#include "phases.inl"

namespace fused_attention {
namespace {

template <template <typename> class Kernel>
constexpr SoftmaxPhase softmax_phase() {
  return phase<ByType<Kernel, SoftmaxParams>, SoftmaxParams>();
}

}  // namespace

constinit const SoftmaxKernels FUSED_ATTENTION_ISA::masked_softmax = {
    .forward = softmax_phase<MaskedSoftmax>(),
    .backward = softmax_phase<MaskedSoftmaxBackward>(),
    .backward_bias = softmax_phase<MaskedSoftmaxBackwardBias>(),
    .backward_sinks = softmax_phase<MaskedSoftmaxBackwardSinks>(),
};

}  // namespace fused_attention
