// FA_TYPE and FA_HEAD_DIM come from the list in build.py.
#include "attention_decode.cuh"
#include "kernel.cuh"

namespace fused_attention::cuda {

FA_KERNEL(attention_decode_kernel<FA_TYPE, FA_HEAD_DIM>);
#if FA_HEAD_DIM == 32  // compiled once, for all head sizes
FA_KERNEL(attention_combine_kernel<FA_TYPE>);
#endif

}  // namespace fused_attention::cuda
