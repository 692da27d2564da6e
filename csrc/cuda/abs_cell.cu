// Products over tiles in shared memory, 4 x 4 results a thread, as small as the maps of a single image ask for.
#include "abs_cell.h"

#include <algorithm>

#include "cuda/launch.cuh"

namespace fastnas::cuda {
namespace {
constexpr int kThreads = 256;  // of the kernels without tiles
constexpr int kTile = 32;      // rows and columns of a product's tile
constexpr int kDepth = 16;     // of the operands in shared memory
constexpr int kTileThreads = (kTile / 4) * (kTile / 4);
constexpr int64_t kChain = 512;  // products that are summed before they meet the rest: long chains round more

static_assert(2 * sizeof(AbsCellArgs) + 512 <= 32764, "the arguments do not fit a kernel's parameters");

// Where things lie in the workspace. A = compute_t<T>. Merged kernels and their gradients are matrices
// [tap][channel of the fan's node][node, channel], fan after fan.
struct Scratch {
  void* merged = nullptr;    // A
  void* grads = nullptr;     // T, of the states' shape: the nodes' gradients                  backward
  void* partial = nullptr;   // A [chunk of pixels][forward fans' matrices]
  void* gradient = nullptr;  // A [forward fans' matrices]
  int64_t chunk = 0, chunks = 0;
  int64_t bytes = 0;
};

template <class T>
Scratch make_scratch(const AbsCellArgs& a, bool backward) {
  using A = compute_t<T>;
  Scratch s;
  auto take = [&](void*& pointer, int64_t bytes) {
    pointer = static_cast<char*>(a.workspace) + s.bytes;
    s.bytes += ceil_div(bytes, 256) * 256;
  };
  const int64_t matrices = a.edges() * a.merged() * static_cast<int64_t>(sizeof(A));
  take(s.merged, matrices);
  if (!backward) return s;
  take(s.grads, a.N * a.image() * sizeof(T));
  const int64_t tiles = 9 * ceil_div(a.C, kTile) * ceil_div(a.C, kTile);  // many fill a device by themselves
  const int64_t most = std::max<int64_t>(1, 256 / tiles);
  s.chunk = 128 * ceil_div(a.pixels(), 128 * most), s.chunks = ceil_div(a.pixels(), s.chunk);
  take(s.partial, s.chunks * matrices);
  take(s.gradient, matrices);
  return s;
}

template <class A>
__device__ inline A magnitude(A v) {
  return v < A(0) ? -v : v;
}

// The sum of an edge's weights of pools.
template <class A>
__device__ inline A pool_weight(const AbsCellArgs& a, int edge) {
  A sum = 0;
  for (int o = 0; o < a.ops_count; ++o)
    if (a.ops[o] == AbsOp::avg_pool) sum += magnitude(static_cast<const A*>(a.weights)[edge * a.ops_count + o]);
  return sum;
}

// Where the matrix of the i-th fan begins.
__device__ inline int64_t matrix_begin(const AbsCellArgs& a, int i, bool backward) {
  int64_t begin = 0;
  for (int k = 0; k < i; ++k) begin += a.fan(k, backward).count * a.merged();
  return begin;
}

// One element of a fan's matrix a thread.
template <class T>
__global__ void __launch_bounds__(kThreads)
    abs_cell_merge_kernel(const __grid_constant__ AbsCellArgs a, compute_t<T>* merged, bool backward) {
  using A = compute_t<T>;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  A* to = merged + i;
  int fan = 0;
  AbsFan f = a.fan(0, backward);
  while (i >= f.count * a.merged()) {
    i -= f.count * a.merged();
    if (++fan == a.nodes - 1) return;
    f = a.fan(fan, backward);
  }
  const int64_t columns = f.count * a.C, column = i % columns, k = i / columns % a.C, c = column % a.C;
  const int tap = static_cast<int>(i / columns / a.C);
  const int edge = a.fan_edge(f, static_cast<int>(column / a.C));
  const int64_t out = backward ? k : c, in = backward ? c : k, at = out * a.C + in, of = backward ? 8 - tap : tap;
  A sum = 0;
  for (int o = 0; o < a.ops_count; ++o) {
    const int candidate = edge * a.ops_count + o;
    const A w = magnitude(static_cast<const A*>(a.weights)[candidate]);
    const T* kernel = static_cast<const T*>(a.kernels[candidate]);
    if (a.ops[o] == AbsOp::conv3x3) sum += w * magnitude(static_cast<A>(kernel[at * 9 + of]));
    if (a.ops[o] == AbsOp::conv1x1 && tap == 4) sum += w * magnitude(static_cast<A>(kernel[at]));
    if (a.ops[o] == AbsOp::skip && tap == 4 && in == out) sum += w;
    if (a.ops[o] == AbsOp::avg_pool && in == out) sum += w / A(9);
  }
  *to = sum;
}

// A map's element a thread: `from` in the place of a node, zeros in the ring and behind the last node.
template <class T>
__global__ void __launch_bounds__(kThreads)
    abs_cell_load_kernel(const __grid_constant__ AbsCellArgs a, const T* from, T* map, int node) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.N * a.image()) return;
  const int64_t channel = i % a.step(), pixel = i / a.step();
  const int64_t x = pixel % (a.W + 2) - 1, y = pixel / (a.W + 2) % (a.H + 2) - 1, image = i / a.image();
  if (x < 0 || x == a.W || y < 0 || y == a.H || channel >= a.nodes * a.C)
    map[i] = T(0);
  else if (channel / a.C == node)
    map[i] = from[((image * a.H + y) * a.W + x) * a.C + channel % a.C];
}

