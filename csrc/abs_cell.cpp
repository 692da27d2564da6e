#include "abs_cell.h"

#include "common.h"

namespace fastnas {
namespace {
// Takes the sizes from a map of x's shape.
AbsCellArgs arguments(const char* op, const Tensor& map, const Tensor& weights, const std::vector<int64_t>& ops,
                      const std::vector<Tensor>& kernels) {
  AbsCellArgs a;
  a.N = map.size(0), a.C = map.size(1), a.H = map.size(2), a.W = map.size(3);
  a.ops_count = static_cast<int>(ops.size());
  STD_TORCH_CHECK(a.ops_count >= 1 && a.ops_count <= kMaxAbsOps, op, ": expected 1 to ", kMaxAbsOps,
                  " candidates, got ", ops.size());
  for (int o = 0; o < a.ops_count; ++o) {
    STD_TORCH_CHECK(ops[o] >= 0 && ops[o] < kAbsOps, op, ": no candidate has the code ", ops[o]);
    a.ops[o] = static_cast<AbsOp>(ops[o]);
  }
  STD_TORCH_CHECK(weights.dim() == 2 && weights.size(1) == a.ops_count && weights.is_contiguous() &&
                      weights.scalar_type() == compute_dtype(map) && weights.device() == map.device(),
                  op, ": weights must be contiguous, of shape (edges, ", a.ops_count,
                  "), float32 (float64 for float64 maps), on the maps' device");
  while (a.nodes < kMaxAbsNodes && a.edges() < weights.size(0)) ++a.nodes;
  STD_TORCH_CHECK(a.nodes >= 2 && a.edges() == weights.size(0), op,
                  ": weights must have n (n - 1) / 2 rows, n of 2 to ", kMaxAbsNodes, ", got ", weights.size(0));
  a.weights = weights.const_data_ptr();
  size_t given = 0;
  for (int k = 0; k < a.edges() * a.ops_count; ++k) {
    const AbsOp kind = a.ops[k % a.ops_count];
    if (kind != AbsOp::conv1x1 && kind != AbsOp::conv3x3) continue;
    const int64_t width = kind == AbsOp::conv1x1 ? 1 : 3;
    STD_TORCH_CHECK(given < kernels.size(), op, ": fewer kernels than convolutions: ", kernels.size());
    const Tensor& w = kernels[given++];
    STD_TORCH_CHECK(w.dim() == 4 && w.size(0) == a.C && w.size(1) == a.C && w.size(2) == width && w.size(3) == width &&
                        w.is_contiguous() && w.scalar_type() == map.scalar_type() && w.device() == map.device(),
                    op, ": kernels must be contiguous, of shape (", a.C, ", ", a.C, ", ", width, ", ", width,
                    "), with the maps' dtype and device");
    a.kernels[k] = w.const_data_ptr();
  }
  STD_TORCH_CHECK(given == kernels.size(), op, ": more kernels than convolutions: ", kernels.size());
  return a;
}

// The CPU has kernels for float and double; half types reach it as float.
template <class T>
void call([[maybe_unused]] const Tensor& t, const AbsCellArgs& a, bool backward) {
#ifdef FASTNAS_EMULATED
  backward ? cuda::abs_cell_backward<T>(a, nullptr) : cuda::abs_cell<T>(a, nullptr);
#else
#ifdef FASTNAS_CUDA
  if (t.is_cuda())
    return backward ? cuda::abs_cell_backward<T>(a, current_stream(t)) : cuda::abs_cell<T>(a, current_stream(t));
#endif
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>)
    backward ? cpu::abs_cell_backward<T>(a, parallel) : cpu::abs_cell<T>(a, parallel);
  else
    STD_TORCH_CHECK(false, "abs_cell: the CPU kernels take float32 and float64");
#endif
}

// CUDA kernels take their scratch from torch's allocator; CPU kernels bring their own.
template <class T>
Tensor workspace([[maybe_unused]] AbsCellArgs& a, const Tensor& t, [[maybe_unused]] bool backward) {
  int64_t bytes = 0;
#if defined(FASTNAS_CUDA) || defined(FASTNAS_EMULATED)
#ifndef FASTNAS_EMULATED
  if (t.is_cuda())
#endif
    bytes = cuda::abs_cell_workspace<T>(a, backward);
#endif
  Tensor scratch = empty({bytes}, ScalarType::Byte, t);
  a.workspace = scratch.mutable_data_ptr();
  return scratch;
}

std::tuple<Tensor, Tensor> abs_cell(const Tensor& x, const Tensor& weights, const std::vector<int64_t>& ops,
                                    const std::vector<Tensor>& kernels) {
  constexpr const char* op = "abs_cell";
  STD_TORCH_CHECK(is_channels_last(x) && x.numel() > 0, op, ": x must be 4-d, not empty and in channels_last memory");
  AbsCellArgs a = arguments(op, x, weights, ops, kernels);
  OnDevice guard(x);
  Tensor y = empty_map({a.N, a.C, a.H, a.W}, x), states = empty_blob({a.N, a.H + 2, a.W + 2, a.step()}, x);
  a.x = x.const_data_ptr(), a.y = y.mutable_data_ptr(), a.states = states.mutable_data_ptr();
  FASTNAS_DISPATCH(x.scalar_type(), op, [&](auto t) {
    Tensor scratch = workspace<decltype(t)>(a, x, false);
    call<decltype(t)>(x, a, false);
  });
  return {std::move(y), std::move(states)};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> abs_cell_backward(const Tensor& grad, const Tensor& states,
                                                                  const Tensor& weights,
                                                                  const std::vector<int64_t>& ops,
                                                                  const std::vector<Tensor>& kernels, bool need_x,
                                                                  bool need_weights, bool need_kernels) {
  constexpr const char* op = "_abs_cell_backward";
  STD_TORCH_CHECK(is_channels_last(grad) && grad.numel() > 0, op,
                  ": grad must be 4-d, not empty and in channels_last memory");
  AbsCellArgs a = arguments(op, grad, weights, ops, kernels);
  STD_TORCH_CHECK(states.dim() == 4 && states.size(0) == a.N && states.size(1) == a.H + 2 &&
                      states.size(2) == a.W + 2 && states.size(3) == a.step() && states.is_contiguous() &&
                      states.scalar_type() == grad.scalar_type() && states.device() == grad.device(),
                  op, ": states must be what abs_cell returned for this grad's shape, dtype and device");
  OnDevice guard(grad);
  a.grad = grad.const_data_ptr(), a.states = const_cast<void*>(states.const_data_ptr());
  Tensor grad_x = need_x ? empty_map({a.N, a.C, a.H, a.W}, grad) : empty({0}, grad.scalar_type(), grad);
  if (need_x) a.grad_x = grad_x.mutable_data_ptr();
  Tensor grad_weights = need_weights ? torch::stable::empty_like(weights) : empty({0}, weights.scalar_type(), weights);
  if (need_weights) a.grad_weights = grad_weights.mutable_data_ptr();
  std::vector<Tensor> grad_kernels;
  for (int k = 0; need_kernels && k < a.edges() * a.ops_count; ++k) {
    if (!a.kernels[k]) continue;
    grad_kernels.push_back(torch::stable::empty_like(kernels[grad_kernels.size()]));
    a.grad_kernels[k] = grad_kernels.back().mutable_data_ptr();
  }
  FASTNAS_DISPATCH(grad.scalar_type(), op, [&](auto t) {
    Tensor scratch = workspace<decltype(t)>(a, grad, true);
    call<decltype(t)>(grad, a, true);
  });
  return {std::move(grad_x), std::move(grad_weights), std::move(grad_kernels)};
}
}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_FRAGMENT(FASTNAS_OPS, m) {
  m.def("abs_cell(Tensor x, Tensor weights, int[] ops, Tensor[] kernels) -> (Tensor, Tensor)");
  m.def(
      "_abs_cell_backward(Tensor grad, Tensor states, Tensor weights, int[] ops, Tensor[] kernels, bool need_x, bool "
      "need_weights, bool need_kernels) -> (Tensor, Tensor, Tensor[])");
}
FASTNAS_IMPL("abs_cell", &fastnas::abs_cell)
FASTNAS_IMPL("_abs_cell_backward", &fastnas::abs_cell_backward)
