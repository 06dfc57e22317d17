// The network's blocks for inference on the CPU, float32, from weights with their batch norms folded in (mvat/models/folded.py).
//
// Each is one operator and reads and writes features once: a convolution with its activation, the Conformer block, and what
// comes after the views of a multi-view block.
#include "inference.h"

#include "features.h"
#include "isa.h"
#include "stage.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using namespace mvat;
using namespace mvat::inference;

struct Level {
  int64_t lanes, block;
  void (*conv_act)(const ConvAct&, int64_t b, int64_t t, float* workspace);
  void (*conformer)(const Conformer&, int64_t b, int64_t t, float* workspace);
  void (*merge)(const Merge&, int64_t b, int64_t t, float* workspace);
};

#define MVAT_ENTRIES(NAME, TARGET, L, NV, MR)                                                                            \
  TARGET void conv_act_##NAME(const ConvAct& s, int64_t b, int64_t t, float* workspace) {                                \
    Tile<L, NV, MR>::conv_act(s, b, t, workspace);                                                                       \
  }                                                                                                                      \
  TARGET void conformer_##NAME(const Conformer& s, int64_t b, int64_t t, float* workspace) {                             \
    Tile<L, NV, MR>::conformer(s, b, t, workspace);                                                                      \
  }                                                                                                                      \
  TARGET void merge_##NAME(const Merge& s, int64_t b, int64_t t, float* workspace) {                                     \
    Tile<L, NV, MR>::merge(s, b, t, workspace);                                                                          \
  }                                                                                                                      \
  const Level level_##NAME = {L, L * NV, conv_act_##NAME, conformer_##NAME, merge_##NAME};
#if MVAT_LEVELS
MVAT_ENTRIES(v4, MVAT_V4, 16, 3, 8)
MVAT_ENTRIES(v3, MVAT_V3, 8, 3, 4)
#endif
MVAT_ENTRIES(v1, , 4, 3, 4)
#undef MVAT_ENTRIES

const Level& level() {
#if MVAT_LEVELS
  if (isa_level() >= 3) return isa_level() == 4 ? level_v4 : level_v3;
#endif
  return level_v1;
}

// Tiles of columns whose `rows` rows, each with a halo, stay in half of the second cache, and an even number of them at least.
Grid grid(int64_t batch, int64_t length, int64_t rows, int64_t halo) {
  const Level& kernels = level();
  const int64_t fits = std::clamp<int64_t>((512 << 10) / (4 * rows), kernels.block, 768);
  const int64_t tiles = std::max<int64_t>(1, (batch * length + fits - 1) / fits), even = (tiles + 1) / 2 * 2;
  const int64_t share = (batch * length + even - 1) / even;
  const int64_t unit = share >= 4 * kernels.block ? kernels.block : kernels.lanes;
  const int64_t columns = (std::max<int64_t>(1, std::min(share, length)) + unit - 1) / unit * unit;
  return {columns, conv::row_size<float>(columns + halo + kernels.block), length};
}

template <typename Block>
void run(const Block& block, int64_t batch, int64_t tiles, void (*tile)(const Block&, int64_t, int64_t, float*)) {
  torch::stable::parallel_for(0, batch * tiles, 1, [&](int64_t begin, int64_t end) {
    const Aligned<float> workspace(block.workspace());
    for (int64_t i = begin; i < end; i++) tile(block, i / tiles, i % tiles * block.grid.columns, workspace.data);
  });
}

// Folded weights, in this order and of these sizes.
void check(const char* op, const Tensor& x, std::initializer_list<std::pair<const Tensor*, int64_t>> weights) {
  STD_TORCH_CHECK(x.dim() == 3 && x.scalar_type() == ScalarType::Float, op, ": expected x [B, C, T] of float32");
  for (const auto& [weight, size] : weights)
    STD_TORCH_CHECK(weight->scalar_type() == ScalarType::Float && weight->is_contiguous() && weight->numel() == size, op,
                    ": expected contiguous float32 weights, ", size, " values where there are ", weight->numel());
}

