// The loops of the frozen-head pass, written once on Vec (head_vec.h, included before this) and on an engine, which takes the
// products, and compiled once per instruction set. See head_pass.h for layouts. No include guard, no includes.

namespace synpo::head {
namespace SYNPO_ISA {

constexpr int64_t kSteps = 256;  // of a logit summed in one go: sums of sums round less

// Numbers of type T, each widened to a unit of its own.
template <class T>
struct Singles {
  using Number = T;
  static constexpr int64_t kUnit = 1;
  static Vec dot(Vec a, Vec b, Vec c) { return Vec::fma(a, b, c); }
  static Vec along(const T* p) { return Vec::load(p); }
  static Vec across(const T* const (&rows)[kUnit]) { return Vec::load(rows[0]); }
};

#if SYNPO_LEVEL == 3
struct Pairs {
  using Number = Bf16;
  static constexpr int64_t kUnit = 2;
  static Vec dot(Vec a, Vec b, Vec c) { return Vec::dot(a, b, c); }
  static Vec along(const Bf16* p) { return Vec::load_pairs(p); }
  static Vec across(const Bf16* const (&rows)[kUnit]) { return Vec::interleave(rows[0], rows[1]); }
};
#endif

// kWidth units of numbers that are neighbours in memory: `numbers` are there, the rest 0.
template <class F>
Vec along(const typename F::Number* p, int64_t numbers) {
  constexpr int64_t kNumbers = Vec::kWidth * F::kUnit;
  if (numbers >= kNumbers) return F::along(p);
  typename F::Number whole[kNumbers] = {};
  for (int64_t i = 0; i < numbers; ++i) whole[i] = p[i];
  return F::along(whole);
}

// kWidth units, each of numbers that are neighbours in a column: `rows` rows and `numbers` columns are there, the rest 0.
template <class F>
inline Vec across(const typename F::Number* p, int64_t stride, int64_t rows, int64_t numbers) {
  const typename F::Number* from[F::kUnit];
  typename F::Number whole[F::kUnit][Vec::kWidth];
  const bool inside = rows >= F::kUnit && numbers >= Vec::kWidth;
  for (int64_t u = 0; u < F::kUnit; ++u) {
    from[u] = p + u * stride;
    for (int64_t i = 0; !inside && i < Vec::kWidth; ++i) {
      whole[u][i] = u < rows && i < numbers ? from[u][i] : typename F::Number{};
    }
    from[u] = inside ? from[u] : whole[u];
  }
  return F::across(from);
}

// Products on vector registers: a unit of W is repeated over the lanes. Tile layout: [step][kStride].
template <class F, int kRowsOf, int kVecs>
struct Broadcast {
  using Format = F;
  static constexpr int64_t kRows = kRowsOf, kLanes = kVecs * Vec::kWidth, kDepth = 1;
  static constexpr int64_t kStride = (kRows + Vec::kWidth - 1) / Vec::kWidth * Vec::kWidth;  // whole vectors to write
  static constexpr bool kRowsAreNeighbours = true;
  // Where kWidth units go that are neighbours in the layout: rows i.. of step s.
  static constexpr int64_t at(int64_t s, int64_t i) { return s * kStride + i; }

  // c (kRows, kLanes) = or += tile · panel; rows beyond `rows` are free to be 0.
  void multiply(const uint32_t* tile, const uint32_t* panel, int64_t steps, int64_t rows, float* c, bool accumulate) {
    if (rows > kRows / 2) {
      multiply_rows<kRowsOf>(tile, panel, steps, c, accumulate);
    } else {
      multiply_rows<kRowsOf / 2>(tile, panel, steps, c, accumulate);
    }
  }

