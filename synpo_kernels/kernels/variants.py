"""Every kernel variant that a run can launch, with the configuration it is launched with, as data for `aot`.

Triton compiles a kernel anew for each set of constants, dtypes and alignments. The cases here are bf16 in every variant
that the backends launch, and the other formats in their lightest and heaviest. Imports triton, and needs no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from . import contrast_sample, exact_rows, exp_tile, pair_loss, product, rows
from .configs import TileConfig, exact_config, product_config, tile_config

FORMATS = (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32"))
# triton's types of arguments by name; pointers not listed here point to the input's own format
TYPES = {
    **dict.fromkeys(("label_ptr", "near_ptr", "order_ptr", "empty_ptr"), "*i64"),
    **dict.fromkeys(("anchor_ptr", "at_target_ptr", "sum_ptr", "target_ptr", "slope_ptr", "logp_ptr"), "*fp32"),
    **dict.fromkeys(("total_ptr", "g_ptr", "field_ptr", "loss_ptr"), "*fp32"),
    **dict.fromkeys(("flag_ptr", "seen_ptr"), "*i8"),
    "nonfinite_ptr": "*i1",
    "scratch_ptr": "*fp32",
    **dict.fromkeys(("grow", "log_plausibility", "penalty", "inverse_penalty"), "fp32"),
    **{f"{name}_{part}": "fp32" for name in ("scale", "top_p", "min_p") for part in range(3)},
    **dict.fromkeys(("uniform_ptr", "normalizer_ptr"), "*fp64"),
    "token_ptr": "*i64",
    **dict.fromkeys(("count_ptr", "turn_ptr", "bound_ptr"), "*i32"),
    "sums_ptr": "*fp64",
    **dict.fromkeys(("logit_scale", "softcap", "alpha", "beta"), "fp32"),
}
EPILOGUE = 256  # bytes a thread: a few numbers put by once a tile, at 690 to 740 TFLOP/s on an H200 all the same
SIZES = ("M", "D", "K", "V")  # multiples of 16 on real shapes, which triton notes at launch


@dataclass(frozen=True)
class Case:
    """One kernel specialised for one chip."""

    name: str
    kernel: Any  # a triton.jit function
    arch: int  # 80, 90, 100
    dtype: str  # triton's name of the input format
    constants: dict[str, Any]
    options: dict[str, Any]  # of the launch: num_warps, num_stages, ...
    types: dict[str, str] = field(default_factory=dict)  # where not those of `TYPES`
    spills: int = 0  # bytes that it may spill, stores and loads

    @property
    def tile(self) -> str:
        """What a program takes at a time, from its constants."""
        return "x".join(str(size) for name, size in self.constants.items() if name.startswith("BLOCK")) or "-"

    def signature(self) -> dict[str, str]:
        """Type of every argument, constants included."""
        return {name: "constexpr" if name in self.constants else self._type(name) for name in self.kernel.arg_names}

    def aligned(self) -> list[str]:
        """Arguments that triton finds divisible by 16 at launch."""
        names = [name for name, type_ in self.signature().items() if type_ != "constexpr"]
        return [name for name in names if name.endswith("_ptr") or name.startswith("stride") or name in SIZES]

    def _type(self, name: str) -> str:
        default = f"*{self.dtype}" if name.endswith("_ptr") else "i32"
        return self.types.get(name, TYPES.get(name, default))


def cases(archs: list[int], hidden: int) -> Iterator[Case]:
    """All cases for chips `archs` (80, 90, 100) and the hidden size D that the kernels are specialised for."""
    for arch in archs:
        for dtype, precision in FORMATS:
            yield from _exponentials(arch, dtype, precision, hidden)
            yield from _exact(arch, dtype, precision, hidden)
            yield from _products(arch, dtype, precision)
            if precision == "ieee":
                yield from _rows(arch, dtype, hidden)
        yield Case("partition", rows.partition_kernel, arch, "fp32", {"BLOCK": rows.LABELS}, rows.OPTIONS)
        yield from _pairs(arch)
        yield from _contrast(arch)


def _exponentials(arch: int, dtype: str, precision: str, hidden: int) -> Iterator[Case]:
    plain = {
        "D": hidden,
        "HAS_BIAS": False,
        "HAS_SOFTCAP": False,
        "HAS_TARGET": False,
        "HAS_COUNT": False,
        "WRITE": True,
    }
    full = {**plain, "HAS_BIAS": True, "HAS_SOFTCAP": True, "HAS_TARGET": True, "HAS_COUNT": True}
    wanted = {
        "exp": plain,
        "exp+target counted": {**plain, "HAS_TARGET": True, "HAS_COUNT": True},
        "exp+target+softcap+bias counted": full,
        "exp+softcap": {**plain, "HAS_SOFTCAP": True},
        "exp sums only": {**plain, "WRITE": False},
        "exp ragged D": {**plain, "D": hidden + 8},
    }
    for name, constants in wanted.items():
        if dtype != "bf16" and name not in ("exp", "exp+target+softcap+bias counted"):
            continue
        for described in (False, True):
            size = 4 if dtype == "fp32" else 2
            config = tile_config(arch // 10, size, softcap="softcap" in name, describable=described)
            if described != config.descriptors:
                continue
            n, v, d = config.block_n, config.block_v, config.block_d
            tile = {
                **constants,
                "GROUP_N": config.group_n,
                "PRECISION": precision,
                **_blocks("NVD", config),
                **_reading(config),
            }
            boxes = {"x_ptr": (n, d), "w_ptr": (v, d), "out_ptr": (n, v)} if described else {}
            label = f"{name}{' described' if described else ''} {_label(dtype, precision)}"
            types, spills = _described(dtype, boxes), EPILOGUE if arch == 90 else 0
            yield Case(label, exp_tile.exp_tile_kernel, arch, dtype, tile, config.options(), types, spills)


def _exact(arch: int, dtype: str, precision: str, hidden: int) -> Iterator[Case]:
    config, label = exact_config(arch // 10), _label(dtype, precision)
    constants = {"D": hidden, "HAS_BIAS": True, "HAS_SOFTCAP": True, "PRECISION": precision}
    constants |= _blocks("NVD", config)
    for name, write in (("exact", True), ("exact sums only", False)):
        if write or dtype == "bf16":
            given = {**constants, "WRITE": write}
            yield Case(f"{name} {label}", exact_rows.exact_rows_kernel, arch, dtype, given, config.options())


def _products(arch: int, dtype: str, precision: str) -> Iterator[Case]:
    for described, m in ((False, 8192), (True, 8192), (True, 256)):
        size = 4 if dtype == "fp32" else 2
        config = product_config(arch // 10, size, m, 3584, 132, describable=described)
        if described != config.descriptors:
            continue
        n, v, d = config.block_n, config.block_v, config.block_d
        shared = {
            "GROUP_M": config.group_n,
            "PRECISION": precision,
            "stride_bd": 1,
            "SHARE": config.share,
            **_blocks("MDK", config),
            **_reading(config),
        }
        for over_rows in (False, True):
            form = {"SUM_COUNTED": over_rows, "stride_am" if over_rows else "stride_ak": 1}
            boxes = {"a_ptr": (d, n) if over_rows else (n, d), "b_ptr": (d, v)} if described else {}
            name = f"product{' over rows' if over_rows else ''}{' described' if described else ''}"
            name += f"{' small' if m == 256 else ''} {_label(dtype, precision)}"
            given, types = (shared | form, config.options()), _described(dtype, boxes)
            yield Case(name, product.counted_product_kernel, arch, dtype, *given, types)


def _rows(arch: int, dtype: str, hidden: int) -> Iterator[Case]:
    blocks = {"D": hidden, "BLOCK_N": rows.BLOCK_N, "BLOCK_D": rows.BLOCK_D, "HAS_SOFTCAP": True, "HAS_ORDER": True}
    begin = {
        **blocks,
        "BLOCK_D": rows.begin_block(4 if dtype == "fp32" else 2),
        "HAS_BIAS": True,
        "stride_xd": 1,
        "stride_wd": 1,
    }
    yield Case(f"begin rows {dtype}", rows.begin_rows_kernel, arch, dtype, begin, rows.OPTIONS)
    finish = {**blocks, "BLOCK_T": rows.BLOCK_T, "HAS_DIVISOR": dtype == "fp16", "WRITE": True, "stride_wd": 1}
    types = {"sums_ptr": "*fp32", "divisor": "fp32", "overflow": "fp32", "pull_ptr": "*fp32"}
    yield Case(f"finish rows {dtype}", rows.finish_rows_kernel, arch, dtype, finish, rows.OPTIONS, types)


def _reading(config: TileConfig) -> dict[str, Any]:
    return {"DESCRIPTORS": config.descriptors, "FLATTEN": config.flatten}


def _described(dtype: str, boxes: dict[str, tuple[int, int]]) -> dict[str, str]:
    """Types of arguments that are tensor descriptors of these blocks."""
    return {name: f"tensordesc<{dtype}[{rows},{columns}]>" for name, (rows, columns) in boxes.items()}


def _pairs(arch: int) -> Iterator[Case]:
    for layout, bounds in (("padded", False), ("packed", True)):
        constants: dict[str, Any] = {"HAS_LABELS": True, "HAS_BOUNDS": bounds, "BLOCK_T": pair_loss.BLOCK_T}
        sums, loss = pair_loss.sequence_sums_kernel, pair_loss.pair_loss_kernel
        yield Case(f"sequence sums {layout}", sums, arch, "fp32", constants, pair_loss.OPTIONS)
        constants = {**constants, "MEAN": True, "BLOCK_B": pair_loss.BLOCK_B}
        yield Case(f"pair loss {layout}", loss, arch, "fp32", constants, pair_loss.OPTIONS)


def _contrast(arch: int) -> Iterator[Case]:
    """A vocabulary of 152,064, the largest of the usual ones: top-k 32 alone, and all there is with the most candidates."""
    options, tiles, vocab = contrast_sample.OPTIONS, 64, 152_064
    peaks: dict[str, Any] = {"TILES": tiles, "BLOCK": contrast_sample.BLOCK}
    yield Case("expert peaks bf16", contrast_sample.expert_peaks_kernel, arch, "bf16", peaks, options)
    for width, dtype, full in ((32, "bf16", False), (contrast_sample.MOST, "fp32", True)):
        has = {"HAS_AMATEUR": True, "HAS_CUTOFF": full, "HAS_SEEN": full, "GROUP": contrast_sample.GROUP}
        name = f"top-{width}{' cut-off' if full else ''} {dtype}"
        kernel = contrast_sample.group_bests_kernel
        yield Case(f"group bests {name}", kernel, arch, dtype, {**peaks, **has}, options)
        large = contrast_sample.large_groups(vocab)
        draw = {"TILES": tiles, "LARGE": large, "K": width, "GREEDY": False, **has}
        yield Case(f"draw {name}", contrast_sample.draw_kernel, arch, dtype, draw, options)


def _blocks(sizes: str, config: TileConfig) -> dict[str, Any]:
    """A tile's rows, columns and inner size under the names of a kernel; strides of 1 are constants at launch too."""
    tile = (config.block_n, config.block_v, config.block_d)
    blocks: dict[str, Any] = {f"BLOCK_{size}": block for size, block in zip(sizes, tile)}
    return blocks | ({"stride_xd": 1, "stride_wd": 1} if sizes == "NVD" else {})


def _label(dtype: str, precision: str) -> str:
    return "tf32" if precision == "tf32" else dtype
