// Copies tiles of rows from global to shared memory.
#pragma once

#include "mma.cuh"
#include "sequence.cuh"

namespace fused_attention::cuda {

FA_DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
// Copies 16 bytes; those beyond `bytes` become zero.
FA_DEVICE void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
// Copies 4 bytes, or stores zero if `bytes` is 0.
FA_DEVICE void copy_word_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
FA_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
FA_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
FA_DEVICE void store_shared(uint32_t to, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}
FA_DEVICE uint4 load_shared(uint32_t from) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(from)
               : "memory");
  return x;
}
FA_DEVICE void store_global(void* to, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}
FA_DEVICE float4 load_global(const float* from) {
  float4 x;
  asm("ld.global.nc.v4.f32 {%0,%1,%2,%3}, [%4];"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "l"(from));
  return x;
}
FA_DEVICE float4 load_shared_floats(uint32_t from) {
  const uint4 x = load_shared(from);
  return make_float4(__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z),
                     __uint_as_float(x.w));
}
FA_DEVICE void store_shared(uint32_t to, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}

// The rows of a head: row n is at data + n * stride elements. A tile has 0 for elements from
// `width` on and for rows outside [begin, end), whatever memory holds there.
template <typename T>
struct RowSource {
  const T* data;
  int64_t stride;
  int begin, end;
  int width;
  bool aligned;  // every row starts at a multiple of 16 bytes
  // Paged rows: row n is row n % page_size of page pages[n / page_size], one of page_count pages
  // that are page_stride elements apart. pages is null if rows are not paged.
  const int32_t* pages;
  int page_size, page_count;
  int64_t page_stride;

  FA_DEVICE const T* row(int n) const {
    if (pages == nullptr) return data + n * stride;
    const uint32_t number = (uint32_t)n / (uint32_t)page_size;
    const int page = between(pages[number], 0, page_count - 1);
    return data + page * page_stride + (n - (int)number * page_size) * stride;
  }
};

// Return the queries of a head, and its keys or values.
template <typename T>
FA_DEVICE RowSource<T> query_rows(const KernelParams& p, const TensorView& view,
                                  const Sequence& seq, int h, int64_t width, Range rows) {
  const T* data = head_of<const T>(view, seq.b, h, seq.q_start);
  return {data, view.stride_s, rows.begin, rows.end, (int)width, p.aligned, nullptr, 0, 0, 0};
}
template <typename T>
FA_DEVICE RowSource<T> key_rows(const KernelParams& p, const TensorView& view, const Sequence& seq,
                                int h, int64_t width, Range rows) {
  const bool paged = p.block_table != nullptr;
  const T* data = head_of<const T>(view, paged ? 0 : seq.b, h, seq.k_start);
  const int32_t* pages = paged ? p.block_table + seq.b * p.block_table_stride_b : nullptr;
  return {data,      view.stride_s, rows.begin,       rows.end,          (int)width,
          p.aligned, pages,         (int)p.page_size, (int)p.page_count, view.stride_b};
}

// Copies 8 elements through registers; the first `count` exist, and the others become 0.
template <typename T, typename Shared>
FA_DEVICE void load_piece(uint32_t to, const T* from, int count, bool aligned) {
  if constexpr (sizeof(T) == 2) {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = 2 * i < count ? from[2 * i].bits : 0;
      const uint32_t high = 2 * i + 1 < count ? from[2 * i + 1].bits : 0;
      x[i] = low | high << 16;
    }
    store_shared(to, make_uint4(x[0], x[1], x[2], x[3]));
  } else {
    float x[8];
    if (aligned && count == 8) {
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const float4 four = load_global(from + i);
        x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = i < count ? from[i] : 0.0f;
    }
    uint32_t packed[4][3];
#pragma unroll
    for (int i = 0; i < 4; ++i) pack_terms<float>(x[2 * i], x[2 * i + 1], packed[i]);
#pragma unroll
    for (int term = 0; term < 3; ++term) {
      store_shared(to + term * Shared::kPlaneBytes,
                   make_uint4(packed[0][term], packed[1][term], packed[2][term], packed[3][term]));
    }
  }
}

// Copies kRows rows from `first` on; each thread of the block copies pieces of 8 elements. kWhole:
// all rows are within [begin, end). kAligned: rows are known to be aligned and not paged, and width
// to be a multiple of 8. Copies are asynchronous where possible, so the caller waits for them.
template <typename T, int kRows, int kWidth, int kThreads, bool kWhole, bool kAligned>
FA_DEVICE void load_tile(uint32_t tile, const RowSource<T>& source, int first) {
  using Shared = Tile<kRows, kWidth, Terms<T>::kCount>;
  constexpr int kLow = Shared::kLow, kStep = kThreads / kLow;
  static_assert(kRows % kStep == 0 || kStep % kRows == 0);
  if constexpr (!kAligned && sizeof(T) == 2) {
    if (source.aligned && source.width % 8 == 0 && source.pages == nullptr) {
      load_tile<T, kRows, kWidth, kThreads, kWhole, true>(tile, source, first);
      return;
    }
  }
  const int low = threadIdx.x % kLow, row0 = threadIdx.x / kLow;
  if (kStep > kRows && row0 >= kRows) return;
  const uint32_t to0 = tile + Shared::offset(row0, low);
  const T* from0 = source.data + (int64_t)(first + row0) * source.stride + low * 8;
#pragma unroll
  for (int i = 0; i < (kRows + kStep - 1) / kStep; ++i) {
    const int row = first + row0 + i * kStep;
    const bool inside = kWhole || (row >= source.begin && row < source.end);
#pragma unroll
    for (int j = 0; j < Shared::kPieces / kLow; ++j) {
      // Rows whose distance is a multiple of 8 are permuted alike.
      const uint32_t to = kStep % 8 == 0 ? to0 + i * kStep * Shared::kRowBytes + j * kLow * 16
                                         : tile + Shared::offset(row0 + i * kStep, low + j * kLow);
      const int left = source.width - (low + j * kLow) * 8;
      const int count = inside ? max(0, min(8, left)) : 0;
      const T* from = from0 + i * kStep * source.stride + j * kLow * 8;
      if constexpr (kAligned) {
        copy_async(to, from, inside && left > 0 ? 16 : 0);
        continue;
      }
      if (source.pages != nullptr) from = inside ? source.row(row) + (low + j * kLow) * 8 : nullptr;
      if (sizeof(T) == 2 && source.aligned) {
        copy_async(to, count > 0 ? from : source.data, count * 2);
      } else {
        load_piece<T, Shared>(to, from, count, source.aligned);
      }
    }
  }
}

}  // namespace fused_attention::cuda
