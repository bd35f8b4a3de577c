// The vector vocabulary of the instruction set that a unit is compiled for (isa_*.cpp names it):
// the algorithms are written in its words. A file that is opened alone has the baseline's.
#pragma once

#ifndef FUSED_ATTENTION_SIMD
#define FUSED_ATTENTION_SIMD "simd_baseline.inl"
#endif

#include FUSED_ATTENTION_SIMD
