// The distance of normalised attention maps, all pairs in one launch: || Q_S/||Q_S|| - Q_T/||Q_T|| ||.
//
// Forward, three launches for up to 28 pairs, their descriptions in the kernels' parameters: (1) every feature is read once
// and leaves its map, and a largest value and a sum of squares for each tile; (2) tiles of maps, C times smaller, leave the
// normalised maps' difference in the teacher's place and partial sums; (3) a block a pair joins these. Norms and distances are
// in double: squares neither over- nor underflow, and the difference of close maps keeps its digits. Backward, one launch: the
// student's features are read once and their gradients written once. Every sum has one fixed order.
#include "attention_transfer_loss.h"

#include <vector>

#include "common/power.h"
#include "common/reduce.h"

namespace mvat::cuda {
namespace {

constexpr int kPairs = 28;           // a launch: its table must stay below the 4 KB of every GPU
constexpr int64_t kPiece = 2048;     // columns of a map for a block of the second kernel
constexpr float kTiny = 1.17549435e-38f;  // a map without one normal number counts as silence

// A feature or a map, with its tiles.
struct Entry {
  const void* data;
  int64_t batch_stride, channel_stride;
  int64_t map;   // where its map begins, in floats from `maps`
  int64_t tile;  // its first tile among the norms
  int32_t channels, length, tiles, first_block;
  Type type;
  int8_t vector, rows;
  bool is_map;

