"""The whole way from video files to pairs, on a random captioner."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from made_videos import write_latin, write_steps, write_unfinished
from pair_runs import SHORT, settings
from synpo.config import ConfigError
from synpo.model.vision import FramesRefused, OneVision
from synpo.pipeline.judge import Failure, JudgeError, Task, Verdict
from synpo.pipeline.judge.offline import OfflineJudge
from synpo.pipeline.run import build_pairs
from synpo.records import Caption, Clip, Pair, Score, read_jsonl, read_records
from synpo.video import VideoError


class CountingJudge(OfflineJudge):
    """The offline judge, remembering which videos it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def score(self, task: Task) -> list[Verdict | Failure]:
        self.asked.append(task.video)
        return super().score(task)


def test_every_record_of_a_run(videos: Path, tiny_captioner_path: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out" / "pairs.jsonl"
    result = build_pairs(settings(tiny_captioner_path), videos, out)
    work = out.with_name("pairs.jsonl.work")
    clips = read_records(Clip, work / "clips.jsonl")
    clip_captions = read_records(Caption, work / "clip_captions.jsonl")
    candidates = read_records(Caption, work / "candidates.jsonl")
    scores = read_records(Score, work / "scores.jsonl")
    pairs = read_records(Pair, out)
    assert len(clips) == len(clip_captions) == 8 and len(candidates) == len(scores) == 12
    assert {c.clip for c in clip_captions} == {c.id for c in clips}
    assert {(c.video, c.index) for c in candidates} == {(v, i) for v in {c.video for c in clips} for i in range(3)}
    assert all(c.text != c.draft for c in candidates), "a random model says something else on a second look"
    assert {s.caption for s in scores} == {c.id for c in candidates}
    by_video = {v: {c.text for c in candidates if c.video == v} for v in {c.video for c in candidates}}
    assert pairs and all({p.chosen, p.rejected} <= by_video[p.video or ""] for p in pairs)
    assert all((p.margin or 0) >= 0.01 for p in pairs)
    assert (result.videos, result.clips, result.candidates, result.scored, result.failed) == (4, 8, 12, 12, 0)
    assert result.pairs == len(pairs) == 4 - result.below_margin - result.alike - result.too_few
    assert set(result.seconds) == {"clips", "clip captions", "candidates", "scores"} and not result.problems
    shown = capsys.readouterr().out
    assert "candidates scored" in shown and f"{len(pairs)} pairs in" in shown.replace("\n", "")


def test_a_model_is_told_how_long_what_it_sees_lasts(
    videos: Path, tiny_captioner_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float | None] = []
    prepare = OneVision.prepare

    def noting(self: OneVision, text: str, frames: Any, vision: Any = None, seconds: float | None = None) -> Any:
        if vision is None:  # it is shown pixels
            told.append(seconds)
        return prepare(self, text, frames, vision, seconds)

    monkeypatch.setattr(OneVision, "prepare", noting)
    build_pairs(settings(tiny_captioner_path), videos, tmp_path / "pairs.jsonl")
    clips = read_records(Clip, tmp_path / "pairs.jsonl.work" / "clips.jsonl")
    lengths = [c.end - c.start for c in clips for _ in range(2)]  # expert and amateur
    whole = [c.end for c in clips if c.index == 1]
    assert sorted(told) == pytest.approx(sorted([*lengths, *whole]))  # type: ignore[type-var]


def test_a_second_run_does_nothing_again(videos: Path, tiny_captioner_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    config = settings(tiny_captioner_path)
    build_pairs(config, videos, out)
    before = out.read_bytes()
    work = tmp_path / "pairs.jsonl.work"
    sizes = {p.name: p.stat().st_size for p in work.iterdir()}
    judge = CountingJudge()

    class NoModel:
        sees_video = True

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"the model was asked for {name}")

    build_pairs(config, videos, out, judge=judge, lm=NoModel())  # type: ignore[arg-type]
    assert judge.asked == [] and out.read_bytes() == before
    assert {p.name: p.stat().st_size for p in work.iterdir()} == sizes


def test_changed_settings_never_mix_with_old_records(videos: Path, tiny_captioner_path: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "pairs.jsonl", tmp_path / "work"
    config = settings(tiny_captioner_path)
    build_pairs(config, videos, out, work)
    first = {c.id for c in read_records(Caption, work / "candidates.jsonl")}
    warmer = replace(config, pairs=replace(config.pairs, candidate_sampling=replace(SHORT, temperature=1.0)))
    result = build_pairs(warmer, videos, out, work)
    assert result.candidates == 12
    everything = read_records(Caption, work / "candidates.jsonl")
    assert len(everything) == 24 and len(read_records(Caption, work / "clip_captions.jsonl")) == 8
    new = {c.text for c in everything if c.id not in first}
    assert all({p.chosen, p.rejected} <= new for p in read_records(Pair, out))

    more = replace(config, pairs=replace(config.pairs, candidates=4, batch_size=4))
    assert build_pairs(more, videos, out, work).candidates == 16
    assert len(read_records(Caption, work / "candidates.jsonl")) == 28, "three of four candidates were there"


def test_batch_size_and_company_do_not_change_the_text(videos: Path, tiny_captioner_path: Path, tmp_path: Path) -> None:
    texts = []
    for size in (1, 24):
        work = tmp_path / f"work{size}"
        build_pairs(settings(tiny_captioner_path, batch_size=size), videos, tmp_path / "pairs.jsonl", work)
        texts.append({c.id: c.text for c in read_records(Caption, work / "candidates.jsonl")})
        texts[-1] |= {c.id: c.text for c in read_records(Caption, work / "clip_captions.jsonl")}
    assert texts[0] == texts[1] and len(texts[0]) == 20


CHILD = """
import os, signal, sys
from pathlib import Path
from synpo.records import RecordStore
from synpo.config import load_config
from synpo.pipeline.run import build_pairs
left = int(sys.argv[4])
append = RecordStore.append
def fatal(self, *records):
    global left
    left -= len(records)
    if left < 0:
        with open(self.path, "a") as file:  # the line in flight is half written
            file.write('{"id": "0123')
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    append(self, *records)
RecordStore.append = fatal
build_pairs(load_config(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_a_killed_run_ends_with_the_pairs_of_one_that_was_not(
    videos: Path, tiny_captioner_path: Path, tmp_path: Path
) -> None:
    config = settings(tiny_captioner_path)
    build_pairs(config, videos, tmp_path / "whole.jsonl")
    text = f"""
model: {{path: {tiny_captioner_path}, device: cpu}}
pairs:
  {{candidates: 3, margin: 0.5, batch_size: 6, candidate_sampling: {{max_new_tokens: 10}},
   clip_sampling: {{temperature: 0.9, top_k: 32, top_p: 0.95, max_new_tokens: 10}}}}
"""
    (tmp_path / "config.yaml").write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}

    def run(limit: int) -> int:
        command = [
            sys.executable,
            "-c",
            CHILD,
            str(tmp_path / "config.yaml"),
            str(videos),
            str(tmp_path / "killed.jsonl"),
        ]
        return subprocess.run([*command, str(limit)], env=environment, capture_output=True, timeout=120).returncode

    assert run(14) == -9, "killed among the clip captions"
    assert not (tmp_path / "killed.jsonl").exists()
    assert run(8) == -9, "killed among the candidates"
    build_pairs(config, videos, tmp_path / "killed.jsonl")
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    for name in ("clips", "clip_captions", "candidates", "scores"):
        whole, killed = (
            [row for _, row in read_jsonl(tmp_path / f"{run}.jsonl.work" / f"{name}.jsonl")]
            for run in ("whole", "killed")
        )
        assert killed == whole, f"{name}: bit for bit the same, each once"


def test_bad_videos_are_left_out_and_named(
    videos: Path, tiny_captioner_path: Path, tmp_path: Path, write_video: Callable[..., Path], capsys: Any
) -> None:
    root = tmp_path / "videos"
    shutil.copytree(videos, root)
    (root / "noise.mp4").write_bytes(os.urandom(4096))
    (root / "empty.mp4").write_bytes(b"")
    whole = write_video(tmp_path / "long.mp4", seconds=30.0, seed=9).read_bytes()
    (root / "torn.mp4").write_bytes(whole[: len(whole) // 3])
    write_unfinished(root / "unfinished.mp4")
    write_latin(root / "latin.mp4")
    (root / os.fsdecode(b"named \xff.mp4")).write_bytes(whole)
    out = tmp_path / "pairs.jsonl"
    result = build_pairs(settings(tiny_captioner_path), root, out)
    assert result.videos == 10 and result.candidates == 15
    assert set(result.problems) == {"noise.mp4", "empty.mp4", "torn.mp4", "unfinished.mp4", "named \ufffd.mp4"}
    assert "under no name that is UTF-8" in result.problems["named \ufffd.mp4"]
    assert "of the 8 wanted frames do not decode" in result.problems["unfinished.mp4"]
    rows = [row for _, row in read_jsonl(tmp_path / "pairs.jsonl.work" / "problems.jsonl")]
    assert {r["video"] for r in rows} == set(result.problems) and all(r["reason"] for r in rows)
    assert not {p.video for p in read_records(Pair, out)} & set(result.problems)
    shown = capsys.readouterr().out
    assert "left out noise.mp4" in shown.replace("\n", " ")


def test_nothing_usable_is_an_error_and_overwrites_nothing(tiny_captioner_path: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "noise.mp4").write_bytes(os.urandom(4096))
    out = tmp_path / "pairs.jsonl"
    out.write_text("earlier pairs\n")
    with pytest.raises(VideoError, match=r"none of the 1 videos can be used; .*problems\.jsonl"):
        build_pairs(settings(tiny_captioner_path), tmp_path / "videos", out)
    assert out.read_text() == "earlier pairs\n"
    assert "noise.mp4" in (tmp_path / "pairs.jsonl.work" / "problems.jsonl").read_text()


def test_a_folder_instead_of_a_file_is_said_before_the_work(
    videos: Path, tiny_captioner_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--pairs takes the file to write, got the folder"):
        build_pairs(settings(tiny_captioner_path), videos, tmp_path)
    assert not list(tmp_path.glob("*.work"))


def test_a_video_that_breaks_off_later_leaves_the_others_alone(
    videos: Path, tiny_captioner_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from synpo.pipeline import stages

    def breaks(root: Path, video: str, start: float, end: float, frames: Any) -> Any:
        if video == "b.mp4" and start > 0:
            raise VideoError("b.mp4 cannot be decoded past frame 3 of 8")
        return original(root, video, start, end, frames)

    original = stages.frames_between
    monkeypatch.setattr(stages, "frames_between", breaks)
    result = build_pairs(settings(tiny_captioner_path, batch_size=3), videos, tmp_path / "pairs.jsonl")
    assert result.problems == {"b.mp4": "b.mp4 cannot be decoded past frame 3 of 8"}
    assert (result.clips, result.candidates, result.scored) == (6, 9, 9)
    again = build_pairs(settings(tiny_captioner_path, batch_size=3), videos, tmp_path / "pairs.jsonl")
    assert again.problems == result.problems and again.pairs == result.pairs


def refusing(side: int) -> Any:
    """OneVision's `prepare` as of a processor that takes no frames of that width, as Qwen3-VL's takes no small ones."""
    prepare = OneVision.prepare

    def refuses(self: Any, text: str, frames: Any, *others: Any) -> Any:
        if frames.shape[-1] == side:
            raise FramesRefused(f"Odd refuses {len(frames)} frames of {side}×48: too small")
        return prepare(self, text, frames, *others)

    return refuses


def test_a_video_that_the_model_cannot_be_shown_costs_itself(
    videos: Path, tiny_captioner_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "videos"
    shutil.copytree(videos, root)
    write_steps(root / "odd.mp4", size=(16, 48))
    monkeypatch.setattr(OneVision, "prepare", refusing(16))
    result = build_pairs(settings(tiny_captioner_path), root, tmp_path / "pairs.jsonl")
    assert result.problems == {
        "odd.mp4": "odd.mp4 cannot be shown to the model: Odd refuses 8 frames of 16×48: too small"
    }
    assert result.candidates == 12 and result.scored == 12
    again = build_pairs(settings(tiny_captioner_path), root, tmp_path / "pairs.jsonl")
    assert again.problems == result.problems and again.pairs == result.pairs


def test_a_video_that_vanishes_costs_itself(
    videos: Path, tiny_captioner_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from synpo.pipeline import run

    def captioned(*args: Any) -> Any:
        found = original(*args)
        (root / "b.mp4").unlink()
        return found

    root = tmp_path / "videos"
    shutil.copytree(videos, root)
    original = run.caption_clips
    monkeypatch.setattr(run, "caption_clips", captioned)
    result = build_pairs(settings(tiny_captioner_path), root, tmp_path / "pairs.jsonl")
    assert set(result.problems) == {"b.mp4"} and "is not in" in result.problems["b.mp4"]
    assert result.candidates == 9


class MoodyJudge:
    """Fails on one caption the first time, and altogether when told to."""

    name, identity, workers = "moody", "moody/1", 2

    def __init__(self) -> None:
        self.order_totals: dict[Task, list[list[float]]] = {}
        self.broken = False
        self.fail = True

    def prepare(self, tasks: Sequence[Task]) -> None: ...

    def score(self, task: Task) -> list[Verdict | Failure]:
        if self.broken:
            raise JudgeError("the endpoint refused the key")
        verdicts: list[Verdict | Failure] = [Verdict(float(i % 5), 3.0, 1.0) for i in range(len(task.candidates))]
        if self.fail and task.video == "a.mp4":
            verdicts[0] = Failure("no JSON in three answers")
        return verdicts

    def stop(self) -> None: ...


def test_a_failed_judgement_is_not_ranked_and_is_tried_again(
    videos: Path, tiny_captioner_path: Path, tmp_path: Path, capsys: Any
) -> None:
    judge, out, config = MoodyJudge(), tmp_path / "pairs.jsonl", settings(tiny_captioner_path)
    judge.broken = True
    with pytest.raises(JudgeError, match="refused"):
        build_pairs(config, videos, out, judge=judge)
    assert not out.exists()
    judge.broken = False
    for _ in range(2):
        result = build_pairs(config, videos, out, judge=judge)
        assert (result.scored, result.failed, result.failures) == (11, 1, {"no JSON in three answers": 1})
    assert "no JSON in three answers" in capsys.readouterr().out
    scores = read_records(Score, tmp_path / "pairs.jsonl.work" / "scores.jsonl")
    failed = [s for s in scores if s.failed]
    assert len(failed) == 2 and all(s.factuality is None and s.note for s in failed)
    rejected = {p.rejected for p in read_records(Pair, out) if p.video == "a.mp4"}
    candidates = read_records(Caption, tmp_path / "pairs.jsonl.work" / "candidates.jsonl")
    assert rejected == {next(c.text for c in candidates if c.video == "a.mp4" and c.index == 1)}
    judge.fail = False
    assert build_pairs(config, videos, out, judge=judge).scored == 12


def test_a_run_without_a_single_verdict_fails_and_overwrites_nothing(
    videos: Path, tiny_captioner_path: Path, tmp_path: Path, capsys: Any
) -> None:
    class Mute(MoodyJudge):
        def score(self, task: Task) -> list[Verdict | Failure]:
            return [Failure("no JSON in three answers")] * len(task.candidates)

    out = tmp_path / "pairs.jsonl"
    out.write_text("earlier pairs\n")
    with pytest.raises(JudgeError, match="none of the 12 candidates could be judged"):
        build_pairs(settings(tiny_captioner_path), videos, out, judge=Mute())
    assert out.read_text() == "earlier pairs\n"
    assert "failed 12×: no JSON in three answers" in capsys.readouterr().out


def test_no_pair_at_all_says_what_to_change(
    videos: Path, tiny_captioner_path: Path, tmp_path: Path, capsys: Any
) -> None:
    result = build_pairs(settings(tiny_captioner_path, margin=99.0, candidates=2), videos, tmp_path / "p.jsonl")
    assert result.pairs == 0 and result.below_margin == 4
    assert "pairs.margin apart: lower it" in capsys.readouterr().out


def test_real_clips(real_data: Path, tiny_captioner_path: Path, tmp_path: Path) -> None:
    short = replace(SHORT, max_new_tokens=4)
    config = settings(tiny_captioner_path, candidates=2, candidate_sampling=short, clip_sampling=short, margin=0.0)
    result = build_pairs(config, real_data / "video", tmp_path / "pairs.jsonl")
    assert (result.videos, result.problems, result.clips, result.candidates) == (4, {}, 9, 8)
    assert {c.video for c in read_records(Clip, tmp_path / "pairs.jsonl.work" / "clips.jsonl")} == {
        "nasa_13013.mp4", "nasa_13013_hdr.mp4", "chaplin.mp4", "big_buck_bunny_0_30.webm",
    }  # fmt: skip
