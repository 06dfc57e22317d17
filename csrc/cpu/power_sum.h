// Sums of p-th powers over channels and their gradients, a tile of time at a time: what the operators on attention maps share.
#pragma once

#include <cstdint>

namespace mvat {

constexpr int64_t kTile = 8192;    // the longest tile: its totals, 64 KB, stay in the second-level cache
constexpr int64_t kGrain = 32768;  // elements that are worth a thread

// out[t] = sum over c of |x[c, t]|^p, a channel being `stride` elements behind the one before it.
//
// Channels are summed eight at a time as a tree in T, the trees in double: as exact as a pairwise sum, and one fixed order
// whatever the number of threads.
void map_tile(const float* x, int64_t channels, int64_t stride, int64_t length, float p, float* out);
void map_tile(const double* x, int64_t channels, int64_t stride, int64_t length, double p, double* out);

// dx[c, t] = grad[t] * d|x[c, t]|^p / dx[c, t]
void grad_tile(const float* grad, const float* x, int64_t channels, int64_t stride, int64_t length, float p, float* dx,
               int64_t dx_stride);
void grad_tile(const double* grad, const double* x, int64_t channels, int64_t stride, int64_t length, double p, double* dx,
               int64_t dx_stride);

}  // namespace mvat
