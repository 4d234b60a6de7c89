"""Micro-batches up to a budget of tokens: every pair once, none too full, all much alike, and other ones every epoch."""

import random

import pytest
from accelerate.data_loader import BatchSamplerShard

from synpo.data.batches import TokenBatches

TOKENS = random.Random(0).choices([60, 100, 300, 310, 700, 950], k=200)


@pytest.mark.parametrize(("budget", "processes"), [(1000, 1), (1300, 2), (4000, 3), (950, 4)])
def test_every_pair_is_in_one_batch_and_batches_are_alike(budget: int, processes: int) -> None:
    sampler = TokenBatches(TOKENS, budget, processes=processes)
    least = sum(TOKENS) / budget
    assert least <= len(sampler) <= max(1.25 * least, sum(t > budget / 2 for t in TOKENS)) + processes
    assert len(sampler) % processes == 0 and sampler.drop_last
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) and all(batches)
        assert sorted(i for batch in batches for i in batch) == list(range(len(TOKENS)))
        sums = [sum(TOKENS[i] for i in batch) for batch in batches]
        assert max(sums) <= budget
        if budget == 4000:
            assert min(sums) >= 0.8 * max(sums)
        orders.append(batches)
        assert list(sampler) == batches
    assert orders[0] != orders[1] and sorted(map(sorted, orders[0])) != sorted(map(sorted, orders[1]))
    assert [*map(list, TokenBatches(TOKENS, budget, seed=1, processes=processes))] == orders[1]


def test_processes_share_them_out() -> None:
    """As accelerate does: batches in turn, and the epoch is told to what lies beneath."""
    sampler = TokenBatches(TOKENS, 1000, processes=2)
    shards = [BatchSamplerShard(sampler, 2, rank, even_batches=False) for rank in (0, 1)]
    assert shards[0].batch_sampler.sampler.set_epoch == sampler.set_epoch
    first, second = map(list, shards)
    assert len(first) == len(second) == len(shards[0]) and [b for both in zip(first, second) for b in both] == list(
        sampler
    )


def test_what_cannot_be_put_together_is_said() -> None:
    with pytest.raises(ValueError, match="a pair has 950 tokens, more than the 900 of a batch"):
        TokenBatches(TOKENS, 900)
    with pytest.raises(ValueError, match="2 pairs cannot be shared out to 3 processes"):
        TokenBatches([1, 2], 10, processes=3)
    assert list(TokenBatches([7], 7)) == [[0]]
