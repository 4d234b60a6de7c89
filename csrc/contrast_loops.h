// The loops over all V logits, written once on a small vector type and compiled once per instruction set by for_each_isa.h.
// No include guard, and no header may be included here.

namespace synpo {
namespace SYNPO_ISA {

#include "vec.h"

// Mixed logits of kWidth tokens from v on. A token the expert excludes (-inf) stays excluded: -inf - -inf would be NaN.
template <class T, bool kMix>
struct Mixer {
  const T* expert;
  const T* amateur;
  Vec expert_scale, amateur_scale;

  explicit Mixer(const Row& row)
      : expert(static_cast<const T*>(row.expert)),
        amateur(static_cast<const T*>(row.amateur)),
        expert_scale(Vec::fill(row.expert_scale)),
        amateur_scale(Vec::fill(row.amateur_scale)) {}

  Vec raw(int64_t v) const {  // NaN instead of -inf where both are -inf
    Vec e = Vec::load(expert + v);
    if constexpr (kMix) return e * expert_scale - Vec::load(amateur + v) * amateur_scale;
    return e;
  }
  Vec exact(int64_t v) const {
    if constexpr (!kMix) return raw(v);
    return raw(v).where(Vec::load(expert + v).eq(Vec::fill(-kInf)), Vec::fill(-kInf));
  }
};

// The tokens [v, end), fewer than kGroup, followed by excluded ones: the last group of a slice, safe to read in full.
template <class T, bool kMix>
struct Tail {
  T expert[kGroup], amateur[kGroup];
  Row row;

  Tail(const Row& source, int64_t v, int64_t end) : row(source) {
    std::fill(expert, expert + kGroup, minus_inf<T>());
    std::fill(amateur, amateur + kGroup, minus_inf<T>());
    std::copy(static_cast<const T*>(source.expert) + v, static_cast<const T*>(source.expert) + end, expert);
    if (kMix) std::copy(static_cast<const T*>(source.amateur) + v, static_cast<const T*>(source.amateur) + end, amateur);
    row.expert = expert;
    row.amateur = kMix ? amateur : nullptr;
  }
};

template <class T, bool kMix>
inline float group_maximum(const Mixer<T, kMix>& mixer, int64_t v, bool& nan) {
  Vec max = mixer.raw(v), sum = max;
  for (int64_t i = Vec::kWidth; i < kGroup; i += Vec::kWidth) {
    const Vec x = mixer.raw(v + i);
    max = Vec::max(x, max);
    sum = sum + x;
  }
  if (Vec::bits(sum.nan()) != 0) {  // seldom: a NaN or infinities, so that the maximum above may be wrong
    max = Vec::fill(-kInf);
    for (int64_t i = 0; i < kGroup; i += Vec::kWidth) {
      const Vec x = mixer.exact(v + i);
      nan |= Vec::bits(x.nan()) != 0;
      max = Vec::max(x, max);
    }
  }
  return max.reduce_max();
}

template <class T, bool kMix>
void maxima(const Row& row, int64_t begin, int64_t end, Candidates& c) {
  const int64_t groups = (end - begin + kGroup - 1) / kGroup, whole = (end - begin) / kGroup;
  if (static_cast<int64_t>(c.group_max.size()) < groups) c.group_max.resize(groups);
  float* out = c.group_max.data();
  const Mixer<T, kMix> mixer(row);
  bool nan = false;
  for (int64_t g = 0; g < whole; ++g) out[g] = group_maximum(mixer, begin + g * kGroup, nan);
  if (whole < groups) {
    const Tail<T, kMix> tail(row, begin + whole * kGroup, end);
    out[whole] = group_maximum(Mixer<T, kMix>(tail.row), 0, nan);
  }
  c.nan |= nan;
  for (int64_t g = 0; g < groups; ++g) c.max = std::max(c.max, out[g]);
}

template <class T, bool kMix>
void collect(const Row& row, int64_t begin, int64_t end, float threshold, int64_t k, const uint64_t* skip, Candidates& c) {
  const int64_t limit = k > 0 ? c.n + 4 * k + kGroup : std::numeric_limits<int64_t>::max();
  auto take = [&](const Mixer<T, kMix>& mixer, int64_t at, int64_t v) {
    c.reserve(c.n + kGroup + Vec::kWidth);
    const int64_t before = c.n;
    const Vec least = Vec::fill(threshold), excluded = Vec::fill(-kInf);
    float values[kGroup];
    uint64_t hits = 0;
    for (int64_t i = 0; i < kGroup; i += Vec::kWidth) {
      const Vec x = mixer.exact(at + i);
      x.store(values + i);
      hits |= static_cast<uint64_t>(Vec::bits(x.ge(least)) & ~Vec::bits(x.eq(excluded))) << i;
    }
    float* x_out = c.x.data();
    int32_t* id_out = c.id.data();
    int64_t n = before;
    if (__builtin_popcountll(hits) <= kFew) {
      for (; hits != 0; hits &= hits - 1) {
        const int i = __builtin_ctzll(hits);
        x_out[n] = values[i];
        id_out[n++] = static_cast<int32_t>(v + i);
      }
    } else {
      for (int64_t i = 0; i < kGroup; i += Vec::kWidth) {
        const uint32_t mask = static_cast<uint32_t>(hits >> i) & ((1u << Vec::kWidth) - 1);
        n += Vec::load(values + i).compress(mask, static_cast<int32_t>(v + i), x_out + n, id_out + n);
      }
    }
    c.n = n;
    if (skip != nullptr) {
      const int64_t added = c.n;
      c.n = before;
      for (int64_t i = before; i < added; ++i) {
        c.x[c.n] = c.x[i];
        c.id[c.n] = c.id[i];
        c.n += !(skip[c.id[i] >> 6] >> (c.id[i] & 63) & 1);
      }
    }
    // A token yet to come must beat the k-th so far: it would lose a tie, having the higher id.
    if (c.n >= limit) threshold = std::max(threshold, std::nextafter(keep_best(c, k), kInf));
  };
  const int64_t groups = (end - begin + kGroup - 1) / kGroup, whole = (end - begin) / kGroup;
  const Mixer<T, kMix> mixer(row);
  int64_t g = 0;
  for (; g + Vec::kWidth <= whole; g += Vec::kWidth) {  // a branch for every group would be guessed wrong too often
    for (uint32_t mask = Vec::bits(Vec::load(c.group_max.data() + g).ge(Vec::fill(threshold))); mask != 0; mask &= mask - 1) {
      const int64_t at = begin + (g + __builtin_ctz(mask)) * kGroup;
      take(mixer, at, at);
    }
  }
  for (; g < whole; ++g) {
    if (c.group_max[g] >= threshold) take(mixer, begin + g * kGroup, begin + g * kGroup);
  }
  if (whole < groups && c.group_max[whole] >= threshold) {
    const Tail<T, kMix> tail(row, begin + whole * kGroup, end);
    take(Mixer<T, kMix>(tail.row), 0, begin + whole * kGroup);
  }
}

template <class T, bool kMix>
void mix(const Row& row, int64_t begin, int64_t end, float threshold, float* out) {
  auto one = [&](const Mixer<T, kMix>& mixer, int64_t at) {
    return mixer.exact(at).where(Vec::load(mixer.expert + at).lt(Vec::fill(threshold)), Vec::fill(-kInf));
  };
  const Mixer<T, kMix> mixer(row);
  int64_t v = begin;
  for (; v + Vec::kWidth <= end; v += Vec::kWidth) one(mixer, v).store(out + v);
  if (v < end) {
    const Tail<T, kMix> tail(row, v, end);
    float rest[Vec::kWidth];
    one(Mixer<T, kMix>(tail.row), 0).store(rest);
    std::copy(rest, rest + (end - v), out + v);
  }
}

int64_t count(const float* x, int64_t n, float threshold) {
  const Vec t = Vec::fill(threshold);
  int64_t found = 0, i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) found += __builtin_popcount(Vec::bits(Vec::load(x + i).ge(t)));
  for (; i < n; ++i) found += x[i] >= threshold;
  return found;
}

// exp(x) for x <= 0: Cody-Waite reduction and a Taylor polynomial of degree 13 on [-ln2/2, ln2/2]. Plain arithmetic without
// branches, which the compiler vectorises in the loop below.
inline double exp(double x) {
  constexpr double kLog2e = 1.4426950408889634074, kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  constexpr double kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10;
  const double y = x < -708.0 ? -708.0 : x;
  const double shifted = y * kLog2e + kRound;
  const double m = shifted - kRound;
  const double r = (y - m * kLn2Hi) - m * kLn2Lo;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r * r + r + 1.0;
  int64_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = static_cast<int64_t>(static_cast<uint64_t>(bits) << 52) + (int64_t{1023} << 52);
  double scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return x < -708.0 ? 0.0 : p * scale;
}

double weigh(const float* x, int64_t n, double scale, double* w, float& max) {
  max = -kInf;
  int64_t i = 0;
  Vec lanes = Vec::fill(-kInf);
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) lanes = Vec::max(Vec::load(x + i), lanes);
  for (; i < n; ++i) max = std::max(max, x[i]);
  max = std::max(max, lanes.reduce_max());

