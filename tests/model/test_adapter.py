"""The adapter against Hugging Face's own forward passes: prompts, padding, vision, positions; what cannot be loaded."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from devices import DEVICE
from synpo.config import ConfigError, ModelConfig
from synpo.model import adapter
from synpo.model.adapter import CaptionModel, check_paths, load, pad_rows
from synpo.model.tiny import byte_tokenizer, tiny_text_model
from synpo.model.vision import Processor
from synpo.train.plan import skeleton

TEXTS = ["A small red circle moves.", "It stops."]


@pytest.fixture(scope="module")
def captioner(tiny_captioner_path: Any) -> CaptionModel:
    return load(ModelConfig(path=str(tiny_captioner_path), device=DEVICE))


def clip(frames: int, height: int = 48, width: int = 48, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)


def rows_of(lm: CaptionModel, clips: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Any]]:
    prompts = [lm.prompt("Describe the video.", c) for c in clips]
    rows = [torch.cat([p.input_ids, lm.completion(t)]) for p, t in zip(prompts, TEXTS * 2)]
    return rows, [p.vision for p in prompts]


def logits_of(lm: CaptionModel, rows: list[Tensor], visions: list[Any], side: Any = "right") -> list[Tensor]:
    ids, mask = (x.to(DEVICE) for x in pad_rows(rows, lm.pad_token_id, side))
    with torch.no_grad():
        logits = lm.model(**lm.forward_kwargs(ids, mask, visions)).logits
    return [row[m.bool()] for row, m in zip(logits, mask)]


def test_captioner_gives_the_logits_of_hugging_faces_own_path(captioner: CaptionModel) -> None:
    rows, visions = rows_of(captioner, [clip(3), None])
    logits = logits_of(captioner, rows, visions)
    with torch.no_grad():
        seen = {"pixel_values_videos": visions[0]["pixels"][None].to(DEVICE)}
        with_video = captioner.model(input_ids=rows[0][None].to(DEVICE), **seen).logits
        without = captioner.model(input_ids=rows[1][None].to(DEVICE)).logits
    torch.testing.assert_close(logits[0], with_video[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1], without[0], rtol=1e-4, atol=1e-5)


def test_padding_side_and_neighbours_change_nothing(captioner: CaptionModel) -> None:
    rows, visions = rows_of(captioner, [clip(2), None, clip(5, seed=1), clip(2, 30, 70, seed=2)])
    alone = [logits_of(captioner, [r], [v])[0] for r, v in zip(rows, visions)]
    for side in ("left", "right"):
        for together, expected in zip(logits_of(captioner, rows, visions, side), alone):
            torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)


def test_the_tower_runs_once_for_rows_that_share_a_video(captioner: CaptionModel) -> None:
    calls = []
    hook = captioner.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    rows, visions = rows_of(captioner, [clip(3), clip(3, seed=1)])
    shared = captioner.encode_vision(visions)
    together = logits_of(captioner, [*rows, *rows], [*shared, *shared])
    hook.remove()
    assert len(calls) == 1
    assert shared[0]["features"].shape == (3 * 4 + 1, 64)
    for logits, expected in zip(together, logits_of(captioner, rows, visions) * 2):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_that_lost_visual_tokens_is_refused(captioner: CaptionModel) -> None:
    prompt = captioner.prompt("Describe the video.", clip(3))
    ids, mask = (x.to(DEVICE) for x in pad_rows([prompt.input_ids[4:]], 0))
    with pytest.raises(ValueError, match="video placeholders in the batch but 13 visual features"):
        captioner.forward_kwargs(ids, mask, [prompt.vision])


def test_a_placeholder_in_the_users_text_is_refused(captioner: CaptionModel) -> None:
    with pytest.raises(ValueError, match="found 2 <video> in the prompt"):
        captioner.prompt("Describe the <video>.", clip(2))


def test_a_text_model_refuses_frames() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="takes no video"):
        CaptionModel(tiny_text_model(tokenizer), tokenizer, None).prompt("Describe.", clip(1))


def test_an_answer_ends_with_the_end_of_a_turn_and_is_never_empty() -> None:
    tokenizer = byte_tokenizer()
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[0, tokenizer.eos_token_id]))
    lm = CaptionModel(model, tokenizer, None)
    assert lm.eos_token_ids == (tokenizer.eos_token_id, 0)
    assert lm.completion("Yes")[-1] == tokenizer.eos_token_id
    for given, expected in ((torch.tensor([0, 3]), (0, 3)), (torch.tensor(3), (3,)), (3, (3,)), ([], ()), (None, ())):
        model.generation_config.eos_token_id = given
        assert CaptionModel(model, tokenizer, None).eos_token_ids == (tokenizer.eos_token_id, *expected)
    with pytest.raises(ValueError, match="has no token"):
        lm.completion("  ")


class QwenProcessor:
    """Stands in for Qwen-VL's processor, whose video part needs torchvision: same keys and shapes."""

    model_input_names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values_videos", "video_grid_thw")

    def __init__(self, tokenizer: Any, numbers: int) -> None:
        self.tokenizer, self.numbers = tokenizer, numbers

    def __call__(self, text: list[str], videos: list[list[Tensor]], **kwargs: Any) -> dict[str, Any]:
        self.told = kwargs.pop("video_metadata", None)
        assert kwargs == {"return_tensors": "pt", "do_sample_frames": False, "add_special_tokens": False}
        ((frames,),) = videos
        grid = torch.tensor([[len(frames) // 2, 4, 4]])
        expanded = text[0].replace("<video>", "<video>" * (int(grid.prod()) // 4))
        encoded = self.tokenizer(expanded, add_special_tokens=False, return_tensors="pt")
        patches = int(grid.prod())
        pixels = frames.float().flatten().repeat(2)[: patches * self.numbers].view(patches, self.numbers) / 255
        types = (encoded.input_ids == self.tokenizer.get_vocab()["<video>"]).int() * 2
        return {**encoded, "pixel_values_videos": pixels, "video_grid_thw": grid, "mm_token_type_ids": types}


def qwen_vl(kind: str) -> CaptionModel:
    tokenizer = byte_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    places = {"video_token_id": tokenizer.get_vocab()["<video>"], "image_token_id": tokenizer.get_vocab()["<image>"]}
    torch.manual_seed(0)
    model: Any
    if kind == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **places))
    else:
        vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "patch_size": 4}
        vision |= {"intermediate_size": 64, "window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **places))
    return CaptionModel(model.to(DEVICE).eval(), tokenizer, Processor(model, QwenProcessor(tokenizer, 3 * 2 * 4 * 4)))


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_qwen_vl_gets_its_three_dimensional_positions(kind: str) -> None:
    lm = qwen_vl(kind)
    rows, visions = rows_of(lm, [clip(4), None, clip(2, seed=1)])
    ids, mask = (x.to(DEVICE) for x in pad_rows(rows, lm.pad_token_id, "left"))
    inputs = lm.forward_kwargs(ids, mask, visions)
    assert inputs["position_ids"].shape == (3, *ids.shape)
    assert inputs["mm_token_type_ids"].unique().tolist() == [0, 2]
    assert not torch.equal(inputs["position_ids"][0], inputs["position_ids"][1])
    for side in ("left", "right"):
        for i, logits in enumerate(logits_of(lm, rows, visions, side)):
            ids = rows[i][None].to(DEVICE)
            seen = {k: v.to(DEVICE) for k, v in (lm.vision._types(ids) | visions[i]).items()}  # type: ignore[union-attr]
            with torch.no_grad():
                own = lm.model(input_ids=ids, **seen).logits[0]
            torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_the_check_of_the_head_reads_words_alone(kind: str) -> None:
    lm = qwen_vl(kind)
    assert lm.placeholder_ids & set(range(8)), "the first tokens of this tokenizer stand for images and videos"
    lm.head()


def test_processors_are_told_when_frames_were_taken() -> None:
    lm = qwen_vl("qwen2_5_vl")
    lm.prompt("Describe.", clip(4), seconds=10.0)
    told = lm.vision.processor.told  # type: ignore[union-attr]
    assert told == [
        [{"total_num_frames": 10000, "fps": 1000.0, "duration": 10.0, "frames_indices": [1250, 3750, 6250, 8750]}]
    ]
    lm.prompt("Describe.", clip(4))
    assert lm.vision.processor.told is None, "the model's own assumption"  # type: ignore[union-attr]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(tiny_captioner_path: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.device: {device} is not there, .* sees 0 CUDA devices"):
        load(ModelConfig(path=str(tiny_captioner_path), device=device))


@pytest.mark.parametrize("where", ["processor", "configuration", "file"])
def test_the_template_of_the_processor_comes_before_the_tokenizers(
    where: str, tiny_captioner_path: Path, tmp_path: Path
) -> None:
    """That of a tokenizer is often its language model's, which knows no video; the configuration comes before both."""
    folder = Path(shutil.copytree(tiny_captioner_path, tmp_path / "model"))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    )
    config = ModelConfig(path=str(folder), device="cpu")
    if where == "processor":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    elif where == "configuration":
        config = replace(config, chat_template=template)
    else:
        (tmp_path / "mine.jinja").write_text(template)
        config = replace(config, chat_template=str(tmp_path / "mine.jinja"))
    for lm in (load(config), skeleton(config)):
        ids = lm.prompt("Describe.", clip(2)).input_ids
        assert lm.tokenizer.decode(ids) == f"<|user|>{'<video>' * 9}Describe.<|end|><|assistant|>"
    with pytest.raises(ConfigError, match=r"model.chat_template: nowhere.jinja is neither a file nor a Jinja template"):
        load(replace(config, chat_template="nowhere.jinja"))


def test_a_folder_that_is_no_adapter(tiny_captioner_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no adapter_config\.json; --adapter takes"):
        load(ModelConfig(path=str(tiny_captioner_path), adapter=str(tmp_path), device="cpu"))


def test_a_folder_that_is_no_model_says_what_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("adapter", "elsewhere"):
        (run / name).mkdir(parents=True)
    base = {"base_model_name_or_path": "org/base"}
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(base))
    (run / "elsewhere" / "adapter_config.json").write_text("{}")
    (run / "config.json").write_text("{}")  # of the run
    (run / "train_log.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    for path, said in (
        (run / "adapter", f"is an adapter: write --model org/base --adapter {run / 'adapter'}"),
        (run / "elsewhere", "is an adapter: write --model THE_MODEL_IT_WAS_TRAINED_ON --adapter"),
        (run, f"what was trained lies in it: write --adapter {run / 'adapter'}"),
        (tmp_path, "holds no model; --model takes a checkpoint folder"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            check_paths(ModelConfig(path=str(path)))
    (run / "model").mkdir()
    with pytest.raises(ConfigError, match=re.escape(f"write --model {run / 'model'}")):
        check_paths(ModelConfig(path=str(run)))
    check_paths(ModelConfig(path="org/base"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flash_attention_serves_halves_on_a_gpu(
    dtype: str, tiny_captioner_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` takes flash-attn where it is installed, but for float32 weights, which it refuses in the middle of a run."""
    chosen: list[str] = []
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    lm = load(ModelConfig(path=str(tiny_captioner_path), dtype=dtype, device="cpu"))
    monkeypatch.setattr(lm.model, "set_attn_implementation", chosen.append)
    adapter._choose_attention(lm.model, "auto", torch.device("cpu"))
    assert not chosen
    adapter._choose_attention(lm.model, "auto", torch.device("cuda"))
    assert chosen == (["flash_attention_2"] if dtype == "bfloat16" else [])
    if dtype == "float32":
        with pytest.raises(
            ConfigError, match="flash_attention_2 computes in float16 and bfloat16, the weights are float32"
        ):
            adapter._choose_attention(lm.model, "flash_attention_2", torch.device("cuda"))


def test_a_missing_flash_attention_is_named(tiny_captioner_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded: FlashAttention2"):
        load(ModelConfig(path=str(tiny_captioner_path), attention="flash_attention_2", device="cpu"))
