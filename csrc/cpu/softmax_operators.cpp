// Runs masked softmax on the CPU.
#include "../softmax_operators.h"

#include <sys/mman.h>

#include "operators.h"

namespace fused_attention {
namespace {

// The first write to each page of new memory costs more than computing what is in it, mostly for
// the trap. So Linux is asked to map many pages at once; if it cannot (before 5.14), nothing is
// lost.
void map_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which old headers lack
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = ((uintptr_t)memory + kPage - 1) / kPage * kPage;
  const uintptr_t end = (uintptr_t)memory + (uintptr_t)bytes;
  if (begin < end) madvise((void*)begin, end - begin, kPopulateWrite);
#endif
}

}  // namespace

// Small outputs lie in memory that malloc has had before, whose pages are mapped.
void expect_output(SoftmaxParams& p, const Tensor& out) {
  constexpr int64_t kNewMemory = 1 << 20;  // elements
  if (out.numel() >= kNewMemory) p.map_pages = map_pages;
}
void run_softmax(SoftmaxParams& p, const Held& held) {
  read_philox(p, held);
  run(kernel_table().masked_softmax.forward, p, true);
}
void run_softmax_backward(SoftmaxParams& p, const Held& held) {
  read_philox(p, held);
  const KernelTable& kernels = kernel_table();
  run(kernels.masked_softmax.backward, p, true);
  if (p.chunks > 1) run(kernels.masked_softmax.backward_bias, p);
  if (p.dsinks != nullptr) run(kernels.masked_softmax.backward_sinks, p);
}

}  // namespace fused_attention
