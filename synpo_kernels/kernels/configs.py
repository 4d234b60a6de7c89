"""Launch parameters as data, apart from the kernels; chosen by chip and dtype, no autotuning at run time.

`python -m synpo_kernels.aot` compiles every entry for its chip and reports registers, spills and shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TileConfig:
    """A BLOCK_N × BLOCK_V tile of the logits, products taken BLOCK_D of the hidden size at a time."""

    block_n: int
    block_v: int
    block_d: int
    group_n: int  # row tiles that share a chunk of W in L2 before the next columns are taken
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ChipConfig:
    """The tiles of one chip generation."""

    half: TileConfig  # 16-bit inputs
    half_counted: TileConfig  # 16-bit inputs with a count of rows
    half_small: TileConfig  # where more is alive an element (a soft cap's slope, a sum to add to): larger tiles spill
    full: TileConfig  # float32 inputs
    full_product: TileConfig  # float32 inputs of a counted product


INTERPRETER = TileConfig(16, 32, 16, 2, 1, 1)

# by major compute capability
CHIPS: dict[int, ChipConfig] = {
    8: ChipConfig(
        half=TileConfig(128, 128, 32, 8, 4, 4),
        half_counted=TileConfig(128, 128, 32, 8, 4, 4),
        half_small=TileConfig(128, 128, 32, 8, 8, 4),
        full=TileConfig(64, 64, 32, 8, 4, 3),
        full_product=TileConfig(64, 64, 32, 8, 8, 3),
    ),
    9: ChipConfig(
        half=TileConfig(128, 256, 64, 8, 8, 3),
        half_counted=TileConfig(128, 256, 64, 8, 8, 3),
        half_small=TileConfig(128, 128, 64, 8, 8, 4),
        full=TileConfig(64, 64, 32, 8, 4, 3),
        full_product=TileConfig(64, 64, 32, 8, 4, 3),
    ),
    10: ChipConfig(
        half=TileConfig(128, 256, 64, 8, 8, 3),
        half_counted=TileConfig(128, 128, 64, 8, 8, 4),  # 128 columns more spill here
        half_small=TileConfig(128, 128, 64, 8, 8, 4),
        full=TileConfig(64, 64, 32, 8, 4, 3),
        full_product=TileConfig(64, 64, 32, 8, 4, 3),
    ),
}

# The exact path runs on rows that should not occur: small tiles that compile everywhere.
EXACT = TileConfig(16, 64, 64, 1, 4, 2)


def tile_config(major: int | None, itemsize: int, *, softcap: bool, counted: bool) -> TileConfig:
    """Parameters for a chip (major compute capability, None: the interpreter) and the bytes of an input number.

    A chip without an entry takes that of the newest older one, compute capability 8 at least.
    """
    if major is None:
        return INTERPRETER
    chip = _chip(major)
    if itemsize == 4:
        return chip.full
    if softcap:
        return chip.half_small
    return chip.half_counted if counted else chip.half


def product_config(major: int | None, itemsize: int) -> TileConfig:
    """Parameters of a counted product, as `tile_config`."""
    if major is None:
        return INTERPRETER
    return _chip(major).full_product if itemsize == 4 else _chip(major).half_small


def _chip(major: int) -> ChipConfig:
    return CHIPS[max((entry for entry in CHIPS if entry <= major), default=min(CHIPS))]


def exact_config(major: int | None) -> TileConfig:
    """Parameters of the exact path, as `tile_config`."""
    return INTERPRETER if major is None else EXACT
