#include "cpu/arena.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#ifdef __unix__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastnas::cpu {
namespace {
constexpr size_t kHeader = 64;  // in front of each block: its size
constexpr size_t kHugePage = 2 << 20;

// A quarter of the machine's memory.
int64_t default_limit() {
#if defined(__unix__) && defined(_SC_PHYS_PAGES)
  return int64_t(sysconf(_SC_PHYS_PAGES)) / 4 * sysconf(_SC_PAGESIZE);
#else
  return int64_t(1) << 30;
#endif
}

struct Arena {
  std::mutex mutex;
  std::map<size_t, std::vector<void*>> free;  // by size, headers included
  ArenaState state{0, 0, default_limit()};
};

// Never destroyed: tensors may outlive static objects.
Arena& arena() {
  static Arena* const a = new Arena;
  return *a;
}

size_t& size_of(void* block) { return *reinterpret_cast<size_t*>(static_cast<char*>(block) - kHeader); }
void release(void* block) noexcept { std::free(static_cast<char*>(block) - kHeader); }
}  // namespace

void* allocate(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : 4096, size = (bytes + 4095) / 4096 * 4096;
  void* memory = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  if (!memory) throw std::bad_alloc();
#if defined(__unix__) && defined(MADV_HUGEPAGE)
  if (alignment == kHugePage) madvise(memory, size / kHugePage * kHugePage, MADV_HUGEPAGE);  // a refusal is no harm
#endif
  return memory;
}

void* arena_take(size_t bytes) {
  const size_t size = (bytes + kHeader + 4095) / 4096 * 4096;
  Arena& a = arena();
  {
    std::lock_guard<std::mutex> lock(a.mutex);
    a.state.lent += static_cast<int64_t>(size);
    auto found = a.free.find(size);
    if (found != a.free.end() && !found->second.empty()) {
      void* block = found->second.back();
      found->second.pop_back();
      a.state.kept -= static_cast<int64_t>(size);
      return block;
    }
  }
  void* memory;
  try {
    memory = allocate(size);
  } catch (...) {
    std::lock_guard<std::mutex> lock(a.mutex);
    a.state.lent -= static_cast<int64_t>(size);
    throw;
  }
  void* block = static_cast<char*>(memory) + kHeader;
  size_of(block) = size;
  return block;
}

void arena_give(void* block) noexcept {
  Arena& a = arena();
  const size_t size = size_of(block);
  std::lock_guard<std::mutex> lock(a.mutex);
  a.state.lent -= static_cast<int64_t>(size);
  if (a.state.kept + static_cast<int64_t>(size) > a.state.limit) return release(block);
  try {
    a.free[size].push_back(block);
    a.state.kept += static_cast<int64_t>(size);
  } catch (...) {
    release(block);
  }
}

ArenaState arena_state() {
  std::lock_guard<std::mutex> lock(arena().mutex);
  return arena().state;
}

void arena_set_limit(int64_t bytes) {
  Arena& a = arena();
  std::lock_guard<std::mutex> lock(a.mutex);
  a.state.limit = std::max<int64_t>(0, bytes);
  while (a.state.kept > a.state.limit) {
    auto largest = std::prev(a.free.end());
    if (largest->second.empty()) {
      a.free.erase(largest);
      continue;
    }
    release(largest->second.back());
    largest->second.pop_back();
    a.state.kept -= static_cast<int64_t>(largest->first);
  }
}
}  // namespace fastnas::cpu
