// Blocked products on vectors held in registers, and the run-time choice of their instruction set.
//
// The compiler's own vector types, one for each lane count. The lane count must match the target: 16 lanes compiled for AVX2
// live in memory and run twenty times slower, so target_clones over one body (isa.h) will not do here. A kernel is a template in
// lanes and blocking, inlined into one plain function for every level: MVAT_V4, MVAT_V3 and the baseline.
#pragma once

#include <cstdint>
#include <new>
#include <type_traits>

#include "isa.h"

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define MVAT_LEVELS 1
#define MVAT_V4 __attribute__((target("arch=x86-64-v4")))
#define MVAT_V3 __attribute__((target("arch=x86-64-v3")))
#else
#define MVAT_LEVELS 0
#endif

// Unrolled whole, so that arrays of vectors become registers.
#define MVAT_UNROLL _Pragma("GCC unroll 16")

// What was stored before it is not kept in registers for after it.
#define MVAT_FENCE asm volatile("" ::: "memory")

// The level of x86-64 that this processor has: 4 (AVX-512), 3 (AVX2 and FMA) or 1.
inline int isa_level() {
#if MVAT_LEVELS
  if (__builtin_cpu_supports("x86-64-v4")) return 4;
  if (__builtin_cpu_supports("x86-64-v3")) return 3;
#endif
  return 1;
}

// A kernel's entries for every level and dtype: ENTRIES(name, target, T, lanes, vectors, rows of a block).
#if MVAT_LEVELS
#define MVAT_EVERY_LEVEL(ENTRIES)            \
  ENTRIES(float_v4, MVAT_V4, float, 16, 3, 8) \
  ENTRIES(float_v3, MVAT_V3, float, 8, 3, 4)  \
  ENTRIES(double_v3, MVAT_V3, double, 4, 3, 4) \
  ENTRIES(float_v1, , float, 4, 3, 4)          \
  ENTRIES(double_v1, , double, 2, 3, 4)
#else
#define MVAT_EVERY_LEVEL(ENTRIES)     \
  ENTRIES(float_v1, , float, 4, 3, 4) \
  ENTRIES(double_v1, , double, 2, 3, 4)
#endif

// level<T>(): of the tables level_float_v4 ... level_double_v1, each a Level<T>, the one for T on this machine.
#if MVAT_LEVELS
#define MVAT_CHOOSE_LEVEL                                                             \
  template <typename T>                                                               \
  const Level<T>& level() {                                                           \
    if constexpr (std::is_same_v<T, float>) {                                         \
      if (isa_level() >= 3) return isa_level() == 4 ? level_float_v4 : level_float_v3; \
      return level_float_v1;                                                          \
    } else {                                                                          \
      return isa_level() >= 3 ? level_double_v3 : level_double_v1;                    \
    }                                                                                 \
  }
#else
#define MVAT_CHOOSE_LEVEL                     \
  template <typename T>                       \
  const Level<T>& level() {                   \
    if constexpr (std::is_same_v<T, float>) { \
      return level_float_v1;                  \
    } else {                                  \
      return level_double_v1;                 \
    }                                         \
  }
#endif

// Memory on a cache line's boundary, not initialised.
template <typename T>
struct Aligned {
  T* data;
  explicit Aligned(int64_t size) : data(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64)))) {}
  ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
};

template <typename T, int L>
struct Simd {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Vector __attribute__((vector_size(sizeof(T) * L)));
  typedef Bits Integers __attribute__((vector_size(sizeof(T) * L)));
  typedef T Memory __attribute__((vector_size(sizeof(T) * L), aligned(sizeof(T)), may_alias));  // at any address
};

template <typename T, int L, int NV, int MR>
MVAT_INLINE void multiply_add_step(typename Simd<T, L>::Vector (&acc)[MR][NV], const T* __restrict b, const T* __restrict a,
                                   int64_t row) {
  typename Simd<T, L>::Vector lanes[NV];
  MVAT_UNROLL for (int v = 0; v < NV; v++) lanes[v] = *(const typename Simd<T, L>::Memory*)(b + v * L);
  MVAT_UNROLL for (int r = 0; r < MR; r++) {
    const T w = a[r * row];
    MVAT_UNROLL for (int v = 0; v < NV; v++) acc[r][v] += lanes[v] * w;
  }
}

// acc[r][v] += sum over i < n of a[r * row + i * step] * b[i * ld + v * L ...]: a is broadcast, b fills the lanes.
template <typename T, int L, int NV, int MR>
MVAT_INLINE void multiply_add(typename Simd<T, L>::Vector (&acc)[MR][NV], const T* __restrict b, int64_t ld,
                              const T* __restrict a, int64_t row, int64_t step, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    MVAT_UNROLL for (int j = 0; j < 4; j++, b += ld, a += step) multiply_add_step<T, L>(acc, b, a, row);
  for (; i < n; i++, b += ld, a += step) multiply_add_step<T, L>(acc, b, a, row);
}

// x = 2^x in place for x <= 100. Below 2^-100 (2^-1000 in double) it stays there: nothing beside a softmax's maximum, and no
// denormals. Relative error 9.2e-8 in float (a minimax polynomial), 2e-16 in double (Taylor's).
template <int L>
MVAT_INLINE void exp2_lanes(typename Simd<float, L>::Vector& x) {
  using Vector = typename Simd<float, L>::Vector;
  using Integers = typename Simd<float, L>::Integers;
  x = x < -100.f ? Vector{} - 100.f : x;  // a NaN stays
  const Vector shifted = x + 0x1.8p23f;  // rounds; the integer stands in the low bits
  const Vector f = x - (shifted - 0x1.8p23f);
  Vector p = f * 1.326472707e-3f + 9.671512649e-3f;
  p = p * f + 5.550733744e-2f;
  p = p * f + 2.402224209e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.f;
  x = (Vector)((Integers)p + ((Integers)shifted << 23));
}

template <int L>
MVAT_INLINE void exp2_lanes(typename Simd<double, L>::Vector& x) {
  using Vector = typename Simd<double, L>::Vector;
  using Integers = typename Simd<double, L>::Integers;
  constexpr double kLn2 = 0x1.62e42fefa39efp-1;
  x = x < -1000. ? Vector{} - 1000. : x;
  const Vector shifted = x + 0x1.8p52;
  const Vector f = (x - (shifted - 0x1.8p52)) * kLn2;
  Vector p = Vector{} + 1.;
  for (int k = 14; k > 0; k--) p = p * f * (1. / k) + 1.;
  x = (Vector)((Integers)p + ((Integers)shifted << 52));
}
