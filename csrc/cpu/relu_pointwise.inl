// CPU kernels of relu_pointwise. Forward, input gradient and weight gradient are one product over register tiles.

// tile[r][j] = sum over k < n of left[r * row + k * column] * (the vector at right + k * step + j * block).
template <class T, int R, int J>
FASTNAS_INLINE void product(const T* left, int64_t row, int64_t column, const T* right, int64_t step, int64_t block,
                            int64_t n, Vec<T> (&tile)[R][J]) {
  clear_tile<T>(tile);
  multiply_add<T>(left, row, column, right, step, block, n, tile);
}

// The pixels of x that group 0 reads for n pixels of z.
inline void source_pixels(const ReluPointwiseArgs& a, int64_t first, int n, int64_t* at) {
  const int64_t width = a.W / a.stride;
  int64_t column = first % width, source = a.source(first);
  for (int i = 0; i < n; ++i) {
    at[i] = source;
    source += a.stride;
    if (++column == width) column = 0, source += (a.stride - 1) * a.W;
  }
}

// relu of the listed pixels, `offset` pixels further; zeros past the last channel.
template <class T>
void activate(const PointwiseRun<T>& run, const int64_t* at, int64_t offset, int n, T* out) {
  constexpr int V = kLanes<T>;
  const int64_t C = run.args->in;
  for (int i = 0; i < n; ++i) {
    const T* x = static_cast<const T*>(run.args->x) + (at[i] + offset) * C;
    T* to = out + i * run.row;
    int64_t c = 0;
    auto positive = [](Vec<T> v) FASTNAS_LAMBDA_INLINE { return v < zero<T>() ? zero<T>() : v; };  // NaN passes
    for (; c + V <= C; c += V) store(to + c, positive(load(x + c)));
    if (c < C) store(to + c, positive(load_n(x + c, lanes_at<T>(c, C))));
  }
}

template <class T>
void relu_pointwise_chunks(const PointwiseRun<T>& run, T* scratch, int64_t begin, int64_t end) {
  constexpr int V = kLanes<T>;
  const ReluPointwiseArgs& a = *run.args;
  int64_t at[kPointwiseChunk];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kPointwiseChunk;
    const int n = static_cast<int>(std::min<int64_t>(kPointwiseChunk, a.pixels() - first));
    source_pixels(a, first, n, at);
    for (int g = 0; g < a.groups; ++g) {
      activate(run, at, a.offset(g), n, scratch);
      const int64_t out = a.out(g), channels = a.channels;
      T* z = static_cast<T*>(a.z) + first * channels + a.begin[g];
      tile_vectors((out + V - 1) / V, [&](auto vectors, int64_t b) FASTNAS_LAMBDA_INLINE {
        tile_rows(n, [&](auto rows, int64_t p) FASTNAS_LAMBDA_INLINE {
          constexpr int R = decltype(rows)::value, J = decltype(vectors)::value;
          Vec<T> tile[R][J];
          product<T, R, J>(scratch + p * run.row, run.row, 1, run.weights[g] + b * a.in * V, V, a.in * V, a.in, tile);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int j = 0; j < J; ++j) {
              const int64_t c = (b + j) * V;
              store_n(z + (p + r) * channels + c, tile[r][j], lanes_at<T>(c, out));
            }
        });
      });
    }
  }
}

// Adds n pixels' part of one group's weight gradient: grad times relu(x), which scratch holds.
template <class T>
void add_weight_gradient(const PointwiseRun<T>& run, const T* grad, int64_t out, int n, const T* scratch, T* sums) {
  constexpr int V = kLanes<T>;
  tile_vectors(run.padded / V, [&](auto vectors, int64_t b) FASTNAS_LAMBDA_INLINE {
    tile_rows(out, [&](auto rows, int64_t o) FASTNAS_LAMBDA_INLINE {
      constexpr int R = decltype(rows)::value, J = decltype(vectors)::value;
      Vec<T> tile[R][J];
      product<T, R, J>(grad + o, 1, run.args->channels, scratch + b * V, run.row, V, n, tile);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int j = 0; j < J; ++j) {
          T* to = sums + (o + r) * run.padded + (b + j) * V;
          store(to, load(to) + tile[r][j]);
        }
    });
  });
}

