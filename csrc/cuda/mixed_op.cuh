// What the forward and the backward kernels of mixed_op share.
//
// Two shapes of kernel. Map kernels walk pixels with rows of threads along the channels, V channels a thread (4 where
// C and the addresses allow it, else 1); their reductions cut the pixels into chunks by shape alone and combine them in
// order. Product kernels are matrix products over tiles in shared memory, 4 x 4 results a thread, one of whose operands
// (a depthwise output, a tap of the activated source, or the gradient before a batch norm) is computed while it is
// loaded and never written. One launch serves all edges of the fan.
#pragma once
#include <algorithm>
#include <cmath>

#include "cuda/launch.cuh"
#include "mixed_op.h"

namespace fastnas::cuda {
constexpr int kBlock = 256;  // threads of every block
// Blocks of a processor that a kernel with many values a thread asks for, so that they stay in registers.
template <class T>
constexpr int kFewBlocks = sizeof(T) == 8 ? 1 : 2;
constexpr int kRows = 2;        // pixels that a thread of a map kernel keeps in registers
constexpr int kDepth = 16;      // channels of a product's tile that are loaded at a time
constexpr int kProduct = 4096;  // results of a product's tile: pixels x channels
constexpr int kMaxTaps = 49;    // of a depthwise kernel
constexpr int64_t kMaxChunks = 1024;
constexpr int64_t kMaxSumChunks = 512;  // of sums that one block a term adds up

// Some of the stages, or of the terms (as ~term), that a launch is about.
struct List {
  int count = 0;
  short entry[kMaxStages + kMaxTerms] = {};
  void add(int value) { entry[count++] = static_cast<short>(value); }
};

// Kernels take the arguments by value. More than 4 KB of parameters, up to 32,764 bytes, need CUDA 12.1 and sm_70.
static_assert(sizeof(MixedOpArgs) + sizeof(List) + 512 <= 32764, "the arguments do not fit a kernel's parameters");

// How the pixels of a map are cut for reductions.
struct Chunks {
  int64_t size = 0, count = 0;
};
inline Chunks chunks_of(int64_t pixels, int64_t least, int64_t most) {
  const int64_t size = least * ceil_div(pixels, least * most);
  return {size, ceil_div(pixels, size)};
}

// Where things lie in the workspace. A = compute_t<T>, P = N * OH * OW.
struct Scratch {
  Chunks chunks;                   // of the P output pixels
  Chunks sum_chunks;               // of the same, for the sums over g: one block takes a chunk of all edges
  Chunks weight_chunks;            // of the same, for the weights' gradients
  Chunks dense_chunks;             // of the same, for dense weights, where the taps are a device's work too
  double* moments = nullptr;       // [norm][chunk][2][C]: mean, sum of squared deviations                    forward
  double* sums = nullptr;          // [sum chunk][edges + terms][C]: of g, then of g * (src - mean), edge by edge
  double* chain = nullptr;         // [stage][chunk][2][C]: of dn, and of dn * (z - mean), dn = grad_norm
  void* coefficients = nullptr;    // A [stages + terms][3][C]: d/d(src) = k0 * g + k1 * (src - mean) + k2
  uint8_t* argmax = nullptr;       // [P][C]: the tap that a max pool took
  void* average = nullptr;         // A [P][C]: what an average pool gave
  void* grad_depthwise = nullptr;  // T [stage][P][C]: the gradients of the depthwise outputs
  void* pointwise = nullptr;       // A [stage], each: [weight chunk][tap of a dense stage][C][C]
  int64_t pointwise_size = 0;      // elements a stage
  void* depthwise = nullptr;       // A [stage], each: [weight chunk][C][taps], and room for kMaxTaps
  int64_t bytes = 0;

