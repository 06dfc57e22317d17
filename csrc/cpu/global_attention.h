// The tile of queries that global_attention works on, forward and backward, for one instruction set.
//
// Keys and values are the windows of the padded signal, and neighbouring windows share half their samples: chunk k is the pair
// of blocks (b_k, b_k+1). A query's scores q1.b_k + q2.b_k+1 are therefore a two-tap filter over blocks, and three of its outputs
// take four products of half width instead of six (Winograd's F(3, 2)):
//     t0 = b0 - b2, t1 = b1 + b2, t2 = b2 - b1, t3 = b3 - b1               of the blocks b0 .. b3 of three keys, a "triple"
//     g0 = q1, g1 = (q1 + q2) / 2, g2 = (q1 - q2) / 2, g3 = q2             of the query
//     score0 = t0.g0 + t1.g1 + t2.g2, score1 = t1.g1 - t2.g2, score2 = t1.g1 + t2.g2 + t3.g3
// The weighted sum of values and all products of the backward pass are this one or its transpose, so every product costs two
// thirds of its plain form. The points 0, 1, -1 keep the rounding error within that of the plain sum times sqrt(2).
//
// Blocking: queries lie in the lanes (L * NV of them), keys are broadcast; everything is transposed, so softmax's statistics need
// no shuffles. A tile of scores has four rows a triple: three scores, and a spare row that turns them into the weights
//     w0 = p0, w1 = p0 + p1 + p2, w2 = p0 - p1 + p2, w3 = p2               of t0 .. t3 in the transposed product.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"

namespace mvat::global_attention {

constexpr double kLn2 = 0.6931471805599453;

// x [B, n, T] in place, whatever its strides.
template <typename T>
struct Signal {
  const T* data;
  int64_t batch_stride, channel_stride, stride;
};

struct Shape {
  int64_t sequences, channels, length;  // B * n, n, T
  int64_t heads, half, padded;          // h = segment_len / 2, and rounded up to whole vectors: the width of every block here
  int64_t chunks, triples;              // P; ceil(P / 3) rounded up to whole row blocks

  int64_t width() const { return 2 * padded; }
  int64_t key_size() const { return triples * 4 * padded; }  // of one sequence
};

template <typename T>
struct Forward {
  Shape shape;
  Signal<T> x;
  const T *keys, *a, *m;  // [sequences, triples, 4, padded]; [heads, width, width], a in base 2
  T *y, *edges;           // [sequences, T]; [tiles, half]: what a tile gives to the next one's first block
  T *softmax, *mixed;     // [sequences, heads, P, 2]: the maximum, in base 2, and the sum; [sequences, heads, P, 2 half]; or null
};

template <typename T>
struct Backward {
  Shape shape;
  Signal<T> x, grad;
  const T *keys, *a, *m, *softmax, *mixed;
};

// Where the gradients of one part of the queries are added up.
template <typename T>
struct Gradients {
  T *keys, *blocks, *a, *m;  // [triples, 4, padded], [P + 1, padded], [heads, width, width] twice
};

// Block k of the padded signal, samples (k - 2) h ..., times a scale, to out[c * step].
template <typename T>
MVAT_INLINE void read_block(const Shape& shape, const Signal<T>& x, int64_t sequence, int64_t k, T scale, T* out, int64_t step) {
  const int64_t half = shape.half, start = (k - 2) * half;
  const T* source = x.data + sequence / shape.channels * x.batch_stride + sequence % shape.channels * x.channel_stride;
  const int64_t from = std::clamp<int64_t>(-start, 0, half), to = std::clamp<int64_t>(shape.length - start, from, half);
  for (int64_t c = 0; c < from; c++) out[c * step] = 0;
  for (int64_t c = from; c < to; c++) out[c * step] = scale * source[(start + c) * x.stride];
  for (int64_t c = to; c < half; c++) out[c * step] = 0;
}

// L lanes, NV vectors of queries, MR broadcast rows in a register block, key tiles of TJ triples.
template <typename T, int L, int NV, int MR, int TJ>
struct Tile {
  using Vector = typename Simd<T, L>::Vector;
  using Memory = typename Simd<T, L>::Memory;
  static constexpr int64_t kQueries = L * NV;
  static constexpr int64_t kBlocks = kQueries + L;  // one more block than queries, in whole vectors