  __device__ Spread spread() const { return {vector, rows}; }
};

struct Features {
  Entry entry[2 * kPairs];
  int32_t count;
};

// The largest value and the sum of squares of a tile of a map.
struct Norm {
  double squares;
  float largest;
};

// The last entry whose first block is not behind this one.
template <typename Table>
__device__ inline int find_entry(const Table& table) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entry[middle].first_block <= int64_t(blockIdx.x)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <typename T, int V>
__device__ void leave_map(const Entry& e, int64_t clip, int64_t start, float p, float* map, Norm* norm) {
  const T* const source = static_cast<const T*>(e.data) + clip * e.batch_stride + start;
  float largest = 0;
  double squares = 0;
  const auto emit = [&](int64_t column, float q) {
    map[column] = q;
    largest = fmaxf(largest, fabsf(q));
    squares += double(q) * q;
  };
  if (e.is_map) {
    const int tile = e.spread().tile();
    for (int column = threadIdx.x; column < tile && column < e.length - start; column += kTileThreads)
      emit(column, to_float(source[column]));
  } else {
    map_tile<T, V>(source, e.channel_stride, e.channels, e.length - start, e.spread(), p, emit);
  }
  largest = block_max<kTileWarps>(largest);
  squares = block_sum<kTileWarps>(squares);
  if (threadIdx.x == 0) *norm = {squares, largest};
}

template <typename T>
__device__ void leave_map(const Entry& e, int64_t clip, int64_t start, float p, float* map, Norm* norm) {
  if (e.vector == 4) return leave_map<T, 4>(e, clip, start, p, map, norm);
  leave_map<T, 1>(e, clip, start, p, map, norm);
}

// Left to itself ptxas spills for the sake of a fifth block.
__global__ void __launch_bounds__(kTileThreads, 4)
    maps_kernel(const __grid_constant__ Features table, float p, float* maps, Norm* norms) {
  const Entry& e = table.entry[find_entry(table)];
  const int64_t block = blockIdx.x - e.first_block, clip = block / e.tiles;
  const int64_t start = block % e.tiles * e.spread().tile();
  float* const map = maps + e.map + clip * e.length + start;
  Norm* const norm = norms + e.tile + block;
  if (e.type == Type::kFloat) return leave_map<float>(e, clip, start, p, map, norm);
  if (e.type == Type::kBFloat16) return leave_map<__nv_bfloat16>(e, clip, start, p, map, norm);
  leave_map<__half>(e, clip, start, p, map, norm);
}

// A pair's maps, in pieces.
struct PairEntry {
  int64_t student_map, teacher_map, student_tile, teacher_tile;
  int64_t clip;   // its first clip among all pairs'
  int64_t piece;  // its first piece among all pairs'
  int32_t student_tiles, teacher_tiles, batch, length, pieces, first_block;
};

struct Pairs {
  PairEntry entry[kPairs];
  int32_t count;
};

// What a piece adds: the squared distance, and the student's normalised map times the difference.
struct Distance {
  double squares, product;
};

// The norm of one map, joined in the order of its tiles; infinite for silence, which is divided by it.
__device__ inline Norm whole_norm(const Norm* tiles, int64_t count) {
  float largest = 0;
  double squares = 0;
  for (int64_t i = threadIdx.x; i < count; i += kTileThreads) {
    largest = fmaxf(largest, tiles[i].largest);
    squares += tiles[i].squares;
  }
  largest = block_max<kTileWarps>(largest);
  squares = block_sum<kTileWarps>(squares);
  if (largest < kTiny && squares == squares) return {INFINITY, 0};
  return {sqrt(squares), largest};
}

__global__ void __launch_bounds__(kTileThreads)
    distances_kernel(const __grid_constant__ Pairs table, float* maps, const Norm* norms, Distance* distances,
                     float* scalars) {
  const PairEntry& e = table.entry[find_entry(table)];
  const int64_t block = blockIdx.x - e.first_block, clip = block / e.pieces, start = block % e.pieces * kPiece;
  const Norm student = whole_norm(norms + e.student_tile + clip * e.student_tiles, e.student_tiles);
  const Norm teacher = whole_norm(norms + e.teacher_tile + clip * e.teacher_tiles, e.teacher_tiles);
  const double student_scale = 1 / student.squares, teacher_scale = 1 / teacher.squares;
  const float* const q_student = maps + e.student_map + clip * e.length;
  float* const q_teacher = maps + e.teacher_map + clip * e.length;
  double squares = 0, product = 0;
  for (int64_t t = start + threadIdx.x; t < start + kPiece && t < e.length; t += kTileThreads) {
    const double normalised = q_student[t] * student_scale;
    double difference = normalised - q_teacher[t] * teacher_scale;
    // Tiles of other sizes may round the norms of equal maps differently: equal maps have no distance.
    if (fabs(difference) <= 1e-14 * fabs(normalised)) difference = 0;
    q_teacher[t] = float(difference);
    squares += difference * difference;
    product += normalised * difference;
  }
  squares = block_sum<kTileWarps>(squares);
  product = block_sum<kTileWarps>(product);
  if (threadIdx.x) return;
  distances[e.piece + block] = {squares, product};
  if (start == 0) {
    float* const scalar = scalars + (e.clip + clip) * 4;
    scalar[0] = student.largest;
    scalar[1] = float(student.largest / student.squares);
  }
}

__global__ void __launch_bounds__(kTileThreads)
    losses_kernel(const __grid_constant__ Pairs table, const Distance* distances, bool paper, float* loss, float* scalars) {
  const PairEntry& e = table.entry[blockIdx.x];
  const int lane = threadIdx.x % 32;
  double total = 0;
  // A warp a clip.
  for (int64_t clip = threadIdx.x / 32; clip < e.batch; clip += kTileWarps) {
    double squares = 0, product = 0;
    for (int64_t i = lane; i < e.pieces; i += 32) {
      squares += distances[e.piece + clip * e.pieces + i].squares;
      product += distances[e.piece + clip * e.pieces + i].product;
    }
    squares = warp_sum(squares);
    product = warp_sum(product);
    if (lane) continue;
    const double distance = sqrt(squares);
    total += paper ? distance : squares / e.length;
    float* const scalar = scalars + (e.clip + clip) * 4;
    const double factor = paper ? 1 / (distance * e.batch) : 2.0 / (double(e.length) * e.batch);
    // Equal maps, and a silent student, have no gradient; a NaN has one.
    scalar[2] = distance == 0 || (scalar[0] == 0 && distance == distance) ? 0.0f : float(factor);
    scalar[3] = float(product);
  }
  total = block_sum<kTileWarps>(total);
  if (threadIdx.x == 0) loss[blockIdx.x] = e.batch ? float(total / e.batch) : 0.0f;
}

// A student's feature and where its gradient goes.
struct GradientEntry {
  const void* data;
  void* dx;
  int64_t batch_stride, channel_stride, map, clip;
  int32_t channels, length, tiles, first_block;
  int32_t pair;
  Type type;
  int8_t vector, rows;
  bool is_map;

