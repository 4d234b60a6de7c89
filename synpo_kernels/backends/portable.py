"""The portable backend: tiles in plain torch, for any device torch runs on.

bf16 stays bf16 where its products are summed in fp32: by tensor cores, and on a CPU by the extension. Other half-precision
inputs are widened chunk by chunk (CPUs would round each product to half precision). A row whose exponential sum overflowed
is found and done again around its largest logit, which reads one number back from a CUDA device.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..head import Head, add_matmul, compute_dtype, taken_whole
from . import passes
from .passes import Forward, Tiles, Whole, target_logits, vocabulary_chunks

# of exponents: torch's exp on a CPU takes ten times as long where it leaves the normal numbers
FLOOR = math.log(passes.LEAST) - 0.1


class TorchTiles:
    """A slice of exponentials by torch operations; see `passes.Tiles`."""

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
    ) -> Tensor:
        _, slope = self.logits(x, part, out)
        torch.threshold_(out.sub_(anchor[:, None]).clamp_(min=FLOOR).exp_(), passes.LEAST, 0.0)  # NaN stays
        row = torch.arange(out.shape[0], device=out.device)
        column = labels.clamp(0, out.shape[1] - 1)
        elsewhere = labels != column  # the label is not in this chunk
        found = out[row, column]
        out[row, column] = found.where(elsewhere, 0.0)
        sums = out.sum(1)
        if slope is not None and keep:
            torch.threshold_(out.mul_(slope), passes.LEAST, 0.0)
        if at_target is not None:
            own = at_target if slope is None else at_target * slope[row, column]
            out[row, column] = out[row, column].where(elsewhere, own)
        return sums

    def add_product(self, total: Tensor, slice_: Tensor, b: Tensor) -> None:
        add_matmul(total, slice_, b)

    def add_transposed_product(self, total: Tensor, slice_: Tensor, b: Tensor, *, fresh: bool = False) -> None:
        add_matmul(total, slice_.T, b, fresh=fresh)


def partition(labels: Tensor, ignore_index: int) -> tuple[Tensor, None]:
    """Indices of the rows to compute; see `choice.Partition`. The host learns their number."""
    return (labels != ignore_index).nonzero().squeeze(1), None


def forward(
    x: Tensor,
    head: Head,
    labels: Tensor,
    ignore_index: int | None,
    *,
    want_direction: bool,
    workspace: int,
    tiles: Tiles | None = None,
    magnify: float = 1.0,
    parts: Whole = passes.WHOLE,
) -> Forward:
    """Log-probabilities (N,) of `labels` and, if wanted, U (N, D) = ∂logp/∂x, 0 where ignored, in one pass; see `passes`.

    Args:
        tiles: of another backend, None: plain torch. magnify: power of two by which they hold a slice larger where U is summed
            (fp16 needs it), in a second pass. parts: where the rest of the head is, if not here.
    """
    found = nothing(x, want_direction)
    for rows in passes.blocks(labels, ignore_index, passes.block_rows(x, workspace)):
        options = (want_direction, workspace, tiles or TorchTiles(), magnify, parts)
        put(found, rows, _block(x[rows], head, labels[rows], *options))
    return found


def nothing(x: Tensor, want_direction: bool) -> Forward:
    """The results of rows that do not count."""
    logps = x.new_zeros(len(x), dtype=compute_dtype(x.dtype))
    normalizer = torch.zeros_like(logps, dtype=passes.widest(x.device))
    return Forward(logps, normalizer, x.new_zeros(x.shape) if want_direction else None)


def put(whole: Forward, rows: Tensor | slice, part: Forward) -> None:
    """Write the results of some rows."""
    whole.logps[rows], whole.normalizer[rows] = part.logps, part.normalizer
    if whole.direction is not None and part.direction is not None:
        whole.direction[rows] = part.direction


def _block(
    x: Tensor,
    head: Head,
    labels: Tensor,
    want_direction: bool,
    workspace: int,
    tiles: Tiles,
    magnify: float,
    parts: Whole,
) -> Forward:
    target, slope = parts.target_logits(x, head, labels)
    at_once = want_direction and magnify == 1.0
    found, total = _around(x, head, labels, target, target, slope, at_once, workspace, tiles, parts)
    if want_direction and not at_once:
        anchor = found.normalizer.to(total.dtype) - math.log(magnify)
        _, pull = passes.accumulate(x, head, labels, anchor, tiles, workspace, want_pull=True)
        assert pull is not None
        others = -torch.expm1(found.logps)
        found = replace(found, direction=parts.directions(head, labels, slope, others, pull.div_(magnify)))
    flagged = (total > passes.OVERFLOW).nonzero().squeeze(1)
    if flagged.numel():
        known = (x[flagged], head, labels[flagged], target[flagged])
        largest, row_slope = largest_logits(x[flagged], head, workspace), None if slope is None else slope[flagged]
        parts.take_largest(largest)
        again = _around(*known, largest, row_slope, want_direction, workspace, TorchTiles(), parts)
        put(found, flagged, again[0])
    return found


def whole_rows(
    x: Tensor, head: Head, labels: Tensor, out: Tensor, *, workspace: int, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `choice.WholeRows`."""
    assert count is None, "`partition` gives the rows to compute alone"
    target, _ = target_logits(x, head, labels)
    total = passes.fill(x, head, labels, target, TorchTiles(), workspace, out)
    logps = (target - target) - torch.log1p(total)  # NaN where the row is not finite, which must stay visible
    flagged = (total > passes.OVERFLOW).nonzero().squeeze(1)
    if flagged.numel() == 0:
        return logps, logps.exp()
    again = forward(x[flagged], head, labels[flagged], None, want_direction=False, workspace=workspace)
    normalizer = passes.log_sum_exp(target, total)
    logps[flagged], normalizer[flagged] = again.logps, again.normalizer
    anchor, share = passes.rounded(normalizer, logps.dtype)
    passes.fill(x, head, labels, anchor, TorchTiles(), workspace, out)
    return logps, share


def _around(
    x: Tensor,
    head: Head,
    labels: Tensor,
    target: Tensor,
    anchor: Tensor,
    slope: Tensor | None,
    want_direction: bool,
    workspace: int,
    tiles: Tiles,
    parts: Whole,
) -> tuple[Forward, Tensor]:
    """One pass with exponents measured from `anchor`; also returns the sum, to see whether it overflowed."""
    total, pull = passes.accumulate(x, head, labels, anchor, tiles, workspace, want_pull=want_direction)
    parts.add_up(total)
    excess = target - anchor  # 0 around the target; NaN where the row is not finite, which must stay visible
    everything = total + excess.exp()
    others = total + torch.expm1(excess)
    logps = excess - torch.log1p(others)
    direction = None
    if pull is not None:
        direction = parts.directions(head, labels, slope, total / everything, pull.div_(everything[:, None]))
    return Forward(logps, passes.log_sum_exp(anchor, others), direction), total


def largest_logits(x: Tensor, head: Head, workspace: int) -> Tensor:
    """(N,) max_v z_v in the compute dtype."""
    largest = torch.full((x.shape[0],), -torch.inf, dtype=compute_dtype(x.dtype), device=x.device)
    tiles = TorchTiles()
    operand = tiles.operand(x)
    for columns, part, scratch in vocabulary_chunks(x, head, tiles, workspace):
        shape = (len(x), columns.stop - columns.start)
        logits, _ = tiles.logits(operand, part, scratch[: shape[0] * shape[1]].view(shape))
        largest = torch.maximum(largest, logits.amax(1))
    return largest
