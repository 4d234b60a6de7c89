"""`FusedLinearSynPOLoss` against the full-logits specification in float64: loss, gradients, every statistic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from synpo_kernels import FusedLinearSynPOLoss, linear_logprobs, losses
from synpo_kernels.reference import naive_synpo

B, T, D, V = 4, 7, 24, 50


def batch(device, dtype=torch.float32, *, empty: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * B, T, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * 0.3
    labels = torch.randint(0, V, (2 * B, T), generator=generator)
    for row, length in enumerate([7, 3, 5, 1, 2, 7, 4, 6]):
        labels[row, length:] = -100
    labels[2, 0] = -100
    if empty:
        labels[1] = -100
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_matches_the_specification(reduction, packed, trained, backend, device) -> None:
    hidden, weight, labels = batch(device)
    bounds = None
    if packed:
        kept = labels != -100
        kept[2, 0] = True  # an ignored row inside a packed sequence
        bounds = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        hidden, labels = hidden[kept], labels[kept]
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_(trained)]
    expected = naive_synpo(*exact, labels, alpha=10.0, cu_seqlens=bounds)
    factor = B - expected.empty_pairs if reduction == "sum" else 1
    inputs = [hidden.requires_grad_(), weight.requires_grad_(trained)]
    module = FusedLinearSynPOLoss(alpha=10.0, reduction=reduction, backend=backend)
    found = module(*inputs, labels, cu_seqlens=bounds)
    assert found.empty_pairs.item() == expected.empty_pairs == 1
    torch.testing.assert_close(found.loss.double(), expected.loss * factor, rtol=1e-5, atol=1e-6)
    for name in ("chosen_logps", "rejected_logps", "chosen_prob", "rejected_prob", "language_reward"):
        value = getattr(found, name)
        assert not value.requires_grad
        torch.testing.assert_close(value.double(), getattr(expected, name), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.margin, found.chosen_prob - found.rejected_prob)
    assert not found.nonfinite_pairs.any()
    wanted = 2 if trained else 1
    gradients = torch.autograd.grad(found.loss, inputs[:wanted])
    for g, e in zip(gradients, torch.autograd.grad(expected.loss * factor, exact[:wanted])):
        assert (g.double() - e).norm() <= 1e-5 * e.norm()


def test_gradient_norms_are_those_of_the_loss(device) -> None:
    hidden, weight, labels = batch(device, torch.float64)
    logps = linear_logprobs(hidden, weight, labels).requires_grad_()
    loss = losses.synpo(losses.sequence_stats(logps, labels))
    (g,) = torch.autograd.grad(loss, logps)
    found = FusedLinearSynPOLoss()(hidden, weight, labels)
    torch.testing.assert_close(found.chosen_grad_norm, g[:B].norm(dim=1))
    torch.testing.assert_close(found.rejected_grad_norm, g[B:].norm(dim=1))
    assert found.chosen_grad_norm[0] > 0 and found.chosen_grad_norm[1] == 0 == found.rejected_grad_norm[1]


def test_half_precision_loss(backend, device) -> None:
    hidden, weight, labels = batch(device, torch.bfloat16)
    expected = naive_synpo(hidden.double(), weight.double(), labels)
    found = FusedLinearSynPOLoss(backend=backend)(hidden, weight, labels)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=1e-5, atol=1e-5)


def test_softcap_scale_bias(backend, device) -> None:
    hidden, weight, labels = batch(device)
    bias = torch.randn(V, device=device)
    expected = naive_synpo(
        hidden.double(), weight.double(), labels, bias=bias.double(), softcap=2.0, logit_scale=0.5, alpha=5.0, beta=0.7
    )
    module = FusedLinearSynPOLoss(alpha=5.0, beta=0.7, softcap=2.0, logit_scale=0.5, backend=backend)
    torch.testing.assert_close(
        module(hidden, weight, labels, bias=bias).loss.double(), expected.loss, rtol=1e-5, atol=1e-6
    )


def test_nan_in_hidden_names_its_pair(backend, device) -> None:
    hidden, weight, labels = batch(device, empty=False)
    hidden[B + 2, 0, 5] = torch.nan
    found = FusedLinearSynPOLoss(backend=backend)(hidden, weight, labels)
    assert found.loss.isnan()
    assert found.nonfinite_pairs.tolist() == [False, False, True, False]
    assert found.chosen_logps[[0, 1, 3]].isfinite().all() and found.rejected_logps[2].isnan()


def test_every_completion_empty(backend, device) -> None:
    hidden, weight, labels = batch(device)
    hidden.requires_grad_()
    found = FusedLinearSynPOLoss(backend=backend)(hidden, weight, torch.full_like(labels, -100))
    assert found.loss.item() == 0 and found.empty_pairs.item() == B
    assert not torch.autograd.grad(found.loss, hidden)[0].any()
    assert not found.chosen_prob.any() and not found.chosen_grad_norm.any()


def test_empty_pair_does_not_dilute_the_mean(backend, device) -> None:
    hidden, weight, labels = batch(device)
    others = torch.tensor([0, 2, 3, 4, 6, 7], device=device)
    module = FusedLinearSynPOLoss(backend=backend)
    torch.testing.assert_close(
        module(hidden, weight, labels).loss, module(hidden[others], weight, labels[others]).loss, rtol=1e-6, atol=1e-7
    )


def test_without_ignored_rows_nothing_is_compacted(backend, device) -> None:
    hidden, weight, labels = batch(device)
    labels = labels.clamp(min=0)
    with_index = FusedLinearSynPOLoss(backend=backend)(hidden, weight, labels)
    without = FusedLinearSynPOLoss(backend=backend, ignore_index=None)(hidden, weight, labels)
    assert torch.equal(with_index.loss, without.loss)
    assert torch.equal(with_index.chosen_grad_norm, without.chosen_grad_norm)


@pytest.mark.parametrize(
    ("hidden", "labels", "bounds", "message"),
    [
        ((3, T, D), (3, T), None, "even number of sequences"),
        ((8, D), (8,), None, "without cu_seqlens"),
        ((4, T, D), (4, T), [0, 1, 2], "with cu_seqlens"),
        ((8, D), (8,), [0, 4, 6, 8], "even number of sequences"),
        ((8, D), (8,), [0, 4, 9], "ascend from 0 to 8"),
        ((4, T, D + 1), (4, T), None, "must share D"),
        ((4, T, D), (4, T + 1), None, "labels must be int64 of shape"),
    ],
)
def test_bad_layouts(hidden, labels, bounds, message) -> None:
    with pytest.raises(ValueError, match=message):
        FusedLinearSynPOLoss()(
            torch.zeros(hidden),
            torch.zeros(V, D),
            torch.zeros(labels, dtype=torch.int64),
            cu_seqlens=None if bounds is None else torch.tensor(bounds),
        )


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": -1.0}, {"beta": -0.1}, {"reduction": "none"}])
def test_bad_options(options) -> None:
    with pytest.raises(ValueError, match="must (not )?be"):
        FusedLinearSynPOLoss(**options)
