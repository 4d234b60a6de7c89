"""Certified skipping: log-probabilities untouched, the true error below the bound, the dropped mass below the tolerance."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from host_reads import HostReads
from synpo_kernels import FusedLinearSynPOLoss, certified, certified_logprobs, fused, linear_logprobs, passes, skipping
from synpo_kernels.kernels.configs import CHIPS, INTERPRETER, product_config
from synpo_kernels.reference import naive_logprobs

TOLERANCES = [0.0, 2.0**-10, 2.0**-4, 0.4]
HEADS = {"plain": {}, "softcap": {"softcap": 3.0}, "all": {"softcap": 5.0, "logit_scale": -1.7, "bias": True}}
KINDS = ["peaked", "flat", "adversarial"]
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    options: dict[str, float]

    def gradients(self, function, **more) -> tuple[object, Tensor]:
        """What `function` returns, and ∂logp_t/∂hidden_t of every row."""
        hidden = self.hidden.detach().requires_grad_()
        found = function(hidden, self.weight, self.labels, bias=self.bias, **self.options, **more)
        logps = found if isinstance(found, Tensor) else found.logps
        return found, torch.autograd.grad(logps.sum(), hidden)[0]

    def double(self) -> Problem:
        bias = None if self.bias is None else self.bias.double()
        return Problem(self.hidden.double(), self.weight.double(), self.labels, bias, self.options)


def make(kind: str, device, dtype: torch.dtype = torch.float64, *, head: str = "plain", n=130, v=160, d=16) -> Problem:
    """peaked: a few tokens hold nearly everything, others in each row. flat: nothing can be skipped. adversarial: many
    improbable tokens whose rows of W are long and all point one way, so that the error of dropping them adds up."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    hidden, weight = draw(n, d), draw(v, d) * 0.3
    options = dict(HEADS[head])
    if kind == "peaked":
        weight *= 7.0
        hidden[::7] *= 0.02  # some rows are flat
    elif kind == "adversarial":
        weight[v // 4 :] = torch.tensor([0.0, 40.0] + [0.0] * (d - 2))
        weight[v // 4 :: 2] *= -0.9
        hidden[:, 1] = draw(n) * 0.01
        hidden *= 1.5 * v**0.1
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[3::5] = -100
    bias = draw(v) if options.pop("bias", False) else None
    given = [None if t is None else t.to(device, dtype) for t in (hidden, weight, bias)]
    return Problem(given[0], given[1], labels.to(device), given[2], options)


@pytest.fixture(autouse=True)
def small(device, monkeypatch) -> None:
    """Several chunks of the vocabulary, blocks of rows, and groups within a block."""
    monkeypatch.setitem(passes.SLICE_BYTES, device.type, 96 * 64 * 4)
    monkeypatch.setattr(passes, "MAX_ROWS", 96)
    monkeypatch.setattr(skipping, "GROUP", 32)
    for module in ("chunked", "fused"):
        monkeypatch.setattr(f"synpo_kernels.{module}.GROUP", 32)
    monkeypatch.setattr(fused, "product_config", lambda *_: INTERPRETER)  # a GPU's tiles do not fit into such groups


def row_norms(difference: Tensor) -> Tensor:
    return torch.linalg.vector_norm(difference.double(), dim=-1)


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_below_the_bound(kind, head, tolerance, device) -> None:
    """In float64, where rounding cannot hide anything."""
    problem = make(kind, device, head=head)
    found, gradient = problem.gradients(certified_logprobs, skip_tolerance=tolerance, backend="chunked")
    expected, exact = problem.gradients(naive_logprobs)
    torch.testing.assert_close(found.logps, expected, rtol=1e-12, atol=1e-12)
    error = row_norms(gradient - exact)
    assert (error <= found.bound + 1e-12 * (1 + row_norms(exact))).all()
    assert (found.bound[problem.labels == -100] == 0).all() and not gradient[problem.labels == -100].any()
    if kind == "adversarial" and tolerance >= 2.0**-4 and head == "plain":
        skipped = found.bound > 0
        assert (error[skipped] > 0.02 * found.bound[skipped]).any(), "the bound is never put to the test"
    if tolerance == 0.0:
        assert (error <= 1e-12 * (1 + row_norms(exact))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format(kind, dtype, backend, device) -> None:
    """Beyond the bound there is only the rounding that the exact gradient has too."""
    problem = make(kind, device, dtype, head="softcap" if kind == "flat" else "plain")
    found, gradient = problem.gradients(certified_logprobs, skip_tolerance=2.0**-5, backend=backend)
    dense, dense_gradient = problem.gradients(linear_logprobs, backend=backend)
    _, exact = problem.double().gradients(naive_logprobs)
    assert torch.equal(found.logps, dense) and found.logps.dtype == torch.float32
    length = problem.weight.double().norm(dim=1).max()
    error, rounding = row_norms(gradient - exact), row_norms(dense_gradient - exact)
    assert gradient.dtype == dtype and (error <= found.bound + rounding + ROUNDING[dtype] * length).all()
    if kind == "peaked":
        assert 0.05 < found.kept_columns.item() < 0.7 and (found.bound > 0).any()
        assert error[found.bound > 0].max() > 2 * ROUNDING[torch.float32] * length  # something was skipped indeed


def test_the_bound_fails_where_it_is_halved_or_the_mass_forgotten(device, monkeypatch) -> None:
    """The check above can fail: without the mean, or with a radius that is too small, errors pass the bound."""
    problem = make("adversarial", device)
    _, exact = problem.gradients(naive_logprobs)

    def worst() -> float:
        found, gradient = problem.gradients(certified_logprobs, skip_tolerance=0.3, backend="chunked")
        skipped = found.bound > 0
        return (row_norms(gradient - exact)[skipped] / found.bound[skipped]).max().item()

    assert 0.1 < worst() <= 1.0
    init = skipping.Chunk.__init__

    def planted(self, weight: Tensor) -> None:
        init(self, weight)
        self.radius = self.radius * 0.02

    monkeypatch.setattr(skipping.Chunk, "__init__", planted)
    assert worst() > 1.0


@pytest.mark.parametrize("tolerance", [2.0**-8, 2.0**-4, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mass_that_is_dropped(kind, tolerance, backend, device, monkeypatch) -> None:
    """Read from the state of the pass: what it counted is at most the tolerance, and is what the product left out."""
    states = []
    bound = skipping.Skipping.bound
    monkeypatch.setattr(
        skipping.Skipping, "bound", lambda self, z: (states.append((self, z.clone())), bound(self, z))[1]
    )
    problem = make(kind, device, torch.float32)
    problem.labels.clamp_(min=0)
    problem.weight = torch.cat([problem.weight, torch.ones_like(problem.weight[:, :1])], 1)  # its pull counts the mass
    problem.hidden = torch.cat([problem.hidden, torch.zeros_like(problem.hidden[:, :1])], 1)
    monkeypatch.setattr(
        skipping.Chunk,
        "__init__",
        lambda self, weight, init=skipping.Chunk.__init__: (init(self, weight), self.mean.zero_())[0],
    )
    _, gradient = problem.gradients(certified_logprobs, skip_tolerance=tolerance, backend=backend, ignore_index=None)
    ((state, normalizer),) = states
    share = state.dropped / normalizer
    assert normalizer.max() < passes.OVERFLOW
    assert (share <= tolerance * (1 + 1e-5)).all()
    assert (kind == "flat" and tolerance < 0.01) or share.max() > tolerance / 20
    torch.testing.assert_close(gradient[:, -1], share, rtol=1e-3, atol=1e-5)  # p_y - 1 + what was multiplied


def test_flat_rows_are_multiplied_whole(backend, device, monkeypatch) -> None:
    """Nothing can be dropped: no gathering, the bound is 0 and the result that of the exact pass."""
    problem = make("flat", device, torch.float32)
    problem.hidden *= 0.01
    found, gradient = problem.gradients(certified_logprobs, skip_tolerance=2.0**-10, backend=backend)
    assert found.kept_columns.item() == 1.0 and not found.bound.any()
    torch.testing.assert_close(gradient, problem.gradients(linear_logprobs, backend=backend)[1], rtol=1e-5, atol=1e-6)


def test_rows_of_like_demand_meet(backend, device) -> None:
    """One flat row in ten costs its own group, not every group: of a block of 96 rows they are in one group of 32."""
    problem = make("peaked", device, torch.float32, n=96)
    problem.hidden *= 2.0
    problem.hidden[::7] *= 50.0  # undo the flat rows of `make`
    problem.labels = (problem.hidden @ problem.weight.T).argmax(1)
    peaked, _ = problem.gradients(certified_logprobs, skip_tolerance=2.0**-6, backend=backend)
    problem.hidden[::10] *= 0.001
    mixed, _ = problem.gradients(certified_logprobs, skip_tolerance=2.0**-6, backend=backend)
    assert peaked.kept_columns < 0.25 and 1 / 3 < mixed.kept_columns < 0.5


@pytest.mark.parametrize("forced", [False, True], ids=["one_row", "every_row"])
def test_overflow_rows_are_exact(forced, backend, device, monkeypatch) -> None:
    problem = make("peaked", device, torch.float32)
    problem.hidden[40] *= 80.0
    problem.labels[40] = (problem.hidden[40] @ problem.weight.T).argmin()
    if forced:
        monkeypatch.setattr(passes, "OVERFLOW", -1.0)
    found, gradient = problem.gradients(certified_logprobs, skip_tolerance=2.0**-5, backend=backend)
    _, exact = problem.double().gradients(naive_logprobs)
    assert found.bound[40] == 0 and (not forced or not found.bound.any())
    assert found.bound.isfinite().all()
    assert (
        row_norms(gradient - exact) <= found.bound + ROUNDING[torch.float32] * problem.weight.norm(dim=1).max()
    ).all()


def test_a_row_that_is_not_finite_stays_visible_and_alone(backend, device) -> None:
    problem = make("peaked", device, torch.float32)
    problem.labels.clamp_(min=0)
    problem.hidden[7, 3] = torch.nan
    found, gradient = problem.gradients(certified_logprobs, skip_tolerance=2.0**-5, backend=backend)
    assert found.logps[7].isnan() and found.logps.isnan().sum() == 1
    others = torch.arange(len(gradient), device=device) != 7
    _, exact = problem.double().gradients(naive_logprobs)
    limit = found.bound + ROUNDING[torch.float32] * problem.weight.norm(dim=1).max()
    assert gradient[others].isfinite().all() and (row_norms(gradient - exact) <= limit)[others].all()


def test_the_same_bits_every_run(backend, device) -> None:
    problem = make("peaked", device, torch.bfloat16)
    first, second = (problem.gradients(certified_logprobs, skip_tolerance=2.0**-6, backend=backend) for _ in range(2))
    assert torch.equal(first[1], second[1]) and torch.equal(first[0].bound, second[0].bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_without_gradients_nothing_is_skipped(dtype, backend, device) -> None:
    problem = make("peaked", device, dtype)
    with torch.no_grad():
        found = certified_logprobs(problem.hidden, problem.weight, problem.labels, skip_tolerance=0.1, backend=backend)
    assert not found.bound.any() and found.kept_columns == 0 and not found.logps.requires_grad
    assert torch.equal(found.logps, linear_logprobs(problem.hidden, problem.weight, problem.labels, backend=backend))


def test_no_rows(backend, device) -> None:
    for labels in (torch.full((3,), -100, device=device), torch.empty(0, dtype=torch.int64, device=device)):
        hidden = torch.randn(len(labels), 8, device=device, requires_grad=True)
        found = certified_logprobs(
            hidden, torch.randn(30, 8, device=device), labels, skip_tolerance=0.1, backend=backend
        )
        assert not found.logps.any() and not torch.autograd.grad(found.logps.sum(), hidden)[0].any()
        assert found.kept_columns == 0


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_loss(packed, backend, device) -> None:
    """The loss is that of the exact module; its gradient is as far off as `gradient_bound` at most."""
    problem = make("peaked", device, torch.float32, n=144)
    shape, bounds = ((144, 16), torch.arange(0, 145, 24, device=device)) if packed else ((6, 24, 16), None)
    likely = (problem.hidden @ problem.weight.T).argmax(1)
    labels = problem.labels.where(problem.labels < 80, likely).view(shape[:-1])  # ignored rows stay ignored
    found, gradients = [], []
    for tolerance in (None, 2.0**-5):
        hidden = problem.hidden.detach().view(shape).requires_grad_()
        module = FusedLinearSynPOLoss(alpha=5.0, backend=backend, skip_tolerance=tolerance)
        found.append(module(hidden, problem.weight, labels, cu_seqlens=bounds))
        gradients.append(torch.autograd.grad(found[-1].loss, hidden)[0])
    exact, skipped = found
    for name in exact.__dataclass_fields__:
        assert torch.equal(getattr(exact, name), getattr(skipped, name)), name
    error = (gradients[0] - gradients[1]).norm()
    assert 1e-4 * gradients[0].norm() < error <= skipped.gradient_bound < 0.3 * gradients[0].norm()
    assert 0 < skipped.kept_columns < 0.7 and not skipped.gradient_bound.requires_grad


def test_backward_twice(backend, device) -> None:
    problem = make("peaked", device, torch.float32)
    hidden = problem.hidden.detach().requires_grad_()
    logps = certified_logprobs(hidden, problem.weight, problem.labels, skip_tolerance=2.0**-5, backend=backend).logps
    upstream = torch.randn(len(logps), generator=torch.Generator().manual_seed(1)).to(device)
    first, second = (
        torch.autograd.grad((logps * g).sum(), hidden, retain_graph=True)[0] for g in (upstream, 3 * upstream)
    )
    torch.testing.assert_close(3 * first, second)


def arguments(problem: Problem) -> tuple:
    hidden = problem.hidden.detach().requires_grad_()
    return hidden, problem.weight, problem.bias, problem.labels, 3.0, 0.5, -100, "chunked", 2.0**-5, True


def test_opcheck_and_compile(backend, device) -> None:
    problem = make("peaked", torch.device("cpu"), torch.float32, head="all", n=20)
    torch.library.opcheck(certified.certified, arguments(problem))
    problem = make("peaked", device, torch.float32, n=24)
    module = FusedLinearSynPOLoss(skip_tolerance=2.0**-5, backend=backend)

    def step(hidden: Tensor):
        return module(torch.tanh(hidden), problem.weight, problem.labels.view(4, 6))

    hidden = problem.hidden.view(4, 6, 16).requires_grad_()
    torch.compiler.reset()
    eager, graph = step(hidden), torch.compile(step, fullgraph=True, backend="aot_eager")(hidden)
    assert torch.equal(eager.gradient_bound, graph.gradient_bound) and torch.equal(eager.loss, graph.loss)
    assert torch.equal(torch.autograd.grad(eager.loss, hidden)[0], torch.autograd.grad(graph.loss, hidden)[0])


def test_no_host_read_on_the_triton_path(device) -> None:
    problem = make("peaked", device, torch.float32)
    with HostReads() as reads, torch.no_grad():
        certified.certified._init_fn(*arguments(problem)[:7], "triton", 2.0**-5, True)
    assert reads.found == []


def test_refusals(device) -> None:
    problem = make("flat", device, torch.float32)
    given = problem.hidden, problem.weight.requires_grad_(), problem.labels
    with pytest.raises(ValueError, match="frozen head"):
        certified_logprobs(*given, skip_tolerance=0.1)
    with pytest.raises(ValueError, match="frozen head"):
        FusedLinearSynPOLoss(skip_tolerance=0.1)(problem.hidden.view(10, 13, 16), given[1], problem.labels.view(10, 13))
    for tolerance in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="skip_tolerance must lie"):
            certified_logprobs(*given, skip_tolerance=tolerance)
    with pytest.raises(ValueError, match="memory='default'"):
        FusedLinearSynPOLoss(skip_tolerance=0.1, memory="low")


def test_tiles_do_not_straddle_groups() -> None:
    """A tile of rows takes the columns of its first row: tiles have to lie within groups."""
    for major in (None, *CHIPS):
        for size in (2, 4):
            assert 128 % product_config(major, size).block_n == 0
    assert fused.GROUP == skipping.GROUP
