// The half of the local view with channels, on the CPU: its kernels for every instruction set and the loops over clips and groups
// of blocks, whose sums are merged in one order.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <vector>

#include "local_attention.h"
#include "local_attention_backward.h"
#include "local_attention_mask.h"

namespace local_attention {

using torch::stable::Tensor;

constexpr int64_t kRun = 32;      // chunks of a row kernel
constexpr int64_t kGroupRun = 4;  // groups that share one total of the weights' gradient

// The kernels, compiled once an instruction set.
template <typename T>
struct Kernels {
  void (*statistics)(const View<T>&, int64_t, Workspace<T>&, double*, double*);
  void (*pool)(const View<T>&, int64_t, Workspace<T>&, T*, int32_t*);
  void (*sums)(const View<T>&, int64_t, const T*, const int32_t*, Workspace<T>&, double*, double*);
  void (*gradients)(const View<T>&, int64_t, const Gradients<T>&, Workspace<T>&, T*);
  void (*logits)(const T*, const T*, int64_t, const T*, Rows<T>&, T*);
  void (*sigmoid)(T*, int64_t, T, T, T);
  void (*multiply)(const T*, int64_t, int64_t, const T*, int64_t, T*, int64_t);
  void (*product)(const T*, int64_t, const T*, int64_t, int64_t, int64_t, T*, double*);
  void (*gate)(const T*, const T*, int64_t, int64_t, int64_t, T, T, T*, T*, Rows<T>&, double*);
  void (*pooled)(const T*, const T*, const T*, const T*, int64_t, const T*, T, T, T, T, Rows<T>&, T*, T*, double*);
};

// I rows of kBlocks / L vectors: as many accumulators as the registers hold.
#define MVAT_KERNELS(NAME, TARGET, T, L, I)                                                                               \
  struct NAME {                                                                                                           \
    TARGET static void statistics(const View<T>& v, int64_t b, Workspace<T>& w, double* m, double* m2) {                  \
      statistics_body<I, L>(v, b, w, m, m2);                                                                              \
    }                                                                                                                     \
    TARGET static void pool(const View<T>& v, int64_t b, Workspace<T>& w, T* p, int32_t* i) { pool_body<I, L>(v, b, w, p, i); } \
    TARGET static void sums(const View<T>& v, int64_t b, const T* p, const int32_t* i, Workspace<T>& w, double* s,        \
                            double* q) {                                                                                  \
      sums_body<I, L>(v, b, p, i, w, s, q);                                                                               \
    }                                                                                                                     \
    TARGET static void gradients(const View<T>& v, int64_t b, const Gradients<T>& g, Workspace<T>& w, T* d) {             \
      gradients_body<I, L>(v, b, g, w, d);                                                                                \
    }                                                                                                                     \
    TARGET static void logits(const T* a, const T* m, int64_t n, const T* w, Rows<T>& r, T* z) {                          \
      logits_body<L>(a, m, n, w, r, z);                                                                                   \
    }                                                                                                                     \
    TARGET static void sigmoid(T* z, int64_t n, T m, T s, T b) { sigmoid_body<L>(z, n, m, s, b); }                        \
    TARGET static void multiply(const T* x, int64_t c, int64_t s, const T* m, int64_t n, T* y, int64_t q) {               \
      multiply_tile(x, c, s, m, n, y, q);                                                                                 \
    }                                                                                                                     \
    TARGET static void product(const T* a, int64_t as, const T* b, int64_t bs, int64_t c, int64_t n, T* o, double* t) {   \
      product_tile(a, as, b, bs, c, n, o, t);                                                                             \
    }                                                                                                                     \
    TARGET static void gate(const T* a, const T* d, int64_t n, int64_t p, int64_t c, T m, T r, T* z, T* g, Rows<T>& w,    \
                            double* s) {                                                                                  \
      gate_body<L>(a, d, n, p, c, m, r, z, g, w, s);                                                                      \
    }                                                                                                                     \
    TARGET static void pooled(const T* a, const T* m, const T* g, const T* z, int64_t n, const T* w, T s, T c, T l, T h,  \
                              Rows<T>& r, T* da, T* dm, double* dw) {                                                     \
      pooled_body<L>(a, m, g, z, n, w, s, c, l, h, r, da, dm, dw);                                                        \
    }                                                                                                                     \
    static constexpr Kernels<T> all() {                                                                                   \
      return {statistics, pool, sums, gradients, logits, sigmoid, multiply, product, gate, pooled};                       \
    }                                                                                                                     \
  };

MVAT_KERNELS(Plain, , float, 4, 2)
MVAT_KERNELS(Exact, , double, 2, 1)  // float64 is for checks, not for speed
#if MVAT_LEVELS
MVAT_KERNELS(Level3, MVAT_V3, float, 8, 4)
MVAT_KERNELS(Level4, MVAT_V4, float, 16, 8)
#endif
#undef MVAT_KERNELS

template <typename T>
Kernels<T> kernels() {
  if constexpr (std::is_same_v<T, double>) return Exact::all();
#if MVAT_LEVELS
  else if (machine_level() == 4) return Level4::all();
  else if (machine_level() == 3) return Level3::all();
#endif
  else return Plain::all();
}

// The sizes of a call, and its loops over the clips' parts.
struct Sizes {
  int64_t batch, channels, length, half, chunks, taps, mask_taps;

