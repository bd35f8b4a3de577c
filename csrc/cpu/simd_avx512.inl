// The vector vocabulary on AVX-512 (F, BW, DQ, VL): 16 floats, 8 doubles, 16 uint32 a register.
#pragma once

#include <immintrin.h>

#include "dispatch.h"

namespace fused_attention {
namespace {

constexpr int kVectorRegisters = 32;
constexpr bool kFusedMultiplyAdd = true;  // whether fma rounds once

template <typename T>
struct Simd;
template <>
struct Simd<float> {
  using Vec = __m512;
  static constexpr int kLanes = 16;
};
template <>
struct Simd<double> {
  using Vec = __m512d;
  static constexpr int kLanes = 8;
};
using VecU32 = __m512i;
constexpr int kU32Lanes = 16;

FA_INLINE __m512 load(const float* p) { return _mm512_loadu_ps(p); }
FA_INLINE __m512d load(const double* p) { return _mm512_loadu_pd(p); }
FA_INLINE void store(float* p, __m512 a) { _mm512_storeu_ps(p, a); }
FA_INLINE void store(double* p, __m512d a) { _mm512_storeu_pd(p, a); }
FA_INLINE __m512 broadcast(float x) { return _mm512_set1_ps(x); }
FA_INLINE __m512d broadcast(double x) { return _mm512_set1_pd(x); }

FA_INLINE __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
FA_INLINE __m512d add(__m512d a, __m512d b) { return _mm512_add_pd(a, b); }
FA_INLINE __m512 sub(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
FA_INLINE __m512d sub(__m512d a, __m512d b) { return _mm512_sub_pd(a, b); }
FA_INLINE __m512 mul(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
FA_INLINE __m512d mul(__m512d a, __m512d b) { return _mm512_mul_pd(a, b); }
FA_INLINE __m512 div(__m512 a, __m512 b) { return _mm512_div_ps(a, b); }
FA_INLINE __m512d div(__m512d a, __m512d b) { return _mm512_div_pd(a, b); }
FA_INLINE __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
FA_INLINE __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
FA_INLINE __m512 fma_once(__m512 a, __m512 b, __m512 c) { return fma(a, b, c); }
FA_INLINE __m512d fma_once(__m512d a, __m512d b, __m512d c) { return fma(a, b, c); }
FA_INLINE __m512 abs(__m512 a) { return _mm512_abs_ps(a); }
FA_INLINE __m512d abs(__m512d a) { return _mm512_abs_pd(a); }
// max and min return the second operand if either is NaN.
FA_INLINE __m512 max(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
FA_INLINE __m512d max(__m512d a, __m512d b) { return _mm512_max_pd(a, b); }
FA_INLINE __m512 min(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
FA_INLINE __m512d min(__m512d a, __m512d b) { return _mm512_min_pd(a, b); }

// Returns lane i of a where bit i is set, and of b elsewhere.
FA_INLINE __m512 select_bits(uint64_t bits, __m512 a, __m512 b) {
  return _mm512_mask_blend_ps((__mmask16)bits, b, a);
}
FA_INLINE __m512d select_bits(uint64_t bits, __m512d a, __m512d b) {
  return _mm512_mask_blend_pd((__mmask8)bits, b, a);
}
// Returns a where x < y (false for NaN), and b elsewhere.
FA_INLINE __m512 select_lt(__m512 x, __m512 y, __m512 a, __m512 b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), b, a);
}
FA_INLINE __m512d select_lt(__m512d x, __m512d y, __m512d a, __m512d b) {
  return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(x, y, _CMP_LT_OQ), b, a);
}
FA_INLINE bool any_gt(__m512 x, __m512 y) { return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ) != 0; }
FA_INLINE bool any_gt(__m512d x, __m512d y) { return _mm512_cmp_pd_mask(x, y, _CMP_GT_OQ) != 0; }

// Reductions over the lanes. The result of reduce_max is unspecified if a lane is NaN.
FA_INLINE float reduce_max(__m512 a) { return _mm512_reduce_max_ps(a); }
FA_INLINE double reduce_max(__m512d a) { return _mm512_reduce_max_pd(a); }
FA_INLINE float reduce_add(__m512 a) { return _mm512_reduce_add_ps(a); }
FA_INLINE double reduce_add(__m512d a) { return _mm512_reduce_add_pd(a); }
// Sets bit i if byte i of 64 is not 0.
FA_INLINE uint64_t nonzero_bytes(const uint8_t* p) {
  const __m512i bytes = _mm512_loadu_si512(p);
  return _mm512_test_epi8_mask(bytes, bytes);
}

FA_INLINE __m512 iota(float) {
  return _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}
FA_INLINE __m512d iota(double) { return _mm512_set_pd(7, 6, 5, 4, 3, 2, 1, 0); }

// Returns x - n, in [-0.5, 0.5], for the integer n nearest to x; 0 for infinities.
FA_INLINE __m512 split_integer(__m512 x, __m512* n) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  *n = _mm512_sub_ps(x, f);
  return f;
}
FA_INLINE __m512d split_integer(__m512d x, __m512d* n) {
  const __m512d f = _mm512_reduce_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  *n = _mm512_sub_pd(x, f);
  return f;
}
// Returns p * 2^n, or 0 where that underflows; n is an integer or -inf.
FA_INLINE __m512 scale_exp2(__m512 p, __m512 n) { return _mm512_scalef_ps(p, n); }
FA_INLINE __m512d scale_exp2(__m512d p, __m512d n) { return _mm512_scalef_pd(p, n); }

FA_INLINE VecU32 iota_u32() {
  return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}

// Load kLanes 16-bit elements, widened to float, and store floats rounded to nearest-even.
FA_INLINE __m512 load_bfloat16(const uint16_t* p) {
  // Word i becomes the upper half of lane i; the lower half is 0.
  const __m512i word = _mm512_mullo_epi32(iota_u32(), _mm512_set1_epi32(1 << 16));
  const __m512i words = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, word, words));
}
FA_INLINE __m512 load_float16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
FA_INLINE void store_bfloat16(uint16_t* p, __m512 a) {
  // Adds 0x7fff, and 1 more where the last bit that stays is odd. A NaN is replaced, because the
  // addition could make it infinite.
  const __m512i bits = _mm512_castps_si512(a), nan = _mm512_set1_epi32(0x7fc00000);
  const __mmask16 number = _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(number, bits, _mm512_set1_epi32(1 << 16));
  const __m512i down = _mm512_mask_add_epi32(nan, number, bits, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_mask_add_epi32(down, odd, down, _mm512_set1_epi32(1));
  // Lane i of 16 pairs takes the upper halves of lanes 2 i and 2 i + 1: words 4 i + 1 and 4 i + 3.
  const __m512i upper =
      _mm512_add_epi32(_mm512_mullo_epi32(iota_u32(), _mm512_set1_epi32(4 << 16 | 4)),
                       _mm512_set1_epi32(3 << 16 | 1));
  const __m512i words = _mm512_permutexvar_epi16(upper, rounded);
  _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(words));
}
FA_INLINE void store_float16(uint16_t* p, __m512 a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

// Transposes in place: r[i][j] <-> r[j][i].
FA_INLINE void transpose(__m512* r) {
  __m512 t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
FA_INLINE void transpose(__m512d* r) {
  __m512d t[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm512_unpacklo_pd(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_pd(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {  // t[i], t[i+2], t[i+4], t[i+6] hold columns i, i+2, i+4, i+6
    const __m512d a = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
    const __m512d b = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
    const __m512d c = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88);
    const __m512d d = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
    r[i] = _mm512_shuffle_f64x2(a, c, 0x88);
    r[i + 4] = _mm512_shuffle_f64x2(a, c, 0xdd);
    r[i + 2] = _mm512_shuffle_f64x2(b, d, 0x88);
    r[i + 6] = _mm512_shuffle_f64x2(b, d, 0xdd);
  }
}

// Lane i becomes the sum of the lanes of r[i].
FA_INLINE __m512 sum_lanes(const __m512* r) {
  __m512 pairs[8], fours[4];
  for (int i = 0; i < 8; ++i) {  // in each quarter: sums of r[2 i], r[2 i + 1], r[2 i], r[2 i + 1]
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]),
                             _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
  }
  for (int i = 0; i < 4; ++i) {  // in each quarter: sums of r[4 i] ... r[4 i + 3]
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88),
                                   _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
  const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88),
                                    _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88),
                       _mm512_shuffle_f32x4(low, high, 0xdd));
}
FA_INLINE __m512d sum_lanes(const __m512d* r) {
  __m512d pairs[4];
  for (int i = 0; i < 4; ++i) {  // in each quarter: sums of r[2 i], r[2 i + 1]
    pairs[i] = _mm512_add_pd(_mm512_unpacklo_pd(r[2 * i], r[2 * i + 1]),
                             _mm512_unpackhi_pd(r[2 * i], r[2 * i + 1]));
  }
  const __m512d low = _mm512_add_pd(_mm512_shuffle_f64x2(pairs[0], pairs[1], 0x88),
                                    _mm512_shuffle_f64x2(pairs[0], pairs[1], 0xdd));
  const __m512d high = _mm512_add_pd(_mm512_shuffle_f64x2(pairs[2], pairs[3], 0x88),
                                     _mm512_shuffle_f64x2(pairs[2], pairs[3], 0xdd));
  return _mm512_add_pd(_mm512_shuffle_f64x2(low, high, 0x88),
                       _mm512_shuffle_f64x2(low, high, 0xdd));
}