  static_assert(TJ % MR == 0);

  MVAT_INLINE void load(Vector (&acc)[MR][NV], const T* from, int64_t row) {
    MVAT_UNROLL for (int r = 0; r < MR; r++)
      MVAT_UNROLL for (int v = 0; v < NV; v++) acc[r][v] = *(const Memory*)(from + r * row + v * L);
  }
  MVAT_INLINE void store(const Vector (&acc)[MR][NV], T* to, int64_t row) {
    MVAT_UNROLL for (int r = 0; r < MR; r++)
      MVAT_UNROLL for (int v = 0; v < NV; v++) *(Memory*)(to + r * row + v * L) = acc[r][v];
  }
  MVAT_INLINE void add(const Vector (&acc)[MR][NV], T* to, int64_t row) {
    MVAT_UNROLL for (int r = 0; r < MR; r++)
      MVAT_UNROLL for (int v = 0; v < NV; v++) *(Memory*)(to + r * row + v * L) += acc[r][v];
  }

  // Blocks q0 .. q0 + kQueries, transposed: out[c][block].
  MVAT_INLINE void read_blocks(const Shape& shape, const Signal<T>& x, int64_t sequence, int64_t q0, T scale, T* out) {
    std::fill_n(out, shape.padded * kBlocks, T(0));
    for (int64_t q = 0; q <= kQueries; q++) read_block(shape, x, sequence, q0 + q, scale, out + q, kBlocks);
  }

  // g [4, padded, queries] of the filter whose two halves are W' (chunk): q[j] = sum over i of W[i][j] chunk[i].
  MVAT_INLINE void filter(const Shape& shape, const T* weight, const T* blocks, T* g) {
    const int64_t padded = shape.padded, width = shape.width(), plane = padded * kQueries;
    for (int64_t c = 0; c < padded; c += MR) {
      T* out = g + c * kQueries;
      Vector acc[MR][NV] = {};
      multiply_add<T, L, NV, MR>(acc, blocks, kBlocks, weight + c, 1, width, shape.half);
      multiply_add<T, L, NV, MR>(acc, blocks + 1, kBlocks, weight + padded * width + c, 1, width, shape.half);
      store(acc, out, kQueries);
      Vector second[MR][NV] = {};
      multiply_add<T, L, NV, MR>(second, blocks, kBlocks, weight + padded + c, 1, width, shape.half);
      multiply_add<T, L, NV, MR>(second, blocks + 1, kBlocks, weight + padded * width + padded + c, 1, width, shape.half);
      store(second, out + 3 * plane, kQueries);
      load(acc, out, kQueries);
      MVAT_UNROLL for (int r = 0; r < MR; r++)
        MVAT_UNROLL for (int v = 0; v < NV; v++) {
          *(Memory*)(out + plane + r * kQueries + v * L) = T(0.5) * (acc[r][v] + second[r][v]);
          *(Memory*)(out + 2 * plane + r * kQueries + v * L) = T(0.5) * (acc[r][v] - second[r][v]);
        }
    }
  }

  // out [width, queries] += W in, in [width, queries], each query times its scale.
  MVAT_INLINE void project(const Shape& shape, const T* weight, const T* in, const Vector (&scale)[NV], T* out) {
    const int64_t padded = shape.padded, width = shape.width();
    for (int64_t c = 0; c < width; c += MR) {
      Vector acc[MR][NV] = {};
      multiply_add<T, L, NV, MR>(acc, in, kQueries, weight + c * width, width, 1, shape.half);
      multiply_add<T, L, NV, MR>(acc, in + padded * kQueries, kQueries, weight + c * width + padded, width, 1, shape.half);
      MVAT_UNROLL for (int r = 0; r < MR; r++)
        MVAT_UNROLL for (int v = 0; v < NV; v++) acc[r][v] *= scale[v];
      add(acc, out + c * kQueries, kQueries);
    }
  }

