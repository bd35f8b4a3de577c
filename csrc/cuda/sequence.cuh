// Finds the queries and keys that a thread block works on. Positions within a sequence fit 30 bits
// (the host checks); offsets in memory are 64-bit.
#pragma once

#include "types.cuh"

namespace fused_attention::cuda {

// One sequence of a call: its length, and the place of its tokens.
struct Sequence {
  int b;
  int Sq, Sk;            // the numbers of its queries and of its keys in use
  int q_start, k_start;  // its first token among all tokens, 0 unless they are packed
  int diagonal_offset;   // key j meets query i at j = i + diagonal_offset
};

FA_DEVICE bool is_packed(const KernelParams& p) { return p.cu_seqlens_q != nullptr; }
// Returns whether b is the sequence after the last one, which holds the packed tokens that belong
// to no sequence. They see no key.
FA_DEVICE bool is_rest(const KernelParams& p, int b) { return is_packed(p) && b == (int)p.B; }

// Clamps x to [low, high]. Lengths and places are clamped so that a kernel stays within the tensors
// of a call, whatever values cu_seqlens and the like hold.
FA_DEVICE int between(int x, int low, int high) { return max(low, min(x, high)); }
// kWhole: the call is known not to be part of a larger one, so diagonal_start is 0.
template <bool kWhole = false>
FA_DEVICE Sequence sequence_of(const KernelParams& p, int b) {
  Sequence seq = {b, (int)p.Sq, (int)p.Sk, 0, 0, kWhole ? 0 : (int)p.diagonal_start};
  const bool rest = is_rest(p, b);
  if (is_packed(p)) {
    seq.q_start = between(p.cu_seqlens_q[b], 0, (int)p.Sq);
    const int end = rest ? (int)p.Sq : p.cu_seqlens_q[b + 1];
    seq.Sq = between(end, seq.q_start, (int)p.Sq) - seq.q_start;
  }
  if (p.cu_seqlens_k != nullptr && !rest) {
    const int first = p.cu_seqlens_k[b], last = p.cu_seqlens_k[b + 1];
    if (p.block_table == nullptr) seq.k_start = between(first, 0, (int)p.Sk);
    seq.Sk = p.block_table != nullptr ? between(last - first, 0, (int)p.Sk)
                                      : between(last, seq.k_start, (int)p.Sk) - seq.k_start;
  }
  if (p.seqused_k != nullptr && !rest) {
    seq.Sk = between(p.seqused_k[b], 0, p.block_table != nullptr ? (int)p.Sk : seq.Sk);
  }
  if (rest) seq.Sk = 0;
  if (p.bottom_right) seq.diagonal_offset += seq.Sk - seq.Sq;
  return seq;
}

// A block of at most `size` tokens of one head of one sequence. An empty block starts beyond the
// end of its sequence.
struct TokenBlock {
  int b, h, start;
};
// Returns block `number` among the blocks of `heads` heads. If tokens are packed, the blocks of
// sequence b, which starts at token t, begin at number t / size + b of a head. That leaves room for
// all, since ceil(n / size) <= (t + n) / size - t / size + 1.
FA_DEVICE TokenBlock token_block(const KernelParams& p, const int32_t* cu_seqlens, int64_t length,
                                 int64_t heads, uint32_t number, int size, bool last_first) {
  const bool packed = cu_seqlens != nullptr;
  const uint32_t blocks =
      (uint32_t)(packed ? length / size + p.B + 1 : ceil_div(length, (int64_t)size));
  const uint32_t head = number / blocks;
  int block = (int)(number % blocks);
  if (last_first) block = (int)blocks - 1 - block;
  if (!packed) {
    return {(int)(head / (uint32_t)heads), (int)(head % (uint32_t)heads), block * size};
  }
  // Whatever cu_seqlens holds, a block starts at 0 or later, and not so far behind the last token
  // that the start overflows.
  const auto first_block = [&](int b) { return between(cu_seqlens[b], 0, (int)length) / size; };
  int low = 0, high = (int)p.B + 1;  // the last sequence whose first block is not beyond this one
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first_block(middle) + middle <= block ? low : high) = middle;
  }
  return {low, (int)head,
          between(block - first_block(low) - low, 0, (int)length / size + 1) * size};
}
// Returns the block of queries of this thread block. The last queries of each head come first:
// under a causal mask they have the most keys.
FA_DEVICE TokenBlock query_block(const KernelParams& p, int size) {
  return token_block(p, p.cu_seqlens_q, p.Sq, p.Hq, blockIdx.x, size, true);
}
// Returns the block of keys of this thread block. With pages, Sk is the capacity of each sequence.
FA_DEVICE TokenBlock key_block(const KernelParams& p, int size) {
  const int32_t* cu_seqlens = p.block_table != nullptr ? nullptr : p.cu_seqlens_k;
  return token_block(p, cu_seqlens, p.Sk, p.Hkv, blockIdx.x, size, false);
}

// A half-open range. The empty range is {0, 0}.
struct Range {
  int begin, end;
};
FA_DEVICE Range intersect(Range a, Range b) {
  const int begin = max(a.begin, b.begin), end = min(a.end, b.end);
  return begin < end ? Range{begin, end} : Range{0, 0};
}

// Returns the keys that the queries [m_start, m_end) may see, before masks: key j is in the window
// of query i iff i + off - left <= j <= i + off + right.
FA_DEVICE Range visible_keys(const KernelParams& p, const Sequence& seq, int m_start, int m_end) {
  const int left = (int)p.window_left, right = (int)p.window_right, off = seq.diagonal_offset;
  return intersect({0, seq.Sk},
                   {left < 0 ? 0 : m_start + off - left, right < 0 ? seq.Sk : m_end + off + right});
}
// Returns the queries that may see one of the keys [n_start, n_end), before masks.
FA_DEVICE Range visible_queries(const KernelParams& p, const Sequence& seq, int n_start,
                                int n_end) {
  const int left = (int)p.window_left, right = (int)p.window_right, off = seq.diagonal_offset;
  return intersect({0, seq.Sq},
                   {right < 0 ? 0 : n_start - off - right, left < 0 ? seq.Sq : n_end - off + left});
}

// Returns the rows of one head of a [B, H, S, D] tensor, from token `start` on.
template <typename T>
FA_DEVICE T* head_of(const TensorView& view, int b, int h, int start = 0) {
  return (T*)view.data + b * view.stride_b + h * view.stride_h + start * view.stride_s;
}
// Returns the number of rows of lse, delta and row_lse: [B, Hq, Sq], packed [Hq, Tq].
FA_DEVICE int64_t count_rows(const KernelParams& p) {
  return (is_packed(p) ? 1 : p.B) * p.Hq * p.Sq;
}
// Returns the index of the first query of head h of a sequence in lse, delta and row_lse.
FA_DEVICE int64_t row_number(const KernelParams& p, const Sequence& seq, int h) {
  return seq.b * p.lse_stride_b + h * p.lse_stride_h + seq.q_start;
}

}  // namespace fused_attention::cuda
