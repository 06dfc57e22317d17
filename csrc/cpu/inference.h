// Whole blocks of the network for inference, tile by tile: batch norms are folded into the weights, and between a block's input
// and its output nothing leaves the second cache. conv.h has the products and how weights are packed.
#pragma once

#include "activation.h"
#include "conv.h"

namespace mvat::inference {

using conv::Conv;

inline Conv pointwise(int64_t in, int64_t out) { return {in, out, 1, 1, 0, false, 0, 0}; }

// What every block has: rows of a tile lie `row` apart, its first column is sample t.
struct Grid {
  int64_t columns, row, length;

  int64_t tiles() const { return (length + columns - 1) / columns; }
};

// y = act(conv(x)).
struct ConvAct {
  Grid grid;
  Conv conv;
  Activation activation;
  Features<const float> x;
  const float *weight, *bias;
  Features<float> y;

  int64_t width() const { return grid.columns + conv.taps() - 1; }
  int64_t workspace() const { return (conv.rows_in() + conv.rows_out() + 2 * conv.stride) * grid.row; }
};

// The Conformer block: y = relu(last silu(middle silu(depthwise glu(first x))) + shortcut x).
struct Conformer {
  Grid grid;
  int64_t in, out, kernel;
  Features<const float> x;
  const float *first, *first_bias, *depthwise, *depthwise_bias, *middle, *middle_bias, *last, *shortcut, *last_bias;
  Features<float> y;

  int64_t halo() const { return kernel / 2; }
  int64_t workspace() const { return (4 * in + 2 * out) * grid.row; }
};

// The end of a multi-view block: v = relu(3-wide conv of each view), y = relu(last gates(v)) + shortcut x + bias.
struct Merge {
  Grid grid;
  int64_t channels, view, hidden;
  Features<const float> x, views[3];
  const float *branches, *branches_bias, *gates, *gates_bias, *last, *last_bias, *shortcut, *shortcut_bias;
  Features<float> y;

  int64_t workspace() const { return (std::max(channels, view) + 3 * view + 3 * hidden + channels) * grid.row; }
};

template <int L, int NV, int MR>
struct Tile {
  using A = Act<float, L>;
  using V = typename Simd<float, L>::Vector;

  // A row of a tile's panel, zeros outside the signal and behind the panel.
  MVAT_INLINE void read(const Features<const float>& x, int64_t b, int64_t c, int64_t from, int64_t count, float* out, int64_t row) {
    read_padded(x, b, c, from, count, out);
    std::fill(out + count, out + row, 0.f);
  }

  MVAT_INLINE void product(const Conv& conv, const float* weight, const float* bias, const float* panel, const Grid& grid,
                           int64_t columns, float* out, bool add = false) {
    conv::product<float, L, NV, MR>(conv, weight, bias, panel, grid.row, columns, out, grid.row, add);
  }

  // rows of a tile: x = act(x) in place.
  template <Activation K>
  MVAT_INLINE void activate(float* x, int64_t rows, const Grid& grid, int64_t columns) {
    for (int64_t r = 0; r < rows; r++) A::template row<K>(x + r * grid.row, {}, nullptr, {}, columns, x + r * grid.row);
  }

  MVAT_INLINE void conv_act(const ConvAct& s, int64_t b, int64_t t, float* workspace) {
    const Conv& conv = s.conv;
    const int64_t row = s.grid.row, start = conv.start(t), width = s.width();
    float *panel = workspace, *out = panel + conv.rows_in() * row, *scratch = out + conv.rows_out() * row;
    for (int64_t c = 0; c < conv.in; c++) {
      if (conv.phases_in() == 1) {
        read(s.x, b, c, start, width, panel + c * row, row);
      } else {
        read(s.x, b, c, start, width * conv.stride, scratch, width * conv.stride);
        conv::split_phases(scratch, conv.stride, width, panel + c * row, conv.in * row);
        for (int64_t r = 0; r < conv.stride; r++)
          std::fill(panel + (r * conv.in + c) * row + width, panel + (r * conv.in + c + 1) * row, 0.f);
      }
    }
    product(conv, s.weight, s.bias, panel, s.grid, s.grid.columns, out);
    for (int64_t o = 0; o < conv.out; o++) {
      int64_t from, count;
      const float* samples = conv::gathered(conv, o, t, s.grid.columns, conv.length_out, out, row, scratch, from, count);
      if (count > 0) A::row(s.activation, samples, {}, nullptr, {}, count, s.y.row(b, o) + from);
    }
  }

