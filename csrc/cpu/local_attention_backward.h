// The gradient of the depthwise half of the local view, on the CPU: in two readings, since norm1's gradient needs two sums over
// everything before any part of it is known. Both compute the convolution anew. See local_attention.h for the blocks in lanes.
#pragma once

#include "local_attention.h"

namespace local_attention {

// From chunks [P, S] to a group's rows of lanes, zeros where a lane has no chunk; the inverse of to_chunks.
template <typename T, typename In>
MVAT_INLINE void from_chunks(int64_t chunks, int64_t half, const In* in, int64_t chunk, int64_t at, T* turned, T* rows) {
  for (int64_t l = 0; l < kBlocks; l++) {
    T* target = turned + l * half;
    if (chunk + l < 0 || chunk + l >= chunks) {
      std::fill_n(target, half, T(0));
      continue;
    }
    const In* source = in + (chunk + l) * 2 * half + at;
    for (int64_t i = 0; i < half; i++) target[i] = T(source[i]);
  }
  transpose(turned, half, kBlocks, half, rows, kBlocks);
}

// The gradients of maximum and mean and the maximum's channel of a group: values holds the maxima of first and second halves,
// then the means.
template <typename T>
MVAT_INLINE void stage_gradients(const View<T>& view, int64_t block, const T* pooled, const int32_t* index,
                                 Workspace<T>& space) {
  const int64_t plane = view.chunks * view.chunk_length();
  for (int64_t second = 0; second < 2; second++) {
    const int64_t chunk = block - second, at = second * view.half;
    T *values = space.values.get() + second * space.size, *turned = space.turned.get();
    from_chunks(view.chunks, view.half, pooled, chunk, at, turned, values);
    from_chunks(view.chunks, view.half, pooled + plane, chunk, at, turned, values + 2 * space.size);
    from_chunks(view.chunks, view.half, index, chunk, at, space.turned_index.get(), space.index.get() + second * space.size);
  }
}

// The gradients of v = norm1(u) at I rows from `values` on in place of u - mean, which moves to `centred`.
template <int I, int L, typename T>
MVAT_INLINE void slopes(typename Lanes<T, L>::Vector (&u)[I][kBlocks / L], Affine<T> norm, int64_t c, const T* maximum,
                        const T* mean, const typename Lanes<T, L>::Int* index,
                        typename Lanes<T, L>::Vector (&centred)[I][kBlocks / L]) {
  using V = typename Lanes<T, L>::Vector;
  using M = typename Lanes<T, L>::Mask;
  constexpr int N = kBlocks / L, G = std::min(4, I * N);
  MVAT_UNROLL for (int i = 0; i < I * N; i += G) {
    V v[G], power[G];
    MVAT_UNROLL for (int g = 0; g < G; g++) v[g] = u[(i + g) / N][(i + g) % N] - norm.mean;
    MVAT_UNROLL for (int g = 0; g < G; g++) centred[(i + g) / N][(i + g) % N] = v[g];
    MVAT_UNROLL for (int g = 0; g < G; g++) v[g] = v[g] * norm.scale + norm.bias;
    exp_minus<L>(v, power);
    MVAT_UNROLL for (int g = 0; g < G; g++) {
      const V gate = 1 / (1 + power[g]);
      v[g] = gate * (1 + v[g] * (power[g] * gate));  // 1 - gate would cancel
    }
    MVAT_UNROLL for (int g = 0; g < G; g++) {
      const int64_t at = (i + g) * L;
      const M place = M(*reinterpret_cast<const typename Lanes<T, L>::LooseMask*>(index + at));
      const M chosen = place == typename Lanes<T, L>::Int(c);
      u[(i + g) / N][(i + g) % N] = v[g] * (load<L>(mean + at) + V(M(load<L>(maximum + at)) & chosen));
    }
  }
}

// ---- first reading: a channel's sums of dv and of dv (u - mean), of one group ----

template <int I, int L, typename T>
MVAT_INLINE void sums_tile(const View<T>& view, const T* rows, int64_t c, int64_t i, Workspace<T>& space,
                           typename Lanes<T, L>::Vector (&sums)[2]) {
  typename Lanes<T, L>::Vector u[2][I][kBlocks / L], centred[I][kBlocks / L];
  convolve<I, L>(rows, view.weight + c * view.taps, view.taps, i, view.half, u[0], u[1]);
  const Affine<T> norm(view, c);
  const int64_t size = space.size;
  const T* values = space.values.get() + i * kBlocks;
  const auto* index = space.index.get() + i * kBlocks;
  MVAT_UNROLL for (int s = 0; s < 2; s++) {
    slopes<I, L>(u[s], norm, c, values + s * size, values + (2 + s) * size, index + s * size, centred);
    MVAT_UNROLL for (int r = 0; r < I; r++) {
      MVAT_UNROLL for (int n = 0; n < kBlocks / L; n++) {
        sums[0] += u[s][r][n];
        sums[1] += u[s][r][n] * centred[r][n];
      }
    }
  }
}

template <int I, int L, typename T>
MVAT_INLINE void sums_body(const View<T>& view, int64_t block, const T* pooled, const int32_t* index, Workspace<T>& space,
                           double* sum, double* product) {
  T* rows = first_row(space.staged.get());
  stage_gradients(view, block, pooled, index, space);
  for (int64_t c = 0; c < view.channels; c++) {
    stage(view, c, block, rows, space.line.get());
    typename Lanes<T, L>::Vector sums[2] = {};
    int64_t i = 0;
    for (; i + I <= view.half; i += I) sums_tile<I, L>(view, rows, c, i, space, sums);
    for (; i < view.half; i++) sums_tile<1, L>(view, rows, c, i, space, sums);
    sum[c] = sum_lanes<L>(sums[0]);
    product[c] = sum_lanes<L>(sums[1]);
  }
}

// ---- second reading: the gradients of x and of the weights ----

// What the second reading takes and gives beside the view. du = scale dv - constant - linear (u - mean).
template <typename T>
struct Gradients {
  const T *constant, *linear;  // [n]
  const T* pooled;             // of the clip
  const int32_t* index;
  const T *grad, *mask;  // of y [n, T], and [T]
  int64_t grad_stride;
  T* dx;  // [n, T]
};

template <int I, int L, typename T>
MVAT_INLINE void slopes_tile(const View<T>& view, const T* rows, int64_t c, int64_t i, Workspace<T>& space,
                             const T (&constant)[2][kBlocks], const T (&linear)[2][kBlocks]) {
  typename Lanes<T, L>::Vector u[2][I][kBlocks / L], centred[I][kBlocks / L];
  convolve<I, L>(rows, view.weight + c * view.taps, view.taps, i, view.half, u[0], u[1]);
  const Affine<T> norm(view, c);
  const int64_t size = space.size;
  const T* values = space.values.get() + i * kBlocks;
  const auto* index = space.index.get() + i * kBlocks;
  T *first = first_row(space.first.get()), *second = first_row(space.second.get()), *both = first_row(space.both.get());
  MVAT_UNROLL for (int s = 0; s < 2; s++) {
    slopes<I, L>(u[s], norm, c, values + s * size, values + (2 + s) * size, index + s * size, centred);
    MVAT_UNROLL for (int r = 0; r < I; r++) {
      MVAT_UNROLL for (int n = 0; n < kBlocks / L; n++) {
        u[s][r][n] = norm.scale * u[s][r][n] - load<L>(constant[s] + n * L) - centred[r][n] * load<L>(linear[s] + n * L);
      }
    }
  }
  MVAT_UNROLL for (int r = 0; r < I; r++) {
    MVAT_UNROLL for (int n = 0; n < kBlocks / L; n++) {
      const int64_t row = (i + r) * kRow + n * L;
      store<L>(first + row, u[0][r][n]);
      store<L>(second + row, u[1][r][n]);
      store<L>(both + row, u[0][r][n] + u[1][r][n]);
    }
  }
}

// The transposed convolution: into block j from both chunks within it, from block j - 1 and from block j + 1.
template <int I, int L, typename T>
MVAT_INLINE void input_tile(const View<T>& view, const T* flipped, int64_t i, Workspace<T>& space, T* out) {
  typename Lanes<T, L>::Vector acc[I][kBlocks / L] = {};
  const int64_t from = i - view.taps / 2;
  correlate<I, L>(acc, first_row(space.both.get()), flipped, view.taps, from, view.half);
  correlate<I, L>(acc, first_row(space.first.get()) - 1, flipped, view.taps, from + view.half, view.half);
  correlate<I, L>(acc, first_row(space.second.get()) + 1, flipped, view.taps, from - view.half, view.half);
  MVAT_UNROLL for (int r = 0; r < I; r++) {
    MVAT_UNROLL for (int n = 0; n < kBlocks / L; n++) store<L>(out + (i + r) * kBlocks + n * L, acc[r][n]);
  }
}

// The first and the last lane belong to the neighbouring groups.
template <int L, typename T>
MVAT_INLINE typename Lanes<T, L>::Vector own_lanes(const typename Lanes<T, L>::Vector (&acc)[kBlocks / L]) {
  auto first = acc[0], last = acc[kBlocks / L - 1];
  if constexpr (L == kBlocks) {
    first[0] = first[L - 1] = 0;
    return first;
  } else {
    first[0] = 0;
    last[L - 1] = 0;
    auto total = first + last;
    MVAT_UNROLL for (int n = 1; n < kBlocks / L - 1; n++) total += acc[n];
    return total;
  }
}

// total[k] += the sums over positions and lanes of (gradient of the output) * (input k - taps / 2 further), in lanes.
template <int I, int L, typename T>
MVAT_INLINE void weight_tiles(const View<T>& view, const T* rows, Workspace<T>& space, T* total) {
  for (int64_t k = 0; k < view.taps; k += I) {
    typename Lanes<T, L>::Vector acc[I][kBlocks / L] = {};
    const int64_t from = k - view.taps / 2, h = view.half;
    correlate<I, L, false>(acc, rows, first_row(space.both.get()), h, from, h);
    correlate<I, L, false>(acc, rows - 1, first_row(space.second.get()), h, from + h, h);
    correlate<I, L, false>(acc, rows + 1, first_row(space.first.get()), h, from - h, h);
    MVAT_UNROLL for (int r = 0; r < I; r++) {
      if (k + r < view.taps) {
        T* sum = total + (k + r) * kBlocks;
        store<L>(sum, load<L>(sum) + own_lanes<L, T>(acc[r]));
      }
    }
  }
}

// The group whose lanes 1 to kBlocks - 2 it owns: those two more are computed for what they hand to their neighbours.
template <int I, int L, typename T>
MVAT_INLINE void gradients_body(const View<T>& view, int64_t block, const Gradients<T>& with, Workspace<T>& space, T* weights) {
  T *rows = first_row(space.staged.get()), *out = space.out.get(), *turned = space.turned.get(), *flipped = space.flipped.get();
  const int64_t h = view.half;
  stage_gradients(view, block, with.pooled, with.index, space);
  for (int64_t c = 0; c < view.channels; c++, weights += view.taps * kBlocks) {
    stage(view, c, block, rows, space.line.get());
    T constant[2][kBlocks], linear[2][kBlocks];
    for (int64_t s = 0; s < 2; s++) {
      lanes_of(view, block - s, with.constant[c], constant[s]);
      lanes_of(view, block - s, with.linear[c], linear[s]);
    }
    int64_t i = 0;
    for (; i + I <= h; i += I) slopes_tile<I, L>(view, rows, c, i, space, constant, linear);
    for (; i < h; i++) slopes_tile<1, L>(view, rows, c, i, space, constant, linear);
    weight_tiles<I, L>(view, rows, space, weights);
    for (int64_t k = 0; k < view.taps; k++) flipped[k] = view.weight[c * view.taps + view.taps - 1 - k];
    for (i = 0; i + I <= h; i += I) input_tile<I, L>(view, flipped, i, space, out);
    for (; i < h; i++) input_tile<1, L>(view, flipped, i, space, out);
    transpose(out, kBlocks, h, kBlocks, turned, h);
    const int64_t start = view.start(block), begin = std::max<int64_t>(start + h, 0);
    const int64_t end = std::min(start + (kBlocks - 1) * h, view.length);
    const T* grad = with.grad + c * with.grad_stride;
    T* dx = with.dx + c * view.length;
    for (int64_t t = begin; t < end; t++) dx[t] = turned[t - start] + grad[t] * with.mask[t];
  }
}

}  // namespace local_attention
