// From the tensors and the plan of an op to MixedOpArgs: what the glue of mixed_op and of mixed_cell share.
#pragma once
#include "common.h"
#include "mixed_op.h"

namespace fastnas {
constexpr int64_t kPlanFields = 5;  // kind, norm, kernel, dilation, stages: one row a candidate

// The tensors that the plan's candidates use up, in order.
struct Operands {
  const std::vector<Tensor>&params, &maps;
  size_t param = 0, map = 0;
};

// Adds an edge with `candidates` rows of the plan to the fan `a`, whose geometry is set. Its weights begin at `weight`;
// norms are numbered by edge, by candidate, by stage.
void add_edge(const char* op, MixedOpArgs& a, const Tensor& x, const int64_t* plan, int candidates, int weight,
              Operands& from);

// Sets the geometry of a fan that leaves x, which must be channels_last.
void set_input(const char* op, MixedOpArgs& a, const Tensor& x, int64_t stride);

// Points at rows [first, first + norms) of the statistics.
void set_statistics(const char* op, MixedOpArgs& a, const Tensor& mean, const Tensor& invstd, const Tensor& x,
                    int64_t first, int64_t rows);

// Runs the fan where x lives.
void run_mixed_op(const Tensor& x, MixedOpArgs& a, bool backward);
}  // namespace fastnas
