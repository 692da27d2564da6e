// Drives the CPU kernels of mixed_op: packs the weights, runs the phases, combines partial results between them.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "counters.h"
#include "cpu/arena.h"
#include "cpu/dispatch.h"
#include "cpu/mixed_op_run.h"

namespace fastnas::cpu {
#define FASTNAS_DECLARE(ISA)                                     \
  namespace ISA {                                                \
  template <class T>                                             \
  void forward_level(const Run<T>&, int, T*, int64_t, int64_t);  \
  template <class T>                                             \
  void forward_sum(const Run<T>&, T*, int64_t, int64_t);         \
  template <class T>                                             \
  void backward_sums(const Run<T>&, T*, int64_t, int64_t);       \
  template <class T>                                             \
  void backward_level(const Run<T>&, int, T*, int64_t, int64_t); \
  }
FASTNAS_DECLARE(plain)
FASTNAS_DECLARE(avx2)
FASTNAS_DECLARE(avx512)

namespace {
constexpr int64_t kMaxSlots = 32;
constexpr int64_t kWgradBytes =
    2 << 20;  // what the slots' weight gradients may take together, where that leaves 4 slots

// Vector-aligned memory that is kept from call to call by each thread.
template <class T>
T* thread_scratch(int64_t n) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  const size_t bytes = static_cast<size_t>(n) * sizeof(T);
  if (bytes > size) {
    memory.reset(), size = 0;  // so that a failure leaves nothing to reuse
    memory.reset(allocate(bytes));
    size = bytes;
  }
  return static_cast<T*>(memory.get());
}

int64_t taps(const Stage& s) { return int64_t(s.kernel) * s.kernel; }
int64_t depthwise_taps(const Stage& s) { return s.dense ? 0 : taps(s); }
int64_t squares(const Stage& s) { return s.dense ? taps(s) : 1; }  // (C, C) matrices among the weights

// A run and the memory behind its pointers.
template <class T>
class Driver {
 public:
  Driver(const MixedOpArgs& args, Parallel parallel, bool backward) : args_(args), parallel_(parallel) {
    Run<T>& r = run;
    r.args = &args_;
    const int bytes = isa() == Isa::avx512 ? 64 : isa() == Isa::avx2 ? 32 : 16;
    r.lanes = bytes / static_cast<int>(sizeof(T));
    r.blocks = static_cast<int>((args.C + r.lanes - 1) / r.lanes);
    r.tail = static_cast<int>(args.C - int64_t(r.blocks - 1) * r.lanes);
    r.padded = r.blocks * r.lanes;
    r.halo = r.levels = 0;
    r.group = static_cast<int>(std::max<int64_t>(1, std::min(args.OH, 64 / args.OW)));
    r.pools = false;
    for (int t = 0; t < args.terms_count; ++t) {
      r.pools |= args.terms[t].kind == Kind::max_pool || args.terms[t].kind == Kind::avg_pool;
      r.leader[t] = leader(args, t);
    }
    r.wgrad_size = 0;
    for (int k = 0; k < args.stages_count; ++k) {
      const Stage& s = args.stages[k];
      r.level[k] = s.source < 0 ? 0 : r.level[s.source] + 1;
      r.levels = std::max(r.levels, r.level[k] + 1);
      r.halo = std::max(r.halo, s.dilation * (s.kernel - 1) / 2);
      r.wgrad_depthwise[k] = r.wgrad_size;
      r.wgrad_pointwise[k] = r.wgrad_size + depthwise_taps(s) * r.padded;
      r.wgrad_size += depthwise_taps(s) * r.padded + squares(s) * r.padded * r.padded;
    }
    r.levels = std::max(r.levels, 1);
    const int64_t wgrad = r.wgrad_size * static_cast<int64_t>(sizeof(T));
    const int64_t fit = backward && wgrad > 0 ? kWgradBytes / wgrad : kMaxSlots;
    r.slots = static_cast<int>(std::min({args.N, kMaxSlots, std::max<int64_t>(4, fit)}));
    pack();
    r.mean = take<T>(int64_t(args.norms) * r.padded), r.invstd = take<T>(int64_t(args.norms) * r.padded);
    r.scale = take<T>(int64_t(args.terms_count) * r.padded), r.shift = take<T>(int64_t(args.terms_count) * r.padded);
    if (backward) {
      r.sums = take<double>(int64_t(r.slots) * (args.edges_count + args.terms_count) * r.padded);
      r.chain = take<double>(int64_t(r.slots) * args.stages_count * 2 * r.padded);
      r.coef = take<T>(int64_t(args.stages_count + args.terms_count) * 3 * r.padded);
      r.wgrad = take<T>(r.slots * r.wgrad_size);
    } else {
      r.moments = take<double>(int64_t(r.slots) * args.norms * 2 * r.padded);
    }
  }

