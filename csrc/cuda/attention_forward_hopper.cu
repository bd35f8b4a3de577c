// FA_TYPE and FA_HEAD_DIM come from the list in build.py.
#include "attention_forward_hopper.cuh"
#include "hopper_kernel.cuh"

namespace fused_attention::cuda {
namespace {

const char* start_forward(const Launch& launch, const void* params, void* stream) {
  constexpr HopperTiles kTiles = hopper_tiles(FA_HEAD_DIM);
  const KernelParams& p = *(const KernelParams*)params;
  const Boxes boxes[] = {{p.query, false, p.D, kTiles.block_m()},
                         {p.key, true, p.D, kTiles.block_n},
                         {p.value, true, p.Dv, kTiles.block_n}};
  return start_with_maps<&attention_forward_hopper_kernel<FA_TYPE, FA_HEAD_DIM>>(launch, p, boxes,
                                                                                 stream);
}
const Kernel forward(FA_EXPANDED_TEXT(attention_forward_hopper_kernel<FA_TYPE, FA_HEAD_DIM>),
                     &start_forward);

int capability() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major * 10 + minor;
}

const bool asks = (compute_capability = capability, true);

}  // namespace
}  // namespace fused_attention::cuda
