// y = relu(W3 (tanh(W1 u + b1) * sigmoid(W2 u + b2)) + b3) + norm(shortcut), u = norm(x), and its gradients on the CPU.
//
// Forward reads x and the shortcut once and writes y once; backward reads y's gradient, x and the shortcut, makes the gates anew
// and writes the gradient behind x's norm, with its sums and those of the shortcut. A tile of columns stays in the second cache
// through all products: three forward, nine backward.
#include <tuple>

#include "conv.h"
#include "features.h"
#include "stage.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using namespace mvat;
using conv::Conv;

template <typename T>
struct Gate {
  int64_t in, hidden, out, columns, row;  // a tile's columns, the distance of its rows
  Features<const T> x, shortcut, grad;    // shortcut.data null where there is none
  const NormRow<T> *norm, *shortcut_norm;
  const T *gates, *gates_bias, *last, *last_bias;  // [2 hidden][in], [2 hidden], [out][hidden], [out]
  const T *gates_turned, *last_turned;             // backward: [in][2 hidden], [hidden][out]
  Features<T> y;                                   // backward dz of x

  Conv pointwise(int64_t from, int64_t to) const { return {from, to, 1, 1, 0, false, x.length, x.length}; }
  int64_t tiles() const { return (x.length + columns - 1) / columns; }
  int64_t forward_workspace() const { return (in + 3 * hidden + out) * row; }
  int64_t backward_workspace() const {
    return (2 * in + 4 * hidden + 2 * out + 128) * row + (columns + 64) * (std::max(in, hidden) + 128);
  }
};

template <typename T>
struct Sums {
  T *gates, *last;                                  // [2 hidden][in], [out][hidden]
  double *gates_bias, *last_bias, *x, *shortcut;    // [2 hidden], [out], [in, 2], [out, 2]
};

template <typename T, int L, int NV, int MR>
struct Tile {
  using A = Act<T, L>;
  using V = typename Simd<T, L>::Vector;

  // u [in], then the gates before their activations [2 hidden].
  MVAT_INLINE void gates(const Gate<T>& g, int64_t b, int64_t t, int64_t count, T* u, T* gates) {
    for (int64_t c = 0; c < g.in; c++) {
      A::row(kIdentity, g.x.row(b, c) + t, g.norm[c], nullptr, NormRow<T>(), count, u + c * g.row);
      std::fill(u + c * g.row + count, u + (c + 1) * g.row, T(0));
    }
    conv::product<T, L, NV, MR>(g.pointwise(g.in, 2 * g.hidden), g.gates, g.gates_bias, u, g.row, g.columns, gates, g.row);
  }

  MVAT_INLINE void forward(const Gate<T>& g, int64_t b, int64_t t, T* workspace) {
    const int64_t count = std::min(g.columns, g.x.length - t);
    T *u = workspace, *two = u + g.in * g.row, *product = two + 2 * g.hidden * g.row, *z = product + g.hidden * g.row;
    gates(g, b, t, count, u, two);
    for (int64_t h = 0; h < g.hidden; h++)
      for (int64_t i = 0; i < g.columns; i += L) {
        const V first = conv::load_lanes<T, L>(two + h * g.row + i, L), second = conv::load_lanes<T, L>(two + (g.hidden + h) * g.row + i, L);
        conv::store_lanes<T, L>(A::tanh(first) * A::sigmoid(second), product + h * g.row + i, L);
      }
    conv::product<T, L, NV, MR>(g.pointwise(g.hidden, g.out), g.last, g.last_bias, product, g.row, g.columns, z, g.row);
    for (int64_t o = 0; o < g.out; o++) {
      T* y = g.y.row(b, o) + t;
      const T* from = z + o * g.row;
      if (!g.shortcut.data) {
        A::row(kRelu, from, NormRow<T>(), nullptr, NormRow<T>(), count, y);
        continue;
      }
      const T* shortcut = g.shortcut.row(b, o) + t;
      const NormRow<T> n = g.shortcut_norm[o];
      for (int64_t i = 0; i < count; i += L) {
        const V v = conv::load_lanes<T, L>(from + i, count - i);
        const V s = conv::load_lanes<T, L>(shortcut + i, count - i) * n.scale + n.shift;
        conv::store_lanes<T, L>((v < T(0) ? V{} : v) + s, y + i, count - i);
      }
    }
  }

