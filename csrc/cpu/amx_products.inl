// Attention's products on AMX tiles, which multiply bfloat16 and accumulate in float.
//
// A number is decomposed into kPlanes bfloat16 planes: one plane rounds the number, two hold a
// float16 exactly and a float to 2^-17, three hold a float exactly. A product of numbers is then a
// sum of products of planes i and j, the small ones first. Products of order i + j >= kPlanes are
// left out: 1, 3 or 6 remain. Three planes are as accurate as float arithmetic. A plane below
// 1.2e-38 counts as 0.
//
// s^T = K q^T reads K by rows, o^T = V^T p^T reads V by columns. Both are decomposed once for every
// query and head that reads them, block by block, padded with zeros to whole AMX tiles: with many
// heads by the task that has all queries of a key head, else by a phase of its own, into
// p.call_workspace. Products with V wait until the weights of kPending tiles are there, so that the
// AMX tiles of o are loaded and stored less often.
#pragma once

#ifndef FUSED_ATTENTION_ISA  // the file is opened alone
#define FUSED_ATTENTION_ISA amx
#endif
#include "vector_products.inl"

namespace fused_attention {
namespace {

constexpr int64_t kTileRows = 16, kTileDepth = 32;  // a [16][32] times b [32][16]

// planes[0] + planes[1] + ... = x. Each plane has a bfloat16 in its upper half; the last one is
// rounded. An infinity or NaN is in the first plane, and the others are 0.
template <int kPlanes>
FA_INLINE void decompose(__m512 x, __m512i (&planes)[kPlanes]) {
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000), half = _mm512_set1_epi32(0x8000);
  x = _mm512_add_ps(x, _mm512_setzero_ps());  // a quiet NaN survives the loss of its lower half
  const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(x), broadcast(kInf<float>), _CMP_LT_OQ);
  __m512 rest = x;
  for (int i = 0; i < kPlanes - 1; ++i) {
    planes[i] = _mm512_and_si512(_mm512_castps_si512(rest), upper);
    rest = _mm512_maskz_sub_ps(finite, rest, _mm512_castsi512_ps(planes[i]));
  }
  const __m512i bits = _mm512_castps_si512(rest);
  planes[kPlanes - 1] = _mm512_and_si512(_mm512_mask_add_epi32(bits, finite, bits, half), upper);
}

// Does the same for numbers that are finite, or whose NaN is kept elsewhere (in the row sum).
template <int kPlanes>
FA_INLINE void decompose_finite(__m512 x, __m512i (&planes)[kPlanes]) {
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000), half = _mm512_set1_epi32(0x8000);
  for (int i = 0; i < kPlanes - 1; ++i) {
    planes[i] = _mm512_and_si512(_mm512_castps_si512(x), upper);
    x = _mm512_sub_ps(x, _mm512_castsi512_ps(planes[i]));
  }
  planes[kPlanes - 1] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), upper);
}

// A matrix of bfloat16 in planes; `row` and `plane` are strides in elements.
template <typename Element>
struct PlanesOf {
  Element* data;
  int64_t row, plane;
  PlanesOf at(int64_t r) const { return {data + r * row, row, plane}; }
};

// Decomposes one row of `count` floats (a multiple of 16), each plane narrowed to bfloat16.
template <int kPlanes>
void decompose_row(const float* src, int64_t count, PlanesOf<uint16_t> dst) {
  for (int64_t i = 0; i < count; i += 16) {
    __m512i planes[kPlanes];
    decompose(load(src + i), planes);
    for (int n = 0; n < kPlanes; ++n) {
      _mm256_storeu_si256((__m256i*)(dst.data + n * dst.plane + i),
                          _mm512_cvtepi32_epi16(_mm512_srli_epi32(planes[n], 16)));
    }
  }
}

// dst[x] = (low[x], high[x]) in each plane, for one vector
template <int kPlanes>
FA_INLINE void store_pairs(const __m512i (&low)[kPlanes], const __m512i (&high)[kPlanes],
                           PlanesOf<uint32_t> dst) {
  for (int n = 0; n < kPlanes; ++n) {
    const __m512i pair = _mm512_or_si512(_mm512_srli_epi32(low[n], 16), high[n]);
    _mm512_storeu_si512(dst.data + n * dst.plane, pair);
  }
}

// out[j / 2] <- rows j and j + 1 of `width` floats, paired; rows from `rows` on are 0.
template <int kPlanes>
void decompose_pairs(int64_t rows, int64_t padded_rows, int64_t width, const float* src,
                     int64_t row, PlanesOf<uint32_t> out) {
  for (int64_t j = 0; j < padded_rows; j += 2) {
    for (int64_t x = 0; x < width; x += kLanes<float>) {
      __m512i low[kPlanes] = {}, high[kPlanes] = {};
      if (j < rows) decompose(load(src + j * row + x), low);
      if (j + 1 < rows) decompose(load(src + (j + 1) * row + x), high);
      store_pairs(low, high, {out.data + j / 2 * out.row + x, out.row, out.plane});
    }
  }
}

