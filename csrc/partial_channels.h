// partial_channels: PC-DARTS' two ends of an edge, in channels_last memory. The first C/k channels of x go to the
// candidates (split); their output, the other channels (2x2 max-pooled with stride 2), concatenation and channel
// shuffle are one write (merge). Channel j * k + g of the output is channel g * C/k + j of the concatenation.
#pragma once
#include "types.h"

namespace fastnas {
struct PartialChannelsArgs {
  int64_t N = 0, C = 0, H = 0, W = 0;  // of x; C is a multiple of k, and H and W of stride
  int k = 1, stride = 1;
  const void* x = nullptr;            // T (N, H, W, C): split, merge; split_backward with stride 2
  const void* mixed = nullptr;        // T (N, H/stride, W/stride, C/k): merge
  const void* grad = nullptr;         // T (N, H/stride, W/stride, C): backwards; null: zeros
  const void* grad_active = nullptr;  // T (N, H, W, C/k): split_backward; null: zeros
  void* out = nullptr;                // what the function computes

  constexpr int64_t pixels() const { return N * H * W; }
  constexpr int64_t windows() const { return N * (H / stride) * (W / stride); }  // pixels of the output
};

namespace cpu {
// out (N, H, W, C/k) = the first C/k channels of x.
template <class T>
void partial_channels_split(const PartialChannelsArgs& args, Parallel parallel);
// out (N, H, W, C): the whole gradient of x, from those of split's and merge's outputs.
template <class T>
void partial_channels_split_backward(const PartialChannelsArgs& args, Parallel parallel);
// out (N, H/stride, W/stride, C) = shuffle(cat(mixed, bypass)).
template <class T>
void partial_channels(const PartialChannelsArgs& args, Parallel parallel);
// out (N, H/stride, W/stride, C/k): the gradient of mixed.
template <class T>
void partial_channels_backward(const PartialChannelsArgs& args, Parallel parallel);
}  // namespace cpu
namespace cuda {
template <class T>
void partial_channels_split(const PartialChannelsArgs& args, Stream stream);
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
  return (a.pixels() * (a.C + (a.grad_active ? active : 0)) +
          (a.grad ? a.windows() * bypass + (a.stride == 2 ? a.pixels() * bypass : 0) : 0)) *
         size;
}
inline int64_t partial_channels_bytes(const PartialChannelsArgs& a, int64_t size) {
  return (a.windows() * (a.C + a.C / a.k) + a.pixels() * (a.C - a.C / a.k)) * size;
}
inline int64_t partial_channels_backward_bytes(const PartialChannelsArgs& a, int64_t size) {
  return 2 * a.windows() * (a.C / a.k) * size;
}
}  // namespace fastnas
