// The kernels for any compiler and processor. Compiled with flags of its own (setup.py), so nothing
// in here may be shared with other objects: no STL, no torch, everything in an anonymous namespace.

#include "dispatch.h"

namespace fused_attention {
namespace {
constexpr const char* kIsaName = "baseline";
#include "simd_baseline.inl"
// The algorithms, on that vocabulary:
#include "kernels.inl"
}  // namespace

extern const KernelTable kBaselineKernels;
const KernelTable kBaselineKernels = kKernels;

}  // namespace fused_attention
