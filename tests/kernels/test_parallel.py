"""Heads spread over processes: two real ones (gloo) run every check below on shards, against the whole head in float64.

The file is its own worker: `python test_parallel.py RANK FOLDER` runs the checks and writes what failed.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from synpo_kernels import FusedLinearSynPOLoss, linear_logprobs
from synpo_kernels.backends import passes
from synpo_kernels.ops import parallel
from synpo_kernels.reference import naive_logprobs, naive_synpo
from workers import run_workers

CHECKS: dict[str, Callable[[int], None]] = {}
N, V, D, R = 13, 37, 11, 3


def two_processes(function: Callable[[int], None]) -> Callable[[int], None]:
    CHECKS[function.__name__] = function
    return function


class Case:
    """A problem every process draws alike, float64, and its solution from full logits."""

    def __init__(self, *, bias: bool = False, rank: int = 0, spread: float = 1.0, **options: float) -> None:
        generator = torch.Generator().manual_seed(3)
        draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
        self.hidden, self.weight, self.upstream = draw(N, D) * spread, draw(V, D), draw(N)
        self.bias = draw(V) if bias else None
        self.u, self.b = (draw(N, rank), draw(V, rank)) if rank else (None, None)
        self.labels = torch.randint(0, V, (N,), generator=generator)
        self.labels[:4] = torch.tensor([0, V - 1, 14, 15])  # both ends, and both sides of a border
        self.labels[6:8] = -100
        self.options = options
        inputs = {k: t.clone().requires_grad_() for k, t in self.tensors().items()}
        hidden, weight = inputs["hidden"], inputs["weight"]
        if rank:
            hidden, weight = torch.cat([hidden, inputs["u"]], 1), torch.cat([weight, inputs["b"]], 1)
        self.logps = naive_logprobs(hidden, weight, self.labels, bias=inputs.get("bias"), **options)
        found = torch.autograd.grad((self.logps * self.upstream).sum(), list(inputs.values()))
        self.gradients = dict(zip(inputs, found))

    def tensors(self) -> dict[str, Tensor]:
        names = ("hidden", "weight", "bias", "u", "b")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def shard(self, rows: slice, dtype: torch.dtype, trained: bool) -> dict[str, Tensor]:
        """This process's inputs: its rows of the head, all of the rest."""
        inputs = {}
        for name, value in self.tensors().items():
            part = value[rows] if name in ("weight", "bias", "b") else value
            inputs[name] = part.to(dtype, copy=True).requires_grad_(trained or name in ("hidden", "u"))
        return inputs

    def check(
        self, rows: slice, dtype: torch.dtype = torch.float64, trained: bool = True, tolerance: float = 1e-10, **more
    ) -> None:
        inputs = self.shard(rows, dtype, trained)
        logps = call(inputs, self.labels, **self.options, **more)
        torch.testing.assert_close(logps.double(), self.logps, rtol=tolerance, atol=tolerance)
        with no_communication():
            (logps * self.upstream).sum().backward()
        for name, value in inputs.items():
            if not value.requires_grad:
                continue
            expected = self.gradients[name]
            expected = expected[rows] if name in ("weight", "bias", "b") else expected
            error = (value.grad.double() - expected).norm()
            assert error <= tolerance * expected.norm() + tolerance, (name, float(error))


def call(inputs: dict[str, Tensor], labels: Tensor, **options) -> Tensor:
    low_rank = (inputs["u"], inputs["b"]) if "u" in inputs else None
    return linear_logprobs(
        inputs["hidden"], inputs["weight"], labels, bias=inputs.get("bias"), low_rank=low_rank, **options
    )


@contextmanager
def no_communication() -> Iterator[None]:
    def refuse(*args, **kwargs):
        raise AssertionError("the backward pass must not communicate")

    before = dist.all_reduce, dist.all_gather
    dist.all_reduce = dist.all_gather = refuse
    try:
        yield
    finally:
        dist.all_reduce, dist.all_gather = before


@contextmanager
def overflow_at(limit: float) -> Iterator[None]:
    before, passes.OVERFLOW = passes.OVERFLOW, limit
    try:
        yield
    finally:
        passes.OVERFLOW = before


