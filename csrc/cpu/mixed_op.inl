// CPU kernels of mixed_op. Every function works on whole images in one thread's scratch.

constexpr int kStrip = FASTNAS_VECTOR_BYTES == 64 ? 16 : 8;  // pixels whose accumulators stay in registers

// Calls f(std::integral_constant<int, P>, x) over [0, n) in strips of P = kStrip, 8, 4 and 1 pixels.
template <class F>
FASTNAS_INLINE void strips(int n, F&& f) {
  int x = 0;
  for (; x + kStrip <= n; x += kStrip) f(std::integral_constant<int, kStrip>{}, x);
  if constexpr (kStrip > 8)
    for (; x + 8 <= n; x += 8) f(std::integral_constant<int, 8>{}, x);
  for (; x + 4 <= n; x += 4) f(std::integral_constant<int, 4>{}, x);
  for (; x < n; ++x) f(std::integral_constant<int, 1>{}, x);
}

// As torch's max pooling compares: a NaN wins and stays.
template <class T>
FASTNAS_INLINE Vec<T> pool_max(Vec<T> best, Vec<T> v) {
  const Vec<T> larger = best > v ? best : v;  // one instruction, which gives v where one of them is NaN
  return best != best ? best : larger;
}
// 1 / n of an average over n taps.
template <class T>
FASTNAS_INLINE Vec<T> share(int n) {
  constexpr T kShare[] = {0, 1, T(1) / 2, T(1) / 3, T(1) / 4, 0, T(1) / 6, 0, 0, T(1) / 9};
  return splat(kShare[n]);
}
// Asks for the cache line at p, to be read or written soon, in the second-level cache.
template <class T>
FASTNAS_INLINE void fetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}
template <class T>
FASTNAS_INLINE void fetch_to_write(const T* p) {
  __builtin_prefetch(p, 1, 2);
}

// What will be read next, fetched bit by bit beside the arithmetic.
struct Ahead {
  const char *at = nullptr, *end = nullptr;
  int64_t piece = 0;  // bytes a call

  template <class T>
  void set(const T* p, int64_t elements, int64_t calls) {
    at = reinterpret_cast<const char*>(p), end = at + elements * static_cast<int64_t>(sizeof(T));
    piece = (end - at) / calls + 64;
  }
  FASTNAS_INLINE void fetch_piece() {
    for (const char* stop = end - at < piece ? end : at + piece; at < stop; at += 64) fetch(at);
  }
};
template <class T>
FASTNAS_INLINE Vec<T> relu(Vec<T> v) {
  return v < zero<T>() ? zero<T>() : v;
}
template <class T>
FASTNAS_INLINE void add_to_double(double* sum, const T* v, int n) {
  for (int i = 0; i < n; ++i) sum[i] += static_cast<double>(v[i]);
}

// The sum of P vectors as a tree, which rounds less than a chain.
template <class T, int P>
FASTNAS_INLINE Vec<T> tree_sum(const Vec<T>* v) {
  if constexpr (P == 1)
    return v[0];
  else
    return tree_sum<T, P / 2>(v) + tree_sum<T, P - P / 2>(v + P / 2);
}

// ReLU of an image, or of its normalised values where mean is given, into the interior of a padded map.
template <class T>
void load_activated(const Run<T>& run, const Grid& grid, const T* image, int64_t C, const T* mean, const T* invstd,
                    T* out) {
  constexpr int V = kLanes<T>;
  for (int b = 0; b < run.blocks; ++b) {
    const int n = run.channels(b);
    const Vec<T> m = mean ? load(mean + b * V) : zero<T>(), s = mean ? load(invstd + b * V) : splat(T(1));
    for (int y = 0; y < grid.h; ++y) {
      const T* p = image + int64_t(y) * grid.w * C + b * V;
      T* q = out + grid.at(b, y, 0);
      if (mean)
        for (int x = 0; x < grid.w; ++x) store(q + x * V, relu<T>((load_n(p + x * C, n) - m) * s));
      else
        for (int x = 0; x < grid.w; ++x) store(q + x * V, relu<T>(load_n(p + x * C, n)));
    }
  }
}

// One output row of one channel block, from a padded map; rows of taps that lie in the halo are skipped.
template <class T, int K, int D, int S>
void depthwise_row(const Grid& in, const T* r, int block, int oy, int width, const T* weight, T* out) {
  constexpr int V = kLanes<T>, pad = D * (K - 1) / 2;
  int k0 = 0, k1 = K;
  while (oy * S - pad + k0 * D < 0) ++k0;
  while (oy * S - pad + (k1 - 1) * D >= in.h) --k1;
  const T* base = r + in.at(block, oy * S - pad, -pad);
  strips(width, [&](auto strip, int x) {
    constexpr int P = decltype(strip)::value;
    Vec<T> acc[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) acc[p] = zero<T>();
    for (int ky = k0; ky < k1; ++ky) {
      const T* row = base + ky * D * in.row() + int64_t(x) * S * V;
#pragma GCC unroll 8
      for (int kx = 0; kx < K; ++kx) {
        const Vec<T> w = load(weight + (ky * K + kx) * V);
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) acc[p] += w * load(row + (p * S + kx * D) * V);
      }
    }
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) store(out + int64_t(x + p) * V, acc[p]);
  });
}

// Stride 1: row y of d/d(input) gathers from the padded output gradient; the weight's gradient takes the same reads.
template <class T, int K, int D>
void depthwise_backward_row(const Grid& grid, const T* du, const T* r, int block, int y, const T* weight, T* dr,
                            T* dw) {
  constexpr int V = kLanes<T>, half = (K - 1) / 2;
  const T* rrow = r + grid.at(block, y, 0);
  T* drow = dr + grid.at(block, y, 0);
  for (int ky = 0; ky < K; ++ky) {
    const int oy = y - (ky - half) * D;
    if (oy < 0 || oy >= grid.h) continue;
    const T* base = du + grid.at(block, oy, -half * D);
    Vec<T> w[K], g[K];
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx) w[kx] = load(weight + (ky * K + kx) * V), g[kx] = zero<T>();
    int x = 0;
    auto pixels = [&](auto strip) FASTNAS_LAMBDA_INLINE {
      constexpr int P = decltype(strip)::value;
      Vec<T> acc[P], rv[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) acc[p] = load(drow + (x + p) * V), rv[p] = load(rrow + (x + p) * V);
#pragma GCC unroll 8
      for (int kx = 0; kx < K; ++kx)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          const Vec<T> v = load(base + (x + p + (K - 1 - kx) * D) * V);
          acc[p] += w[kx] * v;
          g[kx] += rv[p] * v;
        }
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) store(drow + (x + p) * V, acc[p]);
    };
    for (; x + 4 <= grid.w; x += 4) pixels(std::integral_constant<int, 4>{});
    for (; x < grid.w; ++x) pixels(std::integral_constant<int, 1>{});
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx) {
      T* at = dw + (ky * K + kx) * V;
      store(at, load(at) + g[kx]);
    }
  }
}

