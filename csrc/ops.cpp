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

bool is_here(const Tensor& tensor) { return tensor.is_cpu() || is_dry(); }

AOTITorchError empty_strided(Sizes sizes, const int64_t* strides, ScalarType dtype,
                             AtenTensorHandle* handle) {
  return aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), strides, (int32_t)dtype,
                                  aoti_torch_device_type_cpu(), 0, handle);
}

// The integers of a tensor of one or two dimensions, copied: each is read once, and what was
// checked is what is used, even if somebody writes to the tensor during the call.
template <typename Int>
class Integers {
 public:
  explicit Integers(const Tensor& tensor);
  const Int* data() const { return values_.get(); }

 private:
  std::unique_ptr<Int[]> values_;
};

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

template <typename Int>
Integers<Int>::Integers(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const size_t dims = sizes.size();
  const int64_t rows = dims == 2 ? sizes[0] : 1, row_stride = dims == 2 ? strides[0] : 0;
  const int64_t columns = sizes[dims - 1], column_stride = strides[dims - 1];
  const int64_t count = count_elements(sizes);
  if (count < std::numeric_limits<int64_t>::max() / 16) {
    values_.reset(new (std::nothrow) Int[(size_t)count]);
  }
  if (values_ == nullptr) {
    refuse_for_memory("a copy of lengths, pages or random states",
                      (double)count * (double)sizeof(Int), "");
  }
  const Int* given = (const Int*)tensor.const_data_ptr();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      values_[(size_t)(r * columns + c)] =
          __atomic_load_n(given + r * row_stride + c * column_stride, __ATOMIC_RELAXED);
    }
  }
}

// -- running phases -------------------------------------------------------------------------------

