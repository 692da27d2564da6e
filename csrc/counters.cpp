#include "counters.h"

#include <mutex>

namespace fastnas {
namespace {
std::mutex mutex;
std::map<std::string, Count> table;
}  // namespace

void count(const char* name, int64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  Count& entry = table[name];
  ++entry.launches;
  entry.bytes += bytes;
}

std::map<std::string, Count> counters() {
  std::lock_guard<std::mutex> lock(mutex);
  return table;
}

void reset_counters() {
  std::lock_guard<std::mutex> lock(mutex);
  table.clear();
}
}  // namespace fastnas
