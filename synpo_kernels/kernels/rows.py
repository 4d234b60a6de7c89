"""What happens to a row before and after the vocabulary: its target's logit, and ∂logp/∂x from the sums.

    partition    the order of the rows, those that count first, and how many they are
    begin        x_t gathered, z_y = cap(logit_scale · (x_t·W_y + b_y)), its slope, the label
    finish       s → logp = -log1p(s), U = logit_scale · ((s c_y W_y - E') / (1 + s)) rounded once, and whether the row overflowed
    scale_rows   U_t · ∂L/∂logp_t

Each is one pass over x, or over E' and the labels' rows of W, with no copy in fp32. Rows come in an order in which those that
count are first; finish puts each where it belongs, and 0 where it does not count.
"""

# A kernel takes pointers and scalars typed at launch.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head import Head
from .launch import Bound, of_head
from .tiles import cap, counted_rows

Launch = Callable[[int, int], None]  # of so many rows of the order, from the one on

BLOCK_N = 4  # rows of a program, whose work is a pass over D: few, so that many programs fill a GPU
BLOCK_D, BLOCK_T = 1024, 64
INTERPRETER_N = 16  # in the interpreter, where a program costs whatever it does
LABELS, NUMBERS = 2048, 4096  # at a time, of `partition` and of `scale`
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
SIZES = ["N", "first_row"]


@triton.jit
def place_of(order_ptr, row, inside, HAS_ORDER: tl.constexpr):
    """Where row `row` of the order lies among all rows."""
    place = row
    if HAS_ORDER:
        place = tl.load(order_ptr + row, mask=inside, other=0)
    return place


