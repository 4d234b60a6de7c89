"""Optimizers by the names that `train.optim` takes: what they need, and the bytes of their states on the device.

adamw_torch, …            their states in the dtype of what is trained
…_8bit, …_32bit, …_bnb    of bitsandbytes: a byte a number and one fp32 scale a block of 256, or fp32
paged_…                   the same in memory that host and GPU share: what the GPU has no room for stays on the host
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from torch import Tensor

from synpo.config import ConfigError

STATES = {"sgd": 0, "ademamix": 3, "adafactor": 0, "adam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1}
"""Numbers kept for each trained one, by what an optimizer's name holds; others are taken for Adam's."""

BNB = ("adamw_8bit", "bnb", "lion_", "paged_", "ademamix")
BLOCK = 256  # numbers of bitsandbytes that share a scale
LEAST_8BIT, LEAST_PAGED = 4096, 100_000  # numbers of the smallest tensor that it packs, and that it pages


def of_bitsandbytes(name: str) -> bool:
    return any(part in name for part in BNB) and not name.startswith("galore")


def check_optimizer(name: str, arguments: str | None = None) -> None:
    """Raise ConfigError where the optimizer's package is not installed, or its arguments are none, before anything is loaded."""
    if arguments and not all(part.count("=") == 1 for part in arguments.split(",")):
        raise ConfigError(f"train.optim_args: expected name=value,name=value, got {arguments!r}")
    if of_bitsandbytes(name) and find_spec("bitsandbytes") is None:
        raise ConfigError(f"train.optim: {name} needs bitsandbytes, which is not installed: pip install 'synpo[qlora]'")


def state_bytes(name: str, trained: Sequence[Tensor]) -> int:
    """Bytes of the optimizer's states of `trained` that are sure to be on the device."""
    states = next((count for part, count in STATES.items() if part in name), 2)
    if name == "adafactor":  # sums over rows and columns
        return sum(4 * (sum(t.shape[-2:]) if t.dim() > 1 else t.numel()) for t in trained)
    if not of_bitsandbytes(name):
        return states * sum(t.nbytes for t in trained)
    total = 0
    for size in (t.numel() for t in trained):
        packed = "8bit" in name and size >= LEAST_8BIT
        scales = 4 * -(-size // BLOCK) if packed else 0
        numbers = 0 if name.startswith("paged") and size >= LEAST_PAGED else size * (1 if packed else 4)
        total += states * (numbers + scales)
    return total
