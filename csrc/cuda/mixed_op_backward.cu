// The backward of mixed_op. d/d(src) of a term or stage is k0 * g + k1 * (src - mean) + k2 with three coefficients a
// channel; g is the gradient of its edge's sum (k0 holds the weight) or, for a stage that another one reads, its
// grad_norm.
#include "cuda/mixed_op.cuh"

namespace fastnas::cuda {
namespace {
template <class A>
__device__ inline A* coefficients(const MixedOpArgs& a, const Scratch& scratch, int entry) {
  const int row = entry < 0 ? a.stages_count + ~entry : entry;
  return static_cast<A*>(scratch.coefficients) + static_cast<int64_t>(row) * 3 * a.C;
}

// The coefficients of a batch norm behind which lies weight * (normalised): from the sums of g and of g * (src - mean).
// Given statistics do not depend on the input.
template <class A>
__device__ inline void write_coefficients(const MixedOpArgs& a, A* to, int64_t c, double weight, int norm, double sum,
                                          double dot) {
  const double invstd = norm < 0 ? 1 : static_cast<double>(static_cast<const A*>(a.invstd)[norm * a.C + c]);
  const bool batch = norm >= 0 && a.training;
  const double scale = weight * invstd, P = static_cast<double>(output_pixels(a));
  to[c] = static_cast<A>(scale);
  to[a.C + c] = batch ? static_cast<A>(-scale * invstd * invstd * dot / P) : A(0);
  to[2 * a.C + c] = batch ? static_cast<A>(-scale * sum / P) : A(0);
}

// k0 * g + k1 * (src - mean) + k2 at V channels; without batch statistics src is left out, be it NaN or infinite.
template <class A, int V>
struct Slope {
  A k0[V], k1[V], k2[V], mean[V];
  bool batch;
  __device__ Slope(const MixedOpArgs& a, const Scratch& scratch, int entry, int c) {
    const A* from = coefficients<A>(a, scratch, entry) + c;
    read<A, V>(from, k0);
    read<A, V>(from + a.C, k1);
    read<A, V>(from + 2 * a.C, k2);
    const int norm = entry < 0 ? a.terms[~entry].norm : a.stages[entry].norm;
    batch = norm >= 0 && a.training;
    fill(mean, A(0));
    if (norm >= 0) read<A, V>(static_cast<const A*>(a.mean) + norm * a.C + c, mean);
  }
  __device__ A operator()(int v, A g, A src) const {
    return batch ? k0[v] * g + k1[v] * (src - mean[v]) + k2[v] : k0[v] * g;
  }
};

// g of an edge at one pixel.
template <class T, int V>
__device__ inline void edge_gradient(const MixedOpArgs& a, int edge, int64_t p, int c, compute_t<T> (&g)[V]) {
  read<T, V>(static_cast<const T*>(a.edges[edge].grad) + p * a.edges[edge].step + c, g);
}

// The sums over one chunk of pixels: for every edge of g and, for each of its terms, of g * (src - mean). A block walks
// all edges: a chunk of x and of an edge's g stays in the cache while the terms stream by, and a pool is computed for
// the first term that has it and kept, for the other edges and for its gradient.
template <class T, int V>
__global__ void __launch_bounds__(kBlock)
    sum_backward_reduce_kernel(const __grid_constant__ MixedOpArgs a, const __grid_constant__ Scratch scratch) {
  using A = compute_t<T>;
  const int c = map_channel<V>();
  const int64_t P = output_pixels(a), begin = blockIdx.x * scratch.sum_chunks.size;
  const int64_t end = begin + scratch.sum_chunks.size < P ? begin + scratch.sum_chunks.size : P;
  double* to = scratch.sums + static_cast<int64_t>(blockIdx.x) * (a.edges_count + a.terms_count) * a.C + c;
  bool max_kept = false, average_kept = false;
  for (int e = 0; e < a.edges_count; ++e)
    for (int t = a.edges[e].terms_begin - 1; t < a.edges[e].terms_end; ++t, to += a.C) {
      const bool alone = t < a.edges[e].terms_begin;  // g alone
      const Kind kind = alone ? Kind::none : a.terms[t].kind;
      A acc[V], mean[V], unused[V];
      fill(acc, A(0));
      if (c < a.C) read_norm(a, alone ? -1 : a.terms[t].norm, c, mean, unused);
      for (int64_t p = begin + threadIdx.y; p < end && c < a.C; p += blockDim.y) {
        A g[V], values[V];
        edge_gradient<T, V>(a, e, p, c, g);
        if (alone) {
#pragma unroll
          for (int v = 0; v < V; ++v) acc[v] += g[v];
          continue;
        }
        const int64_t at = p * a.C + c;
        if (kind == Kind::max_pool && max_kept) {
          max_pool_at<T, V>(a, p, c, load<uint8_t, V>(scratch.argmax + at).v, values);
        } else if (kind == Kind::max_pool) {
          Pack<uint8_t, V> tap;
          max_pool<T, V>(a, p, c, values, tap.v);
          store(scratch.argmax + at, tap);
        } else if (kind == Kind::avg_pool && average_kept) {
          read<A, V>(static_cast<const A*>(scratch.average) + at, values);
        } else {
          term_values<T, V>(a, a.terms[t], p, c, values);
          if (kind == Kind::avg_pool) write<A, V>(static_cast<A*>(scratch.average) + at, values);
        }
#pragma unroll
        for (int v = 0; v < V; ++v) acc[v] += g[v] * (values[v] - mean[v]);
      }
      max_kept |= kind == Kind::max_pool;
      average_kept |= kind == Kind::avg_pool;
      double sums[V];
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] = static_cast<double>(acc[v]);
      rows_sum(sums);
      if (threadIdx.y == 0 && c < a.C)
#pragma unroll
        for (int v = 0; v < V; ++v) to[v] = sums[v];
    }
}

// Adds partial[chunk * stride] over the chunks in order, 8 rows of 32 channels a block: in row 0.
__device__ inline double chunks_sum(const double* partial, int64_t chunks, int64_t stride, bool inside) {
  __shared__ double rows[8][32];
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
  double sum = 0;
  for (int64_t j = row; j < chunks && inside; j += 8) sum += partial[j * stride];
  rows[row][lane] = sum;
  __syncthreads();
  for (int i = 1; i < 8 && row == 0; ++i) sum += rows[i][lane];
  __syncthreads();
  return sum;
}

// One block a term: its weight's gradient and its coefficients.
template <class A>
__global__ void __launch_bounds__(kBlock)
    sum_backward_finish_kernel(const __grid_constant__ MixedOpArgs a, const __grid_constant__ Scratch scratch) {
  const int t = blockIdx.x;
  const Term& term = a.terms[t];
  A* to = coefficients<A>(a, scratch, term.kind == Kind::separable ? term.stage : ~t);
  const double weight = static_cast<double>(static_cast<const A*>(a.weights)[term.weight]);
  const int64_t stride = (a.edges_count + a.terms_count) * a.C;
  const double* of_g = scratch.sums + (a.edges[term.edge].terms_begin + term.edge) * a.C;
  const double* of_term = scratch.sums + (t + term.edge + 1) * a.C;
  double dot = 0;
  for (int64_t first = 0; first < a.C; first += 32) {
    const int64_t c = first + threadIdx.x % 32;
    const double sum = chunks_sum(of_g + c, scratch.sum_chunks.count, stride, c < a.C);
    const double product = chunks_sum(of_term + c, scratch.sum_chunks.count, stride, c < a.C);
    if (threadIdx.x >= 32 || c >= a.C) continue;
    write_coefficients(a, to, c, weight, term.norm, sum, product);
    dot +=
        term.norm < 0 ? product : product * static_cast<double>(static_cast<const A*>(a.invstd)[term.norm * a.C + c]);
  }
  dot = block_sum(dot);
  if (threadIdx.x == 0 && a.grad_weights) static_cast<A*>(a.grad_weights)[term.weight] = static_cast<A>(dot);
}

// The coefficients of the listed stages, which other stages read.
template <class A>
__global__ void __launch_bounds__(kBlock)
    stages_backward_finish_kernel(const __grid_constant__ MixedOpArgs a, const __grid_constant__ Scratch scratch,
                                  const __grid_constant__ List list) {
  const int stage = list.entry[blockIdx.y];
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  const double* partial = scratch.chain + stage * scratch.chunks.count * 2 * a.C + c;
  const double sum = chunks_sum(partial, scratch.chunks.count, 2 * a.C, c < a.C);
  const double dot = chunks_sum(partial + a.C, scratch.chunks.count, 2 * a.C, c < a.C);
  if (threadIdx.x < 32 && c < a.C)
    write_coefficients(a, coefficients<A>(a, scratch, stage), c, 1.0, a.stages[stage].norm, sum, dot);
}

// The gradients of maps that were computed outside.
template <class T, int V>
__global__ void __launch_bounds__(kBlock)
    maps_backward_kernel(const __grid_constant__ MixedOpArgs a, const __grid_constant__ Scratch scratch,
                         const __grid_constant__ List list) {
  using A = compute_t<T>;
  const int entry = list.entry[blockIdx.z], c = map_channel<V>();
  if (c >= a.C) return;
  const Term& term = a.terms[~entry];
  const Slope<A, V> slope(a, scratch, entry, c);
  for (int r = 0; r < kRows; ++r) {
    const int64_t p = (static_cast<int64_t>(blockIdx.x) * kRows + r) * blockDim.y + threadIdx.y;
    if (p >= output_pixels(a)) return;
    A g[V], src[V];
    edge_gradient<T, V>(a, term.edge, p, c, g);
    read<T, V>(static_cast<const T*>(term.src) + p * a.C + c, src);
#pragma unroll
    for (int v = 0; v < V; ++v) src[v] = slope(v, g[v], src[v]);
    write<T, V>(static_cast<T*>(term.grad) + p * a.C + c, src);
  }
}

// The gradient of a stage's output at channels c..
template <class T, int V>
struct OutputGradient {
  using A = compute_t<T>;
  const T *g, *out;
  int64_t g_step, out_step;
  Slope<A, V> slope;
  __device__ OutputGradient(const MixedOpArgs& a, const Scratch& scratch, int stage, int c)
      : slope(a, scratch, stage, c) {
    const Stage& s = a.stages[stage];
    const Edge& edge = a.edges[s.edge];
    g = static_cast<const T*>(s.grad_norm ? s.grad_norm : edge.grad) + c;
    g_step = s.grad_norm ? a.C : edge.step;
    out = static_cast<const T*>(s.out) + c;
    out_step = a.C;
  }
  __device__ void at(int64_t p, A (&values)[V]) const {
    A of_g[V];
    read<T, V>(g + p * g_step, of_g);
    read<T, V>(out + p * out_step, values);
#pragma unroll
    for (int v = 0; v < V; ++v) values[v] = slope(v, of_g[v], values[v]);
  }
};

// What stages read and their gradients flow into: x (target -1), or the normalised output of a stage.
template <class T>
struct Target {
  const T* map;
  T* grad;
  int64_t H, W, map_step, step;  // step: of grad
  __device__ Target(const MixedOpArgs& a, int target) {
    const bool is_x = target < 0;
    map = static_cast<const T*>(is_x ? a.x : a.stages[target].out);
    grad = static_cast<T*>(is_x ? a.grad_x : a.stages[target].grad_norm);
    H = is_x ? a.H : a.OH;
    W = is_x ? a.W : a.OW;
    map_step = is_x ? a.x_step : a.C;
    step = is_x ? a.grad_x_step : a.C;
  }
};

// The gradients of the listed stages' depthwise outputs: a tile of M pixels by N channels a block.
template <class T, int V, int N>
__global__ void __launch_bounds__(kBlock)
    pointwise_backward_kernel(const __grid_constant__ MixedOpArgs a, const __grid_constant__ Scratch scratch,
                              const __grid_constant__ List list) {
  using A = compute_t<T>;
  constexpr int M = Tile<A, N>::M;
  __shared__ Tile<A, N> tile;
  const int stage = list.entry[blockIdx.z];
  const Stage& s = a.stages[stage];
  const T* pointwise = static_cast<const T*>(s.pointwise);
  const int64_t P = output_pixels(a), first = static_cast<int64_t>(blockIdx.x) * M;
  const int64_t in = static_cast<int64_t>(blockIdx.y) * N;
  constexpr int kGroups = kDepth / V;
  const int k = static_cast<int>(threadIdx.x) % kGroups * V;
  A acc[4][4] = {};
  for (int64_t depth = 0; depth < a.C; depth += kDepth) {
    for (int i = threadIdx.x; i < kDepth * N; i += kBlock) {
      const int64_t o = depth + i / N, c = in + i % N;
      tile.right[i / N][i % N] = o < a.C && c < a.C ? static_cast<A>(pointwise[o * a.C + c]) : A(0);
    }
    const int c = static_cast<int>(depth) + k;
    const OutputGradient<T, V> gradient(a, scratch, stage, c < a.C ? c : 0);
    for (int m = threadIdx.x / kGroups; m < M; m += kBlock / kGroups) {
      A values[V];
      fill(values, A(0));
      if (first + m < P && c < a.C) gradient.at(first + m, values);
#pragma unroll
      for (int v = 0; v < V; ++v) tile.left[k + v][m] = values[v];
    }
    __syncthreads();
    tile.multiply(acc);
    __syncthreads();
  }
  T* to = static_cast<T*>(scratch.grad_depthwise) + stage * P * a.C;
  Tile<A, N>::template write_map<T, V>(to, [&](int i) { return first + i < P ? (first + i) * a.C : -1; }, in, a.C, acc);
}

// The gradient of each listed target's activation from all dense stages that read it: a tile of M pixels by N channels
// a block, one product a stage and tap. It is left where the target's gradient will be, for input_backward_kernel.
// With stride s only every s-th row and column of x is read through a given tap, so x is cut into s * s such grids.
template <class T, int V, int N>
__global__ void __launch_bounds__(kBlock, kFewBlocks<T>)
    dense_backward_kernel(const __grid_constant__ MixedOpArgs a, const __grid_constant__ Scratch scratch,
                          const __grid_constant__ List list) {
  using A = compute_t<T>;
  constexpr int M = Tile<A, N>::M;
  __shared__ Tile<A, N> tile;
  __shared__ Window windows[M];
  const int target = list.entry[blockIdx.z % list.count], grid = static_cast<int>(blockIdx.z) / list.count;
  const Target<T> to(a, target);
  const int stride = target < 0 ? a.stride : 1, top = grid / stride, left = grid % stride;
  const int64_t rows = ceil_div(to.H - top, stride), columns = ceil_div(to.W - left, stride);
  const int64_t pixels = a.N * rows * columns, first = static_cast<int64_t>(blockIdx.x) * M;
  if (first >= pixels) return;
  for (int m = threadIdx.x; m < M; m += kBlock) {
    const Place q = place(first + m, rows, columns);
    windows[m] = {first + m < pixels ? q.n * a.OH * a.OW : -1, q.h, q.w};
  }
  const int64_t in = static_cast<int64_t>(blockIdx.y) * N;
  constexpr int kGroups = kDepth / V;
  const int k = static_cast<int>(threadIdx.x) % kGroups * V;
  A total[4][4] = {};
  for (int stage = 0; stage < a.stages_count; ++stage) {
    const Stage& s = a.stages[stage];
    if (s.source != target || !s.dense) continue;
    const T* pointwise = static_cast<const T*>(s.pointwise);
    const int pad = (s.kernel - 1) / 2;
    A acc[4][4] = {};  // of this stage: shorter sums are closer ones
    for (int64_t depth = 0; depth < a.C; depth += kDepth) {
      const int o = static_cast<int>(depth) + k;
      const OutputGradient<T, V> gradient(a, scratch, stage, o < a.C ? o : 0);
      for (int i = (top + pad) % stride; i < s.kernel; i += stride)
        for (int j = (left + pad) % stride; j < s.kernel; j += stride) {
          for (int n = threadIdx.x; n < kDepth * N; n += kBlock) {
            const int64_t row = depth + n / N, c = in + n % N;
            tile.right[n / N][n % N] = row < a.C && c < a.C
                                           ? static_cast<A>(pointwise[((row * a.C + c) * s.kernel + i) * s.kernel + j])
                                           : A(0);
          }
          const int down = (top + pad - i) / stride, right = (left + pad - j) / stride;
          __syncthreads();
          for (int m = threadIdx.x / kGroups; m < M; m += kBlock / kGroups) {
            const Window at = windows[m];
            const int h = at.h + down, w = at.w + right;
            A values[V];
            fill(values, A(0));
            if (at.image >= 0 && o < a.C && h >= 0 && h < a.OH && w >= 0 && w < a.OW)
              gradient.at(at.image + h * a.OW + w, values);
#pragma unroll
            for (int v = 0; v < V; ++v) tile.left[k + v][m] = values[v];
          }
          __syncthreads();
          tile.multiply(acc);
          __syncthreads();
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) total[i][j] += acc[i][j];
  }
  auto where = [&](int i) -> int64_t {
    if (first + i >= pixels) return -1;
    const Place q = place(first + i, rows, columns);
    return ((q.n * to.H + q.h * stride + top) * to.W + q.w * stride + left) * to.step;
  };
  Tile<A, N>::template write_map<T, V>(to.grad, where, in, a.C, total);
}

// One chunk's part of the listed stages' pointwise weights' gradients, an N x N tile of (out, in) of one tap a block:
// the sum over pixels of (gradient of the output) x (depthwise output, computed once more, or the activated source).
// The stages are all dense or all depthwise.
template <class T, int V, int N>
__global__ void __launch_bounds__(kBlock, kFewBlocks<T>)
    pointwise_weights_kernel(const __grid_constant__ MixedOpArgs a, const __grid_constant__ Scratch scratch,
                             const __grid_constant__ List list) {
  using A = compute_t<T>;
  constexpr int kPixels = 2048 / N;                    // that are loaded at a time
  constexpr int kTeam = (N / 4) * (N / 4);             // threads that hold one copy of the tile
  constexpr int kTeams = kBlock / kTeam;               // each takes every kTeams-th pixel
  alignas(16) __shared__ A operands[2 * kPixels * N];  // left, right; at the end the teams' tiles
  __shared__ A weights[kMaxTaps * N];
  __shared__ Window windows[kPixels];
  A* left = operands;
  A* right = operands + kPixels * N;
  const int stage = list.entry[blockIdx.z], tiles = static_cast<int>(ceil_div(a.C, N));
  const Stage& s = a.stages[stage];
  const Source<T> source(a, s);
  const int out = static_cast<int>(blockIdx.y) / tiles % tiles * N, in = static_cast<int>(blockIdx.y) % tiles * N;
  const int tap = static_cast<int>(blockIdx.y) / (tiles * tiles);
  if (tap >= squares(s)) return;
  const Chunks& chunks = scratch.weight_chunks_of(s);
  const int64_t P = output_pixels(a), begin = blockIdx.x * chunks.size;
  const int64_t end = begin + chunks.size < P ? begin + chunks.size : P;

  constexpr int kGroups = N / V;
  const int k = static_cast<int>(threadIdx.x) % kGroups * V;
  const int o = out + k, i = in + k;
  const OutputGradient<T, V> gradient(a, scratch, stage, o < a.C ? o : 0);
  A mean[V], invstd[V];
  read_norm(a, i < a.C ? source.norm : -1, i, mean, invstd);
  if (!s.dense) load_taps<T>(s, a.C, in, N, weights);

  const int team = static_cast<int>(threadIdx.x) / kTeam, member = static_cast<int>(threadIdx.x) % kTeam;
  const int row = member / (N / 4) * 4, column = member % (N / 4) * 4;
  A acc[4][4] = {};
  for (int64_t first = begin; first < end; first += kPixels) {
    for (int m = threadIdx.x; m < kPixels; m += kBlock)
      windows[m] = first + m < end ? window(a, s, source, first + m) : Window{-1, 0, 0};
    __syncthreads();
    for (int m = threadIdx.x / kGroups; m < kPixels; m += kBlock / kGroups) {
      A values[V];
      fill(values, A(0));
      if (first + m < end && o < a.C) gradient.at(first + m, values);
#pragma unroll
      for (int v = 0; v < V; ++v) left[m * N + k + v] = values[v];
      if (s.dense)
        activated<T, V>(s, source, windows[m], tap, i, mean, invstd, values);
      else
        depthwise<T, V>(s, source, windows[m], i, weights + k, N, mean, invstd, values);
#pragma unroll
      for (int v = 0; v < V; ++v) right[m * N + k + v] = values[v];
    }
    __syncthreads();
    for (int m = team; m < kPixels; m += kTeams) multiply_add(left + m * N + row, right + m * N + column, acc);
    __syncthreads();
  }
#pragma unroll
  for (int y = 0; y < 4; ++y)
#pragma unroll
    for (int x = 0; x < 4; ++x) operands[team * N * N + (row + y) * N + column + x] = acc[y][x];
  __syncthreads();
  A* to = static_cast<A*>(scratch.pointwise) + stage * scratch.pointwise_size +
          (static_cast<int64_t>(blockIdx.x) * squares(s) + tap) * a.C * a.C;
  for (int j = threadIdx.x; j < N * N; j += kBlock) {
    A sum = 0;
    for (int n = 0; n < kTeams; ++n) sum += operands[n * N * N + j];
    const int64_t y = out + j / N, x = in + j % N;
    if (y < a.C && x < a.C) to[y * a.C + x] = sum;
  }
}

// One chunk's part of the depthwise weights' gradients of the listed stages, all of kernel K: a thread a channel.
template <class T, int K>
__global__ void __launch_bounds__(kBlock, kFewBlocks<T>)
    depthwise_weights_kernel(const __grid_constant__ MixedOpArgs a, const __grid_constant__ Scratch scratch,
                             const __grid_constant__ List list) {
  using A = compute_t<T>;
  const int stage = list.entry[blockIdx.z], c = map_channel<1>();
  const Stage& s = a.stages[stage];
  const Source<T> source(a, s);
  const int64_t P = output_pixels(a), begin = blockIdx.x * scratch.weight_chunks.size;
  const int64_t end = begin + scratch.weight_chunks.size < P ? begin + scratch.weight_chunks.size : P;
  const T* grad = static_cast<const T*>(scratch.grad_depthwise) + stage * P * a.C;
  A mean[1], invstd[1], acc[K * K] = {};
  read_norm(a, c < a.C ? source.norm : -1, c, mean, invstd);
  for (int64_t p = begin + threadIdx.y; p < end && c < a.C; p += blockDim.y) {
    const Window win = window(a, s, source, p);
    const A g = static_cast<A>(grad[p * a.C + c]);
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const int h = win.h + i * s.dilation;
      if (h < 0 || h >= source.H) continue;
#pragma unroll
      for (int j = 0; j < K; ++j) {
        const int w = win.w + j * s.dilation;
        if (w < 0 || w >= source.W) continue;
        const A value = static_cast<A>(source.map[(win.image + h * source.W + w) * source.step + c]);
        acc[i * K + j] += g * relu((value - mean[0]) * invstd[0]);
      }
    }
  }
  A* to = static_cast<A*>(scratch.depthwise) +
          (stage * scratch.weight_chunks.count * kMaxTaps + blockIdx.x * (K * K)) * a.C;
#pragma unroll
  for (int t = 0; t < K * K; ++t) {
    double sum[1] = {static_cast<double>(acc[t])};
    rows_sum(sum);
    if (threadIdx.y == 0 && c < a.C) to[static_cast<int64_t>(c) * (K * K) + t] = static_cast<A>(sum[0]);
  }
}

// Adds the chunks' parts of the listed stages' weights' gradients in order.
template <class T>
__global__ void __launch_bounds__(kBlock)
    weights_finish_kernel(const __grid_constant__ MixedOpArgs a, const __grid_constant__ Scratch scratch,
                          const __grid_constant__ List list) {
  using A = compute_t<T>;
  const int stage = list.entry[blockIdx.y];
  const Stage& s = a.stages[stage];
  const int64_t chunks = scratch.weight_chunks_of(s).count, square = a.C * a.C, pointwise = square * squares(s);
  int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  const bool is_pointwise = i < pointwise;
  if (!is_pointwise) i -= pointwise;
  const int64_t size = is_pointwise ? pointwise : s.dense ? 0 : a.C * taps(s);
  if (i >= size) return;
  const A* from = is_pointwise ? static_cast<const A*>(scratch.pointwise) + stage * scratch.pointwise_size
                               : static_cast<const A*>(scratch.depthwise) + stage * chunks * kMaxTaps * a.C;
  const double sum = strided_sum(from + i, chunks, size);
  if (is_pointwise) i = i % square * squares(s) + i / square;  // the taps are innermost in the weights
  static_cast<T*>(is_pointwise ? s.grad_pointwise : s.grad_depthwise)[i] = static_cast<T>(sum);
}

// Adds the gradients of x's pools and of x itself at pixel q of x.
template <class T, int V>
__device__ inline void add_terms(const MixedOpArgs& a, const Scratch& scratch, const Place& at, int64_t q, int c,
                                 const compute_t<T> (&value)[V], compute_t<T> (&sum)[V]) {
  using A = compute_t<T>;
  for (int t = 0; t < a.terms_count; ++t) {
    const Kind kind = a.terms[t].kind;
    const int edge = a.terms[t].edge;
    if (kind == Kind::separable || kind == Kind::map) continue;
    const Slope<A, V> slope(a, scratch, ~t, c);
    A g[V];
    if (kind == Kind::skip) {
      edge_gradient<T, V>(a, edge, q, c, g);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += slope(v, g[v], value[v]);
      continue;
    }
    // Every window that holds q: with tap (i, j) at q, its output is at (at + 1 - tap) / stride.
    for (int i = 0; i < 3; ++i) {
      const int y = at.h + 1 - i, h = y / a.stride;
      if (y < 0 || y % a.stride || h >= a.OH) continue;
      for (int j = 0; j < 3; ++j) {
        const int x = at.w + 1 - j, w = x / a.stride;
        if (x < 0 || x % a.stride || w >= a.OW) continue;
        const int64_t p = (at.n * a.OH + h) * a.OW + w;
        edge_gradient<T, V>(a, edge, p, c, g);
        if (kind == Kind::max_pool) {
          const Pack<uint8_t, V> tap = load<uint8_t, V>(scratch.argmax + p * a.C + c);
#pragma unroll
          for (int v = 0; v < V; ++v)
            if (tap.v[v] == i * 3 + j) sum[v] += slope(v, g[v], value[v]);
        } else {
          A average[V];
          read<A, V>(static_cast<const A*>(scratch.average) + p * a.C + c, average);
          const A share = A(1) / static_cast<A>(pool_extent(h, a.stride, a.H) * pool_extent(w, a.stride, a.W));
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += slope(v, g[v], average[v]) * share;
        }
      }
    }
  }
}

// The gradient of each listed target: x (entry -1), with all its terms and grad_add, or the normalised output of a
// stage, with its sums for the stage's batch norm. It gathers from the gradients of the depthwise outputs of the stages
// that read it; what dense stages give lies in its place. A thread keeps kRows pixels; `chunks` cuts the targets'
// pixels.
template <class T, int V>
__global__ void __launch_bounds__(kBlock, kFewBlocks<T>)
    input_backward_kernel(const __grid_constant__ MixedOpArgs a, const __grid_constant__ Scratch scratch,
                          const __grid_constant__ List list, const Chunks chunks) {
  using A = compute_t<T>;
  __shared__ A weights[kMaxTaps * 64];
  const int target = list.entry[blockIdx.z], c = map_channel<V>(), width = static_cast<int>(blockDim.x) * V;
  const bool is_x = target < 0;
  const Target<T> to(a, target);
  const int64_t pixels = a.N * to.H * to.W, P = output_pixels(a);
  const int64_t begin = blockIdx.x * chunks.size, end = begin + chunks.size < pixels ? begin + chunks.size : pixels;
  A mean[V], invstd[V];
  read_norm(a, is_x || c >= a.C ? -1 : a.stages[target].norm, c, mean, invstd);
  double sums[V] = {}, dots[V] = {};
  bool dense = false;
  for (int stage = 0; stage < a.stages_count; ++stage)
    dense |= a.stages[stage].source == target && a.stages[stage].dense;

  for (int64_t first = begin; first < end; first += static_cast<int64_t>(blockDim.y) * kRows) {
    Place at[kRows];
    A acc[kRows][V] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      at[r] = place(first + r * static_cast<int64_t>(blockDim.y) + threadIdx.y, to.H, to.W);
    for (int stage = 0; stage < a.stages_count; ++stage) {
      const Stage& s = a.stages[stage];
      if (s.source != target || s.dense) continue;
      __syncthreads();
      load_taps<T>(s, a.C, blockIdx.y * width, width, weights);
      __syncthreads();
      const T* from = static_cast<const T*>(scratch.grad_depthwise) + stage * P * a.C;
      const int pad = s.dilation * (s.kernel - 1) / 2;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (first + r * static_cast<int64_t>(blockDim.y) + threadIdx.y >= end || c >= a.C) continue;
        for (int i = 0; i < s.kernel; ++i) {
          const int y = at[r].h + pad - i * s.dilation, h = y / s.stride;
          if (y < 0 || y % s.stride || h >= a.OH) continue;
          for (int j = 0; j < s.kernel; ++j) {
            const int x = at[r].w + pad - j * s.dilation, w = x / s.stride;
            if (x < 0 || x % s.stride || w >= a.OW) continue;
            A d[V];
            read<T, V>(from + ((at[r].n * a.OH + h) * a.OW + w) * a.C + c, d);
            const A* weight = weights + (i * s.kernel + j) * width + threadIdx.x * V;
#pragma unroll
            for (int v = 0; v < V; ++v) acc[r][v] += d[v] * weight[v];
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t q = first + r * static_cast<int64_t>(blockDim.y) + threadIdx.y;
      if (q >= end || c >= a.C) continue;
      A value[V], more[V];
      fill(more, A(0));
      if (dense) read<T, V>(to.grad + q * to.step + c, more);
      read<T, V>(to.map + q * to.map_step + c, value);
#pragma unroll
      for (int v = 0; v < V; ++v) acc[r][v] += more[v];
#pragma unroll
      for (int v = 0; v < V; ++v)
        if ((value[v] - mean[v]) * invstd[v] <= A(0)) acc[r][v] = A(0);  // ReLU; NaN passes
      if (is_x) {
        add_terms<T, V>(a, scratch, at[r], q, c, value, acc[r]);
        fill(more, A(0));
        if (a.grad_add) read<T, V>(static_cast<const T*>(a.grad_add) + q * a.grad_add_step + c, more);
#pragma unroll
        for (int v = 0; v < V; ++v) acc[r][v] += more[v];
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          sums[v] += static_cast<double>(acc[r][v]);
          dots[v] += static_cast<double>(acc[r][v] * (value[v] - mean[v]));
        }
      }
      write<T, V>(to.grad + q * to.step + c, acc[r]);
    }
  }
  if (is_x) return;
  rows_sum(sums);
  rows_sum(dots);
  if (threadIdx.y > 0 || c >= a.C) return;
  double* partial = scratch.chain + (target * scratch.chunks.count + blockIdx.x) * 2 * a.C + c;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    partial[v] = sums[v];
    partial[a.C + v] = dots[v];
  }
}

// Launches the parts of the backward, each of which knows how many bytes it must move.
template <class T, int V>
struct Backward {
  using A = compute_t<T>;
  const MixedOpArgs& a;
  Stream stream;
  Scratch scratch = make_scratch<T>(a, true);
  int64_t P = output_pixels(a);

