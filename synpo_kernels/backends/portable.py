"""The portable backend: tiles in plain torch, for any device torch runs on.

bf16 stays bf16 where its products are summed in fp32: by tensor cores, and on a CPU by the extension. Other half-precision
inputs are widened chunk by chunk (CPUs would round each product to half precision). A row whose exponential sum overflowed
is found and done again around its largest logit, which reads one number back from a CUDA device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..head import Head, add_matmul, compute_dtype, taken_whole
from . import passes
from .passes import Forward, Gradients, cut, target_logits, vocabulary_chunks


@dataclass(frozen=True)
class TorchTiles:
    """A slice of exponentials by torch operations; see `passes.Tiles`."""

    low: bool

    def operand(self, matrix: Tensor) -> Tensor:
        if matrix.dtype == torch.bfloat16 and taken_whole(matrix):
            return matrix
        return matrix.to(compute_dtype(matrix.dtype))

    def slice_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return compute_dtype(dtype)

    def logits(self, x: Tensor, part: Head, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """(logits, slope) of a slice, (n, w) each, the logits in `out`; see `Head.cap`."""
        if x.dtype == out.dtype:
            torch.mm(x, part.weight.T, out=out)
        else:
            add_matmul(out.zero_(), x, part.weight.T)
        if part.bias is not None:
            out.add_(part.bias)
        return part.cap(out)

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
        _, slope = self.logits(x, part, out)
        out.sub_(anchor[:, None]).exp_()
        row = torch.arange(out.shape[0], device=out.device)
        column = labels.clamp(0, out.shape[1] - 1)
        elsewhere = labels != column  # the label is not in this chunk
        found = out[row, column]
        out[row, column] = found.where(elsewhere, 0.0)
        sums = out.sum(1)
        if at_target is not None:
            out[row, column] = found.where(elsewhere, at_target)
        if slope is not None and keep:
            out.mul_(slope)
        return sums

    def add_product(self, total: Tensor, slice_: Tensor, b: Tensor, first_row: int) -> None:
        add_matmul(total, slice_, b)

    def add_transposed_product(self, total: Tensor, slice_: Tensor, b: Tensor, first_row: int) -> None:
        add_matmul(total, slice_.T, b)


def partition(labels: Tensor, ignore_index: int) -> tuple[Tensor, None]:
    """Indices of the rows to compute; see `choice.Partition`. The host learns their number."""
    return (labels != ignore_index).nonzero().squeeze(1), None


def forward(
    x: Tensor,
    head: Head,
    labels: Tensor,
    *,
    want_direction: bool,
    count: Tensor | None = None,
    low: bool = False,
) -> Forward:
    """Log-probabilities (N,) of `labels` and, if wanted, U (N, D) = ∂logp/∂x, in one pass; see `passes`."""
    assert count is None, "`partition` gives the rows to compute alone"
    tiles = TorchTiles(low)
    target, slope = target_logits(x, head, labels)
    result, total = _around(x, head, labels, target, target, slope, tiles, want_direction)
    flagged = (total > passes.OVERFLOW).nonzero().squeeze(1)
    if flagged.numel() == 0:
        return result
    rows, row_labels = x[flagged], labels[flagged]
    row_slope = None if slope is None else slope[flagged]
    largest = largest_logits(rows, head, tiles)
    again, _ = _around(rows, head, row_labels, target[flagged], largest, row_slope, tiles, want_direction)
    for whole, part in (
        (result.logps, again.logps),
        (result.normalizer, again.normalizer),
        (result.direction, again.direction),
    ):
        if whole is not None and part is not None:
            whole[flagged] = part
    return result


def whole_rows(
    x: Tensor, head: Head, labels: Tensor, out: Tensor, *, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Write exp(z - a) · slope of all vocabulary into out (N, V), 0 at the label, for an anchor a of each row.

    Returns:
        logps (N,), and exp(a - log-sum-exp) (N,), which turns `out` into probabilities.
    """
    assert count is None, "`partition` gives the rows to compute alone"
    tiles = TorchTiles(low=False)
    target, _ = target_logits(x, head, labels)
    total = passes.fill(x, head, labels, target, tiles, out)
    logps = (target - target) - torch.log1p(total)  # NaN where the row is not finite, which must stay visible
    flagged = (total > passes.OVERFLOW).nonzero().squeeze(1)
    if flagged.numel() == 0:
        return logps, logps.exp()
    logps[flagged] = forward(x[flagged], head, labels[flagged], want_direction=False).logps
    passes.fill(x, head, labels, target - logps, tiles, out)
    return logps, torch.ones_like(logps)


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
    """Gradients through a trained head; see `passes.gradients`."""
    assert count is None, "`partition` gives the rows to compute alone"
    return passes.gradients(x, head, labels, forward, upstream, TorchTiles(low), want=want)


def _around(
    x: Tensor,
    head: Head,
    labels: Tensor,
    target: Tensor,
    anchor: Tensor,
    slope: Tensor | None,
    tiles: TorchTiles,
    want_direction: bool,
) -> tuple[Forward, Tensor]:
    """One pass with exponents measured from `anchor`; also returns the sum, to see whether it overflowed."""
    total, pull = passes.accumulate(x, head, labels, anchor, tiles, want_pull=want_direction)
    excess = target - anchor  # 0 around the target; NaN where the row is not finite, which must stay visible
    everything = total + excess.exp()
    logps = excess - torch.log1p(total + torch.expm1(excess))
    direction = None
    if pull is not None:
        direction = passes.directions(head, labels, slope, total / everything, pull.div_(everything[:, None]))
    return Forward(logps, target - logps, direction), total


def largest_logits(x: Tensor, head: Head, tiles: TorchTiles) -> Tensor:
    """(N,) max_v z_v in the compute dtype."""
    largest = torch.full((x.shape[0],), -torch.inf, dtype=compute_dtype(x.dtype), device=x.device)
    operand = tiles.operand(x)
    for columns, part, scratch in vocabulary_chunks(x, head, tiles):
        for rows in cut(x.shape[0], passes.MAX_ROWS):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            logits, _ = tiles.logits(operand[rows], part, scratch[: shape[0] * shape[1]].view(shape))
            largest[rows] = torch.maximum(largest[rows], logits.amax(1))
    return largest
