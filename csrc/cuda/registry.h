// The compiled kernels, by name. Each unit of a kernel enters what it compiled; the operators look
// up what a call needs, and know nothing of CUDA themselves.
#pragma once

#include "launch.h"

// A template-id as text, macros in it expanded: its commas separate arguments here.
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

// Of the current device, such as 90. Null where no kernel asks.
extern int (*compute_capability)();

// Null if it was not compiled.
const Kernel* find_kernel(const char* name);

}  // namespace fused_attention::cuda