  // Copies given or saved statistics into their padded place.
  void load_statistics() {
    for (int norm = 0; norm < args_.norms; ++norm) load_norm(norm);
  }

  void forward() {
    if (!args_.training) load_statistics();
    for (int level = 0; level < run.levels; ++level) {
      each_slot(
          [&](T* scratch, int64_t b, int64_t e) { FASTNAS_CPU_CALL(forward_level<T>, run, level, scratch, b, e); });
      if (!args_.training) continue;
      for (int k = 0; k < args_.stages_count; ++k)
        if (run.level[k] == level) finish_moments(args_.stages[k].norm, args_.stages[k].norm);
      for (int t = 0; level == 0 && t < args_.terms_count; ++t)
        if (args_.terms[t].norm >= 0 && args_.terms[t].kind != Kind::separable)
          finish_moments(args_.terms[t].norm, args_.terms[run.leader[t]].norm);
    }
    scale_terms();
    each_slot([&](T* scratch, int64_t b, int64_t e) { FASTNAS_CPU_CALL(forward_sum<T>, run, scratch, b, e); });
  }

  void backward() {
    load_statistics();
    scale_terms();
    each_slot([&](T* scratch, int64_t b, int64_t e) { FASTNAS_CPU_CALL(backward_sums<T>, run, scratch, b, e); });
    finish_sums();
    bool weights = false;
    for (int k = 0; k < args_.stages_count; ++k) weights |= args_.stages[k].grad_pointwise != nullptr;
    bool maps = false;
    for (int t = 0; t < args_.terms_count; ++t) maps |= args_.terms[t].grad != nullptr;
    if (!weights && !maps && !args_.grad_x) return;
    for (int level = run.levels - 1; level >= 0; --level) {
      each_slot(
          [&](T* scratch, int64_t b, int64_t e) { FASTNAS_CPU_CALL(backward_level<T>, run, level, scratch, b, e); });
      for (int k = 0; k < args_.stages_count; ++k)
        if (run.level[k] == level - 1 && args_.stages[k].grad_norm) finish_chain(k);
    }
    if (weights) unpack_gradients();
  }

 private:
  template <class F>
  void each_slot(F&& f) {
    parallel_(run.slots, [&](int64_t b, int64_t e) { f(thread_scratch<T>(run.scratch_size()), b, e); });
  }

  // Zeroed memory that lives as long as the driver.
  template <class U>
  U* take(int64_t n) {
    const size_t bytes = (static_cast<size_t>(std::max<int64_t>(n, 1)) * sizeof(U) + 63) / 64 * 64;
    memory_.emplace_back(std::aligned_alloc(64, bytes), &std::free);
    if (!memory_.back()) throw std::bad_alloc();
    std::fill_n(static_cast<char*>(memory_.back().get()), bytes, 0);
    return static_cast<U*>(memory_.back().get());
  }

  void pack() {
    const int64_t C = args_.C;
    const int V = run.lanes, B = run.blocks;
    for (int k = 0; k < args_.stages_count; ++k) {
      const Stage& s = args_.stages[k];
      const int64_t n = depthwise_taps(s), m = squares(s), size = m * run.padded * run.padded;
      T* d = run.depthwise[k] = take<T>(n * run.padded);
      T *p = run.pointwise[k] = take<T>(2 * size), *q = run.pointwise_t[k] = p + size;
      const T *dw = static_cast<const T*>(s.depthwise), *pw = static_cast<const T*>(s.pointwise);
      for (int64_t c = 0; c < C; ++c)
        for (int64_t t = 0; t < n; ++t) d[(c / V * n + t) * V + c % V] = dw[c * n + t];
      for (int64_t o = 0; o < C; ++o)
        for (int64_t i = 0; i < C; ++i)
          for (int64_t t = 0; t < m; ++t) {
            const T value = pw[(o * C + i) * m + t];
            p[(((o / V * B + i / V) * m + t) * V + i % V) * V + o % V] = value;
            q[(((i / V * B + o / V) * m + t) * V + o % V) * V + i % V] = value;
          }
    }
  }

