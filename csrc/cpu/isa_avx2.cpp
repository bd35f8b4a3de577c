// The kernels for AVX2, FMA, F16C. Compiled with flags of its own (setup.py), so nothing in here
// may be shared with other objects: no STL, no torch, everything in an anonymous namespace.
#include <immintrin.h>

#include "dispatch.h"

namespace fused_attention {
namespace {
constexpr const char* kIsaName = "avx2";
#include "simd_avx2.inl"
// The algorithms, on that vocabulary:
#include "kernels.inl"
}  // namespace

extern const KernelTable kAvx2Kernels;
const KernelTable kAvx2Kernels = kKernels;

}  // namespace fused_attention
