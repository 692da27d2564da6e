// Every function works on a range of pixels; channels are innermost. The output's channel j * k + g is channel
// g * active + j of the concatenation: a pixel is transposed from (k, active) to (active, k).

template <class T>
void partial_channels_split_range(const PartialChannelsArgs& a, int64_t begin, int64_t end) {
  const int64_t active = a.C / a.k;
  for (int64_t p = begin; p < end; ++p)
    std::memcpy(static_cast<T*>(a.out) + p * active, static_cast<const T*>(a.x) + p * a.C, active * sizeof(T));
}

// The first pixel of x that output pixel q covers.
inline int64_t first_pixel(const PartialChannelsArgs& a, int64_t q) {
  if (a.stride == 1) return q;
  const int64_t OW = a.W / 2, OH = a.H / 2;
  const int64_t w = q % OW, h = q / OW % OH, n = q / OW / OH;
  return (n * a.H + 2 * h) * a.W + 2 * w;
}

// Which of the four pixels of a window holds channel c's maximum: the first in scan order, and NaN beats numbers.
template <class T>
FASTNAS_INLINE int argmax(const T* const (&window)[4], int64_t c) {
  int best = 0;
  compute_t<T> value = static_cast<compute_t<T>>(window[0][c]);
  for (int i = 1; i < 4; ++i) {
    const compute_t<T> v = static_cast<compute_t<T>>(window[i][c]);
    if (v > value || v != v) value = v, best = i;
  }
  return best;
}

// Calls body with k as a constant where it is a usual one.
template <class Body>
FASTNAS_INLINE void with_k(int k, Body body) {
  if (k == 2) return body(std::integral_constant<int, 2>());
  if (k == 4) return body(std::integral_constant<int, 4>());
  body(k);
}

template <class T>
void partial_channels_range(const PartialChannelsArgs& a, int64_t begin, int64_t end) {
  const int64_t active = a.C / a.k;
  with_k(a.k, [&](auto k) {
    for (int64_t q = begin; q < end; ++q) {
      const T* mixed = static_cast<const T*>(a.mixed) + q * active;
      const T* x = static_cast<const T*>(a.x) + first_pixel(a, q) * a.C;
      T* y = static_cast<T*>(a.out) + q * a.C;
      for (int64_t j = 0; j < active; ++j) y[j * k] = mixed[j];
      if (a.stride == 1) {
        for (int64_t j = 0; j < active; ++j)
          for (int g = 1; g < k; ++g) y[j * k + g] = x[g * active + j];
        continue;
      }
      const T* const window[4] = {x, x + a.C, x + a.W * a.C, x + (a.W + 1) * a.C};
      for (int64_t j = 0; j < active; ++j)
        for (int g = 1; g < k; ++g) y[j * k + g] = window[argmax(window, g * active + j)][g * active + j];
    }
  });
}

template <class T>
void partial_channels_backward_range(const PartialChannelsArgs& a, int64_t begin, int64_t end) {
  const int64_t active = a.C / a.k;
  with_k(a.k, [&](auto k) {
    for (int64_t q = begin; q < end; ++q) {
      const T* grad = static_cast<const T*>(a.grad) + q * a.C;
      T* out = static_cast<T*>(a.out) + q * active;
      for (int64_t j = 0; j < active; ++j) out[j] = grad[j * k];
    }
  });
}

// One output pixel: everything that x's gradient holds in the pixels that it covers.
template <class T>
void partial_channels_split_backward_range(const PartialChannelsArgs& a, int64_t begin, int64_t end) {
  const int64_t active = a.C / a.k;
  const int pixels = a.stride * a.stride;
  with_k(a.k, [&](auto k) {
    for (int64_t q = begin; q < end; ++q) {
      const int64_t p = first_pixel(a, q);
      const int64_t window[4] = {p, p + 1, p + a.W, p + a.W + 1};
      T* out[4] = {};
      for (int i = 0; i < pixels; ++i) {
        out[i] = static_cast<T*>(a.out) + window[i] * a.C;
        if (a.grad_active)
          std::memcpy(out[i], static_cast<const T*>(a.grad_active) + window[i] * active, active * sizeof(T));
        else
          std::memset(static_cast<void*>(out[i]), 0, active * sizeof(T));
      }
      if (!a.grad || a.stride == 2)
        for (int i = 0; i < pixels; ++i)
          std::memset(static_cast<void*>(out[i] + active), 0, (a.C - active) * sizeof(T));
      if (!a.grad) continue;
      const T* grad = static_cast<const T*>(a.grad) + q * a.C;
      if (a.stride == 1) {
        for (int g = 1; g < k; ++g)
          for (int64_t j = 0; j < active; ++j) out[0][g * active + j] = grad[j * k + g];
        continue;
      }
      const T* x = static_cast<const T*>(a.x);
      const T* const values[4] = {x + window[0] * a.C, x + window[1] * a.C, x + window[2] * a.C, x + window[3] * a.C};
      for (int g = 1; g < k; ++g)
        for (int64_t j = 0; j < active; ++j) out[argmax(values, g * active + j)][g * active + j] = grad[j * k + g];
    }
  });
}

#define FASTNAS_INSTANTIATE(T)                                                                    \
  template void partial_channels_split_range<T>(const PartialChannelsArgs&, int64_t, int64_t);    \
  template void partial_channels_range<T>(const PartialChannelsArgs&, int64_t, int64_t);          \
  template void partial_channels_backward_range<T>(const PartialChannelsArgs&, int64_t, int64_t); \
  template void partial_channels_split_backward_range<T>(const PartialChannelsArgs&, int64_t, int64_t);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
FASTNAS_INSTANTIATE(Half)
FASTNAS_INSTANTIATE(BFloat16)
#undef FASTNAS_INSTANTIATE
