// Self-attention between the overlapped chunks of every channel, and its gradient, on the CPU (the method: global_attention.h).
//
// Every sequence's keys are laid out once, then tiles of queries of all sequences are spread over the threads. A tile reads
// nothing that another one writes, and what is added up across tiles is added in one order, so the thread count changes nothing.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <tuple>
#include <vector>

#include "global_attention.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace mvat::global_attention;

namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr int kTile = 24;       // triples of a key tile
constexpr int64_t kTasks = 16;  // of the backward pass, at least, where there are as many tiles; at most twice as many

// What runs on this processor: the kernels of one level, with the sizes that they were compiled for.
template <typename T>
struct Level {
  int64_t rows, lanes;  // the row block; vectors that a block of the signal is rounded up to
  int64_t forward_queries;
  int64_t (*forward_workspace)(const Shape&);
  void (*forward)(const Forward<T>&, int64_t, int64_t, int64_t, int64_t, T*);
  int64_t backward_queries;
  int64_t (*backward_workspace)(const Shape&);
  void (*backward)(const Backward<T>&, const Gradients<T>&, int64_t, int64_t, int64_t, T*);
};

// A tile's queries fill up to three vectors; the last tile of a sequence takes no more than it needs.
template <typename T, int L, int MR>
MVAT_INLINE void forward_any(const Forward<T>& f, int64_t sequence, int64_t tile, int64_t q0, int64_t queries, T* workspace) {
  if (queries > 2 * L) return Tile<T, L, 3, MR, kTile>::forward(f, sequence, tile, q0, queries, workspace);
  if (queries > L) return Tile<T, L, 2, MR, kTile>::forward(f, sequence, tile, q0, queries, workspace);
  Tile<T, L, 1, MR, kTile>::forward(f, sequence, tile, q0, queries, workspace);
}

template <typename T, int L, int NV, int MR>
MVAT_INLINE void backward_any(const Backward<T>& f, const Gradients<T>& d, int64_t sequence, int64_t q0, int64_t queries,
                              T* workspace) {
  if constexpr (NV > 2)
    if (queries > 2 * L) return Tile<T, L, 3, MR, kTile>::backward(f, d, sequence, q0, queries, workspace);
  if (queries > L) return Tile<T, L, 2, MR, kTile>::backward(f, d, sequence, q0, queries, workspace);
  Tile<T, L, 1, MR, kTile>::backward(f, d, sequence, q0, queries, workspace);
}

// Vectors of queries in the backward pass: 48 of them would leave the first cache.
template <int L, int NV>
constexpr int kBackwardVectors = L == 16 ? 2 : NV;

#define MVAT_ENTRIES(NAME, TARGET, T, L, NV, MR)                                                                         \
  TARGET void forward_##NAME(const Forward<T>& f, int64_t sequence, int64_t tile, int64_t q0, int64_t queries,           \
                             T* workspace) {                                                                             \
    forward_any<T, L, MR>(f, sequence, tile, q0, queries, workspace);                                                    \
  }                                                                                                                      \
  TARGET void backward_##NAME(const Backward<T>& f, const Gradients<T>& d, int64_t sequence, int64_t q0,                 \
                              int64_t queries, T* workspace) {                                                           \
    backward_any<T, L, kBackwardVectors<L, NV>, MR>(f, d, sequence, q0, queries, workspace);                             \
  }                                                                                                                      \
  const Level<T> level_##NAME = {                                                                                        \
      MR,     2 * L,  3 * L,           Tile<T, L, 3, MR, kTile>::forward_workspace,                                         \
      forward_##NAME, kBackwardVectors<L, NV> * L, Tile<T, L, kBackwardVectors<L, NV>, MR, kTile>::backward_workspace,       \
      backward_##NAME};
MVAT_EVERY_LEVEL(MVAT_ENTRIES)
#undef MVAT_ENTRIES

MVAT_CHOOSE_LEVEL

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

Shape shape_of(const Tensor& x, const Tensor& a, int64_t segment_len, int64_t rows, int64_t lanes) {
  const int64_t half = segment_len / 2, chunks = (x.size(2) + segment_len) / half + 1;
  return {x.size(0) * x.size(1), x.size(1), x.size(2), a.size(0), half, round_up(half, lanes), chunks,
          round_up((chunks + 2) / 3, rows)};
}

template <typename T>
Signal<T> signal(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(2)};
}