  // scores [triples, 4, queries], rows 0, 1, 3: start + the filter g over the keys. Every product ends in memory, even where the
  // next one goes on from it: with one set of accumulators at a time the compiler spills none.
  MVAT_INLINE void score(const Shape& shape, const T* g, const T* keys, int64_t triples, const Vector (&start)[NV], T* scores) {
    const int64_t padded = shape.padded, half = shape.half, plane = padded * kQueries, row = 4 * kQueries;
    for (int64_t j = 0; j < triples; j += MR) {
      const T* key = keys + j * 4 * padded;
      T *first = scores + j * row, *second = first + kQueries, *spare = second + kQueries, *third = spare + kQueries;
      {
        Vector acc[MR][NV];
        MVAT_UNROLL for (int r = 0; r < MR; r++)
          MVAT_UNROLL for (int v = 0; v < NV; v++) acc[r][v] = start[v];
        multiply_add<T, L, NV, MR>(acc, g + plane, kQueries, key + padded, 4 * padded, 1, half);
        store(acc, second, row);
      }
      MVAT_FENCE;
      {
        Vector acc[MR][NV] = {};
        multiply_add<T, L, NV, MR>(acc, g + 2 * plane, kQueries, key + 2 * padded, 4 * padded, 1, half);
        MVAT_UNROLL for (int r = 0; r < MR; r++)
          MVAT_UNROLL for (int v = 0; v < NV; v++) {
            T* middle = second + r * row + v * L;
            const Vector one = *(const Memory*)middle;
            *(Memory*)middle = one - acc[r][v];
            *(Memory*)(spare + r * row + v * L) = one + acc[r][v];
          }
      }
      MVAT_FENCE;
      {
        Vector acc[MR][NV];
        load(acc, spare, row);
        multiply_add<T, L, NV, MR>(acc, g, kQueries, key, 4 * padded, 1, half);
        store(acc, first, row);
      }
      MVAT_FENCE;
      {
        Vector acc[MR][NV];
        load(acc, spare, row);
        multiply_add<T, L, NV, MR>(acc, g + 3 * plane, kQueries, key + 3 * padded, 4 * padded, 1, half);
        store(acc, third, row);
      }
      MVAT_FENCE;
    }
  }

  // out [width, queries] += the weighted sum of the keys, from weights w0 .. w3 [triples, 4, queries].
  MVAT_INLINE void mix(const Shape& shape, const T* weights, const T* keys, int64_t triples, T* out) {
    const int64_t padded = shape.padded, row = 4 * kQueries, step = 4 * padded;
    alignas(64) T plus[MR * kQueries], minus[MR * kQueries];
    for (int64_t c = 0; c < padded; c += MR) {
      T *first = out + c * kQueries, *second = out + (padded + c) * kQueries;
      {
        Vector acc[MR][NV] = {};
        multiply_add<T, L, NV, MR>(acc, weights + kQueries, row, keys + padded + c, 1, step, triples);
        store(acc, plus, kQueries);
      }
      MVAT_FENCE;
      {
        Vector acc[MR][NV] = {};
        multiply_add<T, L, NV, MR>(acc, weights + 2 * kQueries, row, keys + 2 * padded + c, 1, step, triples);
        store(acc, minus, kQueries);
      }
      MVAT_FENCE;
      for (int64_t i = 0; i < MR * kQueries; i += L) {
        const Vector one = *(const Memory*)(plus + i), two = *(const Memory*)(minus + i);
        *(Memory*)(first + i) += T(0.5) * (one + two);
        *(Memory*)(second + i) += T(0.5) * (one - two);
      }
      MVAT_FENCE;
      {
        Vector acc[MR][NV] = {};
        multiply_add<T, L, NV, MR>(acc, weights, row, keys + c, 1, step, triples);
        add(acc, first, kQueries);
      }
      MVAT_FENCE;
      {
        Vector acc[MR][NV] = {};
        multiply_add<T, L, NV, MR>(acc, weights + 3 * kQueries, row, keys + 3 * padded + c, 1, step, triples);
        add(acc, second, kQueries);
      }
      MVAT_FENCE;
    }
  }

