"""What the host does for a drawn token: launches, torch operations and Python calls, counted so that they do not grow back.

The kernels take some 20 µs on a GPU, so it is the host that a call waits for. Here launches go through Triton's own binder,
with a chip and a compiler that are only named, on CPU tensors; nothing is drawn. As the interpreter is chosen when triton is
first imported, a process of its own does the work: `python test_sampling_host.py` prints a line a case, with microseconds a call
(without those of the driver).
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

ROOT = Path(__file__).resolve().parents[2]
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
CALLS = 110  # of Python and built-in functions at most: 67 to 85 as this is written, 240 to 270 where Triton binds anew


class Kernel:
    """Stands for a compiled kernel."""

    function = packed_metadata = None
    launched: list[str] = []

    def __init__(self, of: Any) -> None:
        from triton.compiler.compiler import CompiledKernel

        self.name, self.takes = of.__name__, len(of.arg_names)
        type(self).__getitem__ = CompiledKernel.__getitem__  # type: ignore[attr-defined]

    def _init_handles(self) -> None:
        pass

    def launch_metadata(self, grid: tuple[int, ...], stream: int, *arguments: Any) -> None:
        assert len(arguments) == self.takes

    def run(self, *_: Any) -> None:
        self.launched.append(self.name)


class Operators(TorchDispatchMode):
    """Names of the torch operations inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name().split("::")[1].split(".")[0])
        return function(*args, **(kwargs or {}))


def stand_in() -> tuple[list[Any], Callable[[], None]]:
    """Let the Triton path take CPU tensors.

    Returns:
        a list that grows by a kernel for every launch that Triton binds itself; and what makes every later launch be compared
        with Triton's own choice.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from synpo_kernels import contrast
    from synpo_kernels.kernels import tiles

    chip = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "get_current_stream": 0}
    triton.runtime.driver.set_active(SimpleNamespace(**{k: lambda *_, v=v: v for k, v in chip.items()}))
    contrast.triton_takes = lambda dtype, device: (True, "")

    def compile_(self: Any, key: Any, signature: Any, device: int, *_: Any, **__: Any) -> Kernel:
        kernel = self.device_caches[device][0][key] = Kernel(self)
        return kernel

    run, once, bound = JITFunction.run, tiles.Bound.__call__, []

    def binding(self: Any, *arguments: Any, **options: Any) -> Any:
        bound.append(self)
        return run(self, *arguments, **options)

    def checked(self: Any, grid: tuple[int, ...], *tensors: Tensor, **numbers: int) -> None:
        """The kernel that was kept is the one Triton would choose for these arguments."""
        once(self, grid, *tensors, **numbers)
        wanted = run(self._kernel, *tensors, **self._arguments, **self._options, grid=grid, warmup=True)
        assert self._compiled is wanted, (self._kernel.__name__, self._arguments)

    JITFunction._do_compile, JITFunction.run = compile_, binding
    return bound, lambda: setattr(tiles.Bound, "__call__", checked)


def calls_of(run: Callable[[], Any]) -> int:
    """Functions of Python and built-in ones that are called."""
    found = [0]

    def seen(frame: Any, event: str, argument: Any) -> None:
        found[0] += event in ("call", "c_call")

    sys.setprofile(seen)
    run()
    sys.setprofile(None)
    return found[0]


def counted(bound: list[Any]) -> dict[str, dict[str, Any]]:
    """Of a call like those before it, by case."""
    from synpo_kernels import contrastive_sample

    expert, amateur, history = torch.randn(B, V), torch.randn(B, V), torch.randint(V, (B, 9))
    results: dict[str, dict[str, Any]] = {}
    for name, (settings, _, _) in CASES.items():
        options = {"uniform": torch.rand(B, dtype=torch.float64), "history": history, "backend": "triton", **settings}

        def run(options: dict[str, Any] = options) -> Any:
            return contrastive_sample(expert, amateur, **options)

        run()
        bound.clear()
        Kernel.launched.clear()
        with Operators() as operators:
            run()
        launched, calls, took = len(Kernel.launched), calls_of(run), []
        for _ in range(500):
            start = time.perf_counter()
            run()
            took.append(time.perf_counter() - start)
        results[name] = {
            "launches": launched,
            "bound anew": len(bound),
            "operators": operators.names,
            "calls": calls,
            "microseconds": round(1e6 * sorted(took)[len(took) // 2], 1),
        }
    return results


def alike(bound: list[Any]) -> dict[str, int]:
    """How many launches Triton bound where tensors or settings changed, by what changed."""
    from synpo_kernels import contrastive_sample
    from synpo_kernels.kernels import contrast_sample

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
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


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
    assert all(anew[f"{name}, as it is"] > 0 for name in ("apart", "shifted", "shifted amateur", "last of two", "half"))


def test_no_tensor_is_kept(found: Any) -> None:
    assert found["let go"]


if __name__ == "__main__":
    anew, compare = stand_in()
    with torch.inference_mode():
        results: dict[str, Any] = {"counted": counted(anew), "let go": let_go()}
        compare()
        results["alike"] = alike(anew)
    if sys.argv[1:] == ["json"]:
        print(json.dumps(results))
    else:
        for case, figures in results["counted"].items():
            print(f"{case:16}", ", ".join(f"{key} {value}" for key, value in figures.items()))
