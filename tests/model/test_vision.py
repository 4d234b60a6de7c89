"""How a checkpoint's preprocessing is read, and what is said when a video processor cannot be had."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from synpo.model.tiny import byte_tokenizer, tiny_captioner, tiny_text_model
from synpo.model.vision import FramesRefused, OneVision, Processor, sequential_positions, vision_for

OWN = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


@pytest.mark.parametrize(
    "files",
    [
        {"preprocessor_config.json": OWN},
        {
            "video_preprocessor_config.json": OWN,
            "preprocessor_config.json": {"image_mean": [9] * 3, "image_std": [9] * 3},
        },
        {"video_preprocessor_config.json": {"size": 48}, "processor_config.json": {"video_processor": OWN}},
    ],
)
def test_pixels_are_normalised_as_the_checkpoint_says(files: dict[str, Any], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = byte_tokenizer()
    vision = vision_for(tiny_captioner(tokenizer), tokenizer, str(tmp_path))
    assert isinstance(vision, OneVision)
    _, prepared = vision.prepare("<video>", torch.full((2, 3, 48, 48), 51, dtype=torch.uint8))  # 51 / 255 = 0.2
    expected = (0.2 - torch.tensor(OWN["image_mean"])) / torch.tensor(OWN["image_std"])
    torch.testing.assert_close(prepared["pixels"].mean(dim=(0, 2, 3)), expected)


def test_without_a_statement_siglips_normalisation_is_used(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    vision: Any = vision_for(tiny_captioner(tokenizer), tokenizer, str(tmp_path))
    _, prepared = vision.prepare("<video>", torch.full((1, 3, 20, 90), 255, dtype=torch.uint8))
    assert prepared["pixels"].shape == (1, 3, 48, 48)
    torch.testing.assert_close(prepared["pixels"], torch.ones(1, 3, 48, 48))


def test_a_text_model_has_no_vision(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    assert vision_for(tiny_text_model(tokenizer), tokenizer, str(tmp_path)) is None


def test_a_processor_that_cannot_be_loaded_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("torchvision is not installed")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", missing)
    model: Any = SimpleNamespace(config=SimpleNamespace(vision_config={}, model_type="qwen2_vl"))
    with pytest.raises(ValueError, match=r"qwen2_vl model cannot be loaded: torchvision.*LLaVA-OneVision model"):
        vision_for(model, byte_tokenizer(), str(tmp_path))


def test_positions_count_the_tokens_a_mask_keeps() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert sequential_positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


@pytest.mark.parametrize(
    "failure", [ValueError("t:1 must be larger"), RuntimeError("shape"), ZeroDivisionError("0")], ids=repr
)
def test_whatever_a_processor_raises_of_frames_says_which(failure: Exception) -> None:
    class Odd:
        def __call__(self, **given: Any) -> Any:
            raise failure

    vision = Processor(SimpleNamespace(model=SimpleNamespace()), Odd())
    with pytest.raises(FramesRefused, match="Odd refuses 3 frames of 4×2: "):
        vision.prepare("<video>", torch.zeros(3, 3, 2, 4, dtype=torch.uint8))
