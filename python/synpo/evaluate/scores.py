"""What every scorer returns: corpus scores, one score a video, and intervals and paired differences from the same draw.

Scores live in bootstrap.py's terms, so a caption metric and a fact score are resampled, compared and tabulated alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from synpo.evaluate.bootstrap import Difference, Interval, Metric, bootstrap_interval, paired_bootstrap


@dataclass(frozen=True)
class Scores:
    """Scores of one system.

    videos     ids in the order of the references
    corpus     metric → score of the whole set
    per_video  metric → one score a video, in the order of `videos`
    notes      in words, what was left out or must be read with care
    metrics    metric → what its bootstrap needs; a metric missing here has no interval
    """

    videos: list[str]
    corpus: dict[str, float]
    per_video: dict[str, list[float]]
    notes: list[str]
    metrics: dict[str, Metric]

    def intervals(self, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> dict[str, Interval | None]:
        """Bootstrap interval of every metric; None where there is none (METEOR, or a single video)."""
        found = {
            name: bootstrap_interval(metric, resamples=resamples, level=level, seed=seed)
            for name, metric in self.metrics.items()
        }
        return {name: found.get(name) for name in self.corpus}

    def minus(
        self, baseline: Scores, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
    ) -> dict[str, Difference | None]:
        """Paired difference of every metric; None where there is none.

        Raises:
            ValueError: the two systems were not scored on the same videos, in the same order of references.
        """
        if self.videos != baseline.videos:
            raise ValueError(
                f"two systems can be compared only on the same videos in the same order; got {count(len(self.videos), 'video')} "
                f"and {count(len(baseline.videos), 'video')}: score both against the same references"
            )
        found = {
            name: paired_bootstrap(metric, baseline.metrics[name], resamples=resamples, level=level, seed=seed)
            for name, metric in self.metrics.items()
        }
        return {name: found.get(name) for name in self.corpus}

    def joined(self, other: Scores, prefix: str) -> Scores:
        """Both sets of metrics on the same videos, the other's named "<prefix> <metric>"."""
        return Scores(
            self.videos,
            {**self.corpus, **{f"{prefix} {name}": value for name, value in other.corpus.items()}},
            {**self.per_video, **{f"{prefix} {name}": values for name, values in other.per_video.items()}},
            [*self.notes, *other.notes],
            {**self.metrics, **{f"{prefix} {name}": metric for name, metric in other.metrics.items()}},
        )


def require_all(what: str, given: Mapping[str, object], wanted: Mapping[str, object], notes: list[str]) -> None:
    """Every wanted video must be in `given` (ValueError); a given video that nobody wants becomes a note."""
    missing = [video for video in wanted if video not in given]
    if missing:
        raise ValueError(
            f"no {what} for {len(missing)} of {count(len(wanted), 'video')} ({some(missing)}); "
            "caption them, or leave them out of the references"
        )
    extra = [video for video in given if video not in wanted]
    if extra:
        notes.append(f"{count(len(extra), what)} without references not scored ({some(extra)})")


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def some(ids: Iterable[str]) -> str:
    """The first three ids, quoted."""
    ids = list(ids)
    shown: Sequence[str] = [repr(i) for i in ids[:3]]
    return ", ".join(shown) + (", ..." if len(ids) > 3 else "")