  // Three values of a triple to the weights of t0 .. t3, in the four rows at `to`.
  MVAT_INLINE void spread(Vector first, Vector second, Vector third, T* to) {
    const Vector outer = first + third;
    *(Memory*)to = first;
    *(Memory*)(to + kQueries) = outer + second;
    *(Memory*)(to + 2 * kQueries) = outer - second;
    *(Memory*)(to + 3 * kQueries) = third;
  }

  // Rows of scores that are no keys: beyond the last chunk, up to the end of the last row block.
  MVAT_INLINE void mask(T* scores, int64_t keys, int64_t triples) {
    for (int64_t k = keys; k < 3 * triples; k++) {
      T* row = scores + (k / 3 * 4 + k % 3 + (k % 3 == 2)) * kQueries;
      std::fill_n(row, kQueries, T(-1e30));
    }
  }

  static int64_t forward_workspace(const Shape& shape) {
    return shape.padded * kBlocks + (4 * shape.padded + 2 * shape.width() + 4 * TJ) * kQueries;
  }

  MVAT_INLINE void forward(const Forward<T>& f, int64_t sequence, int64_t tile, int64_t q0, int64_t queries, T* workspace) {
    const Shape& shape = f.shape;
    const int64_t padded = shape.padded, width = shape.width(), half = shape.half;
    T *blocks = workspace, *g = blocks + padded * kBlocks, *mixed = g + 4 * padded * kQueries;
    T *y = mixed + width * kQueries, *scores = y + width * kQueries;
    const T* keys = f.keys + sequence * shape.key_size();
    read_blocks(shape, f.x, sequence, q0, T(1), blocks);
    std::fill_n(y, width * kQueries, T(0));
    for (int64_t head = 0; head < shape.heads; head++) {
      filter(shape, f.a + head * width * width, blocks, g);
      std::fill_n(mixed, width * kQueries, T(0));
      Vector top[NV] = {}, total[NV] = {};  // the scores' running maximum, softmax's denominator
      for (int64_t j = 0; j < shape.triples; j += TJ) {
        const int64_t triples = std::min<int64_t>(TJ, shape.triples - j);
        attend(shape, g, keys + j * 4 * padded, triples, shape.chunks - 3 * j, j == 0, top, total, mixed,
               scores);
      }
      Vector scale[NV];
      MVAT_UNROLL for (int v = 0; v < NV; v++) scale[v] = T(1) / total[v];
      if (f.softmax) {
        for (int64_t q = 0; q < queries; q++) {
          const int64_t at = (sequence * shape.heads + head) * shape.chunks + q0 + q;
          const T denominator = total[q / L][q % L];
          f.softmax[2 * at] = top[q / L][q % L];
          f.softmax[2 * at + 1] = denominator;
          T* out = f.mixed + at * 2 * half;
          for (int64_t c = 0; c < half; c++) out[c] = mixed[c * kQueries + q] / denominator;
          for (int64_t c = 0; c < half; c++) out[half + c] = mixed[(padded + c) * kQueries + q] / denominator;
        }
      }
      MVAT_UNROLL for (int v = 0; v < NV; v++) scale[v] *= T(0.5);  // the overlap-add's
      project(shape, f.m + head * width * width, mixed, scale, y);
    }
    // Block k is the first half of chunk k and the second half of chunk k - 1.
    for (int64_t q = 0; q < queries; q++) {
      const int64_t start = (q0 + q - 2) * half;
      const int64_t from = std::clamp<int64_t>(-start, 0, half), to = std::clamp<int64_t>(shape.length - start, from, half);
      T* out = f.y + sequence * shape.length + start;
      if (q == 0) {
        for (int64_t c = from; c < to; c++) out[c] = y[c * kQueries];
      } else {
        for (int64_t c = from; c < to; c++) out[c] = y[c * kQueries + q] + y[(padded + c) * kQueries + q - 1];
      }
    }
    T* edge = f.edges + tile * half;
    for (int64_t c = 0; c < half; c++) edge[c] = y[(padded + c) * kQueries + queries - 1];
  }

