// What the kernels ask of features [B, C, T].
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

// x as it is where samples lie side by side, whatever the other strides; a copy otherwise.
inline torch::stable::Tensor readable(const torch::stable::Tensor& x) {
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}
