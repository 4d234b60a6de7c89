"""The card beside what was trained: filled, true, and without a path of this machine."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from made_videos import write_video
from synpo.config import Config, build
from synpo.model.tiny import byte_tokenizer, save, tiny_text_model
from synpo.records import Pair, write_records
from synpo.train.card import card
from synpo.train.run import TrainResult, train
from synpo.train.trainer import SynPOTrainer

TRAIN = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A text model trained as a whole, with pairs held out and one left out."""
    root = tmp_path_factory.mktemp("card")
    tokenizer = byte_tokenizer()
    save(tiny_text_model(tokenizer), tokenizer, root / "base")
    rows = [{"prompt": f"Say {i}", "chosen": f"It is {i}.", "rejected": "No."} for i in range(7)]
    rows += [{"prompt": f"Long {i}", "chosen": "word " * 200, "rejected": "No."} for i in range(3)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {"loss_type": "dpo", "held_out": 2, "samples": 0, "max_length": 100}
    config = {"model": {"path": str(root / "base"), "device": "cpu"}, "lora": None, "train": TRAIN | values}
    return train(build(Config, config), None, root / "pairs.jsonl", root / "run")


def code_of(text: str, folder: Path, base: Path) -> dict[str, Any]:
    """What the card's lines of Python define."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace('"FOLDER"', repr(str(folder))).replace(f'"{base.name}"', repr(str(base))), names)
    return names


def checked(text: str) -> dict[str, Any]:
    """The front of a card that is filled."""
    assert "More Information Needed" not in text and "[optional]" not in text
    assert not re.search(r"(?<![\w.:/])/(?!/)[\w.-]+/", text), "a path"
    _, front, rest = text.split("---\n", 2)
    assert rest.strip().startswith("# ")
    return yaml.safe_load(front)


def test_a_model_that_was_trained_as_a_whole(text_run: TrainResult) -> None:
    text = (text_run.adapter / "README.md").read_text(encoding="utf-8")
    front = checked(text)
    assert front == {"library_name": "transformers", "tags": ["synpo", "preference-optimization", "dpo"]}
    metrics = text_run.metrics
    (left,) = metrics["dropped"].items()
    for words in (
        "with dpo (https://arxiv.org/abs/2305.18290), beta = 0.1, by synpo",
        f"{metrics['pairs']} preference pairs, {metrics['held_out']} held out. Left out: {left[1]} {left[0]}.",
        "| reference | the model before the first step |",
        "| optimizer step | 2 pairs |",
        f"| steps | {metrics['steps']} of {metrics['steps']}, epoch 1 |",
        "| longest pair | 100 tokens |",
        "Loss on held-out pairs: 0.6931 first, ",
        "`base`",
    ):
        assert words in text, words
    values = [row.split(" | ")[1] for row in text.splitlines() if row.startswith("| log-likelihood of a chosen token")]
    assert values == [f"{text_run.metrics['first']['synpo/chosen_logp']:.3f}"]
    model = code_of(text, text_run.adapter, text_run.output.parent / "base")["model"]
    assert model.num_parameters() > 0


def test_an_adapter_and_its_checkpoints(tiny_captioner_path: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "0.mp4", shade=50)
    pairs = [Pair(f"p{i}", "0.mp4", "Describe.", f"A bar {i}.", "It rains.") for i in range(2)]
    write_records(tmp_path / "pairs.jsonl", pairs)
    model, frames = {"path": str(tiny_captioner_path), "device": "cpu"}, {"minimum": 2, "maximum": 2}
    values = {"model": model, "frames": frames, "lora": {"r": 4, "alpha": 8}, "train": TRAIN}
    result = train(build(Config, values), tmp_path / "videos", tmp_path / "pairs.jsonl", tmp_path / "run")
    for folder in (result.adapter, tmp_path / "run" / "checkpoint-1"):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert checked(text) == {"library_name": "peft", "tags": ["synpo", "preference-optimization"]}
        assert "2 preference pairs, 2 of them about a video." in text
        assert "| LoRA | rank 4, alpha 8, dropout 0.05 |" in text
        assert "alpha = 30, beta = 0.2" in text and "--adapter FOLDER --videos" in text
    model = code_of(text, result.adapter, tiny_captioner_path)["model"]
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_a_base_of_the_hub_is_linked(text_lm: Any, pairs_for: Any, trainer_for: Any, tmp_path: Path) -> None:
    text_lm.model.active_peft_config.base_model_name_or_path = "org/base-7b"
    trainer: SynPOTrainer = trainer_for(text_lm, pairs_for(text_lm))
    text = card(trainer)
    assert checked(text)["base_model"] == "org/base-7b"
    assert "[org/base-7b](https://huggingface.co/org/base-7b)" in text and "Nothing was logged." in text
    trainer.create_model_card()
    assert (tmp_path / "run" / "README.md").read_text(encoding="utf-8") == text
