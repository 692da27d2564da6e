#include "cpu/isa.h"
#include "cpu/relu_pointwise_run.h"

#define FASTNAS_VECTOR_BYTES 16
namespace fastnas::cpu::plain {
#include "cpu/simd.h"
#include "cpu/tiles.h"

#include "cpu/relu_pointwise.inl"
}  // namespace fastnas::cpu::plain
