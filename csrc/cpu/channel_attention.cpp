// y = x * sigmoid(fc(max_t x) + fc(mean_t x)), fc(v) = W2 relu(W1 v + b1) + b2, and its gradients, on the CPU.
//
// A clip is read twice each way: for the gate of every channel, then to be scaled by it (backward: for the gates' gradients, then
// for its own). All threads work at one clip and meet it backwards the second time, so that they find its end still in their
// caches; small clips go whole to one thread each. Work is cut into blocks of a channel: maxima and sums of a block stand in fixed
// lanes and are merged in one order, whatever the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "features.h"
#include "isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kBlock = 4096;
constexpr int64_t kLanes = 16;
constexpr int64_t kGroup = 8 * kLanes;  // summed as trees in T, the trees in double
constexpr int64_t kColumns = 128;
constexpr int64_t kGrain = 32768;       // elements that are worth a thread
constexpr int64_t kWhole = 1 << 17;     // a clip of fewer elements stays in one thread's cache

template <int N, typename T>
MVAT_INLINE T sum_tree(const T* x) {
  if constexpr (N == 1) {
    return *x;
  } else {
    return sum_tree<N / 2>(x) + sum_tree<N / 2>(x + N / 2 * kLanes);
  }
}

// Skips NaN or not, as it comes: the sum tells of it.
template <int N, typename T>
MVAT_INLINE T max_tree(const T* x) {
  if constexpr (N == 1) {
    return *x;
  } else {
    const T a = max_tree<N / 2>(x), b = max_tree<N / 2>(x + N / 2 * kLanes);
    return a > b ? a : b;
  }
}

template <int N, typename T>
MVAT_INLINE T dot_tree(const T* x, int64_t x_stride, const T* y, int64_t y_stride) {
  if constexpr (N == 1) {
    return *x * *y;
  } else {
    return dot_tree<N / 2>(x, x_stride, y, y_stride) +
           dot_tree<N / 2>(x + N / 2 * x_stride, x_stride, y + N / 2 * y_stride, y_stride);
  }
}

template <typename T>
struct Pool {
  double sum;
  T max;
};

template <int N, typename T>
MVAT_INLINE void pool_group(const T* x, double* sum, T* max) {
#pragma omp simd
  for (int64_t i = 0; i < kLanes; i++) {
    const T top = max_tree<N>(x + i);
    sum[i] += double(sum_tree<N>(x + i));
    max[i] = top > max[i] ? top : max[i];
  }
}

template <int N, typename T>
MVAT_INLINE void dot_group(const T* x, const T* y, double* sum) {
#pragma omp simd
  for (int64_t i = 0; i < kLanes; i++) sum[i] += double(dot_tree<N>(x + i, kLanes, y + i, kLanes));
}

MVAT_INLINE double sum_lanes(double* sum) {
  for (int64_t n = kLanes / 2; n > 0; n /= 2) {
    for (int64_t i = 0; i < n; i++) sum[i] += sum[i + n];
  }
  return sum[0];
}

// Sum and maximum of a block; a NaN makes both NaN.
template <typename T>
MVAT_INLINE Pool<T> pool_block(const T* x, int64_t length) {
  double sum[kLanes] = {};
  T max[kLanes];
  std::fill_n(max, kLanes, -std::numeric_limits<T>::infinity());
  int64_t t = 0;
  for (; t + kGroup <= length; t += kGroup) pool_group<8>(x + t, sum, max);
  for (; t + kLanes <= length; t += kLanes) pool_group<1>(x + t, sum, max);
  for (int64_t i = 0; t < length; t++, i++) sum[i] += x[t], max[i] = x[t] > max[i] ? x[t] : max[i];
  Pool<T> pool{sum_lanes(sum), *std::max_element(max, max + kLanes)};
  if (!std::isfinite(pool.sum)) {
    // NaN, infinity, or an overflow on the way.
    pool.sum = 0;
    for (t = 0; t < length; t++) {
      pool.sum += x[t];
      if (x[t] != x[t]) pool.max = x[t];
    }
  }
  return pool;
}

// Where a block first holds the value, which may be NaN; it does hold it.
template <typename T>
MVAT_INLINE int64_t find_first(const T* x, int64_t length, T value) {
  const bool nan = value != value;
  int64_t t = 0;
  for (int found = 0; t + kGroup <= length; t += kGroup) {
#pragma omp simd reduction(| : found)
    for (int64_t i = 0; i < kGroup; i++) found |= (x[t + i] == value) | (nan & (x[t + i] != x[t + i]));
    if (found) break;
  }
  while (t < length - 1 && !(x[t] == value || (nan && x[t] != x[t]))) t++;
  return t;
}

