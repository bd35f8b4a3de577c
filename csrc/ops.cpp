// The operators of the CPU on the LibTorch stable ABI (schemas: operators.h; checks: describe.h).
// Each operator describes its call in an AttentionParams and runs the phases of the kernel in
// force, each under torch's own threads.

#include <dirent.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <limits>
#include <new>

#include "cpu/dispatch.h"
#include "operators.h"

namespace fused_attention {
namespace {

// -- where tensors live ---------------------------------------------------------------------------

constexpr const char* kDevice = "CPU";

bool is_here(const Tensor& tensor) { return tensor.is_cpu(); }

Tensor empty_strided(Sizes sizes, const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), strides,
                                                  (int32_t)dtype, aoti_torch_device_type_cpu(), 0,
                                                  &handle));
  return Tensor(handle);
}

template <typename Params>
void set_philox(Params& p, const int64_t* state, int64_t samples) {
  p.philox_seed = (uint64_t)state[0];
  p.philox_offset = (uint32_t)state[1];
  if (samples > 0) p.philox_states = state;
}

}  // namespace
}  // namespace fused_attention

#include "describe.h"

namespace fused_attention {
namespace {

// -- running phases -------------------------------------------------------------------------------

// Scratch memory of a thread, kept between calls while it is small.
class Workspace {
 public:
  void* at_least(size_t bytes) {
    if (bytes > size_) {
      release();
      data_ = aligned_alloc(64, (bytes + 63) / 64 * 64);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_;
  }
  void trim() {
    if (size_ > kKeptBytes) release();
  }
  ~Workspace() { release(); }

 private:
  static constexpr size_t kKeptBytes = 4 << 20;
  void release() {
    free(data_);
    data_ = nullptr;
    size_ = 0;
  }
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Tasks [next, end), drawn by whoever comes.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};
constexpr int64_t kMaxShares = 16;

// The tasks of share `first`, then what others left of theirs.
template <typename Params>
void run_tasks(const PhaseOf<Params>& phase, const Params& params, Share* shares, int64_t count,
               int64_t first) {
  static thread_local Workspace workspace;
  void* memory = workspace.at_least(phase.workspace_bytes(params));
  for (int64_t i = 0; i < count; ++i) {
    Share& share = shares[(first + i) % count];
    for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
      phase.run(params, task, task + 1, memory);
    }
  }
  workspace.trim();
}

// OpenMP's threads do not survive a fork, and a child that waits for them hangs. A child forked
// from a process that had more than one thread therefore computes on its own one.
bool had_several_threads = false, forked_from_threads = false;

bool has_several_threads() {
  int entries = 0;  // of which two are "." and ".."
  if (DIR* tasks = opendir("/proc/self/task")) {
    while (entries < 4 && readdir(tasks) != nullptr) ++entries;
    closedir(tasks);
  }
  return entries > 3;
}

const int fork_handler =
    pthread_atfork([] { had_several_threads = has_several_threads(); }, nullptr,
                   [] { forked_from_threads |= had_several_threads; });

// Tasks are drawn from counters, so that threads that got short ones take more of them. With one
// share, threads work on neighbouring tasks, which read the same keys; with a share for each thread
// (own_shares), a thread stays in one part of the memory, where no other one takes page faults.
template <typename Params>
void run(const PhaseOf<Params>& phase, const Params& params, bool own_shares = false) {
  const int64_t tasks = phase.num_tasks(params);
  Share shares[kMaxShares];
  shares[0].end = tasks;
  if (tasks == 0) return;
  if (tasks == 1 || forked_from_threads) return run_tasks(phase, params, shares, 1, 0);
  int64_t threads = torch::stable::get_num_threads();
  threads = threads < tasks ? threads : tasks;
  const int64_t count = !own_shares ? 1 : threads < kMaxShares ? threads : kMaxShares;
  for (int64_t i = 0; i < count; ++i) {
    shares[i].next = tasks * i / count;
    shares[i].end = tasks * (i + 1) / count;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    run_tasks(phase, params, shares, count, thread % count);
  });
}

// -- sequences that are not all alike -------------------------------------------------------------

// Offsets of packed sequences: 0, ... rising to at most `total`.
void check_offsets(const char* name, const int32_t* offsets, int64_t B, int64_t total) {
  STD_TORCH_CHECK(offsets[0] == 0, name, ": expected 0 first, got ", offsets[0]);
  for (int64_t b = 0; b < B; ++b) {
    STD_TORCH_CHECK(offsets[b] <= offsets[b + 1], name, ": expected offsets that do not fall, got ",
                    offsets[b], " before ", offsets[b + 1]);
  }
  STD_TORCH_CHECK(offsets[B] <= total, name, ": expected offsets of at most ", total,
                  " tokens, got ", offsets[B]);
}

// The pages that `used` keys need are there.
void check_pages(const int32_t* pages, int64_t used, int64_t page_size, int64_t num_pages) {
  for (int64_t n = 0; n * page_size < used; ++n) {
    STD_TORCH_CHECK(pages[n] >= 0 && pages[n] < num_pages, "block_table: expected pages in [0, ",
                    num_pages, "), got ", pages[n]);
  }
}

// Whatever the tensors of `describe_places` hold, nothing is read out of bounds from here on.
void check_places(const AttentionParams& p, int64_t Tq, int64_t num_pages) {
  if (p.cu_seqlens_q != nullptr) check_offsets("cu_seqlens_q", p.cu_seqlens_q, p.B, Tq);
  if (p.cu_seqlens_k != nullptr) {
    // Of paged keys they tell the lengths only.
    const int64_t total = p.block_table != nullptr ? std::numeric_limits<int32_t>::max() : p.Sk;
    check_offsets("cu_seqlens_k", p.cu_seqlens_k, p.B, total);
  }
  for (int64_t b = 0; b < p.B; ++b) {
    int64_t room = p.Sk;
    if (p.cu_seqlens_k != nullptr) {
      const int64_t length = p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b];
      STD_TORCH_CHECK(length <= room, "cu_seqlens_k: expected lengths of at most ", room,
                      ", what the pages hold, got ", length);
      room = p.block_table != nullptr && p.seqused_k != nullptr ? room : length;
    }
    const int64_t used = p.seqused_k != nullptr ? p.seqused_k[b] : room;
    STD_TORCH_CHECK(used >= 0 && used <= room, "seqused_k: expected lengths in [0, ", room,
                    "], got ", used);
    if (p.block_table != nullptr) {
      check_pages(p.block_table + b * p.block_table_stride_b, used, p.page_size, num_pages);
    }
  }
}
Sequences describe_sequences(AttentionParams& p, const Options& o, const Input& key) {
  const int64_t Tq = p.Sq;
  Sequences held = describe_places(p, o, key);
  check_places(p, Tq, key.shape.size[0]);
  return held;
}

