// The Python module `synpo_kernels._C`: what was built, and the tensor ops torch.ops.synpo_kernels.*.
//
// Ops are registered through libtorch's stable ABI (torch/csrc/stable), so this binary loads beside any torch from 2.11 on.
// synpo_kernels/contrast.py checks arguments and documents them; the checks here only keep a direct caller out of bad memory.

#include "contrast.h"
#include "head_pass.h"
#include "isa.h"
#include "product.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

namespace py = pybind11;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace synpo {
namespace {

// RuntimeError in Python. Not STD_TORCH_CHECK, which puts its message together in a std::ostringstream: beside torch 2.11, on
// Ubuntu 24.04 with CUDA, one that failed ended the process.
void check(bool holds, const char* message) {
  if (!holds) throw std::runtime_error(message);
}

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    default:
      throw std::runtime_error("logits, or hidden states and their head, must be float32, bfloat16 or float16");
  }
}

Batch batch_of(const Tensor& expert, const std::optional<Tensor>& amateur, double alpha) {
  isa();  // what is wrong with $SYNPO_CPU_ISA is told here: a thread could not
  const auto row_major = [](const Tensor& t) { return t.dim() == 2 && (t.stride(1) == 1 || t.size(1) == 1); };
  check(row_major(expert), "expert must be (B, V) with contiguous rows");
  check(expert.size(1) > 0 && expert.size(1) <= INT32_MAX, "expert must have 1 to 2^31 - 1 tokens");
  Batch batch{expert.size(0), expert.size(1), expert.const_data_ptr(), nullptr, expert.stride(0), 0, type_of(expert), alpha};
  if (amateur.has_value()) {
    check(row_major(*amateur) && amateur->size(0) == batch.rows && amateur->size(1) == batch.vocab &&
              amateur->scalar_type() == expert.scalar_type(),
          "amateur must have the shape and dtype of expert, with contiguous rows");
    batch.amateur = amateur->const_data_ptr();
    batch.amateur_stride = amateur->stride(0);
  }
  return batch;
}

float offset_of(double plausibility) { return plausibility > 0.0 ? static_cast<float>(std::log(plausibility)) : -kInf; }

std::tuple<Tensor, Tensor> contrastive_sample(Tensor expert, std::optional<Tensor> amateur, Tensor uniform, double alpha,
                                              double plausibility, double temperature, int64_t top_k, double top_p, double min_p,
                                              std::optional<Tensor> history, double repetition_penalty) {
  const Batch batch = batch_of(expert, amateur, alpha);
  check(uniform.numel() == batch.rows && uniform.is_contiguous() && uniform.scalar_type() == ScalarType::Double,
        "uniform must be (B,) float64");
  if (history.has_value()) {
    check(history->dim() == 2 && history->size(0) == batch.rows && history->is_contiguous() &&
              history->scalar_type() == ScalarType::Long,
          "history must be (B, L) int64");
  }
  Tensor tokens = torch::stable::new_empty(expert, {batch.rows}, ScalarType::Long);
  Tensor logps = torch::stable::new_empty(expert, {batch.rows}, ScalarType::Float);
  const Sampling sampling{offset_of(plausibility),
                          temperature,
                          top_k,
                          top_p,
                          min_p,
                          static_cast<float>(repetition_penalty),
                          static_cast<float>(1.0 / repetition_penalty)};
  sample(batch, sampling, static_cast<const double*>(uniform.const_data_ptr()),
         history.has_value() ? static_cast<const int64_t*>(history->const_data_ptr()) : nullptr,
         history.has_value() ? history->size(1) : 0, static_cast<int64_t*>(tokens.mutable_data_ptr()),
         static_cast<float*>(logps.mutable_data_ptr()));
  return {tokens, logps};
}

