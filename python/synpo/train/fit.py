"""Which GPU trains what: how many pairs fit at a time, by the ways to train a model and the memory of a GPU.

    LoRA, QLoRA (weights in 4 bits, nf4) or, with lora: null, the model itself; each with and without activation checkpointing

Estimated as memory.py says, with the prompt of a pair computed once. Nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from synpo.data.tokenize import Lengths
from synpo.train.memory import Batch, MemoryModel

SIZES = {f"{size}GB": size * 10**9 for size in (8, 12, 16, 24, 48, 80)}
MANY = 256  # pairs at a time beyond which nobody asks


@dataclass(frozen=True)
class Way:
    """One way to train a model: bytes of a step with one pair, and the most pairs at a time on a GPU of each size (0: none)."""

    name: str
    quantization: str
    checkpointing: bool
    one: int
    largest: dict[str, int]


def largest_batch(model: MemoryModel, lengths: Lengths, layout: str, checkpointing: bool, size: int) -> int:
    """Most pairs of these lengths whose step fits in `size` bytes; 0 when one does not."""

    def fits(pairs: int) -> bool:
        return model.step(Batch(pairs, lengths, layout), checkpointing).total <= size

    fitting, beyond = 0, 1
    while fits(beyond):
        fitting, beyond = beyond, 2 * beyond
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        fitting, beyond = (middle, beyond) if fits(middle) else (fitting, middle)
    return fitting


def ways(
    model: Any,
    lengths: Lengths,
    *,
    optimizer: str = "adamw_torch",
    autocast: torch.dtype | None = torch.bfloat16,
    loss_type: str = "synpo",
    checkpointing: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] = SIZES,
) -> list[Way]:
    """Every way to train a model that stands on the meta device, on pairs of these lengths; arguments as `MemoryModel`."""
    adapter = hasattr(model, "peft_config")
    found: list[Way] = []
    saved: dict[Any, Any] = {}  # activations are those of any weights
    for name, quantization in (("LoRA", "none"), ("QLoRA", "nf4")) if adapter else (("whole", "none"),):
        memory = MemoryModel(model, optimizer, "cuda", autocast, quantization, loss_type, checkpointing)
        memory._saved = saved
        for again in (False, True):
            one = memory.step(Batch(1, lengths, "shared"), again).total
            largest = {s: largest_batch(memory, lengths, "shared", again, size) for s, size in sizes.items()}
            found.append(Way(name + (", checkpointed" if again else ""), quantization, again, one, largest))
    return found


def table_of(found: Sequence[Way], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("pairs at a time on", no_wrap=True)
    for heading in ("one, GiB", *found[0].largest):
        table.add_column(heading, justify="right", no_wrap=True)
    for way in found:
        table.add_row(way.name, f"{way.one / 2**30:.1f}", *map(_pairs, way.largest.values()))
    return table


def _pairs(count: int) -> str:
    return "-" if count == 0 else str(count) if count <= MANY else f">{MANY}"