// Operands in shared memory, padded so that columns fall into different banks.
template <class A>
struct Tile {
  alignas(16) A left[kDepth][kTile + 4];
  alignas(16) A right[kDepth][kTile + 4];

  __device__ static int row() { return static_cast<int>(threadIdx.x) / (kTile / 4) * 4; }
  __device__ static int column() { return static_cast<int>(threadIdx.x) % (kTile / 4) * 4; }
  __device__ void multiply(A (&acc)[4][4]) const {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const Pack<A, 4> l = load<A, 4>(&left[k][row()]), r = load<A, 4>(&right[k][column()]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] += l.v[i] * r.v[j];
    }
  }
};

// sum = over depth of operands that `fill(depth)` puts into the tile, in chains of kChain.
template <class A, class Fill>
__device__ inline void product(Tile<A>& tile, int64_t begin, int64_t end, Fill fill, A (&sum)[4][4]) {
  for (int64_t first = begin; first < end; first += kChain) {
    A acc[4][4] = {};
    for (int64_t depth = first; depth < end && depth < first + kChain; depth += kDepth) {
      fill(depth);
      __syncthreads();
      tile.multiply(acc);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += acc[i][j];
  }
}

// What pools of weight 1 add to channel `channel` of the map at pixel p beyond 1/9 a tap; backward, what they add to
// the gradient there.
template <class T>
__device__ inline compute_t<T> border(const AbsCellArgs& a, const T* map, int64_t p, int64_t channel, bool backward) {
  using A = compute_t<T>;
  const int64_t x = p % a.W, y = p / a.W % a.H;
  const int here = abs_taps(y, a.H) * abs_taps(x, a.W);
  if (!backward && here == 9) return A(0);
  if (backward && x >= 2 && x + 2 < a.W && y >= 2 && y + 2 < a.H) return A(0);
  A sum = 0;
  for (int64_t dy = -1; dy <= 1; ++dy)
    for (int64_t dx = -1; dx <= 1; ++dx) {
      if (y + dy < 0 || y + dy == a.H || x + dx < 0 || x + dx == a.W) continue;
      const A v = static_cast<A>(map[a.window(p) + (dy + 1) * a.row() + (dx + 1) * a.step() + channel]);
      sum += backward ? v * abs_excess<A>(abs_taps(y + dy, a.H) * abs_taps(x + dx, a.W)) : v;
    }
  return backward ? sum : sum * abs_excess<A>(here);
}

// A tile of pixels by columns a block.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    abs_cell_fan_kernel(const __grid_constant__ AbsCellArgs a, const AbsFan f, const compute_t<T>* matrix, T* map,
                        T* out, bool pooled, bool backward) {
  using A = compute_t<T>;
  __shared__ Tile<A> tile;
  __shared__ int64_t windows[kTile];
  const int64_t P = a.pixels(), first = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t columns = f.count * a.C, column = static_cast<int64_t>(blockIdx.y) * kTile;
  for (int m = threadIdx.x; m < kTile; m += kTileThreads)
    windows[m] = first + m < P ? a.window(first + m) + f.from * a.C : int64_t{-1};
  __syncthreads();
  A sum[4][4] = {};
  product(
      tile, 0, 9 * a.C,
      [&](int64_t depth) {
        const int row = static_cast<int>(threadIdx.x) % kDepth;
        const int64_t k = depth + row, tap = k / a.C;
        const int64_t offset = tap / 3 * a.row() + tap % 3 * a.step() + k % a.C;
        for (int m = threadIdx.x / kDepth; m < kTile; m += kTileThreads / kDepth)
          tile.left[row][m] = tap < 9 && windows[m] >= 0 ? static_cast<A>(map[windows[m] + offset]) : A(0);
        for (int i = threadIdx.x; i < kDepth * kTile; i += kTileThreads) {
          const int64_t j = depth + i / kTile, n = column + i % kTile;
          tile.right[i / kTile][i % kTile] = j < 9 * a.C && n < columns ? matrix[j * columns + n] : A(0);
        }
      },
      sum);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t p = first + tile.row() + i;
    if (p >= P) return;
    T* pixel = map + a.window(p) + a.row() + a.step();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t n = column + tile.column() + j;
      if (n >= columns) break;
      const int node = f.first + static_cast<int>(n / a.C);
      const int64_t c = n % a.C;
      T* to = pixel + node * a.C + c;
      A value = sum[i][j];
      if (pooled)
        value += pool_weight<A>(a, a.fan_edge(f, node - f.first)) * border(a, map, p, f.from * a.C + c, backward);
      if (f.add) value += static_cast<A>(*to);
      *to = static_cast<T>(value);
      if (out && node == (backward ? 0 : a.nodes - 1)) out[p * a.C + c] = static_cast<T>(value);
    }
  }
}

