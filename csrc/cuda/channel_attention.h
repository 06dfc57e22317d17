#pragma once

#include "common/types.h"

namespace mvat::cuda {

// fc(v) = weight2 relu(weight1 v + bias1) + bias2; weight1 [hidden, C], weight2 [C, hidden]. The backward pass needs no bias2.
struct Layers {
  const float *weight1, *bias1, *weight2, *bias2;
  int64_t hidden;
};

int64_t channel_attention_workspace(const Feature& x, int64_t hidden);
int64_t channel_attention_backward_workspace(const Feature& x, int64_t hidden);

// y [B, C, T] = x * gate, in x's type; gate [B, C] = sigmoid(fc(maximum) + fc(mean)); pooled [2, B, C]: maximum and mean over
// T; index [B, C] of the first maximum.
void channel_attention(const Feature& x, const Layers& fc, void* y, float* gate, float* pooled, int64_t* index,
                       void* workspace, cudaStream_t stream);

void channel_attention_backward(const Feature& grad, const Feature& x, const float* gate, const float* pooled,
                                const int64_t* index, const Layers& fc, void* dx, float* dweight1, float* dbias1,
                                float* dweight2, float* dbias2, void* workspace, cudaStream_t stream);

}  // namespace mvat::cuda
