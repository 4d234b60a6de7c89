"""A trained head with the pair's coefficients known: against float64 and the streaming path, however pairs are grouped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from host_reads import HostReads
from synpo_kernels import FusedLinearSynPOLoss
from synpo_kernels.backends import passes
from synpo_kernels.head import Head
from synpo_kernels.ops import logprobs, scaling, trained_pairs
from synpo_kernels.reference import naive_synpo

B, T, D, V = 4, 6, 20, 70
LENGTHS = [6, 3, 5, 0, 2, 6, 4, 6]  # the fourth chosen completion is empty
ROW = V * 4  # bytes of a row of the workspace in fp32
GROUPS = {"one_group": 1 << 20, "some_groups": 18 * ROW, "a_pair_streams": 8 * ROW, "all_stream": 0}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
HEADS = {"plain": {}, "all": {"softcap": 4.0, "logit_scale": 0.7, "bias": True}}


class Problem:
    def __init__(self, device, dtype: torch.dtype = torch.float32, *, packed: bool = False, bias: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(2 * B, T, D, generator=generator)
        labels = torch.randint(0, V, (2 * B, T), generator=generator)
        for row, length in enumerate(LENGTHS):
            labels[row, length:] = -100
        labels[2, 0] = -100
        self.bounds = None
        if packed:
            rows = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
            self.bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)
            hidden, labels = hidden[rows], labels[rows]
        draw = [hidden, torch.randn(V, D, generator=generator) * 0.5]
        draw += [torch.randn(V, generator=generator)] if bias else []
        self.tensors = [tensor.to(device, dtype) for tensor in draw]
        self.labels = labels.to(device)

    def leaves(self, dtype: torch.dtype, trained: bool = True) -> list[Tensor]:
        """Hidden, weight and perhaps bias."""
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in self.tensors]
        leaves[1].requires_grad_(trained)
        return leaves

    def expected(self, upstream: float = 1.0, **options) -> tuple[Tensor, ...]:
        leaves = self.leaves(torch.float64)
        bias = leaves[2] if len(leaves) == 3 else None
        out = naive_synpo(*leaves[:2], self.labels, bias=bias, cu_seqlens=self.bounds, alpha=8.0, **options)
        return out.loss.detach(), *torch.autograd.grad(upstream * out.loss, leaves)

    def loss_of(self, leaves: list[Tensor], **options):
        bias = leaves[2] if len(leaves) == 3 else None
        module = FusedLinearSynPOLoss(alpha=8.0, **options)
        return module(*leaves[:2], self.labels, bias=bias, cu_seqlens=self.bounds)


def off(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(params=GROUPS)
def grouped(request, device, monkeypatch) -> str:
    monkeypatch.setitem(trained_pairs.PAIR_BYTES, device.type, GROUPS[request.param])
    monkeypatch.setitem(passes.WORKSPACE, device.type, 8192)  # several chunks of the vocabulary
    return request.param


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients(head, packed, grouped, backend, device) -> None:
    options = dict(HEADS[head])
    problem = Problem(device, packed=packed, bias=options.pop("bias", False))
    loss, *gradients = problem.expected(3.0, **options)
    leaves = problem.leaves(torch.float32)
    out = problem.loss_of(leaves, backend=backend, **options)
    assert abs(out.loss.item() - loss.item()) < 1e-6 and out.empty_pairs.item() == 1
    for found, expected in zip(torch.autograd.grad(3.0 * out.loss, leaves), gradients):
        assert off(found, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_as_streaming(dtype, grouped, backend, device) -> None:
    problem = Problem(device, dtype, bias=True)
    found, streamed = (
        (problem.loss_of(leaves := problem.leaves(dtype), backend=backend, memory=memory), leaves)
        for memory in ("default", "low")
    )
    for name in found[0].__dataclass_fields__:
        torch.testing.assert_close(getattr(found[0], name), getattr(streamed[0], name), rtol=1e-6, atol=1e-6)
    truth = problem.expected()[1:]
    pairs = zip(torch.autograd.grad(found[0].loss, found[1]), torch.autograd.grad(streamed[0].loss, streamed[1]), truth)
    for g, by_stream, exact in pairs:
        assert g.dtype == dtype
        assert off(g, exact) <= off(by_stream, exact) + TOLERANCE[dtype] / 4
        assert off(g, by_stream) < TOLERANCE[dtype]


def test_the_paths_are_taken(device, monkeypatch) -> None:
    """What the workspace allows decides, pair by pair; where it holds no row at all, all stream in one pass over W."""
    for allowed, streamed in ((1 << 20, 0), (9 * ROW, 0), (8 * ROW, 2), (0, 1)):
        calls = []
        monkeypatch.setitem(trained_pairs.PAIR_BYTES, device.type, allowed)
        stream = trained_pairs.Step._stream
        monkeypatch.setattr(
            trained_pairs.Step, "_stream", lambda *a, calls=calls, stream=stream: (calls.append(1), stream(*a))[1]
        )
        problem = Problem(device, packed=True)
        assert [LENGTHS[i] + LENGTHS[B + i] for i in range(B)] == [8, 9, 9, 6]
        problem.loss_of(problem.leaves(torch.float32), backend="chunked")
        assert len(calls) == streamed
        monkeypatch.setattr(trained_pairs.Step, "_stream", stream)


def test_backward_twice_and_with_other_numbers(backend, device) -> None:
    problem = Problem(device, bias=True)
    leaves = problem.leaves(torch.float32)
    loss = problem.loss_of(leaves, backend=backend).loss
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    thrice = torch.autograd.grad(-4.0 * loss, leaves)
    for a, b, c in zip(once, again, thrice):
        assert torch.equal(a, b) and torch.equal(-4.0 * a, c)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_what_is_wanted(wanted, backend, device) -> None:
    """Hidden, weight and bias in any combination; the first alone is the frozen head."""
    problem = Problem(device, bias=True)
    expected = problem.expected()[1:]
    leaves = problem.leaves(torch.float32)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    found = torch.autograd.grad(problem.loss_of(leaves, backend=backend).loss, [leaves[i] for i in wanted])
    for i, gradient in zip(wanted, found):
        assert off(gradient, expected[i]) < 1e-5


@pytest.mark.parametrize("forced", [False, True], ids=["one_row", "every_row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_overflow(dtype, forced, backend, device, monkeypatch) -> None:
    """A row whose exponentials overflow, in a group of others; or the way round forced on all of them."""
    problem = Problem(device, dtype)
    if forced:
        monkeypatch.setattr(passes, "OVERFLOW", -1.0)
    else:
        problem.tensors[0][5, 1] *= 60.0
        logits = problem.tensors[0].double() @ problem.tensors[1].double().T
        gap = logits.amax(-1) - logits.gather(-1, problem.labels.clamp(min=0)[..., None])[..., 0]
        assert gap[5, 1] > 100 and (gap > 60).sum() == 1
    expected = problem.expected()
    leaves = problem.leaves(dtype)
    out = problem.loss_of(leaves, backend=backend)
    assert abs(out.loss.item() - expected[0].item()) < 1e-4
    for found, exact in zip(torch.autograd.grad(out.loss, leaves), expected[1:]):
        assert off(found, exact) < TOLERANCE[dtype]


def test_a_mean_over_the_whole_batch(grouped, device) -> None:
    """Groups do not average on their own: with "sum" the gradients are those of "mean" times the pairs that count."""
    problem = Problem(device)
    gradients = []
    for reduction in ("mean", "sum"):
        leaves = problem.leaves(torch.float32)
        out = problem.loss_of(leaves, backend="chunked", reduction=reduction)
        gradients.append(torch.autograd.grad(out.loss, leaves))
    for mean, total in zip(*gradients):
        assert off(3.0 * mean, total) < 1e-6


def test_nothing_counts(backend, device) -> None:
    problem = Problem(device)
    problem.labels.fill_(-100)
    leaves = problem.leaves(torch.float32)
    out = problem.loss_of(leaves, backend=backend)
    assert out.loss.item() == 0 and not any(g.any() for g in torch.autograd.grad(out.loss, leaves))


def test_ignored_rows_reach_nothing(grouped, backend, device) -> None:
    problem = Problem(device)
    expected = problem.expected()
    problem.tensors[0][problem.labels == -100] = torch.nan
    leaves = problem.leaves(torch.float32)
    for found, exact in zip(torch.autograd.grad(problem.loss_of(leaves, backend=backend).loss, leaves), expected[1:]):
        assert off(found, exact) < 1e-5


def test_tied_embedding(backend, device) -> None:
    problem = Problem(device)
    tokens = torch.randint(0, V, (2 * B, T), generator=torch.Generator().manual_seed(1)).to(device)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        embedding = problem.leaves(dtype)[1]
        hidden = torch.tanh(embedding[tokens])
        if dtype == torch.float64:
            loss = naive_synpo(hidden, embedding, problem.labels, alpha=8.0).loss
        else:
            loss = FusedLinearSynPOLoss(alpha=8.0, backend=backend)(hidden, embedding, problem.labels).loss
        gradients.append(torch.autograd.grad(loss, embedding)[0])
    assert off(gradients[1], gradients[0]) < 1e-5


def test_autocast(backend, device) -> None:
    problem = Problem(device)
    leaves, half = problem.leaves(torch.float32), problem.leaves(torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = problem.loss_of(leaves, backend=backend).loss
    expected = problem.loss_of(half, backend=backend).loss
    assert torch.equal(loss, expected)
    for found, exact in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, half)):
        assert found.dtype == torch.float32 and torch.equal(found, exact.float())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_compiled(packed, backend, device) -> None:
    problem = Problem(device, packed=packed, bias=True)
    leaves = problem.leaves(torch.float32)
    module = FusedLinearSynPOLoss(alpha=8.0, backend=backend)

    def step(hidden: Tensor, weight: Tensor, bias: Tensor):
        return module(torch.tanh(hidden), weight, problem.labels, bias=bias, cu_seqlens=problem.bounds)

    torch.compiler.reset()
    eager, graph = step(*leaves), torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    for name in eager.__dataclass_fields__:
        assert torch.equal(getattr(graph, name), getattr(eager, name)), name
    for a, b in zip(torch.autograd.grad(2 * graph.loss, leaves), torch.autograd.grad(2 * eager.loss, leaves)):
        assert torch.equal(a, b)


def arguments(problem: Problem, dtype: torch.dtype, want: tuple[bool, bool, bool]) -> tuple:
    hidden, weight, *bias = problem.leaves(dtype)
    flat = hidden.detach().reshape(-1, D).requires_grad_(want[0])
    bias = bias[0].detach().requires_grad_(want[2]) if bias else None
    weight = weight.detach().requires_grad_(want[1])
    options = (2 * B, 8.0, 0.2, "mean", None, 1.0, -100, "chunked", want)
    return flat, weight, bias, problem.labels.reshape(-1), problem.bounds, *options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, monkeypatch) -> None:
    monkeypatch.setattr(scaling, "may_overwrite", lambda kept: False)  # opcheck reads again what the op returned
    cpu = torch.device("cpu")
    torch.library.opcheck(trained_pairs.synpo_trained.op, arguments(Problem(cpu), dtype, (True, True, False)))
    packed = Problem(cpu, packed=True, bias=True)
    torch.library.opcheck(trained_pairs.synpo_trained.op, arguments(packed, dtype, (True, False, True)))


def test_bf16_sums_over_groups_are_rounded_once(device, monkeypatch) -> None:
    """Many groups: sums in bf16 would lose what a single group adds."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(400, 1, 4, generator=generator).to(device, torch.bfloat16)  # 200 pairs that all push one way
    weight = torch.randn(8, 4, generator=generator).to(device, torch.bfloat16)
    labels = torch.zeros(400, 1, dtype=torch.int64, device=device)
    labels[200:] = 1
    monkeypatch.setitem(trained_pairs.PAIR_BYTES, device.type, 8 * 4 * 4)  # two pairs
    leaf, exact = weight.clone().requires_grad_(), weight.double().requires_grad_()
    module = FusedLinearSynPOLoss(reduction="sum", ignore_index=None, backend="chunked", alpha=1.0)
    (found,) = torch.autograd.grad(module(hidden, leaf, labels).loss, leaf)
    (expected,) = torch.autograd.grad(200 * naive_synpo(hidden.double(), exact, labels, alpha=1.0).loss, exact)
    assert off(found, expected) < 3e-3