  void load_norm(int norm) {
    const T *mean = static_cast<const T*>(args_.mean) + norm * args_.C,
            *invstd = static_cast<const T*>(args_.invstd) + norm * args_.C;
    std::copy_n(mean, args_.C, run.mean + int64_t(norm) * run.padded);
    std::copy_n(invstd, args_.C, run.invstd + int64_t(norm) * run.padded);
  }

  // Combines the slots' moments of `from`, in order, into mean, invstd and the unbiased variance of `norm`.
  void finish_moments(int norm, int from) {
    const double pixels = double(args_.OH * args_.OW), total = double(args_.N) * pixels;
    for (int64_t c = 0; c < args_.C; ++c) {
      double mean = 0, deviation = 0, n = 0;
      for (int64_t slot = 0; slot < run.slots; ++slot) {
        const double* m = run.moments + (slot * args_.norms + from) * 2 * run.padded;
        const double own = double(run.first_image(slot + 1) - run.first_image(slot)) * pixels, delta = m[c] - mean;
        mean += delta * own / (n + own);
        deviation += m[run.padded + c] + delta * delta * n * own / (n + own);
        n += own;
      }
      const int64_t at = norm * args_.C + c;
      static_cast<T*>(args_.mean)[at] = static_cast<T>(mean);
      static_cast<T*>(args_.invstd)[at] = static_cast<T>(1 / std::sqrt(deviation / total + args_.eps[norm]));
      static_cast<T*>(args_.variance)[at] = static_cast<T>(deviation / (total - 1));
    }
    load_norm(norm);
  }

  void scale_terms() {
    for (int t = 0; t < args_.terms_count; ++t) {
      const Term& term = args_.terms[t];
      const T w = static_cast<const T*>(args_.weights)[term.weight];
      for (int64_t c = 0; c < args_.C; ++c) {
        const int64_t at = t * run.padded + c;
        run.scale[at] = term.norm < 0 ? w : w * run.invstd[term.norm * run.padded + c];
        run.shift[at] = term.norm < 0 ? T(0) : run.mean[term.norm * run.padded + c];
      }
    }
  }

  // From the sums over all slots: the weights' gradients, and A, B, C of every term (of its stage, where it has one).
  void finish_sums() {
    const double total = double(args_.N * args_.OH * args_.OW);
    const int64_t size = int64_t(args_.edges_count + args_.terms_count) * run.padded;
    for (int64_t slot = 1; slot < run.slots; ++slot)
      for (int64_t i = 0; i < size; ++i) run.sums[i] += run.sums[slot * size + i];
    for (int t = 0; t < args_.terms_count; ++t) {
      const Term& term = args_.terms[t];
      const double w = static_cast<double>(static_cast<const T*>(args_.weights)[term.weight]);
      T* coef = run.coef + int64_t(term.kind == Kind::separable ? term.stage : args_.stages_count + t) * 3 * run.padded;
      const double *g = run.sums + term.edge * run.padded, *gz = run.sums + (args_.edges_count + t) * run.padded;
      double dot = 0;
      for (int64_t c = 0; c < args_.C; ++c) {
        const double r = term.norm < 0 ? 1 : static_cast<double>(run.invstd[term.norm * run.padded + c]);
        dot += gz[c] * r;
        set_coef(coef + c, w * r, term.norm >= 0, r * r * gz[c] / total, g[c] / total);
      }
      static_cast<T*>(args_.grad_weights)[term.weight] = static_cast<T>(dot);
    }
  }

