// The launchers of csrc/cuda, compiled for the emulation, as a Python module. Tensors come as addresses.
#include <pybind11/pybind11.h>

#include "../../csrc/cuda/attention_map.h"

namespace py = pybind11;
using namespace mvat::cuda;

namespace mvat::cuda {
void self_test(int which, const float* x, float* out);
}

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

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

  m.def("attention_map", [](const Feature& x, float p, uintptr_t map) { attention_map(x, p, at<float>(map), {}); });
  m.def("attention_map_backward", [](uintptr_t grad, const Feature& x, float p, uintptr_t dx) {
    attention_map_backward(at<float>(grad), x, p, at<void>(dx), {});
  });
}
