"""Launching a kernel without asking Triton each time which compiled form of it the arguments want.

Triton binds, checks and looks up every launch anew, which takes longer than many a kernel runs. Here its answer is kept for as
long as the process lives, under all that it hangs on; launches that are alike share it. No tensor is kept.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ..head import Head

compiled: dict[tuple[Any, ...] | None, Any] = {}  # Triton's answers


class Bound:
    """A kernel with its arguments, to be launched again and again with other numbers, or with other tensors of the same layout.

    The numbers that change must be among those the kernel does not specialise on, and fit 32 bits; the tensors that change must
    be alike in what it does specialise on: dtype, device, and whether they begin at a multiple of 16 bytes.
    """

    def __init__(self, kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        """arguments: the kernel's by name, but for the tensors, which come first, and numbers that change; options: of the
        launch."""
        names = kernel.arg_names
        tensors = next(place for place, name in enumerate(names) if name in arguments)
        self._kernel, self._options, self._device = kernel, options, 0
        self._arguments: dict[str, Any] = dict.fromkeys(names[tensors:]) | arguments
        self._compiled: Any = None

    @property
    def name(self) -> str:
        return self._kernel.__name__

    def __call__(self, grid: tuple[int, ...], *tensors: Tensor, **numbers: int) -> None:
        arguments = self._arguments | numbers
        if self._compiled is None:
            key = self._key((*tensors, *arguments.values()))
            self._compiled = compiled.get(key)
            if self._compiled is None:  # in the interpreter it stays so
                self._compiled = self._kernel[grid](*tensors, **arguments, **self._options)
                compiled[key] = self._compiled
                return
        found, grid = self._compiled, (*grid, 1, 1)[:3]
        if _watched():
            found[grid](*tensors, *arguments.values())
            return
        stream = driver.active.get_current_stream(self._device)
        given = (stream, found.function, found.packed_metadata, None, None, None, *tensors, *arguments.values())
        found.run(*grid, *given)

    def _key(self, values: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """All that Triton's answer hangs on; None in the interpreter. values: of all the kernel's arguments."""
        kernel = self._kernel
        if not isinstance(kernel, JITFunction):
            return None
        self._device = driver.active.get_current_device()
        specialised, constants = _parameters(kernel)
        key = [kernel.fn, self._device, *self._options.items(), *values[constants:]]
        for value, special in zip(values, specialised):  # what a kernel is compiled for of each
            if type(value) is int:  # whether it is wide, 1, or a multiple of 16
                wide = not -(2**31) <= value < 2**31
                key.append((wide, value == 1, value % 16 == 0) if special else wide)
            elif isinstance(value, Tensor):
                key += value.dtype, value.data_ptr() % 16 == 0
            elif isinstance(value, TensorDescriptor):
                key += value.base.dtype, *value.block_shape
            else:
                key.append(type(value))
        return tuple(key)


@cache
def _parameters(kernel: JITFunction) -> tuple[list[bool], int]:
    """Whether Triton specialises on each of the arguments before the constants, which come last, and where those begin."""
    constants = len(kernel.params) - len(kernel.constexprs)
    return [not each.do_not_specialize for each in kernel.params[:constants]], constants


def _watched() -> bool:
    """Whether somebody, a profiler say, wants to hear of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def source(tensor: Tensor, block: list[int], described: bool) -> Tensor | TensorDescriptor:
    """The matrix as a kernel takes it: through a descriptor of blocks, or by its pointer."""
    return TensorDescriptor.from_tensor(tensor, block) if described else tensor


def of_head(x: Tensor, head: Head) -> dict[str, Any]:
    """The arguments of a kernel that tell of x (…, D) and a head what their pointers do not."""
    return {
        "logit_scale": head.logit_scale,
        "softcap": 0.0 if head.softcap is None else head.softcap,
        **dict(zip(("stride_xn", "stride_xd"), x.stride())),
        **dict(zip(("stride_wv", "stride_wd"), head.weight.stride())),
        "D": x.shape[1],
        "HAS_BIAS": head.bias is not None,
        "HAS_SOFTCAP": head.softcap is not None,
    }
