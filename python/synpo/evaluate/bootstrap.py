"""Bootstrap over videos: how far a score, or the difference of two systems, would move had other videos been drawn.

A metric here is a function of column sums over videos: the mean of per-video CIDEr is Σ score / Σ 1, micro F1 is a function
of Σ right, Σ stated and Σ true, corpus BLEU one of Σ matches, Σ n-grams and Σ lengths. Drawing videos with replacement is then
one small matrix product, `counts (R, N) @ columns (N, K)`, and the intervals are those of the corpus score itself.

Source: Efron & Tibshirani 1993 (percentile interval); Koehn, EMNLP 2004 (paired bootstrap for the difference of systems).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A corpus score and what it is made of: `columns` (N, K), one row a video; `statistic` (..., K) sums → (...) scores."""

    columns: Array
    statistic: Callable[[Array], Array]

    @property
    def value(self) -> float:
        return float(self.statistic(self.columns.sum(axis=0)))


@dataclass(frozen=True)
class Interval:
    """Percentile bootstrap interval, in the units of the metric."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Score of a system minus the score of the baseline on the same videos.

    `better` is the share of resamples in which the system is strictly ahead, a tie counting one half: 0.5 means that
    the data cannot tell them apart, above 0.975 or below 0.025 that they can (two-sided, 5 %).
    """

    value: float
    low: float
    high: float
    better: float


def mean_metric(scores: Array) -> Metric:
    """The mean over videos of per-video `scores` (N,)."""
    return Metric(np.stack([scores, np.ones_like(scores)], axis=1), lambda sums: sums[..., 0] / sums[..., 1])


def bootstrap_interval(metric: Metric, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Interval | None:
    """Interval of the corpus score; None for fewer than two videos, which say nothing about how videos vary."""
    if len(metric.columns) < 2:
        return None
    scores = metric.statistic(_resampled_sums(metric.columns, resamples, seed))
    low, high = np.quantile(scores, _tails(level))
    return Interval(float(low), float(high))


def paired_bootstrap(
    system: Metric, baseline: Metric, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Difference | None:
    """Difference of two systems, each resample drawing the same videos for both; row i of both must be the same video.

    Returns None for fewer than two videos. Raises ValueError when the two have different numbers of videos.
    """
    if len(system.columns) != len(baseline.columns):
        raise ValueError(
            f"a paired bootstrap needs the same videos for both systems, got {len(system.columns)} and "
            f"{len(baseline.columns)}; score both on the videos they share"
        )
    if len(system.columns) < 2:
        return None
    sums = _resampled_sums(np.concatenate([system.columns, baseline.columns], axis=1), resamples, seed)
    split = system.columns.shape[1]
    differences = system.statistic(sums[:, :split]) - baseline.statistic(sums[:, split:])
    low, high = np.quantile(differences, _tails(level))
    better = float(np.mean(differences > 0) + 0.5 * np.mean(differences == 0))
    return Difference(system.value - baseline.value, float(low), float(high), better)


def _tails(level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(
            f"level is the share of resamples inside the interval, between 0 and 1 (say 0.95), got {level}"
        )
    return (1 - level) / 2, (1 + level) / 2


def _resampled_sums(columns: Array, resamples: int, seed: int) -> Array:
    """Column sums of `resamples` draws of N rows with replacement, (R, K); in blocks, so memory stays at 64·N."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    rng = np.random.default_rng(seed)
    n = len(columns)
    blocks = []
    for start in range(0, resamples, 64):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(64, resamples - start))
        blocks.append(counts @ columns)
    return np.concatenate(blocks)
