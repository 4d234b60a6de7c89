"""Caption metrics: against hand-computed values, an independent implementation of CIDEr-D, and the library's own BLEU."""

import math
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from pycocoevalcap.bleu.bleu import Bleu

from synpo.evaluate import metrics
from synpo.evaluate.metrics import CaptionScores, caption_metrics
from synpo.evaluate.ptb import tokenize
from synpo.evaluate.run import evaluate


def score(candidates: dict[str, str], references: dict[str, list[str]]) -> CaptionScores:
    return caption_metrics(candidates, references, meteor=False)


def cider_d(candidates: dict[str, str], references: dict[str, list[str]]) -> list[float]:
    """CIDEr-D as its paper defines it (arXiv 1411.5726, section 8), from scratch: sigma 6, clipping, times 10."""

    def grams(caption: str, n: int) -> Counter[tuple[str, ...]]:
        words = tokenize(caption)
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    results = []
    for video, captions in references.items():
        total = 0.0
        for n in range(1, 5):
            holding = Counter(g for refs in references.values() for g in set().union(*(grams(r, n) for r in refs)))
            idf = {g: math.log(len(references) / max(1, holding[g])) for g in holding}

            def weigh(
                caption: str, n: int = n, idf: dict[tuple[str, ...], float] = idf
            ) -> dict[tuple[str, ...], float]:
                return {g: k * idf.get(g, math.log(len(references))) for g, k in grams(caption, n).items()}

            mine = weigh(candidates[video])
            for reference in captions:
                theirs = weigh(reference)
                norm = math.hypot(*mine.values()) * math.hypot(*theirs.values())
                if norm == 0:
                    continue
                dot = sum(min(w, theirs.get(g, 0.0)) * theirs.get(g, 0.0) for g, w in mine.items())
                gap = len(tokenize(candidates[video])) - len(tokenize(reference))
                total += dot / norm * math.exp(-(gap**2) / (2 * 6.0**2)) / len(captions)
        results.append(10 * total / 4)
    return results


def test_cider_computed_by_hand() -> None:
    """Two videos, every word in one of them: all weights are ln 2.

    a  the caption is the reference: similarity 1 for words and pairs, 0 for the longer n-grams there are none of:
       10 (1 + 1 + 0 + 0) / 4 = 5
    b  one word of two shared: 10 (1/2 + 0 + 0 + 0) / 4 = 1.25
    """
    scores = score({"a": "Red dog.", "b": "blue bird"}, {"a": ["a red dog".removeprefix("a ")], "b": ["blue cat"]})
    assert scores.per_video["CIDEr"] == pytest.approx([5.0, 1.25])
    assert scores.corpus["CIDEr"] == pytest.approx(3.125)


def test_cider_equals_an_independent_implementation() -> None:
    rng = random.Random(0)
    words = ["a", "red", "ball", "rolls", "left", "man's", "dog", "runs", "and", "jumps", "quickly,"]

    def caption() -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, 14))) + "."

    references = {f"v{i}": [caption() for _ in range(rng.randint(1, 5))] for i in range(12)}
    candidates = {video: caption() for video in references}
    assert score(candidates, references).per_video["CIDEr"] == pytest.approx(cider_d(candidates, references), rel=1e-9)


def test_cider_equals_an_independent_implementation_on_real_captions(real_captions: list[str]) -> None:
    references = {str(i): real_captions[10 * i + 1 : 10 * i + 10] for i in range(5)}
    candidates = {str(i): real_captions[10 * i] for i in range(5)}
    scores = score(candidates, references)
    assert scores.per_video["CIDEr"] == pytest.approx(cider_d(candidates, references), rel=1e-9)
    assert 0 < scores.corpus["CIDEr"] < 10


