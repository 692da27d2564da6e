#include "mixed_sum.h"

#include <algorithm>
#include <vector>

#include "counters.h"
#include "cpu/dispatch.h"

namespace fastnas::cpu {
#define FASTNAS_DECLARE(ISA)                                                     \
  namespace ISA {                                                                \
  template <class T>                                                             \
  void mixed_sum_range(const MixedSumArgs&, int64_t, int64_t);                   \
  template <class T>                                                             \
  void mixed_sum_backward_piece(const MixedSumArgs&, int64_t, int64_t, double*); \
  }
FASTNAS_DECLARE(plain)
FASTNAS_DECLARE(avx2)
FASTNAS_DECLARE(avx512)

template <class T>
void mixed_sum(const MixedSumArgs& args, Parallel parallel) {
  count("mixed_sum", (args.count + 1) * args.n * static_cast<int64_t>(sizeof(T)));
  parallel(mixed_sum_pieces(args.n), [&](int64_t begin, int64_t end) {
    FASTNAS_CPU_CALL(mixed_sum_range<T>, args, begin * kMixedSumPiece, std::min(args.n, end * kMixedSumPiece));
  });
}

template <class T>
void mixed_sum_backward(const MixedSumArgs& args, Parallel parallel) {
  const int64_t maps = 1 + (args.grad_xs[0] ? args.count : 0) + (args.grad_weights ? args.count : 0);
  count("mixed_sum_backward", maps * args.n * static_cast<int64_t>(sizeof(T)));
  const int64_t pieces = mixed_sum_pieces(args.n);
  double* partial = args.grad_weights ? static_cast<double*>(args.partial) : nullptr;
  parallel(pieces, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      FASTNAS_CPU_CALL(mixed_sum_backward_piece<T>, args, p * kMixedSumPiece,
                       std::min(args.n, (p + 1) * kMixedSumPiece), partial ? partial + p * args.count : nullptr);
  });
  if (!partial) return;
  for (int k = 0; k < args.count; ++k) {
    double sum = 0;
    for (int64_t p = 0; p < pieces; ++p) sum += partial[p * args.count + k];
    static_cast<compute_t<T>*>(args.grad_weights)[k] = static_cast<compute_t<T>>(sum);
  }
}

#define FASTNAS_INSTANTIATE(T)                               \
  template void mixed_sum<T>(const MixedSumArgs&, Parallel); \
  template void mixed_sum_backward<T>(const MixedSumArgs&, Parallel);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
FASTNAS_INSTANTIATE(Half)
FASTNAS_INSTANTIATE(BFloat16)
}  // namespace fastnas::cpu
