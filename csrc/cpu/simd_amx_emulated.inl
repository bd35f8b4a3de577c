// The vocabulary of AMX tiles in plain C++, which tests the AMX kernels on machines without AMX. It
// is only as fast as the tests need.
#pragma once

#include "simd_avx512.inl"

#define FUSED_ATTENTION_AMX_PRODUCTS 1

namespace fused_attention {
namespace {

struct EmulatedTile {
  uint32_t rows[16][16];
};
static __thread EmulatedTile tiles[8];
static __thread bool tiles_configured;

FA_INLINE void begin_tiles() { tiles_configured = true; }
FA_INLINE void end_tiles() { tiles_configured = false; }

// Traps if the AMX tiles are not configured, like the processor.
FA_INLINE EmulatedTile& tile(int number) {
  if (!tiles_configured) __builtin_trap();
  return tiles[number];
}
template <int kTile>
FA_INLINE void tile_zero() {
  tile(kTile) = EmulatedTile();
}
template <int kTile>
FA_INLINE void tile_load(const void* p, int64_t row_bytes) {
  for (int r = 0; r < 16; ++r) {
    __builtin_memcpy(tile(kTile).rows[r], (const char*)p + r * row_bytes, 64);
  }
}
template <int kTile>
FA_INLINE void tile_store(void* p, int64_t row_bytes) {
  for (int r = 0; r < 16; ++r) {
    __builtin_memcpy((char*)p + r * row_bytes, tile(kTile).rows[r], 64);
  }
}
// Subnormal numbers count as 0.
FA_INLINE float number(uint32_t bits) {
  return __builtin_bit_cast(float, (bits & 0x7f800000) == 0 ? 0 : bits);
}
template <int kC, int kA, int kB>
FA_INLINE void tile_dot() {
  EmulatedTile &c = tile(kC), &a = tile(kA), &b = tile(kB);
  for (int k = 0; k < 16; ++k) {
    float low[16], high[16];
    for (int n = 0; n < 16; ++n) {
      low[n] = number(b.rows[k][n] << 16);
      high[n] = number(b.rows[k][n] & 0xffff0000);
    }
    for (int m = 0; m < 16; ++m) {
      const float a_low = number(a.rows[m][k] << 16), a_high = number(a.rows[m][k] & 0xffff0000);
      for (int n = 0; n < 16; ++n) {
        float sum = __builtin_bit_cast(float, c.rows[m][n]);
        sum += a_low * low[n];
        sum += a_high * high[n];
        c.rows[m][n] = __builtin_bit_cast(uint32_t, sum);
      }
    }
  }
}

}  // namespace
}  // namespace fused_attention
