"""Every kernel variant that a run can launch, with the configuration it is launched with, as data for `aot`.

Triton compiles a kernel anew for each set of constants, dtypes and alignments. The cases here are bf16 in every variant
that the backends launch, and the other formats in their lightest and heaviest. Imports triton, and needs no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from . import contrast_sample, counted_product, exact_rows, exp_tile, pair_loss
from .configs import CHIPS, TileConfig, exact_config, product_config, tile_config

FORMATS = (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32"))
# triton's types of arguments by name; pointers not listed here point to the input's own format
TYPES = {
    **dict.fromkeys(("label_ptr", "empty_ptr"), "*i64"),
    **dict.fromkeys(("anchor_ptr", "at_target_ptr", "sum_ptr", "target_ptr", "slope_ptr", "logp_ptr"), "*fp32"),
    **dict.fromkeys(("total_ptr", "g_ptr", "field_ptr", "loss_ptr"), "*fp32"),
    **dict.fromkeys(("flag_ptr", "nonfinite_ptr", "nan_ptr", "seen_ptr"), "*i8"),
    **dict.fromkeys(("peak_ptr", "best_ptr"), "*fp32"),
    **dict.fromkeys(("grow", "log_plausibility", "penalty", "inverse_penalty"), "fp32"),
    **{f"{name}_{part}": "fp32" for name in ("scale", "top_p", "min_p") for part in range(3)},
    "uniform_ptr": "*fp64",
    "token_ptr": "*i64",
    **dict.fromkeys(("count_ptr", "bound_ptr"), "*i32"),
    "sums_ptr": "*fp64",
    **dict.fromkeys(("logit_scale", "softcap", "alpha", "beta"), "fp32"),
}
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
    tile: str = "-"
    types: dict[str, str] = field(default_factory=dict)  # where not those of `TYPES`

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
        yield from _pair_loss(arch)
        yield from _contrast(arch)


def _exponentials(arch: int, dtype: str, precision: str, hidden: int) -> Iterator[Case]:
    plain = {"D": hidden, "HAS_BIAS": False, "HAS_SOFTCAP": False, "WRITE": True, "PRECISION": precision}
    full = {**plain, "HAS_BIAS": True, "HAS_SOFTCAP": True}
    wanted = {
        "exp": {**plain, "HAS_TARGET": False},
        "exp+target": {**plain, "HAS_TARGET": True},
        "exp+target+softcap+bias": {**full, "HAS_TARGET": True},
        "exp+softcap": {**full, "HAS_BIAS": False, "HAS_TARGET": False},
        "exp sums only": {**plain, "HAS_TARGET": False, "WRITE": False},
        "exp ragged D": {**plain, "HAS_TARGET": False, "D": hidden + 8},
        "exp counted": {**plain, "HAS_TARGET": False, "HAS_COUNT": True},
        "exp+target counted": {**plain, "HAS_TARGET": True, "HAS_COUNT": True},
        "exp+target+softcap+bias counted": {**full, "HAS_TARGET": True, "HAS_COUNT": True},
    }
    heaviest = CHIPS[max(major for major in CHIPS if major <= arch // 10)]
    for name, constants in wanted.items():
        if dtype != "bf16" and name not in ("exp", "exp+target+softcap+bias"):
            continue
        softcap, counted = "softcap" in name, "counted" in name
        for described in (False, True) if heaviest.descriptors and dtype != "fp32" and not softcap else (False,):
            size = 4 if dtype == "fp32" else 2
            config = tile_config(arch // 10, size, softcap=softcap, counted=counted, describable=described)
            tile = {"HAS_COUNT": False, **constants, "GROUP_N": config.group_n, **_blocks("NVD", config)}
            types = {}
            if described:
                types = {
                    "x_ptr": f"tensordesc<{dtype}[{config.block_n},{config.block_d}]>",
                    "w_ptr": f"tensordesc<{dtype}[{config.block_v},{config.block_d}]>",
                }
            label = f"{name}{' described' if described else ''} {_label(dtype, precision)}"
            tile["DESCRIPTORS"] = described
            yield _tiled(label, exp_tile.exp_tile_kernel, arch, dtype, tile, config, types)


def _exact(arch: int, dtype: str, precision: str, hidden: int) -> Iterator[Case]:
    config, label = exact_config(arch // 10), _label(dtype, precision)
    constants = {"D": hidden, "HAS_BIAS": True, "HAS_SOFTCAP": True, "WRITE": True, "PRECISION": precision}
    constants |= _blocks("NVD", config)
    yield _tiled(f"exact {label}", exact_rows.exact_rows_kernel, arch, dtype, constants, config)
    if dtype == "bf16":
        constants = {**constants, "WRITE": False}
        yield _tiled(f"exact sums only {label}", exact_rows.exact_rows_kernel, arch, dtype, constants, config)


def _products(arch: int, dtype: str, precision: str) -> Iterator[Case]:
    config = product_config(arch // 10, 4 if dtype == "fp32" else 2)
    constants = {"GROUP_M": config.group_n, "PRECISION": precision, "stride_bd": 1, **_blocks("MDK", config)}
    for name, form in (
        ("product", {"SUM_COUNTED": False, "stride_ak": 1}),
        ("product over rows", {"SUM_COUNTED": True, "stride_am": 1}),
    ):
        label = f"{name} {_label(dtype, precision)}"
        yield _tiled(label, counted_product.counted_product_kernel, arch, dtype, {**constants, **form}, config)


def _pair_loss(arch: int) -> Iterator[Case]:
    options = {"num_warps": pair_loss.WARPS, "num_stages": pair_loss.STAGES, "enable_fp_fusion": True}
    for layout, bounds in (("padded", False), ("packed", True)):
        constants: dict[str, Any] = {"HAS_LABELS": True, "HAS_BOUNDS": bounds, "BLOCK_T": pair_loss.BLOCK_T}
        case = Case(
            f"sequence sums {layout}",
            pair_loss.sequence_sums_kernel,
            arch,
            "fp32",
            constants,
            options,
            str(pair_loss.BLOCK_T),
        )
        yield case
        constants = {**constants, "MEAN": True, "BLOCK_B": pair_loss.BLOCK_B}
        yield Case(f"pair loss {layout}", pair_loss.pair_loss_kernel, arch, "fp32", constants, options, case.tile)


def _contrast(arch: int) -> Iterator[Case]:
    """A vocabulary of 152,064, the largest of the usual ones: top-k 32 alone, and all there is with the most candidates."""
    block, options = contrast_sample.BLOCK, contrast_sample.OPTIONS
    tiles, vocab = 64, 152_064
    peaks: dict[str, Any] = {"TILES": tiles, "BLOCK": block}
    yield Case("expert peaks bf16", contrast_sample.expert_peaks_kernel, arch, "bf16", peaks, options, str(block))
    for width, dtype, full in ((32, "bf16", False), (contrast_sample.MOST, "fp32", True)):
        has = {"HAS_AMATEUR": True, "HAS_CUTOFF": full, "HAS_SEEN": full, "GROUP": contrast_sample.GROUP}
        name = f"top-{width}{' cut-off' if full else ''} {dtype}"
        kernel = contrast_sample.group_bests_kernel
        yield Case(f"group bests {name}", kernel, arch, dtype, {**peaks, **has}, options, str(block))
        large = contrast_sample.large_groups(vocab)
        draw = {"TILES": tiles, "LARGE": large, "K": width, "GREEDY": False, **has}
        yield Case(f"draw {name}", contrast_sample.draw_kernel, arch, dtype, draw, options, f"{large}+{width}x8")


def _tiled(
    name: str,
    kernel: Any,
    arch: int,
    dtype: str,
    constants: dict[str, Any],
    config: TileConfig,
    types: dict[str, str] | None = None,
) -> Case:
    tile = f"{config.block_n}x{config.block_v}x{config.block_d}"
    return Case(name, kernel, arch, dtype, constants, config.options(), tile, types or {})


def _blocks(sizes: str, config: TileConfig) -> dict[str, Any]:
    """A tile's rows, columns and inner size under the names of a kernel; strides of 1 are constants at launch too."""
    tile = (config.block_n, config.block_v, config.block_d)
    blocks: dict[str, Any] = {f"BLOCK_{size}": block for size, block in zip(sizes, tile)}
    return blocks | ({"stride_xd": 1, "stride_wd": 1} if sizes == "NVD" else {})


def _label(dtype: str, precision: str) -> str:
    return "tf32" if precision == "tf32" else dtype
