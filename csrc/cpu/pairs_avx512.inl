// Products of pairs of bfloat16 on AVX512-BF16: each float lane adds two products at once. The
// processor takes subnormal numbers (below 1.2e-38) for 0.

// Two neighbouring bfloat16 numbers, at any even address.
struct Pair {
  uint16_t low, high;
};
struct PairVec {
  __m512bh bits;  // 16 pairs
};

FA_INLINE PairVec load(const Pair* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
FA_INLINE void store(Pair* p, PairVec a) { _mm512_storeu_si512(p, (__m512i)a.bits); }
FA_INLINE PairVec broadcast(Pair x) {
  int bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return {(__m512bh)_mm512_set1_epi32(bits)};
}
FA_INLINE __m512 fma(PairVec a, PairVec b, __m512 c) { return _mm512_dpbf16_ps(c, a.bits, b.bits); }

constexpr Pair kOnes = {0x3f80, 0x3f80};

// Lane i: (low[i], high[i]), each the next bfloat16 (of two, the larger in magnitude). Not for NaN,
// which the addition may turn into a number.
FA_INLINE PairVec round_to_pair(__m512 low, __m512 high) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i a = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(low), half), 16);
  const __m512i b = _mm512_add_epi32(_mm512_castps_si512(high), half);
  return {(__m512bh)_mm512_mask_mov_epi16(a, 0xaaaaaaaa, b)};
}
// Each the nearest bfloat16, NaN for NaN.
FA_INLINE void store_rounded(uint16_t* dst, __m512 x) {
  _mm256_storeu_si256((__m256i*)dst, (__m256i)_mm512_cvtneps_pbh(x));
}
// pairs[i] = (low[i], high[i]) for i < 32; where a bit is not set nothing is read, and it is 0.
FA_INLINE void pair_rows(const uint16_t* low, uint64_t low_bits, const uint16_t* high,
                         uint64_t high_bits, Pair* pairs) {
  const __m512i a = _mm512_maskz_loadu_epi16((__mmask32)low_bits, low);
  const __m512i b = _mm512_maskz_loadu_epi16((__mmask32)high_bits, high);
  // Words of a and b in turn: word 2 i of the first vector is a[i], word 2 i + 1 is b[i].
  const __m512i both = _mm512_set1_epi32(1 << 16 | 1);
  const __m512i first =
      _mm512_add_epi32(_mm512_mullo_epi32(iota_u32(), both), _mm512_set1_epi32(32 << 16));
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(16 << 16 | 16));
  _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(a, first, b));
  _mm512_storeu_si512(pairs + 16, _mm512_permutex2var_epi16(a, second, b));
}
