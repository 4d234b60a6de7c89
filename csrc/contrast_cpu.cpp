// Contrastive sampling on the CPU: from a row of logits to one token.
//
//   scan    (contrast_loops.h, all V logits, vectorised, threads over rows and over slices of a row)   -> candidates
//   sample  (this file, candidates only, in double)                                          -> token, log-probability
//
// Candidates are ordered by value, descending, ties by token id: the order top-k, top-p and the inverse CDF are defined in.

#include "contrast.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>

namespace synpo {
namespace {

// A candidate as one integer whose order is the order defined above; and its weight exp((x - max) / temperature).
struct Item {
  uint64_t key;
  double weight;
};

uint64_t to_key(float x, int32_t id) {
  x += 0.0f;  // -0 and +0 are a tie
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(id));
}
int32_t key_id(uint64_t key) { return static_cast<int32_t>(0xFFFFFFFFu - static_cast<uint32_t>(key)); }
float key_value(uint64_t key) {
  uint32_t bits = static_cast<uint32_t>(key >> 32);
  bits = bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Memory reused from call to call by one thread.
struct Scratch {
  Candidates candidates;
  std::vector<uint64_t> keys;
  std::vector<double> weights;
  std::vector<Item> items;
  std::vector<uint64_t> seen;  // a bit per token of the history; all zero between calls
};
Scratch& scratch() {
  static thread_local Scratch s;
  return s;
}

// Position of the first item, in descending order, at which the running sum of weights reaches `target` (passes it, if
// `strictly`); `sum` becomes the sum up to and including it. Sorts only around the position: quickselect, by weight.
// Items before the position are, as a set, those that precede it in the order. Rounding can leave the target out of reach:
// then the last item that the running sum feels is taken.
int64_t reach(Item* items, int64_t n, double target, bool strictly, double& sum) {
  const auto descending = [](const Item& a, const Item& b) { return a.key > b.key; };
  const auto reached = [&](double s) { return strictly ? s > target : s >= target; };
  constexpr int64_t kSort = 2048;
  int64_t low = 0, high = n;
  double before = 0.0;  // weight of the items in front of `low`
  while (high - low > kSort) {
    uint64_t a = items[low].key, b = items[low + (high - low) / 2].key, c = items[high - 1].key;
    // Keys are distinct, so their median of three leaves at least one item on either side.
    const uint64_t pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    Item* split = std::partition(items + low, items + high, [&](const Item& i) { return i.key >= pivot; });
    double upper = 0.0;
    for (Item* i = items + low; i != split; ++i) upper += i->weight;
    if (reached(before + upper)) {
      high = split - items;
    } else {
      before += upper;
      low = split - items;
    }
  }
  std::sort(items + low, items + high, descending);
  sum = before;
  int64_t last = -1;
  for (int64_t i = low; i < high; ++i) {
    const double next = sum + items[i].weight;
    if (next > sum) last = i;
    sum = next;
    if (reached(sum)) return i;
  }
  if (last < 0) {  // it is in front of `low`
    std::sort(items, items + low, descending);
    last = low - 1;
    while (last > 0 && sum + items[last].weight == sum) --last;
  }
  return last;
}

// Draw from candidates that are the whole support (before top-k).
void draw(Candidates& c, const Sampling& s, double u, Scratch& memory, int64_t& token, float& logp) {
  token = 0;
  logp = std::numeric_limits<float>::quiet_NaN();
  if (c.n == 0) return;
  if (s.top_k > 0 && c.n > s.top_k) keep_best(c, s.top_k);
  if (s.temperature == 0.0) u = 0.0;
  const double scale = s.temperature == 0.0 ? 1.0 : std::min(1.0 / s.temperature, 1e300);
  memory.weights.resize(c.n);
  double* weights = memory.weights.data();
  float max;
  double total = kernels().weigh(c.x.data(), c.n, scale, weights, max);

  float x = max;
  if (!(u > 0.0) && s.top_p == 1.0 && s.min_p == 0.0) {  // the first in order: no order is needed to find it
    const float* values = c.x.data();
    const int32_t* ids = c.id.data();
    int32_t first = std::numeric_limits<int32_t>::max();
    for (int64_t i = 0, n = c.n; i < n; ++i) first = values[i] == max ? std::min(first, ids[i]) : first;
    token = first;
  } else {
    memory.items.resize(c.n);
    Item* items = memory.items.data();
    for (int64_t i = 0; i < c.n; ++i) items[i] = {to_key(c.x[i], c.id[i]), weights[i]};
    int64_t kept = c.n;
    if (s.top_p < 1.0) kept = 1 + reach(items, kept, s.top_p * total, false, total);
    if (s.min_p > 0.0) {
      kept = std::partition(items, items + kept, [&](const Item& i) { return i.weight >= s.min_p; }) - items;
      total = 0.0;
      for (int64_t i = 0; i < kept; ++i) total += items[i].weight;
    }
    double unused;
    const Item& drawn = items[reach(items, kept, (u > 0.0 ? u : 0.0) * total, true, unused)];
    token = key_id(drawn.key);
    x = key_value(drawn.key);
  }
  const double gap = x == max ? 0.0 : (static_cast<double>(x) - max) * scale;
  if (!c.nan) logp = static_cast<float>(gap - std::log(total));
}

int64_t element_size(Type type) { return type == Type::f32 ? 4 : 2; }

Row row_of(const Batch& b, int64_t row) {
  const int64_t size = element_size(b.type);
  const char* expert = static_cast<const char*>(b.expert) + row * b.expert_stride * size;
  const char* amateur = b.amateur ? static_cast<const char*>(b.amateur) + row * b.amateur_stride * size : nullptr;
  return {expert, amateur, b.type, static_cast<float>(1.0 + b.alpha), static_cast<float>(b.alpha)};
}

// The tokens seen so far, for the repetition penalty: a bit per token while this object lives.
class History {
 public:
  History(const int64_t* ids, int64_t length, int64_t vocab, std::vector<uint64_t>& bits)
      : ids_(ids), length_(length), vocab_(vocab), bits_(bits) {
    const size_t words = static_cast<size_t>((vocab + 63) / 64);
    if (bits_.size() < words) bits_.resize(words, 0);
    each([&](int64_t id) { bits_[id >> 6] |= uint64_t{1} << (id & 63); });
  }
  ~History() {
    each([&](int64_t id) { bits_[id >> 6] = 0; });
  }
  History(const History&) = delete;
  History& operator=(const History&) = delete;

  const uint64_t* bits() const { return length_ == 0 ? nullptr : bits_.data(); }
  bool contains(int64_t id) const { return bits_[id >> 6] >> (id & 63) & 1; }

  // Visit every seen token once; afterwards nothing is seen any more.
  template <class F>
  void drain(F visit) {
    each([&](int64_t id) {
      if (!contains(id)) return;
      bits_[id >> 6] &= ~(uint64_t{1} << (id & 63));
      visit(id);
    });
  }

 private:
  template <class F>
  void each(F f) const {  // ids outside the vocabulary are padding
    for (int64_t i = 0; i < length_; ++i) {
      if (ids_[i] >= 0 && ids_[i] < vocab_) f(ids_[i]);
    }
  }
  const int64_t* ids_;
  int64_t length_, vocab_;
  std::vector<uint64_t>& bits_;
};

// The largest threshold, or nearly, that at least `rank` of the n values (`max` the largest) reach; -inf where there are fewer.
// Bisection over the floats as integers, from near the maximum: it needs only counts, which are vectorised, and ends within
// 64 steps whatever the values are.
float threshold_of_rank(const float* x, int64_t n, int64_t rank, float max) {
  if (n < rank) return -kInf;
  const auto order = [](float value) { return static_cast<uint32_t>(to_key(value, 0) >> 32); };
  const auto value = [](uint32_t ordered) { return key_value(static_cast<uint64_t>(ordered) << 32); };
  const auto found = [&](uint32_t ordered) { return kernels().count(x, n, value(ordered)); };
  const int64_t enough = rank + rank / 4;
  const uint32_t floor = order(-kInf);
  uint32_t high = order(max) + 1, low = high, step = 1u << 22;  // half an exponent
  do {  // invariant: `high` is not reached by `rank`, or is beyond every value
    high = low;
    low = high - floor > step ? high - step : floor;
    step <<= 1;
    if (low == floor) break;  // every value reaches it
  } while (found(low) < rank);
  while (high - low > 1) {  // invariant: `low` is reached by at least `rank`
    const uint32_t middle = low + (high - low) / 2;
    const int64_t reached = found(middle);
    if (reached < rank) {
      high = middle;
    } else {
      low = middle;
      if (reached <= enough) break;
    }
  }
  return value(low);
}

float penalised(float x, const Sampling& s) { return x > 0.0f ? x * s.inverse_penalty : x * s.penalty; }

// One call: which scan is run on a slice, and how its candidates become the support of a row's distribution.
struct Call {
  const Batch& batch;
  const Sampling& sampling;
  const int64_t* history;
  int64_t history_length;

  bool plausible() const { return sampling.plausibility_offset > -kInf; }
  bool top() const { return !plausible() && sampling.top_k > 0 && sampling.top_k < batch.vocab; }

  // How far below the maximum a candidate may lie. Without a cut-off: where the weights of all V tokens together could no
  // longer change a double, or where greedy only reports their sum, a float. A penalty may lower the maximum, so that
  // nothing can be left out before it is applied.
  float offset() const {
    if (plausible()) return sampling.plausibility_offset;
    if (history_length > 0) return -kInf;
    const double tokens = std::log(static_cast<double>(batch.vocab));
    if (sampling.temperature == 0.0) return static_cast<float>(-tokens - (sampling.top_p == 1.0 ? 20.0 : 45.0));
    return static_cast<float>(-sampling.temperature * (45.0 + tokens));
  }

  History seen(int64_t row) const {
    return {history + row * history_length, history_length, batch.vocab, scratch().seen};
  }

  void scan(int64_t row, int64_t begin, int64_t end, Candidates& c) const {
    c.clear();
    Row logits = row_of(batch, row);
    if (plausible()) logits.amateur = nullptr;  // the cut-off looks at the expert; the amateur is read where it matters
    const Kernels& loops = kernels();
    loops.maxima(logits, begin, end, c);
    if (top()) {
      // k groups reach the threshold, so k tokens do; groups whose maximum is a seen token do not count.
      const int64_t groups = (end - begin + kGroup - 1) / kGroup;
      const float threshold = threshold_of_rank(c.group_max.data(), groups, sampling.top_k + history_length, c.max);
      loops.collect(logits, begin, end, threshold, sampling.top_k, seen(row).bits(), c);
    } else {
      loops.collect(logits, begin, end, near_threshold(c.max, offset()), 0, nullptr, c);
    }
  }

  // Make the candidates of a whole row the support of its distribution, and draw.
  void finish(int64_t row, Candidates& c, double u, int64_t& token, float& logp) const {
    if (plausible() || history_length > 0) {
      const Row logits = row_of(batch, row);
      History history_of_row = seen(row);
      if (top()) {
        history_of_row.drain([&](int64_t id) { append(c, penalised(mixed(logits, id), sampling), static_cast<int32_t>(id)); });
      } else {
        const float threshold = near_threshold(c.max, offset());
        const int64_t collected = c.n;
        c.n = 0;
        for (int64_t i = 0; i < collected; ++i) {
          if (c.x[i] < threshold) continue;  // near the maximum of its slice, not near that of the row
          const int32_t id = c.id[i];
          const float x = plausible() ? mixed(logits, id) : c.x[i];
          append(c, history_of_row.contains(id) ? penalised(x, sampling) : x, id);
        }
      }
    }
    draw(c, sampling, u, scratch(), token, logp);
  }

  static void append(Candidates& c, float x, int32_t id) {
    c.nan |= x != x;
    if (!(x > -kInf)) return;
    c.reserve(c.n + 1);
    c.x[c.n] = x;
    c.id[c.n++] = id;
  }
};

// Slices of a row, so that few rows still occupy all threads.
int64_t slices_per_row(const Batch& batch) {
  constexpr int64_t kSmallest = 8192;  // tokens in a slice
  const int64_t threads = torch::stable::get_num_threads();
  if (batch.rows == 0 || batch.rows > 2 * threads) return 1;
  return std::max<int64_t>(1, std::min(threads / std::gcd(threads, batch.rows), batch.vocab / kSmallest));
}

}  // namespace

float keep_best(Candidates& c, int64_t k) {
  std::vector<uint64_t>& keys = scratch().keys;
  keys.resize(c.n);
  for (int64_t i = 0; i < c.n; ++i) keys[i] = to_key(c.x[i], c.id[i]);
  std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<>());
  for (int64_t i = 0; i < k; ++i) {
    c.x[i] = key_value(keys[i]);
    c.id[i] = key_id(keys[i]);
  }
  c.n = k;
  return key_value(keys[k - 1]);
}

