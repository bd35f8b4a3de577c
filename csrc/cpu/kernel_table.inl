// The kernel table of one instruction set: each phase for the two types that kernels compute in.
// 16-bit tensors are computed in float.
#pragma once

#include "attention_backward.inl"
#include "attention_decode.inl"
#include "attention_forward.inl"
#include "attention_tangents.inl"
#include "attention_weights.inl"
#include "masked_softmax.inl"

namespace fused_attention {
namespace {

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

// Runs independent chains of fma(F, F, T), as many as `multiply` has. Every chain counts its
// products; a float counts to 2^24. The compiler must not merge the chains, nor turn an fma into an
// add.
template <typename T, typename F>
double multiply_vectors(F one, int64_t rounds) {
  constexpr int kRows = kRowsInRegisters<kMaxVectors>;
  constexpr int64_t kCounted = 1 << 19;
  __asm__ volatile("" : "+m"(one));  // hides the value from the compiler
  double total = 0;
  for (int64_t done = 0; done < rounds; done += kCounted) {
    Vec<T> sums[kRows][kMaxVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int x = 0; x < kMaxVectors; ++x) sums[r][x] = broadcast((T)(r * kMaxVectors + x));
    }
    for (int64_t i = done; i < min_of(rounds, done + kCounted); ++i) {
      for (auto& row : sums) {
        for (Vec<T>& sum : row) sum = fma(broadcast(one), broadcast(one), sum);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int x = 0; x < kMaxVectors; ++x) {
        total += (double)reduce_add(sums[r][x]) - (double)(kLanes<T> * (r * kMaxVectors + x));
      }
    }
  }
  return 2 * total;
}
double multiply_registers(DType dtype, int64_t rounds) {
#ifdef FUSED_ATTENTION_AMX_PRODUCTS
  if (dtype == DType::kBFloat16) {
    begin_tiles();
    for (int64_t i = 0; i < rounds; ++i) {
      tile_dot<0, 4, 6>();
      tile_dot<1, 4, 7>();
      tile_dot<2, 5, 6>();
      tile_dot<3, 5, 7>();
    }
    end_tiles();
    return 2.0 * (double)rounds * 4 * kTileRows * 16 * kTileDepth;
  }
#endif
#ifdef FUSED_ATTENTION_PAIR_PRODUCTS
  if (dtype == DType::kBFloat16) return multiply_vectors<float>(kOnes, rounds);
#endif
  return dtype == DType::kFloat64 ? multiply_vectors<double>(1.0, rounds)
                                  : multiply_vectors<float>(1.0f, rounds);
}

#ifdef FUSED_ATTENTION_AMX_PRODUCTS
// Whether AMX tiles multiply correctly. The test is of small integers, whose sums are exact in any
// order.
bool amx_multiplies() {
  constexpr int64_t kSize = 2 * kTileRows, kDepth = 2 * kTileDepth;
  const auto number = [](int64_t i) { return (float)(i * 7919 % 17 - 8); };
  const auto word = [&](int64_t i) {
    return (uint32_t)(__builtin_bit_cast(uint32_t, number(i)) >> 16);
  };
  uint16_t a[kSize * kDepth];
  uint32_t b[kDepth / 2 * kSize];
  float product[kSize * kSize], sum[kSize * kSize];
  for (int64_t i = 0; i < kSize * kDepth; ++i) a[i] = (uint16_t)word(i);
  for (int64_t k = 0; k < kDepth; ++k) {
    for (int64_t x = 0; x < kSize; ++x) {
      uint32_t& pair = b[k / 2 * kSize + x];
      pair = k % 2 == 0 ? word(k * x + 5) : pair | word(k * x + 5) << 16;
    }
  }
  for (int64_t i = 0; i < kSize * kSize; ++i) sum[i] = number(3 * i);
  begin_tiles();
  const DepthSlice part = {{a, kDepth, 0}, kDepth};
  multiply_amx<1, 1, 2, false>(kSize, &part, 1, {b, kSize, 0}, product, kSize);
  multiply_amx<1, 1, 2, true>(kSize, &part, 1, {b, kSize, 0}, sum, kSize);
  end_tiles();
  bool right = true;
  for (int64_t r = 0; r < kSize; ++r) {
    for (int64_t x = 0; x < kSize; ++x) {
      float want = 0;
      for (int64_t k = 0; k < kDepth; ++k) want += number(r * kDepth + k) * number(k * x + 5);
      const int64_t i = r * kSize + x;
      right &= product[i] == want && sum[i] == want + number(3 * i);
    }
  }
  return right;
}

// Whether there are enough keys to make up for decomposing them, and no lse is asked for: kernels
// that read lse compute the scores again, in float, which rounds differently.
bool many_keys(const AttentionParams& p) { return p.Sk >= 128 && p.lse == nullptr; }
template <int kPlanes, int kScoreOrders = kPlanes>
constexpr ForwardKernel amx_forward(const char* reason, bool (*serves)(const AttentionParams&)) {
  return {"attention_forward on tiles",
          reason,
          serves,
          AttentionForward<AmxProducts<kPlanes, kScoreOrders>>::tiles,
          DecomposeKeysAndValues<kPlanes>::call_workspace_bytes,
          {phase<DecomposeKeysAndValues<kPlanes>>(),
           phase<ForwardByHeads<AmxProducts<kPlanes, kScoreOrders>>>()}};
}
#endif

constexpr KernelTable kernels_of(const char* isa) {
  return {
      .isa = isa,
#ifdef FUSED_ATTENTION_AMX_PRODUCTS
      .works = amx_multiplies,
#else
      .works = [] { return true; },
#endif
      .mask_blocks = phase<MaskBlocks>(),
      .mask_blocks_bytes = MaskBlocks::bytes,
      // Best first; the last serves every call.
      .attention_forward =
          {
              {.name = "attention_decode",
               .reason =
                   "few queries: keys and values are read once, in place, for all heads that share"
                   " them; 17x the ordinary kernel for 1 query of 4 heads against 2048 keys",
               .serves = decode_serves,
               .tiles = decode_tiles,
               .call_workspace_bytes = decode_call_workspace_bytes,
               .phases = {phase<ByType<DecodeSplit>>(), phase<ByType<DecodeCombine>>()}},
#ifdef FUSED_ATTENTION_AMX_PRODUCTS
              amx_forward<1>("bfloat16 products on AMX tiles",
                             [](const AttentionParams& p) {
                               return p.dtype == DType::kBFloat16 ||
                                      (p.dtype == DType::kFloat32 && p.precision == 2 &&
                                       many_keys(p));
                             }),
              amx_forward<2, 3>(
                  "4 and 3 products of bfloat16 planes on AMX tiles",
                  [](const AttentionParams& p) { return p.dtype == DType::kFloat16; }),
              amx_forward<2>("3 products of bfloat16 planes on AMX tiles",
                             [](const AttentionParams& p) {
                               return p.dtype == DType::kFloat32 && p.precision == 1 &&
                                      many_keys(p);
                             }),
              amx_forward<3>("6 products of bfloat16 planes on AMX tiles",
                             [](const AttentionParams& p) {
                               return p.dtype == DType::kFloat32 && many_keys(p);
                             }),
#endif
#ifdef FUSED_ATTENTION_PAIR_PRODUCTS
              {.name = "attention_forward on pairs",
               .reason = "two bfloat16 products a lane at once",
               .serves = [](const AttentionParams& p) { return p.dtype == DType::kBFloat16; },
               .tiles = AttentionForward<PairProducts>::tiles,
               .call_workspace_bytes = nullptr,
               .phases = {phase<ForwardByHeads<PairProducts>>()}},
#endif
              {.name = "attention_forward",
               .reason = "serves every call",
               .serves = [](const AttentionParams&) { return true; },
               .tiles =
                   [](const AttentionParams& p) {
                     return p.dtype == DType::kFloat64 ? VectorForward<double>::tiles(p)
                                                       : VectorForward<float>::tiles(p);
                   },
               .call_workspace_bytes = nullptr,
               .phases = {phase<ByType<VectorForward>>()}},
          },
      .attention_backward_delta = phase<ByType<AttentionBackwardDelta>>(),
      .attention_backward_sinks = phase<ByType<AttentionBackwardSinks>>(),
      .attention_backward_keys = phase<WithProducts<AttentionBackwardKeys>>(),
      .attention_backward_queries = phase<WithProducts<AttentionBackwardQueries>>(),
      .attention_backward_heads = phase<WithProducts<AttentionBackwardHeads>>(),
      .attention_backward_combine = phase<ByType<AttentionBackwardCombine>>(),
      .attention_backward_call_workspace_bytes =
          [](const AttentionParams& p) {
            return p.dtype == DType::kFloat64
                       ? AttentionBackwardCombine<double>::call_workspace_bytes(p)
                       : AttentionBackwardCombine<float>::call_workspace_bytes(p);
          },
      .attention_backward_pages = phase<ByType<AttentionBackwardPages>>(),
      .dropout_keep_mask = phase<DropoutKeepMask>(),
      .masked_softmax_forward = phase<ByType<MaskedSoftmax, SoftmaxParams>, SoftmaxParams>(),
      .masked_softmax_backward =
          phase<ByType<MaskedSoftmaxBackward, SoftmaxParams>, SoftmaxParams>(),
      .masked_softmax_backward_bias =
          phase<ByType<MaskedSoftmaxBackwardBias, SoftmaxParams>, SoftmaxParams>(),
      .masked_softmax_backward_sinks =
          phase<ByType<MaskedSoftmaxBackwardSinks, SoftmaxParams>, SoftmaxParams>(),
      .apply_math = apply_math_by_type,
      .multiply_registers = multiply_registers,
      .attention_weights = phase<ByType<AttentionWeights>>(),
      .attention_weights_delta = phase<ByType<AttentionWeightsDelta>>(),
      .attention_jvp = phase<ByType<AttentionJvp>>(),
      .attention_backward_jvp = {phase<ByType<TangentDelta>>(), phase<ByType<TangentSinks>>(),
                                 phase<ByType<AttentionTangentKeys>>(),
                                 phase<ByType<AttentionTangentQueries>>(),
                                 phase<ByType<AttentionTangentBias>>()},
  };
}

}  // namespace
}  // namespace fused_attention
