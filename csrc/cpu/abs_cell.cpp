// Drives the CPU kernels of abs_cell: merges the weights, runs the fans, and combines what the backward sums.
#include "abs_cell.h"

#include <algorithm>

#include "counters.h"
#include "cpu/abs_cell_run.h"
#include "cpu/arena.h"
#include "cpu/dispatch.h"

namespace fastnas::cpu {
#define FASTNAS_DECLARE(ISA)                                             \
  namespace ISA {                                                        \
  template <class T>                                                     \
  void abs_cell_merge(const AbsRun<T>&, T*, int64_t, int64_t);           \
  template <class T>                                                     \
  void abs_cell_load(const AbsRun<T>&, const T*, int, int64_t, int64_t); \
  template <class T>                                                     \
  void abs_cell_fan(const AbsRun<T>&, int, T*, int64_t, int64_t);        \
  template <class T>                                                     \
  void abs_cell_gradient(AbsRun<T>&, int64_t, T*, int64_t, int64_t);     \
  template <class T>                                                     \
  void abs_cell_finish(const AbsRun<T>&, int64_t, int64_t);              \
  }
FASTNAS_DECLARE(plain)
FASTNAS_DECLARE(avx2)
FASTNAS_DECLARE(avx512)

namespace {
// Memory of the arena for as long as the object lives.
template <class T>
class Block {
 public:
  explicit Block(int64_t n) : memory_(arena_take(static_cast<size_t>(n) * sizeof(T))) {}
  ~Block() { arena_give(memory_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  T* get() const { return static_cast<T*>(memory_); }

 private:
  void* memory_;
};

template <class T>
AbsRun<T> make_run(const AbsCellArgs& a, bool backward) {
  AbsRun<T> run{};
  run.args = &a;
  run.backward = backward;
  const int bytes = isa() == Isa::avx512 ? 64 : isa() == Isa::avx2 ? 32 : 16;
  run.lanes = bytes / static_cast<int>(sizeof(T));
  const T* weights = static_cast<const T*>(a.weights);
  for (int e = 0; e < a.edges(); ++e)
    for (int o = 0; o < a.ops_count; ++o) {
      const T w = weights[e * a.ops_count + o];
      if (a.ops[o] == AbsOp::avg_pool) run.pool[e] += w < 0 ? -w : w;
    }
  return run;
}

// Merges the weights, puts `from` into the place of `node` in the map, and runs the fans. Kernels of a whole cell come
// from one block, fan after fan.
template <class T>
void run_fans(AbsRun<T>& run, const void* from, int node, Parallel parallel) {
  const AbsCellArgs& a = *run.args;
  const int64_t size = sizeof(T);
  int64_t elements = 0, blocks = 0;
  for (int i = 0; i + 1 < a.nodes; ++i) {
    const AbsFan f = a.fan(i, run.backward);
    elements += run.merged_size(f), blocks += run.blocks(run.columns(f));
  }
  const Block<T> merged(elements);
  T* at = merged.get();
  for (int i = 0; i + 1 < a.nodes; ++i) run.merged[i] = at, at += run.merged_size(a.fan(i, run.backward));
  count("abs_cell_merge", abs_cell_merge_bytes(a, size, size, run.backward));
  parallel(blocks, [&](int64_t begin, int64_t end) {
    const Block<T> scratch(9 * kMergeChannels * run.lanes);
    FASTNAS_CPU_CALL(abs_cell_merge<T>, run, scratch.get(), begin, end);
  });
  count("abs_cell_load", abs_cell_load_bytes(a, size));
  parallel(a.N * (a.H + 2), [&](int64_t begin, int64_t end) {
    FASTNAS_CPU_CALL(abs_cell_load<T>, run, static_cast<const T*>(from), node, begin, end);
  });
  for (int i = 0; i + 1 < a.nodes; ++i) {
    const AbsFan f = a.fan(i, run.backward);
    if (f.count == 0) continue;
    count("abs_cell_fan", abs_cell_fan_bytes(a, f, size, size));
    parallel(a.N * run.bands(), [&](int64_t begin, int64_t end) {
      const Block<T> scratch(run.blocks(a.C) * run.lanes);
      FASTNAS_CPU_CALL(abs_cell_fan<T>, run, i, scratch.get(), begin, end);
    });
  }
}
}  // namespace

template <class T>
void abs_cell(const AbsCellArgs& args, Parallel parallel) {
  AbsRun<T> run = make_run<T>(args, false);
  run.map = static_cast<T*>(args.states);
  run_fans(run, args.x, 0, parallel);
}

template <class T>
void abs_cell_backward(const AbsCellArgs& a, Parallel parallel) {
  AbsRun<T> run = make_run<T>(a, true);
  const Block<T> grads(a.N * a.image());
  run.map = grads.get();
  run_fans(run, a.grad, a.nodes - 1, parallel);
  const bool kernels = a.kernels_wanted();
  if (!a.grad_weights && !kernels) return;

  const int64_t size = sizeof(T);
  int64_t elements = 0;
  for (int i = 0; i + 1 < a.nodes; ++i) elements += run.merged_size(a.fan(i, false));
  const Block<T> gradient(elements);
  T* at = gradient.get();
  for (int i = 0; i + 1 < a.nodes; ++i) run.gradient[i] = at, at += run.merged_size(a.fan(i, false));
  count("abs_cell_gradient", abs_cell_gradient_bytes(a, size, size));
  // Image by image, so that its maps stay in the cache for all pieces.
  const int fans = a.nodes - 1;
  for (int64_t image = 0; image < a.N; ++image)
    parallel(9 * run.channel_tiles() * fans + (a.pooled() ? fans : 0), [&](int64_t begin, int64_t end) {
      const Block<T> scratch(run.blocks(a.C) * run.lanes);
      FASTNAS_CPU_CALL(abs_cell_gradient<T>, run, image, scratch.get(), begin, end);
    });

  const int64_t blocks = run.blocks(a.C);
  const Block<double> partial(a.edges() * blocks * a.ops_count);
  run.partial = partial.get();
  count("abs_cell_finish", abs_cell_finish_bytes(a, size, size, kernels));
  parallel(a.edges() * blocks,
           [&](int64_t begin, int64_t end) { FASTNAS_CPU_CALL(abs_cell_finish<T>, run, begin, end); });
  if (!a.grad_weights) return;
  for (int64_t k = 0; k < a.edges() * a.ops_count; ++k) {
    const int64_t edge = k / a.ops_count, o = k % a.ops_count;
    double sum = a.ops[o] == AbsOp::avg_pool ? run.border[edge] : 0;
    for (int64_t b = 0; b < blocks; ++b) sum += run.partial[(edge * blocks + b) * a.ops_count + o];
    static_cast<T*>(a.grad_weights)[k] = static_cast<T>(static_cast<const T*>(a.weights)[k] < 0 ? -sum : sum);
  }
}

#define FASTNAS_INSTANTIATE(T)                             \
  template void abs_cell<T>(const AbsCellArgs&, Parallel); \
  template void abs_cell_backward<T>(const AbsCellArgs&, Parallel);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
}  // namespace fastnas::cpu
