"""The language model's frozen weights in 4 or 8 bits (QLoRA, https://arxiv.org/abs/2305.14314); the rest as it is.

    nf4    4-bit NormalFloat with double quantization, products in `model.dtype` (bfloat16 where that is auto)
    int8   8 bits a number (https://arxiv.org/abs/2208.07339)

Vision tower, projector and output head keep their own format: the first two see few tokens, and the fused loss multiplies
with the head's numbers as they stand.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from synpo.config import ConfigError, ModelConfig

NOT_LANGUAGE = r"(^|.*[._])(vision|visual|image|video|audio|projector|connector|merger|resampler|perceiver)"
"""Beginning of the full name of a module that is outside the language model."""

BITS = {"none": 32.0, "nf4": 4.127, "int8": 8.0}
"""Bits that a number of a linear layer takes, with its scales (nf4: QLoRA, section 3); "none" is not looked up."""


def loading(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained`; empty without quantization.

    Raises ConfigError when the setting is unknown, bitsandbytes is not installed, or nf4 is asked for on a CPU: there
    bitsandbytes repacks 4-bit weights at the first evaluation, and gradients no longer pass through them.
    """
    if config.quantization not in BITS:
        raise ConfigError(f"model.quantization: expected {', '.join(BITS)}, got {config.quantization!r}")
    if config.quantization == "none":
        return {}
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization: {config.quantization} needs bitsandbytes, which is not installed: pip install 'synpo[qlora]'"
        )
    if config.quantization == "nf4" and device.type == "cpu":
        raise ConfigError("model.quantization: nf4 needs a CUDA device; on a CPU use int8 or none")
    from transformers import BitsAndBytesConfig

    kept = ["lm_head", rf"{NOT_LANGUAGE}[^.]*"]
    if config.quantization == "int8":
        how = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    else:
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype),
            llm_int8_skip_modules=kept,
        )
    return {"quantization_config": how, "device_map": {"": str(device)}}


def check(model: Any) -> None:
    """Raise ConfigError when the output head of a loaded model was quantized."""
    weight = model.get_output_embeddings().weight
    if not weight.is_floating_point():
        raise ConfigError(
            f"model.quantization: the output head of {type(model).__name__} was quantized to {weight.dtype}, and the fused "
            "loss needs it whole; use model.quantization = none with this model"
        )


def quantizable(model: Any) -> list[str]:
    """Names of the linear layers of `model` that quantization packs: the language model's, without its head."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not (module is head or "lora_" in name or re.match(NOT_LANGUAGE, name))
    ]


def _quantized(model: nn.Module, quantization: str) -> list[torch.Tensor]:
    """The weights of `model`, which stands here unquantized, that `quantization` packs."""
    if quantization == "none":
        return []
    found = (model.get_submodule(name).weight for name in quantizable(model))
    return [weight for weight in found if not weight.requires_grad]  # type: ignore[misc]


def weight_bytes(model: nn.Module, quantization: str) -> int:
    """Bytes that parameters and buffers of `model`, which stands here unquantized, take once loaded with `quantization`."""
    smaller = {id(weight) for weight in _quantized(model, quantization)}
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    return sum(round(t.numel() * BITS[quantization] / 8) if id(t) in smaller else t.nbytes for t in tensors)


def unpacked_bytes(model: nn.Module, quantization: str) -> int:
    """Bytes of the largest weight that a product in 4 bits makes whole."""
    if quantization != "nf4":
        return 0
    return max((weight.nbytes for weight in _quantized(model, quantization)), default=0)