Tensor conv_act(const Tensor& x_any, const Tensor& weight, const Tensor& bias, int64_t stride, int64_t padding, bool transposed,
                int64_t activation) {
  STD_TORCH_CHECK(weight.dim() == 3 && stride >= 1 && padding >= 0, "conv_act: expected a weight [kernel, out, in]");
  STD_TORCH_CHECK(activation >= kIdentity && activation <= kSilu, "conv_act: unknown activation ", activation);
  const int64_t kernel = weight.size(0), out = weight.size(1), in = weight.size(2);
  check("conv_act", x_any, {{&weight, kernel * out * in}, {&bias, out}});
  STD_TORCH_CHECK(x_any.size(1) == in, "conv_act: expected ", in, " channels, got ", x_any.size(1));
  const Tensor x = readable(x_any);
  const int64_t length = x.size(2);
  const int64_t length_out = transposed ? (length - 1) * stride + kernel - 2 * padding : (length + 2 * padding - kernel) / stride + 1;
  STD_TORCH_CHECK(length_out >= 1, "conv_act: x is too short");
  Tensor y = torch::stable::new_empty(x, {x.size(0), out, length_out});
  ConvAct s{};
  s.conv = {in, out, kernel, stride, padding, transposed, length, length_out};
  s.grid = grid(x.size(0), s.conv.columns(), s.conv.rows_in() + s.conv.rows_out(), s.conv.taps());
  s.activation = Activation(activation);
  s.x = features<float>(x);
  s.weight = weight.const_data_ptr<float>();
  s.bias = bias.const_data_ptr<float>();
  s.y = new_features<float>(y);
  run(s, x.size(0), s.grid.tiles(), level().conv_act);
  return y;
}

Tensor conformer(const Tensor& x_any, const Tensor& first, const Tensor& first_bias, const Tensor& depthwise, const Tensor& depthwise_bias,
                 const Tensor& middle, const Tensor& middle_bias, const Tensor& last, const Tensor& shortcut, const Tensor& last_bias) {
  STD_TORCH_CHECK(x_any.dim() == 3 && depthwise.dim() == 2 && depthwise.size(1) % 2 == 1,
                  "conformer_block: expected x [B, C, T] and depthwise weights [C, kernel] with an odd kernel");
  const int64_t in = x_any.size(1), out = last_bias.numel(), kernel = depthwise.size(1);
  check("conformer_block", x_any,
        {{&first, 2 * in * in}, {&first_bias, 2 * in}, {&depthwise, in * kernel}, {&depthwise_bias, in}, {&middle, out * in},
         {&middle_bias, out}, {&last, out * out}, {&shortcut, out * in}, {&last_bias, out}});
  const Tensor x = readable(x_any);
  Tensor y = torch::stable::new_empty(x, {x.size(0), out, x.size(2)});
  Conformer s{};
  s.grid = grid(x.size(0), x.size(2), 4 * in + 2 * out, kernel);
  s.in = in;
  s.out = out;
  s.kernel = kernel;
  s.x = features<float>(x);
  s.first = first.const_data_ptr<float>();
  s.first_bias = first_bias.const_data_ptr<float>();
  s.depthwise = depthwise.const_data_ptr<float>();
  s.depthwise_bias = depthwise_bias.const_data_ptr<float>();
  s.middle = middle.const_data_ptr<float>();
  s.middle_bias = middle_bias.const_data_ptr<float>();
  s.last = last.const_data_ptr<float>();
  s.shortcut = shortcut.const_data_ptr<float>();
  s.last_bias = last_bias.const_data_ptr<float>();
  s.y = new_features<float>(y);
  run(s, x.size(0), s.grid.tiles(), level().conformer);
  return y;
}

