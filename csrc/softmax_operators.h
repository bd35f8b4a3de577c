// The operators of masked softmax that the CPU and CUDA share; each library runs its kernels.
#pragma once

#include "describe.h"

namespace fused_attention {

// Each library implements these, for a call that is described. `held` has the random state of
// dropout.
void run_softmax(SoftmaxParams& p, const Held& held);
void run_softmax_backward(SoftmaxParams& p, const Held& held);
// Each library implements this: it is told of a new output, which will be written in its order.
void expect_output(SoftmaxParams& p, const Tensor& out);

// Returns (out, weights, sink_weight). The last two are for the backward, if `save`: the weights
// before dropout, unless they are in `out`, and the weights of the sinks.
std::tuple<Tensor, Tensor, Tensor> masked_softmax_forward(
    const Tensor& input, double scale, int64_t causal, bool save, const OptionalTensor& mask,
    const OptionalTensor& bias, const OptionalTensor& sinks, const OptionalTensor& philox,
    double dropout_p);
void masked_softmax_(const Tensor& input, double scale, int64_t causal, const OptionalTensor& mask,
                     const OptionalTensor& bias, const OptionalTensor& sinks,
                     const OptionalTensor& philox, double dropout_p);
std::tuple<Tensor, Tensor, Tensor> masked_softmax_backward(
    const Tensor& grad_out, const Tensor& weights, double scale, int64_t causal,
    const OptionalTensor& bias, const OptionalTensor& sink_weight, const OptionalTensor& philox,
    double dropout_p, bool bias_grad, bool sinks_grad);

}  // namespace fused_attention
