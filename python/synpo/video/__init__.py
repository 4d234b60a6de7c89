"""Video files in, frames out.

    files.py      a folder → the videos in it, a record's path → its file
    sampling.py   a stretch of time → the seconds at which frames are taken
    track.py      a file → what its packets tell: when each frame is shown, how long it all takes
    frames.py     a file and seconds → pictures
    picture.py    a decoded frame → what a player shows

Containers promise much that does not hold: a duration that is the sound's, an index of what was never downloaded, times that
were made up. None of it is believed. What counts is which packets are there, and what they decode to. Whatever a file does,
the only error it raises is `VideoError`, with its name.
"""

from synpo.video.files import VIDEO_SUFFIXES, VideoError, list_videos, resolve_video, video_size
from synpo.video.frames import VideoInfo, probe, read_frames
from synpo.video.sampling import FrameSampling, amateur_frames

__all__ = [
    "VIDEO_SUFFIXES",
    "FrameSampling",
    "VideoError",
    "VideoInfo",
    "amateur_frames",
    "list_videos",
    "probe",
    "read_frames",
    "resolve_video",
    "video_size",
]