FA_INLINE VecU32 broadcast_u32(uint32_t x) { return _mm512_set1_epi32((int)x); }
FA_INLINE VecU32 add_u32(VecU32 a, VecU32 b) { return _mm512_add_epi32(a, b); }
FA_INLINE VecU32 xor_u32(VecU32 a, VecU32 b) { return _mm512_xor_si512(a, b); }
// Computes the 64-bit products a * b, as high and low words.
FA_INLINE void mul_wide_u32(VecU32 a, VecU32 b, VecU32* high, VecU32* low) {
  const __m512i even = _mm512_mul_epu32(a, b);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
  *low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  *high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}
// Set bit i if the low (high) 16 bits of lane i are >= threshold.
FA_INLINE uint64_t low16_ge(VecU32 a, uint32_t threshold) {
  return _mm512_cmpge_epu32_mask(_mm512_and_si512(a, _mm512_set1_epi32(0xffff)),
                                 broadcast_u32(threshold));
}
FA_INLINE uint64_t high16_ge(VecU32 a, uint32_t threshold) {
  return _mm512_cmpge_epu32_mask(_mm512_srli_epi32(a, 16), broadcast_u32(threshold));
}

// Two neighbouring bfloat16 numbers, at any even address.
struct Pair {
  uint16_t low, high;
};
// pairs[i] = (low[i], high[i]) for i < 32. Where a bit of low_bits (high_bits) is not set, nothing
// is read and that half is 0.
FA_INLINE void pair_rows(const uint16_t* low, uint64_t low_bits, const uint16_t* high,
                         uint64_t high_bits, Pair* pairs) {
  const __m512i a = _mm512_maskz_loadu_epi16((__mmask32)low_bits, low);
  const __m512i b = _mm512_maskz_loadu_epi16((__mmask32)high_bits, high);
  // Interleaves the words of a and b: word 2 i of the first vector is a[i], word 2 i + 1 is b[i].
  const __m512i both = _mm512_set1_epi32(1 << 16 | 1);
  const __m512i first =
      _mm512_add_epi32(_mm512_mullo_epi32(iota_u32(), both), _mm512_set1_epi32(32 << 16));
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(16 << 16 | 16));
  _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(a, first, b));
  _mm512_storeu_si512(pairs + 16, _mm512_permutex2var_epi16(a, second, b));
}
// dst[i] = src[i] for i < count, 0 from there to `padded`, a multiple of 32.
FA_INLINE void copy_words(const uint16_t* src, int64_t count, int64_t padded, uint16_t* dst) {
  for (int64_t i = 0; i < padded; i += 32) {
    const int64_t left = count - i;
    const __mmask32 valid = left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1;
    _mm512_storeu_si512(dst + i, _mm512_maskz_loadu_epi16(valid, src + i));
  }
}

}  // namespace
}  // namespace fused_attention
