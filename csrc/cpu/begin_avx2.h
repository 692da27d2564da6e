// What follows, up to end_target.h, is compiled for avx2. Standard headers must be included before (see isa.h).
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTNAS_VECTOR_BYTES 32
