"""SynPO with a trained head, its coefficients known before the gradients are formed: three products and no recomputation.

A loss of per-token log-probabilities has to finish its forward pass before autograd hands back g_t = ∂L/∂logp_t, by which
time the logits are gone; the streaming path (`logprobs.trained`) computes them again. SynPO's g_t depends on one pair alone (and,
for the mean, on how many pairs count, which the labels tell). So whole pairs are taken together, as many as fit the
workspace, and for their n rows:

    P̂ (n, V) of all vocabulary      one product of N·V·D        kept, one number a logit
    logp → the pairs' loss → g      closed form, `pair_loss`
    ∂L/∂x = -g ⊙ (R W)              one product                 R = c (softmax - onehot), a row factor away from P̂
    ∂L/∂W = -Rᵀ (g x)               one product, accumulated in the compute dtype over all groups, rounded once

A pair that does not fit streams: its logits are computed twice, four products. The results are those of an upstream
gradient of 1; backward multiplies them by the one it gets, and may run any number of times. What is held between the two is
the size of the gradients.

Exponents are anchored at the target's logit. Where a row of the group overflows, the group's P̂ is computed again around its
log-sum-exp; on the Triton path by kernels that return at once where nothing overflowed, so that the host need not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.choice import Backend, choose
from ..backends.passes import in_order, target_logits, vocabulary_chunks, workspace_of
from ..checks import inside_op
from ..head import Head, compute_dtype
from ..losses import sum_by_sequence
from . import logprobs, pair_loss
from .opaque import op
from .scaling import put_rows, scaled

PairLoss = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # what `pair_loss.pairs` gives

# What P̂ of a group of pairs may take. The gradient of W in the compute dtype comes on top.
PAIR_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class Batch:
    """2B sequences, padded (S, T) or packed, as rows (N, ...)."""

    x: Tensor  # (N, D)
    labels: Tensor  # (N,)
    cu_seqlens: Tensor | None  # (2B + 1,), None: sequences of equal length
    sequences: int  # 2B

    def loss(self, logps: Tensor, *settings: Any) -> PairLoss:
        """`pair_loss.pairs` of logps (N,), g as long; settings: alpha, beta, ignore_index, reduction, backend."""
        shape = (self.sequences, -1) if self.cu_seqlens is None else (-1,)
        loss, g, *rest = pair_loss.pairs.run(logps.view(shape), self.labels.view(shape), self.cu_seqlens, *settings)
        fields, empty, nonfinite = rest
        return loss, g.view(-1), fields, empty, nonfinite

    def weight_of_a_pair(self, ignore_index: int | None) -> Tensor:
        """() one over the pairs that count, in the compute dtype; the labels tell, on their device."""
        dtype, (labels, bounds) = compute_dtype(self.x.dtype), (self.labels, self.cu_seqlens)
        counted = torch.ones_like(labels, dtype=dtype) if ignore_index is None else (labels != ignore_index).to(dtype)
        tokens = sum_by_sequence(counted.view(self.sequences, -1) if bounds is None else counted, bounds).view(2, -1)
        return (tokens > 0).all(0).sum().clamp(min=1).to(dtype).reciprocal()

    def bounds(self) -> list[int]:
        """First row of every sequence, and N. Of packed rows on a CUDA device the host reads them, once a step."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.tolist()
        length = len(self.x) // self.sequences
        return list(range(0, len(self.x) + 1, length)) if length else [0] * (self.sequences + 1)

    def groups(self, most_rows: int) -> Iterator[tuple[Batch, Tensor]]:
        """(some pairs as a batch of their own, their rows (n,)): consecutive ones of `most_rows` at most; a longer one alone."""
        pairs, row = self.sequences // 2, torch.arange(len(self.x), device=self.x.device)
        at = self.bounds()
        first = 0
        while first < pairs:
            last = first + 1
            while last < pairs and at[last + 1] - at[first] + at[pairs + last + 1] - at[pairs + first] <= most_rows:
                last += 1
            rows = torch.cat([row[at[first] : at[last]], row[at[pairs + first] : at[pairs + last]]])
            yield Batch(self.x[rows], self.labels[rows], self._bounds_of(first, last), 2 * (last - first)), rows
            first = last

    def _bounds_of(self, first: int, last: int) -> Tensor | None:
        """cu_seqlens of pairs first … last - 1, rows counted from the first of them."""
        if self.cu_seqlens is None:
            return None
        pairs = self.sequences // 2
        chosen = self.cu_seqlens[first : last + 1] - self.cu_seqlens[first]
        rejected = self.cu_seqlens[pairs + first : pairs + last + 1] - self.cu_seqlens[pairs + first]
        return torch.cat([chosen, chosen[-1] + rejected[1:]])


