// y = sum_k w[k] * x_k, one pass: a strip of the output stays in registers while the summands stream by.

template <class T>
void mixed_sum_range(const MixedSumArgs& a, int64_t begin, int64_t end) {
  using A = compute_t<T>;
  constexpr int kStrip = 256;
  const A* w = static_cast<const A*>(a.weights);
  T* y = static_cast<T*>(a.y);
  for (int64_t i = begin; i < end; i += kStrip) {
    const int m = static_cast<int>(std::min<int64_t>(kStrip, end - i));
    A sum[kStrip];
    for (int j = 0; j < m; ++j) sum[j] = A(0);
    for (int k = 0; k < a.count; ++k) {
      const T* x = static_cast<const T*>(a.xs[k]) + i;
      const A wk = w[k];
#pragma omp simd
      for (int j = 0; j < m; ++j) sum[j] += wk * static_cast<A>(x[j]);
    }
#pragma omp simd
    for (int j = 0; j < m; ++j) y[i + j] = static_cast<T>(sum[j]);
  }
}

// Gradients of one piece; its part of <grad, x_k> goes to partial[k].
template <class T>
void mixed_sum_backward_piece(const MixedSumArgs& a, int64_t begin, int64_t end, double* partial) {
  using A = compute_t<T>;
  // Float partial sums stay short, 32 elements each, and are added in double, in one order for every instruction set.
  constexpr int kStrip = 1024, kSums = 32;
  const A* w = static_cast<const A*>(a.weights);
  const T* g = static_cast<const T*>(a.grad);
  for (int k = 0; partial && k < a.count; ++k) partial[k] = 0;
  for (int64_t i = begin; i < end; i += kStrip) {
    const int m = static_cast<int>(std::min<int64_t>(kStrip, end - i));
    for (int k = 0; k < a.count; ++k) {
      if (T* gx = static_cast<T*>(a.grad_xs[k])) {
        const A wk = w[k];
#pragma omp simd
        for (int j = 0; j < m; ++j) gx[i + j] = static_cast<T>(wk * static_cast<A>(g[i + j]));
      }
      if (!partial) continue;
      const T* x = static_cast<const T*>(a.xs[k]);
      A sums[kSums] = {};
      int j = 0;
      for (; j + kSums <= m; j += kSums)
#pragma omp simd
        for (int l = 0; l < kSums; ++l) sums[l] += static_cast<A>(g[i + j + l]) * static_cast<A>(x[i + j + l]);
      for (; j < m; ++j) sums[j % kSums] += static_cast<A>(g[i + j]) * static_cast<A>(x[i + j]);
      for (int l = 0; l < kSums; ++l) partial[k] += static_cast<double>(sums[l]);
    }
  }
}

#define FASTNAS_INSTANTIATE(T)                                             \
  template void mixed_sum_range<T>(const MixedSumArgs&, int64_t, int64_t); \
  template void mixed_sum_backward_piece<T>(const MixedSumArgs&, int64_t, int64_t, double*);
FASTNAS_INSTANTIATE(float)
FASTNAS_INSTANTIATE(double)
FASTNAS_INSTANTIATE(Half)
FASTNAS_INSTANTIATE(BFloat16)
#undef FASTNAS_INSTANTIATE
