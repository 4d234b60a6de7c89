"""`synpo train` end to end on rendered clips: outputs, refusals, what it tells."""

import json
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from transformers import Trainer

from synpo.config import Config, ConfigError, ModelConfig, build
from synpo.model.adapter import load
from synpo.model.tiny import byte_tokenizer, save, tiny_text_model
from synpo.records import Pair, write_records
from synpo.train.checkpoint import last_checkpoint
from synpo.train.guard import GuardError
from synpo.train.run import settings, train
from synpo.train.trainer import SynPOTrainer
from text_runs import steps


def test_a_run_leaves_everything_and_is_complete(config: Config, data: Path, tmp_path: Path, capsys: Any) -> None:
    result = train(config, data / "videos", data / "pairs.jsonl", tmp_path / "run")
    shown = capsys.readouterr().err
    assert "11 preference pairs" in shown
    assert "dropped: video unreadable" in shown
    assert "as trained: an answer follows '<|end|><|assistant|>' and ends with <|end|>\n" in shown
    assert result.metrics["steps"] == 8
    assert result.metrics["pairs"] == 8
    assert result.metrics["dropped"] == {"video unreadable": 1, "chosen answer empty": 1, "answer too long": 1}
    assert result.metrics["loss_parameters"] == {"alpha": 30.0, "beta": 0.2}
    assert all(path.stat().st_size > 5000 for path in result.plots.values())
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["lora"]["r"] == 4
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names >= {"adapter", "metrics.json", "train_log.jsonl", "checkpoint-8"}
    assert (result.adapter / "adapter_model.safetensors").exists()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Training with SynPO" in page and "8 pairs, 8 steps" in page
    assert page.count("data:image/jpeg;base64,") == 3  # the first, the middle and the last pair
    assert "It rains <mark>7</mark> times" not in page and "<mark>rains</mark>" in page
    assert page.count('class="bold side0"') == page.count('class="bold side1"') == 2

    base = load(config.model)
    tuned = load(replace(config.model, adapter=str(result.adapter)))
    ids = torch.arange(8)[None]
    inputs = base.forward_kwargs(ids, torch.ones_like(ids), [{}])
    assert not torch.allclose(base.model(**inputs).logits, tuned.model(**inputs).logits)

    before = (tmp_path / "run" / "train_log.jsonl").read_bytes()
    again = train(config, data / "videos", data / "pairs.jsonl", tmp_path / "run")
    assert "is complete" in capsys.readouterr().err
    assert again == result
    assert (tmp_path / "run" / "train_log.jsonl").read_bytes() == before