def test_bleu_and_rouge_computed_by_hand() -> None:
    """Caption "a red dog runs" against "a red cat runs": 3 of 4 words, 1 of 3 pairs, no triple; longest common part 3 of 4."""
    scores = score({"a": "A red dog runs."}, {"a": ["a red cat runs"]})
    assert scores.corpus["BLEU-1"] == pytest.approx(3 / 4)
    assert scores.corpus["BLEU-2"] == pytest.approx(math.sqrt(3 / 4 * 1 / 3))
    assert scores.corpus["BLEU-3"] == pytest.approx(0, abs=1e-4)
    assert scores.corpus["ROUGE-L"] == pytest.approx(3 / 4)
    short = score({"a": "red dog"}, {"a": ["a red dog runs"]})
    assert short.corpus["BLEU-1"] == pytest.approx(math.exp(1 - 4 / 2))


def test_what_is_resampled_is_the_reported_score(real_captions: list[str]) -> None:
    references = {str(i): real_captions[3 * i + 1 : 3 * i + 3] for i in range(300)}
    candidates = {str(i): real_captions[3 * i] for i in range(300)}
    scores = score(candidates, references)
    assert set(scores.metrics) == {"CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"} == set(scores.corpus)
    for name, metric in scores.metrics.items():
        assert metric.value == pytest.approx(scores.corpus[name], rel=1e-9), name
    for name, interval in scores.intervals(resamples=200).items():
        assert interval is not None
        assert interval.low < scores.corpus[name] < interval.high, name
    joined = {video: [" ".join(tokenize(c)) for c in captions] for video, captions in references.items()}
    theirs, _ = Bleu(4).compute_score(joined, {v: [" ".join(tokenize(c))] for v, c in candidates.items()}, verbose=0)
    assert [scores.corpus[f"BLEU-{n}"] for n in range(1, 5)] == pytest.approx(theirs)


def test_an_empty_caption_scores_zero_and_is_counted() -> None:
    references = {"a": ["a dog runs in the park"], "b": ["a cat sleeps on the sofa"]}
    scores = score({"a": "  ...", "b": "a cat sleeps on the sofa"}, references)
    assert scores.empty_candidates == 1
    assert scores.videos == ["a", "b"]
    for name in ("CIDEr", "ROUGE-L", "BLEU-1", "BLEU-4"):
        assert scores.per_video[name][0] == pytest.approx(0, abs=1e-6)
        assert scores.per_video[name][1] > 0.9
    assert "1 empty caption, scored 0 ('a')" in scores.notes


def test_a_single_video_is_warned_about_in_words() -> None:
    scores = score({"a": "a dog runs"}, {"a": ["a dog runs"]})
    assert scores.corpus["CIDEr"] == 0
    assert any("single video" in note and "CIDEr" in note for note in scores.notes)
    assert scores.intervals()["CIDEr"] is None


def test_what_is_left_out_is_said() -> None:
    scores = score({"a": "x", "b": "y", "c": "z"}, {"a": ["x", " "], "b": ["y"]})
    assert scores.notes[:2] == [
        "1 candidate caption without references not scored ('c')",
        "1 blank reference caption left out",
    ]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="references are empty"):
        score({"a": "x"}, {})
    with pytest.raises(ValueError, match=r"no candidate caption for 4 of 5 videos \('b', 'c', 'd', ...\)"):
        score({"a": "x"}, {video: ["x"] for video in "abcde"})
    with pytest.raises(ValueError, match=r"'a' has no reference caption with a word in it \(2 given\)"):
        score({"a": "x"}, {"a": ["", "..."]})
    with pytest.raises(ValueError, match="'a' should be a list of captions, got one string"):
        score({"a": "x"}, {"a": "x"})  # type: ignore[dict-item]


def test_meteor_without_java_is_said_and_demanding_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    scores = caption_metrics({"a": "x"}, {"a": ["x"]})
    assert "METEOR" not in scores.corpus
    assert "METEOR: not computed (no java)" in scores.notes
    with pytest.raises(ValueError, match="needs Java"):
        caption_metrics({"a": "x"}, {"a": ["x"]}, meteor=True)


