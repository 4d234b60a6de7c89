// The vector loops of scan.h for every instruction set, and the choice between them at run time.

#include "contrast.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#define SYNPO_X86 1
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

#define SYNPO_ISA portable
#define SYNPO_LEVEL 0
#include "scan.h"
#undef SYNPO_ISA
#undef SYNPO_LEVEL

#if SYNPO_X86

#define SYNPO_ISA avx2
#define SYNPO_LEVEL 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c,bmi2,popcnt")
#endif
#include "scan.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SYNPO_ISA
#undef SYNPO_LEVEL

#define SYNPO_ISA avx512
#define SYNPO_LEVEL 2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c,bmi2,popcnt,prefer-vector-width=512")
#endif
#include "scan.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SYNPO_ISA
#undef SYNPO_LEVEL

#endif  // SYNPO_X86

namespace synpo {
namespace {

const Kernels kPortable{"portable", portable::maxima_any, portable::collect_any, portable::mix_any, portable::count, portable::weigh};

#if SYNPO_X86
const Kernels kAvx2{"avx2", avx2::maxima_any, avx2::collect_any, avx2::mix_any, avx2::count, avx2::weigh};
const Kernels kAvx512{"avx512", avx512::maxima_any, avx512::collect_any, avx512::mix_any, avx512::count, avx512::weigh};

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Kernels* best() {
#if SYNPO_X86
  if (has_avx512()) return &kAvx512;
  if (has_avx2()) return &kAvx2;
#endif
  return &kPortable;
}

const Kernels*& current() {
  static const Kernels* chosen = best();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *current(); }

void use_kernels(const char* name) {
  const std::string wanted = name;
  if (wanted == kPortable.name) {
    current() = &kPortable;
    return;
  }
#if SYNPO_X86
  if (wanted == kAvx2.name && has_avx2()) {
    current() = &kAvx2;
    return;
  }
  if (wanted == kAvx512.name && has_avx512()) {
    current() = &kAvx512;
    return;
  }
#endif
  throw std::invalid_argument("instruction set '" + wanted + "' is unknown or not supported by this CPU; the best one here is '" +
                              best()->name + "'");
}

}  // namespace synpo