Tensor contrastive_mix(Tensor expert, std::optional<Tensor> amateur, double alpha, double plausibility) {
  const Batch batch = batch_of(expert, amateur, alpha);
  Tensor out = torch::stable::new_empty(expert, {batch.rows, batch.vocab}, ScalarType::Float);
  mix(batch, offset_of(plausibility), static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

// x (N, D) and labels (N,) contiguous, W (V, D) with contiguous rows, softcap 0: none → s (N,), z_y (N,) and U (N, D), empty
// where it is not wanted, holding `workspace` bytes beside them; see head_pass.h.
std::tuple<Tensor, Tensor, Tensor> head_pass_op(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor labels,
                                                double softcap, double logit_scale, int64_t workspace, bool want_direction) {
  check(x.dim() == 2 && x.is_contiguous(), "x must be (N, D), contiguous");
  const int64_t rows = x.size(0), hidden = x.size(1);
  check(weight.dim() == 2 && weight.size(1) == hidden && (weight.stride(1) == 1 || hidden == 1) &&
            weight.scalar_type() == x.scalar_type() && weight.size(0) > 0 && weight.size(0) <= INT32_MAX,
        "weight must be (V, D) of the dtype of x, with contiguous rows, V from 1 to 2^31 - 1");
  check(!bias.has_value() || (bias->numel() == weight.size(0) && bias->is_contiguous() &&
                              bias->scalar_type() == x.scalar_type()),
        "bias must be (V,) of the dtype of x, contiguous");
  check(labels.numel() == rows && labels.is_contiguous() && labels.scalar_type() == ScalarType::Long,
        "labels must be (N,) int64, contiguous");
  const auto* label = static_cast<const int64_t*>(labels.const_data_ptr());
  for (int64_t i = 0; i < rows; ++i) check(label[i] >= 0 && label[i] < weight.size(0), "labels must lie in [0, V)");
  Tensor total = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  Tensor target = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  Tensor direction = torch::stable::new_empty(x, {want_direction ? rows : 0, hidden});
  head_pass({rows, weight.size(0), hidden, type_of(x), x.const_data_ptr(), weight.const_data_ptr(), weight.stride(0),
             bias.has_value() ? bias->const_data_ptr() : nullptr, label, static_cast<float>(softcap), static_cast<float>(logit_scale),
             static_cast<float*>(total.mutable_data_ptr()), static_cast<float*>(target.mutable_data_ptr()),
             want_direction ? direction.mutable_data_ptr() : nullptr, workspace});
  return {total, target, direction};
}

Matrix matrix_of(const Tensor& t) {
  const bool by_rows = t.stride(1) == 1 || t.size(1) == 1;
  check(by_rows || t.stride(0) == 1 || t.size(0) == 1, "the rows or the columns of a factor must be contiguous");
  return {t.const_data_ptr(), by_rows ? t.stride(0) : t.stride(1), by_rows};
}

// total (N, M) fp32 with contiguous rows += a (N, K) @ b (K, M), of one dtype.
void add_product_op(Tensor total, Tensor a, Tensor b) {
  check(a.dim() == 2 && b.dim() == 2 && total.dim() == 2 && a.size(1) == b.size(0) && total.size(0) == a.size(0) &&
            total.size(1) == b.size(1) && a.scalar_type() == b.scalar_type(),
        "expected total (N, M), and a (N, K), b (K, M) of one dtype");
  check(total.scalar_type() == ScalarType::Float && (total.stride(1) == 1 || total.size(1) == 1),
        "total must be float32 with contiguous rows");
  add_product({total.size(0), total.size(1), a.size(1), type_of(a), matrix_of(a), matrix_of(b),
               static_cast<float*>(total.mutable_data_ptr()), total.stride(0)});
}

}  // namespace
}  // namespace synpo

STABLE_TORCH_LIBRARY_FRAGMENT(synpo_kernels, m) {
  m.def(
      "contrastive_sample(Tensor expert, Tensor? amateur, Tensor uniform, float alpha, float plausibility, float temperature, "
      "int top_k, float top_p, float min_p, Tensor? history, float repetition_penalty) -> (Tensor, Tensor)");
  m.def("contrastive_mix(Tensor expert, Tensor? amateur, float alpha, float plausibility) -> Tensor");
  m.def(
      "head_pass(Tensor x, Tensor weight, Tensor? bias, Tensor labels, float softcap, float logit_scale, int workspace, "
      "bool want_direction) -> (Tensor, Tensor, Tensor)");
  m.def("add_product(Tensor(a!) total, Tensor a, Tensor b) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(synpo_kernels, CPU, m) {
  m.impl("contrastive_sample", TORCH_BOX(&synpo::contrastive_sample));
  m.impl("contrastive_mix", TORCH_BOX(&synpo::contrastive_mix));
  m.impl("head_pass", TORCH_BOX(&synpo::head_pass_op));
  m.impl("add_product", TORCH_BOX(&synpo::add_product_op));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ extension of synpo_kernels; importing it registers torch.ops.synpo_kernels.*";
  m.attr("sources") = SYNPO_SOURCES;  // a hash of these files
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = SYNPO_VERSION;
        info["torch"] = SYNPO_TORCH_VERSION;
        info["flags"] = SYNPO_COMPILE_FLAGS;
        info["isa"] = synpo::isa_name();
        return info;
      },
      "What this binary was built from, and the instruction set in use.");
  m.def("isa", &synpo::isa_name,
        "Instruction set in use: amx, avx512_bf16, avx512, avx2 or portable; ValueError where $SYNPO_CPU_ISA cannot be.");
  m.def("on_intel", &synpo::on_intel, "Whether this is a CPU of Intel's, for whose fp32 products torch's library is made.");
  m.def("isas", &synpo::isa_names, "Those that run here, best first; amx-emulated is for tests.");
  m.def(
      "use_isa", [](const std::optional<std::string>& name) { synpo::use_isa(name.has_value() ? name->c_str() : nullptr); },
      py::arg("name"), "Use another one, None: the choice made at the start; ValueError where this CPU lacks it.");
}
