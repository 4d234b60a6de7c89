// Products on the tile registers of AMX (included by head_kernels.cpp inside the AVX-512 section, after head_tiles.h), and the
// same registers kept in memory, so that everything but the six instructions below runs on CPUs without them.

namespace synpo::head {
namespace SYNPO_ISA {

constexpr int64_t kTileRows = 16, kTileUnits = 16;  // of a register: 16 rows of 16 units, 1 KiB

// The eight registers, each whole. Palette 1 is asked for by number: some virtual machines hide the leaf that describes it.
class AmxTiles {
 public:
  AmxTiles() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } layout;
    static_assert(sizeof(layout) == 64, "what ldtilecfg reads");
    asm volatile("ldtilecfg %0" ::"m"(layout));
  }
  ~AmxTiles() { asm volatile("tilerelease"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  template <int kTile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kSum, int kA, int kB>
  void dot() {  // sum[i][j] += Σ over units k of the dot product of a[i][k] and b[k][j]
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }
};

class EmulatedTiles {
 public:
  template <int kTile>
  void zero() {
    std::memset(tiles_[kTile], 0, sizeof(tiles_[kTile]));
  }
  template <int kTile>
  void load(const void* p, int64_t stride) {
    for (int64_t i = 0; i < kTileRows; ++i) std::memcpy(tiles_[kTile][i], static_cast<const char*>(p) + i * stride, 64);
  }
  template <int kTile>
  void store(void* p, int64_t stride) {
    for (int64_t i = 0; i < kTileRows; ++i) std::memcpy(static_cast<char*>(p) + i * stride, tiles_[kTile][i], 64);
  }
  template <int kSum, int kA, int kB>
  void dot() {
    for (int64_t i = 0; i < kTileRows; ++i) {
      float even[kTileUnits] = {}, odd[kTileUnits] = {};
      for (int64_t k = 0; k < kTileUnits; ++k) {
        const uint32_t a = tiles_[kA][i][k];
        for (int64_t j = 0; j < kTileUnits; ++j) {
          const uint32_t b = tiles_[kB][k][j];
          even[j] += from_bits(a << 16) * from_bits(b << 16);
          odd[j] += from_bits(a & 0xFFFF0000) * from_bits(b & 0xFFFF0000);
        }
      }
      for (int64_t j = 0; j < kTileUnits; ++j) {
        const float sum = from_bits(tiles_[kSum][i][j]) + (even[j] + odd[j]);
        std::memcpy(&tiles_[kSum][i][j], &sum, sizeof(sum));
      }
    }
  }

 private:
  uint32_t tiles_[8][kTileRows][kTileUnits];
};

// 2 × 2 registers of sums. Tile layout: [step / 16][kRows][step % 16], so that a register's rows are 64 bytes apart.
template <class Tiles>
struct TileProducts {
  using Format = Pairs;
  static constexpr int64_t kRows = 2 * kTileRows, kLanes = 2 * kTileUnits, kDepth = kTileUnits;
  static constexpr bool kRowsAreNeighbours = false;
  // Where kWidth units go that are neighbours in the layout: steps s.. of row i, s a multiple of 16 (or s = 1: the step's size).
  static constexpr int64_t at(int64_t s, int64_t i) { return s * kRows + i * kTileUnits; }

  void multiply(const uint32_t* tile, const uint32_t* panel, int64_t steps, int64_t, float* c, bool accumulate) {
    constexpr int64_t kLaneBytes = 4 * kLanes;
    float* below = c + kTileRows * kLanes;
    if (accumulate) {
      tiles_.template load<0>(c, kLaneBytes);
      tiles_.template load<1>(c + kTileUnits, kLaneBytes);
      tiles_.template load<2>(below, kLaneBytes);
      tiles_.template load<3>(below + kTileUnits, kLaneBytes);
    } else {
      tiles_.template zero<0>();
      tiles_.template zero<1>();
      tiles_.template zero<2>();
      tiles_.template zero<3>();
    }
    for (int64_t s = 0; s < steps; s += kDepth, tile += kDepth * kRows, panel += kDepth * kLanes) {
      tiles_.template load<4>(tile, 64);
      tiles_.template load<5>(tile + kTileRows * kTileUnits, 64);
      tiles_.template load<6>(panel, kLaneBytes);
      tiles_.template load<7>(panel + kTileUnits, kLaneBytes);
      tiles_.template dot<0, 4, 6>();
      tiles_.template dot<1, 4, 7>();
      tiles_.template dot<2, 5, 6>();
      tiles_.template dot<3, 5, 7>();
    }
    tiles_.template store<0>(c, kLaneBytes);
    tiles_.template store<1>(c + kTileUnits, kLaneBytes);
    tiles_.template store<2>(below, kLaneBytes);
    tiles_.template store<3>(below + kTileUnits, kLaneBytes);
  }

 private:
  Tiles tiles_;
};

}  // namespace SYNPO_ISA
}  // namespace synpo::head
