#include "absolute.h"

#include <algorithm>
#include <cstring>

#include "common.h"

namespace fastnas {
namespace {
Float float_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return Float::half;
    case ScalarType::BFloat16:
      return Float::bfloat16;
    case ScalarType::Float:
      return Float::single;
    case ScalarType::Double:
      return Float::twofold;
    default:
      STD_TORCH_CHECK(false, op, ": tensors must be float16, bfloat16, float32 or float64");
  }
}

// True where the elements fill a stretch of memory, each place once.
bool is_dense(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> order;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return true;
    if (t.size(d) > 1) order.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(order.begin(), order.end());
  int64_t expected = 1;
  for (auto [stride, size] : order) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// The table of some tensors, and numbers that lie behind it; on the tensors' device.
class Table {
 public:
  void add(const char* op, const Tensor& t, const Tensor& like, const void* gradient = nullptr) {
    STD_TORCH_CHECK(t.device() == like.device(), op, ": tensors must be on one device");
    STD_TORCH_CHECK(is_dense(t), op, ": tensors must be dense in memory");
    Listed entry{t.mutable_data_ptr(), gradient, t.numel(), words, pieces, float_of(op, t)};
    if (entry.n == 0) return;
    words += entry.words(), pieces += entry.pieces();
    bytes += entry.n * float_size(entry.type) * 2;  // read and written, or two tensors read
    entries.push_back(entry);
  }

  void put(AbsoluteArgs& a, const Tensor& like, const std::vector<int64_t>& groups = {}) {
    const size_t size = entries.size() * sizeof(Listed), tail = groups.size() * sizeof(int64_t);
    memory = torch::stable::empty({static_cast<int64_t>(size + tail)}, ScalarType::Byte);
    char* to = static_cast<char*>(memory->mutable_data_ptr());
    if (size) std::memcpy(to, entries.data(), size);
    if (tail) std::memcpy(to + size, groups.data(), tail);
    if (like.is_cuda()) memory = torch::stable::to(*memory, like.device());
    const char* at = static_cast<const char*>(memory->const_data_ptr());
    a.table = reinterpret_cast<const Listed*>(at), a.groups = reinterpret_cast<const int64_t*>(at + size);
    a.count = static_cast<int64_t>(entries.size()), a.pieces = pieces, a.bytes = bytes;
  }

  std::vector<Listed> entries;
  int64_t words = 0, pieces = 0, bytes = 0;

 private:
  std::optional<Tensor> memory;
};

Tensor absolute(const std::vector<Tensor>& tensors) {
  const char* op = "absolute_";  // torch finds no kernel for an empty list
  Table table;
  for (const Tensor& t : tensors) table.add(op, t, tensors[0]);
  OnDevice guard(tensors[0]);
  Tensor signs = empty({table.words}, ScalarType::Int, tensors[0]);
  AbsoluteArgs a;
  a.signs = static_cast<uint32_t*>(signs.mutable_data_ptr());
  table.put(a, tensors[0]);
  a.bytes += table.words * static_cast<int64_t>(sizeof(uint32_t));
  if (a.pieces > 0) FASTNAS_CALL(tensors[0], absolute, a);
  return signs;
}

void restore(const std::vector<Tensor>& tensors, const Tensor& signs) {
  const char* op = "restore_";
  STD_TORCH_CHECK(!tensors.empty(), op, ": tensors must not be empty");
  Table table;
  for (const Tensor& t : tensors) table.add(op, t, tensors[0]);
  STD_TORCH_CHECK(signs.dim() == 1 && signs.numel() == table.words && signs.scalar_type() == ScalarType::Int &&
                      signs.is_contiguous() && signs.device() == tensors[0].device(),
                  op, ": signs must be what absolute_ returned for these tensors");
  OnDevice guard(tensors[0]);
  AbsoluteArgs a;
  a.signs = static_cast<uint32_t*>(const_cast<void*>(signs.const_data_ptr()));
  table.put(a, tensors[0]);
  a.bytes += table.words * static_cast<int64_t>(sizeof(uint32_t));
  if (a.pieces > 0) FASTNAS_CALL(tensors[0], restore, a);
}

// Pieces of one group lie side by side, whatever the order of the tensors.
Tensor group_products(const std::vector<Tensor>& thetas, const std::vector<Tensor>& grads,
                      const std::vector<int64_t>& groups, int64_t count, bool absolute) {
  const char* op = "group_products";
  STD_TORCH_CHECK(!thetas.empty() && thetas.size() == grads.size() && thetas.size() == groups.size(), op,
                  ": thetas, grads and groups must have the same length, at least 1");
  std::vector<size_t> order(thetas.size());
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = i;
    STD_TORCH_CHECK(groups[i] >= 0 && groups[i] < count, op, ": groups must be of 0 to ", count - 1, ", got ",
                    groups[i]);
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t i, size_t j) { return groups[i] < groups[j]; });
  Table table;
  std::vector<int64_t> begin(static_cast<size_t>(count) + 1);
  for (size_t i : order) {
    const Tensor &theta = thetas[i], &grad = grads[i];
    bool same =
        theta.dim() == grad.dim() && theta.scalar_type() == grad.scalar_type() && theta.device() == grad.device();
    for (int64_t d = 0; same && d < theta.dim(); ++d)
      same = theta.size(d) == grad.size(d) && (theta.size(d) < 2 || theta.stride(d) == grad.stride(d));
    STD_TORCH_CHECK(same, op, ": grads must have the thetas' shapes, strides, dtypes and device");
    table.add(op, theta, thetas[0], grad.const_data_ptr());
    begin[static_cast<size_t>(groups[i]) + 1] = table.pieces;
  }
  for (size_t g = 1; g < begin.size(); ++g) begin[g] = std::max(begin[g], begin[g - 1]);
  OnDevice guard(thetas[0]);
  Tensor sums = empty({count}, ScalarType::Double, thetas[0]);
  Tensor partial = empty({table.pieces}, ScalarType::Double, thetas[0]);
  AbsoluteArgs a;
  table.put(a, thetas[0], begin);
  a.groups_count = count, a.absolute = absolute;
  a.partial = static_cast<double*>(partial.mutable_data_ptr());
  a.sums = static_cast<double*>(sums.mutable_data_ptr());
  if (count > 0) FASTNAS_CALL(thetas[0], group_products, a);
  return sums;
}
}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_FRAGMENT(FASTNAS_OPS, m) {
  m.def("absolute_(Tensor(a!)[] tensors) -> Tensor");
  m.def("restore_(Tensor(a!)[] tensors, Tensor signs) -> ()");
  m.def("group_products(Tensor[] thetas, Tensor[] grads, int[] groups, int count, bool absolute) -> Tensor");
}
FASTNAS_IMPL("absolute_", &fastnas::absolute)
FASTNAS_IMPL("restore_", &fastnas::restore)
FASTNAS_IMPL("group_products", &fastnas::group_products)
