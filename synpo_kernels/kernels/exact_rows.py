"""Flagged rows done again with a running maximum: exact for any logits, and nothing to do where no row is flagged.

The one-pass form measures exponents from the target logit and overflows where the largest logit is some 60 above it.
Such rows are rare to the point of absence, so this kernel favours simplicity: a block of rows without a flag returns at
once, without the host having to know; a flagged block sweeps the vocabulary once for each block of D it owns.
"""

# A kernel takes pointers and scalars typed at launch.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from ..head import Head
from .configs import TileConfig
from .launch import Bound, of_head
from .rows import Rows
from .tiles import cap, product

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit(do_not_specialize=["N"])  # what changes from batch to batch compiles nothing anew
def exact_rows_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    label_ptr,
    flag_ptr,
    target_ptr,
    slope_ptr,
    logp_ptr,
    normalizer_ptr,
    direction_ptr,
    N,
    V,
    logit_scale,
    softcap,
    stride_xn,
    stride_xd,
    stride_wv,
    stride_wd,
    stride_un,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WRITE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (cdiv(N, BLOCK_N), cdiv(D, BLOCK_D) if WRITE else 1); a program owns BLOCK_N rows and BLOCK_D columns of U.

    Pointers: x (N, D), w (V, D), bias (V,), label (N,) int64, flag (N,) int8, target (N,) fp32 z_y, slope (N,) fp32
    ∂z_y; written at flagged rows alone: logp (N,) fp32, normalizer (N,) fp64 the log-sum-exp, direction (N, D). bias, slope
    and direction are touched only with HAS_BIAS, HAS_SOFTCAP, WRITE.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    flagged = tl.load(flag_ptr + n, mask=n < N, other=0) != 0
    if tl.max(flagged.to(tl.int32), 0) == 0:
        return
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.minimum(n, N - 1)
    label = tl.load(label_ptr + row)
    target = tl.load(target_ptr + row)
    largest = target
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    pull = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V).to(tl.int64)
        column = tl.minimum(v, V - 1)
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
        left_out = (v[None, :] == label[:, None]) | (v >= V)[None, :]
        raised = tl.maximum(largest, tl.max(tl.where(left_out, target[:, None], z), 1))
        weights = tl.where(left_out, 0.0, tl.exp(z - raised[:, None]))
        shrink = tl.exp(largest - raised)
        total = total * shrink + tl.sum(weights, 1)
        if WRITE:
            if HAS_SOFTCAP:
                weights *= slope
            w = tl.load(w_ptr + column[:, None] * stride_wv + d[None, :] * stride_wd, mask=(d < D)[None, :], other=0.0)
            pull = tl.dot(weights.to(w.dtype), w, pull * shrink[:, None], input_precision=PRECISION)
        largest = raised
    excess = target - largest
    everything = total + tl.exp(excess)
    if tl.program_id(1) == 0:
        tl.store(logp_ptr + n, excess - tl.log(everything), mask=flagged)
        tl.store(normalizer_ptr + n, largest.to(tl.float64) + tl.log(everything.to(tl.float64)), mask=flagged)
    if WRITE:
        others = total / everything
        if HAS_SOFTCAP:
            others *= tl.load(slope_ptr + row)
        written = flagged[:, None] & (d < D)[None, :]  # the label of a row that is ignored is no column
        w = tl.load(w_ptr + label[:, None] * stride_wv + d[None, :] * stride_wd, mask=written, other=0.0).to(tl.float32)
        direction = (others[:, None] * w - pull / everything[:, None]) * logit_scale
        tl.store(
            direction_ptr + n[:, None] * stride_un + d[None, :],
            direction.to(direction_ptr.dtype.element_ty),
            mask=written,
        )


def launch(x: Tensor, head: Head, rows: Rows, *, precision: str, config: TileConfig) -> None:
    """Overwrite logps, normalizer and, unless None, direction of the rows of x (N, D) whose flag is set. See the kernel."""
    labels, direction, slope = rows.labels, rows.direction, rows.slope
    assert labels.is_contiguous() and (direction is None or direction.stride(1) == 1)
    n, d = x.shape
    if n == 0:
        return
    grid = (triton.cdiv(n, config.block_n), 1 if direction is None else triton.cdiv(d, config.block_d))
    arguments = {
        "x_ptr": x,
        "w_ptr": head.weight,
        "bias_ptr": head.weight if head.bias is None else head.bias,
        "label_ptr": labels,
        "flag_ptr": rows.flags,
        "target_ptr": rows.target,
        "slope_ptr": rows.target if slope is None else slope,
        "logp_ptr": rows.logps,
        "normalizer_ptr": rows.normalizer,
        "direction_ptr": x if direction is None else direction,
        "N": n,
        "V": len(head.weight),
        **of_head(x, head),
        "stride_un": 0 if direction is None else direction.stride(0),
        "BLOCK_N": config.block_n,
        "BLOCK_V": config.block_v,
        "BLOCK_D": config.block_d,
        "WRITE": direction is not None,
        "PRECISION": precision,
    }
    Bound(exact_rows_kernel, arguments, config.options())(grid)
