// Kernels with one fault each, to show that the emulation notices it; and a right one.
#include "../../csrc/cuda/common/reduce.h"

namespace mvat::cuda {
namespace {

constexpr int kThreads = 64;

// out[i] = x[63 - i] by way of shared memory.
template <bool kBarrier>
__global__ void reverse_kernel(const float* x, float* out) {
  MVAT_SHARED(float, stage, kThreads);
  stage[threadIdx.x] = x[threadIdx.x];
  if constexpr (kBarrier) __syncthreads();
  out[threadIdx.x] = stage[kThreads - 1 - threadIdx.x];
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void divergent_shuffle_kernel(float* out) {
  if (threadIdx.x % 2) out[threadIdx.x] = warp_sum(out[threadIdx.x]);
}

__global__ void overrun_kernel() {
  MVAT_DYNAMIC_SHARED(float, stage);
  stage[threadIdx.x] = 0;
}

// out[0] = the sum of x, out[1 ..] = what unwritten shared memory holds.
__global__ void sum_and_poison_kernel(const float* x, float* out) {
  MVAT_DYNAMIC_SHARED(float, stage);
  const float total = block_sum<kThreads / 32>(x[threadIdx.x]);
  if (threadIdx.x == 0) out[0] = total, out[1] = stage[0];
}

}  // namespace

void self_test(int which, const float* x, float* out) {
  if (which == 0) MVAT_LAUNCH(reverse_kernel<true>, 2, kThreads, 0, 0, x, out);
  if (which == 1) MVAT_LAUNCH(reverse_kernel<false>, 1, kThreads, 0, 0, x, out);
  if (which == 2) MVAT_LAUNCH(divergent_barrier_kernel, 1, kThreads, 0, 0);
  if (which == 3) MVAT_LAUNCH(divergent_shuffle_kernel, 1, kThreads, 0, 0, out);
  if (which == 4) MVAT_LAUNCH(overrun_kernel, 1, kThreads, (kThreads - 1) * sizeof(float), 0);
  if (which == 5) MVAT_LAUNCH(sum_and_poison_kernel, 1, kThreads, 4, 0, x, out);
}

// csrc/cuda's own reduction, by itself.
void join_moments(const float* partial, int64_t columns, int64_t rows, float* mean, float* variance) {
  launch_moments(reinterpret_cast<const Moments<float>*>(partial), columns, rows, mean, variance, {});
}

}  // namespace mvat::cuda