def rows_of(rank: int, border: int) -> slice:
    return slice(0, border) if rank == 0 else slice(border, V)


@two_processes
def shards_of_any_size(rank: int) -> None:
    for border in (19, 15, 1, 0, V):  # the last two leave one process without a row
        for trained in (False, True):
            Case(bias=True).check(rows_of(rank, border), trained=trained, group=dist.group.WORLD)


@two_processes
def every_head(rank: int) -> None:
    for options in ({}, {"softcap": 3.0}, {"logit_scale": 0.3}, {"bias": True, "softcap": 5.0, "logit_scale": 1.7}):
        Case(**options).check(rows_of(rank, 15), group=dist.group.WORLD)


@two_processes
def low_rank_addition(rank: int) -> None:
    for trained in (False, True):
        Case(rank=R, bias=True, softcap=4.0).check(rows_of(rank, 15), trained=trained, group=dist.group.WORLD)


@two_processes
def overflowing_rows(rank: int) -> None:
    case = Case(bias=True, softcap=2.0)
    with overflow_at(-1.0):  # every row
        for border in (15, 0):
            case.check(rows_of(rank, border), group=dist.group.WORLD)
    steep = Case(spread=300.0)  # largest logits far more than 88 above the label's: float32 overflows
    for trained in (False, True):
        steep.check(rows_of(rank, 15), torch.float32, trained, 3e-4, group=dist.group.WORLD)


@two_processes
def half_precision(rank: int) -> None:
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2.5e-2), (torch.float16, 3e-3)):
        for trained in (False, True):
            Case(bias=True).check(rows_of(rank, 15), dtype, trained, tolerance, group=dist.group.WORLD)


@two_processes
def triton_tiles(rank: int) -> None:
    case = Case(bias=True, softcap=5.0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2.5e-2), (torch.float16, 3e-3)):
        case.check(rows_of(rank, 15), dtype, True, tolerance, group=dist.group.WORLD, backend="triton")
    Case(spread=300.0).check(rows_of(rank, 15), torch.float32, True, 3e-4, group=dist.group.WORLD, backend="triton")


@two_processes
def small_workspace(rank: int) -> None:
    workspace = 2 * 2 * D * 8 * 4  # four rows at a time
    Case(bias=True).check(rows_of(rank, 15), group=dist.group.WORLD, workspace=workspace)


@two_processes
def no_label_is_ignored(rank: int) -> None:
    case = Case()
    case.labels[6:8] = torch.tensor([3, 30])
    inputs = case.shard(rows_of(rank, 15), torch.float64, True)
    logps = call(inputs, case.labels, ignore_index=None, group=dist.group.WORLD)
    expected = naive_logprobs(case.hidden, case.weight, case.labels)
    torch.testing.assert_close(logps, expected)
    with torch.no_grad():
        torch.testing.assert_close(
            call(inputs, case.labels, ignore_index=3, group=dist.group.WORLD), expected.where(case.labels != 3, 0.0)
        )


@two_processes
def the_same_twice_and_on_both(rank: int) -> None:
    case = Case(bias=True)
    found = []
    for _ in range(2):
        inputs = case.shard(rows_of(rank, 15), torch.float32, True)
        logps = call(inputs, case.labels, group=dist.group.WORLD)
        (logps * case.upstream).sum().backward()
        found.append([logps.detach(), *(t.grad for t in inputs.values())])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    for value in found[0][:2]:  # log-probabilities and the gradient of the hidden states
        both = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(both, value.contiguous())
        assert torch.equal(*both)


@two_processes
def the_loss(rank: int) -> None:
    case = Case(bias=True)
    bounds = torch.tensor([0, 3, 6, 10, N])
    inputs = case.shard(rows_of(rank, 15), torch.float64, True)
    module = FusedLinearSynPOLoss(alpha=4.0, group=dist.group.WORLD)
    loss = module(inputs["hidden"], inputs["weight"], case.labels, bias=inputs["bias"], cu_seqlens=bounds).loss
    loss.backward()
    whole = {k: t.clone().requires_grad_() for k, t in case.tensors().items()}
    expected = naive_synpo(
        whole["hidden"], whole["weight"], case.labels, bias=whole["bias"], alpha=4.0, cu_seqlens=bounds
    ).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(inputs["hidden"].grad, whole["hidden"].grad)
    torch.testing.assert_close(inputs["weight"].grad, whole["weight"].grad[rows_of(rank, 15)])


