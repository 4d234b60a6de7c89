"""Device functions the kernels share, and how their matrices are read.

Shape legend: N rows, D hidden size, V columns of the vocabulary chunk. Addresses are built in int64 throughout: rows
and columns times their strides pass 2³¹ on real shapes.
"""

# A kernel takes pointers and scalars typed at launch.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def grouped(pid, tiles_n, tiles_v, GROUP_N: tl.constexpr):
    """Tile (n, v) of a linear program id: GROUP_N row tiles take the same columns before the next columns come."""
    per_group = GROUP_N * tiles_v
    first = (pid // per_group) * GROUP_N
    height = tl.minimum(tiles_n - first, GROUP_N)
    return first + (pid % per_group) % height, (pid % per_group) // height


@triton.jit
def product(
    x_ptr,
    w_ptr,
    row,
    column,
    stride_xn,
    stride_xd,
    stride_wv,
    stride_wd,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x[row] @ w[column].T with fp32 accumulation, (BLOCK_N, BLOCK_V). row, column: int64 indices inside the tensors.

    D is a constant so that the loop has a known length; with a run-time bound ptxas serialises wgmma.
    """
    inner = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + row[:, None] * stride_xn + inner[None, :] * stride_xd
    w_ptrs = w_ptr + column[None, :] * stride_wv + inner[:, None] * stride_wd
    total = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(d + inner < D)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(d + inner < D)[:, None], other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
        x_ptrs += BLOCK_D * stride_xd
        w_ptrs += BLOCK_D * stride_wd
    return total


@triton.jit
def described_product(
    x_desc,
    w_desc,
    first_row,
    first_column,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`product` of the tile at (first_row, first_column) through tensor descriptors, which the copy engine reads.

    What lies past the edge of a tensor, in D too, comes as 0.
    """
    total = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        x = x_desc.load([first_row, d])
        w = w_desc.load([first_column, d])
        total = tl.dot(x, w.T, total, input_precision=PRECISION)
    return total


@triton.jit
def cap(raw, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """(z, slope): z = softcap · tanh(logit_scale · raw / softcap) and its derivative 1 - tanh² (1 without a softcap)."""
    z = raw * logit_scale
    slope = 1.0
    if HAS_SOFTCAP:
        ratio = 2.0 * tl.sigmoid(2.0 * (z / softcap)) - 1.0
        z = softcap * ratio
        slope = 1.0 - ratio * ratio
    return z, slope


@triton.jit
def counted_rows(count_ptr, first_row, N, HAS_COUNT: tl.constexpr):
    """How many of N rows count, first_row others lying before them; count () int32 is read on the device."""
    rows = N
    if HAS_COUNT:
        rows = tl.maximum(tl.minimum(N, tl.load(count_ptr) - first_row), 0)
    return rows


def describable(tensor: Tensor) -> bool:
    """Whether the copy engine can read this matrix: rows contiguous and apart, base and row stride multiples of 16 bytes."""
    stride, step = tensor.stride()
    size = tensor.element_size()
    apart = stride >= tensor.shape[1] and stride * size % 16 == 0
    return step == 1 and apart and tensor.data_ptr() % 16 == 0 and tensor.numel() > 0
