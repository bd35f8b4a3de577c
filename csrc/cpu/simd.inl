// Includes the vector vocabulary of the instruction set that a translation unit is compiled for
// (isa_*.cpp names it). The kernels are written in this vocabulary. A file that is opened alone
// gets the baseline's.
#pragma once

#ifndef FUSED_ATTENTION_SIMD
#define FUSED_ATTENTION_SIMD "simd_baseline.inl"
#endif

#include FUSED_ATTENTION_SIMD