// Weights [heads, C, C] in two times two blocks, padded to whole vectors with zeros: [heads, width, width], times a scale.
template <typename T>
void pad_weights(const Shape& shape, const Tensor& weights, T scale, T* out) {
  const T* from = weights.const_data_ptr<T>();
  std::fill_n(out, shape.heads * shape.width() * shape.width(), T(0));
  const auto place = [&](int64_t i) { return i < shape.half ? i : shape.padded + i - shape.half; };
  for (int64_t head = 0; head < shape.heads; head++)
    for (int64_t i = 0; i < 2 * shape.half; i++)
      for (int64_t j = 0; j < 2 * shape.half; j++)
        out[(head * shape.width() + place(i)) * shape.width() + place(j)] =
            scale * from[head * weights.stride(0) + i * weights.stride(1) + j * weights.stride(2)];
}

// The triples [sequences, triples, 4, padded] of every sequence.
template <typename T>
void lay_out_keys(const Shape& shape, const Signal<T>& x, T* keys) {
  const int64_t half = shape.half, padded = shape.padded;
  const int64_t grain = std::max<int64_t>(1, 16384 / (4 * padded));
  torch::stable::parallel_for(0, shape.sequences * shape.triples, grain, [&](int64_t begin, int64_t end) {
    const Aligned<T> blocks(4 * half);
    const T *b0 = blocks.data, *b1 = b0 + half, *b2 = b1 + half, *b3 = b2 + half;
    for (int64_t i = begin; i < end; i++) {
      const int64_t sequence = i / shape.triples, k = i % shape.triples * 3;
      for (int64_t j = 0; j < 4; j++) read_block(shape, x, sequence, k + j, T(1), blocks.data + j * half, 1);
      T* out = keys + i * 4 * padded;
      for (int64_t c = 0; c < half; c++) {
        out[c] = b0[c] - b2[c];
        out[padded + c] = b1[c] + b2[c];
        out[2 * padded + c] = b2[c] - b1[c];
        out[3 * padded + c] = b3[c] - b1[c];
      }
      for (int64_t r = 0; r < 4; r++) std::fill(out + r * padded + half, out + (r + 1) * padded, T(0));
    }
  });
}

template <typename T>
void run_forward(const Tensor& x, const Tensor& a, const Tensor& m, int64_t segment_len, Tensor& y, Tensor* softmax, Tensor* mixed) {
  const Level<T>& kernels = level<T>();
  const Shape shape = shape_of(x, a, segment_len, kernels.rows, kernels.lanes);
  const int64_t tiles = (shape.chunks + kernels.forward_queries - 1) / kernels.forward_queries;
  const int64_t square = shape.heads * shape.width() * shape.width();
  const Aligned<T> keys(shape.sequences * shape.key_size()), weights(2 * square);
  const Aligned<T> edges(shape.sequences * tiles * shape.half);
  pad_weights<T>(shape, a, T(kLog2E), weights.data);
  pad_weights<T>(shape, m, T(1), weights.data + square);
  const Forward<T> f = {shape,        signal<T>(x), keys.data, weights.data, weights.data + square, y.mutable_data_ptr<T>(),
                        edges.data,   softmax ? softmax->mutable_data_ptr<T>() : nullptr,
                        mixed ? mixed->mutable_data_ptr<T>() : nullptr};
  lay_out_keys(shape, f.x, keys.data);
  torch::stable::parallel_for(0, shape.sequences * tiles, 1, [&](int64_t begin, int64_t end) {
    const Aligned<T> workspace(kernels.forward_workspace(shape));
    for (int64_t i = begin; i < end; i++) {
      const int64_t q0 = i % tiles * kernels.forward_queries;
      kernels.forward(f, i / tiles, i, q0, std::min(kernels.forward_queries, shape.chunks - q0), workspace.data);
    }
  });
  for (int64_t i = 0; i < shape.sequences * tiles; i++) {
    if (i % tiles == 0) continue;
    const int64_t start = (i % tiles * kernels.forward_queries - 2) * shape.half;
    const int64_t from = std::clamp<int64_t>(-start, 0, shape.half);
    const int64_t to = std::clamp<int64_t>(shape.length - start, from, shape.half);
    T* out = f.y + i / tiles * shape.length + start;
    for (int64_t c = from; c < to; c++) out[c] += edges.data[(i - 1) * shape.half + c];
  }
}

