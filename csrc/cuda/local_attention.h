#pragma once

#include "common/types.h"

namespace mvat::cuda {

// The parameters of the local view. norm1 is that of the C channels, norm2 that of the mask; taps1 and taps2 are odd.
struct LocalParameters {
  const float *depthwise, *weight1, *bias1;  // [C, taps1], [C], [C]
  const float *conv, *weight2, *bias2;       // [2, taps2], [1], [1]
  int64_t taps1, taps2, segment;
  float eps1, eps2;
  bool training;
};

// The running statistics that stand in for the batch's outside training.
struct RunningStatistics {
  const float *mean1, *var1, *mean2, *var2;
};

// What the forward pass leaves for the backward pass, over P chunks a clip.
struct LocalSaved {
  float* attention;   // [B, P, S]
  float* pooled;      // [B, 2, P, S]: maximum and mean over the channels
  int32_t* index;     // [B, P, S]: the first maximum's channel
  float* statistics;  // [2, C + 1]: means, then biased variances, of the channels and of the mask
};

// The same, read only.
struct LocalRead {
  const float *attention, *pooled;
  const int32_t* index;
  const float* statistics;
};

struct LocalGradients {
  void* x;
  float *depthwise, *weight1, *bias1, *conv, *weight2, *bias2;
};

// Why the kernels cannot take these sizes, or null where they can.
const char* local_attention_limit(int64_t segment, int64_t taps1);

int64_t local_attention_workspace(const Feature& x, const LocalParameters& parameters);
int64_t local_attention_backward_workspace(const Feature& x, const LocalParameters& parameters);

void local_attention(const Feature& x, const LocalParameters& parameters, const RunningStatistics& running, void* y,
                     const LocalSaved& saved, void* workspace, cudaStream_t stream);

void local_attention_backward(const Feature& grad, const Feature& x, const LocalParameters& parameters,
                              const LocalRead& saved, const LocalGradients& gradients, void* workspace,
                              cudaStream_t stream);

}  // namespace mvat::cuda
