// The attention transfer loss of all pairs of a model in one call, and the students' gradients, on the CPU.
//
// Forward: one reading of every feature leaves its map Q; the maps, as many times smaller as there are channels, give the norms
// and the distance between normalised maps, d = N(Q_S) - N(Q_T), which takes the place of Q_T. Backward: one reading of the
// students' features and one writing of their gradients; dL/dQ_S is formed from Q_S, d and four scalars a clip:
//
//     dL/dQ_S = grad * factor / ||Q_S|| * (d - N(Q_S) <N(Q_S), d>),   factor = 1 / (B ||d||) or 2 / (B T)
//
// The tiles of all pairs wait in one queue, so that no thread idles whatever the sizes are. A tile's results are its own and
// are joined in the tiles' order: the number of threads changes nothing.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "isa.h"
#include "features.h"
#include "power_sum.h"

using mvat::kGrain;
using mvat::kTile;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kScalars = 4;  // of a clip: max Q_S, max Q_S / ||Q_S||, the gradient's factor, <N(Q_S), d>

// A norm, or a tile's part of it: the squares are those of q / 2^exponent, so that none over- or underflows.
struct Norm {
  double largest, squares;
  int exponent;
};

// What a tile adds to ||d||^2 and <N(Q_S), d>.
struct Distance {
  double squares, product;
};

template <typename T>
MVAT_INLINE Norm tile_norm(const T* q, int64_t length) {
  T largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t t = 0; t < length; t++) largest = std::fabs(q[t]) > largest ? std::fabs(q[t]) : largest;
  const int exponent = std::clamp(std::ilogb(largest), -1022, 1023);
  const double scale = std::ldexp(1.0, -exponent);
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t t = 0; t < length; t++) squares += (q[t] * scale) * (q[t] * scale);
  return {double(largest), squares, exponent};
}

// Leaves d, which may take the place of q_teacher.
template <typename T>
MVAT_INLINE Distance tile_distance(const T* q_student, const T* q_teacher, int64_t length, double student, double teacher,
                                   T* difference) {
  double squares = 0, product = 0;
#pragma omp simd reduction(+ : squares, product)
  for (int64_t t = 0; t < length; t++) {
    const double normalised = q_student[t] * student, d = normalised - q_teacher[t] * teacher;
    difference[t] = T(d);
    squares += d * d;
    product += normalised * d;
  }
  return {squares, product};
}

template <typename T>
MVAT_INLINE void tile_upper(const T* q_student, const T* d, int64_t length, double scale, double share, T* out) {
#pragma omp simd
  for (int64_t t = 0; t < length; t++) out[t] = T(scale * (d[t] - q_student[t] * share));
}

// The entries that are compiled once an instruction set: plain functions, as target_clones wants them.
#define MVAT_ENTRIES(T)                                                                                              \
  MVAT_CLONES Norm norm_entry(const T* q, int64_t length) { return tile_norm(q, length); }                           \
  MVAT_CLONES Distance distance_entry(const T* q_student, const T* q_teacher, int64_t length, double student,        \
                                      double teacher, T* difference) {                                               \
    return tile_distance(q_student, q_teacher, length, student, teacher, difference);                                \
  }                                                                                                                  \
  MVAT_CLONES void upper_entry(const T* q_student, const T* d, int64_t length, double scale, double share, T* out) { \
    tile_upper(q_student, d, length, scale, share, out);                                                             \
  }
MVAT_ENTRIES(float)
MVAT_ENTRIES(double)
#undef MVAT_ENTRIES

// A feature, or a map given as such (one channel), of one side of a pair. Gradients lie contiguous.
template <typename T>
struct Side {
  bool is_map;
  const T* data;
  int64_t batch, channels, length, batch_stride, stride;
  int64_t map, clip;  // where its map begins among all maps, and its first clip among all clips

  Side(const Tensor& x, int64_t map, int64_t clip)
      : is_map(x.dim() == 2), data(x.const_data_ptr<T>()), batch(x.size(0)), channels(is_map ? 1 : x.size(1)),
        length(x.size(-1)), batch_stride(x.stride(0)), stride(is_map ? 0 : x.stride(1)), map(map), clip(clip) {}
};