template <typename T>
MVAT_INLINE double dot_block(const T* x, const T* y, int64_t length) {
  double sum[kLanes] = {};
  int64_t t = 0;
  for (; t + kGroup <= length; t += kGroup) dot_group<8>(x + t, y + t, sum);
  for (; t + kLanes <= length; t += kLanes) dot_group<1>(x + t, y + t, sum);
  for (int64_t i = 0; t < length; t++, i++) sum[i] += x[t] * y[t];
  return sum_lanes(sum);
}

template <typename T>
MVAT_INLINE void scale_block(const T* x, int64_t length, T scale, T shift, T* y) {
#pragma omp simd
  for (int64_t t = 0; t < length; t++) y[t] = x[t] * scale + shift;
}

// out[i] = sum_j w[i, j] v[j], w [rows, columns].
template <typename T>
MVAT_INLINE void times_vector(const T* w, int64_t rows, int64_t columns, const T* v, T* out) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4, w += 4 * columns) {
    T a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t j = 0; j < columns; j++) {
      a += w[j] * v[j], b += w[columns + j] * v[j], c += w[2 * columns + j] * v[j], d += w[3 * columns + j] * v[j];
    }
    out[i] = a, out[i + 1] = b, out[i + 2] = c, out[i + 3] = d;
  }
  for (; i < rows; i++, w += columns) {
    T a = 0;
#pragma omp simd reduction(+ : a)
    for (int64_t j = 0; j < columns; j++) a += w[j] * v[j];
    out[i] = a;
  }
}

template <int N, typename T>
MVAT_INLINE void add_rows(const T* v, int64_t v_stride, const T* w, int64_t stride, int64_t columns, double* sum) {
#pragma omp simd
  for (int64_t j = 0; j < columns; j++) sum[j] += double(dot_tree<N>(v, v_stride, w + j, stride));
}

// out[j] = sum_i v[i] w[i, j], w [rows, columns].
template <typename T>
MVAT_INLINE void vector_times(const T* v, int64_t v_stride, const T* w, int64_t rows, int64_t columns, T* out) {
  for (int64_t start = 0; start < columns; start += kColumns) {
    const int64_t count = std::min(kColumns, columns - start);
    double sum[kColumns];
    std::fill_n(sum, count, 0.0);
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8) add_rows<8>(v + i * v_stride, v_stride, w + i * columns + start, columns, count, sum);
    for (; i < rows; i++) add_rows<1>(v + i * v_stride, v_stride, w + i * columns + start, columns, count, sum);
    for (int64_t j = 0; j < count; j++) out[start + j] = T(sum[j]);
  }
}

// The entries that are compiled once an instruction set: plain functions, as target_clones wants them.
#define MVAT_ENTRIES(T)                                                                                                   \
  MVAT_CLONES void pool_entry(const T* x, int64_t length, Pool<T>* pool) { *pool = pool_block(x, length); }               \
  MVAT_CLONES int64_t find_entry(const T* x, int64_t length, T value) { return find_first(x, length, value); }            \
  MVAT_CLONES double dot_entry(const T* x, const T* y, int64_t length) { return dot_block(x, y, length); }                \
  MVAT_CLONES void scale_entry(const T* x, int64_t length, T scale, T shift, T* y) {                                      \
    scale_block(x, length, scale, shift, y);                                                                              \
  }                                                                                                                       \
  MVAT_CLONES void times_vector_entry(const T* w, int64_t rows, int64_t columns, const T* v, T* out) {                    \
    times_vector(w, rows, columns, v, out);                                                                               \
  }                                                                                                                       \
  MVAT_CLONES void vector_times_entry(const T* v, int64_t v_stride, const T* w, int64_t rows, int64_t columns, T* out) {  \
    vector_times(v, v_stride, w, rows, columns, out);                                                                     \
  }
MVAT_ENTRIES(float)
MVAT_ENTRIES(double)
#undef MVAT_ENTRIES

// How many pieces of work of this many elements are worth a thread.
int64_t pieces(int64_t elements) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
}

template <typename T>
struct Rows {
  T* data;
  int64_t batch_stride, stride;

  T* operator()(int64_t clip, int64_t channel) const { return data + clip * batch_stride + channel * stride; }
};

template <typename T>
Rows<const T> rows_of(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1)};
}

// How the blocks of x [B, C, T] are spread over the threads.
struct Layout {
  int64_t batch, channels, length, blocks;

