// What the kernels ask of features [B, C, T] and maps [B, T].
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

// x as it is where samples lie side by side, whatever the other strides; a copy otherwise.
inline torch::stable::Tensor readable(const torch::stable::Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}