// Stride 2: row oy of the output gradient is scattered into the padded d/d(input); what falls on the halo is dropped.
template <class T, int K, int D>
void depthwise_backward_row_strided(const Grid& in, const Grid& out, const T* du, const T* r, int block, int oy,
                                    const T* weight, T* dr, T* dw) {
  constexpr int V = kLanes<T>, S = 2, pad = D * (K - 1) / 2;
  const T* grow = du + out.at(block, oy, 0);
  for (int ky = 0; ky < K; ++ky) {
    const int y = oy * S - pad + ky * D;
    if (y < 0 || y >= in.h) continue;
    const T* rrow = r + in.at(block, y, -pad);
    T* drow = dr + in.at(block, y, -pad);
    Vec<T> w[K], g[K];
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx) w[kx] = load(weight + (ky * K + kx) * V), g[kx] = zero<T>();
    for (int ox = 0; ox < out.w; ++ox) {
      const Vec<T> v = load(grow + ox * V);
#pragma GCC unroll 8
      for (int kx = 0; kx < K; ++kx) {
        const int64_t at = int64_t(ox * S + kx * D) * V;
        store(drow + at, load(drow + at) + w[kx] * v);
        g[kx] += load(rrow + at) * v;
      }
    }
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx) {
      T* at = dw + (ky * K + kx) * V;
      store(at, load(at) + g[kx]);
    }
  }
}

// acc[p] = sum over input channels of u[block][p][lane] * w[block][lane][V]; blocks of u are `step` elements apart.
template <class T, int P>
FASTNAS_INLINE void pointwise(const T* u, int64_t step, const T* w, int blocks, int tail, Vec<T>* acc) {
  constexpr int V = kLanes<T>;
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) acc[p] = zero<T>();
  for (int b = 0; b < blocks; ++b)
#pragma GCC unroll 4
    for (int i = 0, n = b + 1 < blocks ? V : tail; i < n; ++i) {
      const Vec<T> wv = load(w + (b * V + i) * V);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) acc[p] += wv * splat(u[b * step + p * V + i]);
    }
}

// dw[out block][in block][in lane][out lane] += u[in] * g[out] over n pixels.
template <class T>
void pointwise_weight_gradient(const T* u, const T* g, int64_t step, int n, int blocks, int tail, T* dw) {
  constexpr int V = kLanes<T>;
  for (int bo = 0; bo < blocks; ++bo)
    for (int bi = 0; bi < blocks; ++bi) {
      const T *uu = u + bi * step, *gg = g + bo * step;
      T* q = dw + int64_t(bo * blocks + bi) * V * V;
      auto columns = [&](auto count) FASTNAS_LAMBDA_INLINE {
        constexpr int I = decltype(count)::value;
        Vec<T> acc[I];
#pragma GCC unroll 16
        for (int i = 0; i < I; ++i) acc[i] = zero<T>();
        const T* up = uu;
        for (const T *gp = gg, *end = gg + int64_t(n) * V; gp < end; gp += V, up += V) {
          const Vec<T> gv = load(gp);
#pragma GCC unroll 16
          for (int i = 0; i < I; ++i) acc[i] += gv * splat(up[i]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < I; ++i) store(q + i * V, load(q + i * V) + acc[i]);
      };
      if (bi + 1 < blocks || tail > V / 2)
        columns(std::integral_constant<int, V>{});
      else if (tail > V / 4 || V < 8)
        columns(std::integral_constant<int, (V + 1) / 2>{});
      else
        columns(std::integral_constant<int, (V >= 8 ? V / 4 : 1)>{});
    }
}

// Sums of one image's values and squares around its first pixels' mean: safe where |mean| is far above the deviation.
template <class T>
struct Moments {
  T *shift, *s1, *s2;  // [padded]; s1 and s2 of the current group of rows
  double *sum, *square;

  FASTNAS_INLINE void start(int padded) const {
    for (int c = 0; c < padded; ++c) s1[c] = s2[c] = 0, sum[c] = square[c] = 0;
  }
  FASTNAS_INLINE void flush(int padded) const {
    add_to_double(sum, s1, padded), add_to_double(square, s2, padded);
    for (int c = 0; c < padded; ++c) s1[c] = s2[c] = 0;
  }
};

// Adds an image's moments (of `pixels` values a channel) to the slot's, which cover `images` images so far (Chan et
// al.).
template <class T>
void merge_image(const Moments<T>& m, int padded, double pixels, double images, double* mean, double* deviation) {
  const double share = 1 / (images + 1), cross = pixels * images * share, inverse = 1 / pixels;
  for (int c = 0; c < padded; ++c) {
    const double own = m.sum[c] * inverse, square = m.square[c] - m.sum[c] * own;
    const double delta = static_cast<double>(m.shift[c]) + own - mean[c];
    mean[c] += delta * share;
    deviation[c] += (square > 0 ? square : 0) + delta * delta * cross;
  }
}

// Adds P values to the sums; the image's first ones set the shift.
template <class T, int P>
FASTNAS_INLINE void add_strip(const Vec<T>* v, bool first, Vec<T>& shift, Vec<T>& s1, Vec<T>& s2) {
  if (first) shift = tree_sum<T, P>(v) * splat(T(1) / T(P));
  Vec<T> d[P], square[P];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) d[p] = v[p] - shift, square[p] = d[p] * d[p];
  s1 += tree_sum<T, P>(d), s2 += tree_sum<T, P>(square);
}

// Adds `n` vectors of one block, `step` elements apart, to the moments.
template <class T>
FASTNAS_INLINE void add_moments(const Moments<T>& m, int block, const T* p, int64_t step, int channels, int n,
                                bool first) {
  constexpr int V = kLanes<T>;
  Vec<T> shift = load(m.shift + block * V), s1 = load(m.s1 + block * V), s2 = load(m.s2 + block * V);
  strips(n, [&](auto strip, int x) {
    constexpr int P = decltype(strip)::value;
    Vec<T> v[P];
#pragma GCC unroll 16
    for (int i = 0; i < P; ++i) v[i] = load_n(p + (x + i) * step, channels);
    add_strip<T, P>(v, first && x == 0, shift, s1, s2);
  });
  store(m.shift + block * V, shift), store(m.s1 + block * V, s1), store(m.s2 + block * V, s2);
}

template <class T>
struct PoolRows {
  T *vmax, *vsum;  // [W + 2][V]: over the rows of the window, with a column of padding on each side
  T *max, *avg;    // [OW][V]: the pooled row
};