// Sq and Sk <- those of the longest sequence.
void shorten_to_longest(AttentionParams& p) {
  int64_t Sq = p.cu_seqlens_q != nullptr ? 0 : p.Sq, Sk = 0;
  if (p.seqused_k == nullptr && p.cu_seqlens_k == nullptr) Sk = p.Sk;
  for (int64_t b = 0; b < p.B; ++b) {
    if (p.cu_seqlens_q != nullptr) {
      Sq = std::max<int64_t>(Sq, p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b]);
    }
    if (p.seqused_k != nullptr) {
      Sk = std::max<int64_t>(Sk, p.seqused_k[b]);
    } else if (p.cu_seqlens_k != nullptr) {
      Sk = std::max<int64_t>(Sk, p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b]);
    }
  }
  p.Sq = Sq;
  p.Sk = Sk;
}

// -- operators ------------------------------------------------------------------------------------

// The weights or their gradient: [B, Sq, Sk], averaged over the heads, or [B, Hq, Sq, Sk].
void describe_weights(AttentionParams& p, const Tensor& tensor, const char* name, bool average) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const size_t rows = average ? 1 : 2;  // the dimension of the queries
  STD_TORCH_CHECK(tensor.is_cpu() && sizes.size() == rows + 2 && sizes[0] == p.B &&
                      (average || sizes[1] == p.Hq) && sizes[rows] == p.Sq &&
                      sizes[rows + 1] == p.Sk && dtype_of(tensor, name) == p.dtype,
                  name,
                  ": expected [B, Sq, Sk] if averaged, else [B, Hq, Sq, Sk], in query's dtype");
  p.average_weights = average;
  p.weights = {tensor.data_ptr(),        p.dtype,       strides[0],
               average ? 0 : strides[1], strides[rows], strides[rows + 1]};
}

// Memory that the phases of one call share, 64-byte aligned.
struct Shared {
  explicit Shared(size_t bytes) : tensor(empty({(int64_t)bytes + 63}, ScalarType::Byte)) {}
  void* data() const { return (void*)(((uintptr_t)tensor.data_ptr() + 63) / 64 * 64); }
  Tensor tensor;
};

