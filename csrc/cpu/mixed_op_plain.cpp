#include "cpu/isa.h"
#include "cpu/mixed_op_run.h"

#define FASTNAS_VECTOR_BYTES 16
namespace fastnas::cpu::plain {
#include "cpu/simd.h"
#include "cpu/mixed_op.inl"
}  // namespace fastnas::cpu::plain