class Products(TorchDispatchMode):
    """Operations of all matrix products."""

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.operations += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        assert name not in ("bmm", "baddbmm", "mv", "addmv_", "dot"), "a product that is not counted"
        return function(*args, **(kwargs or {}))


def test_products_counted(monkeypatch) -> None:
    """In units of G = 2·N·V·D: frozen 2, without gradients 1, trained 3, streamed 4. Rows that are ignored are free."""
    n, v, d = 64, 300, 64
    hidden, weight = torch.randn(n, d), torch.randn(v, d)
    labels = torch.randint(0, v, (n,))
    labels[::4] = -100
    product = 2 * int((labels >= 0).sum()) * v * d
    head, g = Head(weight), torch.ones(n)

    def counted(run) -> float:
        with Products() as products:
            run()
        return products.operations / product

    def passed(want: tuple[bool, bool, bool] | None, direction: bool = False) -> None:
        found = logprobs.forward(hidden, head, labels, -100, "chunked", want_direction=direction, workspace=None)
        if want is not None:
            logprobs.gradients(hidden, head, labels, -100, "chunked", found, g, want=want, workspace=None)

    def trained() -> None:  # inside the op, where the mode sees every operation
        options = (4, 30.0, 0.2, "mean", None, 1.0, -100, "chunked", (True, True, False))
        trained_pairs.synpo_trained.run(hidden, weight, None, labels, None, *options)

    assert counted(lambda: passed(None, direction=True)) == 2
    assert counted(lambda: passed(None)) == 1
    assert counted(lambda: passed((True, True, False))) == 4
    assert counted(trained) == 3
    monkeypatch.setitem(trained_pairs.PAIR_BYTES, "cpu", 0)
    assert counted(trained) == 4


def test_no_host_read_on_the_triton_path(device) -> None:
    """Padded rows, some ignored: what the host may not know stays on the device."""

    problem = Problem(device)
    given = arguments(problem, torch.float32, (True, True, False))
    with HostReads() as reads, torch.no_grad():
        trained_pairs.synpo_trained.run(*given[:-2], "triton", given[-1])
    assert reads.found == []
