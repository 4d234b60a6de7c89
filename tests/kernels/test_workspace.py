"""A workspace sizes everything that is held at a time: the same results, bounds on it, and dX in the memory of U."""

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


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ignore_index", [None, -100])
def test_same_results(ignore_index, dtype, trained, backend, device) -> None:
    """A few rows and columns at a time, or all."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, 24, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(90, 24, generator=generator).to(device, dtype).requires_grad_(trained)
    labels = torch.randint(0, 90, (60,), generator=generator).to(device)
    if ignore_index is not None:
        labels[::3] = ignore_index
    upstream = torch.randn(60, generator=generator).to(device)
    wanted = [hidden, weight] if trained else [hidden]
    found = []
    for workspace in (1 << 24, 6000):
        options = {"workspace": workspace, "backend": backend, "ignore_index": ignore_index}
        logps = linear_logprobs(hidden, weight, labels, **options)
        found.append((logps.detach(), *torch.autograd.grad((logps * upstream).sum(), wanted)))
    (logps, *gradients), (low, *low_gradients) = found
    torch.testing.assert_close(low, logps, rtol=1e-6, atol=1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2 * torch.finfo(dtype).eps / torch.finfo(torch.bfloat16).eps
    for g, e in zip(low_gradients, gradients):
        assert g.dtype == dtype and (g.double() - e.double()).norm() <= tolerance * e.double().norm()


@pytest.mark.parametrize("d", [896, 3584, 8192])
@pytest.mark.parametrize("mebibytes", [16, 64, 128, 256])
def test_the_plan_at_full_size(mebibytes, d) -> None:
    """8192 x 152064 in bf16 on 132 multiprocessors: what a block of rows needs stays within the workspace, and fills the chip."""
    gpu = pytest.importorskip("synpo_kernels.backends.gpu")
    rows, columns = gpu.slices(8192 // 128, d, 152064, 2, mebibytes << 20, 132, 128, 256)
    assert rows * (2 * columns + 4 * d + 4 * (columns // 256)) <= mebibytes << 20
    assert rows % 128 == 0 and columns % 256 == 0
    if mebibytes > 16 or d < 8192:
        assert rows // 128 * (columns // 256) >= 48, "a third of the multiprocessors"


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
def test_peak_of_what_is_held(ignored, dtype, backend, device) -> None:
    """Beside inputs, U and numbers of every row, no more than the workspace (of the least that one tile needs, at this size)."""
    n, v, d, workspace = 320, 600, 64, 96 << 10
    x, head = torch.randn(n, d).to(device, dtype), Head(torch.randn(v, d).to(device, dtype))
    labels = torch.randint(0, v, (n,), device=device)
    if ignored:
        labels[::5] = -100
    with LiveBytes(x, head.weight, labels) as held:
        found = logprobs.forward(
            x, head, labels, -100 if ignored else None, backend, want_direction=True, workspace=workspace
        )
    kept = found.direction.nbytes + 16 * 8 * n
    assert workspace / 4 < held.most - kept <= 1.3 * workspace


def test_the_gradient_takes_the_memory_of_what_was_kept(backend, device) -> None:
    """The backward pass that frees the graph scales U where it lies; one that keeps it for another leaves it as it is."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator).to(device).requires_grad_()
    weight, labels = torch.randn(50, 16, generator=generator).to(device), torch.arange(40, device=device)
    upstream = torch.randn(40, generator=generator).to(device)
    options = (None, 1.0, None, backend, None, "", True)
    logps, _, direction, _ = logprobs.linear_logprobs(hidden, weight, None, None, labels, *options)
    first, second = (torch.autograd.grad(logps, hidden, upstream * k, retain_graph=True)[0] for k in (1, 2))
    assert torch.equal(2 * first, second) and first.data_ptr() != direction.data_ptr()
    last = torch.autograd.grad(logps, hidden, upstream)[0]
    assert torch.equal(last, first) and last.data_ptr() == direction.data_ptr()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(logps, hidden, upstream)


