#include "partial_channels.h"

#include "cuda/launch.cuh"

namespace fastnas::cuda {
namespace {
// A row of threads works on a pixel; neighbours take neighbouring channels.
template <class T>
__global__ void partial_channels_split_kernel(PartialChannelsArgs a) {
  const int64_t active = a.C / a.k;
  const int64_t p = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y;
  if (p >= a.pixels()) return;
  for (int64_t c = threadIdx.x; c < active; c += blockDim.x)
    static_cast<T*>(a.out)[p * active + c] = static_cast<const T*>(a.x)[p * a.C + c];
}

// The first pixel of x that output pixel q covers.
template <int S>
__device__ inline int64_t first_pixel(const PartialChannelsArgs& a, int64_t q) {
  if (S == 1) return q;
  const int64_t OW = a.W / S, row = q / OW;  // H is a multiple of S: rows of windows run on through the images
  return row * S * a.W + (q - row * OW) * S;
}

// Which of the window's pixels (0, 1 above; 2, 3 below) holds the maximum: the first in scan order, and NaN beats
// numbers.
template <class T>
__device__ inline int argmax(const T* x, int64_t right, int64_t down) {
  int best = 0;
  compute_t<T> value = static_cast<compute_t<T>>(x[0]);
#pragma unroll
  for (int i = 1; i < 4; ++i) {
    const compute_t<T> v = static_cast<compute_t<T>>(x[i / 2 * down + i % 2 * right]);
    if (v > value || v != v) value = v, best = i;
  }
  return best;
}

template <class T, int S>
__global__ void partial_channels_kernel(PartialChannelsArgs a) {
  const int active = static_cast<int>(a.C / a.k);
  const int64_t q = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y;
  if (q >= a.windows()) return;
  const T* mixed = static_cast<const T*>(a.mixed) + q * active;
  const T* x = static_cast<const T*>(a.x) + first_pixel<S>(a, q) * a.C;
  T* y = static_cast<T*>(a.out) + q * a.C;
  const int64_t right = a.C, down = a.W * a.C;
  for (int c = threadIdx.x; c < a.C; c += blockDim.x) {
    const int j = c / a.k, g = c - j * a.k;
    if (g == 0) {
      y[c] = mixed[j];
      continue;
    }
    const T* source = x + g * active + j;
    const int best = S == 1 ? 0 : argmax(source, right, down);
    y[c] = source[best / 2 * down + best % 2 * right];
  }
}

template <class T>
__global__ void partial_channels_backward_kernel(PartialChannelsArgs a) {
  const int64_t active = a.C / a.k;
  const int64_t q = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y;
  if (q >= a.windows()) return;
  for (int64_t j = threadIdx.x; j < active; j += blockDim.x)
    static_cast<T*>(a.out)[q * active + j] = static_cast<const T*>(a.grad)[q * a.C + j * a.k];
}

// One row of threads an output pixel: everything that x's gradient holds in the S x S pixels that it covers.
template <class T, int S>
__global__ void partial_channels_split_backward_kernel(PartialChannelsArgs a) {
  const int active = static_cast<int>(a.C / a.k);
  const int64_t q = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y;
  if (q >= a.windows()) return;
  const int64_t p = first_pixel<S>(a, q);
  const T* x = static_cast<const T*>(a.x);
  const T* grad = static_cast<const T*>(a.grad);
  const T* grad_active = static_cast<const T*>(a.grad_active);
  T* out = static_cast<T*>(a.out);
  for (int c = threadIdx.x; c < a.C; c += blockDim.x) {
    const int g = c / active, j = c - g * active;
    T value = T(0);
    int best = 0;
    if (g > 0 && grad) {
      value = grad[q * a.C + static_cast<int64_t>(j) * a.k + g];
      if (S == 2) best = argmax(x + p * a.C + c, a.C, a.W * a.C);
    }
#pragma unroll
    for (int i = 0; i < S * S; ++i) {
      const int64_t pixel = p + i / S * a.W + i % S;
      if (g == 0)
        out[pixel * a.C + c] = grad_active ? grad_active[pixel * active + c] : T(0);
      else
        out[pixel * a.C + c] = i == best ? value : T(0);
    }
  }
}

void launch_pixels(const char* name, int64_t bytes, void (*kernel)(PartialChannelsArgs), int64_t pixels,
                   int64_t channels, const PartialChannelsArgs& args, Stream stream) {
  const dim3 block = pixel_block(channels);
  launch(name, bytes, kernel, dim3(ceil_div(pixels, block.y)), block, stream, args);
}
}  // namespace

template <class T>
void partial_channels_split(const PartialChannelsArgs& args, Stream stream) {
  launch_pixels("partial_channels_split", partial_channels_split_bytes(args, sizeof(T)),
                partial_channels_split_kernel<T>, args.pixels(), args.C / args.k, args, stream);
}

template <class T>
void partial_channels_split_backward(const PartialChannelsArgs& args, Stream stream) {
  launch_pixels(
      "partial_channels_split_backward", partial_channels_split_backward_bytes(args, sizeof(T)),
      args.stride == 1 ? partial_channels_split_backward_kernel<T, 1> : partial_channels_split_backward_kernel<T, 2>,
      args.windows(), args.C, args, stream);
}

template <class T>
void partial_channels(const PartialChannelsArgs& args, Stream stream) {
  launch_pixels("partial_channels", partial_channels_bytes(args, sizeof(T)),
                args.stride == 1 ? partial_channels_kernel<T, 1> : partial_channels_kernel<T, 2>, args.windows(),
                args.C, args, stream);
}

template <class T>
void partial_channels_backward(const PartialChannelsArgs& args, Stream stream) {
  launch_pixels("partial_channels_backward", partial_channels_backward_bytes(args, sizeof(T)),
                partial_channels_backward_kernel<T>, args.windows(), args.C / args.k, args, stream);
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
