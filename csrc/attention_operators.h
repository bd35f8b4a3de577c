// The operators of attention that the CPU and CUDA share: their arguments are taken off the stack
// here; each library computes `forward` and `backward`.
#pragma once

#include "describe.h"

namespace fused_attention {

// Each library implements this. Returns out and, unless lse is null, sets *lse.
Tensor forward(const Tensor& query, const Tensor& key, const Tensor& value, const Options& options,
               Tensor* lse);

struct Gradients {
  Tensor query, key, value, bias, sinks;
};

// The arguments of attention_backward, in order.
struct BackwardArguments {
  explicit BackwardArguments(Stack& stack)
      : grad_out(stack.tensor()),
        grad_lse(stack.optional_tensor()),
        query(stack.tensor()),
        key(stack.tensor()),
        value(stack.tensor()),
        out(stack.tensor()),
        lse(stack.tensor()),
        options(stack.options()),
        bias_grad(stack.flag()),
        sinks_grad(stack.flag()),
        grad_weights(stack.optional_tensor()),
        average_weights(stack.flag()) {
    STD_TORCH_CHECK(!bias_grad || options.bias, "bias_grad: expected a bias");
    STD_TORCH_CHECK(!sinks_grad || options.sinks, "sinks_grad: expected sinks");
  }
  Tensor grad_out;
  OptionalTensor grad_lse;
  Tensor query, key, value, out, lse;
  Options options;
  bool bias_grad, sinks_grad;
  OptionalTensor grad_weights;
  bool average_weights;
};
// Each library implements this.
Gradients backward(const BackwardArguments& call);

void attention_forward_plain(StableIValue* values, uint64_t, uint64_t);
void attention_forward_plain_lse(StableIValue* values, uint64_t, uint64_t);
void attention_forward(StableIValue* values, uint64_t, uint64_t);
void attention_backward(StableIValue* values, uint64_t, uint64_t);

// -- dry runs -------------------------------------------------------------------------------------

// Returns the last notes of this thread, as text in a tensor of bytes on the CPU. `listen` says
// whether calls that run are noted from now on.
constexpr const char* kNotes = "notes(bool listen=False) -> Tensor";
void take_notes(StableIValue* values, uint64_t, uint64_t);

void tell(const std::string& text);
// Runs the operator dry: tensors may be on any device, no memory is taken, nothing is computed.
template <BoxedKernel kKernel>
void run_dry(StableIValue* values, uint64_t inputs, uint64_t outputs) {
  const DryRun run;
  kKernel(values, inputs, outputs);
  tell(run.text());
}

}  // namespace fused_attention
