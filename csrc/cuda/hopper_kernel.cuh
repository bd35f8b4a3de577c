// Starts kernels of sm_90, which take tensor maps beside their params.
#pragma once

#include "kernel.cuh"

namespace fused_attention::cuda {

// cuTensorMapEncodeTiled, looked up at run time: the library is not linked to the driver.
using Encode = int (*)(TensorMap*, int type, uint32_t rank, void* address, const uint64_t* sizes,
                       const uint64_t* strides, const uint32_t* box, const uint32_t* steps,
                       int interleave, int swizzle, int promotion, int fill);
inline Encode find_encode() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                             12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? (Encode)entry : nullptr;
}

// Encodes a tensor map of boxes of `rows` rows and 64 columns of a head. Returns whether it
// succeeded.
inline bool encode(TensorMap* map, DType dtype, const TensorView& x, int64_t B, int64_t H,
                   int64_t S, int64_t D, int rows) {
  static const Encode encode_tiled = find_encode();
  // Values from CUDA's headers: CU_TENSOR_MAP_DATA_TYPE_FLOAT16 and _BFLOAT16, _INTERLEAVE_NONE,
  // _SWIZZLE_128B, _L2_PROMOTION_L2_256B, _FLOAT_OOB_FILL_NONE.
  const int type = dtype == DType::kFloat16 ? 6 : 9;
  constexpr int kNoInterleave = 0, kSwizzle128 = 3, kPromotion = 3, kZeros = 0;
  const uint64_t row = (uint64_t)(D + 7) / 8 * 16;  // replaces the stride of a size of 1
  const uint64_t sizes[4] = {(uint64_t)D, (uint64_t)S, (uint64_t)H, (uint64_t)B};
  const uint64_t strides[3] = {S > 1 ? (uint64_t)x.stride_s * 2 : row,
                               H > 1 ? (uint64_t)x.stride_h * 2 : row,
                               B > 1 ? (uint64_t)x.stride_b * 2 : row};
  const uint32_t box[4] = {64, (uint32_t)rows, 1, 1}, steps[4] = {1, 1, 1, 1};
  return encode_tiled != nullptr &&
         encode_tiled(map, type, 4, x.data, sizes, strides, box, steps, kNoInterleave, kSwizzle128,
                      kPromotion, kZeros) == 0;
}

// A tensor, and the number of rows of its boxes.
struct Boxes {
  const TensorView& view;
  bool of_keys;
  int64_t width;
  int rows;
};
template <auto* kKernel, int kMaps>
const char* start_with_maps(const Launch& launch, const KernelParams& p,
                            const Boxes (&boxes)[kMaps], void* stream) {
  const int64_t B = p.cu_seqlens_q != nullptr ? 1 : p.B;
  TensorMap maps[kMaps];
  void* arguments[kMaps + 1] = {(void*)&p};
  for (int i = 0; i < kMaps; ++i) {
    const Boxes& x = boxes[i];
    if (!encode(&maps[i], p.dtype, x.view, B, x.of_keys ? p.Hkv : p.Hq, x.of_keys ? p.Sk : p.Sq,
                x.width, x.rows)) {
      return "the driver cannot make tensor maps (cuTensorMapEncodeTiled)";
    }
    arguments[i + 1] = &maps[i];
  }
  return start_with((const void*)kKernel, launch, arguments, stream);
}

}  // namespace fused_attention::cuda