// Appends the sides that these tensors are.
template <typename T>
void append(const std::vector<Tensor>& tensors, std::vector<Side<T>>& sides) {
  for (const Tensor& x : tensors) {
    if (sides.empty()) {
      sides.emplace_back(x, 0, 0);
    } else {
      const Side<T>& last = sides.back();
      sides.emplace_back(x, last.map + last.batch * last.length, last.clip + last.batch);
    }
  }
}

struct Tile {
  int64_t side, clip, start, length;
};

template <typename T>
int64_t elements(const std::vector<Side<T>>& sides) {
  int64_t count = 0;
  for (const Side<T>& side : sides) count += side.batch * side.length * std::max<int64_t>(1, side.channels);
  return count;
}

template <typename T>
std::vector<Tile> tiles_of(const std::vector<Side<T>>& sides) {
  std::vector<Tile> tiles;
  // Few and wide features (the deepest block: C 960, T 249) would leave threads idle with long tiles.
  const int64_t most = std::max(kGrain, elements(sides) / 64);
  for (size_t i = 0; i < sides.size(); i++) {
    const Side<T>& side = sides[i];
    int64_t tile = kTile;
    while (tile > 64 && tile * side.channels > most) tile /= 2;
    for (int64_t clip = 0; clip < side.batch; clip++) {
      for (int64_t start = 0; start < side.length; start += tile)
        tiles.push_back({int64_t(i), clip, start, std::min(tile, side.length - start)});
    }
  }
  return tiles;
}

// Calls work(i) for i = 0 to count - 1. Every thread takes the next i when it has done its last.
template <typename Work>
void for_each(int64_t count, int64_t elements, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::clamp<int64_t>(elements / kGrain, 1, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
  });
}

void join(const Norm& tile, Norm& all) {
  const int exponent = std::max(all.exponent, tile.exponent);
  all.squares = std::ldexp(all.squares, 2 * (all.exponent - exponent)) +
                std::ldexp(tile.squares, 2 * (tile.exponent - exponent));
  all.largest = std::max(all.largest, tile.largest);
  all.exponent = exponent;
}

// max q / ||q||; zero for silence: a map without one normal number counts as such, for its reciprocal overflows.
template <typename T>
double share_of(const Norm& norm) {
  if (!std::isfinite(norm.squares)) return std::numeric_limits<double>::quiet_NaN();
  if (norm.largest < std::numeric_limits<T>::min()) return 0;
  return std::ldexp(norm.largest, -norm.exponent) / std::sqrt(norm.squares);
}

// What a normalised map is a multiple of its map by.
double inverse(double largest, double share) { return share == 0 ? 0 : share / largest; }

