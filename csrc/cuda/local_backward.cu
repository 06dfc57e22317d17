// The gradients of the local view, in five steps: the mask's gradient, a sum over channels of grad * x; back through sigmoid,
// norm2 and the small convolution, all C times smaller than the features; a pass over the features for the sums that norm1
// needs; a last one for the gradients of x and of the depthwise weights. Each pass over the features convolves its chunks
// again rather than reading a convolution that would be twice as large as they are. A sample takes the gradients of its two
// chunks from shared memory, a block having 31 chunks of its own and the one before them; no atomic additions anywhere.
#include "local_attention.h"

#include "common/reduce.h"
#include "common/tiles.h"
#include "local_chunks.h"
#include "local_mask.h"

namespace mvat::cuda {
namespace {

constexpr int kOwnRows = kRows - 1;
constexpr int kOutputs = 4;  // samples of x's gradient that a thread writes

struct Backward {
  float* mask;        // [B, T]: the gradient of m
  float* before;      // [B, P, S]: the gradient before the sigmoid
  float* normalised;  // [B, P, S]: the mask's convolution, normalised
  float* maximum;     // [B, P, S]: the gradient of the maximum over channels
  float* mean;        // [B, P, S]: of the mean, divided by C
  float* norm2;       // [2, mask blocks]: partial sums for weight2, bias2
  float* conv;        // [2 taps2, mask blocks]
  float* norm1;       // [2, C, tiles * warps]: for weight1, bias1
  float* depthwise;   // [C, taps1, own tiles]