  MVAT_INLINE void backward(const Gate<T>& g, int64_t b, int64_t t, T* workspace, const Sums<T>& sums) {
    const int64_t count = std::min(g.columns, g.x.length - t), plane = g.hidden * g.row;
    // Rows behind u and the product are read by their transposes, whole blocks of them.
    T *u = workspace, *two = u + (g.in + 64) * g.row, *product = two + 2 * plane, *dz = product + plane + 64 * g.row;
    T *d_product = dz + g.out * g.row, *du = d_product + plane, *z = du + g.in * g.row, *turned = z + g.out * g.row;
    gates(g, b, t, count, u, two);
    for (int64_t i = 0; i < plane; i += L) {
      const V first = A::tanh(conv::load_lanes<T, L>(two + i, L)), second = A::sigmoid(conv::load_lanes<T, L>(two + plane + i, L));
      conv::store_lanes<T, L>(first, two + i, L);
      conv::store_lanes<T, L>(second, two + plane + i, L);
      conv::store_lanes<T, L>(first * second, product + i, L);
    }
    const Conv last = g.pointwise(g.hidden, g.out), gate = g.pointwise(g.in, 2 * g.hidden);
    conv::product<T, L, NV, MR>(last, g.last, g.last_bias, product, g.row, g.columns, z, g.row);
    for (int64_t o = 0; o < g.out; o++) {
      const T *grad = g.grad.row(b, o) + t, *shortcut = g.shortcut.data ? g.shortcut.row(b, o) + t : nullptr;
      const NormRow<T> n = g.shortcut_norm[o];
      conv::Sum<T, L> sum, shortcut_sum, shortcut_product;
      int64_t i = 0;
      for (; i < count; i += L) {
        const V d = conv::load_lanes<T, L>(grad + i, count - i);
        const V kept = conv::load_lanes<T, L>(z + o * g.row + i, L) <= T(0) ? V{} : d;
        conv::store_lanes<T, L>(kept, dz + o * g.row + i, L);
        sum += kept;
        if (shortcut) {
          shortcut_sum += d;
          shortcut_product += d * ((conv::load_lanes<T, L>(shortcut + i, count - i) - n.mean) * n.inverse);
        }
      }
      std::fill(dz + o * g.row + i, dz + (o + 1) * g.row, T(0));
      sums.last_bias[o] += sum.lanes();
      if (shortcut) {
        sums.shortcut[2 * o] += shortcut_sum.lanes();
        sums.shortcut[2 * o + 1] += shortcut_product.lanes();
      }
    }
    conv::weight_gradient<T, L, NV, MR>(last, dz, g.row, product, g.row, g.columns, turned, sums.last);
    conv::product<T, L, NV, MR>(g.pointwise(g.out, g.hidden), g.last_turned, nullptr, dz, g.row, g.columns, d_product, g.row);
    for (int64_t h = 0; h < g.hidden; h++) {
      conv::Sum<T, L> sum, sum2;
      for (int64_t i = h * g.row; i < h * g.row + g.columns; i += L) {
        const V d = conv::load_lanes<T, L>(d_product + i, L);
        const V first = conv::load_lanes<T, L>(two + i, L), second = conv::load_lanes<T, L>(two + plane + i, L);
        const V one = d * second * (T(1) - first * first), other = d * first * (second * (T(1) - second));
        conv::store_lanes<T, L>(one, two + i, L);
        conv::store_lanes<T, L>(other, two + plane + i, L);
        sum += one;
        sum2 += other;
      }
      sums.gates_bias[h] += sum.lanes();
      sums.gates_bias[g.hidden + h] += sum2.lanes();
    }
    conv::weight_gradient<T, L, NV, MR>(gate, two, g.row, u, g.row, g.columns, turned, sums.gates);
    conv::product<T, L, NV, MR>(g.pointwise(2 * g.hidden, g.in), g.gates_turned, nullptr, two, g.row, g.columns, du, g.row);
    for (int64_t c = 0; c < g.in; c++)
      A::back(kIdentity, du + c * g.row, g.x.row(b, c) + t, g.norm[c], nullptr, NormRow<T>(), count, g.y.row(b, c) + t, nullptr,
              sums.x + 2 * c, nullptr);
  }
};