  __host__ __device__ const Chunks& weight_chunks_of(const Stage& s) const {
    return s.dense ? dense_chunks : weight_chunks;
  }
};

inline bool has(const MixedOpArgs& a, Kind kind) {
  for (int t = 0; t < a.terms_count; ++t)
    if (a.terms[t].kind == kind) return true;
  return false;
}

// How many stages come before this one.
inline int level(const MixedOpArgs& a, int stage) {
  int n = 0;
  for (int s = a.stages[stage].source; s >= 0; s = a.stages[s].source) ++n;
  return n;
}

__host__ __device__ inline int taps(const Stage& s) { return s.kernel * s.kernel; }
// (C, C) matrices of its pointwise weights.
__host__ __device__ inline int squares(const Stage& s) { return s.dense ? taps(s) : 1; }
__host__ __device__ inline bool is_pool(Kind kind) { return kind == Kind::max_pool || kind == Kind::avg_pool; }
__host__ __device__ inline int64_t output_pixels(const MixedOpArgs& a) { return a.N * a.OH * a.OW; }

// Channels of a product's tile: as wide as C where that is small; one width where channels are read one at a time.
inline int product_width(int64_t C, int vector, int most) {
  return vector == 1 ? 32 : C <= 16 ? 16 : C <= 32 || most == 32 ? 32 : 64;
}
// The weights' gradients hold a whole depthwise kernel in shared memory beside their operands.
template <class T>
constexpr int kMaxWeightTile = sizeof(compute_t<T>) == 8 ? 32 : 64;

// True where every map can be read four channels at a time.
template <class T>
bool by_four(const MixedOpArgs& a) {
  auto map = [](const void* p, int64_t step) {
    return step % 4 == 0 && reinterpret_cast<uintptr_t>(p) % alignof(Pack<T, 4>) == 0;
  };
  bool yes = map(a.x, a.x_step) && map(a.grad_x, a.grad_x_step) && map(a.grad_add, a.grad_add_step) &&
             aligned(a.mean) && aligned(a.invstd) && aligned(a.workspace);
  for (int e = 0; e < a.edges_count; ++e) yes &= map(a.edges[e].y, a.edges[e].step) && map(a.edges[e].grad, 0);
  for (int s = 0; s < a.stages_count; ++s) yes &= map(a.stages[s].out, a.C) && map(a.stages[s].grad_norm, a.C);
  for (int t = 0; t < a.terms_count; ++t) yes &= map(a.terms[t].src, a.C) && map(a.terms[t].grad, a.C);
  return yes && a.C % 4 == 0;
}

template <class T>
Scratch make_scratch(const MixedOpArgs& a, bool backward) {
  using A = compute_t<T>;
  Scratch s;
  auto take = [&](auto*& pointer, int64_t bytes) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(static_cast<char*>(a.workspace) + s.bytes);
    s.bytes += ceil_div(bytes, 256) * 256;
  };
  const int64_t P = output_pixels(a);
  s.chunks = chunks_of(P, 128, kMaxChunks);
  s.sum_chunks = chunks_of(P, 32, kMaxSumChunks);
  const int64_t tiles = ceil_div(a.C, 64);  // (C, C) in tiles fills a device by itself where C is large
  s.weight_chunks = chunks_of(P, 128, std::max<int64_t>(1, 128 / (tiles * tiles)));
  s.dense_chunks = chunks_of(P, 128, std::max<int64_t>(1, 128 / (9 * tiles * tiles)));
  if (!backward) {
    take(s.moments, a.norms * s.chunks.count * 2 * a.C * sizeof(double));
    return s;
  }
  int64_t depthwise = 0;  // room for stages up to the last depthwise one
  for (int k = 0; k < a.stages_count; ++k) {
    if (!a.stages[k].dense) depthwise = k + 1;
    s.pointwise_size =
        std::max(s.pointwise_size, s.weight_chunks_of(a.stages[k]).count * squares(a.stages[k]) * a.C * a.C);
  }
  take(s.sums, s.sum_chunks.count * (a.edges_count + a.terms_count) * a.C * sizeof(double));
  take(s.chain, a.stages_count * s.chunks.count * 2 * a.C * sizeof(double));
  take(s.coefficients, int64_t{a.stages_count + a.terms_count} * 3 * a.C * sizeof(A));
  if (has(a, Kind::max_pool)) take(s.argmax, P * a.C);
  if (has(a, Kind::avg_pool)) take(s.average, P * a.C * sizeof(A));
  take(s.grad_depthwise, depthwise * P * a.C * sizeof(T));
  take(s.pointwise, a.stages_count * s.pointwise_size * sizeof(A));
  take(s.depthwise, depthwise * s.weight_chunks.count * a.C * kMaxTaps * sizeof(A));
  return s;
}

// Bytes of `in` maps of x's size and `out` maps of y's.
template <class T>
int64_t map_bytes(const MixedOpArgs& a, int64_t in, int64_t out) {
  return static_cast<int64_t>(sizeof(T)) * a.C * (in * a.N * a.H * a.W + out * output_pixels(a));
}

