// Runs CUDA kernels on the host: blocks one after another, a fiber for each CUDA thread of a block.
//
// With this directory first on the include path an unmodified .cu file compiles as C++20. Kernels are launched through
// cudaLaunchKernelEx (<<<>>> is not C++) and keep their shared memory static. What it finds, beside wrong results:
//   - barriers and shuffles that not every thread reaches: the launch throws, naming the block;
//   - missing barriers and dependence on the order of blocks: FASTNAS_EMULATOR_SEED=n shuffles the threads of every
//     phase and the blocks of every launch;
//   - shared memory read before it is written: every block starts with all bytes 0xFF, which is NaN in any float;
//   - accesses out of bounds: compile with -fsanitize=address,undefined.
// It has no tensor cores, asynchronous copies, dynamic shared memory, or concurrency between blocks.
#pragma once
#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <dlfcn.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN 1
#define __shared__ static  // a global with red zones
#else
#define EMULATOR_ASAN 0
#define __shared__ static thread_local  // so that all of it can be found, between the two markers, and overwritten
#endif
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidConfiguration = 9;
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

#if !EMULATOR_ASAN
// Defined first and last among the kernels' objects at link time (shared_bounds.cpp).
extern __thread unsigned char emulator_shared_begin, emulator_shared_end;
#endif

namespace emulator {
constexpr size_t kStackBytes = EMULATOR_ASAN ? 256 << 10 : 64 << 10;
enum class State : uint8_t { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  ucontext_t entry;
  jmp_buf resume;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  dim3 thread;
  unsigned lane = 0, warp = 0, mask = 0, parity = 0;
  bool started = false;
  State state = State::done;
};

struct Slot {
  alignas(8) unsigned char bytes[8];
};

inline std::mutex mutex;           // one launch at a time
inline std::vector<Fiber> fibers;  // the threads of the running block
inline std::vector<Slot> slots;    // [warp][parity][lane]: values exchanged by shuffles
inline Fiber* self = nullptr;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline const void* host_stack = nullptr;
inline size_t host_stack_bytes = 0;

inline void leaving(void** fake_stack, const void* stack, size_t bytes) {
#if EMULATOR_ASAN
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#endif
}
inline void arrived(void* fake_stack, const void** stack, size_t* bytes) {
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, stack, bytes);
#endif
}

// No frame is left for good by these jumps. AddressSanitizer's own longjmp, and what GCC puts before a call that cannot
// return, clear what is known of a whole stack each time, which takes longer than the kernels: so this calls libc's,
// and does not say that it never returns.
inline void jump(jmp_buf& to) {
#if EMULATOR_ASAN
  static const auto longjmp =
      reinterpret_cast<void (*)(jmp_buf, int)>(dlsym(dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD), "_longjmp"));
  longjmp(to, 1);
#else
  _longjmp(to, 1);
#endif
}

// Gives control back to the scheduler until the barrier opens.
inline void wait(State barrier) {
  Fiber* me = self;
  me->state = barrier;
  if (_setjmp(me->resume) == 0) {
    leaving(&me->fake_stack, host_stack, host_stack_bytes);
    jump(scheduler);
  }
  arrived(me->fake_stack, &host_stack, &host_stack_bytes);
}

inline void fiber_main() {
  arrived(nullptr, &host_stack, &host_stack_bytes);
  for (;;) {
    body();
    wait(State::done);
  }
}

__attribute__((noinline)) inline void run(Fiber& fiber) {
  static void* fake_stack;
  self = &fiber;
  threadIdx = fiber.thread;
  if (_setjmp(scheduler)) {
    arrived(fake_stack, nullptr, nullptr);
    return;
  }
  leaving(&fake_stack, fiber.stack, kStackBytes);
  if (fiber.started) jump(fiber.resume);
  fiber.started = true;
  setcontext(&fiber.entry);
}

__attribute__((noinline)) inline void create(Fiber& fiber) {
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  fiber.stack = static_cast<char*>(stack);
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = stack;
  fiber.entry.uc_stack.ss_size = kStackBytes;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, fiber_main, 0);
}

inline void make_fibers(size_t threads) {
  for (Fiber& fiber : fibers) {
    if (!fiber.stack) continue;
#if EMULATOR_ASAN
    __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // frames may be on it
#endif
    munmap(fiber.stack, kStackBytes);
  }
  fibers = std::vector<Fiber>(threads);
}

