"""What a run chooses itself, what it keeps of that when it goes on, and that everything then runs in the same precision."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from synpo.config import Config, ConfigError, build
from synpo.data.features import VisionCache
from synpo.model import liger
from synpo.model.adapter import CaptionModel
from synpo.model.tiny import byte_tokenizer, save, tiny_text_model
from synpo.records import Pair, write_records
from synpo.train import choices, layers
from synpo.train.arguments import SynPOConfig
from synpo.train.choices import OPEN, in_words, settle
from synpo.train.run import train
from synpo.train.trainer import SynPOTrainer


@pytest.fixture
def open_settings(tmp_path: Path) -> Callable[..., SynPOConfig]:
    return lambda **values: SynPOConfig(output_dir=str(tmp_path / "args"), use_cpu=True, **values)


def half(lm: CaptionModel) -> CaptionModel:
    lm.model.get_input_embeddings().bfloat16()
    return lm


def test_by_device_and_weights(text_lm: CaptionModel, open_settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(liger, "installed", lambda: False)
    nothing = dict.fromkeys(OPEN, False)
    lora = {"fused_lora": True}
    assert settle(open_settings(), text_lm, "cuda") == nothing | lora | {"tf32": True}
    assert settle(open_settings(), half(text_lm), "cpu") == nothing
    args = open_settings()
    assert (args.bf16, args.mixed_precision, args.activation_checkpointing) == (False, "no", False)
    assert settle(args, text_lm, "cuda") == nothing | lora | {"bf16": True, "tf32": True}
    assert (args.bf16, args.mixed_precision, args.tf32) == (True, "bf16", True)
    assert in_words(args, text_lm) == "bfloat16 weights, bfloat16 autocast, TF32"
    assert settle(args, text_lm, "cuda") == {} and args.bf16  # nothing is open any more
    monkeypatch.setattr(liger, "installed", lambda: True)
    assert settle(open_settings(), text_lm, "cuda")["use_liger_kernel"]
    assert not settle(open_settings(), text_lm, "cpu")["use_liger_kernel"]
    assert not settle(open_settings(torch_compile=True), text_lm, "cuda")["use_liger_kernel"]
    monkeypatch.setattr(choices, "LARGE", 1000)
    args = open_settings()
    assert settle(args, text_lm, "cuda")["activation_checkpointing"]
    assert args.activation_checkpointing and args.gradient_checkpointing
    assert not settle(open_settings(), text_lm, "cpu")["activation_checkpointing"]
    for elsewhere in ("deepspeed", "fsdp"):
        args = open_settings()
        setattr(args, elsewhere, {"zero": 2})
        assert settle(args, text_lm, "cuda") == nothing | {"tf32": True}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_what_is_said_counts(text_lm: CaptionModel, open_settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "LARGE", 1000)
    said = open_settings(**dict.fromkeys(OPEN, False))
    assert settle(said, half(text_lm), "cuda") == {}
    assert not any(getattr(said, name) for name in OPEN)
    old = open_settings(gradient_checkpointing=True)  # its name in earlier releases
    assert "activation_checkpointing" not in settle(old, text_lm, "cuda") and old.activation_checkpointing
    assert not settle(open_settings(fp16=True), text_lm, "cuda")["bf16"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # accelerate launch --mixed_precision bf16
    assert settle(open_settings(), text_lm, "cpu")["bf16"]


def test_lora_that_is_held_apart_is_not_fused(text_lm: CaptionModel, trainer_for: Any) -> None:
    with pytest.raises(ConfigError, match=r"train\.fused_lora reads the weights of LoRA, which FSDP"):
        trainer_for(text_lm, None, fused_lora=True, fsdp="full_shard")


def test_a_gpu_without_bfloat16_products_has_no_autocast(
    text_lm: CaptionModel, open_settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert not settle(open_settings(), half(text_lm), "cuda")["bf16"]


STEPS = 4


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[[str], tuple[Any, ...]]:
    """arguments(folder): of `train`, for a model with bfloat16 weights on the CPU and six pairs."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    save(tiny_text_model(tokenizer).bfloat16(), tokenizer, tmp_path / "model")
    pairs = [Pair(f"p{i}", None, "Why?" * (i + 1), f"Because {i}.", f"No {i}.") for i in range(6)]
    write_records(tmp_path / "pairs.jsonl", pairs)
    values = {
        "model": {"path": str(tmp_path / "model"), "device": "cpu"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "train": {
            "learning_rate": 1e-2,
            "max_steps": STEPS,
            "save_steps": 2,
            "save_strategy": "steps",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "disable_tqdm": True,
        },
    }
    return lambda folder: (build(Config, values), None, tmp_path / "pairs.jsonl", tmp_path / folder)


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def stopped_at(step: int, patch: pytest.MonkeyPatch, arguments: tuple[Any, ...]) -> None:
    real = SynPOTrainer.training_step

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with patch.context() as inside, pytest.raises(KeyboardInterrupt):
        inside.setattr(SynPOTrainer, "training_step", stop)
        train(*arguments)


def test_a_run_keeps_its_choice(arguments: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Also one that was begun before there was a choice, and one that goes on where another would be made."""
    train(*arguments("plain"))
    stopped_at(3, monkeypatch, arguments("of before"))
    config = arguments("of before")[3] / "config.json"
    stored = json.loads(config.read_text())
    assert stored.pop("chosen") == dict.fromkeys(OPEN, False)
    config.write_text(json.dumps(stored))

    monkeypatch.setitem(choices.RULES, "bf16", lambda *_: True)
    train(*arguments("of before"))
    assert losses(arguments("of before")[3]) == losses(arguments("plain")[3])
    capsys.readouterr()
    train(*arguments("autocast"))
    assert "bfloat16 weights, bfloat16 autocast" in " ".join(capsys.readouterr().err.split())
    assert losses(arguments("autocast")[3]) != losses(arguments("plain")[3])
    stopped_at(3, monkeypatch, arguments("killed"))

    monkeypatch.setitem(choices.RULES, "bf16", lambda *_: False)
    train(*arguments("killed"))
    assert losses(arguments("killed")[3]) == losses(arguments("autocast")[3])
    config, *rest = arguments("killed")
    train(replace(config, train=config.train | {"bf16": True}), *rest)  # what was chosen may be said
    with pytest.raises(ConfigError, match=r"train\.bf16 was True, now False"):
        train(replace(config, train=config.train | {"bf16": False}), *rest)


def test_positions_are_multiplied_in_full(
    text_lm: CaptionModel, pairs_for: Any, trainer_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary angles are products of positions up to a model's context: 10 bits would round those beyond 2048."""
    states: list[bool] = []
    monkeypatch.setattr(layers, "enable_tf32", states.append)
    monkeypatch.setitem(choices.RULES, "tf32", lambda *_: True)
    seen: dict[str, bool] = {}
    decoder = text_lm.base.get_decoder()
    trainer = trainer_for(text_lm, pairs_for(text_lm, 2))
    decoder.rotary_emb.forward = watch(decoder.rotary_emb.forward, lambda: seen.update(angles=states[-1]))
    norm = decoder.layers[0].input_layernorm
    norm.forward = watch(norm.forward, lambda: seen.update(layer=states[-1]))
    trainer.train()
    assert seen == {"angles": False, "layer": True}


def watch(function: Callable[..., Any], look: Callable[[], None]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        look()
        return function(*args, **kwargs)

    return watched


def test_kept_features_are_those_of_training(captioner: CaptionModel, pairs_for: Any, tmp_path: Path) -> None:
    vision = pairs_for(captioner, 2)[1].vision
    cache, plain = VisionCache(tmp_path, captioner, torch.bfloat16), VisionCache(tmp_path, captioner)
    video = tmp_path / "video"
    video.write_bytes(b"frames")
    assert cache.key(video, [0.0]) != plain.key(video, [0.0])
    with torch.autocast("cpu", torch.bfloat16):
        (expected,) = captioner.encode_vision([vision])
    kept = cache.make("half", vision)["features"]
    assert torch.equal(kept, expected["features"]) and not torch.equal(kept, plain.make("full", vision)["features"])


def test_samples_are_written_in_the_precision_of_training(
    text_lm: CaptionModel, pairs_for: Any, trainer_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []
    monkeypatch.setattr(
        "synpo.train.trainer.repetition", lambda *_: found.append(torch.is_autocast_enabled("cpu")) or 0.0
    )
    for bf16 in (False, True):
        trainer = trainer_for(text_lm, None, bf16=bf16)
        trainer.eval_dataset = pairs_for(text_lm, 2)
        trainer.evaluate()
    assert found == [False, True]
