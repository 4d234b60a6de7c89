"""How close captions are to reference captions: CIDEr, BLEU-1..4, ROUGE-L and, where Java is installed, METEOR.

The scores are pycocoevalcap's (the code behind published VATEX and MSR-VTT figures; its CIDEr is CIDEr-D) on the words of
evaluate/ptb.py. They are
kept in that library's units: CIDEr 0–10, the others 0–1; papers print both ×100, and so do our tables.

Per-video scores come with every corpus score, and bootstrap intervals over videos with all but METEOR, whose corpus score
is computed inside its Java program. CIDEr's n-gram weights (IDF) are those of the whole reference set in every resample.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge

from synpo.evaluate.bootstrap import Array, Metric, mean_metric
from synpo.evaluate.ptb import tokenize
from synpo.evaluate.scores import Scores, count, require_all, some

Words = dict[str, list[str]]
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"
)  # Thai … Chinese, Japanese


@dataclass(frozen=True)
class CaptionScores(Scores):
    """`Scores` of captions; `empty_candidates` of them had not a single word (scored 0, and counted)."""

    empty_candidates: int


def caption_metrics(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], *, meteor: bool | None = None
) -> CaptionScores:
    """Score one caption a video against the references of that video.

    Args:
        candidates: video id → caption; a blank caption is allowed and scores 0.
        references: video id → reference captions; decides which videos are scored.
        meteor: None computes METEOR where a `java` is on the PATH and says so in `notes` where none is.

    Raises:
        ValueError: no references, a video without a candidate or without a single reference with words in it.
    """
    if not references:
        raise ValueError("references are empty: there is nothing to score against")
    notes: list[str] = []
    require_all("candidate caption", candidates, references, notes)
    truth, guess = _reference_words(references, notes), {video: [_words(candidates[video])] for video in references}
    empty = [video for video in references if not guess[video][0]]
    if empty:
        notes.append(f"{count(len(empty), 'empty caption')}, scored 0 ({some(empty)})")
    spaceless = [video for video, captions in references.items() if any(map(_SPACELESS.search, captions))]
    if spaceless:
        notes.append(
            f"{count(len(spaceless), 'video')} with references in a script without spaces ({some(spaceless)}): words are told "
            "apart by spaces, so that a clause counts as one word; cut them into words before"
        )
    if len(references) == 1:
        notes.append("CIDEr weighs words by how few videos use them: with a single video every weight, and CIDEr, is 0")

    java = _start_meteor(meteor, notes)
    corpus: dict[str, float] = {}
    per_video: dict[str, list[float]] = {}
    metrics: dict[str, Metric] = {}
    for name, scorer in (("CIDEr", Cider()), ("ROUGE-L", Rouge())):
        value, scores = scorer.compute_score(truth, guess)
        corpus[name], per_video[name] = float(value), [float(s) for s in scores]
        metrics[name] = mean_metric(np.asarray(scores, dtype=np.float64))
    _add_bleu(truth, guess, corpus, per_video, metrics)
    if java is not None:
        _add_meteor(java, truth, guess, bool(meteor), corpus, per_video, notes)
    return CaptionScores(list(references), corpus, per_video, notes, metrics, len(empty))


def _words(caption: str) -> str:
    return " ".join(tokenize(caption))


def _reference_words(references: Mapping[str, Sequence[str]], notes: list[str]) -> Words:
    words: Words = {}
    blank = 0
    for video, captions in references.items():
        if isinstance(captions, str):
            raise ValueError(f"references of {video!r} should be a list of captions, got one string")
        tokenized = [_words(caption) for caption in captions]
        words[video] = [caption for caption in tokenized if caption]
        blank += len(captions) - len(words[video])
        if not words[video]:
            raise ValueError(f"{video!r} has no reference caption with a word in it ({len(captions)} given)")
    if blank:
        notes.append(f"{count(blank, 'blank reference caption')} left out")
    return words


def _add_bleu(
    truth: Words,
    guess: Words,
    corpus: dict[str, float],
    per_video: dict[str, list[float]],
    metrics: dict[str, Metric],
) -> None:
    scorer = BleuScorer(n=4)
    for video, captions in truth.items():
        scorer += (guess[video][0], captions)
    values, scores = scorer.compute_score(option="closest")
    rows = [
        [
            c["testlen"],
            min((abs(length - c["testlen"]), length) for length in c["reflen"])[1],
            *c["correct"],
            *c["guess"],
        ]
        for c in scorer.ctest
    ]
    columns = np.asarray(rows, dtype=np.float64)
    for order in range(1, 5):
        name = f"BLEU-{order}"
        corpus[name], per_video[name] = float(values[order - 1]), [float(s) for s in scores[order - 1]]
        metrics[name] = Metric(columns, partial(corpus_bleu, order=order))


def corpus_bleu(sums: Array, order: int) -> Array:
    """Corpus BLEU (Papineni et al., ACL 2002) from sums (..., 10): caption length, closest reference length, matches of
    1..4-grams, 1..4-grams. The small constants are pycocoevalcap's, so that the score is too."""
    length, reference = sums[..., 0], sums[..., 1]
    precision = (sums[..., 2 : 2 + order] + 1e-15) / (sums[..., 6 : 6 + order] + 1e-9)
    ratio = (length + 1e-15) / (reference + 1e-9)
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    result: Array = precision.prod(axis=-1) ** (1 / order) * brevity
    return result


@cache
def _meteor() -> Meteor:
    """One Java program for all systems: it takes seven seconds to load its paraphrase table."""
    return Meteor()


def _start_meteor(wanted: bool | None, notes: list[str]) -> Meteor | None:
    """The Java program, which loads while the other metrics are computed; None where there is none, with a note."""
    if wanted is False:
        notes.append("METEOR: not computed (turned off)")
        return None
    if shutil.which("java") is None:
        if wanted:
            raise ValueError("METEOR was asked for and needs Java: install a Java runtime, or leave METEOR out")
        notes.append("METEOR: not computed (no java)")
        return None
    return _meteor()


def _add_meteor(
    scorer: Meteor,
    truth: Words,
    guess: Words,
    wanted: bool,
    corpus: dict[str, float],
    per_video: dict[str, list[float]],
    notes: list[str],
) -> None:
    try:
        value, scores = scorer.compute_score(truth, guess)
    except (ValueError, OSError) as error:  # the Java program died: its pipe is closed, or its answer is empty
        _meteor.cache_clear()
        reason = _stop(scorer) or str(error)
        if wanted:
            raise RuntimeError(f"METEOR was asked for and its Java program failed: {reason}") from error
        notes.append(f"METEOR: not computed (its Java program failed: {reason})")
        return
    corpus["METEOR"], per_video["METEOR"] = float(value), [float(s) for s in scores]


def _stop(scorer: Meteor) -> str:
    """End a Java program that failed, and return the last line it wrote as its error.

    The library leaves its lock held after an error and waits for it when the scorer is collected: it is released here.
    """
    scorer.meteor_p.kill()
    with contextlib.suppress(BrokenPipeError):
        scorer.meteor_p.stdin.close()
    if scorer.lock.locked():
        scorer.lock.release()
    said: list[str] = scorer.meteor_p.stderr.read().decode(errors="replace").strip().splitlines()
    return said[-1] if said else ""
