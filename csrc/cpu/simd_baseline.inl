// The vector vocabulary in portable C++: 4 floats, 2 doubles, 4 uint32 in plain arrays, which every
// compiler turns into whatever 128-bit vectors its target has.
#pragma once

#include "dispatch.h"

namespace fused_attention {
namespace {

constexpr int kVectorRegisters = 16;
constexpr bool kFusedMultiplyAdd = false;  // whether fma rounds once

template <typename T, int N>
struct Lanes {
  T lane[N];
};
template <typename T>
struct Simd;
template <>
struct Simd<float> {
  using Vec = Lanes<float, 4>;
  static constexpr int kLanes = 4;
};
template <>
struct Simd<double> {
  using Vec = Lanes<double, 2>;
  static constexpr int kLanes = 2;
};
using VecU32 = Lanes<uint32_t, 4>;
constexpr int kU32Lanes = 4;

// Applies f to every lane: map(f, a, b).lane[i] = f(a.lane[i], b.lane[i])
template <typename F, typename T, int N, typename... More>
FA_INLINE Lanes<T, N> map(F f, const Lanes<T, N>& a, const More&... more) {
  Lanes<T, N> out;
  for (int i = 0; i < N; ++i) out.lane[i] = f(a.lane[i], more.lane[i]...);
  return out;
}

FA_INLINE float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
FA_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof x);
  return bits;
}

template <typename T>
FA_INLINE typename Simd<T>::Vec load(const T* p) {
  typename Simd<T>::Vec out;
  __builtin_memcpy(&out, p, sizeof out);
  return out;
}
template <typename T, int N>
FA_INLINE void store(T* p, const Lanes<T, N>& a) {
  __builtin_memcpy(p, &a, sizeof a);
}
template <typename T>
FA_INLINE typename Simd<T>::Vec broadcast(T x) {
  typename Simd<T>::Vec out;
  for (T& lane : out.lane) lane = x;
  return out;
}
#define FA_LANEWISE(name, ...)                               \
  template <typename T, int N>                               \
  FA_INLINE Lanes<T, N> name(Lanes<T, N> a, Lanes<T, N> b) { \
    return map([](T x, T y) { return __VA_ARGS__; }, a, b);  \
  }
FA_LANEWISE(add, x + y)
FA_LANEWISE(sub, x - y)
FA_LANEWISE(mul, x* y)
FA_LANEWISE(div, x / y)
// max and min return the second operand if either is NaN.
FA_LANEWISE(max, x > y ? x : y)
FA_LANEWISE(min, x < y ? x : y)
#undef FA_LANEWISE
template <typename T, int N>
FA_INLINE Lanes<T, N> fma(Lanes<T, N> a, Lanes<T, N> b, Lanes<T, N> c) {
  return map([](T x, T y, T z) { return x * y + z; }, a, b, c);
}
// Does the same with one rounding for float (through double).
template <int N>
FA_INLINE Lanes<float, N> fma_once(Lanes<float, N> a, Lanes<float, N> b, Lanes<float, N> c) {
  return map([](float x, float y, float z) { return (float)((double)x * y + z); }, a, b, c);
}
template <int N>
FA_INLINE Lanes<double, N> fma_once(Lanes<double, N> a, Lanes<double, N> b, Lanes<double, N> c) {
  return fma(a, b, c);
}
template <typename T, int N>
FA_INLINE Lanes<T, N> abs(Lanes<T, N> a) {
  return map([](T x) { return x < 0 ? -x : x; }, a);
}

// Returns lane i of a where bit i is set, and of b elsewhere.
template <typename T, int N>
FA_INLINE Lanes<T, N> select_bits(uint64_t bits, Lanes<T, N> a, Lanes<T, N> b) {
  for (int i = 0; i < N; ++i) a.lane[i] = (bits >> i & 1) ? a.lane[i] : b.lane[i];
  return a;
}
// Returns a where x < y (false for NaN), and b elsewhere.
template <typename T, int N>
FA_INLINE Lanes<T, N> select_lt(Lanes<T, N> x, Lanes<T, N> y, Lanes<T, N> a, Lanes<T, N> b) {
  return map([](T p, T q, T r, T s) { return p < q ? r : s; }, x, y, a, b);
}
template <typename T, int N>
FA_INLINE bool any_gt(Lanes<T, N> x, Lanes<T, N> y) {
  bool any = false;
  for (int i = 0; i < N; ++i) any |= x.lane[i] > y.lane[i];
  return any;
}

// Reductions over the lanes. The result of reduce_max is unspecified if a lane is NaN.
template <typename T, int N>
FA_INLINE T reduce_max(Lanes<T, N> a) {
  T top = a.lane[0];
  for (int i = 1; i < N; ++i) top = a.lane[i] > top ? a.lane[i] : top;
  return top;
}
template <typename T, int N>
FA_INLINE T reduce_add(Lanes<T, N> a) {
  T sum = a.lane[0];
  for (int i = 1; i < N; ++i) sum += a.lane[i];
  return sum;
}
// Sets bit i if byte i of 64 is not 0.
FA_INLINE uint64_t nonzero_bytes(const uint8_t* p) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= (uint64_t)(p[i] != 0) << i;
  return bits;
}

template <typename T>
FA_INLINE typename Simd<T>::Vec iota(T) {
  typename Simd<T>::Vec out;
  for (int i = 0; i < Simd<T>::kLanes; ++i) out.lane[i] = (T)i;
  return out;
}

