// Vectors of a fixed number of lanes, and the choice at run time of how many.
//
// A kernel is an always-inlined template over its lanes, with one plain entry an instruction set (MVAT_V3, MVAT_V4 or neither)
// that inlines it: a vector type wider than the instruction set's own runs twenty times slower.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "isa.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define MVAT_LEVELS 1
#define MVAT_V3 __attribute__((target("arch=x86-64-v3")))
#define MVAT_V4 __attribute__((target("arch=x86-64-v4")))
#else
#define MVAT_LEVELS 0
#endif

#define MVAT_UNROLL _Pragma("GCC unroll 16")  // in full, so that arrays of vectors become registers

// Holds a vector in a register, where the compiler would rather load it twice.
#if defined(__x86_64__)
#define MVAT_KEEP(vector) asm("" : "+v"(vector))
#else
#define MVAT_KEEP(vector) (void)0
#endif

// The best x86-64 level of this machine that kernels are written for: 4 (AVX-512), 3 (AVX2 and FMA) or 1.
inline int machine_level() {
#if MVAT_LEVELS
  static const int level = __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 1;
  return level;
#else
  return 1;
#endif
}

template <typename T, int L>
struct Lanes {
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Vector __attribute__((vector_size(sizeof(T) * L)));
  typedef Int Mask __attribute__((vector_size(sizeof(T) * L)));
  typedef T Loose __attribute__((vector_size(sizeof(T) * L), aligned(alignof(T)), may_alias));
  typedef Int LooseMask __attribute__((vector_size(sizeof(T) * L), aligned(alignof(T)), may_alias));
};

template <int L, typename T>
MVAT_INLINE typename Lanes<T, L>::Vector load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T, L>::Loose*>(p);
}

template <int L, typename T>
MVAT_INLINE void store(T* p, typename Lanes<T, L>::Vector v) {
  *reinterpret_cast<typename Lanes<T, L>::Loose*>(p) = v;
}

// The sum of all lanes, in double and in one order.
template <int L, typename V>
MVAT_INLINE double sum_lanes(V v) {
  double total = 0;
  for (int l = 0; l < L; l++) total += v[l];
  return total;
}

// Where e^-x stops growing: 1 / (1 + e^87) is still normal. A variable, because GCC makes one instruction of a minimum with a
// value that it does not know, and two of one with a constant.
inline float exp_limit = 87.f;

// out[g] = e^-x[g] within an ulp and a half, finite for every finite x; a NaN gives any number. Step by step for all of x: one
// vector's chain of dependent instructions fills the scheduler long before it is through.
template <int L, int G>
MVAT_INLINE void exp_minus(const typename Lanes<float, L>::Vector (&x)[G], typename Lanes<float, L>::Vector (&out)[G]) {
  using V = typename Lanes<float, L>::Vector;
  using M = typename Lanes<float, L>::Mask;
  constexpr float kScale = -0x1.715476p+0f;  // -log2(e)
  constexpr float kRound = 0x1.8p23f;        // adding it leaves the nearest integer in the low bits
  constexpr float kPower[] = {0x1.5f3e54p-10f, 0x1.3b2d4cp-7f, 0x1.c6aee8p-5f, 0x1.ebfbdcp-3f, 0x1.62e430p-1f, 1.f};
  const V most = exp_limit * (V{} + 1.f), least = -exp_limit * (V{} + 1.f);
  V f[G], shifted[G];
  MVAT_UNROLL for (int g = 0; g < G; g++) f[g] = x[g] < most ? x[g] : most;
  MVAT_UNROLL for (int g = 0; g < G; g++) f[g] = f[g] > least ? f[g] : least;
  MVAT_UNROLL for (int g = 0; g < G; g++) shifted[g] = f[g] * kScale + kRound;
  MVAT_UNROLL for (int g = 0; g < G; g++) f[g] = f[g] * kScale - (shifted[g] - kRound);
  MVAT_UNROLL for (int g = 0; g < G; g++) out[g] = V{} + 0x1.41fbbcp-13f;  // 2^f on [-1/2, 1/2] to 2e-9
  MVAT_UNROLL for (int i = 0; i < 6; i++) {
    MVAT_UNROLL for (int g = 0; g < G; g++) out[g] = out[g] * f[g] + kPower[i];
  }
  MVAT_UNROLL for (int g = 0; g < G; g++) out[g] = V(M(out[g]) + (M(shifted[g]) << 23));
}

// float64 is for checks, not for speed.
template <int L, int G>
MVAT_INLINE void exp_minus(const typename Lanes<double, L>::Vector (&x)[G], typename Lanes<double, L>::Vector (&out)[G]) {
  for (int g = 0; g < G; g++) {
    typename Lanes<double, L>::Vector power{};
    for (int l = 0; l < L; l++) power[l] = std::exp(std::min(-x[g][l], 700.));  // no infinity, and a NaN stays
    out[g] = power;
  }
}

// gate[g] = 1 / (1 + e^-v[g]).
template <int L, int G, typename V>
MVAT_INLINE void sigmoid(const V (&v)[G], V (&gate)[G]) {
  exp_minus<L>(v, gate);
  MVAT_UNROLL for (int g = 0; g < G; g++) gate[g] = 1 / (1 + gate[g]);
}

// Zeroed memory on a cache line's boundary.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<T*>(::operator new(sizeof(T) * size, std::align_val_t(64)))) {
    for (int64_t i = 0; i < size; i++) data_[i] = 0;
  }
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};
