"""Models that people train, from the figures of their public configurations, written down here: no weights, no hub.

`ARCHITECTURES[name].skeleton()` is one on torch's meta device, or on another with random weights; `visual(frames)` counts what it
reads of a video of frames of 448 × 336 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class Architecture:
    """`billions` of parameters, as published; `config` builds the configuration, `visual` counts tokens of so many frames."""

    name: str
    billions: float
    config: Callable[[], Any]
    visual: Callable[[int], int]

    def skeleton(self, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "meta") -> Any:
        config = self.config()
        seen = getattr(config, "vision_config", None) is not None
        kind = transformers.AutoModelForImageTextToText if seen else transformers.AutoModelForCausalLM
        with torch.device(device):
            return kind.from_config(config, dtype=dtype, attn_implementation="sdpa")


def _text(width: int, layers: int, heads: int, groups: int, inner: int, words: int, tied: bool, **more: Any) -> Any:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": inner,
        "vocab_size": words,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 1 << 15,
        **more,
    }


def _llama(**text: Any) -> Any:
    return transformers.LlamaConfig(**text)


def _onevision(**text: Any) -> Any:
    tower = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 26}
    return transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text},
        vision_config={"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14, **tower},
        tie_word_embeddings=text["tie_word_embeddings"],
        image_token_index=text["vocab_size"] - 2,
        video_token_index=text["vocab_size"] - 1,
    )


def _qwen25(**text: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    tower = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}
    return transformers.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={**tower, "out_hidden_size": text["hidden_size"], "tokens_per_second": 2},
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def _qwen3(tower: dict[str, Any], **text: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    shared = {
        "patch_size": 16,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": text["hidden_size"],
    }
    return transformers.Qwen3VLConfig(
        text_config={**text, "head_dim": 128, "rope_parameters": rope},
        vision_config={**shared, **tower},
        tie_word_embeddings=text["tie_word_embeddings"],
    )


SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}

_ALL = (
    Architecture(
        "LLaVA-OneVision 0.5B",
        0.89,
        lambda: _onevision(**_text(896, 24, 14, 2, 4864, 152_000, True)),
        lambda frames: 196 * frames + 1,
    ),
    Architecture(
        "Qwen2.5-VL 3B",
        3.75,
        lambda: _qwen25(**_text(2048, 36, 16, 2, 11_008, 151_936, True)),
        lambda frames: frames // 2 * 16 * 12,
    ),
    Architecture(
        "Qwen3-VL 4B",
        4.44,
        lambda: _qwen3(SMALL, **_text(2560, 36, 32, 8, 9728, 151_936, True)),
        lambda frames: frames // 2 * 14 * 10,
    ),
    Architecture(
        "LLaVA-OneVision 7B",
        8.03,
        lambda: _onevision(**_text(3584, 28, 28, 4, 18_944, 152_128, False)),
        lambda frames: 196 * frames + 1,
    ),
    Architecture(
        "Llama-3 8B", 8.03, lambda: _llama(**_text(4096, 32, 32, 8, 14_336, 128_256, False)), lambda frames: 0
    ),
    Architecture(
        "Qwen2.5-VL 7B",
        8.29,
        lambda: _qwen25(**_text(3584, 28, 28, 4, 18_944, 152_064, False)),
        lambda frames: frames // 2 * 16 * 12,
    ),
    Architecture(
        "Qwen3-VL 8B",
        8.77,
        lambda: _qwen3(LARGE, **_text(4096, 36, 32, 8, 12_288, 151_936, False)),
        lambda frames: frames // 2 * 14 * 10,
    ),
)
ARCHITECTURES = {architecture.name: architecture for architecture in _ALL}
