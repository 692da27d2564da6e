#include "absolute.h"

#include "cuda/launch.cuh"

namespace fastnas::cuda {
namespace {
constexpr int kThreads = 256;  // 8 warps; a warp takes a word at a time
constexpr int kBlocks = 4;     // of a processor, at least: more would not leave the registers

// One piece a block: absolute values and their signs, or the signs' return.
template <bool Restore>
__global__ void __launch_bounds__(kThreads, kBlocks) signs_kernel(const __grid_constant__ AbsoluteArgs a) {
  const Listed& t = a.of_piece(blockIdx.x);
  const int64_t begin = (blockIdx.x - t.piece) * kPieceWords;
  const int64_t end = begin + kPieceWords < t.words() ? begin + kPieceWords : t.words();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  with_bits(t.type, [&](auto bits) {
    using U = decltype(bits);
    for (int64_t word = begin + threadIdx.x / 32; word < end; word += kThreads / 32) {
      const int64_t i = word * kWord + lane;
      U* p = static_cast<U*>(t.p) + i;
      if constexpr (Restore) {
        const uint32_t sign = a.signs[t.word + word] >> lane & 1;
        if (i < t.n) *p = static_cast<U>((*p & kMagnitude<U>) | static_cast<U>(static_cast<U>(sign) << kSignBit<U>));
      } else {
        const U value = i < t.n ? *p : U{0};
        const uint32_t signs = warp_sum(static_cast<uint32_t>(value >> kSignBit<U>) << lane);  // bits of their own
        if (i < t.n) *p = value & kMagnitude<U>;
        if (lane == 0) a.signs[t.word + word] = signs;
      }
    }
  });
}

// One piece's sum of products a block, taken in double.
__global__ void __launch_bounds__(kThreads) group_products_kernel(const __grid_constant__ AbsoluteArgs a) {
  const Listed& t = a.of_piece(blockIdx.x);
  const int64_t begin = (blockIdx.x - t.piece) * kPiece, end = begin + kPiece < t.n ? begin + kPiece : t.n;
  double sum = 0;
  with_float(t.type, [&](auto value) {
    using T = decltype(value);
    const T *theta = static_cast<const T*>(t.p), *grad = static_cast<const T*>(t.q);
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const double product = static_cast<double>(static_cast<compute_t<T>>(theta[i])) *
                             static_cast<double>(static_cast<compute_t<T>>(grad[i]));
      sum += a.absolute && product < 0 ? -product : product;
    }
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) a.partial[blockIdx.x] = sum;
}

// One group a block: adds its pieces.
__global__ void __launch_bounds__(kThreads) group_products_finish_kernel(const __grid_constant__ AbsoluteArgs a) {
  double sum = 0;
  for (int64_t p = a.groups[blockIdx.x] + threadIdx.x; p < a.groups[blockIdx.x + 1]; p += kThreads) sum += a.partial[p];
  sum = block_sum(sum);
  if (threadIdx.x == 0) a.sums[blockIdx.x] = sum;
}
}  // namespace

void absolute(const AbsoluteArgs& args, Stream stream) {
  launch("absolute", args.bytes, signs_kernel<false>, dim3(args.pieces), dim3(kThreads), stream, args);
}

void restore(const AbsoluteArgs& args, Stream stream) {
  launch("restore", args.bytes, signs_kernel<true>, dim3(args.pieces), dim3(kThreads), stream, args);
}

void group_products(const AbsoluteArgs& args, Stream stream) {
  const int64_t size = sizeof(double);
  if (args.pieces > 0)
    launch("group_products", args.bytes + args.pieces * size, group_products_kernel, dim3(args.pieces), dim3(kThreads),
           stream, args);
  launch("group_products_finish", (args.pieces + args.groups_count) * size, group_products_finish_kernel,
         dim3(args.groups_count), dim3(kThreads), stream, args);
}
}  // namespace fastnas::cuda
