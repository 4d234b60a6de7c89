// Blocks of the product: rows of a become tiles, columns of b panels (head_pass.h says how they lie), a stretch of the sum at a
// time. Every number is computed by one task in an order that the shapes alone decide.

#include "product.h"

#include "parallel.h"

namespace synpo {
namespace {

constexpr int64_t kInner = 1024;           // numbers of a sum in one go
constexpr int64_t kBlockBytes = 4 << 20;   // of a or b, packed
constexpr int64_t kTiles = 8;              // of a task

const char* at(const Matrix& m, Type type, int64_t row, int64_t column) {
  const int64_t number = m.by_rows ? row * m.stride + column : column * m.stride + row;
  return static_cast<const char*>(m.data) + number * (type == Type::f32 ? 4 : 2);
}

}  // namespace

void add_product(const Product& p) {
  if (p.rows == 0 || p.columns == 0 || p.inner == 0) return;
  const HeadKernels& kernels = head_kernels(p.type);
  const int64_t lanes = kernels.lanes, height = kernels.rows;
  const int64_t most_steps = round_up(ceil_div(std::min(p.inner, kInner), kernels.unit), kernels.depth);
  const int64_t most_tile = most_steps * kernels.tile_step, most_panel = most_steps * lanes;  // units
  const int64_t tiles = std::min(round_up(std::max<int64_t>(1, kBlockBytes / 4 / most_tile), kTiles), ceil_div(p.rows, height));
  const int64_t panels = std::min(std::max<int64_t>(1, kBlockBytes / 4 / most_panel), ceil_div(p.columns, lanes));
  const Buffer<uint32_t> a = buffer<uint32_t>(tiles * most_tile), b = buffer<uint32_t>(panels * most_panel);
  for (int64_t k = 0; k < p.inner; k += kInner) {
    const int64_t inner = std::min(kInner, p.inner - k), steps = round_up(ceil_div(inner, kernels.unit), kernels.depth);
    const int64_t tile_size = steps * kernels.tile_step, panel_size = steps * lanes;
    for (int64_t column = 0; column < p.columns; column += panels * lanes) {
      const int64_t here_panels = ceil_div(std::min(panels * lanes, p.columns - column), lanes);
      parallel(here_panels, [&](int64_t i) {
        const int64_t first = column + i * lanes, width = std::min(lanes, p.columns - first);
        uint32_t* panel = b.get() + i * panel_size;
        if (p.b.by_rows) {
          kernels.pack_sum_panel(at(p.b, p.type, k, first), p.b.stride, inner, width, steps, panel);
        } else {
          kernels.pack_panel(at(p.b, p.type, k, first), p.b.stride, width, inner, steps, panel);
        }
      });
      for (int64_t row = 0; row < p.rows; row += tiles * height) {
        const int64_t rows = std::min(tiles * height, p.rows - row), here_tiles = ceil_div(rows, height);
        const int64_t blocks = ceil_div(here_tiles, kTiles);
        parallel(blocks, [&](int64_t block) {
          const int64_t first = block * kTiles, count = std::min(kTiles, here_tiles - first);
          if (!p.a.by_rows) {
            const int64_t left = rows - first * height;
            kernels.pack_sum_tiles(at(p.a, p.type, row + first * height, k), p.a.stride, inner, left, 0, count, steps,
                                   a.get() + first * tile_size);
            return;
          }
          for (int64_t t = first; t < first + count; ++t) {
            kernels.pack_logits_tile(at(p.a, p.type, row + t * height, k), p.a.stride, std::min(height, rows - t * height), inner,
                                     steps, a.get() + t * tile_size);
          }
        });
        parallel(blocks * here_panels, [&](int64_t task) {
          const int64_t first = task % blocks * kTiles, panel = task / blocks, count = std::min(kTiles, here_tiles - first);
          const int64_t left = column + panel * lanes, width = std::min(lanes, p.columns - left);
          const Buffer<float> sums = buffer<float>(count * height * lanes);
          kernels.sum({a.get() + first * tile_size, count, tile_size, b.get() + panel * panel_size, 1, panel_size, steps, false,
                       sums.get(), 0});
          for (int64_t i = 0; i < std::min(count * height, rows - first * height); ++i) {
            float* total = p.total + (row + first * height + i) * p.total_stride + left;
            for (int64_t j = 0; j < width; ++j) total[j] += sums[i * lanes + j];
          }
        });
      }
    }
  }
}

}  // namespace synpo
