// y = conv(act(norm(x))) and its gradients on the CPU, with the mean and variance of y for the norm that follows.
//
// Forward reads x once and writes y once; backward reads x, y's gradient, and writes the gradient before the norm, with the sums
// that the norm's own gradient takes from it (norm_act.cpp). A tile of columns is packed, normalised and activated on its way,
// into a panel that stays in the second cache; every product of the tile is made there.
#include "norm_act_conv.h"

#include <tuple>

#include "features.h"
#include "stage.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using namespace mvat;
using conv::Conv;
using norm_act_conv::Stage;

template <typename T>
struct Level {
  int64_t lanes, block, widest;  // of a tile: its columns are whole blocks
  void (*forward)(const Stage<T>&, int64_t b, int64_t group, int64_t t, T* workspace, Moments*);
  void (*backward)(const Stage<T>&, int64_t b, int64_t group, int64_t t, T* workspace, T* d_weight, double* d_bias, double* sums);
};

#define MVAT_ENTRIES(NAME, TARGET, T, L, NV, MR)                                                                              \
  TARGET void forward_##NAME(const Stage<T>& s, int64_t b, int64_t group, int64_t t, T* workspace, Moments* moments) {        \
    norm_act_conv::Tile<T, L, NV, MR>::forward(s, b, group, t, workspace, moments);                                           \
  }                                                                                                                           \
  TARGET void backward_##NAME(const Stage<T>& s, int64_t b, int64_t group, int64_t t, T* workspace, T* d_weight,              \
                              double* d_bias, double* sums) {                                                                 \
    norm_act_conv::Tile<T, L, NV, MR>::backward(s, b, group, t, workspace, d_weight, d_bias, sums);                           \
  }                                                                                                                           \
  const Level<T> level_##NAME = {L, L * NV, 1536, forward_##NAME, backward_##NAME};
MVAT_EVERY_LEVEL(MVAT_ENTRIES)
#undef MVAT_ENTRIES

MVAT_CHOOSE_LEVEL

struct Arguments {
  int64_t activation, stride, padding, groups;
  bool transposed;
};

int64_t length_out(const Tensor& x, const Tensor& weight, const Arguments& a) {
  if (a.transposed) return (x.size(2) - 1) * a.stride + weight.size(2) - 2 * a.padding;
  return (x.size(2) + 2 * a.padding - weight.size(2)) / a.stride + 1;
}

int64_t channels_out(const Tensor& weight, const Arguments& a) {
  return a.transposed ? weight.size(1) * a.groups : weight.size(0);
}

template <typename T>
Stage<T> stage(const Tensor& x, const std::vector<NormRow<T>>& norm, const Tensor& weight, const Arguments& a) {
  const Level<T>& kernels = level<T>();
  const int64_t kernel = weight.size(2), per_group = (a.activation == kGlu ? x.size(1) / 2 : x.size(1)) / a.groups;
  // A stride beyond the signal leads nowhere, and its phases would only take memory.
  const int64_t stride = a.transposed ? a.stride : std::min(a.stride, x.size(2) + 2 * a.padding);
  Stage<T> s{};
  s.conv = {per_group, channels_out(weight, a) / a.groups, kernel, stride, a.padding, a.transposed,
            x.size(2), length_out(x, weight, a)};
  s.groups = a.groups;
  s.channels = x.size(1);
  s.activation = Activation(a.activation);
  // A tile's panels are to stay in a quarter of a MB; no fewer than eight tiles where that leaves them a few blocks long.
  const int64_t all = std::max(s.conv.columns(), s.conv.gradient().columns());
  const int64_t bytes = (s.conv.rows_in() + s.conv.rows_out()) * int64_t(sizeof(T));
  const int64_t fits = std::min<int64_t>((256 << 10) / bytes, kernels.widest);
  const int64_t share = x.size(0) * a.groups * all / 8;
  const int64_t columns = std::max<int64_t>(std::min({fits, share, all}), std::min<int64_t>(all, 2 * kernels.block));
  s.columns = (columns + kernels.block - 1) / kernels.block * kernels.block;
  s.x = features<T>(x);
  s.norm = norm.data();
  s.panel_row = conv::row_size<T>(s.width() + kernels.block);
  s.out_row = conv::row_size<T>(s.columns);
  s.grad_row = s.panel_row;
  return s;
}