  __device__ Spread spread() const { return {vector, rows}; }
};

struct Gradients {
  GradientEntry entry[kPairs];
  int32_t count;
};

template <typename T, int V>
__device__ void leave_gradient(const GradientEntry& e, const float* grad, const float* student, const float* difference,
                               const float* scalars, float p) {
  const int64_t block = blockIdx.x - e.first_block, clip = block / e.tiles;
  const Place<V> place(e.spread());
  const int64_t t = block % e.tiles * e.spread().tile() + place.column;
  if (t >= e.length) return;
  const float* const scalar = scalars + (e.clip + clip) * 4;
  const float largest = scalar[0], share = scalar[1], factor = scalar[2], product = scalar[3];
  float dq[V] = {};
  if (!(factor == 0)) {
    const float scale = grad[e.pair] * factor;
    float q[V], apart[V];
    load<V>(student + e.map + clip * e.length + t, q);
    load<V>(difference + e.map + clip * e.length + t, apart);
#pragma unroll
    for (int v = 0; v < V; v++) dq[v] = (apart[v] - q[v] / largest * share * product) * scale * share / largest;
  }
  T* const dx = static_cast<T*>(e.dx) + clip * e.channels * e.length + t;
  if (e.is_map) return store<V>(dx, dq);
  const T* const x = static_cast<const T*>(e.data) + clip * e.batch_stride + t;
  gradient_tile<T, V>(place, dq, x, e.channel_stride, e.channels, p, dx, e.length);
}

template <typename T>
__device__ void leave_gradient(const GradientEntry& e, const float* grad, const float* student, const float* difference,
                               const float* scalars, float p) {
  if (e.vector == 4) return leave_gradient<T, 4>(e, grad, student, difference, scalars, p);
  leave_gradient<T, 1>(e, grad, student, difference, scalars, p);
}

// student and difference are the two halves of `maps`.
__global__ void __launch_bounds__(kTileThreads)
    gradients_kernel(const __grid_constant__ Gradients table, const float* grad, const float* student,
                     const float* difference, const float* scalars, float p) {
  const GradientEntry& e = table.entry[find_entry(table)];
  if (e.type == Type::kFloat) return leave_gradient<float>(e, grad, student, difference, scalars, p);
  if (e.type == Type::kBFloat16) return leave_gradient<__nv_bfloat16>(e, grad, student, difference, scalars, p);
  leave_gradient<__half>(e, grad, student, difference, scalars, p);
}

static_assert(sizeof(Features) < 4000 && sizeof(Pairs) < 4000 && sizeof(Gradients) < 4000);

int64_t map_size(const Side& side) { return side.feature.batch * side.feature.length; }

int64_t tiles_of(const Side& side) {
  return ceil_divide(side.feature.length, spread_over(side.feature.channels, fours(side.feature)).tile());
}

struct Workspace {
  Norm* norms;
  Distance* distances;

