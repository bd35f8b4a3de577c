// The kernels of one instruction set, which kernels_*.cpp define. Those files are compiled once for
// each instruction set, with its flags (build.py), and FUSED_ATTENTION_ISA names the namespace of
// its tables. Nothing else in them may be shared with other objects: no STL, no torch, everything
// else in an anonymous namespace.
#pragma once

#include "dispatch.h"
#include "simd.inl"

namespace fused_attention {

namespace FUSED_ATTENTION_ISA {
extern const ForwardKernel attention_decode;
extern const ForwardKernel* const attention_forward[];
extern const BackwardKernels attention_backward;
extern const WeightsKernels attention_weights;
extern const StatisticsKernels attention_statistics;
extern const TangentKernels attention_tangents;
extern const SoftmaxKernels masked_softmax;
extern const KernelTable kernels;
}  // namespace FUSED_ATTENTION_ISA

namespace {

// A phase for the two types that kernels compute in. 16-bit tensors are computed in float.
template <template <typename> class Kernel, typename Params = AttentionParams>
struct ByType {
  static bool wide(const Params& p) { return p.dtype == DType::kFloat64; }
  static int64_t num_tasks(const Params& p) {
    return wide(p) ? Kernel<double>::num_tasks(p) : Kernel<float>::num_tasks(p);
  }
  static size_t workspace_bytes(const Params& p) {
    return wide(p) ? Kernel<double>::workspace_bytes(p) : Kernel<float>::workspace_bytes(p);
  }
  static void run(const Params& p, int64_t begin, int64_t end, void* workspace) {
    wide(p) ? Kernel<double>::run(p, begin, end, workspace)
            : Kernel<float>::run(p, begin, end, workspace);
  }
};
template <typename Kernel, typename Params = AttentionParams>
constexpr PhaseOf<Params> phase() {
  return {Kernel::num_tasks, Kernel::workspace_bytes, Kernel::run};
}

}  // namespace
}  // namespace fused_attention
