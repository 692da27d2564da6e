// mixed_sum: y = sum_k w[k] * x_k, element by element.
#pragma once
#include "types.h"

namespace fastnas {
constexpr int kMaxSummands = 32;

struct MixedSumArgs {
  int count = 0;
  int64_t n = 0;                      // elements of each tensor
  const void* xs[kMaxSummands] = {};  // T[n]
  const void* weights = nullptr;      // compute_t<T>[count]
  void* y = nullptr;                  // T[n]                      forward
  const void* grad = nullptr;         // T[n]                      backward
  void* grad_xs[kMaxSummands] = {};   // T[n] each; null: not wanted
  void* grad_weights = nullptr;       // compute_t<T>[count]; null: not wanted
  void* partial = nullptr;            // double[mixed_sum_pieces(n) * count]: scratch of the backward
};

// The backward's reduction is cut into pieces by size alone and combined in order, so its bits never depend on threads.
constexpr int64_t kMixedSumPiece = 4096;
inline int64_t mixed_sum_pieces(int64_t n) { return (n + kMixedSumPiece - 1) / kMixedSumPiece; }

namespace cpu {
template <class T>
void mixed_sum(const MixedSumArgs& args, Parallel parallel);
template <class T>
void mixed_sum_backward(const MixedSumArgs& args, Parallel parallel);
}  // namespace cpu
namespace cuda {
template <class T>
void mixed_sum(const MixedSumArgs& args, Stream stream);
template <class T>
void mixed_sum_backward(const MixedSumArgs& args, Stream stream);
}  // namespace cuda
}  // namespace fastnas
