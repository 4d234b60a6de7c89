"""A judge that needs no language model: it counts, over the whole pool of captions, what goes with what.

Witnesses. A caption makes claims: ordered pairs of neighbouring content words of a sentence, "a red circle moves left" →
(red, circle), (red, mov), (circle, mov), (circle, left), (mov, left). The clip captions and the other candidates of a video
are witnesses to a candidate's claims. Two wordings of one thing share no claim, so how far claim e speaks for claim c is
learnt from how often different captions of the same video make the two:

    t(c | e)  = (captions with c | another caption of the video has e), shrunk by `SHRINK` towards p(c), the share overall
    r(c | e)  = clamp((t(c | e) − p(c)) / (t(c | c) − p(c)), 0, 1),  then the smaller of r(c | e) and r(e | c);  r(c | c) = 1
    s_j(c)    = max over the claims e of witness j of r(c | e)
    s(c)      = `CLIPS` · max over clips of s_j(c) + (1 − `CLIPS`) · mean over the other candidates of s_j(c)

Scores. Claims weigh idf(c) = log((V + 1) / videos with c), as in CIDEr (arXiv 1411.5726); C are the candidate's claims, W those
of its witnesses, s_own(c) how far the candidate itself makes c.

    precision    = Σ_C idf · s / Σ_C idf
    recall       = Σ_W idf · s · s_own / Σ_W idf · s
    factuality   ∝ 2 P R / (P + R)
    consistency  ∝ mean over the other candidates of the tf-idf cosine of n-grams, mean over n = 1 … 4
    fluency      = 5 · form · (1 − `LIKELY` + `LIKELY` · likelihood)
      form         = share of sentences that are new · share of words not in a loop · (0.8 if no full stop ends the text)
      likelihood   = mean of clamp(percentile / `USUAL`, 0, 1) of two figures among the pool's: the mean token log-probability
                     the captioner gave, and the mean word log-probability under a bigram model of the other videos' captions;
                     only the least likely captions lose by it, since beyond that likelihood favours the short and general

∝: stretched so that the pool's 2nd percentile and its best become the ends of the scale, but no raw span below `MIN_SPAN` is
stretched to the whole scale, so that a pool of equals is not torn apart.

A clip caption that is wrong in the same way as the candidates cannot be found out by counting: that takes another model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from synpo.pipeline.judge.base import SCALES, Failure, Task, Verdict
from synpo.pipeline.judge.ngrams import (
    Bigrams,
    Claim,
    claims_of,
    document_frequency,
    grams_of,
    mean_similarity,
    words_of,
)
from synpo.records import record_id

VERSION = 1
SHRINK = 5.0
CLIPS = 0.3
LIKELY = 0.4
USUAL = 0.1
MIN_SPAN = 0.25
KNOWN_CLAIMS = 2000  # the commonest claims whose company is learnt; rarer ones speak only for themselves


def form(text: str) -> float:
    """How well formed a text is, 0 to 1: new sentences, no loops ("a dog and a dog and"), a full stop at its end."""
    words = words_of(text)
    if not words:
        return 0.0
    sentences = [tuple(words_of(x)) for x in re.split(r"[.!?;\n]", text) if words_of(x)]
    looped: set[int] = set()
    for n in range(1, 9):
        for i in range(n, len(words) - n + 1):
            if words[i : i + n] == words[i - n : i]:
                looped |= set(range(i, i + n))
    new = len(set(sentences)) / len(sentences)
    ended = 1.0 if text.rstrip("\"'”’) ").endswith((".", "!", "?")) else 0.8
    return new * (1 - len(looped) / len(words)) * ended


class _Scale:
    """Raw figures → [0, 1] by the pool's 2nd percentile and its best."""

    def __init__(self, raw: np.ndarray) -> None:
        low, high = np.quantile(raw, 0.02), raw.max()
        spare = max(MIN_SPAN - (high - low), 0.0) / 2
        self.low, self.high = low - spare, high + spare

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        return np.clip((raw - self.low) / (self.high - self.low), 0, 1)


