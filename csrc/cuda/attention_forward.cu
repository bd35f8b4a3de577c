// FA_TYPE and FA_HEAD_DIM come from the list in build.py.
#include "attention_forward.cuh"
#include "kernel.cuh"

#define FA_FORWARD(fast_path) FA_KERNEL(attention_forward_kernel<FA_TYPE, FA_HEAD_DIM, fast_path>)

namespace fused_attention::cuda {

#if !FA_FLOAT
FA_FORWARD(true);
#endif
FA_FORWARD(false);

}  // namespace fused_attention::cuda