  int64_t sums_bytes(const Chunks& chunks, int64_t rows) const {
    return rows * chunks.count * a.C * static_cast<int64_t>(sizeof(double));
  }
  // Bytes of the pools' maps that are kept.
  int64_t kept_bytes() const {
    return P * a.C * (has(a, Kind::max_pool) + static_cast<int64_t>(sizeof(A)) * has(a, Kind::avg_pool));
  }
  bool contains(const List& list, int stage) const {
    return std::find(list.entry, list.entry + list.count, stage) != list.entry + list.count;
  }
  // Maps that the listed stages' gradients are read from: an output a stage, and a grad_norm a stage or an edge's g.
  int64_t gradient_maps(const List& list) const {
    int64_t maps = list.count;
    bool read[kMaxEdges] = {};
    for (int i = 0; i < list.count; ++i) {
      const Stage& s = a.stages[list.entry[i]];
      maps += s.grad_norm || !read[s.edge];
      if (!s.grad_norm) read[s.edge] = true;
    }
    return maps;
  }

  void sums() const {
    int64_t maps = a.edges_count;
    bool reads_x = false;
    for (int t = 0; t < a.terms_count; ++t) {
      const Kind kind = a.terms[t].kind;
      if (kind == Kind::separable || kind == Kind::map)
        ++maps;
      else
        reads_x = true;
    }
    const int64_t sums = sums_bytes(scratch.sum_chunks, a.edges_count + a.terms_count);
    launch("mixed_op_sum_backward_reduce", map_bytes<T>(a, reads_x, maps) + kept_bytes() + sums,
           sum_backward_reduce_kernel<T, V>, dim3(scratch.sum_chunks.count, map_columns<V>(a.C)), map_block<V>(a.C),
           stream, a, scratch);
    launch("mixed_op_sum_backward_finish", sums + 3 * a.terms_count * a.C * static_cast<int64_t>(sizeof(A)),
           sum_backward_finish_kernel<A>, dim3(a.terms_count), dim3(kBlock), stream, a, scratch);
  }