template <typename T>
void forward(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher, double p, bool paper, Tensor& loss_out,
             Tensor& maps_out, Tensor& scalars_out) {
  const int64_t pairs = student.size();
  std::vector<Side<T>> sides;
  sides.reserve(2 * pairs);
  append(student, sides);
  append(teacher, sides);
  const std::vector<Tile> tiles = tiles_of(sides);
  T* maps = maps_out.mutable_data_ptr<T>();
  const auto map_at = [&](const Side<T>& side, const Tile& tile) {
    return maps + side.map + tile.clip * side.length + tile.start;
  };
  const auto data_at = [](const Side<T>& side, const Tile& tile) {
    return side.data + tile.clip * side.batch_stride + tile.start;
  };

  std::vector<Norm> norm_parts(tiles.size());
  for_each(tiles.size(), elements(sides), [&](int64_t i) {
    const Tile& tile = tiles[i];
    const Side<T>& side = sides[tile.side];
    const T* source = data_at(side, tile);
    // Maps given as such are read where they lie; the backward pass will want the student's.
    if (!side.is_map) mvat::map_tile(source, side.channels, side.stride, tile.length, T(p), map_at(side, tile));
    if (side.is_map && tile.side < pairs) std::copy_n(source, tile.length, map_at(side, tile));
    norm_parts[i] = norm_entry(side.is_map ? source : map_at(side, tile), tile.length);
  });
  const int64_t clips = scalars_out.size(0);
  std::vector<Norm> norms(2 * clips, Norm{0, 0, std::numeric_limits<int>::min() / 4});
  for (size_t i = 0; i < tiles.size(); i++) join(norm_parts[i], norms[sides[tiles[i].side].clip + tiles[i].clip]);
  std::vector<double> shares(2 * clips), inverses(2 * clips);
  for (int64_t i = 0; i < 2 * clips; i++) {
    shares[i] = share_of<T>(norms[i]);
    inverses[i] = inverse(norms[i].largest, shares[i]);
  }

  // The students' tiles stand first.
  const int64_t count = std::count_if(tiles.begin(), tiles.end(), [&](const Tile& tile) { return tile.side < pairs; });
  std::vector<Distance> distance_parts(count);
  for_each(count, maps_out.size(0), [&](int64_t i) {
    const Tile& tile = tiles[i];
    const Side<T>&s = sides[tile.side], &t = sides[tile.side + pairs];
    distance_parts[i] =
        distance_entry(map_at(s, tile), t.is_map ? data_at(t, tile) : map_at(t, tile), tile.length,
                       inverses[s.clip + tile.clip], inverses[t.clip + tile.clip], map_at(t, tile));
  });
  std::vector<Distance> distances(clips, Distance{0, 0});
  for (int64_t i = 0; i < count; i++) {
    Distance& distance = distances[sides[tiles[i].side].clip + tiles[i].clip];
    distance.squares += distance_parts[i].squares;
    distance.product += distance_parts[i].product;
  }

  T* loss = loss_out.mutable_data_ptr<T>();
  T* scalars = scalars_out.mutable_data_ptr<T>();
  for (int64_t pair = 0; pair < pairs; pair++) {
    const Side<T>& side = sides[pair];
    double total = 0;
    for (int64_t clip = side.clip; clip < side.clip + side.batch; clip++) {
      const double distance = std::sqrt(distances[clip].squares);
      // Nearer than the norms are rounded, maps are equal.
      const bool equal = distance <= 4 * std::numeric_limits<double>::epsilon();
      if (!equal) total += paper ? distance : distances[clip].squares / side.length;
      const double factor = paper ? 1 / (distance * side.batch) : 2 / (double(side.length) * side.batch);
      T* scalar = scalars + clip * kScalars;
      scalar[0] = T(norms[clip].largest);
      scalar[1] = T(shares[clip]);
      scalar[2] = equal ? 0 : T(factor);
      scalar[3] = T(distances[clip].product);
    }
    loss[pair] = side.batch ? T(total / side.batch) : 0;
  }
}

template <typename T>
void backward(const Tensor& grad, const std::vector<Tensor>& student, const Tensor& maps_in, const Tensor& scalars_in,
              double p, std::vector<Tensor>& gradients) {
  std::vector<Side<T>> sides;
  sides.reserve(student.size());
  append(student, sides);
  const std::vector<Tile> tiles = tiles_of(sides);
  std::vector<T*> targets;
  for (Tensor& gradient : gradients) targets.push_back(gradient.mutable_data_ptr<T>());
  const T* upper = grad.const_data_ptr<T>();
  const T* maps = maps_in.const_data_ptr<T>();
  const T* differences = maps + maps_in.size(0) / 2;
  const T* scalars = scalars_in.const_data_ptr<T>();
  for_each(tiles.size(), elements(sides), [&](int64_t i) {
    const Tile& tile = tiles[i];
    const Side<T>& side = sides[tile.side];
    if (side.channels == 0) return;
    const T* scalar = scalars + (side.clip + tile.clip) * kScalars;
    const double factor = inverse(scalar[0], scalar[1]);
    const int64_t at = side.map + tile.clip * side.length + tile.start;
    T* target = targets[tile.side] + tile.clip * side.channels * side.length + tile.start;
    T buffer[kTile];
    T* grad_map = side.is_map ? target : buffer;
    upper_entry(maps + at, differences + at, tile.length, upper[tile.side] * factor * scalar[2], factor * scalar[3],
                grad_map);
    if (side.is_map) return;
    const T* source = side.data + tile.clip * side.batch_stride + tile.start;
    mvat::grad_tile(grad_map, source, side.channels, side.stride, tile.length, T(p), target, side.length);
  });
}

// Checks the tensors of one side, and gives them with samples lying side by side.
std::vector<Tensor> checked(const char* op, const std::vector<Tensor>& tensors, ScalarType dtype) {
  std::vector<Tensor> result;
  result.reserve(tensors.size());
  for (const Tensor& x : tensors) {
    STD_TORCH_CHECK((x.dim() == 2 || x.dim() == 3) && x.size(-1) > 0, op,
                    ": expected features [B, C, T] or maps [B, T] with at least one sample");
    STD_TORCH_CHECK(x.scalar_type() == dtype, op, ": expected tensors of one dtype, float32 or float64");
    result.push_back(readable(x));
  }
  return result;
}

