// The kernels for AVX-512 F, BW, DQ, VL and AMX (TILE, BF16). Compiled with flags of its
// own (setup.py), so nothing in here may be shared with other objects: no STL, no torch, everything
// in an anonymous namespace.
#include <immintrin.h>

#include "dispatch.h"

namespace fused_attention {
namespace {
constexpr const char* kIsaName = "amx";
#include "simd_avx512.inl"
// On top of it:
#define FUSED_ATTENTION_TILES 1
#include "amx_tiles.inl"
// The algorithms, on that vocabulary:
#include "kernels.inl"
}  // namespace

extern const KernelTable kAmxKernels;
const KernelTable kAmxKernels = kKernels;

}  // namespace fused_attention
