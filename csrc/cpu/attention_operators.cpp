// The CPU operators attention_forward, attention_backward, attention_weights, attention_statistics,
// dropout_keep_mask and check_sequences.
#include <string.h>

#include <algorithm>

#include "operators.h"

namespace fused_attention {
namespace {

// Describes the weights or their gradient: [B, Sq, Sk] if averaged over the heads, else
// B, Hq, Sq, Sk].
void describe_weights(AttentionParams& p, const Tensor& tensor, const char* name, bool average) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const size_t rows = average ? 1 : 2;  // the dimension of the queries
  STD_TORCH_CHECK(is_here(tensor) && sizes.size() == rows + 2 && sizes[0] == p.B &&
                      (average || sizes[1] == p.Hq) && sizes[rows] == p.Sq &&
                      sizes[rows + 1] == p.Sk && dtype_of(tensor, name) == p.dtype,
                  name,
                  ": expected [B, Sq, Sk] if averaged, else [B, Hq, Sq, Sk], in query's dtype");
  p.average_weights = average;
  p.weights = {address_of(tensor),       p.dtype,       strides[0],
               average ? 0 : strides[1], strides[rows], strides[rows + 1]};
}

// Notes for each block what the mask does, if several heads share it. The caller must keep the
// memory while kernels run.
std::optional<CallWorkspace> note_mask_blocks(AttentionParams& p) {
  const KernelTable& kernels = kernel_table();
  const size_t bytes = kernels.mask_blocks_bytes(p);
  if (bytes == 0) return {};
  std::optional<CallWorkspace> blocks(bytes);
  p.mask_blocks = (uint8_t*)blocks->data();
  run(kernels.mask_blocks, p);
  return blocks;
}

void run_kernel(AttentionParams& p) {
  const std::optional<CallWorkspace> mask_blocks = note_mask_blocks(p);
  const ForwardKernel& kernel = choose_forward(kernel_table(), p);
  note_kernel(kernel.name, kernel.reason, kernel.tiles(p));
  p.threads = torch::stable::get_num_threads();
  const size_t call_workspace_bytes =
      kernel.call_workspace_bytes != nullptr ? kernel.call_workspace_bytes(p) : 0;
  std::optional<CallWorkspace> shared;
  if (call_workspace_bytes > 0) p.call_workspace = shared.emplace(call_workspace_bytes).data();
  for (const Phase& phase : kernel.phases) {
    // Tasks of whole heads share few keys, so that each thread may have a range of its own.
    if (phase.run != nullptr) run(phase, p, phase.num_tasks(p) <= p.B * p.Hq);
  }
}

// Packed sequences of so few queries that the first kernel of the table serves them are a part of
// their own, whatever else is in the batch.
void run_forward(AttentionParams& p) {
  if (p.cu_seqlens_q != nullptr) {
    AttentionParams few = p;
    few.most_queries = 0;
    for (int64_t b = 0; b < p.B; ++b) {
      few.Sq = p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
      if (few.Sq > few.most_queries && kernel_table().attention_forward[0]->serves(few)) {
        few.most_queries = few.Sq;
      }
    }
    if (few.most_queries > 0 && few.most_queries < p.Sq) {
      p.least_queries = few.most_queries + 1;
      few.least_queries = 1;
      shorten_to_longest(few);
      run_kernel(few);
      shorten_to_longest(p);
    }
  }
  run_kernel(p);
}

constexpr Buffer kOut = {"the output [B, Hq, Sq, Dv]", "split the batch", Owner::kResult};
constexpr Buffer kLse = {"the log-sum-exp [B, Hq, Sq]",
                         "a call without gradients and without return_lse keeps none",
                         Owner::kKept};

// Sets tokens behind the last packed sequence: out 0, lse -inf.
template <typename T>
void clear_rest(const AttentionParams& p, int64_t Tq, T* lse) {
  if (is_dry()) return;
  const int64_t first = p.cu_seqlens_q[p.B], row_bytes = p.out.stride_s * element_bytes(p.dtype);
  memset((char*)p.out.data + first * row_bytes, 0, (size_t)((Tq - first) * row_bytes));
  for (int64_t h = 0; lse != nullptr && h < p.Hq; ++h) {
    std::fill(lse + h * Tq + first, lse + (h + 1) * Tq, -std::numeric_limits<T>::infinity());
  }
}

}  // namespace

