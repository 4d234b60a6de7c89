"""total += A B for a slice of which only the first `count` rows hold anything, a number that stays on the device.

Two forms, one kernel: the rows that count are rows of A and of the result (∂/∂x, N of them), or they are what is summed over
(∂/∂W = Rᵀ X). A library product has no way to stop at a number the host does
not know.
"""

# A kernel takes pointers and scalars typed at launch.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .configs import TileConfig
from .tiles import grouped

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit(do_not_specialize=["first_row"])  # what changes from batch to batch compiles nothing anew
def counted_product_kernel(
    a_ptr,
    b_ptr,
    total_ptr,
    count_ptr,
    M,
    K,
    D,
    first_row,
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
    PRECISION: tl.constexpr,
):
    """Grid: cdiv(M, BLOCK_M) · cdiv(D, BLOCK_D) programs in one dimension; a program owns one tile of the result.

    Pointers: a (M, K), b (K, D), total (M, D) fp32, count () int32 rows that hold something, of which first_row lie
    before this slice. SUM_COUNTED: the counted rows are those of b, else those of a. Rows past the count are not read
    into a result (they may hold anything), and their result is left alone.
    """
    tile_m, tile_d = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(D, BLOCK_D), GROUP_M)
    limit = tl.load(count_ptr) - first_row
    rows, depth = M, K
    if SUM_COUNTED:
        depth = tl.minimum(K, limit)
    else:
        rows = tl.minimum(M, limit)
    if tile_m * BLOCK_M >= rows:
        return
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    inner = tl.arange(0, BLOCK_K)
    inside_m, inside_d = (m < rows)[:, None], (d < D)[None, :]
    a_ptrs = a_ptr + m.to(tl.int64)[:, None] * stride_am + inner.to(tl.int64)[None, :] * stride_ak
    b_ptrs = b_ptr + inner.to(tl.int64)[:, None] * stride_bk + d.to(tl.int64)[None, :] * stride_bd
    total_ptrs = total_ptr + m.to(tl.int64)[:, None] * stride_tm + d[None, :]
    total = tl.load(total_ptrs, mask=inside_m & inside_d, other=0.0)
    for k in range(0, depth, BLOCK_K):
        a = tl.load(a_ptrs, mask=inside_m & (k + inner < depth)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(k + inner < depth)[:, None] & inside_d, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    tl.store(total_ptrs, total, mask=inside_m & inside_d)


def launch(
    a: Tensor,
    b: Tensor,
    total: Tensor,
    count: Tensor,
    *,
    first_row: int,
    sum_counted: bool,
    precision: str,
    config: TileConfig,
) -> None:
    """total (M, D) fp32 += a (M, K) @ b (K, D), the first `count - first_row` rows of a (of b with sum_counted) alone.

    `config` gives the tile as rows block_n, columns block_v, summed block_d at a time.
    """
    assert total.stride(1) == 1
    m, k = a.shape
    d = b.shape[1]
    block_d = min(config.block_v, max(16, triton.next_power_of_2(d)))
    counted_product_kernel[(triton.cdiv(m, config.block_n) * triton.cdiv(d, block_d),)](
        a,
        b,
        total,
        count,
        m,
        k,
        d,
        first_row,
        *a.stride(),
        *b.stride(),
        total.stride(0),
        BLOCK_M=config.block_n,
        BLOCK_D=block_d,
        BLOCK_K=config.block_d,
        GROUP_M=config.group_n,
        SUM_COUNTED=sum_counted,
        PRECISION=precision,
        **config.options(),
    )
