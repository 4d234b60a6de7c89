"""A few frames of a video side by side, as a small JPEG for the report."""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image

from synpo.video import VideoError, probe, read_frames, resolve_video

STRIP = 6  # frames
HEIGHT = 120  # pixels at most
GAP = 2


def strip(root: str | os.PathLike[str], video: str) -> bytes | None:
    """Evenly spaced frames of `video`, a path below `root`; None where it cannot be read."""
    try:
        path = resolve_video(Path(root), video)
        seconds = probe(path).duration
        frames = read_frames(path, [(i + 0.5) * seconds / STRIP for i in range(STRIP)])
    except VideoError:
        return None
    height, width = frames.shape[2:]
    if height > HEIGHT:
        height, width = HEIGHT, max(1, round(width * HEIGHT / height))
    sheet = Image.new("RGB", (STRIP * (width + GAP) - GAP, height), "gray")
    for i, frame in enumerate(frames):
        image = Image.fromarray(frame.permute(1, 2, 0).numpy())
        sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS), (i * (width + GAP), 0))
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=90, subsampling=0)
    return data.getvalue()
