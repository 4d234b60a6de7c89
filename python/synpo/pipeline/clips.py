"""Videos into clips, clips into frames.

A video is cut into n = clamp(⌊duration / 10 s⌋ + 1, 2, 16) clips of equal length (arXiv 2506.00835): short stretches whose
captions are the evidence a judge checks a caption of the whole video against.
"""

from __future__ import annotations

import os

from torch import Tensor

from synpo.records import Clip, record_id
from synpo.video import FrameSampling, amateur_frames, probe, read_frames, resolve_video, video_size


def clip_count(duration: float, clip_seconds: float = 10.0, max_clips: int = 16) -> int:
    """n = clamp(⌊duration / clip_seconds⌋ + 1, 2, max_clips) for a video of `duration` seconds."""
    if not (clip_seconds > 0 and max_clips >= 2):
        raise ValueError(
            f"expected pairs.clip_seconds > 0 and pairs.max_clips >= 2, got clip_seconds {clip_seconds} and max_clips {max_clips}"
        )
    return min(max(int(duration // clip_seconds) + 1, 2), max_clips)


def split_video(
    root: str | os.PathLike[str], video: str, clip_seconds: float = 10.0, max_clips: int = 16
) -> list[Clip]:
    """The clips of `video` (a path relative to `root`), in order, of equal length.

    Their ids follow from the path, the size of the file and the range: a file that is replaced by another gets new ones.

    Raises:
        VideoError: the file is missing, corrupt, or holds no frame.
    """
    size, duration = video_size(root, video), probe(resolve_video(root, video)).duration
    count = clip_count(duration, clip_seconds, max_clips)
    edges = [duration * i / count for i in range(count + 1)]
    return [
        Clip(record_id("clip", video, size, start, end), video, index, start, end)
        for index, (start, end) in enumerate(zip(edges, edges[1:]))
    ]


def frames_between(root: str | os.PathLike[str], video: str, start: float, end: float, frames: FrameSampling) -> Tensor:
    """Frames of the stretch [start, end) seconds of `video`: uint8 RGB (F, 3, H, W). Raises VideoError."""
    return read_frames(resolve_video(root, video), frames.times(start, end))


def frames_of(root: str | os.PathLike[str], clip: Clip, frames: FrameSampling) -> Tensor:
    """What the model sees of a clip: uint8 RGB (F, 3, H, W). Raises VideoError."""
    return frames_between(root, clip.video, clip.start, clip.end, frames)


__all__ = ["amateur_frames", "clip_count", "frames_between", "frames_of", "split_video"]
