"""The passes over the vocabulary that the backends share; a backend supplies the tile.

Every exponent is anchored at the target's own logit z_y, so vocabulary chunks are independent and add up:

    P̂[t, v] = exp(z[t, v] - z_y[t]) for v ≠ y_t, 0 at v = y_t          a slice (R, Vc) at a time
    s_t     = Σ_v P̂[t, v]               logp_t = -log1p(s_t)            exact where p is close to 1
    E'_t    = Σ_v P̂[t, v] c[t, v] W_v   U_t = (s_t c_y W_y - E'_t) / (1 + s_t) = ∂logp_t/∂x_t

with c = ∂z/∂(x Wᵀ). The same tile, anchored at the log-sum-exp, gives softmax(z) - onehot(y), from which `gradients`
builds everything a trained head needs. Logits of a hundred leave fp32 four digits fewer than their exponentials have, so the
log-sum-exp is known to float64: what rounding takes from the anchor comes back as a factor of the row.

One number sizes it all: a workspace in bytes, for the slice, the sum E' in the compute dtype and what else a block of rows
needs at a time. Exponentials below `LEAST` are 0 before a product sees them: they, or their products, would be denormal, which
costs some CPUs a hundred cycles each, and 2¹⁸ of them change a sum by less than 2⁻⁸².
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..head import Head, compute_dtype

OVERFLOW = 1e26  # about e⁶⁰: a row whose exponential sum passes this is computed again around its largest logit
LEAST = 2.0**-100  # exponentials below are 0
WORKSPACE = {"cpu": 32 << 20, "cuda": 128 << 20}  # bytes, where nobody asks for another
LOW_WORKSPACE = 16 << 20  # where memory comes first
MIN_COLUMNS = 256  # of a slice, whatever the workspace: narrower ones are all overhead


def workspace_of(device: torch.device, workspace: int | None) -> int:
    """The workspace in bytes, for this kind of device where it is None."""
    return WORKSPACE.get(device.type, WORKSPACE["cpu"]) if workspace is None else workspace


class Tiles(Protocol):
    """What a backend brings to the passes."""

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
    ) -> Tensor:
        """Write c/logit_scale · exp(z - anchor) of a slice into `out`; return the row sums of exp(z - anchor).

        Args:
            x: (n, D) operand. part: the chunk's columns of the head, weight (w, D) as operand. labels: (n,) int64
                counted from the chunk's first column, so most lie outside it. anchor: (n,).
            at_target: (n,) stands in the label's column in place of the exponential, times the same slope; None: 0.
            keep: whether `out` is wanted. out: (n, w), free to work in either way.

        Returns:
            (n,) in the compute dtype, the label's column left out; undefined at rows that are not wanted, as `out` is.
        """

    def add_product(self, total: Tensor, slice_: Tensor, b: Tensor) -> None:
        """total (n, D) += slice_ (n, w) @ b (w, D), in the compute dtype."""

    def add_transposed_product(self, total: Tensor, slice_: Tensor, b: Tensor, *, fresh: bool = False) -> None:
        """total (w, D) += slice_ᵀ (w, n) @ b (n, D), summed in the compute dtype; fresh: overwritten, as `add_matmul`."""


@dataclass(frozen=True)
class Forward:
    """What a pass over the vocabulary yields."""

    logps: Tensor  # (N,) log-probability of each label
    normalizer: Tensor  # (N,) log Σ_v exp(z_v) as `log_sum_exp` gives it
    direction: Tensor | None  # (N, D) U_t = ∂logp_t/∂x_t in the dtype of x; None when it was not asked for


@dataclass(frozen=True)
class Gradients:
    """Gradients of a scalar with upstream coefficients g_t = ∂L/∂logp_t; None where not needed."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)


def widest(device: torch.device) -> torch.dtype:
    """float64, but float32 on Apple's GPUs, which have no wider format."""
    return torch.float32 if device.type == "mps" else torch.float64


def log_sum_exp(anchor: Tensor, others: Tensor) -> Tensor:
    """anchor + log(1 + others) (N,) in the widest format."""
    wide = widest(anchor.device)
    return anchor.to(wide) + torch.log1p(others.to(wide))