  explicit Layout(const Tensor& x)
      : batch(x.size(0)), channels(x.size(1)), length(x.size(2)), blocks((length + kBlock - 1) / kBlock) {}

  // For every clip: read(channel, block, start, length) of every block, between(), write of every block, last one first. Each is
  // called with the clip in front.
  template <typename Read, typename Between, typename Write>
  void each_clip(const Read& read, const Between& between, const Write& write) const {
    const auto forwards = [&](int64_t clip, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) visit(clip, i, read);
    };
    const auto backwards = [&](int64_t clip, int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; i--) visit(clip, i, write);
    };
    const int64_t units = channels * blocks, threads = torch::stable::get_num_threads();
    if (channels * length < kWhole && (batch % threads == 0 || batch > 4 * threads)) {
      const int64_t grain = pieces(channels * length);
      torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
        for (int64_t clip = begin; clip < end; clip++) {
          forwards(clip, 0, units);
          between(clip);
          backwards(clip, 0, units);
        }
      });
      return;
    }
    const int64_t grain = pieces(std::min(kBlock, length));
    for (int64_t clip = 0; clip < batch; clip++) {
      torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { forwards(clip, begin, end); });
      between(clip);
      torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { backwards(clip, begin, end); });
    }
  }

 private:
  template <typename Work>
  void visit(int64_t clip, int64_t i, const Work& work) const {
    const int64_t start = i % blocks * kBlock;
    work(clip, i / blocks, i % blocks, start, std::min(kBlock, length - start));
  }
};

// The gate's two layers.
template <typename T>
struct Gate {
  int64_t channels, hidden;
  const T *weight1, *bias1, *weight2;

  Gate(const Tensor& w1, const Tensor& b1, const Tensor& w2)
      : channels(w1.size(1)), hidden(w1.size(0)), weight1(w1.const_data_ptr<T>()), bias1(b1.const_data_ptr<T>()),
        weight2(w2.const_data_ptr<T>()) {}

  // out = relu(W1 v + b1), NaN handed on
  void hide(const T* v, T* out) const {
    times_vector_entry(weight1, hidden, channels, v, out);
    for (int64_t i = 0; i < hidden; i++) {
      out[i] += bias1[i];
      if (out[i] <= 0) out[i] = 0;
    }
  }
};

template <typename T>
void forward(const Tensor& x_any, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, Tensor& y_any,
             Tensor& gate_any, Tensor& pooled, Tensor& index_any) {
  const Layout layout(x_any);
  const Gate<T> layers(w1, b1, w2);
  const int64_t channels = layout.channels, blocks = layout.blocks, hidden = layers.hidden, all = layout.batch * channels;
  const Rows<const T> x = rows_of<T>(x_any);
  const T* bias2 = b2.const_data_ptr<T>();
  T* y = y_any.mutable_data_ptr<T>();
  T* gate = gate_any.mutable_data_ptr<T>();
  T* max = pooled.mutable_data_ptr<T>();
  T* mean = max + all;
  int64_t* index = index_any.mutable_data_ptr<int64_t>();
  std::vector<Pool<T>> pools(all * blocks);
  std::vector<int64_t> holder(all);  // the block that holds the maximum
  std::vector<T> scratch(layout.batch * 2 * hidden);

  layout.each_clip(
      [&](int64_t clip, int64_t c, int64_t block, int64_t start, int64_t length) {
        pool_entry(x(clip, c) + start, length, &pools[(clip * channels + c) * blocks + block]);
      },
      [&](int64_t clip) {
        for (int64_t row = clip * channels; row < (clip + 1) * channels; row++) {
          const Pool<T>* pool = &pools[row * blocks];
          double sum = 0;
          int64_t best = 0;
          for (int64_t i = 0; i < blocks; i++) {
            sum += pool[i].sum;
            // The first maximum, or the first NaN.
            if (pool[best].max == pool[best].max && !(pool[i].max <= pool[best].max)) best = i;
          }
          holder[row] = best;
          max[row] = pool[best].max;
          mean[row] = T(sum / double(layout.length));
        }
        T* h = &scratch[clip * 2 * hidden];
        layers.hide(max + clip * channels, h);
        layers.hide(mean + clip * channels, h + hidden);
        for (int64_t i = 0; i < hidden; i++) h[i] += h[hidden + i];
        T* g = gate + clip * channels;
        times_vector_entry(layers.weight2, channels, hidden, h, g);
        for (int64_t c = 0; c < channels; c++) g[c] = 1 / (1 + std::exp(-(g[c] + 2 * bias2[c])));
      },
      [&](int64_t clip, int64_t c, int64_t block, int64_t start, int64_t length) {
        const int64_t row = clip * channels + c;
        const T* source = x(clip, c) + start;
        if (block == holder[row]) index[row] = start + find_entry(source, length, max[row]);
        scale_entry(source, length, gate[row], -T(0), y + row * layout.length + start);
      });
}

