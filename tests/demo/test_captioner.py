"""The demo's captioner: what it is taught is true, it is a checkpoint like any other, and a killed run goes on."""

from pathlib import Path

import numpy as np
import pytest
import torch

from synpo.config import ModelConfig
from synpo.demo import captioner as schooling
from synpo.demo.captioner import (
    CaptionerConfig,
    Lesson,
    View,
    batches_of,
    build_captioner,
    cells_of,
    decode_views,
    draw_lesson,
    look,
    train_captioner,
)
from synpo.demo.language import distort, parse, references
from synpo.demo.render import render_all
from synpo.demo.world import COLOURS, MOTIONS, SHAPES, SIZES, Body, Scene, facts_of, make_split
from synpo.model.adapter import CaptionModel, load
from synpo.video import FrameSampling, VideoError

PROMPT = "Describe the video in detail."
SMALL = CaptionerConfig(
    vision_width=16, vision_layers=1, text_width=16, text_layers=1, sight_steps=3, speech_steps=3, speech_batch=4
)
SCENES = make_split(seed=2, split="train", count=3)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    render_all(SCENES, folder, processes=1)
    return folder


@pytest.fixture(scope="module")
def lm() -> CaptionModel:
    return build_captioner(PROMPT, SMALL, 0, torch.device("cpu"))


def test_views_are_the_video_and_its_clips_and_are_decoded_once(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = decode_views(SCENES, videos, 48, FrameSampling())
    for scene, row in zip(SCENES, rows):
        assert [v.facts for v in row] == [facts_of(scene), *(facts_of(scene, *s) for s in _halves(scene))]
        assert all(v.frames.shape == (8, 3, 48, 48) and v.frames.dtype == torch.uint8 for v in row)
        assert row[0].times[0] < row[0].times[-1] < scene.duration and row[2].times[0] > scene.duration / 2
    monkeypatch.setattr(schooling, "read_frames", None)
    again = decode_views(SCENES, videos, 48, FrameSampling())
    assert all(torch.equal(a.frames, b.frames) for x, y in zip(rows, again) for a, b in zip(x, y))


def test_a_missing_video_is_named(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=SCENES[0].id):
        decode_views(SCENES, tmp_path, 48, FrameSampling())


def test_cells_hold_the_front_body() -> None:
    behind = Body("square", "large", "red", "still", 0.2, (0.25, 0.25), (0.25, 0.25))
    front = Body("circle", "small", "blue", "left to right", 0.1, (0.25, 0.25), (0.75, 0.25))
    scene = Scene("x", 0, 4.0, (behind, front))
    cells = cells_of(View(scene, (0.0, 4.0), torch.zeros(2, 3, 48, 48), facts_of(scene)), 2)
    circle = [SHAPES.index("circle"), COLOURS.index("blue"), SIZES.index("small"), MOTIONS.index("left to right")]
    square = [SHAPES.index("square"), COLOURS.index("red"), SIZES.index("large"), MOTIONS.index("still")]
    nothing = [-100] * 4
    assert cells.kind.tolist() == [[circle, nothing, nothing, nothing], [square, circle, nothing, nothing]]
    assert cells.place[1, :2].tolist() == [[0.25, 0.25], [0.75, 0.25]]


def test_the_vocabulary_is_the_language_of_the_world(lm: CaptionModel) -> None:
    rng = np.random.default_rng(0)
    for scene in make_split(5, "test", 100):
        for caption in references(distort(facts_of(scene), rng, 0.5), 4, seed=0):
            ids = lm.completion(caption)
            assert lm.tokenizer.unk_token_id not in ids
            assert ids[-1] == lm.tokenizer.eos_token_id and lm.text(ids) == caption
    assert lm.tokenizer.unk_token_id not in lm.prompt(PROMPT, SCENES and torch.zeros(8, 3, 48, 48)).input_ids


def test_lessons_are_wrong_as_often_as_they_should_be(lm: CaptionModel, videos: Path) -> None:
    """With no errors every answer is the truth of what its question shows; with errors always, some are not."""
    row = decode_views(SCENES, videos, 48, FrameSampling())
    sights = look(lm, row)
    truths = {v.facts for views in row for v in views}
    for errors, right in ((0.0, True), (1.0, False)):
        settings = CaptionerConfig(web_errors=errors, second_look_errors=errors)
        rng = np.random.default_rng(0)
        lessons = [draw_lesson(lm, sights, PROMPT, settings, rng, clean=False) for _ in range(40)]
        assert all(parse(lm.text(answer)) in truths for _, answer, _ in lessons) == right
    assert {int((question == lm.vision.token_id).sum()) for question, _, _ in lessons} == {33, 13}
    assert len({len(question) for question, _, _ in lessons}) > 2, "first and second looks"


def test_batches_hold_lessons_of_about_equal_length() -> None:
    rng = np.random.default_rng(0)

    def draw() -> Lesson:
        return Lesson(torch.zeros(int(rng.integers(1, 100))), torch.zeros(5), None)  # type: ignore[arg-type]

    batches = batches_of(draw, 4, rng)
    spans = [max(len(q) for q, _, _ in b) - min(len(q) for q, _, _ in b) for b in (next(batches) for _ in range(16))]
    assert np.mean(spans) < 25


def test_a_trained_captioner_is_a_checkpoint_like_any_other(videos: Path, tmp_path: Path) -> None:
    path = train_captioner(SCENES, videos, tmp_path / "captioner", PROMPT, seed=1, settings=SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["captioner"], "nothing else is left"
    model = load(ModelConfig(path=str(path), device="cpu"))
    frames = decode_views(SCENES, videos, 48, FrameSampling())[0][0].frames
    prompt = model.prompt(PROMPT, frames)
    out = model.model(
        **model.forward_kwargs(prompt.input_ids[None], torch.ones_like(prompt.input_ids[None]), [prompt.vision])
    )
    assert out.logits.shape[-1] == len(model.tokenizer) and out.logits.isfinite().all()
    again = train_captioner(SCENES, videos, tmp_path / "again", PROMPT, seed=1, settings=SMALL)
    weights, others = load(ModelConfig(path=str(again), device="cpu")).model.state_dict(), model.model.state_dict()
    assert all(torch.equal(weights[k], others[k]) for k in others), "the same seed gives the same captioner"


def test_a_killed_run_keeps_its_sight(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_captioner(SCENES, videos, tmp_path / "whole", PROMPT, settings=SMALL)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(schooling, "learn_to_say", killed)
        with pytest.raises(KeyboardInterrupt):
            train_captioner(SCENES, videos, tmp_path / "captioner", PROMPT, settings=SMALL)
    assert not (tmp_path / "captioner").exists()
    monkeypatch.setattr(schooling, "learn_to_see", None)  # not called again
    path = train_captioner(SCENES, videos, tmp_path / "captioner", PROMPT, settings=SMALL)
    assert (path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    monkeypatch.setattr(schooling, "decode_views", None)
    assert train_captioner(SCENES, videos, tmp_path / "captioner", PROMPT, settings=SMALL) == path


def _halves(scene: Scene) -> list[tuple[float, float]]:
    return [(0.0, scene.duration / 2), (scene.duration / 2, scene.duration)]
