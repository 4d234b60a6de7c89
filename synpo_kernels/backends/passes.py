"""The passes over the vocabulary that the backends share; a backend supplies the tile.

Every exponent is anchored at the target's own logit z_y, so vocabulary chunks are independent and add up:

    P̂[t, v] = exp(z[t, v] - z_y[t]) for v ≠ y_t, 0 at v = y_t          one chunk (N, Vc) at a time
    s_t     = Σ_v P̂[t, v]               logp_t = -log1p(s_t)            exact where p is close to 1
    E'_t    = Σ_v P̂[t, v] c[t, v] W_v   U_t = (s_t c_y W_y - E'_t) / (1 + s_t) = ∂logp_t/∂x_t

with c = ∂z/∂(x Wᵀ). The same tile, anchored at the log-sum-exp, gives softmax(z) - onehot(y), from which `gradients`
builds everything a trained head needs.

Layout: vocabulary chunks outside, row blocks inside, so a chunk of W is prepared once and its gradient is finished in
one place. No more than one slice of the logits exists at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..head import Head, compute_dtype

OVERFLOW = 1e26  # about e⁶⁰: a row whose exponential sum passes this is computed again around its largest logit
SLICE_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}  # the slice of the logits that exists at any moment
LOW_SLICE_BYTES = 2 << 20  # the same where memory comes first
LOW_ROW_BYTES = 12 << 20  # and what is held there of a block of rows
MAX_ROWS = 8192  # rows of a slice; more rows are taken in blocks


class Tiles(Protocol):
    """What a backend brings to the passes."""

    @property
    def low(self) -> bool:
        """Whether memory comes first."""

    def operand(self, matrix: Tensor) -> Tensor:
        """x or a chunk of W in the format the products are taken in."""

    def slice_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Format in which a slice is kept, for inputs of `dtype`."""

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
        """Write c/logit_scale · exp(z - anchor) of a slice into `out`; return the row sums of exp(z - anchor).

        Args:
            x: (n, D) operand. part: the chunk's columns of the head, weight (w, D) as operand. labels: (n,) int64
                counted from the chunk's first column, so most lie outside it. anchor: (n,).
            at_target: (n,) stands in the label's column in place of the exponential, times the same slope; None: 0.
            keep: whether `out` is wanted. out: (n, w), free to work in either way.
            first_row: number of x's first row among all rows, for tiles that know how many rows are wanted.

        Returns:
            (n,) in the compute dtype, the label's column left out; undefined at rows that are not wanted, as `out` is.
        """

    def add_product(self, total: Tensor, slice_: Tensor, b: Tensor, first_row: int) -> None:
        """total (n, D) += slice_ (n, w) @ b (w, D), in the compute dtype."""

    def add_transposed_product(self, total: Tensor, slice_: Tensor, b: Tensor, first_row: int) -> None:
        """total (w, D) += slice_ᵀ (w, n) @ b (n, D), in the compute dtype."""


@dataclass(frozen=True)
class Forward:
    """What a pass over the vocabulary yields."""

    logps: Tensor  # (N,) log-probability of each label
    normalizer: Tensor  # (N,) log Σ_v exp(z_v)
    direction: Tensor | None  # (N, D) U_t = ∂logp_t/∂x_t in the dtype of x; None when it was not asked for


