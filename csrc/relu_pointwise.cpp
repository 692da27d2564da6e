#include "relu_pointwise.h"

#include "common.h"

namespace fastnas {
namespace {
ReluPointwiseArgs arguments(const char* op, const Tensor& x, const std::vector<Tensor>& weights, int64_t stride) {
  STD_TORCH_CHECK(is_channels_last(x) && x.numel() > 0, op, ": x must be 4-d, not empty and in channels_last memory");
  STD_TORCH_CHECK(stride == 1 || stride == 2, op, ": stride must be 1 or 2, got ", stride);
  STD_TORCH_CHECK(x.size(2) % stride == 0 && x.size(3) % stride == 0, op, ": stride 2 needs an even height and width");
  const int64_t groups = static_cast<int64_t>(weights.size());
  STD_TORCH_CHECK(groups >= 1 && groups <= stride, op,
                  ": weights must be one tensor where stride is 1, and one or two where it is 2");
  ReluPointwiseArgs a;
  a.N = x.size(0), a.in = x.size(1), a.H = x.size(2), a.W = x.size(3);
  a.stride = static_cast<int>(stride), a.groups = static_cast<int>(groups);
  a.x = x.const_data_ptr();
  for (int g = 0; g < a.groups; ++g) {
    const Tensor& w = weights[g];
    STD_TORCH_CHECK(w.scalar_type() == x.scalar_type() && w.device() == x.device(), op,
                    ": weights must have x's dtype and device");
    STD_TORCH_CHECK(
        w.dim() == 4 && w.size(0) > 0 && w.size(1) == a.in && w.numel() == w.size(0) * a.in && w.is_contiguous(), op,
        ": weights must be contiguous, of shape (out, ", a.in, ", 1, 1)");
    a.weights[g] = w.const_data_ptr();
    a.begin[g + 1] = a.channels += w.size(0);
  }
  return a;
}

// The CPU has kernels for float and double; half types reach it as float.
template <class T>
void call([[maybe_unused]] const Tensor& x, const ReluPointwiseArgs& a, bool backward) {
#ifdef FASTNAS_EMULATED
  backward ? cuda::relu_pointwise_backward<T>(a, nullptr) : cuda::relu_pointwise<T>(a, nullptr);
#else
#ifdef FASTNAS_CUDA
  if (x.is_cuda())
    return backward ? cuda::relu_pointwise_backward<T>(a, current_stream(x))
                    : cuda::relu_pointwise<T>(a, current_stream(x));
#endif
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>)
    backward ? cpu::relu_pointwise_backward<T>(a, parallel) : cpu::relu_pointwise<T>(a, parallel);
  else
    STD_TORCH_CHECK(false, "relu_pointwise: the CPU kernels take float32 and float64");
#endif
}

// CUDA kernels take their scratch from torch's allocator; CPU kernels bring their own.
template <class T>
Tensor workspace([[maybe_unused]] ReluPointwiseArgs& a, const Tensor& x) {
  int64_t bytes = 0;
#if defined(FASTNAS_CUDA) || defined(FASTNAS_EMULATED)
#ifndef FASTNAS_EMULATED
  if (x.is_cuda())
#endif
    bytes = cuda::relu_pointwise_workspace<T>(a);
#endif
  Tensor t = empty({bytes}, ScalarType::Byte, x);
  a.workspace = t.mutable_data_ptr();
  return t;
}

Tensor relu_pointwise(const Tensor& x, const std::vector<Tensor>& weights, int64_t stride) {
  ReluPointwiseArgs a = arguments("relu_pointwise", x, weights, stride);
  OnDevice guard(x);
  Tensor z = empty_channels_last({a.N, a.channels, a.H / stride, a.W / stride}, x);
  a.z = z.mutable_data_ptr();
  FASTNAS_DISPATCH(x.scalar_type(), "relu_pointwise", [&](auto t) { call<decltype(t)>(x, a, false); });
  return z;
}

std::tuple<Tensor, std::vector<Tensor>> relu_pointwise_backward(const Tensor& grad, const Tensor& x,
                                                                const std::vector<Tensor>& weights, int64_t stride,
                                                                bool need_x, bool need_weights) {
  const char* op = "_relu_pointwise_backward";
  ReluPointwiseArgs a = arguments(op, x, weights, stride);
  STD_TORCH_CHECK(is_channels_last(grad) && grad.size(0) == a.N && grad.size(1) == a.channels &&
                      grad.size(2) == a.H / stride && grad.size(3) == a.W / stride &&
                      grad.scalar_type() == x.scalar_type() && grad.device() == x.device(),
                  op, ": grad must have the output's shape, dtype and device, in channels_last memory");
  OnDevice guard(x);
  a.grad = grad.const_data_ptr();
  Tensor grad_x = need_x ? empty_channels_last({a.N, a.in, a.H, a.W}, x) : empty({0}, x.scalar_type(), x);
  if (need_x) a.grad_x = grad_x.mutable_data_ptr();
  std::vector<Tensor> grad_weights;
  for (int g = 0; need_weights && g < a.groups; ++g) {
    grad_weights.push_back(torch::stable::empty_like(weights[g]));
    a.grad_weights[g] = grad_weights.back().mutable_data_ptr();
  }
  FASTNAS_DISPATCH(x.scalar_type(), "_relu_pointwise_backward", [&](auto t) {
    Tensor scratch = workspace<decltype(t)>(a, x);
    call<decltype(t)>(x, a, true);
  });
  return {std::move(grad_x), std::move(grad_weights)};
}
}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_FRAGMENT(FASTNAS_OPS, m) {
  m.def("relu_pointwise(Tensor x, Tensor[] weights, int stride) -> Tensor");
  m.def(
      "_relu_pointwise_backward(Tensor grad, Tensor x, Tensor[] weights, int stride, bool need_x, bool need_weights) "
      "-> (Tensor, Tensor[])");
}
FASTNAS_IMPL("relu_pointwise", &fastnas::relu_pointwise)
FASTNAS_IMPL("_relu_pointwise_backward", &fastnas::relu_pointwise_backward)