Tensor forward(const Tensor& query, const Tensor& key, const Tensor& value, const Options& options,
               Tensor* lse) {
  note_operator("attention_forward");
  const Layout layout = layout_of_queries(options), kv_layout = layout_of_keys(options);
  const Input q(query, "query", layout), k(key, "key", kv_layout), v(value, "value", kv_layout);
  AttentionParams p;
  Held held;
  describe_inputs(p, q, k, v);
  const int64_t Tq = p.Sq;
  describe_call(p, options, k.shape, held);
  const bool packed = layout == Layout::kPacked;
  Tensor out = packed ? empty(kOut, {Tq, p.Hq, p.Dv}, query.scalar_type())
                      : empty_like_format(kOut, q.given, p.Sq, p.Dv, query.scalar_type());
  p.out = Input(out, "out", layout).view();
  if (lse != nullptr) {
    *lse =
        packed ? empty(kLse, {p.Hq, Tq}, lse_dtype(p)) : empty(kLse, {p.B, p.Hq, Tq}, lse_dtype(p));
    p.lse = address_of(*lse);
  }
  if (is_empty(out) && (lse == nullptr || is_empty(*lse))) return out;
  shorten_to_longest(p);
  if (p.B * p.Hq > 0) run_forward(p);
  if (packed && p.dtype == DType::kFloat64) clear_rest(p, Tq, (double*)p.lse);
  if (packed && p.dtype != DType::kFloat64) clear_rest(p, Tq, (float*)p.lse);
  return out;
}

Gradients backward(const BackwardArguments& call) {
  note_operator("attention_backward");
  const Options& options = call.options;
  const Layout layout = layout_of_queries(options), kv_layout = layout_of_keys(options);
  const Input q(call.query, "query", layout), k(call.key, "key", kv_layout);
  const Input v(call.value, "value", kv_layout);
  const Input o(call.out, "out", layout), grad_o(call.grad_out, "grad_out", layout);
  STD_TORCH_CHECK(
      !call.grad_weights || !(options.cu_seqlens_q || options.seqused_k || options.block_table),
      "grad_weights: expected none beside cu_seqlens_q, seqused_k and block_table");
  AttentionParams p;
  Held held;
  describe_inputs(p, q, k, v);
  describe_call(p, options, k.shape, held);
  describe_gradients(p, q, o, grad_o, call.grad_lse);
  check_lse(p, call.lse, "lse");
  if (call.grad_weights) {
    describe_weights(p, *call.grad_weights, "grad_weights", call.average_weights);
  }
  const ScalarType dtype = call.query.scalar_type();
  Tensor dq = empty_gradient("the gradient of query", call.query, q, layout);
  Tensor dk = empty_gradient("the gradient of key", call.key, k, kv_layout);
  Tensor dv = empty_gradient("the gradient of value", call.value, v, kv_layout);
  Tensor dbias = gradient_if(call.bias_grad, kDbias, options.bias, dtype);
  Tensor dsinks = gradient_if(call.sinks_grad, kDsinks, options.sinks, lse_dtype(p));
  if (is_empty(call.lse)) return zeros(dq, dk, dv, dbias, dsinks);  // there is no query
  const Tensor kept_lse = dense_lse(p, call.lse);
  Tensor delta = empty(kDelta, kept_lse.sizes(), lse_dtype(p));
  p.delta = address_of(delta);
  p.dq = view_of(dq, layout);
  if (options.cu_seqlens_q) torch::stable::zero_(dq);  // tokens behind the last sequence
  if (options.cu_seqlens_k || options.seqused_k || options.block_table) {
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
  }
  Tensor whole_dk = dk, whole_dv = dv;  // in one piece for each sequence
  if (options.block_table) {
    const Buffer buffer = {"the gradients of the sequences' keys and values [B, Hkv, Sk, D]",
                           "a block_table of fewer pages, or packed keys, need less"};
    whole_dk = empty(buffer, {p.B, p.Hkv, p.Sk, p.D}, dtype);
    whole_dv = empty(buffer, {p.B, p.Hkv, p.Sk, p.Dv}, dtype);
    p.page_dk = view_of(dk, kv_layout), p.page_dv = view_of(dv, kv_layout);
  }
  const Layout whole = options.block_table ? Layout::kDense : kv_layout;
  p.dk = view_of(whole_dk, whole), p.dv = view_of(whole_dv, whole);
  if (call.bias_grad) {
    if (p.Sk == 0) torch::stable::zero_(dbias);
    p.dbias = score_view(dbias, "dbias", p);
    p.dbias.dtype = p.bias.dtype;
  }
  if (call.sinks_grad) p.dsinks = address_of(dsinks);
  if (!call.bias_grad) shorten_to_longest(p);
  const std::optional<CallWorkspace> mask_blocks = note_mask_blocks(p);
  const KernelTable& kernels = kernel_table();
  std::optional<CallWorkspace> shared;
  if (const size_t bytes = kernels.attention_backward.call_workspace_bytes(p)) {
    p.call_workspace = shared.emplace(bytes).data();
  }
  const bool one_pass = kernels.attention_backward.heads.num_tasks(p) > 0;
  note_kernel(
      "attention_backward",
      one_pass ? "one pass over queries and keys" : "a pass over keys, then one over queries", {});
  run(kernels.attention_backward.delta, p);
  run(kernels.attention_weights.delta, p);
  run(kernels.attention_backward.sinks, p);
  run(kernels.attention_backward.keys, p);
  run(kernels.attention_backward.queries, p);
  run(kernels.attention_backward.heads, p);
  run(kernels.attention_backward.combine, p);
  run(kernels.attention_backward.pages, p);
  return {dq, dk, dv, dbias, dsinks};
}