// One chunk of pixels' part of the gradient of the matrices: a tile of channels by columns of one tap of a fan a block.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    abs_cell_gradient_kernel(const __grid_constant__ AbsCellArgs a, const __grid_constant__ Scratch s) {
  using A = compute_t<T>;
  __shared__ Tile<A> tile;
  const int fan = static_cast<int>(blockIdx.z);
  const AbsFan f = a.fan(fan, false);
  const int64_t columns = f.count * a.C, tiles = ceil_div(a.C, kTile);
  const int64_t channel = static_cast<int64_t>(blockIdx.x) % tiles * kTile;
  const int64_t column = static_cast<int64_t>(blockIdx.x) / tiles / 9 * kTile;
  const int tap = static_cast<int>(blockIdx.x / tiles % 9);
  if (column >= columns) return;
  const int64_t begin = blockIdx.y * s.chunk, end = begin + s.chunk < a.pixels() ? begin + s.chunk : a.pixels();
  const T* states = static_cast<const T*>(a.states) + tap / 3 * a.row() + tap % 3 * a.step() + f.from * a.C;
  const T* grads = static_cast<const T*>(s.grads) + a.row() + a.step() + f.first * a.C;
  A sum[4][4] = {};
  product(
      tile, begin, end,
      [&](int64_t depth) {
        for (int i = threadIdx.x; i < kDepth * kTile; i += kTileThreads) {
          const int64_t p = depth + i / kTile, c = channel + i % kTile, n = column + i % kTile;
          const int64_t window = p < end ? a.window(p) : 0;
          tile.left[i / kTile][i % kTile] = p < end && c < a.C ? static_cast<A>(states[window + c]) : A(0);
          tile.right[i / kTile][i % kTile] = p < end && n < columns ? static_cast<A>(grads[window + n]) : A(0);
        }
      },
      sum);
  A* to = static_cast<A*>(s.partial) + blockIdx.y * a.edges() * a.merged() + matrix_begin(a, fan, false);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t c = channel + tile.row() + i, n = column + tile.column() + j;
      if (c < a.C && n < columns) to[(tap * a.C + c) * columns + n] = sum[i][j];
    }
}

// Adds the chunks' parts in order.
template <class A>
__global__ void __launch_bounds__(kThreads)
    abs_cell_sum_kernel(const __grid_constant__ Scratch s, const int64_t elements) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= elements) return;
  double sum = 0;
  for (int64_t k = 0; k < s.chunks; ++k) sum += static_cast<double>(static_cast<const A*>(s.partial)[k * elements + i]);
  static_cast<A*>(s.gradient)[i] = static_cast<A>(sum);
}

