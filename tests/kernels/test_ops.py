"""The custom ops: schema, tracing and autograd as torch checks them, and torch.compile without a graph break."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from synpo_kernels import FusedLinearSynPOLoss, linear_logprobs
from synpo_kernels.ops import frozen_pairs, logprobs, scaling
from synpo_kernels.ops.opaque import op

N, V, D = 6, 11, 5


def arguments(dtype: torch.dtype, *, trained: bool, biased: bool, backend: str = "chunked", ignore_index=-100) -> tuple:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_(trained)
    bias = torch.randn(V, generator=generator).to(dtype).requires_grad_(trained) if biased else None
    labels = torch.tensor([3, -100, 0, 10, -100, 3])
    if ignore_index is None:
        labels = labels.clamp(min=0)
    return x, weight, None, bias, labels, None if biased else 2.0, 0.5, ignore_index, backend, None


@pytest.mark.parametrize("biased", [False, True], ids=["softcap", "bias"])
@pytest.mark.parametrize(("ignore_index", "dtype"), [(None, torch.float32), (-100, torch.bfloat16)], ids=str)
def test_opcheck(ignore_index, dtype, biased, monkeypatch) -> None:
    monkeypatch.setattr(scaling, "may_overwrite", lambda kept: False)  # opcheck reads again what the op returned
    given = arguments(dtype, trained=False, biased=biased, ignore_index=ignore_index)
    torch.library.opcheck(logprobs.linear_logprobs.op, (*given, "", True))
    given = arguments(dtype, trained=True, biased=biased, ignore_index=ignore_index)
    torch.library.opcheck(logprobs.linear_logprobs.op, (*given, "", False))
    x, weight, extra, bias, labels, *options = (a.detach() if isinstance(a, Tensor) else a for a in given)
    logps, normalizer, *_ = logprobs.linear_logprobs(x, weight, extra, bias, labels, *options, "", False)
    known = (x, weight, extra, bias, labels, logps, normalizer, torch.ones(N), *options)
    for want in [(True, False, False, False), (True, True, False, biased), (False, True, False, False)]:
        torch.library.opcheck(logprobs.linear_logprobs_gradients.op, (*known, want))


@pytest.mark.parametrize("want", [True, False])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_opcheck_of_the_loss(packed, want, monkeypatch) -> None:
    monkeypatch.setattr(scaling, "may_overwrite", lambda kept: False)
    x, weight, _, bias, labels, *_ = arguments(torch.float32, trained=False, biased=True)
    given = (torch.tensor([0, 4, 6]) if packed else None, 2, 30.0, 0.2, "mean", None, 0.5, -100, "chunked", None, want)
    torch.library.opcheck(frozen_pairs.synpo_frozen.op, (x.detach().requires_grad_(want), weight, bias, labels, *given))


class Seen(TorchDispatchMode):
    """Names of the operators run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_who_looks_on_sees_ops_whole() -> None:
    """A mode, fake and meta tensors, torch.func and classes of tensors meet the op; plain tensors pass the dispatcher by."""
    called = []

    @op("seen_by_a_test")
    def double(x: Tensor) -> Tensor:
        called.append(type(x))
        return 2 * x

    double.register_fake(torch.empty_like)
    double.register_autograd(lambda ctx, g: 2 * g, setup_context=lambda ctx, inputs, output: None)
    x = torch.ones(3, requires_grad=True)
    with Seen() as mode:
        double(x)
    assert "synpo_kernels::seen_by_a_test" in mode.names and "aten::mul.Tensor" not in mode.names
    assert called == [Tensor]
    with FakeTensorMode() as fake:
        assert double(torch.ones(3)).shape == (3,)
    assert double(fake.from_tensor(x)).shape == double(torch.ones(3, device="meta")).shape == (3,)
    assert called == [Tensor]
    assert torch.equal(torch.func.vmap(double)(torch.ones(2, 3)), 2 * torch.ones(2, 3))
    assert called == [Tensor] * 3, "a row at a time, as torch takes an op apart that it knows nothing of"
    assert "seen_by_a_test" not in double(x).grad_fn.name() and "double" in double(x).grad_fn.name()
    assert torch.equal(torch.autograd.grad(double(x).sum(), x)[0], 2 * torch.ones(3))
    with torch.no_grad():
        assert not double(x).requires_grad


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("ignore_index", [None, -100])
def test_compiled_logprobs(ignore_index, trained, backend, device) -> None:
    x, weight, _, bias, labels, *_ = arguments(torch.float32, trained=trained, biased=True, ignore_index=ignore_index)
    x, weight, bias, labels = (t.detach().to(device).requires_grad_(t.requires_grad) for t in (x, weight, bias, labels))
    wanted = [x, weight, bias] if trained else [x]

    def step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logps = linear_logprobs(torch.tanh(x), weight, labels, bias=bias, ignore_index=ignore_index, backend=backend)
        return (logps * torch.arange(N, device=device)).sum()

    eager = step(x, weight, bias)
    graph = compiled(step)(x, weight, bias)
    assert torch.equal(graph, eager)
    gradients = torch.autograd.grad(graph, wanted)
    assert all(torch.equal(g, e) for g, e in zip(gradients, torch.autograd.grad(eager, wanted)))
    with torch.no_grad():
        assert torch.equal(compiled(step)(x, weight, bias), eager)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_compiled_loss(packed, backend, device) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 3, D, generator=generator).to(device)
    labels = torch.randint(0, V, (4, 3), generator=generator).to(device)
    labels[0, 2] = -100
    weight = torch.randn(V, D, generator=generator).to(device)
    bounds = None
    if packed:
        hidden, labels = hidden.reshape(-1, D), labels.reshape(-1)
        bounds = torch.tensor([0, 4, 4, 9, 12], device=device)
    hidden.requires_grad_()
    module = FusedLinearSynPOLoss(backend=backend)

    def step(hidden: Tensor):
        return module(torch.tanh(hidden), weight, labels, cu_seqlens=bounds)

    eager, graph = step(hidden), compiled(step)(hidden)
    for name in eager.__dataclass_fields__:
        assert torch.equal(getattr(graph, name), getattr(eager, name)), name
    assert torch.equal(torch.autograd.grad(graph.loss, hidden)[0], torch.autograd.grad(eager.loss, hidden)[0])


def test_compiled_for_any_number_of_rows() -> None:
    """One graph serves every N once the size is marked dynamic."""
    weight = torch.randn(V, D)
    graph = compiled(lambda x, labels: linear_logprobs(x, weight, labels).sum())
    for n in (6, 9, 17):
        x, labels = torch.randn(n, D, requires_grad=True), torch.randint(0, V, (n,))
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(labels, 0)
        with torch.compiler.set_stance("fail_on_recompile" if n > 6 else "default"):
            torch.autograd.grad(graph(x, labels), x)