  MVAT_INLINE void conformer(const Conformer& s, int64_t b, int64_t t, float* workspace) {
    const int64_t row = s.grid.row, halo = s.halo(), wide = s.grid.columns + 2 * halo, columns = s.grid.columns;
    const int64_t count = std::min(columns, s.grid.length - t);
    float *x = workspace, *two = x + s.in * row, *filtered = two + 2 * s.in * row, *middle = filtered + s.in * row;
    float* y = middle + s.out * row;
    for (int64_t c = 0; c < s.in; c++) read(s.x, b, c, t - halo, wide, x + c * row, row);
    product(pointwise(s.in, 2 * s.in), s.first, s.first_bias, x, s.grid, wide, two);
    const int64_t lo = std::clamp<int64_t>(halo - t, 0, wide), hi = std::clamp<int64_t>(s.grid.length + halo - t, lo, wide);
    const Conv filter{1, 1, s.kernel, 1, halo, false, 0, 0};
    for (int64_t c = 0; c < s.in; c++) {
      float* glu = two + c * row;
      A::template row<kGlu>(glu, {}, two + (s.in + c) * row, {}, wide, glu);
      std::fill_n(glu, lo, 0.f);  // the depthwise convolution's own padding
      std::fill(glu + hi, glu + row, 0.f);
      product(filter, s.depthwise + c * s.kernel, s.depthwise_bias + c, glu, s.grid, columns, filtered + c * row);
    }
    activate<kSilu>(filtered, s.in, s.grid, columns);
    product(pointwise(s.in, s.out), s.middle, s.middle_bias, filtered, s.grid, columns, middle);
    activate<kSilu>(middle, s.out, s.grid, columns);
    product(pointwise(s.out, s.out), s.last, s.last_bias, middle, s.grid, columns, y);
    product(pointwise(s.in, s.out), s.shortcut, nullptr, x + halo, s.grid, columns, y, true);
    for (int64_t o = 0; o < s.out; o++) A::template row<kRelu>(y + o * row, {}, nullptr, {}, count, s.y.row(b, o) + t);
  }

  MVAT_INLINE void merge(const Merge& s, int64_t b, int64_t t, float* workspace) {
    const int64_t row = s.grid.row, columns = s.grid.columns, count = std::min(columns, s.grid.length - t);
    float *panel = workspace, *merged = panel + std::max(s.channels, s.view) * row, *two = merged + 3 * s.view * row;
    float *gated = two + 2 * s.hidden * row, *y = gated + s.hidden * row;
    const Conv branch{s.view, s.view, 3, 1, 1, false, 0, 0};
    for (int64_t i = 0; i < 3; i++) {
      for (int64_t c = 0; c < s.view; c++) read(s.views[i], b, c, t - 1, columns + 2, panel + c * row, row);
      product(branch, s.branches + i * branch.weight_size(), s.branches_bias + i * s.view, panel, s.grid, columns,
              merged + i * s.view * row);
    }
    activate<kRelu>(merged, 3 * s.view, s.grid, columns);
    product(pointwise(3 * s.view, 2 * s.hidden), s.gates, s.gates_bias, merged, s.grid, columns, two);
    for (int64_t h = 0; h < s.hidden; h++)
      for (int64_t i = 0; i < columns; i += L) {
        const V first = conv::load_lanes<float, L>(two + h * row + i, L);
        const V second = conv::load_lanes<float, L>(two + (s.hidden + h) * row + i, L);
        conv::store_lanes<float, L>(A::tanh(first) * A::sigmoid(second), gated + h * row + i, L);
      }
    product(pointwise(s.hidden, s.channels), s.last, s.last_bias, gated, s.grid, columns, y);
    for (int64_t c = 0; c < s.channels; c++) {
      float* to = y + c * row;
      for (int64_t i = 0; i < columns; i += L) {
        const V v = conv::load_lanes<float, L>(to + i, L);
        conv::store_lanes<float, L>((v < 0.f ? V{} : v) + s.shortcut_bias[c], to + i, L);
      }
      read(s.x, b, c, t, columns, panel + c * row, row);
    }
    product(pointwise(s.channels, s.channels), s.shortcut, nullptr, panel, s.grid, columns, y, true);
    for (int64_t c = 0; c < s.channels; c++) std::copy_n(y + c * row, count, s.y.row(b, c) + t);
  }
};

}  // namespace mvat::inference
