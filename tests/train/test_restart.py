"""A run folder used again: which settings count as other ones, what is kept, and that going on changes nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from synpo.config import Config, ConfigError, LoraSection, ModelConfig, build
from synpo.model.adapter import load
from synpo.train.checkpoint import last_checkpoint, owes_evaluation
from synpo.train.lora import make_trainable
from synpo.train.run import settings, train
from synpo.train.trainer import SynPOTrainer
from text_runs import Killed, killed, text_config, text_folder

STEPS = 8  # of eight pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("restart"), 8)


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("logging", [{"logging_steps": 100}, {"logging_strategy": "no"}, {"logging_steps": 3}])
def test_the_last_step_is_logged_however_seldom_the_others_are(
    logging: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    result = train(text_config(folder, **logging), None, folder / "pairs.jsonl", tmp_path)
    assert result.metrics["last"]["step"] == STEPS
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == ([3, 6, 8] if 3 in logging.values() else [8])
    assert all(path.exists() for path in result.plots.values())


def test_starting_over_removes_nothing_until_the_new_run_can_start(folder: Path, tmp_path: Path) -> None:
    arguments = (None, folder / "pairs.jsonl", tmp_path / "run")
    result = train(text_config(folder), *arguments)
    before = sorted(path.name for path in result.output.rglob("*"))
    gone = replace(text_config(folder), model=ModelConfig(path="./gone"))
    with pytest.raises(ConfigError, match="does not exist"):
        train(gone, *arguments, resume=False)
    targets = replace(text_config(folder).lora, target_modules="nothing")
    with pytest.raises(ConfigError, match="matches no module"):
        train(replace(text_config(folder), lora=targets), *arguments, resume=False)
    assert sorted(path.name for path in result.output.rglob("*")) == before


def test_a_key_that_was_not_stored_counts_as_its_default(folder: Path, tmp_path: Path) -> None:
    arguments = (None, folder / "pairs.jsonl", tmp_path)
    result = train(text_config(folder), *arguments)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["config"]["lora"]["target_modules"], stored["config"]["model"]["quantization"], stored["processes"]
    del stored["config"]["frames"]
    stored["config"]["train"] |= {"learning_rate": "1e-2", "loss_type": "synpo"}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert train(text_config(folder), *arguments) == result
    for changed, words in (
        (
            replace(text_config(folder), lora=replace(text_config(folder).lora, target_modules=".*q_proj")),
            "lora.target_modules was",
        ),
        (text_config(folder, loss_type="dpo"), r"train\.loss_type was 'synpo', now 'dpo'"),
        (text_config(folder, beta=0.1), r"train\.beta was None, now 0\.1"),
    ):
        with pytest.raises(ConfigError, match=words):
            train(changed, *arguments)
    stored["processes"] = 2
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="processes was 2, now 1"):
        train(text_config(folder), *arguments)


def test_settings_that_do_not_change_the_result_may_change(folder: Path, tmp_path: Path) -> None:
    """Those of other commands, and what an error message advises to lower."""
    arguments = (None, folder / "pairs.jsonl", tmp_path)
    result = train(text_config(folder), *arguments)
    other = text_config(folder, save_total_limit=1, report_to="none", cache_gigabytes=0.5)
    values = {"eval": {"batch_size": 2}, "judge": {"orders": 3}, "pairs": {"margin": 1.0}}
    sections = build(Config, values)
    assert train(replace(other, eval=sections.eval, judge=sections.judge, pairs=sections.pairs), *arguments) == result


@pytest.mark.parametrize("limit", [1, 2])
def test_a_broken_checkpoint_is_not_kept_in_place_of_a_whole_one(
    limit: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (
        text_config(folder, save_strategy="steps", save_steps=1, save_total_limit=4),
        None,
        folder / "pairs.jsonl",
        tmp_path,
    )
    killed(monkeypatch, 6, train, *arguments)
    for step in (5, 6):
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"cut")
    tight = replace(arguments[0], train=arguments[0].train | {"save_total_limit": limit})
    killed(monkeypatch, 5, train, tight, *arguments[1:])
    last = last_checkpoint(tmp_path)
    assert last is not None and last.name == "checkpoint-5"
    assert {path.name for path in tmp_path.glob("broken-*")} == {"broken-checkpoint-5", "broken-checkpoint-6"}
    result = train(tight, *arguments[1:])
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == list(range(1, STEPS + 1))
    train(tight, *arguments[1:], resume=False)
    assert result.output == tmp_path and not list(tmp_path.glob("broken-*"))


@pytest.mark.parametrize(("kind", "every"), [("steps", 2), ("epoch", 3)])
def test_going_on_evaluates_nothing_twice_and_logs_the_same(
    kind: str, every: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation takes random numbers and generates; neither shows in the steps that follow, wherever the checkpoint is:
    behind the evaluation, or before that at the end of an epoch."""
    extra = {"held_out": 2, "samples": 1, "sample_tokens": 4, "save_strategy": "steps", "save_steps": every}
    settings = text_config(folder, **extra, eval_strategy=kind, eval_steps=2, eval_on_start=True)
    whole = train(settings, None, folder / "pairs.jsonl", tmp_path / "whole")
    killed(monkeypatch, 5, train, settings, None, folder / "pairs.jsonl", tmp_path / "killed")
    again = train(settings, None, folder / "pairs.jsonl", tmp_path / "killed")
    assert [row["step"] for row in rows(again.output) if "eval_loss" in row] == list(range(0, 7, every))
    for row, other in zip(rows(again.output), rows(whole.output)):
        for name in ("step", "loss", "eval_loss", "grad_norm", "eval_synpo/repetition"):
            assert row.get(name) == other.get(name), (row["step"], name)
    shutil.rmtree(again.output)


