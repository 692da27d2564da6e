// CPU kernels of the passes over lists of tensors.

// Calls body(first element, number of elements) for the words of a piece.
template <class F>
FASTNAS_INLINE void words(const Listed& tensor, int64_t piece, F&& body) {
  const int64_t begin = (piece - tensor.piece) * kPiece, end = std::min(tensor.n, begin + kPiece);
  for (int64_t i = begin; i < end; i += kWord) body(i, static_cast<int>(std::min(kWord, end - i)));
}

template <class U>
FASTNAS_INLINE uint32_t take_signs(U* p, int n) {
  uint32_t word = 0;
#pragma omp simd reduction(| : word)
  for (int i = 0; i < n; ++i) {
    word |= static_cast<uint32_t>(p[i] >> kSignBit<U>) << i;
    p[i] &= kMagnitude<U>;
  }
  return word;
}
template <class U>
FASTNAS_INLINE void put_signs(U* p, int n, uint32_t word) {
#pragma omp simd
  for (int i = 0; i < n; ++i)
    p[i] = static_cast<U>((p[i] & kMagnitude<U>) | static_cast<U>(word >> i & 1) << kSignBit<U>);
}

void absolute_pieces(const AbsoluteArgs& a, int64_t begin, int64_t end) {
  for (int64_t piece = begin; piece < end; ++piece) {
    const Listed& t = a.of_piece(piece);
    with_bits(t.type, [&](auto bits) {
      using U = decltype(bits);
      U* p = static_cast<U*>(t.p);
      words(t, piece, [&](int64_t i, int n) FASTNAS_LAMBDA_INLINE {
        a.signs[t.word + i / kWord] = n == kWord ? take_signs(p + i, static_cast<int>(kWord)) : take_signs(p + i, n);
      });
    });
  }
}

void restore_pieces(const AbsoluteArgs& a, int64_t begin, int64_t end) {
  for (int64_t piece = begin; piece < end; ++piece) {
    const Listed& t = a.of_piece(piece);
    with_bits(t.type, [&](auto bits) {
      using U = decltype(bits);
      U* p = static_cast<U*>(t.p);
      words(t, piece, [&](int64_t i, int n) FASTNAS_LAMBDA_INLINE {
        const uint32_t word = a.signs[t.word + i / kWord];
        n == kWord ? put_signs(p + i, static_cast<int>(kWord), word) : put_signs(p + i, n, word);
      });
    });
  }
}

// Products and sums are taken in double: those of float32 are exact there, and neither overflow.
template <bool Absolute, class T>
double products(const T* theta, const T* grad, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const double product = static_cast<double>(theta[i]) * static_cast<double>(grad[i]);
    sum += Absolute ? std::abs(product) : product;
  }
  return sum;
}

void group_products_pieces(const AbsoluteArgs& a, int64_t begin, int64_t end) {
  for (int64_t piece = begin; piece < end; ++piece) {
    const Listed& t = a.of_piece(piece);
    const int64_t first = (piece - t.piece) * kPiece, n = std::min(kPiece, t.n - first);
    with_float(t.type, [&](auto value) {
      using T = decltype(value);
      const T *theta = static_cast<const T*>(t.p) + first, *grad = static_cast<const T*>(t.q) + first;
      a.partial[piece] = a.absolute ? products<true>(theta, grad, n) : products<false>(theta, grad, n);
    });
  }
}