template <class T>
void pool_row(const Run<T>& run, const T* image, int block, int oy, const PoolRows<T>& rows) {
  constexpr int V = kLanes<T>;
  const MixedOpArgs& a = *run.args;
  const int S = a.stride, W = int(a.W), H = int(a.H), n = run.channels(block);
  const int y0 = oy * S > 0 ? oy * S - 1 : 0, y1 = oy * S + 1 < H ? oy * S + 1 : H - 1;
  const int64_t step = a.x_step;
  const T* p = image + int64_t(y0) * W * step + block * V;
  store(rows.vmax, splat(-std::numeric_limits<T>::infinity())), store(rows.vsum, zero<T>());
  store(rows.vmax + (W + 1) * V, splat(-std::numeric_limits<T>::infinity())), store(rows.vsum + (W + 1) * V, zero<T>());
  const int64_t down = W * step;
  auto columns = [&](auto rows_count) FASTNAS_LAMBDA_INLINE {
    for (int x = 0; x < W; ++x) {
      const T* q = p + x * step;
      Vec<T> m = load_n(q, n), sum = m;
#pragma GCC unroll 3
      for (int i = 1; i < decltype(rows_count)::value; ++i) {
        const Vec<T> v = load_n(q += down, n);
        m = pool_max<T>(m, v), sum += v;
      }
      fetch(q + S * down);  // the next output row's
      store(rows.vmax + (x + 1) * V, m), store(rows.vsum + (x + 1) * V, sum);
    }
  };
  const int height = y1 - y0 + 1;
  if (height == 3)
    columns(std::integral_constant<int, 3>{});
  else if (height == 2)
    columns(std::integral_constant<int, 2>{});
  else
    columns(std::integral_constant<int, 1>{});
  const Vec<T> inner = share<T>(height * 3);
  for (int ox = 0; ox < a.OW; ++ox) {
    const int64_t i = int64_t(ox) * S * V;
    const int width = 1 + (ox * S > 0) + (ox * S + 1 < W);
    const Vec<T> sum = load(rows.vsum + i) + load(rows.vsum + i + V) + load(rows.vsum + i + 2 * V);
    store(rows.max + ox * V,
          pool_max<T>(pool_max<T>(load(rows.vmax + i), load(rows.vmax + i + V)), load(rows.vmax + i + 2 * V)));
    store(rows.avg + ox * V, sum * (width == 3 ? inner : share<T>(height * width)));
  }
}

template <class T, int K, int D, int S>
void stage_forward(const Run<T>& run, int stage, const T* r, T* u, T* out, const Moments<T>* moments, Ahead& ahead) {
  constexpr int V = kLanes<T>;
  const MixedOpArgs& a = *run.args;
  const Grid in = run.source_grid(stage);
  const int OW = int(a.OW), OH = int(a.OH);
  const int64_t C = a.C, step = int64_t(run.group) * OW * V;
  const T* dw = run.depthwise[stage];
  for (int y0 = 0; y0 < OH; y0 += run.group) {
    const int rows = y0 + run.group < OH ? run.group : OH - y0, pixels = rows * OW;
    ahead.fetch_piece();
    for (int b = 0; b < run.blocks; ++b)
      for (int y = 0; y < rows; ++y)
        depthwise_row<T, K, D, S>(in, r, b, y0 + y, OW, dw + int64_t(b) * K * K * V,
                                  u + b * step + int64_t(y) * OW * V);
    for (int bo = 0; bo < run.blocks; ++bo) {
      const int n = run.channels(bo);
      const T* w = run.pointwise[stage] + int64_t(bo) * run.blocks * V * V;
      T* q = out + int64_t(y0) * OW * C + bo * V;
      Vec<T> shift = zero<T>(), s1 = zero<T>(), s2 = zero<T>();
      if (moments) shift = load(moments->shift + bo * V);
      strips(pixels, [&](auto strip, int x) {
        constexpr int P = decltype(strip)::value;
        Vec<T> acc[P];
        pointwise<T, P>(u + int64_t(x) * V, step, w, run.blocks, run.tail, acc);
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) {
          store_n(q + int64_t(x + p) * C, acc[p], n);
          fetch_to_write(q + int64_t(x + p + pixels) * C);
        }
        if (moments) add_strip<T, P>(acc, y0 == 0 && x == 0, shift, s1, s2);
      });
      if (moments) {
        store(moments->shift + bo * V, shift), store(moments->s1 + bo * V, s1), store(moments->s2 + bo * V, s2);
      }
    }
    if (moments) moments->flush(run.padded);
  }
}

// acc[p] += sum over taps and channels of r[block][pixel p under the tap][lane] * w[block][tap][lane][V]; the pixels
// are S apart, the taps `to` = +1 or -1 from r, which is the first tap's place.
template <class T, int K, int S, int P, int to>
FASTNAS_INLINE void dense(const Grid& grid, const T* r, const T* w, int blocks, int tail, Vec<T>* acc) {
  constexpr int V = kLanes<T>;
  for (int b = 0; b < blocks; ++b)
    for (int ky = 0; ky < K; ++ky)
      for (int kx = 0; kx < K; ++kx) {
        const T* u = r + b * grid.block() + to * (ky * grid.row() + kx * V);
        const T* ww = w + int64_t((b * K + ky) * K + kx) * V * V;
        const T* const end = u + (b + 1 < blocks ? V : tail);
#pragma GCC unroll 4
        for (; u < end; ++u, ww += V) {
          const Vec<T> wv = load(ww);
#pragma GCC unroll 16
          for (int p = 0; p < P; ++p) acc[p] += wv * splat(u[p * S * V]);
        }
      }
}

template <class T, int K, int S>
void dense_forward(const Run<T>& run, int stage, const T* r, T* out, const Moments<T>* moments, Ahead& ahead) {
  constexpr int V = kLanes<T>, pad = (K - 1) / 2;
  const MixedOpArgs& a = *run.args;
  const Grid in = run.source_grid(stage);
  const int OW = int(a.OW), OH = int(a.OH);
  for (int y0 = 0; y0 < OH; y0 += run.group) {
    const int y1 = y0 + run.group < OH ? y0 + run.group : OH;
    ahead.fetch_piece();
    for (int bo = 0; bo < run.blocks; ++bo) {
      const int n = run.channels(bo);
      const T* w = run.pointwise[stage] + int64_t(bo) * run.blocks * K * K * V * V;
      Vec<T> shift = zero<T>(), s1 = zero<T>(), s2 = zero<T>();
      if (moments) shift = load(moments->shift + bo * V);
      for (int y = y0; y < y1; ++y) {
        T* q = out + int64_t(y) * OW * a.C + bo * V;
        strips(OW, [&](auto strip, int x) {
          constexpr int P = decltype(strip)::value;
          Vec<T> acc[P] = {};
          dense<T, K, S, P, 1>(in, r + in.at(0, y * S - pad, x * S - pad), w, run.blocks, run.tail, acc);
#pragma GCC unroll 16
          for (int p = 0; p < P; ++p) {
            store_n(q + int64_t(x + p) * a.C, acc[p], n);
            fetch_to_write(q + int64_t(x + p + OW) * a.C);
          }
          if (moments) add_strip<T, P>(acc, y == 0 && x == 0, shift, s1, s2);
        });
      }
      if (moments) {
        store(moments->shift + bo * V, shift), store(moments->s1 + bo * V, s1), store(moments->s2 + bo * V, s2);
      }
    }
    if (moments) moments->flush(run.padded);
  }
}

// A map's values, `step` elements from pixel to pixel.
template <class T>
struct Pixels {
  const T* p;
  int64_t step;
};