class Gradients:
    """Sums over the groups, those of the head in the compute dtype; None where not wanted.

    at_once: there is one group, and its ∂L/∂W goes straight into the head's format.
    """

    def __init__(self, x: Tensor, head: Head, want: Sequence[bool], at_once: bool) -> None:
        precise = compute_dtype(x.dtype)
        self.want, self.x, self.at_once = want, x, at_once
        self.hidden = torch.zeros_like(x) if want[0] else None
        self.weight: Tensor | None = None
        if want[1] and at_once:
            self.weight = torch.empty(head.weight.shape, dtype=x.dtype, device=x.device)
        elif want[1]:
            self.weight = torch.zeros(head.weight.shape, dtype=precise, device=x.device)
        self.bias = torch.zeros(len(head.weight), dtype=precise, device=x.device) if want[2] else None

    def finished(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtype of the inputs; one that is not wanted is empty."""
        sums = (self.hidden, self.weight, self.bias)
        d_x, d_weight, d_bias = (self.x.new_empty(0) if each is None else each.to(self.x.dtype) for each in sums)
        return d_x, d_weight, d_bias


def rows_at_once(x: Tensor, head: Head, backend: Backend, want_weight: bool) -> tuple[int, bool]:
    """(rows whose P̂ is held together, whether that is all of them with ∂L/∂W written once).

    All rows, where they need no more than a group of `PAIR_BYTES` and ∂L/∂W in fp32 would; 0 where the tiles hold fp16, which has
    not its range.
    """
    if backend.magnify(x.dtype) != 1.0:
        return 0, False
    allowed = PAIR_BYTES.get(x.device.type, PAIR_BYTES["cpu"])
    a_row = backend.tiles(None).slice_dtype(x.dtype).itemsize * len(head.weight)
    if backend.name == "triton" and want_weight and 0 < len(x) * a_row <= allowed + 4 * head.weight.numel():
        return len(x), True
    return allowed // a_row, False


@dataclass(frozen=True)
class Step:
    """What the groups of a batch have in common."""

    head: Head
    backend: Backend
    alpha: float
    beta: float
    ignore_index: int | None
    reduction: str  # of the pairs of a group
    unit: Tensor | None  # () weight of a group in the loss, None: 1
    workspace: int
    found: Gradients

    def loss(self, group: Batch, logps: Tensor) -> PairLoss:
        """`Batch.loss`, g with the weight of the group."""
        settings = (self.alpha, self.beta, self.ignore_index, self.reduction, self.backend.name)
        loss, g, *rest = group.loss(logps, *settings)
        fields, empty, nonfinite = rest
        return loss, g if self.unit is None else g * self.unit, fields, empty, nonfinite

    def run(self, group: Batch, at: Tensor | slice, most_rows: int) -> tuple[Tensor, PairLoss]:
        """Add the gradients of some pairs; log-probabilities (n,) and their loss. at: (n,) their rows in the batch."""
        return self._stream(group, at) if len(group.x) > most_rows else self._keep(group, at)

    def _keep(self, group: Batch, at: Tensor | slice) -> tuple[Tensor, PairLoss]:
        """Three products: P̂ of the whole group is held while g is found."""
        rows, count = self.backend.rows(group.labels, self.ignore_index)
        labels = group.labels if self.ignore_index is None else group.labels.where(group.labels != self.ignore_index, 0)
        labels = labels[rows]  # each can be looked up
        x, tiles, head = in_order(group.x, rows, count), self.backend.tiles(count), self.head
        stride = -(-len(head.weight) // 16) * 16  # whole rows for the copy engine
        held = torch.empty(len(x), stride, dtype=tiles.slice_dtype(x.dtype), device=x.device)[:, : len(head.weight)]
        options: dict[str, Any] = {"workspace": self.workspace, "count": count}
        in_turn, to_probability = self.backend.whole_rows(x, head, labels, held, **options)
        logps = in_turn
        if not isinstance(rows, slice):
            logps = in_turn.new_zeros(len(group.x))
            logps[rows] = in_turn
        slope = None if head.softcap is None else target_logits(x, head, labels)[1]
        at_label = torch.expm1(in_turn) / to_probability
        held.scatter_(1, labels[:, None], (at_label if slope is None else at_label * slope).to(held.dtype)[:, None])
        found = self.loss(group, logps)
        factor = found[1][rows] * to_probability * -head.logit_scale
        d_x = torch.zeros_like(x, dtype=logps.dtype) if self.found.hidden is not None else None
        operand = tiles.operand(x)
        weighted = torch.empty_like(operand)
        if self.found.weight is not None:
            put_rows(x, factor, weighted, slice(None), self.backend.name)
        for columns, part, _ in vocabulary_chunks(x, head, tiles, self.workspace, sliced=False):
            residual = held[:, columns].to(operand.dtype)
            if d_x is not None:
                tiles.add_product(d_x, residual, part.weight)
            if self.found.weight is not None:
                of_weight = self.found.weight[columns]
                tiles.add_transposed_product(of_weight, residual, weighted, fresh=self.found.at_once)
            if self.found.bias is not None:
                of_bias = self.found.bias[columns, None]
                tiles.add_transposed_product(of_bias, residual, factor[:, None].to(residual.dtype))
        if d_x is not None and self.found.hidden is not None:
            put_rows(d_x, factor, self.found.hidden, rows if isinstance(at, slice) else at[rows], self.backend.name)
        return logps, found

    def _stream(self, group: Batch, at: Tensor | slice) -> tuple[Tensor, PairLoss]:
        """Four products, a slice of the logits at a time; the head's share is rounded to its format before it is added."""
        arguments = (group.x, self.head, group.labels, self.ignore_index, self.backend.name)
        found = logprobs.forward(*arguments, want_direction=False, workspace=self.workspace)
        loss = self.loss(group, found.logps)
        passed = logprobs.gradients(*arguments, found, loss[1], want=self.found.want, workspace=self.workspace)
        if self.found.hidden is not None and passed.hidden is not None:
            self.found.hidden[at] = passed.hidden
        for total, part in ((self.found.weight, passed.weight), (self.found.bias, passed.bias)):
            if total is not None and part is not None:
                total += part
        return found.logps, loss


@op("synpo_trained")
def synpo_trained(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    sequences: int,
    alpha: float,
    beta: float,
    reduction: str,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int | None,
    backend: str,
    want: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (N, D), W (V, D), b (V,), labels (N,) of 2B sequences → loss, statistics, empty and nonfinite pairs as
    `pair_loss.pairs`, ∂loss/∂x, ∂loss/∂W, ∂loss/∂b.

    The loss is differentiable in x, W and b. Gradients that are not wanted are empty; a caller lets go of the others, as the
    backward pass may overwrite them.
    """
    batch, head = Batch(x, labels, cu_seqlens, sequences), Head(weight, bias, softcap, logit_scale)
    with inside_op(x):
        chosen = choose(backend, x)
        most_rows, at_once = rows_at_once(x, head, chosen, want[1])
        found = Gradients(x, head, want, at_once)
        # at 0 every row streams, and a pair alone would read W for its few rows
        together = len(x) <= most_rows or most_rows == 0
        unit = None if together or reduction == "sum" else batch.weight_of_a_pair(ignore_index)
        settings = (alpha, beta, ignore_index, reduction if together else "sum", unit)
        step = Step(head, chosen, *settings, workspace_of(x.device, None), found)
        if together:
            _, (loss, _, fields, empty, nonfinite) = step.run(batch, slice(None), most_rows)
        else:
            logps = x.new_zeros(len(x), dtype=compute_dtype(x.dtype))
            for group, at in batch.groups(most_rows):
                logps[at], _ = step.run(group, at, most_rows)
            loss, _, fields, empty, nonfinite = batch.loss(logps, alpha, beta, ignore_index, reduction, chosen.name)
    return loss, fields, empty, nonfinite, *found.finished()


@synpo_trained.register_fake
def _(x, weight, bias, labels, cu_seqlens, sequences, *options):  # type: ignore[no-untyped-def]
    loss, _, *statistics = pair_loss.results(x, sequences)
    shapes = zip(options[-1], (x.shape, weight.shape, weight.shape[:1]))
    return loss, *statistics, *(x.new_empty(shape if wanted else (0,)) for wanted, shape in shapes)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[4:])
    ctx.backend = inputs[-2]


@once_differentiable
def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = [None] * 14
    for i, gradient in enumerate(ctx.saved_tensors):
        if upstream is None or not ctx.needs_input_grad[i]:
            continue
        found[i] = scaled(gradient, upstream, ctx.backend)
    return tuple(found)


synpo_trained.register_autograd(_backward, setup_context=_keep_gradients)
