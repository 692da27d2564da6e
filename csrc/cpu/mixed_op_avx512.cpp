#include "cpu/isa.h"
#include "cpu/mixed_op_run.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")
#endif
#define FASTNAS_VECTOR_BYTES 64
namespace fastnas::cpu::avx512 {
#include "cpu/simd.h"
#include "cpu/mixed_op.inl"
}  // namespace fastnas::cpu::avx512
#ifdef __clang__
#pragma clang attribute pop
#endif
