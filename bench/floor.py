"""What the matrix products alone take in the library torch calls, at the very shapes: the floor of a dense method.

A frozen head needs two products of N·V·D (logits; gradient of the hidden states), a trained one three. They are timed in
the same turns as the providers, whole and in chunks of the vocabulary as a fused method takes them; the best rate counts.
On a CPU the chunks are multiplied in fp32 whatever the format of the inputs, for half-precision products may be slow there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.cases import IGNORE_INDEX, Problem

CHUNK = 4096


def products(problem: Problem) -> dict[str, Callable[[], object]]:
    """Name → the products of one step over the rows that count."""
    kept = problem.labels != IGNORE_INDEX
    hidden, weight = problem.hidden.detach()[kept], problem.weight.detach()
    return _both(hidden, weight, problem.trained)


def frozen(hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The same for hidden states (N, D) that all count and a frozen head (V, D)."""
    return _both(hidden, weight, trained=False)


def _both(hidden: torch.Tensor, weight: torch.Tensor, trained: bool) -> dict[str, Callable[[], object]]:
    return {"products whole": _whole(hidden, weight, trained), "products": _chunked(hidden, weight, trained)}


def _whole(hidden: torch.Tensor, weight: torch.Tensor, trained: bool) -> Callable[[], object]:
    def run() -> None:
        logits = hidden @ weight.T
        logits @ weight
        if trained:
            logits.T @ hidden

    return run


def _chunked(hidden: torch.Tensor, weight: torch.Tensor, trained: bool) -> Callable[[], object]:
    if hidden.device.type == "cpu":
        hidden, weight = hidden.float(), weight.float()
    total = torch.zeros_like(hidden)

    def run() -> None:
        for part in weight.split(CHUNK):
            logits = hidden @ part.T
            total.addmm_(logits, part, beta=0.0)
            if trained:
                logits.T @ hidden

    return run
