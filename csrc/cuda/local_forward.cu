// y = x * m, m = overlap_add(a) / 2, a = sigmoid(norm2(conv(max and mean over channels of silu(norm1(depthwise(chunks)))))).
//
// Forward: in training a pass over the features leaves the moments of every channel's convolution; a second pass convolves
// again, normalises and pools over the channels, so that no unfolded feature is ever written; the mask is C times smaller; a
// last pass multiplies. Few chunks with many channels are split over the channels too, and their pools joined in the channels'
// order.
#include "local_attention.h"

#include "common/reduce.h"
#include "common/tiles.h"
#include "local_chunks.h"
#include "local_mask.h"

namespace mvat::cuda {
namespace {

template <int kTaps, int kThreads>
__global__ void __launch_bounds__(kThreads, kLocalBlocks<kThreads>)
    moments1_kernel(LocalShape s, Feature x, const float* depthwise, int64_t group, Moments<float>* partial) {
  MVAT_DYNAMIC_SHARED(float, tile);
  float* const weights = tile + kRows * s.stride;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = int64_t(blockIdx.x) * kRows, begin = blockIdx.y * group;
  const int64_t end = begin + group < s.channels ? begin + group : s.channels;
  const float* const position = tile + lane * s.stride + s.margin + warp * kEach;
  const int left = first_row + lane < s.rows ? s.segment - warp * kEach : 0, count = left < kEach ? left : kEach;
  Chunks chunks(s, x, first_row);
  clear(tile, kRows * s.stride);
  chunks.fetch(x, begin);
  for (int64_t c = begin; c < end; c++) {
    __syncthreads();
    chunks.put(s, tile);
    put_weights(depthwise + c * s.taps, s.taps, weights);
    __syncthreads();
    if (c + 1 < end) chunks.fetch(x, c + 1);
    float v[kEach];
    convolve<kTaps>(position, weights, s.taps, v);
    Moments<float> moments = {float(count), 0, 0};
#pragma unroll
    for (int r = 0; r < kEach; r++) moments.mean += r < count ? v[r] : 0;
    moments.mean /= count ? count : 1;
#pragma unroll
    for (int r = 0; r < kEach; r++) moments.m2 += r < count ? (v[r] - moments.mean) * (v[r] - moments.mean) : 0;
    moments = warp_join(moments);
    if (lane == 0) partial[(c * gridDim.x + blockIdx.x) * s.warps + warp] = moments;
  }
}

// What a group of channels pools at a position.
struct Pool {
  float* maximum;
  float* sum;
  int32_t* index;
};

// With one group the result is pooled [B, 2, P, S] itself, else a part that join_kernel joins.
template <int kTaps, int kThreads>
__global__ void __launch_bounds__(kThreads, kLocalBlocks<kThreads>)
    pool_kernel(LocalShape s, Feature x, LocalParameters parameters, int64_t group, LocalSaved saved, Pool part) {
  MVAT_DYNAMIC_SHARED(float, tile);
  float* const weights = tile + kRows * s.stride;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = int64_t(blockIdx.x) * kRows, begin = blockIdx.y * group;
  const int64_t end = begin + group < s.channels ? begin + group : s.channels;
  const float* const position = tile + lane * s.stride + s.margin + warp * kEach;
  float maximum[kEach], sum[kEach];
  int32_t index[kEach];
#pragma unroll
  for (int r = 0; r < kEach; r++) maximum[r] = -INFINITY, sum[r] = 0, index[r] = int32_t(begin);
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
    const float scale = norm.inverse * norm.weight;
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      const float normalised = (v[r] - norm.mean) * scale + norm.bias, u = normalised * sigmoid(normalised);
      sum[r] += u;
      if (u > maximum[r] || (u != u && maximum[r] == maximum[r])) maximum[r] = u, index[r] = int32_t(c);
    }
  }
  const int64_t row = first_row + lane;
  if (row >= s.rows) return;
  const bool whole = gridDim.y == 1;
  const int64_t clip = row / s.chunks, chunk = row % s.chunks, at = row * s.segment + warp * kEach;
  float* const out_maximum = whole ? saved.pooled + (2 * clip * s.chunks + chunk) * s.segment + warp * kEach
                                   : part.maximum + blockIdx.y * s.rows * s.segment + at;
  float* const out_sum = whole ? out_maximum + s.chunks * s.segment : part.sum + blockIdx.y * s.rows * s.segment + at;
  int32_t* const out_index = whole ? saved.index + at : part.index + blockIdx.y * s.rows * s.segment + at;
#pragma unroll
  for (int r = 0; r < kEach; r++) {
    if (warp * kEach + r >= s.segment) break;
    out_maximum[r] = maximum[r];
    out_sum[r] = whole ? sum[r] / s.channels : sum[r];
    out_index[r] = index[r];
  }
}

