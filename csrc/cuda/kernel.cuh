// Registers kernels whose only parameter is a struct, under their template-ids.
#pragma once

#include <cuda_runtime.h>

#include "registry.h"

namespace fused_attention::cuda {

inline const char* start_with(const void* kernel, const Launch& launch, void** arguments,
                              void* stream) {
  // A thread block gets more than 48 KiB of shared memory only on request.
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           (int)launch.shared_bytes);
  if (error == cudaSuccess) {
    error = cudaLaunchKernel(kernel, dim3(launch.blocks), dim3(launch.threads), arguments,
                             launch.shared_bytes, (cudaStream_t)stream);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
template <auto* kKernel>
const char* start_kernel(const Launch& launch, const void* params, void* stream) {
  void* arguments[] = {(void*)params};
  return start_with((const void*)kKernel, launch, arguments, stream);
}

}  // namespace fused_attention::cuda

// FA_KERNEL(template-id) registers a kernel under the text that `Launch::kernel` has.
#define FA_CONCATENATED(a, b) a##b
#define FA_UNIQUE(line) FA_CONCATENATED(entry, line)
#define FA_KERNEL(...)                                               \
  static const fused_attention::cuda::Kernel FA_UNIQUE(__COUNTER__)( \
      FA_EXPANDED_TEXT(__VA_ARGS__),                                 \
      &fused_attention::cuda::start_kernel<&fused_attention::cuda::__VA_ARGS__>)
