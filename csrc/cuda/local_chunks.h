// Overlapped chunks of features in shared memory and the depthwise convolution inside them: what every pass of the local view
// over the features begins with.
//
// A block takes 32 chunks, a lane each, and all their positions, 8 a thread: warp q has positions 8 q .. 8 q + 7. Chunks of
// all clips are counted on as rows, so that short clips share a block. A chunk lies in shared memory between margins that stay
// zero, the convolution's padding; a row is an odd number of 16-byte words long, so that the lanes' vector reads meet no bank
// twice.
#pragma once

#include "common/platform.h"

namespace mvat::cuda {

constexpr int kRows = 32;  // chunks a block
constexpr int kEach = 8;   // positions a thread

struct LocalShape {
  int64_t batch, channels, length, chunks, rows;  // rows: chunks of all clips
  int segment, hop, taps, warps, margin, stride;

  LocalShape(const Feature& x, int64_t segment_len, int64_t taps1)
      : batch(x.batch),
        channels(x.channels),
        length(x.length),
        chunks((x.length + segment_len) / (segment_len / 2) + 1),
        rows(x.batch * chunks),
        segment(int(segment_len)),
        hop(int(segment_len / 2)),
        taps(int(taps1)),
        warps((segment + kEach - 1) / kEach),
        margin((taps / 2 + 3) / 4 * 4),
        stride(warps * kEach + 2 * margin) {
    if (stride / 4 % 2 == 0) stride += 4;
  }

  int threads() const { return 32 * warps; }
  int64_t positions() const { return rows * segment; }
  // A chunk tile and, rounded up to whole words, the weights of a channel.
  int tile_floats() const { return kRows * stride; }
  int weight_floats() const { return (taps + 3) / 4 * 4; }
  int part_floats() const { return warps * ((taps + 31) / 32 * 32); }
  // What the largest kernel, that of the gradients, takes of shared memory.
  int most_floats() const { return 2 * tile_floats() + 2 * weight_floats() + part_floats(); }
};

// The preset's sizes get kernels of their own: kTaps is 31, or 0 for any number.
constexpr int kPresetTaps = 31;
constexpr int kPresetThreads = 256;
// Blocks that a multiprocessor holds at the same time: two hide the barriers of each other.
template <int kThreads>
constexpr int kLocalBlocks = kThreads <= kPresetThreads ? 2 : 1;

// One block's share of the features: what its threads load, and where its lanes stand. The type is asked at run time, once for
// eight loads: instances of these long kernels for each type would cost compile time and bring nothing.
struct Chunks {
  int64_t offset[kEach];  // of the samples this thread loads, from their channel's start in the first clip; -1: silence
  int first, column;      // their first row, and the position they all have
  float value[kEach];

  // The block's chunks are first_row .. first_row + 31, which may lie outside.
  __device__ Chunks(const LocalShape& s, const Feature& x, int64_t first_row) {
    const int wide = s.warps * kEach;
    first = threadIdx.x / wide;
    column = threadIdx.x % wide;
#pragma unroll
    for (int n = 0; n < kEach; n++) {
      const int64_t row = first_row + first + 4 * n;
      offset[n] = -1;
      if (row < 0 || row >= s.rows || column >= s.segment) continue;
      const int64_t t = row % s.chunks * s.hop - s.segment + column;
      if (t >= 0 && t < s.length) offset[n] = row / s.chunks * x.batch_stride + t;
    }
  }

  // Reads the channel's samples, which a later `put` writes to shared memory.
  __device__ void fetch(const Feature& x, int64_t channel) {
    if (x.type == Type::kFloat) return fetch_as<float>(x, channel);
    if (x.type == Type::kBFloat16) return fetch_as<__nv_bfloat16>(x, channel);
    fetch_as<__half>(x, channel);
  }

  __device__ void put(const LocalShape& s, float* tile) const {
#pragma unroll
    for (int n = 0; n < kEach; n++) tile[(first + 4 * n) * s.stride + s.margin + column] = value[n];
  }

 private:
  template <typename T>
  __device__ void fetch_as(const Feature& x, int64_t channel) {
    const T* const source = static_cast<const T*>(x.data) + channel * x.channel_stride;
#pragma unroll
    for (int n = 0; n < kEach; n++) value[n] = offset[n] < 0 ? 0.0f : to_float(source[offset[n]]);
  }
};

__device__ inline void clear(float* shared, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) shared[i] = 0;
}

// target[k] = weight[k], or weight[taps - 1 - k] where flipped.
__device__ inline void put_weights(const float* weight, int taps, float* target, bool flipped = false) {
  for (int k = threadIdx.x; k < taps; k += blockDim.x) target[k] = weight[flipped ? taps - 1 - k : k];
}

// The 40 samples around a thread's 8 positions that 31 taps reach: window[j] stands at position j - 16.
__device__ inline void load_window(const float* position, float (&window)[40]) {
#pragma unroll
  for (int j = 0; j < 40; j += 4) {
    const float4 four = *reinterpret_cast<const float4*>(position - 16 + j);
    window[j] = four.x, window[j + 1] = four.y, window[j + 2] = four.z, window[j + 3] = four.w;
  }
}

// out[r] = sum over k of weight[k] * position[r + k - taps / 2]; position points at the thread's first position in the tile.
template <int kTaps>
__device__ inline void convolve(const float* position, const float* weight, int taps, float (&out)[kEach]) {
#pragma unroll
  for (int r = 0; r < kEach; r++) out[r] = 0;
  if constexpr (kTaps == kPresetTaps) {
    float window[40];
    load_window(position, window);
#pragma unroll
    for (int k = 0; k < kTaps; k++) {
      const float w = weight[k];
#pragma unroll
      for (int r = 0; r < kEach; r++) out[r] += w * window[r + k + 1];
    }
  } else {
    for (int k = 0; k < taps; k++) {
      const float w = weight[k];
#pragma unroll
      for (int r = 0; r < kEach; r++) out[r] += w * position[r + k - taps / 2];
    }
  }
}

__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// A channel's norm, as every pass applies it: (v - mean) * inverse * weight + bias.
struct ChannelNorm {
  float mean, inverse, weight, bias;

  __device__ ChannelNorm(const float* statistics, int64_t channels, int64_t c, float weight, float bias, float eps)
      : mean(statistics[c]), inverse(1 / sqrtf(statistics[channels + 1 + c] + eps)), weight(weight), bias(bias) {}
};

}  // namespace mvat::cuda