  void maps(const List& list) const {
    bool read[kMaxEdges] = {};
    int64_t grads = 0;
    for (int i = 0; i < list.count; ++i) {
      bool& edge = read[a.terms[~list.entry[i]].edge];
      grads += !edge;
      edge = true;
    }
    const dim3 block = map_block<V>(a.C);
    launch("mixed_op_maps_backward", map_bytes<T>(a, 0, grads + 2 * list.count), maps_backward_kernel<T, V>,
           dim3(ceil_div(P, int64_t{block.y} * kRows), map_columns<V>(a.C), list.count), block, stream, a, scratch,
           list);
  }

  void pointwise(const List& list) const {
    int64_t bytes = map_bytes<T>(a, 0, gradient_maps(list) + list.count);
    bytes += list.count * a.C * a.C * static_cast<int64_t>(sizeof(T));
    const int n = product_width(a.C, V, 64);
    auto* kernel = pointwise_backward_kernel<T, V, 32>;
    if constexpr (V > 1)
      kernel = n == 16 ? pointwise_backward_kernel<T, V, 16> : n == 64 ? pointwise_backward_kernel<T, V, 64> : kernel;
    launch("mixed_op_stages_backward_pointwise", bytes, kernel,
           dim3(ceil_div(P, kProduct / n), ceil_div(a.C, n), list.count), dim3(kBlock), stream, a, scratch, list);
  }

