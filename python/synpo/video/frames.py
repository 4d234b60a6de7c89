"""Seconds → pictures: what is shown at each wanted moment, decoded in one pass or, where that is cheaper, by seeking.

A seek pays when a key frame lies well ahead of the next wanted frame. It is trusted as far as it can be checked: the packets
after it must be those that the pass over the file found there, the first must decode to a key frame of its own time, and each
wanted frame must come out under its own mark. If not, and in files whose frames are known by number alone, all is decoded from
the start. The pictures are the same to the bit either way.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import av
import numpy as np
import torch
from av.video.frame import PictureType, VideoFrame
from torch import Tensor

from synpo.video.files import VideoError
from synpo.video.picture import to_picture
from synpo.video.track import NEVER, OPTIONS, Packets, Track, naming, open_video, track_of

SEEK_PAYS = 16  # packets that need not be decoded, from which a seek is the cheaper way
FEW = 2  # wanted moments that may lie past the end, or miss their frame if they are a quarter at most
NEAR = 2  # frames by which a moment may miss its own: a field or a hidden frame has a packet, and is no picture
END = np.iinfo(np.int64).max  # mark of no frame, after the last
READING = 2  # goes up when `read_frames` gives other pictures of a file than before; what is kept of them is made again
Marked = tuple[int, VideoFrame | None]  # a frame and what it is known by


class _Astray(Exception):
    """A seek that did not lead to the frames that decoding from the start gives."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video is: `duration` in seconds, `fps` in frames a second on average, `width` and `height` in pixels as shown."""

    duration: float
    fps: float
    width: int
    height: int


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Duration, rate and size of a video, as measured: what `read_frames` gives lies within them.

    All packets are read, one frame is decoded. Raises VideoError for a file that is damaged or has no frame.
    """
    track = track_of(path)
    height, width = track.size
    return VideoInfo(track.duration, len(track.marks) / track.duration, width, height)


def read_frames(path: str | os.PathLike[str], times: Sequence[float]) -> Tensor:
    """Decode the frames shown at `times` (ascending seconds from the first frame of the video).

    Frames are as players show them: upright, with square pixels, all in the size of the first. A time past the last frame gives
    the last frame.

    Returns:
        uint8 RGB, (len(times), 3, H, W).

    Raises:
        VideoError: the file is damaged, holds no frame, or more than a few of `times` lie past its end, or in
            what does not decode.
    """
    if not times or any(b < a for a, b in zip(times, times[1:])):
        raise ValueError(f"times should be a non-empty ascending sequence of seconds, got {list(times)}")
    track = track_of(path)
    places = np.maximum(np.searchsorted(track.starts, times, side="right") - 1, 0)
    wanted = track.marks[places].tolist()
    with naming(path):
        try:
            pictures, reason = _decode(path, track, wanted, seeks=not track.counted)
        except _Astray:
            pictures, reason = _decode(path, track, wanted, seeks=False)
        shown = np.searchsorted(track.marks, [pictures[mark][0] for mark in wanted])
        missed = places - shown > NEAR
        late = missed | (np.asarray(times) >= track.duration)
        if late.sum() > FEW or 4 * missed.sum() > len(times):
            first = times[int(late.argmax())]
            raise VideoError(
                f"{path}: {late.sum()} of the {len(times)} wanted frames do not decode, the first of them at {first:.2f} s of "
                f"{track.duration:.2f} s{reason}; the file is cut off or damaged"
            )
        images = torch.empty(len(times), 3, *track.size, dtype=torch.uint8)
        for image, mark, later in zip(
            images, wanted, [*wanted[1:], END]
        ):  # sixteen large pictures fill memory twice else
            picture = pictures[mark] if later == mark else pictures.pop(mark)
            image.copy_(torch.from_numpy(picture[1]).permute(2, 0, 1))
        return images


def _decode(
    path: str | os.PathLike[str], track: Track, wanted: Sequence[int], seeks: bool
) -> tuple[dict[int, tuple[int, np.ndarray]], str]:
    """For each mark in `wanted`, which ascend, the picture of that frame or of the last before it, and its own mark.

    Beside them why no more frames decode, where the end was reached.
    """
    pictures: dict[int, tuple[int, np.ndarray]] = {}
    reason = ""
    with open_video(path) as container:
        stream = container.streams[track.stream]
        stream.thread_type = "AUTO"
        stream.codec_context.options = OPTIONS
        frames, sought, place = _decoded(container, stream, track), False, 0
        newest: Marked = (NEVER, None)
        before: Marked = (NEVER, None)
        for mark in wanted:
            if seeks:
                key, there = _entry(track, mark)
                if key - place > SEEK_PAYS:
                    frames, sought = _decoded(container, stream, track, key), True
                    newest = before = (NEVER, None)
                place = there
            while newest[0] < mark:
                before = newest
                try:
                    newest = next(frames)
                except StopIteration as end:
                    newest, reason = (END, None), end.value
            if newest[0] != mark and sought:
                raise _Astray
            own, frame = newest if newest[0] == mark or before[1] is None else before
            if frame is None:
                raise VideoError(f"{path} holds no frame{reason}")
            if mark not in pictures:
                pictures[mark] = own, to_picture(frame, track.aspect, track.size)
    return pictures, reason


def _entry(track: Track, mark: int) -> tuple[int, int]:
    """Where among the packets decoding can begin to get the frame `mark`, and where its own packet is."""
    pts = track.packets.pts
    place = int(np.flatnonzero(pts == mark)[0])
    keys = np.flatnonzero(
        (track.packets.key[: place + 1] != 0) & (pts[: place + 1] != NEVER) & (pts[: place + 1] <= mark)
    )
    return int(keys[-1]) if len(keys) else 0, place


def _decoded(
    container: av.container.InputContainer, stream: av.VideoStream, track: Track, first: int = 0
) -> Generator[tuple[int, VideoFrame], None, str]:
    """Frames with their marks from the packet `first` on, as far as they decode; returns why no more do.

    What does not decode before the first frame is passed over, as at the start of a recording that was cut anywhere.
    """
    mark, number, reason = NEVER, 0, ""
    for packet in _fed(container, stream, track.packets, first):
        try:
            frames = stream.decode(packet)
        except av.error.FFmpegError as error:
            if first:
                raise _Astray from error
            reason = f": {error.strerror}"
            if number:
                break
            continue
        for frame in frames:
            if first and not number:
                intra = frame.key_frame and frame.pict_type == PictureType.I
                if not intra or frame.pts != track.packets.pts[first]:
                    raise _Astray
            mark = number if track.counted else max(mark, NEVER if frame.pts is None else frame.pts)
            number += 1
            yield mark, frame
    return reason


def _fed(
    container: av.container.InputContainer, stream: av.VideoStream, packets: Packets, first: int
) -> Iterator[av.Packet | None]:
    """The packets from `first` on, and None for the end. Raises _Astray where those after the seek are other ones."""
    at = first
    if first:
        container.seek(int(packets.dts[at] if packets.dts[at] != NEVER else packets.pts[at]), stream=stream)
    for packet in container.demux(stream):
        if not packet.size:
            continue
        same = packet.size == packets.size[at] and packet.pts == packets.pts[at]
        if same or not first:
            yield packet
            at += 1
            if at == len(packets.size):
                break
        elif at > first:
            raise _Astray
    if first and at == first:
        raise _Astray
    yield None
