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

// n values as a vector, in the type that they are computed in.
template <class T>
FASTNAS_INLINE Vec<compute_t<T>> load_values(const T* p, int n) {
  if constexpr (std::is_same_v<T, compute_t<T>>) {
    return load_n(p, n);
  } else {
    compute_t<T> lanes[kLanes<compute_t<T>>] = {};
    for (int i = 0; i < n; ++i) lanes[i] = static_cast<compute_t<T>>(p[i]);
    return load(lanes);
  }
}

// What goes past an edge's candidates at n channels: the pixel, or the maxima of a window.
template <class T>
FASTNAS_INLINE Vec<compute_t<T>> bypassing(const T* const (&window)[4], int stride, int64_t c, int n) {
  Vec<compute_t<T>> value = load_values(window[0] + c, n);
  for (int i = 1; stride == 2 && i < 4; ++i) {
    const Vec<compute_t<T>> v = load_values(window[i] + c, n);
    value = (v > value) | (v != v) ? v : value;
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

// scratch: C elements and a vector.
template <class T>
void partial_channels_range(const PartialChannelsArgs& a, compute_t<T>* scratch, int64_t begin, int64_t end) {
  using A = compute_t<T>;
  constexpr int V = kLanes<A>;
  const int64_t active = a.C / a.k;
  A weights[kMaxPartialEdges];
  for (int e = 0; e < a.edges_count; ++e) weights[e] = edge_weight<T>(a, e);
  with_k(a.k, [&](auto k) {
    for (int64_t q = begin; q < end; ++q) {
      const T* mixed = static_cast<const T*>(a.mixed) + q * active;
      const T* window[kMaxPartialEdges][4];
      for (int e = 0; e < a.edges_count; ++e) {
        const int64_t step = a.edges[e].step, down = 2 * a.W * step;
        const T* x = static_cast<const T*>(a.edges[e].map) + first_pixel(q, a.H, a.W, a.edges[e].stride) * step;
        window[e][0] = x, window[e][1] = x + step, window[e][2] = x + down, window[e][3] = x + down + step;
      }
      for (int64_t j = 0; j < active; ++j) scratch[j] = static_cast<A>(mixed[j]);
      for (int64_t c = active; c < a.C; c += V) {
        const int n = static_cast<int>(a.C - c < V ? a.C - c : V);
        Vec<A> sum = splat(weights[0]) * bypassing(window[0], a.edges[0].stride, c, n);
        for (int e = 1; e < a.edges_count; ++e)
          sum += splat(weights[e]) * bypassing(window[e], a.edges[e].stride, c, n);
        store(scratch + c, sum);
      }
      T* y = static_cast<T*>(a.out) + q * a.out_step;
      for (int64_t j = 0; j < active; ++j)
        for (int g = 0; g < k; ++g) y[j * k + g] = static_cast<T>(scratch[g * active + j]);
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

// Everything that x's gradient holds in the pixels of the windows. scratch: 3 times C elements and a vector; dots:
// where the edge weights' gradients are wanted, each edge's product of gradient and what went past its candidates.
template <class T>
void partial_channels_split_backward_range(const PartialChannelsArgs& a, compute_t<T>* scratch, double* dots,
                                           int64_t begin, int64_t end) {
  using A = compute_t<T>;
  constexpr int V = kLanes<A>;
  const int64_t active = a.C / a.k;
  const int stride = a.stride(), pixels = stride * stride;
  A* past = scratch;                 // what went past the candidates
  A* shuffled = scratch + a.C + V;   // the same in the order of the nodes' channels
  A* sum = scratch + 2 * (a.C + V);  // of the gradients, in that order
  A weights[kMaxPartialEdges];
  for (int e = 0; e < a.edges_count; ++e) weights[e] = edge_weight<T>(a, e);
  Vec<A> products[kMaxPartialEdges] = {};
  with_k(a.k, [&](auto k) {
    for (int64_t q = begin; q < end; ++q) {
      const int64_t p = first_pixel(q, a.H / stride, a.W / stride, stride);
      const int64_t at[4] = {p, p + 1, p + a.W, p + a.W + 1};
      const T* window[4];
      for (int i = 0; i < 4; ++i) window[i] = a.x ? static_cast<const T*>(a.x) + at[i] * a.x_step : nullptr;
      const T* const(&values)[4] = window;
      if (dots) {
        for (int64_t c = active; c < a.C; c += V)
          store(past + c, bypassing(values, stride, c, static_cast<int>(a.C - c < V ? a.C - c : V)));
        for (int64_t j = 0; j < active; ++j)
          for (int g = 0; g < k; ++g) shuffled[j * k + g] = g ? past[g * active + j] : A(0);
      }
      for (int64_t c = 0; c < a.C; c += V) {
        const int n = static_cast<int>(a.C - c < V ? a.C - c : V);
        const Vec<A> other = dots ? load_n(shuffled + c, n) : zero<A>();
        Vec<A> total = zero<A>();
        for (int e = 0; e < a.edges_count; ++e) {
          const Vec<A> grad = load_values(static_cast<const T*>(a.edges[e].map) + q * a.edges[e].step + c, n);
          total += splat(weights[e]) * grad;
          products[e] += other * grad;
        }
        store(sum + c, total);
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
  for (int e = 0; dots && e < a.edges_count; ++e) {
    dots[e] = 0;
    for (int i = 0; i < V; ++i) dots[e] += static_cast<double>(products[e][i]);
  }
}

#define FASTNAS_INSTANTIATE(T)                                                                                        \
  template void partial_channels_split_range<T>(const PartialChannelsArgs&, int64_t, int64_t);                        \
  template void partial_channels_range<T>(const PartialChannelsArgs&, compute_t<T>*, int64_t, int64_t);               \
  template void partial_channels_backward_range<T>(const PartialChannelsArgs&, int64_t, int64_t);                     \
  template void partial_channels_split_backward_range<T>(const PartialChannelsArgs&, compute_t<T>*, double*, int64_t, \
                                                         int64_t);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
FASTNAS_INSTANTIATE(Half)
FASTNAS_INSTANTIATE(BFloat16)
#undef FASTNAS_INSTANTIATE
