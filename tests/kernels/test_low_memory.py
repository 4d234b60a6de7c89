"""memory="low": the same results, and a bound on all that is held at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from synpo_kernels import FusedLinearSynPOLoss, linear_logprobs
from synpo_kernels.backends import passes
from synpo_kernels.head import Head
from synpo_kernels.ops import logprobs


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Several blocks of rows and several chunks of the vocabulary."""
    monkeypatch.setattr(passes, "LOW_SLICE_BYTES", 2048)
    monkeypatch.setattr(passes, "LOW_ROW_BYTES", 17 * 3 * 4 * 24)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ignore_index", [None, -100])
def test_same_results(ignore_index, dtype, trained, backend, device, small_blocks) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, 24, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(90, 24, generator=generator).to(device, dtype).requires_grad_(trained)
    labels = torch.randint(0, 90, (60,), generator=generator).to(device)
    if ignore_index is not None:
        labels[::3] = ignore_index
    upstream = torch.randn(60, generator=generator).to(device)
    assert passes.low_rows(hidden) == 17
    wanted = [hidden, weight] if trained else [hidden]
    found = []
    for memory in ("default", "low"):
        options = {"memory": memory, "backend": backend, "ignore_index": ignore_index}
        logps = linear_logprobs(hidden, weight, labels, **options)
        found.append((logps.detach(), *torch.autograd.grad((logps * upstream).sum(), wanted)))
    (logps, *gradients), (low, *low_gradients) = found
    torch.testing.assert_close(low, logps, rtol=1e-6, atol=1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2 * torch.finfo(dtype).eps / torch.finfo(torch.bfloat16).eps
    for g, e in zip(low_gradients, gradients):
        assert g.dtype == dtype and (g.double() - e.double()).norm() <= tolerance * e.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [896, 3584, 8192])
def test_the_plan_at_full_size(d, dtype) -> None:
    """8192 x 152064: a block of rows, a slice and a widened chunk of W stay below 20 MiB together."""
    from synpo_kernels.backends.portable import TorchTiles

    x, head = torch.empty(8192, d, dtype=dtype, device="meta"), Head(torch.empty(152064, d, dtype=dtype, device="meta"))
    rows = passes.low_rows(x)
    assert rows >= 128
    block = 3 * rows * d * 4
    _, part, scratch = next(passes.vocabulary_chunks(x[:rows], head, TorchTiles(low=True)))
    chunk = part.weight.numel() * 4 if dtype != torch.float32 else 0
    assert block + scratch.nbytes + chunk <= 19.5 * 2**20


class LiveBytes(TorchDispatchMode):
    """Most bytes that were alive at once in storages that operations returned, those of `inputs` aside."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.inputs = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.inputs:
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        return result


@pytest.mark.parametrize(("dtype", "ignored"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_peak_of_what_is_held(ignored, dtype, backend, device, monkeypatch) -> None:
    """All limits divided by 256, so the bound is 20 MiB / 256; inputs and the gradient are not counted."""
    monkeypatch.setattr(passes, "LOW_SLICE_BYTES", passes.LOW_SLICE_BYTES >> 8)
    monkeypatch.setattr(passes, "LOW_ROW_BYTES", passes.LOW_ROW_BYTES >> 8)
    n, v, d = 160, 200, 64
    x, head = torch.randn(n, d).to(device, dtype), Head(torch.randn(v, d).to(device, dtype))
    labels = torch.randint(0, v, (n,), device=device)
    if ignored:
        labels[::5] = -100
    rows, bound = passes.low_rows(x), (20 << 12) + 16 * 8 * n  # and labels, counts, statistics of every row
    assert rows < n / 2
    index = -100 if ignored else None
    with LiveBytes(x, head.weight, labels) as forward:
        found = logprobs.forward(x, head, labels, index, backend, want_direction=False, low=True)
    with LiveBytes(x, head.weight, labels) as backward:
        logprobs.gradients(x, head, labels, index, backend, found, found.logps, (True, False, False), True)
    assert rows * d * 4 < forward.most <= bound
    assert rows * d * 4 < backward.most - x.nbytes <= bound


def test_module_and_bad_value(backend, device) -> None:
    hidden, weight = torch.randn(4, 5, 8, device=device, requires_grad=True), torch.randn(20, 8, device=device)
    labels = torch.randint(0, 20, (4, 5), device=device)
    losses = [
        FusedLinearSynPOLoss(memory=memory, backend=backend)(hidden, weight, labels) for memory in ("default", "low")
    ]
    torch.testing.assert_close(losses[0].loss, losses[1].loss)
    gradients = [torch.autograd.grad(out.loss, hidden)[0] for out in losses]
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match="memory must be 'default' or 'low', got 'tiny'"):
        linear_logprobs(hidden, weight, labels, memory="tiny")
