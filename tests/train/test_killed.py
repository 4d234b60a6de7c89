"""`synpo train` that is killed, or writes to a full disk, or finds broken checkpoints: it goes on and logs the same."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from synpo.config import Config
from synpo.train.checkpoint import CheckpointError, fault, last_checkpoint
from synpo.train.log import JsonLog
from synpo.train.run import train
from synpo.train.trainer import SynPOTrainer
from text_runs import steps


def train_and_die(moment: str, step: int, seed: int, arguments: tuple[Any, ...]) -> None:
    """Train in this process, which is killed (SIGKILL) at a moment of the first step from `step` on. It cannot end before."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def before(kind: Any, name: str, action: Callable[..., None]) -> None:
        real = getattr(kind, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            action(self, *args, **kwargs)
            return real(self, *args, **kwargs)

        setattr(kind, name, method)

    def at_log(log: JsonLog, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.global_step < step or "loss" not in logs:
            return
        if moment == "any":  # within the next steps, at least eight of a tenth of a second
            threading.Timer(random.Random(seed).uniform(0, 0.3), die).start()
            before(SynPOTrainer, "training_step", lambda *_: time.sleep(0.1))
        if moment == "line":
            with open(log.path, "a") as file:
                file.write(json.dumps(logs)[:40])
        if moment in ("log", "line"):
            die()

    def at_removal(folder: Any, *args: Any, **kwargs: Any) -> None:
        if Path(folder).name.startswith("checkpoint-"):
            (Path(folder) / "optimizer.pt").unlink()
            die()
        rmtree(folder, *args, **kwargs)

    rmtree = shutil.rmtree
    before(JsonLog, "on_log", at_log)
    if moment == "weights":
        before(SynPOTrainer, "_save_optimizer_and_scheduler", lambda t, *_: t.state.global_step >= step and die())
    if moment == "state":
        before(TrainerState, "save_to_json", lambda state, *_: state.global_step >= step and die())
    if moment == "removal":
        shutil.rmtree = at_removal  # type: ignore[assignment]
    train(*arguments)


MOMENTS = (("log", 1), ("weights", 2), ("any", 3), ("line", 7), ("state", 8), ("removal", 9))


def test_killed_again_and_again_it_goes_on_and_logs_the_same(config: Config, data: Path, tmp_path: Path) -> None:
    """kill -9 at every kind of moment: between steps, in a line of the log, while a checkpoint is written or removed."""
    values = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "num_train_epochs": 4}
    config = replace(config, train=config.train | values)
    arguments = (config, data / "videos", data / "pairs.jsonl")
    whole = train(*arguments, tmp_path / "whole")
    output = tmp_path / "killed"
    processes = multiprocessing.get_context("forkserver")  # a fork of this process, which has threads, may hang
    processes.set_forkserver_preload(["synpo.train.run"])
    broken: dict[str, int] = {}
    for number, (moment, step) in enumerate(MOMENTS):
        process = processes.Process(target=train_and_die, args=(moment, step, number, (*arguments, output)))
        process.start()
        process.join(100)
        assert process.exitcode == -signal.SIGKILL, (moment, step)
        broken[moment] = sum(fault(folder) is not None for folder in output.glob("checkpoint-*"))
    assert broken["log"] == broken["line"] == 0
    assert broken["weights"] == broken["state"] == broken["removal"] == 1
    resumed = train(*arguments, output)
    assert [row[0] for row in steps(resumed.log)] == list(range(1, 17))
    np.testing.assert_allclose(steps(resumed.log), steps(whole.log), rtol=1e-6)
    ours, theirs = (load_file(r.adapter / "adapter_model.safetensors") for r in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("fails", ["optimizer", "weights"])
def test_a_full_disk_says_so_and_keeps_the_last_good_checkpoint(
    fails: str, config: Config, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, train=config.train | {"save_strategy": "steps", "save_steps": 2})
    arguments = (config, data / "videos", data / "pairs.jsonl", tmp_path / "run")

    def full_from_step_4(trainer: Any, real: Any, *args: Any) -> Any:
        if trainer.state.global_step < 4:
            return real(trainer, *args)
        if fails == "optimizer":
            return torch.save({"state": torch.zeros(1 << 16)}, "/dev/full")
        with open("/dev/full", "wb", buffering=0) as file:
            return file.write(b"0")

    name = {"optimizer": "_save_optimizer_and_scheduler", "weights": "save_model"}[fails]
    real = getattr(SynPOTrainer, name)
    with monkeypatch.context() as patch:
        patch.setattr(SynPOTrainer, name, lambda self, *args, **kw: full_from_step_4(self, real, *args))
        with pytest.raises(
            CheckpointError, match=r"checkpoint-4 could not be written: .*last good one is .*checkpoint-2"
        ):
            train(*arguments)
    assert {f.name for f in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2"}
    result = train(*arguments)
    assert [row[0] for row in steps(result.log)] == list(range(1, 9))


def test_killed_after_the_last_step_only_the_end_is_done_again(config: Config, data: Path, tmp_path: Path) -> None:
    result = train(config, data / "videos", data / "pairs.jsonl", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    shutil.rmtree(result.adapter)
    again = train(config, data / "videos", data / "pairs.jsonl", tmp_path / "run")
    assert {k: v for k, v in again.metrics.items() if k != "seconds"} == {
        k: v for k, v in result.metrics.items() if k != "seconds"
    }
    assert (again.adapter / "adapter_model.safetensors").exists()


def test_broken_checkpoints_are_named_and_passed_over(
    config: Config, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, train=config.train | {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 8})
    arguments = (config, data / "videos", data / "pairs.jsonl", tmp_path / "run")
    whole = steps(train(*arguments).log)
    run = tmp_path / "run"
    (run / "metrics.json").unlink()
    assert last_checkpoint(run) == run / "checkpoint-8"

    def truncate(name: str) -> None:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) * 2 // 3])

    truncate("checkpoint-8/adapter_model.safetensors")
    truncate("checkpoint-7/optimizer.pt")
    (run / "checkpoint-6" / "trainer_state.json").unlink()
    truncate("checkpoint-5/trainer_state.json")
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    (run / "checkpoint-3" / "adapter_model.safetensors").unlink()
    capsys.readouterr()
    again = train(*arguments)
    said = capsys.readouterr().err
    for words in (
        "checkpoint-8 is passed over: adapter_model.safetensors is truncated",
        "checkpoint-7 is passed over: optimizer.pt is truncated",
        "checkpoint-6 is passed over: it was not written to its end",
        "checkpoint-5 is passed over: trainer_state.json cannot be read",
        "checkpoint-4 is passed over: it holds no optimizer state",
        "checkpoint-3 is passed over: it holds no weights",
        "going on from",
    ):
        assert words in said
    np.testing.assert_allclose(steps(again.log), whole, rtol=1e-6)