@triton.jit(do_not_specialize=SIZES)
def begin_rows_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    label_ptr,
    order_ptr,
    count_ptr,
    gathered_ptr,
    near_ptr,
    anchor_ptr,
    target_ptr,
    slope_ptr,
    N,
    first_row,
    logit_scale,
    softcap,
    stride_xn,
    stride_xd,
    stride_wv,
    stride_wd,
    stride_gn,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):
    """Grid: (cdiv(N, BLOCK_N),); a program owns BLOCK_N rows of the order, from first_row on.

    Pointers: x (…, D), w (V, D), bias (V,), label (…) int64, order (…) int64 and count () int32 with HAS_ORDER; written: gathered
    (N, D) with HAS_ORDER, near (N,) int64 the labels, anchor (N,) fp32 z_y; and, where the row lies among all rows, target and
    (HAS_SOFTCAP) slope fp32. Rows past the count get label -1 and anchor 0, and are not gathered.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < counted_rows(count_ptr, first_row, N, HAS_ORDER)
    place = place_of(order_ptr, (first_row + n).to(tl.int64), n < N, HAS_ORDER)
    label = tl.load(label_ptr + place, mask=inside, other=0)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + place[:, None] * stride_xn + d[None, :] * stride_xd, mask=mask, other=0.0)
        w = tl.load(w_ptr + label[:, None] * stride_wv + d[None, :] * stride_wd, mask=mask, other=0.0)
        total += tl.sum(x.to(tl.float32) * w.to(tl.float32), 1)
        if HAS_ORDER:
            tl.store(gathered_ptr + n.to(tl.int64)[:, None] * stride_gn + d[None, :], x, mask=mask)
    if HAS_BIAS:
        total += tl.load(bias_ptr + label, mask=inside, other=0.0).to(tl.float32)
    z, slope = cap(total, logit_scale, softcap, HAS_SOFTCAP)
    tl.store(near_ptr + n, tl.where(inside, label, -1), mask=n < N)
    tl.store(anchor_ptr + n, tl.where(inside, z, 0.0), mask=n < N)
    tl.store(target_ptr + place, tl.where(inside, z, 0.0), mask=n < N)
    if HAS_SOFTCAP:
        tl.store(slope_ptr + place, tl.where(inside, slope, 0.0), mask=n < N)


@triton.jit(do_not_specialize=SIZES)
def finish_rows_kernel(
    pull_ptr,
    sums_ptr,
    w_ptr,
    label_ptr,
    order_ptr,
    count_ptr,
    target_ptr,
    slope_ptr,
    logp_ptr,
    normalizer_ptr,
    flag_ptr,
    direction_ptr,
    N,
    T,
    first_row,
    logit_scale,
    divisor,
    overflow,
    stride_pn,
    stride_st,
    stride_wv,
    stride_wd,
    stride_un,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    WRITE: tl.constexpr,
):
    """Grid: (cdiv(N, BLOCK_N), cdiv(D, BLOCK_D) if WRITE else 1); a program owns BLOCK_N rows of the order, BLOCK_D columns of U.

    Pointers: pull (N, D) fp32 E', sums (T, N) fp32, which add up to s, w (V, D), label (…) int64, order and count as
    `begin_rows`, target and slope (…) fp32; written where the row lies among all rows: logp (…) fp32, normalizer (…) fp64 the
    log-sum-exp, flag (…) int8 whether it overflowed, direction (…, D).
    HAS_DIVISOR: E' was anchored at the log-sum-exp and is `divisor` times too large, instead of 1 + s times.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < counted_rows(count_ptr, first_row, N, HAS_ORDER)
    place = place_of(order_ptr, (first_row + n).to(tl.int64), n < N, HAS_ORDER)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, T, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        parts = sums_ptr + t.to(tl.int64)[:, None] * stride_st + n[None, :]
        total += tl.sum(tl.load(parts, mask=(t < T)[:, None] & inside[None, :], other=0.0), 0)
    if tl.program_id(1) == 0:
        target = tl.load(target_ptr + place, mask=inside, other=0.0)
        small = total * (
            1.0 - total * (0.5 - total * (1.0 / 3.0 - total * 0.25))
        )  # log(1 + s) where 1 + s would lose s
        wide = tl.log(1.0 + total.to(tl.float64))
        log = tl.where(total < 0.01, small, wide.to(tl.float32))
        logp = (target - target) - log  # the difference is 0, or NaN where the row is not finite
        tl.store(logp_ptr + place, logp, mask=n < N)
        tl.store(normalizer_ptr + place, target.to(tl.float64) + wide, mask=n < N)
        tl.store(flag_ptr + place, (inside & (total > overflow)).to(tl.int8), mask=n < N)
    if WRITE:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (d < D)[None, :]
        others = total / (1.0 + total)
        shrink = 1.0 / (1.0 + total)
        if HAS_DIVISOR:
            shrink = tl.zeros_like(total) + 1.0 / divisor
        if HAS_SOFTCAP:
            others *= tl.load(slope_ptr + place, mask=inside, other=0.0)
        label = tl.load(label_ptr + place, mask=inside, other=0)
        w = tl.load(w_ptr + label[:, None] * stride_wv + d[None, :] * stride_wd, mask=mask, other=0.0).to(tl.float32)
        pull = tl.load(pull_ptr + n.to(tl.int64)[:, None] * stride_pn + d[None, :], mask=mask, other=0.0)
        direction = (others[:, None] * w - pull * shrink[:, None]) * logit_scale
        tl.store(
            direction_ptr + place[:, None] * stride_un + d[None, :],
            tl.where(inside[:, None], direction, 0.0).to(direction_ptr.dtype.element_ty),
            mask=(n < N)[:, None] & (d < D)[None, :],
        )


