// The mask of the local view: one value for each position of each chunk, C times smaller than the features.
#pragma once

#include "common/platform.h"
#include "local_attention.h"
#include "local_chunks.h"

namespace mvat::cuda {

constexpr int kMaskThreads = 256;
constexpr int64_t kMaskShare = 2048;  // positions for a block that leaves a partial sum

inline int64_t mask_blocks(const LocalShape& s) { return ceil_divide(s.positions(), kMaskShare); }
inline int64_t tiles_of(const LocalShape& s) { return ceil_divide(s.rows, kRows); }
inline bool is_preset(const LocalShape& s) { return s.taps == kPresetTaps && s.threads() <= kPresetThreads; }

// How the channels are split where chunks alone would not fill a GPU.
struct Groups {
  int64_t count, size;

  explicit Groups(const LocalShape& s) : count(1) {
    while (count < 32 && tiles_of(s) * count < 256 && s.channels >= 8 * count) count *= 2;
    size = ceil_divide(s.channels, count);
    count = ceil_divide(s.channels, size);
  }
};

// Where position i of all chunks stands in pooled [B, 2, P, S].
struct Pooled {
  int64_t maximum, mean;  // the mean's place counts from the maximum's
  int position;           // in its chunk

  __device__ Pooled(const LocalShape& s, int64_t i) : mean(s.chunks * s.segment), position(int(i % s.segment)) {
    const int64_t row = i / s.segment;
    maximum = (row / s.chunks * 2 * s.chunks + row % s.chunks) * s.segment + position;
  }
};

// The convolution of maximum and mean over the channels, inside the chunk.
__device__ inline float mask_conv(const LocalShape& s, const LocalParameters& parameters, const float* pooled, int64_t i) {
  const Pooled at(s, i);
  const int taps = int(parameters.taps2), reach = taps / 2;
  float sum = 0;
  for (int k = 0; k < taps; k++) {
    const int position = at.position + k - reach;
    if (position < 0 || position >= s.segment) continue;
    const int64_t place = at.maximum + k - reach;
    sum += parameters.conv[k] * pooled[place] + parameters.conv[taps + k] * pooled[place + at.mean];
  }
  return sum;
}

// m[b, t]: half the sum of the attention at the two places of a sample, in chunk t / hop + 2 and in the one before.
__device__ inline float mask_at(const LocalShape& s, const float* attention, int64_t clip, int64_t t) {
  const int64_t block = t / s.hop;
  const float* const place = attention + (clip * s.chunks + block + 2) * s.segment + (t - block * s.hop);
  return (place[0] + place[s.hop - s.segment]) / 2;
}

}  // namespace mvat::cuda
