"""The data of `synpo eval`: captions of several systems + references (+ facts) → scores, intervals, differences, tables.

    captions.jsonl {"video", "caption"} ─ read_captions ─┐
    references     (benchmarks.py)      ─────────────────┴→ evaluate → EvalResult → to_json / to_table / to_charts

The first system is the baseline, the last one what the evaluation is about: every system is compared with the first, and the
last one with every other, on the same videos, by paired bootstrap.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from synpo.evaluate.bootstrap import Difference, Interval
from synpo.evaluate.facts import fact_scores
from synpo.evaluate.metrics import caption_metrics
from synpo.evaluate.scores import Scores, count, some
from synpo.progress import Bar
from synpo.records import read_jsonl
from synpo.report.table import Chart, Table

SHOWN = ("fact F1", "fact precision", "fact recall", "CIDEr", "BLEU-4", "ROUGE-L", "METEOR")  # what tells most first
CHARTED = ("fact F1", "CIDEr")  # the others are in the tables


@dataclass(frozen=True)
class FactSheet:
    """What is true of each video, and how to read facts off a caption."""

    true: Mapping[str, Set[Hashable]]
    parse: Callable[[str], Set[Hashable]]


@dataclass(frozen=True)
class EvalResult:
    """Scores of several systems on the same videos; system → metric → figure, in the library's units (see metrics.py).

    Metrics are CIDEr, BLEU-1..4, ROUGE-L, METEOR where Java is, and, with a FactSheet, "fact precision", "fact recall",
    "fact F1" and their "fact macro ..." counterparts. `differences` are those of (system, other): each system minus `baseline`,
    the first, and the last one minus each of the others.
    """

    videos: list[str]
    baseline: str
    scores: dict[str, Scores]
    intervals: dict[str, dict[str, Interval | None]]
    differences: dict[tuple[str, str], dict[str, Difference | None]]
    counts: dict[str, dict[str, int]]
    resamples: int
    level: float
    seed: int

    @property
    def systems(self) -> list[str]:
        return list(self.scores)

    @property
    def main(self) -> str:
        """The metric that tells most of those there are."""
        return self._shown()[0]

    def to_json(self) -> dict[str, Any]:
        """Everything, per-video scores included, as plain JSON values."""
        return {
            "videos": len(self.videos),
            "baseline": self.baseline,
            "units": "CIDEr 0-10, all others 0-1; tables show them times 100",
            "bootstrap": {"resamples": self.resamples, "level": self.level, "seed": self.seed},
            "systems": {
                system: {
                    "scores": scores.corpus,
                    "intervals": _plain(self.intervals[system]),
                    "minus": {other: _plain(d) for (one, other), d in self.differences.items() if one == system},
                    "counts": self.counts[system],
                    "notes": scores.notes,
                    "per_video": {
                        video: {name: values[i] for name, values in scores.per_video.items()}
                        for i, video in enumerate(self.videos)
                    },
                }
                for system, scores in self.scores.items()
            },
        }

    def to_table(self) -> Table:
        """Systems × metrics, ×100, the interval under each score, the best of each column standing out."""
        shown = self._shown()
        rows = [
            [system, *(_points(self.scores[system].corpus[m], self.intervals[system][m]) for m in shown)]
            for system in self.systems
        ]
        best = set()
        if len(rows) > 1:
            for column, metric in enumerate(shown, 1):
                values = [self.scores[system].corpus[metric] for system in self.systems]
                best |= {(row, column) for row, value in enumerate(values) if value == max(values)}
        over = f"{count(len(self.videos), 'video')} ({self.resamples:,} resamples, seed {self.seed})"
        bounded = any(interval for found in self.intervals.values() for interval in found.values())
        under = (
            f"×100; under each score its {self.level:.0%} bootstrap interval over {over}"
            if bounded
            else f"×100; {count(len(self.videos), 'video')}"
        )
        return Table("Caption scores", ["system", *shown], rows, best=best, notes=[under, *self._notes()])

    def to_difference_table(self) -> Table | None:
        """Systems minus systems, ×100; differences whose interval leaves out 0 stand out. None where there is none."""
        shown = [m for m in self._shown() if any(found[m] is not None for found in self.differences.values())]
        if not shown:  # a single system, or a single video
            return None
        rows: list[list[str]] = []
        better, worse = set(), set()
        for r, ((system, other), found) in enumerate(self.differences.items()):
            row = [f"{system} − {other}"]
            for c, metric in enumerate(shown, 1):
                d = found[metric]
                row.append("–" if d is None else f"{100 * d.value:+.1f}\n{100 * d.low:.1f}…{100 * d.high:.1f}")
                if d is not None and d.low > 0:
                    better.add((r, c))
                elif d is not None and d.high < 0:
                    worse.add((r, c))
            rows.append(row)
        note = f"×100; below, the {self.level:.0%} interval of a paired bootstrap over videos; in colour where it leaves out 0"
        return Table("Paired differences", ["", *shown], rows, good=better, bad=worse, notes=[note])

    def to_tables(self) -> list[Table]:
        """Scores and, where there are any, differences."""
        return [self.to_table(), *filter(None, [self.to_difference_table()])]

    def to_charts(self) -> list[Chart]:
        """The differences in the main metric, and the metrics of CHARTED that have intervals, ×100."""
        charts = []
        gaps = [(f"{one} − {other}", found[self.main]) for (one, other), found in self.differences.items()]
        differences = [(name, 100 * d.value, Interval(100 * d.low, 100 * d.high)) for name, d in gaps if d is not None]
        if differences:
            charts.append(Chart(f"{self.main}, difference", [*differences], zero=True))
        for metric in self._shown():
            if metric not in CHARTED or self.intervals[self.baseline][metric] is None:
                continue
            rows = []
            for system in self.systems:
                interval = self.intervals[system][metric]
                hundredfold = interval and Interval(100 * interval.low, 100 * interval.high)
                rows.append((system, 100 * self.scores[system].corpus[metric], hundredfold))
            charts.append(Chart(metric, rows))
        return charts

    def changes(self, system: str) -> list[tuple[str, float]]:
        """(video, score of `system` minus the baseline's) in the main metric, the largest gain first."""
        gain = np.subtract(self.scores[system].per_video[self.main], self.scores[self.baseline].per_video[self.main])
        return [(self.videos[i], float(gain[i])) for i in np.argsort(-gain, kind="stable")]

    def _shown(self) -> list[str]:
        return [m for m in SHOWN if all(m in scores.corpus for scores in self.scores.values())]

    def _notes(self) -> list[str]:
        said: dict[str, list[str]] = {}
        for system, scores in self.scores.items():
            for note in scores.notes:
                said.setdefault(note, []).append(system)
        return [n if len(by) == len(self.scores) else f"{', '.join(by)}: {n}" for n, by in said.items()]


def evaluate(
    captions_by_system: Mapping[str, Mapping[str, str]],
    references: Mapping[str, Sequence[str]],
    facts: FactSheet | None = None,
    *,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
    meteor: bool | None = None,
    progress: bool = True,
) -> EvalResult:
    """Score every system on the videos of `references`; the first system is the baseline.

    Args:
        captions_by_system: system → video id → caption.
        references: video id → reference captions.
        facts: adds fact precision, recall and F1.
        seed, resamples, level: of the bootstrap; every system and metric sees the same draws.
        meteor: None computes METEOR where Java is, False never, True demands it.
        progress: show a bar over systems.

    Raises:
        ValueError: no system; a video without caption, usable reference or true facts.
    """
    if not captions_by_system:
        raise ValueError("there is no system to evaluate: give at least one set of captions")
    bootstrap: dict[str, Any] = {"resamples": resamples, "level": level, "seed": seed}
    scores: dict[str, Scores] = {}
    counts: dict[str, dict[str, int]] = {}
    intervals: dict[str, dict[str, Interval | None]] = {}
    for system, captions in Bar(captions_by_system.items(), desc="scoring", unit="system", disable=not progress):
        try:
            scores[system], counts[system] = _score(captions, references, facts, meteor)
        except ValueError as error:
            raise ValueError(f"{system}: {error}") from error
        intervals[system] = scores[system].intervals(**bootstrap)
    baseline, *others = scores
    compared = [(system, baseline) for system in others] + [(others[-1], rival) for rival in others[:-1]]
    differences = {(one, other): scores[one].minus(scores[other], **bootstrap) for one, other in compared}
    return EvalResult(list(references), baseline, scores, intervals, differences, counts, resamples, level, seed)


def _score(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]], facts: FactSheet | None, meteor: bool | None
) -> tuple[Scores, dict[str, int]]:
    text = caption_metrics(captions, references, meteor=meteor)
    counts = {"empty_captions": text.empty_candidates}
    if facts is None:
        return text, counts
    unknown = [video for video in references if video not in facts.true]
    if unknown:
        raise ValueError(f"no true facts for {len(unknown)} of {count(len(references), 'video')} ({some(unknown)})")
    true = {video: facts.true[video] for video in references}
    found = fact_scores({video: facts.parse(captions[video]) for video in references}, true)
    counts |= {"facts_stated": found.stated, "facts_true": found.true, "facts_right": found.right}
    return text.joined(found, "fact"), counts


