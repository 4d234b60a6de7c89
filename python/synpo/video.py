"""Video files in, frames out: probing, the sampling rule and decoding through PyAV.

Frames are picked by time, in one streaming pass from the key frame before the first one wanted. Containers that report no
frame count (WebM) and streams that report no duration are common, so neither is trusted: what counts is what decodes.
"""

from __future__ import annotations

import math
import os
import posixpath
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from torch import Tensor

VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif"})


class VideoError(ValueError):
    """A video that cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video is: `duration` in seconds, `fps` in frames a second, `width` and `height` in pixels as stored."""

    duration: float
    fps: float
    width: int
    height: int


@dataclass(frozen=True)
class FrameSampling:
    """Which frames the model sees: `fps` frames a second of (sub)clip, never fewer than `minimum` nor more than `maximum`."""

    fps: float = 0.5
    minimum: int = 8
    maximum: int = 16

    def __post_init__(self) -> None:
        if not (0 < self.fps < math.inf and 1 <= self.minimum <= self.maximum):
            raise ValueError(f"frames: expected fps > 0 and finite, 1 <= minimum <= maximum, got {self}")

    def times(self, start: float, end: float) -> list[float]:
        """Seconds at which to take frames, evenly spaced over [start, end): the middles of equal parts."""
        if not end > start:
            raise ValueError(f"frames: expected a clip that ends after it starts, got {start} to {end} s")
        count = min(max(round((end - start) * self.fps), self.minimum), self.maximum)
        step = (end - start) / count
        return [start + (i + 0.5) * step for i in range(count)]


def list_videos(root: str | os.PathLike[str]) -> list[str]:
    """Videos below `root` as sorted POSIX paths relative to it.

    Links are followed: who owns the folder put them there, as for videos on another disk. A folder that can be reached in
    several ways is listed once, under its own name if it lies below `root`. Of links that lead nowhere, those with the name
    of a video are listed too, so that their use is an error, and a warning tells of the others.

    Raises:
        VideoError: no such folder, one below it that cannot be read, no video in it, or one whose name is not UTF-8.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise VideoError(f"{folder} is not a folder; --videos takes the folder that holds the video files")

    def barred(error: OSError) -> None:
        raise VideoError(f"{error.filename} cannot be read: {error.strerror}") from error

    found = []
    for path in _files(folder, barred):
        if path.suffix.lower() in VIDEO_SUFFIXES and (path.is_file() or path.is_symlink()):
            found.append(path.relative_to(folder).as_posix())
        elif path.is_symlink() and not path.exists():
            print(
                f"warning: {path} leads to {os.readlink(path)}, where nothing is: no video is taken from there",
                file=sys.stderr,
            )
    found.sort()
    if not found:
        raise VideoError(f"no video below {folder}; looked for {', '.join(sorted(VIDEO_SUFFIXES))}")
    for name in found:
        try:
            name.encode()
        except UnicodeEncodeError as error:  # bytes that are no UTF-8 fit in no record
            raise VideoError(f"{name!r} below {folder} is no UTF-8 name; rename that file") from error
    return found


def _files(root: Path, barred: Callable[[OSError], None]) -> Iterator[Path]:
    """Files below `root` without the hidden ones; links to folders are entered when everything else has been seen."""
    seen: set[str] = set()
    links = [str(root)]
    while links:
        starts, links = sorted(links), []
        for where, folders, names in (step for start in starts for step in os.walk(start, onerror=barred)):
            real = os.path.realpath(where)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            links += [path for name in folders if os.path.islink(path := os.path.join(where, name))]
            yield from (Path(where, name) for name in names if not name.startswith("."))


def resolve_video(root: str | os.PathLike[str], relative: str) -> Path:
    """The file that a record's `video` names. Raises VideoError if the path leaves `root` or is not there.

    The path of a record never leads out of the folder; a link that lies in the folder, which no record can make, may.
    """
    folder = Path(root).resolve()
    inside = posixpath.normpath(relative)
    if inside.startswith(("/", "../")) or inside == "..":
        raise VideoError(
            f"video path {relative!r} leaves the videos folder {folder}; it should be relative to --videos and stay below it"
        )
    path = folder / inside
    if not path.is_file():
        raise VideoError(
            f"video {relative!r} is not in {folder}; --videos should name the folder its path is relative to"
        )
    return path


def _open(path: str | os.PathLike[str]) -> av.container.InputContainer:
    try:
        container = av.open(os.fspath(path))
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"{path} cannot be opened as a video: {error.strerror or error}") from error
    if not container.streams.video:
        container.close()
        raise VideoError(f"{path} has no video stream")
    return container


def _rgb(frame: VideoFrame) -> np.ndarray:
    """One frame as (H, W, 3) uint8, turned upright if the file says it lies on its side."""
    image = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Duration, rate and size of a video. Raises VideoError for a file that is corrupt or has no frame."""
    with _open(path) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or stream.guessed_rate or 25)
        try:
            first = next(container.decode(stream), None)
            if first is None:
                raise VideoError(f"{path} holds no frame")
            if stream.duration and stream.time_base:
                duration = float(stream.duration * stream.time_base)
            elif container.duration:
                duration = container.duration / av.time_base
                if (
                    "matroska" in container.format.name
                ):  # it states where the last frame ends, not how long the video is
                    duration -= (container.start_time or 0) / av.time_base
            else:  # neither says: decode to the end
                last = first.time or 0.0
                for frame in container.decode(stream):
                    last = frame.time if frame.time is not None else last + 1 / fps
                duration = last - (first.time or 0.0) + 1 / fps
        except av.error.FFmpegError as error:
            raise VideoError(f"{path} cannot be decoded: {error}") from error
        return VideoInfo(max(duration, 1 / fps), fps, first.width, first.height)


