// The tile vocabulary in plain C++: what proves the AMX kernels on machines without AMX. Only as
// fast as that needs.

struct EmulatedTile {
  uint32_t rows[16][16];
};
static __thread EmulatedTile tiles[8];
static __thread bool tiles_configured;

FA_INLINE void begin_tiles() { tiles_configured = true; }
FA_INLINE void end_tiles() { tiles_configured = false; }

// The processor raises an exception where the tiles are not configured.
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
template <int kC, int kA, int kB>
FA_INLINE void tile_dot() {
  EmulatedTile &c = tile(kC), &a = tile(kA), &b = tile(kB);
  const auto number = [](uint32_t bits) {
    // Subnormal numbers count as 0.
    if ((bits & 0x7f800000) == 0) bits = 0;
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
  };
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      const float low = number(a.rows[m][k] << 16), high = number(a.rows[m][k] & 0xffff0000);
      for (int n = 0; n < 16; ++n) {
        float sum;
        __builtin_memcpy(&sum, &c.rows[m][n], sizeof sum);
        sum += low * number(b.rows[k][n] << 16);
        sum += high * number(b.rows[k][n] & 0xffff0000);
        __builtin_memcpy(&c.rows[m][n], &sum, sizeof sum);
      }
    }
  }
}
