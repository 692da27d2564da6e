#include "cuda/mixed_op.cuh"

namespace fastnas::cuda {
namespace {
// out = pointwise(depthwise(relu(source))) of the listed stages, or their dense convolution, one product a tap: a tile
// of M pixels by N output channels a block. The two are kernels of their own, so that each stays in registers.
template <class T, int V, int N, bool Dense>
__global__ void __launch_bounds__(kBlock, kFewBlocks<T> + !Dense)
    stages_kernel(const __grid_constant__ MixedOpArgs a, const __grid_constant__ List list) {
  using A = compute_t<T>;
  constexpr int M = Tile<A, N>::M;
  __shared__ Tile<A, N> tile;
  __shared__ A weights[kMaxTaps * kDepth];
  __shared__ Window windows[M];
  const Stage& s = a.stages[list.entry[blockIdx.z]];
  const Source<T> source(a, s);
  const T* pointwise = static_cast<const T*>(s.pointwise);
  const int64_t P = output_pixels(a), first = static_cast<int64_t>(blockIdx.x) * M;
  const int64_t out = static_cast<int64_t>(blockIdx.y) * N;
  for (int m = threadIdx.x; m < M; m += kBlock) windows[m] = window(a, s, source, first + m);

  constexpr int kGroups = kDepth / V;  // threads along the channels of a pixel
  const int k = static_cast<int>(threadIdx.x) % kGroups * V;
  const int products = Dense ? taps(s) : 1;
  A acc[4][4] = {};
  for (int64_t depth = 0; depth < a.C; depth += kDepth) {
    if constexpr (!Dense) load_taps<T>(s, a.C, depth, kDepth, weights);
    const int c = static_cast<int>(depth) + k;
    A mean[V], invstd[V];
    read_norm(a, c < a.C ? source.norm : -1, c, mean, invstd);
    for (int tap = 0; tap < products; ++tap) {
      for (int i = threadIdx.x; i < kDepth * N; i += kBlock) {
        const int64_t in = depth + i % kDepth, o = out + i / kDepth;
        tile.right[i % kDepth][i / kDepth] =
            in < a.C && o < a.C ? static_cast<A>(pointwise[(o * a.C + in) * products + tap]) : A(0);
      }
      __syncthreads();
      for (int m = threadIdx.x / kGroups; m < M; m += kBlock / kGroups) {
        A values[V];
        if constexpr (Dense)
          activated<T, V>(s, source, windows[m], tap, c, mean, invstd, values);
        else
          depthwise<T, V>(s, source, windows[m], c, weights + k, kDepth, mean, invstd, values);
#pragma unroll
        for (int v = 0; v < V; ++v) tile.left[k + v][m] = values[v];
      }
      __syncthreads();
      tile.multiply(acc);
      __syncthreads();
    }
  }
  Tile<A, N>::template write_map<T, V>(
      static_cast<T*>(s.out), [&](int i) { return first + i < P ? (first + i) * a.C : -1; }, out, a.C, acc);
}

// Mean and sum of squared deviations of n values.
struct Moments {
  double n, mean, deviation;
  // Chan's update: what the two sets have together.
  __device__ Moments operator+(const Moments& other) const {
    if (other.n == 0) return *this;
    if (n == 0) return other;
    const double total = n + other.n, delta = other.mean - mean;
    return {total, mean + delta * (other.n / total),
            deviation + other.deviation + delta * delta * (n * other.n / total)};
  }
};

// The moments of one chunk of pixels of each listed stage's output or term. A thread takes four pixels at a time
// relative to its first one, so that neither a large mean nor a constant channel costs precision.
template <class T, int V>
__global__ void __launch_bounds__(kBlock, kFewBlocks<T>)
    moments_kernel(const __grid_constant__ MixedOpArgs a, const __grid_constant__ Scratch scratch,
                   const __grid_constant__ List list) {
  using A = compute_t<T>;
  __shared__ double means[kBlock * V], deviations[kBlock * V];
  const int entry = list.entry[blockIdx.z], c = map_channel<V>();
  Term term;
  if (entry < 0) {
    term = a.terms[~entry];
  } else {
    term.kind = Kind::separable;
    term.stage = entry;
    term.norm = a.stages[entry].norm;
  }
  const int64_t P = output_pixels(a), begin = blockIdx.x * scratch.chunks.size;
  const int64_t end = begin + scratch.chunks.size < P ? begin + scratch.chunks.size : P;
  const int64_t step = blockDim.y;
  A pivot[V], mean[V], deviation[V];
  fill(mean, A(0));
  fill(deviation, A(0));
  int count = 0;
  for (int64_t p = begin + threadIdx.y; p < end && c < a.C; p += 4 * step) {
    A values[4][V];
    int n = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (p + i * step < end) term_values<T, V>(a, term, p + i * step, c, values[i]), ++n;
    const A part = A(1) / static_cast<A>(n), share = static_cast<A>(n) / static_cast<A>(count + n);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (count == 0) pivot[v] = values[0][v];
      A sum = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < n) sum += values[i][v] - pivot[v];
      const A own = sum * part, delta = own - mean[v];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const A d = values[i][v] - pivot[v] - own;
        if (i < n) squares += d * d;
      }
      mean[v] += delta * share;
      deviation[v] += squares + delta * delta * share * static_cast<A>(count);
    }
    count += n;
  }

  // The rows of threads, by a tree; a row's number of pixels follows from its index.
  const int mine = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x) * V;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    means[mine + v] = count ? static_cast<double>(pivot[v]) + static_cast<double>(mean[v]) : 0.0;
    deviations[mine + v] = static_cast<double>(deviation[v]);
  }
  auto pixels = [&](int row, int rows) {  // of the rows row, row + rows, ...
    return static_cast<double>(end - begin > row ? (end - begin - row - 1) / rows + 1 : 0);
  };
  for (int rows = blockDim.y / 2; rows > 0; rows /= 2) {
    __syncthreads();
    const int row = threadIdx.y, other = mine + rows * static_cast<int>(blockDim.x) * V;
    if (row < rows)
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const Moments sum = Moments{pixels(row, 2 * rows), means[mine + v], deviations[mine + v]} +
                            Moments{pixels(row + rows, 2 * rows), means[other + v], deviations[other + v]};
        means[mine + v] = sum.mean;
        deviations[mine + v] = sum.deviation;
      }
  }
  if (threadIdx.y > 0 || c >= a.C) return;
  double* to = scratch.moments + (term.norm * scratch.chunks.count + blockIdx.x) * 2 * a.C + c;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    to[v] = means[mine + v];
    to[a.C + v] = deviations[mine + v];
  }
}