// Notes once what a mask does that several heads share. The memory is the caller's to keep.
std::optional<Shared> note_mask_blocks(AttentionParams& p) {
  const KernelTable& kernels = kernel_table();
  const size_t bytes = kernels.mask_blocks_bytes(p);
  if (bytes == 0) return {};
  std::optional<Shared> blocks(bytes);
  p.mask_blocks = (uint8_t*)blocks->data();
  run(kernels.mask_blocks, p);
  return blocks;
}

void run_forward(AttentionParams& p) {
  const std::optional<Shared> mask_blocks = note_mask_blocks(p);
  const ForwardKernel& kernel = choose_forward(kernel_table(), p);
  p.threads = torch::stable::get_num_threads();
  const size_t shared_bytes = kernel.shared_bytes != nullptr ? kernel.shared_bytes(p) : 0;
  std::optional<Shared> shared;
  if (shared_bytes > 0) p.shared = shared.emplace(shared_bytes).data();
  for (const Phase& phase : kernel.phases) {
    // Tasks of whole heads read nothing that the next one reads.
    if (phase.run != nullptr) run(phase, p, phase.num_tasks(p) <= p.B * p.Hq);
  }
}

// In the memory order of the input, dense.
Tensor empty_gradient(const Tensor& tensor, const Input& input, Layout layout) {
  const Shape& shape = input.given;
  if (layout != Layout::kDense) return empty(tensor.sizes(), tensor.scalar_type());
  return empty_like_layout(shape, shape.size[2], shape.size[3], tensor.scalar_type());
}

// Tokens behind the last packed sequence: out 0, lse -inf.
template <typename T>
void clear_rest(const AttentionParams& p, int64_t Tq, T* lse) {
  const int64_t first = p.cu_seqlens_q[p.B], row_bytes = p.out.stride_s * element_bytes(p.dtype);
  memset((char*)p.out.data + first * row_bytes, 0, (size_t)((Tq - first) * row_bytes));
  for (int64_t h = 0; lse != nullptr && h < p.Hq; ++h) {
    std::fill(lse + h * Tq + first, lse + (h + 1) * Tq, -std::numeric_limits<T>::infinity());
  }
}

