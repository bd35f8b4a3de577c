// Which instruction sets this machine offers, and the kernels of the one in force.
#pragma once

#include "../attention_params.h"

// Helpers of the kernels (*.inl), inlined so that a kernel is one function in one object.
#define FA_INLINE inline __attribute__((always_inline))

namespace fused_attention {

struct TileConfig {
  int64_t block_m, block_n;
};

// An elementary function of math.inl over an array of floats (doubles for kFloat64), so that tests
// can measure the error it states.
enum class MathFunction { kExp2, kTanh };

// The kernels of one instruction set. One constant table per isa_*.cpp.
struct KernelTable {
  const char* isa;
  Phase attention_forward;
  Phase attention_backward_delta;
  Phase attention_backward_sinks;
  Phase attention_backward_keys;
  Phase attention_backward_queries;
  Phase dropout_keep_mask;
  SoftmaxPhase masked_softmax_forward;
  SoftmaxPhase masked_softmax_backward;
  SoftmaxPhase masked_softmax_backward_bias;
  SoftmaxPhase masked_softmax_backward_sinks;
  TileConfig (*attention_tiles)(DType);
  void (*apply_math)(MathFunction, DType, const void* in, void* out, int64_t count);
  Phase attention_weights;
  Phase attention_weights_delta;
};

// The table in force: the best usable ISA, or the one named by FUSED_ATTENTION_CPU_ISA (read once,
// at first use) or by set_isa.
const KernelTable& kernel_table();

constexpr int kMaxIsas = 8;
// Compiled ISAs, best first, into names[kMaxIsas]; returns how many. `usable` = the machine has it.
int list_isas(const char* names[kMaxIsas], bool usable[kMaxIsas]);

// Puts the named ISA in force ("auto" = the best). Returns false, changing nothing, if the name is
// unknown or the machine lacks it.
bool set_isa(const char* name);

// The value of FUSED_ATTENTION_CPU_ISA if it could not be honoured, else null.
const char* rejected_isa_override();

}  // namespace fused_attention
