"""`synpo pairs`: a folder of videos in, a file of preference pairs out.

    videos ─→ clips.jsonl ─→ clip_captions.jsonl ──┐
       └────→ candidates.jsonl ────────────────────┴─→ scores.jsonl ─→ pairs.jsonl

Every stage appends to its file in the work folder and skips what is there, by ids made of the video, the model and the stage's
settings: a run that was killed goes on where it was, and records made with other settings are never mixed in. A video that
cannot be used is left out with its reason, in problems.jsonl and in the table at the end; the others go on.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from synpo.config import Config, ConfigError
from synpo.data.pairs import origin
from synpo.folders import made_folder, own_folder
from synpo.model.adapter import CaptionModel, check_paths
from synpo.pipeline.engine import check_engine
from synpo.pipeline.judge import Judge, JudgeError, make_judge
from synpo.pipeline.judge.audit import audit
from synpo.pipeline.pairs import make_pairs
from synpo.pipeline.stages import Run, caption_clips, captioner, cut_clips, sample_candidates, score_candidates
from synpo.pipeline.summary import PairsResult, print_result
from synpo.records import write_json, write_records
from synpo.video import VideoError, list_videos


def build_pairs(
    config: Config,
    videos: Path,
    pairs: Path,
    work: Path | None = None,
    judge: Judge | None = None,
    lm: CaptionModel | None = None,
) -> PairsResult:
    """Build preference pairs from every video below a folder.

    Args:
        config: model, frames, pairs, judge and seed are used.
        videos: folder of video files.
        pairs: file to write; it is there complete, or not at all.
        work: folder of the stages' records (default: the name of the pairs file with `.work`).
        judge: instead of the one the configuration names.
        lm: the loaded model that `config.model` names, if the caller has it already.

    Raises:
        ConfigError, VideoError: settings, a model, a folder or every video in it that cannot be used.
        FolderInUse: another run writes to the work folder.
        JudgeError: the judge cannot work at all, or had no verdict on anything; what is scored is kept.
    """
    check_engine(config.pairs.engine, config.model, config.pairs.candidate_sampling)
    check_paths(config.model)
    videos, pairs = Path(videos), Path(pairs)
    if pairs.is_dir():
        raise ConfigError(f"--pairs takes the file to write, got the folder {pairs}")
    work = Path(work) if work is not None else pairs.with_name(f"{pairs.name}.work")
    names = list_videos(videos)
    fresh = not work.exists()
    with made_folder(pairs.parent, "--pairs"), own_folder(work, "--work"):
        if judge is None:
            judge = make_judge(config.judge, work, config.seed, config.model.device)
            judge.check()
        if fresh:  # before anything is written; a run that goes on may not need it
            lm = captioner(config.model, lm)
        (work / "problems.jsonl").unlink(missing_ok=True)

        run = Run(config, videos, work, lm)
        clips = cut_clips(run, names)
        evidence = caption_clips(run, clips)
        candidates = sample_candidates(run, clips)
        run.lm = None  # a local judge may need its memory
        scores, judged = score_candidates(run, judge, evidence, candidates)
        made, left_out = make_pairs(candidates, scores, config.pairs.prompt, config.pairs.margin)
        unjudged = bool(scores) and all(s.failed for s in scores.values())
        if len(run.problems) < len(names) and not unjudged:
            write_records(pairs, made)
            write_json(origin(pairs), {"videos": str(videos.resolve())})

    result = PairsResult(
        path=pairs,
        pairs=len(made),
        videos=len(names),
        clips=sum(len(clips[v]) for v in candidates),
        candidates=sum(len(row) for row in candidates.values()),
        scored=sum(not s.failed for s in scores.values()),
        failed=sum(s.failed for s in scores.values()),
        failures=dict(Counter(s.note for s in scores.values() if s.failed)),
        empty=left_out["empty"],
        cut=run.cut,
        below_margin=left_out["margin"],
        alike=left_out["alike"],
        too_few=left_out["few"],
        problems={video: reason for video, (_, reason) in run.problems.items()},
        seconds=run.seconds,
        audit=audit(judge, judged),
    )
    print_result(result)
    if len(run.problems) == len(names):
        raise VideoError(f"none of the {len(names)} videos can be used; {work / 'problems.jsonl'} says why")
    if unjudged:
        raise JudgeError(
            f"none of the {len(scores)} candidates could be judged; the lines above say why, {pairs} is not written"
        )
    return result