  // The same for a stage that other stages read: its normalised output's gradient is grad_norm.
  void finish_chain(int stage) {
    const double total = double(args_.N * args_.OH * args_.OW);
    T* coef = run.coef + int64_t(stage) * 3 * run.padded;
    for (int64_t c = 0; c < args_.C; ++c) {
      double s = 0, sz = 0;
      for (int64_t slot = 0; slot < run.slots; ++slot) {
        const double* sums = run.chain + (slot * args_.stages_count + stage) * 2 * run.padded;
        s += sums[c], sz += sums[run.padded + c];
      }
      const double r = static_cast<double>(run.invstd[args_.stages[stage].norm * run.padded + c]);
      set_coef(coef + c, r, true, r * r * sz / total, s / total);
    }
  }

  // A stands outside: its rounding then scales the whole gradient and leaves it orthogonal to the constant and to z.
  void set_coef(T* coef, double a, bool normalised, double b, double c) {
    const bool batch = normalised && args_.training;  // given statistics do not depend on the input
    coef[0] = static_cast<T>(a);
    coef[run.padded] = batch ? static_cast<T>(-b) : T(0);
    coef[2 * run.padded] = batch ? static_cast<T>(-c) : T(0);
  }

  // Adds the slots' weight gradients in order and writes them in the parameters' own layout.
  void unpack_gradients() {
    const int64_t C = args_.C;
    const int V = run.lanes, B = run.blocks;
    parallel_((run.wgrad_size + 4095) / 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * 4096; i < std::min(run.wgrad_size, end * 4096); ++i) {
        double sum = 0;
        for (int64_t slot = 0; slot < run.slots; ++slot)
          sum += static_cast<double>(run.wgrad[slot * run.wgrad_size + i]);
        run.wgrad[i] = static_cast<T>(sum);
      }
    });
    for (int k = 0; k < args_.stages_count; ++k) {
      const Stage& s = args_.stages[k];
      if (!s.grad_pointwise) continue;
      const int64_t n = depthwise_taps(s), m = squares(s);
      const T *d = run.wgrad + run.wgrad_depthwise[k], *p = run.wgrad + run.wgrad_pointwise[k];
      T *dw = static_cast<T*>(s.grad_depthwise), *pw = static_cast<T*>(s.grad_pointwise);
      for (int64_t c = 0; c < C; ++c)
        for (int64_t t = 0; t < n; ++t) dw[c * n + t] = d[(c / V * n + t) * V + c % V];
      for (int64_t o = 0; o < C; ++o)
        for (int64_t i = 0; i < C; ++i)
          for (int64_t t = 0; t < m; ++t)
            pw[(o * C + i) * m + t] = p[(((o / V * B + i / V) * m + t) * V + i % V) * V + o % V];
    }
  }

  const MixedOpArgs args_;
  Parallel parallel_;
  Run<T> run{};
  std::vector<std::unique_ptr<void, decltype(&std::free)>> memory_;
};

// Bytes that must move, by hand: x and each stage's output once in and once out, the maps, and the edges' sums.
template <class T>
int64_t map_bytes(const MixedOpArgs& a, bool backward) {
  int64_t in = backward ? 1 + (a.grad_x ? 1 + (a.grad_add != nullptr) : 0) : 1, out = a.edges_count;
  out += backward ? a.stages_count : 2 * a.stages_count;
  for (int k = 0; backward && k < a.stages_count; ++k) out += a.stages[k].grad_norm ? 2 : 0;
  for (int e = 0; e < a.edges_count; ++e) out += !backward && a.edges[e].add;
  for (int t = 0; t < a.terms_count; ++t)
    if (a.terms[t].kind == Kind::map) out += a.terms[t].grad ? 2 : 1;
  return static_cast<int64_t>(sizeof(T)) * a.N * a.C * (in * a.H * a.W + out * a.OH * a.OW);
}
}  // namespace

template <class T>
void mixed_op(const MixedOpArgs& args, Parallel parallel) {
  count("mixed_op", map_bytes<T>(args, false));
  Driver<T>(args, parallel, false).forward();
}

template <class T>
void mixed_op_backward(const MixedOpArgs& args, Parallel parallel) {
  count("mixed_op_backward", map_bytes<T>(args, true));
  Driver<T>(args, parallel, true).backward();
}

#define FASTNAS_INSTANTIATE(T)                             \
  template void mixed_op<T>(const MixedOpArgs&, Parallel); \
  template void mixed_op_backward<T>(const MixedOpArgs&, Parallel);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
}  // namespace fastnas::cpu
