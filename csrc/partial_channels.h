// partial_channels: PC-DARTS' two ends of an edge, in channels_last memory. The first C/k channels of a state go to the
// candidates (split). The other channels bypass them (2x2 max-pooled with stride 2); concatenation and channel shuffle
// are one write (merge): channel j * k + g of the output is channel g * C/k + j of the concatenation. The shuffle is
// the same for all edges that lead to a node, so merge takes all of them, and split_backward all edges that leave a
// state.
#pragma once
#include "types.h"

namespace fastnas {
constexpr int kMaxPartialEdges = 8;

// What lies at an edge's other end.
struct PartialEdge {
  const void* map = nullptr;  // T: merge: the state that it leaves; split_backward: the gradient where it leads to
  int64_t step = 0;           // elements from pixel to pixel of it
  int stride = 1;             // in split_backward all edges have one
  int64_t weight = 0;         // its entry of edge_weights
};

struct PartialChannelsArgs {
  int64_t N = 0, C = 0, H = 0, W = 0;  // of out; backward: of the gradient. C is a multiple of k
  int k = 1;
  int edges_count = 0;  // backward: one, whose map is the gradient; split_backward: none stands for a gradient of zeros
  PartialEdge edges[kMaxPartialEdges];
  const void* edge_weights = nullptr;  // A = compute_t<T>: factors of what bypasses the candidates; null: all 1
  const void* x = nullptr;             // T (N, H, W, C): split; split_backward with stride 2 or grad_edge_weights
  const void* mixed = nullptr;         // T (N, H, W, C/k): merge: the sum of all edges' candidates
  const void* grad_active = nullptr;   // T (N, H, W, C/k): split_backward; null: zeros
  const void* grad_add = nullptr;      // T (N, H, W, C): split_backward with stride 1: added to out; null: zeros
  int64_t x_step = 0, grad_add_step = 0, out_step = 0;
  void* out = nullptr;                // T, what the function computes; split_backward: null: not wanted
  void* grad_edge_weights = nullptr;  // A, as edge_weights: split_backward; null: not wanted
  void* workspace = nullptr;          // partial_channels_workspace bytes, on the device

  constexpr int64_t pixels() const { return N * H * W; }
  constexpr int stride() const { return edges_count ? edges[0].stride : 1; }
  constexpr int64_t windows() const { return N * (H / stride()) * (W / stride()); }  // split_backward: of the edges
};

namespace cpu {
// out (N, H, W, C/k) = the first C/k channels of x.
template <class T>
void partial_channels_split(const PartialChannelsArgs& args, Parallel parallel);
// out (N, H, W, C): the whole gradient of x, from those of split's and merge's outputs.
template <class T>
void partial_channels_split_backward(const PartialChannelsArgs& args, Parallel parallel);
// out (N, H, W, C) = shuffle(cat(mixed, sum of the bypasses)).
template <class T>
void partial_channels(const PartialChannelsArgs& args, Parallel parallel);
// out (N, H, W, C/k): the gradient of mixed.
template <class T>
void partial_channels_backward(const PartialChannelsArgs& args, Parallel parallel);
}  // namespace cpu
namespace cuda {
template <class T>
void partial_channels_split(const PartialChannelsArgs& args, Stream stream);
int64_t partial_channels_workspace(const PartialChannelsArgs& args);
template <class T>
void partial_channels_split_backward(const PartialChannelsArgs& args, Stream stream);
template <class T>
void partial_channels(const PartialChannelsArgs& args, Stream stream);
template <class T>
void partial_channels_backward(const PartialChannelsArgs& args, Stream stream);
}  // namespace cuda

// What each function must move: each operand read once, each result written once.
inline int64_t partial_channels_split_bytes(const PartialChannelsArgs& a, int64_t size) {
  return 2 * a.pixels() * (a.C / a.k) * size;
}
inline int64_t partial_channels_split_backward_bytes(const PartialChannelsArgs& a, int64_t size) {
  const int64_t active = a.C / a.k, bypass = a.C - active;
  int64_t channels = a.out ? a.C + (a.grad_active ? active : 0) + (a.grad_add ? a.C : 0) : 0;
  if (a.edges_count > 0 && (a.grad_edge_weights || a.stride() == 2)) channels += bypass;
  return (a.pixels() * channels + a.edges_count * a.windows() * bypass) * size;
}
inline int64_t partial_channels_bytes(const PartialChannelsArgs& a, int64_t size) {
  int64_t maps = 0;
  for (int e = 0; e < a.edges_count; ++e) maps += a.edges[e].stride * a.edges[e].stride;
  return a.pixels() * (a.C + a.C / a.k + maps * (a.C - a.C / a.k)) * size;
}
inline int64_t partial_channels_backward_bytes(const PartialChannelsArgs& a, int64_t size) {
  return 2 * a.pixels() * (a.C / a.k) * size;
}
}  // namespace fastnas