  // One key tile of the online softmax. The maximum is the scores' start value and rises only when it is exceeded by 2^10;
  // sums are formed a key tile at a time before they join the totals, which keeps them as exact as a pairwise sum.
  MVAT_INLINE void attend(const Shape& shape, const T* g, const T* keys, int64_t triples, int64_t count, bool first,
                          Vector (&top)[NV], Vector (&total)[NV], T* mixed, T* scores) {
    Vector start[NV], most[NV];
    MVAT_UNROLL for (int v = 0; v < NV; v++) {
      start[v] = -top[v];
      most[v] = Vector{} - std::numeric_limits<T>::max();
    }
    score(shape, g, keys, triples, start, scores);
    mask(scores, count, triples);
    for (int64_t k = 0; k < 4 * triples; k++) {
      if (k % 4 == 2) continue;  // the spare row
      MVAT_UNROLL for (int v = 0; v < NV; v++) {
        const Vector s = *(const Memory*)(scores + k * kQueries + v * L);
        most[v] = most[v] > s ? most[v] : s;
      }
    }
    bool rises = first;
    for (int v = 0; v < NV; v++)
      for (int i = 0; i < L; i++) rises |= most[v][i] > T(10);
    if (__builtin_expect(rises, 0)) {
      for (int v = 0; v < NV; v++) {
        Vector rise = most[v];
        if (!first) rise = rise > T(0) ? rise : Vector{};
        top[v] += rise;
        for (int64_t k = 0; k < 4 * triples; k++) *(Memory*)(scores + k * kQueries + v * L) -= rise;
        rise = -rise;
        if (first) rise = Vector{};
        exp2_lanes<L>(rise);
        total[v] *= rise;
        for (int64_t c = 0; c < shape.width(); c++) *(Memory*)(mixed + c * kQueries + v * L) *= rise;
      }
    }
    Vector sum[NV] = {};
    for (int64_t j = 0; j < triples; j++) {
      MVAT_UNROLL for (int v = 0; v < NV; v++) {
        T* at = scores + j * 4 * kQueries + v * L;
        Vector p0 = *(const Memory*)at, p1 = *(const Memory*)(at + kQueries), p2 = *(const Memory*)(at + 3 * kQueries);
        exp2_lanes<L>(p0);
        exp2_lanes<L>(p1);
        exp2_lanes<L>(p2);
        spread(p0, p1, p2, at);
        sum[v] += p0 + p1 + p2;
      }
    }
    MVAT_UNROLL for (int v = 0; v < NV; v++) total[v] += sum[v];
    mix(shape, scores, keys, triples, mixed);
  }

  // out [queries, rows] from in [rows, queries].
  MVAT_INLINE void transpose(const T* in, int64_t rows, T* out) {
    for (int64_t q = 0; q < kQueries; q++, out += rows)
      for (int64_t r = 0; r < rows; r++) out[r] = in[r * kQueries + q];
  }

  // out [width, width] += the sum over queries of chunk' row.
  MVAT_INLINE void outer(const Shape& shape, const T* blocks, const T* rows, T* out) {
    const int64_t padded = shape.padded, width = shape.width();
    for (int64_t tap = 0; tap < 2; tap++)
      for (int64_t i = 0; i < padded; i += MR)
        for (int64_t c = 0; c < width; c += 2 * L) {
          Vector acc[MR][2] = {};
          multiply_add<T, L, 2, MR>(acc, rows + c, width, blocks + i * kBlocks + tap, kBlocks, 1, kQueries);
          add_columns<MR>(acc, out + (tap * padded + i) * width + c, width);
        }
  }
  template <int R>
  MVAT_INLINE void add_columns(const Vector (&acc)[R][2], T* to, int64_t row) {
    MVAT_UNROLL for (int r = 0; r < R; r++)
      MVAT_UNROLL for (int v = 0; v < 2; v++) *(Memory*)(to + r * row + v * L) += acc[r][v];
  }

