"""`synpo eval --videos`: caption every video with a model, keep the captions, score them where there are references.

    videos ─ frames ─ generate ─→ captions.work.jsonl ─→ captions.jsonl ─┬→ scores.json, a table
                                            references (and --against) ──┘   report.html

captions.work.jsonl grows as captions are made, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from synpo import terminal
from synpo.config import Config, ConfigError
from synpo.evaluate.benchmarks import match_videos, read_references
from synpo.evaluate.run import EvalResult, evaluate, read_captions
from synpo.evaluate.scores import count
from synpo.evaluate.show import groups, show
from synpo.folders import own_folder
from synpo.model.adapter import CaptionModel, check_paths, load
from synpo.model.fingerprint import fingerprint
from synpo.model.vision import FramesRefused
from synpo.pipeline.decode import generate
from synpo.progress import Bar
from synpo.records import Kept, RecordStore, record_id, write_json, write_jsonl
from synpo.report.frames import strip
from synpo.report.table import print_table
from synpo.video import VideoError, list_videos, probe, read_frames, resolve_video, video_size

SELF = "this model"  # its name in the tables
COUNTED_BY = (
    "synpo",
    "torch",
    "transformers",
    "peft",
    "av",
    "pycocoevalcap",
)  # packages that the figures may depend on


@dataclass(frozen=True)
class VideoCaption(Kept):
    """What a model said of a video in an evaluation. `logp` is the mean log-probability of its tokens."""

    id: str
    video: str
    caption: str
    logp: float


def caption_videos(
    lm: CaptionModel, config: Config, root: Path, videos: Sequence[str], store: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """Caption `videos` (paths relative to `root`), skipping those `store` already holds for this model and these settings.

    Returns:
        video → caption, and video → reason for those that could not be read.
    """
    settings = record_id(
        fingerprint(config.model), config.eval.prompt, config.eval.sampling, config.frames, config.seed
    )
    records: RecordStore[VideoCaption] = RecordStore(VideoCaption, store)
    captions: dict[str, str] = {}
    problems: dict[str, str] = {}
    waiting: list[tuple[str, str]] = []
    for video in videos:
        try:
            key = record_id(settings, video, video_size(root, video))
        except VideoError as error:
            problems[video] = str(error)
            continue
        if key in records:
            captions[video] = records[key].caption
        else:
            waiting.append((key, video))
    with Bar(total=len(videos), initial=len(captions), desc="captions", unit="video") as bar:
        for first in range(0, len(waiting), config.eval.batch_size):
            keys, names, prompts = [], [], []
            for key, video in waiting[first : first + config.eval.batch_size]:
                try:
                    path = resolve_video(root, video)
                    seconds = probe(path).duration
                    frames = read_frames(path, config.frames.times(0.0, seconds))
                except VideoError as error:
                    problems[video] = str(error)
                    continue
                try:
                    prompts.append(lm.prompt(config.eval.prompt, frames, seconds=seconds))
                except FramesRefused as error:
                    problems[video] = f"{video} cannot be shown to the model: {error}"
                    continue
                keys.append(key)
                names.append(video)
            answers = generate(lm, prompts, config.eval.sampling, keys=keys)
            records.append(*(VideoCaption(k, v, a.text, a.logp) for k, v, a in zip(keys, names, answers)))
            captions |= {v: a.text for v, a in zip(names, answers)}
            bar.update(min(config.eval.batch_size, len(waiting) - first))
    return captions, problems


def evaluate_model(
    config: Config,
    videos: Path,
    references: Path | None,
    output: Path,
    against: Mapping[str, Path] | None = None,
) -> EvalResult | None:
    """Caption the videos of a folder and score the captions; what `synpo eval` does.

    Args:
        references: VATEX, MSR-VTT, DREAM-1k or JSON Lines of {"video", "captions"}; None writes captions only.
        output: folder of captions.jsonl, report.html and scores.json, which says with what and over which videos it was made.
        against: name → captions.jsonl of earlier evaluations; the first is the baseline of the paired differences.

    Raises:
        ConfigError, VideoError, ValueError: input that cannot be used; the message says which. All but videos that cannot
            be read, and captions that an earlier evaluation lacks, is found before a model is loaded.
        FolderInUse: another run writes to `output`.
    """
    console = terminal.console()
    _check(config, references, against or {})
    names = list_videos(videos)
    wanted = {name: name for name in names}
    reference_captions: dict[str, list[str]] = {}
    run: dict[str, Any] = {}
    if references is not None:
        found = read_references(references)
        matched = match_videos(found.captions, names)
        if not matched.files:
            raise ConfigError(f"none of the {len(found.captions)} videos of {references} is in {videos}")
        wanted = matched.files
        reference_captions = {video: found.captions[video] for video in wanted}
        run["references"] = {"file": str(references), "format": found.format, "videos": len(found.captions)}
        run["not_in_the_folder"] = matched.missing
        if matched.missing:
            console.print(f"{len(matched.missing)} of {len(found.captions)} referenced videos are not in {videos}")
    with own_folder(output, "--output"):
        lm = load(config.model)
        if not lm.sees_video:
            raise ConfigError(
                f"model {config.model.path} takes no video, and --videos asks for captions of videos; what a text model makes of "
                "held-out pairs is evaluated with --pairs"
            )
        captions, problems = caption_videos(lm, config, videos, sorted(wanted.values()), output / "captions.work.jsonl")
        for video, reason in problems.items():
            console.print(f"left out {video}: {reason}")
        if not captions:
            raise VideoError(f"none of the {len(wanted)} videos in {videos} can be read; the lines above say why")
        for name in ("scores.json", "report.html"):  # of earlier captions
            (output / name).unlink(missing_ok=True)
        write_jsonl(output / "captions.jsonl", ({"video": v, "caption": c} for v, c in captions.items()))
        console.print(f"{count(len(captions), 'caption')} in {output / 'captions.jsonl'}")
        if references is None:
            return None
        usable = {video: file for video, file in wanted.items() if file in captions}
        systems = {}
        for name, path in (against or {}).items():
            others = read_captions(path, usable.values())
            systems[name] = {video: others[file] for video, file in usable.items()}
        systems[SELF] = {video: captions[file] for video, file in usable.items()}
        result = evaluate(
            systems,
            {video: reference_captions[video] for video in usable},
            seed=config.seed,
            resamples=config.eval.bootstrap,
        )
        figures = result.to_json() | {"run": run | {"unreadable": problems} | made_with(config)}
        page = show(
            output,
            " with ".join(filter(None, [config.model.path, config.model.adapter])),
            result,
            groups(result, systems, reference_captions, lambda video: strip(videos, usable[video])),
            {"references": str(references), "videos": str(videos), "seed": str(config.seed)},
            figures,
        )
        write_json(output / "scores.json", figures)
    for table in result.to_tables():
        print_table(table)
    console.print(f"scores.json and {page}")
    return result


def made_with(config: Config) -> dict[str, Any]:
    """What the captions, or answers, and scores of a run depend on."""
    versions = {"python": platform.python_version()}
    for package in COUNTED_BY:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    settings = {"model": asdict(config.model), "frames": asdict(config.frames), "eval": asdict(config.eval)}
    return {**settings, "seed": config.seed, "model_fingerprint": fingerprint(config.model), "versions": versions}


def _check(config: Config, references: Path | None, against: Mapping[str, Path]) -> None:
    check_paths(config.model)
    if against and references is None:
        raise ConfigError("--against compares scores, and without --references there are none")
    if SELF in against:
        raise ConfigError(f"--against: {SELF!r} is what this evaluation is called; give the other one another name")
    for flag, path in (("--references", references), *((f"--against {name}", path) for name, path in against.items())):
        if path is not None and not path.is_file():
            raise ConfigError(f"{flag}: {path} is {'a folder' if path.is_dir() else 'not there'}; give the file")
    for path in against.values():
        read_captions(path)
