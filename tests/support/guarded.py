"""Tensors between pages of memory that nobody may touch: an address outside one ends the process.

python -m guarded        every path on such tensors, the Triton kernels in their interpreter
"""

from __future__ import annotations

import ctypes
import mmap
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

GUARD = 1 << 20  # bytes before and after, more than any kernel here is off by
_held: list[Any] = []


def guarded(tensor: Tensor, *, at_end: bool) -> Tensor:
    """A contiguous copy that begins where memory does (or with at_end ends, up to 16 bytes, where it does)."""
    return _room(tensor.shape, tensor.dtype, at_end).copy_(tensor)


def _room(shape: Any, dtype: torch.dtype, at_end: bool) -> Tensor:
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    size = count * dtype.itemsize
    middle = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, middle + 2 * GUARD)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for start in (address, address + GUARD + middle):
        if libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(GUARD), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    _held.append(memory)
    first = GUARD + ((middle - size) // 16 * 16 if at_end else 0)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=first).view(shape)


def walk(backend: str, at_end: bool) -> None:
    """Log-probabilities and the SynPO loss with their gradients, frozen and trained, with overflowing and ignored rows."""
    from synpo_kernels import FusedLinearSynPOLoss, linear_logprobs

    generator, put = torch.Generator().manual_seed(0), partial(guarded, at_end=at_end)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for dtype, trained, (softcap, hard) in product(dtypes, (False, True), ((None, False), (None, True), (30.0, True))):
        n, v, d = 20, 70, 24
        x = put(((60.0 if hard else 3.0) * torch.randn(n, d, generator=generator)).to(dtype)).requires_grad_()
        w = put((d**-0.5 * torch.randn(v, d, generator=generator)).to(dtype)).requires_grad_(trained)
        b = put(torch.randn(v, generator=generator).to(dtype)) if softcap else None
        labels = torch.randint(v, (n,), generator=generator)
        labels[::7], labels[1::7], labels[2::7] = -100, 0, v - 1
        labels = put(labels)
        print(backend, at_end, dtype, "trained" if trained else "frozen", softcap, hard, flush=True)
        logps = linear_logprobs(x, w, labels, bias=b, softcap=softcap, backend=backend, workspace=1 << 14)
        logps.backward(put(torch.randn(n, generator=generator)))
        if trained and not hard:
            loss = FusedLinearSynPOLoss(backend=backend)
            loss(x.view(4, 5, d), w, labels.view(4, 5)).loss.backward()
        _held.clear()


def main() -> None:
    import interpreter_faults
    from synpo_kernels import _ext

    interpreter_faults.mend()
    empty = torch.empty
    for at_end in (False, True):

        def between(
            *shape: Any, dtype: torch.dtype = torch.float32, device: Any = None, at_end: bool = at_end, **options: Any
        ) -> Tensor:
            if torch.device(device or "cpu").type != "cpu" or options:
                return empty(*shape, dtype=dtype, device=device, **options)
            return _room(shape[0] if shape and not isinstance(shape[0], int) else shape, dtype, at_end)

        torch.empty = between  # type: ignore[assignment]  # what is held for a while lies between guards too
        for backend in ("triton", "cpu") if _ext.available() else ("triton",):
            walk(backend, at_end)


if __name__ == "__main__":
    main()
