// |x|^p summed over channels and its gradient: what the attention map and the transfer loss are made of.
#pragma once

#include "tiles.h"

namespace mvat::cuda {

enum class Power { kOne, kTwo, kAny };

template <Power P>
__device__ inline float power(float x, float p) {
  if constexpr (P == Power::kTwo) return x * x;
  if constexpr (P == Power::kOne) return fabsf(x);
  return powf(fabsf(x), p);
}

// grad * d|x|^p/dx. A gradient of 0 at x = 0 holds for every p >= 1.
template <Power P>
__device__ inline float slope(float x, float grad, float p) {
  if constexpr (P == Power::kTwo) return (grad + grad) * x;
  const float sign = float(x > 0) - float(x < 0);
  if constexpr (P == Power::kOne) return grad * sign;
  return grad * (p * powf(fabsf(x), p - 1)) * sign;
}

// powf is long: one copy of it. The others are short, and many loads in flight are what hides the memory's latency.
template <Power P>
constexpr int kUnroll = P == Power::kAny ? 1 : 8;

template <typename T, int V, Power P, typename Emit>
__device__ __forceinline__ void map_tile_of(const T* x, int64_t stride, int64_t channels, int64_t length,
                                            const Spread& spread, float p, const Emit& emit) {
  const Place<V> place(spread);
  float total[V] = {};
  if (place.column < length) {
    x += place.column;
    const auto term = [&](int64_t c, float(&value)[V]) {
      load<V>(x + c * stride, value);
#pragma unroll
      for (int v = 0; v < V; v++) value[v] = power<P>(value[v], p);
    };
    sum_channels<V, kUnroll<P>>(place, channels, term, total);
  }
  join_rows<V>(place, total, length, emit);
}

// Calls emit(column, sum over channels of |x|^p) for the columns of a tile; x is the tile's first sample, `length` what is left
// of the clip from there. For V = 4 `length` is a multiple of 4.
template <typename T, int V, typename Emit>
__device__ __forceinline__ void map_tile(const T* x, int64_t stride, int64_t channels, int64_t length,
                                         const Spread& spread, float p, const Emit& emit) {
  if (p == 2) return map_tile_of<T, V, Power::kTwo>(x, stride, channels, length, spread, p, emit);
  if (p == 1) return map_tile_of<T, V, Power::kOne>(x, stride, channels, length, spread, p, emit);
  map_tile_of<T, V, Power::kAny>(x, stride, channels, length, spread, p, emit);
}

template <typename T, int V, Power P>
__device__ __forceinline__ void gradient_tile_of(const Place<V>& place, const float (&grad)[V], const T* x, int64_t stride,
                                 int64_t channels, float p, T* dx, int64_t dx_stride) {
  transform<V, kUnroll<P> == 1 ? 1 : 4>(
      place.row, channels, place.rows, [&](int64_t c, float(&value)[V]) { load<V>(x + c * stride, value); },
      [&](int64_t c, float(&value)[V]) {
#pragma unroll
        for (int v = 0; v < V; v++) value[v] = slope<P>(value[v], grad[v], p);
        store<V>(dx + c * dx_stride, value);
      });
}

// Writes the gradient of a map's V columns, grad, to every channel. x and dx point at the thread's first column.
template <typename T, int V>
__device__ __forceinline__ void gradient_tile(const Place<V>& place, const float (&grad)[V], const T* x, int64_t stride,
                                              int64_t channels, float p, T* dx, int64_t dx_stride) {
  if (p == 2) return gradient_tile_of<T, V, Power::kTwo>(place, grad, x, stride, channels, p, dx, dx_stride);
  if (p == 1) return gradient_tile_of<T, V, Power::kOne>(place, grad, x, stride, channels, p, dx, dx_stride);
  gradient_tile_of<T, V, Power::kAny>(place, grad, x, stride, channels, p, dx, dx_stride);
}

}  // namespace mvat::cuda
