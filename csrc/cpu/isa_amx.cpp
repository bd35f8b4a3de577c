// The kernels for AVX-512 F, BW, DQ, VL and AMX (TILE, BF16). This file is compiled with flags of
// its own (setup.py), so nothing in here may be shared with other objects: no STL, no torch,
// everything in an anonymous namespace.
#define FUSED_ATTENTION_SIMD "simd_amx.inl"
#include "kernel_table.inl"

namespace fused_attention {

extern const KernelTable kAmxKernels;
constinit const KernelTable kAmxKernels = kernels_of("amx");

}  // namespace fused_attention
