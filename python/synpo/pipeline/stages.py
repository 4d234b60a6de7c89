"""The stages from videos to scores. Each appends to its own record file and skips what that holds.

    cut_clips         video → its clips
    caption_clips     clip → one caption, decoded contrastively            evidence for the judge
    sample_candidates video → N captions, sampled plainly                  what is ranked
    score_candidates  candidates and evidence of a video → their scores

Batches are cut from the whole list, done or not, and a batch with anything missing is computed whole: so a run that was
interrupted computes the very same numbers as one that was not.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Size, Tensor

from synpo.config import Config, ConfigError, ModelConfig
from synpo.model.adapter import CaptionModel, load
from synpo.model.fingerprint import fingerprint
from synpo.model.vision import FramesRefused
from synpo.pipeline.caption import Description, describe
from synpo.pipeline.clips import frames_between, split_video
from synpo.pipeline.engine import Engine, free_memory, make_engine
from synpo.pipeline.judge.base import Failure, Judge, JudgeError, Task, Verdict
from synpo.pipeline.judge.parallel import judged
from synpo.progress import Bar
from synpo.records import Caption, Clip, RecordStore, Score, record_id, write_jsonl
from synpo.video import VideoError, video_size

HOPELESS = 20  # videos whose judging may fail, one after the other and none before, until no more are asked about


def captioner(config: ModelConfig, lm: CaptionModel | None = None) -> CaptionModel:
    """`lm`, or the model that is named. Raises ConfigError where it cannot be loaded or takes no video."""
    lm = load(config) if lm is None else lm
    if not lm.sees_video:
        raise ConfigError(f"model {config.path} takes no video; pairs of videos need a video model")
    return lm


@dataclass
class Run:
    """What all stages share: settings, folders, the model, and what went wrong."""

    config: Config
    root: Path
    work: Path
    lm: CaptionModel | None
    problems: dict[str, tuple[str, str]] = field(default_factory=dict)  # video → (stage, reason)
    seconds: dict[str, float] = field(default_factory=dict)
    cut: int = 0  # captions of this run that were stopped at max_new_tokens
    taken: dict[Size, str] = field(
        default_factory=dict
    )  # shape of frames → why the model takes none such, "" where it does

    def __post_init__(self) -> None:
        self.model_id = fingerprint(self.config.model)

    def model(self) -> CaptionModel:
        """The captioner, loaded when it is first needed."""
        self.lm = captioner(self.config.model, self.lm)
        return self.lm

    @contextlib.contextmanager
    def engine(self) -> Iterator[Callable[[], Engine]]:
        """Who samples the candidates: a function that gives it, made on the first call and closed in the end.

        vLLM takes most of a GPU, so the captioner that wrote the clip captions leaves it first.
        """
        made: list[Engine] = []

        def get() -> Engine:
            if not made:
                if self.config.pairs.engine != "hf":
                    self.lm = None
                    free_memory()
                made.append(make_engine(self.config.model, self.config.pairs.engine, self.model))
            return made[0]

        try:
            yield get
        finally:
            for engine in made:
                engine.close()

    def leave_out(self, video: str, stage: str, error: Exception) -> None:
        self.problems[video] = (stage, str(error))
        rows = [{"video": v, "stage": s, "reason": r} for v, (s, r) in self.problems.items()]
        write_jsonl(self.work / "problems.jsonl", rows)

    def views(self, stage: str, stretches: Sequence[tuple[str, float, float]]) -> dict[int, Tensor]:
        """Frames of those stretches (video, start, end) that can be read, by their place; the other videos are left out."""
        found = {}
        for place, (video, start, end) in enumerate(stretches):
            if video not in self.problems:
                try:
                    frames = frames_between(self.root, video, start, end, self.config.frames)
                    if self.lm is not None:
                        self.look(video, frames, end - start)
                except VideoError as error:
                    self.leave_out(video, stage, error)
                else:
                    found[place] = frames
        return found

    def look(self, video: str, frames: Tensor, seconds: float) -> None:
        """Raise VideoError where the model's processor refuses frames of this shape; it is asked once, with blank ones."""
        if frames.shape not in self.taken:
            blank = frames.new_zeros(1).expand(frames.shape)
            try:
                self.model().prompt(self.config.pairs.prompt, blank, {}, seconds=seconds)
            except FramesRefused as error:
                self.taken[frames.shape] = str(error)
            else:
                self.taken[frames.shape] = ""
        if reason := self.taken[frames.shape]:
            raise VideoError(f"{video} cannot be shown to the model: {reason}")

    def count_cut(self, descriptions: Sequence[Description]) -> None:
        self.cut += sum(not d.finished for d in descriptions)

    @contextlib.contextmanager
    def progress(self, stage: str, total: int, unit: str) -> Iterator[Bar]:
        start = time.perf_counter()
        with Bar(total=total, desc=stage, unit=unit) as bar:
            yield bar
        self.seconds[stage] = time.perf_counter() - start


