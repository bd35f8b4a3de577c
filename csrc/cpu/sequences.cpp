#include "sequences.h"

#include <algorithm>

namespace fused_attention {
namespace {

// Refuses offsets of packed sequences, unless they begin with 0, do not fall, and are at most
// `total`.
void check_offsets(const char* name, const int32_t* offsets, int64_t B, int64_t total) {
  STD_TORCH_CHECK(offsets[0] == 0, name, ": expected 0 first, got ", offsets[0]);
  for (int64_t b = 0; b < B; ++b) {
    STD_TORCH_CHECK(offsets[b] <= offsets[b + 1], name, ": expected offsets that do not fall, got ",
                    offsets[b], " before ", offsets[b + 1]);
  }
  STD_TORCH_CHECK(offsets[B] <= total, name, ": expected offsets of at most ", total,
                  " tokens, got ", offsets[B]);
}

// Refuses the pages that hold `used` keys if one of them does not exist.
void check_pages(const int32_t* pages, int64_t used, int64_t page_size, int64_t num_pages) {
  for (int64_t n = 0; n * page_size < used; ++n) {
    STD_TORCH_CHECK(pages[n] >= 0 && pages[n] < num_pages, "block_table: expected pages in [0, ",
                    num_pages, "), got ", pages[n]);
  }
}

bool has_sequences(const AttentionParams& p) {
  return p.cu_seqlens_q != nullptr || p.cu_seqlens_k != nullptr || p.seqused_k != nullptr ||
         p.block_table != nullptr;
}

void check_places(const AttentionParams& p, int64_t Tq, int64_t num_pages) {
  if (!has_sequences(p)) return;
  if (p.cu_seqlens_q != nullptr) check_offsets("cu_seqlens_q", p.cu_seqlens_q, p.B, Tq);
  if (p.cu_seqlens_k != nullptr) {
    // With paged keys, cu_seqlens_k gives the lengths only.
    const int64_t total = p.block_table != nullptr ? std::numeric_limits<int32_t>::max() : p.Sk;
    check_offsets("cu_seqlens_k", p.cu_seqlens_k, p.B, total);
  }
  for (int64_t b = 0; b < p.B; ++b) {
    int64_t room = p.Sk;
    if (p.cu_seqlens_k != nullptr) {
      const int64_t length = p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b];
      STD_TORCH_CHECK(length <= room, "cu_seqlens_k: expected lengths of at most ", room,
                      ", what the pages hold, got ", length);
      room = p.block_table != nullptr && p.seqused_k != nullptr ? room : length;
    }
    const int64_t used = p.seqused_k != nullptr ? p.seqused_k[b] : room;
    STD_TORCH_CHECK(used >= 0 && used <= room, "seqused_k: expected lengths in [0, ", room,
                    "], got ", used);
    if (p.block_table != nullptr) {
      check_pages(p.block_table + b * p.block_table_stride_b, used, p.page_size, num_pages);
    }
  }
}
}  // namespace

void describe_sequences(AttentionParams& p, const Options& o, const Shape& key, Held& held) {
  const int64_t Tq = p.Sq, num_pages = key.size[0];
  describe_places(p, o, num_pages, held);
  check_places(p, Tq, num_pages);
}

void shorten_to_longest(AttentionParams& p) {
  if (!has_sequences(p)) return;
  int64_t Sq = p.cu_seqlens_q != nullptr ? 0 : p.Sq, Sk = 0;
  if (p.seqused_k == nullptr && p.cu_seqlens_k == nullptr) Sk = p.Sk;
  for (int64_t b = 0; b < p.B; ++b) {
    if (p.cu_seqlens_q != nullptr) {
      const int64_t queries = p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
      if (!p.serves_queries(queries)) continue;
      Sq = std::max(Sq, queries);
    }
    if (p.seqused_k != nullptr) {
      Sk = std::max<int64_t>(Sk, p.seqused_k[b]);
    } else if (p.cu_seqlens_k != nullptr) {
      Sk = std::max<int64_t>(Sk, p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b]);
    }
  }
  p.Sq = Sq;
  p.Sk = Sk;
}

}  // namespace fused_attention