// The gradient of pixels [first, first + n) of a stage's output of one block: A * (g + B * (z - mean) + E); z is dense.
template <class T>
FASTNAS_INLINE void output_gradient(const Run<T>& run, const Pixels<T>& grad, const T* z, const T* mean, const T* coef,
                                    int block, int64_t first, int n, int64_t ahead, T* out) {
  constexpr int V = kLanes<T>;
  const int64_t C = run.args->C;
  const int channels = run.channels(block);
  const T *from = coef + block * V, *gg = grad.p + first * grad.step + block * V, *zz = z + first * C + block * V;
  const Vec<T> A = load(from), B = load(from + run.padded), E = load(from + 2 * run.padded), m = load(mean + block * V);
  for (int i = 0; i < n; ++i) {
    fetch(gg + (i + ahead) * grad.step), fetch(zz + (i + ahead) * C);
    Vec<T> g = load_n(gg + i * grad.step, channels);
    if (run.args->training) g += B * (load_n(zz + i * C, channels) - m) + E;
    store(out + int64_t(i) * V, A * g);
  }
}

// Adds one image's share of the stage's gradients: dr += d/d(activated input), the packed weights' into wgrad.
template <class T, int K, int D, int S>
void stage_backward(const Run<T>& run, int stage, const T* r, const Pixels<T>& grad, const T* z, const T* mean,
                    const T* coef, T* u, T* dz, T* du, T* dr, T* wgrad, Ahead& ahead) {
  constexpr int V = kLanes<T>;
  const MixedOpArgs& a = *run.args;
  const Grid in = run.source_grid(stage), out = run.out_grid();
  const int OW = int(a.OW), OH = int(a.OH);
  const int64_t step = int64_t(run.group) * OW * V;
  const T* dw = run.depthwise[stage];
  const bool want = a.stages[stage].grad_pointwise != nullptr;
  for (int y0 = 0; y0 < OH; y0 += run.group) {
    const int rows = y0 + run.group < OH ? run.group : OH - y0, n = rows * OW;
    ahead.fetch_piece();
    for (int b = 0; b < run.blocks; ++b) {
      for (int y = 0; want && y < rows; ++y)  // only the pointwise weights' gradient reads it
        depthwise_row<T, K, D, S>(in, r, b, y0 + y, OW, dw + int64_t(b) * K * K * V,
                                  u + b * step + int64_t(y) * OW * V);
      output_gradient(run, grad, z, mean, coef, b, int64_t(y0) * OW, n, n, dz + b * step);
    }
    if (want) pointwise_weight_gradient(u, dz, step, n, run.blocks, run.tail, wgrad + run.wgrad_pointwise[stage]);
    for (int b = 0; b < run.blocks; ++b) {
      const T* w = run.pointwise_t[stage] + int64_t(b) * run.blocks * V * V;
      for (int y = 0; y < rows; ++y) {
        T* q = du + out.at(b, y0 + y, 0);
        strips(OW, [&](auto strip, int x) {
          constexpr int P = decltype(strip)::value;
          Vec<T> acc[P];
          pointwise<T, P>(dz + (int64_t(y) * OW + x) * V, step, w, run.blocks, run.tail, acc);
#pragma GCC unroll 16
          for (int p = 0; p < P; ++p) store(q + int64_t(x + p) * V, acc[p]);
        });
      }
    }
  }
  for (int b = 0; b < run.blocks; ++b) {
    const T* w = dw + int64_t(b) * K * K * V;
    T* g = wgrad + run.wgrad_depthwise[stage] + int64_t(b) * K * K * V;
    if constexpr (S == 1)
      for (int y = 0; y < in.h; ++y) depthwise_backward_row<T, K, D>(in, du, r, b, y, w, dr, g);
    else
      for (int y = 0; y < OH; ++y) depthwise_backward_row_strided<T, K, D>(in, out, du, r, b, y, w, dr, g);
  }
}

// The same of a dense stage; dz is a padded map.
template <class T, int K, int S>
void dense_backward(const Run<T>& run, int stage, const T* r, const Pixels<T>& grad, const T* z, const T* mean,
                    const T* coef, T* dz, T* dr, T* wgrad, Ahead& ahead) {
  constexpr int V = kLanes<T>, pad = (K - 1) / 2;
  const MixedOpArgs& a = *run.args;
  const Grid in = run.source_grid(stage), out = run.out_grid();
  const int OW = int(a.OW), OH = int(a.OH), B = run.blocks;
  for (int y = 0; y < OH; ++y) {
    if (y % run.group == 0) ahead.fetch_piece();
    for (int b = 0; b < B; ++b)
      output_gradient(run, grad, z, mean, coef, b, int64_t(y) * OW, OW, OW, dz + out.at(b, y, 0));
  }
  for (int bi = 0; bi < B; ++bi) {
    const T* w = run.pointwise_t[stage] + int64_t(bi) * B * K * K * V * V;
    if constexpr (S == 1) {
      for (int y = 0; y < in.h; ++y)
        strips(in.w, [&](auto strip, int x) {
          constexpr int P = decltype(strip)::value;
          T* q = dr + in.at(bi, y, x);
          Vec<T> acc[P] = {};
          dense<T, K, 1, P, -1>(out, dz + out.at(0, y + pad, x + pad), w, B, run.tail, acc);
#pragma GCC unroll 16
          for (int p = 0; p < P; ++p) store(q + int64_t(p) * V, load(q + int64_t(p) * V) + acc[p]);
        });
    } else {
      for (int y = 0; y < OH; ++y)  // scattered; what falls on the halo is dropped
        for (int ky = 0; ky < K; ++ky)
          for (int kx = 0; kx < K; ++kx)
            strips(OW, [&](auto strip, int x) {
              constexpr int P = decltype(strip)::value;
              T* q = dr + in.at(bi, y * S - pad + ky, x * S - pad + kx);
              Vec<T> acc[P] = {};
              for (int b = 0; b < B; ++b) {
                const T *d = dz + out.at(b, y, x), *ww = w + int64_t((b * K + ky) * K + kx) * V * V;
                for (int o = 0, n = run.channels(b); o < n; ++o) {
                  const Vec<T> wv = load(ww + o * V);
#pragma GCC unroll 16
                  for (int p = 0; p < P; ++p) acc[p] += wv * splat(d[p * V + o]);
                }
              }
#pragma GCC unroll 16
              for (int p = 0; p < P; ++p) store(q + int64_t(p) * S * V, load(q + int64_t(p) * S * V) + acc[p]);
            });
    }
  }
  if (!a.stages[stage].grad_pointwise) return;
  constexpr int I = V < 16 ? V : 16;
  for (int bo = 0; bo < B; ++bo)
    for (int bi = 0; bi < B; ++bi)
      for (int ky = 0; ky < K; ++ky)
        for (int kx = 0; kx < K; ++kx) {
          T* q = wgrad + run.wgrad_pointwise[stage] + int64_t(((bo * B + bi) * K + ky) * K + kx) * V * V;
          Vec<T> acc[I];
#pragma GCC unroll 16
          for (int i = 0; i < I; ++i) acc[i] = load(q + i * V);
          for (int y = 0; y < OH; ++y) {
            const T *g = dz + out.at(bo, y, 0), *x = r + in.at(bi, y * S - pad + ky, kx - pad);
            for (int p = 0; p < OW; ++p) {
              const Vec<T> gv = load(g + int64_t(p) * V);
#pragma GCC unroll 16
              for (int i = 0; i < I; ++i) acc[i] += gv * splat(x[int64_t(p) * S * V + i]);
            }
          }
#pragma GCC unroll 16
          for (int i = 0; i < I; ++i) store(q + i * V, acc[i]);
        }
}