class OfflineJudge:
    """Scores by the statistics of the pool it was prepared with, so `identity` names that pool.

    It never fails: a candidate without a word scores 0.
    """

    name = "offline"
    workers = 1

    def __init__(self) -> None:
        self.order_totals: dict[Task, list[list[float]]] = {}  # one order is as good as another
        self._pool: dict[Task, tuple[np.ndarray, np.ndarray]] = {}  # task → unscaled figures
        self.identity = f"offline/{VERSION}"

    def check(self) -> None:
        """It needs nothing."""

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Learn from all captions of the pool. Raises ValueError if there are none."""
        if not any(t.candidates for t in tasks):
            raise ValueError("the offline judge needs at least one candidate to learn from")
        self.identity = f"offline/{VERSION}/{record_id(*tasks)}"
        texts = [(*t.evidence, *t.candidates) for t in tasks]
        claims = document_frequency({c for text in video for c in claims_of(text)} for video in texts)
        self._idf = {c: math.log((len(tasks) + 1) / n) for c, n in claims.items()}
        grams = document_frequency({g for text in video for g in grams_of(text)} for video in texts)
        self._gram_idf = {g: math.log((len(tasks) + 1) / n) for g, n in grams.items()}
        self._bigrams = Bigrams(text for t in tasks for text in t.candidates)
        shared = sorted((c for c, n in claims.items() if n > 1), key=lambda c: (-claims[c], c))
        self._learn_company(texts, shared[:KNOWN_CLAIMS])
        self._pool = {t: self._raw(t) for t in tasks}
        self._factuality = _Scale(np.concatenate([facts for facts, _ in self._pool.values()]))
        self._consistency = _Scale(np.concatenate([agreement for _, agreement in self._pool.values()]))
        self._model_logps = np.sort(np.concatenate([t.logps for t in tasks]))
        self._word_logps = np.sort(np.concatenate([self._logps(t) for t in tasks]))

    def score(self, task: Task) -> list[Verdict | Failure]:
        if task not in self._pool:
            raise ValueError(f"the offline judge was not prepared with the candidates of {task.video}")
        facts, agreement = self._pool[task]
        factuality, consistency = self._factuality(facts), self._consistency(agreement)
        words, tokens = self._logps(task), task.logps
        verdicts: list[Verdict | Failure] = []
        for i, text in enumerate(task.candidates):
            likelihood = (_usual(self._model_logps, tokens[i]) + _usual(self._word_logps, words[i])) / 2
            fluency = form(text) * (1 - LIKELY + LIKELY * likelihood)
            verdicts.append(
                Verdict(
                    SCALES["factuality"] * float(factuality[i]),
                    SCALES["fluency"] * fluency,
                    SCALES["consistency"] * float(consistency[i]),
                )
            )
        return verdicts

    def stop(self) -> None:
        """Nothing is asked."""

    def _logps(self, task: Task) -> list[float]:
        return self._bigrams.logps(task.candidates, without=Bigrams(task.candidates))

    def _learn_company(self, texts: Sequence[Sequence[str]], known: Sequence[Claim]) -> None:
        """r(c | e) for all known claims, (C, C)."""
        self._known = {c: i for i, c in enumerate(known)}
        together = np.zeros((len(known), len(known)), np.float32)  # [e, c]: e in one caption, c in another of the video
        others = np.zeros(len(known), np.float32)  # captions beside each one that has e
        having = np.zeros(len(known), np.float32)
        for video in texts:
            rows = [{self._known[c] for c in claims_of(t) if c in self._known} for t in video]
            local = sorted(set().union(*rows))
            made = np.array([[i in row for i in local] for row in rows], np.float32)  # (captions, local claims)
            count = made.sum(0)
            together[np.ix_(local, local)] += np.outer(count, count) - made.T @ made
            others[local] += count * (len(rows) - 1)
            having[local] += count
        share = having / max(sum(map(len, texts)), 1)
        given = (together + SHRINK * share) / (others + SHRINK)[:, None]
        lift = (given - share) / np.maximum(np.diag(given) - share, 1e-2)
        company = np.clip(np.minimum(lift, lift.T), 0, 1)
        np.fill_diagonal(company, 1)
        self._company = company

    def _raw(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """Unscaled factuality and consistency of each candidate: (N,), (N,)."""
        rows = [claims_of(t) for t in (*task.evidence, *task.candidates)]
        local = sorted(set().union(*rows))
        agreement = mean_similarity(task.candidates, self._gram_idf)
        if not local:
            return np.zeros(len(task.candidates)), agreement
        made = np.array([[c in row for c in local] for row in rows])  # (captions, L)
        speaks = np.eye(len(local), dtype=np.float32)  # r between the claims of this video, (L, L)
        at = [i for i, c in enumerate(local) if c in self._known]
        place = [self._known[local[i]] for i in at]
        speaks[np.ix_(at, at)] = self._company[np.ix_(place, place)]
        idf = np.array([self._idf[c] for c in local])
        support = np.stack(
            [speaks[m].max(0) if m.any() else np.zeros(len(local)) for m in made]
        )  # s_j(c), (captions, L)
        clips, candidates = support[: len(task.evidence)], support[len(task.evidence) :]
        seen = clips.max(0) if len(clips) else np.zeros(len(local))
        facts = np.zeros(len(candidates))
        for i, own in enumerate(candidates):
            mine = made[len(task.evidence) + i]
            by_others = (candidates.sum(0) - own) / max(len(candidates) - 1, 1)
            weight = idf * (CLIPS * seen + (1 - CLIPS) * by_others)
            theirs = np.delete(made, len(task.evidence) + i, axis=0).any(0)
            precision = weight[mine].sum() / max(idf[mine].sum(), 1e-9)
            recall = (weight * own)[theirs].sum() / max(weight[theirs].sum(), 1e-9)
            facts[i] = 2 * precision * recall / max(precision + recall, 1e-9)
        return facts, agreement


def _usual(pool: np.ndarray, value: float) -> float:
    """clamp(percentile of `value` in the sorted pool (M,) / USUAL, 0, 1); ties count half."""
    below = (np.searchsorted(pool, value, "left") + np.searchsorted(pool, value, "right")) / 2
    return min(float(below) / (USUAL * len(pool)), 1.0)
