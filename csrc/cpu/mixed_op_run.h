// What the CPU kernels of mixed_op share with the code that drives them: geometry, packed weights, partial results.
//
// Scratch maps are channel-blocked, [block][row][column][lane], so that the vector dimension is the channel and the
// next pixel is the next vector; those that a convolution reads have a halo of zeros. Work is cut into slots of whole
// images by shape alone; each slot's partial results have their own place and are combined in order.
#pragma once
#include "mixed_op.h"

namespace fastnas::cpu {

// A channel-blocked scratch map of h x w pixels with a halo on every side; offsets are in elements.
struct Grid {
  int h, w, halo, lanes;
  int64_t row() const { return int64_t(w + 2 * halo) * lanes; }
  int64_t block() const { return (h + 2 * halo) * row(); }
  int64_t at(int block_index, int y, int x) const {
    return block_index * block() + (y + halo) * row() + int64_t(x + halo) * lanes;
  }
};

template <class T>
struct Run {
  const MixedOpArgs* args;
  int lanes, blocks, tail, padded;  // channels: blocks of lanes, the last one `tail` wide, padded = blocks * lanes
  int halo, slots;
  int group;              // output rows that are taken through depthwise and pointwise together
  bool pools;             // some term is a pool
  int leader[kMaxTerms];  // see leader() in mixed_op.h
  int level[kMaxStages];  // how many stages come before this one
  int levels;

  // Packed weights by stage: depthwise [block][tap][lane]; pointwise [out block][in block][in lane][out lane], and
  // transposed [in block][out block][out lane][in lane]; dense ones have such a square for each tap: [.][.][tap][.][.].
  T* depthwise[kMaxStages];
  T* pointwise[kMaxStages];
  T* pointwise_t[kMaxStages];

  T *mean, *invstd;  // [norm][padded]
  double* moments;   // [slot][norm][2][padded]: mean and sum of squared deviations over the slot's images

  T* scale;  // [term][padded]: weight * invstd, or weight
  T* shift;  // [term][padded]: mean, or 0

  double* sums;   // [slot][edges + terms][padded]: sum g of each edge, then sum g * (src - mean) of each term
  double* chain;  // [slot][stage][2][padded]: sum d, sum d * (z - mean), d = d/d(normalised output of the stage)
  T* coef;        // [stages + terms][3][padded]: d/d(src) = A * (g + B * (src - mean) + C)
  T* wgrad;       // [slot][wgrad_size]: gradients of the packed weights
  int64_t wgrad_size, wgrad_depthwise[kMaxStages], wgrad_pointwise[kMaxStages];

  int64_t first_image(int64_t slot) const { return slot * args->N / slots; }
  int channels(int block) const { return block + 1 < blocks ? lanes : tail; }
  // Elements of one image of x, of a map, of an edge's sum.
  int64_t in_image() const { return args->H * args->W * args->x_step; }
  int64_t out_image() const { return args->OH * args->OW * args->C; }
  int64_t edge_image(int edge) const { return args->OH * args->OW * args->edges[edge].step; }
  Grid in_grid() const { return {int(args->H), int(args->W), halo, lanes}; }
  Grid out_grid() const { return {int(args->OH), int(args->OW), halo, lanes}; }
  Grid source_grid(int stage) const { return args->stages[stage].source < 0 ? in_grid() : out_grid(); }
  Grid pool_grid() const { return {int(args->OH), int(args->OW), 1, lanes}; }

  // Scratch of one thread, in elements of T.
  int64_t scratch_map() const {
    const int64_t a = in_grid().block(), b = out_grid().block();
    return blocks * (a > b ? a : b);
  }
  int64_t scratch_group() const { return int64_t(blocks) * group * args->OW * lanes; }
  int64_t scratch_rows() const { return (2 * (args->W + 2) + 11 * args->OW) * lanes; }
  int64_t scratch_sums() const { return (7 + args->edges_count + args->terms_count) * int64_t(padded); }
  int64_t scratch_size() const {
    return 3 * scratch_map() + 2 * scratch_group() + scratch_rows() + scratch_sums() + 3 * pool_grid().block();
  }
};

}  // namespace fastnas::cpu
