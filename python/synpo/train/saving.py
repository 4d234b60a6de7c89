"""Checkpoints by the clock: a killed run loses minutes, however long its epochs are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

SHARE = 20.0  # writing takes at most one part in so many of the time


class Saver(TrainerCallback):
    """Asks for a checkpoint when the last one, or the start, is `minutes` old, beside what `save_strategy` asks for.

    Where writing one takes so long that it would be more than a twentieth of the time, they are that much further apart. The
    first of several processes decides; the others are told at steps that all of them know, some ten of them to a checkpoint.
    """

    def __init__(self, minutes: float | None, processes: int = 1) -> None:
        self.minutes, self.processes = minutes, processes
        self.cost = 0.0  # seconds that the last checkpoint took
        self._start(0)

    def _start(self, step: int) -> None:
        self.last, self.step, self.look = time.monotonic(), step, step + 1

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around the writing of a checkpoint: takes its time."""
        start = time.monotonic()
        yield
        self.cost = time.monotonic() - start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.minutes is None or args.save_strategy == SaveStrategy.NO or control.should_save:
            return control
        ends = state.global_step >= state.max_steps or state.epoch == int(state.epoch)
        if ends and args.save_strategy == SaveStrategy.EPOCH:
            return control  # that one comes at once
        control.should_save = self._due(state.global_step)
        return control

    def _due(self, step: int) -> bool:
        if step < self.look:
            return False
        gone, interval = time.monotonic() - self.last, max(60 * (self.minutes or 0), SHARE * self.cost)
        if self.processes > 1:
            gone, interval = broadcast_object_list([gone, interval])
            left = (interval - gone) / max(gone / (step - self.step), 1e-9)  # steps, at the pace so far
            self.look = step + max(1, int(left / 2))
        return gone >= interval