// A slice of `depth` columns of the left factor of a product.
struct DepthSlice {
  PlanesOf<const uint16_t> a;
  int64_t depth;
};

// c [16 kA][16 kB] = (or +=) a b. The columns of a are those of `parts`, one part after another,
// its rows begin at row r; b is in pairs along the depth.
template <int kPlanes, int kOrders, int kA, int kB, bool kAccumulate>
FA_INLINE void multiply_tile_block(const DepthSlice* parts, int count, int64_t r,
                                   PlanesOf<const uint32_t> b, float* c, int64_t c_row) {
  const int64_t c_bytes = c_row * 4, b_bytes = b.row * 4;
  float* c_at[2][2] = {{c, c + 16}, {c + kTileRows * c_row, c + kTileRows * c_row + 16}};
  if (kAccumulate) {
    tile_load<0>(c_at[0][0], c_bytes);
    if (kB == 2) tile_load<1>(c_at[0][1], c_bytes);
    if (kA == 2) tile_load<2>(c_at[1][0], c_bytes);
    if (kA == 2 && kB == 2) tile_load<3>(c_at[1][1], c_bytes);
  } else {
    tile_zero<0>();
    if (kB == 2) tile_zero<1>();
    if (kA == 2) tile_zero<2>();
    if (kA == 2 && kB == 2) tile_zero<3>();
  }
  for (int order = kOrders - 1; order >= 0; --order) {
    for (int i = order < kPlanes ? order : kPlanes - 1; i >= 0 && order - i < kPlanes; --i) {
      const uint32_t* b_at = b.data + (order - i) * b.plane;
      for (int part = 0; part < count; ++part) {
        const PlanesOf<const uint16_t> a = parts[part].a.at(r);
        const uint16_t* a_at = a.data + i * a.plane;
        for (int64_t k = 0; k < parts[part].depth; k += kTileDepth) {
          tile_load<4>(a_at + k, a.row * 2);
          if (kA == 2) tile_load<5>(a_at + kTileRows * a.row + k, a.row * 2);
          tile_load<6>(b_at, b_bytes);
          if (kB == 2) tile_load<7>(b_at + 16, b_bytes);
          tile_dot<0, 4, 6>();
          if (kB == 2) tile_dot<1, 4, 7>();
          if (kA == 2) tile_dot<2, 5, 6>();
          if (kA == 2 && kB == 2) tile_dot<3, 5, 7>();
          b_at += kTileDepth / 2 * b.row;
        }
      }
    }
  }
  tile_store<0>(c_at[0][0], c_bytes);
  if (kB == 2) tile_store<1>(c_at[0][1], c_bytes);
  if (kA == 2) tile_store<2>(c_at[1][0], c_bytes);
  if (kA == 2 && kB == 2) tile_store<3>(c_at[1][1], c_bytes);
}

// c [rows][16 kVectors] = (or +=) a b; rows and depths are whole AMX tiles.
template <int kPlanes, int kOrders, int kVectors, bool kAccumulate>
void multiply_amx(int64_t rows, const DepthSlice* parts, int count, PlanesOf<const uint32_t> b,
                  float* c, int64_t c_row) {
  static_assert(kVectors <= 2, "as many tiles of b as there are registers for");
  int64_t r = 0;
  for (; r + 2 * kTileRows <= rows; r += 2 * kTileRows) {
    multiply_tile_block<kPlanes, kOrders, 2, kVectors, kAccumulate>(parts, count, r, b,
                                                                    c + r * c_row, c_row);
  }
  if (r < rows) {
    multiply_tile_block<kPlanes, kOrders, 1, kVectors, kAccumulate>(parts, count, r, b,
                                                                    c + r * c_row, c_row);
  }
}

bool all_finite(const float* x, int64_t count) {
  Vec<float> top = broadcast(0.0f);  // becomes NaN at a NaN or infinity x, where 0 * x is NaN
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    top = fma(load(x + i), broadcast(0.0f), top);
  }
  return reduce_add(top) == 0;
}

// kBlockN keys and values of one key head, in planes.
template <int kPlanes>
struct DecomposedBlock {
  PlanesOf<uint16_t> k;    // [kBlockN][depth]
  PlanesOf<uint16_t> v_t;  // [Dv][kBlockN]
  bool *k_finite, *v_finite;

