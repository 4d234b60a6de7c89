"""One vocabulary chunk of exponentials: a GEMM whose epilogue is exp(z - anchor), never writing logits.

    out[t, v] = slope · exp(cap(logit_scale · (x_t·W_v + b_v)) - anchor_t)      fp32 accumulators, rounded once
    sums[j, t] (+)= Σ over the columns of tile j of exp(z - anchor_t), the label's column left out

Anchored at the target logit this is P̂; anchored at the log-sum-exp, with p_y - 1 in the label's column, it is
softmax(z) - onehot(y). The grid is persistent: as many programs as the chip has multiprocessors, each with every so many tiles
of one flattened loop, so that a tile's epilogue overlaps the next one's loads. Each number is written once: no atomics, the same
bits every run.

x and W are read through pointers or, on chips with a tensor copy engine, through descriptors, and out is written likewise: the
same numbers in the same order, so the same bits.
"""

# A kernel takes pointers and scalars typed at launch.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from ..head import Head
from .configs import TileConfig
from .launch import Bound, of_head, source
from .tiles import cap, counted_rows, described_product, grouped, product

if TYPE_CHECKING:
    from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-100.0)  # log2 of `passes.LEAST`


@triton.jit(
    do_not_specialize=["N", "V", "first_x", "first_row", "first_column", "add"]
)  # what changes from batch to batch compiles nothing anew
def exp_tile_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    label_ptr,
    anchor_ptr,
    at_target_ptr,
    out_ptr,
    sum_ptr,
    count_ptr,
    N,
    V,
    first_x,
    first_row,
    first_column,
    add,
    logit_scale,
    softcap,
    stride_xn,
    stride_xd,
    stride_wv,
    stride_wd,
    stride_on,
    stride_sv,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    WRITE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: any number of programs; they share cdiv(rows, BLOCK_N) · cdiv(V, BLOCK_V) tiles.

    Pointers: x (…, D), of which N rows from first_x on are taken, w (…, D) and bias of the whole head, of which V columns from
    first_column on are taken, label (N,) int64 in the whole vocabulary, anchor (N,) fp32, at_target (N,) fp32 put in the label's
    column, out (N, V), sum (tiles of V, N) fp32, which `add` 0 overwrites and 1 adds to, count () int32 rows that are wanted, of
    which first_row lie before these. bias, at_target, out and count are touched only with HAS_BIAS, HAS_TARGET, WRITE,
    HAS_COUNT. A tile of rows past the count alone is neither computed nor written; in one that has others they are 0. With
    DESCRIPTORS x, w and out are tensor descriptors of blocks (BLOCK_N, BLOCK_D), (BLOCK_V, BLOCK_D) and (BLOCK_N, BLOCK_V), and
    their strides go unused; out then takes whole tiles as far as it reaches, 0 past V.
    """
    rows = counted_rows(count_ptr, first_row, N, HAS_COUNT)
    tiles_n, tiles_v = tl.cdiv(rows, BLOCK_N), tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0), flatten=FLATTEN):
        tile_n, tile_v = grouped(tile, tiles_n, tiles_v, GROUP_N)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        row = tl.minimum(n, N - 1).to(tl.int64)  # past the edge: a real row, masked below
        column = first_column + tl.minimum(v, V - 1).to(tl.int64)
        if DESCRIPTORS:
            raw = described_product(
                x_ptr,
                w_ptr,
                first_x + tile_n * BLOCK_N,
                first_column + tile_v * BLOCK_V,
                D,
                BLOCK_N,
                BLOCK_V,
                BLOCK_D,
                PRECISION,
            )
        else:
            raw = product(
                x_ptr,
                w_ptr,
                first_x + row,
                column,
                stride_xn,
                stride_xd,
                stride_wv,
                stride_wd,
                D,
                BLOCK_N,
                BLOCK_V,
                BLOCK_D,
                PRECISION,
            )
        if HAS_BIAS:
            raw += tl.load(bias_ptr + column).to(tl.float32)[None, :]
        z, slope = cap(raw, logit_scale, softcap, HAS_SOFTCAP)
        exponent = (z - tl.load(anchor_ptr + row)[:, None]) * LOG2E
        is_label = v[None, :] == (tl.load(label_ptr + row) - first_column).to(tl.int32)[:, None]
        weights = tl.exp2(exponent)
        weights = tl.where((exponent < LEAST) | is_label | (v >= V)[None, :] | (n >= rows)[:, None], 0.0, weights)
        sums = sum_ptr + tile_v.to(tl.int64) * stride_sv + n
        before = tl.load(sums, mask=n < N * add, other=0.0)
        tl.store(sums, before + tl.sum(weights, 1), mask=n < N)
        if WRITE:
            if HAS_TARGET:
                weights = tl.where(is_label, tl.load(at_target_ptr + row)[:, None], weights)
            if HAS_SOFTCAP:
                weights *= slope
            if DESCRIPTORS:
                out_ptr.store([tile_n * BLOCK_N, tile_v * BLOCK_V], weights.to(out_ptr.dtype))
            else:
                tl.store(
                    out_ptr + n.to(tl.int64)[:, None] * stride_on + v[None, :],
                    weights.to(out_ptr.dtype.element_ty),
                    mask=(n < N)[:, None] & (v < V)[None, :],
                )


def bind(
    x: Tensor,
    head: Head,
    labels: Tensor,
    anchor: Tensor,
    at_target: Tensor | None,
    out: Tensor,
    sums: Tensor,
    *,
    count: Tensor | None = None,
    write: bool,
    precision: str,
    config: TileConfig,
) -> Bound:
    """The kernel on these tensors, to be called with N, V, first_x, first_row, first_column and add; see it for the rest.

    A config with descriptors wants x, the weight and out `describable`.
    """
    assert out.stride(1) == 1 and labels.is_contiguous() and anchor.is_contiguous() and sums.stride(1) == 1
    described, n, v, d = config.descriptors, config.block_n, config.block_v, config.block_d
    arguments = {
        "x_ptr": source(x, [n, d], described),
        "w_ptr": source(head.weight, [v, d], described),
        "bias_ptr": anchor if head.bias is None else head.bias,
        "label_ptr": labels,
        "anchor_ptr": anchor,
        "at_target_ptr": anchor if at_target is None else at_target,
        "out_ptr": source(out, [n, v], described),
        "sum_ptr": sums,
        "count_ptr": labels if count is None else count,
        **of_head(x, head),
        "stride_on": out.stride(0),
        "stride_sv": sums.stride(0),
        "BLOCK_N": n,
        "BLOCK_V": v,
        "BLOCK_D": d,
        "GROUP_N": config.group_n,
        "HAS_TARGET": at_target is not None,
        "HAS_COUNT": count is not None,
        "WRITE": write,
        "DESCRIPTORS": described,
        "FLATTEN": config.flatten,
        "PRECISION": precision,
    }
    return Bound(exp_tile_kernel, arguments, config.options())
