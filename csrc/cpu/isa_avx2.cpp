// The kernels for AVX2, FMA, F16C. This file is compiled with flags of its own (setup.py), so
// nothing in here may be shared with other objects: no STL, no torch, everything in an anonymous
// namespace.
#define FUSED_ATTENTION_SIMD "simd_avx2.inl"
#include "kernel_table.inl"

namespace fused_attention {

extern const KernelTable kAvx2Kernels;
constinit const KernelTable kAvx2Kernels = kernels_of("avx2");

}  // namespace fused_attention
