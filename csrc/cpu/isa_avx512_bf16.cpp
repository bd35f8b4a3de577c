// The kernels for AVX-512 F, BW, DQ, VL and BF16. Compiled with flags of its own (setup.py), so
// nothing in here may be shared with other objects: no STL, no torch, everything in an anonymous
// namespace.
#include <immintrin.h>

#include "dispatch.h"

namespace fused_attention {
namespace {
constexpr const char* kIsaName = "avx512_bf16";
#include "simd_avx512.inl"
// On top of it:
#define FUSED_ATTENTION_PAIRS 1
#include "pairs_avx512.inl"
// The algorithms, on that vocabulary:
#include "kernels.inl"
}  // namespace

extern const KernelTable kAvx512Bf16Kernels;
const KernelTable kAvx512Bf16Kernels = kKernels;

}  // namespace fused_attention
