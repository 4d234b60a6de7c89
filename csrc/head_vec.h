// What the frozen-head pass does with vectors: squares transposed, exponentials. See for_each_isa.h; no include guard.

namespace synpo::head {
namespace SYNPO_ISA {

#include "vec.h"

#if SYNPO_LEVEL >= 2
inline void transpose(Vec (&rows)[16]) {
  __m512 t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {  // u[i + c]: column 4k + c of rows i to i + 3 in the k-th quarter
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 a = _mm512_shuffle_f32x4(u[c], u[c + 4], 0x88), b = _mm512_shuffle_f32x4(u[c], u[c + 4], 0xDD);
    const __m512 d = _mm512_shuffle_f32x4(u[c + 8], u[c + 12], 0x88), e = _mm512_shuffle_f32x4(u[c + 8], u[c + 12], 0xDD);
    rows[c].v = _mm512_shuffle_f32x4(a, d, 0x88);
    rows[c + 4].v = _mm512_shuffle_f32x4(b, e, 0x88);
    rows[c + 8].v = _mm512_shuffle_f32x4(a, d, 0xDD);
    rows[c + 12].v = _mm512_shuffle_f32x4(b, e, 0xDD);
  }
}
#else
inline void transpose(Vec (&rows)[Vec::kWidth]) {
  uint32_t from[Vec::kWidth][Vec::kWidth], to[Vec::kWidth][Vec::kWidth];
  for (int64_t i = 0; i < Vec::kWidth; ++i) rows[i].store(from[i]);
  for (int64_t i = 0; i < Vec::kWidth; ++i) {
    for (int64_t j = 0; j < Vec::kWidth; ++j) to[j][i] = from[i][j];
  }
  for (int64_t i = 0; i < Vec::kWidth; ++i) rows[i] = Vec::load(to[i]);
}
#endif

// e^x; 0 where that is below kLeast, inf above 88.8, NaN at NaN. The polynomial is e^r's on |r| <= 0.3475, off by at most 4e-9.
inline Vec exp(Vec x) {
  const Vec bounded = Vec::max(Vec::fill(kLeastLog), Vec::min(Vec::fill(88.8f), x));
  const Vec n = (bounded * Vec::fill(1.44269504f)).round();
  const Vec r = Vec::fma(n, Vec::fill(2.12194440e-4f), Vec::fma(n, Vec::fill(-0.693359375f), bounded));  // ln 2 in two parts
  Vec p = Vec::fill(1.38142181e-3f);
  p = Vec::fma(p, r, Vec::fill(8.36889911e-3f));
  p = Vec::fma(p, r, Vec::fill(4.16684076e-2f));
  p = Vec::fma(p, r, Vec::fill(1.66665196e-1f));
  p = Vec::fma(p, r, Vec::fill(0.49999994f));
  p = Vec::fma(p * r, r, r) + Vec::fill(1.0f);
  return (p * Vec::power_of_two(n)).where(x.lt(Vec::fill(kLeastLog)), Vec::fill(0.0f));
}

// Hyperbolic tangent: an odd polynomial near 0, where the quotient of exponentials would cancel.
inline Vec tanh(Vec x) {
  const Vec square = x * x;
  Vec p = Vec::fill(-5.66711277e-3f);
  p = Vec::fma(p, square, Vec::fill(2.06063055e-2f));
  p = Vec::fma(p, square, Vec::fill(-5.37300482e-2f));
  p = Vec::fma(p, square, Vec::fill(1.33313313e-1f));
  p = Vec::fma(p, square, Vec::fill(-3.33332777e-1f));
  const Vec near = Vec::fma(p * square, x, x);
  const Vec one = Vec::fill(1.0f);
  const Vec far = one - Vec::fill(2.0f) / (exp(x + x) + one);
  return far.where(x.abs().lt(Vec::fill(0.625f)), near);
}

}  // namespace SYNPO_ISA
}  // namespace synpo::head