namespace {
// Describes a call whose lse is known: no values, and no sinks, which lse contains.
void describe_weights_call(AttentionParams& p, const Input& query, const Input& key,
                           const Tensor& lse, Options options, Held& held) {
  STD_TORCH_CHECK(
      !options.cu_seqlens_q && !options.cu_seqlens_k && !options.seqused_k && !options.block_table,
      "cu_seqlens, seqused_k and block_table: expected none");
  options.sinks.reset();
  options.precision = 0;  // "highest"
  describe_query_and_key(p, query, key);
  describe_call(p, options, key.shape, held);
  check_lse(p, lse, "lse");
}

// Returns [B, Sq, Sk] if averaged over the heads, else [B, Hq, Sq, Sk].
Tensor weights(const Tensor& query, const Tensor& key, const Tensor& lse, bool average,
               const Options& options) {
  note_operator("attention_weights");
  const Input q(query, "query"), k(key, "key");
  AttentionParams p;
  Held held;
  describe_weights_call(p, q, k, lse, options, held);
  const ScalarType dtype = query.scalar_type();
  Tensor result = average ? empty({"the averaged attention weights [B, Sq, Sk]",
                                   "need_weights=False returns none", Owner::kResult},
                                  {p.B, p.Sq, p.Sk}, dtype)
                          : empty({"the attention weights [B, Hq, Sq, Sk]",
                                   "average_attn_weights=True returns a matrix for all heads, "
                                   "need_weights=False none",
                                   Owner::kResult},
                                  {p.B, p.Hq, p.Sq, p.Sk}, dtype);
  if (is_empty(result)) return result;
  const Tensor kept_lse = dense_lse(p, lse);
  describe_weights(p, result, "weights", average);
  if (p.Hq == 0) {
    torch::stable::zero_(result);
  } else {
    const std::optional<CallWorkspace> mask_blocks = note_mask_blocks(p);
    note_kernel("attention_weights", "tile by tile, from the log-sum-exp", {});
    run(kernel_table().attention_weights.weights, p);
  }
  return result;
}
}  // namespace

void attention_weights(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor query = stack.tensor(), key = stack.tensor(), lse = stack.tensor();
  const bool average = stack.flag();
  stack.give(weights(query, key, lse, average, stack.options()));
}

