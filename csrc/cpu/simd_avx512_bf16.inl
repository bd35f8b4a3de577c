// Products of pairs of bfloat16 on AVX512-BF16: each float lane adds two products at once. The
// processor takes subnormal numbers (below 1.2e-38) for 0.
#pragma once

#include "simd_avx512.inl"

#define FUSED_ATTENTION_PAIR_PRODUCTS 1

namespace fused_attention {
namespace {

struct PairVec {
  __m512bh bits;  // 16 pairs
};

FA_INLINE PairVec load(const Pair* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
FA_INLINE void store(Pair* p, PairVec a) { _mm512_storeu_si512(p, (__m512i)a.bits); }
FA_INLINE PairVec broadcast(Pair x) {
  int bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  __m512i all = _mm512_set1_epi32(bits);
#if defined(__clang__) && __clang_major__ == 16
  __asm__("" : "+v"(all));  // clang 16 crashes when it moves a broadcast across the cast below
#endif
  return {(__m512bh)all};
}
FA_INLINE __m512 fma(PairVec a, PairVec b, __m512 c) { return _mm512_dpbf16_ps(c, a.bits, b.bits); }

constexpr Pair kOnes = {0x3f80, 0x3f80};

// Lane i becomes (low[i], high[i]), each rounded to the nearest bfloat16 (ties away from 0). Not
// for NaN, which the addition may turn into a number.
FA_INLINE PairVec round_to_pair(__m512 low, __m512 high) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i a = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(low), half), 16);
  const __m512i b = _mm512_add_epi32(_mm512_castps_si512(high), half);
  return {(__m512bh)_mm512_mask_mov_epi16(a, 0xaaaaaaaa, b)};
}
// Stores each number as the nearest bfloat16, and NaN as NaN.
FA_INLINE void store_rounded(uint16_t* dst, __m512 x) {
  _mm256_storeu_si256((__m256i*)dst, (__m256i)_mm512_cvtneps_pbh(x));
}

}  // namespace
}  // namespace fused_attention
