#include "cpu/isa.h"
#include "absolute.h"

#include "cpu/begin_avx512.h"
namespace fastnas::cpu::avx512 {
#include "cpu/simd.h"

#include "cpu/absolute.inl"
}  // namespace fastnas::cpu::avx512
#include "cpu/end_target.h"
