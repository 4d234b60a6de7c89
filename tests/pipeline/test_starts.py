"""Pairs that cannot be built: said before anything is made, and nothing is left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from pair_runs import settings
from synpo.config import Config, ConfigError, JudgeConfig, PairsConfig
from synpo.model.tiny import byte_tokenizer, save, tiny_captioner, tiny_text_model
from synpo.pipeline.judge import JudgeError
from synpo.pipeline.run import build_pairs
from synpo.video import VideoError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": 1}, "candidates: expected at least 2, got 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"refinements": -1}, "refinements: expected at least 0, got -1"),
        ({"margin": -1.0}, "margin: expected at least 0"),
        ({"clip_seconds": 0.0}, "clip_seconds: expected above 0"),
        ({"max_clips": 1}, "max_clips: expected at least 2"),
    ],
)
def test_impossible_settings(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairsConfig(**change)


def test_a_judge_without_its_key_is_said_before_anything_is_made(
    videos: Path, tiny_captioner_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    config = replace(settings(tiny_captioner_path), judge=JudgeConfig(kind="openai", model="m", key_env="NO_SUCH_KEY"))
    with pytest.raises(JudgeError, match="NO_SUCH_KEY"):
        build_pairs(config, videos, tmp_path / "pairs.jsonl")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["text model", "no model", "adapter", "judge"])
def test_a_start_that_cannot_be_leaves_nothing(
    kind: str, videos: Path, tiny_captioner_path: Path, tmp_path: Path
) -> None:
    config = settings(tiny_captioner_path)
    if kind == "text model":
        tokenizer = byte_tokenizer()
        config = settings(save(tiny_text_model(tokenizer), tokenizer, tmp_path / "model"))
        message = "takes no video; pairs of videos need a video model"
    elif kind == "no model":
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
        config, message = settings(tmp_path / "model"), "cannot be loaded"
    elif kind == "adapter":  # of the same model, wider
        tokenizer = AutoTokenizer.from_pretrained(tiny_captioner_path)
        wide = get_peft_model(tiny_captioner(tokenizer, text_width=128), LoraConfig(r=2, target_modules=["q_proj"]))
        wide.save_pretrained(tmp_path / "model")
        config = replace(config, model=replace(config.model, adapter=str(tmp_path / "model")))
        message = rf"^model\.adapter: {tmp_path / 'model'} cannot be put on the model: size mismatch"
    else:
        (tmp_path / "model").mkdir()
        config, message = replace(config, judge=JudgeConfig(kind="nobody")), r"judge\.kind: unknown judge 'nobody'"
    with pytest.raises(ConfigError, match=message):
        build_pairs(config, videos, tmp_path / "out" / "a" / "pairs.jsonl", tmp_path / "b" / "work")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_outputs_that_cannot_be_written_are_said_before_the_work(
    videos: Path, tiny_captioner_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for pairs, work, message in (
        (tmp_path / "file" / "p.jsonl", None, "--pairs: .*file cannot be made a folder"),
        (tmp_path / "p.jsonl", tmp_path / "file", "--work: .*file cannot be made a folder"),
    ):
        with pytest.raises(OSError, match=message):
            build_pairs(settings(tiny_captioner_path), videos, pairs, work)


def test_missing_inputs(videos: Path, tiny_captioner_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model"):
        build_pairs(Config(), videos, tmp_path / "p.jsonl")
    with pytest.raises(ConfigError, match="does not exist"):
        build_pairs(settings(tmp_path / "nowhere"), videos, tmp_path / "p.jsonl")
    with pytest.raises(VideoError, match="not a folder"):
        build_pairs(settings(tiny_captioner_path), tmp_path / "nothing", tmp_path / "p.jsonl")
