// The kernels of forward mode (see phases.inl).
#include "attention_tangents.inl"
#include "phases.inl"

namespace fused_attention {

constinit const TangentKernels FUSED_ATTENTION_ISA::attention_tangents = {
    .jvp = phase<ByType<AttentionJvp>>(),
    .backward_jvp = {phase<ByType<TangentDelta>>(), phase<ByType<TangentSinks>>(),
                     phase<ByType<AttentionTangentKeys>>(),
                     phase<ByType<AttentionTangentQueries>>(),
                     phase<ByType<AttentionTangentBias>>()},
};

}  // namespace fused_attention
