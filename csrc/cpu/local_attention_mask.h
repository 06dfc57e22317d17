// The half of the local view without channels, on the CPU: from the pooled rows to the mask and back, the chunks' rows of S
// samples one after the other and the lanes along them; and the two products with the features.
#pragma once

#include <algorithm>

#include "vector.h"

namespace local_attention {

// Both pooled rows of a chunk with zeros around them, and one row's worth of results.
template <typename T>
struct Rows {
  const int64_t length, taps, padded;
  Scratch<T> maximum, mean, out, total;

  Rows(int64_t length, int64_t taps)
      : length(length), taps(taps), padded(length + taps + 32), maximum(padded), mean(padded), out(padded),
        total(2 * taps * 16) {}

  void fill(const T* maxima, const T* means) {
    std::copy_n(maxima, length, maximum.get() + taps / 2);
    std::copy_n(means, length, mean.get() + taps / 2);
  }
};

// logits[s] = sum over k of weight[0][k] * maximum[s + k - taps / 2] + weight[1][k] * mean[s + k - taps / 2], of `count` chunks.
template <int L, typename T>
MVAT_INLINE void logits_body(const T* maxima, const T* means, int64_t count, const T* weight, Rows<T>& rows, T* logits) {
  for (int64_t p = 0; p < count; p++) {
    rows.fill(maxima + p * rows.length, means + p * rows.length);
    for (int64_t s = 0; s < rows.length; s += L) {
      typename Lanes<T, L>::Vector from_maximum{}, from_mean{};
      for (int64_t k = 0; k < rows.taps; k++) {
        from_maximum += weight[k] * load<L>(rows.maximum.get() + s + k);
        from_mean += weight[rows.taps + k] * load<L>(rows.mean.get() + s + k);
      }
      store<L>(rows.out.get() + s, from_maximum + from_mean);
    }
    std::copy_n(rows.out.get(), rows.length, logits + p * rows.length);
  }
}

// From logits to sigmoid((logit - mean) * scale + bias), in place.
template <int L, typename T>
MVAT_INLINE void sigmoid_body(T* logits, int64_t count, T mean, T scale, T bias) {
  using V = typename Lanes<T, L>::Vector;
  for (int64_t i = 0; i < count; i += L) {
    const int64_t valid = std::min<int64_t>(L, count - i);
    T part[L] = {};
    T* place = valid == L ? logits + i : part;
    if (valid < L) std::copy_n(logits + i, valid, part);
    const V v[1] = {(load<L>(place) - mean) * scale + bias};
    V gate[1];
    sigmoid<L>(v, gate);
    store<L>(place, v[0] == v[0] ? gate[0] : v[0]);
    if (valid < L) std::copy_n(part, valid, logits + i);
  }
}

// mask[t] for t in [begin, end): half the sum of the attention at the two places of the chunks that cover t.
template <typename T>
MVAT_INLINE void mask_row(const T* attention, int64_t half, int64_t begin, int64_t end, T* mask) {
  for (int64_t t = begin; t < end;) {
    const int64_t chunk = t / half + 2, at = t % half, count = std::min(half - at, end - t);
    const T *first = attention + chunk * 2 * half + at, *second = attention + (chunk - 1) * 2 * half + half + at;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) mask[t + i] = (first[i] + second[i]) * T(0.5);
    t += count;
  }
}

// y[c, t] = x[c, t] * mask[t].
template <typename T>
MVAT_INLINE void multiply_tile(const T* x, int64_t channels, int64_t stride, const T* mask, int64_t length, T* y,
                               int64_t y_stride) {
  for (int64_t c = 0; c < channels; c++, x += stride, y += y_stride) {
#pragma omp simd
    for (int64_t t = 0; t < length; t++) y[t] = x[t] * mask[t];
  }
}

// out[t] = sum over c of a[c, t] * b[c, t], eight channels at a time and those sums in double.
template <typename T>
MVAT_INLINE void product_tile(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t channels, int64_t length,
                              T* out, double* total) {
  std::fill_n(total, length, 0.0);
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4, a += 4 * a_stride, b += 4 * b_stride) {
#pragma omp simd
    for (int64_t t = 0; t < length; t++) {
      total[t] += (a[t] * b[t] + a[a_stride + t] * b[b_stride + t]) +
                  (a[2 * a_stride + t] * b[2 * b_stride + t] + a[3 * a_stride + t] * b[3 * b_stride + t]);
    }
  }
  for (; c < channels; c++, a += a_stride, b += b_stride) {
#pragma omp simd
    for (int64_t t = 0; t < length; t++) total[t] += a[t] * b[t];
  }
  for (int64_t t = 0; t < length; t++) out[t] = T(total[t]);
}

