// The operators torch.ops.fused_attention_cuda.*, on the LibTorch stable ABI: checks, allocation,
// and the launches that launch.h plans. This file includes nothing of CUDA, so it compiles and
// loads anywhere.

#include <dlfcn.h>
#include <string.h>
#include <torch/csrc/stable/accelerator.h>

#include "../attention_operators.h"
#include "../softmax_operators.h"
#include "registry.h"

namespace fused_attention {

// Replaces the start of a kernel where there is no GPU: tests run kernels in an interpreter, on CPU
// tensors. Returns an error's text, or null.
using Substitute = const char* (*)(const char* kernel, int64_t blocks, int threads,
                                   int shared_bytes, const void* params);

namespace {

Substitute substitute = nullptr;
int substitute_capability = 80;

// The device of the current call.
thread_local int32_t device_type = 0, device_index = 0;

}  // namespace

// -- the device (device.h) ------------------------------------------------------------------------

const char* const kDevice = "CUDA";

bool is_here(const Tensor& tensor) {
  if (is_dry()) return true;
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type == device_type && tensor.get_device_index() == device_index;
}

AOTITorchError empty_strided(Sizes sizes, const int64_t* strides, ScalarType dtype,
                             AtenTensorHandle* handle) {
  return aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), strides, (int32_t)dtype,
                                  device_type, device_index, handle);
}

// Returns the integers of a tensor, contiguous, on the device. Kernels clamp the lengths and page
// numbers that they read.
std::shared_ptr<const void> integers_of(const Tensor& tensor) {
  const auto dense =
      std::make_shared<Tensor>(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
  return {dense, dense->const_data_ptr()};
}

using torch::stable::accelerator::DeviceGuard;

OnDeviceOf::OnDeviceOf(const Tensor& tensor) {
  if (is_dry()) return;
  STD_TORCH_CHECK(tensor.is_cuda() || substitute != nullptr, "query: expected a CUDA tensor");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
  device_index = tensor.get_device_index();
  if (tensor.is_cuda()) guard = new DeviceGuard(device_index);
}
OnDeviceOf::~OnDeviceOf() { delete (DeviceGuard*)guard; }

int64_t bias_tasks() { return cuda::kBiasTasks; }

namespace {

using cuda::KernelParams;
using cuda::Launch;

// Returns PyTorch's current stream, a cudaStream_t. The function is looked up in libtorch_cuda,
// which is loaded wherever there is a CUDA tensor, and is not linked: this library loads without
// it.
void* current_stream() {
  using Get = AOTITorchError (*)(int32_t device_index, void** stream);
  static const Get get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda == nullptr ? nullptr
                                 : (Get)dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
  }();
  STD_TORCH_CHECK(get != nullptr, "libtorch_cuda.so: no aoti_torch_get_current_cuda_stream there");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device_index, &stream));
  return stream;
}

void start(const Launch& launch, const void* params) {
  if (launch.blocks == 0) return;
  STD_TORCH_CHECK(launch.blocks < (int64_t)1 << 31, launch.kernel, ": expected fewer than 2^31 ",
                  "blocks, got ", launch.blocks, "; split the batch");
  note("{\"kernel\": \"%s\", \"blocks\": %lld, \"threads\": %d, \"shared_bytes\": %d}",
       launch.kernel, (long long)launch.blocks, launch.threads, launch.shared_bytes);
  if (is_dry()) return;
  const char* error;
  if (substitute != nullptr) {
    error = substitute(launch.kernel, launch.blocks, launch.threads, launch.shared_bytes, params);
  } else {
    const cuda::Kernel* kernel = cuda::find_kernel(launch.kernel);
    STD_TORCH_CHECK(kernel != nullptr, launch.kernel, ": not compiled into this library");
    error = kernel->start(launch, params, current_stream());
  }
  STD_TORCH_CHECK(error == nullptr, launch.kernel, ": ", error);
}

// Returns whether all rows of a tensor start at a multiple of 16 bytes.
bool is_aligned(const Input& x, DType dtype) {
  bool aligned = (uintptr_t)address_of(x.dense) % 16 == 0;
  for (int i = 0; i < 3; ++i) {
    aligned &= x.shape.size[i] <= 1 || x.shape.stride[i] * element_bytes(dtype) % 16 == 0;
  }
  return aligned;
}

