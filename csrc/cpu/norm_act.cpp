// y = act(norm(x) + norm(shortcut)) and its gradients, a batch norm's statistics and its own gradient, on the CPU.
//
// All are one pass over rows of features. With sums [2, C] of dz and of dz x^ over batch and time, the norm's gradient is
//     dx = scale (dz - (sum dz + x^ sum dz x^) / count),     scale = weight / sqrt(var + eps),
// or scale dz where the statistics do not come from x; the sums are the gradients of the norm's bias and weight.
#include <tuple>

#include "features.h"
#include "stage.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using namespace mvat;

constexpr int64_t kBlock = 4096;  // samples of a row that one item works on

template <typename T>
struct Rows {
  Activation activation;
  int64_t channels;                        // of x
  Features<const T> x, shortcut, grad;     // shortcut.data null where there is none
  const NormRow<T> *norm, *shortcut_norm;  // [channels]
  Features<T> out;
};

template <typename T, int L>
struct Pass {
  using A = Act<T, L>;
  using V = typename Simd<T, L>::Vector;

  // The rows that enter the activation: x itself with its norm, or into `buffer` the sum with the shortcut.
  MVAT_INLINE const T* sum(const Rows<T>& r, int64_t b, int64_t c, int64_t from, int64_t count, T* buffer) {
    const T *x = r.x.row(b, c) + from, *other = r.shortcut.row(b, c) + from;
    const NormRow<T> n = r.norm[c], m = r.shortcut_norm[c];
    for (int64_t i = 0; i < count; i += L) {
      const V z = conv::load_lanes<T, L>(x + i, count - i) * n.scale + n.shift;
      conv::store_lanes<T, L>(z + (conv::load_lanes<T, L>(other + i, count - i) * m.scale + m.shift), buffer + i, count - i);
    }
    return buffer;
  }

  MVAT_INLINE void forward(const Rows<T>& r, int64_t b, int64_t c, int64_t from, int64_t count) {
    const int64_t gate = r.activation == kGlu ? c + r.channels / 2 : c;
    const T *x = r.x.row(b, c) + from, *other = r.x.row(b, gate) + from;
    NormRow<T> n = r.norm[c], m = r.norm[gate];
    alignas(64) T buffer[kBlock], gates[kBlock];
    if (r.shortcut.data) {
      x = sum(r, b, c, from, count, buffer);
      other = gate == c ? x : sum(r, b, gate, from, count, gates);
      n = m = NormRow<T>();
    }
    A::row(r.activation, x, n, other, m, count, r.out.row(b, c) + from);
  }

  // dz to out; sums [channels, 2] of x, shortcut_sums of the shortcut.
  MVAT_INLINE void backward(const Rows<T>& r, int64_t b, int64_t c, int64_t from, int64_t count, double* sums, double* shortcut_sums) {
    const int64_t gate = r.activation == kGlu ? c + r.channels / 2 : c;
    const T* grad = r.grad.row(b, c) + from;
    T *out = r.out.row(b, c) + from, *out_gate = r.out.row(b, gate) + from;
    if (!r.shortcut.data) {
      A::back(r.activation, grad, r.x.row(b, c) + from, r.norm[c], r.x.row(b, gate) + from, r.norm[gate], count, out, out_gate,
              sums + 2 * c, sums + 2 * gate);
      return;
    }
    alignas(64) T buffer[kBlock], gates[kBlock];
    double ignored[2], ignored_gate[2];
    const T* x = sum(r, b, c, from, count, buffer);
    const T* other = gate == c ? x : sum(r, b, gate, from, count, gates);
    A::back(r.activation, grad, x, NormRow<T>(), other, NormRow<T>(), count, out, out_gate, ignored, ignored_gate);
    for (int64_t channel = c; channel <= gate; channel += std::max<int64_t>(1, gate - c)) {
      const T* dz = r.out.row(b, channel) + from;
      products(dz, r.x.row(b, channel) + from, r.norm[channel], count, sums + 2 * channel);
      products(dz, r.shortcut.row(b, channel) + from, r.shortcut_norm[channel], count, shortcut_sums + 2 * channel);
    }
  }

  MVAT_INLINE void products(const T* dz, const T* x, NormRow<T> n, int64_t count, double* sums) {
    conv::Sum<T, L> sum, product;
    for (int64_t i = 0; i < count; i += L) {
      const V d = conv::load_lanes<T, L>(dz + i, count - i);
      sum += d;
      product += d * ((conv::load_lanes<T, L>(x + i, count - i) - n.mean) * n.inverse);
    }
    sums[0] += sum.lanes();
    sums[1] += product.lanes();
  }

