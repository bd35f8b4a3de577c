// FA_TYPE and FA_HEAD_DIM come from the list in build.py.
#include "attention_backward.cuh"
#include "kernel.cuh"

#define FA_BACKWARD(fast_path, gradient) \
  FA_KERNEL(attention_backward_kernel<FA_TYPE, FA_HEAD_DIM, fast_path, Gradient::gradient>)

namespace fused_attention::cuda {

#if FA_HEAD_DIM <= 128
FA_BACKWARD(false, kKeyValue);
#else
FA_BACKWARD(false, kKey);
FA_BACKWARD(false, kValue);
#endif
FA_BACKWARD(false, kQuery);
FA_KERNEL(attention_dbias_kernel<FA_TYPE, FA_HEAD_DIM>);

#if !FA_FLOAT
#if FA_HEAD_DIM <= 128
FA_BACKWARD(true, kKeyValue);
#else
FA_BACKWARD(true, kKey);
FA_BACKWARD(true, kValue);
#endif
FA_BACKWARD(true, kQuery);
#endif

// Kernels that do not depend on the head size are compiled once.
#if FA_HEAD_DIM == 32
FA_KERNEL(attention_delta_kernel<FA_TYPE>);
FA_KERNEL(attention_page_gradients_kernel<FA_TYPE>);
#if FA_FLOAT
FA_KERNEL(attention_dsinks_kernel<256>);
#endif
#endif

}  // namespace fused_attention::cuda