ScalarType checked_dtype(const char* op, const std::vector<Tensor>& student, double p) {
  STD_TORCH_CHECK(!student.empty(), op, ": expected at least one pair");
  STD_TORCH_CHECK(p >= 1 && std::isfinite(p), op, ": expected a finite p >= 1, got ", p);
  const ScalarType dtype = student[0].scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
                  ": expected tensors of one dtype, float32 or float64");
  return dtype;
}

// Samples of the maps of these tensors, and their clips.
std::tuple<int64_t, int64_t> sizes_of(const std::vector<Tensor>& tensors) {
  int64_t samples = 0, clips = 0;
  for (const Tensor& x : tensors) {
    samples += x.size(0) * x.size(-1);
    clips += x.size(0);
  }
  return {samples, clips};
}

std::tuple<Tensor, Tensor, Tensor> attention_transfer_loss(std::vector<Tensor> student_any, std::vector<Tensor> teacher_any,
                                                           double p, bool paper) {
  constexpr const char* op = "attention_transfer_loss";
  const ScalarType dtype = checked_dtype(op, student_any, p);
  STD_TORCH_CHECK(student_any.size() == teacher_any.size(), op, ": expected as many teachers as students");
  const std::vector<Tensor> student = checked(op, student_any, dtype), teacher = checked(op, teacher_any, dtype);
  for (size_t i = 0; i < student.size(); i++) {
    STD_TORCH_CHECK(student[i].size(0) == teacher[i].size(0) && student[i].size(-1) == teacher[i].size(-1), op,
                    ": pair ", i, " must agree in batch and time");
  }
  const auto [samples, clips] = sizes_of(student);
  Tensor loss = torch::stable::new_empty(student[0], {int64_t(student.size())});
  Tensor maps = torch::stable::new_empty(student[0], {2 * samples});
  Tensor scalars = torch::stable::new_empty(student[0], {clips, kScalars});
  dtype == ScalarType::Float ? forward<float>(student, teacher, p, paper, loss, maps, scalars)
                             : forward<double>(student, teacher, p, paper, loss, maps, scalars);
  return {loss, maps, scalars};
}

std::vector<Tensor> attention_transfer_loss_backward(const Tensor& grad_any, std::vector<Tensor> student_any,
                                                     const Tensor& maps_any, const Tensor& scalars_any, double p, bool) {
  constexpr const char* op = "attention_transfer_loss_backward";
  const ScalarType dtype = checked_dtype(op, student_any, p);
  const std::vector<Tensor> student = checked(op, student_any, dtype);
  const auto [samples, clips] = sizes_of(student);
  for (const Tensor* x : {&grad_any, &maps_any, &scalars_any})
    STD_TORCH_CHECK(x->scalar_type() == dtype, op, ": expected grad, maps and scalars in the students' dtype");
  STD_TORCH_CHECK(grad_any.dim() == 1 && grad_any.size(0) == int64_t(student.size()) && maps_any.dim() == 1 &&
                      maps_any.size(0) == 2 * samples && scalars_any.dim() == 2 && scalars_any.size(0) == clips &&
                      scalars_any.size(1) == kScalars,
                  op, ": expected grad [pairs], and maps and scalars as the forward pass gives them");
  const Tensor grad = torch::stable::contiguous(grad_any), maps = torch::stable::contiguous(maps_any),
               scalars = torch::stable::contiguous(scalars_any);
  std::vector<Tensor> gradients;
  gradients.reserve(student.size());
  for (const Tensor& x : student) {
    gradients.push_back(x.dim() == 2 ? torch::stable::new_empty(x, {x.size(0), x.size(1)})
                                     : torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)}));
  }
  dtype == ScalarType::Float ? backward<float>(grad, student, maps, scalars, p, gradients)
                             : backward<double>(grad, student, maps, scalars, p, gradients);
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mvat, CPU, m) {
  m.impl("attention_transfer_loss", TORCH_BOX(&attention_transfer_loss));
  m.impl("attention_transfer_loss_backward", TORCH_BOX(&attention_transfer_loss_backward));
}
