// The kernels for any compiler and processor. This file is compiled with flags of its own
// (setup.py), so nothing in here may be shared with other objects: no STL, no torch, everything in
// an anonymous namespace.
#define FUSED_ATTENTION_SIMD "simd_baseline.inl"
#include "kernel_table.inl"

namespace fused_attention {

extern const KernelTable kBaselineKernels;
constinit const KernelTable kBaselineKernels = kernels_of("baseline");

}  // namespace fused_attention