// Calls f with the stage's kernel size, dilation and stride as compile-time constants.
template <class F>
FASTNAS_INLINE void with_shape(const Stage& s, F&& f) {
  auto stride = [&](auto K, auto D) {
    if (s.stride == 1)
      f(K, D, std::integral_constant<int, 1>{});
    else
      f(K, D, std::integral_constant<int, 2>{});
  };
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  if (s.kernel == 3)
    s.dilation == 1 ? stride(std::integral_constant<int, 3>{}, One{}) : stride(std::integral_constant<int, 3>{}, Two{});
  else if (s.kernel == 5)
    s.dilation == 1 ? stride(std::integral_constant<int, 5>{}, One{}) : stride(std::integral_constant<int, 5>{}, Two{});
  else
    stride(std::integral_constant<int, 7>{}, One{});
}

template <class F>
FASTNAS_INLINE void with_dense_shape(const Stage& s, F&& f) {
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Three = std::integral_constant<int, 3>;
  if (s.kernel == 1)
    s.stride == 1 ? f(One{}, One{}) : f(One{}, Two{});
  else
    s.stride == 1 ? f(Three{}, One{}) : f(Three{}, Two{});
}

template <class T>
struct Scratch {
  T *r, *du, *dr, *u, *dz;
  PoolRows<T> rows;
  T* taken;                        // [3 rows][max, index, sum][OW][lanes]: pooled along a row
  T *shift, *s1, *s2, *term_sums;  // [padded] each; term_sums [edges + terms][padded]
  T *gmax, *gavg, *index;          // pool_grid, one block
  double *sum, *square;            // [padded] each

  Scratch(const Run<T>& run, T* p) {
    const MixedOpArgs& a = *run.args;
    auto take = [&](int64_t n) { return p += n, p - n; };
    r = take(run.scratch_map()), du = take(run.scratch_map()), dr = take(run.scratch_map());
    u = take(run.scratch_group()), dz = take(run.scratch_group());
    rows.vmax = take((a.W + 2) * run.lanes), rows.vsum = take((a.W + 2) * run.lanes);
    rows.max = take(a.OW * run.lanes), rows.avg = take(a.OW * run.lanes);
    taken = take(9 * a.OW * run.lanes);
    gmax = take(run.pool_grid().block()), gavg = take(run.pool_grid().block()), index = take(run.pool_grid().block());
    shift = take(run.padded), s1 = take(run.padded), s2 = take(run.padded);
    sum = reinterpret_cast<double*>(take(2 * run.padded)), square = reinterpret_cast<double*>(take(2 * run.padded));
    term_sums = take(int64_t(a.edges_count + a.terms_count) * run.padded);
  }
  Moments<T> moments() const { return {shift, s1, s2, sum, square}; }
};

template <class T>
FASTNAS_INLINE void clear(T* p, int64_t n) {
  __builtin_memset(p, 0, static_cast<size_t>(n) * sizeof(T));
}

// Where a stage reads from, in image i, and its groups of rows.
template <class T>
FASTNAS_INLINE Pixels<T> stage_source(const Run<T>& run, int stage, int64_t i) {
  const MixedOpArgs& a = *run.args;
  const int source = a.stages[stage].source;
  if (source < 0) return {static_cast<const T*>(a.x) + i * run.in_image(), a.x_step};
  return {static_cast<const T*>(a.stages[source].out) + i * run.out_image(), a.C};
}

// The stages of one level, and what of the next image, or of the next stage's own source, can be fetched meanwhile.
template <class T>
struct Level {
  int stages[kMaxStages], count = 0;
  bool shared;  // all read x
  Level(const Run<T>& run, int level) : shared(level == 0) {
    for (int k = 0; k < run.args->stages_count; ++k)
      if (run.level[k] == level) stages[count++] = k;
  }
  Ahead ahead(const Run<T>& run, int64_t i, int index) const {
    const MixedOpArgs& a = *run.args;
    const int64_t groups = (a.OH + run.group - 1) / run.group;
    const bool last = index + 1 == count;
    Ahead result;
    if (shared) {
      if (index == 0 && i + 1 < a.N) {
        const Pixels<T> next = stage_source(run, stages[0], i + 1);
        result.set(next.p, a.H * a.W * next.step, groups * count);
      }
    } else if (!last || i + 1 < a.N) {
      const Pixels<T> next = stage_source(run, stages[last ? 0 : index + 1], last ? i + 1 : i);
      result.set(next.p, a.OH * a.OW * next.step, groups);
    }
    return result;
  }
};

// Stages of one level: their outputs and moments. Level 0 also takes the moments of pools and of outside maps.
template <class T>
void forward_level(const Run<T>& run, int level, T* scratch, int64_t begin, int64_t end) {
  constexpr int V = kLanes<T>;
  const MixedOpArgs& a = *run.args;
  Scratch<T> s(run, scratch);
  const Moments<T> moments = s.moments();
  const Moments<T>* const wanted = a.training ? &moments : nullptr;
  const Level<T> now(run, level);
  clear(s.r, run.scratch_map());
  for (int64_t slot = begin; slot < end; ++slot) {
    auto merge = [&](int norm, int64_t image) {
      double* m = run.moments + (slot * a.norms + norm) * 2 * run.padded;
      merge_image(moments, run.padded, double(a.OH * a.OW), double(image - run.first_image(slot)), m, m + run.padded);
    };
    for (int64_t i = run.first_image(slot); i < run.first_image(slot + 1); ++i) {
      const T* x = static_cast<const T*>(a.x) + i * run.in_image();
      Ahead ahead;
      for (int index = 0; index < now.count; ++index) {
        const int k = now.stages[index];
        const Stage& stage = a.stages[k];
        const Pixels<T> from = stage_source(run, k, i);
        if (index == 0 || !now.shared) ahead = now.ahead(run, i, index);
        if (stage.source >= 0) {
          const int norm = a.stages[stage.source].norm;
          load_activated(run, run.out_grid(), from.p, from.step, run.mean + norm * run.padded,
                         run.invstd + norm * run.padded, s.r);
        } else if (index == 0) {
          load_activated<T>(run, run.in_grid(), from.p, from.step, nullptr, nullptr, s.r);
        }
        if (a.training) moments.start(run.padded);
        T* out = static_cast<T*>(stage.out) + i * run.out_image();
        if (stage.dense)
          with_dense_shape(stage, [&](auto K, auto S) {
            dense_forward<T, decltype(K)::value, decltype(S)::value>(run, k, s.r, out, wanted, ahead);
          });
        else
          with_shape(stage, [&](auto K, auto D, auto S) {
            stage_forward<T, decltype(K)::value, decltype(D)::value, decltype(S)::value>(run, k, s.r, s.u, out, wanted,
                                                                                         ahead);
          });
        if (a.training) merge(stage.norm, i);
      }
      if (level > 0 || !a.training) continue;
      for (int t = 0; t < a.terms_count; ++t) {
        const Term& term = a.terms[t];
        if (term.norm < 0 || term.kind == Kind::separable || run.leader[t] != t) continue;
        moments.start(run.padded);
        for (int y = 0; y < a.OH; ++y) {
          for (int b = 0; b < run.blocks; ++b) {
            if (term.kind == Kind::map) {
              const T* p = static_cast<const T*>(term.src) + i * run.out_image() + y * a.OW * a.C + b * V;
              add_moments(moments, b, p, a.C, run.channels(b), int(a.OW), y == 0);
            } else {
              pool_row(run, x, b, y, s.rows);
              add_moments(moments, b, term.kind == Kind::max_pool ? s.rows.max : s.rows.avg, V, V, int(a.OW), y == 0);
            }
          }
          moments.flush(run.padded);
        }
        merge(term.norm, i);
      }
    }
  }
}