  Backward(Arena& arena, const LocalShape& s, int64_t taps2) {
    mask = arena.take<float>(s.batch * s.length);
    before = arena.take<float>(s.positions());
    normalised = arena.take<float>(s.positions());
    maximum = arena.take<float>(s.positions());
    mean = arena.take<float>(s.positions());
    norm2 = arena.take<float>(2 * mask_blocks(s));
    conv = arena.take<float>(2 * taps2 * mask_blocks(s));
    norm1 = arena.take<float>(2 * s.channels * tiles_of(s) * s.warps);
    depthwise = arena.take<float>(s.channels * s.taps * ceil_divide(s.rows, kOwnRows));
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(kTileThreads) mask_kernel(Feature grad, Feature x, Spread spread, float* out) {
  const int64_t tiles = (x.length + spread.tile() - 1) / spread.tile();
  const Place<V> place(spread);
  for (int64_t i = blockIdx.x; i < x.batch * tiles; i += gridDim.x) {
    const int64_t clip = i / tiles, start = i % tiles * spread.tile();
    float total[V] = {};
    if (start + place.column < x.length) {
      const T* const a = static_cast<const T*>(x.data) + clip * x.batch_stride + start + place.column;
      const T* const b = static_cast<const T*>(grad.data) + clip * grad.batch_stride + start + place.column;
      const auto term = [&](int64_t c, float(&value)[V]) {
        float upper[V];
        load<V>(a + c * x.channel_stride, value);
        load<V>(b + c * grad.channel_stride, upper);
#pragma unroll
        for (int v = 0; v < V; v++) value[v] *= upper[v];
      };
      sum_channels<V, 4>(place, x.channels, term, total);
    }
    join_rows<V>(place, total, x.length - start,
                 [&](int64_t column, float sum) { out[clip * x.length + start + column] = sum; });
  }
}

__global__ void __launch_bounds__(kMaskThreads)
    sigmoid_kernel(LocalShape s, LocalParameters parameters, LocalRead saved, Backward space) {
  const ChannelNorm norm(saved.statistics, s.channels, s.channels, 1, 0, parameters.eps2);
  const int64_t begin = int64_t(blockIdx.x) * kMaskShare;
  float sum = 0, product = 0;
  for (int64_t i = begin + threadIdx.x; i < begin + kMaskShare && i < s.rows * s.segment; i += kMaskThreads) {
    const int64_t row = i / s.segment, t = row % s.chunks * s.hop - s.segment + i % s.segment;
    const float a = saved.attention[i];
    const float upper = t >= 0 && t < s.length ? space.mask[row / s.chunks * s.length + t] / 2 : 0;
    const float before = upper * a * (1 - a);
    const float normalised = (mask_conv(s, parameters, saved.pooled, i) - norm.mean) * norm.inverse;
    space.before[i] = before;
    space.normalised[i] = normalised;
    sum += before;
    product += before * normalised;
  }
  sum = block_sum<kMaskThreads / 32>(sum);
  product = block_sum<kMaskThreads / 32>(product);
  if (threadIdx.x) return;
  space.norm2[blockIdx.x] = product;
  space.norm2[gridDim.x + blockIdx.x] = sum;
}

// Back through a norm whose weight's and bias's gradients are known; in training its statistics depend on every value.
struct NormBackward {
  float scale, mean, slope;

  __device__ NormBackward(float scale, float dweight, float dbias, int64_t count, bool training)
      : scale(scale), mean(training ? dbias / count : 0), slope(training ? dweight / count : 0) {}

  __device__ float operator()(float upper, float normalised) const { return scale * (upper - mean - normalised * slope); }
};

__global__ void __launch_bounds__(kMaskThreads)
    conv_kernel(LocalShape s, LocalParameters parameters, LocalRead saved, LocalGradients gradients, Backward space) {
  const ChannelNorm norm(saved.statistics, s.channels, s.channels, *parameters.weight2, 0, parameters.eps2);
  const NormBackward through(norm.inverse * norm.weight, *gradients.weight2, *gradients.bias2, s.rows * s.segment,
                             parameters.training);
  const int taps = int(parameters.taps2), reach = taps / 2;
  const int64_t begin = int64_t(blockIdx.x) * kMaskShare;
  const int64_t end = begin + kMaskShare < s.rows * s.segment ? begin + kMaskShare : s.rows * s.segment;
  for (int64_t i = begin + threadIdx.x; i < end; i += kMaskThreads) {
    float maximum = 0, mean = 0;
    for (int k = 0; k < taps; k++) {
      const int64_t j = i - k + reach;
      const int position = int(i % s.segment) - k + reach;
      if (position < 0 || position >= s.segment) continue;
      const float upper = through(space.before[j], space.normalised[j]);
      maximum += parameters.conv[k] * upper;
      mean += parameters.conv[taps + k] * upper;
    }
    space.maximum[i] = maximum;
    space.mean[i] = mean / s.channels;
  }
  for (int k = 0; k < taps; k++) {
    float maximum = 0, mean = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += kMaskThreads) {
      const Pooled at(s, i);
      const int position = at.position + k - reach;
      if (position < 0 || position >= s.segment) continue;
      const float upper = through(space.before[i], space.normalised[i]);
      maximum += upper * saved.pooled[at.maximum + k - reach];
      mean += upper * saved.pooled[at.maximum + at.mean + k - reach];
    }
    maximum = block_sum<kMaskThreads / 32>(maximum);
    mean = block_sum<kMaskThreads / 32>(mean);
    if (threadIdx.x) continue;
    space.conv[int64_t(k) * gridDim.x + blockIdx.x] = maximum;
    space.conv[int64_t(taps + k) * gridDim.x + blockIdx.x] = mean;
  }
}

// The gradients of the pools at a thread's positions, the same for all channels.
struct Upper {
  float maximum[kEach], mean[kEach];
  int32_t index[kEach];
  int count;  // positions that exist

  __device__ Upper(const LocalShape& s, const LocalRead& saved, const Backward& space, int64_t row, int position) {
    const int left = row >= 0 && row < s.rows ? s.segment - position : 0;
    count = left < kEach ? left : kEach;
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      const int64_t i = row * s.segment + position + r;
      maximum[r] = r < count ? space.maximum[i] : 0;
      mean[r] = r < count ? space.mean[i] : 0;
      index[r] = r < count ? saved.index[i] : -1;
    }
  }

