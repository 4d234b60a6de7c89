// Contrastive decoding on the CPU: types shared by the op, the driver and the vector loops.
//
// Shapes: B rows (sequences being decoded), V tokens of the vocabulary. Logits are read once, in their own type, and
// mixed in fp32; whatever is left after the scan (the candidates) is handled in double.

#pragma once

#include "numbers.h"

#include <cstdint>
#include <limits>
#include <vector>

namespace synpo {

constexpr float kInf = std::numeric_limits<float>::infinity();

// One row of logits. `amateur` is null for plain sampling.
struct Row {
  const void* expert;
  const void* amateur;
  Type type;
  float expert_scale;   // 1 + alpha
  float amateur_scale;  // alpha
};

// The mixed logit of one token: the roundings of the vector loops, one at a time. A token the expert excludes stays excluded.
template <class T>
float mixed_as(const Row& row, int64_t v) {
  const float e = to_float(static_cast<const T*>(row.expert)[v]);
  if (row.amateur == nullptr || e == -kInf) return e;
  return e * row.expert_scale - to_float(static_cast<const T*>(row.amateur)[v]) * row.amateur_scale;
}
inline float mixed(const Row& row, int64_t v) {
  switch (row.type) {
    case Type::bf16:
      return mixed_as<Bf16>(row, v);
    case Type::f16:
      return mixed_as<F16>(row, v);
    default:
      return mixed_as<float>(row, v);
  }
}

// What is left of a slice of a row: first the maximum of every group of kGroup tokens, then the tokens that may matter.
struct Candidates {
  std::vector<float> group_max;
  float max = -kInf;
  bool nan = false;
  std::vector<float> x;     // mixed logits, no NaN and no -inf among them
  std::vector<int32_t> id;  // token ids
  int64_t n = 0;

  void reserve(int64_t size) {
    if (static_cast<int64_t>(id.size()) < size) {  // `id` is last: memory may run out in between, and the caller come again
      x.resize(size);
      id.resize(size);
    }
  }
  void clear() {
    max = -kInf;
    nan = false;
    n = 0;
  }
};

constexpr int64_t kGroup = 64;
constexpr int kFew = 16;  // candidates of a group that are written one by one

// The loops over the logits and over long lists of candidates, one table per instruction set.
struct Kernels {
  // Reads tokens [begin, end) once: sets group_max, max and nan. No branch depends on the data, so it runs at memory speed.
  void (*maxima)(const Row&, int64_t begin, int64_t end, Candidates&);
  // Appends the tokens with x >= threshold, by id, after `maxima` of the same slice. With k > 0 only the k largest are wanted
  // and the list stays short (still a superset); tokens with a bit in `skip` are left out.
  void (*collect)(const Row&, int64_t begin, int64_t end, float threshold, int64_t k, const uint64_t* skip, Candidates&);
  // out[v] = mixed logit, or -inf where the expert's logit is below `threshold`.
  void (*mix)(const Row&, int64_t begin, int64_t end, float threshold, float* out);
  // How many of x are >= threshold.
  int64_t (*count)(const float* x, int64_t n, float threshold);
  // w[i] = exp((x[i] - max) * scale), within 2 ulp, 1 where x[i] is the maximum; sets max, returns the sum.
  double (*weigh)(const float* x, int64_t n, double scale, double* w, float& max);
};

// Those of the instruction set in use, see isa.h.
const Kernels& kernels();

// Keep the k best of the candidates (larger value first, then lower id), in any order; the k-th value.
float keep_best(Candidates& c, int64_t k);

// The smallest value within `offset` (<= 0) of the maximum; -inf switches the limit off, also beside a maximum of +inf.
inline float near_threshold(float max, float offset) { return offset == -kInf ? -kInf : max + offset; }

// Everything about how a token is drawn; see synpo_kernels/contrast.py for the meaning of each.
struct Sampling {
  float plausibility_offset;  // log(plausibility), -inf when off
  double temperature;         // 0: greedy
  int64_t top_k;              // 0: off
  double top_p;
  double min_p;
  float penalty, inverse_penalty;  // 1: off
};

// Draw one token per row. History: ids (rows, history_length) seen so far, null when the penalty is off.
struct Batch {
  int64_t rows, vocab;
  const void* expert;
  const void* amateur;  // null: plain sampling
  int64_t expert_stride, amateur_stride;  // elements from one row to the next
  Type type;
  double alpha;
};
void sample(const Batch& batch, const Sampling& sampling, const double* uniform, const int64_t* history, int64_t history_length,
            int64_t* tokens, float* logps);
void mix(const Batch& batch, float plausibility_offset, float* out);

}  // namespace synpo