  static int64_t depth(const AttentionParams& p) { return round_up(p.D, kTileDepth); }
  static int64_t depth_v(const AttentionParams& p) { return round_up(p.Dv, kTileRows); }
  static int64_t bytes(const AttentionParams& p) {
    const int64_t elements = kPlanes * kBlockN * (depth(p) + depth_v(p));
    return round_up(elements * (int64_t)sizeof(uint16_t) + 2, 64);
  }
  DecomposedBlock(const AttentionParams& p, char* blocks, int64_t number) {
    k = {(uint16_t*)(blocks + number * bytes(p)), depth(p), kBlockN * depth(p)};
    v_t = {k.data + kPlanes * k.plane, kBlockN, kBlockN * depth_v(p)};
    k_finite = (bool*)(v_t.data + kPlanes * v_t.plane);
    v_finite = k_finite + 1;
  }
  static int64_t tile_size(const AttentionParams& p) {
    return kBlockN * max_of(depth(p), depth_v(p));
  }
  // Fills the block with the keys and values from n_start on, by way of two tiles of scratch
  // memory.
  void fill(const AttentionParams& p, const Sequence& seq, int64_t h_kv, int64_t n_start,
            float* tile, float* tile_t) const;
  void move(const AttentionParams& p, const Sequence& seq, int64_t h_kv, int64_t n_start,
            Pair* pairs) const;
};

// out[j] <- tile[j], `width` floats padded with zeros to `depth`, for each row of a tile
template <int kPlanes>
void split_rows(int64_t rows, int64_t width, int64_t depth, const float* tile,
                PlanesOf<uint16_t> out) {
  for (int64_t j = 0; j < rows; ++j) {
    const PlanesOf<uint16_t> row = out.at(j);
    decompose_row<kPlanes>(tile + j * width, width, row);
    for (int n = 0; n < kPlanes; ++n) {
      fill(row.data + n * row.plane + width, depth - width, (uint16_t)0);
    }
  }
}
// v_t[d][j] <- v[j][d] for one tile of kBlockN keys
template <int kPlanes>
void split_values(int64_t width, const float* tile, float* tile_t, PlanesOf<uint16_t> v_t) {
  transpose_tile(kBlockN, width, tile, width, tile_t, kBlockN);
  for (int64_t d = 0; d < width; ++d)
    decompose_row<kPlanes>(tile_t + d * kBlockN, kBlockN, v_t.at(d));
}

template <int kPlanes>
void DecomposedBlock<kPlanes>::fill(const AttentionParams& p, const Sequence& seq, int64_t h_kv,
                                    int64_t n_start, float* tile, float* tile_t) const {
  if (kPlanes == 1 && p.dtype == DType::kBFloat16) return move(p, seq, h_kv, n_start, (Pair*)tile);
  const int64_t columns = min_of(kBlockN, seq.Sk - n_start);
  const KeyTile keys = {seq, h_kv, n_start, columns};
  load_key_tile(tile, p, p.key, keys, p.D, nullptr, kBlockN);
  *k_finite = all_finite(tile, kBlockN * round_up(p.D, kLanes<float>));
  split_rows<kPlanes>(kBlockN, round_up(p.D, kLanes<float>), depth(p), tile, k);
  load_key_tile(tile, p, p.value, keys, p.Dv, nullptr, kBlockN);
  *v_finite = all_finite(tile, kBlockN * depth_v(p));
  split_values<kPlanes>(depth_v(p), tile, tile_t, v_t);
}
// Does the same for bfloat16 in one plane: words are moved, nothing is rounded.
template <int kPlanes>
void DecomposedBlock<kPlanes>::move(const AttentionParams& p, const Sequence& seq, int64_t h_kv,
                                    int64_t n_start, Pair* pairs) const {
  const int64_t columns = min_of(kBlockN, seq.Sk - n_start);
  const int64_t rows = round_up(columns, kTileDepth) / 2, row = paired_rows_width(p.Dv);
  for (int64_t j = 0; j < 2 * rows; ++j) {
    const bool exists = j < columns;
    const char* key = key_row(p, p.key, seq, h_kv, n_start + (exists ? j : 0));
    copy_words((const uint16_t*)key, exists ? p.D : 0, depth(p), k.at(j).data);
  }
  pair_rows_of_keys(p, p.value, {seq, h_kv, n_start, columns}, p.Dv, nullptr, pairs);
  for (int64_t i = ceil_div(columns, 2) * row; i < rows * row; ++i) pairs[i] = Pair{0, 0};
  *v_finite = all_finite(pairs, rows * row);
  transpose_tile(rows, depth_v(p), (const float*)pairs, row, (float*)v_t.data, kBlockN / 2);
}

