"""What tensors on torch's meta device stand for: where a model that has no storage yet will compute, and in which dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_meant: list[tuple[str, torch.dtype | None]] = []


@contextmanager
def meant_for(device: str, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Inside, meta tensors count as tensors on `device` ("cuda", "cpu"), under autocast to `autocast` if that is a dtype."""
    _meant.append((device, autocast))
    try:
        yield
    finally:
        _meant.pop()


def device_of(x: Tensor) -> str:
    """The kind of device that x is on, or is meant for."""
    return _meant[-1][0] if x.is_meta and _meant else x.device.type


def autocast_of(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast makes products of x in; None where it is off."""
    if x.is_meta:
        return _meant[-1][1] if _meant else None
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def computes_in(x: Tensor) -> torch.dtype:
    """The dtype of a product of x: that of autocast where it is on, else its own."""
    return autocast_of(x) or x.dtype
