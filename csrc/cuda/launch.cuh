// What every kernel file includes: launching and counting, vector access, warp and block reductions.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "counters.h"
#include "types.h"

namespace fastnas::cuda {
// Launches a kernel under a name; bytes is what it must move: each operand read once, each result written once.
// Throws std::runtime_error with the name if the launch fails.
template <class... P, class... A>
void launch(const char* name, int64_t bytes, void (*kernel)(P...), dim3 grid, dim3 block, Stream stream, A&&... args) {
  count(name, bytes);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The block of kernels that work on channels_last maps: rows of threads along the channels, one row a pixel.
inline dim3 pixel_block(int64_t channels) {
  unsigned x = 4;
  while (x < channels && x < 64) x *= 2;
  return dim3(x, 256 / x);
}

// V elements that are read or written at once; its address must be a multiple of its size, or of 16.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T v[V];
};
template <class T, int V>
__device__ inline Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <class T, int V>
__device__ inline void store(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}
// Elements in 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));
inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }  // true for null

// The sum over the warp, in lane 0.
template <class T>
__device__ inline T warp_sum(T value) {
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(0xffffffffu, value, delta);
  return value;
}

// The sum of `count` values that lie `stride` elements apart, in order.
template <class A>
__device__ inline double strided_sum(const A* values, int64_t count, int64_t stride) {
  double sum = 0;
  for (int64_t j = 0; j < count; ++j) sum += static_cast<double>(values[j * stride]);
  return sum;
}

// The sum over the block, in thread 0, in an order that depends on the block's size alone.
// Every thread calls it; blockDim.x is a multiple of 32, and the block is one-dimensional.
template <class T>
__device__ inline T block_sum(T value) {
  __shared__ T warps[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  value = warp_sum(value);
  if (lane == 0) warps[warp] = value;
  __syncthreads();
  if (warp == 0) value = warp_sum(lane < static_cast<int>(blockDim.x) / 32 ? warps[lane] : T(0));
  __syncthreads();  // the next call may write warps
  return value;
}
}  // namespace fastnas::cuda