// The terms' values along one row of one block.
template <class T>
FASTNAS_INLINE void row_terms(const Run<T>& run, int64_t image, int y, int b, const PoolRows<T>& rows, Pixels<T>* out) {
  constexpr int V = kLanes<T>;
  const MixedOpArgs& a = *run.args;
  const int64_t at = image * run.out_image() + y * a.OW * a.C + b * V;
  const T* x = static_cast<const T*>(a.x) + image * run.in_image();
  if (run.pools) pool_row(run, x, b, y, rows);
  for (int t = 0; t < a.terms_count; ++t) {
    const Term& term = a.terms[t];
    switch (term.kind) {
      case Kind::max_pool:
        out[t] = {rows.max, V};
        break;
      case Kind::avg_pool:
        out[t] = {rows.avg, V};
        break;
      case Kind::skip:
        out[t] = {x + y * a.OW * a.x_step + b * V, a.x_step};
        break;
      case Kind::separable:
        out[t] = {static_cast<const T*>(a.stages[term.stage].out) + at, a.C};
        break;
      default:
        out[t] = {static_cast<const T*>(term.src) + at, a.C};
    }
  }
}

// Calls f(std::integral_constant<int, P>, x) over [0, n) in strips of P = 8 and 1 pixels.
template <class F>
FASTNAS_INLINE void short_strips(int64_t n, F&& f) {
  int x = 0;
  for (; x + 8 <= n; x += 8) f(std::integral_constant<int, 8>{}, x);
  for (; x < n; ++x) f(std::integral_constant<int, 1>{}, x);
}

// y = sum over terms of scale * (term - shift), of every edge.
template <class T>
void forward_sum(const Run<T>& run, T* scratch, int64_t begin, int64_t end) {
  constexpr int V = kLanes<T>;
  const MixedOpArgs& a = *run.args;
  Scratch<T> s(run, scratch);
  Pixels<T> terms[kMaxTerms];
  for (int64_t i = run.first_image(begin); i < run.first_image(end); ++i)
    for (int y = 0; y < a.OH; ++y)
      for (int b = 0; b < run.blocks; ++b) {
        const int n = run.channels(b);
        row_terms(run, i, y, b, s.rows, terms);
        for (int e = 0; e < a.edges_count; ++e) {
          const Edge& edge = a.edges[e];
          T* out = static_cast<T*>(edge.y) + i * run.edge_image(e) + y * a.OW * edge.step + b * V;
          short_strips(a.OW, [&](auto strip, int x) FASTNAS_LAMBDA_INLINE {
            constexpr int P = decltype(strip)::value;
            Vec<T> acc[P];
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) {
              T* q = out + int64_t(x + p) * edge.step;
              acc[p] = edge.add ? load_n(q, n) : zero<T>();
              fetch_to_write(q + a.OW * edge.step);
            }
            for (int t = edge.terms_begin; t < edge.terms_end; ++t) {
              const Vec<T> m = load(run.shift + t * run.padded + b * V), w = load(run.scale + t * run.padded + b * V);
              const int64_t step = terms[t].step;
              const T* q = terms[t].p + x * step;
#pragma GCC unroll 8
              for (int p = 0; p < P; ++p) {
                acc[p] += (load_n(q + p * step, n) - m) * w;
                fetch(q + (p + a.OW) * step);
              }
            }
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) store_n(out + int64_t(x + p) * edge.step, acc[p], n);
          });
        }
      }
}

// Per channel: sum g of every edge, and sum g * (term - shift) of every term.
template <class T>
void backward_sums(const Run<T>& run, T* scratch, int64_t begin, int64_t end) {
  constexpr int V = kLanes<T>;
  const MixedOpArgs& a = *run.args;
  Scratch<T> s(run, scratch);
  Pixels<T> terms[kMaxTerms];
  const int64_t size = int64_t(a.edges_count + a.terms_count) * run.padded;
  for (int64_t slot = begin; slot < end; ++slot) {
    double* sums = run.sums + slot * size;
    for (int64_t i = run.first_image(slot); i < run.first_image(slot + 1); ++i)
      for (int y0 = 0; y0 < a.OH; y0 += run.group) {
        clear(s.term_sums, size);
        for (int y = y0; y < y0 + run.group && y < a.OH; ++y)
          for (int b = 0; b < run.blocks; ++b) {
            const int n = run.channels(b);
            row_terms(run, i, y, b, s.rows, terms);
            for (int e = 0; e < a.edges_count; ++e) {
              const Edge& edge = a.edges[e];
              const T* grad = static_cast<const T*>(edge.grad) + i * run.edge_image(e) + y * a.OW * edge.step + b * V;
              T* total = s.term_sums + e * run.padded + b * V;
              short_strips(a.OW, [&](auto strip, int x) FASTNAS_LAMBDA_INLINE {
                constexpr int P = decltype(strip)::value;
                Vec<T> g[P];
#pragma GCC unroll 8
                for (int p = 0; p < P; ++p) {
                  const T* q = grad + int64_t(x + p) * edge.step;
                  g[p] = load_n(q, n);
                  fetch(q + a.OW * edge.step);
                }
                store(total, load(total) + tree_sum<T, P>(g));
                for (int t = edge.terms_begin; t < edge.terms_end; ++t) {
                  const Vec<T> m = load(run.shift + t * run.padded + b * V);
                  T* sum = s.term_sums + (a.edges_count + t) * run.padded + b * V;
                  const int64_t step = terms[t].step;
                  const T* q = terms[t].p + x * step;
                  Vec<T> d[P];
#pragma GCC unroll 8
                  for (int p = 0; p < P; ++p) {
                    d[p] = g[p] * (load_n(q + p * step, n) - m);
                    fetch(q + (p + a.OW) * step);
                  }
                  store(sum, load(sum) + tree_sum<T, P>(d));
                }
              });
            }
          }
        add_to_double(sums, s.term_sums, int(size));
      }
  }
}

// What the windows of one kind of pool hand on: with g_e the edges' gradients, sum_e A_e * g_e + base + AB * (z -
// mean). Pools of one kind share z and its statistics.
template <class T>
struct PoolGradient {
  int edges[kMaxTerms], count = 0;
  Vec<T> A[kMaxTerms], base = zero<T>(), AB = zero<T>(), mean = zero<T>();
  bool batch = false;

