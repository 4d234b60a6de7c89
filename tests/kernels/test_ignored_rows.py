"""Ignored rows that hold NaN reach no gradient of the head, where whole blocks of rows are read by the copy engine too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from synpo_kernels import FusedLinearSynPOLoss, linear_logprobs
from synpo_kernels.kernels import configs

N, V, D, R = 60, 80, 24, 8  # rows of all matrices are whole multiples of 16 bytes: descriptors serve
UPSTREAM = torch.randn(N, generator=torch.Generator().manual_seed(1))


def logprobs(x: Tensor, head: list[Tensor], labels: Tensor, softcap: float | None) -> Tensor:
    upstream = UPSTREAM.to(x.device)
    return (linear_logprobs(x, head[0], labels, softcap=softcap, backend="triton") * upstream).sum()


def low_rank(x: Tensor, head: list[Tensor], labels: Tensor, softcap: float | None) -> Tensor:
    weight, extra = head
    options = {"low_rank": (x[:, :R].contiguous(), extra), "softcap": softcap, "backend": "triton"}
    return (linear_logprobs(x, weight, labels, **options) * UPSTREAM.to(x.device)).sum()


def pairs(x: Tensor, head: list[Tensor], labels: Tensor, softcap: float | None) -> Tensor:
    loss = FusedLinearSynPOLoss(softcap=softcap, backend="triton")
    return loss(x.view(4, N // 4, D), head[0], labels.view(4, -1)).loss


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("loss", [logprobs, low_rank, pairs])
def test_gradients_are_those_of_rows_that_hold_zeros(
    loss: Callable[..., Tensor], softcap, dtype, descriptors, device, monkeypatch
) -> None:
    """A row past the count comes times 0, but 0 · NaN is NaN. On a GPU the chip says whether descriptors serve."""
    if device.type == "cpu":
        monkeypatch.setattr(configs, "INTERPRETER", replace(configs.INTERPRETER, descriptors=descriptors))
    elif not descriptors:
        pytest.skip("the chip says whether descriptors serve")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator).to(device, dtype)
    head = [torch.randn(V, width, generator=generator).to(device, dtype) for width in (D, R)]
    labels = torch.randint(V, (N,), generator=generator).to(device)
    ignored = (torch.rand(N, generator=generator) < 0.5).to(device)
    labels[ignored] = -100
    found = []
    for filling in (0.0, torch.nan):
        hidden = x.masked_fill(ignored[:, None], filling).requires_grad_()
        leaves = [hidden, *(w.clone().requires_grad_() for w in head[: 2 if loss is low_rank else 1])]
        found.append(torch.autograd.grad(loss(hidden, leaves[1:], labels, softcap), leaves))
    for zeros, nans in zip(*found):
        assert torch.equal(zeros, nans) and zeros.isfinite().all()
