// Tensors as the kernels want them. For small features the dispatcher is most of a call: it is asked only where needed.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>

inline torch::stable::Tensor dense(const torch::stable::Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// Features [B, C, T] or maps [B, T] as they are where samples lie side by side, whatever the other strides; a copy otherwise.
inline torch::stable::Tensor readable(const torch::stable::Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

// A new tensor on the CPU; dtype as aoti_torch_dtype_* gives it. It does not go through the dispatcher.
template <size_t N>
torch::stable::Tensor new_tensor(const int64_t (&sizes)[N], int32_t dtype) {
  std::array<int64_t, N> strides;
  int64_t stride = 1;
  for (size_t i = N; i-- > 0; stride *= std::max<int64_t>(1, sizes[i])) strides[i] = stride;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(N, sizes, strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

// The same in the dtype of x.
template <size_t N>
torch::stable::Tensor new_tensor(const int64_t (&sizes)[N], const torch::stable::Tensor& x) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return new_tensor(sizes, dtype);
}
