#include "power_sum.h"

#include <algorithm>
#include <cmath>

#include "isa.h"
#include "power.h"

namespace mvat {
namespace {

constexpr int64_t kGroup = 8;

enum class Power { kOne, kTwo, kThree, kAny };

template <Power P, typename T>
MVAT_INLINE T power(T x, T p) {
  if constexpr (P == Power::kTwo) return x * x;
  if constexpr (P == Power::kOne) return std::fabs(x);
  if constexpr (P == Power::kThree) return x * x * std::fabs(x);
  return positive_power(x, p);
}

// grad * d|x|^p/dx. A gradient of 0 at x = 0 holds for every p >= 1.
template <Power P, typename T>
MVAT_INLINE T slope(T x, T grad, T p) {
  if constexpr (P == Power::kTwo) return (grad + grad) * x;
  if constexpr (P == Power::kThree) return grad * (3 * x * std::fabs(x));
  const T sign = T(x > 0) - T(x < 0);
  if constexpr (P == Power::kOne) return grad * sign;
  return grad * (p * positive_power(x, p - 1)) * sign;
}

template <int64_t N, Power P, typename T>
MVAT_INLINE T tree(const T* x, int64_t stride, T p) {
  if constexpr (N == 1) {
    return power<P>(*x, p);
  } else {
    return tree<N / 2, P>(x, stride, p) + tree<N / 2, P>(x + N / 2 * stride, stride, p);
  }
}

template <int64_t N, Power P, typename T>
MVAT_INLINE void add(const T* x, int64_t stride, int64_t length, T p, double* total) {
#pragma omp simd
  for (int64_t t = 0; t < length; t++) total[t] += tree<N, P>(x + t, stride, p);
}

template <Power P, typename T>
MVAT_INLINE void map(const T* x, int64_t channels, int64_t stride, int64_t length, T p, T* out) {
  double total[kTile];
  std::fill_n(total, length, 0.0);
  int64_t c = 0;
  for (; c + kGroup <= channels; c += kGroup) add<kGroup, P>(x + c * stride, stride, length, p, total);
  if (channels - c >= 4) add<4, P>(x + c * stride, stride, length, p, total), c += 4;
  if (channels - c >= 2) add<2, P>(x + c * stride, stride, length, p, total), c += 2;
  if (channels - c >= 1) add<1, P>(x + c * stride, stride, length, p, total);
  for (int64_t t = 0; t < length; t++) out[t] = T(total[t]);
}

template <Power P, typename T>
MVAT_INLINE void grad_map(const T* grad, const T* x, int64_t channels, int64_t stride, int64_t length, T p, T* dx,
                          int64_t dx_stride) {
  for (int64_t c = 0; c < channels; c++, x += stride, dx += dx_stride) {
#pragma omp simd
    for (int64_t t = 0; t < length; t++) dx[t] = slope<P>(x[t], grad[t], p);
  }
}

}  // namespace

#define MVAT_ENTRIES(T)                                                                                            \
  MVAT_CLONES void map_tile(const T* x, int64_t channels, int64_t stride, int64_t length, T p, T* out) {           \
    if (p == 2) return map<Power::kTwo>(x, channels, stride, length, p, out);                                      \
    if (p == 1) return map<Power::kOne>(x, channels, stride, length, p, out);                                      \
    if (p == 3) return map<Power::kThree>(x, channels, stride, length, p, out);                                    \
    map<Power::kAny>(x, channels, stride, length, p, out);                                                         \
  }                                                                                                                \
  MVAT_CLONES void grad_tile(const T* grad, const T* x, int64_t channels, int64_t stride, int64_t length, T p,     \
                             T* dx, int64_t dx_stride) {                                                           \
    if (p == 2) return grad_map<Power::kTwo>(grad, x, channels, stride, length, p, dx, dx_stride);                 \
    if (p == 1) return grad_map<Power::kOne>(grad, x, channels, stride, length, p, dx, dx_stride);                 \
    if (p == 3) return grad_map<Power::kThree>(grad, x, channels, stride, length, p, dx, dx_stride);               \
    grad_map<Power::kAny>(grad, x, channels, stride, length, p, dx, dx_stride);                                    \
  }
MVAT_ENTRIES(float)
MVAT_ENTRIES(double)
#undef MVAT_ENTRIES

}  // namespace mvat
