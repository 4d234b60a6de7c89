"""The correctness gate: loss and gradients in float64, and how far a provider may be from them.

The truth is plain softmax over full logits in float64, a block of rows at a time, so that it also fits the shapes that are
timed. An objective is a function of per-token log-probabilities; all of them are means over pairs or tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import IGNORE_INDEX, Problem
from synpo_kernels import losses

BLOCK_ROWS = 256
# Error allowed, relative in norm. bf16 logits near 20 are off by up to 0.06, which moves a probability by as much.
TOLERANCE = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 5e-2}

Objective = Callable[[Tensor, Tensor], Tensor]


def synpo(logps: Tensor, labels: Tensor) -> Tensor:
    return losses.synpo(losses.sequence_stats(logps, labels), alpha=30.0, beta=0.2)


def simpo(logps: Tensor, labels: Tensor) -> Tensor:
    return losses.simpo(losses.sequence_stats(logps, labels), beta=2.0, gamma=1.0)


def cross_entropy(logps: Tensor, labels: Tensor) -> Tensor:
    return -logps[labels != IGNORE_INDEX].mean()


OBJECTIVES: dict[str, Objective] = {"synpo": synpo, "simpo": simpo, "cross-entropy": cross_entropy}


@dataclass(frozen=True)
class Truth:
    loss: float
    hidden: Tensor  # (S, T, D) float64
    weight: Tensor | None  # (V, D) float64, where it was asked for


def truth(problem: Problem, objective: str, *, want_weight: bool = False) -> Truth:
    """Loss and gradients of `problem` in float64."""
    weight = problem.weight.detach().double()
    hidden = problem.hidden.detach().double().flatten(0, 1)
    labels = problem.labels.flatten()
    kept = labels != IGNORE_INDEX
    index = labels.where(kept, 0)
    logps = torch.cat([_log_softmax(x, weight, y) for x, y in zip(hidden.split(BLOCK_ROWS), index.split(BLOCK_ROWS))])
    logps = logps.where(kept, 0.0).requires_grad_()
    loss = OBJECTIVES[objective](logps.view(problem.labels.shape), problem.labels)
    (g,) = torch.autograd.grad(loss, logps)
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.zeros_like(weight) if want_weight else None
    for first in range(0, len(hidden), BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        residual = (hidden[rows] @ weight.T).softmax(-1).neg_()
        residual[torch.arange(len(residual), device=residual.device), index[rows]] += 1.0
        residual *= g[rows, None]
        d_hidden[rows] = residual @ weight
        if d_weight is not None:
            d_weight.addmm_(residual.T, hidden[rows])
    return Truth(float(loss.detach()), d_hidden.view(problem.hidden.shape), d_weight)


def _log_softmax(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (x @ weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]


def first_pair(problem: Problem) -> Problem:
    """The problem of the first pair alone: its share of the gradient is 1 / pairs of this one's."""
    chosen_rejected = [0, problem.case.pairs]
    hidden = problem.hidden.detach()[chosen_rejected].requires_grad_()
    return Problem(problem.case, hidden, problem.weight, problem.labels[chosen_rejected])


def error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; infinite where something is not finite."""
    off = float((found.detach().double() - expected).norm() / expected.norm().clamp(min=1e-300))
    return off if math.isfinite(off) else math.inf


@dataclass(frozen=True)
class Errors:
    """How far a provider is from the truth on the small problem."""

    loss: float
    hidden: float
    weight: float | None

    def complaint(self, dtype: str) -> str | None:
        """What is wrong, in words; None where nothing is."""
        found = {"loss": self.loss, "dX": self.hidden, "dW": self.weight}
        wrong = [
            f"{name} off by {value:.1e}"
            for name, value in found.items()
            if value is not None and value > TOLERANCE[dtype]
        ]
        return f"{', '.join(wrong)}; {TOLERANCE[dtype]:.0e} is allowed" if wrong else None


def compare(loss: Tensor, problem: Problem, expected: Truth) -> Errors:
    """Errors of a provider whose backward has filled the gradients of `problem`."""
    if problem.hidden.grad is None or (problem.trained and problem.weight.grad is None):
        return Errors(math.inf, math.inf, None)
    off = abs(float(loss.detach()) - expected.loss) / abs(expected.loss)
    d_weight = None
    if problem.trained and expected.weight is not None and problem.weight.grad is not None:
        d_weight = error(problem.weight.grad, expected.weight)
    return Errors(off if math.isfinite(off) else math.inf, error(problem.hidden.grad, expected.hidden), d_weight)