  PoolGradient(const Run<T>& run, Kind kind, int block) {
    constexpr int V = kLanes<T>;
    const MixedOpArgs& a = *run.args;
    for (int t = 0; t < a.terms_count; ++t) {
      if (a.terms[t].kind != kind) continue;
      const T* coef = run.coef + int64_t(a.stages_count + t) * 3 * run.padded + block * V;
      edges[count] = a.terms[t].edge, A[count++] = load(coef);
      if (a.terms[t].norm < 0 || !a.training) continue;
      batch = true;
      base += load(coef) * load(coef + 2 * run.padded), AB += load(coef) * load(coef + run.padded);
      mean = load(run.shift + t * run.padded + block * V);
    }
  }
  FASTNAS_INLINE Vec<T> operator()(const Vec<T>* g, Vec<T> z) const {
    Vec<T> sum = zero<T>();
    for (int i = 0; i < count; ++i) sum += A[i] * g[edges[i]];
    return batch ? sum + base + AB * (z - mean) : sum;
  }
};

// Pools row y of an image along x: the maximum as torch finds it, which tap it is (0, 1, 2), and the sum.
template <class T, int S>
void pool_along(const T* x, int64_t step, int W, int OW, int n, T* max, T* index, T* sum) {
  constexpr int V = kLanes<T>;
  for (int ox = 0; ox < OW; ++ox) {
    const int x0 = ox * S - 1, first = x0 < 0 ? 1 : 0, last = x0 + 2 < W ? 2 : W - 1 - x0;
    Vec<T> best = load_n(x + (x0 + first) * step, n), at = splat(T(first)), all = best;
    for (int k = first + 1; k <= last; ++k) {
      const Vec<T> v = load_n(x + (x0 + k) * step, n);
      const auto wins = (v > best) | (v != v);
      best = wins ? v : best, at = wins ? splat(T(k)) : at, all += v;
    }
    store(max + ox * V, best), store(index + ox * V, at), store(sum + ox * V, all);
  }
}

// What the pools of one block hand on, into padded maps: the maximum's share and its tap, the average's share of a tap.
template <class T, int S>
void pools_gradient(const Run<T>& run, const Scratch<T>& s, int64_t image, int b) {
  constexpr int V = kLanes<T>;
  const MixedOpArgs& a = *run.args;
  const int H = int(a.H), W = int(a.W), OH = int(a.OH), OW = int(a.OW), n = run.channels(b);
  const Grid pool = run.pool_grid();
  const T* x = static_cast<const T*>(a.x) + image * run.in_image() + b * V;
  const PoolGradient<T> max(run, Kind::max_pool, b), avg(run, Kind::avg_pool, b);
  const int64_t size = int64_t(OW) * V;
  int ready = 0;  // rows of x that are pooled along
  for (int y = 0; y < OH; ++y) {
    const int y0 = y * S - 1, first = y0 < 0 ? 1 : 0, last = y0 + 2 < H ? 2 : H - 1 - y0;
    for (; ready <= y0 + last; ++ready) {
      T* to = s.taken + ready % 3 * 3 * size;
      pool_along<T, S>(x + int64_t(ready) * W * a.x_step, a.x_step, W, OW, n, to, to + size, to + 2 * size);
    }
    for (int ox = 0; ox < OW; ++ox) {
      const T* from = s.taken + (y0 + first) % 3 * 3 * size + ox * V;
      Vec<T> best = load(from), index = load(from + size) + splat(T(first * 3)), sum = load(from + 2 * size);
      for (int k = first + 1; k <= last; ++k) {
        from = s.taken + (y0 + k) % 3 * 3 * size + ox * V;
        const Vec<T> v = load(from);
        const auto wins = (v > best) | (v != v);
        best = wins ? v : best, index = wins ? load(from + size) + splat(T(k * 3)) : index;
        sum += load(from + 2 * size);
      }
      Vec<T> g[kMaxEdges];
      for (int e = 0; e < a.edges_count; ++e)
        g[e] = load_n(static_cast<const T*>(a.edges[e].grad) + image * run.edge_image(e) +
                          (int64_t(y) * OW + ox) * a.edges[e].step + b * V,
                      n);
      const int columns = 1 + (ox * S > 0) + (ox * S + 1 < W);
      const Vec<T> inside = share<T>((last - first + 1) * columns);
      const int64_t at = pool.at(0, y, ox);
      store(s.gmax + at, max(g, best)), store(s.gavg + at, avg(g, sum * inside) * inside);
      store(s.index + at, index);
    }
  }
}

// The pools' and the skips' gradient and grad_add, added to the stages', into grad_x.
template <class T, int S>
void input_gradient(const Run<T>& run, const Scratch<T>& s, int64_t image, bool staged) {
  constexpr int V = kLanes<T>;
  const MixedOpArgs& a = *run.args;
  const int H = int(a.H), W = int(a.W);
  const Grid grid = run.in_grid(), pool = run.pool_grid();
  T* out = static_cast<T*>(a.grad_x) + image * H * W * a.grad_x_step;
  const T* add = a.grad_add ? static_cast<const T*>(a.grad_add) + image * H * W * a.grad_add_step : nullptr;
  const int64_t row = pool.row();
  for (int b = 0; b < run.blocks; ++b) {
    const int n = run.channels(b);
    struct {
      const T* p;
      int64_t step;
      Vec<T> scale;
    } skips[kMaxTerms];
    int skips_count = 0;
    for (int t = 0; t < a.terms_count; ++t) {
      const int e = a.terms[t].edge;
      if (a.terms[t].kind == Kind::skip)
        skips[skips_count++] = {static_cast<const T*>(a.edges[e].grad) + image * run.edge_image(e) + b * V,
                                a.edges[e].step, load(run.scale + t * run.padded + b * V)};
    }
    if (run.pools) pools_gradient<T, S>(run, s, image, b);
    for (int y = 0; y < H; ++y) {
      Vec<T> before = zero<T>(), here = zero<T>();  // sums of a column of three averages, S = 1
      auto column = [&](int ix) FASTNAS_LAMBDA_INLINE {
        const T* p = s.gavg + pool.at(0, y, ix);
        return load(p - row) + load(p) + load(p + row);
      };
      if (S == 1 && run.pools) here = column(0);
      for (int ix = 0; ix < W; ++ix) {
        const int64_t at = int64_t(y) * W + ix;
        Vec<T> acc = add ? load_n(add + at * a.grad_add_step + b * V, n) : zero<T>();
        for (int i = 0; i < skips_count; ++i) acc += skips[i].scale * load_n(skips[i].p + at * skips[i].step, n);
        if (staged) {
          const Vec<T> d = load(s.dr + grid.at(b, y, ix));
          acc += load(s.r + grid.at(b, y, ix)) <= zero<T>() ? zero<T>() : d;
        }
        if (run.pools && S == 1) {
          const Vec<T> after = column(ix + 1);
          acc += before + here + after;
          before = here, here = after;
          const int64_t from = pool.at(0, y + 1, ix + 1);  // the window whose tap (0, 0) is this pixel
#pragma GCC unroll 3
          for (int ky = 0; ky < 3; ++ky)
#pragma GCC unroll 3
            for (int kx = 0; kx < 3; ++kx) {
              const int64_t w = from - ky * row - kx * V;
              acc += load(s.index + w) == splat(T(ky * 3 + kx)) ? load(s.gmax + w) : zero<T>();
            }
        } else if (run.pools) {
          for (int ky = (y + 1) % S; ky < 3; ky += S)  // the windows whose tap (ky, kx) is this pixel
            for (int kx = (ix + 1) % S; kx < 3; kx += S) {
              const int64_t from = pool.at(0, (y + 1 - ky) / S, (ix + 1 - kx) / S);
              acc += load(s.gavg + from);
              acc += load(s.index + from) == splat(T(ky * 3 + kx)) ? load(s.gmax + from) : zero<T>();
            }
        }
        T* q = out + at * a.grad_x_step + b * V;
        store_n(q, acc, n);
        fetch_to_write(q + W * a.grad_x_step);
      }
    }
  }
}

