// The vocabulary of AMX tiles: 8 registers, each a matrix of 16 rows of 64 bytes. It is inline
// assembly, because GCC 12's intrinsics declare neither what ldtilecfg reads nor that loads and
// stores touch memory.
#pragma once

#include "simd_avx512.inl"

#define FUSED_ATTENTION_AMX_PRODUCTS 1

namespace fused_attention {
namespace {

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// The configuration belongs to a thread, and other libraries change it. So it is loaded before
// every task and released after it.
FA_INLINE void begin_tiles() {
  static const TileConfiguration configuration;
  asm volatile("ldtilecfg %0" ::"m"(configuration));
}
FA_INLINE void end_tiles() { asm volatile("tilerelease" ::); }

template <int kTile>
FA_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// Row r of the AMX tile lies at p + r * row_bytes.
template <int kTile>
FA_INLINE void tile_load(const void* p, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kTile>
FA_INLINE void tile_store(void* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(kTile) : "memory");
}
// c [16][16 floats] += a [16][32 bfloat16] b [16 pairs of rows][16 pairs]
template <int kC, int kA, int kB>
FA_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

}  // namespace
}  // namespace fused_attention