  MVAT_INLINE void moments(const T* x, int64_t count, Moments& out) {
    double mean, m2;
    A::moments(x, count, mean, m2);
    out.add(double(count), mean, m2);
  }

  // dx = scale dz - a - b x^; without an x, scale dz.
  MVAT_INLINE void gradient(const T* dz, const T* x, NormRow<T> n, T a, T b, int64_t count, T* out) {
    if (!x) return A::row(kIdentity, dz, {n.scale}, nullptr, {}, count, out);
    for (int64_t i = 0; i < count; i += L) {
      const V d = conv::load_lanes<T, L>(dz + i, count - i);
      const V normal = (conv::load_lanes<T, L>(x + i, count - i) - n.mean) * n.inverse;
      conv::store_lanes<T, L>(d * n.scale - (normal * b + a), out + i, count - i);
    }
  }
};

template <typename T>
struct Level {
  void (*forward)(const Rows<T>&, int64_t b, int64_t c, int64_t from, int64_t count);
  void (*backward)(const Rows<T>&, int64_t b, int64_t c, int64_t from, int64_t count, double* sums, double* shortcut_sums);
  void (*moments)(const T* x, int64_t count, Moments&);
  void (*gradient)(const T* dz, const T* x, NormRow<T> n, T a, T b, int64_t count, T* out);
};

#define MVAT_ENTRIES(NAME, TARGET, T, L, NV, MR)                                                                               \
  TARGET void forward_##NAME(const Rows<T>& r, int64_t b, int64_t c, int64_t from, int64_t count) {                          \
    Pass<T, L>::forward(r, b, c, from, count);                                                                               \
  }                                                                                                                          \
  TARGET void backward_##NAME(const Rows<T>& r, int64_t b, int64_t c, int64_t from, int64_t count, double* sums,             \
                              double* shortcut_sums) {                                                                       \
    Pass<T, L>::backward(r, b, c, from, count, sums, shortcut_sums);                                                         \
  }                                                                                                                          \
  TARGET void moments_##NAME(const T* x, int64_t count, Moments& out) { Pass<T, L>::moments(x, count, out); }                \
  TARGET void gradient_##NAME(const T* dz, const T* x, NormRow<T> n, T a, T b, int64_t count, T* out) {                      \
    Pass<T, L>::gradient(dz, x, n, a, b, count, out);                                                                        \
  }                                                                                                                          \
  const Level<T> level_##NAME = {forward_##NAME, backward_##NAME, moments_##NAME, gradient_##NAME};
MVAT_EVERY_LEVEL(MVAT_ENTRIES)
#undef MVAT_ENTRIES

MVAT_CHOOSE_LEVEL

// run(b, c, from, count, task) for every block of a row, in tasks whose number depends on the shape alone.
template <typename Run>
int64_t over_rows(int64_t batch, int64_t channels, int64_t length, const Run& run) {
  const int64_t blocks = (length + kBlock - 1) / kBlock, items = batch * channels * blocks;
  const int64_t tasks = std::clamp<int64_t>(items * std::min(length, kBlock) / 16384, std::min<int64_t>(items, 1), std::min<int64_t>(items, 64));
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++)
      for (int64_t i = task * items / tasks; i < (task + 1) * items / tasks; i++) {
        const int64_t from = i % blocks * kBlock;
        run(i / blocks / channels, i / blocks % channels, from, std::min(kBlock, length - from), task);
      }
  });
  return tasks;
}

constexpr int64_t kMostTasks = 64;

template <typename T>
Rows<T> rows(const Tensor& x, const std::vector<NormRow<T>>& norm, const OptionalTensor& shortcut,
             const std::vector<NormRow<T>>& shortcut_norm, int64_t activation) {
  Rows<T> r{};
  r.activation = Activation(activation);
  r.channels = x.size(1);
  r.x = features<T>(x);
  if (shortcut) r.shortcut = features<T>(*shortcut);
  r.norm = norm.data();
  r.shortcut_norm = shortcut_norm.data();
  return r;
}

