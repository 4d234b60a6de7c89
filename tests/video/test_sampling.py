"""The sampling rule, and what the amateur sees."""

import numpy as np
import pytest
import torch

from synpo.video import FrameSampling, amateur_frames


@pytest.mark.parametrize(
    ("sampling", "span", "count"),
    [
        (FrameSampling(), (0, 4), 8),
        (FrameSampling(), (0, 24), 12),
        (FrameSampling(), (0, 600), 16),
        (FrameSampling(fps=1, minimum=1, maximum=4), (3, 3.2), 1),
    ],
)
def test_the_sampling_rule(sampling: FrameSampling, span: tuple[float, float], count: int) -> None:
    times = sampling.times(*span)
    assert len(times) == count
    assert all(span[0] < t < span[1] for t in times)
    steps = np.diff(times)
    np.testing.assert_allclose(steps, (span[1] - span[0]) / count)
    np.testing.assert_allclose(times[0] - span[0], span[1] - times[-1])


@pytest.mark.parametrize("values", [(0, 8, 16), (-1, 8, 16), (float("inf"), 8, 16), (1, 0, 16), (1, 9, 8)])
def test_sampling_that_makes_no_sense_is_refused(values: tuple[float, int, int]) -> None:
    with pytest.raises(ValueError, match="frames: expected fps > 0"):
        FrameSampling(*values)


def test_a_clip_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match="got 2 to 2 s"):
        FrameSampling().times(2, 2)


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (3, [1]), (8, [1, 4, 6]), (16, [1, 4, 6, 9, 12, 14])])
def test_the_amateur_sees_a_third_of_the_frames(count: int, expected: list[int]) -> None:
    frames = torch.arange(count)[:, None, None, None].expand(count, 3, 2, 2)
    assert amateur_frames(frames)[:, 0, 0, 0].tolist() == expected
