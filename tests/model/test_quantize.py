"""Weights in 4 and 8 bits: what is quantized and what is not, and that a step of training goes through."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from synpo.config import ConfigError, LoraSection, ModelConfig
from synpo.model import quantize
from synpo.model.adapter import load
from synpo.model.fingerprint import fingerprint
from synpo.model.tiny import byte_tokenizer, save, tiny_captioner
from synpo.train.lora import apply_lora
from synpo.train.memory import MemoryModel
from synpo.train.plan import skeleton

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (pip install bitsandbytes)"
)


@pytest.fixture
def captioner_path(tmp_path: Path) -> Path:
    tokenizer = byte_tokenizer()
    return save(tiny_captioner(tokenizer), tokenizer, tmp_path / "captioner")


def load_nf4(path: Path) -> Any:
    """With the very settings for a GPU, on this machine's CPU: good for looking at, not for training."""
    config = ModelConfig(path=str(path), dtype="float32", quantization="nf4")
    how = quantize.loading(config, torch.device("cuda")) | {"device_map": {"": "cpu"}}
    return LlavaOnevisionForConditionalGeneration.from_pretrained(path, dtype=torch.float32, **how)


def quantized_names(model: torch.nn.Module) -> tuple[set[str], set[str]]:
    """Names of the linear layers that are quantized, and of those that should be."""
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return {n for n, m in linear.items() if not m.weight.is_floating_point()}, {
        n for n in linear if ".language_model." in n
    }


@needs_bitsandbytes
def test_nf4_quantizes_the_language_model_alone(captioner_path: Path) -> None:
    model = load_nf4(captioner_path)
    found, wanted = quantized_names(model)
    assert found == wanted and len(found) == 14
    packed = [
        m.weight for m in model.modules() if getattr(m, "weight", None) is not None and m.weight.dtype == torch.uint8
    ]
    scales = sum(p.quant_state.absmax.nbytes for p in packed)  # a byte for 64 numbers, with a scale for 256 of those
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    planned = skeleton(ModelConfig(path=str(captioner_path), dtype="float32"))
    planned.model.requires_grad_(False)
    assert MemoryModel(planned.model, quantization="nf4").weights == pytest.approx(held + scales, rel=0.01)


@needs_bitsandbytes
def test_int8_quantizes_the_language_model_alone_and_lora_trains(captioner_path: Path) -> None:
    config = ModelConfig(path=str(captioner_path), device="cpu", dtype="float32", quantization="int8")
    lm = load(config)
    lm.head()
    found, wanted = quantized_names(lm.model)
    assert found == wanted and len(found) == 14
    apply_lora(lm, LoraSection(r=2, alpha=4, dropout=0.0))
    ids = torch.arange(3, 19).view(2, 8)
    inputs = lm.forward_kwargs(ids, torch.ones_like(ids), [{}, {}])
    lm.hidden_states(inputs).square().mean().backward()
    grads = {n: p.grad for n, p in lm.model.named_parameters() if p.requires_grad}
    assert grads and all(g is not None and g.isfinite().all() for g in grads.values())
    assert all(g.abs().max() > 0 for n, g in grads.items() if "lora_B" in n)  # type: ignore[union-attr]


def test_bad_settings_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, captioner_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.quantization: expected none, nf4, int8, got 'int4'"):
        load(ModelConfig(path=str(captioner_path), quantization="int4"))
    monkeypatch.setattr(quantize, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="nf4 needs a CUDA device; on a CPU use int8"):
        load(ModelConfig(path=str(captioner_path), device="cpu", quantization="nf4"))
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"nf4 needs bitsandbytes.*synpo\[qlora\]"):
        load(ModelConfig(path=str(captioner_path), quantization="nf4"))


def test_what_a_model_said_in_another_format_is_not_taken_for_its_own(captioner_path: Path) -> None:
    def known_as(**options: str) -> str:
        return fingerprint(ModelConfig(path=str(captioner_path), **options))

    formats: list[dict[str, str]] = [{}, {"quantization": "int8"}, {"quantization": "nf4"}, {"dtype": "float16"}]
    assert len({known_as(**options) for options in formats}) == 4 and known_as() == known_as(dtype="auto")


def test_a_quantized_head_is_refused() -> None:
    class Packed(torch.nn.Module):
        def get_output_embeddings(self) -> torch.nn.Module:
            layer = torch.nn.Linear(2, 2)
            layer.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
            return layer

    with pytest.raises(ConfigError, match=r"output head of Packed was quantized to torch\.uint8"):
        quantize.check(Packed())