def rounded(normalizer: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An anchor a (N,) of exponents in `dtype` at the log-sum-exp, and exp(a - log-sum-exp), by which they are too small."""
    anchor = normalizer.to(dtype)
    return anchor, (anchor - normalizer).exp().to(dtype)


def cut(total: int, step: int) -> list[slice]:
    """Consecutive slices of at most `step` that cover `total`."""
    return [slice(first, min(first + step, total)) for first in range(0, total, step)]


def block_rows(x: Tensor, workspace: int) -> int:
    """Rows of x (N, D) to take at a time: two numbers in the compute dtype for each of x (x widened or gathered, and a sum)
    stay within half the workspace. The same on all processes that share a head."""
    rows = workspace // 2 // max(1, 2 * x.shape[-1] * compute_dtype(x.dtype).itemsize)
    return max(1, rows - rows % 64, rows % 64)


def blocks(labels: Tensor, ignore_index: int | None, step: int) -> Iterator[slice | Tensor]:
    """The rows that count, `step` at a time. Where some may be ignored the host learns their number."""
    if ignore_index is None:
        yield from cut(len(labels), step)
    else:
        yield from (rows for rows in (labels != ignore_index).nonzero().squeeze(1).split(step) if len(rows))


def in_order(x: Tensor, rows: Tensor | slice, count: Tensor | None) -> Tensor:
    """x (N, D) in the order of `choice.Partition`, 0 past a count that the host does not know: whole blocks of rows are
    multiplied, in which what is not a number would reach the others, times 0."""
    taken = x[rows]
    if count is None:
        return taken
    return taken.masked_fill_((torch.arange(len(taken), device=x.device) >= count)[:, None], 0.0)


def vocabulary_chunks(
    x: Tensor, head: Head, tiles: Tiles, workspace: int, *, sliced: bool = True, summed: bool = False
) -> Iterator[tuple[slice, Head, Tensor]]:
    """Yield (columns, the head's chunk as operand, scratch for one slice of all rows of x, if it is to be `sliced`).

    The slice of the logits, and the chunk of W where the operand is a widened copy or its gradient is `summed`, stay together
    within half the workspace.
    """
    kept, vocabulary = tiles.slice_dtype(x.dtype), len(head.weight)
    columns_of_w = (
        0 if tiles.operand(head.weight[:0]).dtype == head.weight.dtype and not summed else head.weight.shape[1]
    )
    width = workspace // 2 // (kept.itemsize * max(1, (len(x) if sliced else 0) + columns_of_w))
    width = max(1, min(vocabulary, max(width - width % MIN_COLUMNS, min(width, MIN_COLUMNS))))  # a shard may have none
    scratch = torch.empty(len(x) * width if sliced else 0, dtype=kept, device=x.device)
    for columns in cut(vocabulary, width):
        part = head.columns(columns)
        yield columns, replace(part, weight=tiles.operand(part.weight)), scratch


def target_logits(x: Tensor, head: Head, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """(z_y, c_y / logit_scale) of each row's own label, (N,) each in the compute dtype; the second None without softcap."""
    raw = head.weight.index_select(0, labels).to(compute_dtype(x.dtype)).mul_(x).sum(1)
    if head.bias is not None:
        raw.add_(head.bias.index_select(0, labels))
    return head.cap(raw)


def accumulate(
    x: Tensor, head: Head, labels: Tensor, anchor: Tensor, tiles: Tiles, workspace: int, *, want_pull: bool
) -> tuple[Tensor, Tensor | None]:
    """Sweep the vocabulary once around `anchor`.

    Returns:
        total: (N,) Σ_v≠y exp(z_v - anchor); pull: (N, D) Σ_v≠y exp(z_v - anchor) · c_v/logit_scale · W_v, if wanted.
        Both in the compute dtype.
    """
    total = torch.zeros_like(anchor)
    pull = torch.zeros(x.shape, dtype=total.dtype, device=x.device) if want_pull else None
    operand = tiles.operand(x)
    for columns, part, scratch in vocabulary_chunks(x, head, tiles, workspace):
        shape = (len(x), columns.stop - columns.start)
        weights = scratch[: shape[0] * shape[1]].view(shape)
        total += tiles(operand, part, labels - columns.start, anchor, None, want_pull, weights)
        if pull is not None:
            tiles.add_product(pull, weights.to(part.weight.dtype), part.weight)
    return total, pull


def fill(x: Tensor, head: Head, labels: Tensor, anchor: Tensor, tiles: Tiles, workspace: int, out: Tensor) -> Tensor:
    """Write c/logit_scale · exp(z - anchor) of all vocabulary into out (N, V), 0 at the label; return its row sums (N,)."""
    total = torch.zeros_like(anchor)
    operand = tiles.operand(x)
    for columns, part, _ in vocabulary_chunks(x, head, tiles, workspace, sliced=False):
        total += tiles(operand, part, labels - columns.start, anchor, None, True, out[:, columns])
    return total


class Whole:
    """Where the parts of a head are: all here. `ops.parallel.Shards` knows of those that other processes hold."""

    def target_logits(self, x: Tensor, head: Head, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """As the function of this name."""
        return target_logits(x, head, labels)

    def add_up(self, sums: Tensor) -> None:
        """Add those of the other parts, in place."""

    def take_largest(self, values: Tensor) -> None:
        """The largest of all parts, in place."""

    def directions(self, head: Head, labels: Tensor, slope: Tensor | None, others: Tensor, pull: Tensor) -> Tensor:
        """U_t = logit_scale · ((1 - p_y) c_y W_y - Σ_v≠y p_v c_v W_v), (N, D) in the dtype of W.

        Args:
            others: (N,) the probability 1 - p_y of everything but the label. pull: (N, D) the sum over v ≠ y, overwritten.
        """
        coefficient = others if slope is None else others * slope
        pull.addcmul_(head.weight.index_select(0, labels), coefficient[:, None], value=-1)  # -U, before its scale
        return torch.mul(pull, -head.logit_scale, out=torch.empty_like(pull, dtype=head.weight.dtype))


WHOLE = Whole()


def gradients(
    x: Tensor,
    head: Head,
    labels: Tensor,
    forward: Forward,
    upstream: Tensor,
    tiles: Tiles,
    workspace: int,
    *,
    want: Sequence[bool],
    magnify: float = 1.0,
    first_column: int = 0,
) -> Gradients:
    """Gradients through a trained head by recomputing each chunk around the known log-sum-exp.

    R = c (softmax(z) - onehot(y)) is built without g, which enters as a row factor of the products:

        ∂L/∂x = -g ⊙ (R W)      ∂L/∂W = -Rᵀ (g x)      ∂L/∂b = -gᵀ R

    In fp16, where a tiny g would flush, it enters as g / max|g|, and the fp32 sums are scaled back.

    Args:
        upstream: (N,) g_t. want: whether the gradients of (hidden, weight, bias) are needed.
        magnify: power of two by which R is held larger in the slice (fp16 needs it).
        first_column: the columns of W before it are frozen: ∂L/∂W is (V, D - first_column), and costs that much less.

    Each chunk of ∂L/∂W is accumulated in the compute dtype over all rows and rounded once.
    """
    precise = compute_dtype(x.dtype)
    want_hidden, want_weight, want_bias = want
    g = upstream.to(precise)
    scale = -head.logit_scale / magnify
    anchor, share = rounded(forward.normalizer, precise)
    anchor = anchor - math.log(magnify)  # in place it would be the caller's log-sum-exp
    at_target = torch.expm1(forward.logps) * magnify / share
    g = g * share
    unit, factor = g * scale, None
    if x.dtype == torch.float16:
        largest = g.abs().amax() if g.numel() else g.sum()
        unit, factor = g / torch.where(largest > 0, largest, torch.ones_like(largest)), largest * scale
    d_hidden = torch.zeros(x.shape, dtype=precise, device=x.device) if want_hidden else None
    trained = x[:, first_column:]
    d_weight = head.weight.new_empty(len(head.weight), trained.shape[1]) if want_weight else None
    d_bias = torch.empty_like(head.weight[:, 0], memory_format=torch.contiguous_format) if want_bias else None
    operand = tiles.operand(x)
    weighted = (trained * unit[:, None]).to(operand.dtype) if want_weight else operand
    direct = factor is None and x.is_cuda and operand.dtype == x.dtype  # products round their sums themselves
    for columns, part, scratch in vocabulary_chunks(x, head, tiles, workspace, summed=want_weight and not direct):
        shape = (len(x), columns.stop - columns.start)
        residual = scratch[: shape[0] * shape[1]].view(shape)
        tiles(operand, part, labels - columns.start, anchor, at_target, True, residual)
        residual = residual.to(part.weight.dtype)
        if d_hidden is not None:
            tiles.add_product(d_hidden, residual, part.weight)
        if d_weight is not None:
            of_weight = d_weight[columns]
            chunk = of_weight if direct else of_weight.new_zeros(of_weight.shape, dtype=precise)
            tiles.add_transposed_product(chunk, residual, weighted, fresh=direct)
            if not direct:
                of_weight.copy_(chunk if factor is None else chunk.mul_(factor))
        if d_bias is not None:
            chunk = torch.zeros(shape[1], 1, dtype=precise, device=x.device)
            tiles.add_transposed_product(chunk, residual, unit[:, None].to(residual.dtype))
            d_bias[columns] = chunk[:, 0] if factor is None else chunk[:, 0].mul_(factor)
    if d_hidden is not None:
        d_hidden = d_hidden.mul_(g[:, None] * scale).to(x.dtype)
    return Gradients(d_hidden, d_weight, d_bias)
