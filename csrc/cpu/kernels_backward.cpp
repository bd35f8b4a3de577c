// The phases of attention backward (see phases.inl).
#include "attention_backward.inl"
#include "phases.inl"

namespace fused_attention {
namespace {

size_t call_workspace_bytes(const AttentionParams& p) {
  return p.dtype == DType::kFloat64 ? AttentionBackwardCombine<double>::call_workspace_bytes(p)
                                    : AttentionBackwardCombine<float>::call_workspace_bytes(p);
}

}  // namespace

constinit const BackwardKernels FUSED_ATTENTION_ISA::attention_backward = {
    .delta = phase<ByType<AttentionBackwardDelta>>(),
    .sinks = phase<ByType<AttentionBackwardSinks>>(),
    .keys = phase<WithProducts<AttentionBackwardKeys>>(),
    .queries = phase<WithProducts<AttentionBackwardQueries>>(),
    .heads = phase<WithProducts<AttentionBackwardHeads>>(),
    .combine = phase<ByType<AttentionBackwardCombine>>(),
    .call_workspace_bytes = call_workspace_bytes,
    .pages = phase<ByType<AttentionBackwardPages>>(),
};

}  // namespace fused_attention
