// The matrix instructions of a warp, m16n8k16 with float accumulators, and their operands.
//
// Lane l = 4 g + t holds columns 2 t and 2 t + 1 of the accumulator rows g and g + 8: c[0] and c[1]
// are in row g, c[2] and c[3] in row g + 8. Two accumulators of one product, 16 columns in all,
// have the layout of a left operand of the next product.
#pragma once

#include <type_traits>

#include "types.cuh"

namespace fused_attention::cuda {

// kFirst: c <- a b, without reading c. Otherwise c <- c + a b.
template <typename T, bool kFirst = false>
FA_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float x[4] = {};
  if (!kFirst) x[0] = c[0], x[1] = c[1], x[2] = c[2], x[3] = c[3];
  if constexpr (std::is_same_v<T, Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(x[0]), "f"(x[1]),
          "f"(x[2]), "f"(x[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(x[0]), "f"(x[1]),
          "f"(x[2]), "f"(x[3]));
  }
}

// Loads four 8 x 8 matrices of 16-bit elements; each lane gives the address of one row of 16 bytes.
FA_DEVICE void load_matrices(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}
FA_DEVICE void load_matrices_transposed(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

// Rows of `kWidth` 16-bit elements in shared memory, in pieces of 16 bytes that are permuted within
// each row, so that eight rows of a matrix lie in different banks. The terms of floats lie in one
// such plane each, one after the other.
template <int kRows, int kWidth, int kTerms>
struct Tile {
  static constexpr int kPieces = kWidth / 8, kRowBytes = kWidth * 2;
  // The number of pieces that are permuted among each other: 8 if a row is a multiple of 128 bytes,
  // else 4.
  static constexpr int kLow = kPieces % 8 == 0 ? 8 : 4;
  static constexpr int kPlaneBytes = kRows * kRowBytes, kBytes = kTerms * kPlaneBytes;
  static FA_DEVICE int swizzle(int row) { return kLow == 8 ? row & 7 : row >> 1 & 3; }
  static FA_DEVICE uint32_t offset(int row, int piece) {
    return row * kRowBytes + ((piece ^ swizzle(row)) * 16);
  }
  // Returns the address from which a lane reads the 16 x 16 matrix at the start of the tile, for
  // `load_matrices`. The quarters are rows 0 to 7 and 8 to 15 of the left half, then of the right
  // half.
  static FA_DEVICE uint32_t by_columns(uint32_t tile) {
    const int lane = threadIdx.x % 32;
    return tile + offset(lane % 16, lane / 16);
  }
  // As by_columns, but the quarters are the halves of rows 0 to 7, then those of rows 8 to 15.
  static FA_DEVICE uint32_t by_rows(uint32_t tile) {
    const int lane = threadIdx.x % 32;
    return tile + offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  // Moves such an address to the matrix `rows` (a multiple of 16) rows below and 16 * step columns
  // to the right. Exclusive or permutes the pieces, in address bits that nothing else sets since
  // tiles are aligned.
  static FA_DEVICE uint32_t move(uint32_t from, int rows, int step, int term = 0) {
    constexpr int kSteps = kLow / 2;
    return (from ^ (step % kSteps * 32)) + step / kSteps * kLow * 16 + rows * kRowBytes +
           term * kPlaneBytes;
  }
};

}  // namespace fused_attention::cuda
