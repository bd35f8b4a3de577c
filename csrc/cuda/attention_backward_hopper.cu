// FA_TYPE and FA_HEAD_DIM come from the list in build.py.
#include "attention_backward_hopper.cuh"
#include "hopper_kernel.cuh"

namespace fused_attention::cuda {
namespace {

template <bool kKeys>
const char* start_backward(const Launch& launch, const void* params, void* stream) {
  constexpr HopperBackwardTiles kTiles = hopper_backward_tiles(FA_HEAD_DIM);
  const KernelParams& p = *(const KernelParams*)params;
  const int of_queries = kKeys ? kTiles.columns : kTiles.rows();
  const int of_keys = kKeys ? kTiles.rows() : kTiles.columns;
  const Boxes query = {p.query, false, p.D, of_queries},
              grad = {p.grad_out, false, p.Dv, of_queries};
  const Boxes key = {p.key, true, p.D, of_keys}, value = {p.value, true, p.Dv, of_keys};
  const Boxes boxes[] = {kKeys ? key : query, kKeys ? value : grad, kKeys ? query : key,
                         kKeys ? grad : value};
  return start_with_maps<&attention_backward_hopper_kernel<FA_TYPE, FA_HEAD_DIM, kKeys>>(
      launch, p, boxes, stream);
}
const Kernel keys(FA_EXPANDED_TEXT(attention_backward_hopper_kernel<FA_TYPE, FA_HEAD_DIM, true>),
                  &start_backward<true>);
const Kernel queries(
    FA_EXPANDED_TEXT(attention_backward_hopper_kernel<FA_TYPE, FA_HEAD_DIM, false>),
    &start_backward<false>);

}  // namespace
}  // namespace fused_attention::cuda
