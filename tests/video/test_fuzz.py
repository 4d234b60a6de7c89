"""Whatever bytes a file holds: frames, or a VideoError that names it."""

import random
from pathlib import Path

import pytest

from made_videos import write_steps
from synpo.video import FrameSampling, VideoError, probe, read_frames

KINDS = {
    "mp4": "libx264", "mov": "mpeg4", "mkv": "libx264", "avi": "libx264", "webm": "libvpx", "ts": "mpeg2video", "gif": "gif"
}  # fmt: skip


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed: few, one in fifty, near the start, or in a row; now and then the end is missing as well."""
    work = bytearray(data)
    kind = rng.randrange(4)
    if kind < 3:
        count, reach = [(8, len(work)), (len(work) // 50, len(work)), (20, 1500)][kind]
        for _ in range(count):
            work[rng.randrange(min(reach, len(work)))] = rng.randrange(256)
    else:
        start = rng.randrange(len(work))
        for i in range(start, min(start + 2000, len(work))):
            work[i] = rng.randrange(256)
    return bytes(work[: rng.randrange(len(work))] if rng.random() < 0.3 else work)


@pytest.mark.parametrize("suffix", KINDS)
def test_nothing_else_escapes(suffix: str, tmp_path: Path) -> None:
    pixels = "rgb8" if suffix == "gif" else "yuv420p"
    data = write_steps(tmp_path / f"whole.{suffix}", codec=KINDS[suffix], noise=9, gop=8, pixels=pixels).read_bytes()
    for seed in range(9):
        path = tmp_path / f"{seed}.{suffix}"
        path.write_bytes(spoilt(data, random.Random(seed)))
        try:
            info = probe(path)
            times = FrameSampling().times(0, info.duration)
            assert read_frames(path, times).shape == (len(times), 3, info.height, info.width)
        except VideoError as error:
            assert path.name in str(error)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "mov"])
def test_a_title_that_is_no_utf8_is_no_hindrance(suffix: str, tmp_path: Path) -> None:
    path = write_steps(tmp_path / f"a.{suffix}", codec="mpeg4", title="cafZ")
    data = path.read_bytes()
    assert b"cafZ" in data
    path.write_bytes(data.replace(b"cafZ", b"caf\xe9"))
    assert probe(path).duration == pytest.approx(3.0, abs=0.01)
    assert read_frames(path, [0.5]).shape == (1, 3, 48, 64)


def test_whatever_pyav_raises_is_a_video_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_steps(tmp_path / "a.mp4")
    probe(path)
    for error in (MemoryError("no room"), OverflowError("too far"), ValueError("no format"), IndexError("list index")):

        def fails(*args: object, failure: Exception = error) -> None:
            raise failure

        monkeypatch.setattr("synpo.video.frames.to_picture", fails)
        with pytest.raises(
            VideoError, match=rf"a\.mp4 cannot be read as a video: .* \({type(error).__name__}\)"
        ) as caught:
            read_frames(path, [0.5])
        assert caught.value.__cause__ is error
