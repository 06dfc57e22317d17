// Binds the launchers of csrc/cuda to torch.ops.mvat: checks, allocations, the stream. The only file here that knows PyTorch.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <initializer_list>
#include <limits>
#include <tuple>
#include <vector>

#include "attention_map.h"
#include "attention_transfer_loss.h"
#include "channel_attention.h"
#include "local_attention.h"

#ifndef USE_CUDA
// A PyTorch without CUDA has no such function; the library still loads there, its CUDA kernels never called.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using namespace mvat::cuda;
constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

// Makes a tensor's device the current one and looks for errors of the launches when they are done.
class Launches {
 public:
  explicit Launches(const Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "this PyTorch has no CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  void check(const char* op) const {
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

Type type_of(const char* op, const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return Type::kFloat;
  if (x.scalar_type() == ScalarType::BFloat16) return Type::kBFloat16;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, op, ": expected float32, bfloat16 or float16");
  return Type::kHalf;
}

// x as it is where samples lie side by side, whatever the other strides; a copy otherwise.
Tensor readable(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

// `x` must outlive the result.
Feature feature(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, op, ": expected x [B, C, T], got ", x.dim(), " dimensions");
  return {x.const_data_ptr(), x.size(0), x.size(1), x.size(2), x.stride(0), x.stride(1), type_of(op, x)};
}

void check_power(const char* op, double p) {
  STD_TORCH_CHECK(p >= 1 && std::isfinite(p), op, ": expected a finite p >= 1, got ", p);
}

void check_device(const char* op, const Tensor& x, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others)
    STD_TORCH_CHECK(other->is_cuda() && other->get_device_index() == x.get_device_index(), op,
                    ": expected all tensors on one device");
}

bool has_shape(const Tensor& x, std::initializer_list<int64_t> shape) {
  if (x.dim() != int64_t(shape.size())) return false;
  int64_t i = 0;
  for (const int64_t size : shape)
    if (x.size(i++) != size) return false;
  return true;
}

// A contiguous float32 tensor of this shape, as the kernels want their parameters.
Tensor parameter(const char* op, const char* name, const Tensor& x, std::initializer_list<int64_t> shape,
                 ScalarType type = ScalarType::Float) {
  STD_TORCH_CHECK(has_shape(x, shape), op, ": ", name, " has a wrong shape");
  STD_TORCH_CHECK(x.scalar_type() == type, op, ": ", name, " has a wrong dtype");
  return torch::stable::contiguous(x);
}

void check_gradient(const char* op, const Tensor& grad, const Tensor& x) {
  STD_TORCH_CHECK(has_shape(grad, {x.size(0), x.size(1), x.size(2)}) && grad.scalar_type() == x.scalar_type(), op,
                  ": expected grad in the shape and dtype of x");
}

Tensor floats(const Tensor& x, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(x, shape, ScalarType::Float);
}

Tensor bytes(const Tensor& x, int64_t size) { return torch::stable::new_empty(x, {size}, ScalarType::Byte); }

const float* in(const Tensor& x) { return x.const_data_ptr<float>(); }
float* out(Tensor& x) { return x.mutable_data_ptr<float>(); }

// ---- attention_map

Tensor map(const Tensor& x_any, double p) {
  const char* const op = "attention_map";
  check_power(op, p);
  STD_TORCH_CHECK(x_any.dim() == 3, op, ": expected x [B, C, T], got ", x_any.dim(), " dimensions");
  const Tensor x = readable(x_any);
  const Feature source = feature(op, x);
  const Launches launches(x);
  Tensor q = floats(x, {x.size(0), x.size(2)});
  attention_map(source, float(p), out(q), launches.stream());
  launches.check(op);
  return q;
}

