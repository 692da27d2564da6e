// Drives the CPU kernels of relu_pointwise: packs the weights, runs the pieces, combines the weights' gradients.
#include "relu_pointwise.h"

#include <algorithm>

#include "counters.h"
#include "cpu/arena.h"
#include "cpu/dispatch.h"
#include "cpu/relu_pointwise_run.h"

namespace fastnas::cpu {
#define FASTNAS_DECLARE(ISA)                                                        \
  namespace ISA {                                                                   \
  template <class T>                                                                \
  void relu_pointwise_chunks(const PointwiseRun<T>&, T*, int64_t, int64_t);         \
  template <class T>                                                                \
  void relu_pointwise_backward_slots(const PointwiseRun<T>&, T*, int64_t, int64_t); \
  template <class T>                                                                \
  void relu_pointwise_backward_finish(const PointwiseRun<T>&, int64_t, int64_t);    \
  }
FASTNAS_DECLARE(plain)
FASTNAS_DECLARE(avx2)
FASTNAS_DECLARE(avx512)

namespace {
constexpr int64_t kMaxSlots = 32;
constexpr int64_t kSlotChunks = 2;          // at least: combining costs less than a chunk
constexpr int64_t kPartialBytes = 4 << 20;  // what the slots take together, where that leaves 4 of them

template <class T>
PointwiseRun<T> make_run(const ReluPointwiseArgs& a) {
  PointwiseRun<T> run{};
  run.args = &a;
  const int bytes = isa() == Isa::avx512 ? 64 : isa() == Isa::avx2 ? 32 : 16;
  run.lanes = bytes / static_cast<int>(sizeof(T));
  run.padded = (a.in + run.lanes - 1) / run.lanes * run.lanes;
  run.row = run.padded + run.lanes;
  run.chunks = (a.pixels() + kPointwiseChunk - 1) / kPointwiseChunk;
  const int64_t fit = kPartialBytes / (a.channels * run.padded * static_cast<int64_t>(sizeof(T)));
  run.slots = std::max<int64_t>(1, std::min({kMaxSlots, run.chunks / kSlotChunks, std::max<int64_t>(4, fit)}));
  return run;
}

// The matrix of rows x columns whose element (r, c) is at r * step + c * next, as [block of rows][column][lane].
template <class T>
void pack(const T* matrix, int64_t rows, int64_t step, int64_t columns, int64_t next, int lanes, T* to) {
  for (int64_t first = 0; first < rows; first += lanes) {
    const int64_t n = std::min<int64_t>(lanes, rows - first);
    for (int64_t c = 0; c < columns; ++c, to += lanes) {
      const T* from = matrix + first * step + c * next;
      for (int64_t lane = 0; lane < n; ++lane) to[lane] = from[lane * step];
      std::fill(to + n, to + lanes, T(0));
    }
  }
}
}  // namespace

template <class T>
void relu_pointwise(const ReluPointwiseArgs& args, Parallel parallel) {
  count("relu_pointwise", relu_pointwise_bytes(args, sizeof(T)));
  PointwiseRun<T> run = make_run<T>(args);
  auto size = [&](int g) { return (args.out(g) + run.lanes - 1) / run.lanes * run.lanes * args.in; };
  const Block<T> packed(size(0) + (args.groups > 1 ? size(1) : 0));
  for (int g = 0; g < args.groups; ++g) {
    run.weights[g] = packed.get() + (g > 0 ? size(0) : 0);
    pack(static_cast<const T*>(args.weights[g]), args.out(g), args.in, args.in, 1, run.lanes, run.weights[g]);
  }
  parallel(run.chunks, [&](int64_t begin, int64_t end) {
    const Block<T> scratch(run.scratch_size());
    FASTNAS_CPU_CALL(relu_pointwise_chunks<T>, run, scratch.get(), begin, end);
  });
}

template <class T>
void relu_pointwise_backward(const ReluPointwiseArgs& args, Parallel parallel) {
  count("relu_pointwise_backward",
        (args.grad_x ? relu_pointwise_input_bytes(args, sizeof(T)) : relu_pointwise_bytes(args, sizeof(T))) +
            (args.grad_weights[0] ? args.channels * args.in * static_cast<int64_t>(sizeof(T)) : 0));
  PointwiseRun<T> run = make_run<T>(args);
  const Block<T> packed(args.channels * run.padded), partial(run.slots * args.channels * run.padded);
  run.partial = partial.get();
  for (int g = 0; g < args.groups; ++g) {
    run.weights[g] = packed.get() + args.begin[g] * run.padded;
    if (args.grad_x)
      pack(static_cast<const T*>(args.weights[g]), args.in, 1, args.out(g), args.in, run.lanes, run.weights[g]);
  }
  parallel(run.slots, [&](int64_t begin, int64_t end) {
    const Block<T> scratch(run.scratch_size());
    FASTNAS_CPU_CALL(relu_pointwise_backward_slots<T>, run, scratch.get(), begin, end);
  });
  if (args.grad_weights[0])
    parallel(args.channels,
             [&](int64_t begin, int64_t end) { FASTNAS_CPU_CALL(relu_pointwise_backward_finish<T>, run, begin, end); });
}

#define FASTNAS_INSTANTIATE(T)                                         \
  template void relu_pointwise<T>(const ReluPointwiseArgs&, Parallel); \
  template void relu_pointwise_backward<T>(const ReluPointwiseArgs&, Parallel);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
}  // namespace fastnas::cpu
