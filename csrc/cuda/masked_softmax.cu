// FA_TYPE comes from the list in build.py.
#include "kernel.cuh"
#include "masked_softmax.cuh"

#define FA_ROWS(threads, held)                              \
  FA_KERNEL(masked_softmax_kernel<FA_TYPE, threads, held>); \
  FA_KERNEL(masked_softmax_backward_kernel<FA_TYPE, threads, held>)

namespace fused_attention::cuda {

FA_ROWS(32, true);
FA_ROWS(256, true);
FA_ROWS(256, false);
FA_KERNEL(masked_softmax_dbias_kernel<FA_TYPE>);
#if FA_FLOAT
FA_KERNEL(masked_softmax_dbias_sum_kernel<128>);
FA_KERNEL(masked_softmax_dsinks_kernel<256>);
#endif

}  // namespace fused_attention::cuda
