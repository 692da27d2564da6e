// mixed_cell: a whole cell of edges. Fans are run state by state, so that what the candidates of several edges read of
// a state is read once; the sums grow in place, in the cell's own output where a node is a part of it.
//
// With k > 1 (see partial_channels.h) the candidates have C/k channels. A fan then leaves a compact copy of these
// channels of its state, sums grow in maps of their own, and when a node's sum is complete, it is merged with what
// bypassed the candidates of all edges into the node.
#include <algorithm>
#include <utility>

#include "mixed_op_plan.h"
#include "partial_channels.h"

namespace fastnas {
namespace {
constexpr int64_t kEdgeFields = 4;  // source, node, stride, row of weights

struct CellEdge {
  int source, node;
  int64_t stride, row;
};

// A state, or its gradient: pixels `step` elements apart.
struct State {
  char* data = nullptr;
  int64_t step = 0;
};

class Cell {
 public:
  Cell(const char* op, const std::vector<Tensor>& inputs, const Tensor& weights, const std::vector<Tensor>& params,
       const std::vector<Tensor>& maps, const std::vector<int64_t>& plan, const std::vector<int64_t>& edges,
       int64_t concat, int64_t k, const std::optional<Tensor>& edge_weights)
      : op(op), inputs(inputs), weights(weights), params(params), maps(maps), plan(plan), k(k) {
    STD_TORCH_CHECK(!inputs.empty() && !edges.empty() && edges.size() % kEdgeFields == 0, op,
                    ": inputs must not be empty and edges must have ", kEdgeFields, " fields an edge");
    states = sources = static_cast<int>(inputs.size());
    for (size_t i = 0; i < edges.size(); i += kEdgeFields) {
      const CellEdge e = {static_cast<int>(edges[i]), static_cast<int>(edges[i + 1]), edges[i + 2], edges[i + 3]};
      STD_TORCH_CHECK(e.source >= 0 && e.source < e.node && e.node >= sources, op, ": no edge can lead from state ",
                      e.source, " to state ", e.node);
      STD_TORCH_CHECK(list.empty() || list.back().source <= e.source, op, ": edges must be sorted by source");
      STD_TORCH_CHECK(e.stride == 1 || (e.stride == 2 && e.source < sources), op,
                      ": stride must be 1, or 2 where an edge leaves an input");
      list.push_back(e);
      states = std::max(states, e.node + 1);
    }
    STD_TORCH_CHECK(weights.dim() == 2 && weights.is_contiguous() && weights.scalar_type() == compute_dtype(inputs[0]),
                    op, ": weights must be a contiguous matrix, edge by candidate");
    candidates = static_cast<int>(weights.size(1));
    std::vector<bool> used(static_cast<size_t>(weights.size(0)));
    for (const CellEdge& e : list) {
      STD_TORCH_CHECK(e.row >= 0 && e.row < weights.size(0) && !used[e.row], op, ": weights has no row ", e.row,
                      ", or another edge has it");
      used[e.row] = true;
    }
    STD_TORCH_CHECK(plan.size() == list.size() * candidates * kPlanFields, op, ": plan must have ", kPlanFields,
                    " fields for each candidate of each edge");
    kept = states - sources - static_cast<int>(concat);
    STD_TORCH_CHECK(concat >= 1 && kept >= 0, op, ": concat must be from 1 to the number of nodes");
    for (int n = sources; n < states; ++n) {
      bool in = false, out = n >= sources + kept;
      for (const CellEdge& e : list) in |= e.node == n, out |= e.source == n;
      STD_TORCH_CHECK(in && out, op, ": state ", n, " has no edge in, or none out");
    }
    const Tensor& x = inputs[0];
    for (const Tensor& input : inputs)
      STD_TORCH_CHECK(is_channels_last(input) && input.size(0) == x.size(0) && input.size(1) == x.size(1) &&
                          input.scalar_type() == x.scalar_type() && input.device() == x.device() && input.numel() > 0,
                      op, ": inputs must be channels_last, of one N, C, dtype and device, and not empty");
    N = x.size(0), C = x.size(1), bytes = static_cast<int64_t>(x.element_size());
    STD_TORCH_CHECK(k >= 1 && k <= C && C % k == 0, op, ": k = ", k, " must divide the ", C, " channels");
    width = C / k;
    const CellEdge& first = list[0];
    OH = (inputs[first.source].size(2) - 1) / first.stride + 1;
    OW = (inputs[first.source].size(3) - 1) / first.stride + 1;
    this->concat = concat;
    if (edge_weights) {
      STD_TORCH_CHECK(k > 1 && edge_weights->dim() == 1 && edge_weights->size(0) == weights.size(0) &&
                          edge_weights->is_contiguous() && edge_weights->scalar_type() == weights.scalar_type() &&
                          edge_weights->device() == x.device(),
                      op, ": edge_weights go with k > 1 and must be a contiguous vector with an entry for each row of ",
                      "weights, of their dtype and device");
      this->edge_weights = edge_weights->const_data_ptr();
    }
    for (const CellEdge& e : list)
      STD_TORCH_CHECK(k == 1 || (inputs_of(e.node) <= kMaxPartialEdges && outputs_of(e.source) <= kMaxPartialEdges), op,
                      ": with k > 1 at most ", kMaxPartialEdges, " edges can lead to a node, or leave a state");
  }

