"""Candidates from vLLM itself, where it is installed (a CPU build will do): greedy, they are our decoder's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from synpo.config import ModelConfig, SamplingConfig
from synpo.model.adapter import load
from synpo.model.tiny import save, tiny_captioner, word_tokenizer
from synpo.pipeline.engine import VLLM, HuggingFace
from synpo.pipeline.retrospect import retrospective_prompt

vllm = pytest.importorskip("vllm", reason="vllm is not installed (pip install 'synpo[vllm]', or a CPU build of it)")
QUESTION = "Describe."
SECONDS = [8.0, 20.0]


def as_on_the_hub(folder: Path, model: Any, tokenizer: Any) -> None:
    """Give a checkpoint the processor and the weight names of those on the hub, which vLLM reads."""
    from transformers import LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor
    from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor

    side, patch = model.config.vision_config.image_size, model.config.vision_config.patch_size
    pixels: dict[str, Any] = {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(image_grid_pinpoints=[[side, side]], **pixels),
        video_processor=LlavaOnevisionVideoProcessor(**pixels),
        tokenizer=tokenizer,
        num_image_tokens=(side // patch) ** 2,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    if not any("vision_tower.vision_model." in name for name in weights):
        weights = {n.replace("vision_tower.", "vision_tower.vision_model."): w for n, w in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.timeout(600)
def test_greedy_answers_of_vllm_are_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    tokenizer = word_tokenizer([retrospective_prompt(QUESTION, ""), *(f"w{i}" for i in range(200))])
    model = tiny_captioner(tokenizer, text_width=128, text_heads=4)  # heads of 32: the least that vLLM's kernels take
    generator = torch.Generator().manual_seed(3)
    for weight in model.model.language_model.parameters():
        if weight.dim() == 2:  # far enough from uniform that rounding does not choose the token
            torch.nn.init.normal_(weight, std=0.06, generator=generator)
    save(model, tokenizer, tmp_path / "ours")
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    as_on_the_hub(tmp_path / "theirs", model, tokenizer)

    views = [torch.randint(0, 256, (n, 3, 48, 48), generator=generator).to(torch.uint8) for n in (8, 12)]
    keys = [["a", "b"], ["c"]]
    greedy = SamplingConfig(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=12)
    ours = HuggingFace(load(ModelConfig(path=str(tmp_path / "ours"), device="cpu"))).describe(
        views, keys, QUESTION, greedy, 1, SECONDS
    )
    engine = VLLM(ModelConfig(path=str(tmp_path / "theirs"), dtype="float32"))
    theirs = engine.describe(views, keys, QUESTION, greedy, 1, SECONDS)
    sampled = SamplingConfig(temperature=0.9, top_k=8, top_p=0.95, max_new_tokens=12)
    twice = [engine.describe(views, keys, QUESTION, sampled, 0, SECONDS) for _ in range(2)]
    engine.close()

    for expected, got in zip((x for row in ours for x in row), (x for row in theirs for x in row)):
        assert (got.text, got.draft, got.finished) == (expected.text, expected.draft, expected.finished)
        assert got.logp == pytest.approx(expected.logp, abs=2e-3)
    assert twice[0] == twice[1], "seeds follow from the keys"
    assert twice[0][0][0].text != twice[0][0][1].text, "and differ between them"
