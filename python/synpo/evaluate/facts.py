"""How many of the facts a caption states are true, and how many of the true ones it states.

Independent of where facts come from: a fact is any hashable, two facts are the same when they are equal. The demo world reads
them off its captions; a user's own parser or judge may produce them too.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Set
from dataclasses import dataclass

import numpy as np

from synpo.evaluate.bootstrap import Array, Metric, mean_metric
from synpo.evaluate.scores import Scores, require_all


@dataclass(frozen=True)
class FactScores(Scores):
    """`Scores` of stated facts, 0–1, and the counts behind them.

    precision, recall, F1               micro: all facts of all videos in one pot
    macro precision, recall, F1         mean over videos of each video's own
    """

    stated: int
    true: int
    right: int


def fact_scores(stated: Mapping[str, Set[Hashable]], true: Mapping[str, Set[Hashable]]) -> FactScores:
    """Precision, recall and F1 of stated facts.

    A video about which nothing was said scores 0, unless nothing is true of it either, which scores 1. In the pot nothing
    stated at all has precision 0.

    Args:
        stated: video id → facts the caption states.
        true: video id → facts that hold; decides which videos are scored.

    Raises:
        ValueError: `true` is empty, or a video has no entry in `stated` (an empty set is an entry).
    """
    if not true:
        raise ValueError("true facts are empty: there is nothing to score against")
    notes: list[str] = []
    require_all("set of stated facts", stated, true, notes)

    columns = np.asarray(
        [[len(stated[video] & facts), len(stated[video]), len(facts)] for video, facts in true.items()],
        dtype=np.float64,
    )
    silent_and_right = (columns[:, 1:] == 0).all(axis=1)
    corpus: dict[str, float] = {}
    per_video: dict[str, list[float]] = {}
    metrics: dict[str, Metric] = {}
    for name, statistic in (("precision", _precision), ("recall", _recall), ("F1", _f1)):
        metrics[name] = Metric(columns, statistic)
        each = np.where(silent_and_right, 1.0, statistic(columns))
        metrics[f"macro {name}"] = mean_metric(each)
        per_video[name] = each.tolist()
    corpus.update({name: metric.value for name, metric in metrics.items()})
    right, said, held = (int(total) for total in columns.sum(axis=0))
    return FactScores(list(true), corpus, per_video, notes, metrics, said, held, right)


def _ratio(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _precision(sums: Array) -> Array:
    return _ratio(np.asarray(sums[..., 0]), np.asarray(sums[..., 1]))


def _recall(sums: Array) -> Array:
    return _ratio(np.asarray(sums[..., 0]), np.asarray(sums[..., 2]))


def _f1(sums: Array) -> Array:
    return _ratio(np.asarray(2 * sums[..., 0]), np.asarray(sums[..., 1] + sums[..., 2]))
