#include "describe.h"

#include <string.h>

namespace fused_attention {

// -- tensors --------------------------------------------------------------------------------------

void* address_of(const Tensor& tensor) {
  constexpr uintptr_t kNowhere = 1 << 12;
  void* address = tensor.data_ptr();
  return is_dry() ? (void*)((uintptr_t)address % kNowhere + kNowhere) : address;
}

Shape shape_of(const Tensor& tensor, const char* name, Layout layout) {
  STD_TORCH_CHECK(is_here(tensor), name, ": expected a ", kDevice, " tensor");
  const int dims = layout == Layout::kPacked ? 3 : 4;
  STD_TORCH_CHECK(tensor.dim() == dims, name, ": expected ", dims, " dimensions, got ",
                  tensor.dim());
  constexpr int kFrom[3][4] = {{0, 1, 2, 3}, {-1, 1, 0, 2}, {0, 2, 1, 3}};
  Shape shape;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (int i = 0; i < 4; ++i) {
    const int from = kFrom[(int)layout][i];
    shape.size[i] = from < 0 ? 1 : sizes[(size_t)from];
    shape.stride[i] = from < 0 ? 0 : strides[(size_t)from];
  }
  return shape;
}

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16, float16 or float64");
  }
}

int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

namespace {
int64_t element_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      return 1;
  }
}
}  // namespace

int64_t saturating_product(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? std::numeric_limits<int64_t>::max() : product;
}
int64_t count_elements(Sizes sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) {
    if (size == 0) return 0;
    count = saturating_product(count, size);
  }
  return count;
}

void refuse_for_memory(const char* what, double bytes, const char* hint) {
  char text[512];
  snprintf(text, sizeof(text), "not enough memory for %s: %.1f MiB%s%s", what, bytes / (1 << 20),
           *hint != 0 ? ". Hint: " : "", hint);
  throw std::runtime_error(text);
}

namespace {
Tensor new_tensor(Buffer buffer, Sizes sizes, const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  const int64_t count = count_elements(sizes), width = element_bytes(dtype);
  const bool countable = count < std::numeric_limits<int64_t>::max() / 16;
  const auto make = [&] {
    if (!is_dry()) return empty_strided(sizes, strides, dtype, &handle);
    return aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), strides, (int32_t)dtype,
                                    aoti_torch_device_type_meta(), 0, &handle);
  };
  if (!countable || make() != AOTI_TORCH_SUCCESS) {
    refuse_for_memory(buffer.what, (double)count * (double)width, buffer.hint);
  }
  constexpr const char* kOwners[] = {"result", "kept", "call"};
  note("{\"buffer\": \"%s\", \"bytes\": %lld, \"owner\": \"%s\"}", buffer.what,
       (long long)(count * width), kOwners[(int)buffer.owner]);
  return Tensor(handle);
}
}  // namespace

Tensor empty(Buffer buffer, Sizes sizes, ScalarType dtype) {
  constexpr size_t kMaxDims = 64;  // as in torch
  STD_TORCH_CHECK(sizes.size() <= kMaxDims, "expected at most 64 dimensions");
  int64_t strides[kMaxDims], stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride = saturating_product(stride, sizes[i] > 1 ? sizes[i] : 1);
  }
  return new_tensor(buffer, sizes, strides, dtype);
}

Tensor no_result(ScalarType dtype) { return empty({"a result", "", Owner::kResult}, {0}, dtype); }

Tensor empty_like_format(Buffer buffer, const Shape& model, int64_t S, int64_t D,
                         ScalarType dtype) {
  const int64_t B = model.size[0], H = model.size[1];
  if (model.stride[1] >= model.stride[2]) return empty(buffer, {B, H, S, D}, dtype);
  const auto at_least_1 = [](int64_t n) { return n > 1 ? n : 1; };
  const int64_t row = at_least_1(D), token = saturating_product(row, at_least_1(H));
  const int64_t batch = saturating_product(token, at_least_1(S));
  const int64_t strides[4] = {batch, row, token, 1};
  return new_tensor(buffer, {B, H, S, D}, strides, dtype);
}

