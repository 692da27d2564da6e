// Passes over a list of tensors, all of them in one launch: absolute values in place with the signs kept, their return,
// and sums of products by group.
//
// Every tensor is cut into pieces by its size alone; a piece finds its tensor in a table. Signs are packed, 32 elements
// a word, and each tensor begins with a word of its own.
#pragma once
#include "types.h"

namespace fastnas {
constexpr int64_t kWord = 32;         // elements
constexpr int64_t kPieceWords = 256;  // of a piece; a piece of a tensor begins with a word
constexpr int64_t kPiece = kPieceWords * kWord;

enum class Float : int { half, bfloat16, single, twofold };
constexpr int64_t float_size(Float f) { return f == Float::twofold ? 8 : f == Float::single ? 4 : 2; }

struct Listed {
  void* p = nullptr;        // its elements, dense in memory
  const void* q = nullptr;  // products: the gradient's
  int64_t n = 0;
  int64_t word = 0;   // its first word of signs
  int64_t piece = 0;  // its first piece
  Float type = Float::single;

  constexpr int64_t words() const { return (n + kWord - 1) / kWord; }
  constexpr int64_t pieces() const { return (n + kPiece - 1) / kPiece; }
};

struct AbsoluteArgs {
  const Listed* table = nullptr;  // ordered by piece; those without elements are not in it. On the device
  int64_t count = 0, pieces = 0;
  int64_t bytes = 0;                // that must move
  uint32_t* signs = nullptr;        // absolute: written; restore: read
  const int64_t* groups = nullptr;  // (groups_count + 1): each group's first piece, and the end. On the device
  int64_t groups_count = 0;
  bool absolute = false;      // sum |theta * g|
  double* partial = nullptr;  // (pieces)
  double* sums = nullptr;     // (groups_count)

  // The tensor of a piece.
  constexpr const Listed& of_piece(int64_t piece) const {
    int64_t first = 0, end = count;
    while (end - first > 1) {
      const int64_t middle = (first + end) / 2;
      (table[middle].piece <= piece ? first : end) = middle;
    }
    return table[first];
  }
};

// Calls body with a value of the tensor's type, or of an unsigned integer of its size.
template <class F>
constexpr void with_float(Float f, F&& body) {
  if (f == Float::half)
    body(Half{});
  else if (f == Float::bfloat16)
    body(BFloat16{});
  else if (f == Float::single)
    body(0.0f);
  else
    body(0.0);
}
template <class F>
constexpr void with_bits(Float f, F&& body) {
  if (f == Float::twofold)
    body(uint64_t{});
  else if (f == Float::single)
    body(uint32_t{});
  else
    body(uint16_t{});
}
template <class U>
constexpr int kSignBit = 8 * static_cast<int>(sizeof(U)) - 1;
template <class U>
constexpr U kMagnitude = static_cast<U>(static_cast<U>(~U{0}) >> 1);

namespace cpu {
void absolute(const AbsoluteArgs& args, Parallel parallel);
void restore(const AbsoluteArgs& args, Parallel parallel);
void group_products(const AbsoluteArgs& args, Parallel parallel);
}  // namespace cpu
namespace cuda {
void absolute(const AbsoluteArgs& args, Stream stream);
void restore(const AbsoluteArgs& args, Stream stream);
void group_products(const AbsoluteArgs& args, Stream stream);
}  // namespace cuda
}  // namespace fastnas
