"""The loss under pytest-benchmark, to compare two commits: `pytest bench --benchmark-autosave`, then `--benchmark-compare`.

One small shape for each provider that is here; `python -m bench.loss` is what compares providers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from bench import measure  # before torch

import pytest  # isort: skip
import torch  # isort: skip

from bench import cases, loss, peers, report, truth  # isort: skip

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASE = cases.Case(4096, 128256, 4096) if DEVICE.type == "cuda" else cases.Case(256, 8192, 256, "float32")


@pytest.fixture(scope="module", params=peers.HEADS)
def problem(request: pytest.FixtureRequest) -> cases.Problem:
    return cases.make(CASE, DEVICE).with_head(request.param == "trained")


def finished(step: Callable[[], object]) -> None:
    """Run `step` until the device is done."""
    step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("provider", list(peers.providers()), ids=lambda provider: provider.name.replace(" ", "_"))
def test_forward_and_backward(benchmark: Any, provider: peers.Provider, problem: cases.Problem) -> None:
    try:
        loss_of = provider.load(DEVICE)
    except (ImportError, RuntimeError) as error:
        pytest.skip(report.reason_of(error))
    if ("trained" if problem.trained else "frozen") not in provider.heads:
        pytest.skip("not for this head")
    step = partial(loss.step, loss_of, problem)
    step()
    pair = truth.truth(truth.first_pair(problem), provider.objective).hidden / CASE.pairs
    assert problem.hidden.grad is not None
    assert truth.error(problem.hidden.grad[[0, CASE.pairs]], pair) < truth.TOLERANCE[CASE.dtype]
    benchmark.extra_info |= measure.machine(DEVICE)
    benchmark.pedantic(partial(finished, step), rounds=10, warmup_rounds=1)
