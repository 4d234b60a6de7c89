"""Runs that build pairs with a random captioner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from synpo.config import Config, ModelConfig, PairsConfig, SamplingConfig

SHORT = SamplingConfig(temperature=0.9, top_k=32, top_p=0.95, max_new_tokens=10)


def settings(model: Path, **pairs: Any) -> Config:
    options: dict[str, Any] = {
        "candidates": 3, "margin": 0.01, "batch_size": 6, "candidate_sampling": SHORT, "clip_sampling": SHORT, **pairs,
    }  # fmt: skip
    return Config(model=ModelConfig(path=str(model), device="cpu"), pairs=PairsConfig(**options))