  // Into the targets, from the dense stages that read them.
  void dense(const List& targets, const List& stages) const {
    const bool is_x = targets.entry[0] < 0;
    int64_t bytes = map_bytes<T>(a, is_x, gradient_maps(stages) + (is_x ? 0 : targets.count));
    for (int i = 0; i < stages.count; ++i) bytes += weights_bytes<T>(a, a.stages[stages.entry[i]]);
    const int n = product_width(a.C, V, 64), grids = is_x ? a.stride * a.stride : 1;
    auto* kernel = dense_backward_kernel<T, V, 32>;
    if constexpr (V > 1)
      kernel = n == 16 ? dense_backward_kernel<T, V, 16> : n == 64 ? dense_backward_kernel<T, V, 64> : kernel;
    launch("mixed_op_stages_backward_dense", bytes, kernel,
           dim3(ceil_div(P, kProduct / n), ceil_div(a.C, n), targets.count * grids), dim3(kBlock), stream, a, scratch,
           targets);
  }

  // Into the stages that come just before: their grad_norm, and their coefficients.
  void sources(const List& list) const {
    int64_t bytes = map_bytes<T>(a, 0, 2 * list.count) + sums_bytes(scratch.chunks, 2 * list.count);
    for (int s = 0; s < a.stages_count; ++s)
      if (a.stages[s].source >= 0 && contains(list, a.stages[s].source)) bytes += map_bytes<T>(a, 0, 1);
    launch("mixed_op_stages_backward_input", bytes, input_backward_kernel<T, V>,
           dim3(scratch.chunks.count, map_columns<V>(a.C), list.count), map_block<V>(a.C), stream, a, scratch, list,
           scratch.chunks);
    launch("mixed_op_stages_backward_finish",
           sums_bytes(scratch.chunks, 2 * list.count) + 3 * list.count * a.C * static_cast<int64_t>(sizeof(A)),
           stages_backward_finish_kernel<A>, dim3(ceil_div(a.C, 32), list.count), dim3(kBlock), stream, a, scratch,
           list);
  }

