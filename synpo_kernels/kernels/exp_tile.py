"""One vocabulary chunk of exponentials: a GEMM whose epilogue is exp(z - anchor), never writing logits.

    out[t, v] = slope · exp(cap(logit_scale · (x_t·W_v + b_v)) - anchor_t)      fp32 accumulators, rounded once
    sums[j, t] = Σ over the columns of tile j of exp(z - anchor_t), the label's column left out

Anchored at the target logit this is P̂; anchored at the log-sum-exp, with p_y - 1 in the label's column, it is
softmax(z) - onehot(y). Each program owns one tile, each number is written once: no atomics, the same bits every run.

x and W are read through pointers or, on chips with a tensor copy engine, through descriptors: the same numbers in the same
order, so the same bits.
"""

# A kernel takes pointers and scalars typed at launch.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import TileConfig
from .tiles import cap, described_product, grouped, product

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit(do_not_specialize=["N", "first_row"])  # what changes from batch to batch compiles nothing anew
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
    first_row,
    logit_scale,
    softcap,
    stride_xn,
    stride_xd,
    stride_wv,
    stride_wd,
    stride_on,
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
    PRECISION: tl.constexpr,
):
    """Grid: cdiv(N, BLOCK_N) · cdiv(V, BLOCK_V) programs in one dimension; a program owns one tile.

    Pointers: x (N, D), w (V, D), bias (V,), label (N,) int64 counted from the chunk's first column, anchor (N,) fp32,
    at_target (N,) fp32 put in the label's column, out (N, V), sum (cdiv(V, BLOCK_V), N) fp32, count () int32 rows that
    are wanted, of which first_row lie before this slice. bias, at_target, out and count are touched only with HAS_BIAS,
    HAS_TARGET, WRITE, HAS_COUNT. A tile of rows past the count alone is neither computed nor written. With DESCRIPTORS
    x and w are tensor descriptors of blocks (BLOCK_N, BLOCK_D) and (BLOCK_V, BLOCK_D), and their strides go unused.
    """
    tile_n, tile_v = grouped(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP_N)
    if HAS_COUNT:  # noqa: SIM102 (a branch the compiler drops)
        if tile_n * BLOCK_N >= tl.load(count_ptr) - first_row:
            return
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    row = tl.minimum(n, N - 1).to(tl.int64)  # past the edge: a real row, masked below
    column = tl.minimum(v, V - 1).to(tl.int64)
    if DESCRIPTORS:
        raw = described_product(
            x_ptr, w_ptr, tile_n * BLOCK_N, tile_v * BLOCK_V, D, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION
        )
    else:
        raw = product(
            x_ptr,
            w_ptr,
            row,
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
    weights = tl.exp(z - tl.load(anchor_ptr + row)[:, None])
    is_label = v[None, :] == tl.load(label_ptr + row).to(tl.int32)[:, None]
    weights = tl.where(is_label | (v >= V)[None, :], 0.0, weights)
    tl.store(sum_ptr + tile_v.to(tl.int64) * N + n, tl.sum(weights, 1), mask=n < N)
    if WRITE:
        if HAS_TARGET:
            weights = tl.where(is_label, tl.load(at_target_ptr + row)[:, None], weights)
        if HAS_SOFTCAP:
            weights *= slope
        tl.store(
            out_ptr + n.to(tl.int64)[:, None] * stride_on + v[None, :],
            weights.to(out_ptr.dtype.element_ty),
            mask=(n < N)[:, None] & (v < V)[None, :],
        )


def describable(tensor: Tensor) -> bool:
    """Whether the copy engine can read this matrix: rows contiguous and apart, base and row stride multiples of 16 bytes."""
    stride, step = tensor.stride()
    size = tensor.element_size()
    apart = stride >= tensor.shape[1] and stride * size % 16 == 0
    return step == 1 and apart and tensor.data_ptr() % 16 == 0 and tensor.numel() > 0


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    anchor: Tensor,
    at_target: Tensor | None,
    out: Tensor,
    sums: Tensor,
    *,
    count: Tensor | None = None,
    first_row: int = 0,
    logit_scale: float,
    softcap: float | None,
    write: bool,
    precision: str,
    config: TileConfig,
) -> None:
    """Run the kernel on (N, D) x (V, D); `sums` is (cdiv(V, config.block_v), N) fp32. See the kernel for the rest.

    A config with descriptors wants x and weight `describable`.
    """
    assert out.stride(1) == 1 and labels.is_contiguous() and anchor.is_contiguous() and sums.is_contiguous()
    n, v = x.shape[0], weight.shape[0]
    x_source, w_source = x, weight
    if config.descriptors:
        x_source = TensorDescriptor.from_tensor(x, [config.block_n, config.block_d])
        w_source = TensorDescriptor.from_tensor(weight, [config.block_v, config.block_d])
    exp_tile_kernel[(triton.cdiv(n, config.block_n) * triton.cdiv(v, config.block_v),)](
        x_source,
        w_source,
        weight if bias is None else bias,
        labels,
        anchor,
        anchor if at_target is None else at_target,
        out,
        sums,
        labels if count is None else count,
        n,
        v,
        first_row,
        logit_scale,
        0.0 if softcap is None else softcap,
        *x.stride(),
        *weight.stride(),
        out.stride(0),
        D=x.shape[1],
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_D=config.block_d,
        GROUP_N=config.group_n,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_TARGET=at_target is not None,
        HAS_COUNT=count is not None,
        WRITE=write,
        DESCRIPTORS=config.descriptors,
        PRECISION=precision,
        **config.options(),
    )
