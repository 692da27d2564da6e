// abs_cell: a cell of densely connected nodes as a linear map of its input, all weights by their absolute value:
// node j = sum over i < j and o of |w[edge, o]| * |candidate_o| (node i), edges in the order (1, 0), (2, 0), (2, 1),
// ...
//
// An edge's convolutions, identity and pool are one 3x3 kernel M = sum_o |w_o| |W_o|, where a pool is 1/9 on the
// diagonal of every tap; at the border it divides by fewer taps, and the difference is added there. All nodes lie side
// by side in the pixels of one map with a ring of zeros, so that a *fan*, the product of one node with the kernels of
// all edges that leave it, writes neighbouring channels. Backward, a fan takes the gradient of one node to all nodes
// before it.
#pragma once
#include "types.h"

namespace fastnas {
constexpr int kMaxAbsNodes = 8;
constexpr int kMaxAbsEdges = kMaxAbsNodes * (kMaxAbsNodes - 1) / 2;
constexpr int kMaxAbsOps = 16;
constexpr int kAbsPad =
    16;  // elements at the end of a pixel: pixels of a power of two of channels would share few sets

enum class AbsOp : int { none, skip, conv1x1, conv3x3, avg_pool };
constexpr int kAbsOps = 5;

// The node `from` times the merged kernels of the edges between it and nodes [first, first + count).
struct AbsFan {
  int from = 0, first = 0, count = 0;
  bool add = false;  // the nodes hold a part of the sum already
};

struct AbsCellArgs {
  int64_t N = 0, C = 0, H = 0, W = 0;
  int nodes = 0, ops_count = 0;
  AbsOp ops[kMaxAbsOps] = {};                           // the candidates of every edge
  const void* weights = nullptr;                        // A (edges, ops), A = compute_t<T>
  const void* kernels[kMaxAbsEdges * kMaxAbsOps] = {};  // T (C, C, k, k) where the candidate is a convolution
  void* states = nullptr;                               // T (N, H + 2, W + 2, step): every node
  const void* x = nullptr;                              // T (N, H, W, C)                   forward
  void* y = nullptr;                                    // T (N, H, W, C)                   forward
  const void* grad = nullptr;                           // T (N, H, W, C)                   backward
  void* grad_x = nullptr;                               // T (N, H, W, C); null: not wanted
  void* grad_weights = nullptr;                         // A (edges, ops); null: not wanted
  void* grad_kernels[kMaxAbsEdges * kMaxAbsOps] = {};   // as kernels; null: not wanted
  void* workspace = nullptr;                            // abs_cell_workspace bytes, on the device

  constexpr int edges() const { return nodes * (nodes - 1) / 2; }
  static constexpr int edge(int node, int input) { return node * (node - 1) / 2 + input; }
  constexpr int64_t step() const { return nodes * C + kAbsPad; }
  constexpr int64_t row() const { return (W + 2) * step(); }
  constexpr int64_t image() const { return (H + 2) * row(); }
  constexpr int64_t pixels() const { return N * H * W; }
  // Pixel p's window of 3 x 3 pixels in a map begins here; the pixel itself is row() + step() further.
  constexpr int64_t window(int64_t p) const { return p / (H * W) * image() + p / W % H * row() + p % W * step(); }
  constexpr int64_t merged() const { return int64_t{9} * C * C; }  // elements of an edge's kernel
  bool pooled() const {
    for (int o = 0; o < ops_count; ++o)
      if (ops[o] == AbsOp::avg_pool) return true;
    return false;
  }
  bool kernels_wanted() const {
    for (int k = 0; k < edges() * ops_count; ++k)
      if (grad_kernels[k]) return true;
    return false;
  }
  // The i-th fan in the order in which they run; count may be 0.
  constexpr AbsFan fan(int i, bool backward) const {
    if (!backward) return {i, i + 1, nodes - 1 - i, i > 0};
    const int from = nodes - 1 - i, first = grad_x ? 0 : 1;
    return {from, first, from - first, i > 0};
  }
  // The edge between a fan's node and the k-th of those that it writes.
  constexpr int fan_edge(const AbsFan& f, int k) const {
    return f.from < f.first ? edge(f.first + k, f.from) : edge(f.from, f.first + k);
  }
};

// Of the taps of a 3x3 window around pixel i of n, how many are inside.
constexpr int abs_taps(int64_t i, int64_t n) { return 1 + (i > 0) + (i + 1 < n); }
// What the pool's divisor at a pixel is more than 1/9.
template <class A>
constexpr A abs_excess(int taps) {
  return A(1) / static_cast<A>(taps) - A(1) / A(9);
}

namespace cpu {
template <class T>
void abs_cell(const AbsCellArgs& args, Parallel parallel);
template <class T>
void abs_cell_backward(const AbsCellArgs& args, Parallel parallel);
}  // namespace cpu
namespace cuda {
template <class T>
int64_t abs_cell_workspace(const AbsCellArgs& args, bool backward);
template <class T>
void abs_cell(const AbsCellArgs& args, Stream stream);
template <class T>
void abs_cell_backward(const AbsCellArgs& args, Stream stream);
}  // namespace cuda

// What each kernel must move: each operand read once, each result written once.
inline int64_t abs_cell_kernel_bytes(const AbsCellArgs& a, int64_t size) {  // of all candidates
  int64_t n = 0;
  for (int o = 0; o < a.ops_count; ++o) n += a.ops[o] == AbsOp::conv3x3 ? 9 : a.ops[o] == AbsOp::conv1x1;
  return n * a.edges() * a.C * a.C * size;
}
inline int64_t abs_cell_merge_bytes(const AbsCellArgs& a, int64_t size, int64_t merged_size, bool backward) {
  int64_t merged = 0;
  for (int i = 0; i + 1 < a.nodes; ++i) merged += a.fan(i, backward).count;
  return abs_cell_kernel_bytes(a, size) + merged * a.merged() * merged_size;
}
inline int64_t abs_cell_load_bytes(const AbsCellArgs& a, int64_t size) { return 2 * a.pixels() * a.C * size; }
inline int64_t abs_cell_fan_bytes(const AbsCellArgs& a, const AbsFan& f, int64_t size, int64_t merged_size) {
  return (1 + f.count * (1 + f.add)) * a.pixels() * a.C * size + f.count * a.merged() * merged_size;
}
inline int64_t abs_cell_gradient_bytes(const AbsCellArgs& a, int64_t size, int64_t merged_size) {
  return 2 * (a.nodes - 1) * a.pixels() * a.C * size + a.edges() * a.merged() * merged_size;
}
inline int64_t abs_cell_finish_bytes(const AbsCellArgs& a, int64_t size, int64_t merged_size, bool kernels) {
  return a.edges() * a.merged() * merged_size + (1 + kernels) * abs_cell_kernel_bytes(a, size);
}
}  // namespace fastnas
