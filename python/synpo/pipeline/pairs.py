"""Scores into preference pairs: the best candidate of a video is chosen, the worst rejected, if they are far enough apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from synpo.records import Caption, Pair, Score, record_id


def make_pairs(
    candidates: Mapping[str, Sequence[Caption]], scores: Mapping[str, Score], prompt: str, margin: float
) -> tuple[list[Pair], Counter[str]]:
    """At most one pair a video.

    A failed score is never ranked, an empty caption is neither chosen nor rejected, and ties go to the earlier candidate for
    the chosen side and to the later for the rejected.

    Args:
        candidates: video → its candidates.
        scores: caption id → its score.
        prompt: the question the candidates answer.
        margin: least difference of totals; equal totals prefer nothing, even with 0.

    Returns:
        The pairs, videos in the order given, and counts of what was left out: captions without words ("empty") or without
        a score ("failed"); videos whose best and worst are closer than the margin ("margin"), whose candidates all say the
        same ("alike"), or that have fewer than two candidates with a score ("few").
    """
    pairs: list[Pair] = []
    counts: Counter[str] = Counter()
    for video, captions in candidates.items():
        ranked: list[tuple[float, int, Caption]] = []
        for caption in captions:
            score = scores.get(caption.id)
            if not caption.text.strip():
                counts["empty"] += 1
            elif score is None or score.total is None:
                counts["failed"] += 1
            else:
                ranked.append((score.total, -caption.index, caption))
        if len(ranked) < 2:
            counts["few"] += 1
            continue
        (high, _, best), (low, _, worst) = max(ranked, key=_place), min(ranked, key=_place)
        if len({c.text.strip() for _, _, c in ranked}) == 1:
            counts["alike"] += 1
        elif high - low < margin or high == low or best.text.strip() == worst.text.strip():
            counts["margin"] += 1
        else:
            key = record_id("pair", prompt, best.id, worst.id)
            pairs.append(Pair(key, video, prompt, best.text, worst.text, high, low))
    return pairs, counts


def _place(entry: tuple[float, int, Caption]) -> tuple[float, int]:
    return entry[:2]