def cut_clips(run: Run, videos: Sequence[str]) -> dict[str, list[Clip]]:
    """video → its clips, for every video that can be opened."""
    store: RecordStore[Clip] = RecordStore(Clip, run.work / "clips.jsonl")
    clips: dict[str, list[Clip]] = {}
    settings = run.config.pairs
    with run.progress("clips", len(videos), "video") as bar:
        for video in videos:
            try:
                clips[video] = split_video(run.root, video, settings.clip_seconds, settings.max_clips)
            except VideoError as error:
                run.leave_out(video, "clips", error)
            else:
                if new := [c for c in clips[video] if c.id not in store]:
                    store.append(*new)
            bar.update()
    return clips


def caption_clips(run: Run, clips: Mapping[str, Sequence[Clip]]) -> dict[str, list[Caption]]:
    """video → captions of its clips, in order of time."""
    settings, store = run.config.pairs, RecordStore(Caption, run.work / "clip_captions.jsonl")
    made_with = record_id(
        "clip caption", run.model_id, run.config.frames, settings.prompt, settings.clip_sampling, settings.contrast,
        settings.refinements, run.config.seed,
    )  # fmt: skip
    everything = [c for video in clips.values() for c in video]
    ids = {c.id: record_id(made_with, c.id) for c in everything}
    with run.progress("clip captions", len(everything), "clip") as bar:
        for first in range(0, len(everything), settings.batch_size):
            batch = everything[first : first + settings.batch_size]
            if any(ids[c.id] not in store for c in batch if c.video not in run.problems):
                run.model()
                views = run.views("clip captions", [(c.video, c.start, c.end) for c in batch])
                shown = [batch[i] for i in views]
                rows = describe(
                    run.model(),
                    list(views.values()),
                    [[f"{run.config.seed} {ids[c.id]}"] for c in shown],
                    settings.prompt,
                    settings.clip_sampling,
                    contrast=settings.contrast,
                    refinements=settings.refinements,
                    seconds=[c.end - c.start for c in shown],
                )
                run.count_cut([row[0] for row in rows])
                captions = [
                    Caption(ids[c.id], c.video, c.id, c.index, row[0].text, row[0].draft, row[0].logp)
                    for c, row in zip(shown, rows)
                ]
                store.append(*(c for c in captions if c.id not in store))
            bar.update(len(batch))
    return {v: [store[ids[c.id]] for c in row] for v, row in clips.items() if v not in run.problems}


