// The launchers of csrc/cuda, compiled for the emulation, as a Python module. Tensors come as addresses.
#include <pybind11/pybind11.h>

#include <pybind11/stl.h>

#include <vector>

#include "../../csrc/cuda/attention_map.h"
#include "../../csrc/cuda/attention_transfer_loss.h"
#include "../../csrc/cuda/channel_attention.h"
#include "../../csrc/cuda/local_attention.h"

namespace py = pybind11;
using namespace mvat::cuda;

namespace mvat::cuda {
void self_test(int which, const float* x, float* out);
void join_moments(const float* partial, int64_t columns, int64_t rows, float* mean, float* variance);
}

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Working memory full of NaN.
struct Workspace {
  std::vector<char> bytes;
  explicit Workspace(int64_t size) : bytes(size + 16, char(0xff)) {}
  void* data() { return at<void>((reinterpret_cast<uintptr_t>(bytes.data()) + 15) & ~uintptr_t(15)); }
};

}  // namespace

PYBIND11_MODULE(mvat_emulation, m) {
  py::enum_<Type>(m, "Type")
      .value("float32", Type::kFloat)
      .value("bfloat16", Type::kBFloat16)
      .value("float16", Type::kHalf);
  py::class_<Feature>(m, "Feature")
      .def(py::init([](uintptr_t data, int64_t batch, int64_t channels, int64_t length, int64_t batch_stride,
                       int64_t channel_stride, Type type) {
        return Feature{at<void>(data), batch, channels, length, batch_stride, channel_stride, type};
      }));

  m.def("self_test", [](int which, uintptr_t x, uintptr_t out) { self_test(which, at<float>(x), at<float>(out)); });
  m.def("join_moments", [](uintptr_t partial, int64_t columns, int64_t rows, uintptr_t mean, uintptr_t variance) {
    join_moments(at<float>(partial), columns, rows, at<float>(mean), at<float>(variance));
  });

  m.def("attention_map", [](const Feature& x, float p, uintptr_t map) { attention_map(x, p, at<float>(map), {}); });
  m.def("attention_map_backward", [](uintptr_t grad, const Feature& x, float p, uintptr_t dx) {
    attention_map_backward(at<float>(grad), x, p, at<void>(dx), {});
  });

  py::class_<Side>(m, "Side").def(py::init([](const Feature& feature, bool is_map) { return Side{feature, is_map}; }));
  m.def("attention_transfer_loss", [](const std::vector<Side>& student, const std::vector<Side>& teacher, float p, bool paper,
                                      uintptr_t loss, uintptr_t maps, uintptr_t scalars) {
    Workspace workspace(attention_transfer_loss_workspace(student.data(), teacher.data(), student.size()));
    attention_transfer_loss(student.data(), teacher.data(), student.size(), p, paper, at<float>(loss), at<float>(maps),
                            at<float>(scalars), workspace.data(), {});
  });
  m.def("attention_transfer_loss_backward", [](uintptr_t grad, const std::vector<Side>& student, uintptr_t maps,
                                               uintptr_t scalars, float p, const std::vector<uintptr_t>& dx) {
    attention_transfer_loss_backward(at<float>(grad), student.data(), student.size(), at<float>(maps), at<float>(scalars), p,
                                     reinterpret_cast<void* const*>(dx.data()), {});
  });

  m.def("channel_attention", [](const Feature& x, int64_t hidden, uintptr_t w1, uintptr_t b1, uintptr_t w2, uintptr_t b2,
                                uintptr_t y, uintptr_t gate, uintptr_t pooled, uintptr_t index) {
    Workspace workspace(channel_attention_workspace(x, hidden));
    channel_attention(x, {at<float>(w1), at<float>(b1), at<float>(w2), at<float>(b2), hidden}, at<void>(y), at<float>(gate),
                      at<float>(pooled), at<int64_t>(index), workspace.data(), {});
  });
  m.def("channel_attention_backward", [](const Feature& grad, const Feature& x, int64_t hidden, uintptr_t gate,
                                         uintptr_t pooled, uintptr_t index, uintptr_t w1, uintptr_t b1, uintptr_t w2,
                                         uintptr_t dx, uintptr_t dw1, uintptr_t db1, uintptr_t dw2, uintptr_t db2) {
    Workspace workspace(channel_attention_backward_workspace(x, hidden));
    channel_attention_backward(grad, x, at<float>(gate), at<float>(pooled), at<int64_t>(index),
                               {at<float>(w1), at<float>(b1), at<float>(w2), nullptr, hidden}, at<void>(dx), at<float>(dw1),
                               at<float>(db1), at<float>(dw2), at<float>(db2), workspace.data(), {});
  });

  using Addresses = std::vector<uintptr_t>;
  const auto parameters_at = [](const Addresses& p, int64_t taps1, int64_t taps2, int64_t segment, float eps1, float eps2,
                                bool training) {
    return LocalParameters{at<float>(p[0]), at<float>(p[1]), at<float>(p[2]), at<float>(p[3]), at<float>(p[4]),
                           at<float>(p[5]), taps1, taps2, segment, eps1, eps2, training};
  };
  const auto saved_at = [](const Addresses& p) {
    return LocalSaved{at<float>(p[0]), at<float>(p[1]), at<int32_t>(p[2]), at<float>(p[3])};
  };
  const auto read_at = [](const Addresses& p) {
    return LocalRead{at<float>(p[0]), at<float>(p[1]), at<int32_t>(p[2]), at<float>(p[3])};
  };
  py::class_<LocalParameters>(m, "LocalParameters").def(py::init(parameters_at));
  m.def("local_attention_limit", &local_attention_limit);
  m.def("local_attention", [=](const Feature& x, const LocalParameters& parameters, const Addresses& running, uintptr_t y,
                               const Addresses& saved) {
    Workspace workspace(local_attention_workspace(x, parameters));
    const RunningStatistics statistics{at<float>(running[0]), at<float>(running[1]), at<float>(running[2]),
                                       at<float>(running[3])};
    local_attention(x, parameters, statistics, at<void>(y), saved_at(saved), workspace.data(), {});
  });
  m.def("local_attention_backward", [=](const Feature& grad, const Feature& x, const LocalParameters& parameters,
                                        const Addresses& saved, const Addresses& g) {
    Workspace workspace(local_attention_backward_workspace(x, parameters));
    const LocalGradients gradients{at<void>(g[0]), at<float>(g[1]), at<float>(g[2]), at<float>(g[3]), at<float>(g[4]),
                                   at<float>(g[5]), at<float>(g[6])};
    local_attention_backward(grad, x, parameters, read_at(saved), gradients, workspace.data(), {});
  });
}
