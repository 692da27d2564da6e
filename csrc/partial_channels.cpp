#include "partial_channels.h"

#include "common.h"

namespace fastnas {
namespace {
// Geometry of (N, C, H, W), over which an edge of this stride goes.
PartialChannelsArgs arguments(const char* op, const std::vector<int64_t>& size, int64_t k, int64_t stride) {
  STD_TORCH_CHECK(size.size() == 4, op, ": x must be 4-d, (N, C, H, W)");
  STD_TORCH_CHECK(k >= 1 && k <= INT32_MAX && size[1] % k == 0, op, ": k = ", k, " must divide the ", size[1],
                  " channels");
  STD_TORCH_CHECK(stride == 1 || stride == 2, op, ": stride must be 1 or 2, got ", stride);
  STD_TORCH_CHECK(size[2] % stride == 0 && size[3] % stride == 0, op, ": stride 2 needs an even height and width");
  PartialChannelsArgs a;
  a.N = size[0], a.C = size[1], a.H = size[2], a.W = size[3];
  a.k = static_cast<int>(k);
  a.x_step = a.out_step = a.C;
  return a;
}

std::vector<int64_t> sizes(const Tensor& t) {
  std::vector<int64_t> size;
  for (int64_t d = 0; d < t.dim(); ++d) size.push_back(t.size(d));
  return size;
}

void check(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& size, const Tensor& like) {
  STD_TORCH_CHECK(is_channels_last(t) && sizes(t) == size, op, ": ", name, " must be channels_last of shape (", size[0],
                  ", ", size[1], ", ", size[2], ", ", size[3], ")");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type() && t.device() == like.device(), op, ": ", name,
                  " differs in dtype or device");
}

Tensor partial_channels_split(const Tensor& x, int64_t k) {
  const char* op = "partial_channels_split";
  PartialChannelsArgs a = arguments(op, sizes(x), k, 1);
  check(op, "x", x, sizes(x), x);
  OnDevice guard(x);
  Tensor active = empty_channels_last({a.N, a.C / k, a.H, a.W}, x);
  a.x = x.const_data_ptr();
  a.out = active.mutable_data_ptr();
  if (active.numel() > 0)
    FASTNAS_DISPATCH(x.scalar_type(), "partial_channels_split",
                     [&](auto t) { FASTNAS_CALL(x, partial_channels_split<decltype(t)>, a); });
  return active;
}

Tensor partial_channels_split_backward(const std::optional<Tensor>& grad_active, const std::optional<Tensor>& grad,
                                       const std::optional<Tensor>& x, std::vector<int64_t> size, int64_t k,
                                       int64_t stride) {
  const char* op = "_partial_channels_split_backward";
  STD_TORCH_CHECK(grad_active || grad, op, ": grad_active and grad are both missing");
  const Tensor& like = grad ? *grad : *grad_active;
  PartialChannelsArgs a = arguments(op, size, k, stride);
  if (grad_active) {
    check(op, "grad_active", *grad_active, {a.N, a.C / k, a.H, a.W}, like);
    a.grad_active = grad_active->const_data_ptr();
  }
  if (grad) {
    check(op, "grad", *grad, {a.N, a.C, a.H / stride, a.W / stride}, like);
    a.edges[a.edges_count++] = {grad->const_data_ptr(), a.C, static_cast<int>(stride)};
    STD_TORCH_CHECK(x || stride == 1, op, ": stride 2 needs x");
  }
  if (x) {
    check(op, "x", *x, size, like);
    a.x = x->const_data_ptr();
  }
  OnDevice guard(like);
  Tensor grad_x = empty_channels_last(size, like);
  a.out = grad_x.mutable_data_ptr();
  if (grad_x.numel() > 0)
    FASTNAS_DISPATCH(like.scalar_type(), "_partial_channels_split_backward",
                     [&](auto t) { FASTNAS_CALL(like, partial_channels_split_backward<decltype(t)>, a); });
  return grad_x;
}

Tensor partial_channels(const Tensor& mixed, const Tensor& x, int64_t k, int64_t stride) {
  const char* op = "partial_channels";
  PartialChannelsArgs a = arguments(op, sizes(x), k, stride);
  check(op, "x", x, sizes(x), x);
  check(op, "mixed", mixed, {a.N, a.C / k, a.H / stride, a.W / stride}, x);
  OnDevice guard(x);
  a.H /= stride, a.W /= stride;
  Tensor y = empty_channels_last({a.N, a.C, a.H, a.W}, x);
  a.edges[a.edges_count++] = {x.const_data_ptr(), a.C, static_cast<int>(stride)};
  a.mixed = mixed.const_data_ptr();
  a.out = y.mutable_data_ptr();
  if (y.numel() > 0)
    FASTNAS_DISPATCH(x.scalar_type(), "partial_channels",
                     [&](auto t) { FASTNAS_CALL(x, partial_channels<decltype(t)>, a); });
  return y;
}

Tensor partial_channels_backward(const Tensor& grad, int64_t k) {
  const char* op = "_partial_channels_backward";
  PartialChannelsArgs a = arguments(op, sizes(grad), k, 1);
  check(op, "grad", grad, sizes(grad), grad);
  OnDevice guard(grad);
  Tensor grad_mixed = empty_channels_last({a.N, a.C / k, a.H, a.W}, grad);
  a.edges[a.edges_count++] = {grad.const_data_ptr(), a.C};
  a.out = grad_mixed.mutable_data_ptr();
  if (grad_mixed.numel() > 0)
    FASTNAS_DISPATCH(grad.scalar_type(), "_partial_channels_backward",
                     [&](auto t) { FASTNAS_CALL(grad, partial_channels_backward<decltype(t)>, a); });
  return grad_mixed;
}
}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_FRAGMENT(FASTNAS_OPS, m) {
  m.def("partial_channels_split(Tensor x, int k) -> Tensor");
  m.def(
      "_partial_channels_split_backward(Tensor? grad_active, Tensor? grad, Tensor? x, int[] size, int k, int stride) "
      "-> Tensor");
  m.def("partial_channels(Tensor mixed, Tensor x, int k, int stride) -> Tensor");
  m.def("_partial_channels_backward(Tensor grad, int k) -> Tensor");
}
FASTNAS_IMPL("partial_channels_split", &fastnas::partial_channels_split)
FASTNAS_IMPL("_partial_channels_split_backward", &fastnas::partial_channels_split_backward)
FASTNAS_IMPL("partial_channels", &fastnas::partial_channels)
FASTNAS_IMPL("_partial_channels_backward", &fastnas::partial_channels_backward)
