// What CUDA has and the CPU has not: products of halves with sums in fp32, and the memory-efficient kernel of
// scaled_dot_product_attention, with what it keeps for the backward pass.

#include <ATen/ATen.h>
#include <ATen/native/transformers/attention.h>
#include <torch/library.h>

#include <cmath>

#include "host.h"

namespace {

using at::Tensor;
using host_gpu::count_operation;
using host_gpu::host;
using host_gpu::Inside;
using MaybeTensor = std::optional<Tensor>;

// Products of halves with sums in fp32.

void check_product(const Tensor& a, const Tensor& b, at::ScalarType dtype, const Tensor& out) {
  count_operation();
  TORCH_CHECK(a.is_cuda() && b.is_cuda() && out.is_cuda(), "Expected all tensors to be on the same device");
  bool halves = a.scalar_type() == at::kHalf || a.scalar_type() == at::kBFloat16;
  TORCH_CHECK(a.scalar_type() == b.scalar_type() && (dtype == a.scalar_type() || (halves && dtype == at::kFloat)),
              "out_dtype must be that of the factors, or fp32 for fp16 and bf16");
}

Tensor& addmm_out(const Tensor& c, const Tensor& a, const Tensor& b, at::ScalarType dtype, const at::Scalar& beta,
                  const at::Scalar& alpha, Tensor& out) {
  check_product(a, b, dtype, out);
  TORCH_CHECK(c.is_cuda(), "Expected all tensors to be on the same device");
  TORCH_CHECK(out.scalar_type() == dtype && (c.scalar_type() == dtype || c.scalar_type() == a.scalar_type()),
              "the summand or out has the wrong dtype");
  auto sum = at::addmm(host(c).to(at::kFloat), host(a).to(at::kFloat), host(b).to(at::kFloat), beta, alpha);
  host(out.resize_(sum.sizes())).copy_(sum);
  return out;
}

Tensor addmm(const Tensor& c, const Tensor& a, const Tensor& b, at::ScalarType dtype, const at::Scalar& beta,
             const at::Scalar& alpha) {
  auto out = at::empty({a.size(0), b.size(1)}, a.options().dtype(dtype));
  return addmm_out(c, a, b, dtype, beta, alpha, out);
}

Tensor& mm_out(const Tensor& a, const Tensor& b, at::ScalarType dtype, Tensor& out) {
  out.resize_({a.size(0), b.size(1)});
  return addmm_out(at::zeros({1}, out.options()), a, b, dtype, 0, 1, out);
}

Tensor mm(const Tensor& a, const Tensor& b, at::ScalarType dtype) {
  auto out = at::empty({a.size(0), b.size(1)}, a.options().dtype(dtype));
  return mm_out(a, b, dtype, out);
}

Tensor& bmm_out(const Tensor& a, const Tensor& b, at::ScalarType dtype, Tensor& out) {
  check_product(a, b, dtype, out);
  auto product = at::bmm(host(a).to(at::kFloat), host(b).to(at::kFloat));
  host(out.resize_(product.sizes())).copy_(product);
  return out;
}

Tensor bmm(const Tensor& a, const Tensor& b, at::ScalarType dtype) {
  auto out = at::empty({a.size(0), a.size(1), b.size(2)}, a.options().dtype(dtype));
  return bmm_out(a, b, dtype, out);
}

// Attention as the memory-efficient kernel does it, (B, heads, L, head size); grouped heads as the flash kernel takes
// them.

int64_t choice(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, double, bool, std::optional<double>,
               bool) {
  return 2;
}

Tensor wide(const Tensor& t) { return host(t).to(at::kFloat); }
Tensor repeat_heads(const Tensor& t, int64_t n) { return t.size(1) == n ? t : t.repeat_interleave(n / t.size(1), 1); }
Tensor sum_heads(const Tensor& t, int64_t n) { return t.size(1) == n ? t : t.unflatten(1, {n, t.size(1) / n}).sum(2); }

struct Softmax {
  Tensor p, logsumexp;
  double scale;
};

Softmax softmax(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& bias, double dropout, bool causal,
                std::optional<double> scale) {
  count_operation();
  bool biased = bias && bias->defined();
  TORCH_CHECK(q.is_cuda() && k.is_cuda() && v.is_cuda() && (!biased || bias->is_cuda()),
              "Expected all tensors to be on the same device");
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type() &&
                  (!biased || bias->scalar_type() == q.scalar_type()),
              "Expected query, key, value and mask of one dtype");
  TORCH_CHECK(dropout == 0, "this device has no attention with dropout");
  double by = scale.value_or(1 / std::sqrt(static_cast<double>(q.size(-1))));
  auto scores = at::matmul(wide(q), repeat_heads(wide(k), q.size(1)).transpose(-1, -2)) * by;
  if (biased) scores = scores + wide(*bias);
  if (causal)
    scores = scores.masked_fill(at::ones({q.size(-2), k.size(-2)}, at::kBool).tril().logical_not(), -INFINITY);
  auto sums = at::logsumexp(scores, -1);
  return {at::nan_to_num(at::exp(scores - sums.unsqueeze(-1)), 0.0), sums, by};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                     const MaybeTensor& bias, bool, double dropout, bool causal,
                                                     std::optional<double> scale) {
  auto found = softmax(q, k, v, bias, dropout, causal, scale);
  Inside own;
  auto out = at::matmul(found.p, repeat_heads(wide(v), q.size(1))).to(q.scalar_type());
  auto seed = at::zeros({}, at::kLong);
  return {out.transpose(1, 2).contiguous().to(q.device()).transpose(1, 2), found.logsumexp.to(q.device()), seed, seed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                              const Tensor& v, const Tensor& bias, const Tensor&,
                                                              const Tensor&, const Tensor&, const Tensor&,
                                                              double dropout, std::array<bool, 4> wanted, bool causal,
                                                              std::optional<double> scale) {
  auto found = softmax(q, k, v, bias.defined() ? MaybeTensor(bias) : std::nullopt, dropout, causal, scale);
  Inside own;
  auto g = wide(grad), dp = at::matmul(g, repeat_heads(wide(v), q.size(1)).transpose(-1, -2));
  auto ds = found.p * (dp - (found.p * dp).sum(-1, true));
  auto as_of = [](const Tensor& gradient, const Tensor& t) { return gradient.to(t.scalar_type()).to(t.device()); };
  Tensor gq, gk, gv, gb;
  if (wanted[0]) gq = as_of(at::matmul(ds, repeat_heads(wide(k), q.size(1))) * found.scale, q);
  if (wanted[1]) gk = as_of(sum_heads(at::matmul(ds.transpose(-1, -2), wide(q)) * found.scale, k.size(1)), k);
  if (wanted[2]) gv = as_of(sum_heads(at::matmul(found.p.transpose(-1, -2), g), v.size(1)), v);
  if (wanted[3] && bias.defined()) gb = as_of(at::sum_to(ds, bias.sizes()), bias);
  return {gq, gk, gv, gb};
}

}  // namespace

namespace at::native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &choice)
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("mm.dtype", mm);
  m.impl("mm.dtype_out", mm_out);
  m.impl("bmm.dtype", bmm);
  m.impl("bmm.dtype_out", bmm_out);
  m.impl("addmm.dtype", addmm);
  m.impl("addmm.dtype_out", addmm_out);
  m.impl("_scaled_dot_product_efficient_attention", attention);
  m.impl("_scaled_dot_product_efficient_attention_backward", attention_backward);
}
