// What the launchers of csrc/cuda and their callers share. Plain C++: no kernel code, no PyTorch.
#pragma once

#include <cstdint>

#ifdef MVAT_EMULATION
using cudaStream_t = void*;
#else
#include <cuda_runtime_api.h>
#endif

namespace mvat::cuda {

enum class Type : int32_t { kFloat, kBFloat16, kHalf };

inline int64_t size_of(Type type) { return type == Type::kFloat ? 4 : 2; }
inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tensor [B, C, T] whose samples lie side by side. Strides count elements.
struct Feature {
  const void* data;
  int64_t batch, channels, length, batch_stride, channel_stride;
  Type type;
};

// Hands out pieces of one allocation, each on a 16-byte boundary. Over a null pointer it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    char* const piece = base_ ? base_ + used_ : nullptr;
    used_ += ceil_divide(count * int64_t(sizeof(T)), 16) * 16;
    return reinterpret_cast<T*>(piece);
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace mvat::cuda
