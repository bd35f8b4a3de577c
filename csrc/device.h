// What each of the two libraries says about its device: csrc/cpu/device.cpp, csrc/cuda/device.cpp.
#pragma once

#include <memory>

#include "operators.h"

namespace fused_attention {

extern const char* const kDevice;  // in messages

// Whether a tensor is on the device of the call.
bool is_here(const Tensor& tensor);

AOTITorchError empty_strided(Sizes sizes, const int64_t* strides, ScalarType dtype,
                             AtenTensorHandle* handle);

// The integers of a tensor of one or two dimensions as kernels read them, contiguous, for as long
// as the result is held.
std::shared_ptr<const void> integers_of(const Tensor& tensor);

// Makes the device of a tensor the device of the call, while it lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor);
  ~OnDeviceOf();
  OnDeviceOf(const OnDeviceOf&) = delete;

 private:
  [[maybe_unused]] void* guard_ = nullptr;
};

// Into about how many tasks the gradient of a bias of masked softmax is divided.
int64_t bias_tasks();

}  // namespace fused_attention