// An edge's place in the fans' matrices: element (tap, in, out) is at (tap * C + in) * columns + out.
template <class A>
struct EdgeMatrix {
  const A* at;
  int64_t columns;
  int node = 1, from;
  __device__ EdgeMatrix(const AbsCellArgs& a, const Scratch& s, int edge) {
    while (a.edge(node + 1, 0) <= edge) ++node;
    from = edge - a.edge(node, 0);
    const AbsFan f = a.fan(from, false);
    columns = f.count * a.C;
    at = static_cast<const A*>(s.gradient) + matrix_begin(a, from, false) + (node - f.first) * a.C;
  }
  __device__ A operator()(const AbsCellArgs& a, int64_t tap, int64_t in, int64_t out) const {
    return at[(tap * a.C + in) * columns + out];
  }
};

// The gradient of one weight a block.
template <class T>
__global__ void __launch_bounds__(kThreads)
    abs_cell_finish_kernel(const __grid_constant__ AbsCellArgs a, const __grid_constant__ Scratch s) {
  using A = compute_t<T>;
  const int candidate = static_cast<int>(blockIdx.x), edge = candidate / a.ops_count;
  const AbsOp op = a.ops[candidate % a.ops_count];
  const EdgeMatrix<A> gradient(a, s, edge);
  double sum = 0;
  if (op == AbsOp::conv1x1 || op == AbsOp::conv3x3) {
    const int64_t taps = op == AbsOp::conv3x3 ? 9 : 1, first = op == AbsOp::conv3x3 ? 0 : 4;
    const T* kernel = static_cast<const T*>(a.kernels[candidate]);
    for (int64_t i = threadIdx.x; i < a.C * a.C * taps; i += kThreads)
      sum += static_cast<double>(gradient(a, first + i % taps, i / taps % a.C, i / taps / a.C)) *
             static_cast<double>(magnitude(static_cast<A>(kernel[i])));
  } else if (op == AbsOp::skip) {
    for (int64_t c = threadIdx.x; c < a.C; c += kThreads) sum += static_cast<double>(gradient(a, 4, c, c));
  } else if (op == AbsOp::avg_pool) {
    for (int64_t i = threadIdx.x; i < 9 * a.C; i += kThreads)
      sum += static_cast<double>(gradient(a, i / a.C, i % a.C, i % a.C)) / 9;
    const T* states = static_cast<const T*>(a.states);
    const T* grads = static_cast<const T*>(s.grads) + a.row() + a.step() + gradient.node * a.C;
    for (int64_t i = threadIdx.x; i < a.pixels() * a.C; i += kThreads) {
      const int64_t p = i / a.C, c = i % a.C;
      if (abs_taps(p / a.W % a.H, a.H) * abs_taps(p % a.W, a.W) == 9) continue;
      sum += static_cast<double>(border(a, states, p, gradient.from * a.C + c, false)) *
             static_cast<double>(static_cast<A>(grads[a.window(p) + c]));
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x > 0) return;
  const bool negative = static_cast<const A*>(a.weights)[candidate] < A(0);
  static_cast<A*>(a.grad_weights)[candidate] = static_cast<A>(negative ? -sum : sum);
}

// An element of the gradient of one candidate's kernel a thread.
template <class T>
__global__ void __launch_bounds__(kThreads)
    abs_cell_kernels_kernel(const __grid_constant__ AbsCellArgs a, const __grid_constant__ Scratch s) {
  using A = compute_t<T>;
  const int candidate = static_cast<int>(blockIdx.y);
  T* to = static_cast<T*>(a.grad_kernels[candidate]);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool wide = a.ops[candidate % a.ops_count] == AbsOp::conv3x3;
  const int64_t taps = wide ? 9 : 1, first = wide ? 0 : 4;
  if (!to || i >= a.C * a.C * taps) return;
  const EdgeMatrix<A> gradient(a, s, candidate / a.ops_count);
  const A w = magnitude(static_cast<const A*>(a.weights)[candidate]);
  const A value = static_cast<A>(static_cast<const T*>(a.kernels[candidate])[i]);
  const A g = w * gradient(a, first + i % taps, i / taps % a.C, i / taps / a.C);
  to[i] = static_cast<T>(value > A(0) ? g : value < A(0) ? -g : value * A(0));
}

template <class T>
void run_fans(const AbsCellArgs& a, const Scratch& s, const void* from, void* map, bool backward, Stream stream) {
  using A = compute_t<T>;
  int64_t elements = 0;
  for (int i = 0; i + 1 < a.nodes; ++i) elements += a.fan(i, backward).count * a.merged();
  if (elements > 0)
    launch("abs_cell_merge", abs_cell_merge_bytes(a, sizeof(T), sizeof(A), backward), abs_cell_merge_kernel<T>,
           dim3(ceil_div(elements, kThreads)), dim3(kThreads), stream, a, static_cast<A*>(s.merged), backward);
  launch("abs_cell_load", abs_cell_load_bytes(a, sizeof(T)), abs_cell_load_kernel<T>,
         dim3(ceil_div(a.N * a.image(), kThreads)), dim3(kThreads), stream, a, static_cast<const T*>(from),
         static_cast<T*>(map), backward ? a.nodes - 1 : 0);
  const A* matrix = static_cast<const A*>(s.merged);
  for (int i = 0; i + 1 < a.nodes; ++i) {
    const AbsFan f = a.fan(i, backward);
    if (f.count == 0) continue;
    void* out = f.from != (backward ? 1 : a.nodes - 2) ? nullptr : backward ? a.grad_x : a.y;
    launch("abs_cell_fan", abs_cell_fan_bytes(a, f, sizeof(T), sizeof(A)), abs_cell_fan_kernel<T>,
           dim3(ceil_div(a.pixels(), kTile), ceil_div(f.count * a.C, kTile)), dim3(kTileThreads), stream, a, f, matrix,
           static_cast<T*>(map), static_cast<T*>(out), a.pooled(), backward);
    matrix += f.count * a.merged();
  }
}
}  // namespace

