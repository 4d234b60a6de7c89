// The Python module `synpo_kernels._C`: what was built, and the schemas of the tensor ops.
//
// Ops are registered through libtorch's stable ABI (torch/csrc/stable), so this binary loads beside any torch from 2.11 on.

#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ extension of synpo_kernels; importing it registers torch.ops.synpo_kernels.*";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = SYNPO_VERSION;
    info["torch"] = SYNPO_TORCH_VERSION;
    info["flags"] = SYNPO_COMPILE_FLAGS;
    return info;
  });
}