Tensor forward(const Tensor& query, const Tensor& key, const Tensor& value, const Options& options,
               Tensor* lse, std::optional<int64_t> /*longest_q*/,
               std::optional<int64_t> /*longest_k*/) {
  const Layout layout = layout_of_queries(options), kv_layout = layout_of_keys(options);
  const Input q(query, "query", layout), k(key, "key", kv_layout), v(value, "value", kv_layout);
  AttentionParams p;
  describe_inputs(p, q, k, v);
  const int64_t Tq = p.Sq;
  const Sequences held = describe_sequences(p, options, k);
  describe_options(p, options);
  const bool packed = layout == Layout::kPacked;
  Tensor out = packed ? empty({Tq, p.Hq, p.Dv}, query.scalar_type())
                      : empty_like_layout(q.given, p.Sq, p.Dv, query.scalar_type());
  p.out = Input(out, "out", layout).view();
  if (lse != nullptr) {
    *lse = packed ? empty({p.Hq, Tq}, lse_dtype(p)) : empty({p.B, p.Hq, Tq}, lse_dtype(p));
    p.lse = lse->data_ptr();
  }
  shorten_to_longest(p);
  if (p.B * p.Hq > 0) run_forward(p);
  if (packed && p.dtype == DType::kFloat64) clear_rest(p, Tq, (double*)p.lse);
  if (packed && p.dtype != DType::kFloat64) clear_rest(p, Tq, (float*)p.lse);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& lse, double scale, int64_t causal,
    int64_t window_left, int64_t window_right, int64_t precision, const OptionalTensor& mask,
    const OptionalTensor& bias, const OptionalTensor& key_padding_mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const OptionalTensor& philox,
    double softcap, double dropout_p, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, std::optional<int64_t> /*max_seqlen_q*/,
    std::optional<int64_t> /*max_seqlen_k*/, const OptionalTensor& seqused_k,
    const OptionalTensor& block_table, bool bias_grad, bool sinks_grad,
    const OptionalTensor& grad_weights, bool average) {
  const Options options = {scale,     causal,     window_left,      window_right, precision,
                           mask,      bias,       key_padding_mask, alibi_slopes, sinks,
                           philox,    softcap,    dropout_p,        cu_seqlens_q, cu_seqlens_k,
                           seqused_k, block_table};
  const Layout layout = layout_of_queries(options), kv_layout = layout_of_keys(options);
  const Input q(query, "query", layout), k(key, "key", kv_layout), v(value, "value", kv_layout);
  const Input o(out, "out", layout), grad_o(grad_out, "grad_out", layout);
  AttentionParams p;
  describe_inputs(p, q, k, v);
  const Sequences held = describe_sequences(p, options, k);
  describe_options(p, options);
  describe_gradients(p, q, o, grad_o, grad_lse);
  const Tensor kept_lse = dense_lse(p, lse);
  const ScalarType dtype = query.scalar_type();
  Tensor delta = empty(kept_lse.sizes(), lse_dtype(p));
  p.delta = delta.data_ptr();
  Tensor dq = empty_gradient(query, q, layout);
  Tensor dk = empty_gradient(key, k, kv_layout), dv = empty_gradient(value, v, kv_layout);
  p.dq = view_of(dq, layout);
  if (cu_seqlens_q) torch::stable::zero_(dq);  // tokens behind the last sequence
  if (cu_seqlens_k || seqused_k || block_table) {
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
  }
  Tensor whole_dk = dk, whole_dv = dv;  // of each sequence
  if (block_table) {
    whole_dk = empty({p.B, p.Hkv, p.Sk, p.D}, dtype);
    whole_dv = empty({p.B, p.Hkv, p.Sk, p.Dv}, dtype);
    p.page_dk = view_of(dk, kv_layout), p.page_dv = view_of(dv, kv_layout);
  }
  const Layout whole = block_table ? Layout::kDense : kv_layout;
  p.dk = view_of(whole_dk, whole), p.dv = view_of(whole_dv, whole);
  STD_TORCH_CHECK(!bias_grad || bias, "bias_grad: expected a bias");
  STD_TORCH_CHECK(!sinks_grad || sinks, "sinks_grad: expected sinks");
  Tensor dbias = empty({0}, dtype), dsinks = empty({0}, lse_dtype(p));
  if (bias_grad) {
    const Shape shape = shape_of(*bias, "bias");
    const auto& size = shape.size;
    dbias = empty({size[0], size[1], size[2], size[3]}, bias->scalar_type());
    if (p.B * p.Hq * p.Sq * p.Sk == 0) torch::stable::zero_(dbias);
    p.dbias = score_view(dbias, "dbias", p);
    p.dbias.dtype = p.bias.dtype;
  }
  if (sinks_grad) {
    dsinks = empty(sinks->sizes(), lse_dtype(p));
    if (p.B == 0) torch::stable::zero_(dsinks);
    p.dsinks = dsinks.data_ptr();
  }
  STD_TORCH_CHECK(!grad_weights || !(cu_seqlens_q || seqused_k || block_table),
                  "grad_weights: expected none beside cu_seqlens_q, seqused_k and block_table");
  if (grad_weights) describe_weights(p, *grad_weights, "grad_weights", average);
  if (!bias_grad) shorten_to_longest(p);
  if (p.B * p.Hq == 0) return {dq, dk, dv, dbias, dsinks};
  const std::optional<Shared> mask_blocks = note_mask_blocks(p);
  const KernelTable& kernels = kernel_table();
  std::optional<Shared> shared;
  if (const size_t bytes = kernels.attention_backward_shared_bytes(p)) {
    p.shared = shared.emplace(bytes).data();
  }
  run(kernels.attention_backward_delta, p);
  run(kernels.attention_weights_delta, p);
  run(kernels.attention_backward_sinks, p);
  run(kernels.attention_backward_keys, p);
  run(kernels.attention_backward_queries, p);
  run(kernels.attention_backward_heads, p);
  run(kernels.attention_backward_parts, p);
  run(kernels.attention_backward_pages, p);
  return {dq, dk, dv, dbias, dsinks};
}

// -- attention weights ----------------------------------------------------------------------------

// [B, Sq, Sk], averaged over the heads, or [B, Hq, Sq, Sk].
Tensor attention_weights(const Tensor& query, const Tensor& key, const Tensor& lse, double scale,
                         int64_t causal, int64_t window_left, int64_t window_right, bool average,
                         const OptionalTensor& mask, const OptionalTensor& bias,
                         const OptionalTensor& key_padding_mask, const OptionalTensor& alibi_slopes,
                         const OptionalTensor& philox, double softcap, double dropout_p) {
  const Input q(query, "query"), k(key, "key");
  AttentionParams p;
  describe_query_and_key(p, q, k);
  const OptionalTensor& none = no_tensor();
  const Options options = {scale,  causal,  window_left,      window_right, 0,
                           mask,   bias,    key_padding_mask, alibi_slopes, none,
                           philox, softcap, dropout_p,        none,         none,
                           none,   none};
  describe_sequences(p, options, k);
  describe_options(p, options);
  const Tensor kept_lse = dense_lse(p, lse);
  const ScalarType dtype = query.scalar_type();
  Tensor weights =
      average ? empty({p.B, p.Sq, p.Sk}, dtype) : empty({p.B, p.Hq, p.Sq, p.Sk}, dtype);
  describe_weights(p, weights, "weights", average);
  if (p.Hq == 0) {
    torch::stable::zero_(weights);
  } else {
    const std::optional<Shared> mask_blocks = note_mask_blocks(p);
    run(kernel_table().attention_weights, p);
  }
  return weights;
}