Tensor map_backward(const Tensor& grad_any, const Tensor& x_any, double p) {
  const char* const op = "attention_map_backward";
  check_power(op, p);
  STD_TORCH_CHECK(x_any.dim() == 3, op, ": expected x [B, C, T], got ", x_any.dim(), " dimensions");
  check_device(op, x_any, {&grad_any});
  const Tensor x = readable(x_any);
  const Feature source = feature(op, x);
  const Tensor grad = parameter(op, "grad", grad_any, {x.size(0), x.size(2)});
  const Launches launches(x);
  Tensor dx = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  attention_map_backward(in(grad), source, float(p), dx.mutable_data_ptr(), launches.stream());
  launches.check(op);
  return dx;
}

// ---- attention_transfer_loss

// One side of all pairs; `kept` holds the tensors that the descriptions point into.
std::vector<Side> sides(const char* op, const std::vector<Tensor>& tensors, std::vector<Tensor>& kept) {
  std::vector<Side> result;
  kept.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.dim() == 2 || tensor.dim() == 3, op, ": expected features [B, C, T] or maps [B, T]");
    check_device(op, tensors[0], {&tensor});
    kept.push_back(readable(tensor));
    const Tensor& x = kept.back();
    const bool is_map = x.dim() == 2;
    const Feature source = is_map ? Feature{x.const_data_ptr(), x.size(0), 1, x.size(1), x.stride(0), 0, type_of(op, x)}
                                  : feature(op, x);
    STD_TORCH_CHECK(source.length >= 1, op, ": expected at least one time step");
    STD_TORCH_CHECK(source.batch <= kMaxInt && source.channels <= kMaxInt && source.length <= kMaxInt &&
                        source.batch * ceil_divide(source.length, 32) <= kMaxInt / 64,
                    op, ": a feature is too large");
    result.push_back({source, is_map});
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor> loss(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher, double p,
                                        bool paper) {
  const char* const op = "attention_transfer_loss";
  check_power(op, p);
  STD_TORCH_CHECK(!student.empty() && student.size() == teacher.size(), op, ": expected as many teachers as students");
  std::vector<Tensor> kept_student, kept_teacher;
  const std::vector<Side> students = sides(op, student, kept_student), teachers = sides(op, teacher, kept_teacher);
  check_device(op, student[0], {&teacher[0]});
  const int64_t pairs = int64_t(students.size());
  int64_t clips = 0, columns = 0;
  for (int64_t i = 0; i < pairs; i++) {
    const Feature &a = students[i].feature, &b = teachers[i].feature;
    STD_TORCH_CHECK(a.batch == b.batch && a.length == b.length, op, ": pair ", i, " differs in batch or time");
    clips += a.batch;
    columns += a.batch * a.length;
  }
  const Tensor& like = student[0];
  const Launches launches(like);
  Tensor value = floats(like, {pairs}), maps = floats(like, {2 * columns}), scalars = floats(like, {clips, 4});
  Tensor workspace = bytes(like, attention_transfer_loss_workspace(students.data(), teachers.data(), pairs));
  attention_transfer_loss(students.data(), teachers.data(), pairs, float(p), paper, out(value), out(maps), out(scalars),
                          workspace.mutable_data_ptr(), launches.stream());
  launches.check(op);
  return {value, maps, scalars};
}

std::vector<Tensor> loss_backward(const Tensor& grad_any, const std::vector<Tensor>& student, const Tensor& maps,
                                  const Tensor& scalars, double p, bool) {
  const char* const op = "attention_transfer_loss_backward";
  check_power(op, p);
  STD_TORCH_CHECK(!student.empty(), op, ": expected a student");
  std::vector<Tensor> kept;
  const std::vector<Side> students = sides(op, student, kept);
  const int64_t pairs = int64_t(students.size());
  check_device(op, student[0], {&grad_any, &maps, &scalars});
  int64_t clips = 0, columns = 0;
  for (const Side& side : students) clips += side.feature.batch, columns += side.feature.batch * side.feature.length;
  const Tensor grad = parameter(op, "grad", grad_any, {pairs});
  const Tensor all_maps = parameter(op, "maps", maps, {2 * columns});
  const Tensor all_scalars = parameter(op, "scalars", scalars, {clips, 4});
  const Launches launches(student[0]);
  std::vector<Tensor> dx;
  std::vector<void*> targets;
  for (const Tensor& x : kept) {
    dx.push_back(torch::stable::new_empty(x, x.sizes()));
    targets.push_back(dx.back().mutable_data_ptr());
  }
  attention_transfer_loss_backward(in(grad), students.data(), pairs, in(all_maps), in(all_scalars), float(p),
                                   targets.data(), launches.stream());
  launches.check(op);
  return dx;
}

