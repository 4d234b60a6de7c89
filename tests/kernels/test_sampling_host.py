"""What the host does for a drawn token: launches, torch operations and Python calls, counted so that they do not grow back.

The kernels take some 20 µs on a GPU, so it is the host that a call waits for. `python test_sampling_host.py`, with tests/support
in PYTHONPATH, prints a line a case, with microseconds a call (without those of the driver); see `host_costs`.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from host_costs import answer, asked, costs, stand_in

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

B, V = 8, 32_000
SAMPLED: dict[str, Any] = {"temperature": 0.5, "top_k": 32, "top_p": 0.9}
OWN = ["empty"] * 3  # tokens, their log-probabilities, scratch
SEEN = ["zeros", "clamp", "add", "scatter_", "slice"]
# settings → torch operations, launches
CASES: dict[str, tuple[dict[str, Any], list[str], int]] = {
    "given numbers": (SAMPLED, OWN, 2),
    "own numbers": ({**SAMPLED, "uniform": None}, ["rand", *OWN], 2),
    "greedy": ({"top_k": 32, "temperature": 0.0, "uniform": None}, OWN, 2),
    "cut-off": ({**SAMPLED, "plausibility": 0.1}, OWN, 3),
    "penalty": ({**SAMPLED, "repetition_penalty": 1.2}, [*SEEN, *OWN], 2),
}
CALLS = 110  # of Python and built-in functions at most: 63 to 80 as this is written, 240 to 270 where Triton binds anew


def counted(bound: list[Any]) -> dict[str, dict[str, Any]]:
    """Of a call like those before it, by case."""
    from synpo_kernels import contrastive_sample

    expert, amateur, history = torch.randn(B, V), torch.randn(B, V), torch.randint(V, (B, 9))
    results: dict[str, dict[str, Any]] = {}
    for name, (settings, _, _) in CASES.items():
        options = {"uniform": torch.rand(B, dtype=torch.float64), "history": history, "backend": "triton", **settings}

        def run(options: dict[str, Any] = options) -> Any:
            return contrastive_sample(expert, amateur, **options)

        results[name] = costs(run, bound, times=500)
    return results


def alike(bound: list[Any]) -> dict[str, int]:
    """How many launches Triton bound where tensors or settings changed, by what changed."""
    from synpo_kernels import contrastive_sample
    from synpo_kernels.kernels import contrast_sample, launch

    wide = torch.randn(4 * B * V + 1)
    history = torch.randint(V, (B, 9))
    uniform = torch.rand(B + 1, dtype=torch.float64)
    logits = {
        "apart": (wide[: B * V].view(B, V), wide[B * V : 2 * B * V].view(B, V)),
        "shifted": (wide[1 : 1 + B * V].view(B, V), wide[B * V : 2 * B * V].view(B, V)),
        "shifted amateur": (wide[: B * V].view(B, V), wide[1 : 1 + B * V].view(B, V)),
        "last of two": (wide[: 4 * B * V].view(2 * B, 2, V)[:B, -1], wide[: 4 * B * V].view(2 * B, 2, V)[B:, -1]),
        "fewer rows": (wide[: 3 * V].view(3, V), wide[B * V : (B + 3) * V].view(3, V)),
        "alone": (wide[: B * V].view(B, V), None),
        "half": (wide[: B * V].view(B, V).half(), wide[: B * V].view(B, V).half()),
        "odd V": (wide[: B * 999].view(B, 999), wide[: B * 999].view(B, 999)),
    }
    settings: dict[str, dict[str, Any]] = {
        "as it is": {},
        "whole numbers": {"alpha": 1, "repetition_penalty": 2, "top_p": 1, "temperature": 1},
        "penalty": {"repetition_penalty": 1.2, "plausibility": 0.1},
        "shifted uniform": {"shift": 1},
        "greedy": {"temperature": 0.0, "uniform": None},
    }
    contrast_sample.bound.cache_clear()
    launch.compiled.clear()
    found: dict[str, int] = {}
    for again in (False, True):
        for name, (expert, amateur) in logits.items():
            for how, given in settings.items():
                options = {**SAMPLED, **given}
                start, rows = options.pop("shift", 0), len(expert)
                options.setdefault("uniform", uniform[start : start + rows])
                bound.clear()
                contrastive_sample(expert, amateur, history=history[:rows], backend="triton", **options)
                found[f"{name}, {how}{', again' if again else ''}"] = len(bound)
    return found


def let_go() -> bool:
    """Whether what was drawn from is free when the call is over: the launches that are kept hold no tensor."""
    from synpo_kernels import contrastive_sample

    expert, amateur = torch.randn(B, V), torch.randn(B, V)
    for _ in range(2):
        contrastive_sample(expert, amateur, backend="triton", **SAMPLED)
    known = [weakref.ref(expert), weakref.ref(amateur)]
    del expert, amateur
    gc.collect()
    return all(each() is None for each in known)


@pytest.fixture(scope="module")
def found() -> Any:
    return asked(__file__)


@pytest.mark.parametrize("name", CASES)
def test_a_token_costs_the_host_little(name: str, found: Any) -> None:
    _, operators, launches = CASES[name]
    seen = found["counted"][name]
    assert seen["operators"] == operators
    assert (seen["launches"], seen["bound anew"]) == (launches, 0)
    assert seen["calls"] <= CALLS


def test_what_is_kept_is_what_triton_would_choose(found: Any) -> None:
    """Whatever changes from call to call; the first call of its kind is bound by Triton, those like it are not."""
    anew = found["alike"]
    assert all(count == 0 for name, count in anew.items() if name.endswith(", again")), anew
    assert all(count == 0 for name, count in anew.items() if name.startswith("fewer rows")), "rows are only the grid"
    assert all(anew[f"{name}, as it is"] > 0 for name in ("apart", "shifted", "shifted amateur", "half"))
    assert anew["last of two, as it is"] == 0, "a stride that is another multiple of 16"


def test_no_tensor_is_kept(found: Any) -> None:
    assert found["let go"]


if __name__ == "__main__":
    anew, compare = stand_in()
    with torch.inference_mode():
        results: dict[str, Any] = {"counted": counted(anew), "let go": let_go()}
        compare()
        results["alike"] = alike(anew)
    answer(results)
