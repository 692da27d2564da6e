// What the CPU kernels of relu_pointwise share with the code that drives them.
//
// Output pixels are cut into chunks, and chunks into slots, by shape alone. Each slot's part of the weights' gradients
// has its own place, and the slots are combined in order.
#pragma once
#include "relu_pointwise.h"

namespace fastnas::cpu {
constexpr int kPointwiseChunk = 64;  // pixels of z

template <class T>
struct PointwiseRun {
  const ReluPointwiseArgs* args;
  int lanes;
  int64_t padded;  // channels of x, to whole vectors
  // From pixel to pixel of a chunk's relu(x): a vector further than need be, so that the rows of a power of two of
  // channels fall into different sets of the cache.
  int64_t row;
  int64_t chunks, slots;

  T* weights[kMaxGroups];  // forward [out block][in][lane]; backward [in block][out][lane]
  T* partial;              // [slot][out][padded]: of the weights' gradients
  int64_t first_chunk(int64_t slot) const { return slot * chunks / slots; }
  int64_t scratch_size() const { return kPointwiseChunk * row; }  // of one thread
};
}  // namespace fastnas::cpu
