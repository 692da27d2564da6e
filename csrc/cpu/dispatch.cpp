#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace fastnas::cpu {
namespace {
bool supported(Isa isa) {
#if FASTNAS_X86
  __builtin_cpu_init();
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return isa == Isa::plain;
}

constexpr Isa kAll[] = {Isa::avx512, Isa::avx2, Isa::plain};

const char* name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "plain"; }

Isa choose() {
  const char* wanted = std::getenv("FASTNAS_CPU");
  for (Isa isa : kAll) {
    if (wanted && *wanted && std::string(wanted) != name(isa)) continue;
    if (supported(isa)) return isa;
    if (wanted && *wanted)
      throw std::runtime_error("FASTNAS_CPU=" + std::string(wanted) + ": this processor has no " + wanted);
  }
  throw std::runtime_error("FASTNAS_CPU=" + std::string(wanted) + ": expected plain, avx2 or avx512");
}
}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

std::string isa_name() { return name(isa()); }

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (Isa isa : kAll)
    if (supported(isa)) names.emplace_back(name(isa));
  return names;
}
}  // namespace fastnas::cpu
