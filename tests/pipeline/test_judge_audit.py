from __future__ import annotations

from collections import Counter

import pytest

from synpo.pipeline.judge.audit import audit, compare, kappa, ranks, spearman
from synpo.pipeline.judge.base import Task, Verdict
from synpo.pipeline.judge.offline import OfflineJudge
from synpo.records import Score


def test_ranks_and_correlation_by_hand() -> None:
    assert ranks([10, 30, 20, 20]).tolist() == [1, 4, 2.5, 2.5]
    assert spearman([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    assert spearman([1, 1, 1], [1, 2, 3]) is None and spearman([1], [1]) is None


def test_kappa_by_hand() -> None:
    table = Counter({(1, 1): 20, (1, -1): 5, (-1, 1): 10, (-1, -1): 15})  # the textbook 0.4
    assert kappa(table) == pytest.approx(0.4)
    assert kappa(Counter()) is None and kappa(Counter({(1, 1): 7})) is None


def test_compare_counts_pairs_within_a_video_only() -> None:
    same = compare("same", [[1, 5, 9], [3, 1]], [[2, 4, 8], [30, 10]])
    assert (same.count, same.spearman, same.accuracy, same.kappa) == (5, 1.0, 1.0, 1.0)
    turned = compare("turned", [[1, 2]], [[2, 1]])
    assert turned.spearman == pytest.approx(-1) and turned.accuracy == 0
    ties = compare("ties", [[1.0, 1.1]], [[1.0, 2.0]])
    assert ties.accuracy is None and ties.spearman == pytest.approx(1)


def test_audit_of_a_judge_that_counts_words() -> None:
    texts = ("a dog.", "a red dog runs fast.", "a big red dog runs very fast.")
    tasks = [Task(f"{i}.mp4", ("a red dog runs.",), texts, (-1.0,) * 3) for i in range(3)]

    class Wordy(OfflineJudge):
        name = "wordy"

    judge = Wordy()
    judge.order_totals = {t: [[1.0, 2.0, 3.0], [1.0, 3.0, 2.0]] for t in tasks}
    scores = [
        [Score(f"{t.video}{i}", str(i), t.video, 1.0, 1.0, 1.0, 2.0 * i, "wordy") for i in range(3)] for t in tasks
    ]
    length, itself, offline = audit(judge, list(zip(tasks, scores)))
    assert length.spearman == length.accuracy == 1.0 and length.count == 9
    assert itself.spearman == pytest.approx(0.5) and itself.accuracy == pytest.approx(2 / 3)
    assert offline.name == "wordy and offline"
    broken = [*scores[:2], [Score("x", "0", "2.mp4", None, None, None, None, "wordy", "failed")] * 3]
    assert audit(judge, list(zip(tasks, broken)))[0].count == 6, "a video with a failure is left out"
    assert audit(judge, []) == []
    assert Verdict(1, 2, 3).total == pytest.approx(6.1)
    with pytest.raises(ValueError, match="consistency should be between 0 and 3"):
        Verdict(1, 2, 3.5)