  int64_t inputs_of(int node) const {
    return std::count_if(list.begin(), list.end(), [&](const CellEdge& e) { return e.node == node; });
  }
  int64_t outputs_of(int state) const {
    return std::count_if(list.begin(), list.end(), [&](const CellEdge& e) { return e.source == state; });
  }

  int64_t map_bytes(int64_t channels) const { return N * OH * OW * channels * bytes; }

  // Where node `n` lies in a pair of buffers: of those that are concatenated, and of the others.
  State node(int n, void* together, void* apart) const {
    const int i = n - sources - kept;
    if (i >= 0) return {static_cast<char*>(together) + i * C * bytes, concat * C};
    return {static_cast<char*>(apart) + (n - sources) * map_bytes(C), C};
  }

  // The same for any state.
  State state(int n, void* together, void* apart) const {
    if (n >= sources) return node(n, together, apart);
    return {static_cast<char*>(const_cast<void*>(inputs[n].const_data_ptr())), C};
  }

  // Calls body(fan, first edge, first stage, first norm) for each state that edges leave, in order or in reverse.
  template <class Body>
  void each_fan(bool reverse, void* together, void* apart, void* outs, Body body) {
    struct Fan {
      MixedOpArgs args;
      size_t first;
      int64_t stage, norm;
    };
    std::vector<Fan> fans;
    Operands from{params, maps};
    int64_t stage = 0, norm = 0;
    for (size_t i = 0; i < list.size();) {
      fans.push_back({MixedOpArgs(), i, stage, norm});
      MixedOpArgs& a = fans.back().args;
      const int source = list[i].source;
      a.N = N, a.C = width, a.stride = static_cast<int>(list[i].stride), a.OH = OH, a.OW = OW;
      a.H = source < sources ? inputs[source].size(2) : OH, a.W = source < sources ? inputs[source].size(3) : OW;
      const State from_state = state(source, together, apart);
      a.x = from_state.data, a.x_step = from_state.step;
      STD_TORCH_CHECK((a.H - 1) / a.stride + 1 == OH && (a.W - 1) / a.stride + 1 == OW, op,
                      ": edges lead to maps of different sizes");
      STD_TORCH_CHECK(k == 1 || (a.H % a.stride == 0 && a.W % a.stride == 0), op,
                      ": with k > 1, stride 2 needs an even height and width");
      a.weights = weights.const_data_ptr();
      for (; i < list.size() && list[i].source == source; ++i) {
        STD_TORCH_CHECK(list[i].stride == a.stride, op, ": the edges that leave one state must have one stride");
        add_edge(op, a, inputs[0], &plan[i * candidates * kPlanFields], candidates,
                 static_cast<int>(list[i].row * candidates), from);
      }
      for (int s = 0; s < a.stages_count; ++s)
        a.stages[s].out = static_cast<char*>(outs) + (stage + s) * map_bytes(width);
      stage += a.stages_count, norm += a.norms;
    }
    STD_TORCH_CHECK(from.param == params.size() && from.map == maps.size(), op,
                    ": params or maps has more tensors than the plan uses");
    if (reverse) std::reverse(fans.begin(), fans.end());
    for (Fan& f : fans) body(f.args, f.first, f.stage, f.norm);
  }