// Gradients of one level's stages; level 0 also writes the gradients of x and of the outside maps.
template <class T>
void backward_level(const Run<T>& run, int level, T* scratch, int64_t begin, int64_t end) {
  constexpr int V = kLanes<T>;
  const MixedOpArgs& a = *run.args;
  Scratch<T> s(run, scratch);
  const Level<T> now(run, level);
  clear(s.r, run.scratch_map()), clear(s.du, run.scratch_map());
  if (level == 0 && run.pools) {  // the halo outside the pooled grid contributes nothing
    clear(s.gmax, run.pool_grid().block()), clear(s.gavg, run.pool_grid().block());
    for (int64_t i = 0; i < run.pool_grid().block(); ++i) s.index[i] = T(-1);
  }
  for (int64_t slot = begin; slot < end; ++slot) {
    T* wgrad = run.wgrad + slot * run.wgrad_size;
    for (int64_t i = run.first_image(slot); i < run.first_image(slot + 1); ++i) {
      Ahead ahead;
      for (int index = 0; index < now.count; ++index) {
        const int k = now.stages[index];
        const Stage& stage = a.stages[k];
        const Grid grid = run.source_grid(k);
        const Stage* source = stage.source >= 0 ? &a.stages[stage.source] : nullptr;
        const Pixels<T> from = stage_source(run, k, i);
        const T *mean0 = source ? run.mean + source->norm * run.padded : nullptr,
                *invstd0 = source ? run.invstd + source->norm * run.padded : nullptr;
        if (index == 0 || !now.shared) {
          ahead = now.ahead(run, i, index);
          load_activated<T>(run, grid, from.p, from.step, mean0, invstd0, s.r);
          clear(s.dr, grid.block() * run.blocks);
        }
        const Edge& edge = a.edges[stage.edge];
        const Pixels<T> grad =
            stage.grad_norm ? Pixels<T>{static_cast<const T*>(stage.grad_norm) + i * run.out_image(), a.C}
                            : Pixels<T>{static_cast<const T*>(edge.grad) + i * run.edge_image(stage.edge), edge.step};
        const T *z = static_cast<const T*>(stage.out) + i * run.out_image(), *mean = run.mean + stage.norm * run.padded,
                *coef = run.coef + int64_t(k) * 3 * run.padded;
        if (stage.dense)
          with_dense_shape(stage, [&](auto K, auto S) {
            dense_backward<T, decltype(K)::value, decltype(S)::value>(run, k, s.r, grad, z, mean, coef, s.du, s.dr,
                                                                      wgrad, ahead);
          });
        else
          with_shape(stage, [&](auto K, auto D, auto S) {
            stage_backward<T, decltype(K)::value, decltype(D)::value, decltype(S)::value>(
                run, k, s.r, grad, z, mean, coef, s.u, s.dz, s.du, s.dr, wgrad, ahead);
          });
        if (!source) continue;
        // The gradient of the source's normalised output, and its sums for the source's batch norm.
        T* out = static_cast<T*>(source->grad_norm) + i * run.out_image();
        double* sums = run.chain + (slot * a.stages_count + stage.source) * 2 * run.padded;
        for (int b = 0; b < run.blocks; ++b) {
          const int n = run.channels(b);
          const Vec<T> m = load(mean0 + b * V);
          for (int y0 = 0; y0 < grid.h; y0 += run.group) {
            Vec<T> s1 = zero<T>(), s2 = zero<T>();
            for (int y = y0; y < y0 + run.group && y < grid.h; ++y)
              for (int x = 0; x < grid.w; ++x) {
                const int64_t at = grid.at(b, y, x), pixel = (int64_t(y) * grid.w + x) * a.C + b * V;
                const Vec<T> d = load(s.r + at) <= zero<T>() ? zero<T>() : load(s.dr + at);
                store_n(out + pixel, d, n);
                fetch_to_write(out + pixel + int64_t(grid.w) * a.C);
                s1 += d, s2 += d * (load_n(from.p + pixel, n) - m);
              }
            store(s.s1, s1), store(s.s2, s2);
            add_to_double(sums + b * V, s.s1, V), add_to_double(sums + run.padded + b * V, s.s2, V);
          }
        }
      }
      if (level > 0) continue;
      const bool staged = now.count > 0;
      if (a.grad_x) a.stride == 1 ? input_gradient<T, 1>(run, s, i, staged) : input_gradient<T, 2>(run, s, i, staged);
      for (int t = 0; t < a.terms_count; ++t) {
        const Term& term = a.terms[t];
        if (term.kind != Kind::map || !term.grad) continue;
        const Edge& edge = a.edges[term.edge];
        const T *z = static_cast<const T*>(term.src) + i * run.out_image(),
                *g = static_cast<const T*>(edge.grad) + i * run.edge_image(term.edge);
        T* out = static_cast<T*>(term.grad) + i * run.out_image();
        const bool batch =
            a.training && term.norm >= 0;  // else the gradient must not see values, which may be infinite
        for (int b = 0; b < run.blocks; ++b) {
          const int n = run.channels(b);
          const T* coef = run.coef + int64_t(a.stages_count + t) * 3 * run.padded + b * V;
          const Vec<T> A = load(coef), B = load(coef + run.padded), E = load(coef + 2 * run.padded);
          const Vec<T> m = load(run.shift + t * run.padded + b * V);
          for (int64_t p = 0; p < a.OH * a.OW; ++p) {
            const int64_t at = p * a.C + b * V;
            Vec<T> d = load_n(g + p * edge.step + b * V, n);
            if (batch) d += B * (load_n(z + at, n) - m) + E;
            store_n(out + at, A * d, n);
          }
        }
      }
    }
  }
}

#define FASTNAS_INSTANTIATE(T)                                              \
  template void forward_level<T>(const Run<T>&, int, T*, int64_t, int64_t); \
  template void forward_sum<T>(const Run<T>&, T*, int64_t, int64_t);        \
  template void backward_sums<T>(const Run<T>&, T*, int64_t, int64_t);      \
  template void backward_level<T>(const Run<T>&, int, T*, int64_t, int64_t);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
#undef FASTNAS_INSTANTIATE
