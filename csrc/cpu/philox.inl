// Dropout by Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a
// pure function of (seed, offset, head, row, column), so any tile is drawn on its own, in any
// order.
//
// counter = (column // 8, row, batch * Hq + head, offset), key = seed. A call may start to number
// its columns, rows and heads elsewhere than at 0 (dropout_group, dropout_row, dropout_head). The
// 128 bits of one Philox call are the 16-bit values of eight neighbouring columns, low bits first.
#pragma once

#include "sequence.inl"

namespace fused_attention {
namespace {

// x[0..3] <- philox4x32_10(counter = x, key = seed)
FA_INLINE void philox4x32(VecU32* x, uint64_t seed) {
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    VecU32 high0, low0, high1, low1;
    mul_wide_u32(x[0], broadcast_u32(0xD2511F53u), &high0, &low0);
    mul_wide_u32(x[2], broadcast_u32(0xCD9E8D57u), &high1, &low1);
    x[0] = xor_u32(xor_u32(high1, x[1]), broadcast_u32(key0));
    x[2] = xor_u32(xor_u32(high0, x[3]), broadcast_u32(key1));
    x[1] = low1;
    x[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// The random stream of the weights of one head. Heads are numbered through the batch of a sample.
struct PhiloxStream {
  uint64_t seed;
  uint32_t offset, head;
};
template <typename Params>
FA_INLINE PhiloxStream philox_stream(const Params& p, int64_t head) {
  if (p.philox_states == nullptr) return {p.philox_seed, p.philox_offset, (uint32_t)head};
  const int64_t* state = p.philox_states + head / p.sample_heads * 2;
  return {(uint64_t)state[0], (uint32_t)state[1], (uint32_t)(head % p.sample_heads)};
}

FA_INLINE PhiloxStream attention_stream(const AttentionParams& p, int64_t b, int64_t h) {
  PhiloxStream stream = philox_stream(p, b * p.Hq + h);
  stream.head += p.dropout_head;
  return stream;
}

// Sets bit i of keep[j] if dropout keeps the weight of query i and key j of the tile, whose n_start
// is a multiple of 8. Whole groups of 8 columns are written.
void dropout_keep_bits(const AttentionParams& p, const ScoreTile& tile, uint64_t* keep) {
  const PhiloxStream stream = attention_stream(p, tile.seq.b, tile.h);
  const uint32_t first_group = (uint32_t)(tile.n_start / 8) + p.dropout_group;
  const uint32_t first_row = (uint32_t)tile.m_start + p.dropout_row;
  for (int64_t group = 0; group < tile.columns; group += 8) {
    fill(keep + group, 8, (uint64_t)0);
    for (int64_t i = 0; i < tile.rows; i += kU32Lanes) {
      VecU32 x[4] = {broadcast_u32(first_group + (uint32_t)(group / 8)),
                     add_u32(broadcast_u32(first_row + (uint32_t)i), iota_u32()),
                     broadcast_u32(stream.head), broadcast_u32(stream.offset)};
      philox4x32(x, stream.seed);
      for (int word = 0; word < 4; ++word) {
        keep[group + 2 * word] |= low16_ge(x[word], p.dropout_threshold) << i;
        keep[group + 2 * word + 1] |= high16_ge(x[word], p.dropout_threshold) << i;
      }
    }
  }
}

// Transposes a matrix of 8 x 8 bits: bit 8 i + j <-> bit 8 j + i (Warren, Hacker's Delight, 7-3).
FA_INLINE uint64_t transpose_bits(uint64_t x) {
  uint64_t t = (x ^ x >> 7) & 0x00aa00aa00aa00aau;
  x ^= t ^ t << 7;
  t = (x ^ x >> 14) & 0x0000cccc0000ccccu;
  x ^= t ^ t << 14;
  t = (x ^ x >> 28) & 0x00000000f0f0f0f0u;
  return x ^ t ^ t << 28;
}

// Draws one row from column `first` (a multiple of 8) on; the lanes run over its groups of 8
// columns. Bit i of keep[w] says whether the weight in column first + 64 w + i is kept. Whole
// vectors of groups are written, at most kKeepSlack words more than the columns need.
constexpr int64_t kKeepSlack = 2;
[[maybe_unused]] void dropout_keep_row(PhiloxStream stream, uint32_t threshold, uint32_t row,
                                       int64_t first, int64_t columns, uint64_t* keep) {
  constexpr int kAtOnce = kU32Lanes < 8 ? kU32Lanes : 8;
  fill(keep, ceil_div(columns, 64) + kKeepSlack, (uint64_t)0);
  for (int64_t group = 0; group * 8 < columns; group += kU32Lanes) {
    VecU32 x[4] = {add_u32(broadcast_u32((uint32_t)(first / 8 + group)), iota_u32()),
                   broadcast_u32(row), broadcast_u32(stream.head), broadcast_u32(stream.offset)};
    philox4x32(x, stream.seed);
    uint64_t kept[8];  // bit g: column j of group g
    for (int word = 0; word < 4; ++word) {
      kept[2 * word] = low16_ge(x[word], threshold);
      kept[2 * word + 1] = high16_ge(x[word], threshold);
    }
    for (int g = 0; g < kU32Lanes; g += kAtOnce) {
      uint64_t square = 0;
      for (int j = 0; j < 8; ++j) square |= (kept[j] >> g & 0xff) << (8 * j);
      keep[(group + g) / 8] |= transpose_bits(square) << ((group + g) % 8 * 8);
    }
  }
}

// s <- s where kept, 0 elsewhere
template <typename T, int kVectors>
void drop(const uint64_t* keep, int64_t columns, T* s) {
  constexpr int W = kLanes<T>, kRow = kVectors * W;
  for (int64_t j = 0; j < columns; ++j) {
    for (int x = 0; x < kVectors; ++x) {
      T* at = s + j * kRow + x * W;
      store(at, select_bits(keep[j] >> (x * W), load(at), broadcast((T)0)));
    }
  }
}

// Writes the dropout mask itself, one byte per weight. Task: one row of one head.
struct DropoutKeepMask {
  static int64_t num_tasks(const AttentionParams& p) { return p.B * p.Hq * p.Sq; }
  static size_t workspace_bytes(const AttentionParams&) { return kBlockN * sizeof(uint64_t); }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    uint64_t* keep = (uint64_t*)workspace;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / p.Sq, row = task % p.Sq;
      const Sequence seq = sequence_of(p, head / p.Hq);
      for (int64_t n = 0; n < p.Sk; n += kBlockN) {
        const int64_t columns = min_of(kBlockN, p.Sk - n);
        dropout_keep_bits(p, {seq, head % p.Hq, row, 1, n, columns}, keep);
        for (int64_t j = 0; j < columns; ++j) p.dropout_keep[task * p.Sk + n + j] = keep[j] & 1;
      }
    }
  }
};

}  // namespace
}  // namespace fused_attention
