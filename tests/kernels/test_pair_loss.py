"""`synpo_pairs` against the loss in float64 and its gradient; what both implementations owe; that a step reads nothing back."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from synpo_kernels import FusedLinearSynPOLoss, losses, synpo_pairs
from synpo_kernels.backends import choice, gpu
from synpo_kernels.head import Head
from synpo_kernels.kernels import launch
from synpo_kernels.kernels import pair_loss as pair_loss_kernels
from synpo_kernels.ops import logprobs, pair_loss

LENGTHS = [7, 0, 5, 1, 2, 7, 4, 6]
OPTIONS = {"alpha": 5.0, "beta": 0.3}


def tokens(device, *, packed: bool, dtype=torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Eight sequences, one empty, one with an ignored token inside; log-probabilities (8, 7) or packed."""
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(8, 7, generator=generator) * scale
    inside = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    labels = torch.where(inside, 3, -100)
    labels[2, 1] = -100
    bounds = None
    if packed:
        logps, labels = logps[inside], labels[inside]
        bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=device)
    return logps.to(device, dtype), labels.to(device), bounds


def specification(logps: Tensor, labels: Tensor | None, bounds: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """(loss, ∂loss/∂logps) in float64 through autograd."""
    exact = logps.double().requires_grad_()
    stats = losses.sequence_stats(exact, labels, cu_seqlens=bounds)
    loss = losses.synpo(stats, **OPTIONS, reduction=reduction)
    return loss.detach(), torch.autograd.grad(loss, exact)[0]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "all"])
