// The frozen-head pass on the CPU: types shared by the op, the driver and the loops compiled per instruction set.
//
//   z = cap(scale (x Wᵀ + b))     P[v, n] = exp(z[v, n] - z_y[n]), 0 at n's label y     s[n] = Σ_v P[v, n]
//   E[d, n] = Σ_v W[v, d] c[v, n] P[v, n]          U[n] = scale (s[n] c_y W_y - E[:, n]) / (1 + s[n])
//
// W is the broadcast side of both products, rows of x are the vector lanes, so sums over the vocabulary need no reduction
// across lanes and a row that is not finite stays alone.
//
// Layouts, in units of 32 bits (one fp32 number, or two bf16 numbers that are neighbours along the sum of a product):
//   panel   `lanes` rows of x:   x[step][lane];   P[step][lane];   E[d][lane] in fp32
//   tile    `rows` rows of W (product with x) or columns of W (product with P), as the instruction set wants them
//   step    one unit along the sum of a product; numbers beyond its end are 0

#pragma once

#include "numbers.h"

namespace synpo {

// What of P is smaller is 0: no product then meets a denormal number or makes one, which costs Intel's CPUs a hundred cycles, as
// long as what it is multiplied with is above 1.5e-8. 2^18 tokens left out change s by no more than 2^-82.
constexpr float kLeast = 0x1p-100f, kLeastLog = -69.3147f;  // its logarithm, rounded up

struct HeadPass {
  int64_t rows, vocab, hidden;
  Type type;
  const void* x;       // (rows, hidden), contiguous
  const void* weight;  // (vocab, hidden), rows `weight_stride` numbers apart
  int64_t weight_stride;
  const void* bias;       // (vocab,) or null
  const int64_t* labels;  // (rows,)
  float softcap, scale;   // softcap 0: none
  float* total;           // (rows,) s, out
  float* target;          // (rows,) z_y, out
  void* direction;        // (rows, hidden) U, out; null: not wanted
  int64_t workspace;      // bytes to hold, of which a panel and a tile need some at least
};

// What one instruction set does for one format of x and W. Tasks of a phase are independent of each other.
struct HeadKernels {
  int64_t rows, lanes;  // of a tile, of a panel
  int64_t unit;         // numbers in a unit
  int64_t depth;        // steps of a product are padded to a multiple of this
  int64_t tile_step;    // units of a tile per step

  // x · w over `hidden` numbers of each.
  float (*dot)(const void* x, const void* weight, int64_t hidden);
  // Rows [0, rows) of x into one panel: the sum runs over the hidden size. Rows lie `stride` numbers apart, here and below.
  void (*pack_panel)(const void* x, int64_t stride, int64_t rows, int64_t hidden, int64_t steps, uint32_t* panel);
  // Columns [0, columns) of rows [0, rows) into one panel: the sum runs over the rows.
  void (*pack_sum_panel)(const void* x, int64_t stride, int64_t rows, int64_t columns, int64_t steps, uint32_t* panel);
  // Rows [0, rows) of W into one tile of the product with x: the sum runs over the hidden size.
  void (*pack_logits_tile)(const void* weight, int64_t stride, int64_t rows, int64_t hidden, int64_t steps, uint32_t* tile);
  // Columns [first, hidden) of W's rows [0, rows) into `tiles` tiles of the product with P: the sum runs over the rows.
  void (*pack_sum_tiles)(const void* weight, int64_t stride, int64_t rows, int64_t hidden, int64_t first, int64_t tiles,
                         int64_t steps, uint32_t* tile);
  void (*logits)(const struct LogitsTask&);
  void (*sum)(const struct SumTask&);
  void (*directions)(const struct DirectionsTask&);
};

// P and its sums for some tiles of the vocabulary and some panels.
struct LogitsTask {
  const uint32_t* tile;
  int64_t tiles, tile_size;
  const uint32_t* panel;
  int64_t panels, panel_size;
  int64_t steps;
  int64_t first, end;     // the first tile's first token, and where the chunk of the vocabulary ends
  const float* bias;      // of the tokens from `first` on; null: none
  const int32_t* labels;  // of the panels' rows, with the two below
  const float* target;     // z_y
  float* sums;  // out
  float softcap, scale;
  uint32_t* out;  // P of the first panel at `first`; null: not wanted
  int64_t out_size;
};

// E of some tiles of the hidden size and some panels.
struct SumTask {
  const uint32_t* tile;
  int64_t tiles, tile_size;
  const uint32_t* panel;  // of P
  int64_t panels, panel_size;
  int64_t steps;
  bool accumulate;  // or begin anew
  float* out;       // E of the first panel at the first tile
  int64_t out_size;
};

// U of one panel, in the format of W.
struct DirectionsTask {
  const float* sum;  // E, (hidden, lanes)
  int64_t rows, hidden;
  const void* weight;
  int64_t stride;
  const int32_t* labels;
  const float* toward;  // scale s c_y / (1 + s)
  const float* pull;    // scale / (1 + s)
  void* out;            // (rows, hidden)
};

// The kernels for inputs of `type` on the instruction set in use, see isa.h.
const HeadKernels& head_kernels(Type type);

void head_pass(const HeadPass& pass);

}  // namespace synpo
