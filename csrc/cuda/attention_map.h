#pragma once

#include "common/types.h"

namespace mvat::cuda {

// map [B, T] = sum over c of |x[b, c, t]|^p.
void attention_map(const Feature& x, float p, float* map, cudaStream_t stream);

// dx [B, C, T], in x's type, from grad [B, T].
void attention_map_backward(const float* grad, const Feature& x, float p, void* dx, cudaStream_t stream);

}  // namespace mvat::cuda
