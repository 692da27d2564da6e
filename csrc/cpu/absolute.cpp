// Drives the CPU kernels of the passes over lists of tensors.
#include "absolute.h"

#include "counters.h"
#include "cpu/dispatch.h"

namespace fastnas::cpu {
#define FASTNAS_DECLARE(ISA)                                         \
  namespace ISA {                                                    \
  void absolute_pieces(const AbsoluteArgs&, int64_t, int64_t);       \
  void restore_pieces(const AbsoluteArgs&, int64_t, int64_t);        \
  void group_products_pieces(const AbsoluteArgs&, int64_t, int64_t); \
  }
FASTNAS_DECLARE(plain)
FASTNAS_DECLARE(avx2)
FASTNAS_DECLARE(avx512)

void absolute(const AbsoluteArgs& args, Parallel parallel) {
  count("absolute", args.bytes);
  parallel(args.pieces, [&](int64_t begin, int64_t end) { FASTNAS_CPU_CALL(absolute_pieces, args, begin, end); });
}

void restore(const AbsoluteArgs& args, Parallel parallel) {
  count("restore", args.bytes);
  parallel(args.pieces, [&](int64_t begin, int64_t end) { FASTNAS_CPU_CALL(restore_pieces, args, begin, end); });
}

void group_products(const AbsoluteArgs& args, Parallel parallel) {
  count("group_products", args.bytes + args.groups_count * static_cast<int64_t>(sizeof(double)));
  parallel(args.pieces, [&](int64_t begin, int64_t end) { FASTNAS_CPU_CALL(group_products_pieces, args, begin, end); });
  for (int64_t g = 0; g < args.groups_count; ++g) {
    args.sums[g] = 0;
    for (int64_t p = args.groups[g]; p < args.groups[g + 1]; ++p) args.sums[g] += args.partial[p];
  }
}
}  // namespace fastnas::cpu
