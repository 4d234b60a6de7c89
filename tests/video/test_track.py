"""How long a video is and which stream is the video: measured, whatever its file says."""

import itertools
import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition

from made_videos import shades, write_steps
from synpo.video import FrameSampling, VideoError, probe, read_frames


def all_of(path: Path, rate: int = 8) -> list[int]:
    """The steps shown in the middle of every 1 / `rate` seconds, as long as the video is said to last."""
    times = [(i + 0.5) / rate for i in range(round(probe(path).duration * rate))]
    return [round(shade) for shade in shades(read_frames(path, times))]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "ts"])
def test_sound_that_goes_on_is_no_video(suffix: str, tmp_path: Path) -> None:
    codec = "libvpx" if suffix == "webm" else "libx264"
    path = write_steps(tmp_path / f"a.{suffix}", codec=codec, sound=12.0)
    with av.open(str(path)) as container:
        assert container.duration > 11e6
    assert probe(path).duration == pytest.approx(3.0, abs=0.01)
    assert all_of(path) == list(range(24))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "ts", "avi", "gif", "flv"])
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_a_download_that_broke_off_is_as_long_as_what_came(suffix: str, share: float, tmp_path: Path) -> None:
    made: dict[str, Any] = {"codec": "libx264", "options": {"bf": "0"}}
    made = {"webm": {"codec": "libvpx"}, "gif": {"codec": "gif", "pixels": "rgb8"}}.get(suffix, made)
    front = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = write_steps(tmp_path / f"a.{suffix}", 50, 10, noise=60, gop=10, container=front, **made)
    assert probe(path).duration == pytest.approx(5.0, abs=0.01)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    seconds = probe(path).duration
    assert 0.4 * share * 5 < seconds < 1.2 * share * 5
    frames = read_frames(path, FrameSampling().times(0, seconds))
    assert sum(bool((a == b).all()) for a, b in itertools.pairwise(frames)) <= 1


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("fragments.mp4", {"container": {"movflags": "frag_keyframe+empty_moov"}, "gop": 6}),
        ("pieces.mp4", {"container": {"movflags": "frag_every_frame+empty_moov+default_base_moof"}}),
        ("live.webm", {"codec": "libvpx", "container": {"live": "1"}}),
        ("late.mp4", {"offset": 16}),
        ("late.webm", {"offset": 16, "codec": "libvpx"}),
        ("late.ts", {"offset": 16, "codec": "mpeg2video"}),
        ("early.mkv", {"offset": -4}),
        ("plain.flv", {"codec": "flv"}),
    ],
)
def test_streams_without_a_duration_or_with_another_start(name: str, made: dict[str, Any], tmp_path: Path) -> None:
    path = write_steps(tmp_path / name, **made)
    info = probe(path)
    assert (info.duration, info.fps) == (pytest.approx(3.0, abs=0.01), pytest.approx(8.0, abs=0.1))
    assert all_of(path) == list(range(24))


def test_what_an_edit_list_hides_is_not_shown(tmp_path: Path) -> None:
    path = write_steps(tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 12  # after version, flags and the number of entries
    lasts, begins = struct.unpack(">ii", data[place : place + 8])
    data[place : place + 8] = struct.pack(">ii", lasts - 1000, begins + 16384)  # a second in both clocks
    path.write_bytes(data)
    assert probe(path).duration == pytest.approx(2.0, abs=0.01)
    assert all_of(path) == list(range(8, 24))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_that_last_unequally_are_shown_as_long_as_they_last(suffix: str, tmp_path: Path) -> None:
    path = write_steps(tmp_path / f"a.{suffix}", 8, milliseconds=lambda i: 40 * i * i)
    assert 1.96 < probe(path).duration < 2.3
    times = [0.02, 0.1, 0.2, 0.7, 1.0, 1.4, 1.5, 1.95]
    assert [round(s) for s in shades(read_frames(path, times))] == [0, 1, 2, 4, 5, 5, 6, 6]


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4"), ("ts", "mpeg2video")]
)
def test_one_frame_lasts_a_frame(suffix: str, codec: str, tmp_path: Path) -> None:
    path = write_steps(tmp_path / f"a.{suffix}", frames=1, codec=codec)
    assert probe(path).duration == pytest.approx(1 / 8, abs=0.001)
    assert read_frames(path, FrameSampling().times(0, probe(path).duration)).shape == (8, 3, 48, 64)