// Scratch memory of a thread, kept between calls while it is small.
class Workspace {
 public:
  // Returns null if there is no memory.
  void* at_least(size_t bytes) {
    if (bytes > size_) {
      release();
      data_ = aligned_alloc(64, (bytes + 63) / 64 * 64);
      size_ = data_ == nullptr ? 0 : bytes;
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

// The tasks of share `first`, then what others left of theirs. Returns false, without having drawn
// a task, if there is no memory for the workspace: other threads may have theirs.
template <typename Params>
bool run_tasks(const PhaseOf<Params>& phase, const Params& params, Share* shares, int64_t count,
               int64_t first) {
  static thread_local Workspace workspace;
  const size_t bytes = phase.workspace_bytes(params);
  void* memory = workspace.at_least(bytes);
  if (memory == nullptr && bytes > 0) return false;
  for (int64_t i = 0; i < count; ++i) {
    Share& share = shares[(first + i) % count];
    for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
      phase.run(params, task, task + 1, memory);
    }
  }
  workspace.trim();
  return true;
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
  if (tasks == 0) return;
  const int64_t most = forked_from_threads ? 1 : (int64_t)torch::stable::get_num_threads();
  const int64_t threads = most < tasks ? most : tasks;
  note("{\"tasks\": %lld, \"workspace\": %lld, \"threads\": %lld}", (long long)tasks,
       (long long)phase.workspace_bytes(params), (long long)threads);
  if (is_dry()) return;
  Share shares[kMaxShares];
  shares[0].end = tasks;
  const auto refuse = [&] {
    refuse_for_memory("the workspace of a thread", (double)phase.workspace_bytes(params),
                      "fewer keys, or a bias whose gradient is not asked for, need less");
  };
  if (tasks == 1 || most == 1) {
    if (!run_tasks(phase, params, shares, 1, 0)) refuse();
    return;
  }
  const int64_t count = !own_shares ? 1 : threads < kMaxShares ? threads : kMaxShares;
  for (int64_t i = 0; i < count; ++i) {
    shares[i].next = tasks * i / count;
    shares[i].end = tasks * (i + 1) / count;
  }
  std::atomic<bool> served = false;  // by one thread at least, which then ran every task
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    if (run_tasks(phase, params, shares, count, thread % count)) served = true;
  });
  if (!served) refuse();
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

bool has_sequences(const AttentionParams& p) {
  return p.cu_seqlens_q != nullptr || p.cu_seqlens_k != nullptr || p.seqused_k != nullptr ||
         p.block_table != nullptr;
}

// Whatever the tensors of `describe_places` hold, nothing is read out of bounds from here on.
void check_places(const AttentionParams& p, int64_t Tq, int64_t num_pages) {
  if (!has_sequences(p)) return;
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
void describe_sequences(AttentionParams& p, const Options& o, const Shape& key, Held& held) {
  const int64_t Tq = p.Sq, num_pages = key.size[0];
  describe_places(p, o, num_pages, held);
  check_places(p, Tq, num_pages);
}

// Sq and Sk <- those of the longest sequence.
void shorten_to_longest(AttentionParams& p) {
  if (!has_sequences(p)) return;
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
  STD_TORCH_CHECK(is_here(tensor) && sizes.size() == rows + 2 && sizes[0] == p.B &&
                      (average || sizes[1] == p.Hq) && sizes[rows] == p.Sq &&
                      sizes[rows + 1] == p.Sk && dtype_of(tensor, name) == p.dtype,
                  name,
                  ": expected [B, Sq, Sk] if averaged, else [B, Hq, Sq, Sk], in query's dtype");
  p.average_weights = average;
  p.weights = {address_of(tensor),       p.dtype,       strides[0],
               average ? 0 : strides[1], strides[rows], strides[rows + 1]};
}

// Memory that the phases of one call share, 64-byte aligned.
struct Shared {
  explicit Shared(size_t bytes)
      : tensor(empty({"the workspace that the phases of a kernel share", "split the batch"},
                     {(int64_t)bytes + 63}, ScalarType::Byte)) {}
  void* data() const { return (void*)(((uintptr_t)address_of(tensor) + 63) / 64 * 64); }
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

void note_kernel(const char* kernel, const char* reason, TileConfig tiles) {
  note(
      "{\"isa\": \"%s\", \"kernel\": \"%s\", \"reason\": \"%s\", \"block_m\": %lld, \"block_n\": "
      "%lld}",
      kernel_table().isa, kernel, reason, (long long)tiles.block_m, (long long)tiles.block_n);
}

void run_forward(AttentionParams& p) {
  const std::optional<Shared> mask_blocks = note_mask_blocks(p);
  const ForwardKernel& kernel = choose_forward(kernel_table(), p);
  note_kernel(kernel.name, kernel.reason, kernel.tiles(p));
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
Tensor empty_gradient(const char* what, const Tensor& tensor, const Input& input, Layout layout) {
  const Shape& shape = input.given;
  const Buffer buffer = {what, "split the batch; an expanded input has a gradient of full size",
                         Owner::kResult};
  if (layout != Layout::kDense) return empty(buffer, tensor.sizes(), tensor.scalar_type());
  return empty_like_layout(buffer, shape, shape.size[2], shape.size[3], tensor.scalar_type());
}
bool is_empty(const Tensor& tensor) { return count_elements(tensor.sizes()) == 0; }

constexpr Buffer kOut = {"the output [B, Hq, Sq, Dv]", "split the batch", Owner::kResult};
constexpr Buffer kLse = {"the log-sum-exp [B, Hq, Sq]",
                         "a call without gradients and without return_lse keeps none",
                         Owner::kKept};
constexpr Buffer kDelta = {"delta [B, Hq, Sq] of the backward", "split the batch"};
constexpr Buffer kDbias = {"the gradient of the bias",
                           "a bias of size 1 where it is broadcast has a smaller one than an "
                           "expanded bias; a mask has none",
                           Owner::kResult};
constexpr Buffer kDsinks = {"the gradient of the sinks [Hq]", "", Owner::kResult};

// `dtype` is that of a result which is not asked for.
Tensor gradient_if(bool wanted, Buffer buffer, const OptionalTensor& tensor, ScalarType dtype) {
  return wanted ? empty(buffer, tensor->sizes(), tensor->scalar_type()) : no_result(dtype);
}
Gradients zeros(Tensor& dq, Tensor& dk, Tensor& dv, Tensor& dbias, Tensor& dsinks) {
  for (Tensor* gradient : {&dq, &dk, &dv, &dbias, &dsinks}) torch::stable::zero_(*gradient);
  return {dq, dk, dv, dbias, dsinks};
}

// Tokens behind the last packed sequence: out 0, lse -inf.
template <typename T>
void clear_rest(const AttentionParams& p, int64_t Tq, T* lse) {
  if (is_dry()) return;
  const int64_t first = p.cu_seqlens_q[p.B], row_bytes = p.out.stride_s * element_bytes(p.dtype);
  memset((char*)p.out.data + first * row_bytes, 0, (size_t)((Tq - first) * row_bytes));
  for (int64_t h = 0; lse != nullptr && h < p.Hq; ++h) {
    std::fill(lse + h * Tq + first, lse + (h + 1) * Tq, -std::numeric_limits<T>::infinity());
  }
}

Tensor forward(const Tensor& query, const Tensor& key, const Tensor& value, const Options& options,
               Tensor* lse) {
  note_operator("attention_forward");
  const Layout layout = layout_of_queries(options), kv_layout = layout_of_keys(options);
  const Input q(query, "query", layout), k(key, "key", kv_layout), v(value, "value", kv_layout);
  AttentionParams p;
  Held held;
  describe_inputs(p, q, k, v);
  const int64_t Tq = p.Sq;
  describe_sequences(p, options, k.shape, held);
  describe_options(p, options, held);
  const bool packed = layout == Layout::kPacked;
  Tensor out = packed ? empty(kOut, {Tq, p.Hq, p.Dv}, query.scalar_type())
                      : empty_like_layout(kOut, q.given, p.Sq, p.Dv, query.scalar_type());
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

Gradients backward(const BackwardCall& call) {
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
  describe_sequences(p, options, k.shape, held);
  describe_options(p, options, held);
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
  Tensor whole_dk = dk, whole_dv = dv;  // of each sequence
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
  const std::optional<Shared> mask_blocks = note_mask_blocks(p);
  const KernelTable& kernels = kernel_table();
  std::optional<Shared> shared;
  if (const size_t bytes = kernels.attention_backward_shared_bytes(p)) {
    p.shared = shared.emplace(bytes).data();
  }
  const bool one_pass = kernels.attention_backward_heads.num_tasks(p) > 0;
  note_kernel(
      "attention_backward",
      one_pass ? "one pass over queries and keys" : "a pass over keys, then one over queries", {});
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
Tensor weights(const Tensor& query, const Tensor& key, const Tensor& lse, bool average,
               const Options& options) {
  note_operator("attention_weights");
  STD_TORCH_CHECK(
      !options.cu_seqlens_q && !options.cu_seqlens_k && !options.seqused_k && !options.block_table,
      "cu_seqlens, seqused_k and block_table: expected none");
  const Input q(query, "query"), k(key, "key");
  AttentionParams p;
  describe_query_and_key(p, q, k);
  Held held;
  describe_sequences(p, options, k.shape, held);
  describe_options(p, options, held);
  check_lse(p, lse, "lse");
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
    const std::optional<Shared> mask_blocks = note_mask_blocks(p);
    note_kernel("attention_weights", "tile by tile, from the log-sum-exp", {});
    run(kernel_table().attention_weights, p);
  }
  return result;
}

void attention_weights(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor query = stack.tensor(), key = stack.tensor(), lse = stack.tensor();
  const bool average = stack.flag();
  Options options = stack.options();
  options.sinks.reset();  // lse has them
  options.precision = 0;  // "highest"
  stack.give(weights(query, key, lse, average, options));
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

// (tangent_out, tangent_lse)
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
  describe_sequences(p, options, k.shape, held);
  describe_options(p, options, held);
  const ScalarType dtype = query.scalar_type();
  TangentInputs tangents(dtype);
  describe_tangents(p, tangents, q, k, v, direction, options.sinks);
  p.out = tangents.view(out, {{p.B, p.Hq, p.Sq, p.Dv}, {}}, "out");
  check_lse(p, lse, "lse");
  Tensor tangent_out =
      empty_like_layout({"the tangent of the output [B, Hq, Sq, Dv]"}, q.given, p.Sq, p.Dv, dtype);
  Tensor tangent_lse =
      empty({"the tangent of the log-sum-exp [B, Hq, Sq]"}, {p.B, p.Hq, p.Sq}, lse_dtype(p));
  if (!is_empty(tangent_lse)) {  // there are queries
    const Tensor kept_lse = dense_lse(p, lse);
    p.tangent.out = view_of(tangent_out);
    p.tangent.lse = address_of(tangent_lse);
    run(kernel_table().attention_jvp, p);
  }
  stack.give(tangent_out, tangent_lse);
}

// The tangents of what attention_backward returns. `rest`: what follows the arguments of a
// backward up to lse.
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
  describe_sequences(p, options, k.shape, held);
  describe_options(p, options, held);
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
  for (const Phase& phase : kernel_table().attention_backward_jvp) run(phase, p);
  return {dq, dk, dv, dbias, dsinks};
}

void attention_backward_jvp(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor grad_out = stack.tensor();
  const OptionalTensor grad_lse = stack.optional_tensor();
  const Tensor query = stack.tensor(), key = stack.tensor(), value = stack.tensor();
  const Tensor out = stack.tensor(), lse = stack.tensor();
  const Gradients d = backward_jvp(grad_out, grad_lse, query, key, value, out, lse, stack);
  stack.give(d.query, d.key, d.value, d.bias, d.sinks);
}

// -- dropout --------------------------------------------------------------------------------------

Tensor dropout_keep_mask(const Tensor& philox, double dropout_p, int64_t batch, int64_t heads,
                         int64_t seqlen_q, int64_t seqlen_k) {
  STD_TORCH_CHECK(batch >= 0 && heads >= 0 && seqlen_q >= 0 && seqlen_k >= 0,
                  "batch, heads, seqlen_q, seqlen_k: expected sizes");
  AttentionParams p;
  Held held;
  p.B = batch, p.Hq = heads, p.Sq = seqlen_q, p.Sk = seqlen_k;
  const int64_t samples = count_samples(philox, no_tensor(), batch);
  p.sample_heads = samples > 0 ? saturating_product(batch / samples, heads) : 0;
  describe_dropout(p, dropout_p, philox, samples, held);
  Tensor keep = empty(
      {"a dropout mask [batch, heads, seqlen_q, seqlen_k]", "attention(dropout_p=) needs none"},
      {batch, heads, seqlen_q, seqlen_k}, ScalarType::Bool);
  if (is_empty(keep)) return keep;
  p.dropout_keep = (uint8_t*)address_of(keep);
  run(kernel_table().dropout_keep_mask, p);
  return keep;
}

// Refuses the lengths and pages that attention_forward would refuse. A call with dropout asks
// first, because a refused call must not draw random numbers.
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

// The rows of pages that new tokens are written to: those of one sequence, at most one a page.
struct PageRows {
  int32_t page;
  int64_t begin, end, b;
};
// Refuses two new tokens that would go to one row.
void check_pages_apart(std::vector<PageRows>& written) {
  std::sort(written.begin(), written.end(), [](const PageRows& x, const PageRows& y) {
    return std::tie(x.page, x.begin, x.b) < std::tie(y.page, y.begin, y.b);
  });
  for (size_t i = 1; i < written.size(); ++i) {
    const PageRows &before = written[i - 1], &after = written[i];
    STD_TORCH_CHECK(before.page != after.page || before.end <= after.begin,
                    "block_table: expected a place of its own for each new token, got page ",
                    after.page, " for those of sequences ", before.b, " and ", after.b);
  }
}

// Row cache_seqlens[b] + i of sequence b <- row i of key and value, as they were before the call.
void kv_cache_append_(const Tensor& key_cache, const Tensor& value_cache, const Tensor& key,
                      const Tensor& value, const Tensor& cache_seqlens,
                      const OptionalTensor& block_table) {
  constexpr int64_t kRowsAtOnce = 256;
  const Layout layout = block_table ? Layout::kPaged : Layout::kDense;
  const DType dtype = dtype_of(key, "key");
  const int64_t width = element_bytes(dtype);
  for (const Tensor* tensor : {&key_cache, &value_cache, &key, &value}) {
    STD_TORCH_CHECK(tensor->scalar_type() == key.scalar_type(),
                    "key_cache, value_cache, key, value: expected one dtype");
  }
  const Footprint footprints[2] = {footprint_of(key_cache), footprint_of(value_cache)};
  STD_TORCH_CHECK(!footprints[0].overlaps(footprints[1]),
                  "value_cache: expected memory apart from key_cache's");
  // New tokens that lie in a cache are read before it is written to.
  const auto apart = [&](const Tensor& tensor) {
    const Footprint own = footprint_of(tensor);
    if (!own.overlaps(footprints[0]) && !own.overlaps(footprints[1])) return tensor;
    Tensor copy =
        empty({"a copy of new tokens that lie in a cache"}, tensor.sizes(), key.scalar_type());
    torch::stable::copy_(copy, tensor);
    return copy;
  };
  const Tensor own_key = apart(key), own_value = apart(value);
  const CacheView caches[2] = {{key_cache, "key_cache", layout},
                               {value_cache, "value_cache", layout}};
  const CacheView tokens[2] = {{own_key, "key", Layout::kDense},
                               {own_value, "value", Layout::kDense}};
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
    STD_TORCH_CHECK(!footprints[i].overlaps_itself(), name,
                    ": expected memory of its own for each element, got overlapping strides");
  }
  const Integers<int32_t> held_lengths(checked_int32(cache_seqlens, "cache_seqlens", 1, B));
  const int32_t* lengths = held_lengths.data();
  std::optional<Integers<int32_t>> held_table;
  const int32_t* table = nullptr;
  int64_t pages = 0;
  const int64_t page_size = room;
  if (block_table) {
    table = held_table.emplace(checked_int32(*block_table, "block_table", 2, B)).data();
    pages = block_table->size(1);
    room = page_size * pages;
  }
  std::vector<PageRows> written;
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
      const int64_t first = n * page_size;
      written.push_back({page, std::max<int64_t>(lengths[b] - first, 0),
                         std::min<int64_t>(lengths[b] + S - first, page_size), b});
    }
  }
  check_pages_apart(written);
  if (is_empty(key) && is_empty(value)) return;
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

// Outputs that are small lie in memory that malloc has had before.
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

namespace fused_attention {
namespace {

constexpr Operator kOperators[] = {
    {"attention_forward_plain", kAttentionForwardPlain, attention_forward_plain},
    {"attention_forward_plain_lse", kAttentionForwardPlainLse, attention_forward_plain_lse},
    {"attention_forward", kAttentionForward, attention_forward},
    {"attention_backward", kAttentionBackward, attention_backward},
    {"attention_jvp", kAttentionJvp, attention_jvp},
    {"attention_backward_jvp", kAttentionBackwardJvp, attention_backward_jvp},
    {"attention_weights", kAttentionWeights, attention_weights},
    {"dropout_keep_mask", kDropoutKeepMask, TORCH_BOX(&dropout_keep_mask)},
    {"check_sequences", kCheckSequences, check_sequences},
    {"kv_cache_append_", kKvCacheAppend, TORCH_BOX(&kv_cache_append_)},
    {"masked_softmax_forward", kMaskedSoftmaxForward, TORCH_BOX(&masked_softmax_forward)},
    {"masked_softmax_", kMaskedSoftmax, TORCH_BOX(&masked_softmax_)},
    {"masked_softmax_backward", kMaskedSoftmaxBackward, TORCH_BOX(&masked_softmax_backward)},
};

constexpr Operator kPlanned[] = {
    {"attention_forward_plain", kAttentionForwardPlain, planned<attention_forward_plain>},
    {"attention_forward", kAttentionForward, planned<attention_forward>},
    {"attention_backward", kAttentionBackward, planned<attention_backward>},
    {"attention_weights", kAttentionWeights, planned<attention_weights>},
};

}  // namespace
}  // namespace fused_attention

STABLE_TORCH_LIBRARY(fused_attention, m) {
  fused_attention::define(m, fused_attention::kOperators);
}
STABLE_TORCH_LIBRARY_IMPL(fused_attention, CPU, m) {
  fused_attention::implement(m, fused_attention::kOperators);
}
STABLE_TORCH_LIBRARY(fused_attention_plan, m) {
  fused_attention::define(m, fused_attention::kPlanned);
  m.def(fused_attention::kNotes);
}
STABLE_TORCH_LIBRARY_IMPL(fused_attention_plan, CompositeExplicitAutograd, m) {
  fused_attention::implement(m, fused_attention::kPlanned);
  m.impl("notes", fused_attention::take_notes);
}