  void x() const {
    List list;
    list.add(-1);
    int64_t stages = 0;
    bool dense = false, edges[kMaxEdges] = {};
    for (int s = 0; s < a.stages_count; ++s)
      if (a.stages[s].source < 0) (a.stages[s].dense ? dense = true : ++stages);
    for (int t = 0; t < a.terms_count; ++t)
      if (a.terms[t].kind == Kind::skip || is_pool(a.terms[t].kind)) edges[a.terms[t].edge] = true;
    const int64_t grads = std::count(edges, edges + kMaxEdges, true);
    const Chunks chunks = chunks_of(a.N * a.H * a.W, 128, int64_t{1} << 20);
    launch("mixed_op_sum_backward_x",
           map_bytes<T>(a, 2 + dense + (a.grad_add != nullptr), stages + grads) + kept_bytes(),
           input_backward_kernel<T, V>, dim3(chunks.count, map_columns<V>(a.C)), map_block<V>(a.C), stream, a, scratch,
           list, chunks);
  }

  void pointwise_weights(const List& list) const {
    if (!list.count) return;
    const int64_t chunks = scratch.weight_chunks_of(a.stages[list.entry[0]]).count;
    int64_t bytes = map_bytes<T>(a, 0, gradient_maps(list)) + source_bytes<T>(a, list);
    int most = 1;
    for (int i = 0; i < list.count; ++i) {
      const Stage& s = a.stages[list.entry[i]];
      most = std::max(most, squares(s));
      bytes += chunks * squares(s) * a.C * a.C * static_cast<int64_t>(sizeof(A));
      if (!s.dense) bytes += a.C * taps(s) * static_cast<int64_t>(sizeof(T));
    }
    const int n = product_width(a.C, V, kMaxWeightTile<T>);
    const auto tiles = static_cast<unsigned>(ceil_div(a.C, n));
    auto* kernel = pointwise_weights_kernel<T, V, 32>;
    if constexpr (V > 1)
      if (n == 16) kernel = pointwise_weights_kernel<T, V, 16>;
    if constexpr (V > 1 && kMaxWeightTile<T> == 64)
      if (n == 64) kernel = pointwise_weights_kernel<T, V, 64>;
    launch("mixed_op_stages_backward_pointwise_weights", bytes, kernel, dim3(chunks, tiles * tiles * most, list.count),
           dim3(kBlock), stream, a, scratch, list);
  }

