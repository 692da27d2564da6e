// CPU kernels of abs_cell. The fans and the gradient of the merged kernels are products over register tiles.

template <class T>
FASTNAS_INLINE Vec<T> magnitude(Vec<T> v) {
  return v < zero<T>() ? -v : v;
}
template <class T>
FASTNAS_INLINE T magnitude_of(T v) {
  return v < 0 ? -v : v;
}
// The lanes p[0], p[step], ..., of which n are there; the others are zero.
template <class T>
FASTNAS_INLINE Vec<T> gather(const T* p, int64_t step, int n) {
  constexpr int V = kLanes<T>;
  T lanes[V];
  if (n == V) {
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) lanes[i] = p[i * step];
  } else {
    for (int i = 0; i < V; ++i) lanes[i] = i < n ? p[i * step] : T(0);
  }
  return load(lanes);
}
template <class T>
FASTNAS_INLINE double lane_sum(Vec<T> v) {
  double sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += static_cast<double>(v[i]);
  return sum;
}

// to[i] = scale * |from[i]|, or that is added.
template <class T>
FASTNAS_INLINE void add_scaled(const T* from, int64_t n, T scale, T* to) {
  constexpr int V = kLanes<T>;
  int64_t i = 0;
  for (; i + V <= n; i += V) store(to + i, load(to + i) + splat(scale) * magnitude<T>(load(from + i)));
  for (; i < n; ++i) to[i] += scale * magnitude_of(from[i]);
}

// The merged kernel of one output channel of an edge and input channels [in, in + n), as [channel][tap]: what lies side
// by side in the candidates' kernels. The edge's candidates begin at `candidates`.
template <class T>
void merge_row(const AbsCellArgs& a, int64_t candidates, int64_t out, int64_t in, int64_t n, T* row) {
  const bool diagonal = in <= out && out < in + n;
  std::memset(row, 0, 9 * n * sizeof(T));
  for (int k = 0; k < a.ops_count; ++k) {
    const T w = magnitude_of(static_cast<const T*>(a.weights)[candidates + k]);
    const T* kernel = static_cast<const T*>(a.kernels[candidates + k]);
    if (a.ops[k] == AbsOp::conv3x3) add_scaled(kernel + (out * a.C + in) * 9, 9 * n, w, row);
    if (a.ops[k] == AbsOp::conv1x1)
      for (int64_t c = 0; c < n; ++c) row[c * 9 + 4] += w * magnitude_of(kernel[out * a.C + in + c]);
    if (a.ops[k] == AbsOp::skip && diagonal) row[(out - in) * 9 + 4] += w;
    if (a.ops[k] == AbsOp::avg_pool && diagonal)
      for (int tap = 0; tap < 9; ++tap) row[(out - in) * 9 + tap] += w / 9;
  }
}

// The merged kernels of whole vectors of columns, of all fans: rows are merged, then transposed, a few channels of the
// fan's node at a time.
template <class T>
void abs_cell_merge(const AbsRun<T>& run, T* scratch, int64_t begin, int64_t end) {
  constexpr int V = kLanes<T>;
  const AbsCellArgs& a = *run.args;
  const int64_t C = a.C;
  int fan = 0;
  int64_t first = 0;  // piece of the fan
  for (int64_t piece = begin; piece < end; ++piece) {
    AbsFan f = a.fan(fan, run.backward);
    while (piece - first >= run.blocks(run.columns(f)))
      first += run.blocks(run.columns(f)), f = a.fan(++fan, run.backward);
    const int64_t column = (piece - first) * V;
    T* to = run.merged[fan] + (piece - first) * 9 * C * V;
    const int n = lanes_at<T>(column, run.columns(f));
    if (n < V) std::memset(scratch, 0, 9 * kMergeChannels * V * sizeof(T));  // lanes without a column stay zero
    const int64_t few = run.backward ? 1 : kMergeChannels;
    for (int64_t k0 = 0; k0 < C; k0 += few) {
      const int64_t channels = std::min(few, C - k0);
      for (int lane = 0, some; lane < n; lane += some) {  // `some` lanes are channels c on of one node
        const int64_t c = (column + lane) % C;
        const int64_t candidates = a.fan_edge(f, static_cast<int>((column + lane) / C)) * a.ops_count;
        some = run.backward ? static_cast<int>(std::min<int64_t>(n - lane, C - c)) : 1;
        if (run.backward)
          merge_row(a, candidates, k0, c, some, scratch + lane * 9);
        else
          merge_row(a, candidates, c, k0, channels, scratch + lane * 9 * kMergeChannels);
      }
      for (int64_t k = k0; k < k0 + channels; ++k)
        for (int tap = 0; tap < 9; ++tap) {
          if (run.backward)
            store(to + ((8 - tap) * C + k) * V, gather(scratch + tap, 9, V));
          else
            store(to + (tap * C + k) * V, gather(scratch + (k - k0) * 9 + tap, 9 * kMergeChannels, V));
        }
    }
  }
}

