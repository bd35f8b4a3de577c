// The matrix products, copies and barriers of sm_90: wgmma, TMA and mbarrier (PTX ISA, 9.7.13 to
// 9.7.15).
#pragma once

#include "copy.cuh"

namespace fused_attention::cuda {

// -- barriers in shared memory --------------------------------------------------------------------

FA_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine.
FA_DEVICE void barrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
FA_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives at the barrier and makes it wait for `bytes` bytes of copies.
FA_DEVICE void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity has ended.
FA_DEVICE void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done;\n"
      "bra again;\n"
      "done:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Waits for `threads` threads at the hardware barrier `number`.
FA_DEVICE void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
// Makes what threads wrote to shared memory visible to wgmma.
FA_DEVICE void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int kRegisters>
FA_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FA_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// -- copies ---------------------------------------------------------------------------------------

// Copies the box of a tensor [B, H, S, D] at these coordinates to shared memory; its bytes arrive
// at the barrier. Elements outside the tensor become 0.
FA_DEVICE void copy_box(uint32_t to, const TensorMap* map, int column, int row, int h, int b,
                        uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3,%4,%5,%6}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(h), "r"(b)
      : "memory");
}

// Copies rows of one head in parts of 64 columns each.
template <int kParts>
FA_DEVICE void copy_rows(uint32_t to, int part_bytes, const TensorMap* map, int row, int h, int b,
                         uint32_t barrier) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    copy_box(to + part * part_bytes, map, part * 64, row, h, b, barrier);
  }
}

// -- products -------------------------------------------------------------------------------------

// Returns the descriptor of an operand of 16 columns, `offset` bytes behind the start of a tile.
// The tile has rows of 64 16-bit elements, 128 bytes, permuted by the 128-byte swizzle of TMA
// copies; wider tiles are several such parts, one after the other. The offset is added last, so
// that it costs one addition.
FA_DEVICE uint64_t by_columns_of(uint32_t tile, int offset) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kEightRows = (1024ull >> 4) << 32, kUnused = 1 << 16;
  return (kSwizzle128 | kEightRows | kUnused | (tile & 0x3ffff) >> 4) + (offset >> 4);
}
// Returns the descriptor of an operand of 16 rows, transposed; the parts are `part_bytes` apart.
FA_DEVICE uint64_t by_rows_of(uint32_t tile, int offset, int part_bytes) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kEightRows = (1024ull >> 4) << 32;
  const uint64_t parts = (uint64_t)(part_bytes >> 4) << 16;
  return (kSwizzle128 | kEightRows | parts | (tile & 0x3ffff) >> 4) + (offset >> 4);
}

FA_DEVICE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Makes the compiler compute the registers here, and not only where they are used.
template <int kCount>
FA_DEVICE void settle(uint32_t (&x)[kCount][4]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    asm volatile("" : "+r"(x[k][0]), "+r"(x[k][1]), "+r"(x[k][2]), "+r"(x[k][3])::"memory");
  }
}
template <int kCount>
FA_DEVICE void settle(float (&x)[kCount][4]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    asm volatile("" : "+f"(x[k][0]), "+f"(x[k][1]), "+f"(x[k][2]), "+f"(x[k][3])::"memory");
  }
}
FA_DEVICE void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
FA_DEVICE void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define FA_D4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define FA_D32 FA_D4(0), FA_D4(1), FA_D4(2), FA_D4(3), FA_D4(4), FA_D4(5), FA_D4(6), FA_D4(7)
#define FA_D64 \
  FA_D32, FA_D4(8), FA_D4(9), FA_D4(10), FA_D4(11), FA_D4(12), FA_D4(13), FA_D4(14), FA_D4(15)
#define FA_NAMES32                                         \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FA_NAMES64                                                   \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"           \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// Products for the 64 rows of a warpgroup, with accumulators as in mma.cuh.
template <typename T, int kColumns>
struct WarpgroupProduct;
#define FA_PRODUCT(type, text, columns, count, a0, a1, a2, a3, b)                                 \
  template <>                                                                                     \
  struct WarpgroupProduct<type, columns> {                                                        \
    using Accumulators = float[columns / 8][4];                                                   \
    /* d <- a b^T, or d + a b^T if `adds`: a and b in shared memory, both by columns */           \
    static FA_DEVICE void of_columns(Accumulators& d, uint64_t left, uint64_t right, bool adds) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #a2                                       \
                   ", 0;\n"                                                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." text "." text          \
                   " {" FA_NAMES##count "}, %" #a0 ", %" #a1 ", p, 1, 1, 0, 0;\n}"                \
                   : FA_D##count                                                                  \
                   : "l"(left), "l"(right), "r"((int)adds));                                      \
    }                                                                                             \
    /* d <- d + a b: a in registers, b in shared memory by rows */                                \
    static FA_DEVICE void of_rows(Accumulators& d, const uint32_t (&left)[4], uint64_t right) {   \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." text "." text          \
                   " {" FA_NAMES##count "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b          \
                                        ", 1, 1, 1, 1;"                                           \
                   : FA_D##count                                                                  \
                   : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right));         \
    }                                                                                             \
  }
FA_PRODUCT(Half, "f16", 64, 32, 32, 33, 34, 35, 36);
FA_PRODUCT(Half, "f16", 128, 64, 64, 65, 66, 67, 68);
FA_PRODUCT(BFloat16, "bf16", 64, 32, 32, 33, 34, 35, 36);
FA_PRODUCT(BFloat16, "bf16", 128, 64, 64, 65, 66, 67, 68);

}  // namespace fused_attention::cuda
