// The kernels for AVX-512 F, BW, DQ, VL, with AMX in plain C++. Compiled with flags of its
// own (setup.py), so nothing in here may be shared with other objects: no STL, no torch, everything
// in an anonymous namespace.
#include <immintrin.h>

#include "dispatch.h"

namespace fused_attention {
namespace {
constexpr const char* kIsaName = "amx_emulated";
#include "simd_avx512.inl"
// On top of it:
#define FUSED_ATTENTION_TILES 1
#include "amx_emulated.inl"
// The algorithms, on that vocabulary:
#include "kernels.inl"
}  // namespace

extern const KernelTable kAmxEmulatedKernels;
const KernelTable kAmxEmulatedKernels = kKernels;

}  // namespace fused_attention
