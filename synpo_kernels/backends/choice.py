"""Which backend computes the log-probabilities, and the reason in words.

"auto" takes the Triton kernels on a CUDA device (a warning says so where they cannot serve), the compiled kernel on a CPU
with vector instructions it knows, and the portable passes elsewhere. A backend is one entry in `BACKENDS` and one clause
in `choose`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from .. import _ext
from ..head import Head
from . import cpu, portable
from .passes import Forward, Tiles


class Partition(Protocol):
    """labels (N,), ignore_index → (rows, count), the rows to compute.

    With a count of None these are `rows`. Else `rows` are all N, the first `count` of them to be computed, and count is
    () int32 on the device, not known to the host; a pass gets it and may leave the other rows' input unread.
    """

    def __call__(self, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]: ...


class ForwardPass(Protocol):
    """x (N, D), labels (N,), which rows are ignored → `Forward` of N rows, 0 where ignored."""

    def __call__(
        self, x: Tensor, head: Head, labels: Tensor, ignore_index: int | None, *, want_direction: bool, workspace: int
    ) -> Forward: ...


class WholeRows(Protocol):
    """x (N, D), labels (N,): write exp(z - a) · slope of all vocabulary into out (N, V), 0 at the label.

    Returns:
        logps (N,), and exp(a - log-sum-exp) (N,), which turns `out` into probabilities. Past the count logps is 0.
    """

    def __call__(
        self, x: Tensor, head: Head, labels: Tensor, out: Tensor, *, workspace: int, count: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Backend:
    """The passes over the vocabulary of one kind of machine."""

    name: str
    partition: Partition
    forward: ForwardPass
    whole_rows: WholeRows
    tiles: Callable[[Tensor | None], Tiles]  # of the rows that `Partition` gives, by their count
    fp16_magnify: float = 1.0  # power of two by which these hold a slice of probabilities larger, for fp16 inputs

    def rows(self, labels: Tensor, ignore_index: int | None) -> tuple[Tensor | slice, Tensor | None]:
        """`partition`, which nothing has to do where no label is ignored."""
        return (slice(None), None) if ignore_index is None else self.partition(labels, ignore_index)

    def magnify(self, dtype: torch.dtype) -> float:
        return self.fp16_magnify if dtype == torch.float16 else 1.0


def chunked_supports(hidden: Tensor) -> tuple[bool, str]:
    """Whether the portable backend can serve `hidden`, and why."""
    return True, "plain torch runs everywhere"


def triton_supports(hidden: Tensor) -> tuple[bool, str]:
    """Whether the Triton kernels can serve `hidden`, and why."""
    return triton_takes(hidden.dtype, hidden.device)


def triton_takes(dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """`triton_supports` of tensors of this dtype on this device."""
    if find_spec("triton") is None:
        return False, "triton is not installed; pip install triton, or use backend='chunked'"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False, f"the kernels take float32, float16 and bfloat16, got {dtype}; use backend='chunked'"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return False, "the kernels are compiled for NVIDIA GPUs only; use backend='chunked'"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return False, f"the kernels need compute capability 8.0 or newer, this GPU has {major}.{minor}"
        return True, "a CUDA device"
    import triton

    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return True, "the Triton interpreter (TRITON_INTERPRET=1)"
    return False, f"the kernels need a CUDA device, hidden is on {device}; use backend='chunked'"


def cpu_supports(hidden: Tensor) -> tuple[bool, str]:
    """Whether the compiled CPU kernel can serve `hidden`, and why."""
    if hidden.device.type != "cpu":
        return False, f"the kernel runs on CPUs, hidden is on {hidden.device}; use backend='auto'"
    if hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False, f"the kernel takes float32, float16 and bfloat16, got {hidden.dtype}; use backend='chunked'"
    if not _ext.available():
        return False, f"{_ext.reason}; use backend='chunked'"
    return True, f"the compiled kernel for {cpu.instruction_set()}"


def _cpu_is_best(hidden: Tensor) -> bool:
    """Whether the compiled kernel serves and is faster than torch's own products."""
    served, _ = cpu_supports(hidden)
    if hidden.device.type == "cpu" and not _ext.available():
        _ext.say_once()
    return served and _ext.outdoes_library(hidden.dtype)


def _chunked() -> Backend:
    tiles = lambda count: portable.TorchTiles()  # noqa: E731  (`partition` gives the rows to compute alone)
    return Backend("chunked", portable.partition, portable.forward, portable.whole_rows, tiles)


def _cpu() -> Backend:
    return replace(_chunked(), name="cpu", forward=cpu.forward)


def _triton() -> Backend:
    from . import gpu  # imports triton

    return Backend("triton", gpu.partition, gpu.forward, gpu.whole_rows, gpu.TritonTiles, gpu.FP16_MAGNIFY)


BACKENDS: dict[str, tuple[Callable[[Tensor], tuple[bool, str]], Callable[[], Backend]]] = {
    "chunked": (chunked_supports, _chunked),
    "cpu": (cpu_supports, _cpu),
    "triton": (triton_supports, _triton),
}


def choose(name: str, hidden: Tensor) -> Backend:
    """The backend called `name` ("auto" picks one for the device of `hidden`).

    Raises:
        ValueError: the name is unknown, or that backend cannot serve `hidden` (the message says why).
    """
    if name == "auto":
        if not hidden.is_cuda:
            return _cpu() if _cpu_is_best(hidden) else _chunked()
        served, reason = triton_supports(hidden)
        if not served:
            warnings.warn(f"the log-probabilities run on plain torch: {reason}", stacklevel=3)
        return _triton() if served else _chunked()
    if name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {name!r}")
    supports, load = BACKENDS[name]
    served, reason = supports(hidden)
    if not served:
        raise ValueError(f"backend {name!r} cannot serve this input: {reason}")
    return load()
