#include "partial_channels.h"

#include "cuda/launch.cuh"

namespace fastnas::cuda {
namespace {
constexpr int kBlock = 256;
constexpr int64_t kMaxDotBlocks = 1024;  // of the kernel that also computes products: each block leaves its own

// A row of threads works on a pixel; neighbours take neighbouring channels.
template <class T>
__global__ void partial_channels_split_kernel(const __grid_constant__ PartialChannelsArgs a) {
  const int64_t active = a.C / a.k;
  const int64_t p = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y;
  if (p >= a.pixels()) return;
  for (int64_t c = threadIdx.x; c < active; c += blockDim.x)
    static_cast<T*>(a.out)[p * active + c] = static_cast<const T*>(a.x)[p * a.x_step + c];
}

// The first pixel that window q covers, in rows of `columns` windows.
__device__ inline int64_t first_pixel(int64_t q, int64_t columns, int stride) {
  if (stride == 1) return q;
  const int64_t row = q / columns;  // heights are multiples of the stride: rows run on through the images
  return (row * stride * columns + (q - row * columns)) * stride;
}

// The maximum of the window's pixels (0, 1 above; 2, 3 below), and which one holds it: the first in scan order, and NaN
// beats numbers.
template <class T>
struct Maximum {
  compute_t<T> value;
  int place = 0;
  __device__ Maximum(const T* x, int64_t right, int64_t down) : value(static_cast<compute_t<T>>(x[0])) {
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      const compute_t<T> v = static_cast<compute_t<T>>(x[i / 2 * down + i % 2 * right]);
      if (v > value || v != v) value = v, place = i;
    }
  }
};

template <class T>
__device__ inline compute_t<T> edge_weight(const PartialChannelsArgs& a, int e) {
  return a.edge_weights ? static_cast<const compute_t<T>*>(a.edge_weights)[a.edges[e].weight] : compute_t<T>(1);
}

template <class T>
__global__ void partial_channels_kernel(const __grid_constant__ PartialChannelsArgs a) {
  using A = compute_t<T>;
  const int active = static_cast<int>(a.C / a.k);
  const int64_t q = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y;
  if (q >= a.pixels()) return;
  const T* mixed = static_cast<const T*>(a.mixed) + q * active;
  T* y = static_cast<T*>(a.out) + q * a.out_step;
  for (int c = threadIdx.x; c < a.C; c += blockDim.x) {
    const int j = c / a.k, g = c - j * a.k;
    if (g == 0) {
      y[c] = mixed[j];
      continue;
    }
    A sum = 0;
    for (int e = 0; e < a.edges_count; ++e) {
      const PartialEdge& edge = a.edges[e];
      const T* x = static_cast<const T*>(edge.map) + first_pixel(q, a.W, edge.stride) * edge.step + g * active + j;
      sum += edge_weight<T>(a, e) *
             (edge.stride == 1 ? static_cast<A>(*x) : Maximum<T>(x, edge.step, 2 * a.W * edge.step).value);
    }
    y[c] = static_cast<T>(sum);
  }
}

template <class T>
__global__ void partial_channels_backward_kernel(const __grid_constant__ PartialChannelsArgs a) {
  const int64_t active = a.C / a.k;
  const int64_t q = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y;
  if (q >= a.pixels()) return;
  const T* grad = static_cast<const T*>(a.edges[0].map) + q * a.edges[0].step;
  for (int64_t j = threadIdx.x; j < active; j += blockDim.x) static_cast<T*>(a.out)[q * active + j] = grad[j * a.k];
}

// A row of `columns` threads takes one window at a time: everything that x's gradient holds in the S x S pixels that
// it covers, and where D, the products of the edges' gradients with what bypassed their candidates.
template <class T, int S, bool D>
__global__ void __launch_bounds__(kBlock, 2)  // registers enough for 2 blocks, so that nothing is spilled
    partial_channels_split_backward_kernel(const __grid_constant__ PartialChannelsArgs a, const int columns) {
  using A = compute_t<T>;
  const int active = static_cast<int>(a.C / a.k), rows = kBlock / columns;
  const int column = static_cast<int>(threadIdx.x) % columns, row = static_cast<int>(threadIdx.x) / columns;
  const T* grad_active = static_cast<const T*>(a.grad_active);
  const T* grad_add = static_cast<const T*>(a.grad_add);
  T* out = static_cast<T*>(a.out);
  A dots[kMaxPartialEdges] = {};
  for (int64_t q = blockIdx.x * static_cast<int64_t>(rows) + row; q < a.windows();
       q += static_cast<int64_t>(gridDim.x) * rows) {
    const int64_t p = first_pixel(q, a.W / S, S);
    for (int c = column; c < a.C; c += columns) {
      const int g = c / active, j = c - g * active;
      A value = 0, bypass = 0;
      int best = 0;
      if (g > 0) {
        const T* x = static_cast<const T*>(a.x) + p * a.x_step + c;
        if (S == 2 && a.edges_count > 0) {
          const Maximum<T> most(x, a.x_step, a.W * a.x_step);
          bypass = most.value, best = most.place;
        } else if (D) {
          bypass = static_cast<A>(*x);
        }
        auto add = [&](int e) {
          const T* from = static_cast<const T*>(a.edges[e].map) + q * a.edges[e].step;
          const A grad = static_cast<A>(from[static_cast<int64_t>(j) * a.k + g]);
          value += edge_weight<T>(a, e) * grad;
          if constexpr (D) dots[e] += grad * bypass;
        };
        if constexpr (D) {
#pragma unroll
          for (int e = 0; e < kMaxPartialEdges; ++e)  // the products stay in registers
            if (e < a.edges_count) add(e);
        } else {
          for (int e = 0; e < a.edges_count; ++e) add(e);
        }
      }
      if (!out) continue;
#pragma unroll
      for (int i = 0; i < S * S; ++i) {
        const int64_t pixel = p + i / S * a.W + i % S;
        A sum = i == best ? value : A(0);
        if (g == 0 && grad_active) sum = static_cast<A>(grad_active[pixel * active + c]);
        if (S == 1 && grad_add) sum += static_cast<A>(grad_add[pixel * a.grad_add_step + c]);
        out[pixel * a.out_step + c] = static_cast<T>(sum);
      }
    }
  }
  if constexpr (D) {
#pragma unroll
    for (int e = 0; e < kMaxPartialEdges; ++e) {
      const double sum = block_sum(static_cast<double>(dots[e]));
      if (threadIdx.x == 0) static_cast<double*>(a.workspace)[blockIdx.x * kMaxPartialEdges + e] = sum;
    }
  }
}

// Adds the blocks' products, an edge a block.
template <class A>
__global__ void __launch_bounds__(kBlock)
    partial_channels_finish_kernel(const __grid_constant__ PartialChannelsArgs a, const int64_t blocks) {
  const int e = static_cast<int>(blockIdx.x);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kBlock)
    sum += static_cast<const double*>(a.workspace)[i * kMaxPartialEdges + e];
  sum = block_sum(sum);
  if (threadIdx.x == 0) static_cast<A*>(a.grad_edge_weights)[a.edges[e].weight] = static_cast<A>(sum);
}

