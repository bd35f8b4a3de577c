// Dropout by Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a
// pure function of (seed, offset, head, row, column).
//
// counter = (column // 8, row, batch * Hq + head, offset), key = seed, where groups of eight
// columns, rows and heads are counted from dropout_group, dropout_row and dropout_head of the call.
// The 128 bits of one counter are the 16-bit values of eight neighbouring columns, low bits first.
#pragma once

#include "masking.cuh"

namespace fused_attention::cuda {

// x <- philox4x32_10(counter = x, key = seed)
FA_DEVICE void philox4x32(uint32_t (&x)[4], uint64_t seed) {
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = (uint64_t)x[0] * 0xD2511F53u, product1 = (uint64_t)x[2] * 0xCD9E8D57u;
    x[0] = (uint32_t)(product1 >> 32) ^ x[1] ^ key0;
    x[2] = (uint32_t)(product0 >> 32) ^ x[3] ^ key1;
    x[1] = (uint32_t)product1;
    x[3] = (uint32_t)product0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// The seed and offset of a call, and the place where its dropout mask begins.
struct Dropout {
  uint64_t seed;
  uint32_t offset, matrix, threshold, row, group;
};
FA_DEVICE Dropout dropout_of(const KernelParams& p, int b, int h) {
  if (p.dropout_threshold == 0) return {};
  return {
      (uint64_t)p.philox[0], (uint32_t)p.philox[1], (uint32_t)(b * (int)p.Hq + h) + p.dropout_head,
      p.dropout_threshold,   p.dropout_row,         p.dropout_group};
}

// Bit j of the result: whether the weight of column 8 * group + j is kept.
FA_DEVICE uint32_t kept_byte(const Dropout& dropout, int query, int group) {
  uint32_t x[4] = {(uint32_t)group, (uint32_t)query, dropout.matrix, dropout.offset};
  philox4x32(x, dropout.seed);
  uint32_t kept = 0;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    kept |= (uint32_t)((x[word] & 0xffff) >= dropout.threshold) << (2 * word);
    kept |= (uint32_t)((x[word] >> 16) >= dropout.threshold) << (2 * word + 1);
  }
  return kept;
}

// Finds which weights of this lane's two rows of accumulators are kept: bit 2 n + e of keep[0] and
// keep[1]. Lanes that need the same draws share the work and exchange the bytes. `row` is the row
// of the accumulators' first element and `column` the first column of the tile: a query and a key,
// or (kTransposed) a key and a query.
template <int kColumns, bool kTransposed>
FA_DEVICE void dropout_keep_bits(const Dropout& dropout, int row, int column, uint32_t (&keep)[2]) {
  const int g = lane_row(), t = threadIdx.x % 4;
  // If rows are queries, four lanes share two rows of kColumns / 8 bytes each. If rows are keys,
  // eight lanes share kColumns / 4 columns, each with one byte for the upper and one for the lower
  // eight rows.
  constexpr int kSharing = kTransposed ? 8 : 4;
  constexpr int kBytes = kTransposed ? kColumns / 4 * 2 : kColumns / 8 * 2;
  constexpr int kOwn = (kBytes + kSharing - 1) / kSharing;
  static_assert(kOwn <= 4);
  const int mine = kTransposed ? g : t;
  uint32_t bytes = 0;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int number = mine + kSharing * j, half = number % 2, at = number / 2;
    const int query = kTransposed ? column + at / 2 * 8 + 2 * t + at % 2 : row + 8 * half + g;
    const int group = kTransposed ? row / 8 + half : column / 8 + at;
    if (number < kBytes) {
      const uint32_t byte =
          kept_byte(dropout, query + (int)dropout.row, group + (int)dropout.group);
      bytes |= byte << (8 * j);
    }
  }
  keep[0] = keep[1] = 0;
#pragma unroll
  for (int other = 0; other < kSharing; ++other) {
    const uint32_t theirs = __shfl_xor_sync(~0u, bytes, kTransposed ? 4 * other : other);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int number = (mine ^ other) + kSharing * j, half = number % 2, at = number / 2;
      const uint32_t byte = theirs >> (8 * j) & 0xff;
      const uint32_t bits = kTransposed ? (byte >> g & 1) << at : (byte >> (2 * t) & 3) << (2 * at);
      if (number < kBytes) (half ? keep[1] : keep[0]) |= bits;
    }
  }
}

}  // namespace fused_attention::cuda
