#include "mixed_op_plan.h"

namespace fastnas {
namespace {
MixedOpArgs arguments(const char* op, const Tensor& x, const Tensor& weights, const std::vector<Tensor>& params,
                      const std::vector<Tensor>& maps, const std::vector<int64_t>& plan, int64_t stride) {
  STD_TORCH_CHECK(!plan.empty() && plan.size() % kPlanFields == 0, op, ": plan must have ", kPlanFields,
                  " fields a candidate");
  MixedOpArgs a;
  set_input(op, a, x, stride);
  const int candidates = static_cast<int>(plan.size() / kPlanFields);
  STD_TORCH_CHECK(weights.dim() == 1 && weights.size(0) == candidates && weights.is_contiguous() &&
                      weights.scalar_type() == compute_dtype(x),
                  op, ": weights must be a contiguous vector, one entry for each of the ", candidates, " candidates");
  a.weights = weights.const_data_ptr();
  Operands from{params, maps};
  add_edge(op, a, x, plan.data(), candidates, 0, from);
  STD_TORCH_CHECK(from.param == params.size() && from.map == maps.size(), op,
                  ": params or maps has more tensors than the plan uses");
  a.edges[0].step = a.C;
  return a;
}

std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor, Tensor> mixed_op(
    const Tensor& x, const Tensor& weights, const std::vector<Tensor>& params, const std::vector<Tensor>& maps,
    const std::vector<int64_t>& plan, int64_t stride, const std::vector<double>& eps, const std::optional<Tensor>& mean,
    const std::optional<Tensor>& invstd) {
  MixedOpArgs a = arguments("mixed_op", x, weights, params, maps, plan, stride);
  STD_TORCH_CHECK(static_cast<int64_t>(eps.size()) == a.norms, "mixed_op: eps must have one entry for each of the ",
                  a.norms, " norms");
  STD_TORCH_CHECK(mean.has_value() == invstd.has_value(), "mixed_op: mean and invstd go together");
  OnDevice guard(x);
  a.training = !mean.has_value();
  for (int i = 0; i < a.norms; ++i) a.eps[i] = eps[i];
  const std::vector<int64_t> shape = {a.N, a.C, a.OH, a.OW};
  Tensor y = empty_map(shape, x);
  a.edges[0].y = y.mutable_data_ptr();
  std::vector<Tensor> outs;
  for (int k = 0; k < a.stages_count; ++k) {
    outs.push_back(empty_map(shape, x));
    a.stages[k].out = outs.back().mutable_data_ptr();
  }
  std::vector<Tensor> statistics;
  for (int i = 0; i < 3; ++i) statistics.push_back(empty({a.training ? a.norms : 0, a.C}, compute_dtype(x), x));
  if (a.training) {
    a.mean = statistics[0].mutable_data_ptr();
    a.invstd = statistics[1].mutable_data_ptr();
    a.variance = statistics[2].mutable_data_ptr();
  } else {
    set_statistics("mixed_op", a, *mean, *invstd, x, 0, a.norms);
  }
  run_mixed_op(x, a, false);
  return {std::move(y), std::move(outs), statistics[0], statistics[1], statistics[2]};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> mixed_op_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weights, const std::vector<Tensor>& params,
    const std::vector<Tensor>& maps, const std::vector<Tensor>& outs, const Tensor& mean, const Tensor& invstd,
    const std::vector<int64_t>& plan, int64_t stride, bool training, bool need_x, bool need_params, bool need_maps) {
  const char* op = "_mixed_op_backward";
  MixedOpArgs a = arguments(op, x, weights, params, maps, plan, stride);
  STD_TORCH_CHECK(is_channels_last(grad) && grad.size(0) == a.N && grad.size(1) == a.C && grad.size(2) == a.OH &&
                      grad.size(3) == a.OW && grad.scalar_type() == x.scalar_type() && grad.device() == x.device(),
                  op, ": grad must have the output's shape, dtype and device, in channels_last memory");
  STD_TORCH_CHECK(static_cast<int>(outs.size()) == a.stages_count, op, ": outs must have one tensor a stage");
  OnDevice guard(x);
  a.training = training;
  set_statistics(op, a, mean, invstd, x, 0, a.norms);
  a.edges[0].grad = grad.const_data_ptr();
  Tensor grad_x = need_x ? empty_map({a.N, a.C, a.H, a.W}, x) : empty({0}, x.scalar_type(), x);
  if (need_x) a.grad_x = grad_x.mutable_data_ptr(), a.grad_x_step = a.C;
  Tensor grad_weights = torch::stable::new_zeros(weights, {weights.size(0)});
  a.grad_weights = grad_weights.mutable_data_ptr();
  std::vector<Tensor> grad_params, grad_maps, chain;
  size_t param = 0;
  for (int k = 0; k < a.stages_count; ++k) {
    Stage& s = a.stages[k];
    STD_TORCH_CHECK(
        is_channels_last(outs[k]) && outs[k].scalar_type() == x.scalar_type() && outs[k].numel() == grad.numel(), op,
        ": outs must be channels_last, of the output's shape and dtype");
    s.out = const_cast<void*>(outs[k].const_data_ptr());
    for (void** to : {&s.grad_depthwise, &s.grad_pointwise}) {
      if (!need_params || (s.dense && to == &s.grad_depthwise)) continue;
      grad_params.push_back(torch::stable::empty_like(params[param++]));
      *to = grad_params.back().mutable_data_ptr();
    }
    if (s.source >= 0) {
      chain.push_back(empty_map({a.N, a.C, a.OH, a.OW}, x));
      a.stages[s.source].grad_norm = chain.back().mutable_data_ptr();
    }
  }
  for (int t = 0; need_maps && t < a.terms_count; ++t)
    if (a.terms[t].kind == Kind::map) {
      grad_maps.push_back(torch::stable::empty_like(maps[grad_maps.size()]));
      a.terms[t].grad = grad_maps.back().mutable_data_ptr();
    }
  run_mixed_op(x, a, true);
  return {std::move(grad_x), std::move(grad_weights), std::move(grad_params), std::move(grad_maps)};
}
}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_FRAGMENT(FASTNAS_OPS, m) {
  m.def(
      "mixed_op(Tensor x, Tensor weights, Tensor[] params, Tensor[] maps, int[] plan, int stride, float[] eps, Tensor? "
      "mean, "
      "Tensor? invstd) -> (Tensor, Tensor[], Tensor, Tensor, Tensor)");
  m.def(
      "_mixed_op_backward(Tensor grad, Tensor x, Tensor weights, Tensor[] params, Tensor[] maps, Tensor[] outs, Tensor "
      "mean, "
      "Tensor invstd, int[] plan, int stride, bool training, bool need_x, bool need_params, bool need_maps) -> "
      "(Tensor, Tensor, Tensor[], Tensor[])");
}
FASTNAS_IMPL("mixed_op", &fastnas::mixed_op)
FASTNAS_IMPL("_mixed_op_backward", &fastnas::mixed_op_backward)