  // The gradient of norm1's output at position r, from its normalised value.
  __device__ float before_silu(int r, int64_t channel, const ChannelNorm& norm, float normalised) const {
    const float value = normalised * norm.weight + norm.bias, gate = sigmoid(value);
    return (mean[r] + (index[r] == channel ? maximum[r] : 0)) * gate * (1 + value * (1 - gate));
  }
};

template <int kTaps, int kThreads>
__global__ void __launch_bounds__(kThreads, kLocalBlocks<kThreads>)
    norm1_kernel(LocalShape s, Feature x, LocalParameters parameters, int64_t group, LocalRead saved, Backward space) {
  MVAT_DYNAMIC_SHARED(float, tile);
  float* const weights = tile + kRows * s.stride;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = int64_t(blockIdx.x) * kRows, begin = blockIdx.y * group;
  const int64_t end = begin + group < s.channels ? begin + group : s.channels;
  const float* const position = tile + lane * s.stride + s.margin + warp * kEach;
  const Upper upper(s, saved, space, first_row + lane, warp * kEach);
  Chunks chunks(s, x, first_row);
  clear(tile, kRows * s.stride);
  chunks.fetch(x, begin);
  for (int64_t c = begin; c < end; c++) {
    __syncthreads();
    chunks.put(s, tile);
    put_weights(parameters.depthwise + c * s.taps, s.taps, weights);
    __syncthreads();
    if (c + 1 < end) chunks.fetch(x, c + 1);
    float v[kEach];
    convolve<kTaps>(position, weights, s.taps, v);
    const ChannelNorm norm(saved.statistics, s.channels, c, parameters.weight1[c], parameters.bias1[c], parameters.eps1);
    float sum = 0, product = 0;
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      const float normalised = (v[r] - norm.mean) * norm.inverse;
      const float gradient = r < upper.count ? upper.before_silu(r, c, norm, normalised) : 0;
      sum += gradient;
      product += r < upper.count ? gradient * normalised : 0;
    }
    sum = warp_sum(sum);
    product = warp_sum(product);
    if (lane) continue;
    const int64_t rows = int64_t(gridDim.x) * s.warps, at = c * rows + int64_t(blockIdx.x) * s.warps + warp;
    space.norm1[at] = product;
    space.norm1[s.channels * rows + at] = sum;
  }
}

// Lane l gets the warp's sum of total[l], in total[0]: each step keeps half of the values and gives the other half away.
template <int kHalf = 16>
__device__ __forceinline__ void scatter_sum(float (&total)[32]) {
  const bool upper = threadIdx.x & kHalf;
#pragma unroll
  for (int j = 0; j < kHalf; j++) {
    const float give = upper ? total[j] : total[j + kHalf], keep = upper ? total[j + kHalf] : total[j];
    total[j] = keep + __shfl_xor_sync(kWholeWarp, give, kHalf);
  }
  if constexpr (kHalf > 1) scatter_sum<kHalf / 2>(total);
}

// part[k] = the warp's sum of gradient[r] * position[r + k - taps / 2].
template <int kTaps>
__device__ inline void tap_sums(const float* position, const float (&gradient)[kEach], int taps, float* part) {
  if constexpr (kTaps == kPresetTaps) {
    float window[40], total[32];
    load_window(position, window);
#pragma unroll
    for (int k = 0; k < 32; k++) {
      total[k] = 0;
#pragma unroll
      for (int r = 0; r < kEach; r++) total[k] += k < kTaps ? gradient[r] * window[r + k + 1] : 0;
    }
    scatter_sum(total);
    part[threadIdx.x % 32] = total[0];
  } else {
    for (int k = 0; k < taps; k++) {
      float total = 0;
#pragma unroll
      for (int r = 0; r < kEach; r++) total += gradient[r] * position[r + k - taps / 2];
      total = warp_sum(total);
      if (threadIdx.x % 32 == 0) part[k] = total;
    }
  }
}

// The samples whose gradient a thread writes: from a chunk's first half and the second half of the chunk before it.
struct Outputs {
  int64_t from[kOutputs], to[kOutputs];  // in grad and in dx, without the channel; -1: none
  float mask[kOutputs];
  int first, column;

  __device__ Outputs(const LocalShape& s, const float* attention, const Feature& grad, int64_t first_row) {
    const int wide = s.warps * kEach / 2;
    first = threadIdx.x / wide;
    column = threadIdx.x % wide;
#pragma unroll
    for (int n = 0; n < kOutputs; n++) {
      const int64_t row = first_row + first + 8 * n, t = (row % s.chunks - 2) * s.hop + column;
      from[n] = to[n] = -1;
      if (first + 8 * n == 0 || row >= s.rows || column >= s.hop || t < 0 || t >= s.length) continue;
      const int64_t clip = row / s.chunks;
      from[n] = clip * grad.batch_stride + t;
      to[n] = clip * s.channels * s.length + t;
      mask[n] = mask_at(s, attention, clip, t);
    }
  }

  // The gradient of y at these samples; early, for the memory takes its time.
  __device__ void fetch(const Feature& grad, int64_t channel) {
    if (grad.type == Type::kFloat) return fetch_as<float>(grad, channel);
    if (grad.type == Type::kBFloat16) return fetch_as<__nv_bfloat16>(grad, channel);
    fetch_as<__half>(grad, channel);
  }

