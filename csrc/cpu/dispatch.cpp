#include "dispatch.h"

#include <stdlib.h>
#include <string.h>
#ifdef FUSED_ATTENTION_ISA_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>

namespace fused_attention {

extern const KernelTable kBaselineKernels;
#ifdef FUSED_ATTENTION_ISA_AVX2
extern const KernelTable kAvx2Kernels;
#endif
#ifdef FUSED_ATTENTION_ISA_AVX512
extern const KernelTable kAvx512Kernels;
#endif
#ifdef FUSED_ATTENTION_ISA_AMX
extern const KernelTable kAmxKernels, kAmxEmulatedKernels;
#endif
#ifdef FUSED_ATTENTION_ISA_AVX512_BF16
extern const KernelTable kAvx512Bf16Kernels;
#endif

namespace {

struct Isa {
  const KernelTable* kernels;
  bool (*offered)();  // by the machine
  bool (*fast)();     // taken without being named
  bool usable() const { return offered() && kernels->works(); }
};

bool always() { return true; }

#ifdef __x86_64__
[[maybe_unused]] bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// The processor has tiles, and the kernel lets this process use them: it asks once, before the
// first tile instruction of any thread, or that is SIGILL.
[[maybe_unused]] bool has_amx() {
  if (!has_avx512() || !__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16")) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
}
#endif

// Best first. __builtin_cpu_supports also asks the operating system (XCR0) for the registers.
const Isa kIsas[] = {
#ifdef FUSED_ATTENTION_ISA_AMX
    {&kAmxKernels, has_amx, always},
#endif
#ifdef FUSED_ATTENTION_ISA_AVX512_BF16
    // Products of pairs run at twice the float rate on AMD's processors, at half of it on Intel's.
    {&kAvx512Bf16Kernels, [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); },
     [] { return __builtin_cpu_is("amd") != 0; }},
#endif
#ifdef FUSED_ATTENTION_ISA_AVX512
    {&kAvx512Kernels, has_avx512, always},
#endif
#ifdef FUSED_ATTENTION_ISA_AVX2
    {&kAvx2Kernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     },
     always},
#endif
#ifdef FUSED_ATTENTION_ISA_AMX
    {&kAmxEmulatedKernels, has_avx512, [] { return false; }},  // for tests
#endif
    {&kBaselineKernels, always, always},
};

const KernelTable* find_usable(const char* name) {
  for (const Isa& isa : kIsas) {
    const bool named = strcmp(name, isa.kernels->isa) == 0;
    if ((named || (strcmp(name, "auto") == 0 && isa.fast())) && isa.usable()) return isa.kernels;
  }
  return nullptr;
}

const char* isa_override() {
  const char* name = getenv("FUSED_ATTENTION_CPU_ISA");
  return name != nullptr && name[0] != '\0' ? name : "auto";
}

std::atomic<const KernelTable*>& table_in_force() {
  static std::atomic<const KernelTable*> table{[] {
    const KernelTable* named = find_usable(isa_override());
    return named != nullptr ? named : find_usable("auto");
  }()};
  return table;
}

}  // namespace

const KernelTable& kernel_table() { return *table_in_force().load(std::memory_order_relaxed); }

const ForwardKernel& choose_forward(const KernelTable& table, const AttentionParams& p) {
  const ForwardKernel* kernel = table.attention_forward;
  while (!kernel->serves(p)) ++kernel;
  return *kernel;
}

int list_isas(const char* names[kMaxIsas], bool usable[kMaxIsas]) {
  int count = 0;
  for (const Isa& isa : kIsas) {
    names[count] = isa.kernels->isa;
    usable[count++] = isa.usable();
  }
  return count;
}

bool set_isa(const char* name) {
  const KernelTable* table = find_usable(name);
  if (table != nullptr) table_in_force().store(table, std::memory_order_relaxed);
  return table != nullptr;
}

const char* rejected_isa_override() {
  return find_usable(isa_override()) == nullptr ? isa_override() : nullptr;
}

}  // namespace fused_attention
