#include "cpu/isa.h"
#include "mixed_sum.h"

#define FASTNAS_VECTOR_BYTES 16
namespace fastnas::cpu::plain {
#include "cpu/simd.h"
#include "cpu/mixed_sum.inl"
}  // namespace fastnas::cpu::plain