template <typename T>
struct Level {
  int64_t block;
  void (*forward)(const Gate<T>&, int64_t b, int64_t t, T* workspace);
  void (*backward)(const Gate<T>&, int64_t b, int64_t t, T* workspace, const Sums<T>&);
};

#define MVAT_ENTRIES(NAME, TARGET, T, L, NV, MR)                                                                        \
  TARGET void forward_##NAME(const Gate<T>& g, int64_t b, int64_t t, T* workspace) {                                    \
    Tile<T, L, NV, MR>::forward(g, b, t, workspace);                                                                    \
  }                                                                                                                     \
  TARGET void backward_##NAME(const Gate<T>& g, int64_t b, int64_t t, T* workspace, const Sums<T>& sums) {              \
    Tile<T, L, NV, MR>::backward(g, b, t, workspace, sums);                                                             \
  }                                                                                                                     \
  const Level<T> level_##NAME = {L * NV, forward_##NAME, backward_##NAME};
MVAT_EVERY_LEVEL(MVAT_ENTRIES)
#undef MVAT_ENTRIES

MVAT_CHOOSE_LEVEL

struct Weights {
  const Tensor &gates, &gates_bias, &last, &last_bias;  // [2 hidden, in, 1], [2 hidden], [out, hidden, 1], [out]
};

template <typename T>
Gate<T> gate(const Tensor& x, const std::vector<NormRow<T>>& norm, const Weights& w, const OptionalTensor& shortcut,
             const std::vector<NormRow<T>>& shortcut_norm, int64_t rows) {
  Gate<T> g{};
  g.in = x.size(1);
  g.hidden = w.gates.size(0) / 2;
  g.out = w.last.size(0);
  g.x = features<T>(x);
  if (shortcut) g.shortcut = features<T>(*shortcut);
  g.norm = norm.data();
  g.shortcut_norm = shortcut_norm.data();
  g.gates = w.gates.const_data_ptr<T>();
  g.gates_bias = w.gates_bias.const_data_ptr<T>();
  g.last = w.last.const_data_ptr<T>();
  g.last_bias = w.last_bias.const_data_ptr<T>();
  const int64_t block = level<T>().block, fits = (384 << 10) / (rows * int64_t(sizeof(T)));
  const int64_t columns = std::max(std::min({fits, x.size(0) * g.x.length / 8, int64_t(768)}), std::min(g.x.length, 2 * block));
  g.columns = std::max((columns + block - 1) / block, int64_t(1)) * block;
  g.row = conv::row_size<T>(g.columns);
  return g;
}

template <typename T>
void run_forward(const Tensor& x, const NormTensors& norm, const Weights& w, const OptionalTensor& shortcut,
                 const NormTensors& shortcut_norm, Tensor& y) {
  const std::vector<NormRow<T>> first = norm_rows<T>(norm, x.size(1)), second = norm_rows<T>(shortcut_norm, w.last.size(0));
  Gate<T> g = gate(x, first, w, shortcut, second, x.size(1) + 3 * w.gates.size(0) / 2 + w.last.size(0));
  g.y = new_features<T>(y);
  const int64_t tiles = g.tiles();
  torch::stable::parallel_for(0, x.size(0) * tiles, 1, [&](int64_t begin, int64_t end) {
    const Aligned<T> workspace(g.forward_workspace());
    for (int64_t i = begin; i < end; i++) level<T>().forward(g, i / tiles, i % tiles * g.columns, workspace.data);
  });
}

// The sums of `tasks` arrays that lie `stride` apart.
template <typename S, typename T>
void add_up(const S* from, int64_t tasks, int64_t stride, int64_t size, T* to) {
  torch::stable::parallel_for(0, size, 65536, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      S total = 0;
      for (int64_t task = 0; task < tasks; task++) total += from[task * stride + i];
      to[i] = T(total);
    }
  });
}

