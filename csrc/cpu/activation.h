// Rows of features normalised and activated, and the gradient of that, for one instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "conv.h"
#include "simd.h"

namespace mvat {

enum Activation : int64_t { kIdentity, kRelu, kSilu, kGlu };  // in the order of ACTIVATIONS in norm_act_conv.py

// Features x [batch, channels, length], samples side by side.
template <typename T>
struct Features {
  T* data;
  int64_t batch_stride, channel_stride, length;

  T* row(int64_t b, int64_t c) const { return data + b * batch_stride + c * channel_stride; }
};

// Samples from .. from + count of a row, zeros outside the signal.
template <typename T>
MVAT_INLINE void read_padded(const Features<const T>& x, int64_t b, int64_t c, int64_t from, int64_t count, T* out) {
  const int64_t lo = std::clamp<int64_t>(-from, 0, count), hi = std::clamp<int64_t>(x.length - from, lo, count);
  std::fill_n(out, lo, T(0));
  std::copy_n(x.row(b, c) + from + lo, hi - lo, out + lo);
  std::fill(out + hi, out + count, T(0));
}

// z = x * scale + shift with scale = weight / sqrt(var + eps), for every channel; without a norm z = x.
template <typename T>
struct NormRow {
  T scale = 1, shift = 0, mean = 0, inverse = 0;  // x^ = (x - mean) * inverse
};

template <typename T, int L>
struct Act {
  using V = typename Simd<T, L>::Vector;

  MVAT_INLINE V sigmoid(V z) {
    V e = z * T(-1.4426950408889634);
    e = e < T(99) ? e : V{} + T(99);  // a NaN becomes one again below
    exp2_lanes<L>(e);
    const V s = T(1) / (T(1) + e);
    return z == z ? s : z;
  }

  // Near zero a polynomial in z^2, within an ulp; elsewhere (1 - e) / (1 + e) with e = exp(-2 |z|).
  MVAT_INLINE V tanh(V z) {
    if constexpr (sizeof(T) == 8) {
      for (int l = 0; l < L; l++) z[l] = std::tanh(z[l]);
      return z;
    } else {
      constexpr float kOdd[] = {-0x1.9a8aa8p-8f, 0x1.591d64p-6f, -0x1.b92442p-5f, 0x1.110d0ap-3f, -0x1.55554ap-2f};
      const V size = z < T(0) ? -z : z, square = z * z;
      V p = V{} + kOdd[0];
      MVAT_UNROLL for (int i = 1; i < 5; i++) p = p * square + kOdd[i];
      V e = size * T(-2.8853900817779268);
      exp2_lanes<L>(e);
      const V far = (T(1) - e) / (T(1) + e);
      return size < T(0.55) ? z + z * square * p : z < T(0) ? -far : z == z ? far : z;
    }
  }

  template <Activation A>
  MVAT_INLINE V apply(V z, V gate) {
    if constexpr (A == kRelu) return z < T(0) ? V{} : z;
    if constexpr (A == kSilu) return z * sigmoid(z);
    if constexpr (A == kGlu) return z * sigmoid(gate);
    return z;
  }

  template <Activation A>
  MVAT_INLINE void row(const T* x, NormRow<T> n, const T* gate, NormRow<T> g, int64_t count, T* out) {
    for (int64_t i = 0; i < count; i += L) {
      const V z = conv::load_lanes<T, L>(x + i, count - i) * n.scale + n.shift;
      V other{};
      if constexpr (A == kGlu) other = conv::load_lanes<T, L>(gate + i, count - i) * g.scale + g.shift;
      conv::store_lanes<T, L>(apply<A>(z, other), out + i, count - i);
    }
  }

  // out = act(norm(x)).
  MVAT_INLINE void row(Activation a, const T* x, NormRow<T> n, const T* gate, NormRow<T> g, int64_t count, T* out) {
    if (a == kGlu) return row<kGlu>(x, n, gate, g, count, out);
    if (a == kSilu) return row<kSilu>(x, n, gate, g, count, out);
    if (a == kRelu) return row<kRelu>(x, n, gate, g, count, out);
    row<kIdentity>(x, n, gate, g, count, out);
  }