@two_processes
def a_group_of_its_own_order(rank: int) -> None:
    """Ranks are those of the group; another group may hold the head whole."""
    Case().check(slice(0, V), group=[dist.new_group([r]) for r in (0, 1)][rank])


@two_processes
def a_label_past_the_end_is_refused(rank: int) -> None:
    case = Case()
    case.labels[5] = V
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, {V}\), the rows of all shards.* from 0 to {V}"):
        call(case.shard(rows_of(rank, 15), torch.float64, False), case.labels, group=dist.group.WORLD)


@two_processes
def checkpointed(rank: int) -> None:
    case = Case()
    inputs = case.shard(rows_of(rank, 15), torch.float64, True)
    logps = checkpoint(call, inputs, case.labels, group=dist.group.WORLD, use_reentrant=False)
    (logps * case.upstream).sum().backward()
    torch.testing.assert_close(inputs["hidden"].grad, case.gradients["hidden"])
    torch.testing.assert_close(inputs["weight"].grad, case.gradients["weight"][rows_of(rank, 15)])


@two_processes
def compiled_without_breaks(rank: int) -> None:
    case = Case()
    inputs = case.shard(rows_of(rank, 15), torch.float64, True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        logps = linear_logprobs(hidden, weight, case.labels, group=dist.group.WORLD)
        return (logps * case.upstream).sum()

    step(inputs["hidden"], inputs["weight"]).backward()
    torch.testing.assert_close(inputs["hidden"].grad, case.gradients["hidden"])
    torch.testing.assert_close(inputs["weight"].grad, case.gradients["weight"][rows_of(rank, 15)])


def distributed(value: Tensor, placement) -> nn.Parameter:
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    return nn.Parameter(distribute_tensor(value, init_device_mesh("cpu", (2,)), [placement]))


@two_processes
def a_dtensor_with_a_group_is_used_in_parts(rank: int) -> None:
    from torch.distributed.tensor import Shard

    case = Case()
    weight = distributed(case.weight, Shard(0))
    hidden = case.hidden.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"must be sharded by rows.*leave group out"):
        linear_logprobs(hidden, distributed(case.weight, Shard(1)), case.labels, group=dist.group.WORLD)
    logps = linear_logprobs(hidden, weight, case.labels, group=dist.group.WORLD)
    torch.testing.assert_close(logps, case.logps)
    with no_communication():
        (logps * case.upstream).sum().backward()
    torch.testing.assert_close(hidden.grad, case.gradients["hidden"])
    torch.testing.assert_close(weight.grad.full_tensor(), case.gradients["weight"])