// Rows of the map (ring included) with `from` in the place of a node, and zeros in the ring and behind the last node.
template <class T>
void abs_cell_load(const AbsRun<T>& run, const T* from, int node, int64_t begin, int64_t end) {
  const AbsCellArgs& a = *run.args;
  const int64_t step = a.step(), C = a.C;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t y = r % (a.H + 2) - 1, image = r / (a.H + 2);
    T* to = run.map + r * a.row();
    if (y < 0 || y == a.H) {
      std::memset(to, 0, a.row() * sizeof(T));
      continue;
    }
    const T* source = from + (image * a.H + y) * a.W * C;
    std::memset(to, 0, step * sizeof(T));
    std::memset(to + (a.W + 1) * step, 0, step * sizeof(T));
    for (int64_t x = 0; x < a.W; ++x) {
      T* pixel = to + (x + 1) * step;
      std::memcpy(pixel + node * C, source + x * C, C * sizeof(T));
      std::memset(pixel + a.nodes * C, 0, kAbsPad * sizeof(T));
    }
  }
}

// What pools add at the border beyond 1/9 a tap, in rows [y0, y1) of an image of the map: backward, at the pixels
// whose gradient reads the border's.
template <class T>
void add_border(const AbsRun<T>& run, const AbsFan& f, T* image, int64_t y0, int64_t y1, T* sums) {
  constexpr int V = kLanes<T>;
  const AbsCellArgs& a = *run.args;
  const int64_t step = a.step(), row = a.row(), C = a.C, H = a.H, W = a.W, reach = run.backward ? 2 : 1;
  for (int64_t y = y0; y < y1; ++y)
    for (int64_t x = 0; x < W; ++x) {
      if (y >= reach && y < H - reach && x == reach && W > 2 * reach) x = W - reach;
      T* pixel = image + (y + 1) * row + (x + 1) * step;
      const T here = run.backward ? T(1) : abs_excess<T>(abs_taps(y, H) * abs_taps(x, W));
      for (int64_t c = 0; c < C; c += V) {
        const int n = lanes_at<T>(c, C);
        Vec<T> sum = zero<T>();
        for (int64_t dy = -1; dy <= 1; ++dy)
          for (int64_t dx = -1; dx <= 1; ++dx) {
            if (y + dy < 0 || y + dy == H || x + dx < 0 || x + dx == W) continue;
            const Vec<T> v = load_n(pixel + dy * row + dx * step + f.from * C + c, n);
            sum += run.backward ? v * splat(abs_excess<T>(abs_taps(y + dy, H) * abs_taps(x + dx, W))) : v;
          }
        store(sums + c, sum * splat(here));
      }
      for (int k = 0; k < f.count; ++k) {
        const Vec<T> w = splat(run.pool[a.fan_edge(f, k)]);
        T* to = pixel + (f.first + k) * C;
        for (int64_t c = 0; c < C; c += V) {
          const int n = lanes_at<T>(c, C);
          store_n(to + c, load_n(to + c, n) + w * load(sums + c), n);
        }
      }
    }
}

