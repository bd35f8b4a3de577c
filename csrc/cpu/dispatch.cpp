#include "dispatch.h"

#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>

namespace fused_attention {

// kernels_table.cpp, compiled for each instruction set
namespace baseline {
extern const KernelTable kernels;
}
namespace avx2 {
extern const KernelTable kernels;
}
namespace avx512 {
extern const KernelTable kernels;
}
namespace avx512_bf16 {
extern const KernelTable kernels;
}
namespace amx {
extern const KernelTable kernels;
}
namespace amx_emulated {
extern const KernelTable kernels;
}

namespace {

struct Isa {
  const KernelTable* kernels;
  bool (*offered)();  // whether the machine has it
  bool (*fast)();     // whether "auto" may take it
  bool usable() const { return offered() && kernels->works(); }
};

bool always() { return true; }

#ifdef __x86_64__
// The instruction sets that the processor has and whose registers the operating system saves
// (XCR0). They come from cpuid, because compilers differ in the names that their builtins know.
struct Processor {
  Processor() {
    uint32_t a, b, c, d;
    __cpuid(0, a, b, c, d);
    is_amd = b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, 27)) return;  // OSXSAVE
    uint32_t enabled, high;
    __asm__("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
    const bool fma = has(c, 12), f16c = has(c, 29);
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const bool ymm = (enabled & 0x6) == 0x6, zmm = (enabled & 0xe6) == 0xe6;
    const bool tiles = (enabled & 0x60000) == 0x60000;
    avx2 = ymm && has(b, 5) && fma && f16c;
    avx512 = avx2 && zmm && has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31);  // F DQ BW VL
    amx = avx512 && tiles && has(d, 22) && has(d, 24);                             // BF16 TILE
    const bool more = a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d);
    avx512_bf16 = avx512 && more && has(a, 5);
  }
  static bool has(uint32_t bits, int bit) { return bits >> bit & 1; }
  bool is_amd = false, avx2 = false, avx512 = false, avx512_bf16 = false, amx = false;
};
[[maybe_unused]] const Processor& processor() {
  static const Processor found;
  return found;
}

// Whether the processor has AMX and Linux lets this process use it. The process asks once, before
// the first AMX instruction of any thread, which would otherwise raise SIGILL.
[[maybe_unused]] bool has_amx() {
  if (!processor().amx) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
}
#endif

// Best first.
const Isa kIsas[] = {
#ifdef FUSED_ATTENTION_ISA_AMX
    {&amx::kernels, has_amx, always},
#endif
#ifdef FUSED_ATTENTION_ISA_AVX512_BF16
    // Products of pairs run at twice the float rate on AMD's processors, at half of it on Intel's.
    {&avx512_bf16::kernels, [] { return processor().avx512_bf16; },
     [] { return processor().is_amd; }},
#endif
#ifdef FUSED_ATTENTION_ISA_AVX512
    {&avx512::kernels, [] { return processor().avx512; }, always},
#endif
#ifdef FUSED_ATTENTION_ISA_AVX2
    {&avx2::kernels, [] { return processor().avx2; }, always},
#endif
#ifdef FUSED_ATTENTION_ISA_AMX_EMULATED
    {&amx_emulated::kernels, [] { return processor().avx512; }, [] { return false; }},  // for tests
#endif
    {&baseline::kernels, always, always},
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
  const ForwardKernel* const* kernel = table.attention_forward;
  while (!(*kernel)->serves(p)) ++kernel;
  return **kernel;
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
