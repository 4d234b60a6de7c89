"""The output head as the loss gets it: hidden states and head of many families give their own logits; PEFT on the head."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from synpo.model.adapter import CaptionModel
from synpo.model.tiny import byte_tokenizer, tiny_text_model

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def text_model(family: str) -> CaptionModel:
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=0.5)),
        "cohere": lambda: CohereForCausalLM(CohereConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"})),
        "granite": lambda: GraniteForCausalLM(
            GraniteConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logits_scaling=8.0)
        ),
        "llama": lambda: tiny_text_model(byte_tokenizer()),
    }
    return CaptionModel(models[family]().eval(), byte_tokenizer(), None)


def logits_from_head(lm: CaptionModel, ids: Tensor) -> Tensor:
    return lm.head().logits(lm.hidden_states(lm.forward_kwargs(ids, torch.ones_like(ids), [{}] * len(ids))))


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])
def test_hidden_states_and_head_are_the_models_own_logits(family: str) -> None:
    lm = text_model(family)
    ids = torch.randint(0, 260, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(logits_from_head(lm, ids), lm.model(ids).logits, rtol=1e-5, atol=1e-6)
    if family != "llama":  # the setting is not one that does nothing
        assert lm.head().softcap is not None or lm.head().logit_scale != 1.0


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused() -> None:
    lm = text_model("llama")
    lm.model.lm_head.register_forward_hook(lambda layer, inputs, output: output * 2)
    with pytest.raises(ValueError, match="a forward hook on the output head changes its logits"):
        lm.head()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_models_own_logits_are_compared_on_a_few_rows(dtype: torch.dtype) -> None:
    """A model whose logits hang on something else than the state at their place."""
    lm = text_model("llama")
    lm.model.to(dtype)
    head = lm.model.lm_head
    forward = type(lm.model).forward

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if output.logits.shape[1] > 1:
            output.logits = output.logits.roll(1, dims=1) * 0.1 + output.logits * 0.9
        return output

    lm.model.__class__ = type("Mixed", (type(lm.model),), {"forward": changed})
    with pytest.raises(ValueError, match=r"the logits of Mixed are not those of its output head: they differ by up to"):
        lm.head()
    lm = text_model("llama")
    lm.model.to(dtype)
    assert lm.head().weight.dtype == head.weight.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_that_a_model_widens_are_those_of_its_head(dtype: torch.dtype) -> None:
    """Many models scale what their head gives in float32; it was rounded before."""
    lm = text_model("llama")
    lm.model.to(dtype)
    forward = type(lm.model).forward

    def widened(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits.float() * 0.7
        return output

    lm.model.__class__ = type("Wide", (type(lm.model),), {"forward": widened})
    assert lm.head().logit_scale == 0.7


def test_hidden_states_never_build_the_logits_and_leave_no_hook() -> None:
    lm = text_model("llama")
    shapes = []
    forward = lm.model.lm_head.forward
    lm.model.lm_head.forward = lambda x: shapes.append(x.shape) or forward(x)  # type: ignore[func-returns-value]
    ids = torch.arange(12).view(3, 4)
    hidden = lm.hidden_states(lm.forward_kwargs(ids, torch.ones_like(ids), [{}] * 3))
    lm.model.lm_head.forward = forward
    assert hidden.shape == (3, 4, 64)
    assert hidden.requires_grad
    assert shapes == [(1, 1, 64)]
    assert lm.model(ids).logits.shape == (3, 4, len(lm.tokenizer))


def test_the_head_of_a_peft_model() -> None:
    lm = text_model("llama")
    plain = lm.head().weight
    lm.model = get_peft_model(lm.model, LoraConfig(r=2, target_modules=r".*\.q_proj"))
    assert lm.head().weight is plain


def test_the_trained_copy_of_the_head_is_used_and_the_original_while_adapters_are_off() -> None:
    lm = text_model("llama")
    plain = lm.head().weight
    lm.model = get_peft_model(lm.model, LoraConfig(r=2, target_modules=r".*\.q_proj", modules_to_save=["lm_head"]))
    trained = lm.head().weight
    assert trained is not plain
    assert trained.requires_grad
    with torch.no_grad():
        trained += 1.0
    with lm.model.disable_adapter():
        assert lm.head().weight is plain


def lora_on_the_head(family: str, **options: Any) -> CaptionModel:
    """A model with LoRA of rank 2 on its head whose B is not 0."""
    lm = text_model(family)
    lm.model = get_peft_model(lm.model, LoraConfig(r=2, lora_alpha=6, target_modules=["lm_head"], **options))
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return lm


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_lora_on_the_head_is_a_part_of_it(family: str, options: dict[str, Any]) -> None:
    lm = lora_on_the_head(family, **options)
    lm.model.eval()
    ids = torch.arange(8).view(2, 4)
    plain = lm.base.get_output_embeddings().get_base_layer()
    with torch.no_grad():
        own = lm.model(ids).logits
        torch.testing.assert_close(logits_from_head(lm, ids), own, rtol=1e-5, atol=1e-5)
        with lm.model.disable_adapter():
            off = lm.model(ids).logits
            assert lm.head().weight is plain.weight
            torch.testing.assert_close(logits_from_head(lm, ids), off, rtol=1e-5, atol=1e-5)
        assert (own - off).abs().max() > 1e-2
        if family == "llama" and "lora_bias" not in options:  # the others are tied, or have no bias to merge into
            lm.model.merge_adapter()
            torch.testing.assert_close(logits_from_head(lm, ids), own, rtol=1e-4, atol=1e-4)


def test_several_adapters_on_the_head_add_up() -> None:
    lm = lora_on_the_head("llama")
    lm.model.add_adapter("second", LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False))
    lm.model.base_model.set_adapter(["default", "second"])
    ids = torch.arange(8).view(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(logits_from_head(lm, ids), lm.model(ids).logits, rtol=1e-5, atol=1e-5)
    hidden = torch.randn(3, 64)
    assert [tuple(t.shape) for t in lm.head().low_rank(hidden)] == [(3, 5), (len(lm.tokenizer), 5)]  # type: ignore[union-attr]


def test_dropout_of_lora_on_the_head_acts_in_training_alone() -> None:
    lm = lora_on_the_head("llama", lora_dropout=0.5)
    hidden = torch.randn(4, 64)

    def draw() -> Tensor:
        found = lm.head().low_rank(hidden)
        assert found is not None
        return found[0]

    lm.model.train()
    assert not torch.equal(draw(), draw())
    lm.model.eval()
    assert torch.equal(draw(), draw())


def test_dora_on_the_head_is_refused() -> None:
    lm = text_model("llama")
    lm.model = get_peft_model(lm.model, LoraConfig(r=2, target_modules=["lm_head"], use_dora=True))
    with pytest.raises(ValueError, match="Dora on the output head is not supported by the fused loss, plain LoRA is"):
        lm.head()