  // tile holds the gradients of the chunks' samples.
  __device__ void write(const LocalShape& s, Type type, int64_t channel, const float* tile, void* dx) const {
    if (type == Type::kFloat) return write_as<float>(s, channel, tile, dx);
    if (type == Type::kBFloat16) return write_as<__nv_bfloat16>(s, channel, tile, dx);
    write_as<__half>(s, channel, tile, dx);
  }

 private:
  float above[kOutputs];

  template <typename T>
  __device__ void fetch_as(const Feature& grad, int64_t channel) {
    const T* const source = static_cast<const T*>(grad.data) + channel * grad.channel_stride;
#pragma unroll
    for (int n = 0; n < kOutputs; n++) above[n] = from[n] < 0 ? 0.0f : to_float(source[from[n]]);
  }

  template <typename T>
  __device__ void write_as(const LocalShape& s, int64_t channel, const float* tile, void* dx) const {
    T* const target = static_cast<T*>(dx) + channel * s.length;
#pragma unroll
    for (int n = 0; n < kOutputs; n++) {
      if (to[n] < 0) continue;
      const float* const chunk = tile + (first + 8 * n) * s.stride + s.margin + column;
      set(target[to[n]], above[n] * mask[n] + (chunk[0] + chunk[s.hop - s.stride]));
    }
  }
};


template <int kTaps, int kThreads>
__global__ void __launch_bounds__(kThreads, kLocalBlocks<kThreads>)
    gradient_kernel(LocalShape s, Feature grad, Feature x, LocalParameters parameters, int64_t group, LocalRead saved,
                    LocalGradients gradients, Backward space) {
  MVAT_DYNAMIC_SHARED(float, tile);
  const int weight_floats = (s.taps + 3) / 4 * 4, wide_taps = (s.taps + 31) / 32 * 32;
  float* const upper_tile = tile + kRows * s.stride;
  float* const weights = upper_tile + kRows * s.stride;
  float* const flipped = weights + weight_floats;
  float* const parts = flipped + weight_floats;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = int64_t(blockIdx.x) * kOwnRows - 1, begin = blockIdx.y * group;
  const int64_t end = begin + group < s.channels ? begin + group : s.channels;
  const int place = lane * s.stride + s.margin + warp * kEach;
  const Upper upper(s, saved, space, first_row + lane, warp * kEach);
  Outputs outputs(s, saved.attention, grad, first_row);
  Chunks chunks(s, x, first_row);
  clear(tile, 2 * kRows * s.stride);
  chunks.fetch(x, begin);
  for (int64_t c = begin; c < end; c++) {
    __syncthreads();
    chunks.put(s, tile);
    put_weights(parameters.depthwise + c * s.taps, s.taps, weights);
    put_weights(parameters.depthwise + c * s.taps, s.taps, flipped, true);
    __syncthreads();
    if (c + 1 < end) chunks.fetch(x, c + 1);
    float v[kEach];
    convolve<kTaps>(tile + place, weights, s.taps, v);
    const ChannelNorm norm(saved.statistics, s.channels, c, parameters.weight1[c], parameters.bias1[c], parameters.eps1);
    const NormBackward through(norm.inverse * norm.weight, gradients.weight1[c], gradients.bias1[c], s.rows * s.segment,
                               parameters.training);
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      const float normalised = (v[r] - norm.mean) * norm.inverse;
      v[r] = r < upper.count ? through(upper.before_silu(r, c, norm, normalised), normalised) : 0;
      upper_tile[place + r] = v[r];
    }
    // The chunk before the block's own is another block's for the weights.
#pragma unroll
    for (int r = 0; r < kEach; r++) v[r] = lane ? v[r] : 0;
    tap_sums<kTaps>(tile + place, v, s.taps, parts + warp * wide_taps);
    __syncthreads();
    for (int k = threadIdx.x; k < s.taps; k += blockDim.x) {
      float total = 0;
      for (int w = 0; w < s.warps; w++) total += parts[w * wide_taps + k];
      space.depthwise[(c * s.taps + k) * gridDim.x + blockIdx.x] = total;
    }
    outputs.fetch(grad, c);
    convolve<kTaps>(upper_tile + place, flipped, s.taps, v);
#pragma unroll
    for (int r = 0; r < kEach; r++) tile[place + r] = v[r];
    __syncthreads();
    outputs.write(s, x.type, c, tile, gradients.x);
  }
}

