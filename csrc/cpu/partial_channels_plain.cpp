#include "cpu/isa.h"
#include "partial_channels.h"

#define FASTNAS_VECTOR_BYTES 16
namespace fastnas::cpu::plain {
#include "cpu/simd.h"

#include "cpu/partial_channels.inl"
}  // namespace fastnas::cpu::plain
