#include "cpu/isa.h"
#include "cpu/relu_pointwise_run.h"

#include "cpu/begin_avx2.h"
namespace fastnas::cpu::avx2 {
#include "cpu/simd.h"
#include "cpu/tiles.h"

#include "cpu/relu_pointwise.inl"
}  // namespace fastnas::cpu::avx2
#include "cpu/end_target.h"