def read_captions(path: str | os.PathLike[str], videos: Iterable[str] | None = None) -> dict[str, str]:
    """Read JSON Lines of {"video", "caption"} (further keys are left alone).

    Args:
        path: the file.
        videos: ids that must all be there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row without the two texts, a video with two rows, or a wanted video with none.
    """
    captions: dict[str, str] = {}
    for number, row in read_jsonl(path):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("video"), str)
            or not isinstance(row.get("caption"), str)
        ):
            got = f"keys {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
            raise ValueError(f'{path}:{number}: expected {{"video": text, "caption": text}}, got {got}')
        if row["video"] in captions:
            raise ValueError(f"{path}:{number}: a second caption of {row['video']!r}; keep one row a video")
        captions[row["video"]] = row["caption"]
    missing = [video for video in videos or () if video not in captions]
    if missing:
        raise ValueError(
            f"{path}: no caption of {count(len(missing), 'video')} ({some(missing)}); run the captioning again to resume it"
        )
    return captions


def _points(value: float, interval: Interval | None) -> str:
    return f"{100 * value:.1f}" + (f"\n{100 * interval.low:.1f}–{100 * interval.high:.1f}" if interval else "")


def _plain(found: Mapping[str, Interval | Difference | None]) -> dict[str, Any]:
    return {name: None if value is None else asdict(value) for name, value in found.items()}