 private:
  template <int R>
  static void multiply_rows(const uint32_t* tile, const uint32_t* panel, int64_t steps, float* c, bool accumulate) {
    Vec sum[R][kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        sum[i][j] = Vec::fill(0.0f);
        if (accumulate) __builtin_prefetch(c + i * kLanes + j * Vec::kWidth, 1);
      }
    }
    for (int64_t s = 0; s < steps; ++s, tile += kStride, panel += kLanes) {
      Vec b[kVecs];
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) b[j] = Vec::load(panel + j * Vec::kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const Vec a = Vec::repeat(tile + i);
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) sum[i][j] = F::dot(a, b[j], sum[i][j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        float* out = c + i * kLanes + j * Vec::kWidth;
        (accumulate ? sum[i][j] + Vec::load(out) : sum[i][j]).store(out);
      }
    }
  }
};

// kWidth lines of kWidth units from step s0 and row i0 of a tile. `neighbours`: whether a line's units are of one step.
template <class E>
void put(Vec (&lines)[Vec::kWidth], bool neighbours, int64_t s0, int64_t i0, int64_t steps, uint32_t* tile) {
  if (neighbours != E::kRowsAreNeighbours) transpose(lines);
  for (int64_t j = 0; j < Vec::kWidth; ++j) {
    if constexpr (E::kRowsAreNeighbours) {
      if (s0 + j < steps) lines[j].store(tile + E::at(s0 + j, i0));
    } else {
      lines[j].store(tile + E::at(s0, i0 + j));
    }
  }
}

template <class E>
float dot(const void* x, const void* weight, int64_t hidden) {
  using F = Singles<typename E::Format::Number>;
  const auto *a = static_cast<const typename F::Number*>(x), *b = static_cast<const typename F::Number*>(weight);
  Vec sum = Vec::fill(0.0f);
  for (int64_t d = 0; d < hidden; d += Vec::kWidth) sum = Vec::fma(along<F>(a + d, hidden - d), along<F>(b + d, hidden - d), sum);
  float lanes[Vec::kWidth], total = 0.0f;
  sum.store(lanes);
  for (const float lane : lanes) total += lane;
  return total;
}

template <class E>
void pack_panel(const void* x, int64_t stride, int64_t rows, int64_t hidden, int64_t steps, uint32_t* panel) {
  using F = typename E::Format;
  const auto* from = static_cast<const typename F::Number*>(x);
  for (int64_t l0 = 0; l0 < E::kLanes; l0 += Vec::kWidth) {
    for (int64_t s0 = 0; s0 < steps; s0 += Vec::kWidth) {
      const int64_t d = s0 * F::kUnit;
      Vec lines[Vec::kWidth];
      for (int64_t j = 0; j < Vec::kWidth; ++j) {
        const int64_t row = l0 + j;
        lines[j] = row < rows ? along<F>(from + row * stride + d, hidden - d) : Vec::fill(0.0f);
      }
      transpose(lines);
      for (int64_t j = 0; j < Vec::kWidth && s0 + j < steps; ++j) lines[j].store(panel + (s0 + j) * E::kLanes + l0);
    }
  }
}

template <class E>
void pack_sum_panel(const void* x, int64_t stride, int64_t rows, int64_t columns, int64_t steps, uint32_t* panel) {
  using F = typename E::Format;
  const auto* from = static_cast<const typename F::Number*>(x);
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t row = s * F::kUnit;
    for (int64_t l0 = 0; l0 < E::kLanes; l0 += Vec::kWidth) {
      across<F>(from + row * stride + l0, stride, rows - row, columns - l0).store(panel + s * E::kLanes + l0);
    }
  }
}

template <class E>
void pack_logits_tile(const void* weight, int64_t stride, int64_t rows, int64_t hidden, int64_t steps, uint32_t* tile) {
  using F = typename E::Format;
  const auto* from = static_cast<const typename F::Number*>(weight);
  for (int64_t s0 = 0; s0 < steps; s0 += Vec::kWidth) {
    const int64_t d = s0 * F::kUnit;
    for (int64_t i0 = 0; i0 < E::kRows; i0 += Vec::kWidth) {
      Vec lines[Vec::kWidth];
      for (int64_t j = 0; j < Vec::kWidth; ++j) {
        const int64_t row = i0 + j;
        lines[j] = row < rows && row < E::kRows ? along<F>(from + row * stride + d, hidden - d) : Vec::fill(0.0f);
      }
      put<E>(lines, false, s0, i0, steps, tile);
    }
  }
}

