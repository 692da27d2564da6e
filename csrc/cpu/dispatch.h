// Which of the compiled instruction sets runs. FASTNAS_CPU=plain|avx2|avx512 forces one; an unsupported one is an
// error.
#pragma once
#include <string>
#include <vector>

namespace fastnas::cpu {
enum class Isa { plain, avx2, avx512 };

Isa isa();
std::string isa_name();
std::vector<std::string> isa_names();  // those that this machine can run

#if defined(__x86_64__) || defined(_M_X64)
#define FASTNAS_X86 1
#else
#define FASTNAS_X86 0
#endif
}  // namespace fastnas::cpu

// Calls FUNCTION in the namespace of the instruction set in use.
#if FASTNAS_X86
#define FASTNAS_CPU_CALL(FUNCTION, ...)                                                                 \
  (::fastnas::cpu::isa() == ::fastnas::cpu::Isa::avx512 ? ::fastnas::cpu::avx512::FUNCTION(__VA_ARGS__) \
   : ::fastnas::cpu::isa() == ::fastnas::cpu::Isa::avx2 ? ::fastnas::cpu::avx2::FUNCTION(__VA_ARGS__)   \
                                                        : ::fastnas::cpu::plain::FUNCTION(__VA_ARGS__))
#else
#define FASTNAS_CPU_CALL(FUNCTION, ...) ::fastnas::cpu::plain::FUNCTION(__VA_ARGS__)
#endif
