#include "partial_channels.h"

#include <algorithm>
#include <vector>

#include "counters.h"
#include "cpu/dispatch.h"

namespace fastnas::cpu {
#define FASTNAS_DECLARE(ISA)                                                                                        \
  namespace ISA {                                                                                                   \
  template <class T>                                                                                                \
  void partial_channels_split_range(const PartialChannelsArgs&, int64_t, int64_t);                                  \
  template <class T>                                                                                                \
  void partial_channels_range(const PartialChannelsArgs&, compute_t<T>*, int64_t, int64_t);                         \
  template <class T>                                                                                                \
  void partial_channels_backward_range(const PartialChannelsArgs&, int64_t, int64_t);                               \
  template <class T>                                                                                                \
  void partial_channels_split_backward_range(const PartialChannelsArgs&, compute_t<T>*, double*, int64_t, int64_t); \
  }
FASTNAS_DECLARE(plain)
FASTNAS_DECLARE(avx2)
FASTNAS_DECLARE(avx512)

namespace {
constexpr int64_t kPiece = 128;    // pixels that are worth a thread
constexpr int64_t kMaxLanes = 16;  // of any instruction set's vectors
int64_t pieces(int64_t pixels) { return (pixels + kPiece - 1) / kPiece; }

template <class Body>
void over_pixels(int64_t pixels, Parallel parallel, Body body) {
  parallel(pieces(pixels), [&](int64_t begin, int64_t end) { body(begin * kPiece, std::min(pixels, end * kPiece)); });
}
}  // namespace

template <class T>
void partial_channels_split(const PartialChannelsArgs& args, Parallel parallel) {
  count("partial_channels_split", partial_channels_split_bytes(args, sizeof(T)));
  over_pixels(args.pixels(), parallel,
              [&](int64_t begin, int64_t end) { FASTNAS_CPU_CALL(partial_channels_split_range<T>, args, begin, end); });
}

template <class T>
void partial_channels_split_backward(const PartialChannelsArgs& args, Parallel parallel) {
  count("partial_channels_split_backward", partial_channels_split_backward_bytes(args, sizeof(T)));
  const int64_t windows = args.windows();
  std::vector<double> dots(args.grad_edge_weights ? pieces(windows) * kMaxPartialEdges : 0);
  parallel(pieces(windows), [&](int64_t begin, int64_t end) {
    std::vector<compute_t<T>> scratch(3 * (args.C + kMaxLanes));
    for (int64_t i = begin; i < end; ++i) {
      double* of_piece = args.grad_edge_weights ? &dots[i * kMaxPartialEdges] : nullptr;
      FASTNAS_CPU_CALL(partial_channels_split_backward_range<T>, args, scratch.data(), of_piece, i * kPiece,
                       std::min(windows, (i + 1) * kPiece));
    }
  });
  for (int e = 0; e < args.edges_count && args.grad_edge_weights; ++e) {
    double sum = 0;
    for (int64_t i = 0; i < pieces(windows); ++i) sum += dots[i * kMaxPartialEdges + e];
    static_cast<compute_t<T>*>(args.grad_edge_weights)[args.edges[e].weight] = static_cast<compute_t<T>>(sum);
  }
}

template <class T>
void partial_channels(const PartialChannelsArgs& args, Parallel parallel) {
  count("partial_channels", partial_channels_bytes(args, sizeof(T)));
  over_pixels(args.pixels(), parallel, [&](int64_t begin, int64_t end) {
    std::vector<compute_t<T>> scratch(args.C + kMaxLanes);
    FASTNAS_CPU_CALL(partial_channels_range<T>, args, scratch.data(), begin, end);
  });
}

template <class T>
void partial_channels_backward(const PartialChannelsArgs& args, Parallel parallel) {
  count("partial_channels_backward", partial_channels_backward_bytes(args, sizeof(T)));
  over_pixels(args.pixels(), parallel, [&](int64_t begin, int64_t end) {
    FASTNAS_CPU_CALL(partial_channels_backward_range<T>, args, begin, end);
  });
}

#define FASTNAS_INSTANTIATE(T)                                                            \
  template void partial_channels_split<T>(const PartialChannelsArgs&, Parallel);          \
  template void partial_channels_split_backward<T>(const PartialChannelsArgs&, Parallel); \
  template void partial_channels<T>(const PartialChannelsArgs&, Parallel);                \
  template void partial_channels_backward<T>(const PartialChannelsArgs&, Parallel);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
FASTNAS_INSTANTIATE(Half)
FASTNAS_INSTANTIATE(BFloat16)
}  // namespace fastnas::cpu
