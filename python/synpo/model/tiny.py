"""Small models of real Hugging Face classes, built from a configuration with no download: for tests, trials and the demo.

    tokenizer = word_tokenizer(texts)                       # or byte_tokenizer(texts), which knows every string
    model = tiny_captioner(tokenizer, text_width=96)        # LLaVA-OneVision: SigLIP + Qwen2; or tiny_text_model(tokenizer)
    save(model, tokenizer, folder)                          # a checkpoint folder like any other
    lm = load(ModelConfig(path=str(folder)))

A prompt reads  <|user|><video>Describe the video.<|end|><|assistant|>  and an answer ends with  <|end|>.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)

from synpo.records import write_json

PAD, END, UNKNOWN, VIDEO, IMAGE = "<pad>", "<|end|>", "<unk>", "<video>", "<image>"
SPECIAL = [PAD, END, UNKNOWN, VIDEO, IMAGE, "<|system|>", "<|user|>", "<|assistant|>"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<{{ part.type }}>{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _finish(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=SPECIAL[3:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def word_tokenizer(texts: Iterable[str], vocab_size: int = 32_768) -> PreTrainedTokenizerFast:
    """One token a word or punctuation mark of `texts`; anything else is `<unk>`. Decoding gives the text back exactly."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return _finish(tokenizer)


def byte_tokenizer(texts: Iterable[str] = (), vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`: any string is tokenized and decoded exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finish(tokenizer)


def _text_settings(tokenizer: PreTrainedTokenizerFast, width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }


def _build(kind: type[PreTrainedModel], config: Any, tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = kind(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def tiny_captioner(
    tokenizer: PreTrainedTokenizerFast,
    *,
    vision_width: int = 32,
    vision_layers: int = 2,
    vision_heads: int = 2,
    patch: int = 12,
    image_side: int = 48,
    text_width: int = 64,
    text_layers: int = 2,
    text_heads: int = 4,
    seed: int = 0,
) -> LlavaOnevisionForConditionalGeneration:
    """A random LLaVA-OneVision in fp32 with the vocabulary of the tokenizer.

    A frame becomes ⌈image_side / (2·patch)⌉² visual tokens.
    """
    vision = SiglipVisionConfig(
        hidden_size=vision_width,
        intermediate_size=3 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_heads,
        image_size=image_side,
        patch_size=patch,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**_text_settings(tokenizer, text_width, text_layers, text_heads)),
        image_token_index=tokenizer.get_vocab()[IMAGE],
        video_token_index=tokenizer.get_vocab()[VIDEO],
        image_grid_pinpoints=[[image_side, image_side]],
    )
    return _build(LlavaOnevisionForConditionalGeneration, config, tokenizer, seed)


def tiny_text_model(
    tokenizer: PreTrainedTokenizerFast,
    family: str = "llama",
    *,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    seed: int = 0,
) -> PreTrainedModel:
    """A random text model in fp32, `llama` or `qwen2`, with the vocabulary of the tokenizer."""
    families: dict[str, tuple[type[PreTrainedModel], Any]] = {
        "llama": (LlamaForCausalLM, LlamaConfig),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    }
    if family not in families:
        raise ValueError(f"expected family {' or '.join(families)}, got {family!r}")
    kind, config = families[family]
    return _build(kind, config(**_text_settings(tokenizer, width, layers, heads)), tokenizer, seed)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: str | os.PathLike[str]) -> Path:
    """Write model, tokenizer and, for a captioner, how its pixels are normalised, as a checkpoint folder; returns it."""
    folder = Path(path)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    vision: Any = getattr(model.config, "vision_config", None)
    if vision is not None:
        settings = {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": vision.image_size, "width": vision.image_size},
            "image_grid_pinpoints": [[vision.image_size, vision.image_size]],
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        write_json(folder / "preprocessor_config.json", settings)
    return folder
