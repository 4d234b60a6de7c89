"""Micro-batches of as many pairs as fit a budget of tokens, long pairs beside short ones, so that steps are alike.

    sizes   tokens of each pair's stretch of a packed row, in 64ths of the budget, rounded up
    count   the fewest batches into which they go longest first, each into the emptiest
    epoch   pairs of one size change places at random, and so do batches

The count follows from the sizes alone: it is the same in every epoch, and known before training.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

PARTS = 64


class TokenBatches(Sampler[list[int]]):
    """Batches of indices for every process in turn; each epoch's follow from `seed` and its number.

    Args:
        tokens: of each pair, as a stretch of a packed row. budget: most tokens of a batch.
        processes: the number of batches is a multiple of it.

    Raises ValueError where a pair alone is beyond the budget, or there are fewer pairs than processes.
    """

    drop_last = True  # accelerate need not make batches equal: there are as many for every process

    def __init__(self, tokens: Sequence[int], budget: int, seed: int = 0, processes: int = 1) -> None:
        if max(tokens) > budget:
            raise ValueError(f"a pair has {max(tokens)} tokens, more than the {budget} of a batch")
        if len(tokens) < processes:
            raise ValueError(f"{len(tokens)} pairs cannot be shared out to {processes} processes")
        self.seed, self.epoch = seed, 0
        self.sizes = [-(-count * PARTS // budget) for count in tokens]
        least = -(-sum(self.sizes) // PARTS)
        self.count = -(-least // processes) * processes
        while max(map(sum, self._spread(self.sizes))) > PARTS:
            self.count += processes

    def _spread(self, sizes: Sequence[int]) -> list[list[int]]:
        """Sizes, batch by batch: longest first, each into the batch that holds least."""
        batches: list[list[int]] = [[] for _ in range(self.count)]
        emptiest = [(0, i) for i in range(self.count)]
        for size in sorted(sizes, reverse=True):
            held, i = emptiest[0]
            batches[i].append(size)
            heapq.heapreplace(emptiest, (held + size, i))
        return batches

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def sampler(self) -> TokenBatches:
        """Where accelerate looks for `set_epoch` once it has given every process its share."""
        return self

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        of_size: dict[int, list[int]] = {}
        for i in torch.randperm(len(self.sizes), generator=generator).tolist():
            of_size.setdefault(self.sizes[i], []).append(i)
        batches = [[of_size[size].pop() for size in batch] for batch in self._spread(self.sizes)]
        for i in torch.randperm(self.count, generator=generator).tolist():
            yield batches[i]