void check_sizes(const KernelParams& p) {
  STD_TORCH_CHECK(p.dtype != DType::kFloat64, "query: expected float32, bfloat16 or float16");
  STD_TORCH_CHECK(p.D <= cuda::kMaxHeadDim && p.Dv <= cuda::kMaxHeadDim,
                  "query, value: expected a head_dim of at most ", cuda::kMaxHeadDim, ", got ", p.D,
                  " and ", p.Dv);
  STD_TORCH_CHECK(p.Sq + p.Sk + std::abs(p.diagonal_start) < (int64_t)1 << 30,
                  "query, key: expected fewer than 2^30 tokens");
}

// Returns an empty tensor of last size `last` in the memory format of `like`; packed tokens and
// pages are contiguous.
Tensor empty_like_input(Buffer buffer, const Tensor& tensor, const Input& like, Layout layout,
                        int64_t last) {
  if (layout == Layout::kDense) {
    return empty_like_format(buffer, like.given, like.given.size[2], last, tensor.scalar_type());
  }
  int64_t sizes[4];
  for (int i = 0; i < (int)tensor.dim(); ++i) sizes[i] = tensor.size(i);
  sizes[tensor.dim() - 1] = last;
  return empty(buffer, {sizes, (size_t)tensor.dim()}, tensor.scalar_type());
}

// Returns empty floats [B, Hq, Sq], packed [Hq, Tq].
Tensor empty_rows(const KernelParams& p, int64_t Tq) {
  const Buffer buffer = {"a number for each query [B, Hq, Sq]", "split the batch"};
  return p.cu_seqlens_q != nullptr ? empty(buffer, {p.Hq, Tq}, ScalarType::Float)
                                   : empty(buffer, {p.B, p.Hq, Tq}, ScalarType::Float);
}

void describe(KernelParams& p, const Input& query, const Input& key, const Input& value,
              const Options& options, Held& held) {
  describe_inputs(p, query, key, value);
  describe_places(p, options, key.shape.size[0], held);
  p.page_count = key.shape.size[0];
  if (p.page_count == 0 && p.block_table != nullptr) p.Sk = 0;
  describe_options(p, options, held);
  p.philox = (const int64_t*)held.philox.get();
  check_sizes(p);
  STD_TORCH_CHECK(p.sample_heads == 0,
                  "philox, sinks: only CPU tensors may have rows for several samples");
}

int device_capability() {
  if (substitute != nullptr) return substitute_capability;
  return cuda::compute_capability != nullptr ? cuda::compute_capability() : 80;
}

void start_decode(KernelParams& p) {
  const int64_t rows = cuda::rows_of(p);
  Tensor parts = empty({"the partial results of splits of the keys", "split the batch"},
                       {p.splits * rows * (p.Dv + 2)}, ScalarType::Float);
  p.partial_out = (float*)address_of(parts);
  p.partial_max = p.partial_out + p.splits * rows * p.Dv;
  p.partial_sum = p.partial_max + p.splits * rows;
  const cuda::DecodeLaunches launches = cuda::decode_launches(p);
  start(launches.splits, &p);
  start(launches.combine, &p);
}

}  // namespace

Tensor forward(const Tensor& query, const Tensor& key, const Tensor& value, const Options& options,
               Tensor* lse) {
  note_operator("attention_forward");
  const OnDeviceOf device(query);
  const Layout layout = layout_of_queries(options), kv_layout = layout_of_keys(options);
  const Input q(query, "query", layout), k(key, "key", kv_layout), v(value, "value", kv_layout);
  KernelParams p;
  Held held;
  describe(p, q, k, v, options, held);
  Tensor out = empty_like_input({"the output [B, Hq, Sq, Dv]", "split the batch", Owner::kResult},
                                query, q, layout, p.Dv);
  p.out = view_of(out, layout);
  if (lse != nullptr) {
    *lse = empty_rows(p, p.Sq);
    p.lse = address_of(*lse);
  }
  p.aligned = is_aligned(q, p.dtype) && is_aligned(k, p.dtype) && is_aligned(v, p.dtype);
  p.splits = cuda::decode_splits(p, options.max_seqlen_q.value_or(p.Sq),
                                 options.max_seqlen_k.value_or(p.Sk));
  if (p.splits > 0) {
    start_decode(p);
  } else if (cuda::serves_hopper(p, device_capability())) {
    start(cuda::forward_hopper_launch(p), &p);
  } else {
    start(cuda::forward_launch(p), &p);
  }
  return out;
}

