// The compiled kernels by name. Each compiled unit registers its kernels; the operators look up the
// kernel of a call and include nothing of CUDA themselves.
#pragma once

#include "launch.h"

// Turns a template-id into text after expanding its macros. Its commas separate macro arguments.
#define FA_TEXT(...) #__VA_ARGS__
#define FA_EXPANDED_TEXT(...) FA_TEXT(__VA_ARGS__)

namespace fused_attention::cuda {

struct Kernel {
  // Returns an error's text, or null.
  using Start = const char* (*)(const Launch& launch, const void* params, void* stream);

  Kernel(const char* name_, Start start_);
  const char* name;
  Start start;
  Kernel* next;
};

// Returns the compute capability of the current device, such as 90. Null if no kernel needs it.
extern int (*compute_capability)();

// Returns null if the kernel was not compiled.
const Kernel* find_kernel(const char* name);

}  // namespace fused_attention::cuda
