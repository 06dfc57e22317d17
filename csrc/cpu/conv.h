// A convolution along time as products of its weight with panels of rows, for one instruction set.
//
// Time lies in the lanes and weights are broadcast. A tile of columns works on a panel of the input, rows of contiguous samples
// that its products read at the taps' offsets; nothing is copied for a tap. A stride of S splits the panel's rows into S phases:
//     y[t] = sum over j, r of W[S j + r] x[S (t + j) + r - p]
// and a transposed convolution has the phases in its output:
//     y[S v + q - p] = sum over j of W[S j + q] x[v - j]
// Each of the two is the other's gradient, with the weight's input and output exchanged. The weight's own gradient is the
// product of both panels' rows over time: with few channels time stays in the lanes and is summed at the end, with many the
// input's panel is transposed, so that its channels lie in the lanes.
//
// Weights are packed here: [kernel][out][in].
#pragma once

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace mvat::conv {

struct Conv {
  int64_t in, out;                    // channels of a group
  int64_t kernel, stride, padding;
  bool transposed;
  int64_t length_in, length_out;

  int64_t taps() const { return (kernel + stride - 1) / stride; }
  int64_t phases_in() const { return transposed ? 1 : stride; }
  int64_t phases_out() const { return transposed ? stride : 1; }
  int64_t columns() const { return transposed ? (length_out + padding + stride - 1) / stride : length_out; }
  int64_t rows_in() const { return in * phases_in(); }
  int64_t rows_out() const { return out * phases_out(); }
  // Where in the panel a product at column 0 reads tap j; where in the signal the panel of the tile at column t begins.
  int64_t offset(int64_t j) const { return transposed ? taps() - 1 - j : j; }
  int64_t start(int64_t t) const { return transposed ? t - (taps() - 1) : stride * t - padding; }
  bool is_filter() const { return in == 1 && out == 1 && stride == 1; }
  int64_t weight_size() const { return kernel * out * in; }
  Conv gradient() const { return {out, in, kernel, stride, padding, !transposed, length_out, length_in}; }
};

// A row's distance to the next one: an odd number of cache lines, so that rows do not fall on the same lines of a cache.
template <typename T>
inline int64_t row_size(int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return ((columns + kLine - 1) / kLine | 1) * kLine;
}

// Columns a product touches: whole vectors.
template <int L>
inline int64_t whole(int64_t columns) { return (columns + L - 1) / L * L; }

template <typename T, int L>
MVAT_INLINE typename Simd<T, L>::Vector load_part(const T* from, int64_t count) {
  typename Simd<T, L>::Vector v{};
  std::memcpy(&v, from, count * sizeof(T));
  return v;
}

template <typename T, int L>
MVAT_INLINE typename Simd<T, L>::Vector load_lanes(const T* from, int64_t count) {
  return count >= L ? (typename Simd<T, L>::Vector)*(const typename Simd<T, L>::Memory*)from : load_part<T, L>(from, count);
}

template <typename T, int L>
MVAT_INLINE void store_lanes(typename Simd<T, L>::Vector v, T* to, int64_t count) {
  if (count >= L) {
    *(typename Simd<T, L>::Memory*)to = v;
  } else {
    std::memcpy(to, &v, count * sizeof(T));
  }
}

// The sum of a vector's lanes, by halves.
template <typename T, int L>
MVAT_INLINE T sum_lanes(typename Simd<T, L>::Vector v) {
  if constexpr (L == 1) {
    return v[0];
  } else {
    typename Simd<T, L / 2>::Vector half[2];
    std::memcpy(half, &v, sizeof v);
    if constexpr (L == 2) {
      return half[0][0] + half[1][0];
    } else {
      return sum_lanes<T, L / 2>(half[0] + half[1]);
    }
  }
}

// A long sum in parts of 16 vectors: rounding grows with the number of additions one after the other.
template <typename T, int L>
struct Sum {
  using V = typename Simd<T, L>::Vector;
  V whole{}, part{};
  int64_t count = 0;

  inline __attribute__((always_inline)) void operator+=(V v) {
    part += v;
    if (++count % 16) return;
    whole += part;
    part = V{};
  }
  inline __attribute__((always_inline)) T lanes() const { return sum_lanes<T, L>(whole + part); }
};

// One block: acc[row][vector] += the products of the weight's rows with the panel, for input channels c0 .. c1.
template <typename T, int L, int NV, int MR>
MVAT_INLINE void multiply_block(const Conv& conv, const T* weight, const T* panel, int64_t row, int64_t phase_out, int64_t c0,
                                int64_t c1, typename Simd<T, L>::Vector (&acc)[MR][NV]) {
  const int64_t taps = conv.taps(), phases = conv.phases_in();
  for (int64_t j = 0; j < taps; j++)
    for (int64_t r = 0; r < phases; r++) {
      const int64_t k = conv.stride * j + r + phase_out;
      if (k >= conv.kernel) break;
      multiply_add<T, L, NV, MR>(acc, panel + (r * conv.in + c0) * row + conv.offset(j), row,
                                 weight + k * conv.out * conv.in + c0, conv.in, 1, c1 - c0);
    }
}

template <typename T, int L, int NV, int MR>
MVAT_INLINE void product_rows(const Conv& conv, const T* weight, const T* bias, const T* panel, int64_t panel_row, int64_t phase,
                              int64_t c0, int64_t c1, bool add, T* out, int64_t out_row) {
  typename Simd<T, L>::Vector acc[MR][NV];
  MVAT_UNROLL for (int r = 0; r < MR; r++)
    MVAT_UNROLL for (int v = 0; v < NV; v++) {
      if (add) {
        acc[r][v] = *(const typename Simd<T, L>::Memory*)(out + r * out_row + v * L);
      } else {
        acc[r][v] = typename Simd<T, L>::Vector{} + (bias ? bias[r] : T(0));
      }
    }
  multiply_block<T, L, NV, MR>(conv, weight, panel, panel_row, phase, c0, c1, acc);
  MVAT_UNROLL for (int r = 0; r < MR; r++)
    MVAT_UNROLL for (int v = 0; v < NV; v++) *(typename Simd<T, L>::Memory*)(out + r * out_row + v * L) = acc[r][v];
}

template <typename T, int L, int NV, int MR>
MVAT_INLINE void product_columns(const Conv& conv, const T* weight, const T* bias, const T* panel, int64_t panel_row, int64_t c0,
                                 int64_t c1, bool add, T* out, int64_t out_row) {
  for (int64_t q = 0; q < conv.phases_out(); q++, out += conv.out * out_row) {
    int64_t o = 0;
    for (; o + MR <= conv.out; o += MR)
      product_rows<T, L, NV, MR>(conv, weight + o * conv.in, bias ? bias + o : nullptr, panel, panel_row, q, c0, c1, add,
                                 out + o * out_row, out_row);
    if constexpr (MR > 4)
      for (; o + 4 <= conv.out; o += 4)
        product_rows<T, L, NV, 4>(conv, weight + o * conv.in, bias ? bias + o : nullptr, panel, panel_row, q, c0, c1, add,
                                  out + o * out_row, out_row);
    for (; o + 2 <= conv.out; o += 2)
      product_rows<T, L, NV, 2>(conv, weight + o * conv.in, bias ? bias + o : nullptr, panel, panel_row, q, c0, c1, add,
                                out + o * out_row, out_row);
    for (; o < conv.out; o++)
      product_rows<T, L, NV, 1>(conv, weight + o * conv.in, bias ? bias + o : nullptr, panel, panel_row, q, c0, c1, add,
                                out + o * out_row, out_row);
  }
}

// One channel to one: a filter along the row, its taps broadcast.
template <typename T, int L>
MVAT_INLINE void filter(const Conv& conv, const T* weight, T start, const T* panel, int64_t columns, T* out) {
  constexpr int NV = 4;
  int64_t t = 0;
  for (; t + NV * L <= columns; t += NV * L) {
    typename Simd<T, L>::Vector acc[NV];
    MVAT_UNROLL for (int v = 0; v < NV; v++) acc[v] = typename Simd<T, L>::Vector{} + start;
    for (int64_t k = 0; k < conv.kernel; k++) {
      const T* from = panel + conv.offset(k) + t;
      MVAT_UNROLL for (int v = 0; v < NV; v++) acc[v] += *(const typename Simd<T, L>::Memory*)(from + v * L) * weight[k];
    }
    MVAT_UNROLL for (int v = 0; v < NV; v++) *(typename Simd<T, L>::Memory*)(out + t + v * L) = acc[v];
  }
  for (; t < columns; t += L) {
    typename Simd<T, L>::Vector acc = typename Simd<T, L>::Vector{} + start;
    for (int64_t k = 0; k < conv.kernel; k++)
      acc += *(const typename Simd<T, L>::Memory*)(panel + conv.offset(k) + t) * weight[k];
    *(typename Simd<T, L>::Memory*)(out + t) = acc;
  }
}

// The taps' gradients of such a filter; columns are whole vectors.
template <typename T, int L>
MVAT_INLINE void filter_gradient(const Conv& conv, const T* grad, const T* panel, int64_t columns, T* d_weight) {
  constexpr int N = 8;  // taps at a time
  int64_t k = 0;
  for (; k + N <= conv.kernel; k += N) {
    typename Simd<T, L>::Vector acc[N] = {};
    for (int64_t t = 0; t < columns; t += L) {
      const typename Simd<T, L>::Vector g = *(const typename Simd<T, L>::Memory*)(grad + t);
      MVAT_UNROLL for (int i = 0; i < N; i++) acc[i] += g * *(const typename Simd<T, L>::Memory*)(panel + conv.offset(k + i) + t);
    }
    MVAT_UNROLL for (int i = 0; i < N; i++) d_weight[k + i] += sum_lanes<T, L>(acc[i]);
  }
  for (; k < conv.kernel; k++) {
    typename Simd<T, L>::Vector acc{};
    for (int64_t t = 0; t < columns; t += L)
      acc += *(const typename Simd<T, L>::Memory*)(grad + t) * *(const typename Simd<T, L>::Memory*)(panel + conv.offset(k) + t);
    d_weight[k] += sum_lanes<T, L>(acc);
  }
}

// out [rows_out, columns] = bias + weight * panel, or with `add` that much more. Both have room for whole vectors of columns.
template <typename T, int L, int NV, int MR>
MVAT_INLINE void product(const Conv& conv, const T* weight, const T* bias, const T* panel, int64_t panel_row, int64_t columns,
                         T* out, int64_t out_row, bool add = false) {
  if (conv.is_filter() && !add) return filter<T, L>(conv, weight, bias ? *bias : T(0), panel, columns, out);
  // So many channels that a block of the panel's columns stays in the first cache while every row of the weight passes it.
  const int64_t most = std::max<int64_t>(16, 160 / conv.phases_in());
  const int64_t parts = (conv.in + most - 1) / most, step = (conv.in + parts - 1) / parts;
  for (int64_t c0 = 0; c0 < conv.in; c0 += step) {
    const int64_t c1 = std::min(conv.in, c0 + step);
    const bool more = add || c0 > 0;
    int64_t t = 0;
    for (; t + (NV - 1) * L < columns; t += NV * L)
      product_columns<T, L, NV, MR>(conv, weight, bias, panel + t, panel_row, c0, c1, more, out + t, out_row);
    for (; t < columns; t += L)
      product_columns<T, L, 1, MR>(conv, weight, bias, panel + t, panel_row, c0, c1, more, out + t, out_row);
  }
}

template <typename T, int L, int MR, int MC>
MVAT_INLINE void dot_block(const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t columns, T* out, int64_t out_a, int64_t out_b) {
  typename Simd<T, L>::Vector acc[MR][MC] = {};
  int64_t t = 0;
  for (; t + L <= columns; t += L) {
    typename Simd<T, L>::Vector other[MC];
    MVAT_UNROLL for (int c = 0; c < MC; c++) other[c] = *(const typename Simd<T, L>::Memory*)(b + c * b_row + t);
    MVAT_UNROLL for (int r = 0; r < MR; r++) {
      const typename Simd<T, L>::Vector one = *(const typename Simd<T, L>::Memory*)(a + r * a_row + t);
      MVAT_UNROLL for (int c = 0; c < MC; c++) acc[r][c] += one * other[c];
    }
  }
  if (t < columns)
    MVAT_UNROLL for (int r = 0; r < MR; r++)
      MVAT_UNROLL for (int c = 0; c < MC; c++)
        acc[r][c] += load_part<T, L>(a + r * a_row + t, columns - t) * load_part<T, L>(b + c * b_row + t, columns - t);
  MVAT_UNROLL for (int r = 0; r < MR; r++)
    MVAT_UNROLL for (int c = 0; c < MC; c++) out[r * out_a + c * out_b] += sum_lanes<T, L>(acc[r][c]);
}

template <typename T, int L, int MR>
MVAT_INLINE void dot_rows(const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t count_b, int64_t columns, T* out,
                          int64_t out_a, int64_t out_b) {
  int64_t c = 0;
  for (; c + 3 <= count_b; c += 3) dot_block<T, L, MR, 3>(a, a_row, b + c * b_row, b_row, columns, out + c * out_b, out_a, out_b);
  for (; c < count_b; c++) dot_block<T, L, MR, 1>(a, a_row, b + c * b_row, b_row, columns, out + c * out_b, out_a, out_b);
}

// to [columns][in] from [in][columns], whole blocks of L by L.
template <typename T, int L>
MVAT_INLINE void transpose(const T* from, int64_t row, int64_t rows, int64_t columns, T* to, int64_t to_row) {
  using V = typename Simd<T, L>::Vector;
  using I = typename Simd<T, L>::Integers;
  for (int64_t c = 0; c < rows; c += L)
    for (int64_t t = 0; t < columns; t += L) {
      V v[L];
      MVAT_UNROLL for (int i = 0; i < L; i++) v[i] = *(const typename Simd<T, L>::Memory*)(from + (c + i) * row + t + 0);
      // Rows i and i + s exchange their off-diagonal blocks of s lanes.
      MVAT_UNROLL for (int s = L / 2; s > 0; s /= 2) {
        I low, high;
        MVAT_UNROLL for (int l = 0; l < L; l++) {
          low[l] = l & s ? L + l - s : l;
          high[l] = l & s ? L + l : l + s;
        }
        MVAT_UNROLL for (int i = 0; i < L; i++)
          if (!(i & s)) {
            const V a = v[i], b = v[i + s];
            v[i] = __builtin_shuffle(a, b, low);
            v[i + s] = __builtin_shuffle(a, b, high);
          }
      }
      MVAT_UNROLL for (int i = 0; i < L; i++) *(typename Simd<T, L>::Memory*)(to + (t + i) * to_row + c) = v[i];
    }
}

template <typename T, int L, int NV, int MR>
MVAT_INLINE void outer_rows(const T* grad, int64_t grad_row, const T* panel, int64_t panel_row, int64_t columns, int64_t in, T* out,
                            int64_t out_row) {
  constexpr int64_t kChain = 384;  // columns summed one after the other: rounding grows with a sum's length
  for (int64_t c = 0; c < in; c += NV * L)
    for (int64_t t = 0; t < columns; t += kChain) {
      typename Simd<T, L>::Vector acc[MR][NV] = {};
      multiply_add<T, L, NV, MR>(acc, panel + t * panel_row + c, panel_row, grad + t, grad_row, 1, std::min(kChain, columns - t));
      MVAT_UNROLL for (int r = 0; r < MR; r++)
        MVAT_UNROLL for (int v = 0; v < NV; v++)
          if (c + v * L < in) {
            T* to = out + r * out_row + c + v * L;
            store_lanes<T, L>(load_lanes<T, L>(to, in - c - v * L) + acc[r][v], to, in - c - v * L);
          }
    }
}

// Channels from which on it pays to transpose the panel.
constexpr int64_t kTransposed = 32;

// d_weight += the products of the output's gradient, rows (phase, channel), with the input's panel; `turned` has room for the
// panel's transpose, its rows and columns rounded up to blocks.
template <typename T, int L, int NV, int MR>
MVAT_INLINE void weight_gradient(const Conv& conv, const T* grad, int64_t grad_row, const T* panel, int64_t panel_row,
                                 int64_t columns, T* turned, T* d_weight) {
  if (conv.is_filter()) return filter_gradient<T, L>(conv, grad, panel, columns, d_weight);
  const bool transposed = conv.in >= kTransposed;
  const int64_t turned_row = whole<NV * L>(conv.in) + L;
  for (int64_t phase = 0; phase < conv.stride; phase++) {
    const T* b = panel + (conv.transposed ? 0 : phase * conv.in) * panel_row;
    if (transposed && (phase == 0 || !conv.transposed))
      transpose<T, L>(b, panel_row, whole<L>(conv.in), whole<L>(columns + conv.taps() - 1), turned, turned_row);
    const T* a = grad + (conv.transposed ? phase * conv.out : 0) * grad_row;
    for (int64_t j = 0; conv.stride * j + phase < conv.kernel; j++) {
      T* out = d_weight + (conv.stride * j + phase) * conv.out * conv.in;
      int64_t o = 0;
      if (transposed) {
        const T* rows = turned + conv.offset(j) * turned_row;
        for (; o + MR <= conv.out; o += MR)
          outer_rows<T, L, NV, MR>(a + o * grad_row, grad_row, rows, turned_row, columns, conv.in, out + o * conv.in, conv.in);
        for (; o < conv.out; o++)
          outer_rows<T, L, NV, 1>(a + o * grad_row, grad_row, rows, turned_row, columns, conv.in, out + o * conv.in, conv.in);
      } else {
        const T* rows = b + conv.offset(j);
        for (; o + MR <= conv.out; o += MR)
          dot_rows<T, L, MR>(a + o * grad_row, grad_row, rows, panel_row, conv.in, columns, out + o * conv.in, conv.in, 1);
        if constexpr (MR > 4)
          for (; o + 4 <= conv.out; o += 4)
            dot_rows<T, L, 4>(a + o * grad_row, grad_row, rows, panel_row, conv.in, columns, out + o * conv.in, conv.in, 1);
        for (; o < conv.out; o++)
          dot_rows<T, L, 1>(a + o * grad_row, grad_row, rows, panel_row, conv.in, columns, out + o * conv.in, conv.in, 1);
      }
    }
  }
}

// Contiguous samples to rows of phases: to[r][i] = from[stride i + r], and back.
template <typename T>
MVAT_INLINE void split_phases(const T* from, int64_t stride, int64_t columns, T* to, int64_t row) {
  for (int64_t r = 0; r < stride; r++)
    for (int64_t i = 0; i < columns; i++) to[r * row + i] = from[stride * i + r];
}

template <typename T>
MVAT_INLINE void join_phases(const T* from, int64_t row, int64_t stride, int64_t columns, T* to) {
  for (int64_t r = 0; r < stride; r++)
    for (int64_t i = 0; i < columns; i++) to[stride * i + r] = from[r * row + i];
}

// Where channel o of a tile's product lies contiguously, and which samples it is: from .. from + count of the signal.
template <typename T>
MVAT_INLINE const T* gathered(const Conv& conv, int64_t o, int64_t t, int64_t columns, int64_t length, const T* product,
                              int64_t row, T* scratch, int64_t& from, int64_t& count) {
  const int64_t first = conv.transposed ? conv.stride * t - conv.padding : t;
  const int64_t size = columns * conv.phases_out();
  const int64_t lo = std::clamp<int64_t>(-first, 0, size), hi = std::clamp<int64_t>(length - first, lo, size);
  from = first + lo;
  count = hi - lo;
  const T* samples = product + o * row;
  if (conv.phases_out() > 1) {
    join_phases(samples, conv.out * row, conv.stride, columns, scratch);
    samples = scratch;
  }
  return samples + lo;
}

}  // namespace mvat::conv