def read_frames(path: str | os.PathLike[str], times: Sequence[float]) -> Tensor:
    """Decode the frames shown at `times` (ascending seconds from the start of the video).

    A time past the last frame gives the last frame, so a video shorter than its container says still gives len(times) frames.

    Returns:
        uint8 RGB, (len(times), 3, H, W).

    Raises:
        VideoError: the file is corrupt or holds no frame.
    """
    if not times or any(b < a for a, b in zip(times, times[1:])):
        raise ValueError(f"times should be a non-empty ascending sequence of seconds, got {list(times)}")
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        base = float(stream.start_time * stream.time_base) if stream.start_time and stream.time_base else 0.0
        try:
            images: list[np.ndarray] | None = None
            if times[0] > 1 and stream.time_base:
                container.seek(int((base + times[0]) / stream.time_base), stream=stream)
                images = _collect(container, stream, base, times)
                if images is None:
                    container.seek(stream.start_time or 0, stream=stream)
            if images is None:
                images = _collect(container, stream, base, times, from_start=True)
        except av.error.FFmpegError as error:
            raise VideoError(f"{path} cannot be decoded: {error}") from error
    if images is None:
        raise VideoError(f"{path} holds no frame")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _collect(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    base: float,
    times: Sequence[float],
    from_start: bool = False,
) -> list[np.ndarray] | None:
    """The images shown at `times`, decoding from where the container stands.

    None if there is no frame, or if the first one is later than times[0]: seeking overshoots in some containers (MPEG-TS).
    """
    images: list[np.ndarray] = []
    shown: VideoFrame | None = None  # the last frame that starts at or before the next wanted time
    for frame in container.decode(stream):
        start = (frame.time or 0.0) - base
        if shown is None and start > times[0] and not from_start:
            return None
        while shown is not None and len(images) < len(times) and start > times[len(images)]:
            images.append(_rgb(shown))
        if len(images) == len(times):
            return images
        shown = frame
    return None if shown is None else images + [_rgb(shown)] * (len(times) - len(images))


def amateur_frames(frames: Tensor) -> Tensor:
    """The amateur's view for contrastive decoding: ⌈n/3⌉ evenly spaced frames of (n, 3, H, W)."""
    count = -(-len(frames) // 3)
    index = ((torch.arange(count) + 0.5) * len(frames) / count).long()
    return frames[index]
