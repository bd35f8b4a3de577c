// The kernel table of one instruction set: each phase for the two types that kernels compute in.
// 16-bit tensors compute in float.

// clang-format off: each builds on those before it
#include "math.inl"
#include "tiles.inl"
#include "sequence.inl"
#include "masking.inl"
#include "philox.inl"
#include "scores.inl"
#include "online_softmax.inl"
#include "arithmetic.inl"
#include "words.inl"
#include "attention_forward.inl"
#include "attention_decode.inl"
#include "attention_backward.inl"
#include "masked_softmax.inl"
// clang-format on

template <template <typename> class Kernel, typename Params = AttentionParams>
struct ByType {
  static bool wide(const Params& p) { return p.dtype == DType::kFloat64; }
  static int64_t num_tasks(const Params& p) {
    return wide(p) ? Kernel<double>::num_tasks(p) : Kernel<float>::num_tasks(p);
  }
  static size_t workspace_bytes(const Params& p) {
    return wide(p) ? Kernel<double>::workspace_bytes(p) : Kernel<float>::workspace_bytes(p);
  }
  static void run(const Params& p, int64_t begin, int64_t end, void* workspace) {
    wide(p) ? Kernel<double>::run(p, begin, end, workspace)
            : Kernel<float>::run(p, begin, end, workspace);
  }
};
template <typename Kernel, typename Params = AttentionParams>
constexpr PhaseOf<Params> phase() {
  return {Kernel::num_tasks, Kernel::workspace_bytes, Kernel::run};
}

template <typename T>
void apply_math(MathFunction function, const T* in, T* out, int64_t count) {
  constexpr int W = kLanes<T>;
  T lanes[W] = {};
  for (int64_t i = 0; i < count; i += W) {
    const int64_t valid = min_of(W, count - i);
    for (int64_t l = 0; l < valid; ++l) lanes[l] = in[i + l];
    const Vec<T> x = load(lanes);
    store(lanes, function == MathFunction::kExp2 ? exp2<T>(x) : tanh<T>(x));
    for (int64_t l = 0; l < valid; ++l) out[i + l] = lanes[l];
  }
}
void apply_math_by_type(MathFunction function, DType dtype, const void* in, void* out,
                        int64_t count) {
  dtype == DType::kFloat64 ? apply_math(function, (const double*)in, (double*)out, count)
                           : apply_math(function, (const float*)in, (float*)out, count);
}

constexpr KernelTable kKernels = {
    kIsaName,
    {{"attention_decode",
      "few queries: keys and values are read once, in place, for all heads that share them;"
      " 17x the ordinary kernel for 1 query of 4 heads against 2048 keys",
      decode_serves,
      decode_tiles,
      decode_shared_bytes,
      {phase<ByType<DecodeSplit>>(), phase<ByType<DecodeCombine>>()}},
     {"attention_forward",
      "serves every call",
      [](const AttentionParams&) { return true; },
      forward_tiles,
      nullptr,
      {phase<ByType<DirectForward>>()}}},
    phase<ByType<AttentionBackwardDelta>>(),
    phase<ByType<AttentionBackwardSinks>>(),
    phase<ByType<AttentionBackwardKeys>>(),
    phase<ByType<AttentionBackwardQueries>>(),
    phase<DropoutKeepMask>(),
    phase<ByType<MaskedSoftmax, SoftmaxParams>, SoftmaxParams>(),
    phase<ByType<MaskedSoftmaxBackward, SoftmaxParams>, SoftmaxParams>(),
    phase<ByType<MaskedSoftmaxBackwardBias, SoftmaxParams>, SoftmaxParams>(),
    phase<ByType<MaskedSoftmaxBackwardSinks, SoftmaxParams>, SoftmaxParams>(),
    apply_math_by_type,
};
