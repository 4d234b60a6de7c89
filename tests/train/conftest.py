"""Tiny models under LoRA and encoded pairs in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from synpo.config import LoraSection, ModelConfig
from synpo.data.tokenize import EncodedPair
from synpo.model.adapter import CaptionModel, load
from synpo.model.tiny import byte_tokenizer, tiny_text_model
from synpo.train.lora import apply_lora
from synpo.train.trainer import SynPOConfig, SynPOTrainer

CHOSEN = ["A red circle moves.", "It turns blue, then green.", "Two squares meet.", "A star leaves."]
REJECTED = ["Nothing.", "A green triangle stays where it is.", "It rains.", "One dog and a cat."]


@pytest.fixture
def captioner(tiny_captioner_path: Path) -> CaptionModel:
    lm = load(ModelConfig(path=str(tiny_captioner_path), device="cpu"))
    torch.manual_seed(0)
    apply_lora(lm, LoraSection(r=4, alpha=8, dropout=0.0))
    perturb(lm)
    return lm


@pytest.fixture
def text_lm() -> CaptionModel:
    tokenizer = byte_tokenizer()
    lm = CaptionModel(tiny_text_model(tokenizer), tokenizer, None)
    torch.manual_seed(0)
    apply_lora(lm, LoraSection(r=4, alpha=8, dropout=0.0))
    perturb(lm)
    return lm


def perturb(lm: CaptionModel) -> None:
    """LoRA starts as nothing (B = 0); give it values, so that the policy differs from its reference."""
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))


@pytest.fixture
def pairs_for() -> Callable[..., list[EncodedPair]]:
    """pairs_for(lm, count): pairs with unequal answers and, for a captioner, unequal clips."""

    def build(lm: CaptionModel, count: int = 4) -> list[EncodedPair]:
        generator = torch.Generator().manual_seed(0)
        pairs = []
        for i in range(count):
            frames = None
            if lm.sees_video:
                frames = torch.randint(0, 256, (1 + i % 3, 3, 48, 48), dtype=torch.uint8, generator=generator)
            prompt = lm.prompt("Describe." if i % 2 else "Describe the video in detail.", frames)
            chosen, rejected = lm.completion(CHOSEN[i % 4]), lm.completion(REJECTED[i % 4])
            pairs.append(EncodedPair(f"pair-{i}", prompt.input_ids, chosen, rejected, prompt.vision))
        return pairs

    return build


@pytest.fixture
def trainer_for(tmp_path: Path) -> Callable[..., SynPOTrainer]:
    """trainer_for(lm, pairs, **settings): a quiet CPU trainer without warm-up or checkpoints."""

    def build(lm: CaptionModel, pairs: Any, folder: str = "run", **settings: Any) -> SynPOTrainer:
        defaults: dict[str, Any] = {
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        return SynPOTrainer(lm, SynPOConfig(output_dir=str(tmp_path / folder), **defaults | settings), pairs)

    return build
