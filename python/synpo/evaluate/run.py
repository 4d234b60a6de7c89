"""The data of `synpo eval`: captions of several systems + references (+ facts) → scores, intervals, differences, tables.

    captions.jsonl {"video", "caption"} ─ read_captions ─┐
    references     (benchmarks.py)      ─────────────────┴→ evaluate → EvalResult → to_json / to_table / to_charts
    answers.jsonl  (answers.py)         ─→ scores of pairs ─→ compare ─┘

The first system is the baseline, the last one what the evaluation is about: every system is compared with the first, and the
last one with every other, on the same videos, by paired bootstrap.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from synpo.evaluate.bootstrap import Difference, Interval
from synpo.evaluate.facts import fact_scores
from synpo.evaluate.metrics import caption_metrics
from synpo.evaluate.scores import Scores, count, some
from synpo.progress import Bar
from synpo.records import read_jsonl
from synpo.report.table import Chart, Table


@dataclass(frozen=True)
class Kind:
    """What is evaluated, and how its figures are shown.

    noun     what an item is called; title: its table
    units    of the figures in scores.json; note: of those in tables
    shown    metrics in tables, what tells most first; charted: those that are drawn
    natural  metrics with a unit of their own, shown with three digits; the others are shares, shown times 100
    neither  metrics of which neither more nor less is better
    """

    noun: str
    title: str
    units: str
    note: str
    shown: tuple[str, ...]
    charted: tuple[str, ...]
    natural: frozenset[str] = frozenset()
    neither: frozenset[str] = frozenset()

    def figure(self, metric: str, value: float, sign: str = "") -> str:
        """A value as it is shown; `sign` "+" shows that of a gain too."""
        digits, shown = (3, value) if metric in self.natural else (1, 100 * value)
        return f"{round(shown, digits) + 0.0:{sign}.{digits}f}"  # no -0.0

    def shown_as(self, metric: str, value: float) -> float:
        """A value in the units of charts."""
        return value if metric in self.natural else 100 * value


CAPTIONS = Kind(
    noun="video",
    title="Caption scores",
    units="CIDEr 0-10, all others 0-1; tables show them times 100",
    note="×100",
    shown=("fact F1", "fact precision", "fact recall", "CIDEr", "BLEU-4", "ROUGE-L", "METEOR"),
    charted=("fact F1", "CIDEr"),
)
ANSWERS = Kind(
    noun="pair",
    title="Preference between answers",
    units="accuracy 0-1, times 100 in tables; the others are natural logarithms, a token",
    note="accuracy ×100; the others are natural logarithms of probabilities, a token",
    shown=("accuracy", "margin", "chosen", "rejected"),
    charted=("accuracy", "margin"),
    natural=frozenset(["margin", "chosen", "rejected"]),
    neither=frozenset(["rejected"]),
)


@dataclass(frozen=True)
class FactSheet:
    """What is true of each video, and how to read facts off a caption."""

    true: Mapping[str, Set[Hashable]]
    parse: Callable[[str], Set[Hashable]]


@dataclass(frozen=True)
class EvalResult:
    """Scores of several systems on the same videos, or pairs; system → metric → figure, in the library's units (see metrics.py).

    Metrics of captions are CIDEr, BLEU-1..4, ROUGE-L, METEOR where Java is, and, with a FactSheet, "fact precision", "fact
    recall", "fact F1" and their "fact macro ..." counterparts; those of pairs are in answers.py. `differences` are those of
    (system, other): each system minus `baseline`, the first, and the last one minus each of the others.
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
    kind: Kind = CAPTIONS

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
            f"{self.kind.noun}s": len(self.videos),
            "baseline": self.baseline,
            "units": self.kind.units,
            "bootstrap": {"resamples": self.resamples, "level": self.level, "seed": self.seed},
            "systems": {
                system: {
                    "scores": scores.corpus,
                    "intervals": _plain(self.intervals[system]),
                    "minus": {other: _plain(d) for (one, other), d in self.differences.items() if one == system},
                    "counts": self.counts[system],
                    "notes": scores.notes,
                    f"per_{self.kind.noun}": {
                        video: {name: values[i] for name, values in scores.per_video.items()}
                        for i, video in enumerate(self.videos)
                    },
                }
                for system, scores in self.scores.items()
            },
        }

    def to_table(self) -> Table:
        """Systems × metrics, the interval under each score, the best of each column standing out."""
        shown = self._shown()
        rows = [
            [system, *(self._points(m, self.scores[system].corpus[m], self.intervals[system][m]) for m in shown)]
            for system in self.systems
        ]
        best = set()
        if len(rows) > 1:
            for column, metric in enumerate(shown, 1):
                if metric in self.kind.neither:
                    continue
                values = [self.scores[system].corpus[metric] for system in self.systems]
                best |= {(row, column) for row, value in enumerate(values) if value == max(values)}
        items = count(len(self.videos), self.kind.noun)
        over = f"{items} ({self.resamples:,} resamples, seed {self.seed})"
        bounded = any(interval for found in self.intervals.values() for interval in found.values())
        under = (
            f"{self.kind.note}; under each score its {self.level:.0%} bootstrap interval over {over}"
            if bounded
            else f"{self.kind.note}; {items}"
        )
        return Table(self.kind.title, ["system", *shown], rows, best=best, notes=[under, *self._notes()])

    def to_difference_table(self) -> Table | None:
        """Systems minus systems; differences whose interval leaves out 0 stand out. None where there is none."""
        shown = [m for m in self._shown() if any(found[m] is not None for found in self.differences.values())]
        if not shown:  # a single system, or a single video
            return None
        rows: list[list[str]] = []
        better, worse = set(), set()
        for r, ((system, other), found) in enumerate(self.differences.items()):
            row = [f"{system} − {other}"]
            for c, metric in enumerate(shown, 1):
                d = found[metric]
                if d is None:
                    row.append("–")
                    continue
                show = partial(self.kind.figure, metric)
                row.append(f"{show(d.value, '+')}\n{show(d.low)}…{show(d.high)}")
                if metric in self.kind.neither:
                    continue
                if d.low > 0:
                    better.add((r, c))
                elif d.high < 0:
                    worse.add((r, c))
            rows.append(row)
        note = (
            f"{self.kind.note}; below, the {self.level:.0%} interval of a paired bootstrap over {self.kind.noun}s; in colour "
            "where it leaves out 0"
        )
        return Table("Paired differences", ["", *shown], rows, good=better, bad=worse, notes=[note])

    def to_tables(self) -> list[Table]:
        """Scores and, where there are any, differences."""
        return [self.to_table(), *filter(None, [self.to_difference_table()])]

    def to_charts(self) -> list[Chart]:
        """The differences in the main metric, and those metrics to be drawn that have intervals."""
        charts = []
        gaps = [(f"{one} − {other}", found[self.main]) for (one, other), found in self.differences.items()]
        as_shown = partial(self.kind.shown_as, self.main)
        differences = [
            (name, as_shown(d.value), Interval(as_shown(d.low), as_shown(d.high))) for name, d in gaps if d is not None
        ]
        if differences:
            charts.append(Chart(f"{self.main}, difference", [*differences], zero=True))
        for metric in self._shown():
            if metric not in self.kind.charted or self.intervals[self.baseline][metric] is None:
                continue
            rows, as_shown = [], partial(self.kind.shown_as, metric)
            for system in self.systems:
                interval = self.intervals[system][metric]
                around = interval and Interval(as_shown(interval.low), as_shown(interval.high))
                rows.append((system, as_shown(self.scores[system].corpus[metric]), around))
            charts.append(Chart(metric, rows))
        return charts

    def changes(self, system: str, metric: str | None = None) -> list[tuple[str, float]]:
        """(video, score of `system` minus the baseline's) in a metric, the main one by default, the largest gain first."""
        metric = metric or self.main
        gain = np.subtract(self.scores[system].per_video[metric], self.scores[self.baseline].per_video[metric])
        return [(self.videos[i], float(gain[i])) for i in np.argsort(-gain, kind="stable")]

    def _shown(self) -> list[str]:
        return [m for m in self.kind.shown if all(m in scores.corpus for scores in self.scores.values())]

    def _points(self, metric: str, value: float, interval: Interval | None) -> str:
        show = partial(self.kind.figure, metric)
        between = "…" if metric in self.kind.natural else "–"
        return show(value) + (f"\n{show(interval.low)}{between}{show(interval.high)}" if interval else "")

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
    scores: dict[str, Scores] = {}
    counts: dict[str, dict[str, int]] = {}
    for system, captions in Bar(captions_by_system.items(), desc="scoring", unit="system", disable=not progress):
        try:
            scores[system], counts[system] = _score(captions, references, facts, meteor)
        except ValueError as error:
            raise ValueError(f"{system}: {error}") from error
    return compare(scores, counts, CAPTIONS, seed=seed, resamples=resamples, level=level)


def compare(
    scores: Mapping[str, Scores],
    counts: Mapping[str, dict[str, int]],
    kind: Kind,
    *,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> EvalResult:
    """The result of systems' scores on the same items: with intervals and paired differences. The first is the baseline."""
    bootstrap: dict[str, Any] = {"resamples": resamples, "level": level, "seed": seed}
    intervals = {system: found.intervals(**bootstrap) for system, found in scores.items()}
    baseline, *others = scores
    compared = [(system, baseline) for system in others] + [(others[-1], rival) for rival in others[:-1]]
    differences = {(one, other): scores[one].minus(scores[other], **bootstrap) for one, other in compared}
    items = scores[baseline].videos
    return EvalResult(items, baseline, dict(scores), intervals, differences, dict(counts), resamples, level, seed, kind)


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


def _plain(found: Mapping[str, Interval | Difference | None]) -> dict[str, Any]:
    return {name: None if value is None else asdict(value) for name, value in found.items()}
