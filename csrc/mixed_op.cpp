#include "mixed_op.h"

#include "common.h"

namespace fastnas {
namespace {
constexpr int64_t kPlanFields = 5;  // kind, norm, kernel, dilation, stages: one row a candidate

// Checks the inputs and turns the plan into stages and terms. Norms are numbered by candidate, then by stage.
MixedOpArgs arguments(const char* op, const Tensor& x, const Tensor& weights, const std::vector<Tensor>& params,
                      const std::vector<Tensor>& maps, const std::vector<int64_t>& plan, int64_t stride) {
  STD_TORCH_CHECK(is_channels_last(x), op, ": x must be 4-d and in channels_last memory");
  STD_TORCH_CHECK(stride == 1 || stride == 2, op, ": stride must be 1 or 2, got ", stride);
  STD_TORCH_CHECK(!plan.empty() && plan.size() % kPlanFields == 0, op, ": plan must have ", kPlanFields,
                  " fields a candidate");
  MixedOpArgs a;
  a.N = x.size(0), a.C = x.size(1), a.H = x.size(2), a.W = x.size(3);
  a.stride = static_cast<int>(stride);
  a.OH = (a.H - 1) / stride + 1, a.OW = (a.W - 1) / stride + 1;
  STD_TORCH_CHECK(a.N > 0 && a.C > 0 && a.H > 0 && a.W > 0, op, ": x must not be empty");
  a.candidates = static_cast<int>(plan.size() / kPlanFields);
  STD_TORCH_CHECK(weights.dim() == 1 && weights.size(0) == a.candidates && weights.is_contiguous() &&
                      weights.scalar_type() == compute_dtype(x),
                  op, ": weights must be a contiguous vector, one entry for each of the ", a.candidates, " candidates");
  a.x = x.const_data_ptr();
  a.weights = weights.const_data_ptr();
  auto same = [&](const Tensor& t, const char* what) {
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.device() == x.device(), op, ": ", what,
                    " must have x's dtype and device");
  };
  size_t param = 0, map = 0;
  for (int o = 0; o < a.candidates; ++o) {
    const int64_t* row = &plan[o * kPlanFields];
    const Kind kind = static_cast<Kind>(row[0]);
    STD_TORCH_CHECK(row[0] >= 0 && row[0] <= static_cast<int64_t>(Kind::map), op, ": unknown kind ", row[0],
                    " in plan");
    if (kind == Kind::none) continue;
    STD_TORCH_CHECK(a.terms_count < kMaxTerms, op, ": more than ", kMaxTerms, " candidates");
    Term term;
    term.kind = kind, term.weight = o;
    if (kind == Kind::separable) {
      const int64_t kernel = row[2], dilation = row[3];
      STD_TORCH_CHECK(
          ((kernel == 3 || kernel == 5) && (dilation == 1 || dilation == 2)) || (kernel == 7 && dilation == 1), op,
          ": no kernel for a ", kernel, "x", kernel, " depthwise convolution with dilation ", dilation);
      for (int64_t s = 0; s < row[4]; ++s) {
        STD_TORCH_CHECK(a.stages_count < kMaxStages, op, ": more than ", kMaxStages, " stages");
        STD_TORCH_CHECK(param + 2 <= params.size(), op, ": params has too few tensors for the plan");
        const Tensor &dw = params[param++], &pw = params[param++];
        same(dw, "params"), same(pw, "params");
        STD_TORCH_CHECK(
            dw.numel() == a.C * kernel * kernel && pw.numel() == a.C * a.C && dw.is_contiguous() && pw.is_contiguous(),
            op, ": params must be contiguous, (C, 1, kernel, kernel) and (C, C, 1, 1), C = ", a.C);
        Stage stage;
        stage.source = s ? a.stages_count - 1 : -1;
        stage.kernel = static_cast<int>(kernel), stage.dilation = static_cast<int>(dilation);
        stage.stride = s ? 1 : a.stride;
        stage.norm = a.norms++;
        stage.depthwise = dw.const_data_ptr(), stage.pointwise = pw.const_data_ptr();
        a.stages[a.stages_count++] = stage;
      }
      STD_TORCH_CHECK(row[4] > 0, op, ": a separable candidate needs at least one stage");
      term.stage = a.stages_count - 1;
      term.norm = a.stages[term.stage].norm;
    } else {
      STD_TORCH_CHECK(kind != Kind::skip || (stride == 1 && !row[1]), op, ": skip needs stride 1 and no norm");
      if (row[1]) term.norm = a.norms++;
      if (kind == Kind::map) {
        STD_TORCH_CHECK(map < maps.size(), op, ": maps has too few tensors for the plan");
        const Tensor& m = maps[map++];
        same(m, "maps");
        STD_TORCH_CHECK(
            is_channels_last(m) && m.size(0) == a.N && m.size(1) == a.C && m.size(2) == a.OH && m.size(3) == a.OW, op,
            ": maps must be channels_last of shape (", a.N, ", ", a.C, ", ", a.OH, ", ", a.OW, ")");
        term.src = m.const_data_ptr();
      }
    }
    a.terms[a.terms_count++] = term;
  }
  STD_TORCH_CHECK(param == params.size() && map == maps.size(), op,
                  ": params or maps has more tensors than the plan uses");
  return a;
}

void set_statistics(const char* op, MixedOpArgs& a, const Tensor& mean, const Tensor& invstd, const Tensor& x) {
  for (const Tensor* t : {&mean, &invstd})
    STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == a.norms && t->size(1) == a.C && t->is_contiguous() &&
                        t->scalar_type() == compute_dtype(x) && t->device() == x.device(),
                    op, ": mean and invstd must be contiguous, of shape (", a.norms, ", ", a.C, ")");
  a.mean = const_cast<void*>(mean.const_data_ptr());
  a.invstd = const_cast<void*>(invstd.const_data_ptr());
}