// Returns x - n for the integer n nearest to x: in [-0.5, 0.5] for |x| <= 2000. Adding kIntegers
// rounds to an integer, because numbers of that size have no fraction.
template <typename T, int N>
FA_INLINE Lanes<T, N> split_integer(Lanes<T, N> x, Lanes<T, N>* n) {
  constexpr T kIntegers = sizeof(T) == 4 ? (T)12582912.0 : (T)6755399441055744.0;  // 1.5 2^23, 2^52
  const auto nearest = [](T a) {
    const T near = a < (T)-2000 ? (T)-2000 : a;
    return (near + kIntegers) - kIntegers;
  };
  *n = map(nearest, x);
  return sub(x, *n);
}
// Returns p * 2^n, or 0 where that underflows, whatever p is. The power is built in the exponent
// field, which holds it for n in [-126, 127] ([-1022, 1023]); the clamp keeps the conversion to an
// integer defined for NaN and infinities.
FA_INLINE float times_power(float p, float n) {
  if (n < -126.0f) return 0.0f;
  return p * bits_to_float((uint32_t)((n < 127.0f ? (int)n : 127) + 127) << 23);
}
FA_INLINE double times_power(double p, double n) {
  if (n < -1022.0) return 0.0;
  const uint64_t bits = (uint64_t)((n < 1023.0 ? (int64_t)n : 1023) + 1023) << 52;
  double power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return p * power;
}
template <typename T, int N>
FA_INLINE Lanes<T, N> scale_exp2(Lanes<T, N> p, Lanes<T, N> n) {
  return map([](T a, T b) { return times_power(a, b); }, p, n);
}

// Load kLanes 16-bit elements, widened to float, and store floats rounded to nearest-even.
FA_INLINE Simd<float>::Vec load_bfloat16(const uint16_t* p) {
  Simd<float>::Vec out;
  for (int i = 0; i < 4; ++i) out.lane[i] = bits_to_float((uint32_t)p[i] << 16);
  return out;
}
FA_INLINE Simd<float>::Vec load_float16(const uint16_t* p) {
  Simd<float>::Vec out;
  for (int i = 0; i < 4; ++i) {
    const uint32_t sign = (uint32_t)(p[i] & 0x8000) << 16, rest = (uint32_t)(p[i] & 0x7fff) << 13;
    // The exponent is rebiased by a multiplication, which also normalises subnormals.
    const float magnitude =
        rest >= 0x0f800000u ? bits_to_float(rest | 0x7f800000u) : bits_to_float(rest) * 0x1p112f;
    out.lane[i] = bits_to_float(float_to_bits(magnitude) | sign);
  }
  return out;
}
FA_INLINE void store_bfloat16(uint16_t* p, Simd<float>::Vec a) {
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = float_to_bits(a.lane[i]);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    p[i] = a.lane[i] == a.lane[i] ? (uint16_t)rounded : 0x7fc0;
  }
}
FA_INLINE void store_float16(uint16_t* p, Simd<float>::Vec a) {
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = float_to_bits(a.lane[i]), sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00;  // NaN
    } else if (magnitude >= 0x477ff000) {
      half = 0x7c00;  // rounds to 65536 or more: infinity
    } else if (magnitude < 0x38800000) {
      // Subnormal: adding 0.5 leaves the value in the low mantissa bits, rounded by the hardware.
      half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
    } else {
      half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
    p[i] = (uint16_t)(sign | half);
  }
}

// Transposes in place: r[i][j] <-> r[j][i].
template <typename T, int N>
FA_INLINE void transpose(Lanes<T, N>* r) {
  for (int i = 0; i < N; ++i) {
    for (int j = 0; j < i; ++j) {
      const T swap = r[i].lane[j];
      r[i].lane[j] = r[j].lane[i];
      r[j].lane[i] = swap;
    }
  }
}

// Lane i becomes the sum of the lanes of r[i].
template <typename T, int N>
FA_INLINE Lanes<T, N> sum_lanes(const Lanes<T, N>* r) {
  Lanes<T, N> out;
  for (int i = 0; i < N; ++i) out.lane[i] = reduce_add(r[i]);
  return out;
}

FA_INLINE VecU32 broadcast_u32(uint32_t x) { return {{x, x, x, x}}; }
FA_INLINE VecU32 iota_u32() { return {{0, 1, 2, 3}}; }
FA_INLINE VecU32 add_u32(VecU32 a, VecU32 b) { return add(a, b); }
FA_INLINE VecU32 xor_u32(VecU32 a, VecU32 b) {
  return map([](uint32_t x, uint32_t y) { return x ^ y; }, a, b);
}
// Computes the 64-bit products a * b, as high and low words.
FA_INLINE void mul_wide_u32(VecU32 a, VecU32 b, VecU32* high, VecU32* low) {
  for (int i = 0; i < 4; ++i) {
    const uint64_t product = (uint64_t)a.lane[i] * b.lane[i];
    low->lane[i] = (uint32_t)product;
    high->lane[i] = (uint32_t)(product >> 32);
  }
}
// Set bit i if the low (high) 16 bits of lane i are >= threshold.
FA_INLINE uint64_t low16_ge(VecU32 a, uint32_t threshold) {
  uint64_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= (uint64_t)((a.lane[i] & 0xffff) >= threshold) << i;
  return bits;
}
FA_INLINE uint64_t high16_ge(VecU32 a, uint32_t threshold) {
  uint64_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= (uint64_t)((a.lane[i] >> 16) >= threshold) << i;
  return bits;
}

}  // namespace
}  // namespace fused_attention
