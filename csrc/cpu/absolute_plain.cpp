#include "cpu/isa.h"
#include "absolute.h"

#define FASTNAS_VECTOR_BYTES 16
namespace fastnas::cpu::plain {
#include "cpu/simd.h"

#include "cpu/absolute.inl"
}  // namespace fastnas::cpu::plain
