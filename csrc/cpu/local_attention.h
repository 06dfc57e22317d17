// The depthwise half of the local view, on the CPU: everything that is done once a channel.
//
// The padded signal is cut into blocks of h = S / 2 samples. Chunk p is block p and block p + 1, and the convolution of a chunk
// that ends at the chunk's own ends falls apart into
//     first half of chunk j  = within(j) + right(j),       right: the taps that reach from block j into block j + 1
//     second half of chunk j - 1 = within(j) + left(j),    left: those that reach from block j into block j - 1
// so that within(j), by far the most of it, is computed once for both: one multiply-add a tap and sample of the signal, half of
// what the chunks cost apart. The vectors' lanes are neighbouring blocks, their rows the h positions in a block: any number of
// taps, any h and any number of channels run the same loops. A group of kBlocks blocks and all channels keeps the maximum and
// the sum over channels in the first-level cache.
#pragma once

#include <algorithm>
#include <limits>

#include "vector.h"

namespace local_attention {

constexpr int64_t kBlocks = 16;           // blocks in a group
constexpr int64_t kRow = kBlocks + 8;     // a row of lanes: block -1 at -1, blocks 0 to 15, block 16 in the next row's gap
constexpr int64_t kEdge = 7;              // rows of zeros above and below a group's rows: a tile's rows - 1, at most

// The features of one clip and the parameters, as the kernels read them.
template <typename T>
struct View {
  int64_t channels, length, half, chunks, taps;
  const T* x;  // samples side by side
  int64_t stride;  // between channels
  const T* weight;  // [n, taps]
  const T *mean, *scale, *bias;  // v = (u - mean) * scale + bias, [n]

  int64_t chunk_length() const { return 2 * half; }
  int64_t groups() const { return (chunks + kBlocks) / kBlocks; }  // of the chunks + 1 blocks
  int64_t start(int64_t block) const { return (block - 2) * half; }  // the sample at which a block starts
};

// Rows of lanes for `half` positions, with zeros around them.
inline int64_t rows_size(int64_t half) { return (half + 2 * kEdge) * kRow + 16; }
template <typename T>
T* first_row(T* rows) { return rows + kEdge * kRow + 8; }

// Four rows of four become four columns.
template <typename T>
MVAT_INLINE void transpose4(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
#if !defined(__clang__) && __GNUC__ < 12  // has no __builtin_shufflevector
  for (int64_t r = 0; r < 4; r++)
    for (int64_t c = 0; c < 4; c++) out[c * out_stride + r] = in[r * in_stride + c];
#else
  using V = typename Lanes<T, 4>::Vector;
  const V a = load<4>(in), b = load<4>(in + in_stride), c = load<4>(in + 2 * in_stride), d = load<4>(in + 3 * in_stride);
  const V ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const V ef = __builtin_shufflevector(a, b, 2, 6, 3, 7), gh = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  store<4>(out, V(__builtin_shufflevector(ab, cd, 0, 1, 4, 5)));
  store<4>(out + out_stride, V(__builtin_shufflevector(ab, cd, 2, 3, 6, 7)));
  store<4>(out + 2 * out_stride, V(__builtin_shufflevector(ef, gh, 0, 1, 4, 5)));
  store<4>(out + 3 * out_stride, V(__builtin_shufflevector(ef, gh, 2, 3, 6, 7)));
#endif
}

// out[c][r] = in[r][c] for `rows` x `columns`.
template <typename T>
MVAT_INLINE void transpose(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out, int64_t out_stride) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) transpose4(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
    for (; c < columns; c++)
      for (int64_t i = r; i < r + 4; i++) out[c * out_stride + i] = in[i * in_stride + c];
  }
  for (; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) out[c * out_stride + r] = in[r * in_stride + c];
}

// Samples [start, start + count) of one channel, zeros outside the signal: in place where all are inside, else in `line`.
template <typename T>
MVAT_INLINE const T* samples(const View<T>& view, int64_t channel, int64_t start, int64_t count, T* line) {
  const T* x = view.x + channel * view.stride;
  if (start >= 0 && start + count <= view.length) return x + start;
  const int64_t begin = std::max<int64_t>(start, 0), end = std::min(start + count, view.length);
  std::fill_n(line, count, T(0));
  if (begin < end) std::copy(x + begin, x + end, line + begin - start);
  return line;
}

