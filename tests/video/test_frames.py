"""Seconds to pictures: each moment's own frame, whether reached by decoding or by seeking, and files that cannot be used."""

import tracemalloc
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from made_videos import shades, write_steps, write_unfinished
from synpo.video import FrameSampling, VideoError, probe, read_frames
from synpo.video import frames as module

SUFFIX_CODECS = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4", "ts": "mpeg2video"}


@pytest.mark.parametrize("suffix", SUFFIX_CODECS)
def test_frames_are_those_shown_at_their_times(suffix: str, tmp_path: Path) -> None:
    path = write_steps(tmp_path / f"a.{suffix}", codec=SUFFIX_CODECS[suffix])
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
    path = write_steps(tmp_path / "a.mp4")
    assert shades(read_frames(path, [2.95, 5.0, 60.0])) == pytest.approx([23, 23, 23], abs=0.4)
    assert shades(read_frames(path, [100.0])) == pytest.approx([23], abs=0.4)


def test_a_stream_that_does_not_start_at_zero_is_read_from_its_own_start(tmp_path: Path) -> None:
    path = write_steps(tmp_path / "a.mkv", offset=80)
    assert shades(read_frames(path, [0.0, 1.0, 2.0])) == pytest.approx([0, 8, 16], abs=0.4)
    assert shades(read_frames(path, [1.5, 2.0])) == pytest.approx([12, 16], abs=0.4)
    assert probe(path).duration == pytest.approx(3.0, abs=0.15)


@pytest.mark.parametrize("times", [[], [2.0, 1.0]])
def test_times_must_ascend(times: list[float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="non-empty ascending"):
        read_frames(write_steps(tmp_path / "a.mp4"), times)


def test_one_frame_is_a_video(tmp_path: Path) -> None:
    path = write_steps(tmp_path / "a.mp4", frames=1)
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
    write_steps(path)
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


ENCODED: dict[str, dict[str, Any]] = {
    "x264.mp4": {"options": {"x264-params": "b-adapt=0:bframes=3"}},
    "x264.avi": {"options": {"x264-params": "b-adapt=0:bframes=3"}},
    "x264.ts": {"options": {"x264-params": "b-adapt=0:bframes=3"}},
    "raw.h264": {"options": {"x264-params": "b-adapt=0:bframes=3"}},
    "open.mkv": {"options": {"x264-params": "b-adapt=0:bframes=3:open-gop=1:scenecut=0"}},
    "open.ts": {"options": {"x264-params": "b-adapt=0:bframes=3:open-gop=1:scenecut=0"}},
    "refresh.mp4": {"options": {"x264-params": "intra-refresh=1:bframes=0:scenecut=0"}},
    "x265.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:b-adapt=0:bframes=3"}},
    "raw.hevc": {"codec": "libx265", "options": {"x265-params": "log-level=none:b-adapt=0:bframes=3"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "b": "2M"}},
    "mpeg2.ts": {"codec": "mpeg2video", "rate": 25, "options": {"bf": "2", "b": "2M"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25, "options": {"bf": "2", "b": "2M"}},
    "raw.m2v": {"codec": "mpeg2video", "rate": 25, "options": {"bf": "2", "b": "2M"}, "format": "mpeg2video"},
    "mjpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "8"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
    "steps.gif": {"codec": "gif", "pixels": "rgb8", "rate": 10},
}


