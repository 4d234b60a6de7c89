"""A whole run with everything computed once, features on disk and a stored reference, against one that computes it all again."""

import json
from pathlib import Path
from typing import Any

import pytest

from made_videos import write_video
from synpo.config import Config as Settings
from synpo.config import build
from synpo.records import Pair, write_records
from synpo.train.run import train


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """videos/ with two clips, and pairs.jsonl: four pairs about them."""
    (tmp_path / "videos").mkdir()
    for k in range(2):
        write_video(tmp_path / "videos" / f"{k}.mp4", shade=90 * k)
    pairs = [Pair(f"p{i}", f"{i % 2}.mp4", "Describe.", f"A bar falls {i}.", f"It rains {i} times.") for i in range(4)]
    write_records(tmp_path / "pairs.jsonl", pairs)
    return tmp_path


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_that_computes_once_learns_the_same(data: Path, tiny_captioner_path: Path) -> None:
    values: dict[str, Any] = {
        "model": {"path": str(tiny_captioner_path), "device": "cpu"},
        "frames": {"fps": 1, "minimum": 2, "maximum": 2},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
    }
    common = {
        "loss_type": "dpo",
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "disable_tqdm": True,
    }
    again = {"prefix_sharing": False, "cache_gigabytes": 0.0}
    once = {"cache_vision": True, "precompute_reference": True}
    for name, extra in (("again", again), ("once", once)):
        train(build(Settings, {**values, "train": common | extra}), data / "videos", data / "pairs.jsonl", data / name)
    assert losses(data / "once") == pytest.approx(losses(data / "again"), rel=1e-3)
    assert len(losses(data / "once")) == 4
    assert losses(data / "once")[0] != losses(data / "once")[-1]
    assert len(list((data / "once" / "vision").glob("*.safetensors"))) == 2
    assert len((data / "once" / "reference" / "reference-0.jsonl").read_text().splitlines()) == 8
