// Vectors of FASTNAS_VECTOR_BYTES on the GCC/Clang vector extensions. Included inside an instruction set's namespace,
// once for each; the standard headers it needs are included by isa.h before any target pragma.

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(FASTNAS_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = FASTNAS_VECTOR_BYTES / static_cast<int>(sizeof(T));

#undef FASTNAS_INLINE
#undef FASTNAS_LAMBDA_INLINE
#define FASTNAS_INLINE inline __attribute__((always_inline))
#define FASTNAS_LAMBDA_INLINE __attribute__((always_inline))

template <class T>
FASTNAS_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
FASTNAS_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
template <class T>
FASTNAS_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};  // GCC broadcasts scalars in vector arithmetic
}
template <class T>
FASTNAS_INLINE Vec<T> zero() {
  return Vec<T>{};
}

// The first n lanes; the others are zero (load) or left alone (store). 0 < n <= kLanes.
FASTNAS_INLINE Vec<float> load_n(const float* p, int n) {
#if FASTNAS_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  if (n == kLanes<float>) return load(p);
  Vec<float> v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
FASTNAS_INLINE void store_n(float* p, Vec<float> v, int n) {
#if FASTNAS_VECTOR_BYTES == 64
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#else
  if (n == kLanes<float>) return store(p, v);
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}
FASTNAS_INLINE Vec<double> load_n(const double* p, int n) {
#if FASTNAS_VECTOR_BYTES == 64
  return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
#else
  if (n == kLanes<double>) return load(p);
  Vec<double> v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
FASTNAS_INLINE void store_n(double* p, Vec<double> v, int n) {
#if FASTNAS_VECTOR_BYTES == 64
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
#else
  if (n == kLanes<double>) return store(p, v);
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}