// The gradient of a sequence from the sums of its parts, which lie `stride` apart: triples go back to blocks, blocks to samples.
template <typename T>
void gather(const Shape& shape, const T* keys, const T* blocks, int64_t parts, int64_t stride, T* dx) {
  const int64_t half = shape.half, padded = shape.padded;
  for (int64_t k = 2; (k - 2) * half < shape.length; k++) {
    T* out = dx + (k - 2) * half;
    const int64_t size = std::min(half, shape.length - (k - 2) * half);
    std::fill_n(out, size, T(0));
    for (int64_t part = 0; part < parts; part++) {
      const T *t0 = keys + part * stride + k / 3 * 4 * padded, *t1 = t0 + padded, *t2 = t1 + padded, *t3 = t0 - padded;
      const T* block = blocks + part * stride + k * padded;
      if (k % 3 == 0) {  // t3 is the triple's before
        for (int64_t c = 0; c < size; c++) out[c] += block[c] + (t0[c] + t3[c]);
      } else if (k % 3 == 1) {
        for (int64_t c = 0; c < size; c++) out[c] += block[c] + (t1[c] - t2[c] - t2[padded + c]);
      } else {
        for (int64_t c = 0; c < size; c++) out[c] += block[c] + (t1[c] + t2[c] - t0[c]);
      }
    }
  }
}

// The sum over tasks of padded weight gradients [heads, width, width], times a scale, to [heads, C, C].
template <typename T>
void unpad_weights(const Shape& shape, const T* sums, int64_t tasks, int64_t stride, double scale, Tensor& out) {
  std::vector<double> total(shape.heads * shape.width() * shape.width());
  for (int64_t task = 0; task < tasks; task++, sums += stride)
    for (size_t i = 0; i < total.size(); i++) total[i] += sums[i];
  T* to = out.mutable_data_ptr<T>();
  for (int64_t row = 0; row < shape.heads * 2; row++)
    for (int64_t i = 0; i < shape.half; i++)
      for (int64_t column = 0; column < 2; column++)
        for (int64_t j = 0; j < shape.half; j++)
          *to++ = T(scale * total[(row * shape.padded + i) * shape.width() + column * shape.padded + j]);
}

template <typename T>
void run_backward(const Tensor& grad, const Tensor& x, const Tensor& a, const Tensor& m, const Tensor& softmax, const Tensor& mixed,
                  int64_t segment_len, Tensor& dx, Tensor& da, Tensor& dm) {
  const Level<T>& kernels = level<T>();
  const Shape shape = shape_of(x, a, segment_len, kernels.rows, kernels.lanes);
  const int64_t tiles = (shape.chunks + kernels.backward_queries - 1) / kernels.backward_queries;
  const int64_t square = shape.heads * shape.width() * shape.width();
  const Aligned<T> keys(shape.sequences * shape.key_size()), weights(2 * square);
  pad_weights<T>(shape, a, T(kLog2E), weights.data);
  pad_weights<T>(shape, m, T(1), weights.data + square);
  const Backward<T> f = {shape,        signal<T>(x), signal<T>(grad), keys.data, weights.data, weights.data + square,
                         softmax.const_data_ptr<T>(), mixed.const_data_ptr<T>()};
  lay_out_keys(shape, f.x, keys.data);
  // A task is several sequences, or with few sequences a part of one's queries. It has sums of its own, and the sums are added
  // in the tasks' order; which they are depends on the shape alone.
  const int64_t parts = std::min(tiles, (kTasks + shape.sequences - 1) / std::max<int64_t>(1, shape.sequences));
  const int64_t group = parts > 1 ? 1 : (shape.sequences + 2 * kTasks - 1) / (2 * kTasks);
  const int64_t tasks = group ? (shape.sequences + group - 1) / group * parts : 0;
  const int64_t sums = shape.key_size() + (shape.chunks + 1) * shape.padded;
  const Aligned<T> weight_sums(tasks * 2 * square), part_sums(parts > 1 ? tasks * sums : 0);
  T* target = dx.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const Aligned<T> workspace(kernels.backward_workspace(shape)), own(parts > 1 ? 0 : sums);
    for (int64_t task = begin; task < end; task++) {
      T* d_weights = weight_sums.data + task * 2 * square;
      std::fill_n(d_weights, 2 * square, T(0));
      const int64_t first = task / parts * group, part = task % parts;
      for (int64_t sequence = first; sequence < std::min(first + group, shape.sequences); sequence++) {
        T* d_keys = parts > 1 ? part_sums.data + task * sums : own.data;
        std::fill_n(d_keys, sums, T(0));
        const Gradients<T> d = {d_keys, d_keys + shape.key_size(), d_weights, d_weights + square};
        for (int64_t tile = part * tiles / parts; tile < (part + 1) * tiles / parts; tile++) {
          const int64_t q0 = tile * kernels.backward_queries;
          kernels.backward(f, d, sequence, q0, std::min(kernels.backward_queries, shape.chunks - q0), workspace.data);
        }
        if (parts == 1) gather(shape, d.keys, d.blocks, 1, 0, target + sequence * shape.length);
      }
    }
  });
  if (parts > 1)
    torch::stable::parallel_for(0, shape.sequences, 1, [&](int64_t begin, int64_t end) {
      for (int64_t sequence = begin; sequence < end; sequence++) {
        const T* d_keys = part_sums.data + sequence * parts * sums;
        gather(shape, d_keys, d_keys + shape.key_size(), parts, sums, target + sequence * shape.length);
      }
    });
  unpad_weights(shape, weight_sums.data, tasks, 2 * square, kLog2E, da);
  unpad_weights(shape, weight_sums.data + square, tasks, 2 * square, 1, dm);
}