template <int kTaps, int kThreads>
void launch(const LocalShape& s, const Feature& grad, const Feature& x, const LocalParameters& parameters,
            const LocalRead& saved, const LocalGradients& gradients, const Backward& space, cudaStream_t stream) {
  const Groups groups(s);
  const int64_t rows = tiles_of(s) * s.warps, own_tiles = ceil_divide(s.rows, kOwnRows);
  const size_t bytes1 = sizeof(float) * (s.tile_floats() + s.weight_floats());
  const size_t bytes = sizeof(float) * s.most_floats();
  const auto norm1 = norm1_kernel<kTaps, kThreads>;
  const auto gradient = gradient_kernel<kTaps, kThreads>;
  MVAT_ALLOW_SHARED(norm1, bytes1);
  MVAT_ALLOW_SHARED(gradient, bytes);
  MVAT_LAUNCH(norm1, dim3(unsigned(tiles_of(s)), unsigned(groups.count)), s.threads(), bytes1, stream, s, x, parameters,
              groups.size, saved, space);
  launch_sum(space.norm1, s.channels, rows, gradients.weight1, stream);
  launch_sum(space.norm1 + s.channels * rows, s.channels, rows, gradients.bias1, stream);
  MVAT_LAUNCH(gradient, dim3(unsigned(own_tiles), unsigned(groups.count)), s.threads(), bytes, stream, s, grad, x,
              parameters, groups.size, saved, gradients, space);
  launch_sum(space.depthwise, s.channels * s.taps, own_tiles, gradients.depthwise, stream);
}

// No clip, no gradient.
void launch_zeros(const LocalShape& s, const LocalParameters& parameters, const LocalGradients& gradients,
                  cudaStream_t stream) {
  launch_sum(nullptr, s.channels * s.taps, 0, gradients.depthwise, stream);
  launch_sum(nullptr, s.channels, 0, gradients.weight1, stream);
  launch_sum(nullptr, s.channels, 0, gradients.bias1, stream);
  launch_sum(nullptr, 2 * parameters.taps2, 0, gradients.conv, stream);
  launch_sum(nullptr, 1, 0, gradients.weight2, stream);
  launch_sum(nullptr, 1, 0, gradients.bias2, stream);
}

}  // namespace

int64_t local_attention_backward_workspace(const Feature& x, const LocalParameters& parameters) {
  Arena count(nullptr);
  Backward(count, LocalShape(x, parameters.segment, parameters.taps1), parameters.taps2);
  return count.used();
}

void local_attention_backward(const Feature& grad, const Feature& x, const LocalParameters& parameters,
                              const LocalRead& saved, const LocalGradients& gradients, void* workspace,
                              cudaStream_t stream) {
  const LocalShape s(x, parameters.segment, parameters.taps1);
  if (s.rows == 0) return launch_zeros(s, parameters, gradients, stream);
  Arena arena(workspace);
  const Backward space(arena, s, parameters.taps2);
  if (x.length) {
    const Spread spread = spread_over(x.channels, fours(x) && fours(grad));
    const int64_t blocks = grid_for(x.batch * ceil_divide(x.length, spread.tile()));
    with_type(x.type, [&](auto element) {
      using T = decltype(element);
      const auto mask = spread.vector == 4 ? mask_kernel<T, 4> : mask_kernel<T, 1>;
      MVAT_LAUNCH(mask, blocks, kTileThreads, 0, stream, grad, x, spread, space.mask);
    });
  }
  const int64_t blocks = mask_blocks(s);
  MVAT_LAUNCH(sigmoid_kernel, blocks, kMaskThreads, 0, stream, s, parameters, saved, space);
  launch_sum(space.norm2, 1, blocks, gradients.weight2, stream);
  launch_sum(space.norm2 + blocks, 1, blocks, gradients.bias2, stream);
  MVAT_LAUNCH(conv_kernel, blocks, kMaskThreads, 0, stream, s, parameters, saved, gradients, space);
  launch_sum(space.conv, 2 * parameters.taps2, blocks, gradients.conv, stream);
  if (is_preset(s)) {
    launch<kPresetTaps, kPresetThreads>(s, grad, x, parameters, saved, gradients, space, stream);
  } else {
    launch<0, 1024>(s, grad, x, parameters, saved, gradients, space, stream);
  }
}

}  // namespace mvat::cuda