__global__ void __launch_bounds__(kMaskThreads) join_kernel(LocalShape s, Pool part, int groups, LocalSaved saved) {
  const int64_t size = s.rows * s.segment;
  for (int64_t i = int64_t(blockIdx.x) * kMaskThreads + threadIdx.x; i < size; i += int64_t(gridDim.x) * kMaskThreads) {
    float maximum = part.maximum[i], sum = part.sum[i];
    int32_t index = part.index[i];
    for (int g = 1; g < groups; g++) {
      const float other = part.maximum[g * size + i];
      if (other > maximum || (other != other && maximum == maximum)) maximum = other, index = part.index[g * size + i];
      sum += part.sum[g * size + i];
    }
    const Pooled at(s, i);
    saved.pooled[at.maximum] = maximum;
    saved.pooled[at.maximum + at.mean] = sum / s.channels;
    saved.index[i] = index;
  }
}

// Leaves conv(pooled) in attention and, in training, the moments of each block's share.
__global__ void __launch_bounds__(kMaskThreads)
    conv_kernel(LocalShape s, LocalParameters parameters, LocalSaved saved, Moments<float>* partial) {
  MVAT_SHARED(Moments<float>, part, kMaskThreads / 32);
  const int64_t begin = int64_t(blockIdx.x) * kMaskShare, size = s.rows * s.segment;
  Moments<float> moments = {0, 0, 0};
  for (int64_t i = begin + threadIdx.x; i < begin + kMaskShare && i < size; i += kMaskThreads) {
    const float v = mask_conv(s, parameters, saved.pooled, i);
    saved.attention[i] = v;
    moments = join(moments, Moments<float>{1, v, 0});
  }
  if (!parameters.training) return;
  moments = warp_join(moments);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = moments;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < kMaskThreads / 32; w++) moments = join(moments, part[w]);
  partial[blockIdx.x] = moments;
}

__global__ void __launch_bounds__(kMaskThreads) sigmoid_kernel(LocalShape s, LocalParameters parameters, LocalSaved saved) {
  const ChannelNorm norm(saved.statistics, s.channels, s.channels, *parameters.weight2, *parameters.bias2, parameters.eps2);
  for (int64_t i = int64_t(blockIdx.x) * kMaskThreads + threadIdx.x; i < s.rows * s.segment;
       i += int64_t(gridDim.x) * kMaskThreads)
    saved.attention[i] = sigmoid((saved.attention[i] - norm.mean) * norm.inverse * norm.weight + norm.bias);
}

__global__ void __launch_bounds__(kMaskThreads)
    copy_statistics_kernel(int64_t channels, RunningStatistics running, float* statistics) {
  for (int64_t c = threadIdx.x; c <= channels; c += kMaskThreads) {
    statistics[c] = c < channels ? running.mean1[c] : *running.mean2;
    statistics[channels + 1 + c] = c < channels ? running.var1[c] : *running.var2;
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kTileThreads)
    multiply_kernel(LocalShape s, Feature x, Spread spread, const float* attention, T* y) {
  const int64_t tiles = (x.length + spread.tile() - 1) / spread.tile();
  const Place<V> place(spread);
  for (int64_t i = blockIdx.x; i < x.batch * tiles; i += gridDim.x) {
    const int64_t clip = i / tiles, t = i % tiles * spread.tile() + place.column;
    if (t >= x.length) continue;
    float mask[V];
#pragma unroll
    for (int v = 0; v < V; v++) mask[v] = mask_at(s, attention, clip, t + v);
    const T* const source = static_cast<const T*>(x.data) + clip * x.batch_stride + t;
    T* const target = y + clip * x.channels * x.length + t;
    transform<V, 4>(
        place.row, x.channels, place.rows,
        [&](int64_t c, float(&value)[V]) { load<V>(source + c * x.channel_stride, value); },
        [&](int64_t c, float(&value)[V]) {
#pragma unroll
          for (int v = 0; v < V; v++) value[v] *= mask[v];
          store<V>(target + c * x.length, value);
        });
  }
}

struct Forward {
  Moments<float>* moments1;  // [C, blocks, warps]
  Moments<float>* moments2;  // [mask blocks]
  Pool part;                 // [groups, B, P, S], where there are several

  Forward(Arena& arena, const LocalShape& s, int64_t groups, bool training) {
    moments1 = arena.take<Moments<float>>(training ? s.channels * tiles_of(s) * s.warps : 0);
    moments2 = arena.take<Moments<float>>(mask_blocks(s));
    const int64_t size = groups > 1 ? groups * s.positions() : 0;
    part = {arena.take<float>(size), arena.take<float>(size), arena.take<int32_t>(size)};
  }
};

template <int kTaps, int kThreads>
void launch(const LocalShape& s, const Feature& x, const LocalParameters& parameters, const RunningStatistics& running,
            const LocalSaved& saved, const Forward& space, cudaStream_t stream) {
  const size_t bytes = sizeof(float) * (s.tile_floats() + s.weight_floats());
  const Groups groups(s);
  const dim3 grid(unsigned(tiles_of(s)), unsigned(groups.count));
  float* const variance = saved.statistics + s.channels + 1;
  if (parameters.training) {
    const auto moments1 = moments1_kernel<kTaps, kThreads>;
    MVAT_ALLOW_SHARED(moments1, bytes);
    MVAT_LAUNCH(moments1, grid, s.threads(), bytes, stream, s, x, parameters.depthwise, groups.size, space.moments1);
    launch_moments(space.moments1, s.channels, tiles_of(s) * s.warps, saved.statistics, variance, stream);
  } else {
    MVAT_LAUNCH(copy_statistics_kernel, 1, kMaskThreads, 0, stream, s.channels, running, saved.statistics);
  }
  const auto pool = pool_kernel<kTaps, kThreads>;
  MVAT_ALLOW_SHARED(pool, bytes);
  MVAT_LAUNCH(pool, grid, s.threads(), bytes, stream, s, x, parameters, groups.size, saved, space.part);
}

}  // namespace

