// The CPU operators attention_jvp and attention_backward_jvp.
#include <algorithm>

#include "operators.h"

namespace fused_attention {
namespace {

// Tangents as kernels read them: in place, or in a copy that is held here.
struct TangentInputs {
  explicit TangentInputs(ScalarType type) : dtype(type) {}
  TensorView view(const OptionalTensor& tensor, const Shape& like, const char* name) {
    if (!tensor) return {};
    const Input& input = inputs[count++].emplace(*tensor, name);
    const int64_t *size = input.shape.size, *want = like.size;
    STD_TORCH_CHECK(tensor->scalar_type() == dtype && std::equal(size, size + 4, want), name,
                    ": expected [", want[0], ", ", want[1], ", ", want[2], ", ", want[3],
                    "] in query's dtype");
    return input.view();
  }
  void* rows(const AttentionParams& p, const OptionalTensor& tensor, const char* name) {
    if (!tensor) return nullptr;
    check_lse(p, *tensor, name);
    return hold(*tensor);
  }
  const void* like_sinks(const AttentionParams& p, const OptionalTensor& tensor,
                         const OptionalTensor& sinks) {
    if (!tensor) return nullptr;
    STD_TORCH_CHECK(sinks && is_here(*tensor) && tensor->scalar_type() == lse_dtype(p) &&
                        std::ranges::equal(tensor->sizes(), sinks->sizes()),
                    "tangent_sinks: expected the shape and dtype of sinks, beside them");
    return hold(*tensor);
  }
  void* hold(const Tensor& tensor) {
    held[kept] = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
    return address_of(*held[kept++]);
  }
  ScalarType dtype;
  std::optional<Input> inputs[8];
  OptionalTensor held[5];
  int count = 0, kept = 0;
};

// The arguments that attention_jvp and attention_backward_jvp share.
struct Direction {
  OptionalTensor query, key, value, bias, sinks;
};

void describe_tangents(AttentionParams& p, TangentInputs& tangents, const Input& q, const Input& k,
                       const Input& v, const Direction& direction, const OptionalTensor& sinks) {
  p.tangent.query = tangents.view(direction.query, q.shape, "tangent_query");
  p.tangent.key = tangents.view(direction.key, k.shape, "tangent_key");
  p.tangent.value = tangents.view(direction.value, v.shape, "tangent_value");
  if (direction.bias) {
    p.tangent.bias = score_view(*direction.bias, "tangent_bias", p);
    p.tangent.bias.dtype = dtype_of(*direction.bias, "tangent_bias");
  }
  p.tangent.sinks = tangents.like_sinks(p, direction.sinks, sinks);
}

void refuse_sequences(const Options& o) {
  STD_TORCH_CHECK(
      !o.cu_seqlens_q && !o.cu_seqlens_k && !o.seqused_k && !o.block_table,
      "cu_seqlens, seqused_k and block_table: their second derivatives and forward-mode "
      "derivatives are not built yet");
}

}  // namespace

// Returns (tangent_out, tangent_lse).
void attention_jvp(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor query = stack.tensor(), key = stack.tensor(), value = stack.tensor();
  const Tensor out = stack.tensor(), lse = stack.tensor();
  Direction direction;
  direction.query = stack.optional_tensor(), direction.key = stack.optional_tensor();
  direction.value = stack.optional_tensor(), direction.bias = stack.optional_tensor();
  direction.sinks = stack.optional_tensor();
  const Options options = stack.options();
  refuse_sequences(options);
  const Input q(query, "query"), k(key, "key"), v(value, "value");
  AttentionParams p;
  Held held;
  describe_inputs(p, q, k, v);
  describe_call(p, options, k.shape, held);
  const ScalarType dtype = query.scalar_type();
  TangentInputs tangents(dtype);
  describe_tangents(p, tangents, q, k, v, direction, options.sinks);
  p.out = tangents.view(out, {{p.B, p.Hq, p.Sq, p.Dv}, {}}, "out");
  check_lse(p, lse, "lse");
  Tensor tangent_out =
      empty_like_format({"the tangent of the output [B, Hq, Sq, Dv]"}, q.given, p.Sq, p.Dv, dtype);
  Tensor tangent_lse =
      empty({"the tangent of the log-sum-exp [B, Hq, Sq]"}, {p.B, p.Hq, p.Sq}, lse_dtype(p));
  if (!is_empty(tangent_lse)) {  // there are queries
    const Tensor kept_lse = dense_lse(p, lse);
    p.tangent.out = view_of(tangent_out);
    p.tangent.lse = address_of(tangent_lse);
    run(kernel_table().attention_tangents.jvp, p);
  }
  stack.give(tangent_out, tangent_lse);
}

namespace {
// Returns the tangents of the results of attention_backward. `rest` has the arguments behind lse.
Gradients backward_jvp(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query,
                       const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                       Stack& rest) {
  const OptionalTensor tangent_grad_out = rest.optional_tensor();
  const OptionalTensor tangent_grad_lse = rest.optional_tensor();
  Direction direction;
  direction.query = rest.optional_tensor(), direction.key = rest.optional_tensor();
  direction.value = rest.optional_tensor();
  const Tensor tangent_out = rest.tensor(), tangent_lse = rest.tensor();
  direction.bias = rest.optional_tensor(), direction.sinks = rest.optional_tensor();
  const Options options = rest.options();
  const bool bias_grad = rest.flag(), sinks_grad = rest.flag();
  refuse_sequences(options);
  STD_TORCH_CHECK(!bias_grad || options.bias, "bias_grad: expected a bias");
  STD_TORCH_CHECK(!sinks_grad || options.sinks, "sinks_grad: expected sinks");
  const Input q(query, "query"), k(key, "key"), v(value, "value");
  AttentionParams p;
  Held held;
  describe_inputs(p, q, k, v);
  describe_call(p, options, k.shape, held);
  const ScalarType dtype = query.scalar_type();
  TangentInputs tangents(dtype);
  describe_tangents(p, tangents, q, k, v, direction, options.sinks);
  const Shape like_out = {{p.B, p.Hq, p.Sq, p.Dv}, {}};
  p.out = tangents.view(out, like_out, "out");
  p.grad_out = tangents.view(grad_out, like_out, "grad_out");
  p.tangent.out = tangents.view(tangent_out, like_out, "tangent_out");
  p.tangent.grad_out = tangents.view(tangent_grad_out, like_out, "tangent_grad_out");
  check_lse(p, lse, "lse");
  Tensor dq = empty_gradient("the tangent of query's gradient", query, q, Layout::kDense);
  Tensor dk = empty_gradient("the tangent of key's gradient", key, k, Layout::kDense);
  Tensor dv = empty_gradient("the tangent of value's gradient", value, v, Layout::kDense);
  Tensor dbias = gradient_if(bias_grad, kDbias, options.bias, dtype);
  Tensor dsinks = gradient_if(sinks_grad, kDsinks, options.sinks, lse_dtype(p));
  if (is_empty(lse)) return zeros(dq, dk, dv, dbias, dsinks);  // there is no query
  p.lse = tangents.rows(p, lse, "lse");
  p.grad_lse = tangents.rows(p, grad_lse, "grad_lse");
  p.tangent.lse = tangents.rows(p, tangent_lse, "tangent_lse");
  p.tangent.grad_lse = tangents.rows(p, tangent_grad_lse, "tangent_grad_lse");

  Tensor delta = empty(kDelta, {p.B, p.Hq, p.Sq}, lse_dtype(p)),
         tangent_delta = empty(kDelta, {p.B, p.Hq, p.Sq}, lse_dtype(p));
  p.delta = address_of(delta);
  p.tangent.delta = address_of(tangent_delta);
  p.dq = view_of(dq), p.dk = view_of(dk), p.dv = view_of(dv);
  if (bias_grad) {
    if (p.Sk == 0) torch::stable::zero_(dbias);
    p.dbias = score_view(dbias, "dbias", p);
    p.dbias.dtype = p.bias.dtype;
  }
  if (sinks_grad) p.dsinks = address_of(dsinks);
  for (const Phase& phase : kernel_table().attention_tangents.backward_jvp) run(phase, p);
  return {dq, dk, dv, dbias, dsinks};
}

}  // namespace

void attention_backward_jvp(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor grad_out = stack.tensor();
  const OptionalTensor grad_lse = stack.optional_tensor();
  const Tensor query = stack.tensor(), key = stack.tensor(), value = stack.tensor();
  const Tensor out = stack.tensor(), lse = stack.tensor();
  const Gradients d = backward_jvp(grad_out, grad_lse, query, key, value, out, lse, stack);
  stack.give(d.query, d.key, d.value, d.bias, d.sinks);
}

}  // namespace fused_attention