@pytest.mark.parametrize(
    ("step", "extra"),
    [
        (3, {}),
        (6, {}),
        (5, {"max_steps": 5}),
        (6, {"num_train_epochs": 3, "lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss",
             "lr_scheduler_kwargs": {"patience": 0, "mode": "max"}}),  # the second evaluation lowers the rate
    ],
)  # fmt: skip
def test_an_evaluation_that_a_kill_prevented_is_made_up_for(
    step: int, extra: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluated at the end of an epoch, and of the run, right after what is saved at that step; killed between the two."""
    values = {"held_out": 2, "samples": 1, "sample_tokens": 4, "save_strategy": "steps", "save_steps": 1}
    settings = text_config(folder, **values, eval_strategy="epoch", **extra)
    whole = train(settings, None, folder / "pairs.jsonl", tmp_path / "whole")
    real = SynPOTrainer.evaluation_loop

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise Killed
        return real(self, *args, **kwargs)

    with monkeypatch.context() as inside, pytest.raises(Killed):
        inside.setattr(SynPOTrainer, "evaluation_loop", stop)
        train(settings, None, folder / "pairs.jsonl", tmp_path / "killed")
    for _ in range(2):  # the second time it is not owed any more
        again = train(settings, None, folder / "pairs.jsonl", tmp_path / "killed")
        logs = ([row for row in rows(run.output) if "train_loss" not in row] for run in (again, whole))
        for row, other in zip(*logs, strict=True):
            for name in ("step", "epoch", "loss", "learning_rate", "eval_loss", "eval_synpo/repetition"):
                assert row.get(name) == other.get(name), (row["step"], name)
        (again.output / "metrics.json").unlink()
    states = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, again))
    for one, two in zip(*(weights.values() for weights in states), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("step", "epoch", "changed", "owed"),
    [
        (3, 1.0, {}, True),
        (2, 2 / 3, {}, False),
        (5, 5 / 3, {}, True),  # the last one
        (3, 1.0, {"eval_strategy": "steps"}, False),
        (3, 1.0, {"eval_delay": 2}, False),
    ],
)
def test_which_evaluations_are_owed_where_nothing_is_logged_yet(
    step: int, epoch: float, changed: dict[str, Any], owed: bool, folder: Path, tmp_path: Path
) -> None:
    args = settings(text_config(folder, **{"held_out": 2, "eval_strategy": "epoch"} | changed), tmp_path)
    state = {"global_step": step, "max_steps": 5, "epoch": epoch}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert owes_evaluation(tmp_path, tmp_path / "train_log.jsonl", args) is owed


@pytest.mark.parametrize(("kind", "loss_type"), [("text", "dpo"), ("captioner", "synpo"), ("captioner", "ipo")])
def test_a_whole_model_is_trained_gone_on_with_and_loaded(
    kind: str, loss_type: str, folder: Path, tmp_path: Path, tiny_captioner_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = {"held_out": 2, "samples": 0, "save_strategy": "steps", "save_steps": 2, "loss_type": loss_type}
    settings = replace(text_config(folder, **extra), lora=None)
    if kind == "captioner":
        settings = replace(settings, model=replace(settings.model, path=str(tiny_captioner_path)))
    data = (None, folder / "pairs.jsonl")
    uninterrupted = train(settings, *data, tmp_path / "whole")
    killed(monkeypatch, 5, train, settings, *data, tmp_path / "killed")
    result = train(settings, *data, tmp_path / "killed")
    for row, other in zip(rows(result.output), rows(uninterrupted.output), strict=True):
        for name in ("step", "loss", "rewards/margins", "eval_loss", "eval_rewards/margins"):
            assert row.get(name) == other.get(name), (row["step"], name)
    assert result.adapter == tmp_path / "killed" / "model"
    start, end = load(settings.model), load(replace(settings.model, path=str(result.adapter)))
    frozen = {name for name, _ in start.vision_parameters()}
    same = {n for (n, p), q in zip(start.model.named_parameters(), end.model.parameters()) if torch.equal(p, q)}
    assert same == frozen and bool(frozen) == (kind == "captioner")
    assert end.prompt("Say").input_ids.tolist() == start.prompt("Say").input_ids.tolist()
    assert [p.name for p in result.adapter.glob("*preprocessor*")] == ["preprocessor_config.json"] * bool(frozen)
    weights = (load_file(run.adapter / "model.safetensors") for run in (result, uninterrupted))
    for one, two in zip(*(w.values() for w in weights), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ConfigError, match="lora is null was True, now False"):
        train(replace(settings, lora=LoraSection()), *data, tmp_path / "killed")


@pytest.mark.parametrize(
    ("lora", "file"), [(None, "model.safetensors"), (LoraSection(r=4), "adapter_model.safetensors")]
)
def test_the_best_of_a_run_is_what_is_saved(
    lora: LoraSection | None, file: str, folder: Path, tmp_path: Path, tiny_captioner_path: Path
) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    settings = replace(text_config(folder, held_out=2, samples=0, **best), lora=lora)
    settings = replace(settings, model=replace(settings.model, path=str(tiny_captioner_path)))
    result = train(settings, None, folder / "pairs.jsonl", tmp_path)
    first, last = sorted(tmp_path.glob("checkpoint-*"))
    losses = [row["eval_loss"] for row in rows(tmp_path) if "eval_loss" in row]
    assert losses[1] > losses[2]  # after the first and the second epoch
    saved, other, wanted = (load_file(path / file) for path in (result.adapter, last, first))
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
    assert not all(torch.equal(saved[name], other[name]) for name in other)


def test_a_model_that_changed_is_no_reference_for_a_run_that_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    settings = replace(text_config(folder, loss_type="dpo", save_strategy="steps", save_steps=2), lora=None)
    settings = replace(settings, model=replace(settings.model, path=str(tmp_path / "model")))
    arguments = (settings, None, folder / "pairs.jsonl", tmp_path / "run")

    def change() -> None:
        weights = load_file(tmp_path / "model" / "model.safetensors")
        weights["lm_head.weight"][0, 0] += 0.5
        save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})

    killed(monkeypatch, 1, train, *arguments)  # no checkpoint yet: this is still the start
    change()
    killed(monkeypatch, 3, train, *arguments)
    assert rows(tmp_path / "run")[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    change()
    with pytest.raises(
        ConfigError, match=r"the reference of 8 of 8 pairs .* that of the start of the run.*--no-resume"
    ):
        train(*arguments)
    train(*arguments, resume=False)
    assert rows(tmp_path / "run")[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("change", [{"quantization": "int8"}, {"adapter": "."}])
def test_a_model_that_cannot_be_trained_whole_is_named(change: dict[str, Any], folder: Path) -> None:
    settings = text_config(folder)
    with pytest.raises(ConfigError, match=r"model\.quantization = none and no model\.adapter"):
        make_trainable(load(settings.model), replace(settings, lora=None, model=replace(settings.model, **change)))


def test_a_gpu_that_the_trainer_would_not_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.device: training runs on the first visible GPU.*CUDA_VISIBLE_DEVICES=1"
    ):
        settings(Config(model=ModelConfig(device="cuda:1")), tmp_path)
