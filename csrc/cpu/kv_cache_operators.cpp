// kv_cache_append_ writes new tokens into a cache, contiguous or in pages.
#include <string.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "operators.h"

namespace fused_attention {
namespace {

// A cache to write to, or the new tokens that go into it.
struct CacheView {
  CacheView(const Tensor& tensor, const char* name, Layout layout)
      : data((char*)tensor.data_ptr()), shape(shape_of(tensor, name, layout)) {}
  char* row(int64_t b, int64_t h, int64_t s, int64_t width) const {
    return data + (b * shape.stride[0] + h * shape.stride[1] + s * shape.stride[2]) * width;
  }
  char* data;
  Shape shape;
};

void copy_row(const CacheView& to, char* to_row, const CacheView& from, const char* from_row,
              int64_t width) {
  const int64_t D = from.shape.size[3];
  if (to.shape.stride[3] == 1 && from.shape.stride[3] == 1) {
    memcpy(to_row, from_row, (size_t)(D * width));
    return;
  }
  for (int64_t d = 0; d < D; ++d) {
    memcpy(to_row + d * to.shape.stride[3] * width, from_row + d * from.shape.stride[3] * width,
           (size_t)width);
  }
}

// The rows [begin, end) of one page that new tokens of sequence b are written to.
struct PageRows {
  int32_t page;
  int64_t begin, end, b;
};
// Refuses two new tokens that would go to one row.
void check_pages_apart(std::vector<PageRows>& written) {
  std::sort(written.begin(), written.end(), [](const PageRows& x, const PageRows& y) {
    return std::tie(x.page, x.begin, x.b) < std::tie(y.page, y.begin, y.b);
  });
  for (size_t i = 1; i < written.size(); ++i) {
    const PageRows &before = written[i - 1], &after = written[i];
    STD_TORCH_CHECK(before.page != after.page || before.end <= after.begin,
                    "block_table: expected a place of its own for each new token, got page ",
                    after.page, " for those of sequences ", before.b, " and ", after.b);
  }
}

}  // namespace

void kv_cache_append_(const Tensor& key_cache, const Tensor& value_cache, const Tensor& key,
                      const Tensor& value, const Tensor& cache_seqlens,
                      const OptionalTensor& block_table) {
  constexpr int64_t kRowsAtOnce = 256;
  const Layout layout = block_table ? Layout::kPaged : Layout::kDense;
  const DType dtype = dtype_of(key, "key");
  const int64_t width = element_bytes(dtype);
  for (const Tensor* tensor : {&key_cache, &value_cache, &key, &value}) {
    STD_TORCH_CHECK(tensor->scalar_type() == key.scalar_type(),
                    "key_cache, value_cache, key, value: expected one dtype");
  }
  const Footprint footprints[2] = {footprint_of(key_cache), footprint_of(value_cache)};
  STD_TORCH_CHECK(!footprints[0].overlaps(footprints[1]),
                  "value_cache: expected memory apart from key_cache's");
  // New tokens that lie in a cache are read before it is written to.
  const auto apart = [&](const Tensor& tensor) {
    const Footprint own = footprint_of(tensor);
    if (!own.overlaps(footprints[0]) && !own.overlaps(footprints[1])) return tensor;
    Tensor copy =
        empty({"a copy of new tokens that lie in a cache"}, tensor.sizes(), key.scalar_type());
    torch::stable::copy_(copy, tensor);
    return copy;
  };
  const Tensor own_key = apart(key), own_value = apart(value);
  const CacheView caches[2] = {{key_cache, "key_cache", layout},
                               {value_cache, "value_cache", layout}};
  const CacheView tokens[2] = {{own_key, "key", Layout::kDense},
                               {own_value, "value", Layout::kDense}};
  const auto& size = tokens[0].shape.size;
  const int64_t B = size[0], H = size[1], S = size[2];
  int64_t room = caches[0].shape.size[2];
  for (int i = 0; i < 2; ++i) {
    const auto &cache = caches[i].shape, &token = tokens[i].shape;
    const char* name = i == 0 ? "key_cache" : "value_cache";
    STD_TORCH_CHECK(token.size[0] == B && token.size[1] == H && token.size[2] == S,
                    "value: expected the batch, heads and tokens of key");
    STD_TORCH_CHECK(cache.size[1] == H && cache.size[3] == token.size[3] && cache.size[2] == room &&
                        cache.size[0] == (block_table ? caches[0].shape.size[0] : B),
                    name, ": expected the batch, heads and head_dim of the new tokens");
    STD_TORCH_CHECK(!footprints[i].overlaps_itself(), name,
                    ": expected memory of its own for each element, got overlapping strides");
  }
  const auto held_lengths = integers_of(checked_int32(cache_seqlens, "cache_seqlens", 1, B));
  const int32_t* lengths = (const int32_t*)held_lengths.get();
  std::shared_ptr<const void> held_table;
  const int32_t* table = nullptr;
  int64_t pages = 0;
  const int64_t page_size = room;
  if (block_table) {
    held_table = integers_of(checked_int32(*block_table, "block_table", 2, B));
    table = (const int32_t*)held_table.get();
    pages = block_table->size(1);
    room = page_size * pages;
  }
  std::vector<PageRows> written;
  for (int64_t b = 0; b < B; ++b) {
    STD_TORCH_CHECK(lengths[b] >= 0 && lengths[b] + S <= room,
                    "cache_seqlens: expected lengths that leave room for ", S, " of ", room,
                    " tokens, got ", lengths[b]);
    for (int64_t n = S == 0 || !block_table ? pages : lengths[b] / page_size;
         n < pages && n * page_size < lengths[b] + S; ++n) {
      const int32_t page = table[b * pages + n];
      STD_TORCH_CHECK(page >= 0 && page < caches[0].shape.size[0],
                      "block_table: expected pages in [0, ", caches[0].shape.size[0], "), got ",
                      page);
      const int64_t first = n * page_size;
      written.push_back({page, std::max<int64_t>(lengths[b] - first, 0),
                         std::min<int64_t>(lengths[b] + S - first, page_size), b});
    }
  }
  check_pages_apart(written);
  if (is_empty(key) && is_empty(value)) return;
  const auto append = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / S / H, h = row / S % H, i = row % S, n = lengths[b] + i;
      const int64_t at_b = table != nullptr ? table[b * pages + n / page_size] : b;
      const int64_t at_n = table != nullptr ? n % page_size : n;
      for (int x = 0; x < 2; ++x) {
        copy_row(caches[x], caches[x].row(at_b, h, at_n, width), tokens[x],
                 tokens[x].row(b, h, i, width), width);
      }
    }
  };
  if (B * H * S <= kRowsAtOnce || forked_from_threads()) return append(0, B * H * S);
  torch::stable::parallel_for(0, B * H * S, kRowsAtOnce, append);
}

}  // namespace fused_attention
