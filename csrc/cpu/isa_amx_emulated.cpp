// The kernels for AVX-512 F, BW, DQ, VL, with AMX in plain C++. This file is compiled with flags of
// its own (setup.py), so nothing in here may be shared with other objects: no STL, no torch,
// everything in an anonymous namespace.
#define FUSED_ATTENTION_SIMD "amx_emulated.inl"
#include "kernel_table.inl"

namespace fused_attention {

extern const KernelTable kAmxEmulatedKernels;
constinit const KernelTable kAmxEmulatedKernels = kernels_of("amx_emulated");

}  // namespace fused_attention
