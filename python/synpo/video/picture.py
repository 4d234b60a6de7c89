"""A decoded frame → the picture a player shows: square pixels, upright, in the size of the video's first frame."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import Any

import numpy as np
from av.video.frame import VideoFrame

MAX_PIXELS = 1 << 26  # of one frame, 8192²; a file that claims more is damaged, or made to fill memory
MAX_RATIO = (
    200  # of the longer side to the shorter; processors of models refuse more, and not every caller names the video
)
STRETCHED = (1.02, 4.0)  # pixels less oblong than this are square to the eye, and more oblong in a damaged header alone


def to_picture(frame: VideoFrame, aspect: Fraction | None, size: tuple[int, int] | None = None) -> np.ndarray:
    """One frame as (H, W, 3) uint8 RGB.

    Args:
        aspect: width of a pixel over its height. Where it is not 1, the shorter side of the pixel is stretched.
        size: (H, W) of the picture; None takes the frame's own.

    Raises ValueError for a frame too large or too oblong to be meant.
    """
    width, height = frame.width, frame.height
    if aspect and STRETCHED[0] < max(aspect, 1 / aspect) < STRETCHED[1]:
        width, height = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
    if width * height > MAX_PIXELS or max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(
            f"its frames are {width}×{height}; expected at most {MAX_PIXELS} pixels, and sides up to {MAX_RATIO} to 1"
        )
    a, b, c, d = _matrix(frame)
    lies = abs(b) + abs(c) > abs(a) + abs(d)  # on its side: rows are shown as columns
    if size is not None:
        height, width = reversed(size) if lies else size
    if (width, height) == (frame.width, frame.height):
        image = frame.to_ndarray(format="rgb24")
    else:
        image = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
    right, down = (c, b) if lies else (a, d)
    if lies:
        image = image.transpose(1, 0, 2)
    return np.ascontiguousarray(image[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1])


def _matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d) of the display matrix: the pixel at (x, y) is shown at (ax + cy, bx + dy), x to the right, y downwards."""
    try:
        found: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # beside it lies side data of a kind that PyAV does not know; it still tells the angle
        turn = round(frame.rotation / 90) % 4
        return ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[turn]
    if found is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(found))
    return a, b, c, d
