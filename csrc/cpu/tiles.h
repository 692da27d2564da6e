// Products over register tiles. Included after simd.h, inside an instruction set's namespace, once for each.

// A tile of kTileRows scalars by kTileVectors vectors: the accumulators fill the registers, and a multiply-add needs
// about half a load.
constexpr int kTileRows = FASTNAS_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kTileVectors = FASTNAS_VECTOR_BYTES == 16 ? 2 : 3;

// Calls f(std::integral_constant<int, R>, i) over [0, n) in tiles of R = kTileRows, 4 and 1 rows.
template <class F>
FASTNAS_INLINE void tile_rows(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kTileRows <= n; i += kTileRows) f(std::integral_constant<int, kTileRows>{}, i);
  if constexpr (kTileRows > 4)
    for (; i + 4 <= n; i += 4) f(std::integral_constant<int, 4>{}, i);
  for (; i < n; ++i) f(std::integral_constant<int, 1>{}, i);
}

// Calls f(std::integral_constant<int, J>, j) over [0, n) in tiles of J = kTileVectors, 2 and 1 vectors; four are two
// pairs.
template <class F>
FASTNAS_INLINE void tile_vectors(int64_t n, F&& f) {
  int64_t j = 0;
  if constexpr (kTileVectors == 3)
    for (; n - j == 3 || n - j > 4; j += 3) f(std::integral_constant<int, 3>{}, j);
  for (; j + 2 <= n; j += 2) f(std::integral_constant<int, 2>{}, j);
  for (; j < n; ++j) f(std::integral_constant<int, 1>{}, j);
}

// tile[r][j] += sum over k < n of left[r * row + k * column] * (the vector at right + k * step + j * block).
template <class T, int R, int J>
FASTNAS_INLINE void multiply_add(const T* left, int64_t row, int64_t column, const T* right, int64_t step,
                                 int64_t block, int64_t n, Vec<T> (&tile)[R][J]) {
  for (int64_t k = 0; k < n; ++k) {
    Vec<T> v[J];
#pragma GCC unroll 3
    for (int j = 0; j < J; ++j) v[j] = load(right + k * step + j * block);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> s = splat(left[r * row + k * column]);
#pragma GCC unroll 3
      for (int j = 0; j < J; ++j) tile[r][j] += s * v[j];
    }
  }
}

template <class T, int R, int J>
FASTNAS_INLINE void clear_tile(Vec<T> (&tile)[R][J]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int j = 0; j < J; ++j) tile[r][j] = zero<T>();
}

// Lanes of the vector at channel c that are channels.
template <class T>
FASTNAS_INLINE int lanes_at(int64_t c, int64_t channels) {
  return static_cast<int>(std::min<int64_t>(kLanes<T>, channels - c));
}