  Sizes(const Tensor& x, const Tensor& depthwise, int64_t segment, int64_t mask_taps = 0)
      : batch(x.size(0)), channels(x.size(1)), length(x.size(2)), half(segment / 2), chunks((length + segment) / half + 1),
        taps(depthwise.size(2)), mask_taps(mask_taps) {}

  int64_t segment() const { return 2 * half; }
  int64_t plane() const { return chunks * segment(); }
  int64_t groups() const { return (chunks + kBlocks) / kBlocks; }           // of the chunks + 1 blocks
  int64_t owners() const { return (chunks + kBlocks - 3) / (kBlocks - 2); }  // of the blocks 1 to chunks, by their owners
  int64_t owner_runs() const { return (owners() + kGroupRun - 1) / kGroupRun; }
  int64_t runs() const { return (chunks + kRun - 1) / kRun; }
  double count() const { return double(batch) * double(plane()); }  // of the values that a mean and a variance are taken of
};

// Calls work(clip, part, space) for every part of every clip; one space a thread.
template <typename Space, typename Work>
void each(int64_t clips, int64_t parts, const Work& work, const Space& make) {
  torch::stable::parallel_for(0, clips * parts, 1, [&](int64_t begin, int64_t end) {
    auto space = make();
    for (int64_t i = begin; i < end; i++) work(i / parts, i % parts, space);
  });
}

template <typename T>
View<T> view_of(const Sizes& sizes, const Tensor& x, const Tensor& depthwise) {
  View<T> view{};
  view.channels = sizes.channels, view.length = sizes.length, view.half = sizes.half;
  view.chunks = sizes.chunks, view.taps = sizes.taps, view.stride = x.stride(1);
  view.x = x.const_data_ptr<T>(), view.weight = depthwise.const_data_ptr<T>();
  return view;
}

template <typename T>
View<T> clip_of(View<T> view, const Tensor& x, int64_t clip) {
  view.x += clip * x.stride(0);
  return view;
}

// (count, mean, M2) of several parts put together, one after the other (Chan, Golub & LeVeque).
struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void add(double n, double other_mean, double other_m2) {
    if (n == 0) return;
    const double delta = other_mean - mean, total = count + n;
    mean += delta * (n / total);
    m2 += other_m2 + delta * delta * (count * (n / total));
    count = total;
  }
  double variance() const { return m2 / count; }
};

// norm1's factors: v = (u - mean) * scale + bias.
template <typename T>
std::vector<T> scales(const T* weight, const T* variance, int64_t channels, double eps) {
  std::vector<T> scale(channels);
  for (int64_t c = 0; c < channels; c++) scale[c] = T(double(weight[c]) / std::sqrt(double(variance[c]) + eps));
  return scale;
}

template <typename T>
void batch_statistics(const Sizes& sizes, const Kernels<T>& run, const View<T>& view, const Tensor& x, T* mean, T* variance) {
  const int64_t n = sizes.channels, groups = sizes.groups();
  std::vector<double> parts(sizes.batch * groups * 2 * n);
  each(sizes.batch, groups, [&](int64_t clip, int64_t group, Workspace<T>& space) {
    double* part = parts.data() + (clip * groups + group) * 2 * n;
    run.statistics(clip_of(view, x, clip), group * kBlocks, space, part, part + n);
  }, [&] { return Workspace<T>(sizes.half, sizes.taps, false); });
  for (int64_t c = 0; c < n; c++) {
    Moments moments;
    for (int64_t i = 0; i < sizes.batch * groups; i++) {
      const double* part = parts.data() + i * 2 * n;
      moments.add(double(halves(view, i % groups * kBlocks) * sizes.half), part[c], part[n + c]);
    }
    mean[c] = T(moments.mean);
    variance[c] = T(moments.variance());
  }
}