// -- tangents -------------------------------------------------------------------------------------

// A tangent as kernels read it: in place, or in a copy that is held here.
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
    STD_TORCH_CHECK(sinks && tensor->is_cpu() && tensor->scalar_type() == lse_dtype(p) &&
                        std::ranges::equal(tensor->sizes(), sinks->sizes()),
                    "tangent_sinks: expected the shape and dtype of sinks, beside them");
    return hold(*tensor);
  }
  void* hold(const Tensor& tensor) {
    held[kept] = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
    return held[kept++]->data_ptr();
  }
  ScalarType dtype;
  std::optional<Input> inputs[8];
  OptionalTensor held[5];
  int count = 0, kept = 0;
};

void describe_tangents(AttentionParams& p, TangentInputs& tangents, const Input& q, const Input& k,
                       const Input& v, const OptionalTensor& tangent_query,
                       const OptionalTensor& tangent_key, const OptionalTensor& tangent_value,
                       const OptionalTensor& tangent_bias, const OptionalTensor& tangent_sinks,
                       const OptionalTensor& sinks) {
  p.tangent.query = tangents.view(tangent_query, q.shape, "tangent_query");
  p.tangent.key = tangents.view(tangent_key, k.shape, "tangent_key");
  p.tangent.value = tangents.view(tangent_value, v.shape, "tangent_value");
  if (tangent_bias) {
    p.tangent.bias = score_view(*tangent_bias, "tangent_bias", p);
    p.tangent.bias.dtype = dtype_of(*tangent_bias, "tangent_bias");
  }
  p.tangent.sinks = tangents.like_sinks(p, tangent_sinks, sinks);
}

void refuse_sequences(const Options& o) {
  STD_TORCH_CHECK(
      !o.cu_seqlens_q && !o.cu_seqlens_k && !o.seqused_k && !o.block_table,
      "cu_seqlens, seqused_k and block_table: their second derivatives and forward-mode "
      "derivatives are not built yet");
}

// (tangent_out, tangent_lse)
std::tuple<Tensor, Tensor> attention_jvp(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& lse, const OptionalTensor& tangent_query, const OptionalTensor& tangent_key,
    const OptionalTensor& tangent_value, const OptionalTensor& tangent_bias,
    const OptionalTensor& tangent_sinks, double scale, int64_t causal, int64_t window_left,
    int64_t window_right, int64_t precision, const OptionalTensor& mask, const OptionalTensor& bias,
    const OptionalTensor& key_padding_mask, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& philox, double softcap, double dropout_p,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    std::optional<int64_t> /*max_seqlen_q*/, std::optional<int64_t> /*max_seqlen_k*/,
    const OptionalTensor& seqused_k, const OptionalTensor& block_table) {
  const Options options = {scale,     causal,     window_left,      window_right, precision,
                           mask,      bias,       key_padding_mask, alibi_slopes, sinks,
                           philox,    softcap,    dropout_p,        cu_seqlens_q, cu_seqlens_k,
                           seqused_k, block_table};
  refuse_sequences(options);
  const Input q(query, "query"), k(key, "key"), v(value, "value");
  AttentionParams p;
  describe_inputs(p, q, k, v);
  describe_sequences(p, options, k);
  describe_options(p, options);
  const ScalarType dtype = query.scalar_type();
  TangentInputs tangents(dtype);
  describe_tangents(p, tangents, q, k, v, tangent_query, tangent_key, tangent_value, tangent_bias,
                    tangent_sinks, sinks);
  p.out = tangents.view(out, {{p.B, p.Hq, p.Sq, p.Dv}, {}}, "out");
  const Tensor kept_lse = dense_lse(p, lse);
  Tensor tangent_out = empty_like_layout(q.given, p.Sq, p.Dv, dtype);
  Tensor tangent_lse = empty({p.B, p.Hq, p.Sq}, lse_dtype(p));
  p.tangent.out = view_of(tangent_out);
  p.tangent.lse = tangent_lse.data_ptr();
  if (p.B * p.Hq > 0) run(kernel_table().attention_jvp, p);
  return {tangent_out, tangent_lse};
}

