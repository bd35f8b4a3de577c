// Turns tensors into params, for the operators of the CPU and of CUDA. Everything about a call is
// checked here, before a kernel sees it.
#pragma once

#include "device.h"

namespace fused_attention {

// -- tensors --------------------------------------------------------------------------------------

// Returns the address of the first element. In a dry run there is no memory, but the address still
// tells that the tensor is there, and how it is aligned.
void* address_of(const Tensor& tensor);

// The shape and strides of a tensor as [B, H, S, D], read once: every accessor is a call into
// libtorch.
struct Shape {
  int64_t size[4], stride[4];
};

// kDense: [B, H, S, D]. kPacked: all tokens of packed sequences, [T, H, D]. kPaged:
// pages, page_size, H, D].
enum class Layout { kDense, kPacked, kPaged };

Shape shape_of(const Tensor& tensor, const char* name, Layout layout = Layout::kDense);
DType dtype_of(const Tensor& tensor, const char* name);
int64_t element_bytes(DType dtype);

// Returns a * b, or the largest number if the product exceeds it.
int64_t saturating_product(int64_t a, int64_t b);
int64_t count_elements(Sizes sizes);
inline bool is_empty(const Tensor& tensor) { return count_elements(tensor.sizes()) == 0; }

// Throws the error "not enough memory". `what` names a buffer and its shape; `hint` says what would
// need less.
[[noreturn]] void refuse_for_memory(const char* what, double bytes, const char* hint);

// A buffer. `what` and `hint` describe it if there is no memory for it. A result belongs to the
// caller, a kept buffer to the caller or to autograd; any other is gone when the call ends.
enum class Owner { kResult, kKept, kCall };
struct Buffer {
  const char *what, *hint = "";
  Owner owner = Owner::kCall;
};
Tensor empty(Buffer buffer, Sizes sizes, ScalarType dtype);
// Returns an empty tensor, which stands for a result that is not asked for.
Tensor no_result(ScalarType dtype);
// Returns a dense tensor in the memory format of the model: BHSD or BSHD.
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

// Returns the view of a tensor that broadcasts against the scores: each size is 1 or full, and the
// stride is 0 where it is 1.
ScoreView score_view(const Tensor& tensor, const char* name, const AttentionParams& p);

// -- describing a call ----------------------------------------------------------------------------

// Memory that kernels read and that belongs to no argument; kept while a call runs.
struct Held {
  std::shared_ptr<const void> cu_seqlens_q, cu_seqlens_k, seqused_k, block_table;
  std::shared_ptr<const void> philox;  // int64 [2] or [samples, 2], null without dropout
};

Layout layout_of_queries(const Options& o);
Layout layout_of_keys(const Options& o);

// Returns the number of samples of a call, whose philox [n, 2] and sinks [n, heads] have one row
// per sample; 0 if they are [2] and [heads]. The samples divide `batch` equally.
int64_t count_samples(const OptionalTensor& philox, const OptionalTensor& sinks, int64_t batch);

// Describes dropout: its probability in p, its random state in `held`. Both kinds of params have
// the same names for it.
void describe_dropout(AttentionParams& p, double dropout_p, const OptionalTensor& philox,
                      int64_t samples, Held& held);
void describe_dropout(SoftmaxParams& p, double dropout_p, const OptionalTensor& philox,
                      int64_t samples, Held& held);

void describe_query_and_key(AttentionParams& p, const Input& query, const Input& key);
void describe_inputs(AttentionParams& p, const Input& query, const Input& key, const Input& value);
void describe_options(AttentionParams& p, const Options& o, Held& held);

const Tensor& checked_int32(const Tensor& tensor, const char* name, int64_t dim, int64_t size);
// Describes the batch, lengths and places, without checking what the tensors hold.
void describe_places(AttentionParams& p, const Options& o, int64_t num_pages, Held& held);

ScalarType lse_dtype(const AttentionParams& p);
void check_lse(const AttentionParams& p, const Tensor& tensor, const char* name);
// Sets p.lse. Returns the contiguous tensor that it points to.
Tensor dense_lse(AttentionParams& p, const Tensor& lse);
// Describes the inputs that a backward has beyond those of the forward.
void describe_gradients(AttentionParams& p, const Input& query, const Input& out,
                        const Input& grad_out, const OptionalTensor& grad_lse);

}  // namespace fused_attention
