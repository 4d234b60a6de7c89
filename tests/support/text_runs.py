"""Runs of `synpo train` for tests: a text model with pairs, one that ends as a killed process does, and what a log holds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synpo.config import Config, build
from synpo.model.tiny import byte_tokenizer, save, tiny_text_model
from synpo.train.trainer import SynPOTrainer


def text_folder(root: Path, pairs: int) -> Path:
    """root, with model/, a text model, and pairs.jsonl."""
    tokenizer = byte_tokenizer()
    save(tiny_text_model(tokenizer), tokenizer, root / "model")
    rows = [{"prompt": f"Say {i}", "chosen": f"It is {i}.", "rejected": f"No{'.' * i}"} for i in range(pairs)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def text_config(folder: Path, **train: Any) -> Config:
    """Two epochs of two pairs a step on the CPU."""
    values = {
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "disable_tqdm": True,
    }
    model = {"path": str(folder / "model"), "device": "cpu"}
    return build(Config, {"model": model, "lora": {"r": 4}, "train": values | train})


def steps(path: Path) -> list[tuple[float, ...]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"], r["synpo/margin"]) for r in rows if "synpo/margin" in r]


class Killed(BaseException):
    pass


def killed(patch: pytest.MonkeyPatch, step: int, run: Callable[..., Any], *arguments: Any) -> None:
    """Train until `step` steps are done, and end there as a killed process does."""
    real = SynPOTrainer.training_step

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise Killed
        return real(self, *args, **kwargs)

    with patch.context() as inside, pytest.raises(Killed):
        inside.setattr(SynPOTrainer, "training_step", stop)
        run(*arguments)
