"""What a run writes down as it goes: means over the pairs of a step, one line of JSON a log."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from synpo.records import atomic_path, read_jsonl
from synpo.train.objective import Outcome

LOG_NAME = "train_log.jsonl"


class Means:
    """Sums of per-pair statistics on their device, turned into means once a log."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.pairs = 0

    def add(self, outcome: Outcome, pairs: int) -> None:
        values = {"loss": outcome.loss.detach() * pairs, **{k: v.sum() for k, v in outcome.statistics.items()}}
        sums = torch.stack([v.double() for v in values.values()])
        self.names, self.pairs = list(values), self.pairs + pairs
        self.sums = sums if self.sums is None else self.sums + sums

    def drain(self, accelerator: Any) -> dict[str, float]:
        if self.sums is None:
            return {}
        total = accelerator.reduce(torch.cat([self.sums, self.sums.new_tensor([self.pairs])]), "sum").tolist()
        self.sums, self.pairs = None, 0
        return {name: value / total[-1] for name, value in zip(self.names, total)}


class JsonLog(TrainerCallback):
    """Every log of the Trainer as one line of JSON, on the disk at once; resuming drops lines past the checkpoint.

    The last step is logged however seldom the others are: what a run came to is known from it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self.path.exists():
            return
        kept = [row for _, row in read_jsonl(self.path) if row["step"] <= state.global_step and state.global_step > 0]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_log |= state.global_step >= state.max_steps
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")
            file.flush()
            os.fsync(file.fileno())
