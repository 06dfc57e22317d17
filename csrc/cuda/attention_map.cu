// Q[b, t] = sum over c of |x[b, c, t]|^p and its gradient: one reading of x each, at the memory's speed.
#include "attention_map.h"

#include "common/power.h"

namespace mvat::cuda {
namespace {

template <typename T, int V>
__global__ void __launch_bounds__(kTileThreads) map_kernel(Feature x, Spread spread, float p, float* map) {
  const int64_t tiles = (x.length + spread.tile() - 1) / spread.tile();
  for (int64_t i = blockIdx.x; i < x.batch * tiles; i += gridDim.x) {
    const int64_t clip = i / tiles, start = i % tiles * spread.tile();
    const T* const source = static_cast<const T*>(x.data) + clip * x.batch_stride + start;
    float* const target = map + clip * x.length + start;
    map_tile<T, V>(source, x.channel_stride, x.channels, x.length - start, spread, p,
                   [&](int64_t column, float sum) { target[column] = sum; });
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kTileThreads)
    gradient_kernel(const float* grad, Feature x, Spread spread, float p, T* dx) {
  const int64_t tiles = (x.length + spread.tile() - 1) / spread.tile();
  const Place<V> place(spread);
  for (int64_t i = blockIdx.x; i < x.batch * tiles; i += gridDim.x) {
    const int64_t clip = i / tiles, t = i % tiles * spread.tile() + place.column;
    if (t >= x.length) continue;
    float upper[V];
    load<V>(grad + clip * x.length + t, upper);
    gradient_tile<T, V>(place, upper, static_cast<const T*>(x.data) + clip * x.batch_stride + t, x.channel_stride,
                        x.channels, p, dx + clip * x.channels * x.length + t, x.length);
  }
}

int64_t blocks_of(const Feature& x, const Spread& spread) {
  return grid_for(x.batch * ceil_divide(x.length, spread.tile()));
}

}  // namespace

void attention_map(const Feature& x, float p, float* map, cudaStream_t stream) {
  if (x.batch * x.length == 0) return;
  const Spread spread = spread_over(x.channels, fours(x));
  with_type(x.type, [&](auto element) {
    using T = decltype(element);
    const auto kernel = spread.vector == 4 ? map_kernel<T, 4> : map_kernel<T, 1>;
    MVAT_LAUNCH(kernel, blocks_of(x, spread), kTileThreads, 0, stream, x, spread, p, map);
  });
}

void attention_map_backward(const float* grad, const Feature& x, float p, void* dx, cudaStream_t stream) {
  if (x.batch * x.length * x.channels == 0) return;
  const bool aligned = fours(x) && fours(grad, Type::kFloat, x.length) && fours(dx, x.type, x.length);
  const Spread spread = spread_over(x.channels, aligned);
  with_type(x.type, [&](auto element) {
    using T = decltype(element);
    const auto kernel = spread.vector == 4 ? gradient_kernel<T, 4> : gradient_kernel<T, 1>;
    MVAT_LAUNCH(kernel, blocks_of(x, spread), kTileThreads, 0, stream, grad, x, spread, p, static_cast<T*>(dx));
  });
}

}  // namespace mvat::cuda