Gradients backward(const BackwardArguments& call) {
  note_operator("attention_backward");
  const Tensor &query = call.query, &key = call.key, &value = call.value;
  const Options& options = call.options;
  const OnDeviceOf device(query);
  STD_TORCH_CHECK(!call.grad_weights,
                  "grad_weights: only the CPU kernels return attention weights");
  const Layout layout = layout_of_queries(options), kv_layout = layout_of_keys(options);
  const Input q(query, "query", layout), k(key, "key", kv_layout), v(value, "value", kv_layout);
  const Input o(call.out, "out", layout), grad_o(call.grad_out, "grad_out", layout);
  KernelParams p;
  Held held;
  describe(p, q, k, v, options, held);
  describe_gradients(p, q, o, grad_o, call.grad_lse);
  const Tensor kept_lse = dense_lse(p, call.lse);
  Tensor delta = empty_rows(p, p.Sq), row_lse = empty_rows(p, p.Sq);
  p.delta = address_of(delta);
  p.row_lse = (float*)address_of(row_lse);

  const ScalarType dtype = query.scalar_type();
  const char* hint = "split the batch; an expanded input has a gradient of full size";
  Tensor dq =
      empty_like_input({"the gradient of query", hint, Owner::kResult}, query, q, layout, p.D);
  Tensor dk =
      empty_like_input({"the gradient of key", hint, Owner::kResult}, key, k, kv_layout, p.D);
  Tensor dv =
      empty_like_input({"the gradient of value", hint, Owner::kResult}, value, v, kv_layout, p.Dv);
  if (options.cu_seqlens_k || options.seqused_k) {  // for keys that are not in use
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
  }
  p.dq = view_of(dq, layout), p.dk = view_of(dk, kv_layout), p.dv = view_of(dv, kv_layout);
  Tensor whole_dk, whole_dv;  // for pages: the gradients of each sequence
  if (options.block_table) {
    p.page_dk = p.dk, p.page_dv = p.dv;
    const Buffer buffer = {"the gradients of the sequences' keys and values [B, Hkv, Sk, D]",
                           "a block_table of fewer pages, or packed keys, need less"};
    whole_dk = empty(buffer, {p.B, p.Hkv, p.Sk, p.D}, dtype);
    whole_dv = empty(buffer, {p.B, p.Hkv, p.Sk, p.Dv}, dtype);
    p.dk = view_of(whole_dk), p.dv = view_of(whole_dv);
  }
  Tensor dbias = no_result(dtype), dsinks = no_result(ScalarType::Float);
  if (call.bias_grad) {
    dbias =
        empty({"the gradient of the bias",
               "a bias of size 1 where it is broadcast has a smaller gradient than an expanded one",
               Owner::kResult},
              options.bias->sizes(), options.bias->scalar_type());
    p.dbias = score_view(dbias, "dbias", p);
    p.dbias.dtype = p.bias.dtype;
    if (p.B * p.Hq * p.Sq * p.Sk == 0) {
      torch::stable::zero_(dbias);
      p.dbias.data = nullptr;
    }
  }
  if (call.sinks_grad) {
    dsinks =
        empty({"the gradient of the sinks [Hq]", "", Owner::kResult}, {p.Hq}, ScalarType::Float);
    p.dsinks = address_of(dsinks);
  }
  p.aligned = is_aligned(q, p.dtype) && is_aligned(k, p.dtype) && is_aligned(v, p.dtype) &&
              is_aligned(grad_o, p.dtype);
  p.lse_in_log2 = cuda::takes_fast_path(p);
  const cuda::BackwardLaunches launches = cuda::backward_launches(p, device_capability());
  for (int i = 0; i < launches.count; ++i) start(launches.items[i], &p);
  return {dq, dk, dv, dbias, dsinks};
}

// -- masked softmax -------------------------------------------------------------------------------

