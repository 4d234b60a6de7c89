"""Checkpoints by the clock: when they are asked for, that going on from one changes nothing, and that processes agree."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl
from transformers.trainer_utils import SaveStrategy

from synpo.config import Config
from synpo.train import bar as bar_module
from synpo.train import saving
from synpo.train.arguments import SynPOConfig
from synpo.train.bar import TrainingBar
from synpo.train.run import train
from synpo.train.saving import Saver
from text_runs import killed, text_config, text_folder


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(saving.time, "monotonic", lambda: self.now)


def course(
    saver: Saver,
    clock: Clock,
    seconds: float,
    steps: int,
    strategy: SaveStrategy = SaveStrategy.EPOCH,
    writing: float = 0,
) -> list[int]:
    """Steps at which a run of two epochs asks for checkpoints; `seconds` a step, `writing` a checkpoint."""
    args, asked = SimpleNamespace(save_strategy=strategy), []
    saver.on_train_begin(args, SimpleNamespace(global_step=0), None)
    for step in range(1, steps + 1):
        clock.now += seconds
        state = SimpleNamespace(global_step=step, epoch=2 * step / steps, max_steps=steps)
        control = TrainerControl()
        saver.on_step_end(args, state, control)
        by_epoch = strategy == SaveStrategy.EPOCH and state.epoch == int(state.epoch)
        if control.should_save or by_epoch:
            assert not (control.should_save and by_epoch), "twice at one step"
            with saver.writing():
                clock.now += writing
            saver.on_save(args, state, control)
            asked.append(step)
    return asked


def test_no_more_than_two_minutes_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SynPOConfig.save_minutes == 2.0
    clock = Clock(monkeypatch)
    assert course(Saver(2.0), clock, 10, 40) == [12, 20, 32, 40]
    assert course(Saver(2.0), clock, 130, 4) == [1, 2, 3, 4]
    assert course(Saver(2.0), clock, 1, 100) == [50, 100], "epochs that are shorter are enough"
    assert course(Saver(2.0), clock, 100, 4, SaveStrategy.STEPS) == [2, 4], "with steps as strategy those come on top"
    assert course(Saver(2.0), clock, 100, 4, SaveStrategy.NO) == []
    assert course(Saver(None), clock, 100, 4) == [2, 4]


def test_writing_takes_a_twentieth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the whole model is trained."""
    clock = Clock(monkeypatch)
    asked = course(Saver(2.0), clock, 10, 400, SaveStrategy.STEPS, writing=30)
    assert asked[0] == 12
    assert {later - earlier for earlier, later in zip(asked, asked[1:])} == {60}


def test_processes_ask_at_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their clocks differ; what the first one reads counts, and is told at few steps."""
    clock = Clock(monkeypatch)
    told: list[list[float]] = []
    monkeypatch.setattr(saving, "broadcast_object_list", lambda values: told.append(values) or values)  # type: ignore[func-returns-value]
    first = course(Saver(2.0, processes=2), clock, 0.5, 2000, SaveStrategy.STEPS)
    monkeypatch.setattr(saving, "broadcast_object_list", lambda values: heard.pop(0))
    heard = list(told)
    second = course(Saver(2.0, processes=2), clock, 0.7, 2000, SaveStrategy.STEPS)
    assert first == second and len(first) == 8
    assert all(240 <= later - earlier <= 245 for earlier, later in zip(first, first[1:]))
    assert len(told) / len(first) < 15


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("saving"), 6)


@pytest.fixture
def config(folder: Path) -> Config:
    return text_config(folder)


def test_a_run_goes_on_from_the_middle_of_an_epoch_bit_by_bit(
    config: Config, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "SHARE", 0.0)
    whole = train(config, None, folder / "pairs.jsonl", tmp_path / "whole")
    arguments = (None, folder / "pairs.jsonl", tmp_path / "killed")
    often = replace(config, train=config.train | {"save_minutes": 1e-6})
    killed(monkeypatch, 2, train, often, *arguments)
    assert sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    resumed = train(config, *arguments)
    ours, theirs = (load_file(result.adapter / "adapter_model.safetensors") for result in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed.metrics["last"]["loss"] == whole.metrics["last"]["loss"]


def test_the_bar_of_a_run_that_goes_on_begins_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Watched(bar_module.Bar):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(bar_module, "Bar", Watched)
    bar, state = TrainingBar(), SimpleNamespace(is_world_process_zero=True, max_steps=900, global_step=397)
    bar.on_train_begin(None, state, None)
    state.global_step = 398
    bar.on_step_end(None, state, None)
    assert (made[0].initial, made[0].n, made[0].total) == (397, 398, 900)
    bar.on_prediction_step(None, state, None, eval_dataloader=[1, 2])
    bar.on_evaluate(None, state, None)
    bar.on_log(None, state, None, {"loss": 0.5})
    assert made[0].postfix == "loss=0.5" and made[1].disable
    bar.on_train_end(None, state, None)
    assert made[0].disable
