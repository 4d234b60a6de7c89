"""total (+)= A B for a slice of which only the first `count` rows hold anything, a number that stays on the device.

Two forms, one kernel: the rows that count are rows of A and of the result (∂/∂x, N of them); or they are what is summed
over (∂/∂W = Rᵀ X). A library product has no way to stop at a number the host does not know. The grid is persistent, as that of
`exp_tile`; the result is added to through pointers in halves of a tile, so that no more registers are alive than one has.
"""

# A kernel takes pointers and scalars typed at launch.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .configs import TileConfig
from .launch import Bound, source
from .tiles import counted_rows, grouped

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def put_half(total_ptr, m, d, inside_m, D, stride_tm, values, add):
    """Write or add (BLOCK_M, half a BLOCK_D) fp32 values to the result, which may be of a narrower format."""
    ptrs = total_ptr + m.to(tl.int64)[:, None] * stride_tm + d[None, :]
    inside = inside_m[:, None] & (d < D)[None, :]
    if add != 0:
        values += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(ptrs, values.to(total_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["M", "K", "first_row", "first_k", "add"]
)  # what changes from batch to batch compiles nothing anew
def counted_product_kernel(
    a_ptr,
    b_ptr,
    total_ptr,
    count_ptr,
    M,
    K,
    D,
    first_row,
    first_k,
    add,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bd,
    stride_tm,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUM_COUNTED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: any number of programs; they share cdiv(M, BLOCK_M) · cdiv(D, BLOCK_D) tiles of the result.

    Pointers: a (M, K), b (…, D), of which K rows from first_k on are taken, total (M, D), count () int32 rows that hold
    something, of which first_row lie before this slice. add: 0 overwrites the result. SUM_COUNTED: the counted rows are those of
    b, else those of a. Rows past the count are not read into a result (they may hold anything), and a tile of them alone is left
    as it is. With DESCRIPTORS b is a descriptor of blocks (BLOCK_K, BLOCK_D), a one of (BLOCK_M, BLOCK_K), or with SUM_COUNTED,
    where memory holds aᵀ, of (BLOCK_K, BLOCK_M); then what lies past the count in a must be finite, and in b 0.
    """
    rows, depth = M, K
    if SUM_COUNTED:
        depth = counted_rows(count_ptr, first_row, K, True)
    else:
        rows = counted_rows(count_ptr, first_row, M, True)
    tiles_m, tiles_d = tl.cdiv(rows, BLOCK_M), tl.cdiv(D, BLOCK_D)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_d, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_d = grouped(tile, tiles_m, tiles_d, GROUP_M)
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
        inside_m = m < rows
        total = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        if DESCRIPTORS:
            for k in range(0, depth, BLOCK_K):
                if SUM_COUNTED:
                    a = a_ptr.load([k, tile_m * BLOCK_M]).T
                else:
                    a = a_ptr.load([tile_m * BLOCK_M, k])
                b = b_ptr.load([first_k + k, tile_d * BLOCK_D])
                total = tl.dot(a, b, total, input_precision=PRECISION)
        else:
            inner = tl.arange(0, BLOCK_K)
            a_ptrs = a_ptr + m.to(tl.int64)[:, None] * stride_am + inner.to(tl.int64)[None, :] * stride_ak
            b_ptrs = b_ptr + (first_k + inner.to(tl.int64))[:, None] * stride_bk + d.to(tl.int64)[None, :] * stride_bd
            for k in range(0, depth, BLOCK_K):
                a = tl.load(a_ptrs, mask=inside_m[:, None] & (k + inner < depth)[None, :], other=0.0)
                b = tl.load(b_ptrs, mask=(k + inner < depth)[:, None] & (d < D)[None, :], other=0.0)
                total = tl.dot(a, b, total, input_precision=PRECISION)
                a_ptrs += BLOCK_K * stride_ak
                b_ptrs += BLOCK_K * stride_bk
        low, high = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_D // 2)), (0, 2, 1)))
        half = tile_d * BLOCK_D + tl.arange(0, BLOCK_D // 2)
        put_half(total_ptr, m, half, inside_m, D, stride_tm, low, add)
        put_half(total_ptr, m, half + BLOCK_D // 2, inside_m, D, stride_tm, high, add)


def bind(
    slice_: Tensor, b: Tensor, total: Tensor, count: Tensor, *, sum_counted: bool, precision: str, config: TileConfig
) -> Bound:
    """The kernel on a = slice_ (with sum_counted its transpose), b and total, to be called with M, K, first_row, first_k, add.

    `config` gives the tile as rows block_n, columns block_v, summed block_d at a time; with descriptors it wants slice_ and b
    `describable`.
    """
    assert total.stride(1) == 1
    a = slice_.T if sum_counted else slice_
    block = [config.block_d, config.block_n] if sum_counted else [config.block_n, config.block_d]
    arguments = {
        "a_ptr": source(slice_, block, True) if config.descriptors else a,
        "b_ptr": source(b, [config.block_d, config.block_v], config.descriptors),
        "total_ptr": total,
        "count_ptr": count,
        "D": b.shape[1],
        "stride_am": a.stride(0),
        "stride_ak": a.stride(1),
        "stride_bk": b.stride(0),
        "stride_bd": b.stride(1),
        "stride_tm": total.stride(0),
        "BLOCK_M": config.block_n,
        "BLOCK_D": config.block_v,
        "BLOCK_K": config.block_d,
        "GROUP_M": config.group_n,
        "SUM_COUNTED": sum_counted,
        "DESCRIPTORS": config.descriptors,
        "FLATTEN": config.flatten,
        "PRECISION": precision,
    }
    return Bound(counted_product_kernel, arguments, config.options())
