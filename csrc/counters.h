// Launch and byte counters: every kernel launch adds one to its name's count, and the bytes that it must move.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <utility>

namespace fastnas {
struct Count {
  int64_t launches = 0;
  int64_t bytes = 0;  // hand count: each operand read once, each result written once
};
void count(const char* name, int64_t bytes);
std::map<std::string, Count> counters();
void reset_counters();
}  // namespace fastnas
