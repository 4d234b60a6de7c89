// What device.cpp and kernels.cpp share.
#pragma once

#include <ATen/core/Tensor.h>

namespace host_gpu {

// The same bytes as a tensor of the host.
at::Tensor host(const at::Tensor& t);

// What an operation does on its way through the host does not count.
struct Inside {
  static thread_local int depth;
  Inside() { ++depth; }
  ~Inside() { --depth; }
};

void count_operation();

}  // namespace host_gpu