template <class T>
void abs_cell_fan(const AbsRun<T>& run, int fan, T* scratch, int64_t begin, int64_t end) {
  constexpr int V = kLanes<T>;
  const AbsCellArgs& a = *run.args;
  const AbsFan f = a.fan(fan, run.backward);
  const int64_t step = a.step(), row = a.row(), C = a.C, columns = run.columns(f);
  for (int64_t piece = begin; piece < end; ++piece) {
    T* image = run.map + piece / run.bands() * a.image();
    const int64_t y0 = piece % run.bands() * run.band(), y1 = std::min(a.H, y0 + run.band());
    // Sums of 9 * kChainChannels values meet in memory: long chains round more.
    for (int64_t c0 = 0; c0 < C; c0 += kChainChannels) {
      const int64_t channels = std::min(kChainChannels, C - c0);
      const bool add = f.add || c0 > 0;
      tile_vectors(run.blocks(columns), [&](auto vectors, int64_t b) FASTNAS_LAMBDA_INLINE {
        const T* right = run.merged[fan] + (b * 9 * C + c0) * V;
        for (int64_t y = y0; y < y1; ++y)
          tile_rows(a.W, [&](auto pixels, int64_t x) FASTNAS_LAMBDA_INLINE {
            constexpr int R = decltype(pixels)::value, J = decltype(vectors)::value;
            const T* left = image + y * row + x * step + f.from * C + c0;
            Vec<T> tile[R][J];
            clear_tile<T>(tile);
            for (int dy = 0; dy < 3; ++dy)
              for (int dx = 0; dx < 3; ++dx)
                multiply_add<T>(left + dy * row + dx * step, step, 1, right + (dy * 3 + dx) * C * V, V, 9 * C * V,
                                channels, tile);
            T* to = image + (y + 1) * row + (x + 1) * step + f.first * C + b * V;
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
              for (int j = 0; j < J; ++j) {
                T* at = to + r * step + j * V;
                const int n = lanes_at<T>((b + j) * V, columns);
                if (n == V)
                  store(at, add ? load(at) + tile[r][j] : tile[r][j]);
                else
                  store_n(at, add ? load_n(at, n) + tile[r][j] : tile[r][j], n);
              }
          });
      });
    }
    if (a.pooled()) add_border(run, f, image, y0, y1, scratch);
    T* out = static_cast<T*>(run.backward ? a.grad_x : a.y);
    const int last = run.backward ? 1 : a.nodes - 2, node = run.backward ? 0 : a.nodes - 1;
    if (f.from != last || !out) continue;
    out += piece / run.bands() * a.H * a.W * C;
    for (int64_t y = y0; y < y1; ++y)
      for (int64_t x = 0; x < a.W; ++x)
        std::memcpy(out + (y * a.W + x) * C, image + (y + 1) * row + (x + 1) * step + node * C, C * sizeof(T));
  }
}

// <gradients of the nodes, what a weight of 1 adds to them at the border>, of all edges that leave a node.
template <class T>
void add_border_products(AbsRun<T>& run, const AbsFan& f, int64_t image, T* sums) {
  constexpr int V = kLanes<T>;
  const AbsCellArgs& a = *run.args;
  const int64_t step = a.step(), row = a.row(), C = a.C, H = a.H, W = a.W;
  const T* states = static_cast<const T*>(a.states) + image * a.image();
  const T* grads = run.map + image * a.image();
  for (int64_t y = 0; y < H; ++y)
    for (int64_t x = 0; x < W; ++x) {
      if (y >= 1 && y < H - 1 && x == 1 && W > 2) x = W - 1;
      const int64_t pixel = (y + 1) * row + (x + 1) * step;
      for (int64_t c = 0; c < C; c += V) {
        const int n = lanes_at<T>(c, C);
        Vec<T> sum = zero<T>();
        for (int64_t dy = -1; dy <= 1; ++dy)
          for (int64_t dx = -1; dx <= 1; ++dx) sum += load_n(states + pixel + dy * row + dx * step + f.from * C + c, n);
        store(sums + c, sum);
      }
      const double here = abs_excess<double>(abs_taps(y, H) * abs_taps(x, W));
      for (int k = 0; k < f.count; ++k) {
        Vec<T> product = zero<T>();
        for (int64_t c = 0; c < C; c += V)
          product += load_n(grads + pixel + (f.first + k) * C + c, lanes_at<T>(c, C)) * load(sums + c);
        run.border[a.fan_edge(f, k)] += here * lane_sum<T>(product);
      }
    }
}

// One image's part of the merged kernels' gradient; the first image's replaces what is there. Fans differ in columns:
// they are the innermost index of the pieces, so that equal ranges of pieces are about equal work.
template <class T>
void abs_cell_gradient(AbsRun<T>& run, int64_t image, T* scratch, int64_t begin, int64_t end) {
  constexpr int V = kLanes<T>;
  const AbsCellArgs& a = *run.args;
  const int64_t step = a.step(), row = a.row(), C = a.C, fans = a.nodes - 1;
  const int64_t chain = (kChainPixels + a.W - 1) / a.W;  // rows
  const T* states = static_cast<const T*>(a.states) + image * a.image();
  const T* grads = run.map + image * a.image() + row + step;
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t fan = piece % fans, tap = piece / fans / run.channel_tiles();
    const AbsFan f = a.fan(static_cast<int>(fan), false);
    if (tap == 9) {
      add_border_products(run, f, image, scratch);
      continue;
    }
    const int64_t c0 = piece / fans % run.channel_tiles() * kTileChannels, padded = run.padded(f);
    const T* source = states + tap / 3 * row + tap % 3 * step + f.from * C + c0;
    T* sums = run.gradient[fan] + (tap * C + c0) * padded;
    tile_vectors(padded / V, [&](auto vectors, int64_t b) FASTNAS_LAMBDA_INLINE {
      tile_rows(std::min(kTileChannels, C - c0), [&](auto channels, int64_t c) FASTNAS_LAMBDA_INLINE {
        constexpr int R = decltype(channels)::value, J = decltype(vectors)::value;
        for (int64_t y0 = 0; y0 < a.H; y0 += chain) {
          Vec<T> tile[R][J];
          clear_tile<T>(tile);
          for (int64_t y = y0; y < std::min(a.H, y0 + chain); ++y)
            multiply_add<T>(source + y * row + c, 1, step, grads + y * row + f.first * C + b * V, step, V, a.W, tile);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int j = 0; j < J; ++j) {
              T* to = sums + (c + r) * padded + (b + j) * V;
              store(to, image > 0 || y0 > 0 ? load(to) + tile[r][j] : tile[r][j]);
            }
        }
      });
    });
  }
}

