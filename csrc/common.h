// What the glue of every op uses: dtype dispatch, checks, allocation, the current stream, the choice of backend.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/arena.h"
#include "types.h"

// The emulated library is the CUDA side compiled for the host: same sources, another namespace of ops, CPU tensors.
#ifdef FASTNAS_EMULATED
#define FASTNAS_OPS fastnas_emulated
#else
#define FASTNAS_OPS fastnas
#endif

// Registers FUNCTION as the kernel of an op on every device that this library serves.
#if defined(FASTNAS_CUDA) && !defined(FASTNAS_EMULATED)
#define FASTNAS_IMPL(NAME, FUNCTION)                                                    \
  STABLE_TORCH_LIBRARY_IMPL(FASTNAS_OPS, CPU, m) { m.impl(NAME, TORCH_BOX(FUNCTION)); } \
  STABLE_TORCH_LIBRARY_IMPL(FASTNAS_OPS, CUDA, m) { m.impl(NAME, TORCH_BOX(FUNCTION)); }
#else
#define FASTNAS_IMPL(NAME, FUNCTION) \
  STABLE_TORCH_LIBRARY_IMPL(FASTNAS_OPS, CPU, m) { m.impl(NAME, TORCH_BOX(FUNCTION)); }
#endif

// Calls cpu::FUNCTION(..., parallel) or cuda::FUNCTION(..., stream), by where TENSOR lives.
#if defined(FASTNAS_EMULATED)
#define FASTNAS_CALL(TENSOR, FUNCTION, ...) ::fastnas::cuda::FUNCTION(__VA_ARGS__, nullptr)
#elif defined(FASTNAS_CUDA)
#define FASTNAS_CALL(TENSOR, FUNCTION, ...)                                                       \
  ((TENSOR).is_cuda() ? ::fastnas::cuda::FUNCTION(__VA_ARGS__, ::fastnas::current_stream(TENSOR)) \
                      : ::fastnas::cpu::FUNCTION(__VA_ARGS__, ::fastnas::parallel))
#else
#define FASTNAS_CALL(TENSOR, FUNCTION, ...) ::fastnas::cpu::FUNCTION(__VA_ARGS__, ::fastnas::parallel)
#endif

// Calls BODY, a generic lambda that takes a value of the tensor's C++ type.
#define FASTNAS_DISPATCH(DTYPE, NAME, BODY)                                             \
  THO_DISPATCH_V2(DTYPE, NAME, AT_WRAP([&] { (BODY)(scalar_t{}); }), AT_FLOATING_TYPES, \
                  torch::headeronly::ScalarType::Half, torch::headeronly::ScalarType::BFloat16)

#if defined(FASTNAS_CUDA) && !defined(FASTNAS_EMULATED)
// Weak: the library also loads on a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace fastnas {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(FASTNAS_CUDA) && !defined(FASTNAS_EMULATED)
inline Stream current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}
#endif

// Makes the tensor's GPU current for the life of the guard; does nothing for CPU tensors.
struct OnDevice {
  explicit OnDevice(const Tensor& t) {
    if (t.is_cuda()) guard.emplace(t.get_device_index());
  }
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
};

// Runs body over [0, n) in torch's own thread pool.
inline void parallel(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end); });
}

inline Tensor empty(std::vector<int64_t> size, ScalarType dtype, const Tensor& like) {
  return torch::stable::empty(size, dtype, std::nullopt, like.device());
}

// An uninitialised (N, C, H, W) tensor in channels_last memory.
inline Tensor empty_channels_last(std::vector<int64_t> size, const Tensor& like) {
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

// A tensor of these strides whose CPU memory comes from the arena; its strides must be dense.
inline Tensor arena_tensor(const std::vector<int64_t>& size, const std::vector<int64_t>& strides, const Tensor& like) {
  int64_t bytes = static_cast<int64_t>(like.element_size());
  for (int64_t n : size) bytes *= n;
  return torch::stable::from_blob(cpu::arena_take(static_cast<size_t>(bytes)), size, strides, like.device(),
                                  like.scalar_type(), [](void* block) { cpu::arena_give(block); });
}

// The same as empty_channels_last for maps of the size of a feature map; on the CPU it comes from the arena.
inline Tensor empty_map(std::vector<int64_t> size, const Tensor& like) {
  if (like.is_cuda()) return empty_channels_last(std::move(size), like);
  const int64_t c = size[1], h = size[2], w = size[3];
  return arena_tensor(size, {h * w * c, 1, w * c, c}, like);
}

// The same for a contiguous tensor.
inline Tensor empty_blob(std::vector<int64_t> size, const Tensor& like) {
  if (like.is_cuda()) return empty(std::move(size), like.scalar_type(), like);
  std::vector<int64_t> strides(size.size(), 1);
  for (size_t i = size.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * size[i];
  return arena_tensor(size, strides, like);
}

// float for float, half and bfloat16; double for double.
inline ScalarType compute_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// True for an (N, C, H, W) tensor whose memory is dense in the order N, H, W, C.
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}
}  // namespace fastnas