// The gradient of the pixels of x that one group reads.
template <class T>
void input_gradient(const PointwiseRun<T>& run, int group, const T* grad, const int64_t* at, int n) {
  constexpr int V = kLanes<T>;
  const ReluPointwiseArgs& a = *run.args;
  const int64_t out = a.out(group), offset = a.offset(group);
  tile_vectors(run.padded / V, [&](auto vectors, int64_t b) FASTNAS_LAMBDA_INLINE {
    tile_rows(n, [&](auto rows, int64_t p) FASTNAS_LAMBDA_INLINE {
      constexpr int R = decltype(rows)::value, J = decltype(vectors)::value;
      Vec<T> tile[R][J];
      product<T, R, J>(grad + p * a.channels, a.channels, 1, run.weights[group] + b * out * V, V, out * V, out, tile);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int64_t pixel = (at[p + r] + offset) * a.in;
#pragma GCC unroll 3
        for (int j = 0; j < J; ++j) {
          const int64_t c = (b + j) * V;
          const T* x = static_cast<const T*>(a.x) + pixel + c;
          T* to = static_cast<T*>(a.grad_x) + pixel + c;
          if (c + V <= a.in)
            store(to, load(x) <= zero<T>() ? zero<T>() : tile[r][j]);
          else
            store_n(to, load_n(x, lanes_at<T>(c, a.in)) <= zero<T>() ? zero<T>() : tile[r][j], lanes_at<T>(c, a.in));
        }
      }
    });
  });
}

template <class T>
void relu_pointwise_backward_slots(const PointwiseRun<T>& run, T* scratch, int64_t begin, int64_t end) {
  const ReluPointwiseArgs& a = *run.args;
  int64_t at[kPointwiseChunk];
  for (int64_t slot = begin; slot < end; ++slot) {
    T* sums = run.partial + slot * a.channels * run.padded;
    if (a.grad_weights[0]) std::memset(sums, 0, a.channels * run.padded * sizeof(T));
    for (int64_t chunk = run.first_chunk(slot); chunk < run.first_chunk(slot + 1); ++chunk) {
      const int64_t first = chunk * kPointwiseChunk;
      const int n = static_cast<int>(std::min<int64_t>(kPointwiseChunk, a.pixels() - first));
      source_pixels(a, first, n, at);
      for (int g = 0; g < a.groups; ++g) {
        const T* grad = static_cast<const T*>(a.grad) + first * a.channels + a.begin[g];
        if (a.grad_weights[0]) {
          activate(run, at, a.offset(g), n, scratch);
          add_weight_gradient(run, grad, a.out(g), n, scratch, sums + a.begin[g] * run.padded);
        }
        if (a.grad_x) input_gradient(run, g, grad, at, n);
      }
      if (!a.grad_x || a.stride == 1) continue;
      for (int i = 0; i < n; ++i) {  // the pixels that no group reads
        T* window = static_cast<T*>(a.grad_x) + at[i] * a.in;
        std::memset(window + a.in, 0, a.in * sizeof(T));
        std::memset(window + a.W * a.in, 0, a.in * sizeof(T));
        if (a.groups == 1) std::memset(window + a.offset(1) * a.in, 0, a.in * sizeof(T));
      }
    }
  }
}

// Adds the slots, for output channels [begin, end).
template <class T>
void relu_pointwise_backward_finish(const PointwiseRun<T>& run, int64_t begin, int64_t end) {
  constexpr int V = kLanes<T>;
  const ReluPointwiseArgs& a = *run.args;
  for (int64_t o = begin; o < end; ++o) {
    const int g = o < a.begin[1] ? 0 : 1;
    T* to = static_cast<T*>(a.grad_weights[g]) + (o - a.begin[g]) * a.in;
    for (int64_t c = 0; c < a.in; c += V) {
      const T* from = run.partial + o * run.padded + c;
      Vec<T> sum = load(from);
      for (int64_t slot = 1; slot < run.slots; ++slot) sum += load(from + slot * a.channels * run.padded);
      store_n(to + c, sum, lanes_at<T>(c, a.in));
    }
  }
}

#define FASTNAS_INSTANTIATE(T)                                                                  \
  template void relu_pointwise_chunks<T>(const PointwiseRun<T>&, T*, int64_t, int64_t);         \
  template void relu_pointwise_backward_slots<T>(const PointwiseRun<T>&, T*, int64_t, int64_t); \
  template void relu_pointwise_backward_finish<T>(const PointwiseRun<T>&, int64_t, int64_t);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
#undef FASTNAS_INSTANTIATE