// kScoreOrders: how many orders i + j of products of planes are summed in q k. The lse of float16
// inputs is a float, and needs all of them.
//
// Queries, keys and values that are not finite are multiplied by `VectorProducts`, because planes
// of 0 would turn an infinity into NaN. A hidden value that is not finite counts as 0 if no query
// of the tile sees it.
template <int kPlanes, int kScoreOrders = kPlanes>
struct AmxProducts {
  using T = float;
  using Split = DecomposedBlock<kPlanes>;
  static constexpr int kQueryVectors = 2;
  static constexpr int64_t M = kQueryVectors * kLanes<float>;
  static constexpr bool kRounds = kPlanes == 1;
  static constexpr int kPending = 4;
  VectorProducts<float> on_vectors;  // holds the queries as floats
  PlanesOf<uint32_t> q_pairs;        // [depth / 2][queries]
  PlanesOf<uint32_t> p_pairs;        // the pending weights: [kPending * kBlockN / 2][queries]
  uint64_t odd_queries;              // a bit for each query that is not finite
  float* odd_scores;                 // [kBlockN][queries]
  DepthSlice parts[kPending];        // the pending columns of v
  int pending = 0;
  int64_t pending_keys = 0;
  float *tile, *tile_t;         // [kBlockN][D or Dv], and transposed
  PlanesOf<uint16_t> v_planes;  // [kPending][Dv][kBlockN], hidden values are 0
  char* own_blocks;             // the keys and values of one head, in planes; see load_head

  static void begin() { begin_tiles(); }
  static void end() { end_tiles(); }

  static int64_t bytes_of_a_head(const AttentionParams& p) {
    return ceil_div(p.Sk, kBlockN) * Split::bytes(p);
  }
  static bool by_heads(const AttentionParams& p) { return many_heads(p, bytes_of_a_head(p)); }

  void place(const AttentionParams& p, Arena& arena) {
    on_vectors.place(p, arena);
    q_pairs.plane = Split::depth(p) / 2 * M;
    q_pairs.data = arena.take<uint32_t>(kPlanes * q_pairs.plane);
    p_pairs.plane = kPending * kBlockN / 2 * M;
    p_pairs.data = arena.take<uint32_t>(kPlanes * p_pairs.plane);
    odd_scores = arena.take<float>(kBlockN * M);
    tile = arena.take<float>(Split::tile_size(p));
    tile_t = arena.take<float>(Split::tile_size(p));
    const int64_t size = Split::depth_v(p) * kBlockN;
    v_planes = {arena.take<uint16_t>(kPending * kPlanes * size), kBlockN, size};
    own_blocks = arena.take<char>(by_heads(p) ? bytes_of_a_head(p) : 0);
  }

  Split split_of(const AttentionParams& p, const Sequence& seq, int64_t h_kv,
                 int64_t n_start) const {
    return by_heads(p) ? Split(p, own_blocks, n_start / kBlockN)
                       : Split(p, (char*)p.call_workspace,
                               key_block_number(p, seq.b, h_kv, n_start, kBlockN));
  }
  void load_head(const AttentionParams& p, const Sequence& seq, int64_t h_kv) const {
    const Range keys = visible_keys(p, seq, 0, seq.Sq);
    for (int64_t n = keys.begin / kBlockN * kBlockN; n < keys.end; n += kBlockN) {
      split_of(p, seq, h_kv, n).fill(p, seq, h_kv, n, tile, tile_t);
    }
  }

  template <int kVectors>
  void load_queries(const AttentionParams& p, const Sequence& seq, int64_t h, int64_t m_start,
                    int64_t rows) {
    constexpr int W = kLanes<float>, kRow = kVectors * W;
    const int64_t width = round_up(p.D, W), depth = Split::depth(p);
    q_pairs.row = p_pairs.row = kRow;
    if (kPlanes == 1 && p.dtype == DType::kBFloat16) {
      for (int64_t i = 0; i < kRow; ++i) {
        const int64_t token = seq.q_start + m_start + (i < rows ? i : 0);
        copy_words((const uint16_t*)row_of(p.query, p.dtype, seq.b, h, token), i < rows ? p.D : 0,
                   depth, (uint16_t*)tile + i * depth);
      }
      transpose_tile(kRow, depth / 2, tile, depth / 2, (float*)q_pairs.data, kRow);
      return;
    }
    on_vectors.template load_queries<kVectors>(p, seq, h, m_start, rows);
    odd_queries = 0;
    for (int64_t i = 0; i < rows; ++i) {
      odd_queries |= (uint64_t)!all_finite(on_vectors.q + i * width, width) << i;
    }
    decompose_pairs<kPlanes>(width, depth, kRow, on_vectors.q_t, kRow, q_pairs);
  }

