// What the convolution stages' operators share: features and norms as the kernels want them, tasks, workspaces.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "activation.h"

namespace mvat {

using OptionalTensor = std::optional<torch::stable::Tensor>;

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

// The sum over the tasks of their pairs [channels, 2], which lie `stride` apart, as [2, channels].
template <typename T>
void add_up_pairs(const double* pairs, int64_t tasks, int64_t stride, int64_t channels, T* to) {
  for (int64_t c = 0; c < channels; c++)
    for (int64_t i = 0; i < 2; i++) {
      double total = 0;
      for (int64_t task = 0; task < tasks; task++) total += pairs[task * stride + 2 * c + i];
      to[i * channels + c] = T(total);
    }
}

// Mean and biased variance [2, channels] from the tasks' moments [tasks, channels].
template <typename T>
void write_statistics(const std::vector<Moments>& moments, int64_t tasks, int64_t channels, T* to) {
  for (int64_t c = 0; c < channels; c++) {
    Moments total;
    for (int64_t task = 0; task < tasks; task++) {
      const Moments& m = moments[task * channels + c];
      total.add(m.count, m.mean, m.m2);
    }
    to[c] = T(total.mean);
    to[channels + c] = T(total.m2 / total.count);
  }
}

// Weights [groups * out, in, kernel], or [groups * in, out, kernel] if transposed, as one array and as packed ones:
// [groups][kernel][out][in], or for the gradient with out and in exchanged. Packing is a copy where both are the same.
template <typename T>
struct Packed {
  int64_t groups, out, in, kernel, step_out, step_in;  // the steps of the array's channels

  Packed(const conv::Conv& conv, int64_t groups)
      : groups(groups), out(conv.out), in(conv.in), kernel(conv.kernel),
        step_out(conv.transposed ? kernel : conv.in * kernel), step_in(conv.transposed ? conv.out * kernel : kernel) {}

  void pack(const T* from, bool gradient, T* to) const {
    const int64_t rows = gradient ? in : out, row = gradient ? out : in, step_row = gradient ? step_in : step_out;
    const int64_t step = gradient ? step_out : step_in;
    constexpr int64_t kBlock = 16;  // both arrays' cache lines are used up before they are lost
    const int64_t blocks = (rows + kBlock - 1) / kBlock;
    torch::stable::parallel_for(0, groups * blocks, std::max<int64_t>(1, 65536 / (kBlock * row * kernel)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const T* source = from + i / blocks * out * in * kernel;
        T* target = to + i / blocks * out * in * kernel;
        const int64_t first = i % blocks * kBlock, last = std::min(first + kBlock, rows);
        for (int64_t c0 = 0; c0 < row; c0 += kBlock)
          for (int64_t k = 0; k < kernel; k++)
            for (int64_t r = first; r < last; r++)
              for (int64_t c = c0; c < std::min(c0 + kBlock, row); c++)
                target[(k * rows + r) * row + c] = source[r * step_row + c * step + k];
      }
    });
  }

  // The sum of packed arrays, one a task, as [kernel][out][in] into the weight's own order.
  void unpack_sum(const T* from, int64_t tasks, T* to) const {
    const int64_t size = groups * out * in * kernel;
    torch::stable::parallel_for(0, groups * out, std::max<int64_t>(1, 65536 / (in * kernel)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const T* source = from + i / out * out * in * kernel + i % out * in;
        T* target = to + i / out * out * in * kernel + i % out * step_out;
        for (int64_t k = 0; k < kernel; k++)
          for (int64_t c = 0; c < in; c++) {
            T total = 0;
            for (int64_t task = 0; task < tasks; task++) total += source[task * size + k * out * in + c];
            target[c * step_in + k] = total;
          }
      }
    });
  }
};

}  // namespace mvat
