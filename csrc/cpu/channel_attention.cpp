// y = x * sigmoid(fc(max_t x) + fc(mean_t x)), fc(v) = W2 relu(W1 v + b1) + b2, and its gradients, on the CPU.
//
// Features are read twice each way: for the gates, then to be scaled by them (backward: with the upper gradient for the gates'
// gradients, then that gradient alone for the features' own). All threads work at one clip, or at as many small ones as caches
// hold, and go backwards the second time, so that each finds what it read last still in its cache. Work is cut into blocks of a
// channel: maxima and sums of a block stand in fixed lanes and are merged in one order, whatever the number of threads.
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
constexpr int64_t kStrip = 32;
constexpr int64_t kGrain = 32768;       // elements that are worth a thread
constexpr int64_t kWave = 1 << 20;      // elements that caches hold

template <int N, typename T>
MVAT_INLINE T sum_tree(const T* x, int64_t stride) {
  if constexpr (N == 1) {
    return *x;
  } else {
    return sum_tree<N / 2>(x, stride) + sum_tree<N / 2>(x + N / 2 * stride, stride);
  }
}

// Skips a NaN or not, as it comes: the sum tells of it.
template <int N, typename T>
MVAT_INLINE T max_tree(const T* x, int64_t stride) {
  if constexpr (N == 1) {
    return *x;
  } else {
    const T a = max_tree<N / 2>(x, stride), b = max_tree<N / 2>(x + N / 2 * stride, stride);
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
    const T top = max_tree<N>(x + i, kLanes);
    sum[i] += double(sum_tree<N>(x + i, kLanes));
    max[i] = top > max[i] ? top : max[i];
  }
}

template <int N, typename T>
MVAT_INLINE void dot_group(const T* x, const T* y, double* sum) {
#pragma omp simd
  for (int64_t i = 0; i < kLanes; i++) sum[i] += double(dot_tree<N>(x + i, kLanes, y + i, kLanes));
}

// Sum and maximum of a block; a NaN makes both NaN.
template <typename T>
MVAT_INLINE Pool<T> pool_block(const T* x, int64_t length) {
  double sum[kLanes] = {};
  T max[kLanes];
  std::fill_n(max, kLanes, -std::numeric_limits<T>::infinity());
  int64_t t = 0;
  for (; t + kGroup <= length; t += kGroup) pool_group<8>(x + t, sum, max);
  if (length - t >= 4 * kLanes) pool_group<4>(x + t, sum, max), t += 4 * kLanes;
  if (length - t >= 2 * kLanes) pool_group<2>(x + t, sum, max), t += 2 * kLanes;
  if (length - t >= kLanes) pool_group<1>(x + t, sum, max), t += kLanes;
  for (int64_t i = 0; t < length; t++, i++) sum[i] += x[t], max[i] = x[t] > max[i] ? x[t] : max[i];
  Pool<T> pool{sum_tree<kLanes>(sum, 1), max_tree<kLanes>(max, 1)};
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

// Where a block first holds the value, which may be NaN.
template <typename T>
MVAT_INLINE int64_t find_first(const T* x, int64_t length, T value) {
  const int32_t count = int32_t(length);
  int32_t first = count;
  if (value == value) {
#pragma omp simd reduction(min : first)
    for (int32_t t = 0; t < count; t++) first = std::min(first, x[t] == value ? t : count);
  } else {
#pragma omp simd reduction(min : first)
    for (int32_t t = 0; t < count; t++) first = std::min(first, x[t] != x[t] ? t : count);
  }
  return first;
}

template <typename T>
MVAT_INLINE double dot_block(const T* x, const T* y, int64_t length) {
  double sum[kLanes] = {};
  int64_t t = 0;
  for (; t + kGroup <= length; t += kGroup) dot_group<8>(x + t, y + t, sum);
  if (length - t >= 4 * kLanes) dot_group<4>(x + t, y + t, sum), t += 4 * kLanes;
  if (length - t >= 2 * kLanes) dot_group<2>(x + t, y + t, sum), t += 2 * kLanes;
  if (length - t >= kLanes) dot_group<1>(x + t, y + t, sum), t += kLanes;
  for (int64_t i = 0; t < length; t++, i++) sum[i] += x[t] * y[t];
  return sum_tree<kLanes>(sum, 1);
}

template <typename T>
MVAT_INLINE void scale_block(const T* x, int64_t length, T scale, T shift, T* y) {
#pragma omp simd
  for (int64_t t = 0; t < length; t++) y[t] = x[t] * scale + shift;
}

// out_u[i] = sum_j w[i, j] u[j] and the same of v, w [rows, columns].
template <typename T>
MVAT_INLINE void times_vectors(const T* w, int64_t rows, int64_t columns, const T* u, const T* v, T* out_u, T* out_v) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4, w += 4 * columns) {
    const T *w1 = w + columns, *w2 = w1 + columns, *w3 = w2 + columns;
    T u0 = 0, u1 = 0, u2 = 0, u3 = 0, v0 = 0, v1 = 0, v2 = 0, v3 = 0;
#pragma omp simd reduction(+ : u0, u1, u2, u3, v0, v1, v2, v3)
    for (int64_t j = 0; j < columns; j++) {
      u0 += w[j] * u[j], u1 += w1[j] * u[j], u2 += w2[j] * u[j], u3 += w3[j] * u[j];
      v0 += w[j] * v[j], v1 += w1[j] * v[j], v2 += w2[j] * v[j], v3 += w3[j] * v[j];
    }
    out_u[i] = u0, out_u[i + 1] = u1, out_u[i + 2] = u2, out_u[i + 3] = u3;
    out_v[i] = v0, out_v[i + 1] = v1, out_v[i + 2] = v2, out_v[i + 3] = v3;
  }
  for (; i < rows; i++, w += columns) {
    T u0 = 0, v0 = 0;
#pragma omp simd reduction(+ : u0, v0)
    for (int64_t j = 0; j < columns; j++) u0 += w[j] * u[j], v0 += w[j] * v[j];
    out_u[i] = u0, out_v[i] = v0;
  }
}

