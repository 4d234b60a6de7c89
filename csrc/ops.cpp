// The Python module `synpo_kernels._C`: what was built, and the tensor ops torch.ops.synpo_kernels.*.
//
// Ops are registered through libtorch's stable ABI (torch/csrc/stable), so this binary loads beside any torch from 2.11 on.
// synpo_kernels/contrast.py checks arguments and documents them; the checks here only keep a direct caller out of bad memory.

#include "contrast.h"

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>

namespace py = pybind11;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace synpo {
namespace {

Batch batch_of(const Tensor& expert, const std::optional<Tensor>& amateur, double alpha) {
  const auto row_major = [](const Tensor& t) { return t.dim() == 2 && (t.stride(1) == 1 || t.size(1) == 1); };
  STD_TORCH_CHECK(row_major(expert), "expert must be (B, V) with contiguous rows");
  STD_TORCH_CHECK(expert.size(1) > 0 && expert.size(1) <= INT32_MAX, "expert must have 1 to 2^31 - 1 tokens");
  Batch batch{expert.size(0), expert.size(1), expert.const_data_ptr(), nullptr, expert.stride(0), 0, Type::f32, alpha};
  switch (expert.scalar_type()) {
    case ScalarType::Float:
      break;
    case ScalarType::BFloat16:
      batch.type = Type::bf16;
      break;
    case ScalarType::Half:
      batch.type = Type::f16;
      break;
    default:
      STD_TORCH_CHECK(false, "logits must be float32, bfloat16 or float16");
  }
  if (amateur.has_value()) {
    STD_TORCH_CHECK(row_major(*amateur) && amateur->size(0) == batch.rows && amateur->size(1) == batch.vocab &&
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
  STD_TORCH_CHECK(uniform.numel() == batch.rows && uniform.is_contiguous() && uniform.scalar_type() == ScalarType::Double,
                  "uniform must be (B,) float64");
  if (history.has_value()) {
    STD_TORCH_CHECK(history->dim() == 2 && history->size(0) == batch.rows && history->is_contiguous() &&
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

}  // namespace
}  // namespace synpo

STABLE_TORCH_LIBRARY_FRAGMENT(synpo_kernels, m) {
  m.def(
      "contrastive_sample(Tensor expert, Tensor? amateur, Tensor uniform, float alpha, float plausibility, float temperature, "
      "int top_k, float top_p, float min_p, Tensor? history, float repetition_penalty) -> (Tensor, Tensor)");
  m.def("contrastive_mix(Tensor expert, Tensor? amateur, float alpha, float plausibility) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(synpo_kernels, CPU, m) {
  m.impl("contrastive_sample", TORCH_BOX(&synpo::contrastive_sample));
  m.impl("contrastive_mix", TORCH_BOX(&synpo::contrastive_mix));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ extension of synpo_kernels; importing it registers torch.ops.synpo_kernels.*";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = SYNPO_VERSION;
        info["torch"] = SYNPO_TORCH_VERSION;
        info["flags"] = SYNPO_COMPILE_FLAGS;
        info["simd"] = synpo::kernels().name;
        return info;
      },
      "What this binary was built from, and the instruction set in use.");
  m.def("simd_level", [] { return synpo::kernels().name; }, "Instruction set in use: avx512, avx2 or portable.");
  m.def("use_simd_level", &synpo::use_kernels, py::arg("name"),
        "Use another instruction set, for tests and benchmarks; ValueError where this CPU lacks it.");
}