@two_processes
def a_dtensor_without_a_group_is_gathered(rank: int) -> None:
    """Data parallel: each process has hidden states of its own, and the gradient of the head is their mean."""
    from torch.distributed.tensor import Shard

    case = Case(bias=True)
    own = slice(0, 7) if rank == 0 else slice(7, N)
    for trained in (True, False):
        weight, bias = distributed(case.weight, Shard(0)), distributed(case.bias, Shard(0))
        weight.requires_grad_(trained), bias.requires_grad_(trained)
        hidden = case.hidden[own].clone().requires_grad_()
        logps = linear_logprobs(hidden, weight, case.labels[own], bias=bias)
        torch.testing.assert_close(logps, case.logps[own])
        (logps * case.upstream[own]).sum().backward()
        torch.testing.assert_close(hidden.grad, case.gradients["hidden"][own])
        if trained:
            torch.testing.assert_close(weight.grad.full_tensor(), case.gradients["weight"] / 2)
            torch.testing.assert_close(bias.grad.full_tensor(), case.gradients["bias"] / 2)


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    runpy.run_path(str(Path(__file__).with_name("conftest.py")))  # mends the interpreter
    torch.use_deterministic_algorithms(True)  # and poisons scratch with NaN
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    failed = {}
    for name, function in CHECKS.items():
        try:
            function(rank)
        except Exception:
            failed[name] = traceback.format_exc()
            break  # the other process may be a collective ahead: nothing after this means anything
        dist.barrier()
    (folder / f"failed-{rank}.json").write_text(json.dumps(failed))
    os._exit(0)  # without the farewell of a process group whose other half may be gone


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in either process: check → traceback. One start serves all checks."""
    folder = tmp_path_factory.mktemp("gloo")
    on_cpus = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    run_workers(__file__, range(2), str(folder), timeout=120, **on_cpus)
    reports = [folder / f"failed-{r}.json" for r in range(2)]
    return {k: v for report in reports if report.exists() for k, v in json.loads(report.read_text()).items()} | {
        "report": "" if all(r.exists() for r in reports) else "a process ended without a report"
    }


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, failures: dict[str, str]) -> None:
    if name in failures:
        pytest.fail(failures[name], pytrace=False)
    broken = [check for check in failures if check in CHECKS]
    order = list(CHECKS)
    if any(order.index(check) < order.index(name) for check in broken):
        pytest.skip(f"not reached: {broken[0]} failed")
    assert not failures["report"] or broken, failures["report"]


class Partitioned(nn.Parameter):
    """As ZeRO-3 leaves a parameter between its uses: no numbers, only an id."""

    def __new__(cls, full: Tensor, trained: bool = False) -> Partitioned:
        self = super().__new__(cls, full.new_empty(0), trained)
        self.ds_id, self.full = 7, full
        return self


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A double of deepspeed that gathers `Partitioned`; returns what it was asked."""
    asked = []

    class GatheredParameters:
        def __init__(self, parameters) -> None:
            self.parameters = list(parameters)

        def __enter__(self) -> None:
            asked.append(f"gather {len(self.parameters)}")
            for parameter in self.parameters:
                parameter.data = parameter.full

        def __exit__(self, *error) -> None:
            asked.append("release")
            for parameter in self.parameters:
                parameter.data = parameter.full.new_empty(0)

    module = types.ModuleType("deepspeed")
    module.zero = types.SimpleNamespace(GatheredParameters=GatheredParameters)
    module.__spec__ = types.SimpleNamespace(name="deepspeed")
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    return asked


@pytest.mark.parametrize("with_bias", [False, True])
def test_zero3_gathers_for_the_forward_pass_alone(with_bias: bool, deepspeed: list[str]) -> None:
    case = Case(bias=with_bias)
    hidden = case.hidden.clone().requires_grad_()
    bias = Partitioned(case.bias) if with_bias else None
    logps = linear_logprobs(hidden, Partitioned(case.weight), case.labels, bias=bias)
    assert deepspeed == [f"gather {1 + with_bias}", "release"]
    (logps * case.upstream).sum().backward()
    assert len(deepspeed) == 2
    torch.testing.assert_close(logps, case.logps)
    torch.testing.assert_close(hidden.grad, case.gradients["hidden"])
    with torch.no_grad():
        torch.testing.assert_close(
            linear_logprobs(case.hidden, Partitioned(case.weight), case.labels, bias=bias), logps
        )


def test_zero3_releases_after_an_error(deepspeed: list[str]) -> None:
    case = Case()
    with pytest.raises(ValueError, match="must share D"):
        linear_logprobs(case.hidden[:, 1:], Partitioned(case.weight), case.labels)
    assert deepspeed == ["gather 1", "release"]


def test_zero3_that_cannot_be_served_is_refused(monkeypatch: pytest.MonkeyPatch, deepspeed: list[str]) -> None:
    case = Case()
    hidden = case.hidden.clone().requires_grad_()
    with pytest.raises(ValueError, match="a head that is trained cannot be gathered from ZeRO-3"):
        linear_logprobs(hidden, Partitioned(case.weight, trained=True), case.labels)
    assert deepspeed == []
    monkeypatch.delitem(sys.modules, "deepspeed")
    monkeypatch.setattr(parallel, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="deepspeed cannot be imported to gather it"):
        linear_logprobs(hidden, Partitioned(case.weight), case.labels)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
