// A vector of fp32 numbers (or of units, see head_pass.h) for each instruction set; see for_each_isa.h. No include guard.

namespace synpo::head {
namespace SYNPO_ISA {

#if SYNPO_LEVEL >= 2

struct Vec {
  static constexpr int64_t kWidth = 16;
  using Mask = __mmask16;
  __m512 v;
  static Vec fill(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const F16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static Vec load(const Bf16* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(words(p), 16))}; }
  static Vec load(const uint32_t* p) { return {_mm512_castsi512_ps(_mm512_loadu_si512(p))}; }
  static Vec load_pairs(const Bf16* p) { return {_mm512_castsi512_ps(_mm512_loadu_si512(p))}; }
  static Vec interleave(const Bf16* even, const Bf16* odd) {
    return {_mm512_castsi512_ps(_mm512_or_si512(words(even), _mm512_slli_epi32(words(odd), 16)))};
  }
  static Vec repeat(const uint32_t* unit) {
    __m512 x = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*unit)));
    asm("" : "+v"(x));  // one load for all products with it; the compiler would rather load it again in each
    return {x};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(uint32_t* p) const { _mm512_storeu_si512(p, _mm512_castps_si512(v)); }
  void store(F16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  void store(Bf16* p) const {  // to nearest even; NaN stays NaN
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i tie = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(tie, _mm512_set1_epi32(0x7FFF)));
    const __m512i kept = _mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }
  Vec operator+(Vec o) const { return {_mm512_add_ps(v, o.v)}; }
  Vec operator-(Vec o) const { return {_mm512_sub_ps(v, o.v)}; }
  Vec operator*(Vec o) const { return {_mm512_mul_ps(v, o.v)}; }
  Vec operator/(Vec o) const { return {_mm512_div_ps(v, o.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec min(Vec bound, Vec x) { return {_mm512_min_ps(bound.v, x.v)}; }  // x where x is NaN, as in max
  static Vec max(Vec bound, Vec x) { return {_mm512_max_ps(bound.v, x.v)}; }
  Vec round() const { return {_mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  Vec abs() const { return {_mm512_abs_ps(v)}; }
  Mask less(Vec o) const { return _mm512_cmp_ps_mask(v, o.v, _CMP_LT_OQ); }
  static Mask equal(const int32_t* p, int32_t x) { return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(x)); }
  Vec where(Mask mask, Vec o) const { return {_mm512_mask_mov_ps(v, mask, o.v)}; }  // o where the mask is set
  static Vec power_of_two(Vec n) {  // n whole, -126 to 128; 2^128 is inf
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
  }
#if SYNPO_LEVEL == 3
  // c + the dot product of the two numbers in each unit.
  static Vec dot(Vec a, Vec b, Vec c) {
    return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }
  // Units of (even, odd), rounded to bf16.
  static Vec pairs(Vec even, Vec odd) {
    const __m512i order = _mm512_add_epi32(
        _mm512_set1_epi32(0x00100000), _mm512_mullo_epi32(_mm512_set1_epi32(0x00010001),
                                                          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.v, even.v));  // even in the lower half
    return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both))};
  }
#endif

 private:
  static __m512i words(const Bf16* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
};

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

#elif SYNPO_LEVEL == 1

struct Vec {
  static constexpr int64_t kWidth = 8;
  using Mask = __m256;
  __m256 v;
  static Vec fill(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const F16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static Vec load(const Bf16* p) {
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))};
  }
  static Vec load(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
  static Vec repeat(const uint32_t* unit) { return {_mm256_broadcast_ss(reinterpret_cast<const float*>(unit))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(uint32_t* p) const { store(reinterpret_cast<float*>(p)); }
  void store(F16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  void store(Bf16* p) const {  // to nearest even; NaN stays NaN
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i tie = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(tie, _mm256_set1_epi32(0x7FFF)));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256 kept = _mm256_blendv_ps(_mm256_castsi256_ps(near), _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)), nan);
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  Vec operator+(Vec o) const { return {_mm256_add_ps(v, o.v)}; }
  Vec operator-(Vec o) const { return {_mm256_sub_ps(v, o.v)}; }
  Vec operator*(Vec o) const { return {_mm256_mul_ps(v, o.v)}; }
  Vec operator/(Vec o) const { return {_mm256_div_ps(v, o.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec min(Vec bound, Vec x) { return {_mm256_min_ps(bound.v, x.v)}; }  // x where x is NaN, as in max
  static Vec max(Vec bound, Vec x) { return {_mm256_max_ps(bound.v, x.v)}; }
  Vec round() const { return {_mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  Vec abs() const { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)}; }
  Mask less(Vec o) const { return _mm256_cmp_ps(v, o.v, _CMP_LT_OQ); }
  static Mask equal(const int32_t* p, int32_t x) {
    const __m256i labels = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(labels, _mm256_set1_epi32(x)));
  }
  Vec where(Mask mask, Vec o) const { return {_mm256_blendv_ps(v, o.v, mask)}; }  // o where the mask is set
  static Vec power_of_two(Vec n) {  // n whole, -126 to 128; 2^128 is inf
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
  }
};

#else

struct Vec {
  static constexpr int64_t kWidth = 8;
  using Mask = uint32_t;
  float v[8];
  static Vec fill(float x) { return map([&](int) { return x; }); }
  template <class T>
  static Vec load(const T* p) {
    return map([&](int i) { return to_float(p[i]); });
  }
  static Vec load(const uint32_t* p) { return copy(p); }
  static Vec load(const float* p) { return copy(p); }
  static Vec repeat(const uint32_t* unit) { return fill(from_bits(*unit)); }
  void store(float* p) const { std::memcpy(p, v, sizeof(v)); }
  void store(uint32_t* p) const { std::memcpy(p, v, sizeof(v)); }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] = rounded<T>(v[i]);
  }
  Vec operator+(Vec o) const { return map([&](int i) { return v[i] + o.v[i]; }); }
  Vec operator-(Vec o) const { return map([&](int i) { return v[i] - o.v[i]; }); }
  Vec operator*(Vec o) const { return map([&](int i) { return v[i] * o.v[i]; }); }
  Vec operator/(Vec o) const { return map([&](int i) { return v[i] / o.v[i]; }); }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static Vec min(Vec bound, Vec x) { return map([&](int i) { return bound.v[i] < x.v[i] ? bound.v[i] : x.v[i]; }); }
  static Vec max(Vec bound, Vec x) { return map([&](int i) { return bound.v[i] > x.v[i] ? bound.v[i] : x.v[i]; }); }
  Vec round() const { return map([&](int i) { return std::nearbyint(v[i]); }); }
  Vec abs() const { return map([&](int i) { return std::fabs(v[i]); }); }
  Mask less(Vec o) const { return test([&](int i) { return v[i] < o.v[i]; }); }
  static Mask equal(const int32_t* p, int32_t x) { return test([&](int i) { return p[i] == x; }); }
  Vec where(Mask mask, Vec o) const { return map([&](int i) { return mask >> i & 1 ? o.v[i] : v[i]; }); }  // o where set
  static Vec power_of_two(Vec n) {  // n whole, -126 to 128; 2^128 is inf
    return map([&](int i) { return n.v[i] == n.v[i] ? from_bits(static_cast<uint32_t>(n.v[i] + 127.0f) << 23) : n.v[i]; });
  }

 private:
  static Vec copy(const void* p) {
    Vec r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  template <class F>
  static Vec map(F f) {
    Vec r;
    for (int i = 0; i < kWidth; ++i) r.v[i] = f(i);
    return r;
  }
  template <class F>
  static uint32_t test(F f) {
    uint32_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= static_cast<uint32_t>(f(i)) << i;
    return bits;
  }
};

#endif

#if SYNPO_LEVEL < 2
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
  return (p * Vec::power_of_two(n)).where(x.less(Vec::fill(kLeastLog)), Vec::fill(0.0f));
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
  return far.where(x.abs().less(Vec::fill(0.625f)), near);
}

}  // namespace SYNPO_ISA
}  // namespace synpo::head
