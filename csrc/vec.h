// A vector of fp32 numbers, or of any 32 bits, for each instruction set: included by the loops inside their own namespace, with
// SYNPO_LEVEL naming the set, see for_each_isa.h. No include guard, no includes.

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
  Mask lt(Vec o) const { return _mm512_cmp_ps_mask(v, o.v, _CMP_LT_OQ); }
  Mask ge(Vec o) const { return _mm512_cmp_ps_mask(v, o.v, _CMP_GE_OQ); }
  Mask eq(Vec o) const { return _mm512_cmp_ps_mask(v, o.v, _CMP_EQ_OQ); }
  Mask nan() const { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); }
  static uint32_t bits(Mask mask) { return mask; }  // one a lane
  static Mask equal(const int32_t* p, int32_t x) { return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(x)); }
  Vec where(Mask mask, Vec o) const { return {_mm512_mask_mov_ps(v, mask, o.v)}; }  // o where the mask is set
  static Vec power_of_two(Vec n) {  // n whole, -126 to 128; 2^128 is inf
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
  }
  // The largest of all lanes.
  float reduce_max() const {
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 pair = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
  }
  // Write the lanes in `mask`, in order, with their ids; up to kWidth entries beyond the count are scribbled on.
  int64_t compress(uint32_t mask, int32_t first, float* x, int32_t* id) const {
    __m512i ids = _mm512_add_epi32(_mm512_set1_epi32(first),
                                   _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    _mm512_storeu_ps(x, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), v));
    _mm512_storeu_si512(id, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), ids));
    return __builtin_popcount(mask);
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
  Mask lt(Vec o) const { return _mm256_cmp_ps(v, o.v, _CMP_LT_OQ); }
  Mask ge(Vec o) const { return _mm256_cmp_ps(v, o.v, _CMP_GE_OQ); }
  Mask eq(Vec o) const { return _mm256_cmp_ps(v, o.v, _CMP_EQ_OQ); }
  Mask nan() const { return _mm256_cmp_ps(v, v, _CMP_UNORD_Q); }
  static uint32_t bits(Mask mask) { return static_cast<uint32_t>(_mm256_movemask_ps(mask)); }
  static Mask equal(const int32_t* p, int32_t x) {
    const __m256i labels = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(labels, _mm256_set1_epi32(x)));
  }
  Vec where(Mask mask, Vec o) const { return {_mm256_blendv_ps(v, o.v, mask)}; }  // o where the mask is set
  static Vec power_of_two(Vec n) {  // n whole, -126 to 128; 2^128 is inf
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
  }
  float reduce_max() const {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
  }
  int64_t compress(uint32_t mask, int32_t first, float* x, int32_t* id) const {
    // The lanes in `mask` as packed byte indices, widened to a permutation.
    uint64_t bytes = _pdep_u64(mask, 0x0101010101010101ULL) * 0xFF;
    uint64_t order = _pext_u64(0x0706050403020100ULL, bytes);
    __m256i permutation = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(order)));
    _mm256_storeu_ps(x, _mm256_permutevar8x32_ps(v, permutation));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(id), _mm256_add_epi32(permutation, _mm256_set1_epi32(first)));
    return __builtin_popcount(mask);
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
  Mask lt(Vec o) const { return test([&](int i) { return v[i] < o.v[i]; }); }
  Mask ge(Vec o) const { return test([&](int i) { return v[i] >= o.v[i]; }); }
  Mask eq(Vec o) const { return test([&](int i) { return v[i] == o.v[i]; }); }
  Mask nan() const { return test([&](int i) { return v[i] != v[i]; }); }
  static uint32_t bits(Mask mask) { return mask; }
  static Mask equal(const int32_t* p, int32_t x) { return test([&](int i) { return p[i] == x; }); }
  Vec where(Mask mask, Vec o) const { return map([&](int i) { return mask >> i & 1 ? o.v[i] : v[i]; }); }  // o where set
  static Vec power_of_two(Vec n) {  // n whole, -126 to 128; 2^128 is inf
    return map([&](int i) { return n.v[i] == n.v[i] ? from_bits(static_cast<uint32_t>(n.v[i] + 127.0f) << 23) : n.v[i]; });
  }
  float reduce_max() const { return *std::max_element(v, v + kWidth); }
  int64_t compress(uint32_t mask, int32_t first, float* x, int32_t* id) const {
    int64_t n = 0;
    for (int i = 0; i < kWidth; ++i) {
      x[n] = v[i];
      id[n] = first + i;
      n += mask >> i & 1;
    }
    return n;
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