void check(const char* op, const Tensor& x, const NormTensors& norm, const OptionalTensor& shortcut, const NormTensors& shortcut_norm,
           int64_t activation) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 3 && (type == ScalarType::Float || type == ScalarType::Double), op,
                  ": expected x [B, C, T] of float32 or float64");
  STD_TORCH_CHECK(activation >= kIdentity && activation <= kGlu && (activation != kGlu || x.size(1) % 2 == 0), op,
                  ": unknown activation ", activation, " for ", x.size(1), " channels");
  STD_TORCH_CHECK(!shortcut || (shortcut->dim() == 3 && shortcut->size(0) == x.size(0) && shortcut->size(1) == x.size(1) &&
                                shortcut->size(2) == x.size(2) && shortcut->scalar_type() == type),
                  op, ": expected a shortcut in the shape and dtype of x");
  for (const NormTensors* n : {&norm, &shortcut_norm})
    for (const OptionalTensor* tensor : {&n->weight, &n->bias, &n->mean, &n->var})
      STD_TORCH_CHECK(tensor->has_value() == n->weight.has_value() &&
                          (!tensor->has_value() || ((*tensor)->numel() == x.size(1) && (*tensor)->scalar_type() == type)),
                      op, ": a norm is four tensors of ", x.size(1), " channels in the dtype of x");
}

template <typename T>
void run_forward(const Tensor& x, const NormTensors& norm, const OptionalTensor& shortcut, const NormTensors& shortcut_norm,
                 int64_t activation, Tensor& y) {
  const std::vector<NormRow<T>> first = norm_rows<T>(norm, x.size(1)), second = norm_rows<T>(shortcut_norm, x.size(1));
  Rows<T> r = rows(x, first, shortcut, second, activation);
  r.out = new_features<T>(y);
  over_rows(x.size(0), y.size(1), x.size(2), [&](int64_t b, int64_t c, int64_t from, int64_t count, int64_t) {
    level<T>().forward(r, b, c, from, count);
  });
}

template <typename T>
void run_backward(const Tensor& grad, const Tensor& x, const NormTensors& norm, const OptionalTensor& shortcut,
                  const NormTensors& shortcut_norm, int64_t activation, Tensor& dz, Tensor& sums, Tensor& shortcut_sums) {
  const std::vector<NormRow<T>> first = norm_rows<T>(norm, x.size(1)), second = norm_rows<T>(shortcut_norm, x.size(1));
  Rows<T> r = rows(x, first, shortcut, second, activation);
  r.grad = features<T>(grad);
  r.out = new_features<T>(dz);
  const int64_t channels = x.size(1);
  std::vector<double> own(kMostTasks * 2 * channels), others(shortcut ? kMostTasks * 2 * channels : 0);
  over_rows(x.size(0), grad.size(1), x.size(2), [&](int64_t b, int64_t c, int64_t from, int64_t count, int64_t task) {
    level<T>().backward(r, b, c, from, count, own.data() + task * 2 * channels, others.data() + task * 2 * channels);
  });
  add_up_pairs(own.data(), kMostTasks, 2 * channels, channels, sums.mutable_data_ptr<T>());
  if (shortcut) add_up_pairs(others.data(), kMostTasks, 2 * channels, channels, shortcut_sums.mutable_data_ptr<T>());
}