template <typename T>
void run_backward(const Tensor& grad, const Tensor& x, const NormTensors& norm, const Weights& w, const OptionalTensor& shortcut,
                  const NormTensors& shortcut_norm, Tensor& dz, Tensor& sums, Tensor& d_gates, Tensor& d_gates_bias, Tensor& d_last,
                  Tensor& d_last_bias, Tensor& shortcut_sums) {
  const std::vector<NormRow<T>> first = norm_rows<T>(norm, x.size(1)), second = norm_rows<T>(shortcut_norm, w.last.size(0));
  Gate<T> g = gate(x, first, w, shortcut, second, 2 * x.size(1) + 2 * w.gates.size(0) + 2 * w.last.size(0));
  const Aligned<T> gates_turned(w.gates.numel()), last_turned(w.last.numel());
  Packed<T>(g.pointwise(g.in, 2 * g.hidden), 1).pack(g.gates, true, gates_turned.data);
  Packed<T>(g.pointwise(g.hidden, g.out), 1).pack(g.last, true, last_turned.data);
  g.gates_turned = gates_turned.data;
  g.last_turned = last_turned.data;
  g.grad = features<T>(grad);
  g.y = new_features<T>(dz);
  const int64_t tiles = g.tiles(), items = x.size(0) * tiles, size = w.gates.numel() + w.last.numel();
  const int64_t tasks = tasks_for(items, size * sizeof(T)), small = 2 * g.hidden + g.out + 2 * g.in + 2 * g.out;
  const Aligned<T> weights(tasks * size);
  std::vector<double> smalls(tasks * small);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const Aligned<T> workspace(g.backward_workspace());
    for (int64_t task = begin; task < end; task++) {
      T* own = weights.data + task * size;
      std::fill_n(own, size, T(0));
      double* rest = smalls.data() + task * small;
      const Sums<T> s = {own, own + w.gates.numel(), rest, rest + 2 * g.hidden, rest + 2 * g.hidden + g.out,
                         rest + 2 * g.hidden + g.out + 2 * g.in};
      for (int64_t i = task * items / tasks; i < (task + 1) * items / tasks; i++)
        level<T>().backward(g, i / tiles, i % tiles * g.columns, workspace.data, s);
    }
  });
  add_up(weights.data, tasks, size, w.gates.numel(), d_gates.mutable_data_ptr<T>());
  add_up(weights.data + w.gates.numel(), tasks, size, w.last.numel(), d_last.mutable_data_ptr<T>());
  const double* rest = smalls.data();
  add_up(rest, tasks, small, 2 * g.hidden, d_gates_bias.mutable_data_ptr<T>());
  add_up(rest + 2 * g.hidden, tasks, small, g.out, d_last_bias.mutable_data_ptr<T>());
  rest += 2 * g.hidden + g.out;
  add_up_pairs(rest, tasks, small, g.in, sums.mutable_data_ptr<T>());
  if (shortcut) add_up_pairs(rest + 2 * g.in, tasks, small, g.out, shortcut_sums.mutable_data_ptr<T>());
}

void check(const Tensor& x, const NormTensors& norm, const Weights& w, const OptionalTensor& shortcut, const NormTensors& shortcut_norm) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 3 && (type == ScalarType::Float || type == ScalarType::Double),
                  "mask_gate: expected x [B, C, T] of float32 or float64");
  STD_TORCH_CHECK(w.gates.dim() == 3 && w.last.dim() == 3 && w.gates.size(0) % 2 == 0 && w.gates.size(1) == x.size(1) &&
                      w.gates.size(2) == 1 && w.last.size(2) == 1 && w.last.size(1) * 2 == w.gates.size(0) &&
                      w.gates_bias.numel() == w.gates.size(0) && w.last_bias.numel() == w.last.size(0) &&
                      w.gates.numel() > 0 && w.last.numel() > 0,
                  "mask_gate: the weights do not fit ", x.size(1), " channels");
  for (const Tensor* tensor : {&w.gates, &w.gates_bias, &w.last, &w.last_bias})
    STD_TORCH_CHECK(tensor->scalar_type() == type, "mask_gate: expected weights in the dtype of x");
  STD_TORCH_CHECK(!shortcut || (shortcut->dim() == 3 && shortcut->size(0) == x.size(0) && shortcut->size(1) == w.last.size(0) &&
                                shortcut->size(2) == x.size(2) && shortcut->scalar_type() == type),
                  "mask_gate: expected a shortcut [B, out, T] in the dtype of x");
  const auto fits = [&](const NormTensors& n, int64_t channels) {
    for (const OptionalTensor* tensor : {&n.weight, &n.bias, &n.mean, &n.var})
      if (tensor->has_value() != n.weight.has_value() ||
          (tensor->has_value() && ((*tensor)->numel() != channels || (*tensor)->scalar_type() != type)))
        return false;
    return true;
  };
  STD_TORCH_CHECK(fits(norm, x.size(1)) && fits(shortcut_norm, w.last.size(0)), "mask_gate: a norm does not fit its features");
}

