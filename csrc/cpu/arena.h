// Blocks of memory for feature maps, kept from call to call: a fresh block of several MB costs more in page faults than
// the arithmetic that fills it. A block goes back when the tensor that holds it dies.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastnas::cpu {
// Memory for std::free, aligned to 64 bytes; on huge pages where it is large and the system has them to give: they cost
// one page fault in 512, and the processor finds their addresses quicker. Throws std::bad_alloc.
void* allocate(size_t bytes);

// A block of at least `bytes`, aligned to 64 bytes. Throws std::bad_alloc.
void* arena_take(size_t bytes);
// Gives a block back; it is kept for the next call of its size, or freed where the arena holds its limit already.
void arena_give(void* block) noexcept;

// n elements for as long as the object lives.
template <class T>
class Block {
 public:
  explicit Block(int64_t n) : memory_(arena_take(static_cast<size_t>(n) * sizeof(T))) {}
  ~Block() { arena_give(memory_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  T* get() const { return static_cast<T*>(memory_); }

 private:
  void* memory_;
};

struct ArenaState {
  int64_t kept;   // bytes that wait for the next call
  int64_t lent;   // bytes that tensors hold
  int64_t limit;  // of `kept`
};
ArenaState arena_state();
void arena_set_limit(int64_t bytes);  // frees what is above it
}  // namespace fastnas::cpu
