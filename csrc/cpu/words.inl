// Rows along the vector lanes, one word of 64 columns at a time: its visibility is a 64-bit word.
#pragma once

#include "masking.inl"

namespace fused_attention {
namespace {

constexpr int kWord = 64;
// Accumulators of a reduction: enough to hide the latency of an addition.
constexpr int kChains = 4;

// Elements [j, j + kWord) of a row of `count`: in place, or from its end a copy padded with zeros.
template <typename Element>
FA_INLINE const Element* whole_word(const Element* row, int64_t j, int64_t count, Element* staged) {
  if (j + kWord <= count) return row + j;
  fill(staged, kWord, (Element)0);
  __builtin_memcpy(staged, row + j, (size_t)(count - j) * sizeof(Element));
  return staged;
}
// Where to write elements [j, j + kWord), and after that: past the end they go into the copy.
template <typename Element>
FA_INLINE Element* begin_word(Element* row, int64_t j, int64_t count, Element* staged) {
  return j + kWord <= count ? row + j : staged;
}
template <typename Element>
FA_INLINE void end_word(Element* row, int64_t j, int64_t count, const Element* staged) {
  if (j + kWord > count) {
    __builtin_memcpy(row + j, staged, (size_t)(count - j) * sizeof(Element));
  }
}
// f(i, chain) for each vector of a word, i its first column.
template <typename T, typename F>
FA_INLINE void each_vector(F f) {
  constexpr int W = kLanes<T>;
  static_assert(kWord % (kChains * W) == 0, "the chains take turns");
  for (int i = 0; i < kWord; i += kChains * W) {
    for (int chain = 0; chain < kChains; ++chain) f(i + chain * W, chain);
  }
}
// Bits of word j / kWord of a row of `count` columns: all where there are none.
FA_INLINE uint64_t word_bits(const uint64_t* bits, int64_t j, int64_t count) {
  return (bits == nullptr ? ~(uint64_t)0 : bits[j / kWord]) & low_bits(count - j);
}

// Bit i of visible[w]: column 64 w + i is not hidden by the mask.
void mask_row_bits(const uint8_t* mask, int64_t step, int64_t columns, uint64_t* visible) {
  uint8_t staged[kWord];
  for (int64_t j = 0; j < columns; j += kWord) {
    if (step == 1) {
      visible[j / kWord] = nonzero_bytes(whole_word(mask, j, columns, staged));
    } else {
      for (int i = 0; i < kWord; ++i) staged[i] = j + i < columns ? mask[(j + i) * step] : 0;
      visible[j / kWord] = nonzero_bytes(staged);
    }
  }
}

}  // namespace
}  // namespace fused_attention
