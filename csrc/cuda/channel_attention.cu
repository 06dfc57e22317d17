// y = x * sigmoid(fc(max_t x) + fc(mean_t x)): the channel view.
//
// Forward: a warp takes a piece of a channel's samples and leaves its maximum, its index and its sum; a block a clip joins the
// pieces in their order and forms the gate; a third pass multiplies. Backward: the same pieces of sum_t grad * x; a block a
// clip goes back through the gate; the weights' gradients, one thread an element over the clips in their order; and dx = grad
// * gate + dmean / T, with dmax added at the maximum's index.
#include "channel_attention.h"

#include "common/reduce.h"

namespace mvat::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kGateWarps = 16;
constexpr int kGateThreads = 32 * kGateWarps;
constexpr int kStep = 512;  // samples that a warp has in flight

// How the samples of a channel are cut: short pieces fill the GPU, but a clip's block must join them all.
struct Pieces {
  int64_t size, count;
};

Pieces pieces_of(int64_t length) {
  const int64_t size = length <= 64 * 4096 ? 4096 : ceil_divide(length, 64 * kStep) * kStep;
  return {size, ceil_divide(length, size)};
}

// What a warp knows of a piece.
struct Pooled {
  float maximum, sum;
  int64_t index;
};

// Whether a comes before b: NaN above everything, the first index on ties.
__device__ inline bool before(float a, int64_t a_index, float b, int64_t b_index) {
  const bool a_nan = a != a, b_nan = b != b;
  if (a_nan || b_nan) return a_nan && (!b_nan || a_index < b_index);
  return a > b || (a == b && a_index < b_index);
}

// Calls work(row, channel's clip, channel, first sample, end) for every piece, a warp each.
template <typename Work>
__device__ inline void each_piece(int64_t rows, int64_t channels, int64_t length, const Pieces& pieces, const Work& work) {
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; i < rows * pieces.count;
       i += int64_t(gridDim.x) * kWarps) {
    const int64_t row = i / pieces.count, start = i % pieces.count * pieces.size;
    const int64_t end = start + pieces.size < length ? start + pieces.size : length;
    work(i, row / channels, row % channels, start, end);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) pool_kernel(Feature x, Pieces pieces, Pooled* pooled) {
  const int lane = threadIdx.x % 32;
  each_piece(x.batch * x.channels, x.channels, x.length, pieces,
             [&](int64_t piece, int64_t clip, int64_t channel, int64_t start, int64_t end) {
               const T* const source = static_cast<const T*>(x.data) + clip * x.batch_stride + channel * x.channel_stride;
               float sum = 0, maximum = -INFINITY;
               int64_t index = start + lane * V;
#pragma unroll 4
               for (int64_t t = start + lane * V; t < end; t += 32 * V) {
                 float value[V];
                 load<V>(source + t, value);
#pragma unroll
                 for (int v = 0; v < V; v++) {
                   sum += value[v];
                   // Of its own samples a lane meets the first maximum, or the first NaN, first.
                   if (value[v] > maximum || (value[v] != value[v] && maximum == maximum)) {
                     maximum = value[v];
                     index = t + v;
                   }
                 }
               }
#pragma unroll
               for (int flip = 16; flip; flip /= 2) {
                 const float other = __shfl_xor_sync(kWholeWarp, maximum, flip);
                 const int64_t other_index = __shfl_xor_sync(kWholeWarp, index, flip);
                 if (before(other, other_index, maximum, index)) maximum = other, index = other_index;
               }
               sum = warp_sum(sum);
               if (lane == 0) pooled[piece] = {maximum, sum, index};
             });
}

// out_k[r] = relu-or-not of the row's product with v_k, for both pools k: a warp a row of weight [rows, columns].
// Calls emit(row, product with v0, product with v1), in lane 0.
template <typename Emit>
__device__ inline void products(const float* weight, int64_t rows, int64_t columns, const float* v0, const float* v1,
                                const Emit& emit) {
  const int lane = threadIdx.x % 32;
  for (int64_t row = threadIdx.x / 32; row < rows; row += kGateWarps) {
    float a = 0, b = 0;
#pragma unroll 4
    for (int64_t i = lane; i < columns; i += 32) {
      const float w = weight[row * columns + i];
      a += w * v0[i];
      b += w * v1[i];
    }
    a = warp_sum(a);
    b = warp_sum(b);
    if (lane == 0) emit(row, a, b);
  }
}

