"""Intervals and paired differences: against the normal theory they must agree with, and on cases with a known answer."""

import numpy as np
import pytest

from synpo.evaluate.bootstrap import Metric, bootstrap_interval, mean_metric, paired_bootstrap


def test_interval_of_a_mean_agrees_with_normal_theory() -> None:
    scores = np.random.default_rng(1).normal(5.0, 2.0, 800)
    interval = bootstrap_interval(mean_metric(scores), resamples=4000, seed=3)
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    assert interval is not None
    assert interval.low == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(scores.mean() + half, abs=0.1 * half)


def test_coverage_of_a_ratio_of_sums() -> None:
    """A 90 % interval of Σ right / Σ stated holds the true ratio about nine times in ten."""
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        stated = rng.integers(1, 9, 60)
        columns = np.stack([rng.binomial(stated, 0.7), stated], axis=1).astype(float)
        metric = Metric(columns, lambda sums: sums[..., 0] / sums[..., 1])
        interval = bootstrap_interval(metric, resamples=300, level=0.9, seed=trial)
        assert interval is not None
        held += interval.low <= 0.7 <= interval.high
    assert 165 <= held <= 194


def test_same_seed_same_interval_other_seed_other_interval() -> None:
    metric = mean_metric(np.random.default_rng(0).random(30))
    assert bootstrap_interval(metric, seed=5) == bootstrap_interval(metric, seed=5)
    assert bootstrap_interval(metric, seed=5) != bootstrap_interval(metric, seed=6)


def test_a_single_video_has_no_interval() -> None:
    one = mean_metric(np.array([0.4]))
    assert one.value == 0.4
    assert bootstrap_interval(one) is None
    assert paired_bootstrap(one, one) is None


def test_paired_difference_uses_the_same_videos_for_both() -> None:
    """Videos differ wildly, the systems by 0.1 on each: unpaired intervals overlap, the paired one has no width."""
    base = np.random.default_rng(0).normal(0.0, 10.0, 100)
    difference = paired_bootstrap(mean_metric(base + 0.1), mean_metric(base))
    assert difference is not None
    assert difference.value == pytest.approx(0.1)
    assert difference.low == pytest.approx(0.1)
    assert difference.high == pytest.approx(0.1)
    assert difference.better == 1.0


def test_a_system_against_itself_is_a_tie() -> None:
    metric = mean_metric(np.random.default_rng(0).random(20))
    difference = paired_bootstrap(metric, metric)
    assert difference is not None
    assert (difference.value, difference.low, difference.high, difference.better) == (0.0, 0.0, 0.0, 0.5)


def test_bad_arguments() -> None:
    metric = mean_metric(np.ones(3))
    with pytest.raises(ValueError, match="same videos for both systems, got 3 and 4"):
        paired_bootstrap(metric, mean_metric(np.ones(4)))
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap_interval(metric, level=95)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        bootstrap_interval(metric, resamples=0)