def test_other_settings_do_not_go_on_in_the_same_folder(config: Config, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train(config, data / "videos", data / "pairs.jsonl", output)
    other = replace(config, train=config.train | {"loss_type": "sft"})
    with pytest.raises(ConfigError, match=r"other settings: train\.loss_type was 'synpo', now 'sft'.*--no-resume"):
        train(other, data / "videos", data / "pairs.jsonl", output)
    (output / "notes.txt").write_text("mine")
    result = train(other, data / "videos", data / "pairs.jsonl", output, resume=False)
    assert result.metrics["loss_type"] == "sft"
    assert [json.loads(line)["step"] for line in result.log.read_text().splitlines()] == [*range(1, 9), 8]
    assert (output / "notes.txt").read_text() == "mine"


def test_a_start_that_came_to_nothing_bars_no_other(
    config: Config, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not saved cannot be undone: settings changed as the error said must not be "other settings"."""
    output = tmp_path / "run"

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return Trainer.training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SynPOTrainer, "training_step", interrupted)
        train(config, data / "videos", data / "pairs.jsonl", output)
    assert len((output / "train_log.jsonl").read_text().splitlines()) == 2
    smaller = replace(config, train=config.train | {"per_device_train_batch_size": 1})
    result = train(smaller, data / "videos", data / "pairs.jsonl", output)
    assert [step for step, *_ in steps(result.log)] == list(range(1, 17))


def test_a_start_that_cannot_be_leaves_nothing(config: Config, data: Path, tmp_path: Path) -> None:
    for section, values in (("train", {"alpha": -3}), ("train", {"beta": -1}), ("lora", {"target_modules": "nothing"})):
        other = build(Config, json.loads(json.dumps(asdict(config) | {section: asdict(config)[section] | values})))
        with pytest.raises(ConfigError):
            train(other, data / "videos", data / "pairs.jsonl", tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_answers_trained_otherwise_do_not_go_on_in_the_same_folder(config: Config, data: Path, tmp_path: Path) -> None:
    """A run of a release that took the bare answer goes on where that is what the template writes, and nowhere else."""
    output = tmp_path / "run"
    train(config, data / "videos", data / "pairs.jsonl", output)
    made = json.loads((output / "config.json").read_text())
    for known in (made, {key: value for key, value in made.items() if key != "answers"}):
        (output / "config.json").write_text(json.dumps(known))
        (output / "metrics.json").unlink()
        train(config, data / "videos", data / "pairs.jsonl", output)
    template = load(config.model).tokenizer.chat_template.replace("<|{{ message.role }}|>", "<|{{ message.role }}|> ")
    other = replace(config, model=replace(config.model, chat_template=template))
    old = {"config": json.loads(json.dumps(asdict(other)))}
    (output / "config.json").write_text(json.dumps({k: v for k, v in made.items() if k != "answers"} | old))
    (output / "metrics.json").unlink()
    with pytest.raises(ConfigError, match="answers were trained otherwise: the bare answer .* now an answer follows"):
        train(other, data / "videos", data / "pairs.jsonl", output)


def test_held_out_pairs_are_evaluated_and_their_answers_looked_at(config: Config, data: Path, tmp_path: Path) -> None:
    extra = {"held_out": 2, "samples": 2, "sample_tokens": 12}
    result = train(replace(config, train=config.train | extra), data / "videos", data / "pairs.jsonl", tmp_path / "run")
    assert result.metrics["pairs"] == 6
    assert result.metrics["held_out"] == 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("held-out pairs</h4>") == 1 and page.count('class="bold side0"') == 3  # none has a gradient
    rows = [json.loads(line) for line in result.log.read_text().splitlines()]
    evaluations = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 3, 6]
    assert all(0 <= row["eval_synpo/repetition"] <= 1 for row in evaluations)
    assert evaluations[-1]["eval_synpo/chosen_prob"] != evaluations[0]["eval_synpo/chosen_prob"]


def test_curves_are_drawn_while_training_goes_on(
    config: Config, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, train=config.train | {"save_strategy": "steps", "save_steps": 4})

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return Trainer.training_step(self, *args, **kwargs)

    monkeypatch.setattr(SynPOTrainer, "training_step", stop, raising=False)
    with pytest.raises(KeyboardInterrupt):
        train(config, data / "videos", data / "pairs.jsonl", tmp_path / "run")
    assert all((tmp_path / "run" / f"{name}.png").stat().st_size > 5000 for name in ("rewards", "gradient_balance"))


def test_the_guard_stops_a_run_that_goes_wrong_and_it_can_go_on(
    config: Config, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"loss_type": "dpo", "beta": 2.0, "learning_rate": 3e-2, "num_train_epochs": 8, "guard": "stop"}
    config = replace(config, train=config.train | bad)
    pairs = [Pair(f"p{i}", f"{i % 4}.mp4", "Describe.", f"A bar {i}.", f"It rains {i} times. " * 3) for i in range(8)]
    write_records(tmp_path / "pairs.jsonl", pairs)  # the long answers outweigh the short ones
    arguments = (data / "videos", tmp_path / "pairs.jsonl", tmp_path / "run")
    with pytest.raises(
        GuardError, match=r"stopped by train.guard at step \d+: .*learning_rate.*checkpoint-\d+ is saved"
    ):
        train(config, *arguments)
    said = capsys.readouterr().err
    assert "warning: step" in said
    step = last_checkpoint(tmp_path / "run")
    assert step is not None and step.name != "checkpoint-32"
    assert not (tmp_path / "run" / "metrics.json").exists()
    result = train(replace(config, train=config.train | {"guard": "off"}), *arguments)
    assert result.metrics["steps"] == 32


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=rf"report_to: {name} is not installed: pip install 'synpo\[{name}\]'"):
        settings(Config(model=ModelConfig(device="cpu"), train={"report_to": name}), tmp_path)


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed (pip install tensorboard)")
def test_tensorboard_gets_the_metrics(config: Config, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    config = replace(config, train=config.train | {"report_to": "tensorboard"})
    train(config, data / "videos", data / "pairs.jsonl", tmp_path / "run")
    (events,) = (tmp_path / "board").rglob("events.*")
    assert b"synpo/margin" in events.read_bytes()


def test_text_pairs_in_trl_format_train_a_text_model(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    save(tiny_text_model(tokenizer), tokenizer, tmp_path / "model")
    rows = [{"prompt": f"Say {i}", "chosen": f"It is {i}.", "rejected": "No."} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    values: dict[str, Any] = {
        "model": {"path": str(tmp_path / "model"), "device": "cpu"},
        "lora": {"r": 2},
        "train": {"loss_type": "dpo", "beta": 0.3, "num_train_epochs": 1, "disable_tqdm": True, "save_strategy": "no"},
    }
    result = train(build(Config, values), None, tmp_path / "pairs.jsonl", tmp_path / "run")
    assert result.metrics["loss_parameters"] == {"beta": 0.3}
    assert result.metrics["steps"] == 1


def test_an_adapter_is_trained_further_and_is_then_the_reference(config: Config, data: Path, tmp_path: Path) -> None:
    config = replace(config, lora=replace(config.lora, dropout=0.0))
    first = train(config, data / "videos", data / "pairs.jsonl", tmp_path / "first")
    further = replace(config, model=replace(config.model, adapter=str(first.adapter)))
    second = train(further, data / "videos", data / "pairs.jsonl", tmp_path / "second")
    assert second.metrics["first"]["synpo/chosen_logp"] > first.metrics["first"]["synpo/chosen_logp"]
    for name, reward in (("auto", 0.0), ("base", None)):
        dpo = replace(further, train=further.train | {"loss_type": "dpo", "reference": name})
        result = train(dpo, data / "videos", data / "pairs.jsonl", tmp_path / name)
        if reward is None:  # what the first run taught is a reward over the model without its adapter
            assert abs(result.metrics["first"]["rewards/margins"]) > 1e-3
        else:
            assert result.metrics["first"]["rewards/margins"] == pytest.approx(reward, abs=1e-5)
            assert result.metrics["last"]["rewards/margins"] > 1e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1e-4}, r"train: unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ({"learning_rate": "fast"}, r"train\.learning_rate: expected float, got 'fast'"),
        ({"num_train_epochs": True}, r"train\.num_train_epochs: expected float"),
        ({"per_device_train_batch_size": 1.5}, r"train\.per_device_train_batch_size: expected int"),
        ({"lr_scheduler_type": "wavy"}, r"train: .*wavy"),
        ({"loss_type": "ppo"}, r"train\.loss_type: unknown objective 'ppo'"),
        ({"gamma": 1}, r"train\.gamma: synpo has no such parameter"),
        ({"output_dir": "x"}, r"train\.output_dir is set by the run itself"),
        ({"warmup_ratio": 0.1}, r"train: unknown key 'warmup_ratio'"),
        ({"eval_strategy": "steps"}, r"train\.eval_strategy: there is nothing to evaluate; set train\.held_out"),
        ({"guard": "halt"}, r"train\.guard: expected off, warn, stop, got 'halt'"),
        ({"num_train_epochs": 0}, r"train\.num_train_epochs: expected above 0, got 0"),
        ({"per_device_train_batch_size": 0}, r"train\.per_device_train_batch_size: expected at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, r"train\.gradient_accumulation_steps: expected at least 1"),
        ({"learning_rate": -1e-5}, r"train\.learning_rate: expected at least 0"),
        ({"held_out": -1}, r"train\.held_out: expected at least 0"),
        ({"max_grad_norm": -1}, r"train\.max_grad_norm: expected at least 0 \(0 is off\)"),
        ({"save_total_limit": 0}, r"train\.save_total_limit: expected at least 1"),
        ({"alpha": -3}, r"train: synpo: alpha must be positive, got -3"),
        ({"beta": -0.1}, r"train: synpo: beta must not be negative"),
        ({"loss_type": "ipo", "beta": 0}, r"train: ipo: beta must be positive"),
        ({"max_steps": 0}, r"train\.max_steps: expected at least 1, or -1"),
        ({"max_steps": -5}, r"train\.max_steps: expected at least 1, or -1"),
        ({"loss_backend": "abc"}, r"train\.loss_backend: expected one of auto, chunked, cpu, triton, got 'abc'"),
        ({"lr_scheduler_kwargs": {"a": 1}}, r"train\.lr_scheduler_kwargs = \{'a': 1\}: .*unexpected keyword"),
        ({"lr_scheduler_kwargs": "abc"}, r"train\.lr_scheduler_kwargs = 'abc'"),
        ({"optim_args": "abc"}, r"train\.optim_args: expected name=value,name=value, got 'abc'"),
        ({"torch_compile": True, "torch_compile_backend": "abc"}, r"train\.torch_compile_backend or .*abc"),
        ({"torch_compile": True, "torch_compile_mode": "abc"}, r"train\.torch_compile_backend or .*abc"),
        ({"neftune_noise_alpha": -1}, r"train\.neftune_noise_alpha: expected at least 0"),
        ({"log_level": "abc"}, r"train\.log_level: expected one of detail, debug, .*, got 'abc'"),
        ({"dataloader_multiprocessing_context": ""}, r"set train\.dataloader_num_workers, too"),
        ({"report_to": "wandbb"}, r"train\.report_to: unknown tracker 'wandbb'; did you mean 'wandb'"),
        ({"deepspeed": "zero3.json"}, r"train\.deepspeed: DeepSpeed is not installed: pip install deepspeed"),
    ],
)
def test_settings_that_cannot_be_used_are_named(
    values: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "deepspeed" in values:
        monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=message):
        settings(Config(model=ModelConfig(device="cpu"), train=values), tmp_path)


@pytest.mark.parametrize("kind", ["adapter", "backend"])
def test_what_shows_with_the_model_alone_leaves_nothing(
    kind: str, config: Config, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter of another model, kernels that cannot run here."""
    message = r"^train\.loss_backend: backend 'triton' cannot serve this input"
    broken = replace(config, train={**config.train, "loss_backend": "triton"})
    if kind == "adapter":
        first = train(config, data / "videos", data / "pairs.jsonl", tmp_path / "first").adapter
        tokenizer = byte_tokenizer()
        save(tiny_text_model(tokenizer), tokenizer, tmp_path / "other")
        message = rf"^model\.adapter: {first} cannot be put on the model: Target modules .* not found"
        broken = replace(config, model=replace(config.model, path=str(tmp_path / "other"), adapter=str(first)))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ConfigError, match=message):
        train(broken, data / "videos", data / "pairs.jsonl", tmp_path / "run" / "a")
    assert not (tmp_path / "run").exists()


def test_missing_files_are_named(config: Config, data: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nope\.jsonl does not exist"):
        train(config, data / "videos", data / "nope.jsonl", tmp_path / "run")
    with pytest.raises(ValueError, match=r"none of the 11 pairs can be used: 10 video missing"):
        train(config, tmp_path, data / "pairs.jsonl", tmp_path / "run")
    with pytest.raises(ConfigError, match="model folder ./gone does not exist"):
        gone = replace(config, model=ModelConfig(path="./gone"))
        train(gone, data / "videos", data / "pairs.jsonl", tmp_path / "run")
    with pytest.raises(
        IsADirectoryError, match=r"--pairs takes a JSON Lines file, got the folder .* mean .*pairs\.jsonl\?"
    ):
        train(config, data / "videos", data, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--videos: .*nowhere is not there; name the folder of videos"):
        train(config, data / "nowhere", data / "pairs.jsonl", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"pair p0 has the video 0\.mp4; --videos should name the folder it is in"):
        train(config, None, data / "pairs.jsonl", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="--output: .* is a file; name a folder"):
        train(config, data / "videos", data / "pairs.jsonl", data / "pairs.jsonl")