// The tangents of what attention_backward returns.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_jvp(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& lse,
    const OptionalTensor& tangent_grad_out, const OptionalTensor& tangent_grad_lse,
    const OptionalTensor& tangent_query, const OptionalTensor& tangent_key,
    const OptionalTensor& tangent_value, const Tensor& tangent_out, const Tensor& tangent_lse,
    const OptionalTensor& tangent_bias, const OptionalTensor& tangent_sinks, double scale,
    int64_t causal, int64_t window_left, int64_t window_right, int64_t precision,
    const OptionalTensor& mask, const OptionalTensor& bias, const OptionalTensor& key_padding_mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const OptionalTensor& philox,
    double softcap, double dropout_p, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, std::optional<int64_t> /*max_seqlen_q*/,
    std::optional<int64_t> /*max_seqlen_k*/, const OptionalTensor& seqused_k,
    const OptionalTensor& block_table, bool bias_grad, bool sinks_grad) {
  const Options options = {scale,     causal,     window_left,      window_right, precision,
                           mask,      bias,       key_padding_mask, alibi_slopes, sinks,
                           philox,    softcap,    dropout_p,        cu_seqlens_q, cu_seqlens_k,
                           seqused_k, block_table};
  refuse_sequences(options);
  STD_TORCH_CHECK(!bias_grad || bias, "bias_grad: expected a bias");
  STD_TORCH_CHECK(!sinks_grad || sinks, "sinks_grad: expected sinks");
  const Input q(query, "query"), k(key, "key"), v(value, "value");
  AttentionParams p;
  describe_inputs(p, q, k, v);
  describe_sequences(p, options, k);
  describe_options(p, options);
  const ScalarType dtype = query.scalar_type();
  TangentInputs tangents(dtype);
  describe_tangents(p, tangents, q, k, v, tangent_query, tangent_key, tangent_value, tangent_bias,
                    tangent_sinks, sinks);
  const Shape like_out = {{p.B, p.Hq, p.Sq, p.Dv}, {}};
  p.out = tangents.view(out, like_out, "out");
  p.grad_out = tangents.view(grad_out, like_out, "grad_out");
  p.tangent.out = tangents.view(tangent_out, like_out, "tangent_out");
  p.tangent.grad_out = tangents.view(tangent_grad_out, like_out, "tangent_grad_out");
  p.lse = tangents.rows(p, lse, "lse");
  p.grad_lse = tangents.rows(p, grad_lse, "grad_lse");
  p.tangent.lse = tangents.rows(p, tangent_lse, "tangent_lse");
  p.tangent.grad_lse = tangents.rows(p, tangent_grad_lse, "tangent_grad_lse");

  Tensor delta = empty({p.B, p.Hq, p.Sq}, lse_dtype(p)),
         tangent_delta = empty({p.B, p.Hq, p.Sq}, lse_dtype(p));
  p.delta = delta.data_ptr();
  p.tangent.delta = tangent_delta.data_ptr();
  Tensor dq = empty_like_layout(q.given, p.Sq, p.D, dtype);
  Tensor dk = empty_like_layout(k.given, p.Sk, p.D, dtype);
  Tensor dv = empty_like_layout(v.given, p.Sk, p.Dv, dtype);
  p.dq = view_of(dq), p.dk = view_of(dk), p.dv = view_of(dv);
  Tensor dbias = empty({0}, dtype), dsinks = empty({0}, lse_dtype(p));
  if (bias_grad) {
    const auto size = bias->sizes();
    dbias = empty(size, bias->scalar_type());
    if (p.B * p.Hq * p.Sq * p.Sk == 0) torch::stable::zero_(dbias);
    p.dbias = score_view(dbias, "dbias", p);
    p.dbias.dtype = p.bias.dtype;
  }
  if (sinks_grad) {
    dsinks = empty(sinks->sizes(), lse_dtype(p));
    if (p.B == 0) torch::stable::zero_(dsinks);
    p.dsinks = dsinks.data_ptr();
  }
  if (p.B * p.Hq == 0) return {dq, dk, dv, dbias, dsinks};
  for (const Phase& phase : kernel_table().attention_backward_jvp) run(phase, p);
  return {dq, dk, dv, dbias, dsinks};
}

// -- dropout --------------------------------------------------------------------------------------

