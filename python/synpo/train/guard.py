"""Watches a run while it trains: warns in words when negatives dominate or language collapses, and can stop it.

    off    nothing
    warn   each kind of trouble is said once, when it begins, with the settings to change
    stop   negatives that dominate and a language that collapses also end the run, after a checkpoint

What counts as trouble, and from when on, is in diagnostics.py. Curves are drawn again after every evaluation and checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from synpo.train.diagnostics import Finding, Watched, findings, read_log
from synpo.train.plots import PICTURES, plot

MODES = ("off", "warn", "stop")


class GuardError(ValueError):
    """The guard ended a run; the message says why, and how to go on."""


def _say(text: str) -> None:
    tqdm.write(f"warning: {text}", file=sys.stderr)


class Guard(TrainerCallback):
    """Args: `loss_type` and `mode` as in SynPOConfig; `rows` of an earlier part of the run, or more than that: what is past
    the checkpoint does not count; `say` shows a warning.

    Attributes:
        stopped: what ended the run, None while nothing has.
    """

    def __init__(
        self, loss_type: str, mode: str, rows: list[dict[str, Any]] | None = None, say: Callable[[str], None] = _say
    ) -> None:
        self.loss_type, self.mode, self.say = loss_type, mode, say
        self.earlier = list(rows or [])
        self.run = Watched()
        self.said: set[str] = set()
        self.stopped: Finding | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run = Watched(row for row in self.earlier if row["step"] <= state.global_step and state.global_step > 0)
        self.earlier = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        if self.mode == "off":
            return control
        self.run.add(logs or {})
        for finding in findings(self.run, self.loss_type):
            if finding.kind in self.said:
                continue
            self.said.add(finding.kind)
            if state.is_world_process_zero:
                self.say(f"step {state.global_step}: {finding.text}")
            if self.mode == "stop" and finding.serious and self.stopped is None:
                self.stopped = finding
        if self.stopped is not None:
            control.should_save = control.should_training_stop = True
        return control


class Curves(TrainerCallback):
    """Draws both pictures of the run, from its log, into `folder` after every evaluation and every checkpoint."""

    def __init__(self, folder: Path, loss_type: str, log: Path) -> None:
        self.folder, self.loss_type, self.log = folder, loss_type, log

    def draw(self) -> None:
        if self.log.exists() and (rows := read_log(self.log)):
            for picture in PICTURES:
                plot(picture, {self.loss_type: rows}, self.folder)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.draw()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.draw()
