// Which queries and keys a block works on. Positions within a sequence fit 30 bits (the host
// checks); offsets in memory are 64-bit.
#pragma once

#include "types.cuh"

namespace fused_attention::cuda {

// One sequence of a call: how long it is, and where its tokens lie.
struct Sequence {
  int b;
  int Sq, Sk;            // its queries; its keys, those in use
  int q_start, k_start;  // its first token among all tokens, 0 unless they are packed
  int diagonal_offset;   // key j meets query i at j = i + diagonal_offset
};

// Whatever the tensors hold, nothing beyond the memory of a call is touched: lengths are cut.
FA_DEVICE Sequence sequence_of(const Call& p, int b) {
  Sequence seq = {b, (int)p.Sq, (int)p.Sk, 0, 0, 0};
  if (p.bottom_right) seq.diagonal_offset = seq.Sk - seq.Sq;
  return seq;
}

struct QueryBlock {
  int b, h, m_start;
};
// Of each head the last queries first: under a causal mask they have the most keys.
FA_DEVICE QueryBlock query_block(const Call& p, int size) {
  const uint32_t blocks = (uint32_t)ceil_div((int)p.Sq, size), Hq = (uint32_t)p.Hq;
  const uint32_t head = blockIdx.x / blocks, block = blocks - 1 - blockIdx.x % blocks;
  return {(int)(head / Hq), (int)(head % Hq), (int)block * size};
}

// Half-open; empty is {0, 0}.
struct Range {
  int begin, end;
};
FA_DEVICE Range intersect(Range a, Range b) {
  const int begin = max(a.begin, b.begin), end = min(a.end, b.end);
  return begin < end ? Range{begin, end} : Range{0, 0};
}

// Key j is in the window of query i iff i + off - left <= j <= i + off + right.
// The keys that the queries [m_start, m_end) may see, before masks.
FA_DEVICE Range visible_keys(const Call& p, const Sequence& seq, int m_start, int m_end) {
  const int left = (int)p.window_left, right = (int)p.window_right, off = seq.diagonal_offset;
  return intersect({0, seq.Sk},
                   {left < 0 ? 0 : m_start + off - left, right < 0 ? seq.Sk : m_end + off + right});
}
// The queries that may see one of the keys [n_start, n_end), before masks.
FA_DEVICE Range visible_queries(const Call& p, const Sequence& seq, int n_start, int n_end) {
  const int left = (int)p.window_left, right = (int)p.window_right, off = seq.diagonal_offset;
  return intersect({0, seq.Sq},
                   {right < 0 ? 0 : n_start - off - right, left < 0 ? seq.Sq : n_end - off + left});
}

// The rows of one head of a [B, H, S, D] tensor.
template <typename T>
FA_DEVICE T* head_of(const TensorView& view, int b, int h) {
  return (T*)view.data + b * view.stride_b + h * view.stride_h;
}

}  // namespace fused_attention::cuda
