"""`linear_logprobs` on every backend against full logits in float64: values and all gradients.

An error is bounded by that of the same computation in plain torch at the same dtype, plus a little.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import geometric_mean

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from synpo_kernels import linear_logprobs
from synpo_kernels.backends import gpu, passes, portable
from synpo_kernels.reference import naive_logprobs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 8e-4}  # relative, in norm
SHAPES = [(1, 1, 1), (5, 1, 7), (1, 9, 16), (37, 101, 45), (33, 64, 32), (20, 70, 83)]  # N, V, D
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.3},
    "all": {"bias": True, "softcap": 5.0, "logit_scale": 1.7},
}


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    upstream: Tensor
    options: dict[str, float]

    def inputs(self, dtype: torch.dtype, trained: bool) -> list[Tensor]:
        tensors = [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])
        return [t.detach().to(dtype).requires_grad_(trained or t is self.hidden) for t in tensors]

    def run(self, function, dtype: torch.dtype, trained: bool, **more) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Log-probabilities, and the gradients of Σ upstream · logp in hidden (and weight and bias)."""
        inputs = self.inputs(dtype, trained)
        bias = inputs[2] if len(inputs) == 3 else None
        logps = function(inputs[0], inputs[1], self.labels, bias=bias, **self.options, **more)
        wanted = inputs if trained else inputs[:1]
        return logps.detach(), torch.autograd.grad((logps * self.upstream).sum(), wanted)


def make(
    shape: tuple[int, int, int],
    device,
    dtype=torch.float32,
    *,
    head: str = "all",
    spread: float = 1.0,
    ignored: bool = True,
) -> Problem:
    n, v, d = shape
    generator = torch.Generator().manual_seed(n * 7919 + v * 31 + d)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    options = dict(HEADS[head])
    bias = draw(v).to(device) if options.pop("bias", False) else None
    labels = torch.randint(0, v, (n,), generator=generator)
    if ignored and n > 3:
        labels[1:3] = -100
    upstream = torch.randn(n, generator=generator) * torch.logspace(-3, 1, n)
    hidden = draw(n, d) * spread
    return Problem(hidden.to(device), draw(v, d).to(device), labels.to(device), bias, upstream.to(device), options)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def check(problem: Problem, dtype: torch.dtype, trained: bool, backend: str) -> None:
    expected, expected_gradients = problem.run(naive_logprobs, torch.float64, trained)
    plain, plain_gradients = problem.run(naive_logprobs, dtype, trained)
    found, found_gradients = problem.run(linear_logprobs, dtype, trained, backend=backend)
    assert found.dtype == torch.float32
    allowed = (plain.double() - expected).abs().max() + 2e-6 * (1 + expected.abs().max())
    assert (found.double() - expected).abs().max() <= allowed
    assert (found[problem.labels == -100] == 0).all()
    for got, reference, same_dtype in zip(found_gradients, expected_gradients, plain_gradients):
        assert got.dtype == dtype and got.shape == reference.shape
        if reference.norm() > 1e-12:
            assert relative(got, reference) <= relative(same_dtype, reference) + GRADIENT_TOLERANCE[dtype]
        else:  # a vocabulary of one: nothing to learn
            assert got.abs().max() <= 1e-6


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}_V{}_D{}".format(*s))
def test_odd_shapes(shape, dtype, trained, backend, device, monkeypatch) -> None:
    monkeypatch.setitem(passes.WORKSPACE, device.type, 8192)  # many chunks of the vocabulary
    check(make(shape, device, dtype), dtype, trained, backend)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("head", HEADS)
def test_every_head(head, trained, backend, device, monkeypatch) -> None:
    monkeypatch.setitem(passes.WORKSPACE, device.type, 8192)  # many chunks of the vocabulary, several blocks of rows
    check(make((43, 150, 24), device, head=head), torch.float32, trained, backend)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [0.0, 0.3])
