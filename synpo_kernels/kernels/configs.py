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
    half_softcap: TileConfig  # a soft cap keeps logit and slope of every element alive: smaller tiles, or they spill
    full: TileConfig  # float32 inputs


INTERPRETER = TileConfig(16, 32, 16, 2, 1, 1)

# by major compute capability
CHIPS: dict[int, ChipConfig] = {
    8: ChipConfig(
        half=TileConfig(128, 128, 32, 8, 4, 4),
        half_softcap=TileConfig(128, 128, 32, 8, 8, 4),
        full=TileConfig(64, 64, 32, 8, 4, 3),
    ),
    9: ChipConfig(
        half=TileConfig(128, 256, 64, 8, 8, 3),
        half_softcap=TileConfig(128, 128, 64, 8, 8, 4),
        full=TileConfig(64, 64, 32, 8, 4, 3),
    ),
    10: ChipConfig(
        half=TileConfig(128, 256, 64, 8, 8, 3),
        half_softcap=TileConfig(128, 128, 64, 8, 8, 4),
        full=TileConfig(64, 64, 32, 8, 4, 3),
    ),
}

# The exact path runs on rows that should not occur: small tiles that compile everywhere.
EXACT = TileConfig(16, 64, 64, 1, 4, 2)


def tile_config(major: int | None, itemsize: int, softcap: bool) -> TileConfig:
    """Parameters for a chip (major compute capability, None: the interpreter) and the bytes of an input number.

    A chip without an entry takes that of the newest older one, compute capability 8 at least.
    """
    if major is None:
        return INTERPRETER
    chip = CHIPS[max((entry for entry in CHIPS if entry <= major), default=min(CHIPS))]
    if itemsize == 4:
        return chip.full
    return chip.half_softcap if softcap else chip.half


def exact_config(major: int | None) -> TileConfig:
    """Parameters of the exact path, as `tile_config`."""
    return INTERPRETER if major is None else EXACT
