"""LoRA reaches the language model's projections and nothing else, in every family."""

from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, get_peft_model

from synpo.config import ConfigError, LoraSection
from synpo.data.collate import PairCollator
from synpo.model.adapter import CaptionModel
from synpo.model.tiny import byte_tokenizer, tiny_captioner, tiny_text_model
from synpo.train.lora import apply_lora, language_prefix
from synpo.train.objective import PairObjective
from synpo_kernels import OBJECTIVES, SequenceStats, sequence_stats

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def build(kind: str) -> CaptionModel:
    tokenizer = byte_tokenizer()
    model: Any = tiny_captioner(tokenizer) if kind == "captioner" else tiny_text_model(tokenizer, kind)
    return CaptionModel(model, tokenizer, None)


@pytest.mark.parametrize("kind", ["captioner", "llama", "qwen2"])
def test_the_default_wraps_every_projection_of_the_language_model_and_no_other(kind: str) -> None:
    lm = build(kind)
    names = apply_lora(lm, LoraSection(r=2, alpha=4))
    prefix = "model.language_model.layers." if kind == "captioner" else "model.layers."
    assert len(names) == 2 * len(PROJECTIONS)
    assert all(name.startswith(prefix) and name.rsplit(".")[-1] in PROJECTIONS for name in names)
    wrapped = [name for name, module in lm.base.named_modules() if hasattr(module, "lora_A")]
    assert sorted(wrapped) == sorted(names)
    trained = [name for name, p in lm.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(names)
    assert all("lora_" in name for name in trained)


FAMILIES = ["LlavaNextVideo", "VideoLlava", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "SmolVLM", "InternVL", "LlavaOnevision"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_is_found_in_every_family(family: str) -> None:
    config = getattr(transformers, f"{family}Config")()
    for section in (config.text_config, config.vision_config):
        for name in ("num_hidden_layers", "depth"):
            if hasattr(section, name):
                setattr(section, name, 1)
    config.text_config.pad_token_id = 0
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    lm: Any = type("Lm", (), {"model": model})()
    names = apply_lora(lm, LoraSection(r=2))
    assert {name.rsplit(".")[-1] for name in names} == PROJECTIONS
    assert all(name.startswith(("model.language_model.", "model.text_model.")) for name in names)
    assert language_prefix(model) in ("model.language_model", "model.text_model")


def test_an_expression_that_matches_nothing_shows_the_names() -> None:
    with pytest.raises(
        ConfigError, match=r"matches no module of the language model \(model\).*model\.layers\.0\.self_attn"
    ):
        apply_lora(build("llama"), LoraSection(target_modules=r".*\.query"))


def test_an_expression_for_the_tower_matches_nothing() -> None:
    with pytest.raises(ConfigError, match="matches no module of the language model"):
        apply_lora(build("captioner"), LoraSection(target_modules=r".*vision_tower.*\.q_proj"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r: expected at least 1, got 0"),
        ({"alpha": 0}, "alpha: expected at least 1, got 0"),
        ({"dropout": 1}, r"dropout: expected from 0 \(off\) to less than 1, got 1"),
        ({"target_modules": "("}, r"target_modules: '\(' is not a regular expression"),
        ({"target_modules": "a|(?i)b"}, "target_modules: .* is not a regular expression"),
    ],
)
def test_settings_that_cannot_work_are_named_before_a_model_is_loaded(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraSection(**values)


def test_a_match_that_is_no_linear_layer_is_named() -> None:
    with pytest.raises(ConfigError, match="target_modules"):
        apply_lora(build("llama"), LoraSection(target_modules=r".*\.self_attn"))


def test_a_model_that_has_an_adapter_trains_that_one_further() -> None:
    lm = build("captioner")
    names = apply_lora(lm, LoraSection(r=2))
    lm.model.requires_grad_(False)
    first = lm.model
    assert sorted(apply_lora(lm, LoraSection(r=16))) == sorted(names)
    assert lm.model is first
    assert sum(p.requires_grad for p in lm.model.parameters()) == 2 * len(names)


def test_an_adapter_that_is_no_lora_is_refused() -> None:
    lm = build("llama")
    lm.model = get_peft_model(lm.model, IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ConfigError, match=r"model\.adapter: .* holds no LoRA"):
        apply_lora(lm, LoraSection(r=2))


@pytest.mark.parametrize("kind", ["captioner", "llama"])
def test_the_output_head_can_be_asked_for(kind: str) -> None:
    lm = build(kind)
    names = apply_lora(lm, LoraSection(r=2, target_modules=r".*\.(q_proj|v_proj)|lm_head"))
    assert names.count("lm_head") == 1
    assert len(names) == 5
    assert hasattr(lm.base.get_output_embeddings(), "lora_A")


@pytest.mark.parametrize("loss_type", ["synpo", "dpo", "simpo"])
def test_lora_on_the_head_is_trained_as_by_full_logits(loss_type: str, pairs_for: Any) -> None:
    lm = build("llama")
    apply_lora(lm, LoraSection(r=4, alpha=8, dropout=0.0, target_modules=r".*\.q_proj|lm_head"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
    pairs = pairs_for(lm)
    outcome = PairObjective(lm, loss_type, {})(lm.model, PairCollator(lm.pad_token_id)(pairs))
    outcome.loss.backward()
    found = {n: p.grad for n, p in lm.model.named_parameters() if p.grad is not None}
    lm.model.zero_grad()

    def naive() -> SequenceStats:
        rows = []
        for prompt, answer in [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]:
            logps = lm.model(input_ids=torch.cat([prompt, answer])[None]).logits[0].log_softmax(-1)
            rows.append(logps[len(prompt) - 1 : -1].gather(1, answer[:, None])[:, 0])
        return sequence_stats(torch.cat(rows), cu_seqlens=torch.tensor([0, *map(len, rows)]).cumsum(0))

    reference = []
    if OBJECTIVES[loss_type].needs_reference:
        with torch.no_grad(), lm.model.disable_adapter():
            reference = [naive()]
    loss = OBJECTIVES[loss_type](naive(), *reference)
    loss.backward()
    torch.testing.assert_close(outcome.loss, loss, rtol=1e-4, atol=1e-5)
    expected = {n: p.grad for n, p in lm.model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert sum("lm_head" in name for name in found) == 2
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        assert (found[name] - gradient).norm() <= 2e-3 * gradient.norm(), name
