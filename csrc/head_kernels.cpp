// The loops of the frozen-head pass for every instruction set.

#include "head_pass.h"
#include "isa.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SYNPO_LOOPS "head_loops.h"
#define SYNPO_MOST_LEVEL 3
#include "for_each_isa.h"

namespace synpo {
namespace {

struct Formats {
  HeadKernels f32, bf16, f16;
};

template <class T>
using Portable = head::portable::Broadcast<head::portable::Singles<T>, 4, 1>;
constexpr Formats kPortable{head::portable::table<Portable<float>>(), head::portable::table<Portable<Bf16>>(),
                            head::portable::table<Portable<F16>>()};

#if defined(__x86_64__)
template <class T>
using Avx2 = head::avx2::Broadcast<head::avx2::Singles<T>, 6, 2>;
constexpr Formats kAvx2{head::avx2::table<Avx2<float>>(), head::avx2::table<Avx2<Bf16>>(), head::avx2::table<Avx2<F16>>()};

template <class T>
using Avx512 = head::avx512::Broadcast<head::avx512::Singles<T>, 14, 2>;
constexpr HeadKernels kAvx512F32 = head::avx512::table<Avx512<float>>(), kAvx512F16 = head::avx512::table<Avx512<F16>>();
constexpr Formats kAvx512{kAvx512F32, head::avx512::table<Avx512<Bf16>>(), kAvx512F16};

using Dots = head::avx512_bf16::Broadcast<head::avx512_bf16::Pairs, 14, 2>;
constexpr Formats kAvx512Bf16{kAvx512F32, head::avx512_bf16::table<Dots>(), kAvx512F16};

template <class Tiles>
using Amx = head::avx512_bf16::TileProducts<Tiles>;
constexpr Formats kAmx{kAvx512F32, head::avx512_bf16::table<Amx<head::avx512_bf16::AmxTiles>>(), kAvx512F16};
constexpr Formats kAmxEmulated{kAvx512F32, head::avx512_bf16::table<Amx<head::avx512_bf16::EmulatedTiles>>(), kAvx512F16};
#endif

const Formats& formats() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::amx:
      return kAmx;
    case Isa::amx_emulated:
      return kAmxEmulated;
    case Isa::avx512_bf16:
      return kAvx512Bf16;
    case Isa::avx512:
      return kAvx512;
    case Isa::avx2:
      return kAvx2;
#endif
    default:
      return kPortable;
  }
}

}  // namespace

const HeadKernels& head_kernels(Type type) {
  const Formats& of = formats();
  return type == Type::f32 ? of.f32 : type == Type::bf16 ? of.bf16 : of.f16;
}

}  // namespace synpo
