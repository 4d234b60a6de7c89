"""Tiny models: tokenizers give texts back, checkpoints are read like any other."""

from pathlib import Path

import pytest
import torch

from synpo.config import ConfigError, ModelConfig
from synpo.model.adapter import load
from synpo.model.tiny import byte_tokenizer, save, tiny_captioner, tiny_text_model, word_tokenizer

TEXT = "A small red circle moves from left to right, then turns blue."


def test_word_tokenizer_takes_one_token_a_word_and_gives_the_text_back() -> None:
    tokenizer = word_tokenizer([TEXT])
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert len(ids) == len(TEXT.split()) + 2  # the comma and the full stop
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer("A purple circle", add_special_tokens=False).input_ids.count(tokenizer.unk_token_id) == 1


@pytest.mark.parametrize("text", [TEXT, "naïve  façade\n\t– 視頻 🎬", "<video> is a word here?"])
def test_byte_tokenizer_knows_every_string(text: str) -> None:
    tokenizer = byte_tokenizer([TEXT])
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_chat_template_reads_plain_and_structured_content() -> None:
    tokenizer = word_tokenizer([TEXT])
    parts = [{"type": "video"}, {"type": "text", "text": "Hi"}]
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": parts}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|system|>Be brief<|end|><|user|><video>Hi<|end|><|assistant|>"


@pytest.mark.parametrize("family", ["llama", "qwen2", "captioner"])
def test_a_saved_model_loads_with_the_same_weights_and_tokenizer(family: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer([TEXT])
    model = tiny_captioner(tokenizer) if family == "captioner" else tiny_text_model(tokenizer, family)
    lm = load(ModelConfig(path=str(save(model, tokenizer, tmp_path)), device="cpu"))
    assert lm.sees_video == (family == "captioner")
    assert lm.eos_token_ids == (tokenizer.eos_token_id,)
    assert lm.pad_token_id == tokenizer.pad_token_id
    assert lm.text(lm.completion(TEXT)) == TEXT
    for name, value in model.state_dict().items():
        assert torch.equal(lm.model.state_dict()[name], value), name
    assert lm.head().weight.shape == (len(tokenizer), 64)


def test_seed_decides_the_weights() -> None:
    tokenizer = byte_tokenizer()
    first, same, other = (tiny_text_model(tokenizer, seed=s).lm_head.weight for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="expected family llama or qwen2, got 'gpt'"):
        tiny_text_model(byte_tokenizer(), "gpt")


@pytest.mark.parametrize(
    ("path", "message"), [("", "no model"), ("./missing", "does not exist"), (".", "holds no model")]
)
def test_a_missing_model_says_so(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load(ModelConfig(path=path))