// What is made of the merged kernels' gradient, for a vector of output channels of an edge: the weights' parts, and the
// kernels' gradients.
template <class T>
void abs_cell_finish(const AbsRun<T>& run, int64_t begin, int64_t end) {
  constexpr int V = kLanes<T>;
  constexpr int64_t kChain = 16;  // channels that are summed in a register
  const AbsCellArgs& a = *run.args;
  const int64_t C = a.C, blocks = run.blocks(C);
  for (int64_t piece = begin; piece < end; ++piece) {
    const int edge = static_cast<int>(piece / blocks);
    int node = 1;
    while (a.edge(node + 1, 0) <= edge) ++node;
    const int from = edge - a.edge(node, 0);
    const AbsFan f = a.fan(from, false);
    const int64_t o = piece % blocks * V, padded = run.padded(f);
    const int n = lanes_at<T>(o, C);
    const T* gradient = run.gradient[from] + (node - f.first) * C + o;  // [tap][channel][padded]
    for (int k = 0; k < a.ops_count; ++k) {
      const int64_t candidate = int64_t{edge} * a.ops_count + k;
      const int taps = a.ops[k] == AbsOp::conv3x3 ? 9 : 1, first = a.ops[k] == AbsOp::conv3x3 ? 0 : 4;
      double sum = 0;
      if (const T* kernel = static_cast<const T*>(a.kernels[candidate])) {
        const T* from_row = kernel + o * C * taps;
        for (int64_t c0 = 0; c0 < C; c0 += kChain) {
          Vec<T> part = zero<T>();
          for (int64_t c = c0; c < std::min(C, c0 + kChain); ++c)
            for (int tap = 0; tap < taps; ++tap)
              part += load_n(gradient + ((first + tap) * C + c) * padded, n) *
                      magnitude<T>(gather(from_row + c * taps + tap, C * taps, n));
          sum += lane_sum<T>(part);
        }
        if (T* to = static_cast<T*>(a.grad_kernels[candidate])) {
          const T w = magnitude_of(static_cast<const T*>(a.weights)[candidate]);
          for (int lane = 0; lane < n; ++lane)
            for (int64_t c = 0; c < C; ++c)
              for (int tap = 0; tap < taps; ++tap) {
                const int64_t at = ((o + lane) * C + c) * taps + tap;
                const T value = kernel[at], g = w * gradient[((first + tap) * C + c) * padded + lane];
                to[at] = value > 0 ? g : value < 0 ? -g : value * 0;
              }
        }
      } else if (a.ops[k] == AbsOp::skip || a.ops[k] == AbsOp::avg_pool) {
        const bool pool = a.ops[k] == AbsOp::avg_pool;
        for (int tap = pool ? 0 : 4; tap < (pool ? 9 : 5); ++tap)
          for (int lane = 0; lane < n; ++lane)
            sum += static_cast<double>(gradient[(tap * C + o + lane) * padded + lane]) / (pool ? 9 : 1);
      }
      run.partial[piece * a.ops_count + k] = sum;
    }
  }
}

#define FASTNAS_INSTANTIATE(T)                                                       \
  template void abs_cell_merge<T>(const AbsRun<T>&, T*, int64_t, int64_t);           \
  template void abs_cell_load<T>(const AbsRun<T>&, const T*, int, int64_t, int64_t); \
  template void abs_cell_fan<T>(const AbsRun<T>&, int, T*, int64_t, int64_t);        \
  template void abs_cell_gradient<T>(AbsRun<T>&, int64_t, T*, int64_t, int64_t);     \
  template void abs_cell_finish<T>(const AbsRun<T>&, int64_t, int64_t);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
#undef FASTNAS_INSTANTIATE
