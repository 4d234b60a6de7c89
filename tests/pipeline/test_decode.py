"""Decoding against its specification: two models run from scratch over everything so far, one prompt at a time."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from devices import DEVICE
from synpo.config import ContrastConfig, ModelConfig, SamplingConfig
from synpo.model.adapter import CaptionModel, Prompt, load
from synpo.model.tiny import byte_tokenizer, tiny_text_model
from synpo.model.vision import Processor
from synpo.pipeline.caption import describe
from synpo.pipeline.decode import Generation, generate, uniforms
from synpo.pipeline.reader import Reader
from synpo.pipeline.retrospect import retrospective_prompt
from synpo.pipeline.streams import Streams
from synpo.video import amateur_frames

GREEDY = SamplingConfig(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=24)
SAMPLED = SamplingConfig(temperature=0.8, top_k=16, top_p=0.9, max_new_tokens=24)
ENDS = tuple(range(60, 84))  # a random model rarely says the one true end: make one token in a dozen an end


def with_ends(lm: CaptionModel) -> CaptionModel:
    copy = CaptionModel(lm.model, lm.tokenizer, lm.vision)
    copy.eos_token_ids = ENDS
    return copy


def frames(count: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 48, 48), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@torch.no_grad()
def last_logits(lm: CaptionModel, prompt: Prompt, written: list[int]) -> Tensor:
    """Logits (V,) after the prompt and what is written, with no cache and no padding."""
    ids = torch.cat([prompt.input_ids, torch.tensor(written, dtype=torch.long)])[None].to(lm.device)
    return lm.model(**lm.forward_kwargs(ids, torch.ones_like(ids), [prompt.vision])).logits[0, -1].float()


def naive_greedy(
    lm: CaptionModel, prompt: Prompt, amateur: Prompt | None, contrast: ContrastConfig | None, limit: int
) -> tuple[list[int], float]:
    """What two-stream decoding should say, and the smallest gap between the two best tokens on the way."""
    written: list[int] = []
    gap = float("inf")
    while len(written) < limit:
        logits = last_logits(lm, prompt, written)
        if amateur is not None and contrast is not None:
            mixed = (1 + contrast.alpha) * logits - contrast.alpha * last_logits(lm, amateur, written)
            if contrast.plausibility > 0:
                floor = logits.max() + torch.tensor(contrast.plausibility).log()
                mixed = mixed.masked_fill(logits < floor, -torch.inf)
            logits = mixed
        best = logits.topk(2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        token = int(best.indices[0])
        if token in lm.eos_token_ids:
            break
        written.append(token)
    return written, gap


def video_prompts(lm: CaptionModel) -> tuple[list[Prompt], list[Prompt]]:
    """Unequal texts over unequal numbers of frames, and their amateurs."""
    texts = ["Describe the video.", "What moves? Say it in one short sentence.", "Colours?", "Describe the video."]
    views = [frames(n, seed=n) for n in (8, 16, 5, 11)]
    return (
        [lm.prompt(t, v) for t, v in zip(texts, views)],
        [lm.prompt(t, v[::3]) for t, v in zip(texts, views)],
    )


def assert_naive(lm: CaptionModel, prompts: list[Prompt], amateurs: list[Prompt] | None, contrast: Any) -> None:
    answers = generate(
        lm, prompts, GREEDY, keys=[str(i) for i in range(len(prompts))], amateurs=amateurs, contrast=contrast
    )
    for i, answer in enumerate(answers):
        weak = amateurs[i] if amateurs is not None else None
        expected, gap = naive_greedy(lm, prompts[i], weak, contrast, GREEDY.max_new_tokens)
        assert gap > 1e-5, "a tie on the way: the test says nothing, change its seed"
        assert list(answer.tokens) == expected
        assert answer.finished == (len(expected) < GREEDY.max_new_tokens)
        assert answer.text == lm.text(expected)


@pytest.mark.parametrize("contrast", [None, ContrastConfig(), ContrastConfig(alpha=1.0, plausibility=0.3)])
def test_greedy_video_answers_are_those_of_two_plain_models(captioner: CaptionModel, contrast: Any) -> None:
    lm = with_ends(captioner)
    prompts, amateurs = video_prompts(lm)
    assert_naive(lm, prompts, amateurs if contrast else None, contrast)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_greedy_text_answers_are_those_of_two_plain_models(family: str) -> None:
    tokenizer = byte_tokenizer(["a small red circle"])
    if family == "mistral":  # attention within a window of twelve tokens, shorter than every prompt
        settings = MistralConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=12,
        )  # fmt: skip
        torch.manual_seed(3)
        model: Any = MistralForCausalLM(settings).eval()
    else:
        model = tiny_text_model(tokenizer, family)
    lm = with_ends(CaptionModel(model.to(DEVICE), tokenizer, None))
    prompts = [lm.prompt(t) for t in ("Tell me a story about a red circle.", "Hello there, you", "What is a long day?")]
    amateurs = [lm.prompt(t) for t in ("A story, then?", "Hello there, you and everyone else here", "What is a day?")]
    assert_naive(lm, prompts, amateurs, ContrastConfig())
    assert_naive(lm, [prompts[0], prompts[0], prompts[1]], None, None)


class VideoGrid:
    """Stands in for the Hugging Face processor of Qwen2-VL, which needs torchvision: flat patches and their grid."""

    model_input_names = ("input_ids", "pixel_values_videos", "video_grid_thw", "mm_token_type_ids")

    def __init__(self, tokenizer: Any, config: Qwen2VLConfig) -> None:
        self.tokenizer, self.vision = tokenizer, config.vision_config

    def __call__(self, text: list[str], videos: list[list[Tensor]], **_: Any) -> dict[str, Tensor]:
        times = len(videos[0][0]) // 2
        patch = self.vision.in_channels * self.vision.temporal_patch_size * self.vision.patch_size**2
        pixels = torch.randn(times * 16, patch, generator=torch.Generator().manual_seed(len(videos[0][0])))
        placed = text[0].replace("<video>", "<video>" * (times * 4))
        ids = self.tokenizer(placed, add_special_tokens=False, return_tensors="pt").input_ids
        return {"input_ids": ids, "pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[times, 4, 4]])}


def qwen2_vl() -> CaptionModel:
    """A random Qwen2-VL, whose positions have three dimensions."""
    tokenizer = byte_tokenizer(["a small red circle"])
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|user|>"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    return with_ends(CaptionModel(model.to(DEVICE), tokenizer, Processor(model, VideoGrid(tokenizer, config))))


def test_positions_in_three_dimensions() -> None:
    lm = qwen2_vl()
    texts = ["Describe it.", "What moves, and where does it go?"]
    prompts = [lm.prompt(t, frames(n, 0)) for t, n in zip(texts, (8, 4))]
    amateurs = [lm.prompt(t, frames(2, 0)) for t in texts]
    assert Reader(lm).read(prompts)[0].position.shape == (3, 2, 1)
    assert_naive(lm, prompts, amateurs, ContrastConfig())
    other = replace(lm.prompt("And now?", frames(8, 0)), vision=prompts[0].vision)
    assert_naive(lm, [prompts[0], other, prompts[1]], None, None)
    longer = lm.prompt("Describe it.", frames(80, 0))  # forty steps of time, far more than its width
    asked = [longer, replace(lm.prompt("Or?", frames(80, 0)), vision=longer.vision)]
    for rows in (asked, asked[:1]):
        for row, prompt in enumerate(rows):
            ids = torch.cat([prompt.input_ids, torch.tensor([lm.pad_token_id])])[None].to(DEVICE)
            expected = lm.positions(ids, torch.ones_like(ids), [prompt.vision])
            assert torch.equal(Reader(lm).read(rows)[0].position[:, row], expected[:, 0, -1:]), (
                "where a next token stands"
            )


def test_prompts_about_one_video_share_its_reading(captioner: CaptionModel) -> None:
    lm = with_ends(captioner)
    prompts, amateurs = video_prompts(lm)
    follow_ups = [replace(lm.prompt(f"Describe the video. {t}", frames(8, seed=8)), vision=prompts[0].vision)
                  for t in ("Again.", "Once more, with all that happens.")]  # fmt: skip
    rows = [prompts[0], prompts[1], *follow_ups, prompts[0]]
    seen: list[torch.Size] = []
    hook = lm.model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, inputs: seen.append(inputs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    Reader(lm).read(rows)
    hook.remove()
    assert seen[0][0] == 2, "two videos, two rows in the first pass"
    three = [prompts[0], *follow_ups]
    rest = sum(len(p.input_ids) - min(alike(*three), len(prompts[0].input_ids) - 1) for p in three) + 1
    assert seen[1] == (1, rest), "then what differs of four different prompts, one after the other, without padding"
    weak = [amateurs[0], amateurs[1], amateurs[0], amateurs[0], amateurs[0]]
    assert_naive(lm, rows, weak, ContrastConfig())


def forwards(lm: CaptionModel, run: Any) -> tuple[Any, list[tuple[int, int]], int]:
    """What `run()` gives, rows and columns of every pass through the language model, and how often the vision tower ran."""
    sizes: list[tuple[int, int]] = []
    seen: list[int] = []
    core = lm.model.model
    hooks = [
        core.language_model.register_forward_pre_hook(
            lambda _m, _a, inputs: sizes.append(tuple(inputs["inputs_embeds"].shape[:2])), with_kwargs=True
        ),
        (core.visual if hasattr(core, "visual") else core.vision_tower).register_forward_pre_hook(
            lambda *_: seen.append(1)
        ),
    ]
    result = run()
    for hook in hooks:
        hook.remove()
    return result, sizes, len(seen)


def alike(*prompts: Prompt) -> int:
    """How many leading tokens prompts have in common."""
    return len(os.path.commonprefix([p.input_ids.tolist() for p in prompts]))


def tokens_known(streams: Streams, row: int) -> int:
    """How many tokens a row attends to, with those there is room for."""
    own = int(streams.mask[row].sum())
    return own if streams.shared is None else own + int(streams.shared.mask[streams.shared.group[row]].sum())


@pytest.mark.parametrize("family", ["onevision", "qwen2_vl"])
def test_a_later_question_about_a_video_reads_only_what_is_new(family: str, captioner: CaptionModel) -> None:
    lm = with_ends(captioner) if family == "onevision" else qwen2_vl()
    views = [frames(n, seed=n) for n in (8, 16)]
    firsts = [lm.prompt("Describe the video.", v) for v in views]
    later = [
        replace(lm.prompt(f"Describe the video. {text}", views[i]), vision=firsts[i].vision)
        for i, text in ((0, "Again."), (1, "Once more, with all that happens."), (0, "What moves?"))
    ]
    reader = Reader(lm, remember=True)
    reader.read([firsts[0], firsts[1], firsts[1]])
    (streams, logits), sizes, towers = forwards(lm, lambda: reader.read(later, room=5))
    assert towers == 0, "the caches know the videos"
    known = [alike(firsts[0], later[0], later[2]), alike(firsts[1], later[1]), alike(firsts[0], later[0], later[2])]
    assert min(known) > 20
    assert sizes == [(1, sum(len(p.input_ids) - n for p, n in zip(later, known)))], "one pass over the new words"
    (plain, expected), _, _ = forwards(lm, lambda: Reader(lm).read(later, room=5))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(streams.position, plain.position)
    assert [tokens_known(streams, row) for row in range(3)] == [len(p.input_ids) + 5 for p in later]
    assert [tokens_known(plain, row) for row in range(3)] == [len(p.input_ids) + 5 for p in later]

    other = lm.prompt("Describe the video.", frames(8, seed=30))
    assert forwards(lm, lambda: reader.read([other]))[1] == [(1, len(other.input_ids))], "another video is read whole"
    assert len(forwards(lm, lambda: reader.read(later))[1]) == 2, "and takes the place of the earlier ones"


@pytest.mark.parametrize("contrast", [None, ContrastConfig(plausibility=0.1)])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("family", ["onevision", "qwen2_vl"])
def test_second_looks_that_share_everything_say_the_same(
    family: str, sampling: SamplingConfig, contrast: ContrastConfig | None, captioner: CaptionModel
) -> None:
    lm = with_ends(captioner) if family == "onevision" else qwen2_vl()
    views = [frames(8, seed=1), frames(12, seed=2)]
    keys = [["a", "b"], ["c"]]
    rows, _, towers = forwards(
        lm, lambda: describe(lm, views, keys, "Describe.", sampling, contrast=contrast, refinements=2)
    )
    assert towers <= (2 if contrast is None else 4), "once for each number of frames"
    for view, names, row in zip(views, keys, rows):
        for name, got in zip(names, row):
            text, asked = "Describe.", []
            for look in range(3):
                asked = [lm.prompt(text, v) for v in (view, amateur_frames(view))]
                (answer,) = generate(
                    lm, asked[:1], sampling, keys=[name if look == 0 else f"{name} look {look}"],
                    amateurs=asked[1:] if contrast else None, contrast=contrast,
                )  # fmt: skip
                assert look > 0 or answer.text == got.draft
                text = retrospective_prompt("Describe.", answer.text)
            assert (got.text, got.finished) == (answer.text, answer.finished)


@pytest.mark.parametrize("family", ["onevision", "qwen2_vl"])
def test_candidates_hold_their_prompt_once_and_read_the_instruction_once(family: str, captioner: CaptionModel) -> None:
    lm = with_ends(captioner) if family == "onevision" else qwen2_vl()
    views, keys = [frames(8, seed=1), frames(12, seed=2)], [[f"{v} {i}" for i in range(4)] for v in range(2)]
    reader = Reader(lm, remember=True)
    firsts = [p for v in views for p in [lm.prompt("Describe.", v)] * 4]
    streams, _ = reader.read(firsts, room=7)
    assert streams.shared is not None and [x.shape[0] for x in streams.shared.keys] == [2, 2]
    assert streams.cache.get_seq_length() == 0 and streams.mask.shape == (8, 7), "no copy of the prompt in a row"
    remembered = reader._prefixes.streams.cache.layers[0].keys  # type: ignore[union-attr]
    assert streams.shared.keys[0].data_ptr() == remembered.data_ptr(), "nor beside what is remembered"

    rows, sizes, _ = forwards(lm, lambda: describe(lm, views, keys, "Describe.", SAMPLED, refinements=2))
    asked = [lm.prompt(retrospective_prompt("Describe.", draft), views[0]) for draft in ("a", "b")]
    instruction = alike(*asked) - alike(*asked, firsts[0])
    assert instruction > 20 and sizes[0][0] == 2, "both prompts"
    both = [size for size in sizes if size[0] == 1 and size[1] >= 2 * instruction - 4]
    assert len(both) == 1, "then both instructions in a row; not again for the next look, nor with a draft"
    for view, names, row in zip(views, keys, rows):
        for name, got in zip(names, row):
            question, text = lm.prompt("Describe.", view), ""
            for look in range(3):
                (answer,) = generate(lm, [question], SAMPLED, keys=[name if look == 0 else f"{name} look {look}"])
                text = answer.text
                question = lm.prompt(retrospective_prompt("Describe.", text), view)
            assert got.text == text


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("contrast", [None, ContrastConfig()])
def test_a_draft_changes_the_time_and_not_the_answer(
    captioner: CaptionModel, sampling: SamplingConfig, contrast: ContrastConfig | None
) -> None:
    lm = with_ends(captioner)
    prompts, amateurs = video_prompts(lm)
    weak = amateurs if contrast else None
    keys = list("abcd")

    def answer(drafts: Any, **options: Any) -> tuple[list[Generation], int]:
        run = lambda: generate(  # noqa: E731
            lm, prompts, sampling, keys=keys, amateurs=weak, contrast=contrast, drafts=drafts, **options
        )
        answers, sizes, _ = forwards(lm, run)
        return answers, len(sizes)

    plain, passes = answer(None)
    right = [a.tokens for a in plain]
    halves = [(*t[: len(t) // 2], 5, 6, *t[len(t) // 2 + 1 :]) for t in right]
    for drafts in (right, halves, [(), (1,), right[0], (3,) * 50]):
        for check_every in (1, 3, 1000):
            answers, _ = answer(drafts, check_every=check_every)
            assert [(a.text, a.tokens, a.finished) for a in answers] == [(a.text, a.tokens, a.finished) for a in plain]
            assert [a.logp for a in answers] == pytest.approx([a.logp for a in plain], abs=1e-4)
    assert answer(right)[1] * 2 < passes, "right guesses need no pass of their own"
    assert answer(halves)[1] < passes


def by_key(lm: CaptionModel, prompts: list[Prompt], amateurs: list[Prompt], keys: list[str]) -> dict[str, Generation]:
    answers = generate(lm, prompts, SAMPLED, keys=keys, amateurs=amateurs, contrast=ContrastConfig())
    return dict(zip(keys, answers))


def test_samples_follow_their_key_and_not_their_batch(captioner: CaptionModel) -> None:
    lm = with_ends(captioner)
    prompts, amateurs = video_prompts(lm)
    keys = ["7 a", "7 b", "7 c", "7 d"]
    together = by_key(lm, prompts, amateurs, keys)
    assert together == by_key(lm, prompts, amateurs, keys)
    for i, key in enumerate(keys):
        alone = by_key(lm, prompts[i : i + 1], amateurs[i : i + 1], [key])[key]
        assert alone.tokens == together[key].tokens
        assert alone.logp == pytest.approx(together[key].logp, abs=1e-4)
    backwards = by_key(lm, prompts[::-1], amateurs[::-1], keys[::-1])
    assert {k: a.tokens for k, a in backwards.items()} == {k: a.tokens for k, a in together.items()}
    other = generate(
        lm, prompts, SAMPLED, keys=[k.replace("7", "8") for k in keys], amateurs=amateurs, contrast=ContrastConfig()
    )
    assert [a.tokens for a in other] != [together[k].tokens for k in keys]


def test_rarely_looking_for_finished_rows_changes_nothing(captioner: CaptionModel) -> None:
    lm = with_ends(captioner)
    prompts, amateurs = video_prompts(lm)
    keys = list("abcd")
    options: dict[str, Any] = {"keys": keys, "amateurs": amateurs, "contrast": ContrastConfig()}
    often = generate(lm, prompts, SAMPLED, check_every=1, **options)
    never = generate(lm, prompts, SAMPLED, check_every=1000, **options)
    assert [a.tokens for a in often] == [a.tokens for a in never]
    assert [a.logp for a in often] == pytest.approx([a.logp for a in never], abs=1e-4)
    assert any(a.finished for a in often)


def test_logp_is_the_mean_over_the_tokens_written(captioner: CaptionModel) -> None:
    lm = captioner
    prompt = lm.prompt("Describe.", frames(8, 1))
    plain = SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=12)
    (answer,) = generate(lm, [prompt], plain, keys=["x"])
    assert not answer.finished  # its tokens are all there is to average
    written: list[int] = []
    logps = []
    for token in answer.tokens:
        logps.append(float(last_logits(lm, prompt, written).log_softmax(-1)[token]))
        written.append(token)
    assert answer.logp == pytest.approx(sum(logps) / len(logps), abs=1e-4)


def test_eager_attention_says_the_same(captioner: CaptionModel, tiny_captioner_path: Path) -> None:
    eager = load(ModelConfig(path=str(tiny_captioner_path), device=DEVICE, attention="eager"))
    assert eager.base.config.get_text_config()._attn_implementation == "eager"
    prompts, amateurs = video_prompts(captioner)
    options: dict[str, Any] = {"keys": list("abcd"), "amateurs": amateurs, "contrast": ContrastConfig()}
    said = [generate(lm, prompts, SAMPLED, **options) for lm in (captioner, eager)]
    assert [a.tokens for a in said[0]] == [a.tokens for a in said[1]]


def test_repetition_penalty_is_over_the_answer(captioner: CaptionModel) -> None:
    prompt = captioner.prompt("Describe.", frames(8, 1))
    (answer,) = generate(captioner, [prompt], replace(GREEDY, repetition_penalty=1e6), keys=["a"])
    assert len(set(answer.tokens)) == len(answer.tokens) == 24, "no token twice under so high a penalty"
    first, _ = naive_greedy(captioner, prompt, None, None, 1)
    assert answer.tokens[0] == first[0], "nothing to penalise before the first token"


def test_nan_logits_are_reported(tiny_captioner_path: Path) -> None:
    lm = load(ModelConfig(path=str(tiny_captioner_path), device=DEVICE))
    with torch.no_grad():
        lm.model.lm_head.weight[5] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN logits for 2 of 2 rows"):
        generate(lm, [lm.prompt("Describe.", frames(8, i)) for i in (1, 2)], SAMPLED, keys=["a", "b"])


def test_uniforms_are_even_and_depend_on_the_key_alone() -> None:
    numbers = uniforms([str(i) for i in range(64)], 256)
    assert torch.equal(numbers[5:6], uniforms(["5"], 256))
    assert torch.equal(numbers[5:6, :10], uniforms(["5"], 10))
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers, 16, 0, 1)
    assert ((counts - 1024).abs() < 5 * 32).all()
    assert abs(float(torch.corrcoef(numbers[:2])[0, 1])) < 0.3


def test_bad_calls_are_refused(captioner: CaptionModel) -> None:
    prompt = captioner.prompt("Describe.", frames(8, 1))
    assert generate(captioner, [], GREEDY, keys=[]) == []
    with pytest.raises(ValueError, match="expected a key"):
        generate(captioner, [prompt], GREEDY, keys=[])
    with pytest.raises(ValueError, match="takes both"):
        generate(captioner, [prompt], GREEDY, keys=["a"], amateurs=[prompt])
    with pytest.raises(ValueError, match=r"context of 4096: lower frames\.maximum"):
        generate(captioner, [prompt], replace(GREEDY, max_new_tokens=4090), keys=["a"])
    captioner.model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            generate(captioner, [prompt], GREEDY, keys=["a"])
    finally:
        captioner.model.eval()


def test_a_past_that_is_not_attention_is_refused() -> None:
    tokenizer = byte_tokenizer()
    config = Qwen3NextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["linear_attention", "full_attention"],
        mlp_only_layers=[0, 1],
    )
    lm = CaptionModel(Qwen3NextForCausalLM(config).eval(), tokenizer, None)
    with pytest.raises(ValueError, match="LinearAttentionLayer"):
        Reader(lm).read([lm.prompt("Describe.")])
