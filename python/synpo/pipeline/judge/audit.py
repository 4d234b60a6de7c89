"""Is a judge to be trusted? How far two sets of scores rank the candidates of the same videos alike.

    spearman   rank correlation within a video, mean over videos
    accuracy   share of candidate pairs of one video that both order the same way, of those neither ties
    kappa      Cohen's κ of the verdicts "first, second, or neither is better" over the same pairs: agreement beyond chance

Raw agreement overstates a judge, κ does not; scores that follow the length of a caption are a known bias of judges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from synpo.pipeline.judge.base import Judge, Task, Verdict
from synpo.pipeline.judge.ngrams import words_of
from synpo.pipeline.judge.offline import OfflineJudge
from synpo.records import Score

TIE = 0.25  # totals nearer than this count as a tie


@dataclass(frozen=True)
class Agreement:
    """One comparison over `count` candidates; a figure that cannot be had (all ties) is None."""

    name: str
    count: int
    spearman: float | None
    accuracy: float | None
    kappa: float | None


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, ties sharing their mean: (N,)."""
    _, inverse, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation; None where either is constant."""
    x, y = ranks(a), ranks(b)
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def compare(name: str, a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], tie: float = TIE) -> Agreement:
    """Compare two sets of scores, video by video, candidate by candidate."""
    correlations = [r for x, y in zip(a, b) if (r := spearman(x, y)) is not None]
    verdicts: Counter[tuple[int, int]] = Counter()
    for x, y in zip(a, b):
        for i, j in combinations(range(len(x)), 2):
            verdicts[_better(x[i] - x[j], tie), _better(y[i] - y[j], tie)] += 1
    clear = sum(n for (p, q), n in verdicts.items() if p and q)
    same = sum(n for (p, q), n in verdicts.items() if p and p == q)
    return Agreement(
        name,
        sum(len(x) for x in a),
        float(np.mean(correlations)) if correlations else None,
        same / clear if clear else None,
        kappa(verdicts),
    )


def _better(difference: float, tie: float) -> int:
    return 0 if abs(difference) < tie else (1 if difference > 0 else -1)


def kappa(verdicts: Counter[tuple[int, int]]) -> float | None:
    """Cohen's κ of a contingency table {(verdict of a, verdict of b): count}; None where chance alone agrees fully."""
    total = sum(verdicts.values())
    if not total:
        return None
    left: Counter[int] = Counter()
    right: Counter[int] = Counter()
    for (p, q), n in verdicts.items():
        left[p] += n
        right[q] += n
    agreed = sum(n for (p, q), n in verdicts.items() if p == q) / total
    chance = sum(left[p] * right[p] for p in left) / total**2
    return (agreed - chance) / (1 - chance) if chance < 1 else None


def audit(judge: Judge, judged: Sequence[tuple[Task, Sequence[Score]]]) -> list[Agreement]:
    """What can be said of a judge from what it said: against length, against the offline judge, and order against order."""
    rows = [(t, [s.total for s in scores if s.total is not None]) for t, scores in judged]
    complete = [(t, totals) for t, totals in rows if len(totals) == len(t.candidates)]
    if not complete:
        return []
    totals = [x for _, x in complete]
    lengths = [[float(len(words_of(c))) for c in t.candidates] for t, _ in complete]
    found = [compare(f"{judge.name} and the length of the caption", totals, lengths)]
    if orders := [x for t, _ in complete if len(x := judge.order_totals.get(t, [])) > 1]:
        found.append(
            compare(f"{judge.name} and itself, order reversed", [x[0] for x in orders], [x[1] for x in orders])
        )
    if judge.name != OfflineJudge.name:
        other = OfflineJudge()
        other.prepare([t for t, _ in complete])
        found.append(
            compare(
                f"{judge.name} and offline",
                totals,
                [[v.total if isinstance(v, Verdict) else 0.0 for v in other.score(t)] for t, _ in complete],
            )
        )
    return found