@dataclass(frozen=True)
class Gradients:
    """Gradients of a scalar with upstream coefficients g_t = ∂L/∂logp_t; None where not needed."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)


def cut(total: int, step: int) -> list[slice]:
    """Consecutive slices of at most `step` that cover `total`."""
    return [slice(first, min(first + step, total)) for first in range(0, total, step)]


def low_rows(x: Tensor) -> int:
    """Rows to take at a time where memory comes first.

    At most three numbers in the compute dtype are held for each of x: x gathered and widened, and a sum or rows of W.
    """
    rows = LOW_ROW_BYTES // max(1, 3 * x.shape[-1] * compute_dtype(x.dtype).itemsize)
    return max(1, rows - rows % 64, rows % 64)


def vocabulary_chunks(
    x: Tensor, head: Head, tiles: Tiles, *, sliced: bool = True, summed: bool = False
) -> Iterator[tuple[slice, Head, Tensor]]:
    """Yield (columns, the head's chunk as operand, scratch for one slice, if it is to be `sliced`).

    The slice of the logits, and the chunk of W where the operand is a widened copy or its gradient is `summed`, each stay
    within `SLICE_BYTES` (or `LOW_SLICE_BYTES`) in the format of a slice.
    """
    kept = tiles.slice_dtype(x.dtype)
    rows = min(x.shape[0], MAX_ROWS)
    widest = rows if kept == head.weight.dtype and not summed else max(rows, head.weight.shape[1])
    allowed = LOW_SLICE_BYTES if tiles.low else SLICE_BYTES.get(x.device.type, SLICE_BYTES["cpu"])
    budget = allowed // kept.itemsize
    width = max(1, budget // max(1, widest))
    width = min(head.weight.shape[0], max(width - width % 256, width % 256))  # whole tiles, unless a tile is too wide
    scratch = torch.empty(rows * width if sliced else 0, dtype=kept, device=x.device)
    for columns in cut(head.weight.shape[0], width):
        part = head.columns(columns)
        yield columns, replace(part, weight=tiles.operand(part.weight)), scratch


def target_logits(x: Tensor, head: Head, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """(z_y, c_y / logit_scale) of each row's own label, (N,) each in the compute dtype; the second None without softcap."""
    raw = head.weight.index_select(0, labels).to(compute_dtype(x.dtype)).mul_(x).sum(1)
    if head.bias is not None:
        raw.add_(head.bias.index_select(0, labels))
    return head.cap(raw)


def accumulate(
    x: Tensor,
    head: Head,
    labels: Tensor,
    anchor: Tensor,
    tiles: Tiles,
    *,
    want_pull: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sweep the vocabulary once around `anchor`.

    Returns:
        total: (N,) Σ_v≠y exp(z_v - anchor); pull: (N, D) Σ_v≠y exp(z_v - anchor) · c_v/logit_scale · W_v, if wanted.
        Both in the compute dtype.
    """
    total = torch.zeros_like(anchor)
    pull = torch.zeros(x.shape, dtype=total.dtype, device=x.device) if want_pull else None
    operand = tiles.operand(x)
    for columns, part, scratch in vocabulary_chunks(x, head, tiles):
        for rows in cut(x.shape[0], MAX_ROWS):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            weights = scratch[: shape[0] * shape[1]].view(shape)
            near = labels[rows] - columns.start
            total[rows] += tiles(operand[rows], part, near, anchor[rows], None, want_pull, weights, rows.start)
            if pull is not None:
                tiles.add_product(pull[rows], weights.to(part.weight.dtype), part.weight, rows.start)
    return total, pull


def fill(x: Tensor, head: Head, labels: Tensor, anchor: Tensor, tiles: Tiles, out: Tensor) -> Tensor:
    """Write c/logit_scale · exp(z - anchor) of all vocabulary into out (N, V), 0 at the label; return its row sums (N,)."""
    total = torch.zeros_like(anchor)
    operand = tiles.operand(x)
    for columns, part, _ in vocabulary_chunks(x, head, tiles, sliced=False):
        total += tiles(operand, part, labels - columns.start, anchor, None, True, out[:, columns], 0)
    return total


def directions(head: Head, labels: Tensor, slope: Tensor | None, others: Tensor, pull: Tensor) -> Tensor:
    """U_t = logit_scale · ((1 - p_y) c_y W_y - Σ_v≠y p_v c_v W_v), (N, D) in the dtype of W.

    Args:
        others: (N,) the probability 1 - p_y of everything but the label. pull: (N, D) the sum over v ≠ y, overwritten.
    """
    coefficient = others if slope is None else others * slope
    pull.addcmul_(head.weight.index_select(0, labels), coefficient[:, None], value=-1)  # -U, before its scale
    return torch.mul(pull, -head.logit_scale, out=torch.empty_like(pull, dtype=head.weight.dtype))


def gradients(
    x: Tensor,
    head: Head,
    labels: Tensor,
    forward: Forward,
    upstream: Tensor,
    tiles: Tiles,
    *,
    want: tuple[bool, bool, bool],
    magnify: float = 1.0,
    first_column: int = 0,
) -> Gradients:
    """Gradients through a trained head by recomputing each chunk around the known log-sum-exp.

    R = c (softmax(z) - onehot(y)) is built without g, which enters as a row factor of the fp32 products, so that a
    tiny coefficient does not flush R in half precision:

        ∂L/∂x = -g ⊙ (R W)      ∂L/∂W = -max|g| · Rᵀ (g x / max|g|)      ∂L/∂b = -gᵀ R

    Args:
        upstream: (N,) g_t. want: whether the gradients of (hidden, weight, bias) are needed.
        magnify: power of two by which R is held larger in the slice (fp16 needs it).
        first_column: the columns of W before it are frozen: ∂L/∂W is (V, D - first_column), and costs that much less.

    Each chunk of ∂L/∂W is accumulated in the compute dtype over all rows and rounded once.
    """
    precise = compute_dtype(x.dtype)
    want_hidden, want_weight, want_bias = want
    g = upstream.to(precise)
    largest = g.abs().amax() if g.numel() else g.sum()
    unit = g / torch.where(largest > 0, largest, torch.ones_like(largest))
    anchor = forward.normalizer - math.log(magnify)
    at_target = torch.expm1(forward.logps) * magnify
    d_hidden = torch.zeros(x.shape, dtype=precise, device=x.device) if want_hidden else None
    trained = x[:, first_column:]
    d_weight = head.weight.new_empty(len(head.weight), trained.shape[1]) if want_weight else None
    d_bias = torch.empty_like(head.weight[:, 0], memory_format=torch.contiguous_format) if want_bias else None
    operand = tiles.operand(x)
    weighted = (trained * unit[:, None]).to(operand.dtype) if want_weight else operand
    for columns, part, scratch in vocabulary_chunks(x, head, tiles, summed=want_weight):
        width = columns.stop - columns.start
        chunk_weight = torch.zeros(width, trained.shape[1], dtype=precise, device=x.device) if want_weight else None
        chunk_bias = torch.zeros(width, dtype=precise, device=x.device)
        for rows in cut(x.shape[0], MAX_ROWS):
            n = rows.stop - rows.start
            residual = scratch[: n * width].view(n, width)
            near = labels[rows] - columns.start
            tiles(operand[rows], part, near, anchor[rows], at_target[rows], True, residual, rows.start)
            residual = residual.to(part.weight.dtype)
            if d_hidden is not None:
                tiles.add_product(d_hidden[rows], residual, part.weight, rows.start)
            if chunk_weight is not None:
                tiles.add_transposed_product(chunk_weight, residual, weighted[rows], rows.start)
            if want_bias:
                factors = unit[rows, None].to(residual.dtype)
                tiles.add_transposed_product(chunk_bias[:, None], residual, factors, rows.start)
        factor = -largest * (head.logit_scale / magnify)
        if d_weight is not None and chunk_weight is not None:
            d_weight[columns] = chunk_weight.mul_(factor)
        if d_bias is not None:
            d_bias[columns] = chunk_bias.mul_(factor)
    if d_hidden is not None:
        d_hidden = d_hidden.mul_(g[:, None] * (-head.logit_scale / magnify)).to(x.dtype)
    return Gradients(d_hidden, d_weight, d_bias)