// The same with the transposed weight [rows, columns]: emit(column, sum over rows of weight * v0, of weight * v1). Lanes are
// columns, warps take turns at the rows and join in their order.
template <typename Emit>
__device__ inline void transposed_products(const float* weight, int64_t rows, int64_t columns, const float* v0,
                                           const float* v1, const Emit& emit) {
  MVAT_SHARED(float, part, 2 * kGateThreads);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t first = 0; first < columns; first += 32) {
    const int64_t column = first + lane;
    float a = 0, b = 0;
    if (column < columns) {
#pragma unroll 4
      for (int64_t row = warp; row < rows; row += kGateWarps) {
        const float w = weight[row * columns + column];
        a += w * v0[row];
        b += w * v1[row];
      }
    }
    part[threadIdx.x] = a;
    part[kGateThreads + threadIdx.x] = b;
    __syncthreads();
    if (warp == 0 && column < columns) {
      a = b = 0;
      for (int w = 0; w < kGateWarps; w++) a += part[32 * w + lane], b += part[kGateThreads + 32 * w + lane];
      emit(column, a, b);
    }
    __syncthreads();
  }
}

__device__ inline float relu(float x) { return x < 0 ? 0.0f : x; }  // hands NaN on

// hidden [2, B, H]; both passes form it.
__device__ inline void hidden_layer(int64_t clip, int64_t batch, int64_t channels, const Layers& fc, const float* pooled,
                                    float* hidden) {
  products(fc.weight1, fc.hidden, channels, pooled + clip * channels, pooled + (batch + clip) * channels,
           [&](int64_t j, float a, float b) {
             hidden[clip * fc.hidden + j] = relu(a + fc.bias1[j]);
             hidden[(batch + clip) * fc.hidden + j] = relu(b + fc.bias1[j]);
           });
}

