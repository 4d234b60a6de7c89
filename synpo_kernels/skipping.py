"""Leaving out of the gradient's product the vocabulary columns that no row of a block needs, with a certificate.

The gradient of a row pulls along E'_t = Σ_v P̂[t, v] c[t, v] W_v (see `passes`). In one block of rows and one chunk of the
vocabulary, let K be the columns kept and μ any vector. Instead of the whole sum, take

    E'_t ≈ Σ_{v ∈ K} P̂ c W_v + d_t μ,        d_t = Σ_{v ∉ K} P̂[t, v] c[t, v]

The error is Σ_{v ∉ K} P̂ c (W_v - μ), at most d_t · R in norm with R = max_v ‖W_v - μ‖, by the triangle inequality. Over all
chunks j, and with U_t = logit_scale · (… - E'_t) / Z_t, where Z_t = Σ_v P̂[t, v] is the normaliser that the forward pass ends with,

    ‖error of U_t‖ ≤ bound_t = |logit_scale| · Σ_j d_tj R_j / Z_t                                                     (1)

a bound on what skipping adds to ∂logp_t/∂x_t; the rounding of any number format comes on top. μ is the mean of the chunk's
rows of W in their own format, so the vector that is added back is the very vector that the bound speaks of.

Budget. Z_t is not known before the last chunk, but what has been summed of it is a lower bound L_t, which over-estimates
probabilities. A chunk may drop what keeps Σ_j d_tj ≤ τ · (columns seen / V) · L_t true for every row; what one chunk leaves
unspent the next may spend. As L_t ≤ Z_t, the mass dropped of a row ends at τ or less.

Choice. Columns are ranked by their mean probability over the rows. Of a fixed menu of sizes the smallest is kept that every
row can afford: one product of the slice with 0/1 columns gives the mass each size would drop, so that d_t is summed from the
numbers left out. A size above `WORTH` of the chunk is not on the menu: the chunk is then multiplied whole. Nothing here is
read by the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .head import Head, compute_dtype, matmul

if TYPE_CHECKING:
    from .passes import Tiles

ROWS = 512  # rows of a block: fewer share more columns, more make better products
WORTH = 0.7  # a kept share of a chunk above this is not worth gathering
SIZES = 32  # entries of the menu, each 2^(-1/4) of the one before: from WORTH down to 0.3 %
SLACK = 2.0**-9  # by which the certificate is widened: sums of fp32 (or TF32) numbers, and the radius


class Skipping:
    """State of one pass over the vocabulary for N rows: what was dropped so far and what it may have done."""

    def __init__(self, tolerance: float, head: Head, base: Tensor, count: Tensor | None = None) -> None:
        """tolerance: τ. base: (N,) the label's own share exp(z_y - anchor) of Z. count: rows that are wanted; None: all."""
        self.tolerance, self.head, self.base = tolerance, head, base
        self.count = base.new_full((), len(base), dtype=torch.int32) if count is None else count
        self.dropped = torch.zeros_like(base)  # (N,) Σ_j d_tj
        self.error = torch.zeros_like(base)  # (N,) Σ_j d_tj R_j
        self.kept = base.new_zeros((), dtype=torch.float64)  # rows × columns that were multiplied

    def add_product(
        self,
        tiles: Tiles,
        pull: Tensor,
        slice_: Tensor,
        part: Chunk,
        columns: slice,
        rows: slice,
        total: Tensor,
    ) -> None:
        """pull (n, D) += slice_ (n, w) @ W (w, D), dear columns exactly and the others as their mean.

        Args:
            total: (n,) Σ exp(z - anchor) over the columns up to and including these.
        """
        width = slice_.shape[1]
        lower = self.base[rows] + total
        seen = columns.stop / self.head.weight.shape[0]
        budget = self.tolerance * seen * lower - self.dropped[rows]
        rank, order = _ranks(tiles, slice_, lower, rows.start)
        menu = _menu(width, slice_.device)
        left_out = (rank[:, None] >= menu).to(slice_.dtype)
        masses = torch.zeros(slice_.shape[0], len(menu), dtype=pull.dtype, device=pull.device)
        tiles.add_product(masses, slice_, left_out, rows.start)
        affordable = ~(masses > budget[:, None]).any(0)
        kept, choice = menu.where(affordable, width).min(0)
        mass = masses.index_select(1, choice[None])[:, 0].where(kept < width, 0.0)
        tiles.add_kept_product(pull, slice_, part.weight, order, kept, rows.start)
        pull.addr_(mass, part.mean.to(pull.dtype))
        self.dropped[rows] += mass
        self.error[rows] += mass * part.radius
        self.kept += (self.count - rows.start).clamp(0, len(slice_)) * kept

    def share(self) -> Tensor:
        """() share of rows × columns that was multiplied."""
        return self.kept / (self.count.double() * self.head.weight.shape[0]).clamp(min=1.0)

    def bound(self, normalizer: Tensor) -> Tensor:
        """(N,) bound (1), for the normaliser Z (N,) that the pass ended with."""
        return self.error / normalizer * (abs(self.head.logit_scale) * (1.0 + SLACK))


class Chunk:
    """A chunk of W with the vector that stands for its dropped rows."""

    def __init__(self, weight: Tensor) -> None:
        """weight: (w, D) operand."""
        precise = compute_dtype(weight.dtype)
        self.weight = weight
        self.mean = weight.mean(0, dtype=precise).to(weight.dtype)  # μ (D,)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=precise).square_()
        along = matmul(weight, self.mean[:, None])[:, 0]
        length = self.mean.to(precise).square().sum()
        # ‖W_v‖² - 2 W_v·μ + ‖μ‖², and what cancellation may have taken from it
        lost = 8 * weight.shape[1] * torch.finfo(precise).eps * squares.amax()
        self.radius = (squares - 2 * along + length).amax().clamp(min=0).add(lost).sqrt()  # R ()


def _ranks(tiles: Tiles, slice_: Tensor, lower: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """(rank (w,), order (w,)): place of every column by its mean probability, and the columns in that order."""
    width = slice_.shape[1]
    scores = torch.zeros(width, 1, dtype=lower.dtype, device=lower.device)
    tiles.add_transposed_product(scores, slice_, lower.reciprocal().to(slice_.dtype)[:, None], first_row)
    order = scores[:, 0].argsort(descending=True, stable=True)
    place = torch.arange(width, device=order.device)
    return torch.empty_like(order).scatter_(0, order, place), order


def _menu(width: int, device: torch.device) -> Tensor:
    """(SIZES,) int64 numbers of columns that may be kept, descending; made on the device."""
    powers = torch.arange(SIZES, device=device, dtype=torch.float64).mul_(-0.25).exp2_()
    return powers.mul_(WORTH * width).to(torch.int64)