  int64_t count_stages() const {
    int64_t n = 0;
    for (size_t i = 0; i < plan.size(); i += kPlanFields) n += plan[i + 4];
    return n;
  }
  int64_t count_norms() const {
    int64_t n = 0;
    for (size_t i = 0; i < plan.size(); i += kPlanFields) n += plan[i + 4] ? plan[i + 4] : plan[i + 1];
    return n;
  }
  // Uninitialised maps that only fastnas sees, (count, N, OH, OW, channels).
  Tensor blob(int64_t count, int64_t channels) const {
    if (count == 0) return empty({0, N, OH, OW, channels}, inputs[0].scalar_type(), inputs[0]);
    return empty_blob({count, N, OH, OW, channels}, inputs[0]);
  }

  // What the kernels of partial_channels are told of maps of H x W pixels.
  PartialChannelsArgs partial(int64_t H, int64_t W) const {
    PartialChannelsArgs a;
    a.N = N, a.C = C, a.H = H, a.W = W, a.k = static_cast<int>(k), a.edge_weights = edge_weights;
    return a;
  }

  // Replaces the fan's x by a compact copy of the channels that its candidates have.
  Tensor narrow(MixedOpArgs& a) const {
    PartialChannelsArgs p = partial(a.H, a.W);
    Tensor active = empty_map({N, width, a.H, a.W}, inputs[0]);
    p.x = a.x, p.x_step = a.x_step, p.out = active.mutable_data_ptr();
    FASTNAS_DISPATCH(active.scalar_type(), "mixed_cell",
                     [&](auto t) { FASTNAS_CALL(active, partial_channels_split<decltype(t)>, p); });
    a.x = p.out, a.x_step = width;
    return active;
  }

  // Writes a node, whose edges' candidates add up to `mixed`.
  void merge(int n, void* together, void* apart, const void* mixed) const {
    PartialChannelsArgs p = partial(OH, OW);
    for (const CellEdge& e : list)
      if (e.node == n) {
        const State from = state(e.source, together, apart);
        p.edges[p.edges_count++] = {from.data, from.step, static_cast<int>(e.stride), e.row};
      }
    const State to = node(n, together, apart);
    p.mixed = mixed, p.out = to.data, p.out_step = to.step;
    FASTNAS_DISPATCH(inputs[0].scalar_type(), "mixed_cell",
                     [&](auto t) { FASTNAS_CALL(inputs[0], partial_channels<decltype(t)>, p); });
  }

  // From a node's gradient that of its edges' candidates, to `grad_mixed`.
  void unmerge(State grad, void* grad_mixed) const {
    PartialChannelsArgs p = partial(OH, OW);
    p.edges[p.edges_count++] = {grad.data, grad.step};
    p.out = grad_mixed;
    FASTNAS_DISPATCH(inputs[0].scalar_type(), "mixed_cell",
                     [&](auto t) { FASTNAS_CALL(inputs[0], partial_channels_backward<decltype(t)>, p); });
  }

