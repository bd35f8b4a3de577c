// The kernels for AVX-512 F, BW, DQ, VL. This file is compiled with flags of its own (setup.py), so
// nothing in here may be shared with other objects: no STL, no torch, everything in an anonymous
// namespace.
#define FUSED_ATTENTION_SIMD "simd_avx512.inl"
#include "kernel_table.inl"

namespace fused_attention {

extern const KernelTable kAvx512Kernels;
constinit const KernelTable kAvx512Kernels = kernels_of("avx512");

}  // namespace fused_attention
