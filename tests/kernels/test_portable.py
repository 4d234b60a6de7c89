"""The portable backend: gradcheck in float64, and a bound on what it holds at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from synpo_kernels import linear_logprobs
from synpo_kernels.backends import passes, portable
from synpo_kernels.head import Head
from synpo_kernels.ops import logprobs
from synpo_kernels.reference import naive_logprobs

HEADS = [{}, {"softcap": 1.5}, {"logit_scale": 0.4}, {"softcap": 2.0, "logit_scale": 1.3}]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("options", HEADS, ids=lambda o: "_".join(o) or "plain")
@pytest.mark.parametrize("exact", [False, True], ids=["anchored", "exact"])
def test_gradcheck(exact, options, with_bias, trained, monkeypatch) -> None:
    monkeypatch.setitem(passes.WORKSPACE, "cpu", 400)
    if exact:
        monkeypatch.setattr(passes, "OVERFLOW", -1.0)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 5, generator=generator, dtype=torch.float64, requires_grad=trained)
    bias = torch.randn(9, generator=generator, dtype=torch.float64, requires_grad=trained) if with_bias else None
    labels = torch.tensor([0, 8, -100, 3, 3, 5])

    def run(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return linear_logprobs(h, w, labels, bias=b, backend="chunked", **options)

    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    assert run(*inputs).dtype == torch.float64
    torch.testing.assert_close(run(*inputs), naive_logprobs(hidden, weight, labels, bias=bias, **options))
    assert torch.autograd.gradcheck(run, inputs)


def test_second_derivative_is_refused() -> None:
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    logps = linear_logprobs(hidden, torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2]))
    (gradient,) = torch.autograd.grad(logps.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_never_more_than_a_slice_of_the_logits(trained, dtype, monkeypatch) -> None:
    budget = 64 << 10
    monkeypatch.setitem(passes.WORKSPACE, "cpu", 2 * budget)
    n, v, d = 256, 4096, 16
    x, head, labels = torch.randn(n, d).to(dtype), Head(torch.randn(v, d).to(dtype)), torch.randint(0, v, (n,))
    with LargestTensor() as largest:  # inside the ops, where the mode sees every operation
        found = logprobs.forward(x, head, labels, -100, "chunked", want_direction=not trained, workspace=None)
        if trained:
            logprobs.gradients(
                x, head, labels, -100, "chunked", found, torch.ones(n), want=(True, True, False), workspace=None
            )
    weight = head.weight
    allowed = max(budget, weight.untyped_storage().nbytes())
    assert budget / 2 < largest.bytes <= allowed < n * v * 4 / 8


def test_ignored_rows_are_not_computed(monkeypatch) -> None:
    rows = []
    tile = portable.TorchTiles.__call__
    monkeypatch.setattr(
        portable.TorchTiles, "__call__", lambda self, x, *rest: (rows.append(x.shape[0]), tile(self, x, *rest))[1]
    )
    labels = torch.full((100,), -100)
    labels[::10] = 3
    linear_logprobs(torch.randn(100, 4), torch.randn(8, 4), labels, backend="chunked")
    assert rows == [10]
