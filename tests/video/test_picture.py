"""What a player shows of a frame: upright, unmirrored, with square pixels, in one size."""

import struct
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from made_videos import shades, write_steps
from synpo.video import FrameSampling, VideoError, probe, read_frames
from synpo.video.picture import to_picture

QUARTERS = np.zeros((48, 64, 3), np.uint8)
QUARTERS[:24, :32], QUARTERS[:24, 32:], QUARTERS[24:, :32], QUARTERS[24:, 32:] = (
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    255,
)


@pytest.fixture(scope="module")
def quarters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red, green, blue and white quarters."""
    path = tmp_path_factory.mktemp("quarters") / "a.mp4"
    with av.open(str(path), "w") as box:
        stream = box.add_stream("libx264", rate=8, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(8):
            box.mux(stream.encode(av.VideoFrame.from_ndarray(QUARTERS, format="rgb24")))
        box.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), QUARTERS),
        ((-1, 0, 0, 1), QUARTERS[:, ::-1]),
        ((1, 0, 0, -1), QUARTERS[::-1]),
        ((-1, 0, 0, -1), QUARTERS[::-1, ::-1]),
        ((0, 1, -1, 0), np.rot90(QUARTERS, -1)),
        ((0, -1, 1, 0), np.rot90(QUARTERS)),
        ((0, 1, 1, 0), QUARTERS.transpose(1, 0, 2)),
        ((0, -1, -1, 0), np.rot90(QUARTERS, 2).transpose(1, 0, 2)),
        ((0, 0, 0, 0), QUARTERS),
    ],
    ids=[
        "as stored",
        "mirrored",
        "flipped",
        "upside down",
        "clockwise",
        "counterclockwise",
        "transposed",
        "across",
        "zero",
    ],
)
def test_display_matrices(matrix: tuple[int, ...], shown: np.ndarray, quarters: Path, tmp_path: Path) -> None:
    data = bytearray(quarters.read_bytes())
    place = data.index(b"tkhd") + 44  # the matrix of a track header of version 0
    old = struct.unpack(">9i", data[place : place + 36])
    assert old[:5] == (65536, 0, 0, 0, 65536)
    a, b, c, d = (65536 * x for x in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, *old[5:])
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    got = read_frames(path, [0.5])[0].permute(1, 2, 0).numpy()
    assert got.shape == shown.shape == (probe(path).height, probe(path).width, 3)
    assert np.abs(got.astype(int) - shown).mean() < 20


def test_side_data_that_pyav_does_not_know_hides_no_rotation() -> None:
    """PyAV lists all side data of a frame or none, and raises where one is of a newer kind."""

    class Newer(SimpleNamespace):
        @property
        def side_data(self) -> Any:
            raise ValueError("35 is not a valid Type")

    image = QUARTERS[:6, :8]
    for angle, shown in ((0, image), (90, np.rot90(image)), (180, np.rot90(image, 2)), (-90, np.rot90(image, -1))):
        frame: Any = Newer(width=8, height=6, rotation=angle, to_ndarray=lambda format: image)
        np.testing.assert_array_equal(to_picture(frame, None), shown)


@pytest.mark.parametrize(
    ("aspect", "size"),
    [
        ("2/1", (48, 128)),
        ("4/3", (48, 85)),
        ("1/2", (96, 64)),
        ("1/1", (48, 64)),
        ("101/100", (48, 64)),
        ("50/1", (48, 64)),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_pixels_are_square(suffix: str, aspect: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = write_steps(tmp_path / f"a.{suffix}", aspect=Fraction(aspect))
    info = probe(path)
    assert (info.height, info.width) == size
    frames = read_frames(path, [0.6, 2.1])
    assert frames.shape[2:] == size
    assert shades(frames) == pytest.approx([4, 16], abs=0.4)


@pytest.mark.parametrize("suffix", ["mkv", "webm"])
def test_a_size_that_changes_is_scaled_to_the_first(suffix: str, tmp_path: Path) -> None:
    """As in a call whose line gets better."""
    path = tmp_path / f"call.{suffix}"
    with av.open(str(path), "w") as box:
        stream = box.add_stream("libvpx", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        number = 0
        for width, height in ((64, 48), (96, 64), (32, 32)):
            coder = av.CodecContext.create("libvpx", "w")
            coder.width, coder.height, coder.pix_fmt, coder.time_base = width, height, "yuv420p", Fraction(1, 8)
            packets = []
            for _ in range(8):
                image = np.full((height, width, 3), 10 * number, np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
                frame.pts, frame.time_base, number = number, Fraction(1, 8), number + 1
                packets += coder.encode(frame)
            for packet in packets + coder.encode(None):
                packet.stream, packet.time_base = stream, Fraction(1, 8)
                box.mux(packet)
    info = probe(path)
    frames = read_frames(path, FrameSampling().times(0, info.duration))
    assert frames.shape == (8, 3, info.height, info.width) == (8, 3, 48, 64)
    assert shades(frames) == pytest.approx([1, 4, 7, 10, 13, 16, 19, 22], abs=0.6)


def test_recordings_of_two_sizes_joined_into_one(tmp_path: Path) -> None:
    sizes = ((64, 48), (112, 64))
    parts = [write_steps(tmp_path / f"{w}.ts", 12, size=(w, h)).read_bytes() for w, h in sizes]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(parts))
    frames = read_frames(path, [(i + 0.5) / 8 for i in range(24)])
    assert frames.shape == (24, 3, 48, 64)
    assert shades(frames) == pytest.approx([*range(12), *range(12)], abs=0.6)


@pytest.mark.parametrize("size", [(402, 2), (1 << 14, 1 << 13)])
def test_frames_that_no_model_can_take_are_refused_by_name(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "odd.gif" if size[1] > 2 else tmp_path / "odd.mp4"
    if size[1] > 2:  # a canvas of 2²⁷ pixels in a hundred bytes
        path = write_steps(path, codec="gif", pixels="rgb8")
        data = bytearray(path.read_bytes())
        data[6:10] = struct.pack("<HH", *size)
        path.write_bytes(data)
    else:
        with av.open(str(path), "w") as box:
            stream = box.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            box.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.zeros((size[1], size[0], 3), np.uint8), format="rgb24"))
            )
            box.mux(stream.encode())
    with pytest.raises(VideoError, match=r"odd\.(gif|mp4)"):
        probe(path)
