// The local view on the CPU: y = x * mask, the mask from a depthwise convolution inside each chunk (mvat/kernels/local_attention.py).
//
// No feature is unfolded: the channels are read in groups of blocks (local_attention_pool.h), what is left without channels in rows
// of chunks (local_attention_mask.h). The split depends on shapes alone and every sum is merged in one order, so that the number of
// threads changes nothing. Batch statistics are (count, mean, M2), from a reading of their own: to compute the convolution again
// costs less than to keep it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "local_attention_pool.h"

using torch::headeronly::ScalarType;

namespace {

using namespace local_attention;

constexpr int64_t kTile = 1024;  // samples of a product with the features

template <typename T>
void mask_statistics(const Sizes& sizes, const T* logits, T* mean, T* variance) {
  const int64_t runs = sizes.runs();
  std::vector<Moments> parts(sizes.batch * runs);
  each(sizes.batch, runs, [&](int64_t clip, int64_t part, char&) {
    const int64_t chunk = part * kRun, count = std::min(kRun, sizes.chunks - chunk) * sizes.segment();
    const T* z = logits + clip * sizes.plane() + chunk * sizes.segment();
    double sum = 0, m2 = 0;
    for (int64_t i = 0; i < count; i++) sum += z[i];
    const double middle = sum / double(count);
    for (int64_t i = 0; i < count; i++) m2 += (z[i] - middle) * (z[i] - middle);
    parts[clip * runs + part] = {double(count), middle, m2};
  }, [] { return char(); });
  Moments moments;
  for (const Moments& part : parts) moments.add(part.count, part.mean, part.m2);
  *mean = T(moments.mean);
  *variance = T(moments.variance());
}

struct Arguments {
  const Tensor &x, &depthwise, &weight1, &bias1, &mean1, &var1, &conv, &weight2, &bias2, &mean2, &var2;
  double eps1, eps2;
  bool training;
};

struct Results {
  Tensor y, attention, pooled, index, statistics;
};

template <typename T>
void forward(const Sizes& sizes, const Arguments& in, Results& out) {
  const Kernels<T> run = kernels<T>();
  const int64_t n = sizes.channels, S = sizes.segment(), plane = sizes.plane();
  T *attention = out.attention.mutable_data_ptr<T>(), *pooled = out.pooled.mutable_data_ptr<T>();
  T *mean = out.statistics.mutable_data_ptr<T>(), *variance = mean + n + 1;
  int32_t* index = out.index.mutable_data_ptr<int32_t>();
  View<T> view = view_of<T>(sizes, in.x, in.depthwise);

  const bool training = in.training && sizes.batch > 0;  // an empty batch has no statistics
  if (training) {
    batch_statistics(sizes, run, view, in.x, mean, variance);
  } else {
    std::copy_n(in.mean1.const_data_ptr<T>(), n, mean);
    std::copy_n(in.var1.const_data_ptr<T>(), n, variance);
    mean[n] = *in.mean2.const_data_ptr<T>();
    variance[n] = *in.var2.const_data_ptr<T>();
  }
  const std::vector<T> scale = use_norm(view, in.weight1, in.bias1, mean, variance, in.eps1);
  pool(sizes, run, view, in.x, pooled, index);

  const T* conv = in.conv.const_data_ptr<T>();
  each(sizes.batch, sizes.runs(), [&](int64_t clip, int64_t part, Rows<T>& rows) {
    const int64_t chunk = part * kRun, at = chunk * S;
    const T* maxima = pooled + clip * 2 * plane + at;
    run.logits(maxima, maxima + plane, std::min(kRun, sizes.chunks - chunk), conv, rows, attention + clip * plane + at);
  }, [&] { return Rows<T>(S, sizes.mask_taps); });
  if (training) mask_statistics(sizes, attention, mean + n, variance + n);
  const T scale2 = scales(in.weight2.const_data_ptr<T>(), variance + n, 1, in.eps2)[0];
  const T bias2 = *in.bias2.const_data_ptr<T>();
  each(sizes.batch, sizes.runs(), [&](int64_t clip, int64_t part, char&) {
    const int64_t at = part * kRun * S;
    run.sigmoid(attention + clip * plane + at, std::min(kRun * S, plane - at), mean[n], scale2, bias2);
  }, [] { return char(); });

  const T* x = in.x.const_data_ptr<T>();
  T* y = out.y.mutable_data_ptr<T>();
  each(sizes.batch, (sizes.length + kTile - 1) / kTile, [&](int64_t clip, int64_t part, Scratch<T>& mask) {
    const int64_t begin = part * kTile, end = std::min(begin + kTile, sizes.length);
    mask_row(attention + clip * plane, sizes.half, begin, end, mask.get() - begin);
    run.multiply(x + clip * in.x.stride(0) + begin, n, in.x.stride(1), mask.get(), end - begin,
                 y + clip * n * sizes.length + begin, sizes.length);
  }, [] { return Scratch<T>(kTile); });
}

struct Saved {
  const Tensor &grad, &x, &depthwise, &weight1, &bias1, &conv, &weight2, &attention, &pooled, &index, &statistics;
  double eps1, eps2;
  bool training;
};

struct Gradient {
  Tensor x, depthwise, weight1, bias1, conv, weight2, bias2;
};

// From the gradient of y back to those of the pooled rows, of conv, weight2 and bias2; `mask` [B, T] and `dpooled` [B, 2, P, S]
// are filled.
template <typename T>
void mask_backward(const Sizes& sizes, const Kernels<T>& run, const Saved& in, Gradient& out, T* mask, T* dpooled) {
  const int64_t n = sizes.channels, S = sizes.segment(), plane = sizes.plane(), runs = sizes.runs(), taps = sizes.mask_taps;
  const T *attention = in.attention.const_data_ptr<T>(), *pooled = in.pooled.const_data_ptr<T>();
  const T *statistics = in.statistics.const_data_ptr<T>(), *conv = in.conv.const_data_ptr<T>();
  const T *x = in.x.const_data_ptr<T>(), *grad = in.grad.const_data_ptr<T>();
  Scratch<T> dmask(sizes.batch * sizes.length), slope(sizes.batch * plane), normal(sizes.batch * plane);

  each(sizes.batch, (sizes.length + kTile - 1) / kTile, [&](int64_t clip, int64_t part, Scratch<double>& total) {
    const int64_t begin = part * kTile, end = std::min(begin + kTile, sizes.length);
    mask_row(attention + clip * plane, sizes.half, begin, end, mask + clip * sizes.length);
    run.product(x + clip * in.x.stride(0) + begin, in.x.stride(1), grad + clip * in.grad.stride(0) + begin, in.grad.stride(1), n,
                end - begin, dmask.get() + clip * sizes.length + begin, total.get());
  }, [] { return Scratch<double>(kTile); });

  const double rstd = 1 / std::sqrt(double(statistics[2 * n + 1]) + in.eps2);
  std::vector<double> sums(2 * sizes.batch * runs);
  each(sizes.batch, runs, [&](int64_t clip, int64_t part, Rows<T>& rows) {
    const int64_t chunk = part * kRun, at = chunk * S, count = std::min(kRun, sizes.chunks - chunk);
    const T* maxima = pooled + clip * 2 * plane + at;
    T* logits = normal.get() + clip * plane + at;
    run.logits(maxima, maxima + plane, count, conv, rows, logits);
    Rows<T> plain(S, 1);
    run.gate(attention + clip * plane + at, dmask.get() + clip * sizes.length, sizes.length, chunk, count, statistics[n],
             T(rstd), logits, slope.get() + clip * plane + at, plain, sums.data() + 2 * (clip * runs + part));
  }, [&] { return Rows<T>(S, taps); });
  double sum = 0, product = 0;
  for (size_t i = 0; i < sums.size(); i += 2) sum += sums[i], product += sums[i + 1];
  *out.bias2.mutable_data_ptr<T>() = T(sum);
  *out.weight2.mutable_data_ptr<T>() = T(product);

  const T scale = T(double(*in.weight2.const_data_ptr<T>()) * rstd), share = T(1) / T(n);
  const double count = in.training && sizes.batch > 0 ? sizes.count() : std::numeric_limits<double>::infinity();
  const T constant = T(sum / count), linear = T(product / count);
  std::vector<double> parts(sizes.batch * runs * 2 * taps);
  each(sizes.batch, runs, [&](int64_t clip, int64_t part, Rows<T>& rows) {
    const int64_t chunk = part * kRun, at = chunk * S, from = clip * 2 * plane + at;
    run.pooled(pooled + from, pooled + from + plane, slope.get() + clip * plane + at, normal.get() + clip * plane + at,
               std::min(kRun, sizes.chunks - chunk), conv, scale, constant, linear, share, rows, dpooled + from,
               dpooled + from + plane, parts.data() + (clip * runs + part) * 2 * taps);
  }, [&] { return Rows<T>(S, taps); });
  T* dconv = out.conv.mutable_data_ptr<T>();
  for (int64_t k = 0; k < 2 * taps; k++) {
    double total = 0;
    for (int64_t i = 0; i < sizes.batch * runs; i++) total += parts[i * 2 * taps + k];
    dconv[k] = T(total);
  }
}

template <typename T>
void backward(const Sizes& sizes, const Saved& in, Gradient& out) {
  const Kernels<T> run = kernels<T>();
  const int64_t n = sizes.channels;
  const T *mean = in.statistics.const_data_ptr<T>(), *variance = mean + n + 1;
  const int32_t* index = in.index.const_data_ptr<int32_t>();
  Scratch<T> mask(sizes.batch * sizes.length), dpooled(sizes.batch * 2 * sizes.plane());
  mask_backward(sizes, run, in, out, mask.get(), dpooled.get());

  View<T> view = view_of<T>(sizes, in.x, in.depthwise);
  const std::vector<T> scale = use_norm(view, in.weight1, in.bias1, mean, variance, in.eps1);
  std::vector<double> sum, product;
  pool_sums(sizes, run, view, in.x, dpooled.get(), index, sum, product);
  std::vector<T> constant(n), linear(n);
  for (int64_t c = 0; c < n; c++) {
    const double rstd = 1 / std::sqrt(double(variance[c]) + in.eps1);
    out.bias1.mutable_data_ptr<T>()[c] = T(sum[c]);
    out.weight1.mutable_data_ptr<T>()[c] = T(product[c] * rstd);
    if (in.training && sizes.batch > 0) {
      constant[c] = T(scale[c] * (sum[c] / sizes.count()));
      linear[c] = T(scale[c] * rstd * rstd * (product[c] / sizes.count()));
    }
  }
  const Gradients<T> with{constant.data(), linear.data(), dpooled.get(), index, in.grad.const_data_ptr<T>(), mask.get(),
                          in.grad.stride(1), out.x.mutable_data_ptr<T>()};
  pool_gradients(sizes, run, view, in.x, with, in.grad.stride(0), sizes.length, out.depthwise.mutable_data_ptr<T>());
}

// What the parts of the half with channels take, checked and contiguous.
struct Pooling {
  Tensor x, depthwise, weight, bias, mean, var;
  double eps;
  Sizes sizes;
};

template <typename T>
void pool_sums(const Pooling& in, const Tensor& grad, const Tensor& index, Tensor& out) {
  const int64_t n = in.sizes.channels;
  const T* variance = in.var.const_data_ptr<T>();
  View<T> view = view_of<T>(in.sizes, in.x, in.depthwise);
  const std::vector<T> scale = use_norm(view, in.weight, in.bias, in.mean.const_data_ptr<T>(), variance, in.eps);
  std::vector<double> sum, product;
  pool_sums(in.sizes, kernels<T>(), view, in.x, grad.const_data_ptr<T>(), index.const_data_ptr<int32_t>(), sum, product);
  for (int64_t c = 0; c < n; c++) {
    out.mutable_data_ptr<T>()[c] = T(sum[c]);
    out.mutable_data_ptr<T>()[n + c] = T(product[c] / std::sqrt(double(variance[c]) + in.eps));
  }
}

template <typename T>
void pool_backward(const Pooling& in, const Tensor& grad, const Tensor& index, const Tensor& means, Tensor& dx, Tensor& dweight) {
  const int64_t n = in.sizes.channels;
  const T *variance = in.var.const_data_ptr<T>(), *mean_of = means.const_data_ptr<T>();
  View<T> view = view_of<T>(in.sizes, in.x, in.depthwise);
  const std::vector<T> scale = use_norm(view, in.weight, in.bias, in.mean.const_data_ptr<T>(), variance, in.eps);
  std::vector<T> constant(n), linear(n), silence(in.sizes.length);
  for (int64_t c = 0; c < n; c++) {
    constant[c] = T(scale[c] * double(mean_of[c]));
    linear[c] = T(scale[c] * double(mean_of[n + c]) / std::sqrt(double(variance[c]) + in.eps));
  }
  // The product with the mask is not of this half: no gradient comes past it.
  const Gradients<T> with{constant.data(), linear.data(), grad.const_data_ptr<T>(), index.const_data_ptr<int32_t>(),
                          silence.data(), silence.data(), 0, dx.mutable_data_ptr<T>()};
  pool_gradients(in.sizes, kernels<T>(), view, in.x, with, 0, 0, dweight.mutable_data_ptr<T>());
}

// Features as they are where samples lie side by side, whatever the other strides; a copy otherwise.
Tensor readable(const Tensor& x) {
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

void check(const Tensor& x, const Tensor& depthwise, int64_t segment) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) >= 1, "local_attention: expected x [B, n, T] with n >= 1");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "local_attention: expected float32 or float64");
  STD_TORCH_CHECK(segment >= 2 && segment % 2 == 0, "local_attention: expected an even segment_len >= 2, got ", segment);
  STD_TORCH_CHECK(depthwise.dim() == 3 && depthwise.size(0) == x.size(1) && depthwise.size(1) == 1 && depthwise.size(2) % 2 == 1,
                  "local_attention: expected depthwise [n, 1, K], K odd");
}