void check(const Tensor& x, const Tensor& a, const Tensor& m, int64_t segment_len) {
  STD_TORCH_CHECK(x.dim() == 3, "global_attention: expected x [B, n, T], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "global_attention: expected float32 or float64");
  STD_TORCH_CHECK(segment_len >= 2 && segment_len % 2 == 0, "global_attention: expected an even segment_len, got ", segment_len);
  for (const Tensor* weights : {&a, &m}) {
    STD_TORCH_CHECK(weights->dim() == 3 && weights->size(0) == a.size(0) && weights->size(1) == segment_len &&
                        weights->size(2) == segment_len && weights->scalar_type() == x.scalar_type(),
                    "global_attention: expected a and m [heads, segment_len, segment_len] in the dtype of x");
  }
}

std::tuple<Tensor, Tensor, Tensor> global_attention(const Tensor& x, const Tensor& a, const Tensor& m, int64_t segment_len,
                                                    bool keep) {
  check(x, a, m, segment_len);
  const int64_t chunks = (x.size(2) + segment_len) / (segment_len / 2) + 1;
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  const int64_t kept = keep ? x.size(0) : 0;
  Tensor softmax = torch::stable::new_empty(x, {kept, x.size(1), a.size(0), chunks, 2});
  Tensor mixed = torch::stable::new_empty(x, {kept, x.size(1), a.size(0), chunks, segment_len});
  if (x.scalar_type() == ScalarType::Float) {
    run_forward<float>(x, a, m, segment_len, y, keep ? &softmax : nullptr, keep ? &mixed : nullptr);
  } else {
    run_forward<double>(x, a, m, segment_len, y, keep ? &softmax : nullptr, keep ? &mixed : nullptr);
  }
  return {y, softmax, mixed};
}

std::tuple<Tensor, Tensor, Tensor> global_attention_backward(const Tensor& grad, const Tensor& x, const Tensor& a, const Tensor& m,
                                                             const Tensor& softmax_any, const Tensor& mixed_any,
                                                             int64_t segment_len) {
  check(x, a, m, segment_len);
  const int64_t chunks = (x.size(2) + segment_len) / (segment_len / 2) + 1;
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == x.size(0) && grad.size(1) == x.size(1) && grad.size(2) == x.size(2) &&
                      grad.scalar_type() == x.scalar_type(),
                  "global_attention_backward: expected grad in the shape and dtype of x");
  STD_TORCH_CHECK(softmax_any.numel() == x.size(0) * x.size(1) * a.size(0) * chunks * 2 &&
                      2 * mixed_any.numel() == softmax_any.numel() * segment_len && softmax_any.scalar_type() == x.scalar_type() &&
                      mixed_any.scalar_type() == x.scalar_type(),
                  "global_attention_backward: expected softmax and mixed as global_attention gives them with keep=True");
  const Tensor softmax = torch::stable::contiguous(softmax_any), mixed = torch::stable::contiguous(mixed_any);
  Tensor dx = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  Tensor da = torch::stable::new_empty(x, {a.size(0), segment_len, segment_len});
  Tensor dm = torch::stable::new_empty(x, {a.size(0), segment_len, segment_len});
  if (x.scalar_type() == ScalarType::Float) {
    run_backward<float>(grad, x, a, m, softmax, mixed, segment_len, dx, da, dm);
  } else {
    run_backward<double>(grad, x, a, m, softmax, mixed, segment_len, dx, da, dm);
  }
  return {dx, da, dm};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mvat, CPU, m) {
  m.impl("global_attention", TORCH_BOX(&global_attention));
  m.impl("global_attention_backward", TORCH_BOX(&global_attention_backward));
}
