// The vector loops of contrast_loops.h for every instruction set.

#include "contrast.h"
#include "isa.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace synpo {
namespace {

template <class T>
T minus_inf();
template <>
inline float minus_inf<float>() {
  return -kInf;
}
template <>
inline Bf16 minus_inf<Bf16>() {
  return {0xFF80};
}
template <>
inline F16 minus_inf<F16>() {
  return {0xFC00};
}

}  // namespace
}  // namespace synpo

#define SYNPO_LOOPS "contrast_loops.h"
#define SYNPO_MOST_LEVEL 2
#include "for_each_isa.h"

namespace synpo {

const Kernels& kernels() {
  switch (isa()) {
    case Isa::portable:
      return portable::kKernels;
#if defined(__x86_64__)
    case Isa::avx2:
      return avx2::kKernels;
    default:
      return avx512::kKernels;
#else
    default:
      return portable::kKernels;
#endif
  }
}

}  // namespace synpo
