#include "cpu/isa.h"
#include "cpu/mixed_op_run.h"

#include "cpu/begin_avx2.h"
namespace fastnas::cpu::avx2 {
#include "cpu/simd.h"

#include "cpu/mixed_op.inl"
}  // namespace fastnas::cpu::avx2
#include "cpu/end_target.h"