const char* local_attention_limit(int64_t segment, int64_t taps1) {
  if (segment > 256) return "segment_len up to 256";
  const LocalShape s(Feature{nullptr, 1, 1, 1, 1, 1, Type::kFloat}, segment, taps1 < 1000 ? taps1 : 1000);
  return s.most_floats() > 99 * 256 ? "fewer taps of the depthwise convolution" : nullptr;
}

int64_t local_attention_workspace(const Feature& x, const LocalParameters& parameters) {
  const LocalShape s(x, parameters.segment, parameters.taps1);
  Arena count(nullptr);
  Forward(count, s, Groups(s).count, parameters.training);
  return count.used();
}

void local_attention(const Feature& x, const LocalParameters& parameters, const RunningStatistics& running, void* y,
                     const LocalSaved& saved, void* workspace, cudaStream_t stream) {
  const LocalShape s(x, parameters.segment, parameters.taps1);
  if (s.rows == 0) {
    MVAT_LAUNCH(copy_statistics_kernel, 1, kMaskThreads, 0, stream, s.channels, running, saved.statistics);
    return;
  }
  const Groups groups(s);
  Arena arena(workspace);
  const Forward space(arena, s, groups.count, parameters.training);
  if (is_preset(s)) {
    launch<kPresetTaps, kPresetThreads>(s, x, parameters, running, saved, space, stream);
  } else {
    launch<0, 1024>(s, x, parameters, running, saved, space, stream);
  }
  if (groups.count > 1)
    MVAT_LAUNCH(join_kernel, grid_for(ceil_divide(s.positions(), kMaskThreads)), kMaskThreads, 0, stream, s, space.part,
                int(groups.count), saved);
  MVAT_LAUNCH(conv_kernel, mask_blocks(s), kMaskThreads, 0, stream, s, parameters, saved, space.moments2);
  if (parameters.training)
    launch_moments(space.moments2, 1, mask_blocks(s), saved.statistics + s.channels, saved.statistics + 2 * s.channels + 1,
                   stream);
  MVAT_LAUNCH(sigmoid_kernel, grid_for(ceil_divide(s.positions(), kMaskThreads)), kMaskThreads, 0, stream, s, parameters,
              saved);
  if (x.length == 0) return;
  const Spread spread = spread_over(x.channels, fours(x) && fours(y, x.type, x.length));
  const int64_t blocks = grid_for(x.batch * ceil_divide(x.length, spread.tile()));
  with_type(x.type, [&](auto element) {
    using T = decltype(element);
    const auto multiply = spread.vector == 4 ? multiply_kernel<T, 4> : multiply_kernel<T, 1>;
    MVAT_LAUNCH(multiply, blocks, kTileThreads, 0, stream, s, x, spread, saved.attention, static_cast<T*>(y));
  });
}

}  // namespace mvat::cuda
