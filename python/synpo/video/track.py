"""What the packets of a file tell of its video: when each frame is shown, how long it all takes, where decoding can begin.

One pass over the packets, decoding no more than the first frame. Three things are settled here and nowhere else:

- which stream is the video: one that decodes and is no attached picture; of several the one with more than a frame, then the
  one marked as default, then the largest, then the longest;
- whose times count: the presentation times of the packets; where there are none (raw streams), or none that can be true (H.264
  in AVI, a clock that jumps), frames are known by their number, in the order in which they leave the decoder;
- how long it is: from the first frame that decodes to the end of the last whole packet.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from av.video.frame import VideoFrame

from synpo.video.files import VideoError
from synpo.video.picture import MAX_PIXELS, to_picture

NO_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails
NEVER = np.iinfo(np.int64).min  # a time that a packet does not have
NO_TIMES, CLOCK_MAY_JUMP = 0x80, 0x200  # AVFMT_NOTIMESTAMPS and AVFMT_TS_DISCONT, flags of a container format
JUMP = 10.0  # seconds without a packet that mean a jump where the clock may jump; FFmpeg's own threshold
UNORDERED = {
    "h264",
    "hevc",
    "vvc",
}  # where the container holds no times, FFmpeg makes some up, and for these wrong ones
OPTIONS = {"max_pixels": str(MAX_PIXELS)}  # of decoders; given to av.open they crash PyAV 15 where streams show up late


@dataclass(frozen=True, eq=False)
class Packets:
    """The packets of a stream in the order of decoding: int64 (P,) each, times in ticks of its time base.

    `hidden` ones are decoded and not shown, as those before an edit list begins.
    """

    pts: np.ndarray
    dts: np.ndarray
    duration: np.ndarray
    size: np.ndarray
    key: np.ndarray
    hidden: np.ndarray


@dataclass(frozen=True, eq=False)
class Track:
    """The video of a file.

    Attributes:
        stream: its index in the file. packets: its packets, without a broken one at the end.
        counted: whether frames are known by their number, and not by their presentation time.
        marks: (F,) int64 ascending, what each frame is known by.
        starts: (F,) float64 ascending from 0, the second at which each is shown. duration: in seconds, to the end of the last.
        size: height and width of the picture. aspect: width of a pixel over its height, if the file says.
    """

    stream: int
    packets: Packets
    counted: bool
    marks: np.ndarray
    starts: np.ndarray
    duration: float
    size: tuple[int, int]
    aspect: Fraction | None


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever opening, decoding, converting or stacking raises becomes a VideoError that names the file.

    PyAV raises more than FFmpeg's errors: UnicodeDecodeError, ValueError, OverflowError, MemoryError have been seen.
    """
    try:
        yield
    except VideoError:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise VideoError(f"{path} cannot be read as a video: {reason} ({type(error).__name__})") from error


def open_video(path: str | os.PathLike[str]) -> av.container.InputContainer:
    return av.open(os.fspath(path), metadata_errors="replace")


