"""The bar of a training run: steps done and to come, with the figures that matter behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from synpo.progress import Bar

SHOWN = {"loss": "loss", "synpo/chosen_prob": "P+", "synpo/rejected_prob": "P-", "eval_loss": "eval"}


class TrainingBar(TrainerCallback):
    """In place of the Trainer's ProgressCallback. A run that goes on begins where it was: its pace is that of now."""

    def __init__(self) -> None:
        self.training: Bar | None = None
        self.evaluation: Bar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training = Bar(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training is not None:
            self.training.update(state.global_step - self.training.n)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and has_length(eval_dataloader):
            if self.evaluation is None:
                total, alone = len(eval_dataloader), self.training is None
                self.evaluation = Bar(total=total, leave=alone, desc="evaluation", unit="batch")
            self.evaluation.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.evaluation is not None:
            self.evaluation.close()
            self.evaluation = None

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.on_evaluate(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        values = {short: f"{logs[name]:.3g}" for name, short in SHOWN.items() if logs and name in logs}
        if self.training is not None and values:
            self.training.set_postfix(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """At the end, whatever it is: what is said of that comes after the bar."""
        for bar in (self.evaluation, self.training):
            if bar is not None:
                bar.close()
        self.evaluation = self.training = None