void check(const Tensor& x, const Tensor& depthwise, const Tensor& conv, int64_t segment) {
  check(x, depthwise, segment);
  STD_TORCH_CHECK(conv.dim() == 3 && conv.size(0) == 1 && conv.size(1) == 2 && conv.size(2) % 2 == 1,
                  "local_attention: expected conv [1, 2, K], K odd");
}

// A parameter or saved tensor, contiguous: of this many elements, and of x's dtype.
Tensor parameter(const char* name, const Tensor& value, int64_t count, ScalarType dtype) {
  STD_TORCH_CHECK(value.numel() == count && value.scalar_type() == dtype, "local_attention: expected ", count,
                  " elements in ", name, ", got ", value.numel(), ", or another dtype");
  return torch::stable::contiguous(value);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> local_attention_forward(
    const Tensor& x_any, const Tensor& depthwise, const Tensor& weight1, const Tensor& bias1, const Tensor& mean1,
    const Tensor& var1, const Tensor& conv, const Tensor& weight2, const Tensor& bias2, const Tensor& mean2, const Tensor& var2,
    int64_t segment, double eps1, double eps2, bool training) {
  check(x_any, depthwise, conv, segment);
  const Tensor x = readable(x_any);
  const Sizes sizes(x, depthwise, segment, conv.size(2));
  const ScalarType dtype = x.scalar_type();
  const int64_t n = sizes.channels, P = sizes.chunks;
  const Tensor dw = parameter("depthwise", depthwise, n * sizes.taps, dtype), w1 = parameter("weight1", weight1, n, dtype);
  const Tensor b1 = parameter("bias1", bias1, n, dtype), m1 = parameter("mean1", mean1, n, dtype);
  const Tensor v1 = parameter("var1", var1, n, dtype), w = parameter("conv", conv, 2 * sizes.mask_taps, dtype);
  const Tensor w2 = parameter("weight2", weight2, 1, dtype), b2 = parameter("bias2", bias2, 1, dtype);
  const Tensor m2 = parameter("mean2", mean2, 1, dtype), v2 = parameter("var2", var2, 1, dtype);
  Results out{torch::stable::new_empty(x, {sizes.batch, n, sizes.length}), torch::stable::new_empty(x, {sizes.batch, P, segment}),
              torch::stable::new_empty(x, {sizes.batch, 2, P, segment}),
              torch::stable::new_empty(x, {sizes.batch, P, segment}, ScalarType::Int), torch::stable::new_empty(x, {2, n + 1})};
  const Arguments in{x, dw, w1, b1, m1, v1, w, w2, b2, m2, v2, eps1, eps2, training};
  dtype == ScalarType::Float ? forward<float>(sizes, in, out) : forward<double>(sizes, in, out);
  return {out.y, out.attention, out.pooled, out.index, out.statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> local_attention_backward(
    const Tensor& grad_any, const Tensor& x_any, const Tensor& depthwise, const Tensor& weight1, const Tensor& bias1,
    const Tensor& conv, const Tensor& weight2, const Tensor& attention, const Tensor& pooled, const Tensor& index,
    const Tensor& statistics, int64_t segment, double eps1, double eps2, bool training) {
  check(x_any, depthwise, conv, segment);
  const Tensor x = readable(x_any);
  const Sizes sizes(x, depthwise, segment, conv.size(2));
  const ScalarType dtype = x.scalar_type();
  const int64_t n = sizes.channels, places = sizes.batch * sizes.plane();
  STD_TORCH_CHECK(grad_any.dim() == 3 && grad_any.size(0) == x.size(0) && grad_any.size(1) == n && grad_any.size(2) == x.size(2) &&
                      grad_any.scalar_type() == dtype,
                  "local_attention_backward: expected grad in the shape and dtype of x");
  const Tensor grad = readable(grad_any);
  const Tensor dw = parameter("depthwise", depthwise, n * sizes.taps, dtype), w1 = parameter("weight1", weight1, n, dtype);
  const Tensor b1 = parameter("bias1", bias1, n, dtype), w = parameter("conv", conv, 2 * sizes.mask_taps, dtype);
  const Tensor w2 = parameter("weight2", weight2, 1, dtype), a = parameter("attention", attention, places, dtype);
  const Tensor rows = parameter("pooled", pooled, 2 * places, dtype), i = parameter("index", index, places, ScalarType::Int);
  const Tensor s = parameter("statistics", statistics, 2 * (n + 1), dtype);
  Gradient out{torch::stable::new_empty(x, {sizes.batch, n, sizes.length}), torch::stable::new_empty(x, {n, 1, sizes.taps}),
               torch::stable::new_empty(x, {n}), torch::stable::new_empty(x, {n}),
               torch::stable::new_empty(x, {1, 2, sizes.mask_taps}), torch::stable::new_empty(x, {1}),
               torch::stable::new_empty(x, {1})};
  const Saved in{grad, x, dw, w1, b1, w, w2, a, rows, i, s, eps1, eps2, training};
  dtype == ScalarType::Float ? backward<float>(sizes, in, out) : backward<double>(sizes, in, out);
  return {out.x, out.depthwise, out.weight1, out.bias1, out.conv, out.weight2, out.bias2};
}

Tensor local_pool_statistics(const Tensor& x_any, const Tensor& depthwise, int64_t segment) {
  check(x_any, depthwise, segment);
  const Tensor x = readable(x_any);
  const Sizes sizes(x, depthwise, segment);
  const Tensor dw = parameter("depthwise", depthwise, sizes.channels * sizes.taps, x.scalar_type());
  Tensor out = torch::stable::new_empty(x, {2, sizes.channels});
  const auto run = [&]<typename T>(T* to) {
    batch_statistics(sizes, kernels<T>(), view_of<T>(sizes, x, dw), x, to, to + sizes.channels);
  };
  x.scalar_type() == ScalarType::Float ? run(out.mutable_data_ptr<float>()) : run(out.mutable_data_ptr<double>());
  return out;
}

Pooling pooling(const Tensor& x_any, const Tensor& depthwise, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                const Tensor& var, int64_t segment, double eps) {
  check(x_any, depthwise, segment);
  const Tensor x = readable(x_any);
  const Sizes sizes(x, depthwise, segment);
  const ScalarType dtype = x.scalar_type();
  const int64_t n = sizes.channels;
  return {x, parameter("depthwise", depthwise, n * sizes.taps, dtype), parameter("weight1", weight, n, dtype),
          parameter("bias1", bias, n, dtype), parameter("mean1", mean, n, dtype), parameter("var1", var, n, dtype), eps, sizes};
}

std::tuple<Tensor, Tensor> local_pool(const Tensor& x, const Tensor& depthwise, const Tensor& weight, const Tensor& bias,
                                      const Tensor& mean, const Tensor& var, int64_t segment, double eps) {
  const Pooling in = pooling(x, depthwise, weight, bias, mean, var, segment, eps);
  Tensor pooled = torch::stable::new_empty(in.x, {in.sizes.batch, 2, in.sizes.chunks, segment});
  Tensor index = torch::stable::new_empty(in.x, {in.sizes.batch, in.sizes.chunks, segment}, ScalarType::Int);
  const auto run = [&]<typename T>(T* to) {
    View<T> view = view_of<T>(in.sizes, in.x, in.depthwise);
    const std::vector<T> scale =
        use_norm(view, in.weight, in.bias, in.mean.const_data_ptr<T>(), in.var.const_data_ptr<T>(), in.eps);
    pool(in.sizes, kernels<T>(), view, in.x, to, index.mutable_data_ptr<int32_t>());
  };
  in.x.scalar_type() == ScalarType::Float ? run(pooled.mutable_data_ptr<float>()) : run(pooled.mutable_data_ptr<double>());
  return {pooled, index};
}

Tensor local_pool_sums(const Tensor& grad_any, const Tensor& x, const Tensor& depthwise, const Tensor& weight, const Tensor& bias,
                       const Tensor& mean, const Tensor& var, const Tensor& index_any, int64_t segment, double eps) {
  const Pooling in = pooling(x, depthwise, weight, bias, mean, var, segment, eps);
  const int64_t places = in.sizes.batch * in.sizes.plane();
  const Tensor grad = parameter("grad", grad_any, 2 * places, in.x.scalar_type());
  const Tensor index = parameter("index", index_any, places, ScalarType::Int);
  Tensor out = torch::stable::new_empty(in.x, {2, in.sizes.channels});
  in.x.scalar_type() == ScalarType::Float ? pool_sums<float>(in, grad, index, out) : pool_sums<double>(in, grad, index, out);
  return out;
}

std::tuple<Tensor, Tensor> local_pool_backward(const Tensor& grad_any, const Tensor& x, const Tensor& depthwise,
                                               const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var,
                                               const Tensor& index_any, const Tensor& means_any, int64_t segment, double eps) {
  const Pooling in = pooling(x, depthwise, weight, bias, mean, var, segment, eps);
  const int64_t places = in.sizes.batch * in.sizes.plane(), n = in.sizes.channels;
  const ScalarType dtype = in.x.scalar_type();
  const Tensor grad = parameter("grad", grad_any, 2 * places, dtype);
  const Tensor index = parameter("index", index_any, places, ScalarType::Int);
  const Tensor means = parameter("means", means_any, 2 * n, dtype);
  Tensor dx = torch::stable::new_empty(in.x, {in.sizes.batch, n, in.sizes.length});
  Tensor dweight = torch::stable::new_empty(in.x, {n, 1, in.sizes.taps});
  dtype == ScalarType::Float ? pool_backward<float>(in, grad, index, means, dx, dweight)
                             : pool_backward<double>(in, grad, index, means, dx, dweight);
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mvat, CPU, m) {
  m.impl("local_attention", TORCH_BOX(&local_attention_forward));
  m.impl("local_attention_backward", TORCH_BOX(&local_attention_backward));
  m.impl("local_pool_statistics", TORCH_BOX(&local_pool_statistics));
  m.impl("local_pool", TORCH_BOX(&local_pool));
  m.impl("local_pool_sums", TORCH_BOX(&local_pool_sums));
  m.impl("local_pool_backward", TORCH_BOX(&local_pool_backward));
}
