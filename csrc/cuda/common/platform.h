// The language the kernels are written in: CUDA C++, or its emulation on a CPU (tests/emulation), behind a few macros.
#pragma once

#include "types.h"

#ifdef MVAT_EMULATION
#include "cuda_emu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// A template's kernel is named by a variable first: its commas would end the macro's argument.
#define MVAT_LAUNCH(kernel, blocks, threads, bytes, stream, ...) \
  kernel<<<(blocks), unsigned(threads), bytes, stream>>>(__VA_ARGS__)
#define MVAT_SHARED(type, name, count) __shared__ type name[count]
#define MVAT_DYNAMIC_SHARED(type, name)                          \
  extern __shared__ __align__(16) unsigned char mvat_dynamic[]; \
  type* name = reinterpret_cast<type*>(mvat_dynamic)
// Beyond 48 KB a kernel must ask for its shared memory.
#define MVAT_ALLOW_SHARED(kernel, bytes) \
  if ((bytes) > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes))
#endif

namespace mvat::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
// Kernels that loop over their work take at most this many blocks; the grid's own limit is 2^31 - 1. Few in the emulation, so
// that its tests go through the loops.
#ifdef MVAT_EMULATION
constexpr int64_t kMaxBlocks = 5;
#else
constexpr int64_t kMaxBlocks = 1 << 30;
#endif

inline int64_t grid_for(int64_t blocks) { return blocks < kMaxBlocks ? blocks : kMaxBlocks; }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

__device__ inline void set(float& target, float x) { target = x; }
__device__ inline void set(__nv_bfloat16& target, float x) { target = __float2bfloat16_rn(x); }
__device__ inline void set(__half& target, float x) { target = __float2half_rn(x); }

template <int kBytes>
struct Word;
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// V neighbours in one transaction. V is 1, or 4 where the address allows it.
template <int V, typename T>
__device__ inline void load(const T* source, float (&value)[V]) {
  if constexpr (V == 1) {
    value[0] = to_float(*source);
  } else {
    union {
      typename Word<V * sizeof(T)>::type word;
      T element[V];
    };
    word = *reinterpret_cast<const typename Word<V * sizeof(T)>::type*>(source);
#pragma unroll
    for (int v = 0; v < V; v++) value[v] = to_float(element[v]);
  }
}

template <int V, typename T>
__device__ inline void store(T* target, const float (&value)[V]) {
  if constexpr (V == 1) {
    set(*target, value[0]);
  } else {
    union {
      typename Word<V * sizeof(T)>::type word;
      T element[V];
    };
#pragma unroll
    for (int v = 0; v < V; v++) set(element[v], value[v]);
    *reinterpret_cast<typename Word<V * sizeof(T)>::type*>(target) = word;
  }
}

// Goes through begin, begin + step, ... below end: from(i, value) loads, to(i, value) stores. kAhead loads go out before the
// first store, which the compiler cannot arrange by itself, for it must fear that they overlap.
template <int V, int kAhead, typename From, typename To>
__device__ __forceinline__ void transform(int64_t begin, int64_t end, int64_t step, const From& from, const To& to) {
  for (int64_t i = begin; i < end; i += kAhead * step) {
    float value[kAhead][V];
#pragma unroll
    for (int a = 0; a < kAhead; a++)
      if (i + a * step < end) from(i + a * step, value[a]);
#pragma unroll
    for (int a = 0; a < kAhead; a++)
      if (i + a * step < end) to(i + a * step, value[a]);
  }
}

// Calls work(T()) with the element type that `type` names.
template <typename Work>
void with_type(Type type, const Work& work) {
  if (type == Type::kFloat) return work(float());
  if (type == Type::kBFloat16) return work(__nv_bfloat16());
  work(__half());
}

// Whether rows that begin at `data` and follow each other by the strides given can be read four elements at a time.
template <typename... Strides>
bool fours(const void* data, Type type, int64_t length, Strides... strides) {
  return reinterpret_cast<uintptr_t>(data) % (4 * size_of(type)) == 0 && length % 4 == 0 && ((strides % 4 == 0) && ...);
}
inline bool fours(const Feature& x) { return fours(x.data, x.type, x.length, x.batch_stride, x.channel_stride); }

}  // namespace mvat::cuda
