"""Launch parameters as data, apart from the kernels; chosen by chip and dtype, no autotuning at run time.

`python -m synpo_kernels.aot` compiles every entry for its chip and reports registers, spills and shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class TileConfig:
    """A BLOCK_N × BLOCK_V tile of the logits, products taken BLOCK_D of the hidden size at a time."""

    block_n: int
    block_v: int
    block_d: int
    group_n: int  # row tiles that share a chunk of W in L2 before the next columns are taken
    num_warps: int
    num_stages: int
    descriptors: bool = False  # matrices are read and written through tensor descriptors
    flatten: bool = False  # a persistent grid, its loops over tiles and over D made one
    share: bool = False  # multiprocessors that would idle in the last wave of a product take parts of its tiles

    def options(self) -> dict[str, Any]:
        """Triton's launch options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class ChipConfig:
    """The tiles of one chip generation."""

    half: TileConfig  # 16-bit inputs
    half_small: TileConfig  # where more is alive an element (a soft cap's slope, a sum to add to): larger tiles spill
    full: TileConfig  # float32 inputs
    full_small: TileConfig  # float32 inputs where more is alive
    full_product: TileConfig  # and of their counted products
    described: TileConfig | None = None  # in place of half and half_small where all matrices allow descriptors
    described_small: TileConfig | None = None


INTERPRETER = TileConfig(16, 32, 16, 2, 1, 1)

# by major compute capability
CHIPS: dict[int, ChipConfig] = {
    8: ChipConfig(
        half=TileConfig(128, 128, 32, 8, 4, 4),
        half_small=TileConfig(128, 128, 32, 8, 8, 4),
        full=TileConfig(64, 64, 32, 8, 4, 3),
        full_small=TileConfig(64, 64, 32, 8, 8, 3),
        full_product=TileConfig(64, 64, 32, 8, 8, 3),
    ),
    9: ChipConfig(
        half=TileConfig(128, 256, 64, 8, 8, 3),
        half_small=TileConfig(128, 128, 64, 8, 8, 4),
        full=TileConfig(64, 64, 32, 8, 4, 3),
        full_small=TileConfig(64, 128, 32, 8, 8, 3),
        full_product=TileConfig(64, 64, 32, 8, 4, 3),
        described=TileConfig(128, 256, 64, 8, 8, 3, descriptors=True, flatten=True),
        described_small=TileConfig(128, 128, 64, 8, 8, 4, descriptors=True, flatten=True),
    ),
    10: ChipConfig(
        half=TileConfig(128, 128, 64, 8, 8, 4),
        half_small=TileConfig(128, 128, 64, 8, 8, 4),
        full=TileConfig(64, 64, 32, 8, 4, 3),
        full_small=TileConfig(64, 128, 32, 8, 8, 3),
        full_product=TileConfig(64, 64, 32, 8, 4, 3),
        described=TileConfig(128, 128, 64, 8, 8, 4, descriptors=True, flatten=True),
        described_small=TileConfig(128, 128, 64, 8, 8, 4, descriptors=True, flatten=True),
    ),
}
CHIPS[12] = CHIPS[8]  # consumer Blackwell has the tensor instructions and the little shared memory (99 KiB) of Ampere

# The exact path runs on rows that should not occur: small tiles that compile everywhere.
EXACT = TileConfig(16, 64, 64, 1, 4, 2)


def tile_config(major: int | None, itemsize: int, *, softcap: bool, describable: bool = False) -> TileConfig:
    """Parameters for a chip (major compute capability, None: the interpreter) and the bytes of an input number.

    describable: whether x, W and the slice allow tensor descriptors (`tiles.describable`). A chip without an entry takes that of
    the newest older one, compute capability 8 at least.
    """
    if major is None:
        return INTERPRETER
    chip = _chip(major)
    if itemsize == 4:
        return chip.full_small if softcap else chip.full
    if describable and chip.described and chip.described_small:
        return chip.described_small if softcap else chip.described
    return chip.half_small if softcap else chip.half


@lru_cache(1024)
def product_config(
    major: int | None, itemsize: int, m: int, d: int, processors: int, *, describable: bool = False
) -> TileConfig:
    """Parameters of a counted product (m, d), as `tile_config`: tiles are shared, or smaller where more than half would idle."""
    if major is None:
        return INTERPRETER
    chip = _chip(major)
    if itemsize == 4:
        config = chip.full_product
    elif describable and chip.described and chip.described_small:
        large = -(-m // chip.described.block_n) * -(-d // chip.described.block_v)
        config = replace(chip.described, share=True) if large >= processors // 2 else chip.described_small
    else:
        config = chip.half_small
    narrow = max(32, 1 << (d - 1).bit_length())  # a result of one column, of a bias say
    return config if d >= config.block_v else replace(config, block_v=min(config.block_v, narrow))


def _chip(major: int) -> ChipConfig:
    return CHIPS[max((entry for entry in CHIPS if entry <= major), default=min(CHIPS))]


def exact_config(major: int | None) -> TileConfig:
    """Parameters of the exact path, as `tile_config`."""
    return INTERPRETER if major is None else EXACT
