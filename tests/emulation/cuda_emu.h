// Runs the CUDA kernels of csrc/cuda on the CPU, for tests: one fibre a CUDA thread, one block at a time on an OS thread.
//
// What it notices: shared memory read before it was written (it starts as NaN), a missing barrier (the fibres run in ascending
// and in descending order by turns, so that a reader comes before its writer sooner or later), a barrier or shuffle that not
// all threads of the block or warp reach (an error instead of a hang), writes past the dynamic shared memory. What it does not
// see: races between blocks, reads out of bounds of global memory, anything that only the hardware does.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulation switches its fibres in x86-64 assembly for Linux"
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __restrict__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __syncthreads() ::emu::wait(::emu::block().barrier)
#define threadIdx (::emu::block().current->index)
#define blockIdx (::emu::block().block_index)
#define blockDim (::emu::block().block_size)
#define gridDim (::emu::block().grid_size)

#define MVAT_LAUNCH(kernel, blocks, threads, bytes, stream, ...) \
  ::emu::launch(::emu::grid(blocks), dim3(unsigned(threads)), bytes, [&] { kernel(__VA_ARGS__); })
#define MVAT_SHARED(type, name, count) \
  static char name##_key;              \
  type* name = ::emu::shared<type>(&name##_key, count)
#define MVAT_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::emu::block().dynamic.data())
#define MVAT_ALLOW_SHARED(kernel, bytes) ((void)(kernel), (void)(bytes))

asm(R"(.pushsection .text
.weak mvat_emu_swap
.type mvat_emu_swap,@function
mvat_emu_swap:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi); movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.popsection)");
extern "C" void mvat_emu_swap(void** save_stack, void* to_stack);

namespace emu {

constexpr size_t kStack = 64 << 10;
constexpr size_t kGuard = 64;        // bytes behind the dynamic shared memory that nobody may touch
constexpr char kPoison = char(0xff);  // a float of such bytes is a NaN, an int is -1

struct Barrier {
  int need = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slot[32];
};

struct Fibre {
  void* stack_pointer = nullptr;
  dim3 index;
  int number = 0;
  bool done = false;
  std::unique_ptr<char[]> stack;
};

struct Block {
  dim3 block_index, block_size, grid_size;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Fibre> fibres;
  Fibre* current = nullptr;
  void* scheduler = nullptr;
  std::vector<char> dynamic;
  std::map<const void*, std::unique_ptr<char[]>> named;  // shared arrays by the place of their declaration
  const std::function<void()>* body = nullptr;
  bool moved = false;
  std::exception_ptr error;
};

inline Block& block() {
  static thread_local Block b;
  return b;
}

inline void wait(Barrier& barrier) {
  Block& b = block();
  const uint64_t generation = barrier.generation;
  b.moved = true;
  if (++barrier.arrived == barrier.need) {
    barrier.arrived = 0;
    barrier.generation++;
    return;
  }
  while (barrier.generation == generation) mvat_emu_swap(&b.current->stack_pointer, b.scheduler);
}

template <typename T>
T* shared(const void* key, size_t count) {
  auto& array = block().named[key];
  if (!array) {
    array.reset(new char[count * sizeof(T) + 16]);
    std::memset(array.get(), kPoison, count * sizeof(T));
  }
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(array.get()) + 15) & ~uintptr_t(15));
}

inline Warp& warp() { return block().warps[block().current->number / 32]; }
inline int lane() { return block().current->number % 32; }

template <typename T>
T exchange(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xffffffffu) throw std::runtime_error("emulation: a shuffle must name the whole warp");
  Warp& w = warp();
  std::memcpy(&w.slot[lane()], &value, sizeof(T));
  wait(w.barrier);
  T result;
  std::memcpy(&result, &w.slot[source], sizeof(T));
  wait(w.barrier);
  return result;
}

inline void entry() {
  Block& b = block();
  try {
    (*b.body)();
  } catch (...) {
    b.error = std::current_exception();
  }
  b.current->done = b.moved = true;
  mvat_emu_swap(&b.current->stack_pointer, b.scheduler);
}

inline void prepare(Fibre& fibre, int number, const dim3& size) {
  fibre.number = number;
  fibre.done = false;
  fibre.index = dim3(number % size.x, number / size.x % size.y, number / (size.x * size.y));
  const uintptr_t top = (reinterpret_cast<uintptr_t>(fibre.stack.get()) + kStack) & ~uintptr_t(15);
  void** stack = reinterpret_cast<void**>(top) - 8;  // six registers, the return address, a pad
  std::fill(stack, stack + 8, nullptr);
  stack[6] = reinterpret_cast<void*>(&entry);
  fibre.stack_pointer = stack;
}

inline void run_block(const std::function<void()>& body, size_t bytes, bool descending) {
  Block& b = block();
  const int count = b.block_size.x * b.block_size.y * b.block_size.z;
  b.body = &body;
  b.error = nullptr;
  b.named.clear();
  b.dynamic.assign(bytes + kGuard, kPoison);
  b.barrier = {count};
  b.warps.assign((count + 31) / 32, {});
  for (int i = 0; i < int(b.warps.size()); i++) b.warps[i].barrier.need = std::min(32, count - 32 * i);
  if (int(b.fibres.size()) < count) b.fibres.resize(count);
  for (int i = 0; i < count; i++) {
    if (!b.fibres[i].stack) b.fibres[i].stack.reset(new char[kStack]);
    prepare(b.fibres[i], i, b.block_size);
  }
  for (int left = count; left; descending = !descending) {
    b.moved = false;
    for (int i = 0; i < count; i++) {
      Fibre& fibre = b.fibres[descending ? count - 1 - i : i];
      if (fibre.done) continue;
      b.current = &fibre;
      mvat_emu_swap(&b.scheduler, fibre.stack_pointer);
      left -= fibre.done;
      if (b.error) std::rethrow_exception(b.error);
    }
    if (!b.moved && left) throw std::runtime_error("emulation: threads wait at different barriers or shuffles");
  }
  if (std::count(b.dynamic.end() - kGuard, b.dynamic.end(), kPoison) != kGuard)
    throw std::runtime_error("emulation: a write past the dynamic shared memory");
}

inline dim3 grid(dim3 blocks) { return blocks; }
inline dim3 grid(int64_t blocks) { return dim3(unsigned(blocks)); }

inline void launch(dim3 grid, dim3 size, size_t bytes, const std::function<void()>& body) {
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  if (blocks == 0) throw std::runtime_error("emulation: a launch of no blocks");
  if (size.x * size.y * size.z > 1024 || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("emulation: a launch beyond CUDA's limits");
  std::exception_ptr error;
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < blocks; i++) {
    Block& b = block();
    b.grid_size = grid;
    b.block_size = size;
    b.block_index = dim3(i % grid.x, i / grid.x % grid.y, i / (int64_t(grid.x) * grid.y));
    try {
      run_block(body, bytes, i % 2 == 1);
    } catch (...) {
#pragma omp critical(emu_error)
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace emu

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emu::exchange(mask, value, source & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip) {
  return emu::exchange(mask, value, emu::lane() ^ flip);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int offset) {
  return emu::exchange(mask, value, emu::lane() + offset < 32 ? emu::lane() + offset : emu::lane());
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }

// Half precision as 16 bits that are rounded to nearest even.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) { return float(std::bit_cast<_Float16>(x.bits)); }
inline __half __float2half_rn(float x) { return {std::bit_cast<uint16_t>(_Float16(x))}; }
