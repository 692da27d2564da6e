// Products over tiles in shared memory, as in mixed_op: 4 x 4 results a thread, relu(x) taken while it is loaded.
#include "relu_pointwise.h"

#include "cuda/mixed_op.cuh"

namespace fastnas::cuda {
namespace {
// The pixels of z, cut for the weights' gradients.
Chunks weight_chunks(const ReluPointwiseArgs& a) {
  const int64_t tiles = ceil_div(a.channels, 64) * ceil_div(a.in, 64);  // many fill a device by themselves
  return chunks_of(a.pixels(), 128, std::max<int64_t>(1, 128 / tiles));
}

// True where every map can be read and written four channels at a time.
bool by_four(const ReluPointwiseArgs& a) {
  bool yes = a.in % 4 == 0 && aligned(a.x) && aligned(a.z) && aligned(a.grad) && aligned(a.grad_x);
  for (int g = 0; g < a.groups; ++g) yes &= a.out(g) % 4 == 0;
  return yes;
}

int64_t most_out(const ReluPointwiseArgs& a) { return std::max(a.out(0), a.groups > 1 ? a.out(1) : 0); }

// Four channels from c on, as far as they lie before end; read and written at once where V is 4.
template <class T, int V>
__device__ inline void read_channels(const T* from, int64_t c, int64_t end, compute_t<T> (&values)[4]) {
  using A = compute_t<T>;
  fill(values, A(0));
  if constexpr (V == 4) {
    if (c < end) read<T, 4>(from + c, values);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (c + j < end) values[j] = static_cast<A>(from[c + j]);
  }
}
template <class T, int V>
__device__ inline void write_channels(T* to, int64_t c, int64_t end, const compute_t<T> (&values)[4]) {
  if constexpr (V == 4) {
    if (c < end) write<T, 4>(to + c, values);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (c + j < end) to[c + j] = static_cast<T>(values[j]);
  }
}

// z of one group: a tile of M pixels by N channels a block.
template <class T, int V, int N>
__global__ void __launch_bounds__(kBlock, kFewBlocks<T>)
    relu_pointwise_kernel(const __grid_constant__ ReluPointwiseArgs a) {
  using A = compute_t<T>;
  constexpr int M = Tile<A, N>::M;
  __shared__ Tile<A, N> tile;
  __shared__ int64_t sources[M];  // pixels of x; -1: no such pixel of z
  const int g = static_cast<int>(blockIdx.z);
  const T* x = static_cast<const T*>(a.x);
  const T* weights = static_cast<const T*>(a.weights[g]);
  const int64_t P = a.pixels(), first = static_cast<int64_t>(blockIdx.x) * M, end = a.out(g);
  const int64_t out = static_cast<int64_t>(blockIdx.y) * N;
  for (int m = threadIdx.x; m < M; m += kBlock)
    sources[m] = first + m < P ? a.source(first + m) + a.offset(g) : int64_t{-1};
  __syncthreads();

  constexpr int kGroups = kDepth / V;  // threads along the channels of a pixel
  const int k = static_cast<int>(threadIdx.x) % kGroups * V;
  A acc[4][4] = {};
  for (int64_t depth = 0; depth < a.in; depth += kDepth) {
    for (int i = threadIdx.x; i < kDepth * N; i += kBlock) {
      const int64_t c = depth + i % kDepth, o = out + i / kDepth;
      tile.right[i % kDepth][i / kDepth] = c < a.in && o < end ? static_cast<A>(weights[o * a.in + c]) : A(0);
    }
    for (int m = threadIdx.x / kGroups; m < M; m += kBlock / kGroups) {
      A values[V];
      fill(values, A(0));
      if (sources[m] >= 0 && depth + k < a.in) read<T, V>(x + sources[m] * a.in + depth + k, values);
#pragma unroll
      for (int v = 0; v < V; ++v) tile.left[k + v][m] = relu(values[v]);
    }
    __syncthreads();
    tile.multiply(acc);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t p = first + tile_row<N>() + i;
    if (p < P)
      write_channels<T, V>(static_cast<T*>(a.z) + p * a.channels + a.begin[g], out + tile_column<N>(), end, acc[i]);
  }
}

// The gradient of the pixels of x that one group reads, a tile of M by N channels a block; group 0 also writes zeros
// where no group reads.
template <class T, int V, int N>
__global__ void __launch_bounds__(kBlock, kFewBlocks<T>)
    relu_pointwise_input_kernel(const __grid_constant__ ReluPointwiseArgs a) {
  using A = compute_t<T>;
  constexpr int M = Tile<A, N>::M;
  __shared__ Tile<A, N> tile;
  const int g = static_cast<int>(blockIdx.z);
  const T* grad = static_cast<const T*>(a.grad) + a.begin[g];
  const T* weights = static_cast<const T*>(a.weights[g]);
  const int64_t P = a.pixels(), first = static_cast<int64_t>(blockIdx.x) * M, out = a.out(g);
  const int64_t in = static_cast<int64_t>(blockIdx.y) * N;

  constexpr int kGroups = kDepth / V;
  const int k = static_cast<int>(threadIdx.x) % kGroups * V;
  A acc[4][4] = {};
  for (int64_t depth = 0; depth < out; depth += kDepth) {
    for (int i = threadIdx.x; i < kDepth * N; i += kBlock) {
      const int64_t o = depth + i / N, c = in + i % N;
      tile.right[i / N][i % N] = o < out && c < a.in ? static_cast<A>(weights[o * a.in + c]) : A(0);
    }
    for (int m = threadIdx.x / kGroups; m < M; m += kBlock / kGroups) {
      A values[V];
      fill(values, A(0));
      if (first + m < P && depth + k < out) read<T, V>(grad + (first + m) * a.channels + depth + k, values);
#pragma unroll
      for (int v = 0; v < V; ++v) tile.left[k + v][m] = values[v];
    }
    __syncthreads();
    tile.multiply(acc);
    __syncthreads();
  }
  const int64_t c = in + tile_column<N>();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t p = first + tile_row<N>() + i;
    if (p >= P) return;
    const int64_t window = a.source(p), pixel = window + a.offset(g);
    A x[4];
    read_channels<T, V>(static_cast<const T*>(a.x) + pixel * a.in, c, a.in, x);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (x[j] <= A(0)) acc[i][j] = A(0);  // NaN passes
    T* grad_x = static_cast<T*>(a.grad_x);
    write_channels<T, V>(grad_x + pixel * a.in, c, a.in, acc[i]);
    if (a.stride == 1 || g > 0) continue;
    const A zeros[4] = {};
    write_channels<T, V>(grad_x + (window + 1) * a.in, c, a.in, zeros);
    write_channels<T, V>(grad_x + (window + a.W) * a.in, c, a.in, zeros);
    if (a.groups == 1) write_channels<T, V>(grad_x + (window + a.offset(1)) * a.in, c, a.in, zeros);
  }
}

// One chunk's part of one group's weight gradient, an N x N tile of (out, in) a block: the sum over pixels of
// grad x relu(x).
template <class T, int V, int N>
__global__ void __launch_bounds__(kBlock, kFewBlocks<T>)
    relu_pointwise_weights_kernel(const __grid_constant__ ReluPointwiseArgs a, const Chunks chunks) {
  using A = compute_t<T>;
  constexpr int kPixels = 2048 / N;                    // that are loaded at a time
  constexpr int kTeam = (N / 4) * (N / 4);             // threads that hold one copy of the tile
  constexpr int kTeams = kBlock / kTeam;               // each takes every kTeams-th pixel
  alignas(16) __shared__ A operands[2 * kPixels * N];  // left, right; at the end the teams' tiles
  A* left = operands;
  A* right = operands + kPixels * N;
  const int g = static_cast<int>(blockIdx.z), tiles = static_cast<int>(ceil_div(a.in, N));
  const int64_t out = static_cast<int64_t>(blockIdx.y) / tiles * N, in = static_cast<int64_t>(blockIdx.y) % tiles * N;
  const int64_t P = a.pixels(), begin = blockIdx.x * chunks.size;
  const int64_t end = begin + chunks.size < P ? begin + chunks.size : P;

  constexpr int kGroups = N / V;
  const int k = static_cast<int>(threadIdx.x) % kGroups * V;
  const int64_t o = out + k, c = in + k;
  const int team = static_cast<int>(threadIdx.x) / kTeam, member = static_cast<int>(threadIdx.x) % kTeam;
  const int row = member / (N / 4) * 4, column = member % (N / 4) * 4;
  A acc[4][4] = {};
  for (int64_t first = begin; first < end; first += kPixels) {
    for (int m = threadIdx.x / kGroups; m < kPixels; m += kBlock / kGroups) {
      const int64_t p = first + m;
      A values[V];
      fill(values, A(0));
      if (p < end && o < a.out(g)) read<T, V>(static_cast<const T*>(a.grad) + p * a.channels + a.begin[g] + o, values);
#pragma unroll
      for (int v = 0; v < V; ++v) left[m * N + k + v] = values[v];
      fill(values, A(0));
      if (p < end && c < a.in) read<T, V>(static_cast<const T*>(a.x) + (a.source(p) + a.offset(g)) * a.in + c, values);
#pragma unroll
      for (int v = 0; v < V; ++v) right[m * N + k + v] = relu(values[v]);
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
  A* to = static_cast<A*>(a.workspace) + (blockIdx.x * a.channels + a.begin[g]) * a.in;
  for (int j = threadIdx.x; j < N * N; j += kBlock) {
    A sum = 0;
    for (int n = 0; n < kTeams; ++n) sum += operands[n * N * N + j];
    const int64_t y = out + j / N, x = in + j % N;
    if (y < a.out(g) && x < a.in) to[y * a.in + x] = sum;
  }
}

// Adds the chunks' parts in order.
template <class T>
__global__ void __launch_bounds__(kBlock)
    relu_pointwise_finish_kernel(const __grid_constant__ ReluPointwiseArgs a, const int64_t chunks) {
  using A = compute_t<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x, size = a.channels * a.in;
  if (i >= size) return;
  const double sum = strided_sum(static_cast<const A*>(a.workspace) + i, chunks, size);
  const int64_t second = a.begin[1] * a.in;
  static_cast<T*>(a.grad_weights[i < second ? 0 : 1])[i < second ? i : i - second] = static_cast<T>(sum);
}

template <class T, int V>
struct ReluPointwise {
  using A = compute_t<T>;
  const ReluPointwiseArgs& a;
  Stream stream;

  // The grid of a product with `columns` channels in tiles of n.
  dim3 grid(int64_t columns, int n) const {
    return dim3(ceil_div(a.pixels(), kProduct / n), ceil_div(columns, n), a.groups);
  }

  void forward() const {
    const int n = product_width(most_out(a), V, 64);
    auto* kernel = relu_pointwise_kernel<T, V, 32>;
    if constexpr (V > 1)
      kernel = n == 16 ? relu_pointwise_kernel<T, V, 16> : n == 64 ? relu_pointwise_kernel<T, V, 64> : kernel;
    launch("relu_pointwise", relu_pointwise_bytes(a, sizeof(T)), kernel, grid(most_out(a), n), dim3(kBlock), stream, a);
  }

  void input() const {
    const int n = product_width(a.in, V, 64);
    auto* kernel = relu_pointwise_input_kernel<T, V, 32>;
    if constexpr (V > 1)
      kernel = n == 16   ? relu_pointwise_input_kernel<T, V, 16>
               : n == 64 ? relu_pointwise_input_kernel<T, V, 64>
                         : kernel;
    launch("relu_pointwise_backward_input", relu_pointwise_input_bytes(a, sizeof(T)), kernel, grid(a.in, n),
           dim3(kBlock), stream, a);
  }

  void weights() const {
    const int n = product_width(std::min(most_out(a), a.in), V, kMaxWeightTile<T>);
    auto* kernel = relu_pointwise_weights_kernel<T, V, 32>;
    if constexpr (V > 1)
      if (n == 16) kernel = relu_pointwise_weights_kernel<T, V, 16>;
    if constexpr (V > 1 && kMaxWeightTile<T> == 64)
      if (n == 64) kernel = relu_pointwise_weights_kernel<T, V, 64>;
    const Chunks chunks = weight_chunks(a);
    const int64_t size = a.channels * a.in, partial = chunks.count * size * static_cast<int64_t>(sizeof(A));
    launch("relu_pointwise_backward_weights", relu_pointwise_bytes(a, sizeof(T)) - size * sizeof(T) + partial, kernel,
           dim3(chunks.count, ceil_div(most_out(a), n) * ceil_div(a.in, n), a.groups), dim3(kBlock), stream, a, chunks);
    launch("relu_pointwise_backward_finish", partial + size * static_cast<int64_t>(sizeof(T)),
           relu_pointwise_finish_kernel<T>, dim3(ceil_div(size, kBlock)), dim3(kBlock), stream, a, chunks.count);
  }

  void backward() const {
    if (a.grad_x) input();
    if (a.grad_weights[0]) weights();
  }
};
}  // namespace

template <class T>
int64_t relu_pointwise_workspace(const ReluPointwiseArgs& args) {
  if (!args.grad_weights[0]) return 0;
  return weight_chunks(args).count * args.channels * args.in * static_cast<int64_t>(sizeof(compute_t<T>));
}

template <class T>
void relu_pointwise(const ReluPointwiseArgs& args, Stream stream) {
  by_four(args) ? ReluPointwise<T, 4>{args, stream}.forward() : ReluPointwise<T, 1>{args, stream}.forward();
}

template <class T>
void relu_pointwise_backward(const ReluPointwiseArgs& args, Stream stream) {
  by_four(args) ? ReluPointwise<T, 4>{args, stream}.backward() : ReluPointwise<T, 1>{args, stream}.backward();
}

#define FASTNAS_INSTANTIATE(T)                                            \
  template int64_t relu_pointwise_workspace<T>(const ReluPointwiseArgs&); \
  template void relu_pointwise<T>(const ReluPointwiseArgs&, Stream);      \
  template void relu_pointwise_backward<T>(const ReluPointwiseArgs&, Stream);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
FASTNAS_INSTANTIATE(Half)
FASTNAS_INSTANTIATE(BFloat16)
}  // namespace fastnas::cuda