// The gradient before norm2 and the normalised logits of `count` chunks from `chunk` on, and their sums: of the gradient and of
// the products. da is half of d mask at the two places; zero outside the signal.
template <int L, typename T>
MVAT_INLINE void gate_body(const T* attention, const T* dmask, int64_t samples, int64_t chunk, int64_t count, T mean, T rstd,
                           T* logits, T* grad, Rows<T>& rows, double* sums) {
  using V = typename Lanes<T, L>::Vector;
  V sum{}, product{};
  const int64_t S = rows.length;
  T *a = rows.maximum.get(), *d = rows.mean.get(), *z = rows.out.get();  // three padded rows; zeros behind S in d
  for (int64_t p = 0; p < count; p++) {
    const int64_t start = (chunk + p - 2) * (S / 2);
    std::copy_n(attention + p * S, S, a);
    std::copy_n(logits + p * S, S, z);
    std::fill_n(z + S, L, T(0));
    std::fill_n(d, S, T(0));
    const int64_t begin = std::max<int64_t>(0, -start), end = std::min(S, samples - start);
    if (begin < end) std::copy(dmask + start + begin, dmask + start + end, d + begin);
    for (int64_t s = 0; s < S; s += L) {
      const V gate = load<L>(a + s), slope = load<L>(d + s) * T(0.5) * gate * (T(1) - gate);
      const V normal = (load<L>(z + s) - mean) * rstd;
      store<L>(d + s, slope);
      store<L>(z + s, normal);
      sum += slope;
      product += slope * normal;
    }
    std::copy_n(d, S, grad + p * S);
    std::copy_n(z, S, logits + p * S);
  }
  sums[0] = sum_lanes<L>(sum);
  sums[1] = sum_lanes<L>(product);
}

// The gradients of the pooled rows (that of the mean divided by the channels) and of the convolution's weights, of `count` chunks;
// grad and normal as gate_body left them, dz = scale * (grad - constant - linear * normal).
template <int L, typename T>
MVAT_INLINE void pooled_body(const T* maxima, const T* means, const T* grad, const T* normal, int64_t count, const T* weight,
                             T scale, T constant, T linear, T share, Rows<T>& rows, T* dmaxima, T* dmeans, double* dweight) {
  using V = typename Lanes<T, L>::Vector;
  const int64_t S = rows.length, taps = rows.taps;
  T *dz = rows.out.get(), *total = rows.total.get();
  std::fill_n(total, 2 * taps * L, T(0));
  for (int64_t p = 0; p < count; p++) {
    rows.fill(maxima + p * S, means + p * S);
    for (int64_t s = 0; s < S; s++) dz[taps / 2 + s] = scale * (grad[p * S + s] - constant - linear * normal[p * S + s]);
    for (int64_t k = 0; k < taps; k++) {
      V to_maximum{}, to_mean{};
      for (int64_t s = 0; s < S; s += L) {
        V slope = load<L>(dz + taps / 2 + s);
        to_maximum += slope * load<L>(rows.maximum.get() + s + k);
        to_mean += slope * load<L>(rows.mean.get() + s + k);
      }
      store<L>(total + k * L, load<L>(total + k * L) + to_maximum);
      store<L>(total + (taps + k) * L, load<L>(total + (taps + k) * L) + to_mean);
    }
    for (int64_t s = 0; s < S; s += L) {
      V to_maximum{}, to_mean{};
      for (int64_t k = 0; k < taps; k++) {
        const V slope = load<L>(dz + s + k);
        to_maximum += weight[taps - 1 - k] * slope;
        to_mean += weight[2 * taps - 1 - k] * slope;
      }
      // The pooled rows are not needed any more: theirs are the places of the results.
      store<L>(rows.maximum.get() + taps / 2 + s, to_maximum);
      store<L>(rows.mean.get() + taps / 2 + s, to_mean * share);
    }
    std::copy_n(rows.maximum.get() + taps / 2, S, dmaxima + p * S);
    std::copy_n(rows.mean.get() + taps / 2, S, dmeans + p * S);
    std::fill_n(rows.maximum.get() + taps / 2 + S, L, T(0));
    std::fill_n(rows.mean.get() + taps / 2 + S, L, T(0));
  }
  for (int64_t i = 0; i < 2 * taps; i++) dweight[i] = sum_lanes<L>(load<L>(total + i * L));
}

}  // namespace local_attention