  // dz = da act'(z), and the sums of dz and of dz x^ added to sums[0] and sums[1]; GLU's gate likewise.
  template <Activation A>
  MVAT_INLINE void back(const T* da, const T* x, NormRow<T> n, const T* gate, NormRow<T> g, int64_t count, T* dz, T* dgate,
                        double* sums, double* gate_sums) {
    conv::Sum<T, L> sum, product, gate_sum, gate_product;
    for (int64_t i = 0; i < count; i += L) {
      const int64_t left = count - i;
      const V d = conv::load_lanes<T, L>(da + i, left), in = conv::load_lanes<T, L>(x + i, left);
      const V z = in * n.scale + n.shift;
      V out = d;
      if constexpr (A == kRelu) out = z <= T(0) ? V{} : d;  // a NaN hands its gradient on, as in eager
      if constexpr (A == kSilu) {
        const V s = sigmoid(z);
        out = d * (s * (T(1) + z * (T(1) - s)));
      }
      if constexpr (A == kGlu) {
        const V in2 = conv::load_lanes<T, L>(gate + i, left);
        const V s = sigmoid(in2 * g.scale + g.shift);
        out = d * s;
        const V out2 = out * z * (T(1) - s);
        conv::store_lanes<T, L>(out2, dgate + i, left);
        gate_sum += out2;
        gate_product += out2 * ((in2 - g.mean) * g.inverse);
      }
      conv::store_lanes<T, L>(out, dz + i, left);
      sum += out;
      product += out * ((in - n.mean) * n.inverse);
    }
    sums[0] += sum.lanes();
    sums[1] += product.lanes();
    if constexpr (A == kGlu) {
      gate_sums[0] += gate_sum.lanes();
      gate_sums[1] += gate_product.lanes();
    }
  }

  MVAT_INLINE void back(Activation a, const T* da, const T* x, NormRow<T> n, const T* gate, NormRow<T> g, int64_t count, T* dz,
                        T* dgate, double* sums, double* gate_sums) {
    if (a == kGlu) return back<kGlu>(da, x, n, gate, g, count, dz, dgate, sums, gate_sums);
    if (a == kSilu) return back<kSilu>(da, x, n, gate, g, count, dz, dgate, sums, gate_sums);
    if (a == kRelu) return back<kRelu>(da, x, n, gate, g, count, dz, dgate, sums, gate_sums);
    back<kIdentity>(da, x, n, gate, g, count, dz, dgate, sums, gate_sums);
  }

  // Count, mean and M2 of a row: two readings of what lies in the first cache.
  MVAT_INLINE void moments(const T* x, int64_t count, double& mean, double& m2) {
    V sum{};
    for (int64_t i = 0; i < count; i += L) sum += conv::load_lanes<T, L>(x + i, count - i);
    mean = double(conv::sum_lanes<T, L>(sum)) / count;
    const T centre = T(mean);
    V squares{}, rest{};
    int64_t i = 0;
    for (; i + L <= count; i += L) {
      const V d = conv::load_lanes<T, L>(x + i, L) - centre;
      squares += d * d;
      rest += d;
    }
    double tail = 0, tail_rest = 0;
    for (; i < count; i++) {
      const double d = double(x[i]) - double(centre);
      tail += d * d;
      tail_rest += d;
    }
    // The centre is rounded: what that leaves is taken off.
    const double off = (double(conv::sum_lanes<T, L>(rest)) + tail_rest) / count;
    mean = double(centre) + off;
    m2 = double(conv::sum_lanes<T, L>(squares)) + tail - off * off * count;
  }
};

// Chan's rule for the union of two samples.
struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void add(double n, double other_mean, double other_m2) {
    if (n == 0) return;
    const double total = count + n, delta = other_mean - mean;
    mean += delta * (n / total);
    m2 += other_m2 + delta * delta * (count * n / total);
    count = total;
  }
};

}  // namespace mvat
