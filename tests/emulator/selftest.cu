// Kernels with planted mistakes, each next to its correct form; test_emulator.py checks what the emulator says of them.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>

#include "cuda/launch.cuh"

using fastnas::cuda::block_sum;
using fastnas::cuda::launch;
using fastnas::cuda::warp_sum;

namespace {
constexpr int kThreads = 64;

// Each thread reads its neighbour's slot.
__global__ void exchange_kernel(int* out, bool barrier) {
  __shared__ int slots[kThreads];
  slots[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = slots[(threadIdx.x + kThreads - 1) % kThreads];
}

__global__ void diverge_kernel(int* out, bool together) {
  if (together || threadIdx.x < 7) __syncthreads();
  const int sum = together || threadIdx.x >= 7 ? warp_sum(1) : 0;
  out[threadIdx.x] = sum;
}

__global__ void bounds_kernel(float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = 1;
}

__global__ void shared_bounds_kernel(float* out, int offset) {
  __shared__ float slots[kThreads];
  slots[threadIdx.x + offset] = 1;
  __syncthreads();
  out[threadIdx.x] = slots[threadIdx.x];
}

// Blocks that build on each other's results.
__global__ void chain_kernel(int* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = blockIdx.x == 0 ? 1 : out[blockIdx.x - 1] + 1;
}

__global__ void unwritten_kernel(float* out, bool write) {
  __shared__ float slots[kThreads];
  if (write || threadIdx.x % 2) slots[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = slots[threadIdx.x];
}

// Each lane's own number comes back after a rotation, an exchange of pairs and a broadcast.
__global__ void shuffle_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int next = __shfl_sync(~0u, lane, lane + 1), pair = __shfl_xor_sync(~0u, lane, 1),
            first = __shfl_sync(~0u, lane, 0);
  __syncwarp();
  out[threadIdx.x] = (next + 31) % 32 + (pair ^ 1) + first - lane;
}

__global__ void sums_kernel(double* out) {
  const double block = block_sum(1.0 + threadIdx.x);
  const double again = block_sum(2.0 * threadIdx.x);
  if (threadIdx.x == 0) out[blockIdx.x * 2] = block, out[blockIdx.x * 2 + 1] = again;
}

template <class... P, class... A>
void run(void (*kernel)(P...), dim3 grid, A... args) {
  launch("selftest", 0, kernel, grid, dim3(kThreads), nullptr, args...);
}
}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const bool planted = !std::strcmp(argv[2], "planted");
  int bad = 0;
  int ints[kThreads] = {};
  float floats[kThreads] = {};
  try {
    if (!std::strcmp(argv[1], "race")) {
      run(exchange_kernel, dim3(1), ints, !planted);
      for (int i = 0; i < kThreads; ++i) bad += ints[i] != (i + kThreads - 1) % kThreads;
    } else if (!std::strcmp(argv[1], "diverge")) {
      run(diverge_kernel, dim3(1), ints, !planted);
    } else if (!std::strcmp(argv[1], "bounds")) {
      const auto heap = std::make_unique<float[]>(100);
      run(bounds_kernel, dim3(2), heap.get(), planted ? 101 : 100);
    } else if (!std::strcmp(argv[1], "shared_bounds")) {
      run(shared_bounds_kernel, dim3(1), floats, planted ? 1 : 0);
    } else if (!std::strcmp(argv[1], "blocks")) {
      run(chain_kernel, dim3(planted ? kThreads : 1), ints);
      for (int i = 0; i < (planted ? kThreads : 1); ++i) bad += ints[i] != i + 1;
    } else if (!std::strcmp(argv[1], "unwritten")) {
      run(unwritten_kernel, dim3(1), floats, !planted);
      for (float value : floats) bad += std::isnan(value);
    } else if (!std::strcmp(argv[1], "shuffles")) {
      run(shuffle_kernel, dim3(1), ints);
      for (int i = 0; i < kThreads; ++i) bad += ints[i] != i % 32;
    } else if (!std::strcmp(argv[1], "sums")) {
      double sums[4] = {};
      run(sums_kernel, dim3(2), sums);
      const double n = kThreads;
      for (int b = 0; b < 2; ++b) bad += sums[2 * b] != n * (n + 1) / 2, bad += sums[2 * b + 1] != n * (n - 1);
    } else if (!std::strcmp(argv[1], "grid")) {
      run(chain_kernel, dim3(1, planted ? 65536 : 1), ints);
    } else {
      return 2;
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("%d wrong\n", bad);
  return 0;
}