  // keys [triples, 4, padded] += slopes z + weights dO, both filters a query a row.
  template <int R>
  MVAT_INLINE void key_rows(const Shape& shape, const T* slopes, const T* z, const T* weights, const T* out, T* keys) {
    constexpr int64_t row = 4 * kQueries;
    Vector acc[R][2] = {};
    multiply_add<T, L, 2, R>(acc, z, 4 * shape.padded, slopes, row, 1, kQueries);
    multiply_add<T, L, 2, R>(acc, out, 4 * shape.padded, weights, row, 1, kQueries);
    add_columns<R>(acc, keys, 4 * shape.padded);
    MVAT_FENCE;
  }
  MVAT_INLINE void key_gradient(const Shape& shape, const T* slopes, const T* z, const T* weights, const T* out, int64_t triples,
                                T* keys) {
    constexpr int64_t kRows = MR == 4 ? 6 : MR, row = 4 * kQueries;
    for (int64_t c = 0; c < 4 * shape.padded; c += 2 * L) {
      const int64_t plane = c / shape.padded * kQueries;
      int64_t j = 0;
      for (; j + kRows <= triples; j += kRows)
        key_rows<kRows>(shape, slopes + j * row + plane, z + c, weights + j * row + plane, out + c, keys + j * 4 * shape.padded + c);
      for (; j < triples; j += 2)
        key_rows<2>(shape, slopes + j * row + plane, z + c, weights + j * row + plane, out + c, keys + j * 4 * shape.padded + c);
    }
  }

  // Scores, the maximum taken off, become softmax's weights without its denominator, and their slopes those of the scores.
  MVAT_INLINE void soften(int64_t triples, T* scores, T* slopes) {
    for (int64_t j = 0; j < triples; j++) {
      MVAT_UNROLL for (int v = 0; v < NV; v++) {
        T *score = scores + j * 4 * kQueries + v * L, *slope = slopes + j * 4 * kQueries + v * L;
        Vector p[3];
        MVAT_UNROLL for (int k = 0; k < 3; k++) {
          const Vector s = *(const Memory*)(score + (k == 2 ? 3 : k) * kQueries);
          p[k] = s > T(16) ? Vector{} + T(16) : s;  // above 10 only by the rounding of huge scores
          exp2_lanes<L>(p[k]);
        }
        spread(p[0], p[1], p[2], score);
        MVAT_UNROLL for (int k = 0; k < 3; k++) p[k] *= *(const Memory*)(slope + (k == 2 ? 3 : k) * kQueries);
        spread(p[0], p[1], p[2], slope);
      }
    }
  }

  static int64_t backward_workspace(const Shape& shape) {
    return 2 * shape.padded * kBlocks + (16 * shape.padded + 4 * shape.width() + 8 * TJ + 3) * kQueries;
  }

