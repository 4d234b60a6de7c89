"""What the public functions ask of their arguments, the casts of autocast, and where an op runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def in_autocast(hidden: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """All of them in autocast's dtype, as a linear layer casts; unchanged where it is off, or hidden is float64."""
    device_type = hidden.device.type
    if not torch.is_autocast_enabled(device_type) or hidden.dtype == torch.float64:
        return hidden, *others
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in (hidden, *others))


@contextmanager
def inside_op(x: Tensor) -> Iterator[None]:
    """On the device of x, where Triton launches its kernels, and without autocast: the products choose their precision."""
    casting = torch.is_autocast_enabled(x.device.type)  # to switch it off costs as much as a launch
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False) if casting else nullcontext():
        yield


def check_low_rank(hidden: Tensor, weight: Tensor, u: Tensor, b: Tensor) -> None:
    if u.shape[:-1] != hidden.shape[:-1] or b.shape != (len(weight), u.shape[-1]):
        raise ValueError(
            f"low_rank must be (u {(*hidden.shape[:-1], 'r')}, B ({len(weight)}, 'r')), got {tuple(u.shape)} and "
            f"{tuple(b.shape)}"
        )
    for name, tensor in (("u", u), ("B", b)):
        if tensor.dtype != hidden.dtype or tensor.device != hidden.device:
            raise ValueError(
                f"{name} of low_rank must be {hidden.dtype} on {hidden.device} as hidden is, got {tensor.dtype} on "
                f"{tensor.device}; cast it or use autocast"
            )


def check_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    ignore_index: int | None,
    *,
    sharded: bool,
) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden (..., D) and weight (V, D) must share D, got {tuple(hidden.shape)} and {tuple(weight.shape)}; "
            "the head must belong to the model that made the hidden states (a sharded weight must be gathered first)"
        )
    if weight.shape[0] == 0 and not sharded:
        raise ValueError(f"weight (V, D) needs at least one vocabulary entry, got {tuple(weight.shape)}")
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape {tuple(hidden.shape[:-1])}, got {labels.dtype} of {tuple(labels.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(
                f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}; cast one of them or use autocast"
            )
    for name, tensor in (("weight", weight), ("bias", bias), ("labels", labels)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}")
    if hidden.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"hidden must be float64, float32, bfloat16 or float16, got {hidden.dtype}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if labels.device.type == "cpu" and not sharded and not torch.compiler.is_compiling():
        check_range(labels, ignore_index, weight.shape[0], "")


def check_range(labels: Tensor, ignore_index: int | None, vocabulary: int, whose: str) -> None:
    """Raise ValueError for a label outside [0, vocabulary); `whose` rows these are. The host reads the labels."""
    kept = labels if ignore_index is None else labels[labels != ignore_index]
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= vocabulary):
        raise ValueError(
            f"labels must lie in [0, {vocabulary}){whose} or equal ignore_index={ignore_index}, "
            f"got values from {int(kept.min())} to {int(kept.max())}"
        )
