"""What the host does for a pass of the loss: launches, torch operations and Python calls, counted so that they do not grow back.

A small pass takes under a millisecond on a GPU, and one with a small workspace a thousand launches: then it is the host that is
waited for. `python test_loss_host.py`, with tests/support in PYTHONPATH, prints a line a case, with microseconds a call (without
those of the driver); see `host_costs`.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from host_costs import Kernel, answer, asked, calls_of, costs, stand_in

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

N, V, D = 64, 1024, 64
BF16 = torch.bfloat16
# what is asked for → launches; torch operations and calls of functions at most
CASES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "frozen": ({}, 7, 20, 1010),
    "frozen, its pass alone": ({"alone": True}, 6, 18, 820),
    "frozen, no ignore_index": ({"ignore_index": None}, 5, 23, 850),
    "frozen, bias, softcap": ({"biased": True, "softcap": 5.0}, 7, 21, 1010),
    "frozen, fp16": ({"dtype": torch.float16}, 8, 26, 1140),
    "frozen, fp32": ({"dtype": torch.float32}, 7, 20, 930),
    "trained": ({"trained": True}, 9, 73, 1400),
    "pairs": ({"ends": "pairs"}, 2, 9, 200),
    "SynPO, frozen": ({"ends": "SynPO"}, 9, 29, 1080),
    "SynPO, trained": ({"ends": "SynPO", "trained": True}, 12, 99, 1690),
}
A_LAUNCH = 18  # calls of functions for one more launch at most; 30 by way of CompiledKernel.__getitem__


def asking(
    *,
    ends: str = "",
    dtype: torch.dtype = BF16,
    trained: bool = False,
    biased: bool = False,
    alone: bool = False,
    shift: int = 0,
    rows: int = N,
    **options: Any,
) -> Callable[[], Any]:
    """A call of the loss and, unless alone, its backward pass. shift: numbers by which x lies beside a multiple of 16 bytes."""
    from synpo_kernels import FusedLinearSynPOLoss, linear_logprobs, synpo_pairs

    x = torch.zeros(rows * D + shift, dtype=dtype)[shift:].view(8, -1, D).requires_grad_()
    w, b = torch.zeros(V, D, dtype=dtype, requires_grad=trained), torch.zeros(V, dtype=dtype) if biased else None
    labels, upstream = torch.zeros(8, rows // 8, dtype=torch.int64), torch.zeros(8, rows // 8)
    logps = torch.zeros(8, rows // 8, requires_grad=True)
    wanted = [x, w] if trained else [x]
    options["backend"] = "triton"
    module = FusedLinearSynPOLoss(**options) if ends == "SynPO" else None

    def run() -> Any:
        if ends == "pairs":
            return torch.autograd.grad(synpo_pairs(logps, labels, **options)[0].loss, logps)
        if module is not None:
            return torch.autograd.grad(module(x, w, labels, bias=b).loss, wanted)
        found = linear_logprobs(x, w, labels, bias=b, **options)
        return found if alone else torch.autograd.grad(found, wanted, upstream)

    return run


def counted(bound: list[Any]) -> dict[str, dict[str, Any]]:
    return {name: costs(asking(**asked_for), bound, times=100) for name, (asked_for, *_) in CASES.items()}


def a_launch() -> float:
    """Calls of functions for one more launch, among the many of a small workspace."""
    few, many = (asking(alone=True, rows=512, workspace=size) for size in (1 << 22, 120 << 10))
    found = []
    for run in (few, many):
        run()
        Kernel.launched.clear()
        found.append((calls_of(run), len(Kernel.launched)))
    (calls, launches), (more_calls, more_launches) = found
    assert more_launches > 2 * launches
    return (more_calls - calls) / (more_launches - launches)


def alike(bound: list[Any]) -> dict[str, int]:
    """How many launches Triton bound where tensors or settings changed, by what changed."""
    from synpo_kernels.kernels import launch

    changes: dict[str, dict[str, Any]] = {
        "as it is": {},
        "shifted": {"shift": 1},
        "more rows": {"rows": 256},
        "odd rows": {"rows": 200},
        "biased": {"biased": True},
        "capped": {"softcap": 5.0},
        "whole numbers": {"softcap": 5, "logit_scale": 2},
        "no ignore_index": {"ignore_index": None},
        "other ignore_index": {"ignore_index": -(2**40)},
        "workspace": {"rows": 512, "workspace": 120 << 10},
    }
    launch.compiled.clear()
    found: dict[str, int] = {}
    for again in ("", ", again"):
        for name, dtype, trained in product(changes, (BF16, torch.float16, torch.float32), (False, True)):
            bound.clear()
            asking(dtype=dtype, trained=trained, **changes[name])()
            if name in ("as it is", "other ignore_index", "no ignore_index"):
                asking(ends="SynPO", dtype=dtype, trained=trained, **changes[name])()
                asking(ends="pairs", **changes[name])()
            found[f"{name}, {dtype}, {'trained' if trained else 'frozen'}{again}"] = len(bound)
    return found


def let_go() -> bool:
    """Whether what a pass worked on is free when it is over: what is kept of launches holds no tensor."""
    from synpo_kernels import linear_logprobs

    x, w, labels = torch.zeros(N, D, dtype=BF16), torch.zeros(V, D, dtype=BF16), torch.zeros(N, dtype=torch.int64)
    for _ in range(2):
        linear_logprobs(x.requires_grad_(), w, labels, backend="triton")
    known: list[weakref.ref[Tensor]] = [weakref.ref(each) for each in (x, w, labels)]
    del x, w, labels
    gc.collect()
    return all(each() is None for each in known)


def told() -> bool:
    """Whether Triton tells of every launch, those of kept kernels too, while a profiler listens."""
    from triton import knobs

    run, listener = asking(alone=True), lambda _: None
    run()
    Kernel.launched.clear()
    run()
    knobs.runtime.launch_enter_hook.add(listener)
    run()
    knobs.runtime.launch_enter_hook.remove(listener)
    return Kernel.told == Kernel.launched


@pytest.fixture(scope="module")
def found() -> Any:
    return asked(__file__)


@pytest.mark.parametrize("name", CASES)
def test_a_pass_costs_the_host_little(name: str, found: Any) -> None:
    _, launches, operators, calls = CASES[name]
    seen = found["counted"][name]
    assert (seen["launches"], seen["bound anew"]) == (launches, 0)
    assert len(seen["operators"]) <= operators, seen["operators"]
    assert seen["calls"] <= calls


def test_one_of_many_launches_costs_the_host_little(found: Any) -> None:
    assert found["a launch"] <= A_LAUNCH


def test_what_is_kept_is_what_triton_would_choose(found: Any) -> None:
    """Whatever changes from call to call; the first call of its kind is bound by Triton, those like it are not."""
    anew = found["alike"]
    assert all(count == 0 for name, count in anew.items() if name.endswith(", again")), anew
    assert all(anew[f"{name}, {BF16}, frozen"] > 0 for name in ("as it is", "shifted", "biased", "capped")), anew
    assert anew[f"more rows, {BF16}, frozen"] == 0, "the number of rows compiles nothing anew"


def test_a_profiler_hears_of_every_launch(found: Any) -> None:
    assert found["told"]


def test_no_tensor_is_kept(found: Any) -> None:
    assert found["let go"]


if __name__ == "__main__":
    anew, compare = stand_in()
    results: dict[str, Any] = {"counted": counted(anew), "a launch": a_launch(), "let go": let_go(), "told": told()}
    compare()
    results["alike"] = alike(anew)
    answer(results)
