// Element types, their conversions, and their terms in a matrix product.
#pragma once

#include <type_traits>

#include "launch.h"

#define FA_DEVICE __device__ __forceinline__

namespace fused_attention::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
__host__ __device__ constexpr DType dtype_of() {
  return sizeof(T) == 4            ? DType::kFloat32
         : std::is_same_v<T, Half> ? DType::kFloat16
                                   : DType::kBFloat16;
}

constexpr float kInf = __builtin_huge_valf();
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

FA_DEVICE float to_float(float x) { return x; }
FA_DEVICE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
FA_DEVICE float to_float(BFloat16 x) { return __uint_as_float((uint32_t)x.bits << 16); }

// Packs two neighbouring elements into a register, `low` at the lower address.
template <typename T>
FA_DEVICE uint32_t pack(float low, float high);
template <>
FA_DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <>
FA_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

template <typename T>
FA_DEVICE T from_float(float x) {
  return {(uint16_t)pack<T>(x, 0.0f)};
}
template <>
FA_DEVICE float from_float<float>(float x) {
  return x;
}

// The matrix units multiply 16-bit elements. A float enters them as a sum of three bfloat16, which
// hold its 24 bits; of the nine products of two such sums, the six are computed that are not
// smaller than 2^-24 of the largest (Henry, Tang and Heinecke 2019, "Leveraging the bfloat16
// artificial intelligence datatype for higher-precision computations").
template <typename T>
struct Terms {
  using Element = T;
  static constexpr int kCount = 1, kProducts = 1;
};
template <>
struct Terms<float> {
  using Element = BFloat16;
  static constexpr int kCount = 3, kProducts = 6;
};
// Product i multiplies term kLeft[i] and term kRight[i]; the largest product comes first.
__device__ constexpr int kLeft[] = {0, 0, 1, 0, 1, 2}, kRight[] = {0, 1, 0, 2, 1, 0};

// Splits x into a sum of terms, each truncated to the upper half of a float: the sum is exact, and
// FLT_MAX stays finite. Infinity and NaN are in the first term alone; the product of an infinity
// and a zero term of the other factor is NaN.
FA_DEVICE void split(float x, float (&terms)[3]) {
  if (!(fabsf(x) < kInf)) {
    terms[0] = x + x;  // the upper half of a quiet NaN is a NaN too
    terms[1] = terms[2] = 0;
    return;
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    terms[i] = __uint_as_float(__float_as_uint(x) & 0xffff0000u);
    x -= terms[i];
  }
}

// Packs the terms of two neighbouring values as operands of a product.
template <typename T>
FA_DEVICE void pack_terms(float low, float high, uint32_t (&packed)[Terms<T>::kCount]) {
  packed[0] = pack<T>(low, high);
}
template <>
FA_DEVICE void pack_terms<float>(float low, float high, uint32_t (&packed)[3]) {
  float a[3], b[3];
  split(low, a);
  split(high, b);
  for (int i = 0; i < 3; ++i) {
    packed[i] = __byte_perm(__float_as_uint(a[i]), __float_as_uint(b[i]), 0x7632);
  }
}

// Loads element `index` of a bias of any dtype as a float.
FA_DEVICE float load_as_float(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat32:
      return ((const float*)data)[index];
    case DType::kBFloat16:
      return to_float(((const BFloat16*)data)[index]);
    case DType::kFloat16:
      return to_float(((const Half*)data)[index]);
    default:
      return (float)((const double*)data)[index];
  }
}

FA_DEVICE float exp2_approx(float x) {  // 2 ULP
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <typename Number>
__host__ __device__ constexpr Number ceil_div(Number a, Number b) {
  return (a + b - 1) / b;
}

// Returns the sum of x over a block of kThreads threads, always in the same order. Only thread 0
// gets the sum.
template <int kThreads>
FA_DEVICE float block_total(float x) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = x;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if ((int)threadIdx.x < half) shared[threadIdx.x] = x += shared[threadIdx.x + half];
  }
  return x;
}

}  // namespace fused_attention::cuda
