// The vector vocabulary on AVX2, FMA and F16C: 8 floats, 4 doubles, 8 uint32 a register.
#pragma once

#include <immintrin.h>

#include "dispatch.h"

namespace fused_attention {
namespace {

constexpr int kVectorRegisters = 16;
constexpr bool kFusedMultiplyAdd = true;  // whether fma rounds once

template <typename T>
struct Simd;
template <>
struct Simd<float> {
  using Vec = __m256;
  static constexpr int kLanes = 8;
};
template <>
struct Simd<double> {
  using Vec = __m256d;
  static constexpr int kLanes = 4;
};
using VecU32 = __m256i;
constexpr int kU32Lanes = 8;

FA_INLINE __m256 load(const float* p) { return _mm256_loadu_ps(p); }
FA_INLINE __m256d load(const double* p) { return _mm256_loadu_pd(p); }
FA_INLINE void store(float* p, __m256 a) { _mm256_storeu_ps(p, a); }
FA_INLINE void store(double* p, __m256d a) { _mm256_storeu_pd(p, a); }
FA_INLINE __m256 broadcast(float x) { return _mm256_set1_ps(x); }
FA_INLINE __m256d broadcast(double x) { return _mm256_set1_pd(x); }

FA_INLINE __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
FA_INLINE __m256d add(__m256d a, __m256d b) { return _mm256_add_pd(a, b); }
FA_INLINE __m256 sub(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
FA_INLINE __m256d sub(__m256d a, __m256d b) { return _mm256_sub_pd(a, b); }
FA_INLINE __m256 mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
FA_INLINE __m256d mul(__m256d a, __m256d b) { return _mm256_mul_pd(a, b); }
FA_INLINE __m256 div(__m256 a, __m256 b) { return _mm256_div_ps(a, b); }
FA_INLINE __m256d div(__m256d a, __m256d b) { return _mm256_div_pd(a, b); }
FA_INLINE __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
FA_INLINE __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
FA_INLINE __m256 fma_once(__m256 a, __m256 b, __m256 c) { return fma(a, b, c); }
FA_INLINE __m256d fma_once(__m256d a, __m256d b, __m256d c) { return fma(a, b, c); }
FA_INLINE __m256 abs(__m256 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
FA_INLINE __m256d abs(__m256d a) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), a); }
// max and min return the second operand if either is NaN.
FA_INLINE __m256 max(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
FA_INLINE __m256d max(__m256d a, __m256d b) { return _mm256_max_pd(a, b); }
FA_INLINE __m256 min(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
FA_INLINE __m256d min(__m256d a, __m256d b) { return _mm256_min_pd(a, b); }

// Returns lane i of a where bit i is set, and of b elsewhere.
FA_INLINE __m256 select_bits(uint64_t bits, __m256 a, __m256 b) {
  const __m256i lane = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32((int)bits), lane);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
}
FA_INLINE __m256d select_bits(uint64_t bits, __m256d a, __m256d b) {
  const __m256i lane = _mm256_set_epi64x(8, 4, 2, 1);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi64x((long long)bits), lane);
  return _mm256_blendv_pd(b, a, _mm256_castsi256_pd(_mm256_cmpeq_epi64(set, lane)));
}
// Returns a where x < y (false for NaN), and b elsewhere.
FA_INLINE __m256 select_lt(__m256 x, __m256 y, __m256 a, __m256 b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_LT_OQ));
}
FA_INLINE __m256d select_lt(__m256d x, __m256d y, __m256d a, __m256d b) {
  return _mm256_blendv_pd(b, a, _mm256_cmp_pd(x, y, _CMP_LT_OQ));
}
FA_INLINE bool any_gt(__m256 x, __m256 y) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_GT_OQ)) != 0;
}
FA_INLINE bool any_gt(__m256d x, __m256d y) {
  return _mm256_movemask_pd(_mm256_cmp_pd(x, y, _CMP_GT_OQ)) != 0;
}

// Reductions over the lanes. The result of reduce_max is unspecified if a lane is NaN.
FA_INLINE float reduce_max(__m256 a) {
  const __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 y = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
FA_INLINE double reduce_max(__m256d a) {
  const __m128d x = _mm_max_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
  return _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)));
}
FA_INLINE float reduce_add(__m256 a) {
  const __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 y = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
FA_INLINE double reduce_add(__m256d a) {
  const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
  return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}
// Sets bit i if byte i of 64 is not 0.
FA_INLINE uint64_t nonzero_bytes(const uint8_t* p) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i low = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i*)p), zero);
  const __m256i high = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i*)(p + 32)), zero);
  return ~((uint64_t)(uint32_t)_mm256_movemask_epi8(high) << 32 |
           (uint32_t)_mm256_movemask_epi8(low));
}

