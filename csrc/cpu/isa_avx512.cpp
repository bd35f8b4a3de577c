// The kernels for AVX-512 F, BW, DQ, VL. Compiled with flags of its own (setup.py), so nothing in
// here may be shared with other objects: no STL, no torch, everything in an anonymous namespace.
#include <immintrin.h>

#include "dispatch.h"

namespace fused_attention {
namespace {
constexpr const char* kIsaName = "avx512";
#include "simd_avx512.inl"
// The algorithms, on that vocabulary:
#include "kernels.inl"
}  // namespace

extern const KernelTable kAvx512Kernels;
const KernelTable kAvx512Kernels = kKernels;

}  // namespace fused_attention
