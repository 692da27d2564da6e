// relu_pointwise: z = W relu(x), a 1x1 convolution, in channels_last memory. With stride 2 there are up to two groups:
// output pixel (i, j) of group g reads input pixel (2 i + g, 2 j + g), and the groups' channels are concatenated.
// Backward: grad_x = W^T grad, or zero where x <= 0 or no group reads; grad_weights = grad relu(x)^T.
#pragma once
#include "types.h"

namespace fastnas {
constexpr int kMaxGroups = 2;

struct ReluPointwiseArgs {
  int64_t N = 0, H = 0, W = 0;           // of x; multiples of stride
  int64_t in = 0, channels = 0;          // of x, of z
  int64_t begin[kMaxGroups + 1] = {};    // of each group's channels in z; the last one is their end
  int stride = 1, groups = 1;            // one group where stride is 1
  const void* x = nullptr;               // T (N, H, W, in)
  const void* weights[kMaxGroups] = {};  // T (out of the group, in)
  void* z = nullptr;                     // T (N, H/stride, W/stride, channels)  forward
  const void* grad = nullptr;            // the same                             backward
  void* grad_x = nullptr;                // T (N, H, W, in); null: not wanted
  void* grad_weights[kMaxGroups] = {};   // T (out of the group, in); null: not wanted (all or none)
  void* workspace = nullptr;             // relu_pointwise_workspace bytes, on the device; backward

  constexpr int64_t pixels() const { return N * (H / stride) * (W / stride); }  // of z
  constexpr int64_t out(int group) const { return begin[group + 1] - begin[group]; }
  // The pixel of x that group 0 reads for pixel p of z; group g's lies offset(g) pixels further.
  constexpr int64_t source(int64_t p) const {
    if (stride == 1) return p;
    const int64_t row = p / (W / 2), column = p - row * (W / 2);  // H is even: rows of all images count on
    return 2 * row * W + 2 * column;
  }
  constexpr int64_t offset(int group) const { return group * (W + 1); }
};

namespace cpu {
template <class T>
void relu_pointwise(const ReluPointwiseArgs& args, Parallel parallel);
template <class T>
void relu_pointwise_backward(const ReluPointwiseArgs& args, Parallel parallel);
}  // namespace cpu
namespace cuda {
template <class T>
int64_t relu_pointwise_workspace(const ReluPointwiseArgs& args);
template <class T>
void relu_pointwise(const ReluPointwiseArgs& args, Stream stream);
template <class T>
void relu_pointwise_backward(const ReluPointwiseArgs& args, Stream stream);
}  // namespace cuda

// What each function must move: each operand read once, each result written once.
inline int64_t relu_pointwise_bytes(const ReluPointwiseArgs& a, int64_t size) {
  return (a.pixels() * (a.groups * a.in + a.channels) + a.channels * a.in) * size;
}
inline int64_t relu_pointwise_input_bytes(const ReluPointwiseArgs& a, int64_t size) {
  return relu_pointwise_bytes(a, size) + a.N * a.H * a.W * a.in * size;
}
}  // namespace fastnas
