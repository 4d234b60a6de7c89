"""Leaving out of the gradient's product the columns of the vocabulary that a row does not need, with a certificate.

The gradient of a row pulls along E'_t = Σ_v P̂[t, v] c[t, v] W_v (see `passes`). In one chunk of the vocabulary let K be the
columns kept for row t and μ any vector. Instead of the whole sum, take

    E'_t ≈ Σ_{v ∈ K} P̂ c W_v + d_t μ,        d_t = Σ_{v ∉ K} P̂[t, v] c[t, v]

The error is Σ_{v ∉ K} P̂ c (W_v - μ), at most d_t · R in norm with R = max_v ‖W_v - μ‖, by the triangle inequality. Over all
chunks j, and with U_t = logit_scale · (… - E'_t) / Z_t, where Z_t = Σ_v P̂[t, v] is what the forward pass ends with,

    ‖error of U_t‖ ≤ bound_t = |logit_scale| · Σ_j d_tj R_j / Z_t                                                     (1)

a bound on what skipping adds to ∂logp_t/∂x_t; the rounding of any number format comes on top. μ is the mean of the chunk's
rows of W in their own format, so the vector that is added back is the very vector that the bound speaks of.

Budget. Z_t is not known before the last chunk, but what has been summed of it is a lower bound L_t, which over-estimates
probabilities. A chunk may drop what keeps Σ_j d_tj ≤ τ · (columns seen / V) · L_t true; what one chunk leaves unspent the
next may spend. As L_t ≤ Z_t, the mass dropped of a row ends at τ or less.

Choice. The columns of a chunk are ranked by their mean probability over the rows. One product of the slice with 0/1 columns
gives every row the mass that each of a fixed menu of sizes would drop, and so its own least size. Rows are sorted by it, and
each `GROUP` of them multiplies the first columns, as many as its most demanding row needs: a staircase. (Rows of like demand
must meet: one flat softmax in a block of peaked ones has all of them keep what it alone needs.) A size above `WORTH` of the
chunk is not on the menu: such a group is multiplied whole. Nothing here is read by the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .head import Head, compute_dtype, matmul

if TYPE_CHECKING:
    from .passes import Tiles

GROUP = 128  # rows that keep the same columns
WORTH = 0.7  # a kept share of a chunk above this is not worth gathering
SIZES = 32  # entries of the menu: the whole chunk, then WORTH of it, each 2^(-1/4) of the one before, down to 0.4 %
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
        self, tiles: Tiles, pull: Tensor, slice_: Tensor, part: Chunk, seen: int, rows: slice, total: Tensor
    ) -> None:
        """pull (n, D) += slice_ (n, w) @ W (w, D), dear columns exactly and the others as their mean.

        Args:
            seen: columns of the head up to and including these. total: (n,) Σ exp(z - anchor) over them.
        """
        (n, width), device = slice_.shape, slice_.device
        lower = self.base[rows] + total
        budget = self.tolerance * (seen / self.head.weight.shape[0]) * lower - self.dropped[rows]
        scores = torch.zeros(width, 1, dtype=lower.dtype, device=device)
        tiles.add_transposed_product(scores, slice_, lower.reciprocal().to(slice_.dtype)[:, None], rows.start)
        columns = scores[:, 0].argsort(descending=True, stable=True)
        menu = _menu(width, device)
        rank = torch.empty_like(columns).scatter_(0, columns, torch.arange(width, device=device))
        left_out = (rank[:, None] >= menu).to(slice_.dtype)
        masses = torch.zeros(n, SIZES, dtype=pull.dtype, device=device)  # that each size drops of each row
        tiles.add_product(masses, slice_, left_out, rows.start)
        affordable = ~(masses > budget[:, None])
        affordable[:, 0] = True
        place = torch.arange(n, device=device)
        wanted = place < self.count - rows.start
        choice = (affordable.cumprod(1).sum(1) - 1).where(wanted, SIZES)  # (n,) entry of the menu
        order = choice.argsort(stable=True)  # the most demanding rows first, unwanted ones last
        choice = choice[order][place - place % GROUP].clamp(max=SIZES - 1)  # that of the first row of its group
        kept = menu[choice]
        tiles.add_kept_product(pull, slice_, part.weight, columns, order, kept, rows.start)
        mass = torch.empty_like(total).scatter_(0, order, masses[order].gather(1, choice[:, None])[:, 0])
        pull.addr_(mass, part.mean.to(pull.dtype))
        self.dropped[rows] += mass
        self.error[rows] += mass * part.radius
        self.kept += kept.where(wanted[order], 0).sum()

    def bound(self, normalizer: Tensor) -> Tensor:
        """(N,) bound (1), for the normaliser Z (N,) that the pass ended with."""
        return self.error / normalizer * (abs(self.head.logit_scale) * (1.0 + SLACK))

    def share(self) -> Tensor:
        """() share of rows × columns that was multiplied."""
        return self.kept / (self.count.double() * self.head.weight.shape[0]).clamp(min=1.0)


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


def _menu(width: int, device: torch.device) -> Tensor:
    """(SIZES,) int64 numbers of columns that may be kept, descending; made on the device."""
    powers = torch.arange(SIZES, device=device, dtype=torch.float64).sub_(1).mul_(-0.25).exp2_()
    menu = powers.mul_(WORTH * width).to(torch.int64)
    menu[:1] = width  # an element would be copied from the host, which waits; a slice is filled
    return menu