@pytest.mark.parametrize("hours", [0, 8, -8])
@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_recordings_joined_into_one_are_shown_one_after_the_other(codec: str, hours: int, tmp_path: Path) -> None:
    """The clock of the second starts again, or is hours away."""
    parts = [
        write_steps(tmp_path / f"{k}.ts", 12, codec=codec, offset=8 * 3600 * max(0, late))
        for k, late in enumerate((-hours, hours))
    ]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert probe(path).duration == pytest.approx(3.0, abs=0.01)
    assert all_of(path) == [*range(12), *range(12)]


def write_streams(path: Path, *streams: tuple[str, tuple[int, int], int, Disposition | None]) -> Path:
    """Streams side by side, (codec, size, frames, disposition) each: the i-th shows grey 60 i + 5."""
    with av.open(str(path), "w") as box:
        made = []
        for codec, (width, height), _, disposition in streams:
            made.append(stream := box.add_stream(codec, rate=8))
            stream.width, stream.height = width, height
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            if disposition is not None:
                stream.disposition = disposition.value
        for i in range(24):
            for k, (stream, (_, _, count, _)) in enumerate(zip(made, streams)):
                if i < count:
                    grey = np.full((stream.height, stream.width, 3), 60 * k + 5, np.uint8)
                    frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
                    frame.pts = i
                    box.mux(stream.encode(frame))
        for stream in made:
            box.mux(stream.encode())
    return path


SMALL, LARGE = (64, 48), (160, 120)


@pytest.mark.parametrize(
    ("name", "streams", "video"),
    [
        ("cover last.mp4", [("libx264", SMALL, 24, None), ("mjpeg", LARGE, 1, Disposition.attached_pic)], 0),
        ("cover first.mp4", [("mjpeg", LARGE, 1, Disposition.attached_pic), ("libx264", SMALL, 24, None)], 0),
        ("thumbnail first.mkv", [("mjpeg", LARGE, 1, None), ("libx264", SMALL, 24, None)], 1),
        ("thumbnail first.mov", [("mjpeg", LARGE, 1, None), ("libx264", SMALL, 24, None)], 1),
        ("preview first.mkv", [("libx264", SMALL, 24, None), ("libx264", LARGE, 24, None)], 1),
        ("preview first.ts", [("libx264", SMALL, 24, None), ("libx264", LARGE, 24, None)], 1),
        ("default.mkv", [("libx264", LARGE, 24, None), ("libx264", SMALL, 24, Disposition.default)], 1),
        ("longer.mkv", [("libx264", SMALL, 8, None), ("libx264", SMALL, 24, None)], 1),
    ],
)
def test_the_video_is_the_stream_that_players_show(name: str, streams: Any, video: int, tmp_path: Path) -> None:
    path = write_streams(tmp_path / name, *streams)
    info = probe(path)
    (index,) = [i for i, s in enumerate(streams) if s[2] == 24 and (info.width, info.height) == s[1]][-1:]
    assert info.duration == pytest.approx(3.0, abs=0.01)
    grey = shades(read_frames(path, [0.1, 1.5, 2.9]))
    # the muxer of MP4 writes covers after the streams
    place = next(i for i, s in enumerate(streams) if s[0] == "libx264") if "cover" in name else video
    assert grey == pytest.approx([6 * place + 0.5] * 3, abs=0.3) and index == place


def test_a_picture_alone_is_no_video(tmp_path: Path) -> None:
    """Music with a cover."""
    path = write_streams(
        tmp_path / "song.mp4", ("mjpeg", SMALL, 1, Disposition.attached_pic), ("libx264", SMALL, 0, None)
    )
    for read in (probe, lambda path: read_frames(path, [0.1])):
        with pytest.raises(VideoError, match=r"song\.mp4 (has no video|holds no frame)"):
            read(path)


def test_a_file_that_changes_is_measured_again(tmp_path: Path) -> None:
    path = write_steps(tmp_path / "a.mp4")
    assert probe(path).duration == 3.0
    write_steps(path, frames=12)
    assert probe(path).duration == 1.5
