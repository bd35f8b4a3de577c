// The kernels of returned attention weights (see phases.inl).
#include "attention_weights.inl"
#include "phases.inl"

namespace fused_attention {

constinit const WeightsKernels FUSED_ATTENTION_ISA::attention_weights = {
    .weights = phase<ByType<AttentionWeights>>(),
    .delta = phase<ByType<AttentionWeightsDelta>>(),
};

}  // namespace fused_attention