  template <int kVectors>
  void scores(const AttentionParams& p, const KeyTile& keys, float* s) const {
    constexpr int W = kLanes<float>, kRow = kVectors * W;
    const int64_t columns = keys.columns;
    const Split split = split_of(p, keys.seq, keys.h, keys.n_start);
    const DepthSlice part = {{split.k.data, split.k.row, split.k.plane}, Split::depth(p)};
    multiply_amx<kPlanes, kScoreOrders, kVectors, false>(round_up(columns, kTileRows), &part, 1,
                                                         {q_pairs.data, q_pairs.row, q_pairs.plane},
                                                         s, kRow);
    if (kPlanes == 1) return;
    if (odd_queries != 0) {
      on_vectors.template scores<kVectors>(p, keys, odd_scores);
      for (int64_t j = 0; j < columns; ++j) {
        for (int x = 0; x < kVectors; ++x) {
          float* at = s + j * kRow + x * W;
          store(at,
                select_bits(odd_queries >> (x * W), load(odd_scores + j * kRow + x * W), load(at)));
        }
      }
    }
    for (int64_t j = 0; !*split.k_finite && j < columns; ++j) {
      const KeyTile key = {keys.seq, keys.h, keys.n_start + j, 1};
      load_key_tile(on_vectors.q, p, p.key, key, p.D, nullptr, 1);
      if (all_finite(on_vectors.q, round_up(p.D, kLanes<float>))) continue;
      on_vectors.template scores<kVectors>(p, key, s + j * kRow);
    }
  }

  template <int kVectors>
  void flush(const AttentionParams& p, float* acc_t) {
    if (pending == 0) return;
    multiply_amx<kPlanes, kPlanes, kVectors, true>(Split::depth_v(p), parts, pending,
                                                   {p_pairs.data, p_pairs.row, p_pairs.plane},
                                                   acc_t, p_pairs.row);
    pending = 0;
    pending_keys = 0;
  }

  // *out <- the columns of one tile of v. Returns false if a visible value is not finite.
  bool columns_of_v(const AttentionParams& p, const KeyTile& keys, const uint64_t* visible,
                    PlanesOf<uint16_t>* out) const {
    const Split split = split_of(p, keys.seq, keys.h, keys.n_start);
    *out = split.v_t;
    if (*split.v_finite) return true;
    const int64_t width = Split::depth_v(p);
    load_key_tile(tile, p, p.value, keys, p.Dv, visible, kBlockN);
    if (!all_finite(tile, kBlockN * width)) return false;
    *out = {v_planes.data + pending * kPlanes * v_planes.plane, v_planes.row, v_planes.plane};
    split_values<kPlanes>(width, tile, tile_t, *out);
    return true;
  }

  template <int kVectors>
  void accumulate(const AttentionParams& p, const KeyTile& keys, const uint64_t* visible,
                  const uint64_t* keep, Probabilities<float, kVectors> weights, float* s,
                  const RowState<float>& rows, float* acc_t) {
    constexpr int W = kLanes<float>, kRow = kVectors * W;
    const int64_t columns = keys.columns;
    if (pending == kPending) flush<kVectors>(p, acc_t);
    __m512 sum[kVectors];  // of the rounded weights
    for (int x = 0; x < kVectors; ++x) sum[x] = broadcast(0.0f);
    PlanesOf<uint16_t> values;
    if (columns_of_v(p, keys, visible, &values)) {
      uint32_t* waiting = p_pairs.data + pending_keys / 2 * kRow;
      const auto decompose_row = [&](int64_t j, int x, auto drops, __m512i(&planes)[kPlanes]) {
        decompose_finite(weights(s + j * kRow + x * W, x), planes);
        // before dropout, since the denominator counts all weights
        if (kRounds) sum[x] = add(sum[x], _mm512_castsi512_ps(planes[0]));
        if constexpr (drops.value) {
          for (__m512i& plane : planes) {
            plane = _mm512_maskz_mov_epi32((__mmask16)(keep[j] >> (x * W)), plane);
          }
        }
      };
      // Decomposes the weights of `count` keys, from j on; the rest of the pair is 0.
      const auto split_rows = [&](int64_t j, auto count, auto drops) {
        for (int x = 0; x < kVectors; ++x) {
          __m512i low[kPlanes] = {}, high[kPlanes] = {};
          if constexpr (count.value > 0) decompose_row(j, x, drops, low);
          if constexpr (count.value > 1) decompose_row(j + 1, x, drops, high);
          store_pairs(low, high, {waiting + j / 2 * kRow + x * W, kRow, p_pairs.plane});
        }
      };
      const int64_t depth = round_up(columns, kTileDepth);
      with_flag(keep != nullptr, [&](auto drops) {
        int64_t j = 0;
        for (; j + 2 <= columns; j += 2) split_rows(j, Constant<2>(), drops);
        if (j < columns) split_rows(j, Constant<1>(), drops), j += 2;
        for (; j < depth; j += 2) split_rows(j, Constant<0>(), drops);
      });
      parts[pending++] = {{values.data, values.row, values.plane}, depth};
      pending_keys += depth;
    } else {
      weights.replace(columns, s);
      for (int64_t j = 0; j < columns; ++j) {
        for (int x = 0; x < kVectors; ++x) sum[x] = add(sum[x], load(s + j * kRow + x * W));
      }
      flush<kVectors>(p, acc_t);
      on_vectors.template add_values<kVectors>(p, keys, visible, keep, s, acc_t);
    }
    weights.add_sums(rows);
    for (int x = 0; x < kVectors; ++x) {
      float* total = rows.rounded_sum + x * W;
      store(total, add(load(total), sum[x]));
    }
  }
};