template <int N, typename T>
MVAT_INLINE void add_rows(const T* v, int64_t v_stride, const T* w, int64_t w_stride, int64_t columns, T* out) {
#pragma omp simd
  for (int64_t j = 0; j < columns; j++) out[j] += dot_tree<N>(v, v_stride, w + j, w_stride);
}

// out[j] = sum_i v[i] w[i, j], w [rows, columns].
template <typename T>
MVAT_INLINE void vector_times(const T* v, int64_t v_stride, const T* w, int64_t w_stride, int64_t rows, int64_t columns,
                              T* out) {
  std::fill_n(out, columns, T(0));
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) add_rows<8>(v + i * v_stride, v_stride, w + i * w_stride, w_stride, columns, out);
  if (rows - i >= 4) add_rows<4>(v + i * v_stride, v_stride, w + i * w_stride, w_stride, columns, out), i += 4;
  if (rows - i >= 2) add_rows<2>(v + i * v_stride, v_stride, w + i * w_stride, w_stride, columns, out), i += 2;
  if (rows - i >= 1) add_rows<1>(v + i * v_stride, v_stride, w + i * w_stride, w_stride, columns, out);
}

// The entries that are compiled once an instruction set: plain functions, as target_clones wants them.
#define MVAT_ENTRIES(T)                                                                                                    \
  MVAT_CLONES void pool_entry(const T* x, int64_t length, Pool<T>* pool) { *pool = pool_block(x, length); }                \
  MVAT_CLONES int64_t find_entry(const T* x, int64_t length, T value) { return find_first(x, length, value); }             \
  MVAT_CLONES double dot_entry(const T* x, const T* y, int64_t length) { return dot_block(x, y, length); }                 \
  MVAT_CLONES void scale_entry(const T* x, int64_t length, T scale, T shift, T* y) {                                       \
    scale_block(x, length, scale, shift, y);                                                                               \
  }                                                                                                                        \
  MVAT_CLONES void times_vectors_entry(const T* w, int64_t rows, int64_t columns, const T* u, const T* v, T* out_u,        \
                                       T* out_v) {                                                                         \
    times_vectors(w, rows, columns, u, v, out_u, out_v);                                                                   \
  }                                                                                                                        \
  MVAT_CLONES void vector_times_entry(const T* v, int64_t v_stride, const T* w, int64_t w_stride, int64_t rows,            \
                                      int64_t columns, T* out) {                                                           \
    vector_times(v, v_stride, w, w_stride, rows, columns, out);                                                            \
  }
