#include "cpu/isa.h"
#include "partial_channels.h"

#include "cpu/begin_avx512.h"
namespace fastnas::cpu::avx512 {
#include "cpu/simd.h"

#include "cpu/partial_channels.inl"
}  // namespace fastnas::cpu::avx512
#include "cpu/end_target.h"
