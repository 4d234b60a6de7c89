// The formats that numbers come in.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace synpo {

enum class Type { f32, bf16, f16 };

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7FFF;
  if (magnitude >= 0x7C00) return from_bits(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);  // inf, NaN
  // Shifting the exponent by a multiplication also normalises the subnormals.
  return from_bits(sign | magnitude << 13) * from_bits(0x77800000);  // 2^112
}

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

}  // namespace synpo