FA_INLINE __m256 iota(float) { return _mm256_set_ps(7, 6, 5, 4, 3, 2, 1, 0); }
FA_INLINE __m256d iota(double) { return _mm256_set_pd(3, 2, 1, 0); }

// Returns x - n, in [-0.5, 0.5], for the integer n nearest to x; NaN for infinities.
FA_INLINE __m256 split_integer(__m256 x, __m256* n) {
  *n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_sub_ps(x, *n);
}
FA_INLINE __m256d split_integer(__m256d x, __m256d* n) {
  *n = _mm256_round_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_sub_pd(x, *n);
}
// Returns p * 2^n, or 0 where that underflows, whatever p is; n is an integer or -inf. The power is
// built in the exponent field, which holds it for n in [-126, 127].
FA_INLINE __m256 scale_exp2(__m256 p, __m256 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  return select_lt(n, _mm256_set1_ps(-126.0f), _mm256_setzero_ps(), _mm256_mul_ps(p, power));
}
FA_INLINE __m256d scale_exp2(__m256d p, __m256d n) {
  const __m256i integer = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n));
  const __m256i biased = _mm256_add_epi64(integer, _mm256_set1_epi64x(1023));
  const __m256d power = _mm256_castsi256_pd(_mm256_slli_epi64(biased, 52));
  return select_lt(n, _mm256_set1_pd(-1022.0), _mm256_setzero_pd(), _mm256_mul_pd(p, power));
}

// Load kLanes 16-bit elements, widened to float, and store floats rounded to nearest-even.
FA_INLINE __m256 load_bfloat16(const uint16_t* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
FA_INLINE __m256 load_float16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
FA_INLINE void store_bfloat16(uint16_t* p, __m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i out = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(out, out), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
FA_INLINE void store_float16(uint16_t* p, __m256 a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

// Transposes in place: r[i][j] <-> r[j][i].
FA_INLINE void transpose(__m256* r) {
  __m256 t[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
FA_INLINE void transpose(__m256d* r) {
  const __m256d a = _mm256_unpacklo_pd(r[0], r[1]), b = _mm256_unpackhi_pd(r[0], r[1]);
  const __m256d c = _mm256_unpacklo_pd(r[2], r[3]), d = _mm256_unpackhi_pd(r[2], r[3]);
  r[0] = _mm256_permute2f128_pd(a, c, 0x20);
  r[1] = _mm256_permute2f128_pd(b, d, 0x20);
  r[2] = _mm256_permute2f128_pd(a, c, 0x31);
  r[3] = _mm256_permute2f128_pd(b, d, 0x31);
}

// Lane i becomes the sum of the lanes of r[i].
FA_INLINE __m256 sum_lanes(const __m256* r) {
  // Each half holds sums of r[0] ... r[3] in `low`, and of r[4] ... r[7] in `high`.
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(r[4], r[5]), _mm256_hadd_ps(r[6], r[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                       _mm256_permute2f128_ps(low, high, 0x31));
}
FA_INLINE __m256d sum_lanes(const __m256d* r) {
  const __m256d low = _mm256_hadd_pd(r[0], r[1]), high = _mm256_hadd_pd(r[2], r[3]);
  return _mm256_add_pd(_mm256_permute2f128_pd(low, high, 0x20),
                       _mm256_permute2f128_pd(low, high, 0x31));
}

FA_INLINE VecU32 broadcast_u32(uint32_t x) { return _mm256_set1_epi32((int)x); }
FA_INLINE VecU32 iota_u32() { return _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0); }
FA_INLINE VecU32 add_u32(VecU32 a, VecU32 b) { return _mm256_add_epi32(a, b); }
FA_INLINE VecU32 xor_u32(VecU32 a, VecU32 b) { return _mm256_xor_si256(a, b); }
// Computes the 64-bit products a * b, as high and low words.
FA_INLINE void mul_wide_u32(VecU32 a, VecU32 b, VecU32* high, VecU32* low) {
  const __m256i even = _mm256_mul_epu32(a, b);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
  *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
// Set bit i if the low (high) 16 bits of lane i are >= threshold. Both are below 2^31, so that a
// signed comparison works.
FA_INLINE uint64_t lanes_ge(VecU32 a, uint32_t threshold) {
  const __m256i ge = _mm256_cmpgt_epi32(a, _mm256_set1_epi32((int)threshold - 1));
  return (uint64_t)_mm256_movemask_ps(_mm256_castsi256_ps(ge));
}
FA_INLINE uint64_t low16_ge(VecU32 a, uint32_t threshold) {
  return lanes_ge(_mm256_and_si256(a, _mm256_set1_epi32(0xffff)), threshold);
}
FA_INLINE uint64_t high16_ge(VecU32 a, uint32_t threshold) {
  return lanes_ge(_mm256_srli_epi32(a, 16), threshold);
}

}  // namespace
}  // namespace fused_attention