template <class T>
int64_t abs_cell_workspace(const AbsCellArgs& args, bool backward) {
  return make_scratch<T>(args, backward).bytes;
}

template <class T>
void abs_cell(const AbsCellArgs& args, Stream stream) {
  run_fans<T>(args, make_scratch<T>(args, false), args.x, args.states, false, stream);
}

template <class T>
void abs_cell_backward(const AbsCellArgs& a, Stream stream) {
  using A = compute_t<T>;
  const Scratch s = make_scratch<T>(a, true);
  run_fans<T>(a, s, a.grad, s.grads, true, stream);
  const bool kernels = a.kernels_wanted();
  if (!a.grad_weights && !kernels) return;
  const int64_t elements = a.edges() * a.merged(), size = sizeof(A), tiles = ceil_div(a.C, kTile);
  launch("abs_cell_gradient", abs_cell_gradient_bytes(a, sizeof(T), s.chunks * size), abs_cell_gradient_kernel<T>,
         dim3(tiles * 9 * ceil_div((a.nodes - 1) * a.C, kTile), s.chunks, a.nodes - 1), dim3(kTileThreads), stream, a,
         s);
  launch("abs_cell_sum", (s.chunks + 1) * elements * size, abs_cell_sum_kernel<A>, dim3(ceil_div(elements, kThreads)),
         dim3(kThreads), stream, s, elements);
  if (a.grad_weights)
    launch("abs_cell_finish", abs_cell_finish_bytes(a, sizeof(T), size, false), abs_cell_finish_kernel<T>,
           dim3(a.edges() * a.ops_count), dim3(kThreads), stream, a, s);
  if (kernels)
    launch("abs_cell_kernels", abs_cell_finish_bytes(a, sizeof(T), size, true), abs_cell_kernels_kernel<T>,
           dim3(ceil_div(a.merged(), kThreads), a.edges() * a.ops_count), dim3(kThreads), stream, a, s);
}

#define FASTNAS_INSTANTIATE(T)                                      \
  template int64_t abs_cell_workspace<T>(const AbsCellArgs&, bool); \
  template void abs_cell<T>(const AbsCellArgs&, Stream);            \
  template void abs_cell_backward<T>(const AbsCellArgs&, Stream);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
FASTNAS_INSTANTIATE(Half)
FASTNAS_INSTANTIATE(BFloat16)
}  // namespace fastnas::cuda