// CUDA kernels take their scratch from torch's allocator; CPU kernels bring their own.
template <class T>
Tensor workspace([[maybe_unused]] MixedOpArgs& a, [[maybe_unused]] bool backward, const Tensor& x) {
  int64_t bytes = 0;
#if defined(FASTNAS_CUDA) || defined(FASTNAS_EMULATED)
#ifndef FASTNAS_EMULATED
  if (x.is_cuda())
#endif
    bytes = cuda::mixed_op_workspace<T>(a, backward);
#endif
  Tensor t = empty({bytes}, ScalarType::Byte, x);
  a.workspace = t.mutable_data_ptr();
  return t;
}

// The CPU has kernels for float and double; half types reach it as float.
template <class T>
void call(const Tensor& x, const MixedOpArgs& a, bool backward) {
#ifdef FASTNAS_EMULATED
  backward ? cuda::mixed_op_backward<T>(a, nullptr) : cuda::mixed_op<T>(a, nullptr);
#else
#ifdef FASTNAS_CUDA
  if (x.is_cuda())
    return backward ? cuda::mixed_op_backward<T>(a, current_stream(x)) : cuda::mixed_op<T>(a, current_stream(x));
#endif
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>)
    backward ? cpu::mixed_op_backward<T>(a, parallel) : cpu::mixed_op<T>(a, parallel);
  else
    STD_TORCH_CHECK(false, "mixed_op: the CPU kernels take float32 and float64");
  (void)x;
#endif
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
  Tensor y = empty_channels_last(shape, x);
  a.y = y.mutable_data_ptr();
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
    set_statistics("mixed_op", a, *mean, *invstd, x);
  }
  FASTNAS_DISPATCH(x.scalar_type(), "mixed_op", [&](auto t) {
    Tensor scratch = workspace<decltype(t)>(a, false, x);
    call<decltype(t)>(x, a, false);
  });
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
  set_statistics(op, a, mean, invstd, x);
  a.grad = grad.const_data_ptr();
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty({0}, x.scalar_type(), x);
  if (need_x) a.grad_x = grad_x.mutable_data_ptr();
  Tensor grad_weights = torch::stable::empty_like(weights);
  a.grad_weights = grad_weights.mutable_data_ptr();
  std::vector<Tensor> grad_params, grad_maps, chain;
  for (int k = 0; k < a.stages_count; ++k) {
    Stage& s = a.stages[k];
    STD_TORCH_CHECK(
        is_channels_last(outs[k]) && outs[k].scalar_type() == x.scalar_type() && outs[k].numel() == grad.numel(), op,
        ": outs must be channels_last, of the output's shape and dtype");
    s.out = const_cast<void*>(outs[k].const_data_ptr());
    if (need_params) {
      grad_params.push_back(torch::stable::empty_like(params[2 * k]));
      s.grad_depthwise = grad_params.back().mutable_data_ptr();
      grad_params.push_back(torch::stable::empty_like(params[2 * k + 1]));
      s.grad_pointwise = grad_params.back().mutable_data_ptr();
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
  FASTNAS_DISPATCH(x.scalar_type(), "_mixed_op_backward", [&](auto t) {
    Tensor scratch = workspace<decltype(t)>(a, true, x);
    call<decltype(t)>(x, a, true);
  });
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