// -- backward -------------------------------------------------------------------------------------

// c [rows][width] = (or +=) a b, two AMX tiles of b at a time, as many as the registers hold.
template <int kPlanes, int kOrders, bool kAccumulate>
void multiply_amx_wide(int64_t rows, DepthSlice a, PlanesOf<const uint32_t> b, int64_t width,
                       float* c, int64_t c_row) {
  int64_t x = 0;
  for (; x + 32 <= width; x += 32) {
    multiply_amx<kPlanes, kOrders, 2, kAccumulate>(rows, &a, 1, {b.data + x, b.row, b.plane}, c + x,
                                                   c_row);
  }
  if (x < width) {
    multiply_amx<kPlanes, kOrders, 1, kAccumulate>(rows, &a, 1, {b.data + x, b.row, b.plane}, c + x,
                                                   c_row);
  }
}

// kScoreOrders is as in the forward; 0 means that scores of floats are computed in float, as those
// of the lse were. p and ds are decomposed like the other operands.
//
// `on_vectors` takes over where operands are not finite: for the whole tile if q or do is not,
// since 0 * NaN is not 0; for the row of scores of a key or value that is not; and for dq if a
// query sees such a key. The planes of tiles of keys are kept for the next queries, in up to
// kMostBytes.
template <int kPlanes, int kScoreOrders>
struct AmxProductsBackward {
  using T = float;
  static constexpr int kQueryVectors = 4;  // two AMX tiles deep in the sums over queries
  static constexpr int64_t M = kQueryVectors * kLanes<float>;
  static constexpr int64_t kMostBytes = 2 << 20, kMostKept = 64;
  static void begin() { begin_tiles(); }
  static void end() { end_tiles(); }

  VectorProductsBackward<float, kQueryVectors> on_vectors;  // holds the queries as floats
  PlanesOf<uint32_t> q_t, grad_out_t;  // pairs along head_dim [depth / 2][queries]
  PlanesOf<uint32_t> q, grad_out;      // pairs of queries [M / 2][D or Dv]
  PlanesOf<uint16_t> rows_of_keys;     // p or ds [kBlockN][M]
  PlanesOf<uint32_t> ds;               // pairs of keys [kBlockN / 2][queries]
  float *tile, *tile_t;                // [kBlockN][D or Dv], and transposed
  bool queries_finite, odd;            // odd: `on_vectors` multiplies the tile

  // A tile of keys and values, in planes.
  struct Keys {
    int64_t b = -1, h = -1, n = -1;  // the place of the tile
    PlanesOf<uint16_t> k, v, k_t;    // [kBlockN][depth], [D][kBlockN]
    bool k_finite, all_rows_finite;  // all of k is finite; all of k and v is
    bool row_finite[kBlockN];
  };
  Keys kept[kMostKept];
  PlanesOf<uint16_t> visible_k_t;  // hidden keys are 0
  int64_t num_kept;
  Keys* keys;  // of the current tile; then what `on_vectors` needs to load it
  Sequence seq;
  int64_t h_kv, n_start, columns;
  const uint64_t* visible;
  bool is_loaded;

  static int64_t depth(int64_t D) { return round_up(D, kTileDepth); }
  static int64_t width(int64_t D) { return round_up(D, kLanes<float>); }

  static PlanesOf<uint32_t> take_pairs(Arena& arena, int64_t rows, int64_t row) {
    return {arena.take<uint32_t>(kPlanes * rows / 2 * row), row, rows / 2 * row};
  }
  static PlanesOf<uint16_t> take_rows(Arena& arena, int64_t rows, int64_t row) {
    return {arena.take<uint16_t>(kPlanes * rows * row), row, rows * row};
  }
  void place(const AttentionParams& p, Arena& arena) {
    on_vectors.place(p, arena);
    q_t = take_pairs(arena, depth(p.D), M);
    grad_out_t = take_pairs(arena, depth(p.Dv), M);
    q = take_pairs(arena, M, width(p.D));
    grad_out = take_pairs(arena, M, width(p.Dv));
    rows_of_keys = take_rows(arena, kBlockN, M);
    ds = take_pairs(arena, kBlockN, M);
    const int64_t widest = max_of(width(p.D), width(p.Dv));
    tile = arena.take<float>(kBlockN * widest);
    tile_t = arena.take<float>(kBlockN * widest);
    const int64_t size = kPlanes * kBlockN * (depth(p.D) + depth(p.Dv) + width(p.D));
    num_kept = min_of(kMostKept, kMostBytes / (size * (int64_t)sizeof(uint16_t)));
    num_kept = max_of(1, min_of(num_kept, ceil_div(p.Sk, kBlockN)));
    visible_k_t = take_rows(arena, width(p.D), kBlockN);
    for (int64_t i = 0; i < num_kept; ++i) {
      kept[i].k = take_rows(arena, kBlockN, depth(p.D));
      kept[i].v = take_rows(arena, kBlockN, depth(p.Dv));
      kept[i].k_t = take_rows(arena, width(p.D), kBlockN);
    }
  }