@pytest.mark.parametrize("name", ENCODED)
def test_every_frame_is_found_at_its_time_by_decoding_and_by_seeking(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With B-frames, open groups of pictures and without times; what seeking finds is the same to the bit."""
    path = write_steps(tmp_path / name, noise=9, gop=6, **ENCODED[name])
    info = probe(path)
    times = [(i + 0.5) / info.fps for i in range(24)]
    assert info.duration == pytest.approx(24 / ENCODED[name].get("rate", 8), abs=0.01)
    monkeypatch.setattr(module, "SEEK_PAYS", 10**9)
    whole = read_frames(path, times)
    grey = np.array(shades(whole))
    assert np.abs(grey - grey[0] - np.arange(24)).max() < 0.6
    monkeypatch.setattr(module, "SEEK_PAYS", 0)
    assert torch.equal(read_frames(path, times[::5]), whole[::5])
    for i in (4, 7, 13, 19, 23):
        assert torch.equal(read_frames(path, [times[i]])[0], whole[i])


def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry for each packet that is decoded."""
    real, seen = module._fed, []

    def counted(*args: Any) -> Any:
        for packet in real(*args):
            seen.append(packet)
            yield packet

    monkeypatch.setattr(module, "_fed", counted)
    return seen  # type: ignore[return-value]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "webm"])
def test_a_long_video_is_not_decoded_where_nobody_looks(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = "libvpx" if suffix == "webm" else "libx264"
    path = write_steps(tmp_path / f"long.{suffix}", frames=600, codec=codec, gop=10)
    seen = fed(monkeypatch)
    frames = read_frames(path, [(i + 0.5) * 75 / 8 for i in range(8)])
    assert len(seen) < 8 * 20
    assert shades(frames) == pytest.approx([int((i + 0.5) * 75) % 25 for i in range(8)], abs=0.6)


@pytest.mark.parametrize("name", ["refresh.mp4", "x264.avi", "mpeg2.mpg"])
def test_where_seeking_cannot_be_trusted_all_is_decoded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key frame that is none; frames without times; packets that are other ones after a seek."""
    path = write_steps(tmp_path / name, frames=96, noise=9, gop=6, **ENCODED[name])
    seen = fed(monkeypatch)
    read_frames(path, [90.5 / ENCODED[name].get("rate", 8)])
    assert len(seen) >= 91


def test_the_end_may_be_missed_by_a_few_frames_and_no_more(tmp_path: Path) -> None:
    path = write_steps(tmp_path / "a.mp4")
    assert shades(read_frames(path, [1.0, 3.0, 4.0])) == pytest.approx([8, 23, 23], abs=0.4)
    with pytest.raises(
        VideoError, match=r"a\.mp4: 3 of the 4 wanted frames do not decode, the first of them at 3\.00 s of 3\.00 s"
    ):
        read_frames(path, [1.0, 3.0, 4.0, 5.0])


def test_what_was_never_downloaded_is_no_frozen_picture(tmp_path: Path) -> None:
    path = write_unfinished(tmp_path / "a.mp4")
    assert probe(path).duration == pytest.approx(3.0)
    with pytest.raises(
        VideoError, match=r"a\.mp4: \d of the 8 wanted frames do not decode, the first of them at [01]\.\d\d s of 3"
    ):
        read_frames(path, FrameSampling().times(0, 3.0))
    with pytest.raises(VideoError, match=": 1 of the 2 wanted frames do not decode"):
        read_frames(path, [0.2, 2.5])
    assert read_frames(path, [0.2, 0.4]).shape == (2, 3, 48, 64)


def test_a_recording_cut_anywhere_starts_with_its_first_frame(tmp_path: Path) -> None:
    """Without the packets of its first key frame a stream cannot be decoded from its start."""
    whole = write_steps(
        tmp_path / "whole.webm", codec="libvpx-vp9", gop=8, options={"cpu-used": "8", "lag-in-frames": "0"}
    )
    cut = tmp_path / "cut.webm"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size and number >= 5:
                packet.stream = stream
                target.mux(packet)
    info = probe(cut)
    assert info.duration == pytest.approx(2.0, abs=0.01)
    assert shades(read_frames(cut, [0.05, 0.55, 1.95])) == pytest.approx([8, 12, 23], abs=0.4)


def test_pictures_are_not_stacked_before_they_are_laid_out(tmp_path: Path) -> None:
    path = write_steps(tmp_path / "a.mp4", size=(640, 480))
    times = FrameSampling().times(0, probe(path).duration)
    tracemalloc.start()
    try:
        found = read_frames(path, times)
        held = tracemalloc.get_traced_memory()[1]  # by NumPy; memory of torch and FFmpeg is not counted
    finally:
        tracemalloc.stop()
    assert found.is_contiguous() and held < found.nbytes / 2
