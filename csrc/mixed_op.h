// mixed_op: the edges that leave one state x, each y = sum_o w[o] * BN_o(candidate_o(x)), in channels_last memory.
//
// Convolutional candidates are stages (ReLU -> depthwise -> pointwise, or ReLU -> dense convolution) whose outputs,
// before batch norm, are kept for the backward. Everything that a sum adds is a term: the last stage of a candidate, a
// pool of x (recomputed wherever it is read), x itself, or a map that was computed outside.
#pragma once
#include "types.h"

namespace fastnas {
constexpr int kMaxEdges = 8;
constexpr int kMaxStages = 32;
constexpr int kMaxTerms = 40;

// One of the edges that leave x.
struct Edge {
  void* y = nullptr;           // T (N, OH, OW, C)                                        forward
  const void* grad = nullptr;  // T (N, OH, OW, C)                                        backward
  int64_t step = 0;            // elements from pixel to pixel of y and grad
  bool add = false;            // y holds a part of the sum already
  int terms_begin = 0, terms_end = 0;
};

// ReLU -> depthwise (C, 1, kernel, kernel) -> pointwise (C, C), or where dense: ReLU -> pointwise (C, C, kernel,
// kernel). padding = dilation * (kernel - 1) / 2.
struct Stage {
  int edge = 0;
  int source = -1;  // the stage whose normalised output is read; -1: x
  int kernel = 3, dilation = 1, stride = 1;
  bool dense = false;
  int norm = 0;                     // row of mean and invstd that normalises this stage's output
  const void* depthwise = nullptr;  // null where dense
  const void* pointwise = nullptr;
  void* out = nullptr;             // (N, OH, OW, C), before batch norm; written forward, read backward
  void* grad_norm = nullptr;       // (N, OH, OW, C) scratch: d/d(normalised output); null where no stage reads this one
  void* grad_depthwise = nullptr;  // null: not wanted (both or neither), or dense
  void* grad_pointwise = nullptr;
};

enum class Kind : int {
  none,
  skip,
  max_pool,
  avg_pool,
  separable,
  map,
  conv
};  // conv: a separable one's dense sibling

// weights[weight] * (src - mean[norm]) * invstd[norm], or weights[weight] * src where norm is -1.
struct Term {
  Kind kind = Kind::none;  // skip, max_pool, avg_pool: of x; separable (conv is told so too): stage's output; map: src
  int edge = 0;
  int weight = 0;
  int norm = -1;
  int stage = -1;
  const void* src = nullptr;  // map: (N, OH, OW, C)
  void* grad = nullptr;       // map: d/d(src); null: not wanted
};

struct MixedOpArgs {
  int64_t N = 0, C = 0, H = 0, W = 0, OH = 0, OW = 0;
  int stride = 1;  // of every edge: pools, and first stages
  int edges_count = 0, stages_count = 0, terms_count = 0, norms = 0;
  bool training = true;  // batch statistics (computed forward); else mean and invstd are given
  Edge edges[kMaxEdges];
  Stage stages[kMaxStages];  // ordered by edge; a stage's source comes before it
  Term terms[kMaxTerms];     // ordered by edge; candidates of kind none have no term
  const void* x = nullptr;   // T (N, H, W, C), pixels x_step elements apart
  int64_t x_step = 0;
  const void* weights = nullptr;            // A (candidates of all edges), A = compute_t<T>
  void* mean = nullptr;                     // A (norms, C)
  void* invstd = nullptr;                   // A (norms, C)
  void* variance = nullptr;                 // A (norms, C), unbiased; training forward only
  double eps[kMaxStages + kMaxTerms] = {};  // by norm
  void* grad_x = nullptr;                   // T (N, H, W, C), pixels grad_x_step apart; null: not wanted
  int64_t grad_x_step = 0;
  const void* grad_add = nullptr;  // T (N, H, W, C), grad_add_step apart: added to grad_x; may be null
  int64_t grad_add_step = 0;
  void* grad_weights = nullptr;  // A, as weights; zeros where a candidate has no term
  void* workspace = nullptr;     // mixed_op_workspace bytes, on the device
};

// Pools of one kind give every edge the same values: the first normalised term of t's kind, or t itself.
inline int leader(const MixedOpArgs& a, int t) {
  const Kind kind = a.terms[t].kind;
  if (kind != Kind::max_pool && kind != Kind::avg_pool) return t;
  for (int i = 0; i < t; ++i)
    if (a.terms[i].kind == kind && a.terms[i].norm >= 0) return i;
  return t;
}

namespace cpu {
template <class T>
void mixed_op(const MixedOpArgs& args, Parallel parallel);
template <class T>
void mixed_op_backward(const MixedOpArgs& args, Parallel parallel);
}  // namespace cpu
namespace cuda {
template <class T>
int64_t mixed_op_workspace(const MixedOpArgs& args, bool backward);
template <class T>
void mixed_op(const MixedOpArgs& args, Stream stream);
template <class T>
void mixed_op_backward(const MixedOpArgs& args, Stream stream);
}  // namespace cuda
}  // namespace fastnas