Input::Input(const Tensor& tensor, const char* name, Layout layout)
    : given(shape_of(tensor, name, layout)), dense(tensor), shape(given) {
  if (given.stride[3] == 1 || given.size[3] <= 1) return;
  dense = torch::stable::contiguous(tensor);
  shape = shape_of(dense, name, layout);
  note("{\"buffer\": \"a copy of %s\", \"bytes\": %lld, \"owner\": \"call\"}", name,
       (long long)(count_elements(dense.sizes()) * element_bytes(dense.scalar_type())));
}

TensorView view_of(const Tensor& output, Layout layout) {
  return Input(output, "output", layout).view();
}

Footprint footprint_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  return Footprint(tensor.data_ptr(), element_bytes(tensor.scalar_type()), sizes.data(),
                   strides.data(), sizes.size());
}

ScoreView score_view(const Tensor& tensor, const char* name, const AttentionParams& p) {
  const Shape shape = shape_of(tensor, name);
  const int64_t full[4] = {p.B, p.Hq, p.Sq, p.Sk};
  int64_t stride[4];
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(shape.size[i] == 1 || shape.size[i] == full[i], name, ": size ", shape.size[i],
                    " of dimension ", i, " does not broadcast to ", full[i]);
    stride[i] = shape.size[i] == 1 ? 0 : shape.stride[i];
  }
  return {address_of(tensor), DType::kFloat32, stride[0], stride[1], stride[2], stride[3]};
}

// -- describing a call ----------------------------------------------------------------------------

Layout layout_of_queries(const Options& o) {
  return o.cu_seqlens_q ? Layout::kPacked : Layout::kDense;
}
Layout layout_of_keys(const Options& o) {
  return o.block_table ? Layout::kPaged : layout_of_queries(o);
}

int64_t count_samples(const OptionalTensor& philox, const OptionalTensor& sinks, int64_t batch) {
  const bool many = (philox && philox->dim() == 2) || (sinks && sinks->dim() == 2);
  if (!many) return 0;
  const int64_t samples = philox && philox->dim() == 2 ? philox->size(0) : sinks->size(0);
  STD_TORCH_CHECK(
      samples > 0 && batch % samples == 0 && (!philox || philox->dim() == 2) &&
          (!sinks || (sinks->dim() == 2 && sinks->size(0) == samples)),
      "philox, sinks: expected one row per sample in both, and a number of samples that divides ",
      batch);
  return samples;
}

namespace {
template <typename Params>
void describe_dropout_of(Params& p, double dropout_p, const OptionalTensor& philox, int64_t samples,
                         Held& held) {
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1, "dropout_p: expected 0 to 1, got ", dropout_p);
  if (dropout_p == 0) return;
  STD_TORCH_CHECK(
      philox.has_value() && is_here(*philox) &&
          philox->numel() == (samples > 1 ? samples : 1) * 2 &&
          philox->scalar_type() == ScalarType::Long && philox->dim() == (samples > 0 ? 2 : 1),
      "philox: expected an int64 ", kDevice, " tensor [2] of seed and offset, or [samples, 2]");
  held.philox = integers_of(*philox);
  p.dropout_threshold = (uint32_t)std::nearbyint(dropout_p * 65536);
  const uint32_t kept = 65536 - p.dropout_threshold;
  p.dropout_scale = kept == 0 ? 0.0 : 65536.0 / kept;
}
}  // namespace

void describe_dropout(AttentionParams& p, double dropout_p, const OptionalTensor& philox,
                      int64_t samples, Held& held) {
  describe_dropout_of(p, dropout_p, philox, samples, held);
}
void describe_dropout(SoftmaxParams& p, double dropout_p, const OptionalTensor& philox,
                      int64_t samples, Held& held) {
  describe_dropout_of(p, dropout_p, philox, samples, held);
}