namespace {
void check_softmax(const SoftmaxParams& p) {
  STD_TORCH_CHECK(p.dtype != DType::kFloat64, "input: expected float32, bfloat16 or float16");
  STD_TORCH_CHECK(p.sample_heads == 0,
                  "philox, sinks: only CPU tensors may have rows for several samples");
  STD_TORCH_CHECK(p.columns < (int64_t)1 << 34, "input: expected rows of fewer than 2^34 columns");
}
cuda::SoftmaxKernelParams call_of(const SoftmaxParams& p, const Held& held) {
  check_softmax(p);
  cuda::SoftmaxKernelParams call = {p};
  call.philox = (const int64_t*)held.philox.get();
  return call;
}
}  // namespace

void expect_output(SoftmaxParams&, const Tensor&) {}
void run_softmax(SoftmaxParams& p, const Held& held) {
  const cuda::SoftmaxKernelParams call = call_of(p, held);
  start(cuda::softmax_launch(call), &call);
}
void run_softmax_backward(SoftmaxParams& p, const Held& held) {
  cuda::SoftmaxKernelParams call = call_of(p, held);
  std::optional<Tensor> delta;
  if (p.dbias != nullptr) {
    delta = empty({"a number for each row, for the mask's gradient"}, {cuda::softmax_rows(call)},
                  ScalarType::Float);
    call.delta = (float*)address_of(*delta);
  }
  const cuda::SoftmaxBackwardLaunches launches = cuda::softmax_backward_launches(call);
  for (int i = 0; i < launches.count; ++i) start(launches.items[i], &call);
}

namespace cuda {

int (*compute_capability)() = nullptr;

namespace {
Kernel* kernels = nullptr;
}

Kernel::Kernel(const char* name_, Start start_) : name(name_), start(start_), next(kernels) {
  kernels = this;
}

const Kernel* find_kernel(const char* name) {
  const Kernel* kernel = kernels;
  while (kernel != nullptr && strcmp(kernel->name, name) != 0) kernel = kernel->next;
  return kernel;
}

}  // namespace cuda
}  // namespace fused_attention

// compute_capability: that of the GPU that the substitute stands for.
extern "C" __attribute__((visibility("default"))) void fused_attention_cuda_substitute(
    fused_attention::Substitute run, int compute_capability) {
  fused_attention::substitute = run;
  fused_attention::substitute_capability = compute_capability;
}

namespace fused_attention {
namespace {

constexpr Operator kOperators[] = {
    {"attention_forward_plain", kAttentionForwardPlain, attention_forward_plain},
    {"attention_forward_plain_lse", kAttentionForwardPlainLse, attention_forward_plain_lse},
    {"attention_forward", kAttentionForward, attention_forward},
    {"attention_backward", kAttentionBackward, attention_backward},
    {"masked_softmax_forward", kMaskedSoftmaxForward, TORCH_BOX(&masked_softmax_forward)},
    {"masked_softmax_", kMaskedSoftmax, TORCH_BOX(&masked_softmax_)},
    {"masked_softmax_backward", kMaskedSoftmaxBackward, TORCH_BOX(&masked_softmax_backward)},
};

constexpr Operator kDryOperators[] = {
    {"attention_forward_plain", kAttentionForwardPlain, run_dry<attention_forward_plain>},
    {"attention_forward", kAttentionForward, run_dry<attention_forward>},
    {"attention_backward", kAttentionBackward, run_dry<attention_backward>},
};

}  // namespace
}  // namespace fused_attention

STABLE_TORCH_LIBRARY(fused_attention_cuda, m) {
  fused_attention::define(m, fused_attention::kOperators);
}
STABLE_TORCH_LIBRARY_IMPL(fused_attention_cuda, CUDA, m) {
  fused_attention::implement(m, fused_attention::kOperators);
}
// The operators for CPU tensors serve only the substitute.
STABLE_TORCH_LIBRARY_IMPL(fused_attention_cuda, CPU, m) {
  fused_attention::implement(m, fused_attention::kOperators);
}
STABLE_TORCH_LIBRARY(fused_attention_cuda_dry_run, m) {
  fused_attention::define(m, fused_attention::kDryOperators);
  m.def(fused_attention::kNotes);
}
STABLE_TORCH_LIBRARY_IMPL(fused_attention_cuda_dry_run, CompositeExplicitAutograd, m) {
  fused_attention::implement(m, fused_attention::kDryOperators);
  m.impl("notes", fused_attention::take_notes);
}