Tensor forward(const Tensor& x_any, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const OptionalTensor& mean,
               const OptionalTensor& var, const Tensor& gates_any, const Tensor& gates_bias_any, const Tensor& last_any,
               const Tensor& last_bias_any, const OptionalTensor& shortcut_any, const OptionalTensor& shortcut_weight,
               const OptionalTensor& shortcut_bias, const OptionalTensor& shortcut_mean, const OptionalTensor& shortcut_var, double eps,
               double shortcut_eps, bool) {
  const NormTensors norm{norm_weight, norm_bias, mean, var, eps};
  const NormTensors shortcut_norm{shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var, shortcut_eps};
  check(x_any, norm, {gates_any, gates_bias_any, last_any, last_bias_any}, shortcut_any, shortcut_norm);
  const Tensor x = readable(x_any), gates = dense(gates_any), gates_bias = dense(gates_bias_any), last = dense(last_any);
  const Tensor last_bias = dense(last_bias_any);
  const OptionalTensor shortcut = shortcut_any ? OptionalTensor(readable(*shortcut_any)) : std::nullopt;
  Tensor y = torch::stable::new_empty(x, {x.size(0), last.size(0), x.size(2)});
  const Weights w{gates, gates_bias, last, last_bias};
  if (x.scalar_type() == ScalarType::Float) {
    run_forward<float>(x, norm, w, shortcut, shortcut_norm, y);
  } else {
    run_forward<double>(x, norm, w, shortcut, shortcut_norm, y);
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_any, const Tensor& x_any, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
    const OptionalTensor& mean, const OptionalTensor& var, const Tensor& gates_any, const Tensor& gates_bias_any, const Tensor& last_any,
    const Tensor& last_bias_any, const OptionalTensor& shortcut_any, const OptionalTensor& shortcut_weight,
    const OptionalTensor& shortcut_bias, const OptionalTensor& shortcut_mean, const OptionalTensor& shortcut_var, double eps,
    double shortcut_eps) {
  const NormTensors norm{norm_weight, norm_bias, mean, var, eps};
  const NormTensors shortcut_norm{shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var, shortcut_eps};
  check(x_any, norm, {gates_any, gates_bias_any, last_any, last_bias_any}, shortcut_any, shortcut_norm);
  const Tensor x = readable(x_any), gates = dense(gates_any), gates_bias = dense(gates_bias_any), last = dense(last_any);
  const Tensor last_bias = dense(last_bias_any), grad = readable(grad_any);
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == x.size(0) && grad.size(1) == last.size(0) && grad.size(2) == x.size(2) &&
                      grad.scalar_type() == x.scalar_type(),
                  "mask_gate_backward: expected grad in the shape and dtype of the output");
  const OptionalTensor shortcut = shortcut_any ? OptionalTensor(readable(*shortcut_any)) : std::nullopt;
  const auto like = [&](const Tensor& t) { return torch::stable::empty_like(t); };
  Tensor dz = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  Tensor sums = torch::stable::new_empty(x, {2, x.size(1)});
  Tensor d_gates = like(gates), d_gates_bias = like(gates_bias), d_last = like(last), d_last_bias = like(last_bias);
  Tensor shortcut_sums = torch::stable::new_empty(x, {shortcut ? 2 : 0, last.size(0)});
  const Weights w{gates, gates_bias, last, last_bias};
  if (x.scalar_type() == ScalarType::Float) {
    run_backward<float>(grad, x, norm, w, shortcut, shortcut_norm, dz, sums, d_gates, d_gates_bias, d_last, d_last_bias, shortcut_sums);
  } else {
    run_backward<double>(grad, x, norm, w, shortcut, shortcut_norm, dz, sums, d_gates, d_gates_bias, d_last, d_last_bias, shortcut_sums);
  }
  return {dz, sums, d_gates, d_gates_bias, d_last, d_last_bias, shortcut_sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mvat, CPU, m) {
  m.impl("mask_gate", TORCH_BOX(&forward));
  m.impl("mask_gate_backward", TORCH_BOX(&backward));
}