  Workspace(Arena& arena, const Side* student, const Side* teacher, int64_t pairs) {
    int64_t tiles = 0, pieces = 0;
    for (int64_t i = 0; i < pairs; i++) {
      tiles += student[i].feature.batch * (tiles_of(student[i]) + tiles_of(teacher[i]));
      pieces += student[i].feature.batch * ceil_divide(student[i].feature.length, kPiece);
    }
    norms = arena.take<Norm>(tiles);
    distances = arena.take<Distance>(pieces);
  }
};

int64_t total_map_size(const Side* student, int64_t pairs) {
  int64_t total = 0;
  for (int64_t i = 0; i < pairs; i++) total += map_size(student[i]);
  return total;
}

Entry entry_of(const Side& side, int64_t map, int64_t tile, int64_t first_block) {
  const Feature& x = side.feature;
  const Spread spread = spread_over(x.channels, fours(x));
  return {x.data,          x.batch_stride,
          x.channel_stride, map,
          tile,            int32_t(x.channels),
          int32_t(x.length), int32_t(tiles_of(side)),
          int32_t(first_block), x.type,
          int8_t(spread.vector), int8_t(spread.rows),
          side.is_map};
}

}  // namespace

int64_t attention_transfer_loss_workspace(const Side* student, const Side* teacher, int64_t pairs) {
  Arena count(nullptr);
  Workspace(count, student, teacher, pairs);
  return count.used();
}

void attention_transfer_loss(const Side* student, const Side* teacher, int64_t pairs, float p, bool paper, float* loss,
                             float* maps, float* scalars, void* workspace, cudaStream_t stream) {
  Arena arena(workspace);
  const Workspace space(arena, student, teacher, pairs);
  const int64_t half = total_map_size(student, pairs);
  int64_t map = 0, tile = 0, clip = 0, piece = 0;
  for (int64_t begin = 0; begin < pairs; begin += kPairs) {
    Features features = {};
    Pairs table = {};
    int64_t blocks = 0, piece_blocks = 0;
    for (int64_t i = begin; i < pairs && i < begin + kPairs; i++) {
      const int64_t batch = student[i].feature.batch, length = student[i].feature.length;
      const int64_t student_tiles = tiles_of(student[i]), teacher_tiles = tiles_of(teacher[i]);
      const int64_t student_tile = tile, teacher_tile = tile + batch * student_tiles;
      features.entry[features.count++] = entry_of(student[i], map, student_tile, blocks);
      blocks += batch * student_tiles;
      features.entry[features.count++] = entry_of(teacher[i], half + map, teacher_tile, blocks);
      blocks += batch * teacher_tiles;
      tile = teacher_tile + batch * teacher_tiles;
      const int64_t pieces = ceil_divide(length, kPiece);
      table.entry[table.count++] = {map,           half + map,      student_tile,    teacher_tile,    clip,
                                    piece,         int32_t(student_tiles), int32_t(teacher_tiles), int32_t(batch),
                                    int32_t(length), int32_t(pieces), int32_t(piece_blocks)};
      map += batch * length;
      clip += batch;
      piece += batch * pieces;
      piece_blocks += batch * pieces;
    }
    if (blocks) {
      MVAT_LAUNCH(maps_kernel, blocks, kTileThreads, 0, stream, features, p, maps, space.norms);
      MVAT_LAUNCH(distances_kernel, piece_blocks, kTileThreads, 0, stream, table, maps, space.norms, space.distances,
                  scalars);
    }
    MVAT_LAUNCH(losses_kernel, table.count, kTileThreads, 0, stream, table, space.distances, paper, loss + begin, scalars);
  }
}

void attention_transfer_loss_backward(const float* grad, const Side* student, int64_t pairs, const float* maps,
                                      const float* scalars, float p, void* const* dx, cudaStream_t stream) {
  const float* const differences = maps + total_map_size(student, pairs);
  int64_t map = 0, clip = 0;
  for (int64_t begin = 0; begin < pairs; begin += kPairs) {
    Gradients table = {};
    int64_t blocks = 0;
    for (int64_t i = begin; i < pairs && i < begin + kPairs; i++) {
      const Feature& x = student[i].feature;
      const bool aligned = fours(x) && fours(dx[i], x.type, x.length) && fours(maps + map, Type::kFloat, x.length) &&
                           fours(differences + map, Type::kFloat, x.length);
      const Spread spread = spread_over(x.channels, aligned);
      const int64_t tiles = ceil_divide(x.length, spread.tile());
      table.entry[table.count++] = {x.data,          dx[i],           x.batch_stride,  x.channel_stride,
                                    map,             clip,            int32_t(x.channels), int32_t(x.length),
                                    int32_t(tiles),  int32_t(blocks), int32_t(i),      x.type,
                                    int8_t(spread.vector), int8_t(spread.rows), student[i].is_map};
      blocks += x.channels ? x.batch * tiles : 0;
      map += map_size(student[i]);
      clip += x.batch;
    }
    if (blocks)
      MVAT_LAUNCH(gradients_kernel, blocks, kTileThreads, 0, stream, table, grad, maps, differences, scalars, p);
  }
}

}  // namespace mvat::cuda
