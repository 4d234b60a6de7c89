"""Small real videos, a captioner and pairs about them."""

from pathlib import Path

import av
import pytest

from devices import DEVICE
from made_videos import write_video
from synpo.config import ModelConfig
from synpo.model.adapter import CaptionModel, load


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.mp4, b/c.mp4 (24 frames of 64×48 at 8 a second), corrupt.mp4 (noise) and empty.mp4 (no frame)."""
    root = tmp_path_factory.mktemp("videos")
    (root / "b").mkdir()
    for name, shade in (("a.mp4", 40), ("b/c.mp4", 160)):
        write_video(root / name, shade, frames=24, width=64)
    (root / "corrupt.mp4").write_bytes(b"\x00\x01 not a video" * 100)
    with av.open(str(root / "empty.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return root


@pytest.fixture(scope="session")
def captioner(tiny_captioner_path: Path) -> CaptionModel:
    return load(ModelConfig(path=str(tiny_captioner_path), device=DEVICE))
