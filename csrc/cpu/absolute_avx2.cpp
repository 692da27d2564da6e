#include "cpu/isa.h"
#include "absolute.h"

#include "cpu/begin_avx2.h"
namespace fastnas::cpu::avx2 {
#include "cpu/simd.h"

#include "cpu/absolute.inl"
}  // namespace fastnas::cpu::avx2
#include "cpu/end_target.h"
