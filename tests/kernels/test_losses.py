"""Sequence statistics and objectives: literal values, formulas, gradients, empty completions, NaN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from synpo_kernels import OBJECTIVES, SequenceStats, losses, sequence_stats


def random_stats(pairs: int = 3, seed: int = 0) -> SequenceStats:
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(2 * pairs, 5, generator=generator, dtype=torch.float64) * 2 - 0.05
    labels = torch.ones(2 * pairs, 5, dtype=torch.int64)
    labels[0, 3:] = -100
    labels[-1, :2] = -100
    return sequence_stats(logps, labels)


def test_statistics_of_literal_sequences() -> None:
    half, quarter = math.log(0.5), math.log(0.25)
    logps = torch.tensor([[half, quarter, 9.0], [half, half, half], [quarter, 9.0, 9.0], [9.0, 9.0, 9.0]])
    labels = torch.tensor([[1, 1, -100], [1, 1, 1], [1, -100, -100], [-100, -100, -100]])
    stats = sequence_stats(logps, labels)
    assert stats.tokens.tolist() == [2, 3, 1, 0]
    torch.testing.assert_close(stats.logps, torch.tensor([half + quarter, 3 * half, quarter, 0.0]))
    torch.testing.assert_close(stats.mean_logps, torch.tensor([(half + quarter) / 2, half, quarter, 0.0]))
    torch.testing.assert_close(stats.mean_probs, torch.tensor([0.375, 0.5, 0.25, 0.0]))
    assert stats.valid_pairs.tolist() == [True, False]
    assert stats.empty_pairs.item() == 1
    assert stats.chosen.tokens.tolist() == [2, 3] and stats.rejected.tokens.tolist() == [1, 0]


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64], ids=str)
def test_packed_equals_padded(index_type) -> None:
    lengths = [3, 0, 5, 1, 0, 2]
    generator = torch.Generator().manual_seed(1)
    logps = -torch.rand(6, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[7] * n + [-100] * (5 - n) for n in lengths])
    labels[2, 1] = -100  # ignored inside a sequence
    rows = torch.tensor([[i < n for i in range(5)] for n in lengths])
    bounds = torch.tensor([0, 3, 3, 8, 9, 9, 11], dtype=index_type)
    padded, packed = sequence_stats(logps, labels), sequence_stats(logps[rows], labels[rows], cu_seqlens=bounds)
    for name in ("logps", "mean_logps", "mean_probs", "tokens"):
        torch.testing.assert_close(getattr(padded, name), getattr(packed, name))

    def mean_of(values: Tensor) -> Tensor:
        return sequence_stats(values, labels[rows], cu_seqlens=bounds).mean_probs

    assert torch.autograd.gradcheck(mean_of, (logps[rows].requires_grad_(),))


def test_all_packed_sequences_empty() -> None:
    stats = sequence_stats(torch.empty(0), cu_seqlens=torch.zeros(5, dtype=torch.int64))
    assert stats.tokens.tolist() == [0, 0, 0, 0] and stats.empty_pairs.item() == 2


@pytest.mark.parametrize(
    ("logps", "labels", "bounds", "message"),
    [
        (torch.zeros(4), None, None, "must be \\(sequences, tokens\\)"),
        (torch.zeros(2, 4), torch.zeros(2, 3), None, "labels must have one entry a token"),
        (torch.zeros(2, 4), None, torch.tensor([0, 4]), "packed per-token values must be"),
        (torch.zeros(4), None, torch.tensor([0.0, 4.0]), "int32 or int64"),
        (torch.zeros(4), None, torch.tensor([0, 3, 2, 4]), "ascend from 0 to 4"),
        (torch.zeros(4), None, torch.tensor([0, 3]), "ascend from 0 to 4"),
    ],
)
def test_layout_errors(logps, labels, bounds, message) -> None:
    with pytest.raises(ValueError, match=message):
        sequence_stats(logps, labels, cu_seqlens=bounds)


def test_odd_number_of_sequences() -> None:
    with pytest.raises(ValueError, match="even number of sequences"):
        _ = sequence_stats(torch.zeros(3, 2)).chosen


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def by_hand(name: str, s: dict[str, float], r: dict[str, float]) -> float:
    """The published formula of one pair in plain Python; s of the policy, r of the reference model."""
    p_chosen, p_rejected = math.exp(s["m+"]), math.exp(s["m-"])
    ratio = (s["l+"] - r["l+"]) - (s["l-"] - r["l-"])
    mean_ratio = (s["m+"] - r["m+"]) - (s["m-"] - r["m-"])
    odds = math.log(p_chosen / (1 - p_chosen)) - math.log(p_rejected / (1 - p_rejected))
    return {
        "synpo": -1 / (1 + math.exp(-30.0 * (p_chosen - p_rejected))) - 0.2 * s["a+"],
        "sft": -s["m+"],
        "dpo": -log_sigmoid(0.1 * ratio),
        "ipo": (mean_ratio - 5.0) ** 2,
        "simpo": -log_sigmoid(2.0 * (s["m+"] - s["m-"]) - 1.0),
        "cpo": -log_sigmoid(0.1 * (s["l+"] - s["l-"])) - s["m+"],
        "orpo": -s["m+"] - 0.1 * log_sigmoid(odds),
    }[name]


def scalars(stats: SequenceStats, pair: int) -> dict[str, float]:
    chosen, rejected = stats.chosen, stats.rejected
    return {
        "l+": chosen.logps[pair].item(),
        "l-": rejected.logps[pair].item(),
        "m+": chosen.mean_logps[pair].item(),
        "m-": rejected.mean_logps[pair].item(),
        "a+": chosen.mean_probs[pair].item(),
    }


def call(name: str, stats: SequenceStats, reference: SequenceStats, **options) -> Tensor:
    objective = OBJECTIVES[name]
    return objective(stats, reference, **options) if objective.needs_reference else objective(stats, **options)


def test_registry() -> None:
    assert set(OBJECTIVES) == {"synpo", "sft", "dpo", "ipo", "simpo", "cpo", "orpo"}
    assert {name for name, objective in OBJECTIVES.items() if objective.needs_reference} == {"dpo", "ipo"}
    assert [name for name, objective in OBJECTIVES.items() if not objective.needs_rejected] == ["sft"]
    assert OBJECTIVES["dpo"].function is losses.dpo


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_is_its_formula(name) -> None:
    stats, reference = random_stats(), random_stats(seed=5)
    expected = torch.tensor([by_hand(name, scalars(stats, i), scalars(reference, i)) for i in range(3)]).double()
    found = call(name, stats, reference, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(call(name, stats, reference), found.mean())
    torch.testing.assert_close(call(name, stats, reference, reduction="sum"), found.sum())
    with pytest.raises(ValueError, match="reduction must be"):
        call(name, stats, reference, reduction="max")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_gradients(name) -> None:
    generator = torch.Generator().manual_seed(3)
    logps = (-torch.rand(4, 3, generator=generator, dtype=torch.float64) - 0.1).requires_grad_()
    labels = torch.tensor([[1, 1, 1], [1, 1, -100], [1, -100, 1], [1, 1, 1]])
    reference = sequence_stats(logps.detach() * 1.3, labels)
    assert torch.autograd.gradcheck(lambda x: call(name, sequence_stats(x, labels), reference), (logps,))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_empty_completion_contributes_nothing(name, side) -> None:
    generator = torch.Generator().manual_seed(4)
    logps = (-torch.rand(6, 4, generator=generator, dtype=torch.float64) - 0.1).requires_grad_()
    labels = torch.ones(6, 4, dtype=torch.int64)
    labels[1 if side == "chosen" else 4] = -100
    reference = sequence_stats(logps.detach() * 1.3, labels)
    stats = sequence_stats(logps, labels)
    assert stats.empty_pairs.item() == 1
    found = call(name, stats, reference)
    (gradient,) = torch.autograd.grad(found, logps)
    assert gradient.isfinite().all()
    kept = [0, 1, 2] if name == "sft" and side == "rejected" else [0, 2]
    pairs = torch.tensor(kept + [i + 3 for i in kept])
    expected = call(name, sequence_stats(logps[pairs], labels[pairs]), sequence_stats(logps[pairs].detach() * 1.3))
    if name == "sft":
        expected = -sequence_stats(logps[torch.tensor(kept)]).mean_logps.mean()
    torch.testing.assert_close(found, expected)
    if not (name == "sft" and side == "rejected"):
        assert not gradient[1].any() and not gradient[4].any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_pairs_empty_is_a_connected_zero(name) -> None:
    logps = torch.zeros(4, 3, requires_grad=True)
    stats = sequence_stats(logps, torch.full((4, 3), -100))
    loss = call(name, stats, stats.detach())
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, logps)[0].any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nan_is_never_averaged_away(name) -> None:
    logps = -torch.rand(6, 4) - 0.1
    logps[1, 2] = torch.nan
    stats = sequence_stats(logps)
    assert call(name, stats, stats.detach()).isnan()
    assert stats.nonfinite_pairs.tolist() == [False, True, False]
    hidden_by_mask = sequence_stats(logps, torch.ones(6, 4, dtype=torch.int64).masked_fill(logps.isnan(), -100))
    assert call(name, hidden_by_mask, hidden_by_mask.detach()).isfinite()


def test_certain_tokens_keep_orpo_finite() -> None:
    logps = torch.zeros(4, 3, requires_grad=True)  # every probability is exactly 1
    loss = losses.orpo(sequence_stats(logps))
    assert loss.isfinite() and torch.autograd.grad(loss, logps)[0].isfinite().all()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_coefficients_are_the_gradient_of_synpo(packed) -> None:
    generator = torch.Generator().manual_seed(6)
    labels = torch.tensor([[1, 1, 1, 1], [1, 1, -100, -100], [1, -100, 1, -100], [-100, -100, -100, -100]])
    labels = torch.cat([labels, labels.flip(1)[[1, 0, 2, 0]]])
    logps = -torch.rand(8, 4, generator=generator, dtype=torch.float64)
    bounds = None
    if packed:
        logps, labels, bounds = logps.flatten(), labels.flatten(), torch.arange(0, 33, 4)
    logps.requires_grad_()
    stats = sequence_stats(logps, labels, cu_seqlens=bounds)
    loss = losses.synpo(stats, alpha=4.0, beta=0.3, reduction="sum")
    (expected,) = torch.autograd.grad(loss, logps, retain_graph=True)
    found = losses.synpo_coefficients(stats, logps, labels, alpha=4.0, beta=0.3, cu_seqlens=bounds)
    torch.testing.assert_close(found, expected)
    chosen, rejected = losses.token_norms(expected, labels=labels, cu_seqlens=bounds)
    rows = expected.view(8, 4)
    torch.testing.assert_close(torch.cat([chosen, rejected]), rows.norm(dim=1))
    assert chosen[:3].min() > 0 and chosen[3] == 0


def test_rejected_pull_dies_out_with_its_probability() -> None:
    """The rebalancing claim: the less likely the rejected answer, the weaker it is pushed, unlike DPO."""

    def rejected_norm(level: float, name: str) -> float:
        logps = torch.tensor([[-1.0] * 4, [level] * 4], requires_grad=True)
        stats = sequence_stats(logps)
        loss = call(name, stats, sequence_stats(torch.full((2, 4), -1.0)))
        return losses.token_norms(torch.autograd.grad(loss, logps)[0])[1].item()

    assert rejected_norm(-6.0, "synpo") < 0.05 * rejected_norm(-1.0, "synpo")
    assert rejected_norm(-6.0, "dpo") > 0.2 * rejected_norm(-1.0, "dpo")
