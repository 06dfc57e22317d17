// Q[b, t] = sum over c of |x[b, c, t]|^p and its gradient, on the CPU.
//
// Both are limited by memory, so each input is read once and in place. The work is split over (clip, tile of T): a tile's
// totals stay in cache while the channels stream past (csrc/cpu/power_sum.h).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>

#include "features.h"
#include "power_sum.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// How x [B, C, T] is read, and how its (clip, tile) pairs are spread over the threads.
struct Layout {
  int64_t batch, channels, length, batch_stride, stride, tile, tiles;

  explicit Layout(const Tensor& x)
      : batch(x.size(0)), channels(x.size(1)), length(x.size(2)), batch_stride(x.stride(0)), stride(x.stride(1)) {
    // Short and wide features (the deepest block: C 960, T 249) would leave threads idle with long tiles.
    for (tile = mvat::kTile; tile > 64 && batch * ((length + tile - 1) / tile) < 16;) tile /= 2;
    tiles = (length + tile - 1) / tile;
  }

  // Calls work(clip, start, length) for every tile.
  template <typename Work>
  void each_tile(const Work& work) const {
    const int64_t grain = std::max<int64_t>(1, mvat::kGrain / (tile * std::max<int64_t>(1, channels)));
    torch::stable::parallel_for(0, batch * tiles, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t start = i % tiles * tile;
        work(i / tiles, start, std::min(tile, length - start));
      }
    });
  }
};

void check(const Tensor& x, double p) {
  STD_TORCH_CHECK(x.dim() == 3, "attention_map: expected x [B, C, T], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "attention_map: expected float32 or float64");
  STD_TORCH_CHECK(p >= 1 && std::isfinite(p), "attention_map: expected a finite p >= 1, got ", p);
}

template <typename T>
void map(const Tensor& x, double p, Tensor& out) {
  const Layout layout(x);
  const T* source = x.const_data_ptr<T>();
  T* target = out.mutable_data_ptr<T>();
  layout.each_tile([&](int64_t clip, int64_t start, int64_t length) {
    mvat::map_tile(source + clip * layout.batch_stride + start, layout.channels, layout.stride, length, T(p),
                   target + clip * layout.length + start);
  });
}

template <typename T>
void grad_map(const Tensor& grad, const Tensor& x, double p, Tensor& dx) {
  const Layout layout(x);
  const T* upper = grad.const_data_ptr<T>();
  const T* source = x.const_data_ptr<T>();
  T* target = dx.mutable_data_ptr<T>();
  layout.each_tile([&](int64_t clip, int64_t start, int64_t length) {
    mvat::grad_tile(upper + clip * layout.length + start, source + clip * layout.batch_stride + start, layout.channels,
                    layout.stride, length, T(p), target + clip * layout.channels * layout.length + start, layout.length);
  });
}

Tensor attention_map(const Tensor& x_any, double p) {
  check(x_any, p);
  const Tensor x = readable(x_any);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(2)});
  x.scalar_type() == ScalarType::Float ? map<float>(x, p, out) : map<double>(x, p, out);
  return out;
}

Tensor attention_map_backward(const Tensor& grad_any, const Tensor& x_any, double p) {
  check(x_any, p);
  STD_TORCH_CHECK(grad_any.dim() == 2 && grad_any.size(0) == x_any.size(0) && grad_any.size(1) == x_any.size(2) &&
                      grad_any.scalar_type() == x_any.scalar_type(),
                  "attention_map_backward: expected grad [B, T] in the dtype of x [B, C, T]");
  const Tensor x = readable(x_any);
  const Tensor grad = torch::stable::contiguous(grad_any);
  Tensor dx = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  x.scalar_type() == ScalarType::Float ? grad_map<float>(grad, x, p, dx) : grad_map<double>(grad, x, p, dx);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mvat, CPU, m) {
  m.impl("attention_map", TORCH_BOX(&attention_map));
  m.impl("attention_map_backward", TORCH_BOX(&attention_map_backward));
}
