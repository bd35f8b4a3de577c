// Tensors for the driver: any of the kernels' types and any strides. Their memory has exactly the
// bytes that they reach, so that a sanitizer sees every access beyond.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "attention_params.h"

namespace driver {

using fused_attention::DType;

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t range(int64_t first, int64_t last) {
    return first + (int64_t)(engine_() % (uint64_t)(last - first + 1));
  }
  bool chance(int percent) { return range(1, 100) <= percent; }
  // Returns a value that every type holds exactly: 8 significant bits.
  double value() { return (double)range(-127, 127) / 64; }
  uint64_t bits() { return engine_(); }

 private:
  std::mt19937_64 engine_;
};

inline double from_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25));
}
// Converts a normal number that needs no rounding, zero or NaN.
inline uint16_t to_float16(double x) {
  if (x != x) return 0x7e00;
  if (x == 0) return 0;
  int exponent;
  const int fraction = (int)ldexp(fabs(frexp(x, &exponent)), 11);
  return (uint16_t)((x < 0) << 15 | (exponent + 14) << 10 | (fraction & 1023));
}

inline double get(const void* at, DType dtype) {
  uint16_t half;
  switch (dtype) {
    case DType::kFloat64:
      return *(const double*)at;
    case DType::kFloat32:
      return *(const float*)at;
    case DType::kFloat16:
      memcpy(&half, at, 2);
      return from_float16(half);
    default: {
      memcpy(&half, at, 2);
      const uint32_t bits = (uint32_t)half << 16;
      float wide;
      memcpy(&wide, &bits, 4);
      return wide;
    }
  }
}
inline void set(void* at, DType dtype, double x) {
  const float narrow = (float)x;
  uint32_t bits;
  memcpy(&bits, &narrow, 4);
  const uint16_t bfloat16 = (uint16_t)(bits >> 16), float16 = to_float16(x);
  switch (dtype) {
    case DType::kFloat64:
      *(double*)at = x;
      break;
    case DType::kFloat32:
      *(float*)at = narrow;
      break;
    default:
      memcpy(at, dtype == DType::kFloat16 ? &float16 : &bfloat16, 2);
  }
}
inline int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

using Sizes = std::vector<int64_t>;

// A tensor with elements of `width` bytes. Unset memory is never 0: all bits are 1, which is NaN.
class Array {
 public:
  enum class Last { kDense, kAny };  // whether the last dimension has stride 1

  Array() = default;
  // Lays the dimensions out in a random order in memory, with random gaps. With `broadcast`, a
  // dimension of size 1 has stride 0.
  Array(Random& random, Sizes sizes, DType type, Last last, bool broadcast = false,
        int64_t element_bytes = 0)
      : size(std::move(sizes)),
        stride(size.size()),
        dtype(type),
        width(element_bytes ? element_bytes : bytes_of(type)) {
    std::vector<size_t> order(size.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = order.size() - 1 - i;
    const int movable = last == Last::kDense ? 1 : 0;
    if (random.chance(50)) {
      for (size_t i = order.size(); i-- > (size_t)movable + 1;) {
        std::swap(order[i], order[(size_t)random.range(movable, (int64_t)i)]);
      }
    }
    const bool gaps = random.chance(50);
    int64_t step = last == Last::kAny && gaps ? random.range(1, 3) : 1, extent = 1;
    for (const size_t d : order) {
      const bool once = broadcast && size[d] == 1;
      stride[d] = once ? 0 : step;
      if (once) continue;
      extent += size[d] > 0 ? (size[d] - 1) * step : 0;
      step = step * std::max<int64_t>(size[d], 1) + (gaps ? random.range(0, 5) : 0);
    }
    if (count() == 0) extent = 0;
    const int64_t lead = random.chance(50) ? random.range(1, 7) : 0;
    bytes = (lead + extent) * width;
    memory.reset(new char[(size_t)bytes]);
    memset(memory.get(), 0xff, (size_t)bytes);
    data = memory.get() + lead * width;
  }

  int64_t count() const {
    int64_t n = 1;
    for (const int64_t s : size) n *= s;
    return n;
  }
  template <typename... Index>
  char* at(Index... index) const {
    const int64_t indices[] = {(int64_t)index...};
    int64_t offset = 0;
    for (size_t d = 0; d < size.size(); ++d) offset += (size[d] == 1 ? 0 : indices[d]) * stride[d];
    return data + offset * width;
  }
  template <typename... Index>
  double operator()(Index... index) const {
    return get(at(index...), dtype);
  }
  // Calls f(address) for every element.
  template <typename F>
  void each(F f) const {
    Sizes index(size.size(), 0);
    for (int64_t n = count(); n > 0; --n) {
      int64_t offset = 0;
      for (size_t d = 0; d < size.size(); ++d) offset += index[d] * stride[d];
      f(data + offset * width);
      for (size_t d = size.size(); d-- > 0;) {
        if (++index[d] < size[d]) break;
        index[d] = 0;
      }
    }
  }
  void randomise(Random& random) {
    each([&](char* at) { set(at, dtype, random.value()); });
  }
  // Returns whether the bytes between the elements are as they were.
  bool gaps_are_intact() const {
    std::vector<char> copy(memory.get(), memory.get() + bytes);
    each([&](char* at) { memset(copy.data() + (at - memory.get()), 0xff, (size_t)width); });
    return std::all_of(copy.begin(), copy.end(), [](char c) { return c == (char)0xff; });
  }

  Sizes size, stride;
  DType dtype = DType::kFloat32;
  int64_t width = 4, bytes = 0;
  std::unique_ptr<char[]> memory;
  char* data = nullptr;
};

}  // namespace driver