  template <int kVectors>
  void load_queries(const AttentionParams& p, const Sequence& seq_, int64_t h, int64_t m_start,
                    int64_t rows, uint64_t counted) {
    constexpr int64_t kRow = kVectors * kLanes<float>, kDepth = (kRow + 31) / 32 * 32;
    on_vectors.template load_queries<kVectors>(p, seq_, h, m_start, rows, counted);
    queries_finite = all_finite(on_vectors.q, kRow * width(p.D)) &&
                     all_finite(on_vectors.grad_out, kRow * width(p.Dv));
    if (!queries_finite) return;
    q_t.row = grad_out_t.row = ds.row = kRow;
    if (kScoreOrders > 0) {
      decompose_pairs<kPlanes>(width(p.D), depth(p.D), kRow, on_vectors.q_t, kRow, q_t);
    }
    decompose_pairs<kPlanes>(width(p.Dv), depth(p.Dv), kRow, on_vectors.grad_out_t, kRow,
                             grad_out_t);
    decompose_pairs<kPlanes>(kRow, kDepth, width(p.D), on_vectors.q, width(p.D), q);
    decompose_pairs<kPlanes>(kRow, kDepth, width(p.Dv), on_vectors.grad_out, width(p.Dv), grad_out);
  }

  // Loads the first `count` keys or values of the tile; hidden ones become 0.
  void load_tile_of_keys(const AttentionParams& p, const TensorView& view, int64_t D, int64_t count,
                         const uint64_t* visible) const {
    load_key_tile(tile, p, view, {seq, h_kv, n_start, count}, D, visible, kBlockN);
  }
  bool finite_row(int64_t j, int64_t D) const { return all_finite(tile + j * width(D), width(D)); }
  void load_keys(const AttentionParams& p, const KeyTile& place, const uint64_t* visible_) {
    seq = place.seq, h_kv = place.h, n_start = place.n_start, columns = place.columns;
    visible = visible_;
    is_loaded = false;
    keys = kept + min_of(n_start / kBlockN, num_kept - 1);
    if (keys->b == seq.b && keys->h == h_kv && keys->n == n_start) return;
    keys->b = seq.b, keys->h = h_kv, keys->n = n_start;
    // Loads all keys that the sequence has in the tile, even if fewer are asked for.
    const int64_t count = min_of(kBlockN, seq.Sk - n_start);
    keys->k_finite = keys->all_rows_finite = true;
    load_tile_of_keys(p, p.value, p.Dv, count, nullptr);
    for (int64_t j = 0; j < kBlockN; ++j) {
      keys->all_rows_finite &= keys->row_finite[j] = finite_row(j, p.Dv);
    }
    split_rows<kPlanes>(kBlockN, width(p.Dv), depth(p.Dv), tile, keys->v);
    load_tile_of_keys(p, p.key, p.D, count, nullptr);
    for (int64_t j = 0; j < kBlockN; ++j) {
      const bool finite = finite_row(j, p.D);
      keys->k_finite &= finite;
      keys->row_finite[j] &= finite;
    }
    keys->all_rows_finite &= keys->k_finite;
    split_rows<kPlanes>(kBlockN, width(p.D), depth(p.D), tile, keys->k);
    split_values<kPlanes>(width(p.D), tile, tile_t, keys->k_t);
  }
  void load_on_vectors(const AttentionParams& p) {
    if (!is_loaded) on_vectors.load_keys(p, {seq, h_kv, n_start, columns}, visible);
    is_loaded = true;
  }