template <typename T>
void run_forward(const Tensor& x, const NormTensors& norm, const Tensor& weight, const OptionalTensor& bias, const Arguments& a,
                 Tensor& y, Tensor& statistics) {
  const std::vector<NormRow<T>> rows = norm_rows<T>(norm, x.size(1));
  Stage<T> s = stage(x, rows, weight, a);
  const bool as_it_is = s.conv.kernel == 1 && !s.conv.transposed;
  const Aligned<T> packed(as_it_is ? 0 : weight.numel());
  if (!as_it_is) Packed<T>(s.conv, a.groups).pack(weight.const_data_ptr<T>(), false, packed.data);
  s.weight = as_it_is ? weight.const_data_ptr<T>() : packed.data;
  s.bias = bias ? bias->const_data_ptr<T>() : nullptr;
  s.out = new_features<T>(y);
  const bool wanted = statistics.numel() > 0;
  const int64_t tiles = s.tiles(), items = x.size(0) * a.groups * tiles, out = y.size(1);
  const int64_t tasks = tasks_for(items, 1);
  std::vector<Moments> moments(wanted ? tasks * out : 0);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const Aligned<T> workspace(s.forward_workspace());
    for (int64_t task = begin; task < end; task++)
      for (int64_t i = task * items / tasks; i < (task + 1) * items / tasks; i++)
        level<T>().forward(s, i / tiles / a.groups, i / tiles % a.groups, i % tiles * s.columns, workspace.data,
                           wanted ? moments.data() + task * out : nullptr);
  });
  if (!wanted) return;
  write_statistics(moments, tasks, out, statistics.mutable_data_ptr<T>());
}

template <typename T>
void run_backward(const Tensor& grad, const Tensor& x, const NormTensors& norm, const Tensor& weight, const Arguments& a, Tensor& dz,
                  Tensor& sums, Tensor& d_weight, Tensor& d_bias) {
  const std::vector<NormRow<T>> rows = norm_rows<T>(norm, x.size(1));
  Stage<T> s = stage(x, rows, weight, a);
  const Packed<T> packing(s.conv, a.groups);
  const Aligned<T> packed(weight.numel());
  packing.pack(weight.const_data_ptr<T>(), true, packed.data);
  s.weight = packed.data;
  s.grad = features<T>(grad);
  s.out = new_features<T>(dz);
  const int64_t tiles = s.tiles(), items = x.size(0) * a.groups * tiles, size = weight.numel(), channels = x.size(1);
  const int64_t out = grad.size(1), tasks = tasks_for(items, size * sizeof(T));
  const Aligned<T> weights(tasks * size);
  std::vector<double> channel_sums(tasks * 2 * channels), biases(tasks * out);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const Aligned<T> workspace(s.backward_workspace());
    for (int64_t task = begin; task < end; task++) {
      T* own = weights.data + task * size;
      std::fill_n(own, size, T(0));
      for (int64_t i = task * items / tasks; i < (task + 1) * items / tasks; i++)
        level<T>().backward(s, i / tiles / a.groups, i / tiles % a.groups, i % tiles * s.columns, workspace.data, own,
                            biases.data() + task * out, channel_sums.data() + task * 2 * channels);
    }
  });
  T *to = d_weight.mutable_data_ptr<T>(), *to_bias = d_bias.mutable_data_ptr<T>();
  packing.unpack_sum(weights.data, tasks, to);
  for (int64_t o = 0; o < d_bias.numel(); o++) {
    double total = 0;
    for (int64_t task = 0; task < tasks; task++) total += biases[task * out + o];
    to_bias[o] = T(total);
  }
  add_up_pairs(channel_sums.data(), tasks, 2 * channels, channels, sums.mutable_data_ptr<T>());
}

