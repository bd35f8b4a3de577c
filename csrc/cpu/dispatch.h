// The instruction sets that this machine offers, and the kernels of the one in force.
#pragma once

#include "../attention_params.h"

// Helpers of the kernels (*.inl), inlined so that a kernel is one function in one object.
#define FA_INLINE inline __attribute__((always_inline))

namespace fused_attention {

struct TileConfig {
  int64_t block_m, block_n;
};

constexpr int kMaxPhases = 3;

// One way to compute attention forward. Its phases run one after the other (unused ones are null)
// and hand results on in p.call_workspace.
struct ForwardKernel {
  const char* name;
  const char* reason;  // why it has its place in the table, as measured
  bool (*serves)(const AttentionParams&);
  TileConfig (*tiles)(const AttentionParams&);
  size_t (*call_workspace_bytes)(const AttentionParams&);  // null: the phases share nothing
  Phase phases[kMaxPhases];
};
struct BackwardKernels {
  Phase delta, sinks;
  // Either two passes, over keys and then over queries, or one pass over heads, whose query splits
  // are then combined in the call workspace. The phases of the other way have no tasks.
  Phase keys, queries;
  Phase heads, combine;
  size_t (*call_workspace_bytes)(const AttentionParams&);
  Phase pages;
};

struct WeightsKernels {
  Phase weights;
  Phase delta;  // adds the gradient of returned weights to the delta of the backward
};

struct StatisticsKernels {
  Phase rows;
  Phase mass;  // adds what the tasks of `rows` left in the call workspace
  size_t (*call_workspace_bytes)(const AttentionParams&);
};

constexpr int kMaxTangentPhases = 5;
struct TangentKernels {
  Phase jvp;
  Phase backward_jvp[kMaxTangentPhases];
};

struct SoftmaxKernels {
  SoftmaxPhase forward;
  SoftmaxPhase backward, backward_bias, backward_sinks;
};

// An elementary function of math.inl over an array of floats (doubles for kFloat64), so that tests
// can measure the error it states.
enum class MathFunction { kExp2, kTanh };

// The kernels of one instruction set: kernels_table.cpp, which refers to the other kernels_*.cpp.
struct KernelTable {
  const char* isa;
  bool (*works)();  // whether the ISA works on a machine that claims to have it
  // Notes for each block whether the mask hides or shows some of it, in p.mask_blocks (if its size
  // is 0 it is null and the phase does not run).
  Phase mask_blocks;
  size_t (*mask_blocks_bytes)(const AttentionParams&);
  const ForwardKernel* const* attention_forward;  // best first, the last serves every call
  const BackwardKernels& attention_backward;
  const WeightsKernels& attention_weights;
  const StatisticsKernels& attention_statistics;
  const TangentKernels& attention_tangents;
  const SoftmaxKernels& masked_softmax;
  Phase dropout_keep_mask;
  void (*apply_math)(MathFunction, DType, const void* in, void* out, int64_t count);
  // Only multiplies and adds on registers, in the fastest way that kernels of the dtype have, so
  // that no kernel exceeds its rate. Returns the number of operations in `rounds` rounds.
  double (*multiply_registers)(DType, int64_t rounds);
};

// The table in force: the best usable ISA, or the one named by FUSED_ATTENTION_CPU_ISA (read once,
// at first use) or by set_isa.
const KernelTable& kernel_table();

// The first kernel of the table that serves the call.
const ForwardKernel& choose_forward(const KernelTable& table, const AttentionParams& p);

constexpr int kMaxIsas = 8;
// Compiled ISAs, best first, into names[kMaxIsas]; returns how many. `usable` = the machine has it.
int list_isas(const char* names[kMaxIsas], bool usable[kMaxIsas]);

// Puts the named ISA in force ("auto" = the best). Returns false, changing nothing, if the name is
// unknown or the machine lacks it.
bool set_isa(const char* name);

// The value of FUSED_ATTENTION_CPU_ISA if it could not be honoured, else null.
const char* rejected_isa_override();

}  // namespace fused_attention