void sample(const Batch& batch, const Sampling& sampling, const double* uniform, const int64_t* history, int64_t history_length,
            int64_t* tokens, float* logps) {
  const Call call{batch, sampling, history, history_length};
  const int64_t slices = slices_per_row(batch);
  const int64_t grain = std::max<int64_t>(1, 32768 * slices / batch.vocab);
  if (slices == 1) {
    torch::stable::parallel_for(0, batch.rows, grain, [&](int64_t begin, int64_t end) {
      Candidates& c = scratch().candidates;
      for (int64_t row = begin; row < end; ++row) {
        call.scan(row, 0, batch.vocab, c);
        call.finish(row, c, uniform[row], tokens[row], logps[row]);
      }
    });
    return;
  }
  static thread_local std::vector<Candidates> kept;  // of the calling thread; the lambda below runs on others
  std::vector<Candidates>& parts = kept;
  if (static_cast<int64_t>(parts.size()) < batch.rows * slices) parts.resize(batch.rows * slices);
  torch::stable::parallel_for(0, batch.rows * slices, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slice = i % slices;
      call.scan(i / slices, batch.vocab * slice / slices, batch.vocab * (slice + 1) / slices, parts[i]);
    }
  });
  torch::stable::parallel_for(0, batch.rows, grain, [&](int64_t begin, int64_t end) {
    Candidates& all = scratch().candidates;
    for (int64_t row = begin; row < end; ++row) {
      all.clear();
      for (int64_t slice = 0; slice < slices; ++slice) {
        const Candidates& part = parts[row * slices + slice];
        all.reserve(all.n + part.n);
        std::copy_n(part.x.begin(), part.n, all.x.begin() + all.n);
        std::copy_n(part.id.begin(), part.n, all.id.begin() + all.n);
        all.n += part.n;
        all.max = std::max(all.max, part.max);
        all.nan |= part.nan;
      }
      call.finish(row, all, uniform[row], tokens[row], logps[row]);
    }
  });
}

void mix(const Batch& batch, float plausibility_offset, float* out) {
  const int64_t grain = std::max<int64_t>(1, 32768 / batch.vocab);
  torch::stable::parallel_for(0, batch.rows, grain, [&](int64_t begin, int64_t end) {
    Candidates& c = scratch().candidates;
    for (int64_t row = begin; row < end; ++row) {
      float threshold = -kInf;
      if (plausibility_offset > -kInf) {
        Row expert = row_of(batch, row);
        expert.amateur = nullptr;
        c.clear();
        kernels().maxima(expert, 0, batch.vocab, c);
        threshold = near_threshold(c.max, plausibility_offset);
      }
      kernels().mix(row_of(batch, row), 0, batch.vocab, threshold, out + row * batch.vocab);
    }
  });
}

}  // namespace synpo
