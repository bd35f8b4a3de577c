// The options of a call, which every operator of attention takes behind its tensors: one list, from
// which the schemas and the struct Options are made. operators/arguments.py has the same list in
// Python, and a test compares the two.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace fused_attention {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;

// X(type, name, schema). A plain call has the numbers only.
#define FA_NUMBERS(X)                             \
  X(double, scale, "float scale")                 \
  X(int64_t, causal, "int causal")                \
  X(int64_t, window_left, "SymInt window_left")   \
  X(int64_t, window_right, "SymInt window_right") \
  X(int64_t, precision, "int precision")
#define FA_OPTIONS(X)                                                  \
  X(OptionalTensor, mask, "Tensor? mask=None")                         \
  X(OptionalTensor, bias, "Tensor? bias=None")                         \
  X(OptionalTensor, key_padding_mask, "Tensor? key_padding_mask=None") \
  X(OptionalTensor, alibi_slopes, "Tensor? alibi_slopes=None")         \
  X(OptionalTensor, sinks, "Tensor? sinks=None")                       \
  X(OptionalTensor, philox, "Tensor? philox=None")                     \
  X(double, softcap, "float softcap=0.0")                              \
  X(double, dropout_p, "float dropout_p=0.0")                          \
  X(OptionalTensor, cu_seqlens_q, "Tensor? cu_seqlens_q=None")         \
  X(OptionalTensor, cu_seqlens_k, "Tensor? cu_seqlens_k=None")         \
  X(OptionalInt, max_seqlen_q, "SymInt? max_seqlen_q=None")            \
  X(OptionalInt, max_seqlen_k, "SymInt? max_seqlen_k=None")            \
  X(OptionalTensor, seqused_k, "Tensor? seqused_k=None")               \
  X(OptionalTensor, block_table, "Tensor? block_table=None")           \
  X(int64_t, q_start, "SymInt q_start=0")                              \
  X(int64_t, k_start, "SymInt k_start=0")                              \
  X(int64_t, head_start, "SymInt head_start=0")

// For schemas: ", float scale, int causal, ...".
#define FA_SAYS(type, name, schema) ", " schema
#define FA_NUMBERS_SCHEMA FA_NUMBERS(FA_SAYS)
#define FA_OPTIONS_SCHEMA FA_NUMBERS(FA_SAYS) FA_OPTIONS(FA_SAYS)

struct Options {
#define FA_FIELD(type, name, schema) type name = {};
  FA_NUMBERS(FA_FIELD)
  FA_OPTIONS(FA_FIELD)
#undef FA_FIELD
};

// The arguments of a call, in the order of the operator's schema, and its results. Every argument
// must be taken, because whoever takes a tensor owns it.
class Stack {
 public:
  explicit Stack(StableIValue* values) : values_(values) {}
  template <typename T>
  T next() {
    return torch::stable::detail::to<T>(values_[taken_++]);
  }
  Tensor tensor() { return next<Tensor>(); }
  OptionalTensor optional_tensor() { return next<OptionalTensor>(); }
  bool flag() { return next<bool>(); }

#define FA_TAKE(type, name, schema) o.name = next<type>();
  Options numbers() {
    Options o;
    FA_NUMBERS(FA_TAKE)
    return o;
  }
  Options options() {
    Options o = numbers();
    FA_OPTIONS(FA_TAKE)
    return o;
  }
#undef FA_TAKE

  template <typename... T>
  void give(const T&... results) {
    int given = 0;
    ((values_[given++] = torch::stable::detail::from(results)), ...);
  }

 private:
  StableIValue* values_;
  int taken_ = 0;
};

}  // namespace fused_attention