@triton.jit(do_not_specialize=["N", "ignore_index"])
def partition_kernel(label_ptr, order_ptr, count_ptr, N, ignore_index, BLOCK: tl.constexpr):
    """Grid: (1,). label (N,) int64; written: order (N,) int64, all rows, those that count first and in order, the others from
    the end; count () int32, how many count."""
    count = 0
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        counts = tl.load(label_ptr + n, mask=n < N, other=ignore_index) != ignore_index
        so_far = count + tl.cumsum(counts.to(tl.int32), 0)
        place = tl.where(counts, so_far, N - n + so_far) - 1
        tl.store(order_ptr + place, n.to(tl.int64), mask=n < N)
        count += tl.sum(counts.to(tl.int32), 0)
    tl.store(count_ptr, count)


@triton.jit(do_not_specialize=["size"])
def scale_kernel(values_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    """Grid: (cdiv(size, BLOCK),). values (size,) times factor () fp32, in place; nothing is touched where it is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        tl.store(values_ptr + at, (values * factor).to(values_ptr.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["N"])
def scale_rows_kernel(
    values_ptr,
    factor_ptr,
    order_ptr,
    out_ptr,
    N,
    D,
    stride_vn,
    stride_on,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):
    """Grid: (cdiv(N, BLOCK_N), cdiv(D, BLOCK_D)). values (N, D) times factor (N,), a row each, to out (…, D), rounded once; with
    HAS_ORDER row t goes where order (N,) int64 says."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (n < N)[:, None] & (d < D)[None, :]
    factor = tl.load(factor_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    place = place_of(order_ptr, n.to(tl.int64), n < N, HAS_ORDER)
    values = tl.load(values_ptr + n.to(tl.int64)[:, None] * stride_vn + d[None, :], mask=mask, other=0.0)
    scaled = values.to(tl.float32) * factor[:, None]
    tl.store(out_ptr + place[:, None] * stride_on + d[None, :], scaled.to(out_ptr.dtype.element_ty), mask=mask)


def scale_rows(values: Tensor, factor: Tensor, out: Tensor, order: Tensor | None = None) -> None:
    """See the kernel; out may be values. The product is taken in fp32."""
    (n, dim), block = values.shape, _rows_of_a_program(values)
    assert (
        values.stride(1) == out.stride(1) == 1 and factor.is_contiguous() and (order is None or order.is_contiguous())
    )
    if not values.numel():
        return
    arguments = {
        "values_ptr": values,
        "factor_ptr": factor,
        "order_ptr": factor if order is None else order,
        "out_ptr": out,
        "N": n,
        "D": dim,
        "stride_vn": values.stride(0),
        "stride_on": out.stride(0),
        "BLOCK_N": block,
        "BLOCK_D": BLOCK_D,
        "HAS_ORDER": order is not None,
    }
    Bound(scale_rows_kernel, arguments, OPTIONS)((triton.cdiv(n, block), triton.cdiv(dim, BLOCK_D)))


def scale(values: Tensor, factor: Tensor) -> None:
    """values, contiguous, times a number on the device, in place: torch would read and write them even times 1."""
    assert values.is_contiguous()
    if size := values.numel():
        arguments = {"values_ptr": values, "factor_ptr": factor, "size": size, "BLOCK": NUMBERS}
        Bound(scale_kernel, arguments, OPTIONS)((triton.cdiv(size, NUMBERS),))


def partition(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """order and count of labels (N,), contiguous; see `Rows`, and `choice.Partition`."""
    assert labels.is_contiguous()
    order, count = torch.empty_like(labels), torch.empty((), dtype=torch.int32, device=labels.device)
    arguments = {"label_ptr": labels, "order_ptr": order, "count_ptr": count, "N": len(labels)}
    Bound(partition_kernel, {**arguments, "ignore_index": ignore_index, "BLOCK": LABELS}, OPTIONS)((1,))
    return order, count


@dataclass(frozen=True)
class Rows:
    """Numbers of all N rows: what `begin` writes, `finish` reads and writes, `exact_rows` writes again."""

    labels: Tensor  # (N,) int64
    target: Tensor  # (N,) fp32 z_y
    slope: Tensor | None  # (N,) fp32 c_y / logit_scale, with a softcap
    logps: Tensor  # (N,) fp32
    normalizer: Tensor  # (N,) fp64, the log-sum-exp
    flags: Tensor  # (N,) int8, where the sum overflowed
    direction: Tensor | None  # (N, D) U, where it is wanted
    order: Tensor | None = None  # (N,) int64, the rows that count first, and
    count: Tensor | None = None  # () int32 how many they are; None: all count, as they lie


def _rows_of_a_program(tensor: Tensor) -> int:
    return BLOCK_N if tensor.is_cuda else INTERPRETER_N


def begin_block(itemsize: int) -> int:
    """Columns that `begin` takes at a time, of x and W: as many bytes in every format, more would spill."""
    return 2 * BLOCK_D // itemsize


def bind_begin(x: Tensor, head: Head, rows: Rows, gathered: Tensor, near: Tensor, anchor: Tensor) -> Launch:
    """See the kernel. `gathered` is written only with an order."""
    block = _rows_of_a_program(x)
    arguments = {
        "x_ptr": x,
        "w_ptr": head.weight,
        "bias_ptr": head.weight if head.bias is None else head.bias,
        "label_ptr": rows.labels,
        "order_ptr": rows.labels if rows.order is None else rows.order,
        "count_ptr": rows.labels if rows.count is None else rows.count,
        "gathered_ptr": gathered,
        "near_ptr": near,
        "anchor_ptr": anchor,
        "target_ptr": rows.target,
        "slope_ptr": rows.target if rows.slope is None else rows.slope,
        **of_head(x, head),
        "stride_gn": gathered.stride(0),
        "BLOCK_N": block,
        "BLOCK_D": begin_block(x.element_size()),
        "HAS_ORDER": rows.order is not None,
    }
    run = Bound(begin_rows_kernel, arguments, OPTIONS)
    return lambda size, first_row: run((triton.cdiv(size, block),), N=size, first_row=first_row)


def bind_finish(
    pull: Tensor | None, sums: Tensor, head: Head, rows: Rows, *, divisor: float | None, overflow: float
) -> Launch:
    """See the kernel; `pull` is there where `rows.direction` is."""
    direction, dim, block = rows.direction, head.weight.shape[1], _rows_of_a_program(sums)
    arguments = {
        "pull_ptr": sums if pull is None else pull,
        "sums_ptr": sums,
        "w_ptr": head.weight,
        "label_ptr": rows.labels,
        "order_ptr": rows.labels if rows.order is None else rows.order,
        "count_ptr": rows.labels if rows.count is None else rows.count,
        "target_ptr": rows.target,
        "slope_ptr": rows.target if rows.slope is None else rows.slope,
        "logp_ptr": rows.logps,
        "normalizer_ptr": rows.normalizer,
        "flag_ptr": rows.flags,
        "direction_ptr": head.weight if direction is None else direction,
        "T": len(sums),
        "logit_scale": head.logit_scale,
        "divisor": 1.0 if divisor is None else divisor,
        "overflow": overflow,
        "stride_pn": 0 if pull is None else pull.stride(0),
        "stride_st": sums.stride(0),
        "stride_wv": head.weight.stride(0),
        "stride_wd": head.weight.stride(1),
        "stride_un": 0 if direction is None else direction.stride(0),
        "D": dim,
        "BLOCK_N": block,
        "BLOCK_D": BLOCK_D,
        "BLOCK_T": BLOCK_T,
        "HAS_SOFTCAP": rows.slope is not None,
        "HAS_ORDER": rows.order is not None,
        "HAS_DIVISOR": divisor is not None,
        "WRITE": direction is not None,
    }
    run, across = Bound(finish_rows_kernel, arguments, OPTIONS), 1 if direction is None else triton.cdiv(dim, BLOCK_D)
    return lambda size, first_row: run((triton.cdiv(size, block), across), N=size, first_row=first_row)