template <typename T>
void backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& gate_any, const Tensor& pooled, const Tensor& index_any,
              const Tensor& w1, const Tensor& b1, const Tensor& w2, Tensor& dx_any, Tensor& dw1_any, Tensor& db1_any,
              Tensor& dw2_any, Tensor& db2_any) {
  const Layout layout(x_any);
  const Gate<T> layers(w1, b1, w2);
  const int64_t batch = layout.batch, channels = layout.channels, blocks = layout.blocks, hidden = layers.hidden;
  const Rows<const T> x = rows_of<T>(x_any), grad = rows_of<T>(grad_any);
  const T* gate = gate_any.const_data_ptr<T>();
  const T* max = pooled.const_data_ptr<T>();
  const T* mean = max + batch * channels;
  const int64_t* index = index_any.const_data_ptr<int64_t>();
  T* dx = dx_any.mutable_data_ptr<T>();
  std::vector<double> dots(batch * channels * blocks);
  // Of the sum before the sigmoid; of maxima and means; relu's outputs, summed; its inputs, of maxima, then of means.
  std::vector<T> dsum(batch * channels), dmax(batch * channels), dmean(batch * channels);
  std::vector<T> summed(batch * hidden), dhidden(2 * batch * hidden), scratch(batch * 2 * hidden);

  layout.each_clip(
      [&](int64_t clip, int64_t c, int64_t block, int64_t start, int64_t length) {
        dots[(clip * channels + c) * blocks + block] = dot_entry(grad(clip, c) + start, x(clip, c) + start, length);
      },
      [&](int64_t clip) {
        for (int64_t row = clip * channels; row < (clip + 1) * channels; row++) {
          double dgate = 0;
          for (int64_t i = 0; i < blocks; i++) dgate += dots[row * blocks + i];
          dsum[row] = T(dgate) * ((1 - gate[row]) * gate[row]);
        }
        T *of_max = &scratch[clip * 2 * hidden], *of_mean = of_max + hidden, *sum = &summed[clip * hidden];
        T *dof_max = &dhidden[clip * hidden], *dof_mean = &dhidden[(batch + clip) * hidden];
        layers.hide(max + clip * channels, of_max);
        layers.hide(mean + clip * channels, of_mean);
        vector_times_entry(&dsum[clip * channels], 1, layers.weight2, channels, hidden, dof_max);
        for (int64_t i = 0; i < hidden; i++) {
          sum[i] = of_max[i] + of_mean[i];
          dof_mean[i] = of_mean[i] == 0 ? 0 : dof_max[i];
          dof_max[i] = of_max[i] == 0 ? 0 : dof_max[i];
        }
        vector_times_entry(dof_max, 1, layers.weight1, hidden, channels, &dmax[clip * channels]);
        vector_times_entry(dof_mean, 1, layers.weight1, hidden, channels, &dmean[clip * channels]);
      },
      [&](int64_t clip, int64_t c, int64_t, int64_t start, int64_t length) {
        const int64_t row = clip * channels + c, top = index[row] - start;
        T* target = dx + row * layout.length + start;
        scale_entry(grad(clip, c) + start, length, gate[row], T(double(dmean[row]) / double(layout.length)), target);
        if (top >= 0 && top < length) target[top] += dmax[row];
      });

  T *dw1 = dw1_any.mutable_data_ptr<T>(), *db1 = db1_any.mutable_data_ptr<T>();
  T *dw2 = dw2_any.mutable_data_ptr<T>(), *db2 = db2_any.mutable_data_ptr<T>();
  const int64_t grain = pieces(2 * batch * channels);
  torch::stable::parallel_for(0, hidden + channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      double sum = 0;
      if (i < hidden) {
        vector_times_entry(dhidden.data() + i, hidden, max, 2 * batch, channels, dw1 + i * channels);
        for (int64_t clip = 0; clip < 2 * batch; clip++) sum += dhidden[clip * hidden + i];
        db1[i] = T(sum);
      } else {
        const int64_t c = i - hidden;
        vector_times_entry(dsum.data() + c, channels, summed.data(), batch, hidden, dw2 + c * hidden);
        for (int64_t clip = 0; clip < batch; clip++) sum += dsum[clip * channels + c];
        db2[c] = T(2 * sum);
      }
    }
  });
}

