from pathlib import Path

import pytest

from synpo.pipeline.clips import clip_count, frames_of, split_video
from synpo.video import FrameSampling, VideoError, amateur_frames


@pytest.mark.parametrize(
    ("duration", "count"), [(0.04, 2), (9.99, 2), (10.0, 2), (19.99, 2), (20.0, 3), (35.0, 4), (149.9, 15), (1e5, 16)]
)
def test_clip_count_is_the_papers_rule(duration: float, count: int) -> None:
    assert clip_count(duration) == count


def test_clip_count_refuses_impossible_settings() -> None:
    with pytest.raises(ValueError, match="clip_seconds"):
        clip_count(5.0, clip_seconds=0)
    with pytest.raises(ValueError, match="max_clips"):
        clip_count(5.0, max_clips=1)


def test_clips_tile_the_video_and_have_frames(videos: Path) -> None:
    clips = split_video(videos, "deep/d.mp4", clip_seconds=2.0)
    assert [c.index for c in clips] == [0, 1, 2]
    assert clips[0].start == 0 and clips[-1].end == pytest.approx(5.0, abs=0.2)
    assert [c.end for c in clips[:-1]] == [c.start for c in clips[1:]]
    assert len({round(c.end - c.start, 6) for c in clips}) == 1
    frames = frames_of(videos, clips[1], FrameSampling())
    assert frames.shape == (8, 3, 48, 48)
    centre = frames[:, :, 20:32].float().amax((1, 2)).argmax(-1).float()  # of the moving square, along x
    assert (centre.diff() >= 0).all() and 8 < centre[0] < centre[-1] < 32
    assert amateur_frames(frames).shape == (3, 3, 48, 48)


def test_clip_ids_follow_the_file(videos: Path, tmp_path: Path, write_video) -> None:  # type: ignore[no-untyped-def]
    path = write_video(tmp_path / "x.mp4", seconds=2.0, seed=1)
    first = [c.id for c in split_video(tmp_path, "x.mp4")]
    assert first == [c.id for c in split_video(tmp_path, "x.mp4")]
    path.unlink()
    write_video(path, seconds=2.0, seed=5)
    assert not set(first) & {c.id for c in split_video(tmp_path, "x.mp4")}


def test_broken_videos_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a video at all")
    with pytest.raises(VideoError, match="broken.mp4"):
        split_video(tmp_path, "broken.mp4")
    with pytest.raises(VideoError, match="not in"):
        split_video(tmp_path, "missing.mp4")
    with pytest.raises(VideoError, match="leaves"):
        split_video(tmp_path, "../x.mp4")
