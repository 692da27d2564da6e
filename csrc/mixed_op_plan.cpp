#include "mixed_op_plan.h"

namespace fastnas {
namespace {
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
}  // namespace

void set_input(const char* op, MixedOpArgs& a, const Tensor& x, int64_t stride) {
  STD_TORCH_CHECK(stride == 1 || stride == 2, op, ": stride must be 1 or 2, got ", stride);
  STD_TORCH_CHECK(is_channels_last(x), op, ": x must be 4-d and in channels_last memory");
  a.N = x.size(0), a.C = x.size(1), a.H = x.size(2), a.W = x.size(3);
  a.stride = static_cast<int>(stride);
  a.OH = (a.H - 1) / stride + 1, a.OW = (a.W - 1) / stride + 1;
  STD_TORCH_CHECK(a.N > 0 && a.C > 0 && a.H > 0 && a.W > 0, op, ": x must not be empty");
  a.x = x.const_data_ptr();
  a.x_step = a.C;
}

void add_edge(const char* op, MixedOpArgs& a, const Tensor& x, const int64_t* plan, int candidates, int weight,
              Operands& from) {
  STD_TORCH_CHECK(a.edges_count < kMaxEdges, op, ": more than ", kMaxEdges, " edges leave one state");
  auto same = [&](const Tensor& t, const char* what) {
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.device() == x.device(), op, ": ", what,
                    " must have x's dtype and device");
  };
  const int edge = a.edges_count++;
  a.edges[edge].terms_begin = a.terms_count;
  for (int o = 0; o < candidates; ++o) {
    const int64_t* row = plan + o * kPlanFields;
    const Kind kind = static_cast<Kind>(row[0]);
    STD_TORCH_CHECK(row[0] >= 0 && row[0] <= static_cast<int64_t>(Kind::conv), op, ": unknown kind ", row[0],
                    " in plan");
    if (kind == Kind::none) continue;
    STD_TORCH_CHECK(a.terms_count < kMaxTerms, op, ": more than ", kMaxTerms, " candidates");
    Term term;
    term.kind = kind, term.edge = edge, term.weight = weight + o;
    if (kind == Kind::separable || kind == Kind::conv) {
      const int64_t kernel = row[2], dilation = row[3];
      const bool dense = kind == Kind::conv;
      STD_TORCH_CHECK(
          dense ? (kernel == 1 || kernel == 3) && dilation == 1
                : ((kernel == 3 || kernel == 5) && (dilation == 1 || dilation == 2)) || (kernel == 7 && dilation == 1),
          op, ": no kernel for a ", kernel, "x", kernel, dense ? " dense" : " depthwise", " convolution with dilation ",
          dilation);
      STD_TORCH_CHECK(row[4] > 0, op, ": a convolutional candidate needs at least one stage");
      for (int64_t s = 0; s < row[4]; ++s) {
        STD_TORCH_CHECK(a.stages_count < kMaxStages, op, ": more than ", kMaxStages, " stages");
        STD_TORCH_CHECK(from.param + (dense ? 1 : 2) <= from.params.size(), op,
                        ": params has too few tensors for the plan");
        Stage stage;
        stage.edge = edge;
        stage.source = s ? a.stages_count - 1 : -1;
        stage.kernel = static_cast<int>(kernel), stage.dilation = static_cast<int>(dilation);
        stage.stride = s ? 1 : a.stride;
        stage.dense = dense;
        stage.norm = a.norms++;
        if (!dense) {
          const Tensor& depthwise = from.params[from.param++];
          same(depthwise, "params");
          STD_TORCH_CHECK(depthwise.numel() == a.C * kernel * kernel && depthwise.is_contiguous(), op,
                          ": params must be contiguous, a depthwise one (C, 1, kernel, kernel), C = ", a.C);
          stage.depthwise = depthwise.const_data_ptr();
        }
        const Tensor& pointwise = from.params[from.param++];
        same(pointwise, "params");
        STD_TORCH_CHECK(pointwise.numel() == a.C * a.C * (dense ? kernel * kernel : 1) && pointwise.is_contiguous(), op,
                        ": params must be contiguous, a pointwise one (C, C, 1, 1), a dense one (C, C, kernel, "
                        "kernel), C = ",
                        a.C);
        stage.pointwise = pointwise.const_data_ptr();
        a.stages[a.stages_count++] = stage;
      }
      term.kind = Kind::separable;
      term.stage = a.stages_count - 1;
      term.norm = a.stages[term.stage].norm;
    } else {
      STD_TORCH_CHECK(kind != Kind::skip || (a.stride == 1 && !row[1]), op, ": skip needs stride 1 and no norm");
      if (row[1]) term.norm = a.norms++;
      if (kind == Kind::map) {
        STD_TORCH_CHECK(from.map < from.maps.size(), op, ": maps has too few tensors for the plan");
        const Tensor& m = from.maps[from.map++];
        same(m, "maps");
        STD_TORCH_CHECK(
            is_channels_last(m) && m.size(0) == a.N && m.size(1) == a.C && m.size(2) == a.OH && m.size(3) == a.OW, op,
            ": maps must be channels_last of shape (", a.N, ", ", a.C, ", ", a.OH, ", ", a.OW, ")");
        term.src = m.const_data_ptr();
      }
    }
    a.terms[a.terms_count++] = term;
  }
  a.edges[edge].terms_end = a.terms_count;
}

void set_statistics(const char* op, MixedOpArgs& a, const Tensor& mean, const Tensor& invstd, const Tensor& x,
                    int64_t first, int64_t rows) {
  for (const Tensor* t : {&mean, &invstd})
    STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == rows && t->size(1) == a.C && t->is_contiguous() &&
                        t->scalar_type() == compute_dtype(x) && t->device() == x.device(),
                    op, ": mean and invstd must be contiguous, of shape (", rows, ", ", a.C, ")");
  const int64_t offset = first * a.C * static_cast<int64_t>(mean.element_size());
  a.mean = static_cast<char*>(const_cast<void*>(mean.const_data_ptr())) + offset;
  a.invstd = static_cast<char*>(const_cast<void*>(invstd.const_data_ptr())) + offset;
}

void run_mixed_op(const Tensor& x, MixedOpArgs& a, bool backward) {
  FASTNAS_DISPATCH(x.scalar_type(), "mixed_op", [&](auto t) {
    Tensor scratch = workspace<decltype(t)>(a, backward, x);
    call<decltype(t)>(x, a, backward);
  });
}
}  // namespace fastnas