  // The gradients that come from one tile of queries. With dO = dY M, z = X A, D the sum over channels of dO O, and the scores'
  // gradient dS = ln 2 P (dP - D) where dP = dO X': the keys get dS' z + P' dO, the queries dz A' where dz = dS X. P comes
  // without its denominator, which divides dO and D instead.
  MVAT_INLINE void backward(const Backward<T>& f, const Gradients<T>& d, int64_t sequence, int64_t q0, int64_t queries,
                            T* workspace) {
    const Shape& shape = f.shape;
    const int64_t padded = shape.padded, width = shape.width(), half = shape.half;
    T *blocks = workspace, *upper = blocks + padded * kBlocks;         // of the signal and of the output's gradient
    T *z = upper + padded * kBlocks, *z_rows = z + 4 * padded * kQueries;
    T *out = z_rows + 4 * padded * kQueries, *out_rows = out + 4 * padded * kQueries;  // dO
    T *dz = out_rows + 4 * padded * kQueries, *dx = dz + width * kQueries;
    T *dz_rows = dx + width * kQueries, *mixed_rows = dz_rows + width * kQueries;
    T *scores = mixed_rows + width * kQueries, *slopes = scores + 4 * TJ * kQueries;
    T *top = slopes + 4 * TJ * kQueries, *inverse = top + kQueries, *centre = inverse + kQueries;
    const T* keys = f.keys + sequence * shape.key_size();
    read_blocks(shape, f.x, sequence, q0, T(1), blocks);
    read_blocks(shape, f.grad, sequence, q0, T(0.5), upper);
    std::fill_n(dx, width * kQueries, T(0));
    for (int64_t head = 0; head < shape.heads; head++) {
      const int64_t weight = head * width * width;
      filter(shape, f.a + weight, blocks, z);
      filter(shape, f.m + weight, upper, out);
      transpose(z, 4 * padded, z_rows);
      transpose(out, 4 * padded, out_rows);
      // Lanes beyond the last query weigh nothing.
      std::fill_n(mixed_rows, width * kQueries, T(0));
      std::fill_n(top, 3 * kQueries, T(0));
      const int64_t at = (sequence * shape.heads + head) * shape.chunks + q0;
      for (int64_t q = 0; q < queries; q++) {
        top[q] = f.softmax[2 * (at + q)];
        inverse[q] = T(1) / f.softmax[2 * (at + q) + 1];
        T *first = out_rows + q * 4 * padded, *second = first + 3 * padded;
        for (int64_t c = 0; c < 4 * padded; c++) first[c] *= inverse[q];
        const T* mixed = f.mixed + (at + q) * 2 * half;
        std::copy_n(mixed, half, mixed_rows + q * width);
        std::copy_n(mixed + half, half, mixed_rows + q * width + padded);
        for (int64_t c = 0; c < half; c++) centre[q] += first[c] * mixed[c] + second[c] * mixed[half + c];
      }
      Vector minus_top[NV], minus_centre[NV], one[NV];
      MVAT_UNROLL for (int v = 0; v < NV; v++) {
        minus_top[v] = -*(const Memory*)(top + v * L);
        minus_centre[v] = T(-kLn2) * *(const Memory*)(centre + v * L);
        one[v] = Vector{} + T(1);
        const Vector scale = T(kLn2) * *(const Memory*)(inverse + v * L);
        for (int64_t c = 0; c < 4 * padded; c++) *(Memory*)(out + c * kQueries + v * L) *= scale;
      }
      std::fill_n(dz, width * kQueries, T(0));
      for (int64_t j = 0; j < shape.triples; j += TJ) {
        const int64_t triples = std::min<int64_t>(TJ, shape.triples - j);
        const T* tile = keys + j * 4 * padded;
        score(shape, z, tile, triples, minus_top, scores);
        score(shape, out, tile, triples, minus_centre, slopes);
        mask(scores, shape.chunks - 3 * j, triples);
        soften(triples, scores, slopes);
        mix(shape, slopes, tile, triples, dz);
        key_gradient(shape, slopes, z_rows, scores, out_rows, triples, d.keys + j * 4 * padded);
      }
      transpose(dz, width, dz_rows);
      outer(shape, blocks, dz_rows, d.a + weight);
      outer(shape, upper, mixed_rows, d.m + weight);
      project(shape, f.a + weight, dz, one, dx);
    }
    for (int64_t q = 0; q < queries; q++) {
      T* block = d.blocks + (q0 + q) * padded;
      for (int64_t c = 0; c < half; c++) block[c] += dx[c * kQueries + q];
      for (int64_t c = 0; c < half; c++) block[padded + c] += dx[(padded + c) * kQueries + q];
    }
  }
};

}  // namespace mvat::global_attention