// Bytes of the maps that the listed stages read; x once.
template <class T>
int64_t source_bytes(const MixedOpArgs& a, const List& stages) {
  int64_t reads_x = 0, maps = 0;
  for (int i = 0; i < stages.count; ++i)
    if (a.stages[stages.entry[i]].source < 0)
      reads_x = 1;
    else
      ++maps;
  return map_bytes<T>(a, reads_x, maps);
}
// Bytes of a stage's weights.
template <class T>
int64_t weights_bytes(const MixedOpArgs& a, const Stage& s) {
  return static_cast<int64_t>(sizeof(T)) * a.C * (s.dense ? a.C * taps(s) : a.C + taps(s));
}

// The block of a map kernel: rows of threads along the channels, at most 64 channels wide.
template <int V>
dim3 map_block(int64_t C) {
  unsigned x = 1;
  while (x * V < C && x * V < 64) x *= 2;
  return dim3(x, kBlock / x);
}
template <int V>
unsigned map_columns(int64_t C) {
  return static_cast<unsigned>(ceil_div(C, int64_t{map_block<V>(C).x} * V));
}
// This thread's first channel.
template <int V>
__device__ inline int map_channel() {
  return static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * V;
}

template <class T, int V>
__device__ inline void read(const T* p, compute_t<T> (&values)[V]) {
  const Pack<T, V> pack = load<T, V>(p);
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = static_cast<compute_t<T>>(pack.v[v]);
}
template <class T, int V>
__device__ inline void write(T* p, const compute_t<T> (&values)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.v[v] = static_cast<T>(values[v]);
  store(p, pack);
}
template <class A, int V>
__device__ inline void fill(A (&values)[V], A value) {
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = value;
}

// A row of the statistics, at channel c; mean 0 and invstd 1 for row -1.
template <class A, int V>
__device__ inline void read_norm(const MixedOpArgs& a, int norm, int c, A (&mean)[V], A (&invstd)[V]) {
  fill(mean, A(0));
  fill(invstd, A(1));
  if (norm < 0) return;
  read<A, V>(static_cast<const A*>(a.mean) + norm * a.C + c, mean);
  read<A, V>(static_cast<const A*>(a.invstd) + norm * a.C + c, invstd);
}

struct Place {
  int64_t n;
  int h, w;
};
__device__ inline Place place(int64_t pixel, int64_t H, int64_t W) {
  const int64_t row = pixel / W, n = row / H;
  return {n, static_cast<int>(row - n * H), static_cast<int>(pixel - row * W)};
}

// The 3x3 window of an output pixel, cut at the borders.
struct PoolWindow {
  const MixedOpArgs& a;
  int64_t image;  // first pixel of the image
  int h, w;       // of tap 0; may lie outside
  __device__ PoolWindow(const MixedOpArgs& args, int64_t p) : a(args) {
    const Place q = place(p, args.OH, args.OW);
    image = q.n * args.H * args.W;
    h = q.h * args.stride - 1;
    w = q.w * args.stride - 1;
  }
  // Calls body(tap, pixel of x) in scan order.
  template <class Body>
  __device__ void each(Body body) const {
#pragma unroll
    for (int i = 0; i < 3; ++i)
#pragma unroll
      for (int j = 0; j < 3; ++j)
        if (h + i >= 0 && h + i < a.H && w + j >= 0 && w + j < a.W) body(i * 3 + j, image + (h + i) * a.W + w + j);
  }
};

// How many taps of the window of output row or column o lie inside `size`.
__device__ inline int pool_extent(int64_t o, int stride, int64_t size) {
  const int64_t begin = o * stride - 1, end = begin + 3;
  return static_cast<int>((end < size ? end : size) - (begin > 0 ? begin : 0));
}

// Max pool as torch has it: the first maximum in scan order, and NaN beats numbers.
template <class T, int V>
__device__ inline void max_pool(const MixedOpArgs& a, int64_t p, int c, compute_t<T> (&best)[V], uint8_t (&tap)[V]) {
  using A = compute_t<T>;
  const PoolWindow window(a, p);
  fill(best, static_cast<A>(-INFINITY));
  fill(tap, static_cast<uint8_t>((window.h < 0 ? 3 : 0) + (window.w < 0)));
  window.each([&](int t, int64_t pixel) {
    A values[V];
    read<T, V>(static_cast<const T*>(a.x) + pixel * a.x_step + c, values);
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (values[v] > best[v] || values[v] != values[v]) best[v] = values[v], tap[v] = static_cast<uint8_t>(t);
  });
}