def sample_candidates(run: Run, clips: Mapping[str, Sequence[Clip]]) -> dict[str, list[Caption]]:
    """video → its candidates. A video's samples are decoded together; `batch_size` rows make a batch, one video at least."""
    settings, store = run.config.pairs, RecordStore(Caption, run.work / "candidates.jsonl")
    made_with = record_id(
        "candidate", run.model_id, run.config.frames, settings.prompt, settings.candidate_sampling,
        settings.refinements, run.config.seed, *([] if settings.engine == "hf" else [settings.engine]),
    )  # fmt: skip
    ids: dict[str, list[str]] = {}
    for video in (v for v in clips if v not in run.problems):
        try:
            size = video_size(run.root, video)
        except VideoError as error:  # gone since it was cut into clips
            run.leave_out(video, "candidates", error)
        else:
            ids[video] = [record_id(made_with, video, size, i) for i in range(settings.candidates)]
    everything = list(ids)
    step = max(1, settings.batch_size // settings.candidates)
    with run.progress("candidates", len(everything), "video") as bar, run.engine() as engine:
        for first in range(0, len(everything), step):
            batch = everything[first : first + step]
            if any(key not in store for video in batch for key in ids[video]):
                views = run.views("candidates", [(v, 0.0, clips[v][-1].end) for v in batch])
                shown = [batch[i] for i in views]
                rows = engine().describe(
                    list(views.values()),
                    [[f"{run.config.seed} {key}" for key in ids[v]] for v in shown],
                    settings.prompt,
                    settings.candidate_sampling,
                    settings.refinements,
                    [clips[v][-1].end for v in shown],
                )
                for video, row in zip(shown, rows):
                    run.count_cut(row)
                    captions = [
                        Caption(key, video, None, i, d.text, d.draft, d.logp)
                        for i, (key, d) in enumerate(zip(ids[video], row))
                    ]
                    store.append(*(c for c in captions if c.id not in store))
            bar.update(len(batch))
    return {v: [store[key] for key in keys] for v, keys in ids.items() if v not in run.problems}


def score_candidates(
    run: Run, judge: Judge, evidence: Mapping[str, Sequence[Caption]], candidates: Mapping[str, Sequence[Caption]]
) -> tuple[dict[str, Score], list[tuple[Task, list[Score]]]]:
    """caption id → its score, and every task with its scores in order. Empty captions are not shown to the judge.

    A candidate whose judging failed before is judged again; the failure stays in the file under an id of its own.
    Raises JudgeError when the first HOPELESS videos have no verdict: every further question would be paid for in vain.
    """
    store = RecordStore(Score, run.work / "scores.jsonl")
    shown: dict[str, list[Caption]] = {}
    tasks: dict[str, Task] = {}
    for video, row in candidates.items():
        shown[video] = [c for c in row if c.text.strip()]
        tasks[video] = Task(
            video,
            tuple(c.text for c in evidence.get(video, ()) if c.text.strip()),
            tuple(c.text for c in shown[video]),
            tuple(c.logp for c in shown[video]),
        )
    asked = {v: t for v, t in tasks.items() if len(t.candidates) > 1}
    final: dict[str, Score] = {}
    with run.progress("scores", len(asked), "video") as bar:
        if asked:
            judge.prepare(list(asked.values()))
        ids = {
            c.id: record_id("score", judge.identity, task.evidence, task.candidates, c.id)
            for video, task in asked.items()
            for c in shown[video]
        }
        final = {s.caption: s for s in store if not s.failed and ids.get(s.caption) == s.id}
        missing = {v: t for v, t in asked.items() if any(c.id not in final for c in shown[v])}
        failures = Counter(s.caption for s in store if s.failed)
        bar.update(len(asked) - len(missing))
        with contextlib.closing(judged(judge, missing)) as found:
            for video, verdicts in found:
                outcomes = zip(shown[video], verdicts, strict=True)
                new = [_score(judge.name, ids[c.id], c, o, failures[c.id]) for c, o in outcomes if c.id not in final]
                store.append(*new)
                final |= {s.caption: s for s in new}
                bar.update()
                if all(s.failed for s in final.values()) and len({s.video for s in final.values()}) >= HOPELESS:
                    raise JudgeError(
                        f"none of the first {HOPELESS} videos could be judged, the others are not asked about; the last one: "
                        f"{new[-1].note}"
                    )
    return final, [(task, [final[c.id] for c in shown[v]]) for v, task in asked.items()]


def _score(judge: str, key: str, caption: Caption, outcome: Verdict | Failure, failures: int) -> Score:
    """The record of one outcome; a failure gets an id of its own, by how many the caption had before."""
    if isinstance(outcome, Verdict):
        figures = (outcome.factuality, outcome.fluency, outcome.consistency, outcome.total)
        return Score(key, caption.id, caption.video, *figures, judge)
    key = record_id(key, "failure", failures)
    return Score(key, caption.id, caption.video, None, None, None, None, judge, outcome.reason)
