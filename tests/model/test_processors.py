"""Video models through their own Hugging Face processors, which need torchvision: pixels, placeholders, and what time it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from devices import DEVICE
from synpo.config import ContrastConfig, ModelConfig, SamplingConfig
from synpo.model.adapter import CaptionModel, load
from synpo.model.tiny import byte_tokenizer
from synpo.pipeline.caption import describe
from synpo.pipeline.decode import generate
from synpo.pipeline.retrospect import retrospective_prompt, second_looks
from synpo.train.sharing import why_not
from synpo.video import amateur_frames

pytest.importorskip(
    "torchvision", reason="torchvision is not installed (install it together with torch, from one index)"
)
pytest.importorskip(
    "num2words", reason="num2words, which SmolVLM's processor needs, is not installed (pip install num2words)"
)

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl")
QUESTION = "Describe the video."
HALF = [0.5, 0.5, 0.5]
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}VIDEO{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = {
    "qwen": ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    "smolvlm": ("<fake_token_around_image>", "<global-img>"),
    "internvl": ("<img>", "</img>", "<IMG_CONTEXT>"),
}
NAMED = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}  # fmt: skip


def tokenizer_for(kind: str) -> Any:
    base = byte_tokenizer()
    base.add_tokens(["<|im_start|>", "<|im_end|>", *TOKENS[kind]], special_tokens=True)
    video = "<|vision_start|><|video_pad|><|vision_end|>" if kind == "qwen" else "<video>"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token=base.pad_token,
        chat_template=TURNS.replace("VIDEO", video),
        extra_special_tokens=NAMED if kind == "internvl" else {},
    )


def qwen(family: str, tokenizer: Any, text: dict[str, Any]) -> tuple[Any, Any]:
    places = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
                            ("vision_end", "vision_end"))
    }  # fmt: skip
    tower = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "patch_size": 4}
    turning: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    t = transformers
    if family == "qwen2_vl":
        tower |= {"embed_dim": 32, "hidden_size": 64}
        del tower["out_hidden_size"]
        kinds: tuple[Any, ...] = (t.Qwen2VLForConditionalGeneration, t.Qwen2VLConfig, t.Qwen2VLProcessor)
    elif family == "qwen2_5_vl":
        tower |= {"intermediate_size": 64, "window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
        kinds = (t.Qwen2_5_VLForConditionalGeneration, t.Qwen2_5_VLConfig, t.Qwen2_5_VLProcessor)
    else:
        tower |= {"intermediate_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
        text, turning = {**text, "head_dim": 16}, {**turning, "mrope_interleaved": True}
        kinds = (t.Qwen3VLForConditionalGeneration, t.Qwen3VLConfig, t.Qwen3VLProcessor)
    model = kinds[0](kinds[1](text_config={**text, "rope_parameters": turning}, vision_config=tower, **places))
    pixels = {
        "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "image_mean": HALF, "image_std": HALF,
        "size": {"shortest_edge": 256, "longest_edge": 2048},
    }  # fmt: skip
    reader = t.Qwen3VLVideoProcessor if family == "qwen3_vl" else t.Qwen2VLVideoProcessor
    parts = {"image_processor": t.Qwen2VLImageProcessor(**pixels), "video_processor": reader(**pixels)}
    return model, kinds[2](tokenizer=tokenizer, chat_template=tokenizer.chat_template, **parts)


def others(family: str, tokenizer: Any, text: dict[str, Any]) -> tuple[Any, Any]:
    tower = {
        "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 16, "intermediate_size": 64,
        "patch_size": 4,
    }  # fmt: skip
    t, normal = transformers, {"image_mean": HALF, "image_std": HALF}
    shared = {"tokenizer": tokenizer, "chat_template": tokenizer.chat_template}
    if family == "smolvlm":
        config: Any = t.SmolVLMConfig(
            text_config={"model_type": "llama", **text}, vision_config=tower, scale_factor=2,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        size = {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 16}}
        image, video = t.SmolVLMImageProcessor(**size, **normal), t.SmolVLMVideoProcessor(**size, **normal)
        processor = t.SmolVLMProcessor(image_processor=image, video_processor=video, image_seq_len=4, **shared)
        return t.SmolVLMForConditionalGeneration(config), processor
    config = t.InternVLConfig(
        text_config={"model_type": "qwen2", **text}, vision_config=tower,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )  # fmt: skip
    square: dict[str, Any] = {"size": {"height": 16, "width": 16}}
    image, video = t.GotOcr2ImageProcessor(**square, **normal), t.InternVLVideoProcessor(**square, **normal)
    processor = t.InternVLProcessor(image_processor=image, video_processor=video, image_seq_length=4, **shared)
    return t.InternVLForConditionalGeneration(config), processor


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of a family, its processor beside it, as on the hub."""
    family = request.param
    tokenizer = tokenizer_for("qwen" if "qwen" in family else family)
    text = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "vocab_size": len(tokenizer), "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    model, processor = (qwen if "qwen" in family else others)(family, tokenizer, text)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "vis" not in name:  # the usual 0.02 is for wider models: all answers would look alike
            torch.nn.init.normal_(weight, std=0.1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    folder: Path = tmp_path_factory.mktemp("models") / family
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)
    return folder


