// The kernels for AVX-512 F, BW, DQ, VL and BF16. This file is compiled with flags of its own
// (setup.py), so nothing in here may be shared with other objects: no STL, no torch, everything in
// an anonymous namespace.
#define FUSED_ATTENTION_SIMD "simd_avx512_bf16.inl"
#include "kernel_table.inl"

namespace fused_attention {

extern const KernelTable kAvx512Bf16Kernels;
constinit const KernelTable kAvx512Bf16Kernels = kernels_of("avx512_bf16");

}  // namespace fused_attention
