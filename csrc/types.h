// Types shared by the glue, the CPU kernels and the CUDA kernels. No torch library header.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <functional>

struct CUstream_st;

namespace fastnas {
using Half = c10::Half;
using BFloat16 = c10::BFloat16;
using Stream = ::CUstream_st*;  // cudaStream_t

// Runs a body over [0, n) in pieces, possibly in parallel.
using Parallel = void (*)(int64_t n, const std::function<void(int64_t, int64_t)>& body);

// What a dtype is computed and accumulated in.
template <class T>
struct compute {
  using type = float;
};
template <>
struct compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename compute<T>::type;
}  // namespace fastnas