template <class E>
void pack_sum_tiles(const void* weight, int64_t stride, int64_t rows, int64_t hidden, int64_t first, int64_t tiles, int64_t steps,
                    uint32_t* tile) {
  using F = typename E::Format;
  const auto* from = static_cast<const typename F::Number*>(weight);
  const int64_t tile_size = steps * E::at(1, 0);
  const auto line = [&](int64_t s, int64_t d) {
    const int64_t v = s * F::kUnit;
    return across<F>(from + v * stride + d, stride, rows - v, hidden - d);
  };
  if constexpr (E::kRowsAreNeighbours) {  // along the rows of W, which lie far apart and fall on few cache sets
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t ahead = 0; ahead < F::kUnit; ++ahead) {
        const auto* next = from + ((s + 4) * F::kUnit + ahead) * stride + first;
        for (int64_t i = 0; i < tiles * E::kRows; i += 64 / sizeof(*next)) __builtin_prefetch(next + i);
      }
      for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t i0 = 0; i0 < E::kRows; i0 += Vec::kWidth) {
          line(s, first + t * E::kRows + i0).store(tile + t * tile_size + E::at(s, i0));
        }
      }
    }
    return;
  }
  for (int64_t s0 = 0; s0 < steps; s0 += Vec::kWidth) {
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t i0 = 0; i0 < E::kRows; i0 += Vec::kWidth) {
        Vec lines[Vec::kWidth];
        for (int64_t j = 0; j < Vec::kWidth; ++j) lines[j] = line(s0 + j, first + t * E::kRows + i0);
        put<E>(lines, true, s0, i0, steps, tile + t * tile_size);
      }
    }
  }
}

// P of one tile and panel from its products z (kRows, kLanes), `rows` of them real; adds to sums (kLanes).
template <class E, bool kKeep, bool kCapped>
void exponentials(const LogitsTask& task, float* z, int64_t first, int64_t rows, int64_t panel, uint32_t* out) {
  using F = typename E::Format;
  const Vec scale = Vec::fill(task.scale), cap = Vec::fill(task.softcap), per_cap = Vec::fill(kCapped ? 1.0f / task.softcap : 0.0f);
  for (int64_t l = 0; l < E::kLanes; l += Vec::kWidth) {
    const int64_t lane = panel * E::kLanes + l;
    const Vec target = Vec::load(task.target + lane);
    Vec sum = Vec::load(task.sums + lane);
    for (int64_t i = 0; i < rows; ++i) {
      Vec logit = Vec::load(z + i * E::kLanes + l);
      if (task.bias != nullptr) logit = logit + Vec::fill(task.bias[first - task.first + i]);
      logit = logit * scale;
      Vec slope;
      if constexpr (kCapped) {
        const Vec ratio = tanh(logit * per_cap);
        logit = ratio * cap;
        slope = Vec::fill(1.0f) - ratio * ratio;
      }
      Vec p = exp(logit - target);
      p = p.where(Vec::equal(task.labels + lane, static_cast<int32_t>(first + i)), Vec::fill(0.0f));
      sum = sum + p;
      if constexpr (kKeep && kCapped) {
        p = p * slope;
        p = p.where(p.lt(Vec::fill(kLeast)), Vec::fill(0.0f));
      }
      if constexpr (kKeep) p.store(z + i * E::kLanes + l);
    }
    sum.store(task.sums + lane);
    if constexpr (kKeep) {
      for (int64_t i = rows; i < E::kRows; ++i) Vec::fill(0.0f).store(z + i * E::kLanes + l);
      for (int64_t i = 0; i < E::kRows; i += F::kUnit) {
        const float* at = z + i * E::kLanes + l;
        Vec unit = Vec::load(at);
#if SYNPO_LEVEL == 3
        if constexpr (F::kUnit == 2) unit = Vec::pairs(unit, Vec::load(at + E::kLanes));
#endif
        unit.store(out + i / F::kUnit * E::kLanes + l);
      }
    }
  }
}

