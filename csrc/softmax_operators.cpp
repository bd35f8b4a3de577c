#include "softmax_operators.h"

namespace fused_attention {
namespace {

ScalarType accumulation_dtype(const SoftmaxParams& p) {
  return p.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// Describes the rows of a tensor whose last stride is 1. They are numbered and visited in its
// order, in tasks of about kTaskElements elements.
SoftmaxParams describe_rows(const Tensor& tensor, const char* name, int64_t causal) {
  constexpr int64_t kTaskElements = 65536;
  STD_TORCH_CHECK(is_here(tensor) && tensor.dim() >= 1, name, ": expected a ", kDevice,
                  " tensor of at least 1 dimension");
  STD_TORCH_CHECK(causal >= 0 && causal <= 2, "causal: expected 0, 1 or 2, got ", causal);
  const auto sizes = tensor.sizes();
  SoftmaxParams p;
  p.dtype = dtype_of(tensor, name);
  const size_t last = sizes.size() - 1;
  p.columns = sizes[last];
  p.queries = last >= 1 ? sizes[last - 1] : 1;
  p.heads = last >= 2 ? sizes[last - 2] : 1;
  p.groups = 1;
  for (size_t i = 0; i < last; ++i) {
    p.groups = saturating_product(p.groups, sizes[i]);
    if (sizes[i] == 1) continue;
    STD_TORCH_CHECK(p.dims < SoftmaxParams::kMaxDims, name, ": expected at most ",
                    SoftmaxParams::kMaxDims, " dimensions beside the last, got ", last);
    p.size[p.dims++] = sizes[i];
  }
  int64_t number = 1;
  for (int d = p.dims; d-- > 0; number = saturating_product(number, p.size[d])) {
    p.stride[SoftmaxParams::kNumber][d] = number;
  }
  p.causal = causal != 0;
  p.diagonal_offset = causal == (int64_t)Causal::kBottomRight ? p.columns - p.queries : 0;
  p.groups_per_task = p.columns >= kTaskElements ? 1 : kTaskElements / (p.columns + 1);
  return p;
}

// Sets the strides of the rows in `tensor`, whose shape equals or broadcasts to the input's.
// Returns the stride along the columns. Strides are 0 where the tensor is broadcast.
int64_t describe_operand(SoftmaxParams& p, SoftmaxParams::Operand operand, const Tensor& tensor,
                         const char* name, Sizes input, bool broadcast) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const size_t missing = input.size() - sizes.size();
  STD_TORCH_CHECK(is_here(tensor) && sizes.size() <= input.size() && (broadcast || missing == 0),
                  name, ": expected a ", kDevice, " tensor of ", input.size(), " dimensions");
  int d = 0;
  int64_t last_stride = 0;
  for (size_t i = 0; i < input.size(); ++i) {
    const int64_t size = i < missing ? 1 : sizes[i - missing];
    STD_TORCH_CHECK(size == input[i] || (broadcast && size == 1), name, ": size ", size,
                    " does not fit ", input[i], " in dimension ", i);
    const int64_t stride = size == 1 ? 0 : strides[i - missing];
    if (i + 1 == input.size())
      last_stride = stride;
    else if (input[i] != 1)
      p.stride[operand][d++] = stride;
  }
  return last_stride;
}

// Describes the result: a new contiguous tensor, visited in its order if `in_order`.
void describe_output(SoftmaxParams& p, const Tensor& out, Sizes sizes, bool in_order) {
  describe_operand(p, SoftmaxParams::kOutput, out, "out", sizes, false);
  p.output = out.data_ptr();
  if (in_order) expect_output(p, out);
}

// Returns the tensor itself if its last stride is 1, else a copy.
Tensor dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool dense = last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1;
  return dense ? tensor : torch::stable::contiguous(tensor);
}

void describe_sinks(SoftmaxParams& p, const OptionalTensor& sinks, int64_t dims) {
  if (!sinks) return;
  STD_TORCH_CHECK(dims >= 3, "sinks: expected an input of at least 3 dimensions, [..., H, M, N]");
  STD_TORCH_CHECK(is_here(*sinks) && (sinks->dim() == 1 || sinks->dim() == 2) &&
                      sinks->size(-1) == p.heads && sinks->is_contiguous() &&
                      sinks->scalar_type() == accumulation_dtype(p),
                  "sinks: expected a contiguous ", kDevice, " tensor [", p.heads, "] or [samples, ",
                  p.heads, "] in ", p.dtype == DType::kFloat64 ? "float64" : "float32");
  p.sinks = sinks->data_ptr();
}

// Returns how many samples there are, see count_samples.
int64_t describe_samples(SoftmaxParams& p, const OptionalTensor& philox,
                         const OptionalTensor& sinks) {
  const int64_t matrices = p.queries > 0 ? p.groups / p.queries : 0;
  const int64_t samples = count_samples(philox, sinks, p.heads > 0 ? matrices / p.heads : 0);
  p.sample_heads = samples > 0 ? matrices / samples : 0;
  return samples;
}

// Describes everything but the result.
SoftmaxParams describe_softmax(const Tensor& input, double scale, int64_t causal,
                               const OptionalTensor& mask, const OptionalTensor& bias,
                               const OptionalTensor& sinks, const OptionalTensor& philox,
                               double dropout_p, Held& held) {
  SoftmaxParams p = describe_rows(input, "input", causal);
  const auto sizes = input.sizes();
  describe_operand(p, SoftmaxParams::kInput, input, "input", sizes, false);
  p.input = input.data_ptr();
  p.scale = scale;
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask: expected bool");
    p.mask_stride_k = describe_operand(p, SoftmaxParams::kMask, *mask, "mask", sizes, true);
    p.mask = (const uint8_t*)mask->data_ptr();
  }
  if (bias) {
    p.bias_dtype = dtype_of(*bias, "bias");
    p.bias_stride_k = describe_operand(p, SoftmaxParams::kBias, *bias, "bias", sizes, true);
    p.bias = bias->data_ptr();
  }
  describe_sinks(p, sinks, (int64_t)sizes.size());
  describe_dropout(p, dropout_p, philox, describe_samples(p, philox, sinks), held);
  return p;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> masked_softmax_forward(
    const Tensor& input, double scale, int64_t causal, bool save, const OptionalTensor& mask,
    const OptionalTensor& bias, const OptionalTensor& sinks, const OptionalTensor& philox,
    double dropout_p) {
  const OnDeviceOf device(input);
  const Tensor dense = dense_rows(input);
  Held held;
  SoftmaxParams p =
      describe_softmax(dense, scale, causal, mask, bias, sinks, philox, dropout_p, held);
  const auto sizes = input.sizes();
  Tensor out = empty({"the softmax, of input's shape", "masked_softmax_ overwrites its input"},
                     sizes, input.scalar_type());
  describe_output(p, out, sizes, true);
  const bool save_weights = save && dropout_p > 0, save_sinks = save && sinks.has_value();
  Tensor weights = save_weights
                       ? empty({"the weights before dropout, of input's shape, for the backward",
                                "torch.no_grad(), or dropout_p=0, keeps none"},
                               sizes, input.scalar_type())
                       : no_result(input.scalar_type());
  Tensor sink_weight = save_sinks
                           ? empty({"the weights of the sinks, one a row, for the backward",
                                    "torch.no_grad() keeps none"},
                                   Sizes(sizes.data(), sizes.size() - 1), accumulation_dtype(p))
                           : no_result(accumulation_dtype(p));
  if (count_elements(sizes) == 0 && count_elements(sink_weight.sizes()) == 0) {
    return {out, weights, sink_weight};
  }
  if (save_weights) p.weights = weights.data_ptr();
  if (save_sinks) p.sink_weight = sink_weight.data_ptr();
  run_softmax(p, held);
  return {out, weights, sink_weight};
}

void masked_softmax_(const Tensor& input, double scale, int64_t causal, const OptionalTensor& mask,
                     const OptionalTensor& bias, const OptionalTensor& sinks,
                     const OptionalTensor& philox, double dropout_p) {
  const OnDeviceOf device(input);
  const auto sizes = input.sizes();
  const Footprint written = footprint_of(input);
  STD_TORCH_CHECK(!written.overlaps_itself(),
                  "input: expected memory of its own for each element, got overlapping strides");
  const auto check_apart = [&](const char* name, const OptionalTensor& tensor) {
    STD_TORCH_CHECK(!tensor || !written.overlaps(footprint_of(*tensor)), name,
                    ": expected memory apart from input's, which is overwritten");
  };
  check_apart("mask", mask), check_apart("bias", bias);
  check_apart("sinks", sinks), check_apart("philox", philox);
  Tensor dense = dense_rows(input);
  Held held;
  SoftmaxParams p =
      describe_softmax(dense, scale, causal, mask, bias, sinks, philox, dropout_p, held);
  if (count_elements(sizes) == 0) return;
  describe_operand(p, SoftmaxParams::kOutput, dense, "input", sizes, false);
  p.output = dense.data_ptr();
  run_softmax(p, held);
  if (dense.data_ptr() != input.data_ptr()) {
    Tensor target = input;
    torch::stable::copy_(target, dense);
  }
}

namespace {
// Makes the dimensions along which dbias is summed the innermost, so that a group is the rows that
// are summed into one row of dbias. A long sum is cut into chunks, which are added up in the end.
void describe_bias_gradient(SoftmaxParams& p, const Tensor& bias, Sizes sizes) {
  constexpr int64_t kMinRows = 8;
  p.bias_dtype = dtype_of(bias, "bias");
  // Its shape tells where the bias is broadcast; an expanded bias has a gradient of full size.
  Tensor shape = empty({"the gradient of the mask"}, bias.sizes(), bias.scalar_type());
  const int64_t columns = describe_operand(p, SoftmaxParams::kBias, shape, "bias", sizes, true);
  p.bias_width = p.columns == 1 || columns != 0 ? p.columns : 1;
  const SoftmaxParams given = p;
  p.groups = p.group_rows = 1;
  int d = 0;
  for (const bool kept : {true, false}) {
    for (int i = 0; i < p.dims; ++i) {
      if ((given.stride[SoftmaxParams::kBias][i] != 0) != kept) continue;
      (kept ? p.groups : p.group_rows) *= given.size[i];
      p.size[d] = given.size[i];
      for (int k = 0; k < SoftmaxParams::kOperands; ++k) p.stride[k][d] = given.stride[k][i];
      ++d;
    }
  }
  if (p.groups * p.group_rows == 0) return;
  p.groups_per_task = given.groups_per_task / p.group_rows;
  if (p.groups_per_task > 0) return;
  p.groups_per_task = 1;
  const int64_t wanted = bias_tasks() / p.groups, most = p.group_rows / kMinRows;
  const int64_t chunks = wanted < most ? wanted : most;
  p.chunks = chunks > 1 ? chunks : 1;
}
}  // namespace

std::tuple<Tensor, Tensor, Tensor> masked_softmax_backward(
    const Tensor& grad_out, const Tensor& weights, double scale, int64_t causal,
    const OptionalTensor& bias, const OptionalTensor& sink_weight, const OptionalTensor& philox,
    double dropout_p, bool bias_grad, bool sinks_grad) {
  const OnDeviceOf device(weights);
  STD_TORCH_CHECK(!bias_grad || bias, "bias_grad: expected a bias");
  STD_TORCH_CHECK(!sinks_grad || sink_weight, "sinks_grad: expected sink_weight");
  STD_TORCH_CHECK(grad_out.scalar_type() == weights.scalar_type(),
                  "grad_out: expected the dtype of the weights");
  const auto sizes = weights.sizes();
  const Tensor dense_weights = dense_rows(weights), dense_grad = dense_rows(grad_out);
  SoftmaxParams p = describe_rows(dense_weights, "weights", causal);
  p.scale = scale;
  Held held;
  describe_dropout(p, dropout_p, philox, describe_samples(p, philox, {}), held);
  Tensor dx = empty({"the gradient of input"}, sizes, weights.scalar_type());
  describe_operand(p, SoftmaxParams::kInput, dense_weights, "weights", sizes, false);
  describe_operand(p, SoftmaxParams::kGradOut, dense_grad, "grad_out", sizes, false);
  describe_output(p, dx, sizes, !bias_grad);
  p.input = dense_weights.data_ptr();
  p.grad_out = dense_grad.data_ptr();
  const int64_t rows = p.groups;

  Tensor dbias = bias_grad ? empty({"the gradient of the mask",
                                    "a mask of size 1 where it is broadcast has a smaller one "
                                    "than an expanded mask; a boolean mask has none"},
                                   bias->sizes(), bias->scalar_type())
                           : no_result(weights.scalar_type());
  Tensor dsinks = sinks_grad
                      ? empty({"the gradient of the sinks [H]"}, {p.heads}, accumulation_dtype(p))
                      : no_result(accumulation_dtype(p));
  if (rows == 0 || p.columns == 0) {
    torch::stable::zero_(dbias);
    torch::stable::zero_(dsinks);
    return {dx, dbias, dsinks};
  }
  Tensor partial, sink_terms;
  if (bias_grad) {
    describe_bias_gradient(p, *bias, sizes);
    p.dbias = dbias.data_ptr();
    if (p.chunks > 1) {
      partial = empty({"the parts of the mask's gradient"}, {p.groups * p.chunks * p.bias_width},
                      accumulation_dtype(p));
      p.partial = partial.data_ptr();
    }
  }
  if (sinks_grad) {
    STD_TORCH_CHECK(sizes.size() >= 3 && is_here(*sink_weight) && sink_weight->is_contiguous() &&
                        sink_weight->numel() == rows &&
                        sink_weight->scalar_type() == accumulation_dtype(p),
                    "sink_weight: expected what masked_softmax_forward saved");
    p.sink_weight = sink_weight->data_ptr();
    sink_terms =
        empty({"what each row adds to the sinks' gradient"}, {rows}, accumulation_dtype(p));
    p.dsinks = dsinks.data_ptr();
    p.sink_terms = sink_terms.data_ptr();
  }
  run_softmax_backward(p, held);
  return {dx, dbias, dsinks};
}

}  // namespace fused_attention