def test_matches_the_specification(labelled, reduction, packed, backend, device) -> None:
    logps, labels, bounds = tokens(device, packed=packed)
    labels = labels if labelled else None
    expected, gradient = specification(logps, labels, bounds, reduction)
    found, g = synpo_pairs(logps.requires_grad_(), labels, bounds, reduction=reduction, backend=backend, **OPTIONS)
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(g.double(), gradient, rtol=2e-6, atol=1e-7)
    assert not g.requires_grad and found.loss.dtype == torch.float32
    (scaled,) = torch.autograd.grad(found.loss * 3, logps, retain_graph=True)
    assert torch.equal(scaled, torch.autograd.grad(found.loss * 3, logps)[0])  # repeatable
    torch.testing.assert_close(scaled.double(), 3 * gradient, rtol=2e-6, atol=1e-7)
    counted = losses.sequence_stats(logps.detach().double(), labels, cu_seqlens=bounds)
    valid = counted.valid_pairs.double()
    assert found.empty_pairs.item() == (1 if labelled or packed else 0)
    torch.testing.assert_close(found.chosen_logps.double(), counted.chosen.mean_logps * valid, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.language_reward.double(), counted.chosen.mean_probs * valid, rtol=1e-6, atol=1e-7)
    norms = losses.token_norms(gradient, cu_seqlens=bounds)
    torch.testing.assert_close(found.chosen_grad_norm.double(), norms[0], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(found.rejected_grad_norm.double(), norms[1], rtol=2e-6, atol=1e-7)
    for name in pair_loss.FIELDS:
        assert not getattr(found, name).requires_grad and getattr(found, name).shape == (4,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_log_probabilities(dtype, backend, device) -> None:
    logps, labels, _ = tokens(device, packed=False, dtype=dtype)
    expected, gradient = specification(logps, labels, None, "mean")
    found, g = synpo_pairs(logps.requires_grad_(), labels, backend=backend, **OPTIONS)
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(g.double(), gradient, rtol=2e-6, atol=1e-7)
    assert torch.autograd.grad(found.loss, logps)[0].dtype == dtype


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_what_is_not_finite_names_its_pair(bad, backend, device) -> None:
    logps, labels, _ = tokens(device, packed=False)
    logps[6, 2] = bad  # rejected completion of pair 2
    found, g = synpo_pairs(logps, labels, backend=backend)
    assert found.nonfinite_pairs.tolist() == [False, False, True, False]
    assert g[[0, 1, 3, 4, 5, 7]].isfinite().all()
    if bad != bad:
        assert found.loss.isnan() and g[6, :2].isnan().all()
    else:  # a token of probability 0 is a value like any other
        assert found.loss.isfinite() and g.isfinite().all() and found.rejected_prob[2] == 0
    logps[6, 2], logps[6, 5] = -0.1, torch.nan  # ignored there
    assert synpo_pairs(logps, labels, backend=backend)[0].loss.isfinite()


def test_no_pair_counts(backend, device) -> None:
    for shape in ((4, 3), (4, 0), (0, 3)):
        logps = torch.zeros(shape, device=device, requires_grad=True)
        labels = torch.full(shape, -100, device=device)
        found, g = synpo_pairs(logps, labels, backend=backend)
        assert found.loss.item() == 0 and found.empty_pairs.item() == shape[0] // 2 and not g.any()
        assert not torch.autograd.grad(found.loss, logps)[0].any()
        assert not any(getattr(found, name).any() for name in pair_loss.FIELDS)


@pytest.mark.parametrize("blocks", [(16, 4, 3), (1024, 256, 512)], ids=["small", "as shipped"])
def test_more_than_one_block(blocks, backend, device, monkeypatch) -> None:
    """More pairs and tokens than a block holds, more sequences than programs; sums agree with float64 to rounding."""
    for name, size in zip(("BLOCK_T", "BLOCK_B", "PROGRAMS"), blocks):
        monkeypatch.setattr(pair_loss_kernels, name, size)
    shape = (50, 45) if blocks[0] == 16 else (2, 2500)
    generator = torch.Generator().manual_seed(1)
    logps = (-torch.rand(shape, generator=generator)).to(device)
    labels = torch.randint(-1, 4, shape, generator=generator).to(device) * 100
    labels[:, 0] = 1
    labels[5::7] = -100
    expected, gradient = specification(logps, labels, None, "mean")
    found, g = synpo_pairs(logps, labels, backend=backend, **OPTIONS)
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(g.double(), gradient, rtol=1e-5, atol=1e-9)


def test_tokens_outside_the_bounds_have_no_gradient(device) -> None:
    """On a GPU bounds are not read by the host: what they leave out gets 0, what they point past is not read."""
    logps = torch.full((12,), -0.5, device=device)
    bounds = torch.tensor([2, 4, 6, 8, 40], device=device)
    _, g, _, _, _ = pair_loss.pairs(logps, None, bounds, 5.0, 0.3, None, "mean", "triton")
    assert not g[:2].any() and g[2:].all()
    bounds = torch.tensor([0, 4, 6, 8, 9], device=device)
    _, g, _, _, _ = pair_loss.pairs(logps, None, bounds, 5.0, 0.3, None, "mean", "triton")
    assert g[:9].all() and not g[9:].any()


def test_two_runs_are_bitwise_equal_and_any_layout_of_memory_will_do(backend, device) -> None:
    logps, labels, _ = tokens(device, packed=False)
    first, second = (synpo_pairs(logps, labels, backend=backend) for _ in range(2))
    strided = synpo_pairs(logps.T.contiguous().T, labels.T.contiguous().T, backend=backend)
    for other in (second, strided):
        assert torch.equal(first[1], other[1])
        for name in first[0].__dataclass_fields__:
            assert torch.equal(getattr(first[0], name), getattr(other[0], name)), name


def test_long_rows_in_another_layout_give_the_same_bits(backend, device) -> None:
    """Rows long enough that a sum over strided ones would be taken in another order."""
    logps = -torch.rand(8, 700, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.zeros(8, 700, dtype=torch.int64, device=device)
    found, g = synpo_pairs(logps, labels, backend=backend)
    other, other_g = synpo_pairs(logps.T.contiguous().T, labels.T.contiguous().T, backend=backend)
    assert torch.equal(g, other_g)
    for name in found.__dataclass_fields__:
        assert torch.equal(getattr(found, name), getattr(other, name)), name


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_opcheck(packed, backend, device) -> None:
    logps, labels, bounds = tokens(device, packed=packed)
    options = (30.0, 0.2, -100, "mean", backend)
    torch.library.opcheck(pair_loss.pairs.op, (logps.requires_grad_(), labels, bounds, *options))


def test_compiles_without_a_break(backend, device) -> None:
    logps, labels, _ = tokens(device, packed=False)
    torch.compiler.reset()

    def step(logps: Tensor) -> Tensor:
        found, g = synpo_pairs(torch.sin(logps), labels, backend=backend)
        return found.loss + g.sum() + found.margin.sum()

    graph = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, traced = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    assert torch.equal(step(eager), graph(traced))
    assert torch.equal(torch.autograd.grad(step(eager), eager)[0], torch.autograd.grad(graph(traced), traced)[0])


@pytest.mark.parametrize(
    ("shape", "bounds", "options", "message"),
    [
        ((3, 2), None, {}, "even number of sequences"),
        ((4,), [0, 1, 2, 4], {}, "even number of sequences"),
        ((4,), None, {}, "without cu_seqlens"),
        ((4, 2), None, {"reduction": "none"}, "'mean' or 'sum'"),
        ((4, 2), None, {"labels": torch.zeros(4, 3)}, "one entry a token"),
    ],
)
def test_bad_input(shape, bounds, options, message) -> None:
    bounds = None if bounds is None else torch.tensor(bounds)
    with pytest.raises(ValueError, match=message):
        synpo_pairs(torch.zeros(shape), cu_seqlens=bounds, **options)


# ---- a training step reads nothing back: meta tensors have no values that could be read


@pytest.fixture
def no_autocast(monkeypatch) -> None:
    """Autocast knows no meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def test_meta_tensors_refuse_a_read() -> None:
    x = torch.zeros(3, device="meta")
    for read in (lambda: x.sum().item(), lambda: bool(x.any()), x.nonzero, lambda: x[x > 0], lambda: torch.equal(x, x)):
        with pytest.raises((RuntimeError, NotImplementedError), match="[Mm]eta"):
            read()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_no_host_read_around_the_ops(trained, packed, no_autocast) -> None:
    """Forward and backward of the module, its ops by their fake implementations."""
    hidden = torch.zeros(8, 7, 16, device="meta")
    labels = torch.zeros(8, 7, dtype=torch.int64, device="meta")
    bounds = None
    if packed:
        hidden, labels = hidden.view(-1, 16), labels.view(-1)
        bounds = torch.zeros(9, dtype=torch.int32, device="meta")
    weight = torch.zeros(50, 16, device="meta").requires_grad_(trained)
    found = FusedLinearSynPOLoss()(hidden.requires_grad_(), weight, labels, cu_seqlens=bounds)
    assert found.loss.shape == () and found.margin.shape == (4,)
    wanted = [hidden, weight] if trained else [hidden]
    assert [g.shape for g in torch.autograd.grad(found.loss, wanted)] == [w.shape for w in wanted]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("ignore_index", [-100, None])
@pytest.mark.parametrize("workspace", [None, 1 << 16], ids=["default", "small"])
def test_no_host_read_inside_the_ops(workspace, ignore_index, trained, no_autocast, monkeypatch) -> None:
    """The host code around the kernels, every launch counted in place of run."""

    launched: set[str] = set()
    monkeypatch.setattr(launch.Bound, "__call__", lambda self, *_, **__: launched.add(self.name))
    for module in (logprobs, pair_loss):
        monkeypatch.setattr(module, "choose", lambda *_: choice.BACKENDS["triton"][1]())
    monkeypatch.setattr(gpu, "_major", lambda _: 9)
    monkeypatch.setattr(gpu, "_processors", lambda _: 132)
    x = torch.zeros(96, 32, dtype=torch.bfloat16, device="meta")
    labels = torch.zeros(96, dtype=torch.int64, device="meta")
    head = Head(torch.zeros(70, 32, dtype=torch.bfloat16, device="meta"))
    found = logprobs.forward(x, head, labels, ignore_index, "auto", want_direction=not trained, workspace=workspace)
    if trained:
        upstream, want = torch.zeros(96, device="meta"), (True, True, False)
        logprobs.gradients(x, head, labels, ignore_index, "auto", found, upstream, want=want, workspace=workspace)
    given = (found.logps.view(8, 12), labels.view(8, 12), None, 30.0, 0.2, ignore_index, "mean", "auto")
    pair_loss.pairs.run(*given)
    assert launched >= {"exp_tile_kernel", "exact_rows_kernel", "sequence_sums_kernel", "pair_loss_kernel"}
    assert ("counted_product_kernel" in launched) == ("partition_kernel" in launched) == (ignore_index is not None)
    assert trained or {"begin_rows_kernel", "finish_rows_kernel"} <= launched
