"""Fact scores on sets small enough to count by hand."""

import pytest

from synpo.evaluate.facts import fact_scores

TRUE = {"a": {"red", "circle", "left"}, "b": {"blue"}, "c": {("square", "bounces"), "green"}}
STATED = {"a": {"red", "circle", "right", "small"}, "b": {"blue"}, "c": set()}


def test_counted_by_hand() -> None:
    """a: 2 of 4 stated are true, 2 of 3 true are stated; b: all; c: nothing said."""
    scores = fact_scores(STATED, TRUE)
    assert (scores.right, scores.stated, scores.true) == (3, 5, 6)
    assert scores.corpus == pytest.approx(
        {
            "precision": 3 / 5,
            "macro precision": (2 / 4 + 1 + 0) / 3,
            "recall": 3 / 6,
            "macro recall": (2 / 3 + 1 + 0) / 3,
            "F1": 2 * 3 / (5 + 6),
            "macro F1": (2 * 2 / (4 + 3) + 1 + 0) / 3,
        }
    )
    assert scores.per_video["precision"] == [0.5, 1.0, 0.0]
    assert scores.videos == ["a", "b", "c"]


def test_nothing_stated_anywhere_is_zero_not_nan() -> None:
    scores = fact_scores({video: set() for video in TRUE}, TRUE)
    assert set(scores.corpus.values()) == {0.0}
    interval = scores.intervals()["F1"]
    assert interval is not None
    assert (interval.low, interval.high) == (0.0, 0.0)


def test_saying_nothing_where_nothing_is_true_is_right() -> None:
    scores = fact_scores({"a": set(), "b": {"x"}}, {"a": set(), "b": {"x"}})
    assert scores.per_video["F1"] == [1.0, 1.0]
    assert scores.corpus["macro F1"] == 1.0


def test_intervals_hold_the_score_and_differences_are_paired() -> None:
    true = {str(i): {f"{i}.{k}" for k in range(4)} for i in range(50)}
    good = {video: set(sorted(facts)[: 3 if int(video) % 2 else 4]) for video, facts in true.items()}
    bad = {video: set(sorted(facts)[:2]) | {"wrong"} for video, facts in true.items()}
    better, worse = fact_scores(good, true), fact_scores(bad, true)
    for name, interval in better.intervals(seed=1).items():
        assert interval is not None
        assert interval.low <= better.corpus[name] <= interval.high
    difference = better.minus(worse)["F1"]
    assert difference is not None
    assert difference.value == pytest.approx(better.corpus["F1"] - worse.corpus["F1"])
    assert difference.low > 0
    assert difference.better == 1.0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="true facts are empty"):
        fact_scores({}, {})
    with pytest.raises(ValueError, match=r"no set of stated facts for 1 of 3 videos \('c'\)"):
        fact_scores({"a": set(), "b": set()}, TRUE)
    with pytest.raises(ValueError, match="same videos in the same order"):
        fact_scores(STATED, TRUE).minus(fact_scores({"a": set()}, {"a": set()}))
