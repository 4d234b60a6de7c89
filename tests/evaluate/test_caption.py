"""`synpo eval` from video files to scores, on a random captioner."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from made_videos import write_latin, write_steps, write_unfinished
from synpo.config import Config, ConfigError, EvalConfig, ModelConfig, SamplingConfig
from synpo.demo.render import render
from synpo.demo.world import make_split
from synpo.evaluate import caption as module
from synpo.evaluate.caption import evaluate_model
from synpo.model.adapter import CaptionModel
from synpo.model.vision import FramesRefused
from synpo.records import read_jsonl, write_jsonl
from synpo.video import VideoError, probe

GREEDY = SamplingConfig(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=6)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos, and a file that is none."""
    folder = tmp_path_factory.mktemp("videos")
    for scene in make_split(0, "held-out", 3):
        render(scene, folder)
    (folder / "noise.mp4").write_bytes(b"not a video")
    return folder


@pytest.fixture
def config(tiny_captioner_path: Path) -> Config:
    model = ModelConfig(path=str(tiny_captioner_path), device="cpu")
    return Config(model=model, eval=EvalConfig(sampling=GREEDY, batch_size=2, bootstrap=20))


def test_captions_scores_and_what_was_left_out(config: Config, videos: Path, tmp_path: Path, capsys: object) -> None:
    references = tmp_path / "references.jsonl"
    names = [f"held-out-0000{i}.mp4" for i in range(3)]
    write_jsonl(
        references,
        [{"video": n, "captions": [f"a red circle and {n[:-4]}."]} for n in (*names, "noise.mp4", "elsewhere.mp4")],
    )
    earlier = tmp_path / "earlier.jsonl"
    write_jsonl(earlier, [{"video": n, "caption": f"a red circle and {n[:-4]}."} for n in names])
    output = tmp_path / "out"
    result = evaluate_model(config, videos, references, output, {"earlier": earlier})
    assert result is not None and result.videos == names and result.baseline == "earlier"
    assert result.scores["earlier"].corpus["BLEU-1"] > result.scores["this model"].corpus["BLEU-1"]
    assert [row["video"] for _, row in read_jsonl(output / "captions.jsonl")] == names
    assert set(json.loads((output / "scores.json").read_text())["systems"]) == {"earlier", "this model"}
    page = (output / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3  # all have lost against what is there already
    assert "Worse with this model" in page and "3 of 3 videos lost in CIDEr over earlier" in page
    assert "this model against earlier: CIDEr -" in page and "this model − earlier" in page
    shown = capsys.readouterr().out  # type: ignore[attr-defined]
    assert "left out noise.mp4" in shown and "1 of 5 referenced videos are not in" in shown


def test_a_video_that_breaks_off_is_named_and_the_others_go_on(config: Config, tmp_path: Path, capsys: Any) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    write_unfinished(root / "unfinished.mp4")
    write_latin(root / "latin.mp4")
    evaluate_model(config, root, None, tmp_path / "out")
    assert [row["video"] for _, row in read_jsonl(tmp_path / "out" / "captions.jsonl")] == ["latin.mp4"]
    assert re.search(r"left out unfinished\.mp4: .* wanted frames do not decode", capsys.readouterr().out)


def test_a_video_that_the_model_cannot_be_shown_is_named(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    write_steps(root / "fine.mp4")
    write_steps(root / "odd.mp4", size=(16, 48))
    prompt = CaptionModel.prompt

    def refuses(self: Any, text: Any, frames: Any = None, *others: Any, **more: Any) -> Any:
        if frames is not None and frames.shape[-1] == 16:
            raise FramesRefused("Odd refuses 8 frames of 16×48: too small")
        return prompt(self, text, frames, *others, **more)

    monkeypatch.setattr(CaptionModel, "prompt", refuses)
    evaluate_model(config, root, None, tmp_path / "out")
    assert [row["video"] for _, row in read_jsonl(tmp_path / "out" / "captions.jsonl")] == ["fine.mp4"]
    assert "left out odd.mp4: odd.mp4 cannot be shown to the model: Odd refuses" in capsys.readouterr().out.replace(
        "\n", " "
    )


def test_a_model_is_told_how_long_a_video_lasts(
    config: Config, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float | None] = []
    prompt = CaptionModel.prompt

    def noting(self: CaptionModel, *args: Any, seconds: float | None = None) -> Any:
        told.append(seconds)
        return prompt(self, *args, seconds=seconds)

    monkeypatch.setattr(CaptionModel, "prompt", noting)
    evaluate_model(config, videos, None, tmp_path / "out")
    assert told == [probe(videos / f"held-out-0000{i}.mp4").duration for i in range(3)]


def test_an_interrupted_run_captions_what_is_missing_and_no_more(
    config: Config, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_model(config, videos, None, tmp_path / "whole")
    evaluate_model(config, videos, None, tmp_path / "killed")
    work = tmp_path / "killed" / "captions.work.jsonl"
    rows = work.read_bytes().splitlines(keepends=True)
    work.write_bytes(rows[0] + rows[1] + rows[2][:10])
    asked: list[int] = []
    real = module.generate
    monkeypatch.setattr(
        module, "generate", lambda lm, prompts, *a, **k: asked.append(len(prompts)) or real(lm, prompts, *a, **k)
    )
    evaluate_model(config, videos, None, tmp_path / "killed")
    assert sum(asked) == 1
    for name in ("captions.jsonl", "captions.work.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_nothing_readable_is_an_error(config: Config, tmp_path: Path) -> None:
    (tmp_path / "noise.mp4").write_bytes(b"not a video")
    with pytest.raises(VideoError, match="none of the 1 videos"):
        evaluate_model(config, tmp_path, None, tmp_path / "out")
    assert not (tmp_path / "out" / "captions.jsonl").exists()


def test_what_cannot_be_used_is_said_before_the_model_is_loaded(
    config: Config, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: ModelConfig) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(module, "load", load)
    references, broken = tmp_path / "references.jsonl", tmp_path / "broken.jsonl"
    write_jsonl(references, [{"video": "held-out-00000.mp4", "captions": ["a circle."]}])
    broken.write_text("{}\n")
    for settings, against, message in (
        ({"batch_size": 0}, {}, r"batch_size: expected at least 1, got 0"),
        ({"bootstrap": 0}, {}, r"bootstrap: expected at least 1, got 0"),
        ({}, {"this model": references}, "--against: 'this model'"),
        ({}, {"a": broken}, r"broken\.jsonl:1: expected"),
        ({}, {"a": tmp_path / "missing.jsonl"}, r"--against a: .*missing\.jsonl is not there; give the file"),
        ({}, {"a": tmp_path}, "--against a: .* is a folder; give the file"),
    ):
        with pytest.raises(ValueError, match=message):
            other = replace(config, eval=replace(config.eval, **settings))
            evaluate_model(other, videos, references, tmp_path / "out", against)
    with pytest.raises(ConfigError, match="--references: .*nowhere is not there"):
        evaluate_model(config, videos, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(OSError, match="--output: .* cannot be made a folder"):
        evaluate_model(config, videos, references, broken)
    with pytest.raises(ConfigError, match="without --references"):
        evaluate_model(config, videos, None, tmp_path / "out", {"a": references})


def test_the_scores_say_what_they_were_made_of(config: Config, videos: Path, tmp_path: Path) -> None:
    references, output = tmp_path / "references.jsonl", tmp_path / "out"
    names = ["held-out-00000.mp4", "noise.mp4", "elsewhere.mp4", "held-out-00001.mp4"]
    write_jsonl(references, [{"video": n, "captions": ["a red circle."]} for n in names])
    evaluate_model(config, videos, references, output)
    told = json.loads((output / "scores.json").read_text())
    run = told["run"]
    assert told["videos"] == 2 and run["references"] == {"file": str(references), "format": "captions", "videos": 4}
    assert run["not_in_the_folder"] == ["elsewhere.mp4"] and list(run["unreadable"]) == ["noise.mp4"]
    assert run["model"]["path"] == config.model.path and len(run["model_fingerprint"]) == 16
    assert (run["seed"], run["eval"]["prompt"], run["eval"]["bootstrap"]) == (0, config.eval.prompt, 20)
    assert {"synpo", "python", "torch", "transformers", "pycocoevalcap"} <= set(run["versions"])
    evaluate_model(replace(config, seed=1), videos, None, output)
    assert not (output / "scores.json").exists(), "they were of other captions"


def test_a_folder_named_like_markup_is_just_a_folder(config: Config, videos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "[/red]"
    shutil.copytree(videos, folder)
    write_jsonl(tmp_path / "r.jsonl", [{"video": v, "captions": ["a b"]} for v in ("held-out-00000", "elsewhere")])
    assert evaluate_model(config, folder, tmp_path / "r.jsonl", tmp_path / "[/out]") is not None


def test_a_text_model_is_refused(config: Config, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load", lambda _: SimpleNamespace(sees_video=False))
    with pytest.raises(ConfigError, match="takes no video"):
        evaluate_model(config, videos, None, tmp_path / "out")