[[noreturn]] inline void stuck() {
  size_t n[4] = {};
  for (const Fiber& fiber : fibers) ++n[static_cast<size_t>(fiber.state)];
  const std::string block =
      std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z);
  make_fibers(0);
  throw std::runtime_error("emulator: block (" + block + ") is stuck: " + std::to_string(n[1]) +
                           " threads at __syncthreads, " + std::to_string(n[2]) + " at a warp primitive, " +
                           std::to_string(n[3]) + " returned");
}

// Opens every barrier whose participants have all arrived; false if nothing could move.
inline bool release() {
  const bool block = std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) {
    return fiber.state == State::at_block_barrier || fiber.state == State::done;
  });
  bool moved = false;
  if (block) {
    for (Fiber& fiber : fibers)
      if (fiber.state == State::at_block_barrier) fiber.state = State::ready, moved = true;
    return moved;
  }
  for (Fiber& fiber : fibers) {
    if (fiber.state != State::at_warp_barrier) continue;
    Fiber* warp = &fiber - fiber.lane;
    const unsigned mask = fiber.mask;
    const size_t lanes = std::min<size_t>(32, fibers.data() + fibers.size() - warp);
    bool all = true;
    for (size_t l = 0; l < lanes; ++l)
      if (mask >> l & 1) all &= warp[l].state == State::at_warp_barrier && warp[l].mask == mask;
    if (!all) continue;
    for (size_t l = 0; l < lanes; ++l)
      if (mask >> l & 1) warp[l].state = State::ready, moved = true;
  }
  return moved;
}

inline void poison_shared() {
#if !EMULATOR_ASAN
  unsigned char* begin = &emulator_shared_begin;
  unsigned char* end = &emulator_shared_end;
  if (end < begin) throw std::logic_error("emulator: shared_bounds.cpp must be linked around the kernels");
  std::memset(begin, 0xFF, end - begin);
#endif
}

inline void run_block(std::mt19937* shuffle, std::vector<unsigned>& order) {
  poison_shared();
  unsigned i = 0;
  for (unsigned z = 0; z < blockDim.z; ++z)
    for (unsigned y = 0; y < blockDim.y; ++y)
      for (unsigned x = 0; x < blockDim.x; ++x, ++i) {
        Fiber& fiber = fibers[i];
        if (!fiber.stack) create(fiber);
        fiber.thread = {x, y, z};
        fiber.lane = i % 32;
        fiber.warp = i / 32;
        fiber.parity = 0;
        fiber.state = State::ready;
      }
  for (;;) {
    if (shuffle) std::shuffle(order.begin(), order.end(), *shuffle);
    for (unsigned k : order)
      if (fibers[k].state == State::ready) run(fibers[k]);
    if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.state == State::done; }))
      return;
    if (!release()) stuck();
  }
}

// Two buffers by turns: a lane that is already at the next shuffle does not overwrite what a slower one still reads.
template <class T>
T exchange(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8);
  self->parity ^= 1;
  Slot* buffer = &slots[(self->warp * 2 + self->parity) * 32];
  std::memcpy(buffer[self->lane].bytes, &value, sizeof(T));
  self->mask = mask;
  wait(State::at_warp_barrier);
  T result;
  std::memcpy(&result, buffer[source].bytes, sizeof(T));
  return result;
}

inline void launch(const cudaLaunchConfig_t& config, std::function<void()> kernel) {
  std::lock_guard<std::mutex> lock(mutex);
  const dim3 grid = gridDim = config.gridDim;
  const dim3 block = blockDim = config.blockDim;
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  if (threads != fibers.size()) make_fibers(threads);
  slots.resize((threads + 31) / 32 * 64);
  body = std::move(kernel);
  const char* seed = std::getenv("FASTNAS_EMULATOR_SEED");
  std::mt19937 random(seed ? static_cast<unsigned>(std::atoi(seed)) : 0);
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  std::vector<uint64_t> blocks(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  if (seed) std::shuffle(blocks.begin(), blocks.end(), random);
  for (uint64_t b : blocks) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(seed ? &random : nullptr, order);
  }
}
}  // namespace emulator

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... args) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535 || config->dynamicSmemBytes > 0)
    return cudaErrorInvalidConfiguration;
  emulator::launch(*config, [&] { kernel(args...); });
  return cudaSuccess;
}

inline void __syncthreads() { emulator::wait(emulator::State::at_block_barrier); }
inline void __syncwarp(unsigned mask = ~0u) {
  emulator::self->mask = mask;
  emulator::wait(emulator::State::at_warp_barrier);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulator::exchange(mask, value, lane & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulator::exchange(mask, value, emulator::self->lane ^ lanes);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = emulator::self->lane;
  return emulator::exchange(mask, value, lane + delta < 32 ? lane + delta : lane);
}