def test_ignored_rows_reach_nothing(kept, dtype, trained, backend, device, monkeypatch) -> None:
    """Kept rows scattered over blocks of rows; the others hold NaN, which shows wherever it is read."""
    monkeypatch.setitem(passes.WORKSPACE, device.type, 8192)
    problem = make((61, 70, 24), device, dtype, head="bias", ignored=False)
    ignored = torch.rand(61, generator=torch.Generator().manual_seed(2)) >= kept
    problem.labels[ignored.to(device)] = -100
    expected, expected_gradients = problem.run(naive_logprobs, torch.float64, trained)
    problem.hidden[ignored.to(device)] = torch.nan
    found, gradients = problem.run(linear_logprobs, dtype, trained, backend=backend)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    for got, reference in zip(gradients, expected_gradients):
        assert (got.double() - reference).norm() <= 2 * GRADIENT_TOLERANCE[dtype] * reference.norm()


def peaked(shape: tuple[int, int, int], device, dtype) -> Problem:
    problem = make(shape, device, dtype, head="bias", spread=4.0, ignored=False)
    logits = problem.hidden.double() @ problem.weight.double().T + problem.bias.double()
    problem.labels[::2] = logits.argmax(1)[::2]
    problem.labels[1::2] = logits.argmin(1)[1::2]
    return problem


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peaked_softmax(dtype, trained, backend, device) -> None:
    """Half the labels have p ≈ 1, the others lie far below the largest logit (-100 and less)."""
    problem = peaked((24, 90, 32), device, dtype)
    logps = naive_logprobs(problem.hidden.double(), problem.weight.double(), problem.labels, bias=problem.bias.double())
    assert logps.max() > -1e-6 and logps.min() < -100.0, "the problem is not peaked"
    check(problem, dtype, trained, backend)


def test_peaked_gradients_are_as_exact_as_those_of_torch(backend, device) -> None:
    """A log-sum-exp of a hundred, rounded to fp32, would cost three times the error.

    In one problem a few rows make the whole error, which the order of a product's sums changes fivefold, in torch as here: what
    is compared is the geometric mean over problems.
    """
    found_errors, plain_errors = [], []
    for rows in range(26, 74, 6):
        problem = peaked((rows, 90, 32), device, torch.float32)
        _, expected = problem.run(naive_logprobs, torch.float64, True)
        _, plain = problem.run(naive_logprobs, torch.float32, True)
        _, found = problem.run(linear_logprobs, torch.float32, True, backend=backend)
        found_errors += map(relative, found, expected)
        plain_errors += map(relative, plain, expected)
    assert geometric_mean(found_errors) <= 1.3 * geometric_mean(plain_errors) + 2e-7


def test_probability_close_to_one_keeps_its_digits(backend, device) -> None:
    """log p = -e^-30: log-softmax in fp32 rounds it to 0, the anchored form does not."""
    hidden = torch.tensor([[30.0]], device=device)
    weight = torch.tensor([[1.0], [0.0]], device=device)
    logps = linear_logprobs(hidden, weight, torch.tensor([0], device=device), backend=backend)
    assert logps.item() == pytest.approx(-torch.tensor(-30.0).exp().item(), rel=1e-5)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", ["plain", "all"])
def test_exact_path_for_every_row(head, dtype, trained, backend, device, monkeypatch) -> None:
    monkeypatch.setattr(passes, "OVERFLOW", -1.0)  # every row is flagged
    monkeypatch.setitem(passes.WORKSPACE, device.type, 8192)
    check(make((37, 101, 45), device, dtype, head=head), dtype, trained, backend)


