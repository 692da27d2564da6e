// What follows, up to end_target.h, is compiled for avx512. Standard headers must be included before (see isa.h).
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")
#endif
#define FASTNAS_VECTOR_BYTES 64
