// Tiles: small dense matrices in per-thread scratch memory, and the products, transpositions and
// conversions between them and the tensors. Everything an attention kernel does to more than one
// number at a time is here, so that the kernels read like the paper.
//
// The vector lanes run over queries, which serves every product. A tile of scores is held
// transposed, s[key][query], so that softmax runs down the rows with no horizontal operation, and
// in each product one operand is read a scalar at a time (broadcast), the other by whole vectors.
#pragma once

#include "math.inl"

namespace fused_attention {
namespace {

// Queries per tile: three vectors. With three, 8 rows of accumulators fill the 32 registers of
// AVX-512.
constexpr int kMaxVectors = 3;
template <typename T>
constexpr int kBlockM = kMaxVectors * kLanes<T>;
// Keys per tile: a multiple of 8 (a Philox group) and of every row block of `multiply`.
constexpr int kBlockN = 96;
static_assert(kBlockM<float> <= 64, "one visibility word holds the queries of a tile");

template <int N>
struct Constant {
  static constexpr int value = N;
};
// Calls f(Constant<flag>()).
template <typename F>
FA_INLINE void with_flag(bool flag, F f) {
  flag ? f(Constant<1>()) : f(Constant<0>());
}
// Calls f(Constant<n>()) with n = 1, 2 or kMost, the smallest number of vectors that holds the
// rows.
template <typename T, int kMost = kMaxVectors, typename F>
FA_INLINE void with_vectors(int64_t rows, F f) {
  if (rows <= kLanes<T>) return f(Constant<1>());
  if (rows <= 2 * kLanes<T>) return f(Constant<2>());
  f(Constant<kMost>());
}

FA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FA_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
FA_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FA_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out 64-byte aligned pieces of a thread's workspace; with a null base it only measures.
struct Arena {
  char* base;
  size_t used;
  template <typename T>
  FA_INLINE T* take(int64_t count) {
    T* piece = base ? (T*)(base + used) : nullptr;
    used += (size_t)round_up(count * (int64_t)sizeof(T), 64);
    return piece;
  }
};

// A matrix read one scalar at a time: element (r, k) at data[r * row + k * column].
template <typename T>
struct Scalars {
  const T* data;
  int64_t row, column;
};

// c[r][x] (+)= sum_k a(r, k) * b[k][x] for kRows rows r and kVectors vectors x, in registers. The
// old c is added last: sums of sums stay accurate over long rows. The factors F are numbers of type
// T, or another type that the vocabulary can load, broadcast and fma into a vector of T.
template <int kRows, int kVectors, bool kAccumulate, typename F, typename T>
FA_INLINE void multiply_block(int64_t depth, Scalars<F> a, const F* b, int64_t b_row, T* c,
                              int64_t c_row) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int x = 0; x < kVectors; ++x) acc[r][x] = broadcast((T)0);
  }
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load(b)) vectors[kVectors];
    for (int x = 0; x < kVectors; ++x) vectors[x] = load(b + k * b_row + x * W);
    for (int r = 0; r < kRows; ++r) {
      const auto scalar = broadcast(a.data[r * a.row + k * a.column]);
      for (int x = 0; x < kVectors; ++x) acc[r][x] = fma(scalar, vectors[x], acc[r][x]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int x = 0; x < kVectors; ++x) {
      T* at = c + r * c_row + x * W;
      store(at, kAccumulate ? add(load(at), acc[r][x]) : acc[r][x]);
    }
  }
}

// Does the same for any number of rows: in blocks of kRows, then of half as many, and so on.
template <int kRows, int kVectors, bool kAccumulate, typename F, typename T>
FA_INLINE void multiply_rows(int64_t rows, int64_t depth, Scalars<F> a, const F* b, int64_t b_row,
                             T* c, int64_t c_row) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    multiply_block<kRows, kVectors, kAccumulate>(
        depth, Scalars<F>{a.data + r * a.row, a.row, a.column}, b, b_row, c + r * c_row, c_row);
  }
  if constexpr (kRows > 1) {
    if (r < rows) {
      multiply_rows<kRows / 2, kVectors, kAccumulate>(
          rows - r, depth, Scalars<F>{a.data + r * a.row, a.row, a.column}, b, b_row, c + r * c_row,
          c_row);
    }
  }
}