  template <int K>
  void depthwise_weights(const List& list) const {
    if (!list.count) return;
    const int64_t parts = list.count * scratch.weight_chunks.count * a.C * K * K * static_cast<int64_t>(sizeof(A));
    launch("mixed_op_stages_backward_depthwise_weights",
           map_bytes<T>(a, 0, list.count) + source_bytes<T>(a, list) + parts, depthwise_weights_kernel<T, K>,
           dim3(scratch.weight_chunks.count, map_columns<1>(a.C), list.count), map_block<1>(a.C), stream, a, scratch,
           list);
  }

  void weights(const List& list) const {
    List dense, depthwise, by_kernel[3];  // 3, 5, 7
    int64_t bytes = 0, largest = 0;
    for (int i = 0; i < list.count; ++i) {
      const Stage& s = a.stages[list.entry[i]];
      (s.dense ? dense : depthwise).add(list.entry[i]);
      if (!s.dense) by_kernel[s.kernel / 2 - 1].add(list.entry[i]);
      const int64_t size = weights_bytes<T>(a, s) / static_cast<int64_t>(sizeof(T));
      largest = std::max(largest, size);
      bytes += size *
               (scratch.weight_chunks_of(s).count * static_cast<int64_t>(sizeof(A)) + static_cast<int64_t>(sizeof(T)));
    }
    pointwise_weights(depthwise);
    pointwise_weights(dense);
    depthwise_weights<3>(by_kernel[0]);
    depthwise_weights<5>(by_kernel[1]);
    depthwise_weights<7>(by_kernel[2]);
    launch("mixed_op_stages_backward_weights_finish", bytes, weights_finish_kernel<T>,
           dim3(ceil_div(largest, kBlock), list.count), dim3(kBlock), stream, a, scratch, list);
  }