// Combines the chunks in order: 8 rows of threads take every 8th chunk each, then row 0 combines the rows. What a pool
// gave is the same on every edge, and so are its moments; only eps may differ.
template <class A>
__global__ void __launch_bounds__(kBlock)
    moments_finish_kernel(const __grid_constant__ MixedOpArgs a, const __grid_constant__ Scratch scratch,
                          const __grid_constant__ List list) {
  __shared__ Moments rows[8][32];
  const int entry = list.entry[blockIdx.y], norm = entry < 0 ? a.terms[~entry].norm : a.stages[entry].norm;
  const int64_t P = output_pixels(a), c = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  Moments sum = {0, 0, 0};
  for (int64_t j = threadIdx.y; j < scratch.chunks.count && c < a.C; j += 8) {
    const double* from = scratch.moments + (norm * scratch.chunks.count + j) * 2 * a.C + c;
    const int64_t rest = P - j * scratch.chunks.size;
    sum =
        sum + Moments{static_cast<double>(rest < scratch.chunks.size ? rest : scratch.chunks.size), from[0], from[a.C]};
  }
  rows[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || c >= a.C) return;
  for (int row = 1; row < 8; ++row) sum = sum + rows[row][threadIdx.x];
  const double variance = sum.deviation / static_cast<double>(P);
  auto put = [&](int row) {
    const int64_t at = row * a.C + c;
    static_cast<A*>(a.mean)[at] = static_cast<A>(sum.mean);
    static_cast<A*>(a.invstd)[at] = static_cast<A>(1 / sqrt(variance + a.eps[row]));
    static_cast<A*>(a.variance)[at] = static_cast<A>(sum.deviation / static_cast<double>(P - 1));
  };
  put(norm);
  if (entry >= 0 || !is_pool(a.terms[~entry].kind)) return;
  for (int t = ~entry + 1; t < a.terms_count; ++t)
    if (a.terms[t].kind == a.terms[~entry].kind && a.terms[t].norm >= 0) put(a.terms[t].norm);
}

