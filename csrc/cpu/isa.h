// Run-time choice of the instruction set for functions whose loops the compiler vectorises.
//
// A function marked MVAT_CLONES is compiled once for every x86-64 level and the loader picks the best one. What it calls must be
// inlined into it (MVAT_INLINE, no lambdas), or the callee stays at the baseline; parallel regions stay outside.
#pragma once

#include <cstdlib>

#define MVAT_INLINE static inline __attribute__((always_inline))

// GCC knows the levels since version 12, and the choice at load time needs glibc's ifunc. Elsewhere: one plain function.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define MVAT_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MVAT_CLONES
#endif