  void run() const {
    if (a.terms_count) sums();
    List with_grad;
    for (int t = 0; t < a.terms_count; ++t)
      if (a.terms[t].grad) with_grad.add(~t);
    if (with_grad.count) maps(with_grad);
    List with_weights;
    for (int s = 0; s < a.stages_count; ++s)
      if (a.stages[s].grad_pointwise) with_weights.add(s);
    if (!with_weights.count && !a.grad_x) return;
    int deepest = 0;
    for (int s = 0; s < a.stages_count; ++s) deepest = std::max(deepest, level(a, s));
    for (int now = deepest; now >= 0; --now) {
      List depthwise_stages, dense_stages, before, before_dense;
      for (int s = 0; s < a.stages_count; ++s) {
        if (level(a, s) == now) (a.stages[s].dense ? dense_stages : depthwise_stages).add(s);
        if (level(a, s) == now - 1 && a.stages[s].grad_norm) before.add(s);
      }
      for (int i = 0; i < dense_stages.count; ++i) {
        const int source = a.stages[dense_stages.entry[i]].source;
        if (!contains(before_dense, source) && (source >= 0 || a.grad_x)) before_dense.add(source);
      }
      if (depthwise_stages.count) pointwise(depthwise_stages);
      if (before_dense.count) dense(before_dense, dense_stages);
      if (before.count) sources(before);
    }
    if (a.grad_x) x();
    if (with_weights.count) weights(with_weights);
  }
};
}  // namespace

template <class T>
void mixed_op_backward(const MixedOpArgs& args, Stream stream) {
  by_four<T>(args) ? Backward<T, 4>{args, stream}.run() : Backward<T, 1>{args, stream}.run();
}

#define FASTNAS_INSTANTIATE(T) template void mixed_op_backward<T>(const MixedOpArgs&, Stream);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
FASTNAS_INSTANTIATE(Half)
FASTNAS_INSTANTIATE(BFloat16)
}  // namespace fastnas::cuda