// Three quarters of the registers accumulate; the rest hold the vectors and one scalar.
template <int kVectors>
constexpr int kRowsInRegisters =
    kVectorRegisters * 3 / 4 / kVectors < 12 ? kVectorRegisters * 3 / 4 / kVectors : 12;

// c[rows][kVectors] = (or +=) a [rows][depth] @ b [depth][kVectors], at most kMaxDepth terms per
// sum.
constexpr int64_t kMaxDepth = 128;
template <int kVectors, bool kAccumulate, typename F, typename T>
void multiply(int64_t rows, int64_t depth, Scalars<F> a, const F* b, int64_t b_row, T* c,
              int64_t c_row) {
  constexpr int kRows = kRowsInRegisters<kVectors>;
  multiply_rows<kRows, kVectors, kAccumulate>(rows, min_of(depth, kMaxDepth), a, b, b_row, c,
                                              c_row);
  for (int64_t k = kMaxDepth; k < depth; k += kMaxDepth) {
    multiply_rows<kRows, kVectors, true>(rows, min_of(depth - k, kMaxDepth),
                                         Scalars<F>{a.data + k * a.column, a.row, a.column},
                                         b + k * b_row, b_row, c, c_row);
  }
}

// c[rows][width] += a [rows][depth] @ b [depth][width], width a multiple of the lanes.
template <typename F, typename T>
void multiply_wide(int64_t rows, int64_t depth, int64_t width, Scalars<F> a, const F* b,
                   int64_t b_row, T* c, int64_t c_row) {
  int64_t x = 0;
  for (; x + 2 * kLanes<T> <= width; x += 2 * kLanes<T>) {
    multiply<2, true>(rows, depth, a, b + x, b_row, c + x, c_row);
  }
  if (x < width) multiply<1, true>(rows, depth, a, b + x, b_row, c + x, c_row);
}

// dst[c][r] = src[r][c] for rows and columns rounded up to whole vectors; both have room for that.
template <typename T>
void transpose_tile(int64_t rows, int64_t columns, const T* src, int64_t src_row, T* dst,
                    int64_t dst_row) {
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < rows; r += W) {
    for (int64_t c = 0; c < columns; c += W) {
      Vec<T> block[W];
      for (int i = 0; i < W; ++i) block[i] = load(src + (r + i) * src_row + c);
      transpose(block);
      for (int i = 0; i < W; ++i) store(dst + (c + i) * dst_row + r, block[i]);
    }
  }
}

FA_INLINE int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
FA_INLINE const void* element(const void* data, DType dtype, int64_t index) {
  return (const char*)data + index * element_size(dtype);
}
FA_INLINE void* element(void* data, DType dtype, int64_t index) {
  return (char*)data + index * element_size(dtype);
}

// Load and store one element of any type. The 16-bit types go through a vector, because the
// vocabulary converts only vectors.
template <typename T>
FA_INLINE T load_element(const void* src, DType dtype) {
  if (dtype == DType::kFloat64) return (T) * (const double*)src;
  if (dtype == DType::kFloat32) return (T) * (const float*)src;
  uint16_t in[kLanes<float>] = {*(const uint16_t*)src};
  float out[kLanes<float>] = {};
  store(out, dtype == DType::kBFloat16 ? load_bfloat16(in) : load_float16(in));
  return (T)out[0];
}
template <typename T>
FA_INLINE void store_element(void* dst, DType dtype, T value) {
  if (dtype == DType::kFloat64) {
    *(double*)dst = (double)value;
  } else if (dtype == DType::kFloat32) {
    *(float*)dst = (float)value;
  } else {
    uint16_t out[kLanes<float>] = {};
    if (dtype == DType::kBFloat16) store_bfloat16(out, broadcast((float)value));
    if (dtype == DType::kFloat16) store_float16(out, broadcast((float)value));
    *(uint16_t*)dst = out[0];
  }
}

