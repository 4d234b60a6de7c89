"""total (+)= A B for a slice of which only the first `count` rows hold anything, a number that stays on the device.

Two forms, one kernel: the rows that count are rows of A and of the result (∂/∂x, N of them); or they are what is summed
over (∂/∂W = Rᵀ X). A library product has no way to stop at a number the host does not know. The grid is persistent, as that of
`exp_tile`, tile by tile. Where more than an eighth of all waves would be waiting, the steps of the last wave and the one before
are shared evenly among all, wherever tiles end (stream-K, Osama et al., arXiv 2301.03598). The parts of a tile are added to the
result one after the other, in order: the same bits every run.

The result is added to through pointers in halves of a tile, so that no more registers are alive than one has.
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


LEAST = tl.constexpr(16)  # steps of a program that takes part in sharing a tile, which costs it some five


@triton.jit
def put_half(total_ptr, m, d, inside_m, D, stride_tm, values, add):
    """Write or add (BLOCK_M, half a BLOCK_D) fp32 values to the result, which may be of a narrower format."""
    ptrs = total_ptr + m.to(tl.int64)[:, None] * stride_tm + d[None, :]
    inside = inside_m[:, None] & (d < D)[None, :]
    if add != 0:
        values += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(ptrs, values.to(total_ptr.dtype.element_ty), mask=inside)


@triton.jit
def multiply_steps(
    a_ptr,
    b_ptr,
    tile_m,
    tile_d,
    first,
    last,
    rows,
    depth,
    D,
    first_k,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bd,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUM_COUNTED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the sum over k in [first, last) contributes to a tile, (BLOCK_M, BLOCK_D) fp32; first is a multiple of BLOCK_K."""
    total = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    if DESCRIPTORS:
        for k in range(first, last, BLOCK_K):
            if SUM_COUNTED:
                a = a_ptr.load([k, tile_m * BLOCK_M]).T
            else:
                a = a_ptr.load([tile_m * BLOCK_M, k])
            b = b_ptr.load([first_k + k, tile_d * BLOCK_D])
            total = tl.dot(a, b, total, input_precision=PRECISION)
    else:
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
        inner = first + tl.arange(0, BLOCK_K)
        a_ptrs = a_ptr + m.to(tl.int64)[:, None] * stride_am + inner.to(tl.int64)[None, :] * stride_ak
        b_ptrs = b_ptr + (first_k + inner.to(tl.int64))[:, None] * stride_bk + d.to(tl.int64)[None, :] * stride_bd
        for k in range(first, last, BLOCK_K):
            inside = k + tl.arange(0, BLOCK_K) < depth
            a = tl.load(a_ptrs, mask=(m < rows)[:, None] & inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=inside[:, None] & (d < D)[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
            a_ptrs += BLOCK_K * stride_ak
            b_ptrs += BLOCK_K * stride_bk
    return total


@triton.jit
def put_tile(total_ptr, total, tile_m, tile_d, rows, D, stride_tm, add, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write or add a tile to the result."""
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    half = tile_d * BLOCK_D + tl.arange(0, BLOCK_D // 2)
    low, high = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_D // 2)), (0, 2, 1)))
    put_half(total_ptr, m, half, m < rows, D, stride_tm, low, add)
    put_half(total_ptr, m, half + BLOCK_D // 2, m < rows, D, stride_tm, high, add)


@triton.jit(
    do_not_specialize=["M", "K", "first_row", "first_k", "add"]
)  # what changes from batch to batch compiles nothing anew
def counted_product_kernel(
    a_ptr,
    b_ptr,
    total_ptr,
    count_ptr,
    turn_ptr,
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
    SHARE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: any number of programs; they share cdiv(M, BLOCK_M) · cdiv(D, BLOCK_D) tiles of the result.

    Pointers: a (M, K), b (…, D), of which K rows from first_k on are taken, total (M, D), count () int32 rows that hold
    something, of which first_row lie before this slice, with SHARE turn (twice the programs) int32, 0 before and after. add: 0
    overwrites the result. SUM_COUNTED: the counted rows are those of b, else those of a. Rows past the count are not read into a
    result (they may hold anything), and a tile of them alone is left as it is. With DESCRIPTORS b is a descriptor of blocks
    (BLOCK_K, BLOCK_D), a one of (BLOCK_M, BLOCK_K), or with SUM_COUNTED, where memory holds aᵀ, of (BLOCK_K, BLOCK_M); then what
    lies past the count in a must be finite, and in b 0.

    With SHARE a part of a tile waits for the one before it, which a program of a lower number has, and takes up first.
    """
    rows, depth = M, K
    if SUM_COUNTED:
        depth = counted_rows(count_ptr, first_row, K, True)
    else:
        rows = counted_rows(count_ptr, first_row, M, True)
    program, programs = tl.program_id(0), tl.num_programs(0)
    tiles_m, tiles_d = tl.cdiv(rows, BLOCK_M), tl.cdiv(D, BLOCK_D)
    tiles, steps = tiles_m * tiles_d, tl.maximum(tl.cdiv(depth, BLOCK_K), 1)
    waves, whole = tl.cdiv(tiles, programs), tiles
    if SHARE and 8 * tiles < 7 * waves * programs:
        whole = tl.maximum(waves - 2, 0) * programs
    for tile in tl.range(program, whole, programs, flatten=FLATTEN):
        tile_m, tile_d = grouped(tile, tiles_m, tiles_d, GROUP_M)
        total = multiply_steps(
            a_ptr,
            b_ptr,
            tile_m,
            tile_d,
            0,
            depth,
            rows,
            depth,
            D,
            first_k,
            stride_am,
            stride_ak,
            stride_bk,
            stride_bd,
            BLOCK_M,
            BLOCK_D,
            BLOCK_K,
            SUM_COUNTED,
            DESCRIPTORS,
            PRECISION,
        )
        put_tile(total_ptr, total, tile_m, tile_d, rows, D, stride_tm, add, BLOCK_M, BLOCK_D)
    if SHARE:
        every = (tiles - whole).to(tl.int64) * steps
        sharing = tl.maximum(tl.minimum(tl.cdiv(every, LEAST), programs), 1)
        begin = (every * tl.minimum(program, sharing) // sharing).to(tl.int32)
        end = (every * tl.minimum(program + 1, sharing) // sharing).to(tl.int32)
        parts = tl.where(begin < end, (end - 1) // steps - begin // steps + 1, 0)
        for part in range(parts):  # the last first: what another program waits for
            shared = (end - 1) // steps - part
            first, last = tl.maximum(begin - shared * steps, 0), tl.minimum(end - shared * steps, steps)
            tile_m, tile_d = grouped(whole + shared, tiles_m, tiles_d, GROUP_M)
            total = multiply_steps(
                a_ptr,
                b_ptr,
                tile_m,
                tile_d,
                first * BLOCK_K,
                tl.minimum(last * BLOCK_K, depth),
                rows,
                depth,
                D,
                first_k,
                stride_am,
                stride_ak,
                stride_bk,
                stride_bd,
                BLOCK_M,
                BLOCK_D,
                BLOCK_K,
                SUM_COUNTED,
                DESCRIPTORS,
                PRECISION,
            )
            while tl.atomic_add(turn_ptr + shared, 0, sem="acquire") != first:
                pass
            tl.debug_barrier()
            put_tile(
                total_ptr, total, tile_m, tile_d, rows, D, stride_tm, tl.where(first > 0, 1, add), BLOCK_M, BLOCK_D
            )
            tl.debug_barrier()
            tl.atomic_xchg(turn_ptr + shared, tl.where(last < steps, last, 0), sem="release")


def bind(
    slice_: Tensor,
    b: Tensor,
    total: Tensor,
    count: Tensor,
    turn: Tensor | None = None,
    *,
    sum_counted: bool,
    precision: str,
    config: TileConfig,
) -> Bound:
    """The kernel on a = slice_ (with sum_counted its transpose), b and total, to be called with M, K, first_row, first_k, add.

    turn: int32 zeros, two for each program, 0 again afterwards; needed to share. `config` gives the tile as rows block_n, columns
    block_v, summed block_d at a time; with descriptors it wants slice_ and b `describable`.
    """
    assert total.stride(1) == 1 and not (config.share and turn is None)
    a = slice_.T if sum_counted else slice_
    block = [config.block_d, config.block_n] if sum_counted else [config.block_n, config.block_d]
    arguments = {
        "a_ptr": source(slice_, block, True) if config.descriptors else a,
        "b_ptr": source(b, [config.block_d, config.block_v], config.descriptors),
        "total_ptr": total,
        "count_ptr": count,
        "turn_ptr": count if turn is None else turn,
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
        "SHARE": config.share,
        "PRECISION": precision,
    }
    return Bound(counted_product_kernel, arguments, config.options())