  const double top = max;
  for (i = 0; i < n; ++i) {
    const double gap = (static_cast<double>(x[i]) - top) * scale;
    w[i] = exp(x[i] == max ? 0.0 : gap);  // a maximum of +inf takes all
  }
  double sums[8] = {};
  for (i = 0; i + 8 <= n; i += 8) {
    for (int64_t j = 0; j < 8; ++j) sums[j] += w[i + j];
  }
  double total = 0.0;
  for (; i < n; ++i) total += w[i];
  for (double sum : sums) total += sum;
  return total;
}

// Pick the instantiation for a row's type and for plain or mixed logits.
#define SYNPO_DISPATCH(function, row, ...)                                                         \
  switch ((row).type) {                                                                            \
    case Type::f32:                                                                                \
      return (row).amateur ? function<float, true>(row, __VA_ARGS__) : function<float, false>(row, __VA_ARGS__); \
    case Type::bf16:                                                                               \
      return (row).amateur ? function<Bf16, true>(row, __VA_ARGS__) : function<Bf16, false>(row, __VA_ARGS__);   \
    case Type::f16:                                                                                \
      return (row).amateur ? function<F16, true>(row, __VA_ARGS__) : function<F16, false>(row, __VA_ARGS__);     \
  }

void maxima_any(const Row& row, int64_t begin, int64_t end, Candidates& c) {
  SYNPO_DISPATCH(maxima, row, begin, end, c)
}
void collect_any(const Row& row, int64_t begin, int64_t end, float threshold, int64_t k, const uint64_t* skip, Candidates& c) {
  SYNPO_DISPATCH(collect, row, begin, end, threshold, k, skip, c)
}
void mix_any(const Row& row, int64_t begin, int64_t end, float threshold, float* out) {
  SYNPO_DISPATCH(mix, row, begin, end, threshold, out)
}
#undef SYNPO_DISPATCH

constexpr Kernels kKernels{maxima_any, collect_any, mix_any, count, weigh};

}  // namespace SYNPO_ISA
}  // namespace synpo
