// Passes over features [B, C, T] in which every moment t stands for itself: sums over channels, and maps spread over channels.
//
// A block of 8 warps takes a tile of one clip's samples. Each lane has V neighbours in time; `rows` warps share the same
// samples and take turns at the channels, so that short features with many channels fill the GPU as long ones with few do.
#pragma once

#include "platform.h"

namespace mvat::cuda {

constexpr int kTileWarps = 8;
constexpr int kTileThreads = 32 * kTileWarps;

struct Spread {
  int vector, rows;

  __host__ __device__ int tile() const { return kTileWarps / rows * 32 * vector; }
};

inline Spread spread_over(int64_t channels, bool fours) {
  int rows = 1;
  while (rows < kTileWarps && channels >= 16 * rows) rows *= 2;
  return {fours ? 4 : 1, rows};
}

// Where a thread stands in its block's tile.
template <int V>
struct Place {
  int row, rows, column;

  __device__ explicit Place(const Spread& spread) : rows(spread.rows) {
    const int warp = threadIdx.x / 32;
    row = warp % rows;
    column = (warp / rows * 32 + threadIdx.x % 32) * V;
  }
};

// total[v] = the sum of term(c)[v] over the channels of this thread's row.
template <int V, int kUnroll, typename Term>
__device__ inline void sum_channels(const Place<V>& place, int64_t channels, const Term& term, float (&total)[V]) {
#pragma unroll
  for (int v = 0; v < V; v++) total[v] = 0;
#pragma unroll kUnroll
  for (int64_t c = place.row; c < channels; c += place.rows) {
    float value[V];
    term(c, value);
#pragma unroll
    for (int v = 0; v < V; v++) total[v] += value[v];
  }
}

// Outside join_rows, so that all its instances share it.
__device__ inline float* row_stage() {
  MVAT_SHARED(float, part, kTileThreads * 4);
  return part;
}

// Joins the rows' totals in their order and calls emit(column, total) for the tile's first `length` columns.
template <int V, typename Emit>
__device__ inline void join_rows(const Place<V>& place, const float (&total)[V], int64_t length, const Emit& emit) {
  float* const part = row_stage();
  const int tile = kTileThreads * V / place.rows;
#pragma unroll
  for (int v = 0; v < V; v++) part[place.row * tile + place.column + v] = total[v];
  __syncthreads();
  for (int column = threadIdx.x; column < tile && column < length; column += kTileThreads) {
    float sum = part[column];
    for (int row = 1; row < place.rows; row++) sum += part[row * tile + column];
    emit(column, sum);
  }
  __syncthreads();
}

}  // namespace mvat::cuda
