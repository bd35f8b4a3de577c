// The functions that each of the two libraries implements for its device, in csrc/cpu/device.cpp
// and csrc/cuda/device.cpp.
#pragma once

#include <memory>

#include "operators.h"

namespace fused_attention {

extern const char* const kDevice;  // its name in messages

// Whether a tensor is on the device of the call.
bool is_here(const Tensor& tensor);

AOTITorchError empty_strided(Sizes sizes, const int64_t* strides, ScalarType dtype,
                             AtenTensorHandle* handle);

// Returns the integers of a tensor of one or two dimensions as kernels read them, contiguous. They
// live as long as the result is held.
std::shared_ptr<const void> integers_of(const Tensor& tensor);

// Makes the device of a tensor the current device while the object lives.
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor& tensor);
  ~OnDeviceOf();
  OnDeviceOf(const OnDeviceOf&) = delete;
  void* guard = nullptr;  // CUDA's; the CPU needs none
};

// Returns about how many tasks the bias gradient of masked softmax is divided into.
int64_t bias_tasks();

}  // namespace fused_attention
