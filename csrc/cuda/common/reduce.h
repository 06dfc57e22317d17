// Reductions in one fixed order: within a warp, within a block, and over the partial sums that blocks leave behind.
#pragma once

#include "platform.h"

namespace mvat::cuda {

// The sum over the warp, in every lane.
template <typename T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int flip = 16; flip; flip /= 2) x += __shfl_xor_sync(kWholeWarp, x, flip);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int flip = 16; flip; flip /= 2) {
    const float other = __shfl_xor_sync(kWholeWarp, x, flip);
    x = x > other ? x : other;
  }
  return x;
}

// The sum over a block of kWarps warps, in every thread.
template <int kWarps, typename T>
__device__ inline T block_sum(T x) {
  MVAT_SHARED(T, part, kWarps);
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  T total = part[0];
#pragma unroll
  for (int w = 1; w < kWarps; w++) total += part[w];
  __syncthreads();
  return total;
}

template <int kWarps>
__device__ inline float block_max(float x) {
  MVAT_SHARED(float, part, kWarps);
  x = warp_max(x);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  float largest = part[0];
#pragma unroll
  for (int w = 1; w < kWarps; w++) largest = largest > part[w] ? largest : part[w];
  __syncthreads();
  return largest;
}

// Mean and sum of squared distances from it of `count` values; sets are joined as Chan et al. do, never by E[x^2] - mean^2.
template <typename T>
struct Moments {
  T count, mean, m2;
};

template <typename T>
__device__ inline Moments<T> join(const Moments<T>& a, const Moments<T>& b) {
  if (b.count == 0) return a;
  if (a.count == 0) return b;
  const T count = a.count + b.count, share = b.count / count, distance = b.mean - a.mean;
  return {count, a.mean + distance * share, a.m2 + b.m2 + distance * distance * a.count * share};
}

// The warp's moments, in lane 0.
__device__ inline Moments<float> warp_join(Moments<float> a) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    const Moments<float> b = {__shfl_down_sync(kWholeWarp, a.count, offset), __shfl_down_sync(kWholeWarp, a.mean, offset),
                              __shfl_down_sync(kWholeWarp, a.m2, offset)};
    a = join(a, b);
  }
  return a;
}

constexpr int kReduceThreads = 256;

// out[column] = the sum of partial[column][0 .. rows - 1]; one block a column.
__global__ static void __launch_bounds__(kReduceThreads) sum_kernel(const float* partial, int64_t rows, float* out) {
  const float* const column = partial + int64_t(blockIdx.x) * rows;
  double total = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < rows; i += kReduceThreads) total += column[i];
  total = block_sum<kReduceThreads / 32>(total);
  if (threadIdx.x == 0) out[blockIdx.x] = float(total);
}

inline void launch_sum(const float* partial, int64_t columns, int64_t rows, float* out, cudaStream_t stream) {
  if (columns) MVAT_LAUNCH(sum_kernel, columns, kReduceThreads, 0, stream, partial, rows, out);
}

// Joins partial[column][0 .. rows - 1] of Moments<float> to mean[column] and the biased variance[column]; one block a column.
__global__ static void __launch_bounds__(kReduceThreads)
    moments_kernel(const Moments<float>* partial, int64_t rows, float* mean, float* variance) {
  MVAT_SHARED(Moments<double>, part, kReduceThreads);
  const Moments<float>* const column = partial + int64_t(blockIdx.x) * rows;
  Moments<double> total = {0, 0, 0};
  for (int64_t i = threadIdx.x; i < rows; i += kReduceThreads) {
    const Moments<float> next = column[i];
    total = join(total, Moments<double>{next.count, next.mean, next.m2});
  }
  part[threadIdx.x] = total;
  for (int half = kReduceThreads / 2; half; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) part[threadIdx.x] = join(part[threadIdx.x], part[threadIdx.x + half]);
  }
  if (threadIdx.x == 0) {
    mean[blockIdx.x] = float(part[0].mean);
    variance[blockIdx.x] = part[0].count > 0 ? float(part[0].m2 / part[0].count) : 0.0f;
  }
}

inline void launch_moments(const Moments<float>* partial, int64_t columns, int64_t rows, float* mean, float* variance,
                           cudaStream_t stream) {
  MVAT_LAUNCH(moments_kernel, columns, kReduceThreads, 0, stream, partial, rows, mean, variance);
}

}  // namespace mvat::cuda
