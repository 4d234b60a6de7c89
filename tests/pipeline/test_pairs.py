from __future__ import annotations

from synpo.pipeline.pairs import make_pairs
from synpo.records import Caption, Score


def caption(video: str, index: int, text: str) -> Caption:
    return Caption(f"{video}{index}", video, None, index, text, text, -1.0)


def scored(captions: list[Caption], totals: list[float | None]) -> dict[str, Score]:
    return {
        c.id: Score("s" + c.id, c.id, c.video, *((None,) * 3 if t is None else (1.0, 1.0, 1.0)), t, "test")
        for c, t in zip(captions, totals)
    }


def test_best_against_worst() -> None:
    row = [caption("v", i, t) for i, t in enumerate(["middling", "bad", "good", "so so"])]
    pairs, counts = make_pairs({"v": row}, scored(row, [6.0, 2.0, 9.0, 5.0]), "Describe.", 4.0)
    (pair,) = pairs
    assert (pair.chosen, pair.rejected, pair.margin, pair.video, pair.prompt) == ("good", "bad", 7.0, "v", "Describe.")
    assert not counts


def test_margin_is_inclusive_and_videos_do_not_mix() -> None:
    a, b = ([caption(v, i, f"{v} {i}") for i in range(2)] for v in "ab")
    scores = scored(a, [1.0, 5.0]) | scored(b, [9.0, 13.0 - 1e-6])
    pairs, counts = make_pairs({"a": a, "b": b}, scores, "Describe.", 4.0)
    assert [(p.video, p.chosen) for p in pairs] == [("a", "a 1")]
    assert counts == {"margin": 1}


def test_a_failed_score_is_never_ranked() -> None:
    row = [caption("v", i, str(i)) for i in range(4)]
    pairs, counts = make_pairs({"v": row}, scored(row, [None, 1.0, 8.0, None]), "?", 4.0)
    assert [(p.chosen, p.rejected) for p in pairs] == [("2", "1")]
    assert counts == {"failed": 2}
    pairs, counts = make_pairs({"v": row}, scored(row, [None, 1.0, None, None]), "?", 0.0)
    assert not pairs and counts == {"failed": 3, "few": 1}


def test_an_empty_caption_is_neither_chosen_nor_rejected() -> None:
    row = [caption("v", 0, "  "), caption("v", 1, "fine"), caption("v", 2, "")]
    pairs, counts = make_pairs({"v": row}, scored(row, [13.0, 6.0, 0.0]), "?", 1.0)
    assert not pairs and counts == {"empty": 2, "few": 1}


def test_ties_are_settled_by_order() -> None:
    row = [caption("v", i, str(i)) for i in range(4)]
    pairs, _ = make_pairs({"v": row}, scored(row, [7.0, 2.0, 7.0, 2.0]), "?", 4.0)
    assert [(p.chosen, p.rejected) for p in pairs] == [("0", "3")]
    again, _ = make_pairs({"v": row[::-1]}, scored(row, [7.0, 2.0, 7.0, 2.0]), "?", 4.0)
    assert again == pairs


def test_chosen_and_rejected_never_say_the_same() -> None:
    row = [caption("v", i, "same") for i in range(3)]
    assert make_pairs({"v": row}, scored(row, [9.0, 1.0, 5.0]), "?", 4.0) == ([], {"alike": 1})
    row = [caption("v", 0, "same"), caption("v", 1, "other"), caption("v", 2, " same ")]
    assert make_pairs({"v": row}, scored(row, [9.0, 5.0, 1.0]), "?", 4.0) == ([], {"margin": 1})


def test_equal_totals_prefer_nothing() -> None:
    row = [caption("v", i, str(i)) for i in range(3)]
    assert make_pairs({"v": row}, scored(row, [5.0, 5.0, 5.0]), "?", 0.0) == ([], {"margin": 1})
    assert len(make_pairs({"v": row}, scored(row, [5.0, 5.1, 5.0]), "?", 0.0)[0]) == 1