// Reads and writes elements of one type, a vector at a time.
template <DType kDType>
struct Storage;
template <>
struct Storage<DType::kFloat32> {
  using Element = float;
  static FA_INLINE Vec<float> read(const float* p) { return load(p); }
  static FA_INLINE void write(float* p, Vec<float> a) { store(p, a); }
};
template <>
struct Storage<DType::kBFloat16> {
  using Element = uint16_t;
  static FA_INLINE Vec<float> read(const uint16_t* p) { return load_bfloat16(p); }
  static FA_INLINE void write(uint16_t* p, Vec<float> a) { store_bfloat16(p, a); }
};
template <>
struct Storage<DType::kFloat16> {
  using Element = uint16_t;
  static FA_INLINE Vec<float> read(const uint16_t* p) { return load_float16(p); }
  static FA_INLINE void write(uint16_t* p, Vec<float> a) { store_float16(p, a); }
};
template <>
struct Storage<DType::kFloat64> {
  using Element = double;
  static FA_INLINE Vec<double> read(const double* p) { return load(p); }
  static FA_INLINE void write(double* p, Vec<double> a) { store(p, a); }
};
// Calls f(Storage<dtype>()) if elements of dtype are read into vectors of T.
template <typename T, typename F>
FA_INLINE void with_storage(DType dtype, F f) {
  if constexpr (sizeof(T) == 8) {
    if (dtype == DType::kFloat64) f(Storage<DType::kFloat64>());
  } else {
    if (dtype == DType::kFloat32) f(Storage<DType::kFloat32>());
    if (dtype == DType::kBFloat16) f(Storage<DType::kBFloat16>());
    if (dtype == DType::kFloat16) f(Storage<DType::kFloat16>());
  }
}

// dst[0..count) = src[0..count) converted to T; `step` is the stride of src in elements.
template <typename T>
void load_row(T* dst, const void* src, DType dtype, int64_t count, int64_t step = 1) {
  constexpr int W = kLanes<T>;
  int64_t i = 0;
  if (step == 1) {
    with_storage<T>(dtype, [&](auto storage) {
      const auto* from = (const typename decltype(storage)::Element*)src;
      for (; i + W <= count; i += W) store(dst + i, storage.read(from + i));
    });
  }
  for (; i < count; ++i) dst[i] = load_element<T>(element(src, dtype, i * step), dtype);
}

// dst[0..count) = scale * src[0..count) converted to dtype.
template <typename T>
void store_row(void* dst, DType dtype, const T* src, int64_t count, T scale) {
  constexpr int W = kLanes<T>;
  int64_t i = 0;
  with_storage<T>(dtype, [&](auto storage) {
    auto* to = (typename decltype(storage)::Element*)dst;
    for (; i + W <= count; i += W) storage.write(to + i, mul(broadcast(scale), load(src + i)));
  });
  for (; i < count; ++i) store_element<T>(element(dst, dtype, i), dtype, scale * src[i]);
}

template <typename T>
FA_INLINE void fill(T* dst, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) dst[i] = value;
}

FA_INLINE void* row_of(const TensorView& view, DType dtype, int64_t b, int64_t h, int64_t s) {
  return element(view.data, dtype, b * view.stride_b + h * view.stride_h + s * view.stride_s);
}

// Loads rows [start, start + rows) of one head as a tile [padded_rows][round_up(columns)], padded
// with zeros.
template <typename T>
void load_tile(T* dst, const TensorView& view, DType dtype, int64_t b, int64_t h, int64_t start,
               int64_t rows, int64_t columns, int64_t padded_rows) {
  const int64_t width = round_up(columns, kLanes<T>);
  for (int64_t r = 0; r < padded_rows; ++r) {
    T* row = dst + r * width;
    if (r < rows) load_row(row, row_of(view, dtype, b, h, start + r), dtype, columns);
    const int64_t valid = r < rows ? columns : 0;
    fill(row + valid, width - valid, (T)0);
  }
}

}  // namespace
}  // namespace fused_attention