// Returns mass [B, Hq, Sk] and entropy [B, Hq, Sq], each [B, 0] if it is not asked for, and the top
// weights and keys [B, Hq, Sq, num_top].
void attention_statistics(StableIValue* values, uint64_t, uint64_t) {
  note_operator("attention_statistics");
  Stack stack(values);
  const Tensor query = stack.tensor(), key = stack.tensor(), lse = stack.tensor();
  const bool of_keys = stack.flag(), of_rows = stack.flag();
  AttentionParams p;
  p.num_top = stack.next<int64_t>();
  const Options options = stack.options();
  STD_TORCH_CHECK(p.num_top >= 0, "num_top: expected a number >= 0, got ", p.num_top);
  const Input q(query, "query"), k(key, "key");
  Held held;
  describe_weights_call(p, q, k, lse, options, held);
  const auto result = [&](const char* what, bool asked, int64_t size) {
    const Buffer buffer = {what, "split the batch", Owner::kResult};
    return asked ? empty(buffer, {p.B, p.Hq, size}, lse_dtype(p))
                 : empty(buffer, {p.B, 0}, lse_dtype(p));
  };
  Tensor mass = result("the attention mass of the keys [B, Hq, Sk]", of_keys, p.Sk);
  Tensor entropy = result("the entropy of the rows [B, Hq, Sq]", of_rows, p.Sq);
  const Buffer buffer = {"the largest weights of the rows [B, Hq, Sq, num_top]",
                         "a smaller num_top needs less", Owner::kResult};
  Tensor top = empty(buffer, {p.B, p.Hq, p.Sq, p.num_top}, lse_dtype(p));
  Tensor keys = empty(buffer, top.sizes(), ScalarType::Long);
  if (p.B * p.Hq * p.Sq * p.Sk == 0) {
    for (Tensor* x : {&mass, &entropy, &top}) torch::stable::zero_(*x);
    std::fill_n((int64_t*)address_of(keys), count_elements(keys.sizes()), -1);
  } else {
    const Tensor kept_lse = dense_lse(p, lse);
    if (of_keys) p.mass = address_of(mass);
    if (of_rows) p.entropy = address_of(entropy);
    p.top_weights = address_of(top);
    p.top_keys = (int64_t*)address_of(keys);
    const std::optional<CallWorkspace> mask_blocks = note_mask_blocks(p);
    const StatisticsKernels& kernels = kernel_table().attention_statistics;
    note_kernel("attention_statistics", "tile by tile, from the log-sum-exp", {});
    std::optional<CallWorkspace> shared;
    if (const size_t bytes = kernels.call_workspace_bytes(p)) {
      p.call_workspace = shared.emplace(bytes).data();
    }
    run(kernels.rows, p);
    run(kernels.mass, p);
  }
  stack.give(mass, entropy, top, keys);
}

// -- dropout --------------------------------------------------------------------------------------

Tensor dropout_keep_mask(const Tensor& philox, double dropout_p, int64_t batch, int64_t heads,
                         int64_t seqlen_q, int64_t seqlen_k) {
  STD_TORCH_CHECK(batch >= 0 && heads >= 0 && seqlen_q >= 0 && seqlen_k >= 0,
                  "batch, heads, seqlen_q, seqlen_k: expected sizes");
  AttentionParams p;
  Held held;
  p.B = batch, p.Hq = heads, p.Sq = seqlen_q, p.Sk = seqlen_k;
  const int64_t samples = count_samples(philox, {}, batch);
  p.sample_heads = samples > 0 ? saturating_product(batch / samples, heads) : 0;
  describe_dropout(p, dropout_p, philox, samples, held);
  read_philox(p, held);
  Tensor keep = empty(
      {"a dropout mask [batch, heads, seqlen_q, seqlen_k]", "attention(dropout_p=) needs none"},
      {batch, heads, seqlen_q, seqlen_k}, ScalarType::Bool);
  if (is_empty(keep)) return keep;
  p.dropout_keep = (uint8_t*)address_of(keep);
  run(kernel_table().dropout_keep_mask, p);
  return keep;
}

void check_sequences(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor query = stack.tensor(), key = stack.tensor();
  const Options options = stack.options();
  const Shape q = shape_of(query, "query", layout_of_queries(options));
  const Shape k = shape_of(key, "key", layout_of_keys(options));
  AttentionParams p;
  Held held;
  p.B = q.size[0], p.Sq = q.size[2], p.Sk = k.size[2];
  describe_sequences(p, options, k, held);
}

}  // namespace fused_attention