__global__ void __launch_bounds__(kGateThreads)
    gate_kernel(int64_t batch, int64_t channels, int64_t length, int64_t pieces, const Pooled* parts, Layers fc,
                float* hidden, float* gate, float* pooled, int64_t* index) {
  for (int64_t clip = blockIdx.x; clip < batch; clip += gridDim.x) {
    for (int64_t c = threadIdx.x; c < channels; c += kGateThreads) {
      const Pooled* const part = parts + (clip * channels + c) * pieces;
      float maximum = part[0].maximum;
      int64_t first = part[0].index;
      double sum = part[0].sum;
      for (int64_t i = 1; i < pieces; i++) {
        if (before(part[i].maximum, part[i].index, maximum, first)) maximum = part[i].maximum, first = part[i].index;
        sum += part[i].sum;
      }
      pooled[clip * channels + c] = maximum;
      pooled[(batch + clip) * channels + c] = float(sum / length);
      index[clip * channels + c] = first;
    }
    __syncthreads();
    hidden_layer(clip, batch, channels, fc, pooled, hidden);
    __syncthreads();
    products(fc.weight2, channels, fc.hidden, hidden + clip * fc.hidden, hidden + (batch + clip) * fc.hidden,
             [&](int64_t c, float a, float b) {
               gate[clip * channels + c] = 1 / (1 + expf(-(a + b + 2 * fc.bias2[c])));
             });
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) scale_kernel(Feature x, Pieces pieces, const float* gate, T* y) {
  each_piece(x.batch * x.channels, x.channels, x.length, pieces,
             [&](int64_t, int64_t clip, int64_t channel, int64_t start, int64_t end) {
               const int64_t row = clip * x.channels + channel;
               const T* const source = static_cast<const T*>(x.data) + clip * x.batch_stride + channel * x.channel_stride;
               T* const target = y + row * x.length;
               const float scale = gate[row];
               transform<V, 4>(
                   start + threadIdx.x % 32 * V, end, 32 * V,
                   [&](int64_t t, float(&value)[V]) { load<V>(source + t, value); },
                   [&](int64_t t, float(&value)[V]) {
#pragma unroll
                     for (int v = 0; v < V; v++) value[v] *= scale;
                     store<V>(target + t, value);
                   });
             });
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) dot_kernel(Feature grad, Feature x, Pieces pieces, float* dots) {
  each_piece(x.batch * x.channels, x.channels, x.length, pieces,
             [&](int64_t piece, int64_t clip, int64_t channel, int64_t start, int64_t end) {
               const T* const a = static_cast<const T*>(x.data) + clip * x.batch_stride + channel * x.channel_stride;
               const T* const b =
                   static_cast<const T*>(grad.data) + clip * grad.batch_stride + channel * grad.channel_stride;
               float sum = 0;
#pragma unroll 4
               for (int64_t t = start + threadIdx.x % 32 * V; t < end; t += 32 * V) {
                 float value[V], upper[V];
                 load<V>(a + t, value);
                 load<V>(b + t, upper);
#pragma unroll
                 for (int v = 0; v < V; v++) sum += value[v] * upper[v];
               }
               sum = warp_sum(sum);
               if (threadIdx.x % 32 == 0) dots[piece] = sum;
             });
}

// What the backward pass keeps of a clip; k is the pool: maximum, mean.
struct Backward {
  float* dots;     // [B, C, pieces]
  float* dgate;    // [B, C], before the sigmoid
  float* hidden;   // [2, B, H]
  float* dhidden;  // [2, B, H], before the relu
  float* dpooled;  // [2, B, C]

  Backward(Arena& arena, const Feature& x, int64_t hidden_size) {
    dots = arena.take<float>(x.batch * x.channels * pieces_of(x.length).count);
    dgate = arena.take<float>(x.batch * x.channels);
    hidden = arena.take<float>(2 * x.batch * hidden_size);
    dhidden = arena.take<float>(2 * x.batch * hidden_size);
    dpooled = arena.take<float>(2 * x.batch * x.channels);
  }
};

__global__ void __launch_bounds__(kGateThreads)
    gate_backward_kernel(int64_t batch, int64_t channels, int64_t pieces, const float* gate, const float* pooled, Layers fc,
                         Backward space) {
  for (int64_t clip = blockIdx.x; clip < batch; clip += gridDim.x) {
    for (int64_t c = threadIdx.x; c < channels; c += kGateThreads) {
      const int64_t row = clip * channels + c;
      double sum = 0;
      for (int64_t i = 0; i < pieces; i++) sum += space.dots[row * pieces + i];
      space.dgate[row] = float(sum) * gate[row] * (1 - gate[row]);
    }
    hidden_layer(clip, batch, channels, fc, pooled, space.hidden);
    __syncthreads();
    const float* const dgate = space.dgate + clip * channels;
    const int64_t maximum = clip * fc.hidden, mean = (batch + clip) * fc.hidden;
    transposed_products(fc.weight2, channels, fc.hidden, dgate, dgate, [&](int64_t j, float a, float) {
      space.dhidden[maximum + j] = space.hidden[maximum + j] > 0 ? a : 0.0f;
      space.dhidden[mean + j] = space.hidden[mean + j] > 0 ? a : 0.0f;
    });
    __syncthreads();
    transposed_products(fc.weight1, fc.hidden, channels, space.dhidden + maximum, space.dhidden + mean,
                        [&](int64_t c, float a, float b) {
                          space.dpooled[clip * channels + c] = a;
                          space.dpooled[(batch + clip) * channels + c] = b;
                        });
  }
}

// A thread an element of dweight1 [H, C], dweight2 [C, H], dbias1 [H], dbias2 [C].
__global__ void __launch_bounds__(kThreads)
    weights_kernel(int64_t batch, int64_t channels, int64_t hidden, const float* pooled, Backward space, float* dweight1,
                   float* dbias1, float* dweight2, float* dbias2) {
  const int64_t size = hidden * channels;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < 2 * size + hidden + channels;
       i += int64_t(gridDim.x) * kThreads) {
    double sum = 0;
    if (i < size) {
      const int64_t j = i / channels, c = i % channels;
      for (int64_t b = 0; b < 2 * batch; b++) sum += space.dhidden[b * hidden + j] * pooled[b * channels + c];
      dweight1[i] = float(sum);
    } else if (i < 2 * size) {
      const int64_t c = (i - size) / hidden, j = (i - size) % hidden;
      for (int64_t b = 0; b < batch; b++)
        sum += space.dgate[b * channels + c] * (space.hidden[b * hidden + j] + space.hidden[(batch + b) * hidden + j]);
      dweight2[i - size] = float(sum);
    } else if (i < 2 * size + hidden) {
      const int64_t j = i - 2 * size;
      for (int64_t b = 0; b < 2 * batch; b++) sum += space.dhidden[b * hidden + j];
      dbias1[j] = float(sum);
    } else {
      const int64_t c = i - 2 * size - hidden;
      for (int64_t b = 0; b < batch; b++) sum += 2 * space.dgate[b * channels + c];
      dbias2[c] = float(sum);
    }
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(Feature grad, Pieces pieces, const float* gate, const int64_t* index, const float* dpooled, T* dx) {
  each_piece(grad.batch * grad.channels, grad.channels, grad.length, pieces,
             [&](int64_t, int64_t clip, int64_t channel, int64_t start, int64_t end) {
               const int64_t row = clip * grad.channels + channel, rows = grad.batch * grad.channels;
               const T* const source =
                   static_cast<const T*>(grad.data) + clip * grad.batch_stride + channel * grad.channel_stride;
               T* const target = dx + row * grad.length;
               const float scale = gate[row], maximum = dpooled[row], mean = dpooled[rows + row] / grad.length;
               const int64_t first = index[row];
               transform<V, 4>(
                   start + threadIdx.x % 32 * V, end, 32 * V,
                   [&](int64_t t, float(&value)[V]) { load<V>(source + t, value); },
                   [&](int64_t t, float(&value)[V]) {
#pragma unroll
                     for (int v = 0; v < V; v++)
                       value[v] = value[v] * scale + mean + (t + v == first ? maximum : 0.0f);
                     store<V>(target + t, value);
                   });
             });
}

struct Forward {
  Pooled* parts;
  float* hidden;

  Forward(Arena& arena, const Feature& x, int64_t hidden_size) {
    parts = arena.take<Pooled>(x.batch * x.channels * pieces_of(x.length).count);
    hidden = arena.take<float>(2 * x.batch * hidden_size);
  }
};

int64_t piece_blocks(const Feature& x) {
  return grid_for(ceil_divide(x.batch * x.channels * pieces_of(x.length).count, kWarps));
}

}  // namespace

int64_t channel_attention_workspace(const Feature& x, int64_t hidden) {
  Arena count(nullptr);
  Forward(count, x, hidden);
  return count.used();
}

int64_t channel_attention_backward_workspace(const Feature& x, int64_t hidden) {
  Arena count(nullptr);
  Backward(count, x, hidden);
  return count.used();
}

void channel_attention(const Feature& x, const Layers& fc, void* y, float* gate, float* pooled, int64_t* index,
                       void* workspace, cudaStream_t stream) {
  if (x.batch == 0) return;
  Arena arena(workspace);
  const Forward space(arena, x, fc.hidden);
  const Pieces pieces = pieces_of(x.length);
  const bool aligned = fours(x) && fours(y, x.type, x.length);
  with_type(x.type, [&](auto element) {
    using T = decltype(element);
    const auto pool = aligned ? pool_kernel<T, 4> : pool_kernel<T, 1>;
    const auto scale = aligned ? scale_kernel<T, 4> : scale_kernel<T, 1>;
    MVAT_LAUNCH(pool, piece_blocks(x), kThreads, 0, stream, x, pieces, space.parts);
    MVAT_LAUNCH(gate_kernel, grid_for(x.batch), kGateThreads, 0, stream, x.batch, x.channels, x.length, pieces.count,
                space.parts, fc, space.hidden, gate, pooled, index);
    MVAT_LAUNCH(scale, piece_blocks(x), kThreads, 0, stream, x, pieces, gate, static_cast<T*>(y));
  });
}

void channel_attention_backward(const Feature& grad, const Feature& x, const float* gate, const float* pooled,
                                const int64_t* index, const Layers& fc, void* dx, float* dweight1, float* dbias1,
                                float* dweight2, float* dbias2, void* workspace, cudaStream_t stream) {
  Arena arena(workspace);
  const Backward space(arena, x, fc.hidden);
  const Pieces pieces = pieces_of(x.length);
  const bool aligned = fours(x) && fours(grad) && fours(dx, x.type, x.length);
  with_type(x.type, [&](auto element) {
    using T = decltype(element);
    if (x.batch) {
      const auto dot = aligned ? dot_kernel<T, 4> : dot_kernel<T, 1>;
      const auto gradient = aligned ? gradient_kernel<T, 4> : gradient_kernel<T, 1>;
      MVAT_LAUNCH(dot, piece_blocks(x), kThreads, 0, stream, grad, x, pieces, space.dots);
      MVAT_LAUNCH(gate_backward_kernel, grid_for(x.batch), kGateThreads, 0, stream, x.batch, x.channels, pieces.count, gate,
                  pooled, fc, space);
      MVAT_LAUNCH(gradient, piece_blocks(x), kThreads, 0, stream, grad, pieces, gate, index, space.dpooled,
                  static_cast<T*>(dx));
    }
    // Without a clip these are zero.
    const int64_t elements = 2 * fc.hidden * x.channels + fc.hidden + x.channels;
    MVAT_LAUNCH(weights_kernel, grid_for(ceil_divide(elements, kThreads)), kThreads, 0, stream, x.batch, x.channels,
                fc.hidden, pooled, space, dweight1, dbias1, dweight2, dbias2);
  });
}

}  // namespace mvat::cuda