Tensor forward(const Tensor& x_any, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& mean,
               const OptionalTensor& var, const OptionalTensor& shortcut_any, const OptionalTensor& shortcut_weight,
               const OptionalTensor& shortcut_bias, const OptionalTensor& shortcut_mean, const OptionalTensor& shortcut_var, double eps,
               double shortcut_eps, int64_t activation, bool) {
  const NormTensors norm{weight, bias, mean, var, eps};
  const NormTensors shortcut_norm{shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var, shortcut_eps};
  check("norm_act", x_any, norm, shortcut_any, shortcut_norm, activation);
  const Tensor x = readable(x_any);
  const OptionalTensor shortcut = shortcut_any ? OptionalTensor(readable(*shortcut_any)) : std::nullopt;
  Tensor y = torch::stable::new_empty(x, {x.size(0), activation == kGlu ? x.size(1) / 2 : x.size(1), x.size(2)});
  if (x.scalar_type() == ScalarType::Float) {
    run_forward<float>(x, norm, shortcut, shortcut_norm, activation, y);
  } else {
    run_forward<double>(x, norm, shortcut, shortcut_norm, activation, y);
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_any, const Tensor& x_any, const OptionalTensor& weight,
                                            const OptionalTensor& bias, const OptionalTensor& mean, const OptionalTensor& var,
                                            const OptionalTensor& shortcut_any, const OptionalTensor& shortcut_weight,
                                            const OptionalTensor& shortcut_bias, const OptionalTensor& shortcut_mean,
                                            const OptionalTensor& shortcut_var, double eps, double shortcut_eps, int64_t activation) {
  const NormTensors norm{weight, bias, mean, var, eps};
  const NormTensors shortcut_norm{shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var, shortcut_eps};
  check("norm_act_backward", x_any, norm, shortcut_any, shortcut_norm, activation);
  STD_TORCH_CHECK(grad_any.dim() == 3 && grad_any.size(0) == x_any.size(0) && grad_any.size(2) == x_any.size(2) &&
                      grad_any.size(1) == (activation == kGlu ? x_any.size(1) / 2 : x_any.size(1)) &&
                      grad_any.scalar_type() == x_any.scalar_type(),
                  "norm_act_backward: expected grad in the shape and dtype of the output");
  const Tensor grad = readable(grad_any), x = readable(x_any);
  const OptionalTensor shortcut = shortcut_any ? OptionalTensor(readable(*shortcut_any)) : std::nullopt;
  Tensor dz = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  Tensor sums = torch::stable::new_empty(x, {2, x.size(1)});
  Tensor shortcut_sums = torch::stable::new_empty(x, {shortcut ? 2 : 0, x.size(1)});
  if (x.scalar_type() == ScalarType::Float) {
    run_backward<float>(grad, x, norm, shortcut, shortcut_norm, activation, dz, sums, shortcut_sums);
  } else {
    run_backward<double>(grad, x, norm, shortcut, shortcut_norm, activation, dz, sums, shortcut_sums);
  }
  return {dz, sums, shortcut_sums};
}

template <typename T>
void run_statistics(const Tensor& x, Tensor& out) {
  const Features<const T> f = features<T>(x);
  const int64_t channels = x.size(1);
  std::vector<Moments> moments(kMostTasks * channels);
  over_rows(x.size(0), channels, x.size(2), [&](int64_t b, int64_t c, int64_t from, int64_t count, int64_t task) {
    level<T>().moments(f.row(b, c) + from, count, moments[task * channels + c]);
  });
  write_statistics(moments, kMostTasks, channels, out.mutable_data_ptr<T>());
}

Tensor statistics(const Tensor& x_any) {
  STD_TORCH_CHECK(x_any.dim() == 3 && (x_any.scalar_type() == ScalarType::Float || x_any.scalar_type() == ScalarType::Double),
                  "batch_statistics: expected x [B, C, T] of float32 or float64");
  const Tensor x = readable(x_any);
  Tensor out = torch::stable::new_empty(x, {2, x.size(1)});
  if (x.scalar_type() == ScalarType::Float) {
    run_statistics<float>(x, out);
  } else {
    run_statistics<double>(x, out);
  }
  return out;
}

template <typename T>
void run_gradient(const Tensor& dz, const Tensor& x, const std::vector<NormRow<T>>& norm, const Tensor& sums, double count,
                  bool training, Tensor& dx) {
  const Features<const T> d = features<T>(dz), f = features<T>(x);
  const Features<T> out = new_features<T>(dx);
  const T* sum = sums.const_data_ptr<T>();
  const int64_t channels = x.size(1);
  over_rows(x.size(0), channels, x.size(2), [&](int64_t b, int64_t c, int64_t from, int64_t size, int64_t) {
    // Statistics that do not come from x leave its samples apart: a NaN in one must not reach the others through the sums.
    const double scale = double(norm[c].scale) / count;
    level<T>().gradient(d.row(b, c) + from, training ? f.row(b, c) + from : nullptr, norm[c], T(scale * double(sum[c])),
                        T(scale * double(sum[channels + c])), size, out.row(b, c) + from);
  });
}

Tensor gradient(const Tensor& dz_any, const Tensor& x_any, const Tensor& weight, const Tensor& mean, const Tensor& var,
                const Tensor& sums_any, double eps, double count, bool training) {
  const OptionalTensor w(weight), m(mean), v(var);
  const NormTensors norm{w, w, m, v, eps};  // the bias has no part in it
  check("norm_gradient", x_any, norm, OptionalTensor(dz_any), norm, kIdentity);
  STD_TORCH_CHECK(sums_any.numel() == 2 * x_any.size(1) && sums_any.scalar_type() == x_any.scalar_type(),
                  "norm_gradient: expected sums [2, C] in the dtype of x");
  const Tensor dz = readable(dz_any), x = readable(x_any), sums = dense(sums_any);
  Tensor dx = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  if (x.scalar_type() == ScalarType::Float) {
    run_gradient<float>(dz, x, norm_rows<float>(norm, x.size(1)), sums, count, training, dx);
  } else {
    run_gradient<double>(dz, x, norm_rows<double>(norm, x.size(1)), sums, count, training, dx);
  }
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mvat, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&forward));
  m.impl("norm_act_backward", TORCH_BOX(&backward));
  m.impl("batch_statistics", TORCH_BOX(&statistics));
  m.impl("norm_gradient", TORCH_BOX(&gradient));
}
