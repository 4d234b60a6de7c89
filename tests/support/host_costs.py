"""What the host does for a call of the Triton path: launches, torch operations, Python calls and time, without a GPU.

Launches go through Triton's own binder, with a chip and a compiler that are only named, on CPU tensors; no kernel runs, and the
time is without that of the driver. As the interpreter is chosen when triton is first imported, a process of its own does the
work: a test file that is its own worker calls `answer` there, and `asked` in the tests.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]


class Kernel:
    """Stands for a compiled kernel."""

    function = packed_metadata = None
    launched: list[str] = []
    told: list[str] = []  # by way of Triton itself, which tells those who want to hear of launches

    def __init__(self, of: Any) -> None:
        self.name, self.takes = of.__name__, len(of.arg_names)

    def launch_metadata(self, grid: tuple[int, ...], stream: int, *arguments: Any) -> None:
        assert len(arguments) == self.takes

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: self.told.append(self.name)

    def run(self, x: int, y: int, z: int, *given: Any) -> None:
        assert min(x, y, z) > 0 and len(given) == 6 + self.takes, (self.name, x, y, z, len(given))
        self.launched.append(self.name)
        if self.name == "partition_kernel":  # torch looks rows up by what it writes
            order = given[7]
            ctypes.memset(order.data_ptr(), 0, 8 * order.numel())


class Operators(TorchDispatchMode):
    """Names of the torch operations inside it, those that our own ops are made of among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().split(".")[0]
        if name in OPDEFS:
            with self:
                return OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        self.names.append(name.split("::")[1])
        return function(*args, **(kwargs or {}))


def stand_in() -> tuple[list[Any], Callable[[], None]]:
    """Let the Triton path take CPU tensors, as those of an H200.

    Returns:
        a list that grows by a kernel for every launch that Triton binds itself; and what makes every later launch be compared
        with Triton's own choice.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from synpo_kernels import checks, contrast
    from synpo_kernels.backends import choice, gpu, passes
    from synpo_kernels.kernels import launch
    from synpo_kernels.ops import logprobs

    torch.set_num_threads(1)
    chip = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "get_current_stream": 0}
    triton.runtime.driver.set_active(SimpleNamespace(**{k: lambda *_, v=v: v for k, v in chip.items()}))
    contrast.triton_takes = choice.triton_takes = lambda dtype, device: (True, "")
    gpu._major, gpu._processors = lambda device: 9, lambda device: 132
    passes.WORKSPACE["cpu"] = passes.WORKSPACE["cuda"]
    checks.check_range = lambda *_, **__: None
    logprobs._used = lambda labels, ignore_index: ignore_index  # as on a GPU, where the host does not see the labels

    def compile_(self: Any, key: Any, signature: Any, device: int, *_: Any, **__: Any) -> Kernel:
        kernel = self.device_caches[device][0][key] = Kernel(self)
        return kernel

    run, once, bound = JITFunction.run, launch.Bound.__call__, []

    def binding(self: Any, *arguments: Any, **options: Any) -> Any:
        bound.append(self)
        return run(self, *arguments, **options)

    def checked(self: Any, grid: tuple[int, ...], *tensors: Tensor, **numbers: int) -> None:
        """The kernel that was kept is the one Triton would choose for these arguments."""
        once(self, grid, *tensors, **numbers)
        wanted = run(self._kernel, *tensors, **self._arguments | numbers, **self._options, grid=grid, warmup=True)
        assert self._compiled is wanted, (self.name, self._arguments)

    JITFunction._do_compile, JITFunction.run = compile_, binding
    return bound, lambda: setattr(launch.Bound, "__call__", checked)


def calls_of(run: Callable[[], Any]) -> int:
    """Functions of Python and built-in ones that are called."""
    found = [0]

    def seen(frame: Any, event: str, argument: Any) -> None:
        found[0] += event in ("call", "c_call")

    sys.setprofile(seen)
    run()
    sys.setprofile(None)
    return found[0]


def costs(run: Callable[[], Any], bound: list[Any], *, times: int) -> dict[str, Any]:
    """Of a call like those before it."""
    run()
    bound.clear()
    Kernel.launched.clear()
    run()
    launched, anew, took = len(Kernel.launched), len(bound), []
    with Operators() as operators:
        run()
    calls = calls_of(run)
    for _ in range(times):
        start = time.thread_time()  # others may use the machine
        run()
        took.append(time.thread_time() - start)
    return {
        "launches": launched,
        "bound anew": anew,
        "operators": operators.names,
        "calls": calls,
        "microseconds": round(1e6 * sorted(took)[len(took) // 2], 1),
    }


def answer(results: dict[str, Any]) -> None:
    """End of a worker: print what was found, for the tests or for people."""
    if sys.argv[1:] == ["json"]:
        print(json.dumps(results))
        return
    for case, figures in results["counted"].items():
        print(f"{case:24}", ", ".join(f"{key} {value}" for key, value in figures.items()))


def asked(worker: str) -> Any:
    """What the worker in this file has to say."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent)))}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, worker, "json"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
