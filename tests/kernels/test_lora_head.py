"""LoRA on the head against the head it stands for, W + s B A, in float64: values and all gradients, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from host_reads import HostReads
from synpo_kernels import FusedLinearSynPOLoss, linear_logprobs, lora_head
from synpo_kernels.backends import passes, portable
from synpo_kernels.ops import logprobs, scaling
from synpo_kernels.reference import naive_logprobs, naive_synpo

N, V, D, R, S = 19, 53, 21, 4, 0.7
OPTIONS = {"plain": {}, "capped": {"softcap": 3.0, "logit_scale": 1.4}}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def inputs(dtype: torch.dtype, device, trained: tuple[str, ...], bias: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"hidden": (N, D), "weight": (V, D), "a": (R, D), "b": (V, R), "bias": (V,)}
    drawn = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    drawn["b"] *= 0.5
    if not bias:
        del drawn["bias"]
    return {n: t.to(device, dtype).requires_grad_(n in trained) for n, t in drawn.items()}


def labels_and_upstream(device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[2:5] = -100
    return labels.to(device), torch.randn(N, generator=generator).to(device)


def fused(given: dict[str, Tensor], labels: Tensor, **options) -> Tensor:
    low_rank = lora_head(given["hidden"], given["a"], given["b"], S)
    return linear_logprobs(
        given["hidden"], given["weight"], labels, bias=given.get("bias"), low_rank=low_rank, **options
    )


def naive(given: dict[str, Tensor], labels: Tensor, **options) -> Tensor:
    weight = given["weight"] + S * given["b"] @ given["a"]
    return naive_logprobs(given["hidden"], weight, labels, bias=given.get("bias"), **options)


def gradients(function, given: dict[str, Tensor], labels: Tensor, upstream: Tensor, **options) -> dict[str, Tensor]:
    wanted = {n: t for n, t in given.items() if t.requires_grad}
    logps = function(given, labels, **options)
    found = torch.autograd.grad((logps * upstream).sum(), list(wanted.values()))
    return {"logps": logps.detach(), **dict(zip(wanted, found))}


USUAL = ("hidden", "a", "b")  # what LoRA training asks for


@pytest.mark.parametrize("trained", [USUAL, ("hidden",), ("b",), ("hidden", "a", "b", "bias", "weight")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_against_the_head_it_stands_for(options, dtype, trained, backend, device) -> None:
    labels, upstream = labels_and_upstream(device)
    expected = gradients(naive, inputs(torch.float64, device, trained), labels, upstream, **OPTIONS[options])
    found = gradients(fused, inputs(dtype, device, trained), labels, upstream, backend=backend, **OPTIONS[options])
    for name, value in expected.items():
        error = (found[name].double() - value).norm() / value.norm()
        assert error <= TOLERANCE[dtype], (name, float(error))


@pytest.mark.parametrize("trained", [USUAL, ("hidden",)], ids=str)
def test_small_workspace(trained, backend, device) -> None:
    workspace = 2 * 2 * (D + R) * 4 * 4  # four rows at a time
    labels, upstream = labels_and_upstream(device)
    expected = gradients(naive, inputs(torch.float64, device, trained), labels, upstream)
    given = inputs(torch.float32, device, trained)
    for name, value in gradients(fused, given, labels, upstream, backend=backend, workspace=workspace).items():
        assert (value.double() - expected[name]).norm() <= 3e-6 * expected[name].norm(), name


def test_float64_exactly_and_overflowing_rows(device, monkeypatch) -> None:
    labels, upstream = labels_and_upstream(device)
    given = inputs(torch.float64, device, (*USUAL, "bias"))
    expected = gradients(naive, given, labels, upstream)
    for limit in (passes.OVERFLOW, -1.0):
        monkeypatch.setattr(passes, "OVERFLOW", limit)
        for name, value in gradients(fused, given, labels, upstream).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-12)


def test_the_frozen_weight_costs_no_gradient(device, monkeypatch) -> None:
    """The backward pass recomputes the slices and multiplies with r columns: nothing as wide as W, and once."""
    shapes: list[tuple[str, int]] = []

    class Recorded(portable.TorchTiles):
        def add_product(self, total, slice_, b):
            shapes.append(("dX", total.shape[1]))
            super().add_product(total, slice_, b)

        def add_transposed_product(self, total, slice_, b, *, fresh=False):
            shapes.append(("dW", total.shape[1]))
            super().add_transposed_product(total, slice_, b, fresh=fresh)

    monkeypatch.setattr(portable, "TorchTiles", Recorded)
    labels, upstream = labels_and_upstream(device)
    given = inputs(torch.float32, device, USUAL, bias=False)
    loss = (fused(given, labels, backend="chunked") * upstream).sum()
    assert set(shapes) == {("dX", D + R)}
    shapes.clear()
    loss.backward()
    assert set(shapes) == {("dW", R)}
    assert given["weight"].grad is None


def test_the_loss_and_leading_dimensions(backend, device) -> None:
    given = inputs(torch.float32, device, USUAL)
    labels = torch.randint(0, V, (4, 4), generator=torch.Generator().manual_seed(1)).to(device)
    hidden = given["hidden"][:16].view(4, 4, D)
    low_rank = lora_head(hidden, given["a"], given["b"], S)
    module = FusedLinearSynPOLoss(alpha=4.0, backend=backend)
    loss = module(hidden, given["weight"], labels, bias=given["bias"], low_rank=low_rank).loss
    exact = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in given.items()}
    weight = exact["weight"] + S * exact["b"] @ exact["a"]
    expected = naive_synpo(exact["hidden"][:16].view(4, 4, D), weight, labels, bias=exact["bias"], alpha=4.0).loss
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for name in USUAL:
        (found,) = torch.autograd.grad(loss, given[name], retain_graph=True)
        (value,) = torch.autograd.grad(expected, exact[name], retain_graph=True)
        assert (found.double() - value).norm() <= 1e-4 * value.norm()


def test_autocast_casts_all_of_it(device) -> None:
    labels, _ = labels_and_upstream(device)
    given = inputs(torch.float32, device, USUAL)
    with torch.autocast(device.type, torch.bfloat16):
        logps = fused(given, labels)
    logps.sum().backward()
    expected = naive(inputs(torch.float64, device, ()), labels)
    assert (logps.double() - expected).abs().max() < 0.1
    assert all(given[name].grad.dtype == torch.float32 for name in USUAL)


def test_twice_checkpointed_and_compiled_are_the_same(device) -> None:
    labels, upstream = labels_and_upstream(device)
    given = inputs(torch.float32, device, USUAL)
    expected = gradients(fused, given, labels, upstream)

    def checkpointed(given, labels):
        return checkpoint(fused, given, labels, use_reentrant=False)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(given, labels):
        return fused(given, labels)

    for function in (fused, checkpointed, compiled):
        for name, value in gradients(function, given, labels, upstream).items():
            assert torch.equal(value, expected[name]), (function, name)


@pytest.mark.parametrize("ignore_index", [-100, None])
def test_opcheck(ignore_index, monkeypatch) -> None:
    monkeypatch.setattr(scaling, "may_overwrite", lambda kept: False)  # opcheck reads again what the op returned
    labels, _ = labels_and_upstream("cpu")
    given = inputs(torch.float32, "cpu", (*USUAL, "bias", "weight"))
    x = torch.cat([given["hidden"], given["hidden"][:, :R]], 1).detach().requires_grad_()
    labels = labels if ignore_index is not None else labels.clamp(min=0)
    options = (2.0, 1.0, ignore_index, "chunked", None, "", True)
    torch.library.opcheck(
        logprobs.linear_logprobs.op, (x, given["weight"], given["b"], given["bias"], labels, *options)
    )


def test_no_host_read_on_the_triton_path(device, monkeypatch) -> None:
    monkeypatch.setattr(logprobs, "_used", lambda labels, ignore_index: ignore_index)  # as on a GPU
    given, (labels, upstream) = inputs(torch.float32, device, ()), labels_and_upstream(device)
    u, b = lora_head(given["hidden"], given["a"], given["b"], S)
    x, head = torch.cat([given["hidden"], u], 1), (given["weight"], b, given["bias"])
    options = (None, 1.0, -100, "triton", None)
    logps, normalizer, *_ = logprobs.linear_logprobs(x, *head, labels, *options, "", True)
    known = labels, logps, normalizer, upstream, *options
    with HostReads() as reads, torch.no_grad():
        logprobs.linear_logprobs_gradients.run(x, *head, *known, (False, True, True, True))
    assert reads.found == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u, b: (u[1:], b), r"low_rank must be \(u \(19, 'r'\), B \(53, 'r'\)\)"),
        (lambda u, b: (u, b[:, 1:]), "low_rank must be"),
        (lambda u, b: (u.double(), b), "u of low_rank must be torch.float32"),
        (lambda u, b: (u, b.double()), "B of low_rank must be torch.float32"),
    ],
)
def test_bad_input(change, message) -> None:
    given = inputs(torch.float32, "cpu", USUAL)
    low_rank = change(*lora_head(given["hidden"], given["a"], given["b"], S))
    with pytest.raises(ValueError, match=message):
        linear_logprobs(given["hidden"], given["weight"], torch.zeros(N, dtype=torch.int64), low_rank=low_rank)