Tensor dropout_keep_mask(const Tensor& philox, double dropout_p, int64_t batch, int64_t heads,
                         int64_t seqlen_q, int64_t seqlen_k) {
  STD_TORCH_CHECK(batch >= 0 && heads >= 0 && seqlen_q >= 0 && seqlen_k >= 0,
                  "batch, heads, seqlen_q, seqlen_k: expected sizes");
  AttentionParams p;
  p.B = batch, p.Hq = heads, p.Sq = seqlen_q, p.Sk = seqlen_k;
  const int64_t samples = count_samples(philox, no_tensor(), batch);
  p.sample_heads = samples > 0 ? batch / samples * heads : 0;
  describe_dropout(p, dropout_p, philox, samples);
  Tensor keep = empty({batch, heads, seqlen_q, seqlen_k}, ScalarType::Bool);
  p.dropout_keep = (uint8_t*)keep.data_ptr();
  run(kernel_table().dropout_keep_mask, p);
  return keep;
}

// -- key/value cache ------------------------------------------------------------------------------

// A cache to write to, or what goes into it.
struct CacheView {
  CacheView(const Tensor& tensor, const char* name, Layout layout)
      : data((char*)tensor.data_ptr()), shape(shape_of(tensor, name, layout)) {}
  char* row(int64_t b, int64_t h, int64_t s, int64_t width) const {
    return data + (b * shape.stride[0] + h * shape.stride[1] + s * shape.stride[2]) * width;
  }
  char* data;
  Shape shape;
};

void copy_row(const CacheView& to, char* to_row, const CacheView& from, const char* from_row,
              int64_t width) {
  const int64_t D = from.shape.size[3];
  if (to.shape.stride[3] == 1 && from.shape.stride[3] == 1) {
    memcpy(to_row, from_row, (size_t)(D * width));
    return;
  }
  for (int64_t d = 0; d < D; ++d) {
    memcpy(to_row + d * to.shape.stride[3] * width, from_row + d * from.shape.stride[3] * width,
           (size_t)width);
  }
}

// Row cache_seqlens[b] + i of sequence b <- row i of key and value.
void kv_cache_append_(const Tensor& key_cache, const Tensor& value_cache, const Tensor& key,
                      const Tensor& value, const Tensor& cache_seqlens,
                      const OptionalTensor& block_table) {
  constexpr int64_t kRowsAtOnce = 256;
  const Layout layout = block_table ? Layout::kPaged : Layout::kDense;
  const DType dtype = dtype_of(key, "key");
  const int64_t width = element_bytes(dtype);
  const CacheView caches[2] = {{key_cache, "key_cache", layout},
                               {value_cache, "value_cache", layout}};
  const CacheView tokens[2] = {{key, "key", Layout::kDense}, {value, "value", Layout::kDense}};
  const Tensor* tensors[4] = {&key_cache, &value_cache, &key, &value};
  for (const Tensor* tensor : tensors) {
    STD_TORCH_CHECK(tensor->scalar_type() == key.scalar_type(),
                    "key_cache, value_cache, key, value: expected one dtype");
  }
  const auto& size = tokens[0].shape.size;
  const int64_t B = size[0], H = size[1], S = size[2];
  int64_t room = caches[0].shape.size[2];
  for (int i = 0; i < 2; ++i) {
    const auto &cache = caches[i].shape, &token = tokens[i].shape;
    const char* name = i == 0 ? "key_cache" : "value_cache";
    STD_TORCH_CHECK(token.size[0] == B && token.size[1] == H && token.size[2] == S,
                    "value: expected the batch, heads and tokens of key");
    STD_TORCH_CHECK(cache.size[1] == H && cache.size[3] == token.size[3] && cache.size[2] == room &&
                        cache.size[0] == (block_table ? caches[0].shape.size[0] : B),
                    name, ": expected the batch, heads and head_dim of the new tokens");
    for (int d = 0; d < 4; ++d) {
      STD_TORCH_CHECK(cache.size[d] <= 1 || cache.stride[d] != 0, name,
                      ": expected elements with memory of their own, got an expanded tensor");
    }
  }
  const Tensor held_lengths = int32_tensor(cache_seqlens, "cache_seqlens", 1, B);
  const int32_t* lengths = int32_data(held_lengths);
  OptionalTensor held_table;
  const int32_t* table = nullptr;
  int64_t pages = 0;
  const int64_t page_size = room;
  if (block_table) {
    held_table = int32_tensor(*block_table, "block_table", 2, B);
    table = int32_data(*held_table);
    pages = held_table->size(1);
    room = page_size * pages;
  }
  for (int64_t b = 0; b < B; ++b) {
    STD_TORCH_CHECK(lengths[b] >= 0 && lengths[b] + S <= room,
                    "cache_seqlens: expected lengths that leave room for ", S, " of ", room,
                    " tokens, got ", lengths[b]);
    for (int64_t n = S == 0 || !block_table ? pages : lengths[b] / page_size;
         n < pages && n * page_size < lengths[b] + S; ++n) {
      const int32_t page = table[b * pages + n];
      STD_TORCH_CHECK(page >= 0 && page < caches[0].shape.size[0],
                      "block_table: expected pages in [0, ", caches[0].shape.size[0], "), got ",
                      page);
    }
  }
  const auto append = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / S / H, h = row / S % H, i = row % S, n = lengths[b] + i;
      const int64_t at_b = table != nullptr ? table[b * pages + n / page_size] : b;
      const int64_t at_n = table != nullptr ? n % page_size : n;
      for (int x = 0; x < 2; ++x) {
        copy_row(caches[x], caches[x].row(at_b, h, at_n, width), tokens[x],
                 tokens[x].row(b, h, i, width), width);
      }
    }
  };
  if (B * H * S <= kRowsAtOnce || forked_from_threads) return append(0, B * H * S);
  torch::stable::parallel_for(0, B * H * S, kRowsAtOnce, append);
}

