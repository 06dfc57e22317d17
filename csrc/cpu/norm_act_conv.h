// A tile of norm_act_conv's columns, forward and backward, for one instruction set; conv.h has the products.
#pragma once

#include "activation.h"
#include "conv.h"

namespace mvat::norm_act_conv {

using conv::Conv;

template <typename T>
struct Stage {
  Conv conv;                 // of one group
  int64_t groups, channels;  // channels of x
  Activation activation;
  int64_t columns;           // of a tile
  Features<const T> x;
  const NormRow<T>* norm;    // [channels]
  const T *weight, *bias;    // packed; backward the gradient's
  Features<T> out;           // y, or backward dz
  Features<const T> grad;    // of y, backward
  int64_t panel_row, out_row, grad_row;

  int64_t tiles() const {
    return (std::max(conv.columns(), conv.gradient().columns()) + columns - 1) / columns;
  }
  int64_t width() const { return columns + conv.taps() - 1; }
  int64_t forward_workspace() const {
    return conv.rows_in() * panel_row + conv.rows_out() * out_row + conv.stride * (width() + 64);
  }
  int64_t backward_workspace() const {
    const Conv back = conv.gradient();
    const int64_t turned = conv.in < conv::kTransposed ? 0 : (width() + 64) * (conv.in + 128);
    return (conv.rows_in() + 64) * panel_row + back.rows_in() * grad_row + back.rows_out() * out_row +
           2 * conv.stride * (width() + 64) + turned;
  }
};

template <typename T, int L, int NV, int MR>
struct Tile {
  using A = Act<T, L>;

  // Samples from .. from + count of channel c of the convolution's input: normalised, activated, zeros outside the signal.
  MVAT_INLINE void read(const Stage<T>& s, int64_t b, int64_t c, int64_t from, int64_t count, T* out) {
    const int64_t lo = std::clamp<int64_t>(-from, 0, count), hi = std::clamp<int64_t>(s.x.length - from, lo, count);
    const int64_t gate = s.activation == kGlu ? c + s.channels / 2 : c;
    std::fill_n(out, lo, T(0));
    A::row(s.activation, s.x.row(b, c) + from + lo, s.norm[c], s.x.row(b, gate) + from + lo, s.norm[gate], hi - lo, out + lo);
    std::fill(out + hi, out + count, T(0));
  }

  // The panel [rows_in, columns + taps - 1] of the tile at column t, the rest of its rows zero.
  MVAT_INLINE void pack(const Stage<T>& s, int64_t b, int64_t group, int64_t t, T* panel, T* scratch) {
    const Conv& conv = s.conv;
    const int64_t width = s.width(), start = conv.start(t);
    for (int64_t c = 0; c < conv.in; c++) {
      T* to = panel + c * s.panel_row;
      if (conv.phases_in() == 1) {
        read(s, b, group * conv.in + c, start, width, to);
      } else {
        read(s, b, group * conv.in + c, start, width * conv.stride, scratch);
        conv::split_phases(scratch, conv.stride, width, to, conv.in * s.panel_row);
      }
      for (int64_t r = 0; r < conv.phases_in(); r++)
        std::fill(to + r * conv.in * s.panel_row + width, to + r * conv.in * s.panel_row + s.panel_row, T(0));
    }
  }

  // The same of the output's gradient, as the input of the convolution that the gradient is.
  MVAT_INLINE void pack_gradient(const Stage<T>& s, const Conv& back, int64_t b, int64_t group, int64_t t, T* panel, T* scratch) {
    const int64_t width = s.width(), start = back.start(t);
    for (int64_t c = 0; c < back.in; c++) {
      T* to = panel + c * s.grad_row;
      if (back.phases_in() == 1) {
        read_padded(s.grad, b, group * back.in + c, start, width, to);
      } else {
        read_padded(s.grad, b, group * back.in + c, start, width * back.stride, scratch);
        conv::split_phases(scratch, back.stride, width, to, back.in * s.grad_row);
      }
      for (int64_t r = 0; r < back.phases_in(); r++)
        std::fill(to + r * back.in * s.grad_row + width, to + r * back.in * s.grad_row + s.grad_row, T(0));
    }
  }