def test_meteor_with_a_java_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'no room for the heap' >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    metrics._meteor.cache_clear()
    scores = caption_metrics({"a": "x"}, {"a": ["x"]})
    assert "METEOR: not computed (its Java program failed: no room for the heap)" in scores.notes
    with pytest.raises(RuntimeError, match="no room for the heap"):
        caption_metrics({"a": "x"}, {"a": ["x"]}, meteor=True)


def test_one_java_program_loads_while_all_systems_are_scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It takes seven seconds to load: it is started once, and before the other metrics are computed."""
    happened: list[str] = []
    java = tmp_path / "java"
    java.write_text(
        "#!/bin/sh\nread line; echo 1; read line; echo 0.5; echo 0.5\nread line; echo 1; read line; echo 0.4; echo 0.4\n"
    )
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("Meteor", "Rouge"):
        made = getattr(metrics, name)
        monkeypatch.setattr(metrics, name, lambda name=name, made=made: (happened.append(name), made())[1])
    metrics._meteor.cache_clear()
    scored = evaluate({"one": {"a": "x"}, "two": {"a": "y"}}, {"a": ["x"]}, progress=False)
    metrics._meteor.cache_clear()
    assert happened == ["Meteor", "Rouge", "Rouge"]
    assert [scored.scores[system].corpus["METEOR"] for system in ("one", "two")] == [0.5, 0.4]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="no java: METEOR needs one (apt install default-jre-headless)")
def test_captions_that_are_no_line_of_text_score_in_meteor_as_their_words_do() -> None:
    """Captions go to Java as lines whose parts "|||" divides."""
    odd = {
        "a": "the man\nis\r\n\u2028running \ud83d",
        "b": "the dog\0 ||| sits",
        "c": "see http://a.b|||c",
        "d": "\ud83d|||\n",
    }
    plain = {"a": "the man is running", "b": "the dog | | | sits", "c": "see http://a.b | | | c", "d": "| | |"}
    references = {
        "a": ["a man\nruns \udcff", "||| a man"],
        "b": ["a dog sits |||"],
        "c": ["see http://a.b"],
        "d": ["a cat"],
    }
    clean = {"a": ["a man runs", "| | | a man"], "b": ["a dog sits | | |"], "c": ["see http://a.b"], "d": ["a cat"]}
    found, expected = caption_metrics(odd, references, meteor=True), caption_metrics(plain, clean, meteor=True)
    assert found.per_video == expected.per_video and found.corpus == expected.corpus


@pytest.mark.skipif(shutil.which("java") is None, reason="no java: METEOR needs one (apt install default-jre-headless)")
def test_meteor() -> None:
    references = {"a": ["a man runs fast", "the man is running"], "b": ["a dog"], "c": ["a cat"]}
    scores = caption_metrics({"a": "the man is running", "b": "the dog sits", "c": ""}, references, meteor=True)
    assert scores.per_video["METEOR"] == pytest.approx([1.0, 0.2696629, 0.0], abs=1e-6)
    assert 0 < scores.corpus["METEOR"] < 1
    assert scores.intervals()["METEOR"] is None


def test_scripts_without_spaces_are_pointed_out() -> None:
    references = {"a": ["一只狗在跑。"], "b": ["a dog runs"], "c": ["개가 달린다"]}
    (note,) = [n for n in score(dict.fromkeys(references, "a dog"), references).notes if "script" in n]
    assert note.startswith("1 video with references in a script without spaces ('a')")


@pytest.mark.parametrize("caption", ["", "dog", "🐕", "...", "一", "x" * 100_000, "dog " * 5000])
def test_odd_captions_have_finite_scores(caption: str) -> None:
    references = {"a": ["a dog runs", "dog", "the dog"], "b": ["a cat"]}
    scores = score({"a": caption, "b": "a cat"}, references)
    assert all(math.isfinite(x) for row in scores.per_video.values() for x in row)
    assert all(math.isfinite(x) for x in scores.corpus.values())
    assert scores.empty_candidates == (caption in ("", "🐕", "..."))