Tensor merge(const Tensor& x_any, const Tensor& view0, const Tensor& view1, const Tensor& view2, const Tensor& branches,
             const Tensor& branches_bias, const Tensor& gates, const Tensor& gates_bias, const Tensor& last, const Tensor& last_bias,
             const Tensor& shortcut, const Tensor& shortcut_bias) {
  STD_TORCH_CHECK(x_any.dim() == 3 && view0.dim() == 3, "multi_view_merge: expected features [B, C, T]");
  const int64_t channels = x_any.size(1), view = view0.size(1), hidden = gates_bias.numel() / 2;
  check("multi_view_merge", x_any,
        {{&branches, 9 * view * view}, {&branches_bias, 3 * view}, {&gates, 6 * hidden * view}, {&gates_bias, 2 * hidden},
         {&last, channels * hidden}, {&last_bias, channels}, {&shortcut, channels * channels}, {&shortcut_bias, channels}});
  for (const Tensor* v : {&view0, &view1, &view2})
    STD_TORCH_CHECK(v->dim() == 3 && v->size(0) == x_any.size(0) && v->size(1) == view && v->size(2) == x_any.size(2) &&
                        v->scalar_type() == ScalarType::Float,
                    "multi_view_merge: expected float32 views [B, n, T] for x [B, C, T]");
  const Tensor x = readable(x_any), v0 = readable(view0), v1 = readable(view1), v2 = readable(view2);
  Tensor y = torch::stable::new_empty(x, {x.size(0), channels, x.size(2)});
  Merge s{};
  s.grid = grid(x.size(0), x.size(2), 2 * channels + 3 * view + 3 * hidden, 2);
  s.channels = channels;
  s.view = view;
  s.hidden = hidden;
  s.x = features<float>(x);
  s.views[0] = features<float>(v0);
  s.views[1] = features<float>(v1);
  s.views[2] = features<float>(v2);
  s.branches = branches.const_data_ptr<float>();
  s.branches_bias = branches_bias.const_data_ptr<float>();
  s.gates = gates.const_data_ptr<float>();
  s.gates_bias = gates_bias.const_data_ptr<float>();
  s.last = last.const_data_ptr<float>();
  s.last_bias = last_bias.const_data_ptr<float>();
  s.shortcut = shortcut.const_data_ptr<float>();
  s.shortcut_bias = shortcut_bias.const_data_ptr<float>();
  s.y = new_features<float>(y);
  run(s, x.size(0), s.grid.tiles(), level().merge);
  return y;
}

// Every bit counts, and where it stands: lanes of sums in which each value meets the weight of its place.
MVAT_CLONES void add_values(const uint32_t* data, int64_t size, uint32_t* lanes) {
  constexpr int64_t kLanes = 64;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int64_t l = 0; l < kLanes; l++) lanes[l] = (lanes[l] ^ data[i + l]) * 2654435761u + 1;
  for (; i < size; i++) lanes[i % kLanes] = (lanes[i % kLanes] ^ data[i]) * 2654435761u + 1;
}

int64_t fingerprint(const std::vector<Tensor>& tensors) {
  constexpr int64_t kBlock = 1 << 16;  // values that one item reads
  std::vector<Tensor> sources;
  std::vector<std::pair<const uint32_t*, int64_t>> blocks;
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "fingerprint: expected float32");
    sources.push_back(dense(tensor));
    const uint32_t* data = reinterpret_cast<const uint32_t*>(sources.back().const_data_ptr<float>());
    for (int64_t i = 0; i < tensor.numel(); i += kBlock) blocks.push_back({data + i, std::min(kBlock, tensor.numel() - i)});
  }
  std::vector<uint64_t> hashes(blocks.size());
  torch::stable::parallel_for(0, blocks.size(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      uint32_t lanes[64] = {};
      add_values(blocks[i].first, blocks[i].second, lanes);
      uint64_t hash = 14695981039346656037u;
      for (uint32_t lane : lanes) hash = (hash ^ lane) * 1099511628211u;
      hashes[i] = hash;
    }
  });
  uint64_t total = 14695981039346656037u;
  for (uint64_t hash : hashes) total = (total ^ hash) * 1099511628211u;
  return int64_t(total);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mvat, CPU, m) {
  m.impl("conv_act", TORCH_BOX(&conv_act));
  m.impl("fingerprint", TORCH_BOX(&fingerprint));
  m.impl("conformer_block", TORCH_BOX(&conformer));
  m.impl("multi_view_merge", TORCH_BOX(&merge));
}