// Lets the view see norm1; the factors must live as long as it.
template <typename T>
std::vector<T> use_norm(View<T>& view, const Tensor& weight, const Tensor& bias, const T* mean, const T* variance, double eps) {
  std::vector<T> scale = scales(weight.const_data_ptr<T>(), variance, view.channels, eps);
  view.mean = mean, view.scale = scale.data(), view.bias = bias.const_data_ptr<T>();
  return scale;
}

template <typename T>
void pool(const Sizes& sizes, const Kernels<T>& run, const View<T>& view, const Tensor& x, T* pooled, int32_t* index) {
  const int64_t plane = sizes.plane();
  each(sizes.batch, sizes.groups(), [&](int64_t clip, int64_t group, Workspace<T>& space) {
    run.pool(clip_of(view, x, clip), group * kBlocks, space, pooled + clip * 2 * plane, index + clip * plane);
  }, [&] { return Workspace<T>(sizes.half, sizes.taps, false); });
}

// Sums [channels] of dv and of dv (u - mean), u the convolution's output.
template <typename T>
void pool_sums(const Sizes& sizes, const Kernels<T>& run, const View<T>& view, const Tensor& x, const T* dpooled,
               const int32_t* index, std::vector<double>& sum, std::vector<double>& product) {
  const int64_t n = sizes.channels, plane = sizes.plane(), groups = sizes.groups();
  std::vector<double> parts(sizes.batch * groups * 2 * n);
  each(sizes.batch, groups, [&](int64_t clip, int64_t group, Workspace<T>& space) {
    double* part = parts.data() + (clip * groups + group) * 2 * n;
    run.sums(clip_of(view, x, clip), group * kBlocks, dpooled + clip * 2 * plane, index + clip * plane, space, part, part + n);
  }, [&] { return Workspace<T>(sizes.half, sizes.taps, true); });
  sum.assign(n, 0), product.assign(n, 0);
  for (int64_t c = 0; c < n; c++)
    for (int64_t i = 0; i < sizes.batch * groups; i++) sum[c] += parts[i * 2 * n + c], product[c] += parts[(i * 2 + 1) * n + c];
}

// `with` and `grad_stride` are the first clip's; grad_clip and mask_clip the steps to the next one's.
template <typename T>
void pool_gradients(const Sizes& sizes, const Kernels<T>& run, const View<T>& view, const Tensor& x, const Gradients<T>& with,
                    int64_t grad_clip, int64_t mask_clip, T* dweight) {
  const int64_t n = sizes.channels, plane = sizes.plane(), taps = sizes.taps, runs = sizes.owner_runs();
  std::vector<double> parts(sizes.batch * runs * n * taps);
  struct Space {
    Workspace<T> work;
    Scratch<T> total;
  };
  each(sizes.batch, runs, [&](int64_t clip, int64_t part, Space& space) {
    Gradients<T> own = with;
    own.pooled += clip * 2 * plane, own.index += clip * plane;
    own.grad += clip * grad_clip, own.mask += clip * mask_clip, own.dx += clip * n * sizes.length;
    std::fill_n(space.total.get(), n * taps * kBlocks, T(0));
    for (int64_t i = part * kGroupRun; i < std::min((part + 1) * kGroupRun, sizes.owners()); i++)
      run.gradients(clip_of(view, x, clip), i * (kBlocks - 2), own, space.work, space.total.get());
    double* target = parts.data() + (clip * runs + part) * n * taps;
    for (int64_t k = 0; k < n * taps; k++)
      for (int64_t l = 0; l < kBlocks; l++) target[k] += space.total.get()[k * kBlocks + l];
  }, [&] { return Space{Workspace<T>(sizes.half, taps, true), Scratch<T>(n * taps * kBlocks)}; });
  for (int64_t k = 0; k < n * taps; k++) {
    double total = 0;
    for (int64_t i = 0; i < sizes.batch * runs; i++) total += parts[i * n * taps + k];
    dweight[k] = T(total);
  }
}

}  // namespace local_attention