MVAT_ENTRIES(float)
MVAT_ENTRIES(double)
#undef MVAT_ENTRIES

// Calls work(begin, end) for parts of [0, count), pieces of work of so many elements each.
template <typename Work>
void spread(int64_t count, int64_t elements, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, count, grain, work);
}

// The same for parts of a matrix: strips of columns or rows.
template <typename Work>
void spread_strips(int64_t count, int64_t elements, const Work& work) {
  spread((count + kStrip - 1) / kStrip, kStrip * elements, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kStrip; i < std::min(end * kStrip, count); i += kStrip) work(i, std::min(kStrip, count - i));
  });
}

template <typename T>
struct Features {
  const T* data;
  int64_t channels, batch_stride, stride;

  explicit Features(const Tensor& x)
      : data(x.const_data_ptr<T>()), channels(x.size(1)), batch_stride(x.stride(0)), stride(x.stride(1)) {}

  const T* row(int64_t i) const { return data + i / channels * batch_stride + i % channels * stride; }
};

// How the blocks of x [B, C, T] are spread over the threads. A row is a channel of a clip.
struct Layout {
  int64_t batch, channels, rows, length, blocks;

  explicit Layout(const Tensor& x)
      : batch(x.size(0)), channels(x.size(1)), rows(batch * channels), length(x.size(2)),
        blocks((length + kBlock - 1) / kBlock) {}

  // For as many clips at a time as caches hold: read(row, block, start, length) of every block, between(first clip, clips), and
  // write of every block, the last one first.
  template <typename Read, typename Between, typename Write>
  void each_wave(const Read& read, const Between& between, const Write& write) const {
    const int64_t wave = std::max<int64_t>(1, kWave / (channels * length)), elements = std::min(kBlock, length);
    for (int64_t clip = 0; clip < batch; clip += wave) {
      const int64_t clips = std::min(wave, batch - clip), first = clip * channels * blocks;
      spread(clips * channels * blocks, elements, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) visit(first + i, read);
      });
      between(clip, clips);
      spread(clips * channels * blocks, elements, [&](int64_t begin, int64_t end) {
        for (int64_t i = end - 1; i >= begin; i--) visit(first + i, write);
      });
    }
  }

 private:
  template <typename Work>
  void visit(int64_t i, const Work& work) const {
    const int64_t block = i % blocks;
    work(i / blocks, block, block * kBlock, std::min(kBlock, length - block * kBlock));
  }
};

// The gate's first layer: relu(W1 v + b1) of maxima and means, `clips` of them from u and v on. A NaN is handed on.
template <typename T>
void hide(const Tensor& w1, const Tensor& b1, int64_t clips, const T* u, const T* v, T* of_u, T* of_v) {
  const int64_t hidden = w1.size(0), channels = w1.size(1);
  const T *weight = w1.const_data_ptr<T>(), *bias = b1.const_data_ptr<T>();
  spread_strips(hidden, 2 * clips * channels, [&](int64_t start, int64_t count) {
    for (int64_t clip = 0; clip < clips; clip++) {
      T *at_u = of_u + clip * hidden + start, *at_v = of_v + clip * hidden + start;
      times_vectors_entry(weight + start * channels, count, channels, u + clip * channels, v + clip * channels, at_u, at_v);
      for (int64_t i = 0; i < count; i++) {
        const T a = at_u[i] + bias[start + i], b = at_v[i] + bias[start + i];
        at_u[i] = a <= 0 ? 0 : a, at_v[i] = b <= 0 ? 0 : b;
      }
    }
  });
}