  const char* op;
  const std::vector<Tensor>& inputs;
  const Tensor& weights;
  const std::vector<Tensor>&params, &maps;
  const std::vector<int64_t>& plan;
  std::vector<CellEdge> list;
  const int64_t k;
  int sources, states, kept, candidates;       // kept: nodes that are not concatenated
  int64_t N, C, width, OH, OW, bytes, concat;  // width: channels of the candidates
  const void* edge_weights = nullptr;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixed_cell(
    const std::vector<Tensor>& inputs, const Tensor& weights, const std::optional<Tensor>& edge_weights,
    const std::vector<Tensor>& params, const std::vector<Tensor>& maps, const std::vector<int64_t>& plan,
    const std::vector<int64_t>& edges, int64_t concat, int64_t k, const std::vector<double>& eps,
    const std::optional<Tensor>& mean, const std::optional<Tensor>& invstd) {
  Cell cell("mixed_cell", inputs, weights, params, maps, plan, edges, concat, k, edge_weights);
  const Tensor& x = inputs[0];
  const int64_t norms = cell.count_norms();
  STD_TORCH_CHECK(static_cast<int64_t>(eps.size()) == norms, "mixed_cell: eps must have one entry for each of the ",
                  norms, " norms");
  STD_TORCH_CHECK(mean.has_value() == invstd.has_value(), "mixed_cell: mean and invstd go together");
  OnDevice guard(x);
  const bool training = !mean.has_value();
  Tensor y = empty_map({cell.N, concat * cell.C, cell.OH, cell.OW}, x);
  Tensor states = cell.blob(cell.kept, cell.C), outs = cell.blob(cell.count_stages(), cell.width);
  Tensor sums = cell.blob(k > 1 ? cell.states - cell.sources : 0, cell.width);
  auto sum = [&](int node) {
    return static_cast<char*>(sums.mutable_data_ptr()) + (node - cell.sources) * cell.map_bytes(cell.width);
  };
  std::vector<Tensor> statistics;
  for (int i = 0; i < 3; ++i) statistics.push_back(empty({training ? norms : 0, cell.width}, compute_dtype(x), x));
  std::vector<bool> begun(cell.states), merged(cell.states);
  void *together = y.mutable_data_ptr(), *apart = states.mutable_data_ptr();
  cell.each_fan(false, together, apart, outs.mutable_data_ptr(),
                [&](MixedOpArgs& a, size_t first, int64_t, int64_t norm) {
                  a.training = training;
                  std::copy_n(eps.begin() + norm, a.norms, a.eps);
                  const Tensor &m = training ? statistics[0] : *mean, &s = training ? statistics[1] : *invstd;
                  set_statistics("mixed_cell", a, m, s, x, norm, norms);
                  if (training)
                    a.variance = static_cast<char*>(statistics[2].mutable_data_ptr()) +
                                 norm * cell.width * static_cast<int64_t>(statistics[2].element_size());
                  for (int e = 0; e < a.edges_count; ++e) {
                    const int node = cell.list[first + e].node;
                    const State to = k > 1 ? State{sum(node), cell.width} : cell.node(node, together, apart);
                    a.edges[e].y = to.data, a.edges[e].step = to.step, a.edges[e].add = begun[node];
                    begun[node] = true;
                  }
                  if (k == 1) return run_mixed_op(x, a, false);
                  const int source = cell.list[first].source;
                  if (source >= cell.sources) cell.merge(source, together, apart, sum(source)), merged[source] = true;
                  const Tensor active = cell.narrow(a);
                  run_mixed_op(x, a, false);
                });
  for (int n = cell.sources; k > 1 && n < cell.states; ++n)
    if (!merged[n]) cell.merge(n, together, apart, sum(n));
  return {std::move(y), std::move(states), std::move(outs), statistics[0], statistics[1], statistics[2]};
}

// The gradient of a state, and of the edge weights, where any of them is wanted. CUDA kernels take their scratch from
// torch's allocator.
void run_partial_backward(const Tensor& x, PartialChannelsArgs& p) {
  if (!p.out && !p.grad_edge_weights) return;
  int64_t bytes = 0;
#if defined(FASTNAS_CUDA) || defined(FASTNAS_EMULATED)
#ifndef FASTNAS_EMULATED
  if (x.is_cuda())
#endif
    bytes = cuda::partial_channels_workspace(p);
#endif
  Tensor scratch = empty({bytes}, ScalarType::Byte, x);
  p.workspace = scratch.mutable_data_ptr();
  FASTNAS_DISPATCH(x.scalar_type(), "_mixed_cell_backward",
                   [&](auto t) { FASTNAS_CALL(x, partial_channels_split_backward<decltype(t)>, p); });
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> mixed_cell_backward(
    const Tensor& grad, const std::vector<Tensor>& inputs, const Tensor& y, const Tensor& states, const Tensor& weights,
    const std::optional<Tensor>& edge_weights, const std::vector<Tensor>& params, const std::vector<Tensor>& maps,
    const Tensor& outs, const Tensor& mean, const Tensor& invstd, const std::vector<int64_t>& plan,
    const std::vector<int64_t>& edges, int64_t concat, int64_t k, bool training,
    const std::vector<int64_t>& need_inputs, bool need_edge_weights, bool need_params, bool need_maps) {
  const char* op = "_mixed_cell_backward";
  Cell cell(op, inputs, weights, params, maps, plan, edges, concat, k, edge_weights);
  const Tensor& x = inputs[0];
  for (const Tensor* t : {&grad, &y})
    STD_TORCH_CHECK(is_channels_last(*t) && t->size(0) == cell.N && t->size(1) == concat * cell.C &&
                        t->size(2) == cell.OH && t->size(3) == cell.OW && t->scalar_type() == x.scalar_type() &&
                        t->device() == x.device(),
                    op, ": grad and y must be channels_last, of the output's shape, dtype and device");
  STD_TORCH_CHECK(need_inputs.size() == inputs.size(), op, ": need_inputs must have one entry an input");
  STD_TORCH_CHECK(states.is_contiguous() && states.numel() * cell.bytes == cell.kept * cell.map_bytes(cell.C) &&
                      outs.is_contiguous() &&
                      outs.numel() * cell.bytes == cell.count_stages() * cell.map_bytes(cell.width),
                  op, ": states and outs must be those of the forward");
  OnDevice guard(x);
  // Each node's gradient is complete when the fan that leaves it has run; a node that no edge leaves has that of y.
  Tensor together = empty_map({cell.N, concat * cell.C, cell.OH, cell.OW}, x), apart = cell.blob(cell.kept, cell.C);
  std::vector<bool> leaves(cell.states);
  for (const CellEdge& e : cell.list) leaves[e.source] = true;
  std::vector<Tensor> grad_inputs, grad_params, grad_maps;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::vector<int64_t> size = {cell.N, cell.C, inputs[i].size(2), inputs[i].size(3)};
    if (need_inputs[i] && !leaves[i])
      grad_inputs.push_back(torch::stable::new_zeros(inputs[i], size));
    else
      grad_inputs.push_back(need_inputs[i] ? empty_map(size, x) : empty({0}, x.scalar_type(), x));
  }
  if (need_params)
    for (const Tensor& p : params) grad_params.push_back(torch::stable::empty_like(p));
  if (need_maps)
    for (const Tensor& m : maps) grad_maps.push_back(torch::stable::empty_like(m));
  Tensor grad_weights = torch::stable::new_zeros(weights, {weights.size(0), weights.size(1)});
  void *out_together = const_cast<void*>(y.const_data_ptr()), *out_apart = const_cast<void*>(states.const_data_ptr());
  void *to_together = together.mutable_data_ptr(), *to_apart = apart.mutable_data_ptr();
  void* from_grad = const_cast<void*>(grad.const_data_ptr());
  // Where the complete gradient of a node lies.
  auto gradient = [&](int n) {
    return leaves[n] ? cell.node(n, to_together, to_apart) : cell.node(n, from_grad, nullptr);
  };
  need_edge_weights &= edge_weights.has_value();
  Tensor grad_edge_weights = torch::stable::new_zeros(weights, {need_edge_weights ? weights.size(0) : 0});
  Tensor grad_sums = cell.blob(k > 1 ? cell.states - cell.sources : 0, cell.width);
  auto grad_sum = [&](int node) {
    return static_cast<char*>(grad_sums.mutable_data_ptr()) + (node - cell.sources) * cell.map_bytes(cell.width);
  };
  for (int n = cell.sources; k > 1 && n < cell.states; ++n)
    if (!leaves[n]) cell.unmerge(gradient(n), grad_sum(n));
  size_t param = params.size(), map = maps.size();
  cell.each_fan(true, out_together, out_apart, const_cast<void*>(outs.const_data_ptr()),
                [&](MixedOpArgs& a, size_t first, int64_t, int64_t norm) {
                  a.training = training;
                  set_statistics(op, a, mean, invstd, x, norm, cell.count_norms());
                  a.grad_weights = grad_weights.mutable_data_ptr();
                  for (int e = 0; e < a.edges_count; ++e) {
                    const int node = cell.list[first + e].node;
                    const State from = k > 1 ? State{grad_sum(node), cell.width} : gradient(node);
                    a.edges[e].grad = from.data, a.edges[e].step = from.step;
                  }
                  const int source = cell.list[first].source;
                  if (source >= cell.sources) {
                    const State to = cell.node(source, to_together, to_apart),
                                add = cell.node(source, from_grad, nullptr);
                    a.grad_x = to.data, a.grad_x_step = to.step;
                    if (source >= cell.sources + cell.kept) a.grad_add = add.data, a.grad_add_step = add.step;
                  } else if (need_inputs[source]) {
                    a.grad_x = grad_inputs[source].mutable_data_ptr(), a.grad_x_step = cell.C;
                  }
                  std::vector<Tensor> chain;
                  for (int i = a.stages_count - 1; i >= 0; --i) {
                    Stage& s = a.stages[i];
                    param -= s.dense ? 1 : 2;
                    if (need_params) {
                      size_t at = param;
                      if (!s.dense) s.grad_depthwise = grad_params[at++].mutable_data_ptr();
                      s.grad_pointwise = grad_params[at].mutable_data_ptr();
                    }
                    if (s.source >= 0) {
                      chain.push_back(empty_map({cell.N, cell.width, cell.OH, cell.OW}, x));
                      a.stages[s.source].grad_norm = chain.back().mutable_data_ptr();
                    }
                  }
                  for (int t = a.terms_count - 1; t >= 0; --t)
                    if (a.terms[t].kind == Kind::map) {
                      --map;
                      if (need_maps) a.terms[t].grad = grad_maps[map].mutable_data_ptr();
                    }
                  if (k == 1) return run_mixed_op(x, a, true);
                  // The fan gives the gradient of the channels that its candidates have; the others' is added here.
                  PartialChannelsArgs p = cell.partial(a.H, a.W);
                  p.x = a.x, p.x_step = a.x_step;
                  p.out = std::exchange(a.grad_x, nullptr), p.out_step = a.grad_x_step;
                  p.grad_add = std::exchange(a.grad_add, nullptr), p.grad_add_step = a.grad_add_step;
                  if (need_edge_weights) p.grad_edge_weights = grad_edge_weights.mutable_data_ptr();
                  for (int e = 0; e < a.edges_count; ++e) {
                    const CellEdge& edge = cell.list[first + e];
                    const State from = gradient(edge.node);
                    p.edges[p.edges_count++] = {from.data, from.step, a.stride, edge.row};
                  }
                  const Tensor active = cell.narrow(a);
                  std::optional<Tensor> grad_active;
                  if (p.out) {
                    grad_active = empty_map({cell.N, cell.width, a.H, a.W}, x);
                    p.grad_active = a.grad_x = grad_active->mutable_data_ptr();
                    a.grad_x_step = cell.width;
                  }
                  run_mixed_op(x, a, true);
                  run_partial_backward(x, p);
                  if (source >= cell.sources) cell.unmerge(gradient(source), grad_sum(source));
                });
  return {std::move(grad_inputs), std::move(grad_weights), std::move(grad_edge_weights), std::move(grad_params),
          std::move(grad_maps)};
}
}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_FRAGMENT(FASTNAS_OPS, m) {
  m.def(
      "mixed_cell(Tensor[] inputs, Tensor weights, Tensor? edge_weights, Tensor[] params, Tensor[] maps, int[] plan, "
      "int[] edges, int concat, int k, float[] eps, Tensor? mean, Tensor? invstd) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def(
      "_mixed_cell_backward(Tensor grad, Tensor[] inputs, Tensor y, Tensor states, Tensor weights, Tensor? "
      "edge_weights, Tensor[] params, Tensor[] maps, Tensor outs, Tensor mean, Tensor invstd, int[] plan, int[] edges, "
      "int concat, int k, bool training, int[] need_inputs, bool need_edge_weights, bool need_params, bool need_maps) "
      "-> (Tensor[], Tensor, Tensor, Tensor[], Tensor[])");
}
FASTNAS_IMPL("mixed_cell", &fastnas::mixed_cell)
FASTNAS_IMPL("_mixed_cell_backward", &fastnas::mixed_cell_backward)