def test_a_trained_heads_gradients_survive_a_kept_graph(backend, device) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 10, 16, generator=generator).to(device).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).to(device).requires_grad_()
    labels = torch.randint(0, 50, (4, 10), generator=generator).to(device)
    loss = FusedLinearSynPOLoss(backend=backend)(hidden, weight, labels).loss
    first = torch.autograd.grad(3 * loss, [hidden, weight], retain_graph=True)
    again = torch.autograd.grad(loss, [hidden, weight])
    for a, b in zip(first, again):
        torch.testing.assert_close(a, 3 * b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_trained_head_leaves_what_it_kept_as_it_was(dtype, device) -> None:
    """In float64 the log-sum-exp that is kept is an operand of the backward pass as it is."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).to(device, dtype).requires_grad_() for n in (12, 50))
    logps = linear_logprobs(hidden, weight, torch.arange(12, device=device), backend="chunked")
    first, again = (torch.autograd.grad(logps.sum(), [hidden, weight], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_launches_of_a_pass(device, monkeypatch) -> None:
    """Two a slice, two a block of rows, and two beside them, however many rows are ignored."""
    gpu = pytest.importorskip("synpo_kernels.backends.gpu")
    from synpo_kernels.kernels import configs, launch

    launched: list[str] = []
    once = launch.Bound.__call__
    counting = lambda self, *a, **k: (launched.append(self.name), once(self, *a, **k))[1]  # noqa: E731
    monkeypatch.setattr(launch.Bound, "__call__", counting)
    order, begin, finish, exact = (
        f"{name}_kernel" for name in ("partition", "begin_rows", "finish_rows", "exact_rows")
    )
    slice_ = ["exp_tile_kernel", "counted_product_kernel"]
    n, v, d = 40, 300, 16
    hidden, weight = torch.randn(n, d, device=device), Head(torch.randn(v, d, device=device))
    labels = torch.randint(0, v, (n,), device=device)
    labels[3] = -100
    gpu.forward(hidden, weight, labels, -100, want_direction=True, workspace=1 << 24)
    assert launched == [order, begin, *slice_, finish, exact]
    launched.clear()
    gpu.forward(hidden, weight, labels, -100, want_direction=True, workspace=8000)
    config = configs.tile_config(gpu._major(device), 4, softcap=False)
    n_blocks, tile = -(-n // config.block_n), (config.block_n, config.block_v)
    most, width = gpu.slices(n_blocks, d, v, 4, 8000, gpu._processors(device), *tile)
    blocks, chunks = -(-n // most), -(-v // width)
    assert blocks * chunks > 1
    assert launched == [order, *[begin, *slice_ * chunks, finish] * blocks, exact]


def test_bad_values(backend, device) -> None:
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
    for bad in (0, -1, True):
        with pytest.raises(ValueError, match="workspace must be a positive number of bytes"):
            FusedLinearSynPOLoss(workspace=bad)
    with pytest.raises(ValueError, match="given without memory='low'"):
        linear_logprobs(hidden, weight, labels, memory="low", workspace=1 << 20)


def test_no_exponential_is_kept_below_the_least(backend, device) -> None:
    """Or it, or its products, would be denormal, which some CPUs take a hundred cycles over; NaN is not one."""
    if backend != "chunked":
        pytest.skip("the kernels' own tests look into their slices")
    from synpo_kernels.backends.portable import TorchTiles

    gaps = torch.tensor([0.0, -60.0, -69.0, -69.4, -90.0, -110.0, torch.nan], device=device)
    head = Head(torch.eye(7, device=device)[:, :7] * gaps.nan_to_num())
    out = torch.empty(1, 7, device=device)
    x, label, anchor = torch.ones(1, 7, device=device), torch.tensor([99], device=device), torch.zeros(1, device=device)
    TorchTiles()(x, head, label, anchor, None, True, out)
    expected = gaps.nan_to_num().exp()
    torch.testing.assert_close(out[0], torch.where(expected > passes.LEAST, expected, 0.0), rtol=1e-5, atol=0)
    assert (out[0] != 0).sum() == 4
    TorchTiles()(x, head, label, torch.full((1,), torch.nan, device=device), None, True, out)
    assert out.isnan().all()
