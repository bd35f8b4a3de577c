// FA_TYPE and FA_HEAD_DIM come from the list in setup.py.
#include "attention_forward_hopper.cuh"
#include "kernel.cuh"

namespace fused_attention::cuda {

namespace {

// cuTensorMapEncodeTiled, asked for at run time: the library is not linked to the driver.
using Encode = int (*)(TensorMap*, int type, uint32_t rank, void* address, const uint64_t* sizes,
                       const uint64_t* strides, const uint32_t* box, const uint32_t* steps,
                       int interleave, int swizzle, int promotion, int fill);
Encode find_encode() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                             12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? (Encode)entry : nullptr;
}

// Boxes of `rows` rows and 64 columns of a head.
bool encode(TensorMap* map, DType dtype, const TensorView& x, int64_t B, int64_t H, int64_t S,
            int64_t D, int rows) {
  static const Encode encode_tiled = find_encode();
  // Those of the headers: CU_TENSOR_MAP_DATA_TYPE_FLOAT16 and _BFLOAT16, _INTERLEAVE_NONE,
  // _SWIZZLE_128B, _L2_PROMOTION_L2_256B, _FLOAT_OOB_FILL_NONE.
  const int type = dtype == DType::kFloat16 ? 6 : 9;
  constexpr int kNoInterleave = 0, kSwizzle128 = 3, kPromotion = 3, kZeros = 0;
  const uint64_t row = (uint64_t)(D + 7) / 8 * 16;  // in place of the stride of a size of 1
  const uint64_t sizes[4] = {(uint64_t)D, (uint64_t)S, (uint64_t)H, (uint64_t)B};
  const uint64_t strides[3] = {S > 1 ? (uint64_t)x.stride_s * 2 : row,
                               H > 1 ? (uint64_t)x.stride_h * 2 : row,
                               B > 1 ? (uint64_t)x.stride_b * 2 : row};
  const uint32_t box[4] = {64, (uint32_t)rows, 1, 1}, steps[4] = {1, 1, 1, 1};
  return encode_tiled != nullptr &&
         encode_tiled(map, type, 4, x.data, sizes, strides, box, steps, kNoInterleave, kSwizzle128,
                      kPromotion, kZeros) == 0;
}

template <auto* kKernel, int kHeadDim>
const char* start_hopper_kernel(const Launch& launch, const void* params, void* stream) {
  constexpr HopperTiles kTiles = hopper_tiles(kHeadDim);
  const Call& p = *(const Call*)params;
  const int64_t B = p.cu_seqlens_q != nullptr ? 1 : p.B;
  TensorMap maps[3];
  if (!encode(&maps[0], p.dtype, p.query, B, p.Hq, p.Sq, p.D, kTiles.block_m()) ||
      !encode(&maps[1], p.dtype, p.key, B, p.Hkv, p.Sk, p.D, kTiles.block_n) ||
      !encode(&maps[2], p.dtype, p.value, B, p.Hkv, p.Sk, p.Dv, kTiles.block_n)) {
    return "the driver makes no tensor maps";
  }
  void* arguments[] = {(void*)params, &maps[0], &maps[1], &maps[2]};
  return start_with((const void*)kKernel, launch, arguments, stream);
}

int capability() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major * 10 + minor;
}

const bool asks = (compute_capability = capability, true);

}  // namespace

#define FA_HOPPER_KERNEL(...)                                 \
  static const Kernel hopper(FA_EXPANDED_TEXT((__VA_ARGS__)), \
                             &start_hopper_kernel<&__VA_ARGS__, FA_HEAD_DIM>)
FA_HOPPER_KERNEL(attention_forward_hopper_kernel<FA_TYPE, FA_HEAD_DIM>);

}  // namespace fused_attention::cuda