def frames(count: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 48, 64), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@torch.no_grad()
def test_prompts_are_those_of_the_processor_and_tell_the_time(checkpoint: Path) -> None:
    lm, seen = load(ModelConfig(path=str(checkpoint), device=DEVICE)), frames(8, 0)
    prompt = lm.prompt(QUESTION, seen, seconds=64.0)  # a frame every 8 seconds, the first after 4
    known = {"total_num_frames": 64, "fps": 1.0, "frames_indices": list(range(4, 64, 8)), "duration": 64.0}
    turn = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
    expected = lm.vision.processor(  # type: ignore[union-attr]
        text=[lm.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)],
        videos=[[seen]], video_metadata=[[known]], return_tensors="pt", do_sample_frames=False,
    )  # fmt: skip
    assert prompt.input_ids.tolist() == expected["input_ids"][0].tolist()
    tensors = {key: value.to(DEVICE) for key, value in expected.items() if isinstance(value, Tensor)}
    ids = prompt.input_ids[None].to(DEVICE)
    ours = lm.model(**lm.forward_kwargs(ids, torch.ones_like(ids), lm.encode_vision([prompt.vision]))).logits
    torch.testing.assert_close(ours, lm.model(**tensors).logits, atol=1e-5, rtol=1e-5)

    text = lm.tokenizer.decode(prompt.input_ids)
    if checkpoint.name == "qwen2_5_vl":
        assert prompt.vision["second_per_grid_ts"].tolist() == [16.0], "two frames a step"
    if checkpoint.name == "qwen3_vl":
        assert all(f"<{t}.0 seconds>" in text for t in (8, 24, 40, 56)), "between two frames"
    if checkpoint.name == "smolvlm":
        assert "0:01:04" in text and all(f"Frame from {t}:" in text for t in ("00:04", "00:12", "01:00"))


def test_second_looks_share_the_video(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load(ModelConfig(path=str(checkpoint), device=DEVICE))
    views, seconds = [frames(8, 0), frames(6, 1)], [64.0, 12.0]
    shown = [lm.prompt(QUESTION, v, seconds=s) for v, s in zip(views, seconds)]
    drafts = ["a circle moves", "  nothing:\nnothing "]
    expected = [lm.prompt(retrospective_prompt(QUESTION, d), v, seconds=s) for d, v, s in zip(drafts, views, seconds)]
    monkeypatch.setattr(lm.vision, "prepare", None)
    looks = second_looks(lm, shown, views, QUESTION, drafts, seconds)
    assert [look.input_ids.tolist() for look in looks] == [p.input_ids.tolist() for p in expected]
    assert all(look.vision is first.vision for look, first in zip(looks, shown))


def test_what_is_shared_changes_no_answer(checkpoint: Path) -> None:
    lm = load(ModelConfig(path=str(checkpoint), device=DEVICE))
    views, seconds = [frames(8, 0), frames(12, 1)], [64.0, 12.0]
    greedy = SamplingConfig(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=8)
    rows = describe(lm, views, [["a", "b"], ["c"]], QUESTION, greedy, contrast=ContrastConfig(), seconds=seconds)

    def alone(lm: CaptionModel, text: str, view: Tensor, lasts: float) -> str:
        expert, amateur = (lm.prompt(text, v, seconds=lasts) for v in (view, amateur_frames(view)))
        (answer,) = generate(lm, [expert], greedy, keys=["x"], amateurs=[amateur], contrast=ContrastConfig())
        return answer.text

    for view, lasts, row in zip(views, seconds, rows):
        draft = alone(lm, QUESTION, view, lasts)
        text = alone(lm, retrospective_prompt(QUESTION, draft), view, lasts)
        assert all((got.draft, got.text) == (draft, text) for got in row)
    assert rows[0][0].draft != rows[1][0].draft, "answers depend on the video"


def test_pairs_are_packed_exactly(checkpoint: Path) -> None:
    assert why_not(load(ModelConfig(path=str(checkpoint), device=DEVICE))) is None
