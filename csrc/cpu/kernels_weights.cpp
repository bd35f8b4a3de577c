// The kernels of returned attention weights and of their statistics (see phases.inl).
#include "attention_statistics.inl"
#include "phases.inl"

namespace fused_attention {

constinit const WeightsKernels FUSED_ATTENTION_ISA::attention_weights = {
    .weights = phase<ByType<AttentionWeights>>(),
    .delta = phase<ByType<AttentionWeightsDelta>>(),
};
constinit const StatisticsKernels FUSED_ATTENTION_ISA::attention_statistics = {
    .rows = phase<ByType<AttentionStatistics>>(),
    .mass = phase<ByType<AttentionMass>>(),
    .call_workspace_bytes = mass_call_workspace_bytes,
};

}  // namespace fused_attention