void check(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0 && x.size(2) > 0,
                  "channel_attention: expected x [B, C, T] with at least one channel and one sample");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "channel_attention: expected float32 or float64");
  STD_TORCH_CHECK(w1.dim() == 2 && b1.dim() == 1 && w2.dim() == 2 && w1.size(1) == x.size(1) && b1.size(0) == w1.size(0) &&
                      w2.size(0) == x.size(1) && w2.size(1) == w1.size(0),
                  "channel_attention: expected weight1 [H, C], bias1 [H], weight2 [C, H] for x [B, C, T]");
  STD_TORCH_CHECK(w1.scalar_type() == x.scalar_type() && b1.scalar_type() == x.scalar_type() &&
                      w2.scalar_type() == x.scalar_type(),
                  "channel_attention: expected parameters in the dtype of x");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_attention(const Tensor& x_any, const Tensor& w1_any, const Tensor& b1_any,
                                                             const Tensor& w2_any, const Tensor& b2_any) {
  check(x_any, w1_any, b1_any, w2_any);
  STD_TORCH_CHECK(b2_any.dim() == 1 && b2_any.size(0) == x_any.size(1) && b2_any.scalar_type() == x_any.scalar_type(),
                  "channel_attention: expected bias2 [C] in the dtype of x [B, C, T]");
  const Tensor x = readable(x_any);
  const Tensor w1 = torch::stable::contiguous(w1_any), b1 = torch::stable::contiguous(b1_any);
  const Tensor w2 = torch::stable::contiguous(w2_any), b2 = torch::stable::contiguous(b2_any);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  Tensor gate = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  Tensor pooled = torch::stable::new_empty(x, {2, x.size(0), x.size(1)});
  Tensor index = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Long);
  const auto run = x.scalar_type() == ScalarType::Float ? forward<float> : forward<double>;
  run(x, w1, b1, w2, b2, y, gate, pooled, index);
  return {y, gate, pooled, index};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> channel_attention_backward(
    const Tensor& grad_any, const Tensor& x_any, const Tensor& gate_any, const Tensor& pooled_any, const Tensor& index_any,
    const Tensor& w1_any, const Tensor& b1_any, const Tensor& w2_any) {
  check(x_any, w1_any, b1_any, w2_any);
  const int64_t batch = x_any.size(0), channels = x_any.size(1), length = x_any.size(2), hidden = w1_any.size(0);
  STD_TORCH_CHECK(grad_any.dim() == 3 && grad_any.size(0) == batch && grad_any.size(1) == channels &&
                      grad_any.size(2) == length && grad_any.scalar_type() == x_any.scalar_type(),
                  "channel_attention_backward: expected grad in the shape and dtype of x");
  STD_TORCH_CHECK(gate_any.numel() == batch * channels && pooled_any.numel() == 2 * batch * channels &&
                      index_any.numel() == batch * channels && gate_any.scalar_type() == x_any.scalar_type() &&
                      pooled_any.scalar_type() == x_any.scalar_type() && index_any.scalar_type() == ScalarType::Long,
                  "channel_attention_backward: expected gate, pooled and index as channel_attention gives them");
  const Tensor grad = readable(grad_any), x = readable(x_any);
  const Tensor gate = torch::stable::contiguous(gate_any), pooled = torch::stable::contiguous(pooled_any);
  const Tensor index = torch::stable::contiguous(index_any), w1 = torch::stable::contiguous(w1_any);
  const Tensor b1 = torch::stable::contiguous(b1_any), w2 = torch::stable::contiguous(w2_any);
  Tensor dx = torch::stable::new_empty(x, {batch, channels, length});
  Tensor dw1 = torch::stable::new_empty(x, {hidden, channels}), db1 = torch::stable::new_empty(x, {hidden});
  Tensor dw2 = torch::stable::new_empty(x, {channels, hidden}), db2 = torch::stable::new_empty(x, {channels});
  const auto run = x.scalar_type() == ScalarType::Float ? backward<float> : backward<double>;
  run(grad, x, gate, pooled, index, w1, b1, w2, dx, dw1, db1, dw2, db2);
  return {dx, dw1, db1, dw2, db2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mvat, CPU, m) {
  m.impl("channel_attention", TORCH_BOX(&channel_attention));
  m.impl("channel_attention_backward", TORCH_BOX(&channel_attention_backward));
}