// ---- channel_attention

std::tuple<Tensor, Tensor, Tensor, Tensor> channel(const Tensor& x_any, const Tensor& weight1_any, const Tensor& bias1_any,
                                                   const Tensor& weight2_any, const Tensor& bias2_any) {
  const char* const op = "channel_attention";
  STD_TORCH_CHECK(x_any.dim() == 3 && x_any.size(1) && x_any.size(2), op, ": expected x [B, C, T] with C, T >= 1");
  check_device(op, x_any, {&weight1_any, &bias1_any, &weight2_any, &bias2_any});
  const Tensor x = readable(x_any);
  const Feature source = feature(op, x);
  const int64_t batch = x.size(0), n = x.size(1), hidden = bias1_any.numel();
  const Tensor weight1 = parameter(op, "weight1", weight1_any, {hidden, n});
  const Tensor bias1 = parameter(op, "bias1", bias1_any, {hidden});
  const Tensor weight2 = parameter(op, "weight2", weight2_any, {n, hidden});
  const Tensor bias2 = parameter(op, "bias2", bias2_any, {n});
  const Launches launches(x);
  Tensor y = torch::stable::new_empty(x, {batch, n, x.size(2)});
  Tensor gate = floats(x, {batch, n}), pooled = floats(x, {2, batch, n});
  Tensor index = torch::stable::new_empty(x, {batch, n}, ScalarType::Long);
  Tensor workspace = bytes(x, channel_attention_workspace(source, hidden));
  channel_attention(source, {in(weight1), in(bias1), in(weight2), in(bias2), hidden}, y.mutable_data_ptr(), out(gate),
                    out(pooled), index.mutable_data_ptr<int64_t>(), workspace.mutable_data_ptr(), launches.stream());
  launches.check(op);
  return {y, gate, pooled, index};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> channel_backward(
    const Tensor& grad_any, const Tensor& x_any, const Tensor& gate_any, const Tensor& pooled_any, const Tensor& index_any,
    const Tensor& weight1_any, const Tensor& bias1_any, const Tensor& weight2_any) {
  const char* const op = "channel_attention_backward";
  STD_TORCH_CHECK(x_any.dim() == 3 && x_any.size(1) && x_any.size(2), op, ": expected x [B, C, T] with C, T >= 1");
  check_device(op, x_any, {&grad_any, &gate_any, &pooled_any, &index_any, &weight1_any, &bias1_any, &weight2_any});
  check_gradient(op, grad_any, x_any);
  const Tensor x = readable(x_any), grad = readable(grad_any);
  const Feature source = feature(op, x);
  const int64_t batch = x.size(0), n = x.size(1), hidden = bias1_any.numel();
  const Tensor gate = parameter(op, "gate", gate_any, {batch, n});
  const Tensor pooled = parameter(op, "pooled", pooled_any, {2, batch, n});
  const Tensor index = parameter(op, "index", index_any, {batch, n}, ScalarType::Long);
  const Tensor weight1 = parameter(op, "weight1", weight1_any, {hidden, n});
  const Tensor bias1 = parameter(op, "bias1", bias1_any, {hidden});
  const Tensor weight2 = parameter(op, "weight2", weight2_any, {n, hidden});
  const Launches launches(x);
  Tensor dx = torch::stable::new_empty(x, {batch, n, x.size(2)});
  Tensor dweight1 = floats(x, {hidden, n}), dbias1 = floats(x, {hidden});
  Tensor dweight2 = floats(x, {n, hidden}), dbias2 = floats(x, {n});
  Tensor workspace = bytes(x, channel_attention_backward_workspace(source, hidden));
  channel_attention_backward(feature(op, grad), source, in(gate), in(pooled), index.const_data_ptr<int64_t>(),
                             {in(weight1), in(bias1), in(weight2), nullptr, hidden}, dx.mutable_data_ptr(), out(dweight1),
                             out(dbias1), out(dweight2), out(dbias2), workspace.mutable_data_ptr(), launches.stream());
  launches.check(op);
  return {dx, dweight1, dbias1, dweight2, dbias2};
}

// ---- local_attention

// The parameters, checked and contiguous, beside the description that points into them.
struct Local {
  Tensor depthwise, weight1, bias1, conv, weight2, bias2;
  LocalParameters parameters;
  int64_t chunks;

  Local(const char* op, const Tensor& x, const Tensor& depthwise_any, const Tensor& weight1_any, const Tensor& bias1_any,
        const Tensor& conv_any, const Tensor& weight2_any, const Tensor& bias2_any, int64_t segment, double eps1, double eps2,
        bool training) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(1) >= 1, op, ": expected x [B, C, T] with C >= 1");
    check_device(op, x, {&depthwise_any, &weight1_any, &bias1_any, &conv_any, &weight2_any, &bias2_any});
    STD_TORCH_CHECK(segment >= 2 && segment % 2 == 0, op, ": expected an even segment_len of at least 2, got ", segment);
    STD_TORCH_CHECK(depthwise_any.dim() == 3 && conv_any.dim() == 3, op, ": expected weights of three dimensions");
    const int64_t n = x.size(1), taps1 = depthwise_any.size(2), taps2 = conv_any.size(2);
    STD_TORCH_CHECK(taps1 % 2 == 1 && taps2 % 2 == 1, op, ": expected odd kernels, got ", taps1, " and ", taps2);
    const char* const limit = local_attention_limit(segment, taps1);
    STD_TORCH_CHECK(limit == nullptr, op, ": the CUDA kernels take ", limit, ", got segment_len ", segment, " and ", taps1,
                    " taps; use mvat.kernels.use_backend('eager')");
    depthwise = parameter(op, "depthwise", depthwise_any, {n, 1, taps1});
    weight1 = parameter(op, "weight1", weight1_any, {n});
    bias1 = parameter(op, "bias1", bias1_any, {n});
    conv = parameter(op, "conv", conv_any, {1, 2, taps2});
    weight2 = parameter(op, "weight2", weight2_any, {1});
    bias2 = parameter(op, "bias2", bias2_any, {1});
    parameters = {in(depthwise), in(weight1), in(bias1), in(conv),    in(weight2),  in(bias2),
                  taps1,         taps2,       segment,   float(eps1), float(eps2), training};
    chunks = (x.size(2) + segment) / (segment / 2) + 1;
    STD_TORCH_CHECK(n <= kMaxInt && x.size(0) * chunks <= kMaxInt, op, ": x is too large");
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> local(
    const Tensor& x_any, const Tensor& depthwise, const Tensor& weight1, const Tensor& bias1, const Tensor& mean1_any,
    const Tensor& var1_any, const Tensor& conv, const Tensor& weight2, const Tensor& bias2, const Tensor& mean2_any,
    const Tensor& var2_any, int64_t segment, double eps1, double eps2, bool training) {
  const char* const op = "local_attention";
  const Local p(op, x_any, depthwise, weight1, bias1, conv, weight2, bias2, segment, eps1, eps2, training);
  const Tensor x = readable(x_any);
  const Feature source = feature(op, x);
  const int64_t batch = x.size(0), n = x.size(1);
  check_device(op, x, {&mean1_any, &var1_any, &mean2_any, &var2_any});
  const Tensor mean1 = parameter(op, "mean1", mean1_any, {n}), var1 = parameter(op, "var1", var1_any, {n});
  const Tensor mean2 = parameter(op, "mean2", mean2_any, {1}), var2 = parameter(op, "var2", var2_any, {1});
  const Launches launches(x);
  Tensor y = torch::stable::new_empty(x, {batch, n, x.size(2)});
  Tensor attention = floats(x, {batch, p.chunks, segment}), pooled = floats(x, {batch, 2, p.chunks, segment});
  Tensor index = torch::stable::new_empty(x, {batch, p.chunks, segment}, ScalarType::Int);
  Tensor statistics = floats(x, {2, n + 1});
  Tensor workspace = bytes(x, local_attention_workspace(source, p.parameters));
  local_attention(source, p.parameters, {in(mean1), in(var1), in(mean2), in(var2)}, y.mutable_data_ptr(),
                  {out(attention), out(pooled), index.mutable_data_ptr<int32_t>(), out(statistics)},
                  workspace.mutable_data_ptr(), launches.stream());
  launches.check(op);
  return {y, attention, pooled, index, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> local_backward(
    const Tensor& grad_any, const Tensor& x_any, const Tensor& depthwise, const Tensor& weight1, const Tensor& bias1,
    const Tensor& conv, const Tensor& weight2, const Tensor& attention_any, const Tensor& pooled_any, const Tensor& index_any,
    const Tensor& statistics_any, int64_t segment, double eps1, double eps2, bool training) {
  const char* const op = "local_attention_backward";
  // The gradients do not depend on bias2: any tensor of its shape stands in for it.
  const Local p(op, x_any, depthwise, weight1, bias1, conv, weight2, weight2, segment, eps1, eps2, training);
  check_device(op, x_any, {&grad_any, &attention_any, &pooled_any, &index_any, &statistics_any});
  check_gradient(op, grad_any, x_any);
  const Tensor x = readable(x_any), grad = readable(grad_any);
  const Feature source = feature(op, x);
  const int64_t batch = x.size(0), n = x.size(1);
  Tensor attention = parameter(op, "attention", attention_any, {batch, p.chunks, segment});
  Tensor pooled = parameter(op, "pooled", pooled_any, {batch, 2, p.chunks, segment});
  Tensor index = parameter(op, "index", index_any, {batch, p.chunks, segment}, ScalarType::Int);
  Tensor statistics = parameter(op, "statistics", statistics_any, {2, n + 1});
  const Launches launches(x);
  Tensor dx = torch::stable::new_empty(x, {batch, n, x.size(2)});
  Tensor ddepthwise = floats(x, {n, 1, p.parameters.taps1}), dweight1 = floats(x, {n}), dbias1 = floats(x, {n});
  Tensor dconv = floats(x, {1, 2, p.parameters.taps2}), dweight2 = floats(x, {1}), dbias2 = floats(x, {1});
  Tensor workspace = bytes(x, local_attention_backward_workspace(source, p.parameters));
  local_attention_backward(feature(op, grad), source, p.parameters,
                           {in(attention), in(pooled), index.const_data_ptr<int32_t>(), in(statistics)},
                           {dx.mutable_data_ptr(), out(ddepthwise), out(dweight1), out(dbias1), out(dconv), out(dweight2),
                            out(dbias2)},
                           workspace.mutable_data_ptr(), launches.stream());
  launches.check(op);
  return {dx, ddepthwise, dweight1, dbias1, dconv, dweight2, dbias2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mvat, CUDA, m) {
  m.impl("attention_map", TORCH_BOX(&map));
  m.impl("attention_map_backward", TORCH_BOX(&map_backward));
  m.impl("attention_transfer_loss", TORCH_BOX(&loss));
  m.impl("attention_transfer_loss_backward", TORCH_BOX(&loss_backward));
  m.impl("channel_attention", TORCH_BOX(&channel));
  m.impl("channel_attention_backward", TORCH_BOX(&channel_backward));
  m.impl("local_attention", TORCH_BOX(&local));
  m.impl("local_attention_backward", TORCH_BOX(&local_backward));
}