// What a max pool gave, from the taps that it took.
template <class T, int V>
__device__ inline void max_pool_at(const MixedOpArgs& a, int64_t p, int c, const uint8_t (&tap)[V],
                                   compute_t<T> (&values)[V]) {
  const PoolWindow window(a, p);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int64_t pixel = window.image + (window.h + tap[v] / 3) * a.W + window.w + tap[v] % 3;
    values[v] = static_cast<compute_t<T>>(static_cast<const T*>(a.x)[pixel * a.x_step + c + v]);
  }
}

// Average pool over the taps that lie inside.
template <class T, int V>
__device__ inline void avg_pool(const MixedOpArgs& a, int64_t p, int c, compute_t<T> (&mean)[V]) {
  using A = compute_t<T>;
  fill(mean, A(0));
  int count = 0;
  PoolWindow(a, p).each([&](int, int64_t pixel) {
    A values[V];
    read<T, V>(static_cast<const T*>(a.x) + pixel * a.x_step + c, values);
#pragma unroll
    for (int v = 0; v < V; ++v) mean[v] += values[v];
    ++count;
  });
#pragma unroll
  for (int v = 0; v < V; ++v) mean[v] /= static_cast<A>(count);
}

// What a term adds, before its batch norm, at output pixel p.
template <class T, int V>
__device__ inline void term_values(const MixedOpArgs& a, const Term& term, int64_t p, int c,
                                   compute_t<T> (&values)[V]) {
  if (term.kind == Kind::max_pool) {
    uint8_t tap[V];
    max_pool<T, V>(a, p, c, values, tap);
  } else if (term.kind == Kind::avg_pool) {
    avg_pool<T, V>(a, p, c, values);
  } else {
    const void* src = term.kind == Kind::skip ? a.x : term.kind == Kind::map ? term.src : a.stages[term.stage].out;
    read<T, V>(static_cast<const T*>(src) + p * (term.kind == Kind::skip ? a.x_step : a.C) + c, values);
  }
}

// The sum over the block's rows, in row 0, by a tree that depends on the block's shape alone. Every thread calls it.
template <int V>
__device__ inline void rows_sum(double (&values)[V]) {
  __shared__ double rows[kBlock * V];
  double* mine = rows + (threadIdx.y * blockDim.x + threadIdx.x) * V;
#pragma unroll
  for (int v = 0; v < V; ++v) mine[v] = values[v];
  __syncthreads();
  for (unsigned step = blockDim.y / 2; step > 0; step /= 2) {
    if (threadIdx.y < step)
#pragma unroll
      for (int v = 0; v < V; ++v) mine[v] += mine[step * blockDim.x * V + v];
    __syncthreads();
  }
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = mine[v];
  __syncthreads();  // the next call may write rows
}

// What a stage's convolution reads.
template <class T>
struct Source {
  const T* map;
  int64_t H, W, C, step;
  int norm;
  __device__ Source(const MixedOpArgs& a, const Stage& s)
      : map(static_cast<const T*>(s.source < 0 ? a.x : a.stages[s.source].out)),
        H(s.source < 0 ? a.H : a.OH),
        W(s.source < 0 ? a.W : a.OW),
        C(a.C),
        step(s.source < 0 ? a.x_step : a.C),
        norm(s.source < 0 ? -1 : a.stages[s.source].norm) {}
};

// ReLU; NaN passes.
template <class A>
__device__ inline A relu(A v) {
  return v <= A(0) ? A(0) : v;
}

// Where the convolution of an output pixel begins.
struct Window {
  int64_t image;  // first pixel of the image in the source; -1: no such output pixel
  int h, w;       // of tap 0; may lie outside
};
template <class T>
__device__ inline Window window(const MixedOpArgs& a, const Stage& s, const Source<T>& source, int64_t p) {
  if (p >= output_pixels(a)) return {-1, 0, 0};
  const Place q = place(p, a.OH, a.OW);
  const int pad = s.dilation * (s.kernel - 1) / 2;
  return {q.n * source.H * source.W, q.h * s.stride - pad, q.w * s.stride - pad};
}