void check(const Tensor& x, const NormTensors& norm, const Tensor& weight, const OptionalTensor& bias, const Arguments& a) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 3, "norm_act_conv: expected x [B, C, T] and a weight of 3 dimensions");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "norm_act_conv: expected float32 or float64");
  STD_TORCH_CHECK(a.activation >= kIdentity && a.activation <= kGlu && (a.activation != kGlu || x.size(1) % 2 == 0),
                  "norm_act_conv: unknown activation ", a.activation, " for ", x.size(1), " channels");
  const int64_t channels = a.activation == kGlu ? x.size(1) / 2 : x.size(1);
  STD_TORCH_CHECK(a.stride >= 1 && a.padding >= 0 && a.groups >= 1 && channels % a.groups == 0 && weight.size(0) % a.groups == 0 &&
                      (a.transposed ? weight.size(0) : weight.size(1) * a.groups) == channels && weight.scalar_type() == type,
                  "norm_act_conv: the weight does not fit ", channels, " channels in ", a.groups, " groups");
  STD_TORCH_CHECK(weight.numel() > 0 && length_out(x, weight, a) >= 1, "norm_act_conv: x is too short or the weight empty");
  STD_TORCH_CHECK(!bias || (bias->numel() == channels_out(weight, a) && bias->scalar_type() == type),
                  "norm_act_conv: the bias does not fit");
  STD_TORCH_CHECK(norm.weight.has_value() == norm.bias.has_value() && norm.weight.has_value() == norm.mean.has_value() &&
                      norm.weight.has_value() == norm.var.has_value(),
                  "norm_act_conv: a norm is four tensors");
  if (norm.weight)
    for (const OptionalTensor* tensor : {&norm.weight, &norm.bias, &norm.mean, &norm.var})
      STD_TORCH_CHECK((*tensor)->numel() == x.size(1) && (*tensor)->scalar_type() == type,
                      "norm_act_conv: expected a norm of ", x.size(1), " channels in the dtype of x");
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_any, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                   const OptionalTensor& mean, const OptionalTensor& var, const Tensor& weight_any,
                                   const OptionalTensor& bias_any, double eps, int64_t activation, int64_t stride, int64_t padding,
                                   int64_t groups, bool transposed, bool, bool statistics) {
  const NormTensors norm{norm_weight, norm_bias, mean, var, eps};
  const Arguments a{activation, stride, padding, groups, transposed};
  check(x_any, norm, weight_any, bias_any, a);
  const Tensor x = readable(x_any), weight = dense(weight_any);
  const OptionalTensor bias = bias_any ? OptionalTensor(dense(*bias_any)) : std::nullopt;
  const int64_t out = channels_out(weight, a);
  Tensor y = torch::stable::new_empty(x, {x.size(0), out, length_out(x, weight, a)});
  Tensor moments = torch::stable::new_empty(x, {statistics ? 2 : 0, out});
  if (x.scalar_type() == ScalarType::Float) {
    run_forward<float>(x, norm, weight, bias, a, y, moments);
  } else {
    run_forward<double>(x, norm, weight, bias, a, y, moments);
  }
  return {y, moments};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_any, const Tensor& x_any, const OptionalTensor& norm_weight,
                                                    const OptionalTensor& norm_bias, const OptionalTensor& mean,
                                                    const OptionalTensor& var, const Tensor& weight_any, bool has_bias, double eps,
                                                    int64_t activation, int64_t stride, int64_t padding, int64_t groups,
                                                    bool transposed) {
  const NormTensors norm{norm_weight, norm_bias, mean, var, eps};
  const Arguments a{activation, stride, padding, groups, transposed};
  check(x_any, norm, weight_any, std::nullopt, a);
  STD_TORCH_CHECK(grad_any.dim() == 3 && grad_any.size(0) == x_any.size(0) && grad_any.size(1) == channels_out(weight_any, a) &&
                      grad_any.size(2) == length_out(x_any, weight_any, a) && grad_any.scalar_type() == x_any.scalar_type(),
                  "norm_act_conv_backward: expected grad in the shape and dtype of the output");
  const Tensor x = readable(x_any), grad = readable(grad_any), weight = dense(weight_any);
  Tensor dz = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  Tensor sums = torch::stable::new_empty(x, {2, x.size(1)});
  Tensor d_weight = torch::stable::new_empty(x, {weight.size(0), weight.size(1), weight.size(2)});
  Tensor d_bias = torch::stable::new_empty(x, {has_bias ? grad.size(1) : 0});
  if (x.scalar_type() == ScalarType::Float) {
    run_backward<float>(grad, x, norm, weight, a, dz, sums, d_weight, d_bias);
  } else {
    run_backward<double>(grad, x, norm, weight, a, dz, sums, d_weight, d_bias);
  }
  return {dz, sums, d_weight, d_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mvat, CPU, m) {
  m.impl("norm_act_conv", TORCH_BOX(&forward));
  m.impl("norm_act_conv_backward", TORCH_BOX(&backward));
}