template <class E>
void logits(const LogitsTask& task) {
  E engine;
  alignas(64) float z[E::kRows * E::kLanes];
  const auto finish = task.out == nullptr   ? (task.softcap == 0.0f ? exponentials<E, false, false> : exponentials<E, false, true>)
                      : task.softcap == 0.0f ? exponentials<E, true, false>
                                             : exponentials<E, true, true>;
  for (int64_t p = 0; p < task.panels * E::kLanes; ++p) task.sums[p] = 0.0f;
  for (int64_t t = 0; t < task.tiles; ++t) {
    const int64_t first = task.first + t * E::kRows, rows = std::min(E::kRows, task.end - first);
    for (int64_t p = 0; p < task.panels; ++p) {
      for (int64_t s = 0; s < task.steps || s == 0; s += kSteps) {
        engine.multiply(task.tile + t * task.tile_size + s * E::at(1, 0), task.panel + p * task.panel_size + s * E::kLanes,
                        std::min(kSteps, task.steps - s), rows, z, s > 0);
      }
      uint32_t* out = task.out + p * task.out_size + t * (E::kRows / E::Format::kUnit) * E::kLanes;
      finish(task, z, first, rows, p, task.out == nullptr ? nullptr : out);
    }
  }
}

template <class E>
void sum(const SumTask& task) {
  E engine;
  for (int64_t t = 0; t < task.tiles; ++t) {
    for (int64_t p = 0; p < task.panels; ++p) {
      float* out = task.out + p * task.out_size + t * E::kRows * E::kLanes;
      engine.multiply(task.tile + t * task.tile_size, task.panel + p * task.panel_size, task.steps, E::kRows, out, task.accumulate);
    }
  }
}

template <class E>
void directions(const DirectionsTask& task) {
  using T = typename E::Format::Number;
  auto* out = static_cast<T*>(task.out);
  for (int64_t l0 = 0; l0 < task.rows; l0 += Vec::kWidth) {
    for (int64_t d = 0; d < task.hidden; d += Vec::kWidth) {
      const int64_t width = std::min(Vec::kWidth, task.hidden - d);
      Vec lines[Vec::kWidth];
      for (int64_t j = 0; j < Vec::kWidth; ++j) {
        lines[j] = j < width ? Vec::load(task.sum + (d + j) * E::kLanes + l0) : Vec::fill(0.0f);
      }
      transpose(lines);
      for (int64_t j = 0; j < Vec::kWidth && l0 + j < task.rows; ++j) {
        const int64_t row = l0 + j;
        const T* label = static_cast<const T*>(task.weight) + task.labels[row] * task.stride + d;
        const Vec u = along<Singles<T>>(label, width) * Vec::fill(task.toward[row]) - lines[j] * Vec::fill(task.pull[row]);
        T* to = out + row * task.hidden + d;
        if (width == Vec::kWidth) {
          u.store(to);
        } else {
          T whole[Vec::kWidth];
          u.store(whole);
          for (int64_t i = 0; i < width; ++i) to[i] = whole[i];
        }
      }
    }
  }
}

template <class E>
constexpr HeadKernels table() {
  return {E::kRows,  E::kLanes,     E::Format::kUnit,  E::kDepth,           E::at(1, 0),
          dot<E>,    pack_panel<E>, pack_sum_panel<E>, pack_logits_tile<E>, pack_sum_tiles<E>, logits<E>,
          sum<E>,    directions<E>};
}

}  // namespace SYNPO_ISA
}  // namespace synpo::head