def track_of(path: str | os.PathLike[str]) -> Track:
    """The video of a file; measured once, and again when the file has changed.

    Raises VideoError for a file that is missing, damaged, or holds no frame.
    """
    with naming(path):
        stat = os.stat(path)
        return _measure(Path(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=16)
def _measure(path: Path, size: int, changed: int) -> Track:
    with open_video(path) as container:
        streams = [s for s in container.streams.video if not s.disposition & NO_VIDEO and s.codec_context is not None]
        if not streams:
            others = ", only a picture or what FFmpeg cannot decode" if container.streams.video else ""
            raise VideoError(f"{path} has no video stream{others}")
        packets, firsts, reason = _demux(container, streams)
        tracks = [
            (stream, _track(container, stream, firsts[stream.index], packets[stream.index]))
            for stream in streams
            if stream.index in firsts and len(packets[stream.index].size)
        ]
    if not tracks:
        raise VideoError(f"{path} holds no frame{reason}")
    return max(tracks, key=_rank)[1]


def _rank(both: tuple[av.VideoStream, Track]) -> tuple[bool, bool, int, float]:
    stream, track = both
    default = bool(stream.disposition & Disposition.default)
    return len(track.marks) > 1, default, track.size[0] * track.size[1], track.duration


def _demux(
    container: av.container.InputContainer, streams: Sequence[av.VideoStream]
) -> tuple[dict[int, Packets], dict[int, VideoFrame], str]:
    """By the index of a stream its packets, and the first frame that they decode to; and what went wrong, if anything did."""
    rows: dict[int, list[tuple[int, ...]]] = {s.index: [] for s in streams}
    sound = dict.fromkeys(rows, 0)  # packets up to the last whole one
    firsts: dict[int, VideoFrame] = {}
    reason = ""

    def look(stream: Any, packet: av.Packet | None) -> None:
        nonlocal reason
        try:
            for frame in stream.decode(packet):
                firsts.setdefault(stream.index, frame)
        except av.error.FFmpegError as error:
            reason = f": {error.strerror}"

    for stream in streams:
        stream.codec_context.options = OPTIONS
    try:
        for packet in container.demux(streams):
            if not packet.size:
                if packet.dts is None:  # the end, behind which PyAV may stumble over streams that came up on the way
                    break
                continue
            index = packet.stream.index
            pts, dts = (NEVER if t is None else t for t in (packet.pts, packet.dts))
            rows[index].append((pts, dts, packet.duration or 0, packet.size, packet.is_keyframe, packet.is_discard))
            if not packet.is_corrupt:
                sound[index] = len(rows[index])
            if index not in firsts:
                look(packet.stream, packet)
    except av.error.FFmpegError as error:  # what came before it counts
        reason = f": {error.strerror}"
    for stream in streams:
        if stream.index not in firsts:
            look(stream, None)
    found = {i: np.array(row[: sound[i]], np.int64).reshape(-1, 6) for i, row in rows.items()}
    return {i: Packets(*np.ascontiguousarray(table.T)) for i, table in found.items()}, firsts, reason


def _track(
    container: av.container.InputContainer, stream: av.VideoStream, first: VideoFrame, packets: Packets
) -> Track:
    tick = stream.time_base or Fraction(1, av.time_base)
    flags, names = container.format.flags, container.format.name.split(",")
    jump = JUMP / tick if flags & CLOCK_MAY_JUMP else math.inf
    steady = _is_steady(packets.dts, jump)  # those in the order of decoding never go back
    guessed = flags & NO_TIMES or ("avi" in names and stream.codec_context.name in UNORDERED)
    counted = bool(guessed or not steady or not _is_steady(np.sort(packets.pts), jump) or (packets.pts == NEVER).all())
    shown = packets.hidden == 0
    if not counted:
        shown &= packets.pts >= (first.pts if first.pts in packets.pts else NEVER + 1)
    if not shown.any():
        raise ValueError("none of its frames is ever shown")
    times, length = (packets.dts if counted else packets.pts)[shown], packets.duration[shown]
    usual = _usual(times, length) or max(1, round(1 / (tick * (stream.average_rate or stream.guessed_rate or 25))))
    length = np.where(length > 0, length, usual)
    if not counted:
        times, place = np.unique(times, return_index=True)
        length = length[place]
    elif not steady or NEVER in times:
        times = np.cumsum(length) - length
    span = int(times[-1]) - int(times[0])
    if (span + int(length[-1])) * tick.numerator >= 1 << 53:
        raise ValueError(f"its last frame is {float(span * tick):.3g} s after its first")
    aspect = stream.sample_aspect_ratio
    return Track(
        stream=stream.index,
        packets=packets,
        counted=counted,
        marks=np.arange(len(times)) if counted else times,
        starts=(times - times[0]) * tick.numerator / tick.denominator,
        duration=float((span + int(length[-1])) * tick),
        size=to_picture(first, aspect).shape[:2],
        aspect=aspect,
    )


def _is_steady(times: np.ndarray, jump: float) -> bool:
    """Whether the times that are there go on without a step back, or one of more than `jump`."""
    steps = np.diff(times[times != NEVER])
    return bool(((steps >= 0) & (steps <= jump)).all())


def _usual(times: np.ndarray, length: np.ndarray) -> int:
    """How many ticks a frame is shown as a rule, by what packets say or by the gaps between them; 0 when neither tells."""
    for ticks in (length, np.diff(np.sort(times[times != NEVER]))):
        if (ticks > 0).any():
            return int(np.median(ticks[ticks > 0]))
    return 0
