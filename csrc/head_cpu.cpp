// The frozen-head pass on the CPU: blocks of rows, chunks of the vocabulary, threads.
//
//   per block of rows       x packed into panels; E in panels
//     per chunk of W
//       P and its sums      tiles of the vocabulary × panels; beside it, the chunk is packed for the second product
//       E += P W            tiles of the hidden size × panels; beside it, the next chunk is packed for the first
//     U from E
//
// Every number is computed by one task in an order that the shapes alone decide, so results do not depend on the number of
// threads or on which of them was faster.

#include "head_pass.h"
#include "parallel.h"

#include <algorithm>
#include <cmath>

namespace synpo {
namespace {

constexpr int64_t kMostRows = 2048;        // of a block of rows
constexpr int64_t kMostTokens = 2048;      // of a chunk of the vocabulary
constexpr int64_t kWeightBytes = 4 << 20;  // a chunk of W, packed for one product
constexpr int64_t kSliceBytes = 8 << 20;   // P of a chunk and a block of rows
constexpr int64_t kBlock = 8;              // tiles of a task
constexpr int64_t kPanelBytes = 512 << 10, kMostPanels = 16;  // panels of a task: they stay in the second cache, tiles pass by

int64_t number_size(Type type) { return type == Type::f32 ? 4 : 2; }

float widened(Type type, const void* p, int64_t i) {
  switch (type) {
    case Type::bf16:
      return to_float(static_cast<const Bf16*>(p)[i]);
    case Type::f16:
      return to_float(static_cast<const F16*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

// The pass over one block of rows.
class Block {
 public:
  Block(const HeadPass& pass, int64_t most_rows, int64_t most_tokens)
      : pass_(pass),
        kernels_(head_kernels(pass.type)),
        keep_(pass.direction != nullptr),
        most_tokens_(most_tokens),
        most_panels_(ceil_div(most_rows, kernels_.lanes)),
        hidden_tiles_(ceil_div(pass.hidden, kernels_.rows)),
        logit_steps_(steps(pass.hidden)),
        tile_size_(logit_steps_ * kernels_.tile_step),
        x_(buffer<uint32_t>(most_panels_ * logit_steps_ * kernels_.lanes)),
        logit_tiles_(buffer<uint32_t>(tiles(most_tokens) * tile_size_)),
        sum_tiles_(buffer<uint32_t>(keep_ ? hidden_tiles_ * steps(most_tokens) * kernels_.tile_step : 0)),
        p_(buffer<uint32_t>(keep_ ? most_panels_ * p_size() : 0)),
        e_(buffer<float>(keep_ ? most_panels_ * e_size() : 0)),
        sums_(buffer<float>(ceil_div(tiles(most_tokens), kBlock) * most_panels_ * kernels_.lanes)),
        bias_(buffer<float>(pass.bias == nullptr ? 0 : most_tokens)),
        labels_(buffer<int32_t>(most_panels_ * kernels_.lanes)),
        target_(buffer<float>(most_panels_ * kernels_.lanes)),
        slope_(buffer<float>(most_panels_ * kernels_.lanes)),
        total_(buffer<double>(most_panels_ * kernels_.lanes)) {}

  void run(int64_t first_row, int64_t rows) {
    first_row_ = first_row;
    rows_ = rows;
    panels_ = ceil_div(rows, kernels_.lanes);
    for (int64_t i = 0; i < panels_ * kernels_.lanes; ++i) {
      labels_[i] = i < rows ? static_cast<int32_t>(pass_.labels[first_row + i]) : -1;
      total_[i] = 0.0;
    }
    parallel(panels_, [&](int64_t panel) {
      const int64_t row = panel * kernels_.lanes;
      kernels_.pack_panel(x(row), pass_.hidden, std::min(kernels_.lanes, rows_ - row), pass_.hidden, logit_steps_,
                          x_.get() + panel * logit_steps_ * kernels_.lanes);
      for (int64_t i = row; i < row + kernels_.lanes; ++i) set_target(i);
    });
    sum_and_pack(-most_tokens_);
    for (int64_t token = 0; token < pass_.vocab; token += most_tokens_) {
      logits_and_pack(token);
      sum_and_pack(token);
    }
    for (int64_t i = 0; i < rows; ++i) pass_.total[first_row + i] = static_cast<float>(total_[i]);
    if (keep_) directions();
  }

 private:
  int64_t tiles(int64_t tokens) const { return ceil_div(tokens, kernels_.rows); }
  int64_t steps(int64_t numbers) const { return round_up(ceil_div(numbers, kernels_.unit), kernels_.depth); }
  int64_t p_size() const { return tiles(most_tokens_) * kernels_.rows / kernels_.unit * kernels_.lanes; }
  int64_t e_size() const { return hidden_tiles_ * kernels_.rows * kernels_.lanes; }
  const char* numbers(const void* p, int64_t i) const { return static_cast<const char*>(p) + i * number_size(pass_.type); }
  const char* x(int64_t row) const { return numbers(pass_.x, (first_row_ + row) * pass_.hidden); }
  const char* weight(int64_t token) const { return numbers(pass_.weight, token * pass_.weight_stride); }

  // z_y of a row of the block and its slope; rows that only fill a panel get what is free to be anything.
  void set_target(int64_t i) {
    target_[i] = 0.0f;
    slope_[i] = 1.0f;
    if (i >= rows_) return;
    float z = kernels_.dot(x(i), weight(labels_[i]), pass_.hidden);
    if (pass_.bias != nullptr) z += widened(pass_.type, pass_.bias, labels_[i]);
    z *= pass_.scale;
    if (pass_.softcap != 0.0f) {
      const double ratio = std::tanh(static_cast<double>(z) / pass_.softcap);
      z = static_cast<float>(pass_.softcap * ratio);
      slope_[i] = static_cast<float>(1.0 - ratio * ratio);
    }
    pass_.target[first_row_ + i] = target_[i] = z;
  }

  // Tokens of the chunk that begins at `token`; 0 before the first and after the last.
  int64_t tokens_at(int64_t token) const {
    return token < 0 ? 0 : std::clamp<int64_t>(pass_.vocab - token, 0, most_tokens_);
  }

  // All pack(0 … packs - 1), and product(first panel, panels, first tile, tiles, block of tiles) for all panels, of `panel_size`
  // units each, and tiles; neighbouring products share their panels.
  template <class P, class F>
  void parallel_with_packing(int64_t packs, const P& pack, int64_t all_tiles, int64_t panel_size, const F& product) {
    const int64_t blocks = ceil_div(all_tiles, kBlock);
    const int64_t even = panels_ * blocks / (4 * torch::stable::get_num_threads());  // for all threads to be done at once
    const int64_t group = std::clamp<int64_t>(std::min(kPanelBytes / 4 / std::max<int64_t>(1, panel_size), even), 1, kMostPanels);
    parallel(packs + ceil_div(panels_, group) * blocks, [&](int64_t i) {
      if (i < packs) return pack(i);
      const int64_t panel = (i - packs) / blocks * group, block = (i - packs) % blocks;
      product(panel, std::min(group, panels_ - panel), block * kBlock, std::min(kBlock, all_tiles - block * kBlock), block);
    });
  }

  // P of a chunk; and its part of W for `sum_and_pack`.
  void logits_and_pack(int64_t token) {
    const int64_t tokens = tokens_at(token), lanes = kernels_.lanes, panel_size = logit_steps_ * lanes;
    const int64_t sum_steps = steps(tokens), sum_tile = sum_steps * kernels_.tile_step;
    const auto pack = [&](int64_t block) {
      const int64_t tile = block * kBlock;
      kernels_.pack_sum_tiles(weight(token), pass_.weight_stride, tokens, pass_.hidden, tile * kernels_.rows,
                              std::min(kBlock, hidden_tiles_ - tile), sum_steps, sum_tiles_.get() + tile * sum_tile);
    };
    const auto product = [&](int64_t panel, int64_t panels, int64_t tile, int64_t tiles, int64_t block) {
      const int64_t before = tile * kernels_.rows;
      LogitsTask task{};
      task.tile = logit_tiles_.get() + tile * tile_size_;
      task.tiles = tiles;
      task.tile_size = tile_size_;
      task.panel = x_.get() + panel * panel_size;
      task.panels = panels;
      task.panel_size = panel_size;
      task.steps = logit_steps_;
      task.first = token + before;
      task.end = token + tokens;
      task.bias = pass_.bias == nullptr ? nullptr : bias_.get() + before;
      task.labels = labels_.get() + panel * lanes;
      task.target = target_.get() + panel * lanes;
      task.sums = sums_.get() + (block * panels_ + panel) * lanes;
      task.softcap = pass_.softcap;
      task.scale = pass_.scale;
      task.out = keep_ ? p_.get() + panel * p_size() + before / kernels_.unit * lanes : nullptr;
      task.out_size = p_size();
      kernels_.logits(task);
    };
    for (int64_t i = 0; pass_.bias != nullptr && i < tokens; ++i) bias_[i] = widened(pass_.type, pass_.bias, token + i);
    parallel_with_packing(keep_ ? ceil_div(hidden_tiles_, kBlock) : 0, pack, tiles(tokens), panel_size, product);
    for (int64_t block = 0; block < ceil_div(tiles(tokens), kBlock); ++block) {
      for (int64_t i = 0; i < panels_ * lanes; ++i) total_[i] += sums_[block * panels_ * lanes + i];
    }
  }

  // E += P W of a chunk; and the next chunk of W for `logits_and_pack`.
  void sum_and_pack(int64_t token) {
    const int64_t tokens = tokens_at(token), lanes = kernels_.lanes, tile_size = steps(tokens) * kernels_.tile_step;
    const int64_t next = token + most_tokens_, next_tokens = tokens_at(next);
    const auto pack = [&](int64_t tile) {
      const int64_t first = tile * kernels_.rows;
      kernels_.pack_logits_tile(weight(next + first), pass_.weight_stride, std::min(kernels_.rows, next_tokens - first),
                                pass_.hidden, logit_steps_, logit_tiles_.get() + tile * tile_size_);
    };
    const auto product = [&](int64_t panel, int64_t panels, int64_t tile, int64_t tiles, int64_t) {
      float* out = e_.get() + panel * e_size() + tile * kernels_.rows * lanes;
      kernels_.sum({sum_tiles_.get() + tile * tile_size, tiles, tile_size, p_.get() + panel * p_size(), panels, p_size(),
                    steps(tokens), token > 0, out, e_size()});
    };
    parallel_with_packing(tiles(next_tokens), pack, keep_ && tokens > 0 ? hidden_tiles_ : 0, tile_size / kernels_.tile_step * lanes,
                          product);
  }

  void directions() {
    parallel(panels_, [&](int64_t panel) {
      const int64_t row = panel * kernels_.lanes, rows = std::min(kernels_.lanes, rows_ - row);
      float toward[64], pull[64];
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t n = first_row_ + row + i;
        const float s = pass_.total[n], others = s / (1.0f + s);
        // 0, or NaN where the label's own logit is not finite, which must show
        const float fault = pass_.target[n] - pass_.target[n];
        toward[i] = pass_.scale * others * slope_[row + i] + fault;
        pull[i] = pass_.scale / (1.0f + s);
      }
      void* out = static_cast<char*>(pass_.direction) + (first_row_ + row) * pass_.hidden * number_size(pass_.type);
      kernels_.directions({e_.get() + panel * e_size(), rows, pass_.hidden, pass_.weight, pass_.weight_stride, labels_.get() + row,
                           toward, pull, out});
    });
  }

  const HeadPass& pass_;
  const HeadKernels& kernels_;
  const bool keep_;
  const int64_t most_tokens_, most_panels_, hidden_tiles_, logit_steps_, tile_size_;
  const Buffer<uint32_t> x_, logit_tiles_, sum_tiles_, p_;
  const Buffer<float> e_, sums_, bias_;
  const Buffer<int32_t> labels_;
  const Buffer<float> target_, slope_;
  const Buffer<double> total_;
  int64_t first_row_ = 0, rows_ = 0, panels_ = 0;
};

}  // namespace

// Half the workspace is for x and E of a block of rows; what is left then for a chunk of W, packed for each product, and its P.
void head_pass(const HeadPass& pass) {
  if (pass.rows == 0) return;
  const HeadKernels& kernels = head_kernels(pass.type);
  const bool keep = pass.direction != nullptr;
  const int64_t steps = round_up(ceil_div(pass.hidden, kernels.unit), kernels.depth);
  const int64_t sums = keep ? round_up(pass.hidden, kernels.rows) : 0;  // of a row
  const int64_t row_bytes = std::max<int64_t>(1, 4 * (steps + sums));
  const int64_t allowed = std::clamp<int64_t>(pass.workspace / 2 / row_bytes, kernels.lanes, kMostRows);
  const int64_t rows = round_up(ceil_div(pass.rows, ceil_div(pass.rows, allowed)), kernels.lanes);
  const int64_t packed = std::max<int64_t>(1, 4 * kernels.tile_step * steps);  // bytes of a tile
  const int64_t slice = 4 / kernels.unit * rows * kernels.rows;
  const int64_t tile_bytes = packed + (keep ? 4 * kernels.tile_step * sums / kernels.unit + slice : 0);
  const int64_t fitting = std::min({(pass.workspace - rows * row_bytes) / tile_bytes, kWeightBytes / packed, kSliceBytes / slice});
  const int64_t tiles = std::clamp<int64_t>(fitting, 1, ceil_div(std::min(pass.vocab, kMostTokens), kernels.rows));
  Block block(pass, rows, tiles * kernels.rows);
  for (int64_t first = 0; first < pass.rows; first += rows) block.run(first, std::min(rows, pass.rows - first));
}

}  // namespace synpo
