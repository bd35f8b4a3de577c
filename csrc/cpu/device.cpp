#include "../device.h"

#include <new>

#include "../describe.h"

namespace fused_attention {

const char* const kDevice = "CPU";

bool is_here(const Tensor& tensor) { return tensor.is_cpu() || is_dry(); }

AOTITorchError empty_strided(Sizes sizes, const int64_t* strides, ScalarType dtype,
                             AtenTensorHandle* handle) {
  return aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), strides, (int32_t)dtype,
                                  aoti_torch_device_type_cpu(), 0, handle);
}

// Copies the integers of a tensor. Each is read once, so that the value that is checked is the
// value that is used, even if another thread writes to the tensor during the call.
namespace {
template <typename Int>
std::shared_ptr<const void> copied(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const size_t dims = sizes.size();
  const int64_t rows = dims == 2 ? sizes[0] : 1, row_stride = dims == 2 ? strides[0] : 0;
  const int64_t columns = sizes[dims - 1], column_stride = strides[dims - 1];
  const int64_t count = count_elements(sizes);
  std::unique_ptr<Int[]> values;
  if (count < std::numeric_limits<int64_t>::max() / 16) {
    values.reset(new (std::nothrow) Int[(size_t)count]);
  }
  if (values == nullptr) {
    refuse_for_memory("a copy of lengths, pages or random states",
                      (double)count * (double)sizeof(Int), "");
  }
  const Int* given = (const Int*)tensor.const_data_ptr();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      values[(size_t)(r * columns + c)] =
          __atomic_load_n(given + r * row_stride + c * column_stride, __ATOMIC_RELAXED);
    }
  }
  return std::shared_ptr<const Int[]>(std::move(values));
}
}  // namespace

std::shared_ptr<const void> integers_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Long ? copied<int64_t>(tensor)
                                                  : copied<int32_t>(tensor);
}

OnDeviceOf::OnDeviceOf(const Tensor&) {}
OnDeviceOf::~OnDeviceOf() {}

int64_t bias_tasks() { return 64; }

}  // namespace fused_attention
