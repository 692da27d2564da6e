// What the CPU kernels of abs_cell share with the code that drives them.
//
// Everything is cut into pieces by shape alone, and a piece has its results to itself: bands of rows of an image for
// the fans, (tap, kTileChannels channels) of a fan for the merged kernels' gradient, (edge, a vector of output
// channels) for what is made of it, whose parts are added in order.
#pragma once
#include "abs_cell.h"

namespace fastnas::cpu {
constexpr int64_t kBandPixels = 32;   // of a fan's piece, at least
constexpr int64_t kChainPixels = 64;  // that are summed in a register before they meet the rest
constexpr int64_t kChainChannels = 64;
constexpr int64_t kMergeChannels = 16;  // that are merged before they are transposed
constexpr int64_t kTileChannels = 8;    // of the source in a piece of the merged kernels' gradient

template <class T>
struct AbsRun {
  const AbsCellArgs* args;
  bool backward;
  int lanes;
  T* map;                       // args->states, or of the same shape the nodes' gradients
  T* merged[kMaxAbsNodes];      // by fan: [block of columns][tap][channel of `from`][lane]; a column is (node, channel)
  T pool[kMaxAbsEdges];         // sum of |w| of the edge's pools
  T* gradient[kMaxAbsNodes];    // of the merged kernels, by forward fan: [tap][channel of `from`][columns, padded]
  double border[kMaxAbsEdges];  // <grad, what the pool's divisors at the border add>, a weight of 1
  double* partial;              // [edge][block of output channels][op]

  int64_t blocks(int64_t channels) const { return (channels + lanes - 1) / lanes; }
  int64_t columns(const AbsFan& f) const { return f.count * args->C; }
  int64_t padded(const AbsFan& f) const { return blocks(columns(f)) * lanes; }
  int64_t merged_size(const AbsFan& f) const { return 9 * args->C * padded(f); }
  int64_t band() const { return (kBandPixels + args->W - 1) / args->W; }  // rows
  int64_t bands() const { return (args->H + band() - 1) / band(); }
  int64_t channel_tiles() const { return (args->C + kTileChannels - 1) / kTileChannels; }
};
}  // namespace fastnas::cpu
