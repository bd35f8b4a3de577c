// Helpers for kernels whose vector lanes run along a row. They take a row one word, 64 columns, at
// a time: 64 bits hold the visibility of a word.
#pragma once

#include "masking.inl"

namespace fused_attention {
namespace {

constexpr int kWord = 64;
// The accumulators of a reduction: enough to hide the latency of an addition.
constexpr int kChains = 4;

// Returns elements [j, j + kWord) of a row of `count`: in place, or at the ragged edge in `staged`,
// padded with zeros.
template <typename Element>
FA_INLINE const Element* whole_word(const Element* row, int64_t j, int64_t count, Element* staged) {
  if (j + kWord <= count) return row + j;
  fill(staged, kWord, (Element)0);
  __builtin_memcpy(staged, row + j, (size_t)(count - j) * sizeof(Element));
  return staged;
}
// begin_word returns where to write elements [j, j + kWord): in place, or at the ragged edge in
// `staged`. end_word then copies the valid part of `staged` to the row.
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
// Calls f(i, chain) for each vector of a word; i is the first column of the vector.
template <typename T, typename F>
FA_INLINE void each_vector(F f) {
  constexpr int W = kLanes<T>;
  static_assert(kWord % (kChains * W) == 0, "the chains take turns");
  for (int i = 0; i < kWord; i += kChains * W) {
    for (int chain = 0; chain < kChains; ++chain) f(i + chain * W, chain);
  }
}
// Returns the bits of word j / kWord of a row of `count` columns: all are set if `bits` is null,
// and none past the end.
FA_INLINE uint64_t word_bits(const uint64_t* bits, int64_t j, int64_t count) {
  return (bits == nullptr ? ~(uint64_t)0 : bits[j / kWord]) & low_bits(count - j);
}

// Sets bit i of visible[w] if element 64 w + i of the mask is not 0.
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
