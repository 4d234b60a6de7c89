"""Videos: the sampling rule, frames by time, containers that tell little, and files that cannot be used."""

import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from synpo.video import (
    FrameSampling,
    VideoError,
    amateur_frames,
    list_videos,
    probe,
    read_frames,
    resolve_video,
)

SUFFIX_CODECS = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4", "ts": "mpeg2video"}


def write(path: Path, frames: int = 24, rate: int = 8, codec: str = "libx264", offset: int = 0) -> Path:
    """Grey video whose shade grows by 10 a frame: 64×48."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * i, dtype=np.uint8), format="rgb24")
            frame.pts = i + offset
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shades(frames: Tensor) -> list[float]:
    return [round(float(f.float().mean()) / 10, 1) for f in frames]


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


@pytest.mark.parametrize("suffix", SUFFIX_CODECS)
def test_frames_are_those_shown_at_their_times(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.{suffix}", codec=SUFFIX_CODECS[suffix])
    info = probe(path)
    assert (info.width, info.height) == (64, 48)
    assert info.duration == pytest.approx(3.0, abs=0.15)
    assert info.fps == pytest.approx(8.0, abs=0.1)
    frames = read_frames(path, [0.0, 0.99, 1.01, 2.0, 2.9])
    assert frames.shape == (5, 3, 48, 64)
    assert frames.dtype == torch.uint8
    assert shades(frames) == pytest.approx([0, 7, 8, 16, 23], abs=0.4)
    assert shades(read_frames(path, [1.55, 1.55, 2.3])) == pytest.approx([12, 12, 18], abs=0.4)  # through a seek


def test_times_past_the_end_give_the_last_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    assert shades(read_frames(path, [2.95, 5.0, 60.0])) == pytest.approx([23, 23, 23], abs=0.4)
    assert shades(read_frames(path, [100.0])) == pytest.approx([23], abs=0.4)


def test_a_stream_that_does_not_start_at_zero_is_read_from_its_own_start(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", offset=80)
    assert shades(read_frames(path, [0.0, 1.0, 2.0])) == pytest.approx([0, 8, 16], abs=0.4)
    assert shades(read_frames(path, [1.5, 2.0])) == pytest.approx([12, 16], abs=0.4)
    assert probe(path).duration == pytest.approx(3.0, abs=0.15)


@pytest.mark.parametrize("times", [[], [2.0, 1.0]])
def test_times_must_ascend(times: list[float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="non-empty ascending"):
        read_frames(write(tmp_path / "a.mp4"), times)


def test_one_frame_is_a_video(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", frames=1)
    assert probe(path).duration > 0
    assert len(read_frames(path, FrameSampling().times(0, probe(path).duration))) == 8


def no_frames(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()


def only_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def truncated(path: Path) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:-400])


BROKEN = {
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 40),
    "empty file": lambda path: path.touch(),
    "no frame": no_frames,
    "only sound": only_sound,
    "truncated": truncated,
    "missing": lambda path: None,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_cannot_be_used_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    BROKEN[kind](path)
    with pytest.raises(VideoError, match=r"a\.mp4"):
        probe(path)
    with pytest.raises(VideoError, match=r"a\.mp4"):
        read_frames(path, [0.1])


def test_only_videos_below_the_folder_are_listed(tmp_path: Path) -> None:
    for name in ("b.mp4", "a/c.WEBM", "notes.txt", ".hidden.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    assert list_videos(tmp_path) == ["a/c.WEBM", "b.mp4"]
    with pytest.raises(VideoError, match="is not a folder; --videos"):
        list_videos(tmp_path / "b.mp4")
    with pytest.raises(VideoError, match="no video below"):
        list_videos(tmp_path / "folder.mp4")


def test_links_to_videos_and_to_folders_of_videos_are_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each folder once, under its own name where it has one below the root; loops end."""
    root, disk = tmp_path / "videos", tmp_path / "disk"
    for name in ("videos/own/a.mp4", "disk/b.mp4", "disk/deep/c.mp4", "disk/.d.mp4", "e.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (root / "again").symlink_to(root / "own")
    (root / "aside").symlink_to(disk)
    (root / "second").symlink_to(disk)
    (root / "e.mp4").symlink_to(tmp_path / "e.mp4")
    (disk / "back").symlink_to(root)
    (disk / "deep" / "self").symlink_to(disk / "deep")
    names = ["aside/b.mp4", "aside/deep/c.mp4", "e.mp4", "own/a.mp4"]
    assert list_videos(root) == names
    assert all(resolve_video(root, name).is_file() for name in names)
    assert capsys.readouterr().err == ""
    (root / "unmounted").symlink_to(tmp_path / "gone")
    assert list_videos(root) == names
    assert f"warning: {root / 'unmounted'} leads to {tmp_path / 'gone'}, where nothing is" in capsys.readouterr().err
    (tmp_path / "linked").symlink_to(root)
    assert list_videos(tmp_path / "linked") == names


def test_a_name_that_no_record_can_hold_is_said(tmp_path: Path) -> None:
    (tmp_path / "fine \u00a0\u200d.mp4").touch()
    assert len(list_videos(tmp_path)) == 1
    (tmp_path / os.fsdecode(b"b\xff.mp4")).touch()
    with pytest.raises(VideoError, match=r"b\\udcff\.mp4.*rename that file"):
        list_videos(tmp_path)


def test_paths_from_records_stay_below_the_root(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    (root / "a").mkdir(parents=True)
    (root / "a" / "b.mp4").touch()
    (tmp_path / "secret.mp4").touch()
    (tmp_path / "disk").mkdir()
    (root / "disk").symlink_to(tmp_path / "disk")
    for path in ("a/b.mp4", "./a//b.mp4", "disk/../a/b.mp4"):
        assert resolve_video(root, path) == root.resolve() / "a" / "b.mp4"
    with pytest.raises(VideoError, match="is not in"):
        resolve_video(root, "disk/../secret.mp4")  # for the file system that were a file beside the folder
    for path in ("../secret.mp4", str(tmp_path / "secret.mp4"), "a/../../secret.mp4", "..", "disk/../../secret.mp4"):
        with pytest.raises(VideoError, match="leaves the videos folder"):
            resolve_video(root, path)
    for path in ("a/c.mp4", "b.mp4", "a"):
        with pytest.raises(VideoError, match="is not in"):
            resolve_video(root, path)


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (3, [1]), (8, [1, 4, 6]), (16, [1, 4, 6, 9, 12, 14])])
def test_the_amateur_sees_a_third_of_the_frames(count: int, expected: list[int]) -> None:
    frames = torch.arange(count)[:, None, None, None].expand(count, 3, 2, 2)
    assert amateur_frames(frames)[:, 0, 0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("name", "size", "seconds"),
    [
        ("nasa_13013.mp4", (480, 270), 13.0),
        ("nasa_13013_hdr.mp4", (480, 270), 13.0),
        ("chaplin.mp4", (640, 360), 9.6),
        ("big_buck_bunny_0_30.webm", (1280, 720), 30.0),
    ],
)
def test_real_videos(name: str, size: tuple[int, int], seconds: float, real_data: Path) -> None:
    path = real_data / "video" / name
    info = probe(path)
    assert info.duration == pytest.approx(seconds, rel=0.1)
    frames = read_frames(path, FrameSampling(fps=0.5, minimum=2, maximum=3).times(0, info.duration))
    assert frames.shape[1:] == (3, info.height, info.width)
    assert frames.float().std() > 5


def test_nothing_is_passed_over_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to a file that was moved is listed, and found missing when it is used; a folder that is barred is an error."""
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "moved.mp4")
    (tmp_path / "sub").mkdir()
    assert list_videos(tmp_path) == ["a.mp4", "link.mp4"]
    with pytest.raises(VideoError, match=r"'link\.mp4' is not in"):
        resolve_video(tmp_path, "link.mp4")
    scan = os.scandir

    def scandir(path: str | os.PathLike[str]) -> object:
        if os.fspath(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(VideoError, match=r"sub cannot be read: Permission denied"):
        list_videos(tmp_path)