void describe_query_and_key(AttentionParams& p, const Input& query, const Input& key) {
  p.dtype = dtype_of(query.dense, "query");
  STD_TORCH_CHECK(key.dense.scalar_type() == query.dense.scalar_type(),
                  "query, key: expected one dtype");
  const int64_t *q = query.shape.size, *k = key.shape.size;
  p.B = q[0], p.Hq = q[1], p.Sq = q[2], p.D = q[3];
  p.Hkv = k[1], p.Sk = k[2];
  STD_TORCH_CHECK(k[3] == p.D, "key: expected head_dim ", p.D, ", got ", k[3]);
  STD_TORCH_CHECK(p.Hkv == 0 ? p.Hq == 0 : p.Hq % p.Hkv == 0, "query: ", p.Hq,
                  " heads are no multiple of key's ", p.Hkv);
  p.query = query.view();
  p.key = key.view();
}

void describe_inputs(AttentionParams& p, const Input& query, const Input& key, const Input& value) {
  describe_query_and_key(p, query, key);
  const int64_t* v = value.shape.size;
  p.Dv = v[3];
  STD_TORCH_CHECK(value.dense.scalar_type() == query.dense.scalar_type(),
                  "query, value: expected one dtype");
  STD_TORCH_CHECK(v[0] == key.shape.size[0] && v[1] == p.Hkv && v[2] == p.Sk,
                  "value: expected batch, heads and tokens as in key");
  p.value = value.view();
}

// Returns the softcap that kernels use. A cap of 2^96 or more (float64: 2^992) counts as none: no
// softmax tells such scores apart, and cap * tanh would overflow, or scale / cap would be denormal.
// A cap so small that scale / cap would overflow is raised until it does not: exp of all logits
// remains 1.
static double effective_softcap(double softcap, double scale, bool wide) {
  using Wide = std::numeric_limits<double>;
  using Narrow = std::numeric_limits<float>;
  const double most = wide ? Wide::max() : (double)Narrow::max();
  const double least = wide ? Wide::min() : (double)Narrow::min();
  scale = std::fabs(scale);
  if (softcap <= 0 || softcap >= std::ldexp(1.0, wide ? 992 : 96)) return 0;
  if (scale > 0 && scale / softcap < least) return 0;
  return std::fmax(softcap, 4 * std::fmax(least, scale / most));
}

