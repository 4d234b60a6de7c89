"""Contrastive sampling with top-k on a GPU: each input is read once, O(k) groups of it again, nothing of size V is written.

    expert_peaks   (with a cut-off) largest expert logit of every group of tokens; reads the expert
    group_bests    largest mixed logit of every group; reads expert and amateur, with a cut-off only near plausible tokens
    draw           one program a row: the k best groups hold the k best tokens, so only these groups are mixed again; then
                   temperature, top-p, min-p and the draw among k candidates, in float64

Why k groups suffice: order tokens and groups by value, descending, ties by index. Were a token of the first k in a group
beyond the first k, each of those k groups would hold a token that precedes it. `draw` applies this three times, to groups of
512, 64 and 8 tokens, so that it never sorts more than 8 k numbers (or the groups of 512): a long sort is slow to compile.

Bytes a row: 2·V inputs (V plus the neighbourhood of the plausible ones with a cut-off, where the second reading of the
expert comes from the L2 cache), V/64 floats written and read, 64 k inputs read again. `contrast._sample_torch` is
the definition; logits are mixed in fp32 without fused multiply-add, as there.

Shape legend: B rows, V tokens, G = cdiv(V, GROUP) groups, K candidates.
"""

# A kernel takes pointers and scalars typed at launch.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import math
from ctypes import c_float
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Bound

BLOCK = 4096  # tokens of a program that reads whole rows
GROUP = 64  # tokens of a group
FAN: tl.constexpr = tl.constexpr(8)  # groups of a larger one, parts of a group
MOST = 64  # candidates at most: they are sorted in the registers of one program
LEAST_TEMPERATURE = 1e-30  # its inverse goes to the kernel as fp32 parts
NOTHING: tl.constexpr = tl.constexpr(-0x7FFFFFFFFFFFFFFF)  # a key before that of any number
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}


@triton.jit
def mixed(
    expert_ptr,
    amateur_ptr,
    seen_ptr,
    token,
    inside,
    grow,
    alpha,
    cutoff,
    penalty,
    inverse_penalty,
    HAS_AMATEUR: tl.constexpr,
    HAS_CUTOFF: tl.constexpr,
    HAS_SEEN: tl.constexpr,
):
    """(x, broken): mixed and penalised logits of one row's tokens, -inf where not inside, NaN as -inf; where x was NaN.

    Pointers are to the row's first token; grow = 1 + alpha.
    """
    e = tl.load(expert_ptr + token, mask=inside, other=float("-inf")).to(tl.float32)
    x = e
    wanted = inside & (e != float("-inf"))
    if HAS_CUTOFF:
        wanted = wanted & (e >= cutoff) | (inside & (e != e))
    if HAS_AMATEUR:
        m = tl.load(amateur_ptr + token, mask=wanted, other=0.0).to(tl.float32)
        x = e * grow - m * alpha
    if HAS_SEEN:
        seen = tl.load(seen_ptr + token, mask=wanted, other=0) != 0
        x = tl.where(seen, tl.where(x > 0, x * inverse_penalty, x * penalty), x)
    broken = wanted & (x != x)
    x = tl.where(wanted & (x == x), x, float("-inf"))
    return tl.where(x == 0, 0.0, x), broken  # -0 and 0 are a tie


@triton.jit
def rank(x, index, SIZE):
    """int64 keys in the order of x, ties by lower index in [0, SIZE)."""
    bits = x.to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (ordered << 32) + (SIZE - 1 - index).to(tl.int64)


