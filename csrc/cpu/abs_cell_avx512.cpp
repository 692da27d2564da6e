#include "cpu/isa.h"
#include "cpu/abs_cell_run.h"

#include "cpu/begin_avx512.h"
namespace fastnas::cpu::avx512 {
#include "cpu/simd.h"
#include "cpu/tiles.h"

#include "cpu/abs_cell.inl"
}  // namespace fastnas::cpu::avx512
#include "cpu/end_target.h"
