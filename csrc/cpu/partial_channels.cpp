#include "partial_channels.h"

#include <algorithm>

#include "counters.h"
#include "cpu/dispatch.h"

namespace fastnas::cpu {
#define FASTNAS_DECLARE(ISA)                                                                \
  namespace ISA {                                                                           \
  template <class T>                                                                        \
  void partial_channels_split_range(const PartialChannelsArgs&, int64_t, int64_t);          \
  template <class T>                                                                        \
  void partial_channels_range(const PartialChannelsArgs&, int64_t, int64_t);                \
  template <class T>                                                                        \
  void partial_channels_backward_range(const PartialChannelsArgs&, int64_t, int64_t);       \
  template <class T>                                                                        \
  void partial_channels_split_backward_range(const PartialChannelsArgs&, int64_t, int64_t); \
  }
FASTNAS_DECLARE(plain)
FASTNAS_DECLARE(avx2)
FASTNAS_DECLARE(avx512)

namespace {
// Runs body over pixels in pieces that are worth a thread.
template <class Body>
void over_pixels(int64_t pixels, Parallel parallel, Body body) {
  constexpr int64_t kPiece = 128;
  parallel((pixels + kPiece - 1) / kPiece,
           [&](int64_t begin, int64_t end) { body(begin * kPiece, std::min(pixels, end * kPiece)); });
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
  over_pixels(args.windows(), parallel, [&](int64_t begin, int64_t end) {
    FASTNAS_CPU_CALL(partial_channels_split_backward_range<T>, args, begin, end);
  });
}

template <class T>
void partial_channels(const PartialChannelsArgs& args, Parallel parallel) {
  count("partial_channels", partial_channels_bytes(args, sizeof(T)));
  over_pixels(args.windows(), parallel,
              [&](int64_t begin, int64_t end) { FASTNAS_CPU_CALL(partial_channels_range<T>, args, begin, end); });
}

template <class T>
void partial_channels_backward(const PartialChannelsArgs& args, Parallel parallel) {
  count("partial_channels_backward", partial_channels_backward_bytes(args, sizeof(T)));
  over_pixels(args.windows(), parallel, [&](int64_t begin, int64_t end) {
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
