#include "cpu/isa.h"
#include "partial_channels.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTNAS_VECTOR_BYTES 32
namespace fastnas::cpu::avx2 {
#include "cpu/simd.h"

#include "cpu/partial_channels.inl"
}  // namespace fastnas::cpu::avx2
#ifdef __clang__
#pragma clang attribute pop
#endif