// Depthwise convolution of relu(normalised source) at channels c.. of one output pixel. weights[tap * stride + v].
template <int K, class T, int V>
__device__ inline void depthwise_k(const Source<T>& source, const Window& win, int dilation, int c,
                                   const compute_t<T>* weights, int stride, const compute_t<T> (&mean)[V],
                                   const compute_t<T> (&invstd)[V], compute_t<T> (&out)[V]) {
  using A = compute_t<T>;
#pragma unroll 1  // a row of taps in flight is enough, and fits in registers
  for (int i = 0; i < K; ++i) {
    const int h = win.h + i * dilation;
    if (h < 0 || h >= source.H) continue;
    const T* row = source.map + (win.image + h * source.W) * source.step + c;
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const int w = win.w + j * dilation;
      if (w < 0 || w >= source.W) continue;
      A values[V];
      read<T, V>(row + w * source.step, values);
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] += relu((values[v] - mean[v]) * invstd[v]) * weights[(i * K + j) * stride + v];
    }
  }
}
template <class T, int V>
__device__ inline void depthwise(const Stage& s, const Source<T>& source, const Window& win, int c,
                                 const compute_t<T>* weights, int stride, const compute_t<T> (&mean)[V],
                                 const compute_t<T> (&invstd)[V], compute_t<T> (&out)[V]) {
  fill(out, compute_t<T>(0));
  if (win.image < 0 || c >= source.C) return;
  if (s.kernel == 3)
    depthwise_k<3, T, V>(source, win, s.dilation, c, weights, stride, mean, invstd, out);
  else if (s.kernel == 5)
    depthwise_k<5, T, V>(source, win, s.dilation, c, weights, stride, mean, invstd, out);
  else
    depthwise_k<7, T, V>(source, win, s.dilation, c, weights, stride, mean, invstd, out);
}

// relu(normalised source) at channels c.. of one tap of a dense stage's window.
template <class T, int V>
__device__ inline void activated(const Stage& s, const Source<T>& source, const Window& win, int tap, int c,
                                 const compute_t<T> (&mean)[V], const compute_t<T> (&invstd)[V],
                                 compute_t<T> (&out)[V]) {
  fill(out, compute_t<T>(0));
  const int h = win.h + tap / s.kernel, w = win.w + tap % s.kernel;
  if (win.image < 0 || c >= source.C || h < 0 || h >= source.H || w < 0 || w >= source.W) return;
  read<T, V>(source.map + (win.image + h * source.W + w) * source.step + c, out);
#pragma unroll
  for (int v = 0; v < V; ++v) out[v] = relu((out[v] - mean[v]) * invstd[v]);
}

// Copies the depthwise weights of `width` channels from c on to shared memory, [tap][width]; zeros past the last one.
template <class T>
__device__ inline void load_taps(const Stage& s, int64_t C, int64_t c, int width, compute_t<T>* to) {
  const int n = taps(s);
  const int threads = blockDim.x * blockDim.y;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < n * width; i += threads) {
    const int channel = i / n, tap = i - channel * n;
    to[tap * width + channel] =
        c + channel < C ? static_cast<compute_t<T>>(static_cast<const T*>(s.depthwise)[(c + channel) * n + tap])
                        : compute_t<T>(0);
  }
}

// acc[i][j] += sum_k left[k][m + i] * right[k][n + j], (m, n) being this thread's corner of a tile N channels wide.
template <int N>
__device__ inline int tile_row() {
  return static_cast<int>(threadIdx.x / (N / 4)) * 4;
}
template <int N>
__device__ inline int tile_column() {
  return static_cast<int>(threadIdx.x % (N / 4)) * 4;
}
template <class A>
__device__ inline void multiply_add(const A* left, const A* right, A (&acc)[4][4]) {
  const Pack<A, 4> l = load<A, 4>(left), r = load<A, 4>(right);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[i][j] += l.v[i] * r.v[j];
}

// A tile of a product with P rows: operands in shared memory, padded so that columns fall into different banks.
template <class A, int N>
struct Tile {
  static constexpr int M = kProduct / N;  // pixels
  alignas(16) A left[kDepth][M + 4];
  alignas(16) A right[kDepth][N + 4];

  __device__ void multiply(A (&acc)[4][4]) const {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) multiply_add(&left[k][tile_row<N>()], &right[k][tile_column<N>()], acc);
  }

  // Writes this thread's results of a tile that begins at `channel`; where(i) is the place of the tile's i-th pixel in
  // the map, in elements, or negative.
  template <class T, int V, class Where>
  __device__ static void write_map(T* map, Where where, int64_t channel, int64_t C, const A (&acc)[4][4]) {
    const int64_t c = channel + tile_column<N>();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = where(tile_row<N>() + i);
      if (at < 0) return;
      if (V == 4) {
        if (c < C) write<T, 4>(map + at + c, acc[i]);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (c + j < C) map[at + c + j] = static_cast<T>(acc[i][j]);
      }
    }
  }
};
}  // namespace fastnas::cuda
