// Who sees whom: the tiles that somebody sees, and inside a tile one word per key, bit i set where
// query m_start + i may attend to it.

// Half-open range.
struct Range {
  int64_t begin, end;
};
// Empty is {0, 0}: rounded down to a tile's start it stays empty, and nothing past an end is read.
FA_INLINE Range intersect(Range a, Range b) {
  const int64_t begin = max_of(a.begin, b.begin), end = min_of(a.end, b.end);
  return begin < end ? Range{begin, end} : Range{0, 0};
}

// Key j is in the window of query i iff i + off - left <= j <= i + off + right.
// The keys that the queries [m_start, m_end) may see, before masks.
FA_INLINE Range visible_keys(const AttentionParams& p, const Sequence& seq, int64_t m_start,
                             int64_t m_end) {
  const int64_t first = p.window_left < 0 ? 0 : m_start + seq.diagonal_offset - p.window_left;
  const int64_t last = p.window_right < 0 ? seq.Sk : m_end + seq.diagonal_offset + p.window_right;
  return intersect({0, seq.Sk}, {first, last});
}
// The queries that may see one of the keys [n_start, n_end), before masks.
FA_INLINE Range visible_queries(const AttentionParams& p, const Sequence& seq, int64_t n_start,
                                int64_t n_end) {
  const int64_t first = p.window_right < 0 ? 0 : n_start - seq.diagonal_offset - p.window_right;
  const int64_t last = p.window_left < 0 ? seq.Sq : n_end - seq.diagonal_offset + p.window_left;
  return intersect({0, seq.Sq}, {first, last});
}

FA_INLINE uint64_t low_bits(int64_t count) {
  return count <= 0 ? 0 : count >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << count) - 1;
}

enum class Visible { kNone, kSome, kAll };

// visible[j] for one tile; left unwritten unless the answer is kSome.
Visible tile_visibility(const AttentionParams& p, const Sequence& seq, int64_t h, int64_t m_start,
                        int64_t rows, int64_t n_start, int64_t columns, uint64_t* visible) {
  const uint64_t everybody = low_bits(rows);
  // The diagonal band cuts the tile unless its first query reaches the last key to the right and
  // its last query the first key to the left.
  const bool cut_right =
      p.window_right >= 0 && n_start + columns - 1 > m_start + seq.diagonal_offset + p.window_right;
  const bool cut_left =
      p.window_left >= 0 && n_start < m_start + rows - 1 + seq.diagonal_offset - p.window_left;
  if (!cut_right && !cut_left && p.key_padding_mask == nullptr && p.mask.data == nullptr) {
    return Visible::kAll;
  }
  fill(visible, columns, everybody);
  for (int64_t j = 0; cut_right && j < columns; ++j) {
    visible[j] &= ~low_bits(n_start + j - seq.diagonal_offset - p.window_right - m_start);
  }
  for (int64_t j = 0; cut_left && j < columns; ++j) {
    visible[j] &= low_bits(n_start + j - seq.diagonal_offset + p.window_left - m_start + 1);
  }
  if (p.key_padding_mask != nullptr) {
    const uint8_t* padding =
        p.key_padding_mask + seq.b * p.key_padding_stride_b + n_start * p.key_padding_stride_k;
    for (int64_t j = 0; j < columns; ++j) {
      if (padding[j * p.key_padding_stride_k] != 0) visible[j] = 0;
    }
  }
  if (p.mask.data != nullptr) {
    const uint8_t* mask = (const uint8_t*)p.mask.data + seq.b * p.mask.stride_b +
                          h * p.mask.stride_h + m_start * p.mask.stride_q +
                          n_start * p.mask.stride_k;
    const int64_t step = p.mask.stride_k;
    if (p.mask.stride_q == 0) {
      for (int64_t j = 0; j < columns; ++j) visible[j] = mask[j * step] ? visible[j] : 0;
    } else {
      for (int64_t i = 0; i < rows; ++i, mask += p.mask.stride_q) {
        if (step == 1) {
          for (int64_t j = 0; j < columns; ++j) visible[j] &= ~((uint64_t)(mask[j] == 0) << i);
        } else {
          for (int64_t j = 0; j < columns; ++j) {
            visible[j] &= ~((uint64_t)(mask[j * step] == 0) << i);
          }
        }
      }
    }
  }
  uint64_t seen_by_all = everybody, seen_by_any = 0;
  for (int64_t j = 0; j < columns; ++j) {
    seen_by_all &= visible[j];
    seen_by_any |= visible[j];
  }
  if (seen_by_any == 0) return Visible::kNone;
  return seen_by_all == everybody ? Visible::kAll : Visible::kSome;
}
