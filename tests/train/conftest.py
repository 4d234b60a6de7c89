"""Tiny models under LoRA, encoded pairs in memory; clips with pairs, and settings to train on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from made_videos import write_video
from synpo.config import Config, LoraSection, ModelConfig, build
from synpo.data.tokenize import EncodedPair
from synpo.model.adapter import CaptionModel, load
from synpo.model.tiny import byte_tokenizer, tiny_text_model
from synpo.model.vision import Processor
from synpo.records import Pair, write_records
from synpo.train.arguments import SynPOConfig
from synpo.train.lora import apply_lora
from synpo.train.trainer import SynPOTrainer

CHOSEN = ["A red circle moves.", "It turns blue, then green.", "Two squares meet.", "A star leaves."]
REJECTED = ["Nothing.", "A green triangle stays where it is.", "It rains.", "One dog and a cat."]


@pytest.fixture
def captioner(tiny_captioner_path: Path) -> CaptionModel:
    lm = load(ModelConfig(path=str(tiny_captioner_path), device="cpu"))
    torch.manual_seed(0)
    apply_lora(lm, LoraSection(r=4, alpha=8, dropout=0.0))
    perturb(lm)
    return lm


@pytest.fixture
def text_lm() -> CaptionModel:
    tokenizer = byte_tokenizer()
    lm = CaptionModel(tiny_text_model(tokenizer), tokenizer, None)
    torch.manual_seed(0)
    apply_lora(lm, LoraSection(r=4, alpha=8, dropout=0.0))
    perturb(lm)
    return lm


def perturb(lm: CaptionModel) -> None:
    """LoRA starts as nothing (B = 0); give it values, so that the policy differs from its reference."""
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))


@pytest.fixture
def pairs_for() -> Callable[..., list[EncodedPair]]:
    """pairs_for(lm, count): pairs with unequal answers and, for a captioner, unequal clips."""

    def build(lm: CaptionModel, count: int = 4) -> list[EncodedPair]:
        generator = torch.Generator().manual_seed(0)
        pairs = []
        for i in range(count):
            frames = None
            if lm.sees_video:
                frames = torch.randint(0, 256, (1 + i % 3, 3, 48, 48), dtype=torch.uint8, generator=generator)
            prompt = lm.prompt("Describe." if i % 2 else "Describe the video in detail.", frames)
            chosen, rejected = lm.completion(CHOSEN[i % 4]), lm.completion(REJECTED[i % 4])
            pairs.append(EncodedPair(f"pair-{i}", prompt.input_ids, chosen, rejected, prompt.vision))
        return pairs

    return build


@pytest.fixture
def trainer_for(tmp_path: Path) -> Callable[..., SynPOTrainer]:
    """trainer_for(lm, pairs, **settings): a quiet CPU trainer without warm-up or checkpoints."""

    def build(lm: CaptionModel, pairs: Any, folder: str = "run", **settings: Any) -> SynPOTrainer:
        defaults: dict[str, Any] = {
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        return SynPOTrainer(lm, SynPOConfig(output_dir=str(tmp_path / folder), **defaults | settings), pairs)

    return build


VIDEO_FAMILIES = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl")
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


class HandMade:
    """Stands in for the processors of video models, which need torchvision: the same keys, shapes and placeholders.

    A frame of Qwen is 4×4 patches of 4 pixels, two frames a step of time; one of the others an image of 16×16 pixels.
    """

    def __init__(self, tokenizer: Any, family: str) -> None:
        self.tokenizer, self.family = tokenizer, family
        qwen = ("mm_token_type_ids", "pixel_values_videos", "video_grid_thw")
        self.model_input_names = ("input_ids", *(qwen if "qwen" in family else ("pixel_values",)))

    def to_dict(self) -> dict[str, Any]:
        return {"family": self.family}

    def __call__(self, text: list[str], videos: list[list[torch.Tensor]], **_: Any) -> dict[str, torch.Tensor]:
        frames = videos[0][0].float()[..., :16, :16] / 255 - 0.5
        if "qwen" in self.family:
            times = len(frames) // 2
            visual = {"pixel_values_videos": frames.reshape(times * 16, -1)[:, :96]}
            visual["video_grid_thw"] = torch.tensor([[times, 4, 4]])
            step = "<video>" * 4
            expanded = "".join(f" {t} s:{step}" for t in range(times)) if self.family == "qwen3_vl" else step * times
        elif self.family == "smolvlm":
            visual = {"pixel_values": frames[None], "pixel_attention_mask": torch.ones(1, len(frames), 16, 16).bool()}
            expanded = "<image>" * 4 * len(frames)
        else:
            visual = {"pixel_values": frames}
            expanded = "<image>" * 4 * len(frames)
        ids = self.tokenizer(text[0].replace("<video>", expanded), add_special_tokens=False, return_tensors="pt")
        return {"input_ids": ids.input_ids, **visual}


def video_model(family: str, tokenizer: Any) -> Any:
    """A random model of a family of video models, from its configuration."""
    places = {name: tokenizer.get_vocab()[f"<{name}>"] for name in ("video", "image")}
    ends = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    text = {**TEXT, **ends, "pad_token_id": tokenizer.pad_token_id}
    tokens = {f"{name}_token_id": place for name, place in places.items()}
    vit = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "image_size": 16,
        "intermediate_size": 64,
    }
    if family == "qwen2_vl":
        vision: dict[str, Any] = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4}
        config: Any = transformers.Qwen2VLConfig(
            text_config={**text, "rope_parameters": MROPE}, vision_config=vision, **tokens
        )
        return transformers.Qwen2VLForConditionalGeneration(config)
    if family == "qwen2_5_vl":
        vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "patch_size": 4}
        vision |= {"intermediate_size": 64, "window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
        config = transformers.Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": MROPE}, vision_config=vision, **tokens
        )
        return transformers.Qwen2_5_VLForConditionalGeneration(config)
    if family == "qwen3_vl":
        vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "patch_size": 4}
        vision |= {"intermediate_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
        config = transformers.Qwen3VLConfig(
            text_config={**text, "head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
            vision_config=vision,
            **tokens,
        )
        return transformers.Qwen3VLForConditionalGeneration(config)
    if family == "smolvlm":
        config = transformers.SmolVLMConfig(
            text_config={"model_type": "llama", **text},
            vision_config={**vit, "patch_size": 4},
            image_token_id=places["image"],
            scale_factor=2,
        )
        return transformers.SmolVLMForConditionalGeneration(config)
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **text},
        vision_config={**vit, "patch_size": 4},
        image_token_id=places["image"],
    )
    return transformers.InternVLForConditionalGeneration(config)


@pytest.fixture
def family_lm(request: pytest.FixtureRequest) -> Callable[[str], CaptionModel]:
    """family_lm(name): a tiny model of a family, every parameter of its language model trained, its vision frozen."""

    def build(family: str) -> CaptionModel:
        tokenizer = byte_tokenizer()
        vision: Any = None
        torch.manual_seed(0)
        if family == "llava_onevision":
            lm = load(ModelConfig(path=str(request.getfixturevalue("tiny_captioner_path")), device="cpu"))
            model, tokenizer, vision = lm.model, lm.tokenizer, lm.vision
        elif family in VIDEO_FAMILIES:
            model = video_model(family, tokenizer)
            vision = Processor(model, HandMade(tokenizer, family))
        elif family == "qwen3":
            config = {**TEXT, "vocab_size": len(tokenizer), "head_dim": 16, "eos_token_id": tokenizer.eos_token_id}
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config))
        else:
            model = tiny_text_model(tokenizer, family)
        decoder = {id(p) for p in [*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()]}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in decoder)
        return CaptionModel(model.eval(), tokenizer, vision)

    return build


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """videos/ with four clips and a corrupt one, and pairs.jsonl: eight usable pairs and three that are not."""
    root = tmp_path_factory.mktemp("data")
    (root / "videos").mkdir()
    for k in range(4):
        write_video(root / "videos" / f"{k}.mp4", shade=50 * k)
    (root / "videos" / "bad.mp4").write_bytes(b"no video")
    pairs = [Pair(f"p{i}", f"{i % 4}.mp4", "Describe.", f"A bar falls {i}.", f"It rains {i} times.") for i in range(8)]
    bad = [
        Pair("corrupt", "bad.mp4", "Describe.", "a", "b"),
        Pair("empty", "0.mp4", "Describe.", "", "b"),
        Pair("long", "0.mp4", "Describe.", "word " * 50, "b"),
    ]
    write_records(root / "pairs.jsonl", [*pairs, *bad])
    return root


@pytest.fixture
def config(tiny_captioner_path: Path) -> Config:
    values = {
        "model": {"path": str(tiny_captioner_path), "device": "cpu"},
        "frames": {"fps": 1, "minimum": 2, "maximum": 2},
        "lora": {"r": 4, "alpha": 8},
        "train": {
            "learning_rate": "1e-2",  # as YAML reads 1e-2
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_completion_length": 60,
            "disable_tqdm": True,
        },
    }
    return build(Config, values)