def test_exponent_overflow_is_exact(backend, device) -> None:
    """exp(z - z_y) is infinite in fp32 for the middle row alone; its neighbours are untouched."""
    hidden = torch.tensor([[1.0, 0.0], [1000.0, 0.0], [0.0, 1.0]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0, 0.5], [-1.0, 0.25], [0.0, 2.0]], device=device)
    labels = torch.tensor([0, 1, 2], device=device)
    logps = linear_logprobs(hidden, weight, labels, backend=backend)
    assert logps[1].item() == -2000.0
    (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    assert torch.equal(gradient[1], weight[1] - weight[0])
    double = hidden.detach().double().requires_grad_()
    expected = torch.autograd.grad(naive_logprobs(double, weight.double(), labels).sum(), double)[0]
    assert torch.allclose(gradient.double(), expected, atol=1e-6)


@pytest.mark.parametrize("exact", [False, True], ids=["anchored", "exact"])
def test_all_logits_very_negative(exact, backend, device, monkeypatch) -> None:
    """A running maximum that starts at 0 would take the log of 0 here."""
    if exact:
        monkeypatch.setattr(passes, "OVERFLOW", -1.0)
    weight = torch.full((70, 4), -200.0, device=device)
    logps = linear_logprobs(
        torch.ones(3, 4, device=device), weight, torch.tensor([0, 1, 69], device=device), backend=backend
    )
    assert torch.allclose(logps, torch.tensor(1 / 70.0).log().expand(3).to(device), atol=1e-5)


def test_masked_vocabulary_entries(backend, device) -> None:
    """A bias of -inf removes an entry: no NaN, no weight, no gradient."""
    problem = make((9, 40, 8), device, head="bias", ignored=False)
    problem.labels.clamp_(max=29)
    problem.bias[30:] = -torch.inf
    found, (gradient,) = problem.run(linear_logprobs, torch.float32, False, backend=backend)
    problem.weight, problem.bias = problem.weight[:30], problem.bias[:30]
    expected, (expected_gradient,) = problem.run(naive_logprobs, torch.float64, False)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert torch.allclose(gradient.double(), expected_gradient, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_upstream_gradients_survive(dtype, backend, device) -> None:
    """Each row's share of ∂L/∂W is 1e-8, which fp16 flushes to 0; their sum is 3e-6, which it holds to 2 %."""
    rows = 300
    weight = torch.zeros(2, 1, device=device, dtype=dtype, requires_grad=True)
    hidden = torch.ones(rows, 1, device=device, dtype=dtype)
    logps = linear_logprobs(hidden, weight, torch.zeros(rows, dtype=torch.int64, device=device), backend=backend)
    (gradient,) = torch.autograd.grad(logps.sum() * 2e-8, weight)
    torch.testing.assert_close(
        gradient.double(), 3e-6 * torch.tensor([[1.0], [-1.0]]).to(gradient).double(), rtol=1e-2, atol=0
    )


def test_no_rows_is_a_connected_zero(backend, device) -> None:
    for labels in (torch.full((2, 3), -100, device=device), torch.empty(0, 3, dtype=torch.int64, device=device)):
        hidden = torch.randn(*labels.shape, 8, device=device, requires_grad=True)
        weight = torch.randn(11, 8, device=device, requires_grad=True)
        logps = linear_logprobs(hidden, weight, labels, backend=backend)
        assert logps.shape == labels.shape and not logps.any()
        gradients = torch.autograd.grad(logps.sum(), [hidden, weight])
        assert not gradients[0].any() and not gradients[1].any()
        assert linear_logprobs(hidden, weight.detach(), labels, backend=backend).requires_grad


@pytest.mark.parametrize("known", [False, True], ids=["counted", "known"])
@pytest.mark.parametrize("rows", [0, 3])
def test_a_product_over_no_rows_overwrites_with_zeros(rows, known, device) -> None:
    """∂L/∂W is written into uninitialised memory where its sums need no other format."""
    count = torch.zeros((), dtype=torch.int32, device=device)
    slice_, b = torch.zeros(rows, 11, device=device), torch.zeros(rows, 8, device=device)
    for tiles in [portable.TorchTiles(), gpu.TritonTiles(None)] if known else [gpu.TritonTiles(count)]:
        total = torch.full((11, 8), torch.nan, device=device)
        tiles.add_transposed_product(total, slice_, b, fresh=True)
        assert not total.any()


def test_leading_dimensions_and_strided_inputs(backend, device) -> None:
    base = torch.randn(12, 5, 4, device=device)
    hidden, weight = base.permute(2, 1, 0), torch.randn(12, 30, device=device).T  # both non-contiguous
    labels = torch.randint(0, 30, (5, 4), device=device).T
    bias = torch.randn(60, device=device)[::2]
    expected = naive_logprobs(hidden.double(), weight.double(), labels, bias=bias.double())
    for ignore_index in (-100, None):
        for trained in (False, True):
            w = weight.detach().requires_grad_(trained)
            h = hidden.detach().requires_grad_()
            found = linear_logprobs(h, w, labels, bias=bias, ignore_index=ignore_index, backend=backend)
            assert found.shape == (4, 5)
            assert torch.allclose(found.double(), expected, atol=1e-5)
            torch.autograd.grad(found.sum(), [h, w] if trained else [h])


@pytest.mark.parametrize("ignore_index", [-100, None])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_labels_with_gaps_between_them(trained, ignore_index, backend, device) -> None:
    """A view of every other label, as of two streams in one tensor."""
    problem = make((9, 30, 8), device, ignored=ignore_index is not None)
    apart = torch.stack([problem.labels, torch.full_like(problem.labels, -7)], 1).flatten()[::2]
    options = {"backend": backend, "ignore_index": ignore_index}
    expected, gradients = problem.run(linear_logprobs, torch.float32, trained, **options)
    problem.labels = apart
    found, again = problem.run(linear_logprobs, torch.float32, trained, **options)
    assert torch.equal(found, expected) and all(torch.equal(a, b) for a, b in zip(again, gradients))


def test_padded_hidden_gradient_is_zero_at_ignored_rows(backend, device) -> None:
    hidden = torch.randn(2, 6, 8, device=device, requires_grad=True)
    labels = torch.randint(0, 20, (2, 6), device=device)
    labels[0, 4:], labels[1, :3] = -100, -100
    logps = linear_logprobs(hidden, torch.randn(20, 8, device=device), labels, backend=backend)
    (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    assert not gradient[labels == -100].any() and gradient[labels != -100].abs().sum(-1).min() > 0


def test_tied_embedding_gets_both_gradients(backend, device) -> None:
    def gradient(function, dtype: torch.dtype, **options) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        embedding = torch.randn(25, 8, generator=generator).to(device, dtype).requires_grad_()
        tokens = torch.randint(0, 25, (10,), generator=generator).to(device)
        hidden = torch.tanh(embedding[tokens[:-1]])
        return torch.autograd.grad(function(hidden, embedding, tokens[1:], **options).sum(), embedding)[0]

    expected = gradient(naive_logprobs, torch.float64)
    assert relative(gradient(linear_logprobs, torch.float32, backend=backend), expected) < 1e-6


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_backward_twice_and_bitwise_repeatable(trained, backend, device) -> None:
    problem = make((20, 70, 33), device, torch.bfloat16)
    inputs = problem.inputs(torch.bfloat16, trained)
    wanted = inputs if trained else inputs[:1]
    runs = []
    for _ in range(2):
        logps = linear_logprobs(*inputs[:2], problem.labels, bias=inputs[2], **problem.options, backend=backend)
        for _ in range(2):
            gradients = torch.autograd.grad((logps * problem.upstream).sum(), wanted, retain_graph=True)
            runs.append((logps.detach(), *gradients))
        doubled = torch.autograd.grad((logps * problem.upstream).sum() * 2, wanted, retain_graph=True)
        assert all(torch.equal(two, 2 * one) for one, two in zip(gradients, doubled))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


def test_gradients_accumulate(backend, device) -> None:
    hidden = torch.randn(6, 8, device=device, requires_grad=True)
    weight = torch.randn(20, 8, device=device, requires_grad=True)
    labels = torch.randint(0, 20, (6,), device=device)
    linear_logprobs(hidden, weight, labels, backend=backend).sum().backward()
    once = weight.grad.clone(), hidden.grad.clone()
    linear_logprobs(hidden, weight, labels, backend=backend).sum().backward()
    assert torch.equal(weight.grad, 2 * once[0]) and torch.equal(hidden.grad, 2 * once[1])


def test_bias_alone_trained(backend, device) -> None:
    problem = make((20, 50, 8), device, head="bias")
    double = problem.bias.double().requires_grad_()
    expected = naive_logprobs(problem.hidden.double(), problem.weight.double(), problem.labels, bias=double)
    bias = problem.bias.clone().requires_grad_()
    found = linear_logprobs(problem.hidden, problem.weight, problem.labels, bias=bias, backend=backend)
    (g,) = torch.autograd.grad((found * problem.upstream).sum(), bias)
    (e,) = torch.autograd.grad((expected * problem.upstream).sum(), double)
    assert relative(g, e) < 1e-5


def test_frozen_head_takes_no_weight_gradient(backend, device) -> None:
    hidden = torch.randn(6, 8, device=device, requires_grad=True)
    weight = torch.randn(20, 8, device=device)
    logps = linear_logprobs(hidden, weight, torch.randint(0, 20, (6,), device=device), backend=backend)
    saved = []
    node = logps.grad_fn
    while node is not None:
        saved += list(getattr(node, "saved_tensors", ()))
        node = node.next_functions[0][0] if node.next_functions else None
    assert [tensor.shape for tensor in saved] == [hidden.shape]  # U alone


def test_no_grad_skips_the_second_product(backend, device, monkeypatch) -> None:
    calls = []
    multiplying = (
        [(gpu, "add_matmul"), (gpu, "_product")] if backend == "triton" else [(portable.TorchTiles, "add_product")]
    )
    for where, name in multiplying:
        real = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *a, _real=real, **k: (calls.append(1), _real(*a, **k))[1])
    hidden, weight = torch.randn(6, 8, device=device, requires_grad=True), torch.randn(20, 8, device=device)
    labels = torch.randint(0, 20, (6,), device=device)
    with torch.no_grad():
        quiet = linear_logprobs(hidden, weight, labels, backend=backend)
    assert not calls and not quiet.requires_grad
    loud = linear_logprobs(hidden, weight, labels, backend=backend)
    assert calls and torch.equal(loud, quiet)


def test_autocast_runs_in_the_autocast_dtype(backend, device) -> None:
    hidden = torch.randn(6, 8, device=device, requires_grad=True)
    weight = torch.randn(20, 8, device=device, requires_grad=True)
    labels = torch.randint(0, 20, (6,), device=device)
    expected = linear_logprobs(hidden.bfloat16(), weight.bfloat16(), labels, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = linear_logprobs(hidden, weight, labels, backend=backend)
        mixed = linear_logprobs(hidden.bfloat16(), weight, labels, backend=backend)
        gradients = torch.autograd.grad(found.sum(), [hidden, weight])
    assert found.dtype == torch.float32 and torch.equal(found, expected) and torch.equal(mixed, expected)
    again = torch.autograd.grad(expected.sum(), [hidden, weight])
    assert all(g.dtype == torch.float32 and torch.equal(g, a) for g, a in zip(gradients, again))


@pytest.mark.parametrize("vocabulary", [1, 20])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_rows_stay_visible(bad, vocabulary, backend, device) -> None:
    hidden = torch.randn(4, 8, device=device)
    hidden[2, 3] = bad
    hidden.requires_grad_()
    weight = torch.randn(vocabulary, 8, device=device)
    logps = linear_logprobs(hidden, weight, torch.zeros(4, dtype=torch.int64, device=device), backend=backend)
    assert logps.isfinite().tolist() == [True, True, False, True]
    (gradient,) = torch.autograd.grad(logps[[0, 1, 3]].sum(), hidden)
    assert gradient[[0, 1, 3]].isfinite().all()


def test_activation_checkpointing(backend, device) -> None:
    hidden = torch.randn(6, 8, device=device, requires_grad=True)
    weight = torch.randn(20, 8, device=device, requires_grad=True)
    labels = torch.randint(0, 20, (6,), device=device)

    def run(h: Tensor) -> Tensor:
        return linear_logprobs(torch.tanh(h), weight, labels, backend=backend).sum()

    plain = torch.autograd.grad(run(hidden), [hidden, weight])
    again = torch.autograd.grad(checkpoint(run, hidden, use_reentrant=False), [hidden, weight])
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