// -- masked softmax -------------------------------------------------------------------------------

// The first write to each page of new memory costs more than computing what is in it: most of it is
// the trap, so the kernel is asked for many pages at once. No matter if it cannot (before
// Linux 5.14).
void map_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which old headers lack
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = ((uintptr_t)memory + kPage - 1) / kPage * kPage;
  const uintptr_t end = (uintptr_t)memory + (uintptr_t)bytes;
  if (begin < end) madvise((void*)begin, end - begin, kPopulateWrite);
#endif
}

using SoftmaxCall = SoftmaxParams;
constexpr int64_t kBiasTasks = 64;
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor&) {}
};

// Small ones lie in memory that malloc has had before.
void expect_output(SoftmaxParams& p, const Tensor& out) {
  constexpr int64_t kNewMemory = 1 << 20;  // elements
  if (out.numel() >= kNewMemory) p.map_pages = map_pages;
}
void run_softmax(const SoftmaxParams& p) { run(kernel_table().masked_softmax_forward, p, true); }
void run_softmax_backward(const SoftmaxParams& p) {
  const KernelTable& kernels = kernel_table();
  run(kernels.masked_softmax_backward, p, true);
  if (p.chunks > 1) run(kernels.masked_softmax_backward_bias, p);
  if (p.dsinks != nullptr) run(kernels.masked_softmax_backward_sinks, p);
}

}  // namespace
}  // namespace fused_attention

#include "softmax_operators.h"

STABLE_TORCH_LIBRARY(fused_attention, m) {
  using namespace fused_attention;
  m.def(kAttentionForwardPlain);
  m.def(kAttentionForwardPlainLse);
  m.def(kAttentionForward);
  m.def(kAttentionBackward);
  m.def(kAttentionJvp);
  m.def(kAttentionBackwardJvp);
  m.def(kAttentionWeights);
  m.def(kDropoutKeepMask);
  m.def(kKvCacheAppend);
  m.def(kMaskedSoftmaxForward);
  m.def(kMaskedSoftmax);
  m.def(kMaskedSoftmaxBackward);
}

STABLE_TORCH_LIBRARY_IMPL(fused_attention, CPU, m) {
  m.impl("attention_forward_plain", TORCH_BOX(&fused_attention::attention_forward_plain));
  m.impl("attention_forward_plain_lse", TORCH_BOX(&fused_attention::attention_forward_plain_lse));
  m.impl("attention_forward", TORCH_BOX(&fused_attention::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&fused_attention::attention_backward));
  m.impl("attention_jvp", TORCH_BOX(&fused_attention::attention_jvp));
  m.impl("attention_backward_jvp", TORCH_BOX(&fused_attention::attention_backward_jvp));
  m.impl("attention_weights", TORCH_BOX(&fused_attention::attention_weights));
  m.impl("dropout_keep_mask", TORCH_BOX(&fused_attention::dropout_keep_mask));
  m.impl("kv_cache_append_", TORCH_BOX(&fused_attention::kv_cache_append_));
  m.impl("masked_softmax_forward", TORCH_BOX(&fused_attention::masked_softmax_forward));
  m.impl("masked_softmax_", TORCH_BOX(&fused_attention::masked_softmax_));
  m.impl("masked_softmax_backward", TORCH_BOX(&fused_attention::masked_softmax_backward));
}
