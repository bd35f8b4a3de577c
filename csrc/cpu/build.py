"""The flags of the CPU kernels, which setup.py compiles once for each instruction set.

FUSED_ATTENTION_ISAS   the instruction sets to compile ("avx2 avx512"); the baseline is always
                       compiled. "all" includes amx_emulated, which only tests use
"""

import os
import platform
import sys
from pathlib import Path

AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd {AVX2}"
# g++ 12 warns about its own AVX-512 headers.
AVX512 += " -Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option"
# The flags of each instruction set, whose vocabulary is csrc/cpu/simd_<name>.inl. All but the
# baseline are for x86-64.
ISAS = {
    "baseline": "",
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": f"-mavx512bf16 {AVX512}",
    "amx": AVX512,
    "amx_emulated": AVX512,
}
if platform.machine().lower() not in ("x86_64", "amd64"):
    ISAS = {"baseline": ""}


def chosen_isas() -> list[str]:
    asked = os.environ.get("FUSED_ATTENTION_ISAS", "").split()
    for name in asked:
        if name not in ("all", *ISAS):
            sys.exit(
                f"fused_attention: FUSED_ATTENTION_ISAS: expected some of all, {', '.join(ISAS)},"
                f" got {name!r}"
            )
    if "all" in asked:
        return list(ISAS)
    return [x for x in ISAS if x in ("baseline", *asked) or (not asked and x != "amx_emulated")]


def kernel_units() -> list[tuple[Path, list[str], str]]:
    """Returns each source, its flags, and the name that tells its objects apart."""
    return [
        (source, [*ISAS[isa].split(), f"-DFUSED_ATTENTION_ISA={isa}"], isa)
        for isa in chosen_isas()
        for source in sorted(Path("csrc/cpu").glob("kernels_*.cpp"))
    ]
