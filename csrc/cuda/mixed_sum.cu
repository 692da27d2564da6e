#include "mixed_sum.h"

#include "cuda/launch.cuh"

namespace fastnas::cuda {
namespace {
constexpr int kThreads = 256;

template <class T, int V>
__global__ void mixed_sum_kernel(MixedSumArgs a) {
  using A = compute_t<T>;
  const A* weights = static_cast<const A*>(a.weights);
  const int64_t i = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) * V;
  if (i >= a.n) return;
  if (V > 1 && i + V > a.n) {
    for (int64_t j = i; j < a.n; ++j) {
      A sum = 0;
      for (int k = 0; k < a.count; ++k) sum += weights[k] * static_cast<A>(static_cast<const T*>(a.xs[k])[j]);
      static_cast<T*>(a.y)[j] = static_cast<T>(sum);
    }
    return;
  }
  A sum[V] = {};
#pragma unroll 4
  for (int k = 0; k < a.count; ++k) {
    const Pack<T, V> x = load<T, V>(static_cast<const T*>(a.xs[k]) + i);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += weights[k] * static_cast<A>(x.v[v]);
  }
  Pack<T, V> y;
#pragma unroll
  for (int v = 0; v < V; ++v) y.v[v] = static_cast<T>(sum[v]);
  store(static_cast<T*>(a.y) + i, y);
}

// One block a piece: the summands' gradients, and the piece's part of each <grad, x_k>. The gradient of a piece stays
// in the first-level cache while the summands stream by.
template <class T, int V>
__global__ void mixed_sum_backward_kernel(MixedSumArgs a) {
  using A = compute_t<T>;
  const A* weights = static_cast<const A*>(a.weights);
  const T* grad = static_cast<const T*>(a.grad);
  const int64_t begin = blockIdx.x * kMixedSumPiece;
  const int64_t end = begin + kMixedSumPiece < a.n ? begin + kMixedSumPiece : a.n;
  for (int k = 0; k < a.count; ++k) {
    const T* x = static_cast<const T*>(a.xs[k]);
    T* grad_x = static_cast<T*>(a.grad_xs[k]);
    const A w = weights[k];
    A dot = 0;  // of at most kMixedSumPiece / kThreads elements
    for (int64_t i = begin + threadIdx.x * V; i < end; i += kThreads * V) {
      if (V > 1 && i + V > end) {
        for (int64_t j = i; j < end; ++j) {
          const A g = static_cast<A>(grad[j]);
          if (grad_x) grad_x[j] = static_cast<T>(w * g);
          if (a.grad_weights) dot += g * static_cast<A>(x[j]);
        }
        break;
      }
      const Pack<T, V> g = load<T, V>(grad + i);
      if (grad_x) {
        Pack<T, V> out;
#pragma unroll
        for (int v = 0; v < V; ++v) out.v[v] = static_cast<T>(w * static_cast<A>(g.v[v]));
        store(grad_x + i, out);
      }
      if (a.grad_weights) {
        const Pack<T, V> in = load<T, V>(x + i);
#pragma unroll
        for (int v = 0; v < V; ++v) dot += static_cast<A>(g.v[v]) * static_cast<A>(in.v[v]);
      }
    }
    if (a.grad_weights) {
      const double sum = block_sum(static_cast<double>(dot));
      if (threadIdx.x == 0) static_cast<double*>(a.partial)[blockIdx.x * static_cast<int64_t>(a.count) + k] = sum;
    }
  }
}

// One block a weight: adds the pieces' parts.
template <class T>
__global__ void mixed_sum_backward_finish_kernel(MixedSumArgs a, int64_t pieces) {
  const double* partial = static_cast<const double*>(a.partial) + blockIdx.x;
  double sum = 0;
  for (int64_t p = threadIdx.x; p < pieces; p += blockDim.x) sum += partial[p * a.count];
  sum = block_sum(sum);
  if (threadIdx.x == 0) static_cast<compute_t<T>*>(a.grad_weights)[blockIdx.x] = static_cast<compute_t<T>>(sum);
}
}  // namespace

template <class T>
void mixed_sum(const MixedSumArgs& args, Stream stream) {
  bool vector = aligned(args.y);
  for (int k = 0; k < args.count; ++k) vector &= aligned(args.xs[k]);
  const int64_t threads = vector ? ceil_div(args.n, kVector<T>) : args.n;
  launch("mixed_sum", (args.count + 1) * args.n * static_cast<int64_t>(sizeof(T)),
         vector ? mixed_sum_kernel<T, kVector<T>> : mixed_sum_kernel<T, 1>, dim3(ceil_div(threads, kThreads)),
         dim3(kThreads), stream, args);
}

template <class T>
void mixed_sum_backward(const MixedSumArgs& args, Stream stream) {
  bool vector = aligned(args.grad);
  for (int k = 0; k < args.count; ++k) vector &= aligned(args.xs[k]) && aligned(args.grad_xs[k]);
  const int64_t pieces = mixed_sum_pieces(args.n);
  const int64_t maps = 1 + (args.grad_xs[0] ? args.count : 0) + (args.grad_weights ? args.count : 0);
  launch("mixed_sum_backward", maps * args.n * static_cast<int64_t>(sizeof(T)),
         vector ? mixed_sum_backward_kernel<T, kVector<T>> : mixed_sum_backward_kernel<T, 1>, dim3(pieces),
         dim3(kThreads), stream, args);
  if (!args.grad_weights) return;
  launch("mixed_sum_backward_finish", pieces * args.count * static_cast<int64_t>(sizeof(double)),
         mixed_sum_backward_finish_kernel<T>, dim3(args.count), dim3(kThreads), stream, args, pieces);
}

#define FASTNAS_INSTANTIATE(T)                             \
  template void mixed_sum<T>(const MixedSumArgs&, Stream); \
  template void mixed_sum_backward<T>(const MixedSumArgs&, Stream);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
FASTNAS_INSTANTIATE(Half)
FASTNAS_INSTANTIATE(BFloat16)
}  // namespace fastnas::cuda
