// mixed_op: a whole edge, y = sum_o w[o] * BN_o(candidate_o(x)), in channels_last memory.
//
// Separable candidates are stages (ReLU -> depthwise -> pointwise) whose outputs, before batch norm, are kept for the
// backward. Everything that the sum adds is a term: the last stage of a candidate, a pool of x (recomputed wherever it
// is read), x itself, or a map that was computed outside.
#pragma once
#include "types.h"

namespace fastnas {
constexpr int kMaxStages = 24;
constexpr int kMaxTerms = 24;

// ReLU -> depthwise (C, 1, kernel, kernel) -> pointwise (C, C); padding = dilation * (kernel - 1) / 2.
struct Stage {
  int source = -1;  // the stage whose normalised output is read; -1: x
  int kernel = 3, dilation = 1, stride = 1;
  int norm = 0;  // row of mean and invstd that normalises this stage's output
  const void* depthwise = nullptr;
  const void* pointwise = nullptr;
  void* out = nullptr;             // (N, OH, OW, C), before batch norm; written forward, read backward
  void* grad_norm = nullptr;       // (N, OH, OW, C) scratch: d/d(normalised output); null where no stage reads this one
  void* grad_depthwise = nullptr;  // null: not wanted (both or neither)
  void* grad_pointwise = nullptr;
};

enum class Kind : int { none, skip, max_pool, avg_pool, separable, map };

// weights[weight] * (src - mean[norm]) * invstd[norm], or weights[weight] * src where norm is -1.
struct Term {
  Kind kind = Kind::none;  // skip, max_pool, avg_pool: of x; separable: stage's output; map: src
  int weight = 0;
  int norm = -1;
  int stage = -1;
  const void* src = nullptr;  // map: (N, OH, OW, C)
  void* grad = nullptr;       // map: d/d(src); null: not wanted
};

struct MixedOpArgs {
  int64_t N = 0, C = 0, H = 0, W = 0, OH = 0, OW = 0;
  int stride = 1;  // of the edge: pools, and first stages
  int stages_count = 0, terms_count = 0, candidates = 0, norms = 0;
  bool training = true;                     // batch statistics (computed forward); else mean and invstd are given
  Stage stages[kMaxStages];                 // a stage's source comes before it
  Term terms[kMaxTerms];                    // candidates of kind none have no term
  const void* x = nullptr;                  // T (N, H, W, C)
  const void* weights = nullptr;            // A (candidates), A = compute_t<T>
  void* mean = nullptr;                     // A (norms, C)
  void* invstd = nullptr;                   // A (norms, C)
  void* variance = nullptr;                 // A (norms, C), unbiased; training forward only
  double eps[kMaxStages + kMaxTerms] = {};  // by norm
  void* y = nullptr;                        // T (N, OH, OW, C)                         forward
  const void* grad = nullptr;               // T (N, OH, OW, C)                         backward
  void* grad_x = nullptr;                   // T (N, H, W, C); null: not wanted
  void* grad_weights = nullptr;             // A (candidates); null: not wanted
  void* workspace = nullptr;                // mixed_op_workspace bytes, on the device
};

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
