// What the convolution stages' operators share: features and norms as the kernels want them, tasks, workspaces.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <new>
#include <optional>
#include <vector>

#include "activation.h"

namespace mvat {

using OptionalTensor = std::optional<torch::stable::Tensor>;

template <typename T>
struct Aligned {
  T* data;
  explicit Aligned(int64_t size) : data(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64)))) {}
  ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
};

template <typename T>
Features<const T> features(const torch::stable::Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1), x.size(2)};
}

template <typename T>
Features<T> new_features(torch::stable::Tensor& x) {
  return {x.mutable_data_ptr<T>(), x.stride(0), x.stride(1), x.size(2)};
}

// A batch norm as operators take it: four tensors [C], or none of them.
struct NormTensors {
  const OptionalTensor &weight, &bias, &mean, &var;
  double eps;
};

template <typename T>
std::vector<NormRow<T>> norm_rows(const NormTensors& norm, int64_t channels) {
  std::vector<NormRow<T>> rows(channels);
  if (!norm.weight) return rows;
  const torch::stable::Tensor weight = torch::stable::contiguous(*norm.weight), bias = torch::stable::contiguous(*norm.bias);
  const torch::stable::Tensor mean = torch::stable::contiguous(*norm.mean), var = torch::stable::contiguous(*norm.var);
  const T *w = weight.const_data_ptr<T>(), *b = bias.const_data_ptr<T>(), *m = mean.const_data_ptr<T>(), *v = var.const_data_ptr<T>();
  for (int64_t c = 0; c < channels; c++) {
    const double inverse = 1 / std::sqrt(double(v[c]) + norm.eps);
    const T scale = T(double(w[c]) * inverse);  // the shift goes with the rounded one, or a large mean would not cancel
    rows[c] = {scale, T(double(b[c]) - double(m[c]) * double(scale)), m[c], T(inverse)};
  }
  return rows;
}

// Items in as many tasks, each a run of neighbours with sums of its own that are added in the tasks' order: the result does not
// depend on the number of threads.
inline int64_t tasks_for(int64_t items, int64_t bytes_of_sums) {
  const int64_t most = std::clamp<int64_t>((int64_t(16) << 20) / std::max<int64_t>(1, bytes_of_sums), 2, 64);
  return std::min(items, most);
}

}  // namespace mvat