void describe_options(AttentionParams& p, const Options& o, Held& held) {
  STD_TORCH_CHECK(o.causal >= 0 && o.causal <= 3, "causal: expected 0 to 3, got ", o.causal);
  STD_TORCH_CHECK(o.window_left >= -1 && o.window_right >= -1,
                  "window: expected tokens, or -1 for no limit");
  // Positions plus lengths must fit 31 bits. The random numbers of dropout come by eight columns.
  for (const int64_t start : {o.q_start, o.k_start, o.head_start}) {
    STD_TORCH_CHECK(start >= 0 && start < (int64_t)1 << 30,
                    "q_start, k_start, head_start: expected 0 to 2^30, got ", start);
  }
  STD_TORCH_CHECK(o.dropout_p == 0 || o.k_start % 8 == 0,
                  "k_start: expected a multiple of 8 with dropout, got ", o.k_start);
  p.diagonal_start = o.q_start - o.k_start;
  p.dropout_row = (uint32_t)o.q_start;
  p.dropout_group = (uint32_t)(o.k_start / 8);
  p.dropout_head = (uint32_t)o.head_start;
  // A window that reaches beyond the sequence hides nothing. It is dropped, so that index
  // arithmetic cannot overflow.
  const int64_t longest = p.Sq + p.Sk + std::abs(p.diagonal_start);
  const auto window = [&](int64_t tokens) { return tokens > longest ? -1 : tokens; };
  p.window_left = window(o.window_left);
  const auto causal = (Causal)o.causal;
  const bool hides_future = causal == Causal::kTopLeft || causal == Causal::kBottomRight;
  p.window_right = hides_future ? 0 : window(o.window_right);
  p.bottom_right = causal == Causal::kBottomRight || causal == Causal::kBottomRightOnly;
  p.scale = o.scale;
  STD_TORCH_CHECK(std::isfinite(o.scale), "scale: expected a finite number, got ", o.scale);
  STD_TORCH_CHECK(o.softcap >= 0, "softcap: expected a number >= 0, got ", o.softcap);
  p.softcap = effective_softcap(o.softcap, o.scale, p.dtype == DType::kFloat64);
  p.precision = o.precision;
  const int64_t samples = count_samples(o.philox, o.sinks, p.B);
  p.sample_heads = samples > 0 ? p.B / samples * p.Hq : 0;
  describe_dropout(p, o.dropout_p, o.philox, samples, held);
  if (o.mask) {
    STD_TORCH_CHECK(o.mask->scalar_type() == ScalarType::Bool, "mask: expected bool");
    p.mask = score_view(*o.mask, "mask", p);
  }
  if (o.bias) {
    p.bias = score_view(*o.bias, "bias", p);
    p.bias.dtype = dtype_of(*o.bias, "bias");
  }
  if (o.key_padding_mask) {
    const Tensor& padding = *o.key_padding_mask;
    STD_TORCH_CHECK(is_here(padding) && padding.scalar_type() == ScalarType::Bool &&
                        padding.dim() == 2 && padding.size(0) == p.B && padding.size(1) == p.Sk,
                    "key_padding_mask: expected a bool ", kDevice, " tensor [", p.B, ", ", p.Sk,
                    "]");
    p.key_padding_mask = (const uint8_t*)address_of(padding);
    p.key_padding_stride_b = padding.stride(0);
    p.key_padding_stride_k = padding.stride(1);
  }
  if (o.alibi_slopes) {
    const Tensor& slopes = *o.alibi_slopes;
    const int64_t dim = slopes.dim();
    STD_TORCH_CHECK(is_here(slopes) && slopes.scalar_type() == ScalarType::Float &&
                        (dim == 1 || (dim == 2 && slopes.size(0) == p.B)) &&
                        slopes.size(dim - 1) == p.Hq && slopes.is_contiguous(),
                    "alibi_slopes: expected a contiguous float32 ", kDevice, " tensor [", p.Hq,
                    "] or [", p.B, ", ", p.Hq, "]");
    p.alibi_slopes = (const float*)address_of(slopes);
    p.alibi_stride_b = dim == 2 ? p.Hq : 0;
  }
  if (o.sinks) {
    const Tensor& sinks = *o.sinks;
    const bool wide = p.dtype == DType::kFloat64;
    STD_TORCH_CHECK(is_here(sinks) && (sinks.dim() == 1 || samples > 0) && sinks.size(-1) == p.Hq &&
                        sinks.is_contiguous() &&
                        sinks.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                    "sinks: expected a contiguous ", wide ? "float64 " : "float32 ", kDevice,
                    " tensor [", p.Hq, "], or [samples, ", p.Hq, "]");
    p.sinks = address_of(sinks);
  }
}

// -- sequences that are not all alike -------------------------------------------------------------

const Tensor& checked_int32(const Tensor& tensor, const char* name, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(is_here(tensor) && tensor.scalar_type() == ScalarType::Int &&
                      tensor.dim() == dim && tensor.size(0) == size,
                  name, ": expected an int32 ", kDevice, " tensor of ", dim,
                  " dimensions, the first ", size);
  return tensor;
}

namespace {
const int32_t* int32s(const Tensor& tensor, std::shared_ptr<const void>& held) {
  held = integers_of(tensor);
  return (const int32_t*)held.get();
}
}  // namespace