// Which of x and its pools the terms add.
struct Shared {
  bool x, max_pool, avg_pool;
};

// Every edge's y = sum over its terms of (value - mean) * (weight * invstd); kRows pixels a thread. A thread walks all
// edges rather than one: x and its pools, which each of them adds, are read and computed once, and E edges of DARTS
// read 4 E + 1 maps instead of 5 E.
template <class T, int V>
__global__ void __launch_bounds__(kBlock) sum_kernel(const __grid_constant__ MixedOpArgs a, const Shared shared) {
  using A = compute_t<T>;
  const int c = map_channel<V>();
  if (c >= a.C) return;
  const int64_t P = output_pixels(a), first = static_cast<int64_t>(blockIdx.x) * blockDim.y * kRows + threadIdx.y;
  A x[kRows][V], largest[kRows][V], average[kRows][V];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t p = first + r * static_cast<int64_t>(blockDim.y);
    if (p >= P) break;
    uint8_t tap[V];
    if (shared.x) read<T, V>(static_cast<const T*>(a.x) + p * a.x_step + c, x[r]);
    if (shared.max_pool) max_pool<T, V>(a, p, c, largest[r], tap);
    if (shared.avg_pool) avg_pool<T, V>(a, p, c, average[r]);
  }
  for (int e = 0; e < a.edges_count; ++e) {
    const Edge& edge = a.edges[e];
    T* y = static_cast<T*>(edge.y) + c;
    A sum[kRows][V] = {};
    for (int t = edge.terms_begin; t < edge.terms_end; ++t) {
      const Term& term = a.terms[t];
      const A weight = static_cast<const A*>(a.weights)[term.weight];
      A mean[V], scale[V];
      read_norm(a, term.norm, c, mean, scale);
#pragma unroll
      for (int v = 0; v < V; ++v) scale[v] *= weight;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t p = first + r * static_cast<int64_t>(blockDim.y);
        if (p >= P) break;
        A values[V];
        if (term.kind == Kind::separable || term.kind == Kind::map) term_values<T, V>(a, term, p, c, values);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A value = term.kind == Kind::skip       ? x[r][v]
                          : term.kind == Kind::max_pool ? largest[r][v]
                          : term.kind == Kind::avg_pool ? average[r][v]
                                                        : values[v];
          sum[r][v] += (value - mean[v]) * scale[v];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t p = first + r * static_cast<int64_t>(blockDim.y);
      if (p >= P) break;
      A before[V];
      fill(before, A(0));
      if (edge.add) read<T, V>(y + p * edge.step, before);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[r][v] += before[v];
      write<T, V>(y + p * edge.step, sum[r]);
    }
  }
}

