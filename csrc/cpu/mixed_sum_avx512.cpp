#include "cpu/isa.h"
#include "mixed_sum.h"

#include "cpu/begin_avx512.h"
namespace fastnas::cpu::avx512 {
#include "cpu/simd.h"

#include "cpu/mixed_sum.inl"
}  // namespace fastnas::cpu::avx512
#include "cpu/end_target.h"