  // moments: [groups * out], of y, or null.
  MVAT_INLINE void forward(const Stage<T>& s, int64_t b, int64_t group, int64_t t, T* workspace, Moments* moments) {
    const Conv& conv = s.conv;
    T *panel = workspace, *product = panel + conv.rows_in() * s.panel_row, *scratch = product + conv.rows_out() * s.out_row;
    pack(s, b, group, t, panel, scratch);
    conv::product<T, L, NV, MR>(conv, s.weight + group * s.conv.weight_size(), s.bias ? s.bias + group * conv.out : nullptr, panel,
                                s.panel_row, s.columns, product, s.out_row);
    for (int64_t o = 0; o < conv.out; o++) {
      int64_t from, count;
      const T* samples = conv::gathered(conv, o, t, s.columns, conv.length_out, product, s.out_row, scratch, from, count);
      if (count <= 0) continue;
      std::copy_n(samples, count, s.out.row(b, group * conv.out + o) + from);
      if (moments) {
        double mean, m2;
        A::moments(samples, count, mean, m2);
        moments[group * conv.out + o].add(double(count), mean, m2);
      }
    }
  }

  // d_weight [groups, weight_size], d_bias [groups * out] and sums [channels, 2] are added to; dz goes to s.out.
  MVAT_INLINE void backward(const Stage<T>& s, int64_t b, int64_t group, int64_t t, T* workspace, T* d_weight, double* d_bias,
                            double* sums) {
    const Conv &conv = s.conv, back = conv.gradient();
    T *panel = workspace, *grad = panel + (conv.rows_in() + 64) * s.panel_row, *product = grad + back.rows_in() * s.grad_row;
    T *scratch = product + back.rows_out() * s.out_row, *scratch2 = scratch + conv.stride * (s.width() + 64);
    T* turned = scratch2 + conv.stride * (s.width() + 64);
    const T* weight = s.weight + group * s.conv.weight_size();
    pack(s, b, group, t, panel, scratch);
    pack_gradient(s, back, b, group, t, grad, scratch);
    // Where the tile's own columns begin in the gradient's panel.
    const T* own = grad + (back.transposed ? back.taps() - 1 : 0);
    conv::weight_gradient<T, L, NV, MR>(conv, own, s.grad_row, panel, s.panel_row, s.columns, turned,
                                        d_weight + group * conv.weight_size());
    if (d_bias)
      for (int64_t o = 0; o < conv.out; o++)
        for (int64_t q = 0; q < conv.phases_out(); q++)
          d_bias[group * conv.out + o] += sum(own + (q * conv.out + o) * s.grad_row, s.columns);
    conv::product<T, L, NV, MR>(back, weight, nullptr, grad, s.grad_row, s.columns, product, s.out_row);
    for (int64_t i = 0; i < back.out; i++) {
      const int64_t c = group * back.out + i, gate = s.activation == kGlu ? c + s.channels / 2 : c;
      int64_t from, count;
      const T* samples = conv::gathered(back, i, t, s.columns, s.x.length, product, s.out_row, scratch2, from, count);
      if (count > 0)
        A::back(s.activation, samples, s.x.row(b, c) + from, s.norm[c], s.x.row(b, gate) + from, s.norm[gate], count,
                s.out.row(b, c) + from, s.out.row(b, gate) + from, sums + 2 * c, sums + 2 * gate);
    }
  }

  MVAT_INLINE double sum(const T* x, int64_t count) {
    conv::Sum<T, L> total;
    for (int64_t i = 0; i < count; i += L) total += conv::load_lanes<T, L>(x + i, count - i);
    return total.lanes();
  }
};

}  // namespace mvat::norm_act_conv