  // c [key][query] <- a b
  template <int kOrders>
  static void multiply_keys(int64_t columns, PlanesOf<uint16_t> a, PlanesOf<uint32_t> b, float* c) {
    const DepthSlice part = {{a.data, a.row, a.plane}, a.row};
    multiply_amx_wide<kPlanes, kOrders, false>(round_up(columns, kTileRows), part,
                                               {b.data, b.row, b.plane}, b.row, c, b.row);
  }
  template <int kVectors>
  void scores(const AttentionParams& p, int64_t columns_, float* s, float* dp) {
    constexpr int64_t kRow = kVectors * kLanes<float>;
    odd = !queries_finite;
    if (odd || kScoreOrders == 0) load_on_vectors(p);
    if (odd) return on_vectors.template scores<kVectors>(p, columns_, s, dp);
    if constexpr (kScoreOrders == 0) {
      on_vectors.template query_scores<kVectors>(p, columns_, s);
    } else {
      multiply_keys<kScoreOrders>(columns_, keys->k, q_t, s);
    }
    multiply_keys<kPlanes>(columns_, keys->v, grad_out_t, dp);
    if (kPlanes == 1 || keys->all_rows_finite) return;
    for (int64_t j = 0; j < columns_; ++j) {
      if (keys->row_finite[j]) continue;
      on_vectors.load_keys(p, {seq, h_kv, n_start + j, 1}, nullptr);
      on_vectors.template scores<kVectors>(p, 1, s + j * kRow, dp + j * kRow);
      is_loaded = false;
    }
  }
  void select_queries(const AttentionParams& p, int64_t rows, uint64_t selected) {
    if (odd) on_vectors.select_queries(p, rows, selected);
  }

  // sums [key][d] += left [key][query] factor [query][d]
  template <int kVectors>
  void add_to_keys(int64_t columns_, int64_t D, const float* left, PlanesOf<uint32_t> factor,
                   float* sums) const {
    constexpr int64_t kRow = kVectors * kLanes<float>, kDepth = (kRow + 31) / 32 * 32;
    const int64_t padded = round_up(columns_, kTileRows);
    split_rows<kPlanes>(columns_, kRow, kDepth, left, rows_of_keys);
    for (int64_t j = columns_; j < padded; ++j) {
      const PlanesOf<uint16_t> row = rows_of_keys.at(j);
      for (int n = 0; n < kPlanes; ++n) fill(row.data + n * row.plane, kDepth, (uint16_t)0);
    }
    const DepthSlice part = {{rows_of_keys.data, rows_of_keys.row, rows_of_keys.plane}, kDepth};
    multiply_amx_wide<kPlanes, kPlanes, true>(padded, part, {factor.data, factor.row, factor.plane},
                                              width(D), sums, width(D));
  }
  template <int kVectors>
  void add_to_dv(const AttentionParams& p, int64_t rows, int64_t columns_, const float* weights,
                 float* dv) const {
    if (odd) return on_vectors.template add_to_dv<kVectors>(p, rows, columns_, weights, dv);
    add_to_keys<kVectors>(columns_, p.Dv, weights, grad_out, dv);
  }
  // Leaves the tile to `on_vectors` if ds is not finite: an infinite value in another tile makes
  // delta infinite, and so ds.
  template <int kVectors>
  void check_gradients(const AttentionParams& p, int64_t columns_, const float* gradients) {
    constexpr int64_t kRow = kVectors * kLanes<float>;
    if (kPlanes == 1 || odd || all_finite(gradients, columns_ * kRow)) return;
    load_on_vectors(p);
    on_vectors.q_to_add = on_vectors.q;
    odd = true;
  }
  template <int kVectors>
  void add_to_dk(const AttentionParams& p, int64_t rows, int64_t columns_, const float* gradients,
                 float* dk) {
    check_gradients<kVectors>(p, columns_, gradients);
    if (odd) return on_vectors.template add_to_dk<kVectors>(p, rows, columns_, gradients, dk);
    add_to_keys<kVectors>(columns_, p.D, gradients, q, dk);
  }
  template <int kVectors>
  void add_to_dq(const AttentionParams& p, const KeyTile& place, const uint64_t* visible_,
                 const float* gradients, float* dq_t) {
    constexpr int64_t kRow = kVectors * kLanes<float>;
    const int64_t columns_ = place.columns;
    check_gradients<kVectors>(p, columns_, gradients);
    PlanesOf<uint16_t> k_t = keys->k_t;
    if (!odd && !keys->k_finite) {
      load_tile_of_keys(p, p.key, p.D, columns_, visible_);
      odd = !all_finite(tile, kBlockN * width(p.D));
      k_t = visible_k_t;
      split_values<kPlanes>(width(p.D), tile, tile_t, k_t);
    }
    if (odd) {
      load_on_vectors(p);
      return on_vectors.template add_to_dq<kVectors>(p, place, visible_, gradients, dq_t);
    }
    const int64_t keys_deep = round_up(columns_, kTileDepth);
    decompose_pairs<kPlanes>(columns_, keys_deep, kRow, gradients, kRow, ds);
    const DepthSlice part = {{k_t.data, k_t.row, k_t.plane}, keys_deep};
    multiply_amx_wide<kPlanes, kPlanes, true>(width(p.D), part, {ds.data, ds.row, ds.plane}, kRow,
                                              dq_t, kRow);
  }
};

}  // namespace
}  // namespace fused_attention
