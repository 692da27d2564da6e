#include "cpu/isa.h"
#include "partial_channels.h"

#include "cpu/begin_avx2.h"
namespace fastnas::cpu::avx2 {
#include "cpu/simd.h"

#include "cpu/partial_channels.inl"
}  // namespace fastnas::cpu::avx2
#include "cpu/end_target.h"
