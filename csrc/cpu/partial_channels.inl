// Every function works on a range of pixels; channels are innermost. A node's channel j * k + g is channel
// g * active + j of the concatenation: a pixel is transposed from (k, active) to (active, k).

template <class T>
void partial_channels_split_range(const PartialChannelsArgs& a, int64_t begin, int64_t end) {
  const int64_t active = a.C / a.k;
  for (int64_t p = begin; p < end; ++p)
    std::memcpy(static_cast<T*>(a.out) + p * active, static_cast<const T*>(a.x) + p * a.x_step, active * sizeof(T));
}

// The first pixel that window q covers, in images of h x w windows.
inline int64_t first_pixel(int64_t q, int64_t h, int64_t w, int stride) {
  if (stride == 1) return q;
  const int64_t column = q % w, row = q / w % h, n = q / w / h;
  return ((n * h + row) * 2 * w + column) * 2;
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
template <class T>
FASTNAS_INLINE compute_t<T> maximum(const T* const (&window)[4], int64_t c) {
  compute_t<T> value = static_cast<compute_t<T>>(window[0][c]);
  for (int i = 1; i < 4; ++i) {
    const compute_t<T> v = static_cast<compute_t<T>>(window[i][c]);
    value = v > value || v != v ? v : value;
  }
  return value;
}

// Calls body with k as a constant where it is a usual one.
template <class Body>
FASTNAS_INLINE void with_k(int k, Body body) {
  if (k == 2) return body(std::integral_constant<int, 2>());
  if (k == 4) return body(std::integral_constant<int, 4>());
  body(k);
}

template <class T>
FASTNAS_INLINE compute_t<T> edge_weight(const PartialChannelsArgs& a, int e) {
  return a.edge_weights ? static_cast<const compute_t<T>*>(a.edge_weights)[a.edges[e].weight] : compute_t<T>(1);
}

// scratch: C elements.
template <class T>
void partial_channels_range(const PartialChannelsArgs& a, compute_t<T>* scratch, int64_t begin, int64_t end) {
  using A = compute_t<T>;
  const int64_t active = a.C / a.k;
  A* __restrict__ sum = scratch;
  with_k(a.k, [&](auto k) {
    for (int64_t q = begin; q < end; ++q) {
      const T* mixed = static_cast<const T*>(a.mixed) + q * active;
      for (int64_t j = 0; j < active; ++j) sum[j] = static_cast<A>(mixed[j]);
      for (int e = 0; e < a.edges_count; ++e) {
        const PartialEdge& edge = a.edges[e];
        const int64_t right = edge.step, down = 2 * a.W * edge.step;
        const T* x = static_cast<const T*>(edge.map) + first_pixel(q, a.H, a.W, edge.stride) * edge.step;
        const T* const window[4] = {x, x + right, x + down, x + down + right};
        const A weight = edge_weight<T>(a, e);
        auto add = [&](auto value) FASTNAS_LAMBDA_INLINE {
          if (e == 0)
            for (int64_t c = active; c < a.C; ++c) sum[c] = weight * value(c);
          else
            for (int64_t c = active; c < a.C; ++c) sum[c] += weight * value(c);
        };
        edge.stride == 1 ? add([&](int64_t c) FASTNAS_LAMBDA_INLINE { return static_cast<A>(x[c]); })
                         : add([&](int64_t c) FASTNAS_LAMBDA_INLINE { return maximum(window, c); });
      }
      T* y = static_cast<T*>(a.out) + q * a.out_step;
      for (int64_t j = 0; j < active; ++j)
        for (int g = 0; g < k; ++g) y[j * k + g] = static_cast<T>(sum[g * active + j]);
    }
  });
}

template <class T>
void partial_channels_backward_range(const PartialChannelsArgs& a, int64_t begin, int64_t end) {
  const int64_t active = a.C / a.k;
  with_k(a.k, [&](auto k) {
    for (int64_t q = begin; q < end; ++q) {
      const T* grad = static_cast<const T*>(a.edges[0].map) + q * a.edges[0].step;
      T* out = static_cast<T*>(a.out) + q * active;
      for (int64_t j = 0; j < active; ++j) out[j] = grad[j * k];
    }
  });
}

// One window: everything that x's gradient holds in the pixels that it covers. scratch: 2 C elements; dots: to each
// edge's entry the product of its gradient with what bypassed its candidates is added.
template <class T>
void partial_channels_split_backward_range(const PartialChannelsArgs& a, compute_t<T>* scratch, double* dots,
                                           int64_t begin, int64_t end) {
  using A = compute_t<T>;
  const int64_t active = a.C / a.k;
  const int stride = a.stride(), pixels = stride * stride;
  A* __restrict__ sum = scratch;  // both in the order of the nodes' channels
  A* __restrict__ bypass = scratch + a.C;
  with_k(a.k, [&](auto k) {
    for (int64_t q = begin; q < end; ++q) {
      const int64_t p = first_pixel(q, a.H / stride, a.W / stride, stride);
      const int64_t at[4] = {p, p + 1, p + a.W, p + a.W + 1};
      const T* window[4];
      for (int i = 0; i < 4; ++i) window[i] = a.x ? static_cast<const T*>(a.x) + at[i] * a.x_step : nullptr;
      const T* const(&values)[4] = window;
      for (int64_t c = 0; c < a.C; ++c) sum[c] = A(0);
      if (a.grad_edge_weights)
        for (int64_t j = 0; j < active; ++j) {
          bypass[j * k] = A(0);
          for (int g = 1; g < k; ++g) {
            const int64_t c = g * active + j;
            bypass[j * k + g] = stride == 1 ? static_cast<A>(values[0][c]) : maximum(values, c);
          }
        }
      for (int e = 0; e < a.edges_count; ++e) {
        const T* grad = static_cast<const T*>(a.edges[e].map) + q * a.edges[e].step;
        const A weight = edge_weight<T>(a, e);
        for (int64_t c = 0; c < a.C; ++c) sum[c] += weight * static_cast<A>(grad[c]);
        if (!a.grad_edge_weights) continue;
        A dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < a.C; ++c) dot += bypass[c] * static_cast<A>(grad[c]);
        dots[e] += static_cast<double>(dot);
      }
      if (!a.out) continue;
      for (int i = 0; i < pixels; ++i) {
        T* out = static_cast<T*>(a.out) + at[i] * a.out_step;
        if (a.grad_active)
          std::memcpy(out, static_cast<const T*>(a.grad_active) + at[i] * active, active * sizeof(T));
        else
          std::memset(static_cast<void*>(out), 0, active * sizeof(T));
        if (stride == 2) std::memset(static_cast<void*>(out + active), 0, (a.C - active) * sizeof(T));
      }
      T* out = static_cast<T*>(a.out) + p * a.out_step;
      auto scatter = [&](auto place) FASTNAS_LAMBDA_INLINE {
        for (int g = 1; g < k; ++g)
          for (int64_t j = 0; j < active; ++j) {
            const int64_t c = g * active + j;
            out[place(c) * a.out_step + c] = static_cast<T>(sum[j * k + g]);
          }
      };
      stride == 1 ? scatter([](int64_t) { return 0; })
                  : scatter([&](int64_t c) FASTNAS_LAMBDA_INLINE { return at[argmax(values, c)] - p; });
      if (!a.grad_add) continue;
      const T* add = static_cast<const T*>(a.grad_add) + p * a.grad_add_step;
      for (int64_t c = 0; c < a.C; ++c) out[c] = static_cast<T>(static_cast<A>(out[c]) + static_cast<A>(add[c]));
    }
  });
}

#define FASTNAS_INSTANTIATE(T)                                                                    \
  template void partial_channels_split_range<T>(const PartialChannelsArgs&, int64_t, int64_t);    \
  template void partial_channels_range<T>(const PartialChannelsArgs&, compute_t<T>*, int64_t, int64_t); \
  template void partial_channels_backward_range<T>(const PartialChannelsArgs&, int64_t, int64_t); \
  template void partial_channels_split_backward_range<T>(const PartialChannelsArgs&, compute_t<T>*, double*, int64_t, int64_t);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
FASTNAS_INSTANTIATE(Half)
FASTNAS_INSTANTIATE(BFloat16)
#undef FASTNAS_INSTANTIATE
