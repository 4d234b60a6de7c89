"""Small H.264 files for tests that need real videos and not their content."""

from pathlib import Path

import av
import numpy as np


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