// The blocks block - 1 to block + kBlocks of one channel as rows of lanes.
template <typename T>
MVAT_INLINE void stage(const View<T>& view, int64_t channel, int64_t block, T* rows, T* line) {
  const int64_t h = view.half;
  const T* x = samples(view, channel, view.start(block - 1), (kBlocks + 2) * h, line);
  // The next channel's samples are elsewhere: no hardware guesses them.
  if (channel + 1 < view.channels && x != line) {
    for (int64_t i = 0; i < (kBlocks + 2) * h; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + view.stride + i);
  }
  transpose(x + h, h, kBlocks, h, rows, kRow);
  for (int64_t i = 0; i < h; i++) rows[i * kRow - 1] = x[i];
  for (int64_t i = 0; i < h; i++) rows[i * kRow + kBlocks] = x[(kBlocks + 1) * h + i];
}

// What row k is multiplied by: one weight for all lanes, or a row of lanes itself.
template <bool Broadcast, int L, typename T>
MVAT_INLINE auto factor(const T* weight, int64_t k, int n) {
  if constexpr (Broadcast) return weight[k];
  else return load<L>(weight + k * kRow + n * L);
}

// acc[i] += sum over k < count of weight[k] * rows[first + i + k], over those k that reach a row in [0, half) from one of the
// tile's rows at least: the others' zeros stand in the edges.
template <int I, int L, bool Broadcast = true, typename T>
MVAT_INLINE void correlate(typename Lanes<T, L>::Vector (&acc)[I][kBlocks / L], const T* rows, const T* weight, int64_t count,
                           int64_t first, int64_t half) {
  constexpr int N = kBlocks / L;
  int64_t k = std::max<int64_t>(0, 1 - I - first);
  const int64_t end = std::min(count, half - first);
  const T* in = rows + (first + k) * kRow;
  for (; k + 2 <= end; k += 2, in += 2 * kRow) {
    asm volatile("" ::: "memory");  // rows kept from one step to the next would push the sums out of the registers
    decltype(factor<Broadcast, L>(weight, k, 0)) w0[N], w1[N];
    MVAT_UNROLL for (int n = 0; n < N; n++) {
      w0[n] = factor<Broadcast, L>(weight, k, n);
      w1[n] = factor<Broadcast, L>(weight, k + 1, n);
      acc[0][n] += w0[n] * load<L>(in + n * L);
    }
    MVAT_UNROLL for (int i = 1; i < I; i++) {
      MVAT_UNROLL for (int n = 0; n < N; n++) {
        auto row = load<L>(in + i * kRow + n * L);
        MVAT_KEEP(row);
        acc[i - 1][n] += w1[n] * row;
        acc[i][n] += w0[n] * row;
      }
    }
    MVAT_UNROLL for (int n = 0; n < N; n++) acc[I - 1][n] += w1[n] * load<L>(in + I * kRow + n * L);
  }
  if (k < end) {
    MVAT_UNROLL for (int i = 0; i < I; i++) {
      MVAT_UNROLL for (int n = 0; n < N; n++) {
        acc[i][n] += factor<Broadcast, L>(weight, k, n) * load<L>(in + i * kRow + n * L);
      }
    }
  }
}

// The convolution at the I positions from i on: of the chunks that start with a block, and of those that end with it.
template <int I, int L, typename T>
MVAT_INLINE void convolve(const T* rows, const T* weight, int64_t taps, int64_t i, int64_t half,
                          typename Lanes<T, L>::Vector (&first)[I][kBlocks / L],
                          typename Lanes<T, L>::Vector (&second)[I][kBlocks / L]) {
  const int64_t from = i - taps / 2;
  MVAT_UNROLL for (int r = 0; r < I; r++) {
    MVAT_UNROLL for (int n = 0; n < kBlocks / L; n++) second[r][n] = typename Lanes<T, L>::Vector{};
  }
  correlate<I, L>(second, rows, weight, taps, from, half);
  MVAT_UNROLL for (int r = 0; r < I; r++) {
    MVAT_UNROLL for (int n = 0; n < kBlocks / L; n++) first[r][n] = second[r][n];
  }
  correlate<I, L>(first, rows + 1, weight, taps, from - half, half);
  correlate<I, L>(second, rows - 1, weight, taps, from + half, half);
}

// How many of a group's chunk halves are there: the first group lacks the second half of "chunk -1", the last group what lies
// behind the last chunk.
template <typename T>
int64_t halves(const View<T>& view, int64_t block) {
  const int64_t firsts = std::min(kBlocks, view.chunks - block);
  const int64_t seconds = std::min(kBlocks, view.chunks + 1 - block) - (block == 0);
  return std::max<int64_t>(firsts, 0) + seconds;
}