void describe_places(AttentionParams& p, const Options& o, int64_t num_pages, Held& held) {
  const int64_t Tq = p.Sq;
  if (o.cu_seqlens_q) {
    STD_TORCH_CHECK(o.cu_seqlens_q->dim() == 1 && o.cu_seqlens_q->size(0) > 0,
                    "cu_seqlens_q: expected [B + 1] offsets");
    STD_TORCH_CHECK(!o.mask && !o.bias && !o.key_padding_mask,
                    "mask, bias, key_padding_mask: expected none beside cu_seqlens_q");
    p.B = o.cu_seqlens_q->size(0) - 1;
    const Tensor& offsets = checked_int32(*o.cu_seqlens_q, "cu_seqlens_q", 1, p.B + 1);
    p.cu_seqlens_q = int32s(offsets, held.cu_seqlens_q);
    STD_TORCH_CHECK(o.cu_seqlens_k || o.block_table, "cu_seqlens_k: expected beside cu_seqlens_q");
  } else {
    STD_TORCH_CHECK(!o.cu_seqlens_k, "cu_seqlens_q: expected beside cu_seqlens_k");
    STD_TORCH_CHECK(o.block_table || num_pages == p.B, "key, value: expected batch ", p.B, ", got ",
                    num_pages);
  }
  if (o.block_table) {
    const Tensor& table = checked_int32(*o.block_table, "block_table", 2, p.B);
    p.block_table = int32s(table, held.block_table);
    p.block_table_stride_b = table.size(1);
    p.page_size = p.Sk;
    p.Sk = p.page_size * p.block_table_stride_b;
  }
  if (o.cu_seqlens_k) {
    const Tensor& offsets = checked_int32(*o.cu_seqlens_k, "cu_seqlens_k", 1, p.B + 1);
    p.cu_seqlens_k = int32s(offsets, held.cu_seqlens_k);
  }
  if (o.seqused_k) {
    const Tensor& lengths = checked_int32(*o.seqused_k, "seqused_k", 1, p.B);
    p.seqused_k = int32s(lengths, held.seqused_k);
  }
  p.lse_stride_b = p.cu_seqlens_q != nullptr ? 0 : p.Hq * Tq;
  p.lse_stride_h = Tq;
}

ScalarType lse_dtype(const AttentionParams& p) {
  return p.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

void check_lse(const AttentionParams& p, const Tensor& tensor, const char* name) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t heads = packed ? 0 : 1;  // the dimension of the heads
  STD_TORCH_CHECK(is_here(tensor) && tensor.dim() == heads + 2 &&
                      (packed || tensor.size(0) == p.B) && tensor.size(heads) == p.Hq &&
                      tensor.size(heads + 1) == p.Sq && tensor.scalar_type() == lse_dtype(p),
                  name, ": expected ", packed ? "[Hq, Tq]" : "[B, Hq, Sq]", " with B ", p.B,
                  ", Hq ", p.Hq, ", ", packed ? "Tq " : "Sq ", p.Sq, " in lse's dtype");
}

Tensor dense_lse(AttentionParams& p, const Tensor& lse) {
  check_lse(p, lse, "lse");
  Tensor dense = lse.is_contiguous() ? lse : torch::stable::contiguous(lse);
  p.lse = address_of(dense);
  return dense;
}

void describe_gradients(AttentionParams& p, const Input& query, const Input& out,
                        const Input& grad_out, const OptionalTensor& grad_lse) {
  for (const Input* x : {&out, &grad_out}) {
    const int64_t* size = x->shape.size;
    STD_TORCH_CHECK(
        x->dense.scalar_type() == query.dense.scalar_type() && size[0] == query.shape.size[0] &&
            size[1] == p.Hq && size[2] == p.Sq && size[3] == p.Dv,
        "grad_out, out: expected query's shape with ", p.Dv, " for head_dim, and query's dtype");
  }
  p.out = out.view();
  p.grad_out = grad_out.view();
  if (!grad_lse) return;
  check_lse(p, *grad_lse, "grad_lse");
  const bool packed = p.cu_seqlens_q != nullptr;
  p.grad_lse = address_of(*grad_lse);
  p.grad_lse_stride_b = packed ? 0 : grad_lse->stride(0);
  p.grad_lse_stride_h = grad_lse->stride(packed ? 0 : 1);
  p.grad_lse_stride_s = grad_lse->stride(packed ? 1 : 2);
}

}  // namespace fused_attention