template <class T, int V, bool Dense>
void forward_stages(const MixedOpArgs& a, const List& list, Stream stream) {
  using A = compute_t<T>;
  if (!list.count) return;
  const int n = product_width(a.C, V, 64);
  auto* kernel = stages_kernel<T, V, 32, Dense>;
  if constexpr (V > 1)
    kernel = n == 16 ? stages_kernel<T, V, 16, Dense> : n == 64 ? stages_kernel<T, V, 64, Dense> : kernel;
  int64_t bytes = source_bytes<T>(a, list) + map_bytes<T>(a, 0, list.count);
  for (int i = 0; i < list.count; ++i) bytes += weights_bytes<T>(a, a.stages[list.entry[i]]);
  launch("mixed_op_stages", bytes, kernel, dim3(ceil_div(output_pixels(a), kProduct / n), ceil_div(a.C, n), list.count),
         dim3(kBlock), stream, a, list);
  static_assert(sizeof(Tile<A, 16>) + kMaxTaps * kDepth * sizeof(A) + 256 * sizeof(Window) <= 48 << 10);
}

template <class T, int V>
void forward(const MixedOpArgs& a, Stream stream) {
  using A = compute_t<T>;
  const Scratch scratch = make_scratch<T>(a, false);
  const int64_t partial = scratch.chunks.count * 2 * a.C * static_cast<int64_t>(sizeof(double));
  for (int now = 0, left = a.stages_count; now == 0 || left > 0; ++now) {
    List depthwise, dense, norms;
    for (int s = 0; s < a.stages_count; ++s)
      if (level(a, s) == now) (a.stages[s].dense ? dense : depthwise).add(s), norms.add(s);
    left -= norms.count;
    forward_stages<T, V, false>(a, depthwise, stream);
    forward_stages<T, V, true>(a, dense, stream);
    int64_t reads_x = 0, maps = norms.count, rows = norms.count;
    for (int t = 0; now == 0 && t < a.terms_count; ++t) {
      const Kind kind = a.terms[t].kind;
      if (a.terms[t].norm < 0 || kind == Kind::separable) continue;
      ++rows;
      if (leader(a, t) != t) continue;
      norms.add(~t);
      maps += kind == Kind::map;
      reads_x |= kind != Kind::map;
    }
    if (!a.training || !norms.count) continue;
    launch("mixed_op_moments", map_bytes<T>(a, reads_x, maps) + norms.count * partial, moments_kernel<T, V>,
           dim3(scratch.chunks.count, map_columns<V>(a.C), norms.count), map_block<V>(a.C), stream, a, scratch, norms);
    launch("mixed_op_moments_finish", norms.count * partial + rows * 3 * a.C * static_cast<int64_t>(sizeof(A)),
           moments_finish_kernel<A>, dim3(ceil_div(a.C, 32), norms.count), dim3(32, 8), stream, a, scratch, norms);
  }
  const Shared shared = {has(a, Kind::skip), has(a, Kind::max_pool), has(a, Kind::avg_pool)};
  int64_t maps = 0;
  for (int e = 0; e < a.edges_count; ++e) maps += 1 + a.edges[e].add;
  for (int t = 0; t < a.terms_count; ++t) maps += a.terms[t].kind == Kind::separable || a.terms[t].kind == Kind::map;
  const dim3 block = map_block<V>(a.C);
  launch("mixed_op_sum", map_bytes<T>(a, shared.x || shared.max_pool || shared.avg_pool, maps), sum_kernel<T, V>,
         dim3(ceil_div(output_pixels(a), int64_t{block.y} * kRows), map_columns<V>(a.C)), block, stream, a, shared);
}
}  // namespace

template <class T>
int64_t mixed_op_workspace(const MixedOpArgs& args, bool backward) {
  return make_scratch<T>(args, backward).bytes;
}

template <class T>
void mixed_op(const MixedOpArgs& args, Stream stream) {
  by_four<T>(args) ? forward<T, 4>(args, stream) : forward<T, 1>(args, stream);
}

#define FASTNAS_INSTANTIATE(T)                                      \
  template int64_t mixed_op_workspace<T>(const MixedOpArgs&, bool); \
  template void mixed_op<T>(const MixedOpArgs&, Stream);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
FASTNAS_INSTANTIATE(Half)
FASTNAS_INSTANTIATE(BFloat16)
}  // namespace fastnas::cuda
