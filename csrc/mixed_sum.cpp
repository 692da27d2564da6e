#include "mixed_sum.h"

#include "common.h"

namespace fastnas {
namespace {
MixedSumArgs arguments(const std::vector<Tensor>& xs, const Tensor& weights) {
  STD_TORCH_CHECK(!xs.empty() && xs.size() <= kMaxSummands, "mixed_sum: expected 1 to ", kMaxSummands,
                  " tensors in xs, got ", xs.size());
  STD_TORCH_CHECK(weights.dim() == 1 && weights.size(0) == static_cast<int64_t>(xs.size()),
                  "mixed_sum: weights must have one entry for each of the ", xs.size(), " tensors in xs");
  STD_TORCH_CHECK(weights.scalar_type() == compute_dtype(xs[0]) && weights.is_contiguous(),
                  "mixed_sum: weights must be contiguous and float32 (float64 for float64 xs)");
  MixedSumArgs args;
  args.n = xs[0].numel();
  args.weights = weights.const_data_ptr();
  for (const Tensor& x : xs) {
    STD_TORCH_CHECK(x.scalar_type() == xs[0].scalar_type() && x.device() == xs[0].device() && x.dim() == xs[0].dim(),
                    "mixed_sum: xs must agree in dtype, device and shape");
    for (int64_t d = 0; d < x.dim(); ++d)
      STD_TORCH_CHECK(x.size(d) == xs[0].size(d) && x.stride(d) == xs[0].stride(d),
                      "mixed_sum: xs must agree in shape and strides");
    args.xs[args.count++] = x.const_data_ptr();
  }
  return args;
}

Tensor mixed_sum(const std::vector<Tensor>& xs, const Tensor& weights) {
  MixedSumArgs args = arguments(xs, weights);
  OnDevice guard(weights);
  Tensor y = torch::stable::empty_like(xs[0]);
  args.y = y.mutable_data_ptr();
  if (args.n == 0) return y;
  FASTNAS_DISPATCH(y.scalar_type(), "mixed_sum", [&](auto t) { FASTNAS_CALL(xs[0], mixed_sum<decltype(t)>, args); });
  return y;
}

std::tuple<std::vector<Tensor>, Tensor> mixed_sum_backward(const Tensor& grad, const std::vector<Tensor>& xs,
                                                           const Tensor& weights, bool need_xs, bool need_weights) {
  MixedSumArgs args = arguments(xs, weights);
  STD_TORCH_CHECK(grad.numel() == args.n && grad.scalar_type() == xs[0].scalar_type(),
                  "_mixed_sum_backward: grad must have the shape and dtype of xs");
  OnDevice guard(weights);
  std::vector<Tensor> grad_xs;
  if (need_xs)
    for (const Tensor& x : xs) {
      grad_xs.push_back(torch::stable::empty_like(x));
      args.grad_xs[grad_xs.size() - 1] = grad_xs.back().mutable_data_ptr();
    }
  Tensor grad_weights = empty({need_weights ? args.count : 0}, weights.scalar_type(), weights);
  Tensor partial = empty({need_weights ? mixed_sum_pieces(args.n) * args.count : 0}, ScalarType::Double, weights);
  if (need_weights) {
    if (args.n == 0) torch::stable::zero_(grad_weights);
    args.grad_weights = grad_weights.mutable_data_ptr();
    args.partial = partial.mutable_data_ptr();
  }
  args.grad = grad.const_data_ptr();
  if (args.n > 0)
    FASTNAS_DISPATCH(grad.scalar_type(), "_mixed_sum_backward",
                     [&](auto t) { FASTNAS_CALL(xs[0], mixed_sum_backward<decltype(t)>, args); });
  return {std::move(grad_xs), std::move(grad_weights)};
}
}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_FRAGMENT(FASTNAS_OPS, m) {
  m.def("mixed_sum(Tensor[] xs, Tensor weights) -> Tensor");
  m.def(
      "_mixed_sum_backward(Tensor grad, Tensor[] xs, Tensor weights, bool need_xs, bool need_weights) -> (Tensor[], "
      "Tensor)");
}
FASTNAS_IMPL("mixed_sum", &fastnas::mixed_sum)
FASTNAS_IMPL("_mixed_sum_backward", &fastnas::mixed_sum_backward)
