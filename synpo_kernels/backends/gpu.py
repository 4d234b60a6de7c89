"""The Triton backend: the passes of `passes.py` over kernel tiles, and the exact kernel for overflowed rows.

bf16 and fp32 take one pass, P̂ in the input's own format (bf16 has the exponent range of fp32). fp16 cannot hold P̂: its
sums come from a first pass that writes nothing, and a second one, around the log-sum-exp, holds 2¹⁴ · p. The host reads
nothing back: of ignored rows it never learns how many there are. They are moved behind the others, the kernels read the
count where it is, and blocks past it return at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..head import Head, add_matmul
from ..kernels import counted_product, exact_rows, exp_tile
from ..kernels.configs import exact_config, product_config, tile_config
from . import passes
from .passes import Forward, Gradients, accumulate, directions, target_logits

FP16_MAGNIFY = 2.0**14


def _major(device: torch.device) -> int | None:
    """Major compute capability; None in the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None


def _precision() -> str:
    """How the kernels multiply fp32, following torch.set_float32_matmul_precision."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@dataclass(frozen=True)
class TritonTiles:
    """A slice of exponentials by one kernel; see `passes.Tiles`.

    Products with the slice are the library's where every row counts; past a `count` they are a kernel's that stops there.
    """

    count: Tensor | None  # () int32, the first rows that are wanted; None: all
    low: bool

    def operand(self, matrix: Tensor) -> Tensor:
        return matrix

    def slice_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def __call__(
        self,
        x: Tensor,
        part: Head,
        labels: Tensor,
        anchor: Tensor,
        at_target: Tensor | None,
        keep: bool,
        out: Tensor,
        first_row: int,
    ) -> Tensor:
        softcap, counted = part.softcap is not None, self.count is not None
        describable = exp_tile.describable(x) and exp_tile.describable(part.weight)
        config = tile_config(
            _major(x.device), x.element_size(), softcap=softcap, counted=counted, describable=describable
        )
        tiles_v = -(-part.weight.shape[0] // config.block_v)
        sums = torch.empty(tiles_v, x.shape[0], dtype=torch.float32, device=x.device)
        if x.shape[0]:
            exp_tile.launch(
                x,
                part.weight,
                part.bias,
                labels,
                anchor,
                at_target,
                out,
                sums,
                count=self.count,
                first_row=first_row,
                logit_scale=part.logit_scale,
                softcap=part.softcap,
                write=keep,
                precision=_precision(),
                config=config,
            )
        return sums.sum(0)

    def add_product(self, total: Tensor, slice_: Tensor, b: Tensor, first_row: int) -> None:
        self._add(total, slice_, b, first_row, transposed=False)

    def add_transposed_product(self, total: Tensor, slice_: Tensor, b: Tensor, first_row: int) -> None:
        self._add(total, slice_.T, b, first_row, transposed=True)

    def _add(self, total: Tensor, a: Tensor, b: Tensor, first_row: int, *, transposed: bool) -> None:
        if self.count is None:
            add_matmul(total, a, b)
        elif a.numel():
            counted_product.launch(
                a,
                b,
                total,
                self.count,
                first_row=first_row,
                sum_counted=transposed,
                precision=_precision(),
                config=product_config(_major(a.device), a.element_size()),
            )


def partition(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """All rows, those to compute first and in order; and their number, on the device. See `choice.Partition`."""
    kept = labels != ignore_index
    before = kept.cumsum(0)  # kept rows up to and including this one
    row = torch.arange(len(labels), device=labels.device)
    count = kept.sum(dtype=torch.int32)
    place = torch.where(kept, before - 1, count + row - before)
    return torch.empty_like(row).scatter_(0, place, row), count


def forward(
    x: Tensor,
    head: Head,
    labels: Tensor,
    *,
    want_direction: bool,
    count: Tensor | None = None,
    low: bool = False,
) -> Forward:
    """Log-probabilities (N,) of `labels` and, if wanted, U (N, D) = ∂logp/∂x, 0 past the count; see `passes`."""
    twice = want_direction and x.dtype == torch.float16
    tiles = TritonTiles(count, low)
    target, slope = target_logits(x, head, labels)
    target, slope = _counted(target, count), None if slope is None else _counted(slope, count)
    total, pull = accumulate(x, head, labels, target, tiles, want_pull=want_direction and not twice)
    total = _counted(total, count)  # what lies behind was not written
    logps = (target - target) - torch.log1p(total)  # the difference is 0, or NaN where the row is not finite
    direction = None
    if pull is not None:
        everything = 1.0 + total
        direction = directions(head, labels, slope, total / everything, pull.div_(everything[:, None]))
    flags = _counted((total > passes.OVERFLOW).to(torch.int8), count)
    _redo(x, head, labels, flags, target, slope, logps, direction)
    if twice:
        anchor = target - logps - math.log(FP16_MAGNIFY)
        _, pull = accumulate(x, head, labels, anchor, tiles, want_pull=True)
        assert pull is not None
        direction = directions(head, labels, slope, -torch.expm1(logps), pull.div_(FP16_MAGNIFY))
    return Forward(logps, target - logps, direction)


def whole_rows(
    x: Tensor, head: Head, labels: Tensor, out: Tensor, *, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Write exp(z - a) · slope of all vocabulary into out (N, V), 0 at the label, for an anchor a of each row.

    Where a row overflows all are written again around the log-sum-exp, by kernels that return at once where none does.

    Returns:
        logps (N,), and exp(a - log-sum-exp) (N,), which turns `out` into probabilities. Past the count logps is 0.
    """
    target, slope = target_logits(x, head, labels)
    target, slope = _counted(target, count), None if slope is None else _counted(slope, count)
    total = _counted(passes.fill(x, head, labels, target, TritonTiles(count, low=False), out), count)
    logps = (target - target) - torch.log1p(total)
    flags = (total > passes.OVERFLOW).to(torch.int8)
    _redo(x, head, labels, flags, target, slope, logps, None)
    overflowed = flags.any()
    again = overflowed * (len(x) if count is None else count)
    passes.fill(x, head, labels, target - logps, TritonTiles(again.to(torch.int32), low=False), out)
    return logps, torch.where(overflowed, 1.0, logps.exp())


def _redo(
    x: Tensor,
    head: Head,
    labels: Tensor,
    flags: Tensor,
    target: Tensor,
    slope: Tensor | None,
    logps: Tensor,
    direction: Tensor | None,
) -> None:
    """Overwrite logps and direction at the rows whose flag is set, by the exact kernel."""
    if not len(x):
        return
    exact_rows.launch(
        x,
        head.weight,
        head.bias,
        labels,
        flags,
        target,
        slope,
        logps,
        direction,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        precision=_precision(),
        config=exact_config(_major(x.device)),
    )


def gradients(
    x: Tensor,
    head: Head,
    labels: Tensor,
    forward: Forward,
    upstream: Tensor,
    *,
    want: tuple[bool, bool, bool],
    count: Tensor | None = None,
    low: bool = False,
) -> Gradients:
    """Gradients through a trained head, ∂L/∂x 0 past the count; see `passes.gradients`."""
    magnify = FP16_MAGNIFY if x.dtype == torch.float16 else 1.0
    tiles, upstream = TritonTiles(count, low), _counted(upstream, count)
    return passes.gradients(x, head, labels, forward, upstream, tiles, want=want, magnify=magnify)


def _counted(values: Tensor, count: Tensor | None) -> Tensor:
    """(N,) values with 0 past the count."""
    if count is None:
        return values
    return values.where(torch.arange(len(values), device=values.device) < count, 0)
