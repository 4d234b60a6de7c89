"""The demo end to end, at a hundredth of its size: it reports, goes on where it was, and never touches a folder of others."""

import json
import time

import pytest

from synpo.config import ConfigError
from synpo.demo import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished demo of scale 0.01: its output folder."""
    output = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "MARGIN", 0.0)  # so little schooling gives captions that hardly differ in their scores
        patch.setattr(run, "CANDIDATES", 3)
        run.demo(output, seed=1, scale=0.01)
        yield output


def test_the_report_holds_every_figure(finished):
    figures = json.loads((finished / "report.json").read_text())
    assert list(figures["scores"]["systems"]) == ["base", "SFT", "DPO", "SynPO"]
    for system in figures["scores"]["systems"].values():
        assert {"CIDEr", "fact precision", "fact recall", "fact F1"} <= set(system["scores"])
    assert figures["training"]["SynPO"]["steps"] == len(figures["logs"]["SynPO"]) > 0
    assert set(figures["seconds"]) == {
        "videos", "captioner", "pairs", "train SFT", "train DPO", "train SynPO", "evaluation",
    }  # fmt: skip
    page = (finished / "report.html").read_text()
    assert "http://" not in page and "https://" not in page
    assert page.count("data:image/jpeg;base64,") >= 2  # at least one sample and one pair
    assert page.count('class="bold side0"') == 6  # three runs in two pictures
    for said in (
        "SynPO against DPO: fact F1",
        "SynPO − DPO",
        "the world",
        "fact F1",
        "missed change: that",
        "Preference pairs",
    ):
        assert said in page
    assert [*figures["learnt errors in the pairs"]] == ["chosen captions", "rejected captions"]
    assert (finished / "rewards.png").stat().st_size and (finished / "gradient_balance.png").stat().st_size


def test_a_second_run_repeats_nothing(finished):
    files = [
        *finished.glob("*/adapter/adapter_model.safetensors"),
        *finished.glob("videos/*/*.mp4"),
        *finished.glob("captions/*.jsonl"),
        *finished.glob("pairs.jsonl*/*.jsonl"),
        finished / "captioner" / "model.safetensors",
        finished / "pairs.jsonl",
    ]
    before = {path: path.stat().st_mtime_ns for path in files}
    start = time.perf_counter()
    run.demo(finished, seed=1, scale=0.01)
    assert time.perf_counter() - start < 20
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_another_demo_needs_another_folder(finished):
    with pytest.raises(ConfigError, match="seed 1 and scale 0.01.*--no-resume"):
        run.demo(finished, seed=2, scale=0.01)


def test_a_folder_of_others_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    for resume in (True, False):
        with pytest.raises(ConfigError, match="no demo made it"):
            run.demo(tmp_path, scale=0.01, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf")])
def test_scale_must_be_positive(scale, tmp_path):
    with pytest.raises(ConfigError, match="--scale"):
        run.demo(tmp_path / "out", scale=scale)
