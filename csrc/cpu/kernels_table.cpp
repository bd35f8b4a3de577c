// The table of all kernels of one instruction set (see phases.inl).
#include "masking.inl"
#include "phases.inl"
#include "philox.inl"
#include "tiles.inl"
#ifdef FUSED_ATTENTION_AMX_PRODUCTS
#include "amx_products.inl"
#endif
#ifdef FUSED_ATTENTION_PAIR_PRODUCTS
#include "vector_products.inl"
#endif

namespace fused_attention {
namespace {

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
#else
bool amx_multiplies() { return true; }
#endif

}  // namespace

constinit const KernelTable FUSED_ATTENTION_ISA::kernels = {
    .isa = FA_STRING(FUSED_ATTENTION_ISA),
    .works = amx_multiplies,
    .mask_blocks = phase<MaskBlocks>(),
    .mask_blocks_bytes = MaskBlocks::bytes,
    .attention_forward = FUSED_ATTENTION_ISA::attention_forward,
    .attention_backward = FUSED_ATTENTION_ISA::attention_backward,
    .attention_weights = FUSED_ATTENTION_ISA::attention_weights,
    .attention_statistics = FUSED_ATTENTION_ISA::attention_statistics,
    .attention_tangents = FUSED_ATTENTION_ISA::attention_tangents,
    .masked_softmax = FUSED_ATTENTION_ISA::masked_softmax,
    .dropout_keep_mask = phase<DropoutKeepMask>(),
    .apply_math = apply_math_by_type,
    .multiply_registers = multiply_registers,
};

}  // namespace fused_attention