@triton.jit
def index_of(key, SIZE):
    """Index of a key, SIZE for the key of nothing."""
    return tl.where(key == NOTHING, SIZE, SIZE - 1 - (key & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def best_indices(x, index, inside, SIZE, LENGTH: tl.constexpr, K: tl.constexpr):
    """Indices of the K largest of LENGTH values (all if they are fewer), in any order; SIZE stands for nothing."""
    keys = tl.where(inside, rank(x, index, SIZE), NOTHING)
    return index_of(tl.topk(tl.reshape(keys, (LENGTH,)), K if K < LENGTH else LENGTH), SIZE)


@triton.jit
def value_of(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def double(first, second, third):
    """float64 from its parts: scalars reach a kernel as fp32."""
    return tl.full((), first, tl.float64) + tl.full((), second, tl.float64) + tl.full((), third, tl.float64)


@triton.jit
def scratch_of_row(scratch_ptr, row, groups, TILES: tl.constexpr):
    """Where a row's scratch begins: of each tile the expert's peak, then whether it holds a NaN, then the best of each group."""
    return scratch_ptr + row * (2 * TILES + groups)


@triton.jit
def expert_peaks_kernel(expert_ptr, scratch_ptr, V, groups, stride_eb, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (B, T), T tiles of BLOCK tokens. scratch (B, 2 TILES + G) fp32: peak and NaN of each tile are written."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    peak_ptr = scratch_of_row(scratch_ptr, row, groups, TILES)
    token = tile * BLOCK + tl.arange(0, BLOCK)
    e = tl.load(expert_ptr + row * stride_eb + token, mask=token < V, other=float("-inf")).to(tl.float32)
    tl.store(peak_ptr + tile, tl.max(tl.where(e == e, e, float("-inf")), 0))
    tl.store(peak_ptr + TILES + tile, tl.max((e != e).to(tl.int32), 0).to(tl.float32))


@triton.jit
def row_cutoff(peak_ptr, tiles, log_plausibility, TILES: tl.constexpr):
    tile = tl.arange(0, TILES)
    peaks = tl.load(peak_ptr + tile, mask=tile < tiles, other=float("-inf"))
    return tl.max(peaks, 0) + log_plausibility


@triton.jit
def group_bests_kernel(
    expert_ptr,
    amateur_ptr,
    seen_ptr,
    scratch_ptr,
    V,
    groups,
    tiles,
    stride_eb,
    stride_mb,
    stride_sb,
    grow,
    alpha,
    log_plausibility,
    penalty,
    inverse_penalty,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_AMATEUR: tl.constexpr,
    HAS_CUTOFF: tl.constexpr,
    HAS_SEEN: tl.constexpr,
):
    """Grid: (B, T); a program owns BLOCK / GROUP groups. scratch: the best of each is written, and whether a NaN was mixed.

    With HAS_CUTOFF `expert_peaks_kernel` was there before, and a tile without a plausible token is not read again.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    group = tile * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    peak_ptr = scratch_of_row(scratch_ptr, row, groups, TILES)
    nan_ptr, best_ptrs = peak_ptr + TILES, peak_ptr + 2 * TILES + group
    cutoff = 0.0
    if HAS_CUTOFF:
        cutoff = row_cutoff(peak_ptr, tiles, log_plausibility, TILES)
        if tl.load(peak_ptr + tile) < cutoff:
            tl.store(best_ptrs, tl.full((BLOCK // GROUP,), float("-inf"), tl.float32), mask=group < groups)
            return
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x, broken = mixed(
        expert_ptr + row * stride_eb,
        amateur_ptr + row * stride_mb,
        seen_ptr + row * stride_sb,
        token,
        token < V,
        grow,
        alpha,
        cutoff,
        penalty,
        inverse_penalty,
        HAS_AMATEUR,
        HAS_CUTOFF,
        HAS_SEEN,
    )
    tl.store(best_ptrs, tl.max(x, 1), mask=group < groups)
    found = tl.max(tl.max(broken.to(tl.int32), 1), 0)
    if HAS_CUTOFF:
        found = tl.maximum(found, tl.load(nan_ptr + tile).to(tl.int32))
    tl.store(nan_ptr + tile, found.to(tl.float32))


@triton.jit
def draw_kernel(
    expert_ptr,
    amateur_ptr,
    seen_ptr,
    scratch_ptr,
    uniform_ptr,
    token_ptr,
    logp_ptr,
    V,
    groups,
    tiles,
    candidates,
    stride_eb,
    stride_mb,
    stride_sb,
    grow,
    alpha,
    log_plausibility,
    penalty,
    inverse_penalty,
    scale_0,
    scale_1,
    scale_2,
    top_p_0,
    top_p_1,
    top_p_2,
    min_p_0,
    min_p_1,
    min_p_2,
    TILES: tl.constexpr,
    LARGE: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    HAS_AMATEUR: tl.constexpr,
    HAS_CUTOFF: tl.constexpr,
    HAS_SEEN: tl.constexpr,
    GREEDY: tl.constexpr,
):
    """Grid: (B,); a program owns a row. Top-k leaves `candidates` tokens; K > 1 is the power of two from there, LARGE that from
    G / FAN.

    Pointers beside those of `group_bests_kernel`: uniform (B,) float64 (not read where GREEDY), token (B,) int64, logp (B,) fp32.
    """
    row = tl.program_id(0).to(tl.int64)
    peak_ptr = scratch_of_row(scratch_ptr, row, groups, TILES)
    nan_ptr, best_ptr = peak_ptr + TILES, peak_ptr + 2 * TILES
    WIDE: tl.constexpr = K if K < LARGE else LARGE
    MIDDLE: tl.constexpr = K if K < WIDE * FAN else WIDE * FAN
    PARTS: tl.constexpr = GROUP // FAN
    NARROW: tl.constexpr = K if K < MIDDLE * PARTS else MIDDLE * PARTS
    fan = tl.arange(0, FAN)
    # among larger groups of FAN groups
    large = tl.arange(0, LARGE)
    group = large[:, None] * FAN + fan[None, :]
    bests = tl.load(best_ptr + group, mask=group < groups, other=float("-inf"))
    chosen = best_indices(tl.max(bests, 1), large, large * FAN < groups, LARGE, LARGE, K)
    # among their groups
    group = chosen[:, None] * FAN + fan[None, :]
    bests = tl.load(best_ptr + group, mask=group < groups, other=float("-inf"))
    chosen = best_indices(bests, group, group < groups, groups, WIDE * FAN, K)

    cutoff = 0.0
    if HAS_CUTOFF:
        cutoff = row_cutoff(peak_ptr, tiles, log_plausibility, TILES)
    # among the parts of these
    part = tl.reshape(chosen[:, None] * PARTS + tl.arange(0, PARTS)[None, :], (MIDDLE * PARTS,))
    token = part[:, None] * (GROUP // PARTS) + tl.arange(0, GROUP // PARTS)[None, :]
    x, _ = mixed(
        expert_ptr + row * stride_eb,
        amateur_ptr + row * stride_mb,
        seen_ptr + row * stride_sb,
        token,
        token < V,
        grow,
        alpha,
        cutoff,
        penalty,
        inverse_penalty,
        HAS_AMATEUR,
        HAS_CUTOFF,
        HAS_SEEN,
    )
    parts = groups * PARTS
    chosen = best_indices(tl.max(x, 1), part, part < parts, parts, MIDDLE * PARTS, K)
    # among their tokens
    token = chosen[:, None] * (GROUP // PARTS) + tl.arange(0, GROUP // PARTS)[None, :]
    x, _ = mixed(
        expert_ptr + row * stride_eb,
        amateur_ptr + row * stride_mb,
        seen_ptr + row * stride_sb,
        token,
        token < V,
        grow,
        alpha,
        cutoff,
        penalty,
        inverse_penalty,
        HAS_AMATEUR,
        HAS_CUTOFF,
        HAS_SEEN,
    )
    keys = tl.where(token < V, rank(x, token, V), NOTHING)
    best = tl.topk(tl.reshape(keys, (NARROW * (GROUP // PARTS),)), K)

    position = tl.arange(0, K)
    left = (position < candidates) & (best != NOTHING)
    values = tl.where(left, value_of(best), float("-inf")).to(tl.float64)
    top = tl.max(values, 0)
    # a largest logit of +inf takes all
    log_weight = tl.where(values == top, 0.0, (values - top) * double(scale_0, scale_1, scale_2))
    weight = tl.where(values == float("-inf"), 0.0, tl.exp(log_weight))
    mass = tl.cumsum(weight, 0)
    enough = double(top_p_0, top_p_1, top_p_2) * tl.sum(tl.where(position == K - 1, mass, 0.0), 0)
    nucleus = tl.min(tl.where(mass >= enough, position, K), 0)
    weight = tl.where((position <= nucleus) & (weight >= double(min_p_0, min_p_1, min_p_2)), weight, 0.0)

    mass = tl.cumsum(weight, 0)
    total = tl.sum(tl.where(position == K - 1, mass, 0.0), 0)
    reach = total * 0.0
    if not GREEDY:
        u = tl.load(uniform_ptr + row)
        reach = tl.where(u > 0, u, 0.0) * total
    first = tl.min(tl.where(mass > reach, position, K), 0)
    last = tl.max(tl.where(weight > 0, position, 0), 0)  # rounding may leave u * total out of reach
    drawn = position == tl.where(first < K, first, last)
    logp = tl.sum(tl.where(drawn, log_weight, 0.0), 0) - tl.log(total)
    tile = tl.arange(0, TILES)
    broken = tl.max(tl.load(nan_ptr + tile, mask=tile < tiles, other=0).to(tl.int32), 0)
    empty = total == 0
    tl.store(token_ptr + row, tl.where(empty, 0, tl.sum(tl.where(drawn, index_of(best, V), 0), 0).to(tl.int64)))
    tl.store(logp_ptr + row, tl.where(empty | (broken > 0), float("nan"), logp).to(tl.float32))


def large_groups(vocab: int) -> int:
    """The power of two from the number of larger groups on."""
    return triton.next_power_of_2(triton.cdiv(vocab, GROUP * FAN.value))


class Launches(NamedTuple):
    """The kernels with everything but their pointers, for logits of one layout under one set of settings."""

    peaks: Bound | None
    bests: Bound
    draw: Bound
    tiles: int
    scratch: int  # fp32 numbers a row


def launch(
    expert: Tensor,
    amateur: Tensor | None,
    uniform: Tensor | None,
    alpha: float,
    plausibility: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seen: Tensor | None,
    repetition_penalty: float,
) -> tuple[Tensor, Tensor]:
    """(tokens, logps) as `contrast._sample_torch`; nothing is read back to the host.

    Takes a top_k (or, at 0, a V) of at most `MOST` and a temperature of 0, which needs no uniform, or at least
    `LEAST_TEMPERATURE`. seen: (B, V) int8, rows contiguous, 1 at tokens under the repetition penalty.
    """
    (rows, vocab), device = expert.shape, expert.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    logps = torch.empty(rows, dtype=torch.float32, device=device)
    if rows == 0:
        return tokens, logps
    layout = (device, expert.dtype, vocab, _layout(expert), _layout(amateur), _layout(seen), _aligned(uniform))
    settings = map(float, (alpha, plausibility, temperature, top_p, min_p, repetition_penalty))
    run = bound(*layout, int(top_k), *settings)
    scratch = torch.empty(rows, run.scratch, dtype=torch.float32, device=device)
    inputs = (expert, expert if amateur is None else amateur, scratch if seen is None else seen, scratch)
    if run.peaks is not None:
        run.peaks((rows, run.tiles), expert, scratch)
    run.bests((rows, run.tiles), *inputs)
    run.draw((rows,), *inputs, scratch if uniform is None else uniform, tokens, logps)
    return tokens, logps


def _aligned(tensor: Tensor | None) -> bool | None:
    """Whether a pointer is to 16 bytes, for which Triton compiles another kernel."""
    return None if tensor is None else tensor.data_ptr() % 16 == 0


def _layout(tensor: Tensor | None) -> tuple[tuple[int, ...], bool | None] | None:
    return None if tensor is None else (tensor.stride(), _aligned(tensor))


@lru_cache(256)
def bound(
    device: torch.device,
    dtype: torch.dtype,
    vocab: int,
    expert: tuple[tuple[int, ...], bool],
    amateur: tuple[tuple[int, ...], bool] | None,
    seen: tuple[tuple[int, ...], bool] | None,
    uniform: bool | None,
    top_k: int,
    alpha: float,
    plausibility: float,
    temperature: float,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
) -> Launches:
    """What does not change from token to token, found once. Of tensors: strides, and whether they begin at 16 bytes."""
    strides = tuple(0 if layout is None else layout[0][0] for layout in (expert, amateur, seen))
    assert all(layout is None or layout[0][1] == 1 or vocab == 1 for layout in (expert, amateur, seen))
    assert (uniform is not None) or temperature == 0
    candidates = min(top_k, vocab) if top_k else vocab
    groups, tiles = triton.cdiv(vocab, GROUP), triton.cdiv(vocab, BLOCK)
    padded = triton.next_power_of_2(tiles)
    sizes = {"V": vocab, "groups": groups, "TILES": padded}
    shared = {
        **sizes,
        "tiles": tiles,
        **dict(zip(("stride_eb", "stride_mb", "stride_sb"), strides)),
        "grow": 1 + alpha,
        "alpha": alpha,
        "log_plausibility": math.log(plausibility) if plausibility > 0 else 0.0,
        "penalty": repetition_penalty,
        "inverse_penalty": 1 / repetition_penalty,
        "GROUP": GROUP,
        "HAS_AMATEUR": amateur is not None,
        "HAS_CUTOFF": plausibility > 0,
        "HAS_SEEN": seen is not None,
    }
    drawing = {
        "candidates": candidates,
        **_parts("scale", 1.0 if temperature == 0 else 1 / temperature),
        **_parts("top_p", top_p),
        **_parts("min_p", min_p),
        "LARGE": large_groups(vocab),
        "K": max(2, triton.next_power_of_2(candidates)),  # tl.topk of triton 3.6 fails to take one of several
        "GREEDY": temperature == 0,
    }
    peaks = {**sizes, "stride_eb": strides[0], "BLOCK": BLOCK}
    return Launches(
        Bound(expert_peaks_kernel, peaks, OPTIONS) if plausibility > 0 else None,
        Bound(group_bests_kernel, shared | {"BLOCK": BLOCK}, OPTIONS),
        Bound(draw_kernel, shared | drawing, OPTIONS),
        tiles,
        2 * padded + groups,
    )


def _parts(name: str, number: float) -> dict[str, float]:
    """name_0, name_1 and name_2: three fp32 numbers whose sum in float64 is `number`."""
    parts = {}
    for place in range(3):
        parts[f"{name}_{place}"] = part = c_float(number).value
        number -= part
    return parts
