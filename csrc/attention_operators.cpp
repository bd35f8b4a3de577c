#include "attention_operators.h"

#include <string.h>

namespace fused_attention {

// Each argument costs 0.1 us in the dispatcher alone, so plain calls have operators of their own.
void attention_forward_plain(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor query = stack.tensor(), key = stack.tensor(), value = stack.tensor();
  stack.give(forward(query, key, value, stack.numbers(), nullptr));
}

void attention_forward_plain_lse(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor query = stack.tensor(), key = stack.tensor(), value = stack.tensor();
  Tensor lse;
  const Tensor out = forward(query, key, value, stack.numbers(), &lse);
  stack.give(out, lse);
}

void attention_forward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor query = stack.tensor(), key = stack.tensor(), value = stack.tensor();
  Tensor lse;
  const Tensor out = forward(query, key, value, stack.options(), &lse);
  stack.give(out, lse);
}

void attention_backward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const BackwardArguments call(stack);
  const Gradients d = backward(call);
  stack.give(d.query, d.key, d.value, d.bias, d.sinks);
}

// -- dry runs -------------------------------------------------------------------------------------

namespace {
thread_local Notes listened, told;
}  // namespace

void tell(const std::string& text) { told.text = text; }

void take_notes(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const bool listen = stack.flag();
  const std::string text = notes == &listened ? listened.text : told.text;
  listened.text.clear(), told.text.clear();
  notes = listen ? &listened : nullptr;
  const int64_t size = (int64_t)text.size(), stride = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, (int32_t)ScalarType::Byte,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor bytes(handle);
  memcpy(bytes.data_ptr(), text.data(), text.size());
  stack.give(bytes);
}

}  // namespace fused_attention