template <typename T>
void forward(const Tensor& x_any, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, Tensor& y_any,
             Tensor& gate_any, Tensor& pooled, Tensor& index_any) {
  const Layout layout(x_any);
  const Features<T> x(x_any);
  const int64_t channels = layout.channels, blocks = layout.blocks, hidden = w1.size(0);
  const T *weight2 = w2.const_data_ptr<T>(), *bias2 = b2.const_data_ptr<T>();
  T *y = y_any.mutable_data_ptr<T>(), *gate = gate_any.mutable_data_ptr<T>();
  T *max = pooled.mutable_data_ptr<T>(), *mean = max + layout.rows;
  int64_t* index = index_any.mutable_data_ptr<int64_t>();
  std::vector<Pool<T>> pools(layout.rows * blocks);
  std::vector<int64_t> holder(layout.rows);  // the block that holds the maximum
  std::vector<T> of_max(layout.batch * hidden), of_mean(layout.batch * hidden), products(layout.rows);

  layout.each_wave(
      [&](int64_t row, int64_t block, int64_t start, int64_t length) {
        pool_entry(x.row(row) + start, length, &pools[row * blocks + block]);
      },
      [&](int64_t clip, int64_t clips) {
        const int64_t first = clip * channels;
        spread(clips * channels, kLanes * blocks, [&](int64_t begin, int64_t end) {
          for (int64_t row = first + begin; row < first + end; row++) {
            const Pool<T>* pool = &pools[row * blocks];
            double sum = 0;
            int64_t best = 0;
            for (int64_t i = 0; i < blocks; i++) {
              sum += pool[i].sum;
              // The first maximum, or the first NaN.
              if (pool[best].max == pool[best].max && !(pool[i].max <= pool[best].max)) best = i;
            }
            holder[row] = best, max[row] = pool[best].max, mean[row] = T(sum / double(layout.length));
          }
        });
        hide(w1, b1, clips, max + first, mean + first, of_max.data() + clip * hidden, of_mean.data() + clip * hidden);
        spread_strips(channels, 2 * clips * hidden, [&](int64_t start, int64_t count) {
          for (int64_t i = clip; i < clip + clips; i++) {
            T *g = gate + i * channels + start, *product = &products[i * channels + start];
            const T *from_max = of_max.data() + i * hidden, *from_mean = of_mean.data() + i * hidden;
            times_vectors_entry(weight2 + start * hidden, count, hidden, from_max, from_mean, g, product);
            for (int64_t c = 0; c < count; c++) g[c] = 1 / (1 + std::exp(-(g[c] + product[c] + 2 * bias2[start + c])));
          }
        });
      },
      [&](int64_t row, int64_t block, int64_t start, int64_t length) {
        if (block == holder[row]) index[row] = start + find_entry(x.row(row) + start, length, max[row]);
        scale_entry(x.row(row) + start, length, gate[row], -T(0), y + row * layout.length + start);
      });
}

