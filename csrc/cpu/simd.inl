// Includes the vector vocabulary of the instruction set that a unit is compiled for, which setup.py
// names in FUSED_ATTENTION_ISA. The kernels are written in this vocabulary. A file that is opened
// alone gets the baseline's.
#pragma once

#ifndef FUSED_ATTENTION_ISA
#define FUSED_ATTENTION_ISA baseline
#endif

#define FA_STRING_OF(x) #x
#define FA_STRING(x) FA_STRING_OF(x)
#define FA_SIMD_FILE(isa) simd_##isa.inl
#define FA_SIMD_FILE_OF(isa) FA_STRING(FA_SIMD_FILE(isa))

#include FA_SIMD_FILE_OF(FUSED_ATTENTION_ISA)
