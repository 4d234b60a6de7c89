"""Small videos for tests that need real files: with a little content, or with frames that can be told apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor


def write_video(path: Path, shade: int, *, frames: int = 16, rate: int = 8, width: int = 48) -> None:
    """A white bar that falls through a grey picture, `width` × 48, `rate` frames a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, 48, "yuv420p"
        for i in range(frames):
            image = np.full((48, width, 3), shade, dtype=np.uint8)
            image[2 * i : 2 * i + 10, 8:20] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_steps(
    path: Path,
    frames: int = 24,
    rate: int = 8,
    codec: str = "libx264",
    *,
    size: tuple[int, int] = (64, 48),
    offset: int = 0,
    noise: int = 0,
    gop: int | None = None,
    options: Mapping[str, str] | None = None,
    container: Mapping[str, str] | None = None,
    format: str | None = None,
    pixels: str = "yuv420p",
    aspect: Fraction | None = None,
    milliseconds: Callable[[int], int] | None = None,
    sound: float = 0.0,
    title: str = "",
) -> Path:
    """Grey video, `size` pixels wide and high, whose shade grows by 10 a frame, from 0 again after 25.

    Args:
        offset: frames by which it starts late. noise: how far single pixels lie off, so that pictures take up bytes.
        gop: frames from one key frame to the next. options, container: of the encoder and of the muxer.
        milliseconds: when the i-th frame is shown, instead of evenly. sound: seconds of silence beside it.
    """
    grain = np.random.default_rng(0).integers(0, noise + 1, (*size[::-1], 3))
    with av.open(str(path), "w", format=format, options=dict(container or {})) as box:
        if title:
            box.metadata["title"] = title
        stream = box.add_stream(codec, rate=rate, options=dict(options or {}))
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if gop:
            stream.codec_context.gop_size = gop
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        silence = box.add_stream("aac" if path.suffix != ".webm" else "libopus", rate=48000) if sound else None
        if silence is not None:
            silence.layout = "mono"
        if milliseconds:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            image = np.clip(10 * (i % 25) + np.roll(grain, 5 * i, 1), 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i + offset, Fraction(1, rate)
            if milliseconds:
                frame.pts, frame.time_base = milliseconds(i), Fraction(1, 1000)
            box.mux(stream.encode(frame))
        box.mux(stream.encode())
        if silence is not None:
            kind = "s16" if path.suffix == ".webm" else "fltp"
            for k in range(round(sound * 48000 / 960)):
                still = np.zeros((1, 960), np.float32 if kind == "fltp" else np.int16)
                chunk = av.AudioFrame.from_ndarray(still, format=kind, layout="mono")
                chunk.sample_rate, chunk.pts, chunk.time_base = 48000, 960 * k, Fraction(1, 48000)
                box.mux(silence.encode(chunk))
            box.mux(silence.encode())
    return path


def write_unfinished(path: Path) -> Path:
    """An MP4 of which half has come: the index in front, and zeros where the rest should be. It opens, and it does not decode."""
    write_steps(path, noise=60, gop=6, container={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2].ljust(len(data), b"\0"))
    return path


def write_latin(path: Path) -> Path:
    """A video with nothing wrong but a title in Latin-1."""
    write_steps(path, title="cafZ")
    path.write_bytes(path.read_bytes().replace(b"cafZ", b"caf\xe9"))
    return path


def shades(frames: Tensor) -> list[float]:
    """Of which step each frame of such a video is, from its grey."""
    return [round(float(f.float().mean()) / 10, 1) for f in frames]