template <typename T>
void backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& gate_any, const Tensor& pooled,
              const Tensor& index_any, const Tensor& w1, const Tensor& b1, const Tensor& w2,
              Tensor& dx_any, Tensor& dw1_any, Tensor& db1_any, Tensor& dw2_any, Tensor& db2_any) {
  const Layout layout(x_any);
  const Features<T> x(x_any), grad(grad_any);
  const int64_t batch = layout.batch, channels = layout.channels, blocks = layout.blocks, hidden = w1.size(0);
  const T *weight1 = w1.const_data_ptr<T>(), *weight2 = w2.const_data_ptr<T>(), *gate = gate_any.const_data_ptr<T>();
  const T *max = pooled.const_data_ptr<T>(), *mean = max + layout.rows;
  const int64_t* index = index_any.const_data_ptr<int64_t>();
  T* dx = dx_any.mutable_data_ptr<T>();
  std::vector<double> dots(layout.rows * blocks);
  std::vector<T> dsum(layout.rows), dmax(layout.rows), dmean(layout.rows);  // dsum: of what goes into the sigmoid
  std::vector<T> of_max(batch * hidden), of_mean(batch * hidden);           // relu's outputs; in the end of_max is their sum
  std::vector<T> dhidden(2 * batch * hidden);                               // of relu's inputs, for maxima, then for means

  layout.each_wave(
      [&](int64_t row, int64_t block, int64_t start, int64_t length) {
        dots[row * blocks + block] = dot_entry(grad.row(row) + start, x.row(row) + start, length);
      },
      [&](int64_t clip, int64_t clips) {
        const int64_t first = clip * channels, last = clip + clips;
        for (int64_t row = first; row < last * channels; row++) {
          double dgate = 0;
          for (int64_t i = 0; i < blocks; i++) dgate += dots[row * blocks + i];
          dsum[row] = T(dgate) * ((1 - gate[row]) * gate[row]);
        }
        hide(w1, b1, clips, max + first, mean + first, of_max.data() + clip * hidden, of_mean.data() + clip * hidden);
        spread_strips(hidden, clips * channels, [&](int64_t start, int64_t count) {
          for (int64_t i = clip; i < last; i++) {
            T *a = of_max.data() + i * hidden + start, *b = of_mean.data() + i * hidden + start;
            T *da = dhidden.data() + i * hidden + start, *db = dhidden.data() + (batch + i) * hidden + start;
            vector_times_entry(&dsum[i * channels], 1, weight2 + start, hidden, channels, count, da);
            for (int64_t j = 0; j < count; j++) {
              db[j] = b[j] == 0 ? 0 : da[j];
              da[j] = a[j] == 0 ? 0 : da[j];
              a[j] += b[j];
            }
          }
        });
        spread_strips(channels, 2 * clips * hidden, [&](int64_t start, int64_t count) {
          for (int64_t i = clip; i < last; i++) {
            const T *da = dhidden.data() + i * hidden, *db = dhidden.data() + (batch + i) * hidden;
            vector_times_entry(da, 1, weight1 + start, channels, hidden, count, &dmax[i * channels + start]);
            vector_times_entry(db, 1, weight1 + start, channels, hidden, count, &dmean[i * channels + start]);
          }
        });
      },
      [&](int64_t row, int64_t, int64_t start, int64_t length) {
        const int64_t top = index[row] - start;
        const T shift = T(double(dmean[row]) / double(layout.length));
        T* target = dx + row * layout.length + start;
        scale_entry(grad.row(row) + start, length, gate[row], shift, target);
        if (top >= 0 && top < length) target[top] += dmax[row];
      });

  T *dw1 = dw1_any.mutable_data_ptr<T>(), *db1 = db1_any.mutable_data_ptr<T>();
  T *dw2 = dw2_any.mutable_data_ptr<T>(), *db2 = db2_any.mutable_data_ptr<T>();
  spread(hidden + channels, 2 * batch * channels, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      double sum = 0;
      if (i < hidden) {
        vector_times_entry(dhidden.data() + i, hidden, max, channels, 2 * batch, channels, dw1 + i * channels);
        for (int64_t clip = 0; clip < 2 * batch; clip++) sum += dhidden[clip * hidden + i];
        db1[i] = T(sum);
      } else {
        const int64_t c = i - hidden;
        vector_times_entry(dsum.data() + c, channels, of_max.data(), hidden, batch, hidden, dw2 + c * hidden);
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
  const Tensor w1 = dense(w1_any), b1 = dense(b1_any);
  const Tensor w2 = dense(w2_any), b2 = dense(b2_any);
  Tensor y = new_tensor({x.size(0), x.size(1), x.size(2)}, x);
  Tensor gate = new_tensor({x.size(0), x.size(1)}, x);
  Tensor pooled = new_tensor({2, x.size(0), x.size(1)}, x);
  Tensor index = new_tensor({x.size(0), x.size(1)}, aoti_torch_dtype_int64());
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
  const Tensor gate = dense(gate_any), pooled = dense(pooled_any);
  const Tensor index = dense(index_any), w1 = dense(w1_any);
  const Tensor b1 = dense(b1_any), w2 = dense(w2_any);
  Tensor dx = new_tensor({batch, channels, length}, x);
  Tensor dw1 = new_tensor({hidden, channels}, x), db1 = new_tensor({hidden}, x);
  Tensor dw2 = new_tensor({channels, hidden}, x), db2 = new_tensor({channels}, x);
  const auto run = x.scalar_type() == ScalarType::Float ? backward<float> : backward<double>;
  run(grad, x, gate, pooled, index, w1, b1, w2, dx, dw1, db1, dw2, db2);
  return {dx, dw1, db1, dw2, db2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mvat, CPU, m) {
  m.impl("channel_attention", TORCH_BOX(&channel_attention));
  m.impl("channel_attention_backward", TORCH_BOX(&channel_attention_backward));
}