// out[lane] = value where that lane's chunk is there, else 0. The chunk of lane 0 is `chunk`.
template <typename T>
MVAT_INLINE void lanes_of(const View<T>& view, int64_t chunk, T value, T* out) {
  for (int64_t l = 0; l < kBlocks; l++) out[l] = chunk + l >= 0 && chunk + l < view.chunks ? value : T(0);
}

// What a thread needs beside its results; the second line of members is the backward pass's.
template <typename T>
struct Workspace {
  using Int = typename Lanes<T, 4>::Int;
  const int64_t size;  // of a group's rows without edges
  Scratch<T> line, staged, values, turned;
  Scratch<Int> index, turned_index;
  Scratch<T> first, second, both, out, flipped;

  Workspace(int64_t half, int64_t taps, bool backward)
      : size(half * kBlocks), line((kBlocks + 2) * half), staged(rows_size(half)), values(4 * size), turned(size),
        index(2 * size), turned_index(backward ? size : 0), first(backward ? rows_size(half) : 0),
        second(backward ? rows_size(half) : 0), both(backward ? rows_size(half) : 0), out(backward ? size : 0),
        flipped(backward ? taps : 0) {}
};

// ---- statistics of the convolution's output, of one group of blocks: mean and M2 a channel ----

template <int I, int L, typename T>
MVAT_INLINE void outputs(const View<T>& view, const T* rows, const T* weight, int64_t i, T* first, T* second) {
  typename Lanes<T, L>::Vector f[I][kBlocks / L], s[I][kBlocks / L];
  convolve<I, L>(rows, weight, view.taps, i, view.half, f, s);
  MVAT_UNROLL for (int r = 0; r < I; r++) {
    MVAT_UNROLL for (int n = 0; n < kBlocks / L; n++) {
      store<L>(first + (i + r) * kBlocks + n * L, f[r][n]);
      store<L>(second + (i + r) * kBlocks + n * L, s[r][n]);
    }
  }
}

// The sum of (values - mean)^2, and with a mean of 0 and Square = false the sum of the values.
template <bool Square, int L, typename T>
MVAT_INLINE double moment(const T* values, int64_t count, const T* mean) {
  typename Lanes<T, L>::Vector total[4] = {};
  static_assert(kBlocks % L == 0);
  for (int64_t i = 0; i < count; i += kBlocks) {
    MVAT_UNROLL for (int n = 0; n < kBlocks / L; n++) {
      const auto v = load<L>(values + i + n * L) - load<L>(mean + n * L);
      total[n % 4] += Square ? v * v : v;
    }
  }
  return sum_lanes<L>((total[0] + total[1]) + (total[2] + total[3]));
}

template <int I, int L, typename T>
MVAT_INLINE void statistics_body(const View<T>& view, int64_t block, Workspace<T>& space, double* mean, double* m2) {
  T *rows = first_row(space.staged.get()), *first = space.values.get(), *second = first + space.size;
  const double count = double(halves(view, block) * view.half);
  for (int64_t c = 0; c < view.channels; c++) {
    stage(view, c, block, rows, space.line.get());
    const T* weight = view.weight + c * view.taps;
    int64_t i = 0;
    for (; i + I <= view.half; i += I) outputs<I, L>(view, rows, weight, i, first, second);
    for (; i < view.half; i++) outputs<1, L>(view, rows, weight, i, first, second);
    // A lane without its chunk convolves silence: it adds nothing to the sum, and nothing to M2 about a mean of 0.
    T zero[kBlocks] = {}, about[kBlocks];
    mean[c] = (moment<false, L>(first, space.size, zero) + moment<false, L>(second, space.size, zero)) / count;
    const T rounded = T(mean[c]);
    lanes_of(view, block, rounded, about);
    m2[c] = moment<true, L>(first, space.size, about);
    lanes_of(view, block - 1, rounded, about);
    m2[c] += moment<true, L>(second, space.size, about);
    m2[c] -= count * (mean[c] - rounded) * (mean[c] - rounded);  // about the rounded mean, which is an ulp away at most
  }
}

// ---- maximum, its channel, and mean over the channels of silu(norm1(convolution)), of one group of blocks ----

// One channel's factors of norm1: v = (u - mean) * scale + bias.
template <typename T>
struct Affine {
  T mean, scale, bias;
  Affine(const View<T>& view, int64_t c) : mean(view.mean[c]), scale(view.scale[c]), bias(view.bias[c]) {}
};

