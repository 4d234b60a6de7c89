// The loops of the frozen-head pass for every instruction set, and the choice between them at run time.

#include "head_pass.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define SYNPO_X86 1
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace synpo::head {
namespace {

// To nearest even; NaN stays NaN.
template <class T>
T rounded(float x);
template <>
inline Bf16 rounded<Bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return {0x7FC0};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline F16 rounded<F16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return {static_cast<uint16_t>(sign | 0x7E00)};
  if (magnitude >= 0x477FF000) return {static_cast<uint16_t>(sign | 0x7C00)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {  // below 2^-14: a whole number of 2^-24
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(from_bits(magnitude) * 16777216.0f)))};
  }
  return {static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13)};
}

}  // namespace
}  // namespace synpo::head

#define SYNPO_ISA portable
#define SYNPO_LEVEL 0
#include "head_vec.h"
#include "head_tiles.h"
#undef SYNPO_ISA
#undef SYNPO_LEVEL

#if SYNPO_X86

#define SYNPO_ISA avx2
#define SYNPO_LEVEL 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "head_vec.h"
#include "head_tiles.h"
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
#include "head_vec.h"
#include "head_tiles.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SYNPO_ISA
#undef SYNPO_LEVEL

#define SYNPO_ISA avx512_bf16
#define SYNPO_LEVEL 3
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,amx-tile,amx-bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,prefer-vector-width=512")
#endif
#include "head_vec.h"
#include "head_tiles.h"
#include "head_amx.h"
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

struct Isa {
  const char* name;
  HeadKernels f32, bf16, f16;
  bool (*runs)();
};

bool always() { return true; }

#if SYNPO_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// The CPU has the tile registers, the system keeps them for its threads (a virtual machine may not although the CPU says it has
// them), and Linux lets this process use them: they must be asked for before their first use.
bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d >> 22 & 1) == 0 || (d >> 24 & 1) == 0) return false;  // amx-bf16, amx-tile
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;
  if ((low & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

template <class T>
using Portable = head::portable::Broadcast<head::portable::Singles<T>, 4, 1>;

#if SYNPO_X86
template <class T>
using Avx2 = head::avx2::Broadcast<head::avx2::Singles<T>, 6, 2>;
template <class T>
using Avx512 = head::avx512::Broadcast<head::avx512::Singles<T>, 14, 2>;
using Avx512Bf16 = head::avx512_bf16::Broadcast<head::avx512_bf16::Pairs, 14, 2>;
using Amx = head::avx512_bf16::TileProducts<head::avx512_bf16::AmxTiles>;
using AmxEmulated = head::avx512_bf16::TileProducts<head::avx512_bf16::EmulatedTiles>;
#endif

// Best first; the last is never chosen unasked.
const Isa kIsas[] = {
#if SYNPO_X86
    {"amx", head::avx512::table<Avx512<float>>(), head::avx512_bf16::table<Amx>(), head::avx512::table<Avx512<F16>>(), has_amx},
    {"avx512_bf16", head::avx512::table<Avx512<float>>(), head::avx512_bf16::table<Avx512Bf16>(),
     head::avx512::table<Avx512<F16>>(), has_avx512_bf16},
    {"avx512", head::avx512::table<Avx512<float>>(), head::avx512::table<Avx512<Bf16>>(), head::avx512::table<Avx512<F16>>(),
     has_avx512},
    {"avx2", head::avx2::table<Avx2<float>>(), head::avx2::table<Avx2<Bf16>>(), head::avx2::table<Avx2<F16>>(), has_avx2},
#endif
    {"portable", head::portable::table<Portable<float>>(), head::portable::table<Portable<Bf16>>(),
     head::portable::table<Portable<F16>>(), always},
#if SYNPO_X86
    {"amx-emulated", head::avx512::table<Avx512<float>>(), head::avx512_bf16::table<AmxEmulated>(),
     head::avx512::table<Avx512<F16>>(), has_avx512_bf16},
#endif
};

const Isa* best() {
  for (const Isa& isa : kIsas) {
    if (isa.runs()) return &isa;
  }
  return nullptr;  // not reached: the portable one runs everywhere
}

const Isa*& current() {
  static const Isa* chosen = best();
  return chosen;
}

}  // namespace

const HeadKernels& head_kernels(Type type) {
  const Isa& isa = *current();
  return type == Type::f32 ? isa.f32 : type == Type::bf16 ? isa.bf16 : isa.f16;
}

const char* head_isa() { return current()->name; }

std::vector<const char*> head_isas() {
  std::vector<const char*> names;
  for (const Isa& isa : kIsas) {
    if (isa.runs()) names.push_back(isa.name);
  }
  return names;
}

void use_head_isa(const char* name) {
  std::string here;
  for (const Isa& isa : kIsas) {
    if (!isa.runs()) continue;
    if (isa.name == std::string(name)) {
      current() = &isa;
      return;
    }
    here += (here.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("instruction set '" + std::string(name) + "' is unknown or not supported by this CPU; here run " + here);
}

}  // namespace synpo