void launch_pixels(const char* name, int64_t bytes, void (*kernel)(PartialChannelsArgs), int64_t channels,
                   const PartialChannelsArgs& args, Stream stream) {
  const dim3 block = pixel_block(channels);
  launch(name, bytes, kernel, dim3(ceil_div(args.pixels(), block.y)), block, stream, args);
}

// Blocks of split_backward; every thread has one window where no products are wanted.
int64_t backward_blocks(const PartialChannelsArgs& a) {
  const int64_t blocks = ceil_div(a.windows(), pixel_block(a.C).y);
  return a.grad_edge_weights && blocks > kMaxDotBlocks ? kMaxDotBlocks : blocks;
}
}  // namespace

template <class T>
void partial_channels_split(const PartialChannelsArgs& args, Stream stream) {
  launch_pixels("partial_channels_split", partial_channels_split_bytes(args, sizeof(T)),
                partial_channels_split_kernel<T>, args.C / args.k, args, stream);
}

int64_t partial_channels_workspace(const PartialChannelsArgs& args) {
  return args.grad_edge_weights ? backward_blocks(args) * kMaxPartialEdges * static_cast<int64_t>(sizeof(double)) : 0;
}

template <class T>
void partial_channels_split_backward(const PartialChannelsArgs& args, Stream stream) {
  const bool dots = args.grad_edge_weights && args.edges_count > 0, one = args.stride() == 1;
  auto* kernel = one    ? dots ? partial_channels_split_backward_kernel<T, 1, true>
                               : partial_channels_split_backward_kernel<T, 1, false>
                 : dots ? partial_channels_split_backward_kernel<T, 2, true>
                        : partial_channels_split_backward_kernel<T, 2, false>;
  const int64_t blocks = backward_blocks(args);
  launch("partial_channels_split_backward",
         partial_channels_split_backward_bytes(args, sizeof(T)) + partial_channels_workspace(args), kernel,
         dim3(blocks), dim3(kBlock), stream, args, static_cast<int>(pixel_block(args.C).x));
  if (dots)
    launch("partial_channels_finish", partial_channels_workspace(args), partial_channels_finish_kernel<compute_t<T>>,
           dim3(args.edges_count), dim3(kBlock), stream, args, blocks);
}

template <class T>
void partial_channels(const PartialChannelsArgs& args, Stream stream) {
  launch_pixels("partial_channels", partial_channels_bytes(args, sizeof(T)), partial_channels_kernel<T>, args.C, args,
                stream);
}

template <class T>
void partial_channels_backward(const PartialChannelsArgs& args, Stream stream) {
  launch_pixels("partial_channels_backward", partial_channels_backward_bytes(args, sizeof(T)),
                partial_channels_backward_kernel<T>, args.C / args.k, args, stream);
}

#define FASTNAS_INSTANTIATE(T)                                                          \
  template void partial_channels_split<T>(const PartialChannelsArgs&, Stream);          \
  template void partial_channels_split_backward<T>(const PartialChannelsArgs&, Stream); \
  template void partial_channels<T>(const PartialChannelsArgs&, Stream);                \
  template void partial_channels_backward<T>(const PartialChannelsArgs&, Stream);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
FASTNAS_INSTANTIATE(Half)
FASTNAS_INSTANTIATE(BFloat16)
}  // namespace fastnas::cuda