template <int I, int L, typename T>
MVAT_INLINE void pool_rows(const typename Lanes<T, L>::Vector (&u)[I][kBlocks / L], Affine<T> norm, int64_t c, T* maximum,
                           T* sum, typename Lanes<T, L>::Int* index) {
  using V = typename Lanes<T, L>::Vector;
  using M = typename Lanes<T, L>::Mask;
  constexpr int N = kBlocks / L, G = std::min(4, I * N);
  const M channel = M{} + typename Lanes<T, L>::Int(c);
  MVAT_UNROLL for (int i = 0; i < I * N; i += G) {
    V v[G], a[G];
    MVAT_UNROLL for (int g = 0; g < G; g++) v[g] = u[(i + g) / N][(i + g) % N] - norm.mean;
    MVAT_UNROLL for (int g = 0; g < G; g++) v[g] = v[g] * norm.scale + norm.bias;
    exp_minus<L>(v, a);
    MVAT_UNROLL for (int g = 0; g < G; g++) a[g] = v[g] / (1 + a[g]);
    MVAT_UNROLL for (int g = 0; g < G; g++) {
      // A NaN goes its way through the mean.
      const int64_t at = (i + g) * L;
      const V former = load<L>(maximum + at);
      const M better = a[g] > former;
      auto* place = reinterpret_cast<typename Lanes<T, L>::LooseMask*>(index + at);
      store<L>(maximum + at, better ? a[g] : former);
      *place = better ? channel : M(*place);
      store<L>(sum + at, load<L>(sum + at) + a[g]);
    }
  }
}

template <int I, int L, typename T>
MVAT_INLINE void pool_tile(const View<T>& view, const T* rows, int64_t c, int64_t i, Workspace<T>& space) {
  typename Lanes<T, L>::Vector f[I][kBlocks / L], s[I][kBlocks / L];
  convolve<I, L>(rows, view.weight + c * view.taps, view.taps, i, view.half, f, s);
  const Affine<T> norm(view, c);
  const int64_t size = space.size;
  T* values = space.values.get() + i * kBlocks;
  auto* index = space.index.get() + i * kBlocks;
  pool_rows<I, L>(f, norm, c, values, values + 2 * size, index);
  pool_rows<I, L>(s, norm, c, values + size, values + 3 * size, index + size);
}

// From a group's rows of lanes to the chunks [P, S] they belong to; the chunk of lane 0 is `chunk`, `at` the position in it.
template <typename T, typename Out>
MVAT_INLINE void to_chunks(const View<T>& view, const T* rows, int64_t row, int64_t chunk, int64_t at, T* turned, T factor,
                           Out* out) {
  const int64_t h = view.half;
  transpose(rows, row, h, kBlocks, turned, h);
  for (int64_t l = std::max<int64_t>(0, -chunk); l < std::min(kBlocks, view.chunks - chunk); l++) {
    Out* target = out + (chunk + l) * view.chunk_length() + at;
    for (int64_t i = 0; i < h; i++) target[i] = Out(turned[l * h + i] * factor);
  }
}

template <int I, int L, typename T>
MVAT_INLINE void pool_body(const View<T>& view, int64_t block, Workspace<T>& space, T* pooled, int32_t* index) {
  T* rows = first_row(space.staged.get());
  const int64_t size = space.size, plane = view.chunks * view.chunk_length();
  T* values = space.values.get();  // maxima of first and second halves, then sums
  std::fill_n(values, 2 * size, -std::numeric_limits<T>::infinity());
  std::fill_n(values + 2 * size, 2 * size, T(0));
  std::fill_n(space.index.get(), 2 * size, 0);
  for (int64_t c = 0; c < view.channels; c++) {
    stage(view, c, block, rows, space.line.get());
    int64_t i = 0;
    for (; i + I <= view.half; i += I) pool_tile<I, L>(view, rows, c, i, space);
    for (; i < view.half; i++) pool_tile<1, L>(view, rows, c, i, space);
  }
  for (int64_t second = 0; second < 2; second++) {
    const int64_t chunk = block - second, at = second * view.half;
    const T* half = values + second * size;
    T* turned = space.turned.get();
    to_chunks(view, half, kBlocks, chunk, at, turned, T(1), pooled);
    to_chunks(view, half + 2 * size, kBlocks, chunk, at, turned, T(1) / T(view.channels), pooled + plane);
    const auto* found = space.index.get() + second * size;
    for (int64_t l = std::max<int64_t>(0, -chunk); l < std::min(kBlocks, view.chunks - chunk); l++)
      for (int64_t i = 0; i < view.half; i++)
        index[(chunk + l) * view.chunk_length() + at + i] = int32_t(found[i * kBlocks + l]);
  }
}

}  // namespace local_attention
