// From tensors to params: what the operators of the CPU and of CUDA share. Everything about a call
// is checked here, before a kernel sees it.
#pragma once

#include "device.h"

namespace fused_attention {

// -- tensors --------------------------------------------------------------------------------------

// The address of the first element. In a dry run there is no memory, but addresses still tell what
// a call has, and how it is aligned.
void* address_of(const Tensor& tensor);

// The shape and strides of a tensor as [B, H, S, D], read once: every accessor is a call into
// libtorch.
struct Shape {
  int64_t size[4], stride[4];
};

// [B, H, S, D]; all tokens of packed sequences, [T, H, D]; pages, [pages, page_size, H, D].
enum class Layout { kDense, kPacked, kPaged };

Shape shape_of(const Tensor& tensor, const char* name, Layout layout = Layout::kDense);
DType dtype_of(const Tensor& tensor, const char* name);
int64_t element_bytes(DType dtype);

// Returns a * b, or the largest number if the product exceeds it.
int64_t saturating_product(int64_t a, int64_t b);
int64_t count_elements(Sizes sizes);
inline bool is_empty(const Tensor& tensor) { return count_elements(tensor.sizes()) == 0; }

// `what` names a buffer and its shape; `hint` says what would need less.
[[noreturn]] void refuse_for_memory(const char* what, double bytes, const char* hint);

// A new tensor, which `what` and `hint` describe where there is no memory for it. Results are the
// caller's; what is kept is the caller's or autograd's; the rest is gone when the call ends.
enum class Owner { kResult, kKept, kCall };
struct Buffer {
  const char *what, *hint = "";
  Owner owner = Owner::kCall;
};
Tensor empty(Buffer buffer, Sizes sizes, ScalarType dtype);
// Returns an empty tensor, which stands for a result that is not asked for.
Tensor no_result(ScalarType dtype);
// Dense [B, H, S, D] memory, or [B, S, H, D] where that is how the model tensor lies.
Tensor empty_like_format(Buffer buffer, const Shape& model, int64_t S, int64_t D, ScalarType dtype);

// An input as given and as kernels read it: in place if its last stride is 1, else copied.
struct Input {
  Input(const Tensor& tensor, const char* name, Layout layout = Layout::kDense);
  TensorView view() const {
    return {address_of(dense), shape.stride[0], shape.stride[1], shape.stride[2]};
  }
  Shape given;
  Tensor dense;
  Shape shape;
};

TensorView view_of(const Tensor& output, Layout layout = Layout::kDense);
Footprint footprint_of(const Tensor& tensor);

// A tensor that broadcasts against the scores: each size 1 or full, stride 0 where it is 1.
ScoreView score_view(const Tensor& tensor, const char* name, const AttentionParams& p);

// -- describing a call ----------------------------------------------------------------------------

// What kernels read that belongs to no argument; kept while a call runs.
struct Held {
  std::shared_ptr<const void> cu_seqlens_q, cu_seqlens_k, seqused_k, block_table;
  std::shared_ptr<const void> philox;  // int64 [2] or [samples, 2], null without dropout
};

Layout layout_of_queries(const Options& o);
Layout layout_of_keys(const Options& o);

// How many samples a call has, whose philox [n, 2] and sinks [n, heads] have a row for each; 0
// where they are [2] and [heads]. `batch` is what they share out among them.
int64_t count_samples(const OptionalTensor& philox, const OptionalTensor& sinks, int64_t batch);

// The probability and, in `held`, the random state of dropout. Both kinds of params hold it under
// the same names.
void describe_dropout(AttentionParams& p, double dropout_p, const OptionalTensor& philox,
                      int64_t samples, Held& held);
void describe_dropout(SoftmaxParams& p, double dropout_p, const OptionalTensor& philox,
                      int64_t samples, Held& held);

void describe_query_and_key(AttentionParams& p, const Input& query, const Input& key);
void describe_inputs(AttentionParams& p, const Input& query, const Input& key, const Input& value);
void describe_options(AttentionParams& p, const Options& o, Held& held);

const Tensor& checked_int32(const Tensor& tensor, const char* name, int64_t dim, int64_t size);
// Batch, lengths and places, but for what the tensors hold.
void describe_places(AttentionParams& p, const Options& o, int64_t num_pages, Held& held);

ScalarType lse_dtype(const AttentionParams& p);
void check_lse(const AttentionParams& p, const Tensor& tensor, const char* name);
// As the kernels read it.
Tensor dense_lse(AttentionParams& p, const Tensor& lse);
// What a backward is given.
void describe_gradients(AttentionParams& p, const Input& query, const Input& out,
                        const Input& grad_out, const OptionalTensor& grad_lse);

}  // namespace fused_attention
